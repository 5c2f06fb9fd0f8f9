"""pyllm tune --emit: which backend wins, for which sizes, and that the table which it writes is followed."""

import math

import pytest
import torch

import pyllm
from pyllm import backend, cli, dispatch
from pyllm.benchmarks import defaults
from pyllm.benchmarks.catalogue import BENCHMARKS
from pyllm.benchmarks.timing import Timing
from pyllm.dispatch import Row


def times(spread=0.05, **ratio):
    return Timing(dict.fromkeys(ratio, 1.0), ratio, spread)


@pytest.mark.parametrize(
    "measured, decided",
    [
        ([], None),
        ([times(native=1.0)], None),
        ([times(native=1.0, torch=1.2), times(native=1.0, torch=1.5)], ("torch", 1.2, "native")),
        ([times(native=1.0, torch=1.2), times(native=1.0)], ("torch", 1.2, "native")),
        ([times(native=1.0, torch=1.2), times(native=1.0, torch=0.8)], ("native", 1 / 1.2, "torch")),
        ([times(native=1.0, torch=1.2, spread=0.3)], ("native", 1 / 1.2, "torch")),
        ([times(native=1.0, triton=1.3, torch=1.2)], ("triton", 1.3, "native")),
        ([times(native=1.0, triton=0.5, torch=0.8)], ("native", 1 / 0.8, "torch")),
        ([times(torch=1.0, triton=3.0), times(native=1.0, torch=0.5)], ("native", 2.0, "torch")),
    ],
)
def test_another_backend_wins_where_it_is_faster_in_every_case_beyond_the_noise(measured, decided):
    result = defaults.decide(("native", "triton", "torch"), measured)
    assert result == (decided and (decided[0], pytest.approx(decided[1]), decided[2]))


def test_a_shape_stands_for_the_sizes_around_it():
    shapes = [(4, 16), (256, 16), (1, 64), (16, 64), (2**20, 64)]
    assert list(defaults.regions(shapes, 2**16)) == [
        ((4, 16), 0, 0),
        ((256, 16), 0, 512),
        ((1, 64), 32, 0),
        ((16, 64), 32, 256),
    ]


def row(name: str, width: int, elements: int, ratio: float = 1.0) -> Row:
    return Row("a GPU", "softmax", "both", "float32", width, elements, name, ratio, "rival", "here")


def test_neighbouring_sizes_of_one_backend_are_one_row():
    rows = [row("native", 0, 0, 1.5), row("native", 0, 9, 1.2), row("torch", 0, 99), row("torch", 64, 0)]
    assert defaults.merged(rows) == [row("native", 0, 0, 1.2), *rows[2:]]


def test_what_is_measured_anew_takes_the_place_of_the_old():
    old = [row("native", 0, 0), row("torch", 0, 9), Row("a CPU", *list(vars(row("torch", 0, 0)).values())[1:])]
    assert defaults.replaced(old, [row("triton", 0, 0)]) == [old[2], row("triton", 0, 0)]


@pytest.mark.parametrize("name", defaults.OPERATORS)
def test_the_grid_is_of_shapes_that_the_benchmark_takes(name):
    benchmark = BENCHMARKS[name]
    assert all(len(shape) == len(benchmark.tiny) and math.prod(shape) for shape in benchmark.grid)
    for most in defaults.MOST_ELEMENTS.values():
        assert len(list(defaults.regions(benchmark.grid, most))) >= 4


def test_the_table_that_is_written_is_followed(tmp_path, monkeypatch, capsys):
    path = tmp_path / "table.csv"
    dispatch.write(path, [row("triton", 0, 0)])
    arguments = ["tune", "--emit", str(path), "--device", "cpu", "--quick", "--op", "softmax", "--dtype", "bf16"]
    monkeypatch.setattr(defaults, "decide", lambda _, times: ("torch", min(times[0].seconds.values()), "native"))
    assert cli.main(arguments) == 0
    assert "softmax bf16 both" in capsys.readouterr().out
    table = dispatch.read(path)
    assert row("triton", 0, 0) in table
    written = [r for r in table if r.device != "a GPU"]
    assert {r.direction for r in written} == {"forward", "both"}
    assert all(r.dtype == "bfloat16" and r.ratio >= 0 and "pyllm" in r.source for r in written)
    monkeypatch.setattr(dispatch, "table", lambda: dispatch.read(path))
    monkeypatch.setattr(backend, "_plans", {})
    (choice,) = pyllm.explain(pyllm.ops.softmax, torch.randn(5, 9, dtype=torch.bfloat16))
    assert choice.backend == "torch" and choice.reason.startswith("measured on")


def test_wrong_numbers_are_left_out_and_told(monkeypatch, capsys):
    from pyllm.ops.softmax import SOFTMAX

    wrong = backend.Implementation(lambda x, *options: 1.01 * torch.softmax(x, -1))
    monkeypatch.setitem(SOFTMAX.implementations, "torch", wrong)
    found = defaults.rows(BENCHMARKS["softmax"], "fp16", "forward", "cpu", cli.wide_console(), quick=True)
    assert found == [] and "on torch is left out, its numbers are wrong: output 0" in capsys.readouterr().out


def test_an_unknown_operator_is_an_error(capsys):
    with pytest.raises(SystemExit):
        cli.main(["tune", "--emit", "x.csv", "--op", "conv"])
    assert "unknown operator 'conv'" in capsys.readouterr().err
