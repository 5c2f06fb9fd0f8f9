"""Loads the compiled library, if it is there; nothing is compiled and no CUDA call is made."""

import importlib.util
import os
import warnings
from pathlib import Path

import torch

PATH = Path(__file__).parent / "libpyllm_cpu.so"


def _load() -> str | None:
    """Registers the operators of the compiled library; returns why that failed, or None."""
    if not PATH.exists():
        return f"the compiled library {PATH.name} is not installed (it is built where a C++ compiler is found)"
    try:
        torch.ops.load_library(str(PATH))
    except OSError as problem:
        return f"the compiled library does not load: {problem}"
    return None


error = _load()
if error is not None:
    # pip hides what a build prints, so this is where a user learns of it.
    warnings.warn(f"pyllm runs without its compiled kernels: {error}", RuntimeWarning, stacklevel=2)
_triton_installed = importlib.util.find_spec("triton") is not None
_triton_interpreted = os.environ.get("TRITON_INTERPRET") == "1"


def triton_error(device: str) -> str | None:
    """Why Triton kernels cannot run on this device type, or None if they can."""
    if not _triton_installed:
        return "Triton is not installed"
    if device == "cpu" and not _triton_interpreted:
        return "Triton runs CPU tensors only in its interpreter: set TRITON_INTERPRET=1 before importing pyllm"
    if device not in ("cpu", "cuda"):
        return f"there are no Triton kernels for {device}"
    return None
