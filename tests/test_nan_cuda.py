"""NaN and infinity in the CUDA kernels, executed on the host model: as the other backends, see docs/cuda_host.md."""

import pytest
import test_nan_attention
import test_nan_rows
import torch
from cuda_attention import AttentionKernels
from cuda_decode import DecodeKernels
from cuda_host.build import why_not
from cuda_rows import RowKernels
from nan_case import INF, NAN
from test_cuda_rows import MAKE, PLAIN, SOFTMAXES

import pyllm
from pyllm.backend import Implementation
from pyllm.ops.attention import ATTENTION, _on
from pyllm.ops.attention_decode import ATTENTION_DECODE

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=f"the host model cannot be built: {why_not()}"),
    pytest.mark.usefixtures("one_thread"),
]

HOST = ("cuda_host", "cpu")


@pytest.fixture(autouse=True)
def kernels(monkeypatch) -> DecodeKernels:
    """All kernels as the backend "cuda_host"; decoding's may be changed."""
    attention, rows, decode = AttentionKernels.built(), RowKernels.built(), DecodeKernels.built()
    monkeypatch.setattr(pyllm.backend, "BACKENDS", (*pyllm.backend.BACKENDS, "cuda_host"))
    monkeypatch.setitem(ATTENTION.implementations, "cuda_host", _on(attention.fwd, attention.bwd))
    monkeypatch.setitem(ATTENTION_DECODE.implementations, "cuda_host", Implementation(decode.attention_decode_fwd))
    for name, operator in (PLAIN | SOFTMAXES).items():
        made = MAKE[name](*(getattr(rows, f"{name}_{way}") for way in ("fwd", "bwd")))
        monkeypatch.setitem(operator.implementations, "cuda_host", made)
    return decode


@pytest.mark.parametrize("n, dtype", [(5, torch.float32), (1000, torch.bfloat16), (20000, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
def test_softmax(log, n, dtype):
    test_nan_rows.test_softmax(HOST, log, n, dtype)


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
def test_softmax_with_a_mask(log):
    test_nan_rows.test_softmax_with_a_mask(HOST, log)
    for how in ("bool", "float", "causal", "bool row", "float row"):
        test_nan_rows.test_softmax_hides(HOST, log, how)


@pytest.mark.parametrize("n, dtype", [(5, torch.float32), (1000, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_norm(name, n, dtype):
    test_nan_rows.test_norm(HOST, name, n, dtype)


@pytest.mark.parametrize("sq, sk", [(66, 200), (4, 5)])
@pytest.mark.parametrize("where", ["NaN key", "NaN value", "NaN query", "NaN mask", "inf key", "inf value", "inf mask"])
def test_attention(where, sq, sk):
    test_nan_attention.test_attention(HOST, where, torch.bfloat16, sq, sk)


def test_nan_in_the_gradient_of_attention():
    test_nan_attention.test_nan_in_the_gradient_of_attention(HOST, torch.bfloat16, 66, 200)


@pytest.mark.parametrize("name, garbage", [("key", NAN), ("value", NAN), ("value", INF)])
@pytest.mark.parametrize("how", ["padding", "window", "causal"])
def test_what_no_query_sees_has_no_effect(how, name, garbage):
    test_nan_attention.test_what_no_query_sees_has_no_effect(HOST, how, name, garbage, torch.bfloat16)


@pytest.mark.parametrize("how", ["bool row", "float row", "bool", "float"])
def test_keys_under_a_mask_have_no_effect_on_results(how):
    test_nan_attention.test_keys_under_a_mask_have_no_effect_on_results(HOST, how)


@pytest.mark.parametrize("shares", [1, 5])
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("where", ["key_cache", "value_cache", "query"])
def test_decode(kernels, where, paged, shares):
    kernels.shares = shares
    for place in (0, 600, test_nan_attention.CACHED - 1):
        test_nan_attention.test_decode(HOST, where, place, paged, torch.float32)


@pytest.mark.parametrize("left", [None, 37, 701])
@pytest.mark.parametrize("heads, dtype", [(1, torch.float32), (8, torch.bfloat16)], ids=str)
def test_decode_reads_no_garbage(kernels, left, heads, dtype):
    for kernels.shares in (1, 5):
        test_nan_attention.test_decode_reads_no_garbage(HOST, NAN, left, True, heads, dtype)
