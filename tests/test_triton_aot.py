"""The ahead-of-time gate of the Triton kernels, and the interpreter's copy of dropout's mask."""

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from pyllm import reference
from pyllm.kernels import aot, attention_tiles
from pyllm.kernels.philox import keep_mask

# One variant of each kernel, compiled as kernels/aot.py does; a process of its own, since kernels are interpreted here.
COMPILE_SOME = """
import importlib
from pyllm.kernels import aot

seen = set()
for module in aot.MODULES:
    for variant, kernel, *rest in importlib.import_module(f"pyllm.kernels.{module}").aot_variants("sm_90"):
        if kernel.__name__ not in seen:
            seen.add(kernel.__name__)
            row = aot.compile_variant("sm_90", variant, kernel, *rest)
            print(row.kernel, row.registers, aot.verdict(row))
row = aot.compile_variant("sm_90", variant, kernel, *rest[:2], {"num_warps": 3})
print("broken", row.registers, aot.verdict(row))
"""


def test_kernels_compile_without_a_gpu():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", COMPILE_SOME], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = dict(line.split(" ", 1) for line in result.stdout.splitlines())
    assert "does not compile" in rows.pop("broken")
    assert {"norm_fwd_kernel", "norm_bwd_kernel", "softmax_fwd_kernel", "cross_entropy_fwd_kernel"} <= rows.keys()
    for name, row in rows.items():
        registers, why = row.split(" ", 1)
        assert int(registers) > 0 and why == "None", f"{name}: {why}"


def test_gate_refuses():
    row = aot.Row("kernel", "variant", "sm_120", shared=101_376, registers=255)
    assert aot.verdict(row) is None
    assert "101,377 B of shared memory, sm_120 has 101,376" in aot.verdict(replace(row, shared=101_377))
    assert aot.verdict(replace(row, target="sm_90", shared=101_377)) is None
    assert "spills 8 B" in aot.verdict(replace(row, spills=8))
    assert "only 4 registers" in aot.verdict(replace(row, registers=4))
    assert "does not compile: boom" in aot.verdict(replace(row, error="boom"))


def test_spills_with_a_reason_are_reported(monkeypatch):
    monkeypatch.setattr(aot, "SPILLS", (aot.Allowance("some_.*", "bfloat16 .*", "sm_90", 8, "why"),))
    row = aot.Row("some_kernel", "bfloat16 D=256", "sm_90", registers=255, spills=8)
    assert aot.verdict(row) is None
    assert "| 255 | 8 | ok, spills |" in aot.section([row]) and "up to 8 B: why" in aot.markdown([row])
    for other in ({"spills": 12}, {"kernel": "other_kernel"}, {"variant": "float32 D=256"}, {"target": "sm_80"}):
        assert "spills" in aot.verdict(replace(row, **other))


def test_every_allowance_has_a_reason():
    assert all(one.most > 0 and len(one.why) > 20 for one in aot.SPILLS)


@pytest.mark.parametrize("bad", [{"spills": 4}, {}], ids=["refused", "accepted"])
def test_exit_status_and_table(bad, monkeypatch, tmp_path, capsys):
    row = aot.Row("some_kernel", "bf16 | N=8", "sm_90", shared=1234, registers=40, **bad)
    monkeypatch.setattr(aot, "compile_all", lambda targets, every: iter([row]))
    assert aot.main(["--targets", "sm_90", "--out", str(tmp_path / "docs" / "table.md")]) == len(bad)
    table = (tmp_path / "docs" / "table.md").read_text()
    cell = "spills 4 B of registers per thread" if bad else "ok"
    assert f"| some_kernel | bf16 / N=8 | sm_90 | 1,234 | 40 | {4 if bad else 0} | {cell} |" in table
    assert (cell in capsys.readouterr().err) == bool(bad)
    aot.main(["--targets", "sm_90", "--out", str(tmp_path / "docs" / "table.md"), "--append"])
    assert (tmp_path / "docs" / "table.md").read_text() == table + aot.section([row])


def test_a_table_is_current_of_the_sources_and_without_refusals(monkeypatch, tmp_path):
    table = tmp_path / "table.md"
    row = aot.Row("some_kernel", "bf16", "sm_90", shared=1234, registers=40)

    def is_current(*texts: str) -> bool:
        table.write_text("".join(texts))
        return aot.main(["--current", str(table)]) == 0

    whole = aot.markdown([row]), aot.section([row])
    assert is_current(*whole)
    assert not is_current(whole[0])  # of one Triton
    assert not is_current(whole[0], aot.section([replace(row, spills=4)]))
    monkeypatch.setattr(aot, "fingerprint", lambda: "of other sources")
    assert not is_current(*whole)


