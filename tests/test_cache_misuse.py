"""A KVCache that is used wrongly says so, and is what it was before the call that failed."""

from copy import deepcopy

import pytest
import torch
from block_case import DEFAULT, SIZES, B, E, L, S, on
from torch import Tensor
from torch.nn import Module

from pyllm.nn import DecoderLayer, EncoderLayer, KVCache, Rotary

pytestmark = pytest.mark.usefixtures("one_thread")

PAGED = pytest.mark.parametrize("paged", [{}, {"page_size": 16}], ids=["contiguous", "paged"])


def layers_of(kind: type[EncoderLayer], number: int = 2, **options) -> list[EncoderLayer]:
    return [kind(*SIZES, **{"causal": True, "position": "rotary"} | options).eval() for _ in range(number)]


def cache_for(layers, capacity=3 * L, **options) -> KVCache:
    attn = layers[0].self_attn
    return KVCache(len(layers), B, capacity, attn.kv_heads, attn.head_dim, **options)


def step(layers, cache: KVCache, x: Tensor, *memory: Tensor) -> Tensor:
    for index, layer in enumerate(layers):
        x = layer(x, *memory, cache=cache, layer=index)
    cache.advance(x.shape[1])
    return x


def state(cache: KVCache) -> dict:
    """All that a call could change but keys and values beyond the lengths."""
    others = ("keys", "values", "memory", "_kept")
    held = {name: deepcopy(value) for name, value in vars(cache).items() if name not in others}
    held |= {"memory": [None if m is None else [id(t) for t in m] for m in cache.memory], "kept": [*cache._kept]}
    if cache.block_table is None:
        held["kept"] += [
            [t[:, i, :, :n].clone() for t in (cache.keys, cache.values)] for i, n in enumerate(cache._lengths)
        ]
    return held


def assert_same(before: dict, after: dict) -> None:
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", [EncoderLayer, DecoderLayer])
def test_the_layer_must_be_given(kind: type[EncoderLayer]):
    layers = layers_of(kind)
    cache, memory = cache_for(layers), [torch.randn(B, S, E)] if kind is DecoderLayer else []
    before = state(cache)
    for options in ({}, {"layer": None}, {"layer": 2}, {"layer": -1}):
        with torch.no_grad(), pytest.raises(ValueError, match="KVCache: layer must be from 0 to 1, got"):
            layers[0](torch.randn(B, 2, E), *memory, cache=cache, **options)
    with pytest.raises(ValueError, match="layer must be from 0 to 1, got None"):
        cache.of_layer(None)
    assert_same(before, state(cache))


def test_the_memory_of_a_layer_that_there_is_not():
    """An index from the end would be another layer's."""
    layer = DecoderLayer(*SIZES, causal=True).eval()
    cache = KVCache(2, B, L, 4, 6)
    with torch.no_grad(), pytest.raises(ValueError, match="layer must be from 0 to 1, got -1"):
        layer.cross_attn(torch.randn(B, 1, E), torch.randn(B, S, E), cache=cache, layer=-1)
    assert cache.memory == [None, None]


@PAGED
@pytest.mark.parametrize("target", DEFAULT)
def test_a_forgotten_advance_is_an_error(paged: dict, target):
    with on(target), torch.no_grad():
        layers = layers_of(EncoderLayer)
        cache, x = cache_for(layers, **paged), torch.randn(B, L, E)
        whole = layers[1](layers[0](x))
        out = x[:, :4]
        for index, layer in enumerate(layers):
            out = layer(out, cache=cache, layer=index)
        before = state(cache)
        for index, layer in enumerate(layers):
            with pytest.raises(
                RuntimeError, match=f"layer {index} was called before, and its 4 tokens were not counted"
            ):
                layer(x[:, 4:5], cache=cache, layer=index)
        assert_same(before, state(cache))
        with pytest.raises(ValueError, match="new is 5, but layer 0 was called with 4 tokens"):
            cache.advance([4, 5, 4])
        assert_same(before, state(cache))
        cache.advance(4)
        torch.testing.assert_close(torch.cat([out, step(layers, cache, x[:, 4:])], 1), whole)


@PAGED
@pytest.mark.parametrize("drop", [("advance", 0), ("reset",)], ids=["advance", "reset"])
def test_tokens_that_are_dropped(paged: dict, drop: tuple):
    with torch.no_grad():
        layers = layers_of(EncoderLayer)
        cache, x = cache_for(layers, **paged), torch.randn(B, L, E)
        layers[0](torch.randn(B, 3, E), cache=cache, layer=0)
        name, *args = drop
        getattr(cache, name)(*args)
        assert cache.lengths.tolist() == [0] * B
        torch.testing.assert_close(step(layers, cache, x), layers[1](layers[0](x)))


