"""pyllm check: what it runs through; a wrong kernel is found, also one that ends its process, and is no default."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import pyllm
from pyllm import backend, check, cli, ops, verdicts
from pyllm.attention_cases import CASES
from pyllm.kernels.attention_tiles import TILES, target_of
from pyllm.ops.softmax import SOFTMAX

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def own_verdicts(monkeypatch, tmp_path):
    """A machine on which nothing was checked, and whose verdicts are forgotten after the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(backend, "_plans", {})
    monkeypatch.setattr(verdicts, "_assumed", False)
    verdicts.forget()
    yield
    verdicts.forget()


def replaced(monkeypatch, wrong) -> None:
    """Makes wrong(native's run, its arguments) the native softmax."""
    right = SOFTMAX.implementations["native"]
    planted = replace(right, run=lambda *args: wrong(right.run, *args))
    monkeypatch.setitem(SOFTMAX.implementations, "native", planted)


def softmax_choice():
    (choice,) = pyllm.explain(ops.softmax, torch.randn(3, 4))
    return choice


def test_a_wrong_kernel_is_found_and_no_default(monkeypatch, capsys, tmp_path):
    file = tmp_path / "new" / "check.json"
    arguments = ["check", "--device", "cpu", "--op", "softmax", "--op", "rms_norm", "--backend", "native"]
    with monkeypatch.context() as planted:
        replaced(planted, lambda run, *args: run(*args) * (1 + 1e-2))
        assert softmax_choice().backend == "native"
        assert cli.main([*arguments, "--json", str(file)]) == 1
        told = capsys.readouterr().out
        assert "FAILED" in told and "softmax on native: softmax 5x63 fp32: output 0: " in told
        assert "times the error budget" in told and "1 of 2 passed" in told
        written = json.loads(file.read_text())["verdicts"]
        assert not written["softmax native"]["passed"] and written["softmax native"]["worst"] > check.FAR
        assert written["rms_norm native"]["passed"] and written["rms_norm native"]["cases"] > 5
        choice = softmax_choice()
        assert choice.backend == "torch"
        assert "backend 'native' cannot run softmax: it failed `pyllm check` on this device" in choice.reason
        (other,) = pyllm.explain(ops.rms_norm, torch.randn(3, 4))
        assert other.backend == "native"
        with pyllm.use_backend("native"):
            assert softmax_choice().backend == "native", "by name it runs"
        cli.main(["doctor"])
        assert "1 kernels passed, failed: softmax native" in " ".join(capsys.readouterr().out.split())
    assert cli.main(arguments) == 0
    assert softmax_choice().backend == "native", "a later verdict replaces the earlier"


def test_a_compiled_graph_obeys_the_verdict():
    verdicts.save(CPU, {"softmax native": {"passed": False}})
    x = torch.randn(3, 8)
    compiled = torch.compile(lambda x: ops.softmax(x).sin(), fullgraph=True, backend="aot_eager")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.testing.assert_close(compiled(x), x.softmax(-1).sin())
    called = {event.key for event in profile.key_averages()}
    assert "aten::sin" in called and "pyllm::softmax_fwd" not in called