def test_a_sample_of_the_variants(monkeypatch):
    compiled = []
    monkeypatch.setattr(aot, "compile_variant", lambda target, *variant: compiled.append(variant[0]))
    module = SimpleNamespace(aot_variants=lambda target: ((f"bfloat16 N={n}",) for n in range(7)))
    monkeypatch.setattr(aot.importlib, "import_module", lambda name: module)
    aot._compile_module(("rotary", "sm_90", 3))
    assert compiled == ["bfloat16 N=0", "bfloat16 N=3", "bfloat16 N=6"]


def test_resources_of_amd_code():
    asm = ".agpr_count: 4\n.vgpr_count:     58\n.vgpr_spill_count: 3\n"
    assert aot._resources({"amdgcn": asm}) == (58, 12)


@triton.jit
def keep_kernel(p_rng, p_keep, head, row, first_col, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    o_rows = row + tl.arange(0, BLOCK_M)
    keep = keep_mask(tl.load(p_rng), tl.load(p_rng + 1), head, o_rows, first_col, threshold, BLOCK_N)
    tl.store(p_keep + tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], keep.to(tl.int8))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(
    "block, first_col", [((8, 16), 64), ((8, 16), 80), ((16, 32), 64), ((1, 64), 64), ((32, 256), 64)], ids=str
)
def test_keep_mask_is_the_reference(block, first_col, p):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rng = torch.tensor([-(2**62) - 12345, 2**40 + 2**32 - 1], device=device)
    head, row = 3, 17
    keep = torch.full(block, 7, dtype=torch.int8, device=device)
    threshold = reference.dropout_threshold(p)
    keep_kernel[(1,)](rng, keep, head, row, first_col, threshold, BLOCK_M=block[0], BLOCK_N=block[1])
    expected = reference.dropout_keep(rng, p, head + 1, row + block[0], first_col + block[1])
    assert torch.equal(keep, expected[head, row:, first_col:].to(torch.int8))


def test_no_tile_of_hopper_transposes_a_square_accumulator():
    """Triton from 3.4 on computed dot(trans(...)) of 64 x 64 with 8 warps wrongly there; outer() swaps where N > M."""
    for width in attention_tiles.TILES["sm_90"]["key"]:
        for tile in width.split():
            assert not tile.startswith("64x64x8"), tile


def test_widths_of_heads():
    cases = {(2, 16): 0, (2, 64): 0, (2, 128): 1, (2, 256): 2, (4, 64): 3, (8, 32): 3, (4, 128): 4, (8, 64): 4}
    for (itemsize, block_d), width in cases.items():
        fitting = [attention_tiles.fits(name, itemsize, block_d) for name in attention_tiles.WIDTHS[:-1]]
        assert [*fitting, True].index(True) == width
    for target, passes in attention_tiles.TILES.items():
        assert all(len(widths) == len(attention_tiles.WIDTHS) - 1 for widths in passes.values()), target


def test_tiles_that_a_machine_measured_come_first(monkeypatch, tmp_path):
    def tile(target="sm_90", load="busy"):
        attention_tiles.tuned.cache_clear()
        return attention_tiles.tiles("fwd", target, itemsize=2, block_d=128, load=load)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shipped = tile(), tile(load="plain"), tile("sm_86")
    file = tmp_path / "pyllm" / "attention_tiles.json"
    file.parent.mkdir()
    file.write_text('{"sm_90 fwd 16-bit-128 busy": "64x16x2x5", "sm_86 fwd 16-bit-128 busy": "16x32x1x2"}')
    measured = {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 2, "num_stages": 5, "TMA": False}
    assert tile() == measured != shipped[0]
    assert tile(load="plain") == shipped[1]
    assert tile("sm_86")["BLOCK_M"] == 16 != shipped[2]["BLOCK_M"]
    for wrong in ("[]", '{"sm_90 fwd busy": "64x16x2x5"}', '{"sm_90 fwd 16-bit-128 busy": "64x16"}'):
        file.write_text(wrong)
        with pytest.raises(ValueError, match=r"attention_tiles\.json: must"):
            tile()
    monkeypatch.undo()
    attention_tiles.tuned.cache_clear()
