"""The memory plan of a layer: what its forward keeps for the backward, and what the backward makes again.

"all" keeps every intermediate result. "minimal" makes norm outputs (from the norm's input) and activations (from the
pre-activation) again: a pass over memory each. "recompute" makes the pre-activation of the feed-forward again too,
which is a matrix product. Dropout is a function of its seed, so whatever is made again is the same to the bit.

In units of tokens * d_model elements, a post-norm layer with a feed-forward of 4 d_model keeps 16, 11 and 7: its input,
queries, keys, values and attention's output (5), the sums that are normed (2), the pre-activation (4), norm output and
activation (5). torch.nn's layer keeps 19 and, with dropout, matrices of attention weights and of masks.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from pyllm.derivatives import transformed
from pyllm.nn.plain import LINEAR, is_unchanged
from pyllm.ops._autocast import in_given_precision, lower_precision
from pyllm.ops._registration import needs_grad

PLANS = ("all", "minimal", "recompute")


def check_plan(save: str) -> str:
    if save not in PLANS:
        raise ValueError(f"save must be one of {', '.join(PLANS)}, got {save!r}")
    return save


class Source(NamedTuple):
    """How a tensor is made again, to the bit: compute(*tensors), tensors being kept anyway. compute holds none itself,
    for it stays where saved-tensor hooks do not see it."""

    compute: Callable[..., Tensor]
    tensors: tuple[Tensor | None, ...]

    def cast(self, dtype: torch.dtype) -> "Source":
        return Source(partial(_cast, dtype, self.compute), self.tensors)


def _cast(dtype: torch.dtype, compute: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    return compute(*tensors).to(dtype)


def flat(source: Source | None) -> tuple:
    """A source as the last arguments of a Function, which takes tensors one by one; no gradient goes its way."""
    return () if source is None else (source.compute, *source.tensors)


def matrix(x: Tensor) -> Tensor:
    """x (..., N) as (T, N), also where a size is 0, beside which none can be inferred."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


# (tensor, shape) as `view`, for what a Function returns: a view that it made could not be changed in place.
no_view = torch.ops.aten._unsafe_view.default


def kept(ctx, x: Tensor, source: tuple) -> tuple[Tensor | None, ...]:
    """What a Function is to save for `restored`: x, or the tensors of its source, if there is one."""
    ctx.compute, *tensors = source or (None, x)
    return tuple(tensors)


def restored(ctx, tensors: tuple[Tensor | None, ...]) -> Tensor:
    """The matrix (T, width) of x, from what `kept` had saved."""
    x = tensors[0] if ctx.compute is None else ctx.compute(*tensors)
    return matrix(x)


def in_one_precision(
    x: Tensor, source: Source | None, *weights: Tensor
) -> tuple[Tensor, Source | None, tuple[Tensor, ...]]:
    """x, its source and weights as autocast has them in a matrix product."""
    cast, *weights = lower_precision(x, *weights)
    if source is not None and cast.dtype != x.dtype:
        source = source.cast(cast.dtype)
    return cast, source, tuple(weights)


def by_hand(*tensors: Tensor | None) -> bool:
    """Whether a Function of this package takes the place of autograd's own: a compiler has a memory plan itself, a
    transform or a trace has rules for PyTorch's operators alone, and tensors of other classes (quantised, distributed)
    have products of their own."""
    return (
        needs_grad(*tensors)
        and not torch.compiler.is_compiling()
        and not transformed()
        and all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, source: Source | None = None) -> Tensor:
    """F.linear(x, weight, bias), whose backward makes x from its source, if there is one, instead of keeping it."""
    if not by_hand(x, weight, bias) or (source is None and (bias is None or not x.is_cpu)):
        return F.linear(x, weight, bias)
    x, source, (weight,) = in_one_precision(x, source, weight)
    if bias is not None:
        bias = bias.to(x.dtype)
    return _Linear.apply(x, weight, bias, *flat(source))


def branch_linear(x: Tensor, module: Module) -> tuple[Tensor, Tensor | None]:
    """A branch's last linear layer on x, as a tensor and a bias that is yet to be added.

    The module is one that torch.nn.MultiheadAttention does not call: here it is where it has something of its own, but
    hooks of all modules and methods replaced on its class do not see it, as in torch.
    """
    if is_unchanged(module, *LINEAR):
        return linear(x, module.weight), module.bias
    return module(x), None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, *source):
        ctx.save_for_backward(weight, *kept(ctx, x, source))
        if bias is None or not x.is_cpu or torch._C._len_torch_dispatch_stack():  # a mode may have kept the product
            out = F.linear(x, weight, bias)
        else:
            out = F.linear(x, weight).add_(bias)  # oneDNN's product with a bias takes a quarter longer
        return no_view(out, out.shape) if out._is_view() else out

    @staticmethod
    @in_given_precision
    def backward(ctx, dout):  # of operators that are differentiated again as they are
        weight, *saved = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, *rest = ctx.needs_input_grad
        rows = matrix(dout)
        dx = (rows @ weight).view(*dout.shape[:-1], weight.shape[1]) if wants_x else None
        dweight = rows.mT @ restored(ctx, saved) if wants_weight else None
        dbias = rows.sum(0) if wants_bias else None
        return dx, dweight, dbias, *(None for _ in rest)
