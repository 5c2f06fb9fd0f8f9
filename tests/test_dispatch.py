"""The default choice: the measured table, the size brackets, what is passed over, and what a compiled graph sees."""

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import pyllm
from pyllm import backend, dispatch, ops
from pyllm.ops.activation import ACTIVATION
from pyllm.ops.attention import ATTENTION
from pyllm.ops.attention_decode import ATTENTION_DECODE
from pyllm.ops.dropout_add import DROPOUT_ADD
from pyllm.ops.norm import ADD_LAYER_NORM, ADD_RMS_NORM, LAYER_NORM, RMS_NORM
from pyllm.ops.softmax import LOG_SOFTMAX, SOFTMAX

OPERATORS = {op.name: op for op in (ATTENTION, ATTENTION_DECODE, ADD_LAYER_NORM, ADD_RMS_NORM, LAYER_NORM, RMS_NORM)}
OPERATORS |= {op.name: op for op in (SOFTMAX, LOG_SOFTMAX, ACTIVATION, DROPOUT_ADD)}
CUDA = torch.device("cuda", 0)


@pytest.fixture
def plans(monkeypatch):
    """Plans are worked out anew in the test, and forgotten after it."""
    monkeypatch.setattr(backend, "_plans", {})


@pytest.fixture
def measured(plans, monkeypatch):
    """Makes this machine's table: (operator, direction, width, elements, backend), all of float32."""

    def write(*rows):
        here = dispatch.device_name(torch.device("cpu"))
        table = [dispatch.Row(here, op, way, "float32", *rest, 1.25, "native", "a test") for op, way, *rest in rows]
        monkeypatch.setattr(dispatch, "table", lambda: table)

    return write


def chosen(x, grad=True):
    with torch.set_grad_enabled(grad):
        (choice,) = pyllm.explain(ops.softmax, x)
    return choice


def test_an_architectures_estimates_hold_until_a_device_is_measured(monkeypatch):
    def row(device, backend):
        return dispatch.Row(device, "attention", "both", "bfloat16", 0, 0, backend, 1.1, "native", "a test")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: "NVIDIA H100")
    rows = [row("sm_90", "torch"), row("sm_100", "triton")]
    monkeypatch.setattr(dispatch, "table", lambda: rows)
    (found,) = dispatch.rows("attention", CUDA, torch.bfloat16, "both")
    assert str(found) == "estimated for sm_90, not measured on this device: a test" and found.backend == "torch"
    rows.append(row("NVIDIA H100", "native"))
    (found,) = dispatch.rows("attention", CUDA, torch.bfloat16, "both")
    assert found.backend == "native" and str(found).startswith("measured on NVIDIA H100: 1.10 x native's speed")


def test_the_shipped_estimates_leave_attention_to_pytorch_where_it_serves_the_call(monkeypatch):
    monkeypatch.setattr(dispatch, "device_name", lambda place: "NVIDIA H100")
    monkeypatch.setattr(dispatch, "architecture", lambda place: "sm_90")
    for dtype, backends in ((torch.bfloat16, ["torch"]), (torch.float16, ["torch"]), (torch.float32, [])):
        for direction in ("forward", "both"):
            assert [row.backend for row in dispatch.rows("attention", CUDA, dtype, direction)] == backends


def test_the_table_rules_by_size_and_pass(measured):
    """The width counts first: at 39 x 100 there are rows for a smaller width with more elements."""
    measured(
        ("softmax", "both", 0, 0, "reference"),
        ("softmax", "both", 100, 4000, "torch"),
        ("softmax", "both", 0, 1000, "torch"),
        ("softmax", "both", 100, 0, "reference"),
        ("softmax", "forward", 0, 0, "torch"),
    )
    by_shape = {(2, 99): "reference", (1000,): "reference", (10, 99): "reference", (20, 50): "torch", (20, 99): "torch"}
    by_shape |= {(1, 100): "reference", (39, 100): "reference", (40, 100): "torch"}
    for shape, name in by_shape.items():
        assert chosen(torch.randn(shape)).backend == name, shape
        assert chosen(torch.randn(shape), grad=False).backend == "torch", shape
    choice = chosen(torch.randn(40, 100))
    assert choice.reason.startswith("measured on ") and "1.25 x native's speed or more (a test)" in choice.reason


def test_what_the_table_names_and_cannot_run_is_passed_over(measured):
    measured(("softmax", "both", 0, 0, "torch"))
    x = torch.randn(3, 4)
    (choice,) = pyllm.explain(lambda: ops.softmax(x, attn_mask=x > 0))
    assert choice.backend in ("native", "reference")
    assert choice.reason.startswith("preferred next") and "backend 'torch' cannot run softmax: a mask" in choice.reason


