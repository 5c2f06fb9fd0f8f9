"""Compiles CUDA kernels with a C++ compiler for the host model (see docs/cuda_host.md) and runs them on CPU tensors."""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
BUILD = ROOT / "build" / "cuda_host"
FLAGS = ["-x", "c++", "-std=c++20", "-O2", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]

Edit = tuple[str, str, str]  # (file from the repository's root on, text that it has once, text in its place)


class HostModelError(RuntimeError):
    """What a launch did wrong: kernel, block, thread and what."""


def compiler() -> str | None:
    """$CXX, or the first C++ compiler on the path."""
    return os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)


def cuda_headers() -> Path | None:
    """Where vector_types.h and cuda_bf16.h are: Triton's wheel carries them, as a CUDA toolkit does."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(triton.origin).parent / "backends" / "nvidia" / "include"] if triton else []
    nvcc = shutil.which("nvcc")
    folders += [Path(nvcc).resolve().parents[1] / "include"] if nvcc else []
    folders.append(Path("/usr/local/cuda/include"))
    return next((folder for folder in folders if (folder / "cuda_bf16.h").exists()), None)


def why_not() -> str | None:
    """What is missing to build the model here, or None."""
    if compiler() is None:
        return "no C++ compiler was found"
    return "no CUDA headers were found" if cuda_headers() is None else None


class Model:
    """A compiled translation unit together with the executor."""

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        self._library.cuda_host_allocate.restype = ctypes.c_void_p

    def run(self, function: str, *arguments: Tensor | int | float | None, seed: int = 0) -> None:
        """Calls an `extern "C" const char*` function, which takes pointers, int64_t and double.

        Each tensor is copied into memory of its own, between guard pages and as far off alignment as it was, and back.
        The seed decides in which order blocks and threads run. Raises HostModelError for what the model finds.
        """
        entry = getattr(self._library, function)
        entry.restype = ctypes.c_char_p
        copies: dict[tuple[int, int], int] = {}
        try:
            values = [self._passed(argument, copies) for argument in arguments]
            self._library.cuda_host_seed(ctypes.c_uint64(seed))
            error = entry(*values)
            for (original, size), copy in copies.items():
                ctypes.memmove(original, copy, size)
        finally:
            self._library.cuda_host_free_all()
        if error is not None:
            raise HostModelError(error.decode())

    def _passed(self, argument: Tensor | int | float | None, copies: dict[tuple[int, int], int]):
        if isinstance(argument, float):
            return ctypes.c_double(argument)
        if isinstance(argument, int):
            return ctypes.c_int64(argument)
        if argument is None:
            return ctypes.c_void_p(None)
        begin, size = argument.data_ptr(), _span(argument)
        if (begin, size) not in copies:
            copy = self._library.cuda_host_allocate(ctypes.c_size_t(size), ctypes.c_size_t(begin % 16))
            if copy is None:
                raise MemoryError(f"no {size} bytes for a copy")
            ctypes.memmove(copy, begin, size)
            copies[begin, size] = copy
        return ctypes.c_void_p(copies[begin, size])


def _span(tensor: Tensor) -> int:
    """Bytes from a strided tensor's first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def build(source: Path, edits: Iterable[Edit] = ()) -> Model:
    """The model of a translation unit, from the cache if nothing that went into it has changed.

    edits change the sources first, to plant a fault; each must apply exactly once.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    edits = list(edits)
    with _locked("executor"):
        executor = _compiled(HERE / "executor.cpp", None)
    with _locked(f"{source.stem}-{_digest(repr(edits).encode())}"):
        overlay = _edited(edits)
        within = source.resolve().relative_to(ROOT)
        if overlay is not None and (overlay / within).exists():
            source = overlay / within
        objects = [executor, _compiled(source, overlay)]
        library = BUILD / f"{source.stem}-{_digest(*(o.read_bytes() for o in objects))}.so"
        if not library.exists():
            unfinished = library.with_suffix(f".{os.getpid()}")
            _call([compiler(), "-shared", *map(str, objects), "-o", str(unfinished)])
            unfinished.rename(library)
    return Model(library)


@contextlib.contextmanager
def _locked(name: str):
    """Keeps other processes, which build the same, waiting."""
    with open(BUILD / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _edited(edits: list[Edit]) -> Path | None:
    """A folder with the edited files, in the places that they have in the repository."""
    if not edits:
        return None
    overlay = BUILD / f"edited-{_digest(repr(edits).encode())}"
    texts: dict[str, str] = {}
    for file, old, new in edits:
        text = texts.get(file) or (ROOT / file).read_text()
        if text.count(old) != 1:
            raise ValueError(f"{file} has {text.count(old)} times, not once: {old}")
        texts[file] = text.replace(old, new)
    for file, text in texts.items():
        (overlay / file).parent.mkdir(parents=True, exist_ok=True)
        (overlay / file).write_text(text)
    return overlay


def _compiled(source: Path, overlay: Path | None) -> Path:
    roots = [root for root in (overlay, ROOT) if root is not None]
    includes = [f"-I{root / folder}" for root in roots for folder in ("csrc", "tests")]
    command = [compiler(), *FLAGS, *includes, "-isystem", str(HERE), "-isystem", str(cuda_headers()), "-c", str(source)]
    stem = BUILD / f"{source.stem}-{_digest(repr(command).encode(), _compiler_version())}"
    result, dependencies, inputs = (stem.with_suffix(suffix) for suffix in (".o", ".d", ".inputs"))
    if not result.exists() or not inputs.exists() or inputs.read_text() != _digest_of_inputs(dependencies):
        inputs.unlink(missing_ok=True)
        _call([*command, "-MMD", "-MF", str(dependencies), "-o", str(result)])
        inputs.write_text(_digest_of_inputs(dependencies))
    return result


def _digest_of_inputs(dependencies: Path) -> str:
    files = [Path(name) for name in dependencies.read_text().replace("\\\n", " ").split()[1:]]
    return _digest(*(file.read_bytes() if file.exists() else b"" for file in files))


@functools.cache
def _compiler_version() -> bytes:
    return subprocess.run([compiler(), "--version"], capture_output=True, check=True).stdout


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]
