"""Cross-entropy of logits and class indices: the loss and the gradient of the logits from one pass over them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload

from pyllm import reference
from pyllm.backend import Implementation, Operator, select
from pyllm.derivatives import beyond_kernels, transformed
from pyllm.ops import _checks
from pyllm.ops._registration import apply, kernel, needs_grad, on_kernels
from pyllm.reference import statistics_type

REDUCTIONS = ("none", "mean", "sum")


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    inplace: bool = False,
) -> Tensor:
    """torch.nn.functional.cross_entropy over the last dimension, plus z_loss * log-sum-exp(logits)^2 for each target.

    logits: (..., V), float32, float64, bfloat16 or float16; target: (...) int64. weight (V), of logits' dtype or
    float32 and without a gradient, and label_smoothing in [0, 1] are as in torch; the z-loss (Chowdhery et al., 2022)
    is not weighted. A target of ignore_index counts nowhere: loss 0, gradient 0. reduction: "none" returns (...), "sum"
    and "mean" a scalar; the mean is over the targets that count, or their weights, and NaN over none. The result has
    logits' dtype, and is float32 under autocast, as torch's.

    The forward computes the gradient of the logits too, where one is required. inplace=True lets it take the place of
    the logits, which are then consumed: later autograd use of them raises RuntimeError, and so does a second
    derivative. They must be contiguous and no view. Under torch.compile, whose own planning decides on memory, and
    under torch.func, inplace changes nothing.

    Raises TypeError, ValueError or RuntimeError for a dtype, a shape, a number or a device that does not fit.
    Targets outside [0, V) raise IndexError on the CPU; on a GPU, where looking would synchronise, and in a compiled
    program, their loss and gradient are NaN.
    """
    name = "cross_entropy"
    _checks.floating(name, "logits", logits)
    if logits.dim() == 0:
        raise ValueError(f"{name}: logits must have at least one dimension")
    check_targets(name, target, "logits", logits, logits.shape[-1], ignore_index)
    check_options(name, label_smoothing, z_loss, reduction)
    if weight is not None:
        _check_weight(name, weight, logits)
    dtype = loss_type(logits)
    inplace = inplace and not torch.compiler.is_compiling() and not transformed() and needs_grad(logits)
    if inplace and (logits._is_view() or not logits.is_contiguous()):
        raise ValueError(f"{name}: inplace=True needs contiguous logits that are no view of another tensor")
    args = (logits, target, weight, ignore_index, label_smoothing, z_loss, reduction, inplace)
    return select(CROSS_ENTROPY, *args)(*args).to(dtype)


def loss_type(logits: Tensor) -> torch.dtype:
    """The dtype of a loss: that of the logits, or float32 where autocast is on, on each device type."""
    if logits.dtype != torch.float64 and not logits.is_meta and torch.is_autocast_enabled(logits.device.type):
        return torch.float32
    return logits.dtype


def check_options(op: str, label_smoothing: float, z_loss: float, reduction: str) -> None:
    _checks.probability(op, "label_smoothing", label_smoothing)
    if not isinstance(z_loss, (int, float)):
        raise TypeError(f"{op}: z_loss must be a number, got {type(z_loss).__name__}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def check_targets(op: str, target: Tensor, first: str, rows: Tensor, classes: int, ignore_index: int) -> None:
    """target has a class index, or ignore_index, for each row of the tensor called `first`."""
    if not isinstance(target, Tensor):
        raise TypeError(f"{op}: target must be a Tensor, got {type(target).__name__}")
    _checks.same_device(op, "target", target, first, rows)
    if target.dtype != torch.int64:
        raise TypeError(f"{op}: target must be int64 class indices, got {target.dtype}")
    if target.shape != rows.shape[:-1]:
        _checks.shape(op, "target", target, rows.shape[:-1], f"{first}' without the last dimension")
    if _checks.can_look(target) and target.numel():
        outside = ((target < 0) | (target >= classes)) & (target != ignore_index)
        if outside.any():
            raise IndexError(
                f"{op}: target {target[outside][0].item()} is out of bounds: there are {classes} classes, and "
                f"ignore_index is {ignore_index}"
            )


def _check_weight(op: str, weight: Tensor, logits: Tensor) -> None:
    _checks.floating(op, "weight", weight)
    _checks.same_device(op, "weight", weight, "logits", logits)
    if weight.dtype not in (logits.dtype, torch.float32):
        raise TypeError(f"{op}: weight must be {logits.dtype}, as logits, or float32, got {weight.dtype}")
    _checks.shape(op, "weight", weight, logits.shape[-1:], "(V,)")
    if needs_grad(weight):
        raise ValueError(f"{op}: weight cannot require a gradient")


def inverse_count(target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """What a mean multiplies the sum by, without a synchronisation; infinite where no target counts."""
    kept = target != ignore_index
    if weight is None or not weight.shape[0]:  # without classes no target counts
        return kept.sum(dtype=dtype).reciprocal()
    index = torch.where(kept, target, 0).clamp(0, weight.shape[0] - 1)  # out of bounds: the loss is NaN anyway
    return torch.where(kept, weight[index], 0.0).sum(dtype=dtype).reciprocal()


def has_saved_tensor_hooks() -> bool:
    """Whether what a graph saves now passes through hooks, which may hold it."""
    return not torch.compiler.is_compiling() and torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def kept_gradient(gradient: Tensor, shared: bool) -> Tensor:
    """A gradient that the forward computed, to be scaled in place: a copy where somebody may read it again.

    shared: whether hooks or another graph hold it, beside this graph if that is kept.
    """
    again = shared or torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()
    return gradient.clone() if again else gradient.detach().contiguous()


# --- operators as PyTorch's dispatcher knows them: weight, scale and losses are of the statistics type ---


@kernel("cross_entropy")
def cross_entropy_fwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The loss of each target, and the logits' gradient of scale * the sum of them, or (0,) where none is asked for."""
    loss = logits.new_empty(target.shape, dtype=statistics_type(logits))
    return loss, logits.new_empty(logits.shape if gradient else 0)


