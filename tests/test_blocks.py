"""EncoderLayer and DecoderLayer: against the same written in plain PyTorch, and as torch.nn's users handle layers."""

import math
import pickle
from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES, TARGETS
from torch import Tensor
from torch_parity import compare, results

import pyllm
from pyllm.nn import DecoderLayer, EncoderLayer, KVCache, LearnedPositions, RelativePositionBias, SinusoidalPositions
from pyllm.ops import RelativeBias
from pyllm.ops.relative_bias import bucket
from pyllm.testing import assert_within_budget

DEFAULT = [pytest.param((None, d), id=f"default-{d}", marks=[pytest.mark.gpu] * (d == "cuda")) for d in DEVICES]
SERVING = [t for t in TARGETS if t.values[0][0] != "torch"]  # torch's kernel takes neither masks nor biases
E, H, FF, B, L, S = 24, 4, 40, 3, 9, 7
SIZES = (E, H, FF)

# What is asked for -> options of a layer, on top of dropout=0
OPTIONS = {
    "defaults": {},
    "pre-norm": {"norm_first": True},
    "causal": {"causal": True, "norm_first": True, "activation": "silu"},
    "rms": {"norm": "rms_norm", "norm_eps": 1e-2, "activation": "gelu"},
    "rms pre-norm": {"norm": "rms_norm", "norm_first": True, "activation": "swiglu"},
    "no biases": {"qkv_bias": False, "out_bias": False, "ffn_bias": False, "norm_bias": False, "activation": "reglu"},
    "own head_dim": {"head_dim": 10, "scale": 0.5, "activation": "gelu_tanh"},
    "grouped": {"num_kv_heads": 2, "activation": "geglu", "qkv_bias": False},
    "multi-query": {"num_kv_heads": 1, "head_dim": 5, "activation": "geglu_tanh", "out_bias": False},
    "window": {"window": (2, 3), "softcap": 2.0, "activation": torch.tanh},
    "alibi": {"position": "alibi", "causal": True},
    "t5": {"position": "t5", "num_buckets": 8, "max_distance": 6, "scale": 1.0},
    "t5 causal": {"position": "t5", "num_buckets": 6, "max_distance": 6, "causal": True, "num_kv_heads": 2},
    "rotary": {"position": "rotary", "causal": True},
    "rotary interleaved": {"position": "rotary", "rotary_dim": 4, "rotary_interleaved": True, "rotary_base": 50.0},
}
PARALLEL = {
    "parallel": {"parallel_residual": True, "norm_first": True},
    "shared norm": {"parallel_residual": True, "shared_norm": True, "norm_first": True, "norm": "rms_norm"},
}


def everywhere(names, *on_every_backend):
    """(name, target): all the names on the default backend, which layers do not see, and some on every one."""
    return [
        pytest.param(name, *target.values, id=f"{name}-{target.id}", marks=target.marks)
        for name in names
        for target in (SERVING if name in on_every_backend else DEFAULT)
    ]