def test_without_a_row_the_default_says_that_nothing_was_measured(measured):
    measured(("softmax", "both", 0, 500, "torch"))
    for x in (torch.randn(3, 4), torch.randn(99, 9).double()):
        assert chosen(x).reason.startswith("preferred, not measured on this device")
    assert chosen(torch.randn(99, 9)).backend == "torch"


def test_an_override_is_above_the_table(measured):
    measured(("softmax", "both", 0, 0, "torch"))
    with pyllm.use_backend("reference"):
        assert (chosen(torch.randn(3, 4)).backend, chosen(torch.randn(3, 4)).reason) == ("reference", "asked for")


def test_a_compiled_graph_follows_the_table(measured):
    measured(("softmax", "both", 0, 0, "torch"), ("softmax", "both", 0, 100, "reference"))

    def function(x):
        return ops.softmax(x, scale=0.5).sin()

    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=graphs)
    counts = []
    for rows in (3, 5, 9, 10, 15, 30, 4):  # 10 elements each
        x = torch.randn(rows, 10)
        assert torch.equal(compiled(x), function(x)), rows
        counts.append(graphs.frame_count)
    assert counts == [1, 1, 1, 2, 2, 2, 2], "one graph for each side of the bracket"
    with torch.no_grad():
        assert torch.equal(compiled(x), function(x)) and graphs.frame_count == 3, "one for the other pass"


ROW = dispatch.Row("GPU, of 2 parts", "softmax", "both", "bfloat16", 0, 64, "triton", 1.5, "torch", "x, y")


def can_be_followed(row: dispatch.Row) -> bool:
    names = OPERATORS[row.operator].implementations if row.operator in OPERATORS else ()
    known = row.backend in names and row.rival in names and row.rival != row.backend
    sized = min(row.width, row.elements) >= 0 and row.ratio > 1 and bool(row.device and row.source)
    dtype = getattr(torch, row.dtype, None)
    return known and sized and row.direction in ("forward", "both") and isinstance(dtype, torch.dtype)


def test_the_committed_table_is_one_that_select_can_follow():
    assert all(map(can_be_followed, (ROW, *dispatch.read(dispatch.PATH))))
    wrong = {
        "operator": "sofmax",
        "direction": "back",
        "dtype": "bf16",
        "width": -1,
        "backend": "cudnn",
        "rival": "triton",
    }
    for name, value in (wrong | {"ratio": 0.9, "source": ""}).items():
        assert not can_be_followed(replace(ROW, **{name: value})), name


def test_a_table_is_read_as_it_was_written(tmp_path):
    dispatch.write(tmp_path / "table.csv", [ROW])
    assert dispatch.read(tmp_path / "table.csv") == [ROW]
    with open(dispatch.PATH) as committed, open(tmp_path / "table.csv") as written:
        assert next(csv.reader(committed)) == next(csv.reader(written))


# --- native on CUDA, of which only a GPU shows the rest ---


