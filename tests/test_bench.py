"""The benchmarks' own correctness: peers compute the same, work is counted right, drift cancels, red has no time."""

import resource
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import pyllm
from pyllm import cli
from pyllm.backend import Implementation
from pyllm.benchmarks import measure, timing
from pyllm.benchmarks.catalogue import BENCHMARKS
from pyllm.ops.softmax import SOFTMAX

TINY = [
    measure.Case(benchmark, benchmark.tiny, "fp64", benchmark.passes[-1], variant)
    for benchmark in BENCHMARKS.values()
    for variant in benchmark.variants
]
# post-norm, the layers' default, has dropout 0.1
DETERMINISTIC = [
    case for case in TINY if "dropout 0.1" not in case.variant and case.variant not in ("post-norm", "pre-norm")
]


def tensors(outputs) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
def test_peers_compute_what_pyllm_computes(case):
    workload = case.workload()
    results = {}
    with pyllm.use_backend("reference"):
        for name, call in workload.calls.items():
            torch.manual_seed(1)  # of the cotangents
            results[name] = tensors(call())
            if case.direction == "both":
                results[name] += measure.staged(call, workload.leaves, "both")()
    torch.testing.assert_close(results["eager"], results["pyllm"])


@pytest.mark.parametrize("case", TINY, ids=str)
def test_every_case_is_measured(case):
    (result,) = measure.measure(case, "reference", peers=(), quick=True)
    assert result.problem is None and result.backend == "reference" and not result.fresh_pages
    assert min(result.seconds.values()) > 0 and result.ratio["eager"] == 1.0
    assert result.rate > 0 and result.share > 0


@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
def test_work_is_counted_as_the_tensors_and_products_tell(case):
    workload, shape = case.workload(), case.shape
    if case.benchmark.name == "attention_decode":
        caches = [t for name, t in workload.calls["eager"].keywords.items() if "cache" in name]
        assert case.benchmark.moved(shape)[0] == sum(t.numel() for t in caches)
    elif case.benchmark.moved:
        outputs = tensors(workload.calls["eager"]())
        elements = sum(t.numel() for t in [*workload.leaves, *outputs] if t.dim() == len(shape))
        read_half = shape[0] * shape[1] * shape[2] / 2 if case.variant == "causal" else 0
        assert case.benchmark.moved(shape, **case.options)[0] == elements - read_half
    else:
        # What is packed, only the packed call computes; the reference's products are those of the sequences.
        which = "pyllm" if "varlen" in case.benchmark.name else "eager"
        with pyllm.use_backend("reference"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
            workload.calls[which]()
        causal = 0.5 if case.variant == "causal" else 1.0  # which the counter does not know
        assert case.benchmark.flops(shape, **case.options)[0] == forward.get_total_flops() * causal


def test_peak_memory_is_that_of_the_call():
    x = torch.randn(2**12)
    assert 0 <= timing.peak_memory(lambda: ((x * 2) + 1) * 3, "cpu") - 2 * x.nbytes < 64  # and the numbers 1, 2, 3
    assert timing.peak_memory(lambda: None, "cpu") == 0


def test_drift_cancels_and_the_ratio_is_paired(monkeypatch):
    costs = {"eager": 3.0, "pyllm": 2.0}
    slots = []

    def clock(call, repeats):
        slots.append(call())
        return costs[call()] + 0.01 * len(slots)  # the machine gets slower and slower

    monkeypatch.setattr(timing, "_cpu_seconds", clock)
    times = timing.paired({name: partial(str, name) for name in costs}, "cpu", rounds=5)
    assert slots[-6:] == ["eager", "pyllm", "eager", "eager", "pyllm", "eager"]
    assert times.spread == pytest.approx(0.0, abs=1e-12)
    drift = 0.01 * (len(slots) - 14.5)  # in the middle of the third of five rounds
    assert times.seconds == pytest.approx({"eager": 3.0 + drift, "pyllm": 2.0 + drift})
    assert times.ratio["pyllm"] == pytest.approx((3.0 + drift) / (2.0 + drift))


class Event:
    """A CUDA event on a clock that calls and erasures set forward."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def elapsed_time(self, end):
        return end.at - self.at


def test_gpu_clocks(monkeypatch):
    def advance(milliseconds):
        Event.now += milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    synchronized = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: synchronized.append(True))
    monkeypatch.setattr(timing, "_l2_eraser", lambda: type("Cache", (), {"zero_": lambda _: advance(100.0)})())
    assert timing.seconds(lambda: advance(2.0), "cuda", 5) == pytest.approx(2e-3)
    calls = []
    assert 0 < timing._gpu_wall_seconds(lambda: calls.append(True), 7) < 1e-2
    assert len(calls) == 7 and len(synchronized) == 3
    times = timing.paired({"eager": lambda: advance(3.0), "pyllm": lambda: advance(2.0)}, "cuda", rounds=3, slot=1e-6)
    assert times.ratio["pyllm"] == pytest.approx(1.5) and times.seconds["pyllm"] == pytest.approx(2e-3)


def test_a_red_case_has_no_time(monkeypatch, capsys):
    wrong = Implementation(lambda x, *options: 1.01 * torch.softmax(x, -1))
    monkeypatch.setitem(SOFTMAX.implementations, "torch", wrong)
    case = measure.Case(BENCHMARKS["softmax"], (1, 8, 8), "fp32", "forward")
    (result,) = measure.measure(case, "torch", peers=(), quick=True)
    assert "output 0" in result.problem and not result.seconds and result.rate is None
    assert cli.main(["bench", "softmax", "--quick", "--backend", "torch", "--variant", ""]) == 1
    assert capsys.readouterr().out.count("RED: output 0") == 6


def test_compiled_peer():
    case = measure.Case(BENCHMARKS["rms_norm"], (4, 64), "fp32", "backward")
    (result,) = measure.measure(case, "reference", quick=True)
    assert set(result.seconds) == {"eager", "pyllm", "compile"}


def test_peers_by_name():
    case = measure.Case(BENCHMARKS["rms_norm"], (4, 64), "fp32", "both")
    (result,) = measure.measure(case, "reference", peers=("torch", "liger", "sdpa-flash"), quick=True)
    assert set(result.seconds) == set(result.memory) == {"eager", "pyllm", "torch"}
    assert result.backend == "reference" and "liger_kernel" in result.refused["liger"]
    attention = measure.Case(BENCHMARKS["attention"], (1, 1, 8, 16), "fp32", "forward")
    (result,) = measure.measure(attention, "reference", peers=("sdpa-flash", "sdpa-cudnn", "native"), quick=True)
    assert set(result.seconds) >= {"eager", "pyllm", "sdpa-flash"} and set(result.refused) >= {"sdpa-cudnn"}


@pytest.mark.parametrize("variant", ["", "causal"])
def test_flex_attention_is_a_peer(variant):
    workload = measure.Case(BENCHMARKS["attention"], (1, 2, 128, 16), "fp32", "forward", variant).workload()
    flex = workload.peer("flex")
    tensors = {name: t.detach() for name, t in flex.keywords.items()}  # it has no gradient on the CPU
    torch.testing.assert_close(flex.func(*flex.args, **tensors), workload.calls["eager"]())


def test_warm_allocator_keeps_pages():
    size = 40 * 2**20

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(3):
            torch.ones(size, dtype=torch.uint8)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    if timing.warm_allocator(4 * size):
        warm = faults()
        timing.warm_allocator(0)
        assert warm < 100 < faults()