class Plain:
    """The forward of a block, written out; the layer's own modules only hold the parameters. self.options: its own."""

    def forward(
        self, x, memory=None, mask=None, padding=None, memory_padding=None, positions=None, relative_bias=None
    ) -> Tensor:
        o = self.options

        def norm(name, t):
            module = getattr(self, f"{name}_norm")
            if module is None:
                return norm("self_attn", t)
            if o.get("norm") == "rms_norm":
                return t * (t.square().mean(-1, keepdim=True) + module.eps).rsqrt() * module.weight
            return F.layer_norm(t, (E,), module.weight, module.bias, module.eps)

        def drop(t, p):
            return F.dropout(t, p, self.training)

        sublayers = [("self_attn", lambda t: self.attend_self(t, mask, padding, positions, relative_bias, drop))]
        if memory is not None:
            sublayers += [("cross_attn", lambda t: self.attend_cross(t, memory, memory_padding, drop))]
        sublayers += [("ffn", lambda t: self.feed(t, drop))]
        if o.get("parallel_residual"):
            return x + sum(drop(branch(norm(name, x)), self.dropout.p) for name, branch in sublayers)
        for name, branch in sublayers:
            if o.get("norm_first"):
                x = x + drop(branch(norm(name, x)), self.dropout.p)
            else:
                x = norm(name, x + drop(branch(x), self.dropout.p))
        return x

    def feed(self, x, drop):
        hidden = F.linear(x, self.ffn.linear1.weight, self.ffn.linear1.bias)
        name = self.options.get("activation", "relu")
        activation = {
            "relu": F.relu,
            "silu": F.silu,
            "gelu": F.gelu,
            "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
            "swiglu": lambda t: F.silu(t[..., :FF]) * t[..., FF:],
            "reglu": lambda t: F.relu(t[..., :FF]) * t[..., FF:],
            "geglu": lambda t: F.gelu(t[..., :FF]) * t[..., FF:],
            "geglu_tanh": lambda t: F.gelu(t[..., :FF], approximate="tanh") * t[..., FF:],
        }
        hidden = name(hidden) if callable(name) else activation[name](hidden)
        return F.linear(drop(hidden, self.ffn.dropout.p), self.ffn.linear2.weight, self.ffn.linear2.bias)

    def heads(self, x, weight, bias, count):
        return F.linear(x, weight, bias).view(*x.shape[:2], count, -1).transpose(1, 2)

    def attend_self(self, x, mask, padding, positions, relative_bias, drop):
        o, attn, length = self.options, self.self_attn, x.shape[1]
        kv = o.get("num_kv_heads", H)
        q, k, v = self.heads(x, attn.qkv.weight, attn.qkv.bias, H + 2 * kv).split([H, kv, kv], 1)
        i = torch.arange(length)
        distance = i[None, :] - i[:, None]
        bias = torch.zeros(1, H, length, length, dtype=x.dtype)
        if o.get("position") == "rotary":
            q, k = (self.rotate(t, i if positions is None else positions) for t in (q, k))
        elif o.get("position") == "alibi":
            bias = bias - (0.5 ** (2 * torch.arange(1, 5)))[:, None, None] * distance.abs()  # 4 heads: 1/4 ... 1/256
        elif o.get("position") == "t5":
            table = attn.position.weight if relative_bias is None else relative_bias.table
            buckets = bucket(distance, o["num_buckets"], not o.get("causal"), o["max_distance"])
            bias = bias + table[buckets].permute(2, 0, 1)
        hidden = (distance > 0) if o.get("causal") else torch.zeros_like(distance, dtype=torch.bool)
        if "window" in o:
            left, right = o["window"]
            hidden = hidden | (distance < -left) | (distance > right)
        return self.weigh(attn, q, k, v, bias, hidden, mask, padding, drop)

    def attend_cross(self, x, memory, padding, drop):
        attn, kv = self.cross_attn, self.options.get("num_kv_heads", H)
        q = self.heads(x, attn.query.weight, attn.query.bias, H)
        k, v = self.heads(memory, attn.kv.weight, attn.kv.bias, 2 * kv).split([kv, kv], 1)
        return self.weigh(attn, q, k, v, 0.0, torch.tensor(False), None, padding, drop)

    def weigh(self, attn, q, k, v, bias, hidden, mask, padding, drop):
        o = self.options
        k, v = (t.repeat_interleave(H // k.shape[1], 1) for t in (k, v))
        scores = q @ k.mT * o.get("scale", 1 / math.sqrt(q.shape[-1]))
        if "softcap" in o:
            scores = o["softcap"] * torch.tanh(scores / o["softcap"])
        scores = scores + bias
        if mask is not None:
            scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -torch.inf)
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None], -torch.inf)
        weights = drop(scores.masked_fill(hidden, -torch.inf).softmax(-1), attn.dropout)
        return F.linear((weights @ v).transpose(1, 2).flatten(2), attn.out.weight, attn.out.bias)

    def rotate(self, x, positions):
        o = self.options
        dim = o.get("rotary_dim", x.shape[-1])
        angle = positions[..., None].double() / o.get("rotary_base", 1e4) ** (torch.arange(0, dim, 2) / dim).double()
        turn = torch.polar(torch.ones_like(angle), angle)
        turn = turn[:, None] if turn.dim() == 3 else turn
        pairs = x[..., :dim].unflatten(-1, (-1, 2) if o.get("rotary_interleaved") else (2, -1))
        pairs = pairs if o.get("rotary_interleaved") else pairs.mT
        turned = torch.view_as_real(torch.view_as_complex(pairs.double().contiguous()) * turn).to(x.dtype)
        turned = turned if o.get("rotary_interleaved") else turned.mT
        return torch.cat([turned.flatten(-2), x[..., dim:]], -1)


