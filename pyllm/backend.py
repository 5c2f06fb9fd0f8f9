"""Chooses the implementation of each operator call. No other file knows which backends there are.

Order of precedence: `use_backend` (or PYLLM_BACKEND), then an operator's measured default, then PREFERENCE. A backend
asked for by name runs or raises; only the default choice may pass over an implementation, and `explain` says why.
"""

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyllm import _library

BACKENDS = ("native", "triton", "torch", "reference")

# What is tried first where nothing was measured.
PREFERENCE = {
    "cpu": ("native", "torch", "reference"),
    "cuda": ("native", "triton", "torch", "reference"),
}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Implementation:
    """One backend's implementation of an operator.

    run takes the operator's validated arguments; unfit takes the same and returns why it cannot serve them, or None.
    fused takes the same and returns whether one kernel does it, rather than a composition of several PyTorch calls; or
    it is the answer for every call. kernel names what runs, and takes the same to tell its tile sizes.
    """

    run: Callable
    unfit: Callable[..., str | None] | None = None
    fused: Callable[..., bool] | bool = True
    kernel: Callable[..., str] | str = ""


@dataclass(frozen=True)
class Choice:
    """One operator call as `explain` reports it. kernel: what runs, with its tile sizes where it has some."""

    op: str
    backend: str
    kernel: str
    reason: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    fused: bool


@dataclass
class Operator:
    """An operator's name and its implementations by backend.

    measured maps (device type, dtype) to (backend, source): the default that a measurement chose over PREFERENCE.
    """

    name: str
    implementations: dict[str, Implementation]
    measured: dict[tuple[str, torch.dtype], tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self):
        # Made here, not on first use: compiled graphs are guarded on what is in it.
        self.ranked = {(device, dtype): _rank(self, device, dtype) for device in PREFERENCE for dtype in _DTYPES}


_override: str | None = None
_recording: list[Choice] | None = None


def _check_name(name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
    return name


class use_backend:
    """Makes every operator run on `name`, or on the default choice again with None. A function and a context manager.

    The setting is the process's. Raises ValueError for an unknown name; a call that the backend cannot serve raises
    RuntimeError when it is made. The environment variable PYLLM_BACKEND sets the initial value.
    """

    def __init__(self, name: str | None):
        global _override
        self._before = _override
        _override = _check_name(name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        global _override
        _override = self._before


def unavailable(name: str, device: str) -> str | None:
    """Why backend `name` cannot run on tensors of this device type, or None if it can."""
    if name == "native":
        if _library.error is not None:
            return _library.error
        if device != "cpu":
            return f"the compiled library has no {device} kernels"
    elif name == "triton":
        return _library.triton_error(device)
    return None


def backends(device: str = "cpu") -> dict[str, str | None]:
    """Every backend, with None if it can run on this device type, else why it cannot."""
    return {name: unavailable(name, device) for name in BACKENDS}


def select(op: Operator, tensor: Tensor, *args) -> Callable:
    """The callable that serves op(tensor, *args). Raises RuntimeError if the backend asked for cannot."""
    device = "cpu" if tensor.is_cpu else "cuda" if tensor.is_cuda else tensor.device.type
    candidates = _candidates(op, device, tensor.dtype) if _override is None else [(_override, "asked for")]
    refusals = []
    for name, reason in candidates:
        why = unavailable(name, device)
        if why is None:
            implementation = op.implementations[name]
            if implementation.unfit is not None:
                why = implementation.unfit(tensor, *args)
        if why is None:
            if _recording is not None:
                _record(op, name, "; ".join([reason, *refusals]), tensor, *args)
            return implementation.run
        refusals.append(f"backend {name!r} cannot run {op.name}: {why}")
    raise RuntimeError("; ".join(refusals))


def _candidates(op: Operator, device: str, dtype: torch.dtype) -> list[tuple[str, str]]:
    """(backend, reason) in the order in which they are tried."""
    return op.ranked.get((device, dtype)) or _rank(op, device, dtype)


def _rank(op: Operator, device: str, dtype: torch.dtype) -> list[tuple[str, str]]:
    reason = "preferred on cpu" if device == "cpu" else "preferred, not measured on this device"
    ranked = [(name, reason) for name in PREFERENCE.get(device, ("torch", "reference"))]
    fastest = op.measured.get((device, dtype))
    return ranked if fastest is None else [fastest, *(r for r in ranked if r[0] != fastest[0])]


def _record(op: Operator, name: str, reason: str, tensor: Tensor, *args) -> None:
    implementation = op.implementations[name]
    fused, kernel = (
        told(tensor, *args) if callable(told) else told for told in (implementation.fused, implementation.kernel)
    )
    place = (tuple(tensor.shape), tensor.dtype, str(tensor.device))
    _recording.append(Choice(op.name, name, kernel, reason, *place, fused))


@contextmanager
def recording():
    """Collects the `Choice` of every operator call made inside."""
    global _recording
    before, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = before


_override = _check_name(os.environ.get("PYLLM_BACKEND") or None)