@pytest.mark.parametrize("wrong", ["1", None, [1.0, 1.0, 1.0], [1, 1], [1, -1, 1], torch.ones(3)], ids=str)
def test_what_is_no_number_of_tokens(wrong):
    cache = KVCache(1, B, L, 1, 8)
    before = state(cache)
    with pytest.raises(ValueError, match="KVCache: new must be a number, 0 or more, or 3 of them"):
        cache.advance(wrong)
    assert_same(before, state(cache))


class Failing(Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("on purpose")


PLACES = {
    "queries": lambda layer: setattr(layer.self_attn, "qkv", Failing()),
    "output": lambda layer: setattr(layer.self_attn, "out", Failing()),
    "memory": lambda layer: setattr(layer.cross_attn, "kv", Failing()),
    "output of memory": lambda layer: setattr(layer.cross_attn, "out", Failing()),
    "feed-forward": lambda layer: setattr(layer, "ffn", Failing()),
    "norm": lambda layer: setattr(layer, "ffn_norm", Failing()),
}


@PAGED
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("begun", [0, 15], ids=["prompt", "into a new page"])
@pytest.mark.parametrize("target", DEFAULT)
def test_a_failed_call_leaves_a_cache_as_it_was(place: str, begun: int, paged: dict, target):
    """Wherever it fails: lengths, pages, block table, memory, kept tables; and the same call then works."""
    with on(target), torch.no_grad():
        layers = layers_of(DecoderLayer)
        x, memory = torch.randn(B, begun + 4, E), torch.randn(B, S, E)
        cache = cache_for(layers, **paged)
        if begun:
            step(layers, cache, x[:, :begun], memory)
            cache.reset(1)
        whole = layers[1](layers[0](x, memory), memory)
        before = state(cache)
        broken = deepcopy(layers[0])
        PLACES[place](broken)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="on purpose"):
                broken(x[:, begun:], memory, cache=cache, layer=0)
            assert_same(before, state(cache))
        out = step(layers, cache, x[:, begun:], memory)
        torch.testing.assert_close(out[[0, 2]], whole[[0, 2], begun:])


@PAGED
def test_a_call_with_the_wrong_dtype_leaves_a_cache_as_it_was(paged: dict):
    """Also one that decodes, whose tables are made before the operator looks at the dtype."""
    layers = layers_of(EncoderLayer)
    cache, x = cache_for(layers, **paged), torch.randn(B, 16, E)
    with torch.no_grad():
        step(layers, cache, x)
        before = state(cache)
        with pytest.raises(TypeError, match="key must have the cache's dtype"):
            deepcopy(layers[0]).double()(x[:, :1].double(), cache=cache, layer=0)
        assert_same(before, state(cache))


def test_reset_drops_pages_from_the_table():
    cache = KVCache(1, 2, 40, 1, 8, page_size=16)
    cache.reserve(40)
    assert cache.block_table[0].any()
    cache.reset(0)
    assert not cache.block_table[0].any() and cache.block_table[1].any()


def test_rotary_tables_of_a_class_of_the_users_are_its_own():
    class Slower(Rotary):
        def __init__(self, dim: int, factor: float):
            super().__init__(dim)
            self.factor = factor

        def tables(self, positions: Tensor, dtype: torch.dtype = torch.float32):
            return super().tables(positions / self.factor, dtype)

    layers = layers_of(EncoderLayer, 3)
    for layer, factor in zip(layers[1:], (2.0, 4.0), strict=True):
        layer.self_attn.position = Slower(layer.self_attn.position.dim, factor)
    with torch.no_grad():
        cache, x = cache_for(layers), torch.randn(B, L, E)
        out = torch.cat([step(layers, cache, part) for part in x.split((4, 1, 4), 1)], 1)
        torch.testing.assert_close(out, layers[2](layers[1](layers[0](x))))


def test_a_compiled_layer_sees_a_forgotten_advance():
    torch._dynamo.reset()
    layer = layers_of(EncoderLayer, 1)[0]
    compiled = torch.compile(layer, backend="eager")
    cache, x = cache_for([layer]), torch.randn(B, L, E)
    with torch.no_grad():
        for token in x[:, :3].split(1, 1):
            compiled(token, cache=cache, layer=0)
            with pytest.raises(RuntimeError, match="layer 0 was called before"):
                compiled(token, cache=cache, layer=0)
            cache.advance(1)


def test_a_trace_of_a_cache_is_refused():
    layers = layers_of(EncoderLayer, 1)
    layers[0].requires_grad_(False)
    cache, x = cache_for(layers), torch.randn(B, 1, E)
    before = state(cache)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"torch\.jit\.trace would keep its lengths"):
        torch.jit.trace(lambda x: layers[0](x, cache=cache, layer=0), x, check_trace=False)
    assert_same(before, state(cache))
