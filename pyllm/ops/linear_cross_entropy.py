"""Cross-entropy of a linear layer over the vocabulary, without holding its logits.

Two ways, of which the budget of working memory decides. By tokens: the logits of some tokens at a time, over the whole
vocabulary, become their gradient in place, and the gradients of hidden and weight are made at once, in the forward:
three matrix products in all. The gradient of the weight is accumulated in the statistics' type, so for 16-bit weights
that takes V D floats. By vocabulary: the logits of all tokens over some classes at a time, once for each token's
statistics and, in the backward, once more for the gradients: four products, and no accumulator but N D floats. It also
serves a vocabulary that is split over processes, and gradients that depend on more than one incoming number.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import register_flop_formula

from pyllm import reference
from pyllm.backend import Implementation, Operator, select
from pyllm.derivatives import beyond_kernels, vjp
from pyllm.ops import _checks
from pyllm.ops import linear_cross_entropy_chunks as chunks
from pyllm.ops._autocast import in_given_precision, lower_precision
from pyllm.ops._registration import apply, kernel, needs_grad, on_kernels
from pyllm.ops.cross_entropy import (
    check_options,
    check_targets,
    cross_entropy_bwd,
    has_saved_tensor_hooks,
    inverse_count,
    kept_gradient,
    loss_type,
    reduced,
    torch_cross_entropy,
)
from pyllm.reference import statistics_type


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    memory_budget: int | None = None,
    process_group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """`cross_entropy` of the logits hidden weight^T + bias, of which only a part is held at a time.

    hidden: (..., D), weight: (V, D), bias: (V,), all of one dtype, float32, float64, bfloat16 or float16; target: (...)
    int64. The other arguments, the result and the errors are those of `cross_entropy`; under autocast the products are
    in its dtype and the loss is float32.

    memory_budget: bytes that the call may hold beyond its results, which are the loss and the gradients. None is an
    eighth of the logits, or 32 MiB if that is more. A larger one saves time: one that has room for the weight's
    gradient in float32 saves a product of four for 16-bit weights. Raises ValueError, with the least that works, if it
    cannot be met. Backends `torch`, which takes no budget, and `reference` hold all logits.

    process_group: the vocabulary is split over its ranks in their order, and weight and bias are this rank's part,
    equally large on each; hidden and target are the same on all. The loss, and the gradient of hidden, summed over the
    ranks, are the whole vocabulary's.
    """
    name = "linear_cross_entropy"
    _checks.floating(name, "hidden", hidden)
    dtype = loss_type(hidden)
    hidden, weight, bias = lower_precision(hidden, weight, bias)
    _check(name, hidden, weight, bias)
    first, classes = 0, weight.shape[0]
    if process_group is not None:
        first = classes * dist.get_rank(process_group)
        classes *= dist.get_world_size(process_group)
    check_targets(name, target, "hidden", hidden, classes, ignore_index)
    check_options(name, label_smoothing, z_loss, reduction)
    if memory_budget is not None and (not isinstance(memory_budget, int) or isinstance(memory_budget, bool)):
        raise TypeError(f"{name}: memory_budget must be a number of bytes, got {type(memory_budget).__name__}")
    rows = hidden.flatten(0, -2) if hidden.dim() > 1 else hidden[None]
    index = target.reshape(-1)
    wanted = [t is not None and needs_grad(t) for t in (hidden, weight, bias)]
    shard = (first, classes, process_group)
    args = (rows, weight, index, bias, ignore_index, label_smoothing, z_loss, reduction, memory_budget, wanted, shard)
    loss = select(LINEAR_CROSS_ENTROPY, *args)(*args).to(dtype)
    return loss.reshape(target.shape) if reduction == "none" else loss


def _check(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() == 0:
        raise ValueError(f"{op}: hidden must have at least one dimension")
    _checks.like(op, "weight", weight, "hidden", hidden)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{op}: weight must have shape (V, D) with hidden's D = {hidden.shape[-1]}, got {tuple(weight.shape)}"
        )
    if bias is not None:
        _checks.like(op, "bias", bias, "hidden", hidden)
        _checks.shape(op, "bias", bias, weight.shape[:1], "(V,)")


# --- operators as PyTorch's dispatcher knows them. wanted: whether hidden, weight and bias get a gradient, or (0,) ---


def _gradients(wanted: list[bool], *tensors: Tensor | None) -> tuple[Tensor, ...]:
    like = tensors[0]
    return tuple(t.new_empty(t.shape) if asked else like.new_empty(0) for t, asked in zip(tensors, wanted, strict=True))


@kernel(chunks.by_tokens)
def linear_cross_entropy_fwd(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    wanted: list[bool],
    memory: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of each token, and the gradients of scale * the sum of them."""
    loss = hidden.new_empty(target.shape, dtype=statistics_type(hidden))
    return loss, *_gradients(wanted, hidden, weight, bias)


