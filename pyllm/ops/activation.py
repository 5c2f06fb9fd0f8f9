"""gelu, relu, silu and the gated swiglu, geglu, reglu, each with bias and dropout fused in.

One pair of operators serves all, told apart by `kind`: "relu", "gelu", "gelu_tanh", "silu", or gated "reglu", "geglu",
"geglu_tanh", "swiglu". Only the input is kept for the backward, which computes the activation anew.
"""

from functools import partial

import torch
from torch import Tensor
from torch._ops import OpOverload

from pyllm import reference
from pyllm.backend import Implementation, Operator, select
from pyllm.derivatives import beyond_kernels, vjp
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
from pyllm.reference import GATED

aten = torch.ops.aten


def gelu(x: Tensor, bias: Tensor | None = None, *, approximate: str = "none", dropout_p: float = 0.0) -> Tensor:
    """dropout(gelu(x + bias)) with gelu(h) = h Phi(h), Phi the normal distribution (Hendrycks and Gimpel, 2016).

    x: (..., N), float32, float64, bfloat16 or float16, its rows anywhere; bias: (N,), x's dtype or float32.
    approximate="tanh": h (1 + tanh(sqrt(2 / pi) (h + 0.044715 h^3))) / 2. dropout_p in [0, 1] is applied whenever it is
    not 0. Returns x's shape and dtype. Raises TypeError, ValueError or RuntimeError for what does not fit.
    """
    return _plain("gelu", _variant("gelu", "gelu", approximate), x, bias, dropout_p)


def relu(x: Tensor, bias: Tensor | None = None, *, dropout_p: float = 0.0) -> Tensor:
    """dropout(max(x + bias, 0)). Arguments as in `gelu`."""
    return _plain("relu", "relu", x, bias, dropout_p)


def silu(x: Tensor, bias: Tensor | None = None, *, dropout_p: float = 0.0) -> Tensor:
    """dropout(h / (1 + exp(-h))) with h = x + bias. Arguments as in `gelu`."""
    return _plain("silu", "silu", x, bias, dropout_p)


def swiglu(gate: Tensor, up: Tensor | None = None, bias: Tensor | None = None, *, dropout_p: float = 0.0) -> Tensor:
    """dropout(silu(gate) * up) (Shazeer, 2020).

    gate and up: (..., N) of one shape and dtype, such as halves of one matrix, read where they are; or up=None and
    gate (..., 2N) packed: the first half of its columns is the gate, the second half is multiplied by it, and a bias
    (2N,), of gate's dtype or float32, is added to it first. The packed form is the one to train with: its gradient
    is written packed, not put together from two. Returns (..., N) in gate's dtype. dropout_p and errors as in `gelu`.
    """
    return _gated("swiglu", "swiglu", gate, up, bias, dropout_p)


def geglu(
    gate: Tensor,
    up: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    approximate: str = "none",
    dropout_p: float = 0.0,
) -> Tensor:
    """dropout(gelu(gate) * up), approximate as in `gelu`, the other arguments as in `swiglu`."""
    return _gated("geglu", _variant("geglu", "geglu", approximate), gate, up, bias, dropout_p)


def reglu(gate: Tensor, up: Tensor | None = None, bias: Tensor | None = None, *, dropout_p: float = 0.0) -> Tensor:
    """dropout(relu(gate) * up). Arguments as in `swiglu`."""
    return _gated("reglu", "reglu", gate, up, bias, dropout_p)


def _variant(op: str, kind: str, approximate: str) -> str:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{op}: approximate must be 'none' or 'tanh', got {approximate!r}")
    return kind if approximate == "none" else f"{kind}_tanh"


def _plain(op: str, kind: str, x: Tensor, bias: Tensor | None, dropout_p: float) -> Tensor:
    _checks.rows(op, "x", x)
    return _activated(op, kind, "x", x, None, bias, "(N,)", dropout_p)


def _gated(op: str, kind: str, gate: Tensor, up: Tensor | None, bias: Tensor | None, dropout_p: float) -> Tensor:
    _checks.rows(op, "gate", gate)
    if up is not None:
        _checks.like(op, "up", up, "gate", gate)
        _checks.shape(op, "up", up, gate.shape, "gate's")
        if bias is not None:
            raise ValueError(f"{op}: bias goes with a packed gate (..., 2N), not with up")
    elif gate.shape[-1] % 2:
        raise ValueError(f"{op}: a packed gate must have an even width, got {tuple(gate.shape)}")
    return _activated(op, kind, "gate", gate, up, bias, "(2N,)", dropout_p)


