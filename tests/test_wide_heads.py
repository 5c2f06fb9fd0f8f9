"""Heads wider than the kernels take: composed by PyTorch's, and explained; a kernel asked for by name refuses."""

import pytest
import torch
import torch_parity
from block_case import DEFAULT, on
from torch import Tensor

import pyllm
from pyllm import ops
from pyllm.backend import CannotRun
from pyllm.nn import EncoderLayer, KVCache
from pyllm.testing import check, randn

pytestmark = pytest.mark.usefixtures("one_thread")

D = 257
WHY = f"its kernels take a head_dim of up to 256, and this one is {D}"


def operands(heads: int = 2, kv_heads: int = 2, **options) -> dict[str, Tensor]:
    return {
        "query": randn(2, heads, 5, D, **options),
        "key": randn(2, kv_heads, 7, D, **options),
        "value": randn(2, kv_heads, 7, D, **options),
    }


def everything(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    slopes = pyllm.nn.alibi_slopes(query.shape[1], query.device)
    options = {"is_causal": True, "window": (3, -1), "softcap": 5.0, "dropout_p": 0.2, "alibi_slopes": slopes}
    padding = torch.arange(7, device=query.device) >= torch.tensor([[7], [4]], device=query.device)
    return ops.attention(query, key, value, attn_mask=mask, key_padding_mask=padding, return_lse=True, **options)


CALLS = {
    "plain": lambda query, key, value: ops.attention(query, key, value),
    "causal": lambda query, key, value: ops.attention(query, key, value, is_causal=True),
    "packed": lambda query, key, value: ops.attention_varlen(
        *(t.transpose(0, 1).flatten(1, 2).transpose(0, 1) for t in (query, key, value)),
        *(torch.tensor([0, n, 2 * n], dtype=torch.int32, device=query.device) for n in (5, 7)),
        is_causal=True,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("target", DEFAULT)
def test_attention(name: str, kv_heads: int, dtype: torch.dtype, target):
    check(CALLS[name], operands(kv_heads=kv_heads, dtype=dtype, device=target[1]), None)


@pytest.mark.parametrize("target", DEFAULT)
def test_attention_with_everything(target):
    check(everything, operands(4, 2, device=target[1]) | {"mask": randn(5, 7, device=target[1])}, None)


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("target", DEFAULT)
def test_a_kernel_that_is_asked_for_refuses(backend: str, target):
    with on((backend, target[1])), torch.no_grad():
        query, key, value = operands(device=target[1]).values()
        lengths = torch.full((2,), 7, dtype=torch.int32)
        for call in (
            lambda: ops.attention(query, key, value),
            lambda: CALLS["packed"](query, key, value),
            lambda: ops.attention_decode(query, key, value, lengths),
        ):
            with pytest.raises(CannotRun, match=f"backend '{backend}' cannot run .*: {WHY}"):
                call()


def kinds() -> dict:
    x = torch.randn(5, 2, 2 * D)
    return {
        "attention": (pyllm.nn.MultiheadAttention(2 * D, 2), x, x, x),
        "encoder": (pyllm.nn.TransformerEncoderLayer(2 * D, 2, 16), x),
        "decoder": (pyllm.nn.TransformerDecoderLayer(2 * D, 2, 16), x, x),
        "block": (EncoderLayer(16, 2, 16, head_dim=D), torch.randn(2, 5, 16)),
    }


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["attention", "encoder", "decoder", "block"])
@pytest.mark.parametrize("target", DEFAULT)
def test_explain_says_why(name: str, training: bool, target):
    with on(target):
        module, *inputs = kinds()[name]
        choices = [c for c in pyllm.explain(module.train(training), *inputs) if c.op == "attention"]
        assert choices and all(c.backend in ("torch", "reference") and WHY in c.reason for c in choices)


@pytest.mark.parametrize("target", DEFAULT)
def test_torchs_modules(target):
    with on(target):
        x = torch.randn(5, 2, 2 * D)
        causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
        padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        for options in ({}, {"need_weights": False}, {"attn_mask": causal, "key_padding_mask": padding}):
            torch_parity.compare(*torch_parity.pair("MultiheadAttention", 2 * D, 2), x, x, x, **options)
        torch_parity.compare(*torch_parity.pair("TransformerEncoderLayer", 2 * D, 2, 16, 0.0), x, src_mask=causal)


def test_patched():
    theirs = torch.nn.TransformerEncoderLayer(2 * D, 2, 16, 0.0)
    x = torch.randn(5, 2, 2 * D)
    expected = theirs(x)
    report = pyllm.patch(theirs)
    assert not report.left and report.replaced["self_attn"] == "MultiheadAttention"
    torch.testing.assert_close(theirs(x), expected)


@pytest.mark.parametrize("paged", [{}, {"page_size": 16}], ids=["contiguous", "paged"])
@pytest.mark.parametrize("target", DEFAULT)
def test_generation(paged: dict, target):
    with on(target), torch.no_grad():
        options = {"head_dim": 258, "num_kv_heads": 1, "causal": True, "position": "rotary", "dtype": torch.float64}
        layer = EncoderLayer(16, 2, 16, **options).eval()
        x = torch.randn(2, 6, 16, dtype=torch.float64)
        cache, outs = KVCache(1, 2, 8, 1, 258, dtype=torch.float64, **paged), []
        for part in x.split((4, 1, 1), 1):
            outs.append(layer(part, cache=cache, layer=0))
            cache.advance(part.shape[1])
        torch.testing.assert_close(torch.cat(outs, 1), layer(x))
