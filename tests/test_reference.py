"""The reference, which every backend is compared with, against PyTorch's own functions, in fp64, with gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyllm import ops, reference
from pyllm.attention_cases import BOTTOM
from pyllm.backend import use_backend
from pyllm.testing import randn

pytestmark = pytest.mark.usefixtures("one_thread")


def rand(*shape: int) -> Tensor:
    return randn(*shape, dtype=torch.float64)


def assert_equal(ours, theirs, *leaves: Tensor) -> None:
    """Of two functions of the leaves, results and gradients."""
    with use_backend("reference"):
        mine, right = ours(*leaves), theirs(*leaves)
    mine, right = ([t] if isinstance(t, Tensor) else list(t) for t in (mine, right))
    cotangents = [torch.rand_like(t) for t in right]
    mine += torch.autograd.grad(mine, leaves, cotangents, allow_unused=True)
    right += torch.autograd.grad(right, leaves, cotangents, allow_unused=True)
    for a, e in zip(mine, right, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            torch.testing.assert_close(a, e)


NORMS = {
    "layer_norm": (
        lambda x, w, b: ops.layer_norm(x, w, b, 1e-3),
        lambda x, w, b: F.layer_norm(x, (x.shape[-1],), w, b, 1e-3),
    ),
    "rms_norm": (lambda x, w, b: ops.rms_norm(x, w, 1e-3), lambda x, w, b: F.rms_norm(x, (x.shape[-1],), w, 1e-3)),
    "add_layer_norm": (
        lambda x, w, b: ops.add_layer_norm(x, 2 * x, w, b, 1e-3, x_bias=b),
        lambda x, w, b: (F.layer_norm(3 * x + b, (x.shape[-1],), w, b, 1e-3), 3 * x + b),
    ),
    "add_rms_norm": (
        lambda x, w, b: ops.add_rms_norm(x, 2 * x, w, 1e-3, x_bias=b),
        lambda x, w, b: (F.rms_norm(3 * x + b, (x.shape[-1],), w, 1e-3), 3 * x + b),
    ),
    "dropout_add": (lambda x, w, b: ops.dropout_add(x, w, b), lambda x, w, b: w + x + b),
}


@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 8), (0, 8)], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_norms_and_sums(name, shape):
    residual = name == "dropout_add"
    assert_equal(*NORMS[name], rand(*shape), rand(*(shape if residual else shape[-1:])), rand(shape[-1]))


ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@pytest.mark.parametrize("name", [*ACTIVATIONS, *reference.GATED])
def test_activations(name):
    kind, tanh = name.removesuffix("_tanh"), {"approximate": "tanh"} if name.endswith("_tanh") else {}
    act = ACTIVATIONS[reference.GATED.get(name, name)]

    def plain(x, bias):
        if name not in reference.GATED:
            return act(x + bias)
        gate, up = (x + bias).chunk(2, -1)
        return act(gate) * up

    assert_equal(lambda x, bias: getattr(ops, kind)(x, bias=bias, **tanh), plain, rand(5, 14), rand(14))
    if name in reference.GATED:
        two = rand(5, 14), rand(5, 14)
        assert_equal(lambda gate, up: getattr(ops, kind)(gate, up, **tanh), lambda g, u: act(g) * u, *two)


@pytest.mark.parametrize("masking", [None, "bool", "float"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax(name, is_causal, masking):
    keep = torch.rand(6, 9) < 0.7
    keep[:, 0] = True  # a row with nothing left is NaN in torch
    mask = {None: None, "bool": keep, "float": torch.randn(6, 9, dtype=torch.float64)}[masking]

    def plain(x):
        scores = 0.3 * x
        if masking is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if masking == "bool" else scores + mask
        if is_causal:
            scores = scores.masked_fill(torch.ones(6, 9, dtype=torch.bool).triu(1), -torch.inf)
        # In log_softmax the gradient of what is -inf is not looked at.
        return getattr(torch, name)(scores, -1).nan_to_num(neginf=-1e3)

    def ours(x):
        return getattr(ops, name)(x, scale=0.3, attn_mask=mask, is_causal=is_causal).nan_to_num(neginf=-1e3)

    assert_equal(ours, plain, rand(2, 6, 9))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_cross_entropy(label_smoothing, weighted, reduction):
    """Classes without a chance too, the target's among them."""
    target = torch.tensor([3, -100, 0, 36, -100, 7])
    hopeless = torch.zeros(6, 37, dtype=torch.float64)
    hopeless[0, 3] = hopeless[2, 1:] = hopeless[3, 5] = -torch.inf
    weight = torch.rand(37, dtype=torch.float64) if weighted else None
    options = {"label_smoothing": label_smoothing, "reduction": reduction}

    for added in (0.0, hopeless):
        assert_equal(
            lambda x, added=added: ops.cross_entropy(x + added, target, weight=weight, **options),
            lambda x, added=added: F.cross_entropy(x + added, target, weight=weight, **options),
            rand(6, 37),
        )

    def linear(hidden, matrix, bias):
        return ops.linear_cross_entropy(hidden, matrix, target, bias, **options)

    def plain(hidden, matrix, bias):
        return F.cross_entropy(F.linear(hidden, matrix, bias), target, **options)

    if not weighted:
        assert_equal(linear, plain, rand(6, 5), rand(37, 5), rand(37))