@kernel(chunks.statistics_by_vocabulary)
def linear_cross_entropy_shard_fwd(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, first: int, memory: int
) -> Tensor:
    """(4, N): largest logit, sum of exponentials relative to it, the target's logit, sum of logits, of these classes.

    They are [first, first + V) of the vocabulary. A target outside of them has 0.
    """
    return hidden.new_empty((4, hidden.shape[0]), dtype=statistics_type(hidden))


@kernel(chunks.losses)
def linear_cross_entropy_shard_loss(
    statistics: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, classes: int
) -> Tensor:
    """The loss of each token from its statistics over the whole vocabulary, of so many classes."""
    return statistics.new_empty(target.shape)


@kernel(chunks.gradients_by_vocabulary)
def linear_cross_entropy_shard_bwd(
    dloss: Tensor,
    statistics: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    classes: int,
    first: int,
    wanted: list[bool],
    memory: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients that these classes have or give; dloss is one for each token, or one for all."""
    return _gradients(wanted, hidden, weight, bias)


def _on(
    fwd: OpOverload, shard_fwd: OpOverload, shard_loss: OpOverload, shard_bwd: OpOverload, scale_gradient: OpOverload
) -> Implementation:
    class ByTokens(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, bias, target, scale, options, wanted, memory):
            loss, *gradients = fwd(hidden, weight, target, bias, scale, *options, wanted, memory)
            gradients = (g if asked else None for g, asked in zip(gradients, wanted, strict=True))
            ctx.save_for_backward(*gradients, hidden, weight, bias, target)  # the operands for a second derivative
            ctx.options, ctx.reduction = options, "sum" if scale is None else "mean"
            ctx.shared = has_saved_tensor_hooks()
            return loss.sum() if scale is None else loss.sum() * scale

        @staticmethod
        @in_given_precision
        def backward(ctx, dloss):
            *gradients, hidden, weight, bias, target = ctx.saved_tensors
            if beyond_kernels(dloss):
                operands = (hidden, weight, bias)
                return *again(dloss, operands, target, ctx.options, ctx.reduction, ctx.needs_input_grad), *(None,) * 5
            gradients = [None if g is None else kept_gradient(g, ctx.shared) for g in gradients]
            for gradient in gradients:
                if gradient is not None:
                    scale_gradient(gradient, dloss)
            return *gradients, *(None,) * 5

    class ByVocabulary(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, bias, target, scale, options, reduction, wanted, memory, shard):
            loss, statistics = losses(hidden, weight, target, bias, options, memory, shard)
            ctx.save_for_backward(hidden, weight, bias, target, scale, statistics)
            ctx.options, ctx.reduction, ctx.wanted, ctx.memory, ctx.shard = options, reduction, wanted, memory, shard
            return reduced(loss, scale, reduction)

        @staticmethod
        @in_given_precision
        def backward(ctx, dloss):
            hidden, weight, bias, target, scale, statistics = ctx.saved_tensors
            first, classes, group = ctx.shard
            if beyond_kernels(dloss):
                if group is not None:
                    raise RuntimeError(f"linear_cross_entropy has no second derivative: {_WHOLE}")
                operands = (hidden, weight, bias)
                return *again(dloss, operands, target, ctx.options, ctx.reduction, ctx.needs_input_grad), *(None,) * 7
            dloss = dloss if scale is None else dloss * scale
            args = (hidden, weight, target, bias, *ctx.options, classes, first, ctx.wanted, ctx.memory)
            gradients = shard_bwd(dloss, statistics, *args)
            if group is not None and ctx.wanted[0]:
                dist.all_reduce(gradients[0], group=group)
            gradients = (g if asked else None for g, asked in zip(gradients, ctx.wanted, strict=True))
            return *gradients, *(None,) * 7

    def again(dloss, operands, target, options, reduction, wanted):
        def composed(hidden, weight, bias):
            loss = reference.linear_cross_entropy(hidden, weight, target, bias, *options, reduction)
            return loss.to(dloss.dtype)

        return vjp(composed, operands, wanted[:3], [dloss])

    def losses(hidden, weight, target, bias, options, memory, shard):
        first, classes, group = shard
        statistics = shard_fwd(hidden, weight, target, bias, first, memory)
        if group is not None:
            statistics = _combined(statistics, group)
        return shard_loss(statistics, target, *options, classes), statistics

    def run(hidden, weight, target, bias, ignore_index, label_smoothing, z_loss, reduction, budget, wanted, shard):
        options = (ignore_index, label_smoothing, z_loss)
        scale = None
        if reduction == "mean":
            scale = inverse_count(target, None, ignore_index, statistics_type(hidden))
        # A gradient that would underflow before a loss scale comes in, or that depends on more than one number.
        late = reduction == "none" or hidden.dtype == torch.float16 or shard[-1] is not None
        by_tokens, memory = chunks.plan(hidden, weight, wanted, late, budget)
        if not any(wanted):
            return reduced(losses(hidden, weight, target, bias, options, memory, shard)[0], scale, reduction)
        if by_tokens:
            return apply(ByTokens, hidden, weight, bias, target, scale, options, wanted, memory)
        return apply(ByVocabulary, hidden, weight, bias, target, scale, options, reduction, wanted, memory, shard)

    return Implementation(run)


def _combined(statistics: Tensor, group) -> Tensor:
    """Each token's statistics over the whole vocabulary, from those of its shards."""
    peak = statistics[0].clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group)
    sums = statistics[1:].clone()
    sums[0] *= torch.exp(statistics[0] - chunks.shift(peak))
    dist.all_reduce(sums, group=group)
    return torch.cat([peak[None], sums])


