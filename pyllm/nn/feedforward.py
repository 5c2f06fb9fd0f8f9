"""The position-wise feed-forward network of a Transformer layer (Vaswani et al., 2017, section 3.3)."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Linear, Module

from pyllm import reference
from pyllm.backend import select
from pyllm.derivatives import beyond_kernels, vjp
from pyllm.nn.dropout import DROPOUT, Dropout, dropped
from pyllm.nn.memory import Source, by_hand, flat, in_one_precision, kept, matrix, no_view, restored
from pyllm.nn.plain import LINEAR, is_plain
from pyllm.nn.tracing import leaf
from pyllm.ops._autocast import in_given_precision
from pyllm.ops._registration import draw_rng
from pyllm.ops.activation import ACTIVATION
from pyllm.reference import GATED

KINDS = ("relu", "gelu", "gelu_tanh", "silu", *GATED)
_FUNCTIONS = ((F.relu, "relu"), (torch.relu, "relu"), (F.gelu, "gelu"), (F.silu, "silu"))
_APPROXIMATE = {"none": "gelu", "tanh": "gelu_tanh"}
_MODULES = {torch.nn.ReLU: "relu", torch.nn.GELU: "gelu", torch.nn.SiLU: "silu"}


def kind_of(activation: Callable[[Tensor], Tensor] | str) -> str | None:
    """The kind, as `pyllm.ops.activation` has it, of one of torch's functions or modules; None for another callable."""
    if isinstance(activation, str):
        return activation
    if type(activation) is partial and activation.func is F.gelu and activation.keywords.keys() == {"approximate"}:
        return None if activation.args else _APPROXIMATE.get(activation.keywords["approximate"])
    if not isinstance(activation, Module):  # and perhaps without a hash
        return next((kind for function, kind in _FUNCTIONS if function is activation), None)
    kind = _MODULES.get(type(activation)) if is_plain(activation, type(activation)) else None
    return "gelu_tanh" if kind == "gelu" and activation.approximate == "tanh" else kind


def activate(x: Tensor, bias: Tensor | None, dropout_p: float, kind: str) -> Tensor:
    """dropout(activation(x + bias)), of packed gates where the kind is gated."""
    args = (x, None, bias, draw_rng(x, dropout_p), dropout_p, kind)
    return select(ACTIVATION, *args)(*args)


def fuses(linear1: Module, activation: Callable[[Tensor], Tensor] | str, dropout: Module, linear2: Module) -> bool:
    """Whether `feed_forward` calls none of the modules."""
    plain = is_plain(linear1, *LINEAR) and is_plain(linear2, *LINEAR) and is_plain(dropout, *DROPOUT)
    return plain and kind_of(activation) is not None


def feed_forward(
    x: Tensor,
    source: Source | None,
    linear1: Module,
    activation: Callable[[Tensor], Tensor] | str,
    dropout: Module,
    linear2: Module,
    save: str,
) -> tuple[Tensor, Tensor | None]:
    """linear2(dropout(activation(linear1(x)))) of x (..., d_model), as a tensor and a bias that is yet to be added.

    Modules that the user has put in place, or that carry hooks, are called; otherwise bias, activation and dropout are
    one kernel, and `save` says what is kept for the backward.
    """
    kind = kind_of(activation)
    if not fuses(linear1, activation, dropout, linear2):
        hidden = linear1(x)
        active = activation(hidden) if callable(activation) else activate(hidden, None, 0.0, kind)
        return linear2(dropped(active, dropout)), None
    dropout_p = dropout.p if dropout.training else 0.0
    if not by_hand(x, linear1.weight, linear1.bias, linear2.weight):
        hidden = activate(F.linear(x, linear1.weight), linear1.bias, dropout_p, kind)
        return F.linear(hidden, linear2.weight), linear2.bias
    x, source, (weight1, weight2) = in_one_precision(x, source, linear1.weight, linear2.weight)
    options = (draw_rng(x, dropout_p), dropout_p, kind, save)
    return _FeedForward.apply(x, weight1, linear1.bias, weight2, *options, *flat(source)), linear2.bias


