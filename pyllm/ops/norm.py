"""layer_norm, rms_norm, and the same with bias, dropout and residual addition fused in front."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload

from pyllm import reference
from pyllm.backend import Implementation, Operator, select
from pyllm.derivatives import beyond_kernels, vjp
from pyllm.ops import _checks
from pyllm.ops._autocast import full_precision
from pyllm.ops._registration import apply, draw_rng, gradient_of, if_given, kernel, needs_grad, no_dropout, on_kernels
from pyllm.reference import statistics_type


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Layer normalisation of the last dimension (Ba et al., 2016): (x - mean) / sqrt(var + eps) * weight + bias.

    x: (..., N), float32, float64, bfloat16 or float16; weight and bias: (N,), x's dtype or float32. Returns x's shape
    and dtype; statistics are float32 (float64 for float64). Raises TypeError, ValueError or RuntimeError for a dtype,
    a shape or a device that does not fit.
    """
    x, weight, bias = full_precision(x, weight, bias)
    eps = _check_row("layer_norm", x, weight, bias, eps)
    return select(LAYER_NORM, x, weight, bias, eps)(x, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, 2019).

    Shapes, dtypes and errors as in `layer_norm`. eps=None is, as in torch, the machine epsilon of the
    statistics' dtype.
    """
    x, weight = full_precision(x, weight)
    eps = _check_row("rms_norm", x, weight, None, eps)
    if eps is None:
        eps = default_eps(x.dtype)
    return select(RMS_NORM, x, weight, None, eps)(x, weight, None, eps)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """z = residual + dropout(x + x_bias); returns (layer_norm(z), z), in one pass over the memory.

    x and residual: (..., N) of one shape; both of one dtype, or x of 16 bits and residual float32 (then both results
    are float32). weight and bias as in `layer_norm`. dropout_p in [0, 1] is applied whenever it is not 0. x_bias: (N,),
    x's dtype or float32, such as the bias of the projection that made x; its gradient is summed in the same pass.
    """
    eps = _check_add("add_layer_norm", x, residual, weight, bias, eps, dropout_p, x_bias)
    args = (x, residual, weight, bias, x_bias, draw_rng(x, dropout_p), dropout_p, eps)
    return select(ADD_LAYER_NORM, *args)(*args)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0.0,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """z = residual + dropout(x + x_bias); returns (rms_norm(z), z). Arguments as in `add_layer_norm` and `rms_norm`."""
    eps = _check_add("add_rms_norm", x, residual, weight, None, eps, dropout_p, x_bias)
    if eps is None:
        eps = default_eps(residual.dtype)
    args = (x, residual, weight, None, x_bias, draw_rng(x, dropout_p), dropout_p, eps)
    return select(ADD_RMS_NORM, *args)(*args)


def default_eps(dtype: torch.dtype) -> float:
    """What eps=None stands for in rms_norm, as in torch."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def _check_row(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None) -> float | None:
    """eps as a number."""
    _checks.rows(op, "x", x)
    if weight is not None:
        _checks.parameter(op, "weight", weight, "x", x)
    if bias is not None:
        _checks.parameter(op, "bias", bias, "x", x)
    return eps if type(eps) is float else _checks.number(op, "eps", eps)


def _check_add(op, x, residual, weight, bias, eps, dropout_p, x_bias) -> float | None:
    """eps as a number."""
    _checks.residual(op, residual, x)
    eps = _check_row(op, residual, weight, bias, eps)
    if x_bias is not None:
        _checks.parameter(op, "x_bias", x_bias, "x", x)
    _checks.probability(op, "dropout_p", dropout_p)
    return eps


# --- operators as PyTorch's dispatcher knows them: fake implementations, whose annotations are the schemas ---


def _statistic(x: Tensor) -> Tensor:
    """(M,) for the M rows of x."""
    return x.new_empty(math.prod(x.shape[:-1]), dtype=statistics_type(x))  # Size.numel() would fix dynamic shapes


def _branch_gradient(z: Tensor, dropout_p: float, x_dtype: torch.dtype) -> Tensor:
    """dx, or (0,) where it is dresidual itself."""
    return z.new_empty(0 if dropout_p == 0.0 and x_dtype == z.dtype else z.shape, dtype=x_dtype)


@kernel("norm")
def layer_norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:  # y, mean, rstd
    return x.new_empty(x.shape), _statistic(x), _statistic(x)


