"""Rotary position embedding of queries and keys (Su et al., 2021), into a new tensor or in place."""

import torch
from torch import Tensor
from torch._ops import OpOverload

from pyllm import reference
from pyllm.backend import Implementation, Operator, select
from pyllm.derivatives import beyond_kernels, vjp
from pyllm.ops import _checks
from pyllm.ops._registration import apply, kernel, needs_grad, on_kernels, will_change
from pyllm.reference import merged_heads, statistics_type


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, inverse: bool = False) -> Tensor:
    """Turns pairs of the first R columns of x by the angles whose cos and sin are given; other columns pass through.

    x: (B, H, S, D), any strides; cos and sin: (S, R / 2) or (B, S, R / 2), floating, R up to D. A pair is columns
    (c, c + R / 2), or (2c, 2c + 1) if interleaved. inverse turns back. All three have gradients. Returns x's shape and
    dtype, stored as (B, S, H, D). Raises TypeError, ValueError or RuntimeError for what does not fit.
    """
    args = (x, *_tables("rotary", x, cos, sin), interleaved, inverse)
    return select(ROTARY, *args)(*args)


def rotary_(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, inverse: bool = False) -> Tensor:
    """`rotary` in place, such as on the queries and keys in a packed matrix of them and the values; returns x.

    x: its last dimension contiguous, no element twice in memory. Under autograd x is no leaf that requires a gradient;
    the gradient that comes in may be another operator's too, so it is turned back into a new tensor. cos and sin have
    no gradient, which would need the x that is overwritten: raises ValueError where they require one.
    """
    tables = _tables("rotary_", x, cos, sin)
    if needs_grad(*tables):
        raise ValueError("rotary_: cos and sin must not require a gradient; rotary, which is not in place, has it")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"rotary_: x must have a contiguous last dimension, got strides {x.stride()}")
    if _checks.is_expanded(x):
        raise RuntimeError("rotary_: x must not be expanded, since each of its elements is written")
    args = (x, *tables, interleaved, inverse)
    return select(ROTARY_INPLACE, *args)(*args)


def _tables(op: str, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The checked cos and sin, contiguous, in the statistics type."""
    _checks.floating(op, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{op}: x must have shape (B, H, S, D), got {tuple(x.shape)}")
    for name, table in (("cos", cos), ("sin", sin)):
        _checks.floating(op, name, table)
        _checks.same_device(op, name, table, "x", x)
    if not (
        cos.dim() in (2, 3)
        and cos.shape[-2] == x.shape[2]
        and (cos.dim() == 2 or _checks.is_one_or(cos.shape[0], x.shape[0]))
        and min(1, x.shape[3]) <= 2 * cos.shape[-1] <= x.shape[3]
    ):
        raise ValueError(
            f"{op}: cos must have shape (S, R / 2) or (B, S, R / 2) with S = {x.shape[2]}, B = {x.shape[0]} and R at "
            f"most {x.shape[3]}, got {tuple(cos.shape)}"
        )
    _checks.shape(op, "sin", sin, cos.shape, "cos's")
    if cos.dim() == 3 and cos.shape[0] == 1:
        cos, sin = cos[0], sin[0]
    return tuple(t.to(statistics_type(x)).contiguous() for t in (cos, sin))


# --- operators as PyTorch's dispatcher knows them ---


@kernel("rotary")
def rotary_fwd(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    return merged_heads(x)


@kernel("rotary", mutates=("x",))
def rotary_inplace_fwd(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> None:
    return None


# --- autograd, where a gradient is turned back, and the tables of implementations ---


def _on(fwd: OpOverload, bwd: OpOverload) -> Implementation:
    class Rotary(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, cos, sin, interleaved, inverse):
            learned = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
            ctx.save_for_backward(cos, sin, x if learned else None)
            ctx.options = (interleaved, inverse)
            return fwd(x, cos, sin, interleaved, inverse)

        @staticmethod
        def backward(ctx, dy):
            cos, sin, x = ctx.saved_tensors
            interleaved, inverse = ctx.options
            if x is not None:
                return (
                    *vjp(lambda *t: _reference(*t, *ctx.options), (x, cos, sin), ctx.needs_input_grad[:3], [dy]),
                    None,
                    None,
                )
            turn = _reference if beyond_kernels(dy) else bwd
            return turn(dy, cos, sin, interleaved, not inverse), None, None, None, None

    def run(x, cos, sin, *options):
        if needs_grad(x, cos, sin):
            return apply(Rotary, x, cos, sin, *options)
        return fwd(x, cos, sin, *options)

    return Implementation(run)


def _inplace_on(fwd: OpOverload, bwd: OpOverload) -> Implementation:
    class RotaryInPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, cos, sin, interleaved, inverse):
            ctx.mark_dirty(x)
            ctx.save_for_backward(cos, sin)
            ctx.options = (interleaved, inverse)
            fwd(x, cos, sin, interleaved, inverse)
            return x

        @staticmethod
        def backward(ctx, dy):
            interleaved, inverse = ctx.options
            turn = _reference if beyond_kernels(dy) else bwd
            return turn(dy, *ctx.saved_tensors, interleaved, not inverse), None, None, None, None

    def run(x, *rest):
        if needs_grad(x):
            return RotaryInPlace.apply(x, *rest)
        will_change(x)
        fwd(x, *rest)
        return x

    return Implementation(run)


def _reference(x, cos, sin, interleaved, inverse):
    cos, sin = (t if t.dim() == 2 else t[:, None] for t in (cos, sin))
    return reference.rotary(x, cos, -sin if inverse else sin, interleaved)


def _reference_inplace(x, *rest):
    return x.copy_(_reference(x, *rest))


ROTARY = Operator(
    "rotary",
    on_kernels(_on, rotary_fwd, rotary_fwd)
    | {name: Implementation(_reference, fused=False) for name in ("torch", "reference")},
)
ROTARY_INPLACE = Operator(
    "rotary_inplace",
    on_kernels(_inplace_on, rotary_inplace_fwd, rotary_fwd)
    | {name: Implementation(_reference_inplace, fused=False) for name in ("torch", "reference")},
)
