"""pyllm.nn's modules against torch.nn's of the same name: numbers, gradients, empty rows, dropout, errors."""

from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch_parity import MODULES, SMALL, E, H, assert_parity, compare, pair, results

import pyllm.nn
from pyllm import use_backend
from pyllm.backend import recording
from pyllm.testing import assert_within_budget

pytestmark = pytest.mark.usefixtures("one_thread")

L, S, B = 5, 7, 4
LAYER = (E, H, 40, 0.0)
LAYERS = ["TransformerEncoderLayer", "TransformerDecoderLayer"]
CAUSAL = torch.full((L, L), -torch.inf).triu(1)


def stack(name, module, norm=None, **kwargs):
    """A TransformerEncoder or TransformerDecoder of two layers from pyllm.nn or torch.nn."""
    layer = getattr(module, f"Transformer{name}Layer")(*LAYER, **kwargs)
    return getattr(module, f"Transformer{name}")(layer, 2, norm)


def inputs(name: str, *, batch_first=True, batched=True, dtype=torch.float32, device="cpu"):
    """What the forward of a layer or a stack takes: (tgt, memory) for a decoder, (src,) for an encoder."""
    lengths = (L, S) if "Decoder" in name or name == "Transformer" else (L,)
    shapes = [((B, n, E) if batch_first else (n, B, E)) if batched else (n, E) for n in lengths]
    return [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]


