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
            layers[0](x, cache=cache, layer=0)


@pytest.mark.parametrize("target", DEFAULT)
@pytest.mark.parametrize("paged", [{}, {"page_size": 16}], ids=["contiguous", "paged"])
def test_prompts_of_different_lengths(paged: dict, target):
    """Padded at their end, they go on where they end."""
    with on(target), torch.no_grad():
        layers = [EncoderLayer(*SIZES, causal=True, position="rotary", dtype=torch.float64).eval()]
        x, lengths = torch.randn(B, L, E, dtype=torch.float64), [6, 2, 4]
        cache = cache_for(layers, capacity=20, **paged)
        layers[0](x[:, :6], cache=cache, layer=0)
        cache.advance(lengths)
        following = torch.stack([row[n : n + 3] for row, n in zip(x, lengths, strict=True)])
        assert cache.positions(3)[1].tolist() == [2, 3, 4]
        out = generate(layers, cache, following, (1, 2))
        assert cache.lengths.tolist() == [9, 5, 7]
        for row, n, actual in zip(x, lengths, out, strict=True):
            torch.testing.assert_close(actual, layers[0](row[None, : n + 3])[0, n:])


def state_of(cache: KVCache) -> tuple:
    """All that a failed call must leave as it was."""
    tables = [t if t is None else t.clone() for t in (cache.block_table, cache.lengths, cache.keys, cache.values)]
    return tables, list(cache.memory), repr(cache)