def pair(kind: type, **options):
    """(the layer, the same in plain PyTorch), no parameter at its initial value."""
    ours = kind(*SIZES, **{"dropout": 0.0} | options)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    theirs = deepcopy(ours)
    theirs.__class__ = type("Plain" + kind.__name__, (Plain, kind), {})
    theirs.options = ({"causal": True} if kind is DecoderLayer else {}) | options
    return ours, theirs


class Renamed(torch.nn.Module):
    """A pyllm layer under Plain's names for the arguments."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, memory=None, mask=None, padding=None, memory_padding=None, **options):
        if type(self.layer) is EncoderLayer:
            return self.layer(x, mask, padding, **options)
        masks = {"tgt_key_padding_mask": padding, "memory_key_padding_mask": memory_padding}
        return self.layer(x, memory, mask, **masks, **options)

    def named_parameters(self):
        return self.layer.named_parameters()


def allowed(*shape: int) -> Tensor:
    """True = take part, the diagonal and the first key always."""
    mask = torch.rand(shape) < 0.6
    mask[..., 0] = True
    return mask | torch.eye(*shape[-2:], dtype=torch.bool) if shape[-1] == shape[-2] else mask


@contextmanager
def on(target):
    """Everything on the target's device and backend."""
    backend, device = target
    with torch.device(device), pyllm.use_backend(backend):
        yield


# --- numbers ---


@pytest.mark.parametrize("name, target", everywhere([*OPTIONS, *PARALLEL], "rms pre-norm"))
def test_encoder_layer(name: str, target):
    with on(target):
        ours, theirs = pair(EncoderLayer, **(OPTIONS | PARALLEL)[name])
        padding = torch.arange(L) >= torch.tensor([L, L - 2, L - 1])[:, None]
        compare(Renamed(ours), theirs, torch.randn(B, L, E), mask=torch.randn(B, 1, L, L), padding=padding)


@pytest.mark.parametrize("name, target", everywhere(OPTIONS, "t5 causal"))
def test_decoder_layer(name: str, target):
    with on(target):
        ours, theirs = pair(DecoderLayer, **OPTIONS[name])
        padding = torch.arange(S) >= torch.tensor([S, S - 2, 1])[:, None]
        inputs = [torch.randn(B, L, E), torch.randn(B, S, E)]
        compare(Renamed(ours), theirs, *inputs, mask=allowed(L, L), memory_padding=padding)


@pytest.mark.parametrize("interleaved", [False, True])
def test_positions_of_each_sequence(interleaved: bool):
    """Given as positions, or as the tables made of them."""
    ours, theirs = pair(EncoderLayer, position="rotary", rotary_interleaved=interleaved)
    positions, x = torch.randint(50, (B, L)), torch.randn(B, L, E)
    compare(Renamed(ours), theirs, x, positions=positions)
    tables = ours.self_attn.position.tables(positions)
    assert torch.equal(ours(x, rotary=tables), ours(x, positions=positions))
    assert not torch.equal(ours(x), ours(x, positions=positions))


@pytest.mark.parametrize("position", ["none", "t5"])
def test_a_shared_bias_takes_the_place_of_the_layers_own(position: str):
    ours, theirs = pair(EncoderLayer, **OPTIONS["t5"] | {"position": position})
    theirs.options = OPTIONS["t5"]
    shared = RelativePositionBias(H, 8, 6)
    compare(Renamed(ours), theirs, torch.randn(B, L, E), relative_bias=shared())
    ours(torch.randn(B, L, E), relative_bias=shared()).sum().backward()
    assert shared.weight.grad.any() and all(p.grad is None for n, p in ours.named_parameters() if "position" in n)


