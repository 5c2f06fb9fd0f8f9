"""The position-wise feed-forward network of a Transformer layer (Vaswani et al., 2017, section 3.3)."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Linear, Module

_gelu_tanh = functools.partial(F.gelu, approximate="tanh")
_PLAIN = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": _gelu_tanh, "silu": F.silu}
_GATES = {"reglu": F.relu, "geglu": F.gelu, "geglu_tanh": _gelu_tanh, "swiglu": F.silu}


def feed_forward(
    x: Tensor, linear1: Module, activation: Callable[[Tensor], Tensor], dropout: Module, linear2: Module
) -> Tensor:
    """linear2(dropout(activation(linear1(x)))) of x (..., d_model)."""
    return linear2(dropout(activation(linear1(x))))


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
        name = self.activation_name = activation if isinstance(activation, str) else None
        gate = _GATES.get(name)
        if gate is not None:
            self.activation = functools.partial(_gated, gate)
        elif name in _PLAIN:
            self.activation = _PLAIN[name]
        elif callable(activation):
            self.activation = activation
        else:
            names = ", ".join([*_PLAIN, *_GATES])
            raise ValueError(f"activation must be a callable or one of {names}, got {activation!r}")
        factory = {"bias": bias, "device": device, "dtype": dtype}
        self.linear1 = Linear(d_model, dim_feedforward * (2 if gate else 1), **factory)
        self.linear2 = Linear(dim_feedforward, d_model, **factory)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_model); the same shape."""
        return feed_forward(x, self.linear1, self.activation, self.dropout, self.linear2)

    def extra_repr(self) -> str:
        return f"activation={self.activation_name or self.activation}"


def _gated(activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return activation(gate) * up
