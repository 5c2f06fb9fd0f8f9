"""EncoderLayer and DecoderLayer: against the same written in plain PyTorch, and as torch.nn's users handle layers."""

import math
import pickle
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from block_case import FF, OPTIONS, PARALLEL, SIZES, B, E, H, L, S, everywhere, on
from torch import Tensor
from torch_parity import compare, results

import pyllm
from pyllm.nn import DecoderLayer, EncoderLayer, RelativePositionBias
from pyllm.nn.memory import PLANS
from pyllm.ops.relative_bias import bucket
from pyllm.testing import assert_within_budget


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


def test_every_operator_call_is_fused():
    layer = DecoderLayer(*SIZES, **OPTIONS["t5 causal"], norm_first=True)
    calls = pyllm.explain(layer, torch.randn(B, L, E), torch.randn(B, S, E), strict=True)
    attending = ["attention", "add_layer_norm"]
    assert [call.op for call in calls] == ["layer_norm", *attending, *attending, "activation", "dropout_add"]
    layer = EncoderLayer(*SIZES, norm="rms_norm")
    for save in PLANS:
        layer.save = save
        assert [call.op for call in pyllm.explain(layer, torch.randn(B, L, E), strict=True)] == [
            *("attention", "add_rms_norm", "activation", "add_rms_norm")
        ]


BAD = [
    ({"d_model": 25}, "d_model 25 must be a multiple of nhead 4"),
    ({"nhead": 0}, "nhead must be an int, 1 or more"),
    ({"dim_feedforward": 0}, "dim_feedforward must be an int"),
    ({"head_dim": 0}, "head_dim must be 1 or more"),
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