def test_z_loss():
    target = torch.tensor([3, -100, 0])

    def plain(x):
        squares = x.logsumexp(-1).square().where(target != -100, 0.0)
        return F.cross_entropy(x, target, reduction="sum") + 0.1 * squares.sum()

    assert_equal(lambda x: ops.cross_entropy(x, target, z_loss=0.1, reduction="sum"), plain, rand(3, 7))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved):
    """As a product of complex numbers; inverse turns back."""
    angles = torch.rand(5, 3, dtype=torch.float64)

    def plain(x):
        turned, rest = x[..., :6], x[..., 6:]
        pairs = turned.unflatten(-1, (3, 2)) if interleaved else turned.unflatten(-1, (2, 3)).mT
        z = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
        z = torch.view_as_real(z)
        return torch.cat([z.flatten(-2) if interleaved else z.mT.flatten(-2), rest], -1)

    def ours(x, **options):
        return ops.rotary(x, angles.cos(), angles.sin(), interleaved=interleaved, **options)

    assert_equal(ours, plain, rand(2, 3, 5, 8))
    assert_equal(lambda x: ours(ours(x), inverse=True), lambda x: x * 1, rand(2, 3, 5, 8))


SQ, SK = 5, 9
KEEP = torch.rand(2, 4, SQ, SK, generator=torch.Generator().manual_seed(0)) < 0.6
KEEP[..., 0] = True
DISTANCE = torch.arange(SK) - torch.arange(SQ)[:, None]
PADDING = torch.arange(SK) >= torch.tensor([[9], [4]])

# What is asked for -> (options of attention, what it is as a mask of scaled_dot_product_attention).
ATTENTION = {
    "plain": ({}, None),
    "bool": ({"attn_mask": KEEP}, KEEP),
    "padding": ({"key_padding_mask": PADDING}, ~PADDING[:, None, None]),
    "causal": ({"is_causal": True}, DISTANCE <= 0),
    "bottom-right": ({"is_causal": True} | BOTTOM, DISTANCE - (SK - SQ) <= 0),
    "window": ({"window": (1, 2)}, (DISTANCE >= -1) & (DISTANCE <= 2)),
    "window of one side": ({"window": (-1, 1)} | BOTTOM, DISTANCE - (SK - SQ) <= 1),
    "alibi": ({"alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4])}, "alibi"),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name):
    options, mask = ATTENTION[name]
    if name == "alibi":
        mask = -(options["alibi_slopes"].double()[:, None, None] * DISTANCE.abs())
        options = {"alibi_slopes": options["alibi_slopes"].double()}

    def plain(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.4, enable_gqa=True)

    inputs = rand(2, 4, SQ, 6), rand(2, 2, SK, 6), rand(2, 2, SK, 6)
    assert_equal(lambda q, k, v: ops.attention(q, k, v, scale=0.4, **options), plain, *inputs)


def test_attentions_added_mask_softcap_and_lse():
    """T5's bias is compared with transformers' in test_hf_parity.py."""

    def plain(query, key, value, mask):
        scores = 2 * torch.tanh(query @ key.mT / 4 / 2) + mask
        return scores.softmax(-1) @ value, scores.logsumexp(-1)

    def ours(query, key, value, mask):
        return ops.attention(query, key, value, attn_mask=mask, softcap=2.0, return_lse=True)

    assert_equal(ours, plain, rand(1, 2, SQ, 16), rand(1, 2, SK, 16), rand(1, 2, SK, 16), rand(1, 2, SQ, SK))


def test_dropout_is_philox():
    """The known answers of Random123 for Philox-4x32-10, and the share that is kept."""
    for counter, seed, words in (
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        found = reference.philox_4x32([torch.tensor(c) for c in counter], torch.tensor(seed))
        assert tuple(int(w) for w in found) == words
    rng = torch.tensor([5, 7])
    x = torch.ones(1000, 64, dtype=torch.float64)
    y = reference.dropout(x, rng, 0.25)
    assert set(y.unique().tolist()) == {0.0, 4 / 3} and abs((y == 0).double().mean() - 0.25) < 0.01
    assert torch.equal(reference.dropout(x, rng, 0.0), x) and not reference.dropout(x, rng, 1.0).any()


@pytest.mark.parametrize("bottom_right", [False, True], ids=["top left", "bottom right"])
@pytest.mark.parametrize("slopes", [0, 1, 4])
@pytest.mark.parametrize("mask", [None, "bool", "float", "of keys"])
@pytest.mark.parametrize("more", [False, True], ids=["alone", "with the rest"])
def test_packed_without_a_look_at_the_bounds(mask, slopes, bottom_right, more):
    """What transforms take is, sequence by sequence, what everything else takes."""
    heads, longest = 4, (6, 5)
    bounds = [torch.tensor(b, dtype=torch.int32) for b in ((0, 3, 3, 9, 10), (0, 5, 6, 9, 13))]
    query, key, value = rand(1, heads, 10, 8), rand(1, 2, 13, 8), rand(1, 2, 13, 8)
    masks = {
        "bool": torch.rand(4, heads, *longest) > 0.3,
        "float": rand(1, heads, *longest),
        "of keys": rand(4, 1, 1, 5),
    }
    padding, bias = (torch.rand(1, 13) < 0.3, rand(heads, 7)) if more else (None, None)
    rng, options = (torch.tensor([5, 7]), (0.4, 2.0, 0.3, 2, 1)) if more else (None, (0.4, 0.0, 0.0, -1, -1))
    tensors = (query, key, value, masks.get(mask), padding, bias, rand(slopes, heads) if slopes else None, *bounds, rng)
    call = (*tensors, *options, bottom_right)
    torch.testing.assert_close(reference._packed_attention(reference.AttentionCall(*call)), reference.attention(*call))
