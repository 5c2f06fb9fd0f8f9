"""What a machine with a GPU can show of this project: make gpu OUT=dir.

Parts run one after another, those that are likeliest to fail first, each in a process of its own; it ends within the
limit with what it has by then. --part runs single ones, and what earlier runs left in OUT stays: gpu.json (all that was
seen), gpu.csv (all that was timed), summary.txt, and the logs of the programs that ran. No setting of the device is
changed.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console

import pyllm
from pyllm import doctor
from pyllm.benchmarks import exercise, report, timing
from pyllm.benchmarks.catalogue import BENCHMARKS
from pyllm.benchmarks.measure import DTYPES, OVERHEAD_PASSES, Case, Result, first_line, measure

ELEMENTS = 2**26  # of a large tensor: its bytes are several times what a cache holds
TOKENS = 2**14
ROW_PEERS = ("compile", "liger", "triton")
ATTENTION_PEERS = ("native", "triton", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "flex")
DECODING_PEERS = ("native", "triton")  # and eager: SDPA on the whole cache
GRACE = 30  # seconds that a part may be over its limit, a long kernel or program not yet ended
SANITIZER_TOOLS = ("memcheck", "racecheck")


@dataclass(frozen=True)
class Run:
    """What a part is given. root: the checkout, for its tests. end: when the part has to be over, on time.monotonic."""

    out: Path
    root: Path
    device: str
    quick: bool
    pytest_args: tuple[str, ...]
    end: float

    def left(self) -> float:
        return self.end - time.monotonic()


@dataclass
class Report:
    """What a part saw. state: ok, failed or skipped. rows: what was timed."""

    state: str
    lines: list[str] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)
    seconds: float = 0.0


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


def tests(run: Run) -> Report:
    command = [sys.executable, "-m", "pytest", "-c", str(run.root / "pyproject.toml"), "--rootdir", str(run.root)]
    return _program(run, "tests", [*command, "--tb=short", "-rf", *run.pytest_args, str(run.root / "tests")])


def sanitizer(run: Run) -> Report:
    """Every kernel under compute-sanitizer. PyTorch's allocator would hide what reads or writes past a tensor."""
    tool = shutil.which("compute-sanitizer", path=os.environ["PATH"] + os.pathsep + "/usr/local/cuda/bin")
    if tool is None:
        return Report("skipped", ["compute-sanitizer is not on the path"])
    both = Report("ok")
    for name in SANITIZER_TOOLS:
        command = [tool, "--tool", name, "--error-exitcode", "86", sys.executable, "-m", "pyllm.benchmarks.exercise"]
        command += ["--device", run.device, *(["--quick"] if run.quick else [])]
        one = _program(run, f"sanitizer-{name}", command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        refusals = [line for line in one.lines if "Device not supported" in line]
        if refusals:
            return Report("skipped", refusals[:1])
        both.lines += [f"{name}: {line}" for line in one.lines]
        both.state = one.state if both.state == "ok" else both.state
    return both


def _program(run: Run, name: str, command: Sequence[str], **environment: str) -> Report:
    """Runs a program of this project to its end or the part's; all of its output is in NAME.log."""
    path = [str(Path(pyllm.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", **environment}
    log = run.out / f"{name}.log"
    with open(log, "w") as file:
        try:
            done = subprocess.run(
                command, cwd=run.out, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=max(run.left(), 1)
            )
            ended = f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = "stopped: out of time"
    lines = log.read_text(errors="replace").splitlines()
    return Report("ok" if ended == "exit code 0" else "failed", [*lines[-40:], ended])


def races(run: Run) -> Report:
    """Repeated runs give the same bits, in outputs and gradients, with uninitialised memory full of NaN."""
    repeats, compared, differing = 2 if run.quick else 20, 0, []
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for backend in exercise.able(run.device):
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
    finally:
        torch.use_deterministic_algorithms(False)
    return Report("failed" if differing else "ok", [*differing, f"{compared} cases, {repeats} more runs of each"])


def ceilings(run: Run) -> Report:
    rates = {"copy": timing.copy_bandwidth(run.device, run.quick)}
    for dtype in ("bf16", "fp32"):
        rates[f"{dtype} matrix product"] = timing.matrix_rate(run.device, DTYPES[dtype], run.quick)
    units = ("GB/s", *("GFLOP/s",) * 2)
    return Report("ok", [f"{n}: {rate / 1e9:.0f} {unit}" for (n, rate), unit in zip(rates.items(), units, strict=True)])


def norms(run: Run) -> Report:
    """The targets' shapes first: plain norms over widths, then with addition and dropout, fp32, and small ones."""
    planned = []
    for name in ("rms_norm", "layer_norm"):
        planned += _cases(name, [(ELEMENTS // n, n) for n in (1024, 2048, 4096, 8192, 16384)])
    for name in ("add_rms_norm", "add_layer_norm"):
        planned += _cases(name, [(ELEMENTS // 4096, 4096)])
    for name in ("rms_norm", "layer_norm"):
        planned += _cases(name, [(ELEMENTS // 4096, 4096)], dtype="fp32")
    return _measured(run, planned, ROW_PEERS)


def softmaxes(run: Run) -> Report:
    planned = _cases("softmax", [(1, ELEMENTS // n, n) for n in (1024, 8192, 32768, 131072)], variants=[""])
    planned += _cases("softmax", [(16, 2048, 2048)], variants=["causal"])
    planned += _cases("log_softmax", [(1, ELEMENTS // 32768, 32768)])
    planned += _cases("softmax", [(1, ELEMENTS // 8192, 8192)], dtype="fp32", variants=[""])
    return _measured(run, planned, ROW_PEERS)


def attention_64(run: Run) -> Report:
    return _attention(run, 64)


def attention_128(run: Run) -> Report:
    return _attention(run, 128)


def attention_256(run: Run) -> Report:
    return _attention(run, 256)


def _attention(run: Run, dim: int) -> Report:
    """Lengths from 512 to 16k of as many tokens, causal and not; the targets' lengths first."""
    shapes = [(TOKENS // n, 2048 // dim, n, dim) for n in (16384, 2048, 8192, 4096, 1024, 512)]
    return _measured(run, _cases("attention", shapes, variants=["causal", ""]), ATTENTION_PEERS)


def decoding(run: Run) -> Report:
    """One token on long caches: many sequences and one, as many key heads as heads and fewer; few keys at last."""
    shapes = [(batch, 32, kv_heads, 16384, 128) for batch in (1, 16) for kv_heads in (8, 32)]
    shapes += [(64, 16, 16, 2048, 64), (8, 16, 2, 8192, 256), (1, 32, 8, 131072, 128), (64, 32, 8, 512, 128)]
    return _measured(run, _cases("attention_decode", shapes), DECODING_PEERS)


def overhead(run: Run) -> Report:
    """Calls from end to end: on tiny tensors, and on the largest that count as small."""
    planned = []
    for benchmark in exercise.BENCHMARKS:
        planned += _cases(benchmark.name, [benchmark.tiny], directions=OVERHEAD_PASSES)
    for name in ("rms_norm", "layer_norm"):
        planned += _cases(name, [(1024, 1024)], directions=OVERHEAD_PASSES)
    return _measured(run, planned, ("triton",), end_to_end=True)


def defaults(run: Run) -> Report:
    """This device's rows of the table of default backends, in OUT/dispatch.csv."""
    command = [sys.executable, "-m", "pyllm", "tune", "--emit", str(run.out / "dispatch.csv"), "--device", run.device]
    if run.quick:
        command += ["--quick", "--op", "softmax", "--dtype", "fp32"]
    return _program(run, "defaults", command)


def _cases(
    name: str,
    shapes: Sequence[tuple[int, ...]],
    dtype: str = "bf16",
    variants: Sequence[str] | None = None,
    directions: Sequence[str] = ("forward", "backward"),
) -> list[Case]:
    benchmark = BENCHMARKS[name]
    return [
        Case(benchmark, shape, dtype, direction, variant)
        for shape in shapes
        for variant in (benchmark.variants if variants is None else variants)
        for direction in directions
        if direction in benchmark.passes or (direction == "recorded" and "both" in benchmark.passes)
    ]


def _measured(run: Run, planned: Sequence[Case], peers: Sequence[str], end_to_end: bool = False) -> Report:
    """Measures the cases as far as time allows; a quick run takes one of each benchmark, tiny, and compiles nothing."""
    if run.quick:
        planned = list({case.benchmark.name: case for case in planned}.values())
    results: list[Result] = []
    missing = len(planned)
    for case in planned:
        if run.left() < 0:
            break
        missing -= 1
        shape = case.benchmark.tiny if run.quick else case.shape
        placed = Case(case.benchmark, shape, case.dtype, case.direction, case.variant, run.device)
        chosen = [peer for peer in peers if not run.quick or peer not in ("compile", "flex")]
        try:
            results += measure(placed, None, chosen, run.quick, end_to_end)
        except Exception as error:  # reported, and the other cases are still of use
            results.append(Result(placed, "default", problem=first_line(error)))
    console = Console(width=220, color_system=None)
    with console.capture() as told:
        console.print(report.overhead_table(results) if end_to_end else report.table(results))
    lines = told.get().splitlines()
    lines += dict.fromkeys(f"not measured: {name}: {why}" for r in results for name, why in r.refused.items())
    if missing:
        lines.append(f"out of time: {missing} of {len(planned)} cases are missing")
    red = any(result.problem for result in results)
    return Report("failed" if missing or red else "ok", lines, [result.row() for result in results])


PARTS: dict[str, Callable[[Run], Report]] = {
    part.__name__: part
    for part in (
        *(build, tests, sanitizer, races, ceilings, norms, softmaxes),
        *(attention_128, attention_64, attention_256, decoding, overhead, defaults),
    )
}


def record(out: Path, device: str, name: str, one: Report) -> None:
    """Adds a part to gpu.json, and writes gpu.csv and summary.txt from all that are in it."""
    path = out / "gpu.json"
    parts = json.loads(path.read_text())["parts"] if path.exists() else {}
    parts = {n: asdict(one) if n == name else parts[n] for n in PARTS if n == name or n in parts}
    facts = timing.machine(device)
    path.write_text(json.dumps({"machine": facts, "parts": parts}, indent=1) + "\n")
    report.write_rows(out / "gpu.csv", [{"part": n, **row} for n, part in parts.items() for row in part["rows"]])
    lines = [", ".join(f"{key} {value}" for key, value in facts.items())]
    for n, part in parts.items():
        lines += ["", f"== {n}: {part['state']}, {part['seconds']:.0f} s", *part["lines"]]
    (out / "summary.txt").write_text("\n".join(lines) + "\n")


def run_part(name: str, run: Run) -> Report:
    start = time.monotonic()
    try:
        one = PARTS[name](run)
    except Exception:  # reported, and the other parts are still of use
        one = Report("failed", traceback.format_exc().splitlines())
    one.seconds = time.monotonic() - start
    return one


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 where a part that ran has failed."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--root", type=Path, required=True, help="the checkout, whose tests are run")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all of them, in this order")
    parser.add_argument("--limit", type=float, default=8.5, metavar="MINUTES", help="of each part")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: to see that the parts work")
    parser.add_argument("--quick", action="store_true", help="tiny tensors, few rounds: to see that the parts work")
    parser.add_argument("--pytest-args", default="-m gpu -n 8", help="what the part `tests` runs")
    parser.add_argument("--here", choices=PARTS, help=argparse.SUPPRESS)  # a part, in this process
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("this PyTorch sees no CUDA device")
    out, limit = arguments.out.resolve(), 60 * arguments.limit
    out.mkdir(parents=True, exist_ok=True)
    if arguments.here:
        options = (arguments.device, arguments.quick, tuple(shlex.split(arguments.pytest_args)))
        run = Run(out, arguments.root.resolve(), *options, time.monotonic() + limit)
        one = run_part(arguments.here, run)
        record(out, arguments.device, arguments.here, one)
        print(f"== {arguments.here}: {one.state}, {one.seconds:.0f} s", *one.lines, sep="\n", flush=True)
        return 1 if one.state == "failed" else 0
    failed = False
    for name in arguments.part or PARTS:
        command = [sys.executable, "-m", "pyllm.benchmarks.gpu", *(sys.argv[1:] if argv is None else argv)]
        try:
            code = subprocess.run([*command, "--here", name], timeout=limit + GRACE).returncode
            ended = f"the process ended with exit code {code}"
        except subprocess.TimeoutExpired:
            code, ended = 2, "the process hung and was ended"
        if code not in (0, 1):
            record(out, arguments.device, name, Report("failed", [ended]))
        failed = failed or code != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