@pytest.mark.parametrize("site", ["dropout", "ffn.dropout", "self_attn", "cross_attn"])
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"norm_first": True, "norm": "rms_norm"}], ids=str)
def test_dropout_is_where_it_belongs(site: str, options: dict):
    """Each site alone: with p = 1 nothing is random; with p = 1/2 the generator decides, and only in training."""
    ours, theirs = pair(DecoderLayer, **options)
    inputs = [torch.randn(B, L, E), torch.randn(B, S, E)]
    for layer in (ours, theirs):
        setattr(layer.get_submodule(site), "dropout" if "attn" in site else "p", 1.0)
    compare(Renamed(ours), theirs, *inputs)
    setattr(ours.get_submodule(site), "dropout" if "attn" in site else "p", 0.5)
    assert not torch.equal(ours(*inputs), ours(*inputs))
    ours.eval()
    assert torch.equal(ours(*inputs), ours(*inputs))


def test_dropout_arguments():
    layer = DecoderLayer(*SIZES, dropout=0.25)
    assert {layer.dropout.p, layer.ffn.dropout.p, layer.self_attn.dropout, layer.cross_attn.dropout} == {0.25}
    layer = DecoderLayer(*SIZES, dropout=0.25, attention_dropout=0.5)
    assert layer.dropout.p == layer.ffn.dropout.p == 0.25
    assert layer.self_attn.dropout == layer.cross_attn.dropout == 0.5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, PARALLEL["parallel"] | {"causal": True}], ids=str)
def test_an_all_padded_sample_stays_finite(options: dict, training: bool):
    layer = EncoderLayer(*SIZES, **options).train(training)
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[-1] = True
    found = results(layer, [torch.randn(B, L, E)], {"src_key_padding_mask": padding})
    assert all(t.isfinite().all() for t in found.values())


