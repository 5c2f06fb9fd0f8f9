"""What a benchmark is, and how one case of it is measured: correctness first, then paired times."""

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from pyllm import testing
from pyllm.backend import BACKENDS, recording, use_backend
from pyllm.benchmarks import timing
from pyllm.graphs import graphed

# forward runs without gradient; recorded is a forward that a backward can follow; step is both with the optimiser.
PASSES = ("forward", "backward", "both")
OVERHEAD_PASSES = ("forward", "recorded", "both")
SDPA = ("sdpa-flash", "sdpa-cudnn", "sdpa-efficient")
PEERS = ("compile", *BACKENDS, "liger", *SDPA, "flex", "chunked", "hf", "graphed")
DEFAULT_PEERS = ("compile", "sdpa-flash", "sdpa-cudnn", "chunked", "hf")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
AUTOCAST = "autocast"  # what computes in bf16 on tensors that are fp32
DTYPES[AUTOCAST] = torch.bfloat16


Call = Callable[[], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Peer:
    """A call that has leaves of its own, such as a model whose parameters are split in another way.

    captured: the call that a whole step, optimiser included, is a CUDA graph of.
    """

    call: Call
    leaves: list[Tensor]
    captured: Call | None = None

    def __call__(self) -> Tensor | tuple[Tensor, ...]:
        return self.call()


@dataclass(frozen=True)
class Workload:
    """One operation on given tensors. calls: without arguments, by implementation, PyTorch's eager one first.

    leaves: what backward differentiates. check(backend) raises AssertionError unless pyllm's numbers are in the budget.
    peers: more calls, timed where they are asked for by name; late: the same, made when they are asked for.
    modules: what is to be in training or evaluation mode. used: True where an output counts, broadcast; elsewhere its
    gradient is 0.
    """

    calls: dict[str, Call]
    leaves: list[Tensor]
    check: Callable[[str | None], None]
    peers: dict[str, Call] = field(default_factory=dict)
    late: dict[str, Callable[[], Call]] = field(default_factory=dict)
    modules: tuple[Module, ...] = ()
    used: Tensor | None = None

    def staged(self, call: Call, direction: str) -> Callable[[], object]:
        """The part of a call that a pass times."""
        leaves = call.leaves if isinstance(call, Peer) else self.leaves
        if direction == "step" and isinstance(call, Peer) and call.captured is not None:
            return graphed(staged(call.captured, leaves, direction, self.used))
        return staged(call, leaves, direction, self.used)

    def peer(self, name: str) -> Call | None:
        """`compile` is the eager call compiled, a backend's name is pyllm on that backend; None: there is none."""
        if name in ("compile", "flex"):
            # A function stays compiled for the shapes that it has met, however many: none is compiled for again.
            torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 2**16
            torch._functorch.config.donated_buffer = False  # a graph that backward runs over again keeps its buffers
        if name == "compile":
            return _compiled(self.calls["eager"])
        if name in BACKENDS:
            return use_backend_in(name, self.calls["pyllm"])
        return self.late[name]() if name in self.late else self.peers.get(name)


@dataclass(frozen=True)
class Benchmark:
    """An operator's or a layer's cases.

    build makes the workload of a shape, whose sizes `axes` names. `small` is the shape with fewer independent rows or
    heads, on which the numbers are checked. variants: options of build, by label. Either moved (elements that each pass
    has to read and write at least) or flops is given: (shape, **options) -> (forward, backward). passes: those it has.
    grid: shapes of the first tensor, over which the fastest backend may change. tokens: (shape, **options) -> how many
    a call computes, without padding. autocasts: whether build takes autocast=True, for parameters in fp32.
    """

    name: str
    axes: str
    shapes: tuple[tuple[int, ...], ...]
    tiny: tuple[int, ...]
    build: Callable[..., Workload]
    small: Callable[[tuple[int, ...]], tuple[int, ...]]
    moved: Callable[..., tuple[float, float]] | None = None
    flops: Callable[..., tuple[float, float]] | None = None
    variants: dict[str, dict] = field(default_factory=lambda: {"": {}})
    passes: tuple[str, ...] = PASSES
    grid: tuple[tuple[int, ...], ...] = ()
    tokens: Callable[..., int] | None = None
    autocasts: bool = False

    @property
    def unit(self) -> str:
        """Of the work that a rate counts."""
        return "B/s" if self.moved else "FLOP/s"


@dataclass(frozen=True)
class Case:
    """One row of the table: what is measured."""

    benchmark: Benchmark
    shape: tuple[int, ...]
    dtype: str
    direction: str
    variant: str = ""
    device: str = "cpu"

    def __str__(self) -> str:
        parts = (self.benchmark.name, "x".join(map(str, self.shape)), self.dtype, self.variant, self.direction)
        return "-".join(part.replace(" ", "-") for part in parts if part)

    @property
    def options(self) -> dict:
        return self.benchmark.variants[self.variant]

    def workload(self, shape: tuple[int, ...] | None = None) -> Workload:
        """Random inputs, the same at every call, of the case's shape or of another; inference is in evaluation mode."""
        torch.manual_seed(0)
        options = self.options | ({"autocast": True} if self.dtype == AUTOCAST else {})
        workload = self.benchmark.build(shape or self.shape, DTYPES[self.dtype], self.device, **options)
        for module in workload.modules:
            module.train(self.direction != "forward")
        return workload

    def problem(self, backend: str | None) -> str | None:
        """Why pyllm's numbers are wrong on a small version of this case, or None."""
        try:
            self.workload(self.benchmark.small(self.shape)).check(backend)
        except AssertionError as error:
            return str(error)
        return None


@dataclass(frozen=True)
class Result:
    """One row as measured. seconds, ratio: by implementation, ratio = eager's time over its own.

    rate is pyllm's bytes or FLOP per second, share what part that is of the machine's limit. problem: why there is no
    time. fresh_pages: outputs so large that each call has them faulted in anew by the kernel. memory: bytes that a call
    holds at most beyond its inputs, by implementation; saved: what its forward keeps for its backward. end_to_end: the
    time of the host's launches is in it. refused: why peers could not run.
    """

    case: Case
    backend: str
    fresh_pages: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    ratio: dict[str, float] = field(default_factory=dict)
    spread: float | None = None
    rate: float | None = None
    share: float | None = None
    problem: str | None = None
    memory: dict[str, int] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)
    end_to_end: bool = False
    refused: dict[str, str] = field(default_factory=dict)

    def row(self) -> dict:
        """Plain values for JSON and CSV; times in seconds, rates per second."""
        case = self.case
        row = {
            "op": case.benchmark.name,
            "shape": "x".join(map(str, case.shape)),
            "axes": case.benchmark.axes,
            "dtype": case.dtype,
            "device": case.device,
            "variant": case.variant,
            "pass": case.direction,
        }
        measured = {"seconds": self.seconds, "ratio": self.ratio, "peak_bytes": self.memory, "saved_bytes": self.saved}
        if case.benchmark.tokens is not None:
            tokens = case.benchmark.tokens(case.shape, **case.options)
            measured["tokens_per_second"] = {name: tokens / seconds for name, seconds in self.seconds.items()}
        for name, by_peer in measured.items():
            row |= {f"{name}_{peer}": value for peer, value in by_peer.items()}
        names = ("backend", "fresh_pages", "end_to_end", "spread", "rate", "share", "problem")
        return row | {"rate_unit": case.benchmark.unit} | {name: getattr(self, name) for name in names}


