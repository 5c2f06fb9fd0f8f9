"""What operators do not take is torch's own result, or its own error, in pyllm.nn.functional and the modules."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pyllm.nn
import pyllm.nn.functional as PF
from pyllm.testing import assert_within_budget

pytestmark = pytest.mark.usefixtures("one_thread")

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OTHERS = [torch.complex64, torch.complex128, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (4 * torch.randn(shape)).to(dtype)


def assert_torchs(call, *inputs) -> None:
    """call(functional, *inputs): torch's result and gradients to the bit, or torch's exception."""
    found = []
    for functional in (F, PF):
        leaves = [
            t.clone().requires_grad_(t.dtype.is_floating_point or t.dtype.is_complex) if isinstance(t, Tensor) else t
            for t in inputs
        ]
        try:
            out = call(functional, *leaves)
        except Exception as problem:
            found.append((type(problem), str(problem)))
            continue
        wanted = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
        gradients = torch.autograd.grad(out, wanted, torch.ones_like(out), allow_unused=True) if wanted else ()
        found.append([out, *gradients])
    theirs, ours = found
    assert type(ours) is type(theirs), f"torch: {theirs}, here: {ours}"
    if isinstance(theirs, tuple):
        assert ours == theirs
        return
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("other", OTHERS, ids=str)
@pytest.mark.parametrize(
    "call",
    [
        lambda f, x: f.layer_norm(x, (6,)),
        lambda f, x: f.layer_norm(x, (4, 6)),
        lambda f, x: f.rms_norm(x, (6,)),
        lambda f, x: f.rms_norm(x, (4, 6), x.real[0:4] if x.is_complex() else None),
        lambda f, x: f.softmax(x, 0),
        lambda f, x: f.log_softmax(x, -1),
        lambda f, x: f.softmax(x, -1, dtype=torch.complex64),
        lambda f, x: f.cross_entropy(x, torch.zeros(4, dtype=torch.int64)),
        lambda f, x: f.cross_entropy(torch.ones(4, 6), torch.zeros(4, dtype=torch.int64), x[0]),
        lambda f, x: f.scaled_dot_product_attention(x, x, x),
        lambda f, x: f.scaled_dot_product_attention(*torch.ones(3, 4, 6), x[:4, :4]) if x.dtype != torch.bool else x,
    ],
    ids=[
        *("layer_norm", "layer_norm of two", "rms_norm", "rms_norm with weight", "softmax", "log_softmax"),
        *("softmax to complex", "cross_entropy", "weight", "attention", "mask"),
    ],
)
def test_dtypes_that_operators_do_not_take(call, other: torch.dtype):
    assert_torchs(call, numbers(4, 6, dtype=other))


@pytest.mark.parametrize(("x", "parameter"), list(itertools.permutations(FLOATS, 2)), ids=str)
def test_mixed_dtypes_of_layer_norm(x: torch.dtype, parameter: torch.dtype):
    """Where torch computes, which is with float32 beside 16 bits, so do the operators; elsewhere it raises."""
    rows, weight, bias = numbers(4, 33, dtype=x), numbers(33, dtype=parameter), numbers(33, dtype=parameter)
    if parameter != torch.float32 or x == torch.float64:
        assert_torchs(lambda f, *t: f.layer_norm(t[0], (33,), *t[1:]), rows, weight, bias)
        return
    truth = F.layer_norm(rows.double(), (33,), weight.double(), bias.double())
    actual, plain = (f.layer_norm(rows, (33,), weight, bias) for f in (PF, F))
    assert actual.dtype == plain.dtype == x
    assert_within_budget("layer_norm", actual, truth, plain)


def test_weight_and_bias_of_two_dtypes():
    weight, bias = torch.ones(33), torch.ones(33).bfloat16()
    assert_torchs(lambda f, *t: f.layer_norm(t[0], (33,), *t[1:]), numbers(4, 33, dtype=torch.bfloat16), weight, bias)


@pytest.mark.parametrize("other", [*FLOATS, torch.complex64, torch.int64], ids=str)
@pytest.mark.parametrize("x", FLOATS, ids=str)
def test_mixed_dtypes_of_rms_norm(x: torch.dtype, other: torch.dtype):
    """torch computes with any of them; operators in at least its precision, and it alone beyond theirs."""
    rows, weight = numbers(4, 33, dtype=x), numbers(33, dtype=other)
    actual, plain = (f.rms_norm(rows, (33,), weight, 1e-6) for f in (PF, F))
    assert actual.dtype == plain.dtype
    if other in (torch.complex64, torch.int64) or (other == torch.float64 and x != other):
        assert_torchs(lambda f, *t: f.rms_norm(t[0], (33,), t[1], 1e-6), rows, weight)
        return
    truth = F.rms_norm(rows.double(), (33,), weight.double(), 1e-6)
    if x == torch.float64:  # nothing is truer
        torch.testing.assert_close(actual, truth)
        return
    assert_within_budget("rms_norm", actual, truth, plain)


_X = torch.randn(2, 3, 5, 8)


@pytest.mark.parametrize(
    "call",
    [
        lambda f: f.layer_norm([1.0], (1,)),
        lambda f: f.layer_norm(_X, (7,)),
        lambda f: f.layer_norm(_X, ()),
        lambda f: f.layer_norm(_X, (8,), torch.ones(7)),
        lambda f: f.layer_norm(_X, (8,), torch.ones(8, device="meta")),
        lambda f: f.rms_norm(_X, (5, 7)),
        lambda f: f.rms_norm(_X, (8,), torch.ones(8).double()),
        lambda f: f.softmax(_X, 4),
        lambda f: f.softmax(_X[0, 0, 0, 0], 1),
        lambda f: f.log_softmax(_X, "last"),
        lambda f: f.cross_entropy(torch.ones(5, 7), torch.zeros(4, dtype=torch.int64)),
        lambda f: f.cross_entropy(torch.ones(5, 7), torch.zeros(5, dtype=torch.int32)),
        lambda f: f.cross_entropy(torch.ones(()), torch.zeros((), dtype=torch.int64)),
        lambda f: f.cross_entropy(torch.ones(5, 7), torch.zeros(5, dtype=torch.int64), torch.ones(6)),
        lambda f: f.cross_entropy(torch.ones(5, 7), torch.zeros(5, dtype=torch.int64), torch.ones(7).double()),
        lambda f: f.cross_entropy(torch.ones(5, 7), torch.zeros(5, dtype=torch.int64), label_smoothing=-1.0),
        lambda f: f.cross_entropy(torch.ones(5, 7), torch.zeros(5, dtype=torch.int64), label_smoothing=2.0),
        lambda f: f.scaled_dot_product_attention(_X[0, 0, 0], _X, _X),
        lambda f: f.scaled_dot_product_attention(_X, _X[..., :7], _X),
        lambda f: f.scaled_dot_product_attention(_X, _X.double(), _X),
        lambda f: f.scaled_dot_product_attention(_X, _X, _X, torch.ones(5, 5).double()),
        lambda f: f.scaled_dot_product_attention(_X, _X, _X, torch.ones(4, 5)),
        lambda f: f.scaled_dot_product_attention(_X, _X, _X, torch.ones(2, 2, 3, 5, 5)),
        lambda f: f.scaled_dot_product_attention(_X, _X[:, :2], _X[:, :2], enable_gqa=True),
        lambda f: f.scaled_dot_product_attention(_X, _X, _X, dropout_p=2.0),
    ],
)
def test_what_does_not_fit_is_torchs(call):
    assert_torchs(call)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors(layout: torch.layout):
    x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=layout)
    for call in (lambda f: f.layer_norm(x, (8,), torch.ones(8), torch.ones(8)), lambda f: f.softmax(x, -1)):
        for ours, theirs in zip(call(PF).unbind(), call(F).unbind(), strict=True):
            assert torch.equal(ours, theirs)


def test_modules():
    """They are the functions."""
    x = torch.randn(4, 8, dtype=torch.complex64)
    ours, theirs = pyllm.nn.RMSNorm(8), torch.nn.RMSNorm(8)
    assert torch.equal(ours(x), theirs(x))
    for nn in (torch.nn, pyllm.nn):
        with pytest.raises(RuntimeError, match="mixed dtype"):
            nn.LayerNorm(8)(torch.randn(4, 8).double())
        with pytest.raises(NotImplementedError, match="not implemented for 'Long'"):
            nn.Softmax(-1)(torch.ones(4, 8, dtype=torch.int64))
        assert nn.CrossEntropyLoss()(torch.ones(4, 8), torch.full((4, 8), 1 / 8)).isfinite()
