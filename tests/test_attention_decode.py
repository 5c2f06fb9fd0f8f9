"""Decoding's contract, the same on every backend: a few queries over a cache, contiguous or paged."""

import pytest
import torch
from conftest import KERNELS, WITHOUT_TORCH

import pyllm
from pyllm import reference
from pyllm.attention_cases import DECODE_CASES as CASES
from pyllm.attention_cases import DecodeCase as Case
from pyllm.ops import attention, attention_decode
from pyllm.testing import check, randn


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_within_budget(case: Case, dtype: torch.dtype, target):
    backend, device = target
    check(case.call, case.inputs(dtype, device), backend)


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("left, page", [(5, 0), (0, 16), (16, 16)])
def test_a_window_may_begin_and_end_anywhere(left: int, page: int, target):
    """Sequences of all lengths around multiples of a page and of a tile, which the window begins and ends at."""
    backend, device = target
    options = {"window": (left, -1)}
    case = Case(
        "",
        lengths=(*range(22), *range(60, 70), *range(124, 146)),
        heads=1,
        kv_heads=1,
        dim=4,
        capacity=160,
        page=page,
        options=options,
    )
    check(case.call, case.inputs(torch.float32, device), backend)


@pytest.mark.parametrize("target", KERNELS)
def test_later_keys_may_outweigh_all_before(target):
    """By more than exp can hold, whichever share of the keys they are in."""
    backend, device = target
    case = Case("", lengths=(700, 63), capacity=704, dim=8)
    inputs = case.inputs(torch.float32, device)
    for first, size in ((0, 1e-3), (512, 300.0)):
        inputs["key_cache"].data[:, :, first:] = size * inputs["query"].data.sign().mean((1, 2))[:, None, None]
    check(case.call, inputs, backend)


@pytest.mark.parametrize("target", WITHOUT_TORCH)
def test_steps_add_up_to_causal_attention(target):
    backend, device = target
    query, key, value = (randn(2, h, 12, 8, device=device, grad=False) for h in (4, 2, 2))
    caches = [torch.full((2, 2, 16, 8), torch.nan, device=device) for _ in range(2)]
    outs = []
    with pyllm.use_backend(backend):
        for step in (slice(0, 7), *(slice(i, i + 1) for i in range(7, 12))):
            lengths = torch.full((2,), step.start, dtype=torch.int32, device=device)
            new = {"key": key[:, :, step], "value": value[:, :, step]}
            outs.append(attention_decode(query[:, :, step], *caches, lengths, **new))
        whole = attention(query, key, value, is_causal=True)
    torch.testing.assert_close(torch.cat(outs, 2), whole)
    assert torch.equal(caches[0][:, :, :12], key) and torch.equal(caches[1][:, :, :12], value)
    assert caches[0][:, :, 12:].isnan().all(), "written beyond the new keys"


@pytest.mark.parametrize("target", KERNELS)
def test_only_the_pages_of_the_table_are_read(target):
    backend, device = target
    case = Case("", page=16, lengths=(20,), dim=8)
    inputs = case.inputs(torch.float32, device)
    plain = case.call(**inputs)
    with pyllm.use_backend(backend):
        table = torch.tensor([[1, 3]], dtype=torch.int32, device=device)
        caches = [torch.full((5, 2, 16, 8), torch.nan, device=device) for _ in range(2)]
        order = torch.randperm(len(inputs["key_cache"]), generator=torch.Generator().manual_seed(1))[:2]
        for cache, name in zip(caches, ("key_cache", "value_cache"), strict=True):
            cache[[1, 3]] = inputs[name][order.to(device)]
            cache[3, :, 5:] = torch.nan
        lengths = torch.tensor([20], dtype=torch.int32, device=device)
        new = {name: inputs[name] for name in ("key", "value")}
        out = attention_decode(inputs["query"], *caches, lengths, block_table=table, **new)
    torch.testing.assert_close(out, plain[0])


def test_rotary_keeps_lengths_and_turns_by_the_difference_of_positions():
    x, y = randn(1, 8, dtype=torch.float64, grad=False), randn(1, 8, dtype=torch.float64, grad=False)
    angle = torch.arange(20.0, dtype=torch.float64)[:, None] / torch.tensor([1.0, 7.0, 30.0])
    cos, sin = angle.cos(), angle.sin()
    for interleaved in (False, True):

        def turned(z, i, interleaved=interleaved):
            return reference.rotary(z, cos[i : i + 1], sin[i : i + 1], interleaved)

        torch.testing.assert_close(turned(x, 9).norm(), x.norm())
        torch.testing.assert_close((turned(x, 9) * turned(y, 4)).sum(), (turned(x, 15) * turned(y, 10)).sum())
        assert torch.equal(turned(x, 9)[:, 6:], x[:, 6:])


