"""Dropout within layers: torch.nn's module of this name with the mask of the fused kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pyllm import ops
from pyllm.nn.plain import is_plain
from pyllm.nn.tracing import drop_in
from pyllm.ops._checks import FLOATING


@drop_in
class Dropout(torch.nn.Dropout):
    """Takes the place of a layer's torch.nn.Dropout.

    It draws what the fused kernels draw, so that a layer computes the same where modules are called one by one, since
    hooks look at them.
    """

    def forward(self, input: Tensor) -> Tensor:
        return _dropped(input, self)


DROPOUT = (torch.nn.Dropout, Dropout)  # what a kernel may do instead


def dropped(x: Tensor, dropout: Module | None) -> Tensor:
    """dropout(x) where no kernel does it along with something else."""
    if dropout is None:
        return x
    return _dropped(x, dropout) if is_plain(dropout, *DROPOUT) else dropout(x)


def _dropped(x: Tensor, dropout: torch.nn.Dropout) -> Tensor:
    draws = dropout.training and dropout.p > 0.0
    wraps = is_traceable_wrapper_subclass(x)  # such as a DTensor, whose rules are of PyTorch's operators
    if not (draws and x.dtype in FLOATING and x.dim() > 0 and not x.is_nested and not wraps):
        return F.dropout(x, dropout.p, dropout.training, dropout.inplace)
    result = ops.dropout_add(x, torch.zeros_like(x), dropout_p=dropout.p)
    return x.copy_(result) if dropout.inplace else result