class _FeedForward(torch.autograd.Function):
    """activation(x weight1^T + bias1) weight2^T, with dropout in between."""

    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, rng, dropout_p, kind, save, *source):
        options = (rng, dropout_p, kind)
        hidden = matrix(x) @ weight1.mT
        with torch.enable_grad():  # the choice of a call that has a backward
            ctx.value = select(ACTIVATION, hidden, None, bias1, *options, part="value")
            ctx.gradient = select(ACTIVATION, hidden, None, bias1, *options, part="gradient", record=False)
        active = ctx.value(hidden, None, bias1, *options)
        ctx.options = (dropout_p, kind)
        ctx.save_for_backward(
            weight1,
            bias1,
            weight2,
            rng,
            hidden if save != "recompute" else None,
            active if save == "all" else None,
            *kept(ctx, x, source),
        )
        return no_view(active @ weight2.mT, (*x.shape[:-1], weight2.shape[0]))

    @staticmethod
    @in_given_precision
    def backward(ctx, dout):
        weight1, bias1, weight2, rng, hidden, active, *saved = ctx.saved_tensors
        wants_x, wants_weight1, wants_bias1, wants_weight2, *rest = ctx.needs_input_grad
        again = beyond_kernels(dout)
        x = restored(ctx, saved) if hidden is None or wants_weight1 or again else None
        if again:
            operands = (x, weight1, bias1, weight2)
            composed = partial(_composed, rng, *ctx.options)
            dx, *others = vjp(composed, operands, ctx.needs_input_grad[:4], [matrix(dout)])
            return dx if dx is None else dx.view(*dout.shape[:-1], dx.shape[-1]), *others, *(None for _ in rest)
        if hidden is None:
            hidden = x @ weight1.mT
        rows = matrix(dout)
        dweight2 = None
        if wants_weight2:
            if active is None:
                active = ctx.value(hidden, None, bias1, rng, *ctx.options)
            dweight2 = rows.mT @ active
        active = None
        dhidden, _, dbias1 = ctx.gradient(rows @ weight2, hidden, None, bias1, rng, *ctx.options)
        hidden = None
        dweight1 = dhidden.mT @ x if wants_weight1 else None
        dx = (dhidden @ weight1).view(*dout.shape[:-1], weight1.shape[1]) if wants_x else None
        return dx, dweight1, dbias1 if wants_bias1 else None, dweight2, *(None for _ in rest)


def _composed(rng, dropout_p, kind, x, weight1, bias1, weight2) -> Tensor:
    """The same of matrices, in PyTorch's operators."""
    return reference.activation(x @ weight1.mT, None, bias1, rng, dropout_p, kind) @ weight2.mT


@leaf
class FeedForward(Module):
    """`feed_forward` with its own modules, plain or gated.

    activation: "relu", "gelu", "gelu_tanh", "silu" or a callable; or gated, activation(x gate) * (x up), "reglu",
    "geglu", "geglu_tanh" or "swiglu" (Shazeer, 2020): then the first half of linear1's rows is the gate.
    Raises ValueError for another name.
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        dropout: float = 0.0,
        bias: bool = True,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if not (callable(activation) or activation in KINDS):
            raise ValueError(f"activation must be a callable or one of {', '.join(KINDS)}, got {activation!r}")
        self.activation = activation
        factory = {"bias": bias, "device": device, "dtype": dtype}
        self.linear1 = Linear(d_model, dim_feedforward * (2 if activation in GATED else 1), **factory)
        self.linear2 = Linear(dim_feedforward, d_model, **factory)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_model); the same shape."""
        out, bias = self.branch(x, None, "all")
        return out if bias is None else out + bias

    def branch(self, x: Tensor, source: Source | None, save: str) -> tuple[Tensor, Tensor | None]:
        """`feed_forward` of these modules."""
        return feed_forward(x, source, self.linear1, self.activation, self.dropout, self.linear2, save)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
