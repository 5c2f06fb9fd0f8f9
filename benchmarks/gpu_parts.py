"""The parts of a run on a GPU, each in a process of its own that gpu.py starts and ends.

python -m pyllm.benchmarks.gpu_parts NAME --out DIR --root CHECKOUT
"""

import argparse
import contextlib
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console

import pyllm
from pyllm import doctor, verdicts
from pyllm.backend import use_backend
from pyllm.benchmarks import exercise, gpu, report, timing
from pyllm.benchmarks.gpu_cases import MEASURED, few_tokens
from pyllm.benchmarks.measure import DTYPES, Case, Result, first_line, measure, staged

COMPILED = ("compile", "flex", "liger")  # peers that compile for each case
SANITIZER_TOOLS = ("memcheck", "racecheck")


@dataclass(frozen=True)
class Run:
    """What a part is given. root: the checkout, for its tests. end: when the part has to be over, on time.monotonic.

    backends: those to be run by name, or none for all of them and for timing the default choice.
    """

    out: Path
    root: Path
    device: str
    quick: bool
    pytest_args: tuple[str, ...]
    end: float
    backends: tuple[str, ...] = ()
    rounds: int | None = None
    slot: float | None = None
    few_peers: bool = False

    def left(self) -> float:
        return self.end - time.monotonic()

    def able(self) -> list[str]:
        """The backends with kernels that are to be run, and can."""
        return [name for name in exercise.able(self.device) if not self.backends or name in self.backends]


@dataclass
class Report:
    """What a part saw. state: ok, failed or skipped."""

    state: str
    lines: list[str] = field(default_factory=list)


def build(run: Run) -> Report:
    """Whether both kernel backends can run here, and what is installed."""
    console = Console(width=160, color_system=None)
    with console.capture() as told:
        doctor.main(console)
    missing = [name for name in exercise.KERNEL_BACKENDS if name not in exercise.able(run.device)]
    return Report("failed" if missing else "ok", [*told.get().splitlines(), *_tools()])


def _tools() -> list[str]:
    commands = (
        ["nvcc", "--version"],
        ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv"],
    )
    lines = []
    for command in commands:
        if shutil.which(command[0]) is None:
            lines.append(f"{command[0]} is not on the path")
        else:
            lines += subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return lines


def check(run: Run) -> Report:
    """pyllm check, one backend after another: what one has found is kept when the next one takes too long."""
    able = [name for name in (*run.able(), *([] if run.backends else ["torch"]))]
    narrow = ["--op", "softmax", "--op", "rms_norm"] if run.quick else []
    reports = []
    for name in able:
        command = [sys.executable, "-m", "pyllm", "check", "--device", run.device, "--backend", name, *narrow]
        reports.append(_program(run, f"check-{name}", [*command, "--json", str(run.out / f"check-{name}.json")]))
    return _joined(reports)


def tests(run: Run) -> Report:
    return _program(run, "tests", _pytest(run))


def ptxas(run: Run) -> Report:
    """The tests that failed once more, with nvcc's ptxas in the place of the one that Triton brings.

    Which has compiled kernels for sm_90a wrongly: what passes now is a fault of its, not of a kernel.
    """
    found = _cuda_tool("ptxas")
    if found is None:
        return Report("skipped", ["no ptxas but Triton's is on the path"])
    if not (run.out / "pytest_cache" / "v" / "cache" / "lastfailed").exists():
        return Report("skipped", ["no test has failed"])
    names = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
    return _program(run, "ptxas", [*_pytest(run), "--lf", "--lfnf=none"], **dict.fromkeys(names, found))


def _pytest(run: Run) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-c", str(run.root / "pyproject.toml"), "--rootdir", str(run.root)]
    command += ["--tb=short", "-rf", "--durations=10", "-o", f"cache_dir={run.out / 'pytest_cache'}"]
    narrow = ["-k", " or ".join(f"{name}-{run.device}" for name in run.backends)] if run.backends else []
    return [*command, *narrow, *run.pytest_args, str(run.root / "tests")]