# --- generation ---

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
    ],
)
def test_wrong_use_of_a_cache_is_named(state: dict, call: dict, error: type[Exception], message: str):
    cache = KVCache(1, B, L, H, E // H)
    options = {"causal": True, "training": False, "grad": False} | state
    training, grad = options.pop("training"), options.pop("grad")
    layer = EncoderLayer(*SIZES, **options).train(training)
    with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
        layer(torch.randn(B, L, E), cache=cache, **call)
    with pytest.raises(ValueError, match="new must be a number"):
        cache.advance([1])


# --- as torch's users handle layers ---

KINDS = [(EncoderLayer, o) for o in (OPTIONS | PARALLEL).values()] + [(DecoderLayer, OPTIONS["rotary"])]
IDS = [*OPTIONS, *PARALLEL, "decoder"]


@pytest.mark.parametrize("kind, options", KINDS, ids=IDS)
def test_state_and_copies(kind: type, options: dict):
    layer = kind(*SIZES, **options).eval()
    inputs = [torch.randn(B, L, E)] * (2 if kind is DecoderLayer else 1)
    expected = layer(*inputs)
    other = kind(*SIZES, **options).eval()
    other.load_state_dict(layer.state_dict(), strict=True)
    for twin in (other, deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(*inputs), expected)
        assert str(twin) == str(layer)
    meta = kind(*SIZES, **options, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in meta.parameters()} == {("meta", torch.bfloat16)}


def test_state_has_the_documented_names():
    assert set(EncoderLayer(*SIZES, position="t5", norm="rms_norm", ffn_bias=False).state_dict()) == {
        *("self_attn.qkv.weight", "self_attn.qkv.bias", "self_attn.out.weight", "self_attn.out.bias"),
        *("self_attn.position.weight", "ffn.linear1.weight", "ffn.linear2.weight"),
        *("self_attn_norm.weight", "ffn_norm.weight"),
    }
    decoder = DecoderLayer(*SIZES, qkv_bias=False, out_bias=False, ffn_bias=False, norm_bias=False).state_dict()
    parts = ("self_attn.qkv", "self_attn.out", "cross_attn.query", "cross_attn.kv", "cross_attn.out", "ffn.linear1")
    norms = ("self_attn_norm", "cross_attn_norm", "ffn_norm")
    assert set(decoder) == {f"{name}.weight" for name in (*parts, "ffn.linear2", *norms)}
    assert decoder["self_attn.qkv.weight"].shape == (3 * E, E)


def test_a_layer_shows_what_it_is():
    text = str(DecoderLayer(*SIZES, num_kv_heads=2, window=(5, 0), position="alibi", activation="swiglu"))
    for part in ("heads=4, kv_heads=2, head_dim=6", "window=(5, 0)", "causal=True", "alibi", "activation=swiglu"):
        assert part in text
    assert "Rotary(4, base=10000, interleaved=False)" in str(EncoderLayer(*SIZES, position="rotary", rotary_dim=4))


@pytest.mark.parametrize("kind, options", KINDS, ids=IDS)
def test_autocast(kind: type, options: dict):
    """Parameters and the residual stream stay float32, and errors are of bfloat16's size."""
    ours, theirs = pair(kind, **options)
    inputs = [torch.randn(B, L, E)] * (2 if kind is DecoderLayer else 1)
    with torch.autocast("cpu", torch.bfloat16):
        actual, plain = results(Renamed(ours), inputs, {}), results(theirs, inputs, {})
    truth = results(deepcopy(theirs).double(), inputs, {}, torch.float64)
    assert {t.dtype for t in actual.values()} == {torch.float32}
    assert_within_budget("output", actual["output 0"], truth["output 0"], plain["output 0"].float())


@pytest.mark.parametrize(
    "kind, options",
    [
        (EncoderLayer, OPTIONS["rms pre-norm"]),
        (EncoderLayer, OPTIONS["alibi"] | {"num_kv_heads": 2, "window": (3, 0)}),
        (EncoderLayer, OPTIONS["rotary"] | PARALLEL["parallel"]),
        (DecoderLayer, OPTIONS["t5 causal"]),
    ],
    ids=["rms", "alibi", "rotary", "t5 decoder"],
)
def test_compiles_into_one_graph(kind: type, options: dict):
    torch._dynamo.reset()
    ours, theirs = pair(kind, **options)
    inputs = [torch.randn(B, L, E)] * (2 if kind is DecoderLayer else 1)
    ours.forward = torch.compile(ours.forward, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (L, L + 4):
            inputs = [torch.randn(B, length, E)] * len(inputs)
            compare(Renamed(ours), theirs, *inputs)


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


def test_every_operator_call_is_fused():
    layer = DecoderLayer(*SIZES, **OPTIONS["t5 causal"], norm_first=True)
    calls = pyllm.explain(layer, torch.randn(B, L, E), torch.randn(B, S, E), strict=True)
    assert [call.op for call in calls] == ["layer_norm", "attention", "add_layer_norm", "attention", "add_layer_norm"]
    layer = EncoderLayer(*SIZES, norm="rms_norm")
    assert [call.op for call in pyllm.explain(layer, torch.randn(B, L, E), strict=True)] == [
        *("attention", "add_rms_norm", "add_rms_norm")
    ]


BAD = [
    ({"d_model": 25}, "d_model 25 must be a multiple of nhead 4"),
    ({"nhead": 0}, "nhead must be an int, 1 or more"),
    ({"dim_feedforward": 0}, "dim_feedforward must be an int"),
    ({"head_dim": 257}, "head_dim must be from 1 to 256"),
    ({"num_kv_heads": 3}, "nhead 4 must be a multiple of num_kv_heads 3"),
    ({"num_kv_heads": 0}, "num_kv_heads must be an int"),
    ({"attention_dropout": 1.5}, "attention_dropout must be in"),
    ({"dropout": 1.5}, "attention_dropout must be in|dropout probability"),
    ({"activation": "tanh"}, "activation must be a callable or one of relu, .*swiglu"),
    ({"activation": 3}, "activation must be a callable"),
    ({"norm": "batch_norm"}, "norm must be 'layer_norm' or 'rms_norm'"),
    ({"parallel_residual": True}, "parallel_residual needs norm_first=True"),
    ({"shared_norm": True}, "shared_norm needs parallel_residual=True"),
    ({"position": "learned"}, "position must be one of none, alibi, t5, rotary"),
    ({"rotary_dim": 4}, "rotary_dim must be up to head_dim 6, with position='rotary'"),
    ({"rotary_dim": 8, "position": "rotary"}, "rotary_dim must be up to head_dim 6"),
    ({"rotary_dim": 3, "position": "rotary"}, "dim must be even"),
    ({"rotary_base": 0.0, "position": "rotary"}, "base must be positive"),
    ({"num_buckets": 3, "position": "t5"}, "table must have"),
    ({"max_distance": 4, "position": "t5"}, "max_distance must be"),
]


@pytest.mark.parametrize("wrong, message", BAD, ids=[message for _, message in BAD])
def test_wrong_options_are_named(wrong: dict, message: str):
    sizes = {"d_model": E, "nhead": H, "dim_feedforward": FF}
    with pytest.raises(ValueError, match=message):
        EncoderLayer(**sizes | wrong)


def test_wrong_calls_are_named():
    x = torch.randn(B, L, E)
    with pytest.raises(ValueError, match="parallel_residual has no place for cross-attention"):
        DecoderLayer(*SIZES, parallel_residual=True, norm_first=True)
    with pytest.raises(ValueError, match="memory must be given"):
        DecoderLayer(*SIZES)(x)
    with pytest.raises(ValueError, match="memory and its masks must not be given"):
        DecoderLayer(*SIZES, cross=False)(x, x)
    with pytest.raises(ValueError, match="positions and rotary are for position='rotary'"):
        EncoderLayer(*SIZES)(x, positions=torch.arange(L))
    rotary = EncoderLayer(*SIZES, position="rotary")
    with pytest.raises(ValueError, match="positions must not be given with rotary"):
        rotary(x, positions=torch.arange(L), rotary=rotary.self_attn.position.tables(torch.arange(L)))


# --- positions that are added ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sinusoidal_positions(dtype: torch.dtype):
    module = SinusoidalPositions(6, 50, dtype=dtype)
    expected = torch.empty(50, 6, dtype=torch.float64)
    for position in range(50):
        for pair in range(3):
            angle = position / 10000 ** (2 * pair / 6)
            expected[position, 2 * pair], expected[position, 2 * pair + 1] = math.sin(angle), math.cos(angle)
    x = torch.randn(B, 50, 6, dtype=dtype)
    torch.testing.assert_close(module(x), x + expected.to(dtype))
    assert not module.state_dict() and str(module) == "SinusoidalPositions(6, max_len=50)"
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("module", [SinusoidalPositions(E, 50), LearnedPositions(50, E)], ids=["sinusoidal", "learned"])
def test_added_positions(module):
    x, positions = torch.randn(B, L, E), torch.randint(50, (B, L))
    table = module(torch.zeros(1, 50, E))[0]
    torch.testing.assert_close(module(x), x + table[:L])
    torch.testing.assert_close(module(x, positions), x + table[positions])
    torch.testing.assert_close(module(x, positions[0]), x + table[positions[0]])
    with pytest.raises(ValueError, match="Positions: x must have at most max_len = 50 positions, got 51"):
        module(torch.zeros(1, 51, E))
    with pytest.raises(ValueError, match="d_model must be even"):
        SinusoidalPositions(5)


def test_learned_positions_are_learned():
    module = LearnedPositions(50, E)
    assert [(n, tuple(p.shape)) for n, p in module.named_parameters()] == [("weight", (50, E))]
    module(torch.zeros(B, L, E)).sum().backward()
    assert (module.weight.grad[:L] == B).all() and not module.weight.grad[L:].any()


def test_relative_position_bias_makes_the_operators_bias():
    module = RelativePositionBias(H, 16, 64, bidirectional=False)
    bias = module()
    assert isinstance(bias, RelativeBias) and bias.table is module.weight and tuple(module.weight.shape) == (16, H)
    assert (bias.bidirectional, bias.max_distance) == (False, 64)
    assert str(module) == "RelativePositionBias(4, num_buckets=16, max_distance=64, bidirectional=False)"
