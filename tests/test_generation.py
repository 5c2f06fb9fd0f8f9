"""KVCache, and blocks that generate with it: step by step they compute what they compute at once."""

from copy import deepcopy

import pytest
import torch
from block_case import DEFAULT, OPTIONS, PARALLEL, SIZES, B, E, H, L, S, everywhere, on
from torch import Tensor

import pyllm
from pyllm.nn import DecoderLayer, EncoderLayer, KVCache

GENERATING = {name: o for name, o in OPTIONS.items() if name not in ("window", "t5", "own head_dim")} | {
    "window": {"window": (2, -1), "softcap": 2.0},
    "parallel": PARALLEL["parallel"],
    "own head_dim": {"head_dim": 10, "scale": 0.5},
}


def cache_for(layers, batch=B, capacity=L, **options) -> KVCache:
    attn = layers[0].self_attn
    weight = attn.qkv.weight
    return KVCache(
        len(layers), batch, capacity, attn.kv_heads, attn.head_dim, dtype=weight.dtype, device=weight.device, **options
    )


def generate(layers, cache, x, steps=(4, 1, 1, 3), memory=None, **masks) -> Tensor:
    """x through the layers, `steps` tokens at a time."""
    outs = []
    for part in x.split(steps, 1):
        for index, layer in enumerate(layers):
            args = () if memory is None else (memory if cache.memory[index] is None else None,)
            part = layer(part, *args, cache=cache, layer=index, **masks)
        cache.advance(part.shape[1])
        outs.append(part)
    return torch.cat(outs, 1)


@pytest.mark.parametrize("paged", [{}, {"page_size": 16}], ids=["contiguous", "paged"])
@pytest.mark.parametrize("name, target", everywhere(GENERATING, "rotary interleaved"))
def test_step_by_step_equals_the_whole(name: str, paged: dict, target):
    with on(target), torch.no_grad():
        options = GENERATING[name] | {"causal": True, "dtype": torch.float64}
        layers = [EncoderLayer(*SIZES, **options).eval() for _ in range(2)]
        x = torch.randn(B, L, E, dtype=torch.float64)
        cache = cache_for(layers, **paged)
        torch.testing.assert_close(generate(layers, cache, x), layers[1](layers[0](x)))
        with pytest.raises(ValueError, match="KVCache: the cache is full: sequence 0 has 9 tokens, 1 are to be added"):
            generate(layers, cache, x[:, :1], (1,))


@pytest.mark.parametrize("target", DEFAULT)
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_computes_the_memory_once(padded: bool, target):
    with on(target), torch.no_grad():
        layers = [DecoderLayer(*SIZES, num_kv_heads=2, dtype=torch.float64).eval() for _ in range(2)]
        x, memory = (torch.randn(B, n, E, dtype=torch.float64) for n in (L, S))
        masks = {"memory_key_padding_mask": torch.arange(S) >= torch.tensor([S, 3, 1])[:, None]} if padded else {}
        whole = layers[1](layers[0](x, memory, **masks), memory, **masks)
        calls = []
        for layer in layers:
            layer.cross_attn.kv.register_forward_hook(lambda *args: calls.append(1))
        cache = cache_for(layers)
        torch.testing.assert_close(generate(layers, cache, x, memory=memory, **masks), whole)
        assert len(calls) == 2
        cache.reset()
        torch.testing.assert_close(generate(layers, cache, x, memory=memory, **masks), whole)
        assert len(calls) == 4
        cache.reset()
        with pytest.raises(ValueError, match="memory must be given"):
            layers[0](x, cache=cache)


@pytest.mark.parametrize("target", DEFAULT)
@pytest.mark.parametrize("paged", [{}, {"page_size": 16}], ids=["contiguous", "paged"])
def test_prompts_of_different_lengths(paged: dict, target):
    """Padded at their end, they go on where they end."""
    with on(target), torch.no_grad():
        layers = [EncoderLayer(*SIZES, causal=True, position="rotary", dtype=torch.float64).eval()]
        x, lengths = torch.randn(B, L, E, dtype=torch.float64), [6, 2, 4]
        cache = cache_for(layers, capacity=20, **paged)
        layers[0](x[:, :6], cache=cache)
        cache.advance(lengths)
        following = torch.stack([row[n : n + 3] for row, n in zip(x, lengths, strict=True)])
        assert cache.positions(3)[1].tolist() == [2, 3, 4]
        out = generate(layers, cache, following, (1, 2))
        assert cache.lengths.tolist() == [9, 5, 7]
        for row, n, actual in zip(x, lengths, out, strict=True):
            torch.testing.assert_close(actual, layers[0](row[None, : n + 3])[0, n:])


