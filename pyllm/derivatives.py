"""Derivatives that no kernel has: forward mode, a backward that is differentiated again, torch.func's transforms.

A kernel is a forward and its backward. What PyTorch asks beyond these is computed by PyTorch's own operators, which it
can follow any number of times: `backend.select` takes an operator's reference for a call that is `transformed`, and an
operator's autograd function writes a backward for which `beyond_kernels` holds as a composition, often by `vjp`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether torch.func or vmap transforms what runs now, forward-mode differentiation is on, or torch.jit traces."""
    # Each operator call asks: no look-up that can be spared.
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0 or _get_tracing_state() is not None


def beyond_kernels(*cotangents: Tensor | None) -> bool:
    """Whether the backward that runs now with these cotangents is to be differentiated again, or is batched by vmap."""
    if torch.compiler.is_compiling():  # a trace of a backward has grad mode on, and no second derivative
        return False
    if torch.is_grad_enabled() or transformed():
        return True
    # autograd.grad(is_grads_batched=True) has a vmap of its own.
    return any(torch._C._functorch.is_legacy_batchedtensor(c) for c in cotangents if c is not None)


def vjp(
    function: Callable, inputs: Sequence[Tensor | None], wanted: Sequence[bool], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of function(*inputs) for the inputs wanted, None for the others.

    They are differentiable where grad mode is on. function returns a tensor or several, composed of PyTorch's
    operators; a cotangent of None stands for zeros.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that the gradients end here where one input is made from another, and yet go on from here.
        ends = [
            t if not asked else t.view_as(t) if again else t.detach().requires_grad_()
            for t, asked in zip(inputs, wanted, strict=True)
        ]
        outputs = function(*ends)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if c is not None and o.requires_grad]
    leaves = [t for t, asked in zip(ends, wanted, strict=True) if asked]
    if not pairs or not leaves:
        return [torch.zeros_like(t) if asked else None for t, asked in zip(inputs, wanted, strict=True)]
    outputs, cotangents = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, leaves, cotangents, create_graph=again, materialize_grads=True))
    return [next(found) if asked else None for asked in wanted]
