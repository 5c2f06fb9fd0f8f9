"""Autocast that is on where a backward is called, and was not in the forward: what kernels compute stays as it was."""

import pytest
import torch
from conftest import WITHOUT_TORCH, interpreted_in_ci
from test_memory_plan import LAYERS, inputs

import pyllm
from pyllm import ops
from pyllm.nn.memory import PLANS

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(loss: torch.Tensor, leaves: list[torch.Tensor], again: bool) -> list[torch.Tensor]:
    """First ones, or those of the first ones' squares."""
    found = torch.autograd.grad(loss, leaves, create_graph=again)
    if not again:
        return list(found)
    penalty = sum(g.square().sum() for g in found if g.requires_grad)
    return list(torch.autograd.grad(penalty, leaves, allow_unused=True, materialize_grads=True))


def assert_autocast_changes(share: float, forward, leaves: list[torch.Tensor], device: str, again: bool) -> None:
    """At most this share of the largest gradient: PyTorch's own products are rounded to 16 bits there."""
    torch.manual_seed(0)
    expected = gradients(forward(), leaves, again)
    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        loss = forward()
        with torch.autocast(device, dtype):
            found = gradients(loss, leaves, again)
        for a, e in zip(found, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=0.0, atol=share * e.abs().max().item() + 1e-6)


@pytest.mark.parametrize("target", interpreted_in_ci(WITHOUT_TORCH))
@pytest.mark.parametrize("save", PLANS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, save, target):
    backend, device = target
    layer = LAYERS[name](save=save).to(device)
    arguments = [x.requires_grad_() for x in inputs(name, device)]
    with pyllm.use_backend(backend):
        leaves = [*arguments, *layer.parameters()]
        assert_autocast_changes(0.05, lambda: layer(*arguments).sin().sum(), leaves, device, False)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("target", WITHOUT_TORCH)
def test_linear_cross_entropy(target, reduction):
    backend, device = target
    hidden, weight = (torch.randn(*shape, device=device).requires_grad_() for shape in ((5, 24), (9, 24)))
    index = torch.tensor([1, 2, -100, 8, 0], device=device)
    for again in (False, True):
        with pyllm.use_backend(backend):
            assert_autocast_changes(
                0.05 if again or backend == "reference" else 0.0,
                lambda: ops.linear_cross_entropy(hidden, weight, index, reduction=reduction).sum(),
                [hidden, weight],
                device,
                again,
            )


@pytest.mark.parametrize("target", WITHOUT_TORCH)
def test_second_derivatives_of_attention(target):
    backend, device = target
    leaves = [torch.randn(2, 2, 5, 8, device=device).requires_grad_() for _ in range(3)]
    with pyllm.use_backend(backend):
        assert_autocast_changes(0.05, lambda: ops.attention(*leaves).sin().sum(), leaves, device, True)


@pytest.mark.parametrize("dtype, other", [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)], ids=str)
def test_a_mask_of_the_other_16_bits(dtype, other, target):
    backend, device = target
    layer = pyllm.nn.MultiheadAttention(24, 3, batch_first=True, device=device)
    x, mask = torch.randn(2, 5, 24, device=device), torch.randn(5, 5, device=device).to(other).requires_grad_()
    with torch.autocast(device, dtype):
        with pyllm.use_backend(backend if backend != "torch" else None):
            out = layer(x, x, x, attn_mask=mask, need_weights=False)[0]
        expected = layer(x, x, x, attn_mask=mask.float(), need_weights=False)[0]
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
    assert out.dtype == dtype and torch.autograd.grad(out.float().sin().sum(), mask)[0].dtype == other
