"""dropout_add: bias, dropout and residual addition in one pass."""

import torch
from torch import Tensor
from torch._ops import OpOverload

from pyllm import reference
from pyllm.backend import Implementation, Operator, select
from pyllm.derivatives import beyond_kernels
from pyllm.ops import _checks
from pyllm.ops._registration import (
    apply,
    draw_rng,
    gradient_of,
    if_given,
    kernel,
    needs_grad,
    no_dropout,
    on_kernels,
)


def dropout_add(x: Tensor, residual: Tensor, bias: Tensor | None = None, *, dropout_p: float = 0.0) -> Tensor:
    """residual + dropout(x + bias).

    x and residual: (..., N) of one shape; both of one dtype, or x of 16 bits and residual float32. bias: (N,), x's
    dtype or float32. dropout_p in [0, 1] is applied whenever it is not 0. Returns residual's dtype.
    Raises TypeError, ValueError or RuntimeError for a dtype, a shape or a device that does not fit.
    """
    _checks.residual("dropout_add", residual, x)
    if bias is not None:
        _checks.parameter("dropout_add", "bias", bias, "x", x)
    _checks.probability("dropout_add", "dropout_p", dropout_p)
    args = (x, residual, bias, draw_rng(x, dropout_p), dropout_p)
    return select(DROPOUT_ADD, *args)(*args)


@kernel("dropout_add")
def dropout_add_fwd(x: Tensor, residual: Tensor, bias: Tensor | None, rng: Tensor | None, dropout_p: float) -> Tensor:
    return residual.new_empty(residual.shape)


@kernel("dropout_add")
def dropout_add_bwd(
    dy: Tensor, bias: Tensor | None, rng: Tensor | None, dropout_p: float, x_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:  # dx, dbias
    return dy.new_empty(dy.shape, dtype=x_dtype), gradient_of(dy, bias)


def _on(fwd: OpOverload, bwd: OpOverload) -> Implementation:
    class DropoutAdd(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, residual, bias, rng, dropout_p):
            ctx.save_for_backward(bias, rng)
            ctx.options = (dropout_p, x.dtype)
            return fwd(x, residual, bias, rng, dropout_p)

        @staticmethod
        def backward(ctx, dy):
            bias, rng = ctx.saved_tensors
            dropout_p, x_dtype = ctx.options
            if bias is None and dropout_p == 0.0 and x_dtype == dy.dtype:
                return dy, dy, None, None, None
            if beyond_kernels(dy):
                dx = reference.dropout(dy, rng, dropout_p)
                return (
                    dx.to(x_dtype),
                    dy,
                    None if bias is None else dx.sum_to_size(bias.shape).to(bias.dtype),
                    None,
                    None,
                )
            dx, dbias = bwd(dy, bias, rng, dropout_p, x_dtype)
            return dx, dy, if_given(bias, dbias), None, None

    def run(x, residual, bias, rng, dropout_p):
        if needs_grad(x, residual, bias):
            return apply(DropoutAdd, x, residual, bias, rng, dropout_p)
        return fwd(x, residual, bias, rng, dropout_p)

    return Implementation(run)


DROPOUT_ADD = Operator(
    "dropout_add",
    on_kernels(_on, dropout_add_fwd, dropout_add_bwd)
    | {
        "torch": Implementation(reference.dropout_add, no_dropout(-1), lambda x, residual, bias, *_: bias is None),
        "reference": Implementation(reference.dropout_add, fused=False),
    },
)
