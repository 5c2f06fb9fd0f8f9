"""pyllm tune: the fastest tile that is right is chosen and written where the launchers look. Times are made up here."""

import json
from pathlib import Path

import pytest
import torch

from pyllm import cli
from pyllm.benchmarks import tune
from pyllm.kernels import attention_tiles

ENTRY = tune.Entry("sm_90", "fwd", "16-bit-64", "plain")


@pytest.fixture
def tiles_of_a_gpu(monkeypatch, tmp_path):
    """Lookups go as on an sm_90 with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    attention_tiles.tuned.cache_clear()
    yield lambda: attention_tiles.tiles("fwd", "sm_90", 2, 64, "plain")
    attention_tiles.tuned.cache_clear()


def _tuned(monkeypatch, lookup, seconds, result):
    """What `best` chooses where seconds(tile) and result(tile) are those of the tile that a launcher would take."""

    def call():
        return (torch.tensor(result(lookup())),)

    monkeypatch.setattr(tune.Entry, "call", lambda self, device: call)
    return tune.best(ENTRY, "cpu", lambda call: seconds(lookup()), (MemoryError,))


def test_the_fastest_right_tile_that_fits_is_chosen(monkeypatch, tiles_of_a_gpu):
    def seconds(tile):
        return 1.0 if tile["BLOCK_M"] == 128 else 0.5 / tile["BLOCK_N"]

    def result(tile):
        if tile["num_warps"] == 8 and tile["BLOCK_M"] == 64:
            raise MemoryError
        return 1.0 if tile["BLOCK_N"] < 128 or tile["BLOCK_M"] == 128 else 2.0

    tile, ratio = _tuned(monkeypatch, tiles_of_a_gpu, seconds, result)
    m, n, warps, _ = map(int, tile.removesuffix("xtma").split("x"))
    assert (n, m != 128) == (64, True) and not (m == 64 and warps == 8)
    assert ratio == pytest.approx(1.0 / (0.5 / 64))
    assert attention_tiles.tuned() == {}, "a trial stays behind"


def test_the_shipped_tile_stays_where_none_is_faster(monkeypatch, tiles_of_a_gpu):
    assert _tuned(monkeypatch, tiles_of_a_gpu, lambda tile: 1.0, lambda tile: 1.0) == (None, 1.0)


def test_what_was_found_is_written_and_read(tiles_of_a_gpu):
    before = tiles_of_a_gpu()
    for text, tma in (("32x64x4x2", False), ("32x64x4x2xtma", True)):
        path = tune.save({str(ENTRY): text})
        attention_tiles.tuned.cache_clear()  # as another process reads it
        assert json.loads(Path(path).read_text()) == {str(ENTRY): text}
        after = tiles_of_a_gpu()
        assert after == {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2, "TMA": tma} != before


@pytest.mark.parametrize("entry", tune.entries("sm_90"), ids=str)
def test_every_entry_has_candidates_and_a_name_that_the_cache_takes(entry, tiles_of_a_gpu):
    candidates = list(entry.candidates())
    assert len(candidates) == len(set(candidates)) > 10
    tune.save({str(entry): candidates[0]})
    attention_tiles.tuned.cache_clear()
    assert attention_tiles.tuned()[str(entry)] == candidates[0]


@pytest.mark.parametrize("step", ["fwd", "key", "query", "decode"])
def test_calls_compute(step, monkeypatch):
    monkeypatch.setattr(tune, "BATCH", 1)
    monkeypatch.setattr(tune, "HEADS", 2)
    for load in attention_tiles.LOADS:
        with tune.use_backend("triton" if torch.cuda.is_available() else "reference"):
            results = tune.Entry("sm_90", step, "32-bit-64", load).call("cpu", 32)()
        assert all(t.isfinite().all() for t in results)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune"]) == 1
    assert "tuned on a GPU" in capsys.readouterr().out


def test_named_tiles_alone_are_tried_and_none_after_the_time(monkeypatch, tiles_of_a_gpu):
    """Of those that are named: the fastest. Of no time: none."""

    def call():
        return (torch.tensor(1.0),)

    def seconds(_):
        tile = tiles_of_a_gpu()
        tried.append(tile["BLOCK_M"])
        return 1.0 / tile["BLOCK_M"] if tile["BLOCK_M"] < 128 else 1.0

    monkeypatch.setattr(tune.Entry, "call", lambda self, device: call)
    tried = []
    named = ["32x64x4x2", "64x64x4x2"]
    assert tune.best(ENTRY, "cpu", seconds, (), named)[0] == "64x64x4x2"
    assert tried[3:] == [32, 64]
    tried.clear()
    assert tune.best(ENTRY, "cpu", seconds, (), named, end=0.0) == (None, 1.0) and tried == [128] * 3


@pytest.mark.parametrize("entry", [*tune.entries("sm_80"), *tune.entries("sm_90")], ids=str)
def test_a_few_tiles_are_known_for_every_entry(entry):
    few = entry.few()
    assert 2 <= len(few) <= 8 and len(set(few)) == len(few) and set(few) <= set(entry.candidates())


def test_tiles_by_name(capsys):
    with pytest.raises(SystemExit):
        cli.main(["tune", "--candidates", "64x128"])
    assert "'64x128': expected a tile as in 64x128x8x3" in capsys.readouterr().err