@kernel("cross_entropy", mutates=("logits",))
def cross_entropy_inplace_fwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """As cross_entropy_fwd, with the gradient in place of the logits."""
    return logits.new_empty(target.shape, dtype=statistics_type(logits))


@kernel("cross_entropy", mutates=("gradient",))
def cross_entropy_bwd(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor, of one element or one for each row. Nothing is read or written where that is 1."""


@kernel("cross_entropy", mutates=("statistics",))
def cross_entropy_shard_fwd(statistics: Tensor, logits: Tensor, target: Tensor, first: int) -> None:
    """Merges logits (N, width) of the classes from `first` on into statistics (4, N).

    These are each row's largest logit, sum of exponentials relative to it, the target's logit if it is here, and sum of
    logits; they begin as -inf, 0, 0, 0.
    """


@kernel("cross_entropy", mutates=("logits",))
def cross_entropy_shard_bwd(logits: Tensor, coefficients: Tensor, target: Tensor, first: int) -> None:
    """logits = a exp(logits - shift) - c, and - b at the target, with coefficients (4, N): shift, a, b, c."""


def _on(fwd: OpOverload, inplace_fwd: OpOverload, bwd: OpOverload) -> Implementation:
    class CrossEntropy(torch.autograd.Function):
        """Its second output is the gradient of the logits, so that a backward which is differentiated again finds here
        what that gradient depends on, and logits need not be kept."""

        @staticmethod
        def forward(ctx, logits, target, weight, scale, options, reduction, inplace):
            # In float16 the gradient of a mean would underflow before a loss scale could reach it.
            is_late = scale is not None and logits.dtype == torch.float16
            early = None if is_late else scale
            # Without a target the gradient is 0, to be multiplied by something finite.
            late = torch.where((target != options[0]).any(), scale, 0.0) if is_late else None
            args = (logits, target, weight, early, *options)
            if inplace:
                loss, dlogits = inplace_fwd(*args), logits
                ctx.mark_dirty(logits)
            else:
                loss, dlogits = fwd(*args, True)
            ctx.save_for_backward(dlogits, target, weight, early, late)
            ctx.options, ctx.inplace, ctx.shared = options, inplace, has_saved_tensor_hooks()
            ctx.set_materialize_grads(False)
            return reduced(loss, scale, reduction), dlogits

        @staticmethod
        def backward(ctx, dloss, ddlogits):
            if ctx.inplace and ddlogits is not None:
                raise RuntimeError("cross_entropy: inplace=True has consumed the logits, but they were used afterwards")
            dlogits, target, weight, early, late = ctx.saved_tensors
            if ddlogits is not None or beyond_kernels(dloss):
                if ctx.inplace:
                    raise RuntimeError("cross_entropy: inplace=True has consumed the logits: no second derivative")
                ctx.shared = True
                gradient = None if dloss is None else composed(dlogits, dloss if late is None else dloss * late)
                if ddlogits is not None:
                    change = _hessian_product(ddlogits, dlogits, target, weight, early, *ctx.options)
                    gradient = change if gradient is None else gradient + change
                return gradient, *(None,) * 6
            if dloss is None:
                return (None,) * 7
            factor = (dloss if late is None else dloss * late).contiguous()
            dlogits = kept_gradient(dlogits, ctx.shared)
            bwd(dlogits, factor)
            return dlogits, *(None,) * 6

    def composed(dlogits, factor):
        return (dlogits * (factor[..., None] if factor.dim() else factor)).to(dlogits.dtype)

    def run(logits, target, weight, ignore_index, label_smoothing, z_loss, reduction, inplace):
        dtype = statistics_type(logits)
        scale = inverse_count(target, weight, ignore_index, dtype) if reduction == "mean" else None
        weight = None if weight is None else weight.to(dtype).contiguous()
        options = (ignore_index, label_smoothing, z_loss)
        if needs_grad(logits):
            return apply(CrossEntropy, logits, target, weight, scale, options, reduction, inplace)[0]
        return reduced(fwd(logits, target, weight, None, *options, False)[0], scale, reduction)

    return Implementation(run)


_LEAST_SHARE = 32  # of k, in roundings of the gradient: then probabilities have an error of 3 %


def _hessian_product(
    vector: Tensor,
    gradient: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """The product of `vector` with the second derivative of the losses whose gradient (..., V) is given.

    With the probabilities p, that gradient is scale * (k p - b at the target - c), b = (1 - label_smoothing) times the
    target's weight, c = label_smoothing / V times each class's and k = b + sum(c) + 2 z_loss lse: its sum over the
    classes tells k, and then itself p. NaN where z_loss makes k so small that p is lost in the gradient's rounding.
    """
    classes = gradient.shape[-1]
    kept = (target != ignore_index)[..., None]
    index = torch.where(kept, target[..., None], 0)
    ones = torch.ones(classes, dtype=statistics_type(gradient), device=gradient.device)
    weight = ones if weight is None else weight
    at_target = (1 - label_smoothing) * weight[index]
    everywhere = label_smoothing / max(classes, 1) * weight
    unscaled = gradient.to(weight.dtype)
    unscaled = unscaled if scale is None else unscaled / scale
    without_lse = at_target + everywhere.sum()
    total = unscaled.sum(-1, keepdim=True) + without_lse  # k
    shares = unscaled + everywhere + torch.zeros_like(unscaled).scatter(-1, index, at_target)  # k p
    some = total != 0
    inverse = torch.where(some, 1 / torch.where(some, total, 1.0), 0.0)
    along = (shares * vector).sum(-1, keepdim=True)
    product = shares * vector + shares * along * (2 * z_loss * inverse - 1) * inverse
    if z_loss:
        lost = total.abs() < _LEAST_SHARE * torch.finfo(gradient.dtype).eps * without_lse
        product = torch.where(lost, torch.nan, product)
    product = torch.where(kept, product if scale is None else product * scale, 0.0)
    return product.to(gradient.dtype)


def reduced(loss: Tensor, scale: Tensor | None, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() if scale is None else loss.sum() * scale


def torch_cross_entropy(logits, target, weight, ignore_index, label_smoothing, z_loss, reduction, inplace):
    scale = inverse_count(target, weight, ignore_index, statistics_type(logits)) if reduction == "mean" else None
    weight = None if weight is None else weight.to(logits.dtype)
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": "none"}
    rows = logits.reshape(math.prod(target.shape), logits.shape[-1])  # beside classes of 0 no -1 is inferred
    loss = F.cross_entropy(rows, target.reshape(-1), weight, **options)
    return reduced(loss.reshape(target.shape).to(statistics_type(logits)), scale, reduction)  # torch's sums 16 bits


def _unfit_for_torch(logits, target, weight, ignore_index, label_smoothing, z_loss, reduction, inplace) -> str | None:
    return "it has no z-loss" if z_loss else None


CROSS_ENTROPY = Operator(
    "cross_entropy",
    on_kernels(_on, cross_entropy_fwd, cross_entropy_inplace_fwd, cross_entropy_bwd)
    | {
        "torch": Implementation(torch_cross_entropy, _unfit_for_torch, fused=False),
        "reference": Implementation(lambda *args: reference.cross_entropy(*args[:-1]), fused=False),
    },
)
