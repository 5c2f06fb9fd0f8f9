"""The gate of `make check-cuda`: what it reads from the compiler's output, and what it refuses."""

import importlib.util
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

FILE = Path(__file__).parent.parent / "csrc" / "cuda" / "check.py"
specification = importlib.util.spec_from_file_location("check_cuda", FILE)
check_cuda = importlib.util.module_from_spec(specification)
sys.modules["check_cuda"] = check_cuda
specification.loader.exec_module(check_cuda)

TABLE = {("attention_forward", 64): 32768}

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
    return check_cuda.parse(RESOURCES.replace("STACK_BYTES", str(stack)), SASS, {})


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
    assert check_cuda.verdict(replace(row, stores=0)) == "has no 128-bit stores"
    assert check_cuda.verdict(replace(row, loads=0)) == "has no 128-bit loads"
    assert check_cuda.verdict(replace(row, kernel="column_sum", loads=0)) is None
    assert "only 4 registers" in check_cuda.verdict(replace(row, registers=4))


def attention(dim: int = 64, body: str = "", kernel: str = "17attention_forward"):
    """The row of a kernel of tensor cores, whose loop is from 0x100 to 0x150."""
    symbol = f"_ZN5pyllm4cuda{kernel}I6__halfLi{dim}ELb1EEEvNS0_16AttentionForwardE"
    loop = (
        body
        or """
        /*0100*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR8][R4.64] ;  /* 0x0000000c04007986 */
        /*0110*/                   LDSM.16.M88.4 R8, [R3] ;                      /* 0x0000000c04007986 */
        /*0120*/                   HMMA.16816.F32 R4, R8, R12, R4 ;              /* 0x0000000c04007986 */"""
    )
    sass = f"""
\tcode for sm_80
\t\tFunction : {symbol}
        /*0030*/              @!P6 BRA 0x200 ;                             /* 0x000000000038e947 */
{loop}
        /*0150*/               @P0 BRA 0x100 ;                             /* 0xfffffffc00fc8947 */
        /*0160*/                   EXIT ;                                  /* 0x000000000000794d */
        /*0170*/                   BRA 0x170 ;                             /* 0xfffffffc00fc7947 */
"""
    resources = f"""
arch = sm_80
 Function {symbol}:
  REG:128 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:520
"""
    (row,) = check_cuda.parse(resources, sass, TABLE)
    return row


def test_attention_is_on_tensor_cores():
    row = attention()
    assert (row.kernel, row.dtypes, row.head_dim, row.dynamic) == ("attention_forward", "fp16", 64, 32768)
    assert (row.products, row.copies, row.matrices) == (1, 1, 1) and check_cuda.verdict(row) is None
    assert attention(96).dynamic == 0 and "cuda/shared_memory.h does not tell" in check_cuda.verdict(attention(96))
    assert "more than some devices have" in check_cuda.verdict(replace(row, dynamic=(99 << 10) + 1))
    assert check_cuda.verdict(replace(row, dynamic=99 << 10)) is None


@pytest.mark.parametrize("gone, message", [("HMMA", "tensor cores"), ("LDGSTS", "asynchronous"), ("LDSM", "matrices")])
def test_planted_loops_without_what_makes_them_fast_are_refused(gone, message):
    loop = """
        /*00f0*/                   {gone} R8, R4 ;
        /*0100*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR8][R4.64] ;
        /*0110*/                   LDSM.16.M88.4 R8, [R3] ;
        /*0120*/                   HMMA.16816.F32 R4, R8, R12, R4 ;"""
    head, _, rest = loop.partition("{gone}")
    elsewhere = f"{head}{gone}{rest.replace(gone, 'NOP')}"  # before the loop only
    assert message in check_cuda.verdict(attention(body=elsewhere))
    assert check_cuda.verdict(attention(body=loop.format(gone=gone))) is None


