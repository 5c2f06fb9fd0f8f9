"""Paired timing of several implementations of one operation, and what this machine can do at best.

The first implementation is the baseline. It is measured twice, so that the spread of a ratio of equals (A/A) stands
beside every ratio. A round runs all of them forwards, then backwards (A B C A' A' C B A): drift of the clock and of the
load cancels. Reported are medians over the rounds. On a GPU each call is bracketed by events, after the L2 cache has
been overwritten, or, end to end, the wall clock runs over many; on a CPU it runs over enough calls to fill `slot`
seconds, on inputs that stay the same.
"""

import ctypes
import functools
import gc
import itertools
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import pyllm
from pyllm import _library, dispatch

FRESH_PAGES_FROM = 32 * 2**20  # bytes; above this glibc takes every block from the kernel and gives it back


@dataclass(frozen=True)
class Timing:
    """seconds: of a call, by implementation. ratio: baseline's time over the implementation's, paired by round.

    spread: the largest deviation from 1 of the baseline's ratio to itself.
    """

    seconds: dict[str, float]
    ratio: dict[str, float]
    spread: float


def paired(
    calls: dict[str, Callable[[], object]], device: str, rounds: int = 7, slot: float = 0.05, end_to_end: bool = False
) -> Timing:
    """Times the calls against the first of them. slot: seconds that each fills at a time (at least one call).

    end_to_end: on a GPU, with the time that the host takes to launch, where that is the longer one.
    """
    baseline = next(iter(calls))
    again = f"{baseline} again"
    calls = {**calls, again: calls[baseline]}
    clock = _cpu_seconds if device != "cuda" else _gpu_wall_seconds if end_to_end else _gpu_seconds
    for call in calls.values():  # compiles, fills caches and the allocator
        clock(call, 2)
    repeats = {name: max(1, int(slot / _spent(clock, call))) for name, call in calls.items()}
    names = list(calls)
    samples = []
    for _ in range(rounds):
        spent = dict.fromkeys(names, 0.0)
        for name in [*names, *reversed(names)]:
            spent[name] += clock(calls[name], repeats[name]) / 2
        samples.append(spent)
    return Timing(
        {name: median(s[name] for s in samples) for name in names if name != again},
        {name: median(s[baseline] / s[name] for s in samples) for name in names if name != again},
        max(abs(s[baseline] / s[again] - 1.0) for s in samples),
    )


def _spent(clock: Callable, call: Callable[[], object]) -> float:
    """Seconds that measuring one call takes, what lies around the call included."""
    start = time.perf_counter()
    return max(clock(call, 1), time.perf_counter() - start)


def seconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """Of one call: on a GPU the median of `repeats`, each after the L2 cache was overwritten; on a CPU the mean."""
    return (_gpu_seconds if device == "cuda" else _cpu_seconds)(call, repeats)


def _cpu_seconds(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _gpu_wall_seconds(call: Callable[[], object], repeats: int) -> float:
    def calls() -> None:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return _cpu_seconds(calls, 1) / repeats


def _gpu_seconds(call: Callable[[], object], repeats: int) -> float:
    cache = _l2_eraser()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in pairs:
        # Once would erase; the GPU is to be busy for longer than the host takes to launch the call.
        for _ in range(4):
            cache.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in pairs) / 1e3


@functools.cache
def _l2_eraser() -> torch.Tensor:
    return torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")


def warm_allocator(size: int) -> bool:
    """Makes glibc keep `size` bytes of pages for large blocks, which are then not faulted in anew; 0: as usual again.

    Returns whether this C library can be told so. As usual means the thresholds that glibc's own adaptation ends in.
    """
    libc = ctypes.CDLL(None) if platform.system() == "Linux" else None
    if not hasattr(libc, "mallopt"):
        return False
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
    libc.mallopt(mmap_threshold, FRESH_PAGES_FROM)
    libc.mallopt(mmap_max, 0 if size else 65536)
    libc.mallopt(trim_threshold, 2**31 - 1 if size else FRESH_PAGES_FROM)
    if size:
        torch.ones(size, dtype=torch.uint8)  # freed at once, and its pages serve what comes
    else:
        libc.malloc_trim(0)
    return True


def peak_memory(call: Callable[[], object], device: str) -> int:
    """Bytes of tensors that a call allocates at most at a time: results, what autograd keeps, temporaries."""
    call()  # what is allocated once
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    return max(0, *itertools.accumulate(_allocations(call)[1]), 0)


def saved_memory(call: Callable[[], Tensor | tuple[Tensor, ...]], device: str) -> int:
    """Bytes that a forward leaves allocated beyond its outputs: all that its backward keeps, whoever holds it.

    The allocator is asked, not autograd, so that what a kernel or a compiled graph stores by itself counts as well;
    inputs and parameters existed before and do not. An output that is kept counts for the layer that reads it.
    """
    call()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        outputs = call()
        left = torch.cuda.memory_allocated() - before
    else:
        outputs, sizes = _allocations(call)
        left = sum(sizes)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    storages = {s.data_ptr(): s.nbytes() for s in (output.untyped_storage() for output in outputs)}
    return max(0, left - sum(storages.values()))


def _allocations(call: Callable[[], object]) -> tuple[object, list[int]]:
    """(the result of a call, the bytes of CPU memory that it took, or gave back where negative, in turn)."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler is silent
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return result, [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


@functools.cache
def copy_bandwidth(device: str, quick: bool = False) -> float:
    """Bytes per second, read and written, of a copy far larger than the caches."""
    source = torch.randn(2**22 if quick else 2**26, device=device)
    target = torch.empty_like(source).copy_(source)
    timing = paired({"copy": lambda: target.copy_(source)}, device, rounds=3 if quick else 7)
    return 2 * source.nbytes / timing.seconds["copy"]


@functools.cache
def matrix_rate(device: str, dtype: torch.dtype, quick: bool = False) -> float:
    """FLOP per second of a large square matrix product in dtype."""
    n = 512 if quick else 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    timing = paired({"product": lambda: torch.mm(a, b, out=out)}, device, rounds=3 if quick else 5)
    return 2 * n**3 / timing.seconds["product"]


def machine(device: str) -> dict[str, str | int]:
    """What a number needs beside it: processor, threads, instruction sets, versions."""
    facts: dict[str, str | int] = {"pyllm": pyllm.__version__, "torch": torch.__version__, "device": device}
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = str(torch.version.cuda)
    facts["cpu"] = dispatch.processor()
    facts["threads"] = torch.get_num_threads()
    facts["torch_isa"] = torch.backends.cpu.get_cpu_capability()
    build = _library.facts()
    facts["pyllm_isa"] = "unknown" if build is None else build.cpu_isa()
    return facts
