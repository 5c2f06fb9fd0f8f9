"""pyllm check: every kernel that this machine can run, on small awkward calls, against fp64 within the error budget.

Outputs and every gradient are compared as pyllm.testing does, uninitialised memory full of NaN. The verdicts on the
backends' operators are kept (verdicts.py) and decide on the defaults. On a GPU each call runs in one of several other
processes: an error there ends its process alone, and kernels are compiled at the same time.

A right kernel exceeds the budget on some inputs in a thousand, by little (docs/verified.md). What exceeds it by less
than FAR is therefore drawn anew, and is an error if it does so on all of DRAWS inputs.
"""

import functools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pyllm import backend as selector
from pyllm import testing, verdicts
from pyllm.attention_cases import CASES, DECODE_CASES, HEAD_DIM_CASES, DecodeCase
from pyllm.backend import CannotRun, unavailable
from pyllm.operator_cases import CASES as OPERATOR_CASES
from pyllm.operator_cases import OperatorCase

CHECKED = ("native", "triton", "torch")
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
DRAWS = 3
FAR = 4.0
SILENCE = 120  # seconds after which a call hangs

# The selector's operator, where a public one has another name or none of its own.
SELECTED = dict.fromkeys(("gelu", "relu", "silu", "swiglu", "geglu", "reglu"), "activation")
SELECTED |= {"rotary_": "rotary_inplace", "attention_weights": "attention"}
ELSEWHERE = ("attention", "attention_varlen", "attention_decode", "merge_attention")  # in attention_cases, or no kernel


@dataclass(frozen=True)
class Call:
    """One call of an operator, named as the selector does. inputs: of (dtype, device), random.

    deterministic: the modes that it is made in, where these are different kernels.
    """

    op: str
    name: str
    call: Callable
    inputs: Callable[[torch.dtype, str], testing.Inputs]
    dtypes: tuple[torch.dtype, ...]
    deterministic: tuple[bool, ...] = (True,)


@dataclass(frozen=True)
class Outcome:
    """One call as compared. ratio: its worst error as a share of the budget; problem: why it is wrong, or None."""

    op: str
    backend: str
    case: str
    dtype: str
    ratio: float = 0.0
    problem: str | None = None
    draws: int = 1


@dataclass
class Verdict:
    """All calls of an operator on a backend, as kept and shown. redrawn: those that needed other inputs to pass."""

    passed: bool = True
    cases: int = 0
    redrawn: int = 0
    worst: float = 0.0
    dtypes: list[str] = field(default_factory=list)
    problem: str | None = None

    def add(self, one: Outcome) -> None:
        self.cases += 1
        self.redrawn += one.draws > 1
        self.worst = max(self.worst, one.ratio)
        if one.dtype not in self.dtypes:
            self.dtypes.append(one.dtype)
        if one.problem is not None:
            self.problem = self.problem or f"{one.case} {one.dtype}: {one.problem}"
            self.passed = False


def calls(backend: str, device: str) -> list[Call]:
    """Those that a backend is checked on; it may refuse some of them. The slowest to compile first."""
    return [*_attention(backend, device), *_decoding(device), *_operators()]


def operators() -> list[str]:
    """What can be checked, by the selector's names."""
    return list(dict.fromkeys(call.op for call in calls("native", "cpu")))


