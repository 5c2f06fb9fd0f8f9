"""The gate of `make check-cuda`: what it reads from the compiler's output, and what it refuses."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

FILE = Path(__file__).parent.parent / "csrc" / "cuda" / "check.py"
specification = importlib.util.spec_from_file_location("check_cuda", FILE)
check_cuda = importlib.util.module_from_spec(specification)
sys.modules["check_cuda"] = check_cuda
specification.loader.exec_module(check_cuda)

SYMBOL = "_ZN5pyllm4cuda17norm_forward_heldI13__nv_bfloat16fLb1ELb0EEEvNS0_11NormForwardE"

RESOURCES = f"""
Fatbin elf code:
================
arch = sm_80
host = linux

Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function {SYMBOL}:
  REG:64 STACK:STACK_BYTES SHARED:0 LOCAL:0 CONSTANT[0]:520 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a
host = linux

Resource usage:
 Function {SYMBOL}:
  REG:72 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:712 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin ptx code:
================
arch = sm_100
"""

SASS = f"""
\tcode for sm_80
\t\tFunction : {SYMBOL}
        /*0100*/                   LDG.E.128.CONSTANT R12, [R18.64] ;      /* 0x0000000812127981 */
        /*0110*/                   LDG.E.U16.CONSTANT R3, [R18.64] ;       /* 0x0000000812037981 */
        /*0120*/                   STG.E.128 [R4.64], R12 ;                /* 0x0000000c04007986 */

\tcode for sm_90a
\t\tFunction : {SYMBOL}
        /*0100*/                   LDG.E.128.STRONG.SM R12, desc[UR8][R18.64] ;
        /*0110*/                   LDG.E.128.CONSTANT R16, desc[UR8][R18.64+0x10] ;
        /*0120*/                   STL [R1], R12 ;
"""


def parsed(stack: int = 0):
    return check_cuda.parse(RESOURCES.replace("STACK_BYTES", str(stack)), SASS)


def test_what_is_read():
    ampere, hopper = parsed()
    assert (ampere.kernel, ampere.dtypes) == (hopper.kernel, hopper.dtypes) == ("norm_forward_held", "bf16 fp32")

    def numbers(row):
        return row.architecture, row.registers, row.shared, row.loads, row.stores

    assert numbers(ampere) == ("sm_80", 64, 0, 1, 1)
    assert numbers(hopper) == ("sm_90a", 72, 1024, 2, 0)


def test_a_planted_spill_is_refused():
    clean, local_store = parsed()
    assert check_cuda.verdict(clean) is None
    assert "1 accesses to it" in check_cuda.verdict(local_store)
    framed, _ = parsed(stack=16)
    assert "spills: 16 B of local memory" in check_cuda.verdict(framed)


def test_what_else_is_refused():
    row, _ = parsed()
    assert "no 128-bit" in check_cuda.verdict(replace(row, stores=0))
    assert "no 128-bit" in check_cuda.verdict(replace(row, loads=0))
    assert check_cuda.verdict(replace(row, kernel="column_sum", loads=0)) is None
    assert "only 4 registers" in check_cuda.verdict(replace(row, registers=4))


def test_a_line_is_the_worst_of_its_instances():
    row, other = parsed()
    instance = replace(row, registers=99, stack=8, loads=7, stores=0)
    (line, _) = check_cuda.worst([row, other, instance])
    assert (line.registers, line.stack, line.loads, line.stores, line.instances) == (99, 8, 1, 0, 2)


@pytest.mark.parametrize("stack, missing", [(0, False), (16, False), (0, True)])
def test_exit_status_and_table(stack, missing, monkeypatch, tmp_path, capsys):
    resources, sass = RESOURCES.replace("STACK_BYTES", str(stack)), SASS.replace("STL [R1]", "STG.E.128 [R2.64]")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(check_cuda, "ARCHITECTURES", ("sm_80", "sm_90a", "sm_100a")[: 2 + missing])
    monkeypatch.setattr(check_cuda, "nvcc_folder", lambda: tmp_path)
    monkeypatch.setattr(check_cuda, "build", lambda nvcc: None)
    monkeypatch.setattr(check_cuda, "cuobjdump", lambda option: sass if option == "-sass" else resources)
    table = tmp_path / "table.md"
    assert check_cuda.main(["--out", str(table)]) == int(bool(stack) or missing)
    assert f"| norm_forward_held | bf16 fp32 | sm_80 | 1 | 64 | {stack} | 0 | 1 | 1 |" in table.read_text()
    told = capsys.readouterr().err
    assert ("sm_80: spills" in told) == bool(stack) and ("sm_100a was not compiled" in told) == missing
