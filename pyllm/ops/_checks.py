"""Argument checks of the operators, written once. They name the operator, the argument and what was expected."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from pyllm.derivatives import transformed

_TRACING_MODES = tuple(getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL"))
FLOATING = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


def floating(op: str, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")


def like(op: str, name: str, tensor: Tensor, first: str, other: Tensor) -> None:
    """The tensor has the device and the dtype of another argument, which was checked."""
    if not isinstance(tensor, Tensor) or tensor.dtype != other.dtype:
        floating(op, name, tensor)
    same_device(op, name, tensor, first, other)
    if tensor.dtype != other.dtype:
        raise TypeError(f"{op}: {name} must have the dtype of {first}, {other.dtype}, got {tensor.dtype}")


def same_device(op: str, name: str, tensor: Tensor, first: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise RuntimeError(f"{op}: {name} must be on the device of {first}, {other.device}, got {tensor.device}")


def shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tensor.shape != expected:
        raise ValueError(f"{op}: {name} must have shape {meaning} = {tuple(expected)}, got {tuple(tensor.shape)}")


def rows(op: str, name: str, tensor: Tensor) -> None:
    """The tensor is one that a row operator takes: (..., N)."""
    floating(op, name, tensor)
    if tensor.dim() == 0:
        raise ValueError(f"{op}: {name} must have at least one dimension")


def parameter(op: str, name: str, tensor: Tensor, first: str, x: Tensor, meaning: str = "(N,)") -> None:
    """The tensor has an element for each column of x, which was checked, in x's dtype or float32."""
    dtype = tensor.dtype if isinstance(tensor, Tensor) else None
    fits = dtype == x.dtype or dtype == torch.float32
    if not fits:
        floating(op, name, tensor)
    if tensor.device != x.device:
        same_device(op, name, tensor, first, x)
    if not fits:
        raise TypeError(f"{op}: {name} must be {x.dtype}, as {first}, or float32, got {dtype}")
    if tensor.dim() != 1 or tensor.shape[0] != x.shape[-1]:
        shape(op, name, tensor, x.shape[-1:], meaning)


def residual(op: str, tensor: Tensor, x: Tensor) -> None:
    """x can be added to the tensor: one shape and dtype, or x of 16 bits and the tensor float32."""
    floating(op, "residual", tensor)
    rows(op, "x", x)
    same_device(op, "residual", tensor, "x", x)
    shape(op, "residual", tensor, x.shape, "x's")
    if tensor.dtype != x.dtype and (tensor.dtype != torch.float32 or x.dtype == torch.float64):
        raise TypeError(f"{op}: residual must be {x.dtype}, as x, or float32 beside 16 bits, got {tensor.dtype}")


def probability(op: str, name: str, p: float) -> None:
    if not isinstance(p, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(p).__name__}")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{op}: {name} must be in [0, 1], got {p}")


def is_one_or(size: int, other: int) -> bool:
    """Whether a size broadcasts to the other. Not by `in`, which is False where a trace knows one as a symbol."""
    return size == 1 or size == other


def number(op: str, name: str, value: float | Tensor | None) -> float | None:
    """The value; that of a tensor only where no derivative of it would be lost."""
    if not isinstance(value, Tensor):
        return value
    if value.requires_grad or transformed():
        raise TypeError(f"{op}: {name} must be a number, got a Tensor, whose derivative would be lost")
    return value.item()


def broadcasts(op: str, name: str, tensor: Tensor, target: Sequence[int], meaning: str) -> None:
    sizes = tensor.shape
    fits = len(sizes) <= len(target) and all(
        is_one_or(s, t) for s, t in zip(reversed(sizes), reversed(target), strict=False)
    )
    if not fits:
        raise ValueError(f"{op}: {name} must broadcast to {meaning} = {tuple(target)}, got {tuple(sizes)}")


def attention_mask(op: str, mask: Tensor, other: Tensor, first: str) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: attn_mask must be a Tensor, got {type(mask).__name__}")
    same_device(op, "attn_mask", mask, first, other)
    if mask.dtype not in (torch.bool, torch.float32, other.dtype):
        raise TypeError(f"{op}: attn_mask must be bool, float32 or {other.dtype}, as {first}, got {mask.dtype}")


def can_look(tensor: Tensor) -> bool:
    """Whether a check may read the tensor's values: on the CPU, elsewhere only with PYLLM_DEBUG=1; never in a trace,
    under a transform, or of a subclass that does operators by itself."""
    if torch.compiler.is_compiling() or transformed():
        return False
    if type(tensor) is not Tensor and type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return False
    if torch._C._len_torch_dispatch_stack() and any(map(torch._C._get_dispatch_mode, _TRACING_MODES)):
        return False
    return tensor.is_cpu or (not tensor.is_meta and os.environ.get("PYLLM_DEBUG") == "1")


def is_expanded(tensor: Tensor) -> bool:
    """Whether elements of the tensor share their memory."""
    strides = tensor.stride()
    return 0 in strides and any(n > 1 for n, stride in zip(tensor.shape, strides, strict=True) if stride == 0)


def short(values: Sequence) -> str:
    """A list for an error message."""
    return str(values) if len(values) <= 16 else f"[{', '.join(map(str, values[:8]))}, ... {values[-1]}]"