def allowed(*shape) -> torch.Tensor:
    """A bool mask of torch.nn (True = ignore) that leaves the first key of every row."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


# --- numbers ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_every_backend(target, norm_first, dtype):
    backend, device = target
    options = {"norm_first": norm_first, "device": device, "dtype": dtype}
    # relu's derivative jumps: in 16 bits a rounding error beside the jump is as large as the gradient itself
    ours, theirs = pair("TransformerDecoderLayer", *LAYER, "gelu", **options)
    arguments = inputs("Decoder", batch_first=False, dtype=dtype, device=device)
    masks = {"tgt_mask": CAUSAL.to(device, dtype), "tgt_is_causal": True}
    if backend != "torch":  # which is not allowed masks that might leave a row empty
        masks["memory_key_padding_mask"] = allowed(B, S).to(device)
    with use_backend(backend):
        compare(ours, theirs, *arguments, **masks)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ["relu", "gelu", torch.nn.functional.silu], ids=["relu", "gelu", "callable"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_constructor_arguments(name, norm_first, batch_first, activation, bias):
    options = {"norm_first": norm_first, "batch_first": batch_first, "activation": activation, "bias": bias}
    ours, theirs = pair(name, *LAYER, layer_norm_eps=1e-2, **options)
    compare(ours, theirs, *inputs(name, batch_first=batch_first))
    compare(ours.eval(), theirs.eval(), *inputs(name, batched=False))


@pytest.mark.parametrize(
    "activation, fused",
    [
        (partial(F.gelu, approximate="tanh"), True),
        (torch.nn.GELU("tanh"), True),
        (torch.nn.SiLU(), True),
        (partial(F.leaky_relu, negative_slope=0.2), False),
        (torch.tanh, False),
    ],
    ids=["partial gelu", "module gelu", "module silu", "partial leaky", "tanh"],
)
def test_an_activation_that_the_kernel_knows_is_fused(activation, fused):
    ours, theirs = pair("TransformerEncoderLayer", *LAYER, activation=activation)
    with recording() as calls:
        compare(ours, theirs, *inputs("TransformerEncoderLayer"))
    assert any(call.op == "activation" for call in calls) == fused


ATTENTIONS = {
    "self": {},
    "cross": {},
    "all different": {"bias": False},
    "kdim": {"kdim": 10, "vdim": 9},
    "bias_kv": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True, "add_bias_kv": True},
}
MASKS = {
    "none": lambda s: {},
    "bool": lambda s: {"attn_mask": allowed(L, s)},
    "float": lambda s: {"attn_mask": torch.randn(L, s)},
    "bool heads": lambda s: {"attn_mask": allowed(B * H, L, s)},
    "float heads": lambda s: {"attn_mask": torch.randn(B * H, L, s)},
    "padding": lambda s: {"key_padding_mask": allowed(B, s)},
    "float padding": lambda s: {"key_padding_mask": torch.randn(B, s)},
    "bool, padding": lambda s: {"attn_mask": allowed(L, s), "key_padding_mask": allowed(B, s)},
    "float, float padding": lambda s: {"attn_mask": torch.randn(L, s), "key_padding_mask": torch.randn(B, s)},
    "bool, float padding": lambda s: {"attn_mask": allowed(L, s), "key_padding_mask": torch.randn(B, s)},
    "float heads, padding": lambda s: {"attn_mask": torch.randn(B * H, L, s), "key_padding_mask": allowed(B, s)},
    "causal": lambda s: {"attn_mask": torch.full((L, s), -torch.inf).triu(1), "is_causal": True},
    "bool causal, padding": lambda s: {
        "attn_mask": torch.ones(L, s, dtype=torch.bool).triu(1),
        "is_causal": True,
        "key_padding_mask": allowed(B, s),
    },
}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention(kind, masks):
    """All ways to mask, with and without weights, averaged or not, batch or sequence first."""
    batch_first = "bool" in masks
    ours, theirs = pair("MultiheadAttention", E, H, batch_first=batch_first, **ATTENTIONS[kind])
    x = torch.randn(B, L, E)
    y, z = (torch.randn(B, S, ATTENTIONS[kind].get(width, E)) for width in ("kdim", "vdim"))
    arguments = {"self": [x, x, x], "cross": [x, y, y]}.get(kind, [x, y, z])
    if not batch_first:
        moved = {id(t): t.transpose(0, 1).contiguous() for t in arguments}
        arguments = [moved[id(t)] for t in arguments]
    options = MASKS[masks](L if kind == "self" else S)
    compare(ours, theirs, *arguments, need_weights=False, **options)
    compare(ours, theirs, *arguments, **options)
    compare(ours.eval(), theirs.eval(), *arguments, average_attn_weights=False, **options)


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
def test_attention_of_one_sample(need_weights):
    ours, theirs = pair("MultiheadAttention", E, H)
    x, y = torch.randn(L, E), torch.randn(S, E)
    for masks in ({"attn_mask": allowed(H, L, S)}, {"attn_mask": torch.randn(L, S)}, {"key_padding_mask": allowed(S)}):
        compare(ours, theirs, x, y, y, need_weights=need_weights, **masks)


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
@pytest.mark.parametrize("masks", ["bool", "float", "hint"])
def test_transformer(batch_first, masks):
    options = {**SMALL, "dropout": 0.0, "norm_first": batch_first, "batch_first": batch_first}
    ours, theirs = pair("Transformer", **options)
    tgt, src = inputs("Transformer", batch_first=batch_first)
    masks = {
        "bool": {"tgt_mask": CAUSAL.bool(), "src_key_padding_mask": allowed(B, S)},
        "float": {"src_mask": torch.randn(S, S), "memory_mask": torch.randn(L, S), "tgt_mask": CAUSAL},
        "hint": {
            "tgt_mask": CAUSAL,
            "tgt_is_causal": True,
            "memory_mask": torch.ones(L, S, dtype=torch.bool).triu(1),
            "memory_is_causal": True,
            "memory_key_padding_mask": allowed(B, S),
        },
    }[masks]
    compare(ours, theirs, src, tgt, **masks)
    compare(ours.eval(), theirs.eval(), src, tgt, **masks)


@pytest.mark.parametrize("name", ["Encoder", "Decoder"])
def test_stacks(name):
    ours, theirs = (stack(name, m, m.LayerNorm(E)) for m in (pyllm.nn, torch.nn))
    theirs.load_state_dict(ours.state_dict())
    mask = {"mask": CAUSAL} if name == "Encoder" else {"tgt_mask": CAUSAL}
    compare(ours, theirs, *inputs(name, batch_first=False), **mask)
    compare(ours, theirs, *inputs(name, batched=False), **mask)


@pytest.mark.parametrize("shape", [E, (E,), [L, E]], ids=str)
@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}, {"eps": 0.1}, {"bias": False}], ids=str)
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_norms(name, shape, options):
    if name == "RMSNorm" and "bias" in options:
        options = {}
    compare(*pair(name, shape, **options), torch.randn(B, L, E))


@pytest.mark.parametrize("dim", [None, 0, -1])
@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_softmax(dim):
    compare(*pair("Softmax", dim), torch.randn(B, L, E))


def test_training_follows_torch():
    """The losses of four steps of SGD, and that they fall."""
    ours, theirs = pair("Transformer", **SMALL, dropout=0.0)
    tgt, src = inputs("Transformer", batch_first=False)
    target = torch.randn(L, B, E)

    def losses(model, dtype):
        model = deepcopy(model).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        found = []
        for _ in range(4):
            loss = (model(src.to(dtype), tgt.to(dtype), tgt_mask=CAUSAL.to(dtype)) - target.to(dtype)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        return torch.stack(found)

    actual = losses(ours, torch.float32)
    assert_within_budget("losses", actual, losses(theirs, torch.float64), losses(theirs, torch.float32))
    assert (actual[1:] < actual[:-1]).all()


# --- masks that leave nothing ---


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("masks", ["padding", "float padding", "bool", "float"])
def test_an_empty_row_attends_to_nothing(masks, need_weights):
    attention = pyllm.nn.MultiheadAttention(E, H, batch_first=True)
    torch.nn.init.normal_(attention.out_proj.bias)
    x = torch.randn(B, S, E)
    hidden = torch.zeros(B, S, dtype=torch.bool)
    hidden[1] = True
    options = {"key_padding_mask": hidden}
    if masks == "float padding":
        options = {"key_padding_mask": torch.zeros(B, S).masked_fill(hidden, -torch.inf)}
    elif masks != "padding":
        hidden = hidden.repeat_interleave(H, 0)[:, None].expand(B * H, S, S)
        options = {"attn_mask": hidden if masks == "bool" else torch.zeros(B * H, S, S).masked_fill(hidden, -torch.inf)}
    found = results(attention, [x, x, x], {"need_weights": need_weights, **options})
    assert torch.equal(found["output 0"][1], attention.out_proj.bias.expand(S, E))
    if need_weights:
        assert not found["output 1"][1].any()
    assert not found["gradient of input 0"][1].any()
    assert all(t.isfinite().all() for n, t in found.items())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("name", ["Encoder", "Decoder"])
def test_an_all_padded_sample_stays_finite(name, norm_first, training):
    """With gradients and, where torch would take its fast path, without; the other samples do not notice."""
    model = stack(name, pyllm.nn, batch_first=True, norm_first=norm_first).train(training)
    arguments = inputs(name)
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[-1] = True
    masks = {"src_key_padding_mask": padding} if name == "Encoder" else {"tgt_key_padding_mask": padding}
    if name == "Decoder":
        masks["memory_key_padding_mask"] = padding[:, :1].expand(B, S)
    found = results(model, arguments, masks)
    assert all(t.isfinite().all() for t in found.values())
    with torch.no_grad():
        assert torch.equal(model(*arguments, **masks), found["output 0"])
    others = results(model, [t[:-1] for t in arguments], {n: m[:-1] for n, m in masks.items()})
    assert_within_budget("other samples", found["output 0"][:-1], others["output 0"].double(), others["output 0"])


# --- dropout ---


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize(
    ("name", "site"),
    [("TransformerEncoderLayer", s) for s in ("self_attn", "dropout", "dropout1", "dropout2")]
    + [("TransformerDecoderLayer", s) for s in ("self_attn", "multihead_attn", "dropout", "dropout2", "dropout3")],
)
def test_dropout_is_where_torch_has_it(name, site, norm_first):
    """Each dropout alone: with p = 1 nothing is random; with p = 1/2 the generator decides, and only in training."""
    ours, theirs = pair(name, *LAYER, norm_first=norm_first)
    arguments = inputs(name, batch_first=False)

    def drop(p):
        for model in (ours, theirs):
            module = getattr(model, site)
            setattr(module, "dropout" if "attn" in site else "p", p)

    drop(1.0)
    compare(ours, theirs, *arguments)
    compare(ours.eval(), theirs.eval(), *arguments)
    drop(0.5)
    torch.manual_seed(1)
    assert torch.equal(ours(*arguments), ours(*arguments)), "eval"
    ours.train()
    first, second = ours(*arguments), ours(*arguments)
    assert not torch.equal(first, second)


def test_returned_weights_are_those_that_made_the_output():
    """With dropout: output = (returned weights) values, projected."""
    attention = pyllm.nn.MultiheadAttention(E, H, dropout=0.5, batch_first=True)
    x = torch.randn(B, L, E)

    def expected(weights, dtype):
        w = attention.in_proj_weight[2 * E :].to(dtype)
        values = (x.to(dtype) @ w.mT).unflatten(-1, (H, -1)).transpose(1, 2)
        merged = (weights.to(dtype) @ values).transpose(1, 2).flatten(-2)
        return merged @ attention.out_proj.weight.to(dtype).mT

    out, weights = attention(x, x, x, average_attn_weights=False)
    assert (weights == 0).any(), "dropout is visible in the weights"
    assert_within_budget("output", out, expected(weights, torch.float64), expected(weights, torch.float32))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_output_does_not_depend_on_need_weights(dropout):
    """To the bit, with the same dropout; no gradient is lost either."""
    attention = pyllm.nn.MultiheadAttention(E, H, dropout=dropout)
    arguments, masks = inputs("Decoder", batch_first=False), {"key_padding_mask": allowed(B, S)}
    arguments.append(arguments[1])
    torch.manual_seed(4)
    with_weights = attention(*arguments, **masks)[0]
    torch.manual_seed(4)
    without = attention(*arguments, need_weights=False, **masks)[0]
    assert torch.equal(with_weights, without)
    gradients = (torch.autograd.grad(out.sum(), attention.parameters()) for out in (with_weights, without))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("name", LAYERS)
def test_checkpointing_with_dropout_changes_no_bit(name, norm_first):
    layer = getattr(pyllm.nn, name)(E, H, 40, 0.3, norm_first=norm_first)
    arguments = inputs(name, batch_first=False)
    torch.manual_seed(3)
    plain = results(layer, arguments, {})
    torch.manual_seed(3)

    class Checkpointed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, *inputs):
            return checkpoint(self.layer, *inputs, use_reentrant=False)

    again = results(Checkpointed(), arguments, {})
    assert [*plain] == [n.replace("layer.", "") for n in again]
    assert all(torch.equal(a, b) for a, b in zip(plain.values(), again.values(), strict=True))


# --- what users do to layers ---


class _SelfAttentionDoubled:
    def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):
        return 2 * super()._sa_block(x, attn_mask, key_padding_mask, is_causal)


def _call_recorder(model, site):
    calls = []
    getattr(model, site).register_forward_hook(lambda module, args, out: calls.append(site) or 2 * out)
    return calls


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("change", ["norm", "hook on norm", "hook on dropout", "block", "subclass", "identity"])
def test_changed_layers_do_what_torchs_do(change, norm_first):
    options = {"norm_first": norm_first, "batch_first": True}
    ours, theirs = pair("TransformerEncoderLayer", *LAYER, **options)
    for model in (ours, theirs):
        if change == "norm":
            model.norm2 = torch.nn.RMSNorm(E, eps=1e-3)
        elif change == "identity":
            model.dropout1 = torch.nn.Identity()
        elif change == "block":
            model._ff_block = lambda x: x.sin()
        elif change == "subclass":
            model.__class__ = type("Doubled", (_SelfAttentionDoubled, type(model)), {})
        else:
            calls = _call_recorder(model, "norm2" if "norm" in change else "dropout1")
            model(*inputs("Encoder"))
            assert calls
    compare(ours, theirs, *inputs("Encoder"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", [n for n in MODULES if n != "Softmax"])
def test_autocast(name, training, dtype):
    """Under autocast the dtypes of outputs and gradients are torch's, and the numbers within the budget."""
    args, kwargs = MODULES[name]
    ours, theirs = (
        m.train(training) for m in pair(name, *args, **kwargs, **({"dropout": 0.0} if "Tr" in name else {}))
    )
    tgt, src = inputs("Transformer", dtype=dtype)
    arguments = {
        "MultiheadAttention": [tgt, src, src],
        "TransformerDecoderLayer": [tgt, tgt],
        "Transformer": [tgt, tgt],
    }
    arguments = arguments.get(name, [tgt])

    def run(model, as_dtype):
        with torch.autocast("cpu", torch.bfloat16, enabled=as_dtype is None):
            return results(model, arguments, {}, as_dtype)

    assert_parity(run(ours, None), [(run(theirs, None), run(deepcopy(theirs).double(), torch.float64))])


