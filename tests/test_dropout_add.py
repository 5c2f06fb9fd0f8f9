"""dropout_add on every backend."""

import pytest
import torch
from conftest import COMPARED, TARGETS, WITHOUT_TORCH

from pyllm import ops
from pyllm.backend import use_backend
from pyllm.reference import dropout_keep
from pyllm.testing import DTYPES, check, randn

PAIRS = [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
def test_dropout_add(target, dtypes, p):
    backend, device = target

    def function(x, residual, bias=None):
        return ops.dropout_add(x, residual, bias, dropout_p=p)

    for shape in [(3, 63), (2, 4, 130), (0, 8), (2, 0)]:
        inputs = {n: randn(*shape, dtype=d, device=device) for n, d in zip(("x", "residual"), dtypes, strict=True)}
        bias = randn(shape[-1], dtype=dtypes[0], device=device)
        if backend == "torch" and p > 0.0:
            with use_backend("torch"), pytest.raises(RuntimeError, match="dropout mask would differ"):
                function(**inputs)
            continue
        check(function, inputs, backend)
        check(function, {**inputs, "bias": bias}, backend)
    if dtypes[0].itemsize == 2 and not (backend == "torch" and p > 0.0):
        x = randn(5, 40, dtype=dtypes[0], device=device)
        inputs = {"x": x, "residual": randn(5, 40, dtype=dtypes[1], device=device), "bias": randn(40).to(device)}
        check(function, {**inputs, "bias": inputs["bias"].detach().requires_grad_()}, backend)


@pytest.mark.parametrize("target", COMPARED)
def test_strided_inputs(target):
    backend, device = target
    x = randn(6, 80, 9, device=device, grad=False).transpose(1, 2)[::2, :, ::2].requires_grad_()
    residual = randn(3, 9, 1, device=device, grad=False).expand(3, 9, 40).requires_grad_()
    check(ops.dropout_add, {"x": x, "residual": residual}, backend)


@pytest.mark.parametrize("target", WITHOUT_TORCH)
def test_dropout_is_the_reference_mask(target):
    backend, device = target
    x, residual = torch.ones(37, 1003, device=device), torch.zeros(37, 1003, device=device)
    torch.manual_seed(7)
    rng = torch.randint(-(2**63), 2**63 - 1, (2,), device=device)
    torch.manual_seed(7)
    with use_backend(backend):
        y = ops.dropout_add(x, residual, dropout_p=0.1)
    assert torch.equal(y != 0, dropout_keep(rng, 0.1, 1, 37, 1003)[0])


@pytest.mark.parametrize("target", WITHOUT_TORCH)
def test_a_probability_is_rounded_to_a_65536th(target):
    """1e-5 is 0.66 of it, so that of a million elements some are dropped."""
    backend, device = target
    x = torch.ones(64, 16384, device=device)
    with use_backend(backend):
        y = ops.dropout_add(x, torch.zeros_like(x), dropout_p=1e-5)
    assert 1 <= (y == 0).sum() <= 64


def test_gradients_are_not_copied_where_they_are_the_incoming_one():
    x, residual = randn(4, 8), randn(4, 8)
    dy = torch.randn(4, 8)
    for p, same in ((0.0, (True, True)), (0.5, (False, True))):
        y = ops.dropout_add(x, residual, dropout_p=p)
        gradients = torch.autograd.grad(y, (x, residual), dy)
        assert tuple(g.data_ptr() == dy.data_ptr() for g in gradients) == same


@pytest.mark.parametrize("target", [t for t in TARGETS if t.values[0][0] == "native"])
def test_large_results_are_those_of_small_ones(target):
    """Large results are written past the caches, small ones are not."""
    backend, device = target
    x, residual = (torch.randn(2200, 1024, device=device) for _ in range(2))
    with use_backend(backend):
        parts = [ops.dropout_add(*part) for part in zip(x.split(440), residual.split(440), strict=True)]
        assert torch.equal(ops.dropout_add(x, residual), torch.cat(parts))


def test_gradcheck(target):
    backend, device = target
    tensors = [randn(*s, dtype=torch.float64, device=device) for s in ((2, 7), (2, 7), (7,))]

    def run(*tensors):
        torch.manual_seed(3)
        return ops.dropout_add(*tensors, dropout_p=0.3 if backend != "torch" else 0.0)

    with use_backend(backend):
        assert torch.autograd.gradcheck(run, tensors)


BAD = [
    (lambda x: ops.dropout_add(x, x[:1]), ValueError, "residual must have shape x's"),
    (lambda x: ops.dropout_add(x, None), TypeError, "residual must be a Tensor"),
    (lambda x: ops.dropout_add(x, x.double()), TypeError, "residual must be torch.float32, as x, or float32 beside 16"),
    (lambda x: ops.dropout_add(x.double(), x), TypeError, "residual must be torch.float64, as x, or float32 beside 16"),
    (lambda x: ops.dropout_add(x, x, torch.ones(3)), ValueError, r"bias must have shape \(N,\)"),
    (lambda x: ops.dropout_add(x, x, dropout_p=1.5), ValueError, r"dropout_p must be in \[0, 1\]"),
    (lambda x: ops.dropout_add(x[0, 0], x[0, 0]), ValueError, "x must have at least one dimension"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[m for _, _, m in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=f"dropout_add: {message}"):
        call(torch.randn(2, 8))