def _activated(op, kind, name, x, up, bias, bias_meaning, dropout_p) -> Tensor:
    if bias is not None:
        _checks.parameter(op, "bias", bias, name, x, bias_meaning)
    _checks.probability(op, "dropout_p", dropout_p)
    args = (x, up, bias, draw_rng(x, dropout_p), dropout_p, kind)
    return select(ACTIVATION, *args)(*args)


# --- operators as PyTorch's dispatcher knows them ---


@kernel("activation")
def activation_fwd(
    x: Tensor, up: Tensor | None, bias: Tensor | None, rng: Tensor | None, dropout_p: float, kind: str
) -> Tensor:
    packed = kind in GATED and up is None
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2) if packed else x.shape)


@kernel("activation")
def activation_bwd(
    dy: Tensor, x: Tensor, up: Tensor | None, bias: Tensor | None, rng: Tensor | None, dropout_p: float, kind: str
) -> tuple[Tensor, Tensor, Tensor]:  # dx, dup, dbias
    return x.new_empty(x.shape), gradient_of(x, up), gradient_of(x, bias)


# --- autograd, and the tables of implementations ---


def _on(fwd: OpOverload, bwd: OpOverload) -> Implementation:
    def gradient(dy, x, up, bias, rng, dropout_p, kind):
        dx, dup, dbias = bwd(dy, x, up, bias, rng, dropout_p, kind)
        return dx, if_given(up, dup), if_given(bias, dbias)

    class Activation(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, up, bias, rng, dropout_p, kind):
            ctx.save_for_backward(x, up, bias, rng)
            ctx.options = (dropout_p, kind)
            return fwd(x, up, bias, rng, dropout_p, kind)

        @staticmethod
        def backward(ctx, dy):
            if beyond_kernels(dy):
                *inputs, rng = ctx.saved_tensors
                composed = partial(reference.activation, rng=rng, dropout_p=ctx.options[0], kind=ctx.options[1])
                return *vjp(composed, inputs, ctx.needs_input_grad[:3], [dy]), None, None, None
            return *gradient(dy, *ctx.saved_tensors, *ctx.options), None, None, None

    def run(x, up, bias, rng, dropout_p, kind):
        if needs_grad(x, up, bias):
            return apply(Activation, x, up, bias, rng, dropout_p, kind)
        return fwd(x, up, bias, rng, dropout_p, kind)

    return Implementation(run, value=fwd, gradient=gradient)


def _plain_call(x, up, bias, rng, dropout_p, kind) -> bool:
    return bias is None and kind not in GATED


# Gradient g and input h of an activation -> gradient of h.
_SLOPES = {
    "relu": lambda g, h: aten.threshold_backward(g, h, 0),
    "gelu": lambda g, h: aten.gelu_backward(g, h),
    "gelu_tanh": lambda g, h: aten.gelu_backward(g, h, approximate="tanh"),
    "silu": lambda g, h: aten.silu_backward(g, h),
}


def _composed_gradient(dy, x, up, bias, rng, dropout_p, kind):
    """activation_bwd of PyTorch's own kernels: no call of autograd, which a trace could not follow."""
    h = x if bias is None else x + bias
    g = reference.dropout(dy, rng, dropout_p).to(h.dtype)
    dup = None
    if kind not in GATED:
        dx = _SLOPES[kind](g, h)
    else:
        gate, factor = h.chunk(2, -1) if up is None else (h, up)
        act = GATED[kind]
        dx = _SLOPES[act](g * factor, gate)
        dup = g * reference.activation(gate, None, None, None, 0.0, act)
        if up is None:
            dx, dup = torch.cat([dx, dup], -1), None
    dbias = None if bias is None else dx.sum_to_size(bias.shape).to(bias.dtype)
    return dx.to(x.dtype), dup, dbias


_COMPOSED = {"value": reference.activation, "gradient": _composed_gradient}

ACTIVATION = Operator(
    "activation",
    on_kernels(_on, activation_fwd, activation_bwd)
    | {
        "torch": Implementation(reference.activation, no_dropout(-2), _plain_call, **_COMPOSED),
        "reference": Implementation(reference.activation, fused=False, **_COMPOSED),
    },
)