def test_a_gradient_alone_that_is_wrong_is_found(monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy * 1.05

    replaced(monkeypatch, lambda run, *args: Wrong.apply(run(*args)))
    verdict = check.gather(check.here(["native", "torch"], "cpu", ["softmax"]))
    assert "gradient of x" in verdict["softmax", "native"].problem
    assert verdict["softmax", "torch"].passed


def test_a_kernel_that_raises_does_not_stop_the_others(monkeypatch):
    def broken(run, *args):
        raise RuntimeError("no image for this device\nand more")

    replaced(monkeypatch, broken)
    verdict = check.gather(check.here(["native"], "cpu", ["softmax", "rms_norm"]))
    assert verdict["softmax", "native"].problem == "softmax 5x63 fp32: RuntimeError: no image for this device"
    assert verdict["rms_norm", "native"].passed


def test_an_element_that_is_not_written_is_found(monkeypatch):
    def forgetful(run, *args):
        y = torch.empty_like(run(*args))
        return y.flatten().index_copy(0, torch.arange(y.numel() - 1), run(*args).flatten()[:-1]).view(y.shape)

    replaced(monkeypatch, forgetful)
    verdict = check.gather(check.here(["native"], "cpu", ["softmax"]))
    assert verdict["softmax", "native"].worst == float("inf")


@pytest.mark.parametrize("ratios, passed", [([1.5, 0.9], True), ([1.5, 1.2, 3.9], False), ([9.0], False)])
def test_what_exceeds_the_budget_by_little_is_drawn_anew(monkeypatch, ratios, passed):
    seen = []

    def exceeded(call, name, inputs, truth, seed):
        seen.append(inputs["x"])
        ratio = ratios[len(seen) - 1]
        return (f"{ratio} times the error budget" if ratio > 1 else None), ratio

    monkeypatch.setattr(check, "_exceeded", exceeded)
    call = next(call for call in check.calls("native", "cpu") if call.op == "softmax")
    (one,) = check.compare({"native": replace(call, dtypes=(torch.float32,))}, "cpu")
    assert (one.problem is None, one.draws, one.ratio) == (passed, len(ratios), max(ratios))
    assert len({x.sum().item() for x in seen}) == len(ratios), "other inputs"


# What another process runs, in which the native softmax ends it, hangs it, or raises.
PROCESS = """
import os, sys, time, dataclasses
from pyllm import check
from pyllm.ops.softmax import SOFTMAX
def wrong(*args):
    {fault}
SOFTMAX.implementations["native"] = dataclasses.replace(SOFTMAX.implementations["native"], run=wrong)
check.serve(sys.argv[1])
"""


@pytest.mark.parametrize(
    "fault, told",
    [
        ("os.kill(os.getpid(), 11)", "exit code -11"),
        pytest.param("time.sleep(60)", "no result within 20 s", marks=pytest.mark.slow),
        ("raise RuntimeError('an illegal access')", "an illegal access"),
    ],
)
def test_a_call_that_ends_its_process_is_wrong_and_the_others_are_checked(fault, told, monkeypatch):
    monkeypatch.setattr(check, "_command", lambda: [sys.executable, "-c", PROCESS.format(fault=fault)])
    monkeypatch.setattr(check, "SILENCE", 20)
    plan, ask = check.calls("native", "cpu"), check._Worker.ask
    few = [next(call for call in plan if call.op == op) for op in ("softmax", "rms_norm", "rotary")]
    monkeypatch.setattr(check, "calls", lambda name, device: few)
    # The other process has all calls.
    monkeypatch.setattr(check._Worker, "ask", lambda self, name, index: ask(self, name, plan.index(few[index])))
    verdict = check.gather(check.apart(["native"], "cpu", [call.op for call in few], 1))
    assert told in verdict["softmax", "native"].problem
    assert verdict["rms_norm", "native"].passed and verdict["rotary", "native"].passed


def test_every_operator_with_kernels_is_checked_in_every_dtype():
    modules = [module for name, module in sys.modules.items() if name.startswith("pyllm.ops.")]
    values = [value for module in modules for value in vars(module).values()]
    operators = {value.name for value in values if isinstance(value, backend.Operator)}
    assert set(check.operators()) == operators
    for name in operators:
        dtypes = {dtype for call in check.calls("native", "cpu") if call.op == name for dtype in call.dtypes}
        assert {torch.float32, torch.bfloat16, torch.float16} <= dtypes
        assert torch.float64 in dtypes or name == "attention_decode"


@pytest.mark.parametrize("name, dtype", [("native", torch.float16), ("triton", torch.bfloat16)])
def test_attention_on_a_gpu_is_checked_in_both_modes_at_every_head_dim(name, dtype):
    plan = [call for call in check.calls(name, "cuda") if call.op == "attention" and "weights" not in call.name]
    assert {case.name for case in CASES} <= {call.name for call in plan}
    assert all(dtype in call.dtypes for call in plan)
    assert {mode for call in plan for mode in call.deterministic} == {False, True}
    masked = [call for call in plan if call.name.startswith("head-dim-") and call.name.endswith("masked")]
    assert {call.inputs(dtype, "cpu")["query"].shape[-1] for call in masked} == {40, 64, 72, 80, 96, 128, 192, 256}
    assert all(call.deterministic == (False, True) for call in (plan if name == "native" else masked))
    assert all("key_padding_mask" in call.inputs(dtype, "cpu") for call in masked)


def test_strided_inputs_lie_between_nan():
    call = next(call for call in check.calls("native", "cpu") if call.name == "rms_norm 33x1000")
    x = call.inputs(torch.float32, "cpu")["x"]
    assert x.stride() == (1003, 1) and x.storage_offset() == 1 and x.requires_grad and x.isfinite().all()


# --- the default ---


@pytest.fixture
def gpu(monkeypatch):
    """A GPU on which both backends of kernels can run, as far as the selector sees."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "New GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(backend, "refusal", lambda op, name, place, dtype: None)
    monkeypatch.setattr(verdicts, "_driver", lambda: "580.1")
    monkeypatch.setattr(verdicts, "proven", lambda: frozenset())
    caches = (verdicts.key, target_of)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def tried(op="softmax"):
    """(reason, why not) by backend, in the order in which they are tried."""
    backend.forget()
    ((_, _, candidates),) = backend._plan(op, CUDA, torch.bfloat16, True, None)
    return {name: (reason, why) for name, reason, why in candidates}


def test_on_a_gpu_where_nothing_was_checked_pytorchs_kernels_come_first(gpu):
    plan = tried()
    assert list(plan) == ["torch", "native", "triton", "reference"]
    assert all(why is None for _, why in plan.values())
    for name in ("torch", "native", "triton"):
        assert "run `pyllm check` to use pyllm's kernels here" in plan[name][0]
    assert "pyllm check" not in plan["reference"][0]
    ((_, _, (asked,)),) = backend._plan("softmax", CUDA, torch.bfloat16, True, "native")
    assert asked == ("native", "asked for", None)


def test_kernels_that_cannot_run_there_are_no_reason_to_check(gpu, monkeypatch):
    kernels = verdicts.KERNELS
    monkeypatch.setattr(backend, "refusal", lambda op, name, *_: "not installed" if name in kernels else None)
    assert list(tried()) == ["native", "triton", "torch", "reference"]
    assert tried()["torch"] == ("preferred, not measured on this device", None)


def test_a_kernel_that_passed_is_the_default_again(gpu):
    verdicts.save(CUDA, {"softmax triton": {"passed": True}})
    assert list(tried()) == ["triton", "torch", "native", "reference"]
    verdicts.save(CUDA, {"softmax native": {"passed": True}})
    plan = tried()
    assert list(plan) == ["native", "triton", "torch", "reference"]
    assert plan["native"] == ("preferred, not measured on this device", None)
    assert list(tried("rms_norm")) == ["torch", "native", "triton", "reference"], "another operator's"


def test_a_kernel_that_failed_is_passed_over(gpu):
    verdicts.save(CUDA, {"softmax native": {"passed": False}, "softmax triton": {"passed": True}})
    plan = tried()
    assert plan["native"][1] == "it failed `pyllm check` on this device" and plan["triton"][1] is None
    assert list(plan) == ["native", "triton", "torch", "reference"]


def test_a_proven_architecture_needs_no_check(gpu, monkeypatch):
    monkeypatch.setattr(verdicts, "proven", lambda: frozenset({("sm_90", "native")}))
    assert list(tried()) == ["native", "torch", "triton", "reference"]
    verdicts.save(CUDA, {"softmax native": {"passed": False}})
    assert tried()["native"][1] is not None, "this machine's own verdict counts more"


def test_a_measured_row_does_not_make_an_unchecked_kernel_the_default(gpu, monkeypatch):
    row = pyllm.dispatch.Row("New GPU", "softmax", "both", "bfloat16", 0, 64, "triton", 1.5, "torch", "x")
    monkeypatch.setattr(pyllm.dispatch, "table", lambda: [row])

    def candidates():
        backend.forget()
        (_, elements, found), _ = backend._plan("softmax", CUDA, torch.bfloat16, True, None)
        assert elements == 64
        return found

    assert [name for name, *_ in candidates()] == ["torch", "triton", "native", "reference"]
    verdicts.save(CUDA, {"softmax triton": {"passed": True}})
    assert candidates()[0][0] == "triton" and candidates()[0][1].startswith("measured on New GPU")


@pytest.mark.parametrize("change", ["name", "driver", "torch", "build"])
def test_a_verdict_is_of_one_device_driver_and_build(gpu, monkeypatch, change):
    verdicts.save(CUDA, {"softmax native": {"passed": True}})
    assert verdicts.standing("softmax", "native", CUDA) == "passed"
    changes = {
        "name": (torch.cuda, "get_device_name", lambda device=None: "Newer GPU"),
        "driver": (verdicts, "_driver", lambda: "590.1"),
        "torch": (torch, "__version__", "3.0"),
        "build": (verdicts, "build", lambda device: "0.2.0 abc"),
    }
    monkeypatch.setattr(*changes[change])
    verdicts.key.cache_clear()
    assert verdicts.standing("softmax", "native", CUDA) is None
    assert verdicts.standing("softmax", "native", CPU) is None


def test_a_new_library_is_another_build(monkeypatch, tmp_path):
    """Of its own device, and whenever it was copied here."""
    builds = []
    for name in ("PATH", "CUDA_PATH"):
        monkeypatch.setattr(pyllm._library, name, tmp_path / name)
    for contents in ("one", "two", "one"):
        (tmp_path / "CUDA_PATH").write_text(contents)
        verdicts.build.cache_clear()
        builds.append((verdicts.build("cpu"), verdicts.build("cuda")))
    verdicts.build.cache_clear()
    assert builds[0] == builds[2] and builds[0][0] == builds[1][0] and builds[0][1] != builds[1][1]
    assert builds[0][0].startswith(pyllm.__version__)


def test_kernels_are_assumed_to_have_passed_where_they_are_tested_and_timed(gpu):
    verdicts.save(CUDA, {"softmax native": {"passed": False}})
    verdicts.assume(True)
    assert list(tried()) == ["native", "triton", "torch", "reference"] and tried()["native"][1] is None


def test_without_a_place_to_keep_them_there_are_no_verdicts(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    backend.forget()
    assert softmax_choice().backend == "native"
    assert cli.main(["check", "--device", "cpu", "--op", "rotary", "--backend", "torch"]) == 0
    assert "not kept: " in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "[]", '{"here": {"softmax native": {"passed": 1}}}', '{"here": 3}'])
def test_a_file_that_holds_something_else_is_an_error_of_the_first_call(text):
    verdicts.path().parent.mkdir(parents=True, exist_ok=True)
    verdicts.path().write_text(text)
    if text == "{":
        assert subprocess.run([sys.executable, "-c", "import pyllm"]).returncode == 0
    backend.forget()
    with pytest.raises(ValueError, match=r"check\.json: holds no verdicts of pyllm check: delete it"):
        ops.softmax(torch.randn(3, 4))


def test_proven_architectures_are_ones_that_kernels_are_compiled_for():
    assert all(architecture in TILES and name in verdicts.KERNELS for architecture, name in verdicts.proven())


def test_bad_arguments(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        cli.main(["check", "--op", "gelu"])
    assert "unknown operator 'gelu': expected attention, attention_decode" in capsys.readouterr().err
    monkeypatch.setattr(check, "unavailable", lambda name, place: "it was left at home")
    assert cli.main(["check", "--backend", "native"]) == 1
    assert "not checked: native: it was left at home" in capsys.readouterr().out


@pytest.mark.slow
def test_every_kernel_passes_here(capsys):
    assert cli.main(["check", "--device", "cpu", "--backend", "native", "--backend", "torch"]) == 0, capsys.readouterr()
