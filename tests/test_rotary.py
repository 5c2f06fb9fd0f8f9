"""rotary and rotary_ on every backend."""

import pytest
import torch
from conftest import COMPARED, KERNELS

from pyllm import ops
from pyllm.backend import use_backend
from pyllm.testing import DTYPES, check, randn


def tables_of(*shape, device="cpu"):
    """cos and sin of random angles, float32."""
    angles = torch.rand(*shape, device=device) * 6.28
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
def test_rotary(target, interleaved, dtype):
    backend, device = target
    for shape, turned, tables in (
        ((2, 3, 7, 64), 64, (7,)),
        ((2, 3, 7, 40), 20, (2, 7)),
        ((1, 2, 5, 3), 2, (1, 5)),
        ((2, 1, 33, 96), 72, (33,)),
        ((0, 3, 7, 8), 8, (7,)),
        ((2, 3, 0, 8), 8, (0,)),
    ):
        cos, sin = tables_of(*tables, turned // 2, device=device)
        x = randn(*shape, dtype=dtype, device=device)
        check(lambda x, c=cos, s=sin: ops.rotary(x, c, s, interleaved=interleaved), {"x": x}, backend)
        check(lambda x, c=cos, s=sin: ops.rotary_(x * 1, c, s, interleaved=interleaved), {"x": x}, backend)


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
def test_inverse_and_strides(target, interleaved):
    backend, device = target
    cos, sin = tables_of(5, 8, device=device)
    layouts = {
        "by position": randn(2, 5, 3, 16, device=device, grad=False).transpose(1, 2),
        "by column": randn(2, 3, 16, 5, device=device, grad=False).mT,
        "one for all": randn(1, 1, 5, 16, device=device, grad=False).expand(2, 3, 5, 16),
    }
    with use_backend(backend):
        for x in layouts.values():
            y = ops.rotary(x, cos, sin, interleaved=interleaved)
            torch.testing.assert_close(ops.rotary(y, cos, sin, interleaved=interleaved, inverse=True), x)
            z = x.clone(memory_format=torch.contiguous_format)
            assert ops.rotary_(z, cos, sin, interleaved=interleaved) is z and torch.equal(z, y)
    for x in layouts.values():
        for inverse in (False, True):
            options = {"interleaved": interleaved, "inverse": inverse}
            inputs = {"x": x.detach().requires_grad_()}
            check(lambda x, options=options: ops.rotary(x, cos, sin, **options), inputs, backend)


def packed_attention(qkv, cos, sin, turn):
    """Products of queries and keys of a packed (B, S, 3, H, D), both turned by `turn`."""
    both = qkv[:, :, :2].flatten(2, 3).transpose(1, 2)  # (B, 2H, S, D), a view
    assert both._base is not None
    query, key = turn(both, cos, sin).chunk(2, 1)
    return query @ key.mT @ qkv[:, :, 2].transpose(1, 2)


def test_in_place_on_a_packed_matrix(target):
    """The view is turned, the matrix holds it, values are untouched, and the gradients are those of a new tensor."""
    backend, device = target
    leaf = randn(2, 5, 3, 4, 16, dtype=torch.float64, device=device)
    cos, sin = tables_of(5, 8, device=device)
    with use_backend(backend):
        results = []
        for turn in (ops.rotary, ops.rotary_):
            qkv = leaf * 1.0
            out = packed_attention(qkv, cos, sin, turn)
            results.append((out, *torch.autograd.grad(out.sum(), leaf)))
            assert torch.equal(qkv[:, :, 2], leaf[:, :, 2]) and torch.equal(qkv, leaf) == (turn is ops.rotary)
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_the_incoming_gradient_is_left_alone(target):
    backend, device = target
    cos, sin = tables_of(5, 8, device=device)
    dy = torch.randn(2, 3, 5, 16, device=device)
    kept = dy.clone()
    for turn in (ops.rotary, ops.rotary_):
        x = randn(2, 3, 5, 16, device=device)
        with use_backend(backend):
            turn(x * 1, cos, sin).backward(dy)
        assert torch.equal(dy, kept) and not torch.equal(x.grad, dy)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
def test_gradcheck(target, interleaved):
    backend, device = target
    cos, sin = (t.double() for t in tables_of(2, 2, 1, device=device))
    x = randn(2, 1, 2, 3, dtype=torch.float64, device=device)
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda x: ops.rotary(x, cos, sin, interleaved=interleaved), x)
        assert torch.autograd.gradcheck(lambda x: ops.rotary_(x * 1, cos, sin, interleaved=interleaved), x)


@pytest.mark.parametrize("target", KERNELS)
def test_in_place_compiles(target):
    backend, device = target
    cos, sin = tables_of(5, 8, device=device)

    def function(x):
        return ops.rotary_(x * 2, cos, sin).square().sum()

    with use_backend(backend):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        x = randn(2, 3, 5, 16, device=device)
        results = [(loss, *torch.autograd.grad(loss, x)) for loss in (function(x), compiled(x))]
        with torch.no_grad():
            assert torch.equal(function(x), compiled(x))
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)


def x(*shape):
    return torch.randn(*shape)


BAD = [
    ("rotary", lambda: ops.rotary(x(3, 5, 16), x(5, 8), x(5, 8)), ValueError, r"x must have shape \(B, H, S, D\)"),
    ("rotary", lambda: ops.rotary(x(1, 3, 5, 16), x(6, 8), x(6, 8)), ValueError, r"cos must have .* S = 5, B = 1"),
    ("rotary", lambda: ops.rotary(x(1, 3, 5, 16), x(5, 9), x(5, 9)), ValueError, "R at most 16"),
    ("rotary", lambda: ops.rotary(x(1, 3, 5, 16), x(5, 0), x(5, 0)), ValueError, "cos must have shape"),
    ("rotary", lambda: ops.rotary(x(2, 3, 5, 16), x(3, 5, 8), x(3, 5, 8)), ValueError, "cos must have shape"),
    ("rotary", lambda: ops.rotary(x(1, 3, 5, 16), x(5, 8), x(5, 4)), ValueError, "sin must have shape cos's"),
    ("rotary", lambda: ops.rotary(x(1, 3, 5, 16), x(5, 8).int(), x(5, 8)), TypeError, "cos must be float32"),
    ("rotary", lambda: ops.rotary(x(1, 3, 5, 16), x(5, 8), x(5, 8).to("meta")), RuntimeError, "sin must be on the dev"),
    ("rotary", lambda: ops.rotary(None, x(5, 8), x(5, 8)), TypeError, "x must be a Tensor"),
    ("rotary_", lambda: ops.rotary_(x(1, 3, 16, 5).mT, x(5, 8), x(5, 8)), ValueError, "x must have a contiguous"),
    ("rotary_", lambda: ops.rotary_(x(1, 1, 5, 16).expand(1, 3, 5, 16), x(5, 8), x(5, 8)), RuntimeError, "must not be"),
]


@pytest.mark.parametrize("name, call, error, message", BAD, ids=[f"{n}-{m}" for n, _, _, m in BAD])
def test_bad_input(name, call, error, message):
    with pytest.raises(error, match=f"{name}: .*{message}"):
        call()


def test_a_leaf_that_requires_a_gradient_is_not_written_to(target):
    backend, device = target
    cos, sin = tables_of(5, 8, device=device)
    with use_backend(backend), pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        ops.rotary_(randn(1, 3, 5, 16, device=device), cos, sin)
