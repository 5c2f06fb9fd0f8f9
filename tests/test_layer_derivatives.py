"""Layers under torch.func, forward mode and second derivatives: torch.nn's numbers, or autograd's own."""

from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyllm
from pyllm.nn import DecoderLayer, EncoderLayer

pytestmark = pytest.mark.usefixtures("one_thread")

E, L = 8, 5
ENCODER = {"dim_feedforward": 16, "dropout": 0.0, "batch_first": True}
GROUPED = {"num_kv_heads": 1, "norm": "rms_norm", "norm_first": True, "activation": "swiglu", "dropout": 0.0}


def softmax_classes(ns):
    return torch.nn.Sequential(torch.nn.Linear(E, E), ns.Softmax(-1))


def attend(module, x, **options):
    return module(x, x, x, **options)[0]


# name -> (a module out of torch.nn or pyllm.nn, how it is called on x (L, E) of one sample)
LAYERS = {
    "LayerNorm": (lambda ns: ns.LayerNorm(E), lambda m, x: m(x)),
    "RMSNorm": (lambda ns: ns.RMSNorm(E), lambda m, x: m(x)),
    "Softmax": (softmax_classes, lambda m, x: m(x)),
    "MultiheadAttention": (lambda ns: ns.MultiheadAttention(E, 2, batch_first=True), attend),
    "MultiheadAttention-output": (
        lambda ns: ns.MultiheadAttention(E, 2, batch_first=True, add_bias_kv=True),
        partial(attend, need_weights=False),
    ),
    "TransformerEncoderLayer": (lambda ns: ns.TransformerEncoderLayer(E, 2, **ENCODER), lambda m, x: m(x)),
    "TransformerEncoderLayer-gelu": (
        lambda ns: ns.TransformerEncoderLayer(E, 2, **ENCODER, activation="gelu", norm_first=True),
        lambda m, x: m(x),
    ),
    "TransformerDecoderLayer": (lambda ns: ns.TransformerDecoderLayer(E, 2, **ENCODER), lambda m, x: m(x, x * 2)),
    "TransformerEncoder": (
        lambda ns: ns.TransformerEncoder(ns.TransformerEncoderLayer(E, 2, **ENCODER), 2, ns.LayerNorm(E)),
        lambda m, x: m(x),
    ),
    "Transformer": (lambda ns: ns.Transformer(E, 2, 1, 1, **ENCODER), lambda m, x: m(x, x * 2)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def pair(name):
    """(pyllm.nn's module, torch.nn's with its parameters, their call), in fp64."""
    make, call = LAYERS[name]
    ours, theirs = make(pyllm.nn).double(), make(torch.nn).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs, call


def on_math(function):
    """PyTorch's other attention kernels have no such derivatives."""
    with sdpa_kernel(SDPBackend.MATH):
        return function()


def weights_of(module):
    return {name: p.detach() for name, p in module.named_parameters()}


@every_layer
def test_per_sample_gradients(name):
    x = torch.randn(3, L, E, dtype=torch.float64)

    def gradients(module, call):
        def loss(weights, x):
            return functional_call(Called(module, call), prefixed(weights), (x,)).square().sum()

        return vmap(grad(loss, (0, 1)), (None, 0))(weights_of(module), x)

    ours, theirs, call = pair(name)
    torch.testing.assert_close(gradients(ours, call), on_math(lambda: gradients(theirs, call)))


class Called(torch.nn.Module):
    """A module with its call as its forward."""

    def __init__(self, module, call):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x):
        return self.call(self.module, x)


def prefixed(weights):
    return {f"module.{name}": p for name, p in weights.items()}


@every_layer
def test_tangents(name):
    """Along inputs and weights; and along inputs alone where nothing else requires a gradient."""
    x, v = (torch.randn(L, E, dtype=torch.float64) for _ in range(2))

    def tangents(module, call):
        weights = weights_of(module)
        moved = {name: torch.ones_like(p) for name, p in weights.items()}

        def function(weights, x):
            return functional_call(Called(module, call), prefixed(weights), (x,))

        both = jvp(function, (weights, x), (moved, v))
        module.requires_grad_(False)
        return both, jvp(partial(call, module), (x,), (v,))

    ours, theirs, call = pair(name)
    torch.testing.assert_close(tangents(ours, call), on_math(lambda: tangents(theirs, call)))


@every_layer
def test_gradient_penalty(name):
    """Gradients of a loss on gradients, of inputs and of weights."""
    x = torch.randn(L, E, dtype=torch.float64)

    def penalty(module, call):
        leaf = x.clone().requires_grad_()
        (force,) = torch.autograd.grad(call(module, leaf).square().sum(), leaf, create_graph=True)
        leaves = [leaf, *module.parameters()]
        return torch.autograd.grad(force.square().sum(), leaves, allow_unused=True, materialize_grads=True)

    ours, theirs, call = pair(name)
    torch.testing.assert_close(penalty(ours, call), on_math(lambda: penalty(theirs, call)))


@every_layer
def test_batched_gradients(name):
    """autograd.grad(is_grads_batched=True) is a loop over the gradients."""
    ours, _, call = pair(name)
    x = torch.randn(L, E, dtype=torch.float64, requires_grad=True)
    out = call(ours, x)
    cotangents = torch.randn(3, *out.shape, dtype=torch.float64)
    leaves = [x, *ours.parameters()]
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    batched = torch.autograd.grad(out, leaves, cotangents, is_grads_batched=True, **options)
    singles = [torch.autograd.grad(out, leaves, c, **options) for c in cotangents]
    torch.testing.assert_close(batched, tuple(torch.stack(parts) for parts in zip(*singles, strict=True)))


BLOCKS = {
    "encoder": lambda **o: EncoderLayer(E, 2, 16, dropout=0.0, **o),
    "rotary": lambda **o: EncoderLayer(E, 2, 16, position="rotary", causal=True, **GROUPED, **o),
    "t5": lambda **o: EncoderLayer(E, 2, 16, position="t5", num_buckets=4, max_distance=8, dropout=0.0, **o),
    "alibi-parallel": lambda **o: EncoderLayer(
        E, 2, 16, position="alibi", norm_first=True, parallel_residual=True, dropout=0.0, **o
    ),
    "decoder": lambda **o: DecoderLayer(E, 2, 16, causal=True, dropout=0.0, **o),
}


@pytest.mark.parametrize("save", ["all", "minimal", "recompute"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_in_every_memory_plan(name, save):
    """Second derivatives and tangents, against finite differences and autograd's first ones."""
    block = BLOCKS[name](save=save).double()
    x, v = (torch.randn(2, L, E, dtype=torch.float64) for _ in range(2))

    def call(x):
        return (block(x, x * 2) if name == "decoder" else block(x)).square().sum()

    leaves = [x.requires_grad_(), *block.parameters()]
    gradients = torch.autograd.grad(call(x), leaves, create_graph=True)
    slope = (gradients[0] * v).sum()
    torch.testing.assert_close(jvp(call, (x.detach(),), (v,))[1], slope.detach())
    second = torch.autograd.grad(slope, leaves, allow_unused=True, materialize_grads=True)
    step = 1e-5
    both = []
    for s in (step, -step):
        moved = (x.detach() + s * v).requires_grad_()
        both.append(torch.autograd.grad(call(moved), [moved, *block.parameters()]))
    for ahead, behind, exact in zip(*both, second, strict=True):
        torch.testing.assert_close((ahead - behind) / (2 * step), exact, rtol=1e-6, atol=1e-7)


def test_dropout_is_the_same_under_a_transform():
    block = EncoderLayer(E, 2, 16, dropout=0.3).double()
    x, v = (torch.randn(2, L, E, dtype=torch.float64) for _ in range(2))
    torch.manual_seed(1)
    plain = block(x)
    torch.manual_seed(1)
    value, _ = jvp(block, (x,), (v,))
    torch.testing.assert_close(value, plain)


def test_a_padded_batch_is_not_packed_under_a_transform():
    """How many tokens there are is a value, which a batched tensor does not have."""
    encoder = pyllm.nn.TransformerEncoder(pyllm.nn.TransformerEncoderLayer(E, 2, **ENCODER), 2).double()
    x, v = (torch.randn(3, 2, L, E, dtype=torch.float64) for _ in range(2))
    padding = torch.arange(L) >= torch.tensor([[L, 2], [3, 3], [1, 4]])[..., None]
    encoder.pack = False
    expected = torch.stack([encoder(a, src_key_padding_mask=p) for a, p in zip(x, padding, strict=True)])
    encoder.pack = True
    batched = vmap(lambda a, p: encoder(a, src_key_padding_mask=p))(x, padding)
    torch.testing.assert_close(batched, expected)
    value, tangent = jvp(lambda a: encoder(a, src_key_padding_mask=padding[0]), (x[0],), (v[0],))
    torch.testing.assert_close(value, expected[0])
    assert tangent.all()


def test_the_tangent_of_a_causal_mask():
    """Where there is padding a mask is added, as in torch, and not only known to be causal."""
    torch.manual_seed(0)
    ours = pyllm.nn.MultiheadAttention(E, 2, batch_first=True).double()
    theirs = torch.nn.MultiheadAttention(E, 2, batch_first=True).double()
    theirs.load_state_dict(ours.state_dict())
    x, v = torch.randn(2, L, E, dtype=torch.float64), torch.randn(L, L, dtype=torch.float64)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    padding = torch.zeros(2, L, dtype=torch.float64).masked_fill(torch.arange(L) > 1, -torch.inf)
    options = {"key_padding_mask": padding, "is_causal": True, "need_weights": False}
    found = []
    for module in (ours, theirs):
        call = partial(module, x, x, x, **options)
        with sdpa_kernel(SDPBackend.MATH):
            found.append(jvp(lambda m, call=call: call(attn_mask=m)[0], (mask,), (v,)))
    torch.testing.assert_close(*found)
    assert found[0][1].any()


def test_packed_batches():
    """Second derivatives, tangents and batched gradients through unpad, a block on the tokens, and pad."""
    block = EncoderLayer(E, 2, 16, dropout=0.0).double()
    x = torch.randn(2, L, E, dtype=torch.float64, requires_grad=True)
    padding = torch.arange(L) >= torch.tensor([[3], [L]])

    def call(x):
        tokens, packing = pyllm.nn.unpad(x, padding)
        return pyllm.nn.pad(block(tokens, packing=packing), packing)

    assert gradcheck(call, x, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(call, x, fast_mode=True)
