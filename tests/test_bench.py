"""The benchmarks' own correctness: peers compute the same, work is counted right, drift cancels, red has no time."""

import resource
from functools import partial

import pytest
import taped_graphs
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import pyllm
from pyllm import cli
from pyllm.backend import Implementation
from pyllm.benchmarks import layers, lengths, measure, timing
from pyllm.benchmarks.catalogue import BENCHMARKS
from pyllm.ops.softmax import SOFTMAX

TINY = [
    measure.Case(benchmark, benchmark.tiny, "fp64", benchmark.passes[-1], variant)
    for benchmark in BENCHMARKS.values()
    for variant in benchmark.variants
]
DETERMINISTIC = [
    case
    for case in TINY
    if not any(case.options.get(name) for name in ("dropout", "dropout_p"))  # the draws differ
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
            if workload.used is not None:
                results[name] = [output.masked_fill(~workload.used, 0.0) for output in results[name]]
            if case.direction == "both":
                results[name] += workload.staged(call, "both")()
    torch.testing.assert_close(results["eager"], results["pyllm"])


@pytest.mark.parametrize("lengths", ["full", "half padded"])
@pytest.mark.parametrize("layer", [name for name, layer in layers.LAYERS.items() if layer.hf])
def test_hugging_faces_layer_computes_what_pyllms_computes(layer, lengths):
    workload = layers.LAYERS[layer].build((3, 8, 256), torch.float64, "cpu", lengths=lengths)
    results = []
    for call in (workload.calls["pyllm"], workload.late["hf"]()):
        output = call()
        torch.manual_seed(1)  # of the cotangents
        gradient, *_ = workload.staged(call, "both")()
        used = torch.ones(()).bool() if workload.used is None else workload.used
        results.append([output.masked_fill(~used, 0.0), gradient])
    torch.testing.assert_close(*results, rtol=0.0, atol=1e-5)  # some of its norms are in fp32


def test_padding_gets_no_gradient_and_inference_is_in_evaluation_mode():
    inference, training = (
        measure.Case(BENCHMARKS["bert_layer"], (4, 8, 64), "fp32", way, "half padded") for way in ("forward", "both")
    )
    assert not any(module.training for module in inference.workload().modules)
    workload = training.workload()
    assert all(module.training for module in workload.modules)
    gradient, *_ = workload.staged(workload.calls["pyllm"], "both")()
    assert workload.used.sum() == sum(lengths.half_padded(4, 8)) == 17
    assert torch.equal(gradient.any(-1), workload.used[..., 0])


def test_step_is_the_optimisers_too_and_leaves_the_weights():
    case = measure.Case(BENCHMARKS["bert_layer"], (2, 8, 64), "fp32", "step", "full")
    workload = case.workload()
    before = [leaf.detach().clone() for leaf in workload.leaves]
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        workload.staged(workload.calls["pyllm"], "step")()
    assert any("fused_adamw" in event.key for event in profiler.key_averages())
    assert all(map(torch.equal, before, workload.leaves)) and not any(leaf.grad is not None for leaf in workload.leaves)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["both", "step", "forward"])
def test_graphed_layers_are_a_peer(direction, monkeypatch):
    case = measure.Case(BENCHMARKS["gpt2_block"], (2, 8, 64), "fp32", direction, "half padded")
    (result,) = measure.measure(case, "reference", peers=("graphed",), quick=True)
    assert result.problem is None and "CUDA graphs need" in result.refused["graphed"]
    taped_graphs.install(monkeypatch)
    (result,) = measure.measure(case, "reference", peers=("graphed",), quick=True)
    assert result.problem is None and not result.refused and result.seconds["graphed"] > 0


@pytest.mark.slow
def test_autocast_is_of_fp32_parameters():
    case = measure.Case(BENCHMARKS["llama_block"], (2, 8, 64), measure.AUTOCAST, "both", "full")
    (result,) = measure.measure(case, "reference", peers=("hf",), quick=True)
    assert result.problem is None and set(result.seconds) == {"eager", "pyllm", "hf", "all", "recompute"}
    workload = case.workload()
    assert {leaf.dtype for leaf in workload.leaves} == {torch.float32}
    assert workload.calls["pyllm"]().dtype == torch.float32  # the residual stream


def test_distributions_of_lengths():
    assert lengths.half_padded(8, 256)[-1] == lengths.log_normal(8, 256)[-1] == 256
    assert sum(lengths.half_padded(8, 256)) == pytest.approx(4 * 256, abs=4)
    assert lengths.log_normal(16, 512) == sorted(lengths.log_normal(16, 512)) and min(lengths.log_normal(16, 512)) > 40
    assert lengths.half_padded(1, 9) == lengths.log_normal(1, 9) == [9]
    assert lengths.padding([9, 9], 9, "cpu") is None
    assert lengths.padding([1, 3], 3, "cpu").tolist() == [[False, True, True], [False, False, False]]


@pytest.mark.parametrize(
    "case",
    # Of layers the budget is what takes long.
    [pytest.param(c, marks=[pytest.mark.slow] if c.benchmark.autocasts and c.variant != "full" else []) for c in TINY],
    ids=str,
)
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
    elif case.benchmark in layers.BENCHMARKS:
        batch, length, width = shape
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
            workload.calls["eager"]()
        if case.options["lengths"] == "full":
            hidden = 4 * batch * length**2 * width / 2 if layers.LAYERS[case.benchmark.name].causal else 0
            assert case.benchmark.flops(shape, **case.options)[0] == forward.get_total_flops() - hidden
        else:
            assert case.benchmark.flops(shape, **case.options)[0] < forward.get_total_flops()
    else:
        # What is packed, only the packed call computes; the reference's products are those of the sequences.
        which = "pyllm" if "varlen" in case.benchmark.name else "eager"
        with pyllm.use_backend("reference"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
            workload.calls[which]()
        counted = forward.get_total_flops()
        if case.variant == "causal":  # which the counter does not know
            counted /= 2
        assert case.benchmark.flops(shape, **case.options)[0] == counted


def test_peak_memory_is_that_of_the_call():
    x = torch.randn(2**12)
    assert 0 <= timing.peak_memory(lambda: ((x * 2) + 1) * 3, "cpu") - 2 * x.nbytes < 64  # and the numbers 1, 2, 3
    assert timing.peak_memory(lambda: None, "cpu") == 0


@pytest.mark.parametrize("name", ["bert_layer", "gpt2_block"])
def test_saved_memory_is_what_autograd_keeps_of_torchs_layer(name):
    workload = measure.Case(BENCHMARKS[name], (2, 32, 128), "fp32", "both", "full dropout 0").workload()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = workload.calls["eager"]()
    own = {t.untyped_storage().data_ptr() for t in [*workload.leaves, output]}
    expected = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)
    assert 0 <= timing.saved_memory(workload.calls["eager"], "cpu") - expected < 256  # and a few numbers


def test_saved_memory_counts_what_a_function_holds():
    class Holds(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.held = x * 2  # not told to autograd
            return x + 1

        @staticmethod
        def backward(ctx, dy):
            return dy

    x = torch.randn(2**12, requires_grad=True)
    assert 0 <= timing.saved_memory(lambda: Holds.apply(x), "cpu") - x.nbytes < 256
    assert timing.saved_memory(lambda: x + 1, "cpu") < 256


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


@pytest.mark.slow
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