def assert_state(cache: KVCache, before: tuple) -> None:
    tables, memory, shown = before
    for now, then in zip((cache.block_table, cache.lengths, cache.keys, cache.values), tables, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
    assert all(now is then for now, then in zip(cache.memory, memory, strict=True)) and repr(cache) == shown


LONG = 45


@pytest.mark.parametrize("paged", [{}, {"page_size": 16}, {"page_size": 32}], ids=str)
@pytest.mark.parametrize("name, target", everywhere(["rotary", "alibi", "window"]))
def test_token_by_token_into_new_pages(name: str, paged: dict, target):
    """Sequences that begin with 1, 15 and 17 tokens pass the ends of their pages at different steps."""
    with on(target), torch.no_grad():
        options = GENERATING[name] | {"causal": True, "dtype": torch.float64}
        layers = [EncoderLayer(*SIZES, **options).eval() for _ in range(2)]
        starts = [1, 15, 17]
        x = torch.randn(3, 17 + LONG, E, dtype=torch.float64)
        whole = layers[1](layers[0](x))
        cache = cache_for(layers, 3, 17 + LONG, **paged)
        cache.keys.fill_(torch.nan), cache.values.fill_(torch.nan)
        prompt = x[:, :17]
        for index, layer in enumerate(layers):
            prompt = layer(prompt, cache=cache, layer=index)
        cache.advance(starts)
        for step in range(LONG):
            token = torch.stack([row[n + step] for row, n in zip(x, starts, strict=True)])[:, None]
            out = generate(layers, cache, token, (1,))
            for row, n, actual in zip(whole, starts, out, strict=True):
                torch.testing.assert_close(actual[0], row[n + step])
        assert cache.lengths.tolist() == [n + LONG for n in starts]


@pytest.mark.parametrize("target", DEFAULT)
def test_too_few_pages_for_all_sequences(target):
    """There is one page for each of two, but not for three: nothing changes, and a sequence less goes on."""
    with on(target), torch.no_grad():
        layers = [EncoderLayer(*SIZES, **OPTIONS["rotary"], dtype=torch.float64).eval() for _ in range(2)]
        x = torch.randn(3, LONG, E, dtype=torch.float64)
        cache = cache_for(layers, 3, LONG, page_size=16, pages=8)
        whole = layers[1](layers[0](x))
        out = generate(layers, cache, x[:, :32], (30, 1, 1))
        before = state_of(cache)
        for _ in range(2):
            with pytest.raises(ValueError, match="3 pages are needed for 1 more tokens of each sequence, and 2 of 8"):
                generate(layers, cache, x[:, 32:33], (1,))
            assert_state(cache, before)
        cache.reset(1)
        again = torch.stack([x[0, 32:], x[1, : LONG - 32], x[2, 32:]])
        out = generate(layers, cache, again, (1,) * (LONG - 32))
        expected = torch.stack([whole[0, 32:], whole[1, : LONG - 32], whole[2, 32:]])
        torch.testing.assert_close(out, expected)
        assert cache.lengths.tolist() == [LONG, LONG - 32, LONG]


@pytest.mark.parametrize("target", DEFAULT)
def test_a_sequence_that_begins_anew_gets_its_own_memory(target):
    """After reset(i) the memory is to be given again: the rows of the others are as before, that of i is new."""
    with on(target), torch.no_grad():
        layers = [DecoderLayer(*SIZES, dtype=torch.float64).eval() for _ in range(2)]
        x, memory = (torch.randn(B, n, E, dtype=torch.float64) for n in (L, S))
        cache = cache_for(layers, page_size=16)
        generate(layers, cache, x[:, :4], (3, 1), memory=memory)
        cache.reset(1)
        before = state_of(cache)
        with pytest.raises(ValueError, match="memory must be given"):
            layers[0](x[:, 4:5], cache=cache, layer=0)
        assert cache.lengths.tolist() == before[0][1].tolist() == [4, 0, 4]
        memory = torch.cat([memory[:1], torch.randn(1, S, E, dtype=torch.float64), memory[2:]])
        following = torch.stack([x[0, 4:6], x[1, :2], x[2, 4:6]])
        out = generate(layers, cache, following, (1, 1), memory=memory)
        whole = layers[1](layers[0](x, memory), memory)
        torch.testing.assert_close(out, torch.stack([whole[0, 4:6], whole[1, :2], whole[2, 4:6]]))


@pytest.mark.parametrize(
    "first, second",
    [
        ({"position": "rotary"}, {"position": "rotary", "rotary_base": 50.0}),
        ({"position": "rotary"}, {"position": "rotary", "rotary_dim": 4}),
        ({"position": "rotary"}, {"position": "rotary", "rotary_interleaved": True}),
        ({"position": "alibi"}, {"position": "rotary"}),
        ({"position": "alibi"}, {"position": "alibi", "nhead": 2, "num_kv_heads": 2}),
    ],
    ids=["base", "dim", "pairs", "scheme", "heads"],
)
def test_layers_that_share_a_cache_keep_their_own_positions(first: dict, second: dict):
    options = {"num_kv_heads": 2, "head_dim": 6, "causal": True, "dtype": torch.float64}
    layers = [
        EncoderLayer(**{"d_model": E, "nhead": H, "dim_feedforward": 40} | options | o).eval() for o in (first, second)
    ]
    with torch.no_grad():
        x = torch.randn(B, L, E, dtype=torch.float64)
        torch.testing.assert_close(generate(layers, cache_for(layers), x), layers[1](layers[0](x)))


def test_prompts_are_computed_at_once():
    layer = EncoderLayer(*SIZES, causal=True, position="rotary").eval()
    cache, x = cache_for([layer], page_size=16), torch.randn(B, L, E)

    def attending(part: Tensor) -> str:
        (name,) = (call.op for call in pyllm.explain(layer, part, cache=cache, layer=0) if "attention" in call.op)
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
        (
            {"num_kv_heads": 1},
            {},
            ValueError,
            r"KVCache: key must have shape \(B, Hkv, S, D\) = \(3, 4, 9, 6\), got \(3, 1, 9, 6\)",
        ),
        ({"dtype": torch.float64}, {}, TypeError, "key must have the cache's dtype, torch.float32, got torch.float64"),
    ],
)
def test_wrong_use_of_a_cache_is_named(state: dict, call: dict, error: type[Exception], message: str):
    cache = KVCache(1, B, L, H, E // H)
    options = {"causal": True, "training": False, "grad": False} | state
    training, grad = options.pop("training"), options.pop("grad")
    layer = EncoderLayer(*SIZES, **options).train(training)
    before = state_of(cache)
    with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
        layer(torch.randn(B, L, E, dtype=options.get("dtype")), **{"cache": cache, "layer": 0} | call)
    for wrong in ([1], -1, [1, -1, 1]):
        with pytest.raises(ValueError, match="new must be a number"):
            cache.advance(wrong)
    assert_state(cache, before)


def test_generation_compiles_into_one_graph():
    torch._dynamo.reset()
    layer = EncoderLayer(*SIZES, causal=True, position="rotary").eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    cache, x = cache_for([layer], page_size=16), torch.randn(B, L, E)
    outs = []
    with torch.no_grad():
        for token in x.split(1, 1):
            cache.reserve(1)
            outs.append(compiled(token, cache=cache, layer=0))
            cache.advance(1)
        torch.testing.assert_close(torch.cat(outs, 1), layer(x))