def _on_torch(hidden, weight, target, bias, ignore_index, label_smoothing, z_loss, reduction, *_):
    return torch_cross_entropy(
        F.linear(hidden, weight, bias), target, None, ignore_index, label_smoothing, z_loss, reduction, False
    )


def _unfit_for_torch(hidden, weight, target, bias, ignore_index, label_smoothing, z_loss, reduction, budget, *rest):
    if z_loss:
        return "it has no z-loss"
    return "it holds all logits" if budget is not None else _needs_whole_vocabulary(*rest)


_WHOLE = "it needs the whole vocabulary"


def _needs_whole_vocabulary(wanted, shard) -> str | None:
    return _WHOLE if shard[-1] is not None else None


LINEAR_CROSS_ENTROPY = Operator(
    "linear_cross_entropy",
    on_kernels(
        _on,
        linear_cross_entropy_fwd,
        linear_cross_entropy_shard_fwd,
        linear_cross_entropy_shard_loss,
        linear_cross_entropy_shard_bwd,
        cross_entropy_bwd,
    )
    | {
        "torch": Implementation(_on_torch, _unfit_for_torch, fused=False),
        "reference": Implementation(
            lambda *args: reference.linear_cross_entropy(*args[:8]),
            lambda *args: _needs_whole_vocabulary(*args[-2:]),
            fused=False,
        ),
    },
)


def _products(hidden: Tensor, weight: Tensor, count: int) -> int:
    return count * 2 * hidden.shape[0] * weight.numel()


def _forward_flops(hidden, weight, target, bias, scale, ignore_index, label_smoothing, z_loss, wanted, memory, **_):
    return _products(hidden, weight, 1 + wanted[0] + wanted[1])


def _shard_forward_flops(hidden, weight, *_, **__):
    return _products(hidden, weight, 1)


def _shard_backward_flops(dloss, statistics, hidden, weight, *rest, **_):
    wanted = rest[-2]
    return _products(hidden, weight, 1 + wanted[0] + wanted[1])


for _formula, _kernel in (
    (_forward_flops, linear_cross_entropy_fwd),
    (_shard_forward_flops, linear_cross_entropy_shard_fwd),
    (_shard_backward_flops, linear_cross_entropy_shard_bwd),
):
    for _overload in (_kernel.native, _kernel.triton):
        if _overload is not None:
            register_flop_formula(_overload.overloadpacket, get_raw=True)(_formula)