@pytest.fixture
def gpu(monkeypatch, tmp_path, plans):
    """A PyTorch that believes to have CUDA and an sm_75, and a CUDA library that is no library."""
    monkeypatch.setattr(pyllm._library, "error", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    binary = SimpleNamespace(cuda_serves=lambda capability: capability >= 80, cuda_architectures=lambda: ["sm_80", "x"])
    monkeypatch.setattr(pyllm, "_C", binary, raising=False)
    monkeypatch.setattr(pyllm._library, "CUDA_PATH", tmp_path / "libpyllm_cuda.so")
    (tmp_path / "libpyllm_cuda.so").write_text("no library")
    pyllm._library._cuda_library_error.cache_clear()
    yield tmp_path / "libpyllm_cuda.so"
    pyllm._library._cuda_library_error.cache_clear()


def test_why_native_cannot_run_on_cuda(gpu, monkeypatch):
    def why():
        pyllm._library._cuda_library_error.cache_clear()
        return pyllm.backends("cuda")["native"]

    assert "libpyllm_cuda.so does not load: " in why() and ".so: " in why()
    monkeypatch.setattr(pyllm._library, "_load", lambda path, shared: None)
    assert why() == (
        "Old GPU is an sm_75, and libpyllm_cuda.so has kernels for sm_80, x only: reinstall pyllm with "
        "PYLLM_CUDA_ARCHS=75"
    )
    with monkeypatch.context() as served:
        served.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert why() is None
    with monkeypatch.context() as other_python:
        other_python.delattr(pyllm, "_C")
        other_python.setitem(sys.modules, "pyllm._C", None)
        assert why() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no CUDA device" in why()
    gpu.unlink()
    assert "not built: reinstall pyllm with nvcc on the path" in why()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "has no CUDA: install a build of it that has" in why()
    monkeypatch.setattr(pyllm._library, "error", "left at home")
    assert why() == "left at home"


def test_native_on_cuda_serves_what_it_has_kernels_for(gpu, monkeypatch):
    monkeypatch.setattr(pyllm._library, "cuda_error", lambda device: None)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: "softmax" in name)

    def candidates(op, dtype):
        ((_, _, tried),) = backend._make_plan(op, CUDA, dtype, True, None)
        return {name: why for name, _, why in tried}

    assert list(candidates("softmax", torch.bfloat16)) == ["native", "triton", "torch", "reference"]
    assert candidates("softmax", torch.bfloat16)["native"] is None
    assert "take no float64" in candidates("softmax", torch.float64)["native"]
    assert candidates("attention", torch.bfloat16) == {
        "native": "it has no CUDA C++ kernel",
        "triton": pyllm._library.triton_error("cuda"),
        "torch": None,
        "reference": None,
    }
    ((_, _, ((_, reason, why),)),) = backend._make_plan("attention", CUDA, torch.float16, True, "native")
    assert (reason, why) == ("asked for", "it has no CUDA C++ kernel")


@pytest.mark.slow
def test_the_gpu_tests_are_collected_where_there_is_a_gpu():
    code = (
        "import sys, pytest, torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "import pyllm\n"
        "pyllm._library.cuda_error = lambda device: None\n"
        "torch.cuda.device_count = lambda: 1\n"
        "torch.cuda.get_device_capability = lambda device=None: (9, 0)\n"
        "sys.exit(pytest.main(['-m', 'gpu', '--collect-only', '-p', 'no:cacheprovider']))\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    files = {line.split("::")[0] for line in tests}
    assert {f"tests/test_{n}.py" for n in ("cuda", "rows", "norm", "attention", "registration")} <= files
    assert "tests/test_bench.py" not in files
    backends = [next(name for name in (*backend.BACKENDS, "") if f"{name}-cuda" in line or not name) for line in tests]
    assert [*dict.fromkeys(backends)][:3] == ["native", "triton", "torch"] and backends.count("native") > 2000
    assert tests[0].startswith("tests/test_cuda.py::")
    assert sum("test_attention_on_tensor_cores" in line and "deterministic" in line for line in tests) > 100


def test_a_refusal_is_found_behind_a_compilers_error():
    """Which skips the tests of what the CUDA C++ kernels do not have, and nothing else."""

    def raised(first: Exception, then: Exception | None) -> Exception:
        try:
            try:
                raise first
            except Exception as error:
                raise then or first from error
        except Exception as error:
            return error

    why = "backend 'native' cannot run activation: it has no CUDA C++ kernel"
    assert conftest.refused(backend.CannotRun(why)) == why
    assert conftest.refused(raised(backend.CannotRun(why), RuntimeError("compiler"))) == why
    assert conftest.refused(RuntimeError(f"Unsupported: CannotRun: {why}\nfrom user code")) == why
    assert conftest.refused(RuntimeError("CUDA error: an illegal memory access")) is None
    assert conftest.refused(raised(backend.CannotRun(why), AssertionError("another message was expected"))) is None


def test_import_leaves_the_cuda_library_alone():
    code = "import pyllm\nassert 'pyllm_cuda' not in open('/proc/self/maps').read()"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_settings_of_the_backend_are_nested():
    """Each context gives back what was there before it, an exception or not; a call stays."""
    names = [None, "reference", "torch", "reference", None]
    seen = []

    def inside(rest):
        if rest:
            with pyllm.use_backend(rest[0]):
                seen.append(backend.asked())
                inside(rest[1:])
                seen.append(backend.asked())

    before = backend.asked()
    inside(names)
    assert seen == [*names, *reversed(names)] and backend.asked() == before
    with pytest.raises(KeyError), pyllm.use_backend("torch"), pyllm.use_backend("reference"):
        raise KeyError
    assert backend.asked() == before
    with pyllm.use_backend("torch"):
        with pytest.raises(ValueError, match="unknown backend"):
            pyllm.use_backend("cudnn")
        assert backend.asked() == "torch"
