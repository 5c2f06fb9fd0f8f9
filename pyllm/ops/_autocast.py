"""What torch.autocast does to the operators: the same as to torch's own of these names, on each device type."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from pyllm.reference import without_autocast

_SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def full_precision(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """For operators that torch runs in float32 under CUDA autocast; CPU autocast leaves them as they come."""
    first = tensors[0]
    if isinstance(first, Tensor) and first.is_cuda and torch.is_autocast_enabled("cuda"):
        return tuple(t.float() if t is not None and t.dtype in _SIXTEEN_BITS else t for t in tensors)
    return tensors


def lower_precision(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """For operators that torch runs in the autocast dtype: floating tensors but float64 are cast, others untouched."""
    first = tensors[0]
    if not isinstance(first, Tensor) or first.is_meta or not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    castable = (torch.float32, *_SIXTEEN_BITS)
    return tuple(t.to(dtype) if t is not None and t.dtype in castable else t for t in tensors)


def widened(added: Tensor | None, other: Tensor) -> Tensor | None:
    """In float32 what is of the 16-bit type that autocast did not cast the other tensor to."""
    if not isinstance(added, Tensor) or added.dtype == other.dtype or added.dtype not in _SIXTEEN_BITS:
        return added
    return added.float() if not other.is_meta and torch.is_autocast_enabled(other.device.type) else added


def in_given_precision(backward: Callable) -> Callable:
    """A backward with products of its own, in its tensors' dtypes also where autocast is on when it is called."""

    @functools.wraps(backward)
    def call(ctx, *cotangents):
        given = next(c for c in cotangents if c is not None)
        if given.is_meta or not torch.is_autocast_enabled(given.device.type):
            return backward(ctx, *cotangents)
        with without_autocast(given):
            return backward(ctx, *cotangents)

    return call
