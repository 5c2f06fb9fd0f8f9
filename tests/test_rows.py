"""What row operators have in common, on every backend with kernels: nothing to do, and tensors anywhere."""

import pytest
import torch
from conftest import KERNELS

from pyllm import ops
from pyllm.backend import use_backend
from pyllm.testing import check, randn

NAMES = ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "softmax", "log_softmax", "gelu", "dropout_add"]

pytestmark = pytest.mark.parametrize("target", KERNELS)


def call_of(name, rows, width, device, dtype=torch.bfloat16):
    """(the operator as a function of its inputs, the inputs)."""
    inputs = {"x": randn(rows, width, dtype=dtype, device=device)}
    if "add" in name:
        inputs["residual"] = randn(rows, width, dtype=dtype, device=device)
    if "norm" in name:
        inputs["weight"] = randn(width, dtype=dtype, device=device)
    if "layer_norm" in name or name in ("gelu", "dropout_add"):
        inputs["bias"] = randn(width, dtype=dtype, device=device)
    return getattr(ops, name), inputs


def outputs_and_gradients(function, inputs):
    outputs = function(**inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    return outputs + list(torch.autograd.grad(outputs, list(inputs.values()), [o.detach() for o in outputs]))


@pytest.mark.parametrize("shape", [(0, 40), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_do(target, name, shape):
    backend, device = target
    function, inputs = call_of(name, *shape, device)
    with use_backend(backend):
        results = outputs_and_gradients(function, inputs)
    assert results[0].shape == shape
    for tensor, gradient in zip(inputs.values(), results[-len(inputs) :], strict=True):
        assert gradient.shape == tensor.shape and torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [63, 1000, 4097])
@pytest.mark.parametrize("name", NAMES)
def test_tensors_that_begin_anywhere(target, name, width, dtype):
    """One element after a boundary that vectors need."""
    backend, device = target
    function, inputs = call_of(name, 5, width, device, dtype)

    def shifted(t):
        return torch.cat([t.detach().flatten()[:1], t.detach().flatten()])[1:].view(t.shape).requires_grad_()

    check(function, {n: shifted(t) for n, t in inputs.items()}, backend)


def test_compiles_whole_with_dynamic_shapes(target):
    backend, device = target

    def every_call(**inputs):
        y, z = ops.add_layer_norm(**inputs)
        y, z = ops.add_rms_norm(ops.layer_norm(y), ops.rms_norm(z), inputs["weight"])
        return (ops.softmax(y, scale=0.5) + ops.log_softmax(z, is_causal=True)[:, :1]).square().sum()

    with use_backend(backend):
        compiled = torch.compile(every_call, fullgraph=True, dynamic=True, backend="aot_eager")
        for rows in (3, 8):
            _, inputs = call_of("add_layer_norm", rows, 40, device, torch.float32)
            losses = [function(**inputs) for function in (every_call, compiled)]
            eager, traced = ((loss, *torch.autograd.grad(loss, list(inputs.values()))) for loss in losses)
            assert all(torch.equal(e, t) for e, t in zip(eager, traced, strict=True))