def _right(**changed) -> dict:
    right = {
        "query": torch.ones(2, 4, 1, 8),
        "key_cache": torch.ones(2, 2, 16, 8),
        "value_cache": torch.ones(2, 2, 16, 8),
        "cache_seqlens": torch.tensor([3, 15], dtype=torch.int32),
        "key": torch.ones(2, 2, 1, 8),
        "value": torch.ones(2, 2, 1, 8),
    }
    return right | changed


_PAGED = {"key_cache": torch.ones(5, 2, 16, 8), "value_cache": torch.ones(5, 2, 16, 8)}
BAD = [
    ({"query": torch.ones(2, 4, 8)}, ValueError, "query must have 4 dimensions"),
    ({"query": torch.ones(2, 3, 1, 8)}, ValueError, "query's 3 heads must be a multiple of key_cache's 2"),
    ({"key_cache": torch.ones(3, 2, 16, 8)}, ValueError, "key_cache must have shape"),
    ({"value_cache": torch.ones(2, 2, 15, 8)}, ValueError, "value_cache must have shape"),
    ({"value_cache": torch.ones(2, 2, 16, 8).half()}, TypeError, "value_cache must have the dtype of query"),
    ({"cache_seqlens": torch.tensor([3, 15])}, TypeError, "cache_seqlens must be an int32"),
    ({"cache_seqlens": torch.ones(3, dtype=torch.int32)}, ValueError, "cache_seqlens must have shape"),
    ({"cache_seqlens": torch.tensor([-1, 3], dtype=torch.int32)}, ValueError, "cache_seqlens must not be negative"),
    (
        {"cache_seqlens": torch.tensor([3, 16], dtype=torch.int32)},
        ValueError,
        "the cache is full: sequence 1 has 16 keys",
    ),
    (
        {name: torch.ones(2, heads, 2, 8) for name, heads in (("query", 4), ("key", 2), ("value", 2))},
        ValueError,
        "the cache is full: sequence 1 has 15 keys, 2 are to be added",
    ),
    ({"key": None}, ValueError, "key and value must both be given"),
    ({"key": torch.ones(2, 2, 2, 8)}, ValueError, "key must have shape"),
    ({"value": torch.ones(2, 4, 1, 8)}, ValueError, "value must have shape"),
    (_PAGED | {"block_table": torch.zeros(2, 3)}, TypeError, "block_table must be an int32"),
    (_PAGED | {"block_table": torch.zeros(3, 3, dtype=torch.int32)}, ValueError, "block_table must have shape"),
    (
        _PAGED | {"block_table": torch.full((2, 1), 5, dtype=torch.int32)},
        ValueError,
        "block_table must name pages from 0",
    ),
    ({"rotary": (torch.ones(16, 4),)}, ValueError, "rotary must be"),
    ({"rotary": (torch.ones(16, 4), torch.ones(16, 3))}, ValueError, "rotary must have cos and sin of one shape"),
    ({"rotary": (torch.ones(15, 4), torch.ones(15, 4))}, ValueError, "rotary must be cos and sin"),
    ({"rotary": (torch.ones(16, 5), torch.ones(16, 5))}, ValueError, "rotary must be cos and sin"),
    (
        {"query": torch.ones(2, 4, 4, 8), "key": None, "value": None, "rotary": (torch.ones(16, 4), torch.ones(16, 4))},
        ValueError,
        "rotary needs a position for each of the 4 queries: sequence 0 has 3 keys",
    ),
    ({"key_cache": torch.ones(1, 2, 16, 8).expand(2, -1, -1, -1)}, RuntimeError, "key_cache must not be expanded"),
    ({"value_cache": torch.ones(2, 1, 16, 8).expand(-1, 2, -1, -1)}, RuntimeError, "value_cache must not be expanded"),
    (dict.fromkeys(("key_cache", "value_cache"), torch.ones(2, 2, 16, 8)), ValueError, "must be two tensors"),
    ({"scale": torch.ones((), requires_grad=True)}, TypeError, "scale must be a number"),
    ({"window": (-3, 0)}, ValueError, "window must be"),
    ({"softcap": -1.0}, ValueError, "softcap must be"),
    ({"query": torch.ones(2, 4, 1, 8).requires_grad_()}, RuntimeError, "no gradient"),
]


@pytest.mark.parametrize("wrong, error, message", BAD, ids=[message for *_, message in BAD])
def test_wrong_arguments_are_named_before_anything_is_written(wrong: dict, error: type[Exception], message: str):
    arguments = _right(**wrong)
    before = arguments["key_cache"].clone()
    with pytest.raises(error, match=f"attention_decode: .*{message}"):
        attention_decode(**arguments)
    assert torch.equal(arguments["key_cache"], before)


def test_a_page_must_be_a_multiple_of_16():
    caches = {"key_cache": torch.ones(5, 2, 17, 8), "value_cache": torch.ones(5, 2, 17, 8)}
    with pytest.raises(ValueError, match="page_size that is a multiple of 16"):
        attention_decode(**_right(**caches, block_table=torch.zeros(2, 3, dtype=torch.int32)))
