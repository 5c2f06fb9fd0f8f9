"""The CUDA kernels of attention, executed on the host model: see docs/cuda_host.md."""

import dataclasses

import pytest
import test_attention
import test_attention_features
import torch
from attention_case import BOTTOM, CAUSAL, DROPOUT, Case
from cuda_attention import AttentionKernels
from cuda_host.build import HostModelError, why_not

import pyllm
from pyllm.ops.attention import ATTENTION, _on
from pyllm.testing import check

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"the host model cannot be built: {why_not()}")

HOST = ("cuda_host", "cpu")  # what test_attention takes as a target
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def one_thread():
    """The model has one; PyTorch's in each worker of the tests would but wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def kernels(monkeypatch) -> AttentionKernels:
    """The kernels, which attention runs on as its backend "cuda_host"."""
    kernels = AttentionKernels.built()
    monkeypatch.setattr(pyllm.backend, "BACKENDS", (*pyllm.backend.BACKENDS, "cuda_host"))
    monkeypatch.setitem(ATTENTION.implementations, "cuda_host", _on(kernels.fwd, kernels.bwd))
    return kernels


def served(case: Case) -> Case:
    """The case with a head_dim and a layout that the kernels take."""
    layout = "bshd" if case.layout == "bhds" else case.layout
    return dataclasses.replace(case, dim=-(-case.dim // 8) * 8, layout=layout)


@pytest.mark.parametrize(
    "case, dtype",
    [(served(c), DTYPES[i % 2]) for i, c in enumerate(test_attention.CASES)],
    ids=lambda x: x.name if isinstance(x, Case) else str(x),
)
def test_cases(kernels, case, dtype):
    check(case.call, case.inputs(dtype, "cpu"), "cuda_host")