@pytest.mark.parametrize("name", ["MultiheadAttention", "Transformer"])
def test_compiles_into_one_graph(name):
    """With dynamic shapes and gradients; the masks are tensors whose values the graph does not know."""
    options = {"num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 40, "dropout": 0.0}
    ours, theirs = pair(name, E, H, **(options if name == "Transformer" else {"add_bias_kv": True}))
    torch._dynamo.reset()
    ours.forward = torch.compile(ours.forward, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (L, L + 3):
            x, y = torch.randn(length, B, E), torch.randn(length, B, E)
            causal = torch.ones(length, length, dtype=torch.bool).triu(1)
            padding = allowed(B, length)
            if name == "MultiheadAttention":
                compare(ours, theirs, x, y, y, attn_mask=causal, key_padding_mask=padding)
            else:
                compare(ours, theirs, x, y, tgt_mask=causal, src_mask=causal, memory_key_padding_mask=padding)


# --- errors ---


def _attention(*args, **kwargs):
    return lambda module: module.MultiheadAttention(*args, **kwargs)


def _call(query, key, value, constructor=None, **masks):
    tensors = [torch.randn(shape) for shape in (query, key, value)]
    return lambda module: module.MultiheadAttention(E, H, **(constructor or {}))(*tensors, **masks)


_X, _Y = (L, B, E), (S, B, E)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(_attention(0, 1), id="no embed_dim"),
        pytest.param(_attention(E, 0), id="no heads"),
        pytest.param(_attention(E, 5), id="heads that do not divide"),
        pytest.param(lambda m: m.TransformerEncoderLayer(E, 5), id="layer: heads that do not divide"),
        pytest.param(lambda m: m.TransformerEncoderLayer(E, H, activation="tanh"), id="activation"),
        pytest.param(lambda m: m.TransformerEncoderLayer(E), id="no nhead"),
        pytest.param(lambda m: m.TransformerDecoderLayer(E, H, dropout=1.5), id="dropout"),
        pytest.param(lambda m: m.LayerNorm(E)(torch.randn(3, E + 1)), id="norm shape"),
        pytest.param(_call((L, B, E + 1), _Y, _Y), id="query width"),
        pytest.param(_call(_X, (S, B, 5), (S, B, 5)), id="key width"),
        pytest.param(_call(_X, _Y, _X), id="value length"),
        pytest.param(_call(_X, (S, B + 1, E), (S, B + 1, E)), id="key batch"),
        pytest.param(_call(_X, _Y, (S + 1, B, 9), {"kdim": E, "vdim": 9}), id="value length, vdim"),
        pytest.param(_call((E,), (E,), (E,)), id="rank 1"),
        pytest.param(_call(_X, (S, E), (S, E)), id="ranks differ"),
        pytest.param(_call((L, E), (S, E), (S, E), key_padding_mask=torch.zeros(1, S)), id="padding rank, one sample"),
        pytest.param(_call(_X, _Y, _Y, attn_mask=torch.zeros(L, S + 1)), id="mask shape"),
        pytest.param(_call(_X, _Y, _Y, attn_mask=torch.zeros(B, L, S)), id="mask without heads"),
        pytest.param(_call(_X, _Y, _Y, attn_mask=torch.zeros(L)), id="mask rank"),
        pytest.param(_call(_X, _Y, _Y, attn_mask=torch.zeros(L, S).int()), id="mask of integers"),
        pytest.param(_call(_X, _Y, _Y, key_padding_mask=torch.zeros(B, S + 1)), id="padding length"),
        pytest.param(_call(_X, _Y, _Y, key_padding_mask=torch.zeros(B + 1, S)), id="padding batch"),
        pytest.param(_call(_X, _Y, _Y, key_padding_mask=torch.zeros(S)), id="padding rank"),
        pytest.param(_call(_X, _Y, _Y, key_padding_mask=torch.zeros(B, S).int()), id="padding of integers"),
        pytest.param(_call(_X, _Y, _Y, is_causal=True), id="is_causal without a mask"),
        pytest.param(lambda m: m.Transformer(**SMALL)(torch.randn(L, 2, E), torch.randn(L, 3, E)), id="batches"),
        pytest.param(lambda m: m.Transformer(**SMALL)(torch.randn(L, 2, 5), torch.randn(L, 2, 5)), id="d_model"),
    ],
)
def test_errors_are_torchs(call):
    with pytest.raises(Exception) as theirs:
        call(torch.nn)
    with pytest.raises(theirs.type):
        call(pyllm.nn)