def sanitizer(run: Run) -> Report:
    """Every kernel under compute-sanitizer. PyTorch's allocator would hide what reads or writes past a tensor."""
    tool = _cuda_tool("compute-sanitizer")
    if tool is None:
        return Report("skipped", ["compute-sanitizer is not on the path"])
    reports = []
    for backend in run.able():  # a backend by itself, so that one that is slow leaves the other's
        for name in SANITIZER_TOOLS:
            command = [tool, "--tool", name, "--error-exitcode", "86", sys.executable]
            command += ["-m", "pyllm.benchmarks.exercise", "--device", run.device, "--backend", backend]
            command += ["--quick"] if run.quick else []
            one = _program(run, f"sanitizer-{name}-{backend}", command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            refusals = [line for line in one.lines if "Device not supported" in line]
            if refusals:
                return Report("skipped", refusals[:1])
            reports.append(Report(one.state, [f"{name}: {line}" for line in one.lines]))
    return _joined(reports)


def _cuda_tool(name: str) -> str | None:
    return shutil.which(name, path=os.environ["PATH"] + os.pathsep + "/usr/local/cuda/bin")


def _joined(reports: Sequence[Report]) -> Report:
    state = "failed" if any(one.state == "failed" for one in reports) else "ok"
    return Report(state, [line for one in reports for line in one.lines])


def _program(run: Run, name: str, command: Sequence[str], **environment: str) -> Report:
    """Runs a program of this project to its end or the part's; all of its output is in NAME.log."""
    path = [str(Path(pyllm.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", **environment}
    log = run.out / f"{name}.log"
    with open(log, "w") as file:
        ended = gpu.run_until(command, run.left(), cwd=run.out, env=environment, stdout=file, stderr=subprocess.STDOUT)
    lines = log.read_text(errors="replace").splitlines()
    return Report("ok" if ended == "exit code 0" else "failed", [*lines[-60:], ended])


def races(run: Run) -> Report:
    """Repeated runs give the same bits, in outputs and gradients, with uninitialised memory full of NaN."""
    repeats, compared, differing = 2 if run.quick else 20, 0, []
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for backend in run.able():
            for case in exercise.cases(run.device, run.quick):
                if run.left() < 0:
                    return Report("failed", [*differing, f"out of time: {compared} cases compared"])
                first = exercise.run(case, backend)
                if first is None:
                    continue
                compared += 1
                again = (exercise.run(case, backend) for _ in range(repeats))
                if not all(torch.equal(a, b) for results in again for a, b in zip(first, results, strict=True)):
                    differing.append(f"{backend} {case}: runs differ")
                    print(differing[-1], flush=True)
    finally:
        torch.use_deterministic_algorithms(False)
    return Report("failed" if differing else "ok", [*differing, f"{compared} cases, {repeats} more runs of each"])


# --- compiling beforehand ---

WARMED = ("attention_128", "norms", "decoding", "softmaxes", "attention_64")


def compile(run: Run) -> Report:
    """What Triton compiles for the parts of WARMED, in processes side by side: its cache then has it."""
    count = len(_warmed(run))
    done, problems = 0, []
    # Processes that have touched a GPU cannot be forked.
    pool = multiprocessing.get_context("spawn").Pool(min(16, os.cpu_count() or 1, count))
    try:
        results = pool.imap_unordered(_warm, [(run, index) for index in range(count)])
        with contextlib.suppress(multiprocessing.TimeoutError):
            while done < count:
                problem = results.next(timeout=max(run.left(), 0.1))
                done += 1
                problems += [problem] if problem else []
    finally:
        pool.terminate()
        pool.join()
    lines = [*problems, f"{done} of {count} cases compiled"]
    return Report("failed" if problems or done < count else "ok", lines)


def _warmed(run: Run) -> list[Case]:
    return [case for part in WARMED for case in _planned(run, MEASURED[part][0]())]


def _warm(task: tuple[Run, int]) -> str | None:
    """Runs a case once on Triton, or on what there is; what is wrong."""
    run, index = task
    case = _warmed(run)[index]
    try:
        workload = case.workload()
        name = "triton" if "triton" in run.able() else None
        with use_backend(name), torch.set_grad_enabled(case.direction != "forward"):
            staged(workload.calls["pyllm"], workload.leaves, case.direction)()
        if run.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except Exception as error:  # reported, and the other cases are still of use
        return f"{case}: {first_line(error)}"
    return None


def ceilings(run: Run) -> Report:
    rates = {"copy": timing.copy_bandwidth(run.device, run.quick)}
    for dtype in ("bf16", "fp32"):
        rates[f"{dtype} matrix product"] = timing.matrix_rate(run.device, DTYPES[dtype], run.quick)
    units = ("GB/s", *("GFLOP/s",) * 2)
    return Report("ok", [f"{n}: {rate / 1e9:.0f} {unit}" for (n, rate), unit in zip(rates.items(), units, strict=True)])


def _measuring(name: str) -> Callable[[Run], Report]:
    def part(run: Run) -> Report:
        plan, peers = MEASURED[name]
        if name == "overhead":
            return _measured(run, name, plan(), peers, True, report.overhead_table)
        reports = [_measured(run, name, plan(), peers)]
        if name == "layers":
            reports.append(_measured(run, name, few_tokens(), peers, end_to_end=True))
        return _joined(reports)

    return part


def _planned(run: Run, planned: Sequence[Case]) -> list[Case]:
    """The cases on the run's device; a quick run takes one of each benchmark, tiny."""
    if run.quick:
        planned = list({case.benchmark.name: case for case in planned}.values())
    return [
        replace(case, shape=case.benchmark.tiny if run.quick else case.shape, device=run.device) for case in planned
    ]


def _measured(
    run: Run,
    part: str,
    planned: Sequence[Case],
    peers: Sequence[str],
    end_to_end: bool = False,
    table: Callable = report.table,
) -> Report:
    """Measures the cases as far as time allows, on the backends named one by one, and keeps each result at once."""
    planned = _planned(run, planned)
    chosen = [peer for peer in peers if not (run.quick or run.few_peers) or peer not in COMPILED]
    results: list[Result] = []
    missing = len(planned)
    for case in planned:
        if run.left() < 0:
            break
        missing -= 1
        for backend in run.backends or (None,):
            others = [peer for peer in chosen if peer != backend]
            before = len(results)
            try:
                results += measure(case, backend, others, run.quick, end_to_end, run.rounds, run.slot)
            except Exception as error:  # reported, and the other cases are still of use
                results.append(Result(case, backend or "default", problem=first_line(error), end_to_end=end_to_end))
            for result in results[before:]:
                gpu.note(run.out, part, result.row())
    console = Console(width=220, color_system=None)
    with console.capture() as told:
        console.print(table(results))
    lines = told.get().splitlines()
    lines += dict.fromkeys(f"not measured: {name}: {why}" for r in results for name, why in r.refused.items())
    if missing:
        lines.append(f"out of time: {missing} of {len(planned)} cases are missing")
    red = any(result.problem for result in results)
    return Report("failed" if missing or red else "ok", lines)


def tune(run: Run) -> Report:
    """A few tiles of the attention, as far as time allows; what is faster goes into OUT, not into the user's cache."""
    command = [sys.executable, "-m", "pyllm", "tune", "--short", "--minutes", f"{max(run.left() - 10, 1) / 60:.2f}"]
    if run.device != "cuda":
        return Report("skipped", ["tiles are tuned on a GPU"])
    return _program(run, "tune", command, XDG_CACHE_HOME=str(run.out / "cache"))


# What Nsight Compute looks at: the attention's forward and backward at a length of 8192.
PROFILED = """
import sys, torch
from pyllm import backend, ops
backend.use_backend(sys.argv[1])
length, device = (8192, "cuda") if sys.argv[2] == "cuda" else (64, "cpu")
q, k, v = (torch.randn(1, 16, length, 128, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
out = ops.attention(q, k, v)
out.backward(torch.randn_like(out))
"""


def profile(run: Run) -> Report:
    """Nsight Compute's numbers of the attention's kernels, of each backend by itself."""
    tool = _cuda_tool("ncu")
    if tool is None:
        return Report("skipped", ["ncu is not on the path"])
    reports = []
    for backend in run.able():
        file = str(run.out / f"attention-{backend}")
        command = [tool, "--clock-control", "none", "--set", "full", "-k", "regex:attention_(forward|backward|fwd|bwd)"]
        command += ["-c", "3", "-f", "-o", file, sys.executable, "-c", PROFILED, backend, run.device]
        reports.append(_program(run, f"profile-{backend}", command))
        details = [tool, "-i", f"{file}.ncu-rep", "--page", "details"]
        reports.append(_program(run, f"profile-{backend}-details", details))
    return _joined(reports)


def defaults(run: Run) -> Report:
    """This device's rows of the table of default backends, in OUT/dispatch.csv."""
    command = [sys.executable, "-m", "pyllm", "tune", "--emit", str(run.out / "dispatch.csv"), "--device", run.device]
    if run.quick:
        command += ["--quick", "--op", "softmax", "--dtype", "fp32"]
    return _program(run, "defaults", command)


PARTS: dict[str, Callable[[Run], Report]] = {name: _measuring(name) for name in MEASURED} | {
    part.__name__: part
    for part in (build, check, tests, ptxas, races, sanitizer, compile, ceilings, tune, profile, defaults)
}


def run_part(name: str, run: Run) -> Report:
    """Runs a part and records it."""
    start = time.monotonic()
    gpu.forget(run.out, name)
    try:
        one = PARTS[name](run)
    except Exception:  # reported, and the other parts are still of use
        one = Report("failed", traceback.format_exc().splitlines())
    gpu.record(run.out, name, one.state, one.lines, time.monotonic() - start, timing.machine(run.device))
    return one


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 where the part has failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--few_peers", action="store_true")
    parser.add_argument("--pytest-args", default="-m gpu -n 12")
    parser.add_argument("--backend", action="append", default=[])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--slot", type=float)
    arguments = parser.parse_args(argv)
    end = time.monotonic() + arguments.seconds
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("this PyTorch sees no CUDA device")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the program that the part has started
    verdicts.assume(True)  # what is timed is pyllm's kernels, on a machine that may never have checked them
    run = Run(
        arguments.out,
        arguments.root,
        arguments.device,
        arguments.quick,
        tuple(shlex.split(arguments.pytest_args)),
        end,
        tuple(arguments.backend),
        arguments.rounds,
        arguments.slot,
        arguments.few_peers,
    )
    one = run_part(arguments.part, run)
    print(f"== {arguments.part}: {one.state}", *one.lines, sep="\n", flush=True)
    return 1 if one.state == "failed" else 0


if __name__ == "__main__":
    sys.exit(main())
