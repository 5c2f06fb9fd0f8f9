"""Attention in bf16 on every instruction set: products of pairs are another way than products in fp32."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from amx_model.build import build, why_not

HERE = Path(__file__).parent


def check_on(isa: str, *library: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(HERE / "attention_isa.py"), *library]
    return subprocess.run(command, env={**os.environ, "PYLLM_CPU_ISA": isa}, capture_output=True, text=True)


@pytest.mark.parametrize(
    "isa", [*(pytest.param(isa, marks=pytest.mark.slow) for isa in ("portable", "avx2", "avx512")), "avx512bf16", "amx"]
)
def test_bf16_within_budget(isa):
    pytest.importorskip("pyllm._C")
    result = check_on(isa)
    if f"this processor has no {isa}" in result.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert result.stdout == "within budget\n", result.stderr


@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
def test_bf16_within_budget_on_a_model_of_amx():
    if importlib.import_module("pyllm._C").cpu_isa() not in ("avx512bf16", "amx"):
        pytest.skip("the model stands for the tiles; the rest of the kernels needs AVX-512-BF16")
    result = check_on("amx", str(build()))
    assert result.stdout == "within budget\n", result.stderr
