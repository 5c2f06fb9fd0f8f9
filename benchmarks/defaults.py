"""Measures which backend is fastest on this machine, for the table in pyllm/dispatch.csv (`pyllm tune --emit`).

Every benchmark with a grid is measured at its shapes, in all of its variants, on all backends in pairs; each shape
stands for the sizes around it, up to the geometric mean with the next one. Another backend replaces the preferred one
for these sizes only where it is faster by more than the spread in every variant that it can run. On a GPU small
tensors are timed end to end, large ones by events.
"""

import datetime
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

import pyllm
from pyllm import backend, dispatch
from pyllm.benchmarks import timing
from pyllm.benchmarks.catalogue import BENCHMARKS
from pyllm.benchmarks.measure import DTYPES, Benchmark, Case, staged, use_backend_in
from pyllm.dispatch import Row

MOST_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}
END_TO_END_UP_TO = 2**20  # elements
DIRECTIONS = ("forward", "both")
OPERATORS = tuple(name for name, benchmark in BENCHMARKS.items() if benchmark.grid)


def emit(path: Path, console, operators: Sequence[str], dtypes: Sequence[str], device: str, quick: bool = False) -> int:
    """Writes the rows of this machine into a table, in place of those that it has there. Returns an exit code."""
    table = dispatch.read(path) if path.exists() else []
    for name, dtype, direction in itertools.product(operators, dtypes, DIRECTIONS):
        found = rows(BENCHMARKS[name], dtype, direction, device, console, quick)
        table = replaced(table, found)
        dispatch.write(path, table)
        console.print(f"{name} {dtype} {direction}:", "" if found else "only one backend can run it")
        for row in found:
            console.print(
                f"  from {row.width} wide, {row.elements} elements: {row.backend}, {row.ratio} x {row.rival}",
                markup=False,
            )
    return 0


def replaced(table: Iterable[Row], found: Sequence[Row]) -> list[Row]:
    """The table with the new rows, in an order that keeps its history readable."""
    new = {_calls(row) for row in found}
    kept = [row for row in table if _calls(row) not in new]
    return sorted([*kept, *found], key=lambda row: (*_calls(row), row.width, row.elements))


def _calls(row: Row) -> tuple[str, str, str, str]:
    return row.device, row.operator, row.direction, row.dtype


def rows(benchmark: Benchmark, dtype: str, direction: str, device: str, console, quick: bool = False) -> list[Row]:
    """What was measured for one operator, dtype and pass; empty where there is nothing to choose from."""
    place = torch.device(device)
    torch_dtype = DTYPES[dtype]
    preferred = [name for name in backend.PREFERENCE[device] if name != "reference"]
    able = [name for name in preferred if backend.refusal(benchmark.name, name, place, torch_dtype) is None]
    source = f"pyllm {pyllm.__version__}, torch {torch.__version__}, {datetime.date.today()}"
    key = (dispatch.device_name(place), benchmark.name, direction, str(torch_dtype).removeprefix("torch."))
    made = []
    for shape, width, elements in regions(benchmark.grid, 2**14 if quick else MOST_ELEMENTS[device]):
        cases = [Case(benchmark, shape, dtype, direction, variant, device) for variant in benchmark.variants]
        times = [_times(case, [name for name in able if _right(case, name, console)], quick) for case in cases]
        decided = decide(able, [t for t in times if t is not None])
        if decided is not None:
            name, ratio, rival = decided
            made.append(Row(*key, width, elements, name, round(ratio, 3), rival, source))
    return merged(made)


def regions(shapes: Iterable[tuple[int, ...]], most: int) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """(shape, least width, least number of elements) of the sizes that each shape stands for."""
    by_width: dict[int, dict[int, tuple[int, ...]]] = {}
    for shape in shapes:
        if math.prod(shape) <= most:
            by_width.setdefault(shape[-1], {})[math.prod(shape)] = shape
    widths = sorted(by_width)
    for width, least_width in zip(widths, _bounds(widths), strict=True):
        sizes = sorted(by_width[width])
        for elements, least in zip(sizes, _bounds(sizes), strict=True):
            yield by_width[width][elements], least_width, least


def _bounds(sizes: Sequence[int]) -> list[int]:
    return [0, *(math.isqrt(a * b) for a, b in itertools.pairwise(sizes))]


def _right(case: Case, name: str, console) -> bool:
    """Whether a backend can run the case and computes right numbers; what is wrong is told once."""
    place = (case.dtype, case.variant, case.device)
    return _right_when_small(case.benchmark.name, case.benchmark.small(case.shape), *place, name, console)


@functools.cache
def _right_when_small(op: str, shape, dtype: str, variant: str, device: str, name: str, console) -> bool:
    case = Case(BENCHMARKS[op], shape, dtype, "both", variant, device)
    try:
        problem = case.problem(name)
    except backend.CannotRun:
        return False
    if problem is not None:
        console.print(f"{case} on {name} is left out, its numbers are wrong: {problem}", style="red", markup=False)
    return problem is None


def _times(case: Case, names: Sequence[str], quick: bool) -> timing.Timing | None:
    if not names:
        return None
    workload = case.workload()
    calls = {n: staged(use_backend_in(n, workload.calls["pyllm"]), workload.leaves, case.direction) for n in names}
    end_to_end = math.prod(case.shape) <= END_TO_END_UP_TO
    with torch.set_grad_enabled(case.direction != "forward"):
        return timing.paired(calls, case.device, 3 if quick else 5, 1e-3 if quick else 1e-2, end_to_end)


def decide(preferred: Sequence[str], times: Sequence[timing.Timing]) -> tuple[str, float, str] | None:
    """(backend, ratio, rival) of a row from the times of its cases, whose backends are in the order of preference."""
    default = next((name for name in preferred if any(name in t.ratio for t in times)), None)
    compared = [t for t in times if default in t.ratio]
    ratios: dict[str, list[float]] = {}
    faster: dict[str, bool] = {}
    for t in compared:
        for name, ratio in t.ratio.items():
            if name != default:
                ratios.setdefault(name, []).append(ratio)
                faster[name] = faster.get(name, True) and ratio > 1.0 + t.spread
    if not ratios:
        return None
    winners = [name for name in ratios if faster[name]]
    if winners:
        best = max(winners, key=lambda name: min(ratios[name]))
        return best, min(ratios[best]), default
    rival = max(ratios, key=lambda name: max(ratios[name]))
    return default, 1.0 / max(ratios[rival]), rival


def merged(found: Sequence[Row]) -> list[Row]:
    """Rows of one width that name the same backend for neighbouring sizes, as one with the worst ratio."""
    made: list[Row] = []
    for row in found:
        last = made[-1] if made else None
        if last is not None and (last.width, last.backend) == (row.width, row.backend):
            worst = min(last, row, key=lambda r: r.ratio)
            made[-1] = replace(worst, elements=last.elements)
        else:
            made.append(row)
    return made