def cases(
    benchmark: Benchmark,
    dtypes: Sequence[str],
    device: str,
    shapes: Sequence[tuple[int, ...]] | None = None,
    directions: Sequence[str] | None = None,
    variants: Sequence[str] | None = None,
) -> list[Case]:
    """All combinations; the benchmark's own shapes, variants and passes unless others are named."""
    chosen = list(benchmark.variants) if variants is None else variants
    recorded = ("recorded",) if "both" in benchmark.passes else ()
    ways = [way for way in directions or PASSES if way in (*benchmark.passes, *recorded)]
    product = itertools.product(shapes or benchmark.shapes, dtypes, chosen, ways)
    return [Case(benchmark, shape, dtype, way, variant, device) for shape, dtype, variant, way in product]


def measure(
    case: Case,
    backend: str | None = None,
    peers: Sequence[str] = DEFAULT_PEERS,
    quick: bool = False,
    end_to_end: bool = False,
    rounds: int | None = None,
    slot: float | None = None,
) -> Iterator[Result]:
    """Results of a case: one, or two where the allocator matters (fresh pages, then kept ones).

    peers: those of Workload.peer to be timed, where the case has them. quick: to see that it works, not for numbers.
    rounds, slot: as of timing.paired, whose own they are by default.
    """
    asked = {"rounds": rounds, "slot": slot} | ({"rounds": 3, "slot": 0.002} if quick else {})
    timing_options = {"end_to_end": end_to_end} | {name: value for name, value in asked.items() if value is not None}
    with use_backend(backend):
        problem = case.problem(backend)
        if problem is not None:
            yield Result(case, backend or "default", problem=problem, end_to_end=end_to_end)
            return
        workload = case.workload()
        with recording() as choices:
            outputs = workload.calls["pyllm"]()
        ran = "+".join(dict.fromkeys(choice.backend for choice in choices))
        made = _outputs(outputs) if case.direction == "forward" else (*_outputs(outputs), *workload.leaves)
        size = max(tensor.nbytes for tensor in made)  # of a result, or of a gradient
        del outputs, made
        large = case.device == "cpu" and size > timing.FRESH_PAGES_FROM
        called = dict(workload.calls)
        calls = {name: workload.staged(call, case.direction) for name, call in called.items()}
        refused = {}
        for name in peers:
            try:
                peer = workload.peer(name)
                if peer is None:
                    continue
                with torch.set_grad_enabled(case.direction != "forward"):
                    timed = workload.staged(peer, case.direction)
                    timed()
                called[name], calls[name] = peer, timed
            except Exception as error:  # not installed, not for this shape or device, or whatever a peer may raise
                refused[name] = first_line(error)
        for warm in (False, True) if large else (False,):
            # For small results too: the thresholds of a new process would have them faulted in anew, call by call.
            if case.device == "cpu" and not timing.warm_allocator(16 * size if warm else 0) and warm:
                continue
            with torch.set_grad_enabled(case.direction != "forward"):
                times = timing.paired(calls, case.device, **timing_options)
                memory = {name: timing.peak_memory(call, case.device) for name, call in calls.items()}
                saved = {}
                if case.direction in ("both", "step"):
                    saved = {name: timing.saved_memory(call, case.device) for name, call in called.items()}
            rate, share = _rate(case, times.seconds["pyllm"], quick)
            measured = (times.seconds, times.ratio, times.spread, rate, share)
            others = {"memory": memory, "saved": saved, "end_to_end": end_to_end, "refused": refused}
            yield Result(case, ran, large and not warm, *measured, **others)
        if large:
            timing.warm_allocator(0)