def test_prompts_are_computed_at_once():
    layer = EncoderLayer(*SIZES, causal=True, position="rotary").eval()
    cache, x = cache_for([layer], page_size=16), torch.randn(B, L, E)

    def attending(part: Tensor) -> str:
        (name,) = (call.op for call in pyllm.explain(layer, part, cache=cache) if "attention" in call.op)
        cache.advance(part.shape[1])
        return name

    with torch.no_grad():
        assert [attending(part) for part in x.split((6, 1, 2), 1)] == ["attention", *["attention_decode"] * 2]


def test_pages_are_held_freed_and_used_again():
    cache = KVCache(1, 2, 40, 1, 8, page_size=16, pages=4)
    cache.reserve(20)
    cache.advance(20)
    table = cache.block_table.tolist()
    assert sorted(table[0][:2] + table[1][:2]) == [0, 1, 2, 3]
    before = cache.block_table.clone()
    with pytest.raises(ValueError, match=r"the cache is full: 2 pages are needed .* 0 of 4 are free"):
        cache.reserve(13)
    assert torch.equal(cache.block_table, before), "changed by what failed"
    cache.reserve(12)
    cache.reset(0)
    assert cache.lengths.tolist() == [0, 20]
    cache.reserve(16)
    cache.advance([16, 12])
    assert cache.block_table[0, 0] in table[0][:2] and cache.block_table[1].tolist()[:2] == table[1][:2]
    with pytest.raises(ValueError, match="sequence 0 has no pages for 17 tokens"):
        cache.advance([1, 0])
    assert cache.lengths.tolist() == [16, 32]
    twin = deepcopy(cache)
    twin.reset()
    assert cache.lengths.tolist() == [16, 32] and twin.lengths.tolist() == [0, 0]
    twin.reserve(32)
    assert repr(cache) == (
        "KVCache(layers=1, batch=2, capacity=40, kv_heads=1, head_dim=8, page_size=16, pages=4, lengths=[16, 32])"
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layers": 0}, "layers must be an int, 1 or more"),
        ({"capacity": 2.0}, "capacity must be an int"),
        ({"page_size": 24}, "page_size must be a multiple of 16, got 24"),
        ({"pages": 4}, "pages must come with a page_size"),
        ({"page_size": 16, "pages": 0}, "pages must be an int, 1 or more"),
    ],
)
def test_wrong_sizes_of_a_cache_are_named(change: dict, message: str):
    with pytest.raises(ValueError, match=f"KVCache: {message}"):
        KVCache(**{"layers": 1, "batch": 2, "capacity": 8, "kv_heads": 1, "head_dim": 8} | change)


@pytest.mark.parametrize(
    "state, call, error, message",
    [
        ({}, {"layer": 1}, ValueError, "layer must be from 0 to 0, got 1"),
        ({}, {"layer": -1}, ValueError, "layer must be from 0 to 0, got -1"),
        ({"causal": False}, {}, ValueError, "a cache needs causal=True"),
        ({}, {"attn_mask": torch.ones(L, L)}, ValueError, "with a cache, masks, positions and rotary must not"),
        ({"training": True}, {}, RuntimeError, "cache is for generation, .* call eval"),
        ({"grad": True}, {}, RuntimeError, "call it under torch.no_grad"),
        ({"num_kv_heads": 1}, {}, ValueError, "key must have shape|multiple of"),
        ({"dtype": torch.float64}, {}, TypeError, "key must have the cache's dtype, torch.float32, got torch.float64"),
    ],
)
def test_wrong_use_of_a_cache_is_named(state: dict, call: dict, error: type[Exception], message: str):
    cache = KVCache(1, B, L, H, E // H)
    options = {"causal": True, "training": False, "grad": False} | state
    training, grad = options.pop("training"), options.pop("grad")
    layer = EncoderLayer(*SIZES, **options).train(training)
    with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
        layer(torch.randn(B, L, E, dtype=options.get("dtype")), cache=cache, **call)
    with pytest.raises(ValueError, match="new must be a number"):
        cache.advance([1])


def test_generation_compiles_into_one_graph():
    torch._dynamo.reset()
    layer = EncoderLayer(*SIZES, causal=True, position="rotary").eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    cache, x = cache_for([layer], page_size=16), torch.randn(B, L, E)
    outs = []
    with torch.no_grad():
        for token in x.split(1, 1):
            cache.reserve(1)
            outs.append(compiled(token, cache=cache))
            cache.advance(1)
        torch.testing.assert_close(torch.cat(outs, 1), layer(x))
