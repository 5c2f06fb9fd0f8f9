"""Loads the compiled libraries, if they are there; at import the CPU's only, and no CUDA call is made."""

import ctypes
import functools
import importlib.util
import os
import warnings
from pathlib import Path
from types import ModuleType

import torch

PATH = Path(__file__).parent / "libpyllm_cpu.so"
CUDA_PATH = Path(__file__).parent / "libpyllm_cuda.so"


def _load(path: Path, shared: Path | None = None) -> str | None:
    """Registers the operators of a compiled library; returns why that failed, or None.

    shared: a library that it takes symbols from without naming it.
    """
    try:
        if shared is not None:
            ctypes.CDLL(str(shared), mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(path))
    except OSError as problem:
        return f"{path.name} does not load: {problem.__cause__ or problem}"  # PyTorch wraps the linker's words
    return None


error = (
    _load(PATH)
    if PATH.exists()
    else f"the compiled library {PATH.name} is not installed (it is built where a C++ compiler is found)"
)
if error is not None:
    # pip hides what a build prints, so this is where a user learns of it.
    warnings.warn(f"pyllm runs without its compiled kernels: {error}", RuntimeWarning, stacklevel=2)
_triton_installed = importlib.util.find_spec("triton") is not None
_triton_interpreted = os.environ.get("TRITON_INTERPRET") == "1"


def cuda_error(device: torch.device) -> str | None:
    """Why the CUDA C++ kernels cannot run on this CUDA device, or None if they can: then their library is loaded."""
    return error or _cuda_library_error() or _unserved(device)


@functools.cache
def _cuda_library_error() -> str | None:
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} has no CUDA: install a build of it that has"
    if not CUDA_PATH.exists():
        return (
            f"{CUDA_PATH.name} is not built: reinstall pyllm with nvcc on the path (PYLLM_CUDA=1 makes that an order)"
        )
    if not torch.cuda.is_available():
        return "torch sees no CUDA device: see nvidia-smi and CUDA_VISIBLE_DEVICES"
    # It is also built beside a PyTorch without CUDA, so it names no library of CUDA PyTorch. That is in the process by
    # now, but for PyTorch alone.
    return _load(CUDA_PATH, shared=Path(torch.__file__).parent / "lib" / "libtorch_cuda.so")


def facts() -> ModuleType | None:
    """pyllm._C, which tells of the build; None where the libraries were carried to another Python than theirs."""
    try:
        from pyllm import _C
    except ImportError:
        return None
    return _C


def _unserved(device: torch.device) -> str | None:
    _C = facts()
    if _C is None:  # the library itself refuses, then
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if _C.cuda_serves(10 * major + minor):
        return None
    return (
        f"{torch.cuda.get_device_name(device)} is an sm_{major}{minor}, and {CUDA_PATH.name} has kernels for "
        f"{', '.join(_C.cuda_architectures())} only: reinstall pyllm with PYLLM_CUDA_ARCHS={major}{minor}"
    )


def cuda_refusal(op: str, dtype: torch.dtype) -> str | None:
    """Why the loaded CUDA library cannot serve an operator in this dtype, or None if it can."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"pyllm::{op}_fwd", "CUDA"):
        return "it has no CUDA C++ kernel"
    if op == "attention" and dtype in (torch.float32, torch.float64):
        return "its CUDA C++ kernels run on tensor cores and take bfloat16 and float16 only"
    if dtype == torch.float64:
        return "its CUDA C++ kernels compute in float32 and take no float64"
    return None


def triton_error(device: str) -> str | None:
    """Why Triton kernels cannot run on this device type, or None if they can."""
    if not _triton_installed:
        return "Triton is not installed"
    if device == "cpu" and not _triton_interpreted:
        return "Triton runs CPU tensors only in its interpreter: set TRITON_INTERPRET=1 before importing pyllm"
    if device not in ("cpu", "cuda"):
        return f"there are no Triton kernels for {device}"
    return None