def _compiled(call: Call) -> Call:
    """The call compiled for its shapes; a function that other workloads call as well is compiled once for a shape."""
    if not isinstance(call, partial):
        return torch.compile(call, dynamic=False)
    # What a closure holds is to go with its workload.
    compiled = torch.compile if getattr(call.func, "__closure__", ()) else _compiled_function
    return partial(compiled(call.func, dynamic=False), *call.args, **call.keywords)


@functools.cache
def _compiled_function(function: Callable, dynamic: bool) -> Callable:
    return torch.compile(function, dynamic=dynamic)


def staged(call: Call, leaves: list[Tensor], direction: str, used: Tensor | None = None) -> Callable[[], object]:
    """The part of a call that a pass times; backward alone reuses one graph. used: as in `Workload`."""
    if direction in ("forward", "recorded"):
        return call
    # A loss is where a backward starts.
    cotangents = [torch.randn_like(o) if o.dim() else torch.ones_like(o) for o in _outputs(call())]
    if used is not None:
        cotangents = [c.masked_fill_(~used, 0.0) for c in cotangents]

    def gradients(outputs, retain_graph):
        return torch.autograd.grad(outputs, leaves, cotangents, retain_graph=retain_graph)

    if direction == "backward":
        return partial(gradients, _outputs(call()), True)
    if direction == "both":
        return lambda: gradients(_outputs(call()), False)
    parameters = [leaf for leaf in leaves if isinstance(leaf, Parameter)]
    # Its whole arithmetic, and the weights stay.
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True, capturable=parameters[0].is_cuda)

    def step() -> None:
        for leaf, gradient in zip(leaves, gradients(_outputs(call()), False), strict=True):
            leaf.grad = gradient
        optimizer.step()
        for leaf in leaves:
            leaf.grad = None

    return step