def _attention(backend: str, device: str) -> Iterator[Call]:
    """In dtypes that take turns beside the first ones."""
    kernels = backend == "triton" or device == "cuda"
    for index, case in enumerate((*HEAD_DIM_CASES, *CASES)):
        dtypes = torch.float32, torch.bfloat16, (torch.float16, torch.float64)[index % 2]
        if (backend, device) == ("native", "cuda"):
            case, dtypes = case.on_tensor_cores(), (torch.bfloat16, torch.float16)
        elif (backend, device) == ("triton", "cuda"):  # which compiles for each
            others = (torch.float32, torch.float16, torch.float64)
            dtypes = (torch.bfloat16, others[index // 4 % 3]) if index % 4 == 0 else (torch.bfloat16,)
        # Sums of gradients in any order, as in training, are other kernels on a GPU.
        modes = (False, True) if kernels and backend != "torch" else (True,)
        if backend == "triton" and case in CASES:  # in turns, for the time that compiling takes
            modes = (index % 2 == 0,)
        yield Call("attention", case.name, case.call, case.inputs, dtypes, modes)


def _decoding(device: str) -> Iterator[Call]:
    cases = list(DECODE_CASES)
    if device == "cuda":  # instances by head_dim, and caches that blocks share
        for heads, kv_heads, new, dim, page in ((8, 8, 1, 64, 0), (16, 2, 1, 128, 64), (4, 1, 4, 96, 0)):
            cases.append(DecodeCase(f"long-{dim}", (4000, 0, 777), new, heads, kv_heads, dim, 4096, page))
        for dim in (72, 80, 192, 256):
            cases.append(DecodeCase(f"head-dim-{dim}", (300, 63), 2, 12, 4, dim, 320))
    for index, case in enumerate(cases):
        dtypes = (torch.float32, torch.bfloat16, torch.float16)[: 2 + (index % 3 == 0)]
        yield Call("attention_decode", case.name, case.call, case.inputs, dtypes)


# Sizes by letter of an OperatorCase, for each dtype that they are checked in: misaligned, strided, and rows that a
# block walks along or that several blocks share.
_SIZES = (
    ({"m": 5, "n": 63, "v": 63, "q": 5, "k": 65, "d": 7}, testing.DTYPES),
    ({"m": 33, "n": 1000, "v": 1000, "q": 33, "k": 130, "d": 16}, (torch.bfloat16, torch.float32)),
    ({"m": 3, "n": 20001, "v": 32003}, (torch.float16, torch.float32)),
    ({"m": 2, "n": 32768, "v": 131072}, (torch.bfloat16,)),
)


def _operators() -> Iterator[Call]:
    for case in OPERATOR_CASES:
        if case.op in ELSEWHERE:
            continue
        for index, (sizes, dtypes) in enumerate(_SIZES):
            if index > 1 and ("d" in case.sizes or case.op == "linear_cross_entropy"):
                break  # whose kernels do not ask for the width
            inputs = functools.partial(_inputs, case, sizes, index == 1)
            name = f"{case.name} {'x'.join(str(sizes[n]) for n in case.sizes if n in sizes)}"
            yield Call(SELECTED.get(case.op, case.op), name, case.call, inputs, dtypes)


def _inputs(case: OperatorCase, sizes: dict, strided: bool, dtype: torch.dtype, device: str) -> testing.Inputs:
    sizes = {name: size for name, size in sizes.items() if name in case.sizes and name not in case.together}
    if case.op in ("rotary", "rotary_"):  # the columns that turn are a part of all
        sizes |= {"q": sizes["q"], "d": case.sizes["d"] * (16 if strided else 7)}
        sizes["r"] = case.sizes["r"] * sizes["d"] // case.sizes["d"]
    elif "gate" in case.shapes and "up" not in case.shapes:  # both in one tensor
        sizes["n"] += sizes["n"] % 2
    elif case.op == "linear_cross_entropy":
        sizes["n"] = 40 if strided else 63
    inputs = case.inputs(dtype, device, **sizes)
    return {name: _strided(t) if strided and t.is_floating_point() else t for name, t in inputs.items()}


def _strided(t: Tensor) -> Tensor:
    """The same between other elements, which no kernel may read as its own."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), torch.nan, dtype=t.dtype, device=t.device)
    inner = wide[..., 1:-2]
    return inner.copy_(t.detach()).requires_grad_(t.requires_grad)


def compare(same: dict[str, Call], device: str) -> Iterator[Outcome]:
    """A call in its dtypes on each of the backends that can serve it; by backend, since their modes may differ."""
    for dtype in next(iter(same.values())).dtypes:
        draws: dict[int, tuple] = {}
        for backend, call in same.items():
            try:
                one = _compare(call, dtype, backend, device, draws)
            except CannotRun:
                continue
            yield one


def _compare(call: Call, dtype: torch.dtype, backend: str, device: str, draws: dict[int, tuple]) -> Outcome:
    """draws: the inputs and what is expected of them, made at need. Raises CannotRun."""
    worst, before = 0.0, torch.are_deterministic_algorithms_enabled()
    problem = None
    try:
        for draw in range(DRAWS):
            _use_deterministic(True)  # under which PyTorch fills what is uninitialised with NaN
            if draw not in draws:
                testing.seed_with(draw)
                inputs = call.inputs(dtype, device)
                draws[draw] = inputs, functools.cache(functools.partial(testing._expected, call.call, inputs, draw))
            problem, ratio = _exceeded(call, backend, *draws[draw], draw)
            worst = max(worst, ratio)
            if problem is None or ratio > FAR:
                break
    finally:
        _use_deterministic(before)
    return Outcome(call.op, backend, call.name, NAMES[dtype], worst, problem, draw + 1)


def _use_deterministic(mode: bool) -> None:
    # What the reference is composed of may have no such algorithm; the kernels have.
    torch.use_deterministic_algorithms(mode, warn_only=True)


def _exceeded(call: Call, backend: str, inputs: testing.Inputs, truth: Callable, seed: int) -> tuple[str | None, float]:
    """(what is wrong with a call on its inputs or None, the worst share of the budget: infinity for other errors)."""
    testing.observed.clear()
    try:
        for deterministic in call.deterministic:
            _use_deterministic(deterministic)
            testing.check(call.call, inputs, backend, seed, truth)
    except CannotRun:
        raise
    except AssertionError as error:
        return str(error), max(testing.observed, default=float("inf")) if "budget" in str(error) else float("inf")
    except Exception as error:  # whatever a kernel may raise is its problem, and the other kernels are still of use
        return f"{type(error).__name__}: {error}".splitlines()[0], float("inf")
    return None, max(testing.observed, default=0.0)


def able(device: str) -> dict[str, str | None]:
    """The backends that are checked, with None if they can run on the device, else why they cannot."""
    return {name: unavailable(name, torch.device(device)) for name in CHECKED}


def here(backends: Sequence[str], device: str, wanted: Sequence[str]) -> Iterator[list[Outcome]]:
    """All calls in this process, on one thread: more would only wait for one another. Outcomes, as they come."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from _here(backends, device, wanted)
    finally:
        torch.set_num_threads(threads)


def _here(backends: Sequence[str], device: str, wanted: Sequence[str]) -> Iterator[list[Outcome]]:
    plans = {name: [call for call in calls(name, device) if call.op in wanted] for name in backends}
    for index in range(max(map(len, plans.values()), default=0)):
        # The same call for all of them, whose truth is then worked out once.
        same: dict[tuple, list[str]] = {}
        for name, plan in plans.items():
            same.setdefault(plan[index].dtypes, []).append(name)
        for names in same.values():
            yield list(compare({name: plans[name][index] for name in names}, device))


def apart(backends: Sequence[str], device: str, wanted: Sequence[str], processes: int) -> Iterator[list[Outcome]]:
    """All calls in other processes; one that ends or hangs is replaced, and the call that it was at is wrong."""
    tasks: queue.SimpleQueue = queue.SimpleQueue()
    waiting = 0
    for name in sorted(backends, key=CHECKED.index):
        for index, call in enumerate(calls(name, device)):
            if call.op in wanted:
                tasks.put((name, index))
                waiting += 1
    done: queue.SimpleQueue = queue.SimpleQueue()
    threads = [threading.Thread(target=_work, args=(tasks, done, device), daemon=True) for _ in range(processes)]
    for thread in threads:
        thread.start()
    for _ in range(waiting):
        yield done.get()


def _work(tasks: queue.SimpleQueue, done: queue.SimpleQueue, device: str) -> None:
    """Hands one task after another to a process; a new one when it has ended."""
    worker = None
    while True:
        try:
            name, index = tasks.get_nowait()
        except queue.Empty:
            break
        worker = worker or _Worker(device)
        outcomes = worker.ask(name, index)
        if outcomes is None:
            call = calls(name, device)[index]
            outcomes = [Outcome(call.op, name, call.name, "", float("inf"), worker.end())]
        if worker.has_ended():
            worker = None
        done.put(outcomes)
    if worker is not None:
        worker.end()


class _Worker:
    """A process that compares the calls that it is asked to, one by one."""

    def __init__(self, device: str):
        self.process = subprocess.Popen(
            [*_command(), device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"CUBLAS_WORKSPACE_CONFIG": ":4096:8", **os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            start_new_session=True,
        )
        self.is_late = False

    def ask(self, backend: str, index: int) -> list[Outcome] | None:
        """None: there is no answer, and the process has ended."""
        alarm = threading.Timer(SILENCE, self._give_up)
        alarm.start()
        try:
            self.process.stdin.write(json.dumps([backend, index]) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:  # it ended before
            line = ""
        finally:
            alarm.cancel()
        return [Outcome(**one) for one in json.loads(line)] if line else None

    def _give_up(self) -> None:
        self.is_late = True
        self.process.kill()

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> str:
        """Ends the process and says how it ended."""
        self.process.stdin.close()
        try:
            code = self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.process.stdout.close()
        return f"no result within {SILENCE} s" if self.is_late else f"its process ended with exit code {code}"


def _command() -> list[str]:
    return [sys.executable, "-m", "pyllm.check"]


def serve(device: str) -> None:
    """What another process runs: a line of JSON in, a line out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a compiler prints is no answer
    plans = {name: calls(name, device) for name in CHECKED}
    for line in sys.stdin:
        name, index = json.loads(line)
        outcomes = list(compare({name: plans[name][index]}, device))
        try:
            if device == "cuda":
                torch.cuda.synchronize()
            alive = True
        except RuntimeError as error:  # after one such error all that follows raises it
            alive = False
            if not any(one.problem for one in outcomes):
                call = plans[name][index]
                problem = f"{type(error).__name__}: {error}".splitlines()[0]
                outcomes.append(Outcome(call.op, name, call.name, "", float("inf"), problem))
        answers.write(json.dumps([asdict(one) for one in outcomes]) + "\n")
        answers.flush()
        if not alive:
            os._exit(3)


def gather(lists: Iterable[list[Outcome]]) -> dict[tuple[str, str], Verdict]:
    """The verdicts by (operator, backend)."""
    found: dict[tuple[str, str], Verdict] = {}
    for one in (one for outcomes in lists for one in outcomes):
        found.setdefault((one.op, one.backend), Verdict()).add(one)
    return {key: found[key] for key in sorted(found, key=lambda key: (key[0], CHECKED.index(key[1])))}


def main(
    console,
    device: str,
    backends: Sequence[str] | None = None,
    wanted: Sequence[str] | None = None,
    json_file: Path | None = None,
) -> int:
    """Checks, prints a table, keeps the verdicts. Exit code 1 where a kernel fails or none can run."""
    from rich.progress import track

    start, place, wanted = time.monotonic(), torch.device(device), wanted or operators()
    refusals = able(device)
    chosen = [name for name in backends or CHECKED if refusals[name] is None]
    for name in backends or CHECKED:
        if refusals[name] is not None:
            console.print(f"not checked: {name}: {refusals[name]}", markup=False)
    if not chosen:
        return 1
    sizes = [sum(call.op in wanted for call in calls(name, device)) for name in chosen]
    if device == "cuda":
        lists = apart(chosen, device, wanted, processes=min(12, max(1, (os.cpu_count() or 1) * 3 // 4)))
    else:
        lists = here(chosen, device, wanted)
    total = sum(sizes) if device == "cuda" else max(sizes)
    label = f"checking {', '.join(chosen)} on {device}"
    found = gather(track(lists, label, total, console=console, transient=True))
    seconds = time.monotonic() - start
    console.print(table(found, device))
    for (op, name), verdict in found.items():
        if not verdict.passed:
            console.print(f"{op} on {name}: {verdict.problem}", style="red", markup=False, soft_wrap=True)
    kept = {f"{op} {name}": asdict(verdict) for (op, name), verdict in found.items()}
    failed = sum(not verdict.passed for verdict in found.values())
    passed = f"{len(found) - failed} of {len(found)} passed in {seconds:.0f} s"
    console.print(f"{passed} on {verdicts.key(place)}", markup=False, soft_wrap=True)
    try:
        console.print(f"kept in {verdicts.save(place, kept)}", markup=False, soft_wrap=True)
    except (OSError, RuntimeError) as error:
        console.print(f"not kept: {error}", style="red", markup=False)
    selector.forget()
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        facts = {"device": device, "key": verdicts.key(place), "seconds": seconds, "verdicts": kept}
        json_file.write_text(json.dumps(facts, indent=1) + "\n")
    return 1 if failed or not found else 0


def table(found: dict[tuple[str, str], Verdict], device: str):
    """Verdicts for a terminal."""
    from rich.table import Table

    made = Table()
    for column in ("operator", "backend", "device", "dtypes", "cases", "redrawn", "worst of the budget", "verdict"):
        numeric = column in ("cases", "redrawn", "worst of the budget")
        made.add_column(column, justify="right" if numeric else "left")
    for (op, name), verdict in found.items():
        dtypes = ", ".join(name for name in NAMES.values() if name in verdict.dtypes)
        cells = (op, name, device, dtypes, str(verdict.cases), str(verdict.redrawn or ""), f"{verdict.worst:.2f}")
        made.add_row(*cells, "passed" if verdict.passed else "FAILED", style=None if verdict.passed else "red")
    return made


if __name__ == "__main__":
    serve(sys.argv[1])
