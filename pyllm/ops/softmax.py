"""softmax and log_softmax with scale, mask and causality fused in."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import OpOverload

from pyllm import reference
from pyllm.backend import Implementation, Operator, select
from pyllm.derivatives import beyond_kernels
from pyllm.ops import _checks
from pyllm.ops._autocast import full_precision
from pyllm.ops._registration import apply, kernel, needs_grad, on_kernels


def softmax(
    x: Tensor, dim: int = -1, *, scale: float = 1.0, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """softmax(scale * x + mask) along `dim`; 0 throughout a row in which the masks leave nothing.

    x: any shape, float32, float64, bfloat16 or float16. attn_mask broadcasts to x's shape: boolean, True = take part,
    or x's dtype or float32, added, with a gradient if it requires one. is_causal keeps column j of row i where j <= i;
    it wants dim to be the last and takes the one before as rows. Returns x's shape and dtype,
    contiguous.
    Raises TypeError, ValueError, IndexError or RuntimeError for a dtype, a shape, a dim or a device that does not fit.
    """
    return _along("softmax", SOFTMAX, x, dim, scale, attn_mask, is_causal)


def log_softmax(
    x: Tensor, dim: int = -1, *, scale: float = 1.0, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """The logarithm of `softmax`: -inf where that is 0; no gradient is taken there. Arguments as there."""
    return _along("log_softmax", LOG_SOFTMAX, x, dim, scale, attn_mask, is_causal)


def _along(name: str, op: Operator, x: Tensor, dim: int, scale: float, attn_mask: Tensor | None, is_causal: bool):
    (x,) = full_precision(x)
    _checks.floating(name, "x", x)
    if type(scale) is not float:
        scale = _checks.number(name, "scale", scale)
    rank = x.dim()
    if dim != -1 or not rank:
        if not -rank <= dim < rank:
            raise IndexError(f"{name}: dim must be in [{-rank}, {rank - 1}] for an x of {rank} dimensions, got {dim}")
        dim = dim if dim < 0 else dim - rank
    if is_causal and (dim != -1 or rank < 2):
        raise ValueError(f"{name}: is_causal needs dim to be the last of at least two dimensions")
    if attn_mask is not None:
        _checks.attention_mask(name, attn_mask, x, "x")
        _checks.broadcasts(name, "attn_mask", attn_mask, x.shape, "x's shape")
        attn_mask = attn_mask.reshape((1,) * (rank - attn_mask.dim()) + attn_mask.shape)
    rows = x if dim == -1 else x.transpose(dim, -1)
    return select(op, rows, attn_mask, scale, is_causal, dim)(x, attn_mask, scale, is_causal, dim)


def _over(dim: int, function: Callable[..., Tensor], first: Tensor, second: Tensor | None, *options) -> Tensor:
    """function(first, second, *options), which works on the last dimension, over `dim`; the result is contiguous."""
    if dim == -1:
        return function(first, second, *options)
    first, second = (None if t is None else t.transpose(dim, -1) for t in (first, second))
    return function(first, second, *options).transpose(dim, -1).contiguous()


# --- operators as PyTorch's dispatcher knows them: attn_mask has x's rank, each size x's or 1 ---


@kernel("softmax")
def softmax_fwd(x: Tensor, attn_mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
    return x.new_empty(x.shape)


@kernel("softmax")
def softmax_bwd(dy: Tensor, y: Tensor, scale: float) -> Tensor:
    """scale * (gradient of the scores); columns that the masks removed have y = 0 and get 0."""
    return y.new_empty(y.shape)


@kernel("softmax")
def log_softmax_fwd(x: Tensor, attn_mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
    return x.new_empty(x.shape)


@kernel("softmax")
def log_softmax_bwd(dy: Tensor, y: Tensor, scale: float) -> Tensor:
    """As softmax_bwd; removed columns have y = -inf, and what dy holds there is not read into the sum."""
    return y.new_empty(y.shape)


def _on(composed_bwd: Callable) -> Callable[[OpOverload, OpOverload], Implementation]:
    """composed_bwd: the backward in PyTorch's operators, with its arguments."""

    def on(fwd: OpOverload, bwd: OpOverload) -> Implementation:
        class Softmax(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, attn_mask, scale, is_causal, dim):
                y = _over(dim, fwd, x, attn_mask, scale, is_causal)
                ctx.save_for_backward(y)
                ctx.scale, ctx.dim = scale, dim
                if ctx.needs_input_grad[1]:
                    ctx.mask_like = (attn_mask.shape, attn_mask.dtype)
                return y

            @staticmethod
            def backward(ctx, dy):
                (y,) = ctx.saved_tensors
                gradient = composed_bwd if beyond_kernels(dy) else bwd
                if not ctx.needs_input_grad[1]:
                    return _over(ctx.dim, gradient, dy, y, ctx.scale), None, None, None, None
                shape, dtype = ctx.mask_like
                dscores = _over(ctx.dim, gradient, dy, y, 1.0)
                return dscores * ctx.scale, dscores.to(dtype).sum_to_size(shape), None, None, None

        def run(x, attn_mask, scale, is_causal, dim):
            if needs_grad(x, attn_mask):
                return apply(Softmax, x, attn_mask, scale, is_causal, dim)
            return fwd(x, attn_mask, scale, is_causal) if dim == -1 else _over(dim, fwd, x, attn_mask, scale, is_causal)

        return Implementation(run)

    return on


def _composed_softmax_bwd(dy: Tensor, y: Tensor, scale: float) -> Tensor:
    return scale * y * (dy - (y * dy).sum(-1, keepdim=True))


def _composed_log_softmax_bwd(dy: Tensor, y: Tensor, scale: float) -> Tensor:
    kept = y != -torch.inf
    dy = torch.where(kept, dy, 0.0)
    return scale * torch.where(kept, dy - y.exp() * dy.sum(-1, keepdim=True), 0.0)


def _reference(function: Callable) -> Implementation:
    def run(x, attn_mask, scale, is_causal, dim):
        return _over(dim, function, x, attn_mask, scale, is_causal)

    return Implementation(run, fused=False)


def _on_torch(function) -> Implementation:
    def run(x, attn_mask, scale, is_causal, dim):
        x = x if scale == 1.0 else x * scale
        if not is_causal:
            return function(x, dim)
        removed = ~reference.band(*x.shape[-2:], -1, 0, False, x.device)
        y = function(x.masked_fill(removed, -torch.inf), -1)
        # Filled once more, so that a gradient that comes in there stays out of log_softmax's sum.
        return y.masked_fill(removed, 0.0 if function is torch.softmax else -torch.inf)

    def unfit(x, attn_mask, *_):
        return None if attn_mask is None else "a mask may leave a row empty, where torch gives NaN"

    def fused(x, attn_mask, scale, is_causal, dim):
        return scale == 1.0 and not is_causal

    return Implementation(run, unfit, fused)


SOFTMAX = Operator(
    "softmax",
    on_kernels(_on(_composed_softmax_bwd), softmax_fwd, softmax_bwd)
    | {"torch": _on_torch(torch.softmax), "reference": _reference(reference.softmax)},
)
LOG_SOFTMAX = Operator(
    "log_softmax",
    on_kernels(_on(_composed_log_softmax_bwd), log_softmax_fwd, log_softmax_bwd)
    | {
        "torch": _on_torch(torch.log_softmax),
        "reference": _reference(reference.log_softmax),
    },
)