def _outputs(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def use_backend_in(name: str, call: Callable) -> Callable:
    """The call, its forward on a backend."""

    def on_backend():
        with use_backend(name):
            return call()

    return on_backend


def _rate(case: Case, seconds: float, quick: bool) -> tuple[float | None, float | None]:
    if case.direction == "recorded":
        return None, None
    benchmark = case.benchmark
    forward, backward = (benchmark.moved or benchmark.flops)(case.shape, **case.options)
    work = {"forward": forward, "backward": backward}.get(case.direction, forward + backward)
    work *= DTYPES[case.dtype].itemsize if benchmark.moved else 1
    return work / seconds, work / seconds / limit(case, quick)


def limit(case: Case, quick: bool = False) -> float:
    """What bounds the case on this machine, as measured: bytes or FLOP per second."""
    if case.benchmark.moved:
        return timing.copy_bandwidth(case.device, quick)
    return timing.matrix_rate(case.device, DTYPES[case.dtype], quick)


def limits(some: Sequence[Case], quick: bool = False) -> dict[str, str]:
    """The measured limits that the shares of these cases refer to, in words."""
    named = {"copy" if case.benchmark.moved else f"{case.dtype} matrix product": case for case in some}
    return {name: rate(limit(case, quick), case.benchmark.unit) for name, case in named.items()}


def rate(per_second: float, unit: str) -> str:
    """A rate in words; unit: "B/s" or "FLOP/s"."""
    return f"{per_second / 1e9:.{1 if per_second < 1e11 else 0}f} G{unit}"


def randn(*shape: int, dtype: torch.dtype, device: str, grad: bool = True) -> Tensor:
    """Normal random numbers, made where they are used: a CPU takes seconds for what a GPU reads in microseconds."""
    return torch.randn(shape, dtype=dtype, device=device).requires_grad_(grad)


def liger(module: str, function: str, *options) -> Callable:
    """Liger-Kernel's autograd function as a peer, called as function(**inputs); imported when it is called."""

    def call(**inputs: Tensor) -> Tensor:
        found = getattr(importlib.import_module(f"liger_kernel.ops.{module}"), function)
        return found.apply(*inputs.values(), *options)

    return call


def operator_workload(
    function: Callable,
    eager: Callable,
    inputs: testing.Inputs,
    others: dict[str, Callable] | None = None,
    peers: dict[str, Callable] | None = None,
) -> Workload:
    """A workload of functions called as function(**inputs); others are timed always, peers by name."""
    functions = {"eager": eager, "pyllm": function, **(others or {})}
    return Workload(
        {name: partial(f, **inputs) for name, f in functions.items()},
        [t for t in inputs.values() if t is not None and t.requires_grad],
        partial(testing.check, function, inputs),
        {name: partial(f, **inputs) for name, f in (peers or {}).items()},
    )