@pytest.mark.parametrize("first", [torch.bool, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("second", [torch.bool, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_masks_of_two_dtypes(dtype, second, first):
    """What torch adds is added in the dtype that comes out there."""
    ours, theirs = pair("MultiheadAttention", E, H, batch_first=True, dtype=dtype)
    x = torch.randn(2, 5, E, dtype=dtype)
    masks = {"attn_mask": torch.rand(5, 5) > 0.8, "key_padding_mask": torch.arange(5) >= torch.tensor([[5], [3]])}
    for name, kind in zip(masks, (first, second), strict=True):
        if kind != torch.bool:
            masks[name] = torch.zeros(masks[name].shape, dtype=kind).masked_fill(masks[name], -2.0)
    try:
        expected = theirs(x, x, x, **masks, need_weights=False)[0]
    except RuntimeError as error:
        assert "dtype" in str(error)
        return
    torch.testing.assert_close(ours(x, x, x, **masks, need_weights=False)[0], expected, rtol=2e-2, atol=2e-2)


def test_nested_tensors_are_refused():
    x = torch.nested.nested_tensor([torch.randn(2, E), torch.randn(3, E)])
    with pytest.raises(AssertionError, match="NestedTensor"):
        pyllm.nn.MultiheadAttention(E, H, batch_first=True)(x, x, x)