def test_only_attention_of_large_head_dims_may_spill():
    spilling = replace(attention(), stack=8)
    assert "spills" in check_cuda.verdict(spilling)
    assert "spills" in check_cuda.verdict(replace(spilling, head_dim=128))
    assert check_cuda.verdict(replace(spilling, head_dim=192)) is None
    decode = replace(spilling, kernel="attention_decode_split", head_dim=256, loads=1, stores=1)
    assert check_cuda.verdict(replace(decode, kernel="attention_decode_append", stack=0, loads=0)) is None
    assert "spills" in check_cuda.verdict(decode) and check_cuda.verdict(replace(decode, stack=0)) is None


def test_a_line_is_the_worst_of_its_instances():
    row, other = parsed()
    instance = replace(row, registers=99, stack=8, loads=7, stores=0)
    line, _, wide = check_cuda.worst([row, other, replace(row, head_dim=64), instance])
    assert wide.head_dim == 64
    assert (line.registers, line.stack, line.loads, line.stores, line.instances) == (99, 8, 1, 0, 2)


def test_a_call_without_its_instance_is_found(tmp_path, monkeypatch):
    template = "template <int D> void run(); void go() { run<64>(); } template <> void run<32>() {}"
    source = f"namespace pyllm::cuda {{ {template} }}"
    library = tmp_path / "library.so"
    command = ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
    subprocess.run(command, input=source, text=True, check=True)
    monkeypatch.setattr(check_cuda, "LIBRARY", library)
    assert check_cuda.without_instance() == ["void pyllm::cuda::run<64>()"]


def test_a_unit_for_each_head_dim():
    instances = runpy.run_path(str(FILE.parent / "instances.py"))["instances"]
    units = instances((32, 256))
    assert next(iter(units)).endswith("_256") and len(units) == len(set(units.values())) > 1
    source = units["attention_decode_split_float_bf16_f16_32"]
    assert source.startswith('#include "cuda/attention_decode_split.cuh"\n')
    assert source.count("\ntemplate void decode_split<") == 3 and "decode_split<bf16, 32>(" in source
    assert set(units) < set(instances())


@pytest.mark.parametrize("stack, missing", [(0, False), (16, False), (0, True)])
def test_exit_status_and_table(stack, missing, monkeypatch, tmp_path, capsys):
    resources, sass = RESOURCES.replace("STACK_BYTES", str(stack)), SASS.replace("STL [R1]", "STG.E.128 [R2.64]")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    monkeypatch.delenv("PYLLM_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(check_cuda, "ARCHITECTURES", ("sm_80", "sm_90a", "sm_100a")[: 2 + missing])
    monkeypatch.setattr(check_cuda, "nvcc_folder", lambda: tmp_path)
    monkeypatch.setattr(check_cuda, "build", lambda nvcc: None)
    monkeypatch.setattr(check_cuda, "cuobjdump", lambda option: sass if option == "-sass" else resources)
    monkeypatch.setattr(check_cuda, "dynamic_shared", dict)
    monkeypatch.setattr(check_cuda, "without_instance", list)
    table = tmp_path / "table.md"
    assert check_cuda.main(["--out", str(table)]) == int(bool(stack) or missing)
    assert f"| norm_forward_held | bf16 fp32 |  | sm_80 | 1 | 64 | {stack} | 0 |  | 1 | 1 |" in table.read_text()
    told = capsys.readouterr().err
    assert ("sm_80: spills" in told) == bool(stack) and ("sm_100a was not compiled" in told) == missing
    written = table.read_text()
    assert check_cuda.main(["--current", str(table)]) == 0
    monkeypatch.setenv("PYLLM_CUDA_ARCHS", "100a" if missing else "90a,80")
    table.write_text("of other sources")
    assert check_cuda.main(["--out", str(table)]) == int(bool(stack) or missing)
    assert table.read_text() == "of other sources" != written and check_cuda.main(["--current", str(table)]) == 1


def test_the_fingerprint_is_of_every_source(tmp_path):
    found = set()
    for name in ("setup.py", "csrc/dtype.h", "csrc/cuda/norm.cu", "csrc/cuda/norm.cuh", "csrc/cuda/check.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "setup.py").touch()
        for text in ("", "a", "b"):
            (tmp_path / name).write_text(text)
            found.add(check_cuda.fingerprint(tmp_path))
    assert len(found) == 5 * 3
