"""The position-wise feed-forward network of a Transformer layer (Vaswani et al., 2017, section 3.3)."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import Module


def feed_forward(
    x: Tensor, linear1: Module, activation: Callable[[Tensor], Tensor], dropout: Module, linear2: Module
) -> Tensor:
    """linear2(dropout(activation(linear1(x)))) of x (..., d_model)."""
    return linear2(dropout(activation(linear1(x))))