@kernel("norm")
def layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # dx, dweight, dbias
    return x.new_empty(x.shape), gradient_of(x, weight), gradient_of(x, bias)


@kernel("norm")
def rms_norm_fwd(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:  # y, rstd
    return x.new_empty(x.shape), _statistic(x)


@kernel("norm")
def rms_norm_bwd(dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:  # dx, dweight
    return x.new_empty(x.shape), gradient_of(x, weight)


@kernel("norm")
def add_layer_norm_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    x_bias: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # y, z, mean, rstd
    z = residual.new_empty(x.shape)
    return torch.empty_like(z), z, _statistic(z), _statistic(z)


@kernel("norm")
def add_layer_norm_bwd(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    x_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rng: Tensor | None,
    dropout_p: float,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # dx, dresidual, dweight, dbias, dx_bias
    dx = _branch_gradient(z, dropout_p, x_dtype)
    return dx, z.new_empty(z.shape), gradient_of(z, weight), gradient_of(z, bias), gradient_of(z, x_bias)


@kernel("norm")
def add_rms_norm_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    x_bias: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # y, z, rstd
    z = residual.new_empty(x.shape)
    return torch.empty_like(z), z, _statistic(z)


@kernel("norm")
def add_rms_norm_bwd(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    x_bias: Tensor | None,
    rstd: Tensor,
    rng: Tensor | None,
    dropout_p: float,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # dx, dresidual, dweight, dx_bias
    dx = _branch_gradient(z, dropout_p, x_dtype)
    return dx, z.new_empty(z.shape), gradient_of(z, weight), gradient_of(z, x_bias)


# --- autograd, one class per backend for both norms, over the forward and the backward in LayerNorm's form ---


def _norm(value: Callable, gradient: Callable, composed: Callable) -> Implementation:
    """composed: value in PyTorch's operators, with the same arguments."""

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias, eps):
            y, mean, rstd = value(x, weight, bias, eps)
            ctx.save_for_backward(x, weight, bias, mean, rstd)
            ctx.eps = eps
            return y

        @staticmethod
        def backward(ctx, dy):
            if beyond_kernels(dy):
                return *vjp(partial(composed, eps=ctx.eps), ctx.saved_tensors[:3], ctx.needs_input_grad[:3], [dy]), None
            return *gradient(dy, *ctx.saved_tensors), None

    def run(x, weight, bias, eps):
        if needs_grad(x, weight, bias):
            return apply(Norm, x, weight, bias, eps)
        return value(x, weight, bias, eps)[0]

    return Implementation(run)


def _layer_norm_on(fwd: OpOverload, bwd: OpOverload) -> Implementation:
    def gradient(dy, x, weight, bias, mean, rstd):
        dx, dweight, dbias = bwd(dy, x, weight, bias, mean, rstd)
        return dx, if_given(weight, dweight), if_given(bias, dbias)

    return _norm(fwd, gradient, reference.layer_norm)


def _rms_norm_on(fwd: OpOverload, bwd: OpOverload) -> Implementation:
    def value(x, weight, bias, eps):
        y, rstd = fwd(x, weight, eps)
        return y, None, rstd

    def gradient(dy, x, weight, bias, mean, rstd):
        dx, dweight = bwd(dy, x, weight, rstd)
        return dx, if_given(weight, dweight), None

    return _norm(value, gradient, _reference_rms_norm)


def _add_norm(value: Callable, gradient: Callable, composed: Callable) -> Implementation:
    """composed: the norm alone, in PyTorch's operators."""

    class AddNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, residual, weight, bias, x_bias, rng, dropout_p, eps):
            y, z, mean, rstd = value(x, residual, weight, bias, x_bias, rng, dropout_p, eps)
            ctx.save_for_backward(z, weight, bias, x_bias, mean, rstd, rng)
            ctx.dropout, ctx.eps = (dropout_p, x.dtype), eps
            ctx.set_materialize_grads(False)
            return y, z

        @staticmethod
        def backward(ctx, dy, dz):
            z, *_ = saved = ctx.saved_tensors
            dy = torch.zeros_like(z) if dy is None else dy
            if beyond_kernels(dy, dz):
                return *again(ctx, saved, dy, dz), None, None, None
            return *gradient(dy, dz, *saved, *ctx.dropout), None, None, None

    def again(ctx, saved, dy, dz):
        z, weight, bias, x_bias, *_, rng = saved
        dropout_p, x_dtype = ctx.dropout
        _, _, *parameters = ctx.needs_input_grad[:4]
        of_norm = vjp(partial(composed, eps=ctx.eps), (z, weight, bias), (True, *parameters), [dy])
        dresidual = of_norm[0] if dz is None else of_norm[0] + dz
        dx = reference.dropout(dresidual, rng, dropout_p)
        dx_bias = None if x_bias is None else dx.sum_to_size(x_bias.shape).to(x_bias.dtype)
        return dx.to(x_dtype), dresidual, *of_norm[1:], dx_bias

    def run(x, residual, weight, bias, x_bias, rng, dropout_p, eps):
        if needs_grad(x, residual, weight, bias, x_bias):
            return apply(AddNorm, x, residual, weight, bias, x_bias, rng, dropout_p, eps)
        return value(x, residual, weight, bias, x_bias, rng, dropout_p, eps)[:2]

    return Implementation(run)


def _add_layer_norm_on(fwd: OpOverload, bwd: OpOverload) -> Implementation:
    def gradient(dy, dz, z, weight, bias, x_bias, mean, rstd, rng, dropout_p, x_dtype):
        dx, dresidual, dweight, dbias, dx_bias = bwd(
            dy, dz, z, weight, bias, x_bias, mean, rstd, rng, dropout_p, x_dtype
        )
        dx = dx if dx.shape == z.shape else dresidual
        return dx, dresidual, if_given(weight, dweight), if_given(bias, dbias), if_given(x_bias, dx_bias)

    return _add_norm(fwd, gradient, reference.layer_norm)


def _add_rms_norm_on(fwd: OpOverload, bwd: OpOverload) -> Implementation:
    def value(x, residual, weight, bias, x_bias, rng, dropout_p, eps):
        y, z, rstd = fwd(x, residual, weight, x_bias, rng, dropout_p, eps)
        return y, z, None, rstd

    def gradient(dy, dz, z, weight, bias, x_bias, mean, rstd, rng, dropout_p, x_dtype):
        dx, dresidual, dweight, dx_bias = bwd(dy, dz, z, weight, x_bias, rstd, rng, dropout_p, x_dtype)
        dx = dx if dx.shape == z.shape else dresidual
        return dx, dresidual, if_given(weight, dweight), None, if_given(x_bias, dx_bias)

    return _add_norm(value, gradient, _reference_rms_norm)


# --- the same of PyTorch's calls ---


def _torch_layer_norm(x, weight, bias, eps):
    if x.dtype != torch.float32 and (weight is not None or bias is not None):
        weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _torch_rms_norm(x, weight, bias, eps):
    return F.rms_norm(x, x.shape[-1:], weight if weight is None else weight.to(x.dtype), eps)


def _torch_add(norm: Callable) -> Callable:
    def add_norm(x, residual, weight, bias, x_bias, rng, dropout_p, eps):
        z = reference.dropout_add(x, residual, x_bias, rng, dropout_p)
        return norm(z, weight, bias, eps), z

    return add_norm


def _reference_rms_norm(x, weight, bias, eps):
    return reference.rms_norm(x, weight, eps)


def _reference_add_rms_norm(x, residual, weight, bias, *args):
    return reference.add_rms_norm(x, residual, weight, *args)


LAYER_NORM = Operator(
    "layer_norm",
    on_kernels(_layer_norm_on, layer_norm_fwd, layer_norm_bwd)
    | {
        "torch": Implementation(_torch_layer_norm),
        "reference": Implementation(reference.layer_norm, fused=False),
    },
)
RMS_NORM = Operator(
    "rms_norm",
    on_kernels(_rms_norm_on, rms_norm_fwd, rms_norm_bwd)
    | {
        "torch": Implementation(_torch_rms_norm, fused=False),
        "reference": Implementation(_reference_rms_norm, fused=False),
    },
)
ADD_LAYER_NORM = Operator(
    "add_layer_norm",
    on_kernels(_add_layer_norm_on, add_layer_norm_fwd, add_layer_norm_bwd)
    | {
        "torch": Implementation(_torch_add(_torch_layer_norm), no_dropout(-2), fused=False),
        "reference": Implementation(reference.add_layer_norm, fused=False),
    },
)
ADD_RMS_NORM = Operator(
    "add_rms_norm",
    on_kernels(_add_rms_norm_on, add_rms_norm_fwd, add_rms_norm_bwd)
    | {
        "torch": Implementation(_torch_add(_torch_rms_norm), no_dropout(-2), fused=False),
        "reference": Implementation(_reference_add_rms_norm, fused=False),
    },
)
