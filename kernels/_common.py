"""What all kernels share: rounding, the launch, and its description for kernels/aot.py."""

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import mangle_type

from pyllm import replay

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

_captured: list[tuple] | None = None


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x.to(dtype), to nearest even in the interpreter too, which truncates to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    return x.to(dtype)


@lru_cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; 2 without a GPU, which still makes a persistent grid loop."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def launch(kernel, grid: tuple[int, ...], device: torch.device, **arguments) -> None:
    """kernel[grid](**arguments) on `device`; inside `captured`, only noted."""
    if arguments.get("p_rng") is not None:  # which a saved-tensor hook may have moved
        arguments["p_rng"] = arguments["p_rng"].contiguous()
    if _captured is not None:
        _captured.append((kernel, arguments, grid))
    else:
        described = arguments.get("TMA")
        with torch.cuda.device(-1 if device.type == "cpu" else device), replay.paused():
            launched = partial(_with_scratch, device, kernel[grid]) if described else kernel[grid]
            compiled = launched(**arguments)
        recorder = replay.recorder()
        if recorder is not None:
            again = kernel[grid] if INTERPRETED.value else _again(compiled, (*grid, 1, 1)[:3], device)
            again = partial(_with_scratch, device, again) if described else again
            recorder.launched(again, [arguments[name] for name in kernel.arg_names], named=INTERPRETED.value)


def _again(compiled, grid: tuple[int, int, int], device: torch.device):
    """compiled[grid] without what that looks up at each call, which takes longer than the launch."""
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    stream, index = triton.runtime.driver.active.get_current_stream, device.index or 0
    knobs = triton.knobs.runtime

    def launched(*args):
        before, after = knobs.launch_enter_hook, knobs.launch_exit_hook  # such as a profiler's; chains may be empty
        if getattr(before, "calls", before) or getattr(after, "calls", after):
            compiled[grid](*args)
        else:
            run(*grid, stream(index), function, metadata, None, None, None, *args)

    return launched


def _with_scratch(device: torch.device, launched, *args, **arguments):
    """launched(...) with memory for tensor descriptors; the allocator of the caller's context stays."""

    def allocate(size: int, _alignment: int, _stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)  # aligned to 512 B

    context = contextvars.copy_context()
    context.run(triton.set_allocator, allocate)
    return context.run(launched, *args, **arguments)


@contextmanager
def captured() -> Iterator[list[tuple]]:
    """Collects (kernel, signature, constexprs, options), as kernels/aot.py wants them, of the launches made inside.

    They are to be made on meta tensors, which count as aligned.
    """
    global _captured
    _captured, calls = [], []
    try:
        yield calls
        calls += [(kernel, *_described(kernel, arguments)) for kernel, arguments, _ in _captured]
    finally:
        _captured = None


def _described(kernel, arguments: dict) -> tuple[dict, dict, dict]:
    """(signature, constexprs, options) to which Triton would specialise a launch with these arguments."""
    parameters = {p.name: p for p in kernel.params}
    signature, constexprs, options = {}, {}, {}
    for name, value in arguments.items():
        if name not in parameters:
            options[name] = value
        elif parameters[name].is_constexpr or _static(value):
            constexprs[name] = value
        else:
            signature[name] = parameters[name].annotation_type or _type(value)
            if isinstance(value, tuple):
                constexprs |= _constants(value, (kernel.arg_names.index(name),))
    return signature, constexprs, options


def _static(value) -> bool:
    """Whether Triton makes a constant of an argument."""
    return value is None or (isinstance(value, int) and value == 1)


def _constants(value: tuple, path: tuple[int, ...]) -> dict:
    """The constants in a tuple, by where they are."""
    found = {}
    for i, element in enumerate(value):
        if isinstance(element, tuple):
            found |= _constants(element, (*path, i))
        elif _static(element):
            found[(*path, i)] = element
    return found


def _type(value) -> str | tuple:
    if isinstance(value, tuple):
        return map_tuple(lambda element: "constexpr" if _static(element) else _type(element), value)
    aligned = isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)
    return mangle_type(value) + (":16" if aligned else "")


def map_tuple(function, value: tuple) -> tuple:
    """function of each element, in a tuple of the same names."""
    elements = map(function, value)
    return type(value)(*elements) if hasattr(value, "_fields") else tuple(elements)
