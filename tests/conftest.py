"""Backends and devices under test. Without a GPU, Triton's kernels run in its interpreter."""

import functools
import gc
import os
import pathlib
import re
import types
from collections import OrderedDict
from collections.abc import Iterator

# All of this has to be in the environment before torch, triton or pyllm are imported.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

import pyllm
import pyllm.testing
import pyllm.verdicts
from pyllm.backend import CannotRun

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
if DEVICES == ["cpu"]:
    # PyTorch's own keeps a formatted traceback of every call, for each kind of device that it may find later.
    torch.manual_seed = torch.default_generator.manual_seed
TARGETS = [
    pytest.param((name, device), id=f"{name}-{device}")
    for device in DEVICES
    for name, why in pyllm.backends(device).items()
    if why is None
]
# The reference compared with itself says nothing: test_reference.py compares it with torch.
COMPARED = [t for t in TARGETS if t.values[0][0] != "reference"]
WITHOUT_TORCH = [t for t in TARGETS if t.values[0][0] != "torch"]  # whose kernels serve few of an operator's calls
KERNELS = [t for t in COMPARED if t.values[0][0] != "torch"]
# What `make test` leaves to CI: the interpreter computes in float32, and both take their time.
SLOW_DTYPES = {
    "triton": {torch.float16, torch.bfloat16, torch.float64},
    "cuda_host": {torch.float16, torch.float64},
}
# Of layers and of PyTorch's machinery, on kernels that other files run through the interpreter.
INTERPRETED_IN_CI = ("blocks", "derivatives", "empty_sizes", "generation", "layers", "memory_plan", "registration")
INTERPRETED_IN_CI += ("saved_tensors",)
# What runs first on a GPU, where time is short: the kernels by themselves, those of CUDA C++ before those that compile.
FIRST_ON_CUDA = ("cuda", "attention", "attention_decode", "norm", "softmax", "rows", "attention_features")
BACKENDS_ON_CUDA = ("native", "triton", "torch", "reference")


def interpreted_in_ci(targets: list) -> list:
    """The targets, the one of Triton's interpreter marked slow: for tests whose cases others have run through it."""
    return [
        pytest.param(*t.values, id=t.id, marks=[*t.marks, pytest.mark.slow]) if t.values[0] == ("triton", "cpu") else t
        for t in targets
    ]


collect_ignore = [] if "cuda" in DEVICES else ["test_cuda.py"]


@pytest.fixture(params=TARGETS)
def target(request) -> tuple[str, str]:
    """(backend, device), each pair that this machine can run."""
    return request.param


@pytest.fixture(scope="module")
def one_thread():
    """For modules with tiny tensors: the threads of each worker would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nan_filled_outputs():
    """Uninitialised memory holds NaN, so that an element that a kernel forgets is seen; gradients are repeatable."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """Collections do not look through what a module finds: thousands of tests, all of torch, what was compiled."""
    gc.collect()
    gc.freeze()


def fingerprint(value) -> object:
    """Equal for values that a call cannot tell apart; an object that shows but its address is equal to itself alone."""
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return value.shape, value.stride(), value.dtype, value.device, value.requires_grad, content
    if isinstance(value, functools.partial):
        return fingerprint((value.func, value.args, value.keywords))
    if isinstance(value, types.MethodType):
        return fingerprint((value.__func__, value.__self__))
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__code__, fingerprint((value.__defaults__, value.__kwdefaults__, cells))
    if isinstance(value, torch.nn.Module):  # itself alone, as long as it trains or does not
        return value, tuple(module.training for module in value.modules())
    if isinstance(value, dict):
        return tuple((name, fingerprint(v)) for name, v in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(fingerprint, value))
    return type(value), repr(value)


@pytest.fixture(scope="session", autouse=True)
def one_truth_for_all_targets():
    """What `check` compares with is not the backend's, and takes most of its time: of the last calls it is kept."""
    expected, known = pyllm.testing._expected, OrderedDict()

    def kept(function, inputs, seed):
        state = torch.are_deterministic_algorithms_enabled(), torch.is_autocast_enabled("cpu")
        key = fingerprint((function, inputs, seed, state))
        if key not in known:
            known[key] = expected(function, inputs, seed)
            if len(known) > 64:
                known.popitem(last=False)
        return known[key]

    pyllm.testing._expected = kept
    yield
    pyllm.testing._expected = expected


def pytest_addoption(parser):
    parser.addoption("--ledger", metavar="FILE", help="write each file's worst error ratio by target")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks: gpu; slow, where kernels are interpreted or run on a model, in dtypes whose code others share, for finite
    differences, and with faults in them."""
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if parameters.get("device") == "cuda" or "cuda" in parameters.get("target", ()):
            item.add_marker("gpu")
        interpreted, name = parameters.get("target") == ("triton", "cpu"), item.path.stem.removeprefix("test_")
        if interpreted and (name in INTERPRETED_IN_CI or item.originalname == "test_gradcheck"):
            item.add_marker("slow")
        if item.originalname == "test_planted_faults_are_caught":
            item.add_marker("slow")
        left = SLOW_DTYPES["triton"] if interpreted else set()
        left = SLOW_DTYPES["cuda_host"] if name.startswith("cuda_") else left
        if not left.isdisjoint(_dtypes(parameters.values())):
            item.add_marker("slow")
    if "cuda" in DEVICES:
        items.sort(key=_turn_on_cuda)


def _turn_on_cuda(item) -> tuple[int, int]:
    target = item.callspec.params.get("target", ()) if hasattr(item, "callspec") else ()
    backend = target[0] if "cuda" in target else None
    name = item.path.stem.removeprefix("test_")
    return (
        BACKENDS_ON_CUDA.index(backend) if backend in BACKENDS_ON_CUDA else len(BACKENDS_ON_CUDA),
        FIRST_ON_CUDA.index(name) if name in FIRST_ON_CUDA else len(FIRST_ON_CUDA),
    )


def _dtypes(values) -> Iterator[torch.dtype]:
    """The dtypes among a test's parameters."""
    for value in values:
        if isinstance(value, torch.dtype):
            yield value
        elif isinstance(value, tuple):
            yield from _dtypes(value)


def pytest_configure(config):
    pyllm.verdicts.assume(True)  # the default is what it is where `pyllm check` has passed
    config.worst_ratio = {}
    if config.getoption("--ledger"):
        pyllm.testing.LEAST_DRAWS = pyllm.testing.DRAWS


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    pyllm.testing.observed.clear()
    target = getattr(item, "callspec", None) and item.callspec.params.get("target")
    try:
        result = yield
    except Exception as error:
        refusal = refused(error)
        if target == ("native", "cuda") and refusal:  # test_cuda.py says what it has
            pytest.skip(refusal)
        raise
    if target and pyllm.testing.observed:
        _note(item.config, {f"{item.path.stem} {target[0]} {target[1]}": max(pyllm.testing.observed)})
    return result


def refused(error: BaseException | None) -> str | None:
    """Why a backend cannot run, if that is what an error tells, or what a compiler made its own error of."""
    while error is not None and not isinstance(error, AssertionError):  # of a test that has looked at a refusal
        if isinstance(error, CannotRun):
            return str(error)
        found = re.search(r"CannotRun\W+(backend 'native' cannot run [^\n]+)", str(error))
        if found:
            return found[1]
        error = error.__cause__ or error.__context__
    return None


def _note(config, ratios: dict[str, float]) -> None:
    for key, ratio in ratios.items():
        config.worst_ratio[key] = max(config.worst_ratio.get(key, 0.0), ratio)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    _note(node.config, getattr(node, "workeroutput", {}).get("worst_ratio", {}))


def pytest_sessionfinish(session):
    config, path = session.config, session.config.getoption("--ledger")
    if hasattr(config, "workeroutput"):  # a worker of xdist
        config.workeroutput["worst_ratio"] = config.worst_ratio
    elif path:
        lines = [f"{key} {ratio:.2f}" for key, ratio in sorted(config.worst_ratio.items())]
        pathlib.Path(path).write_text("\n".join(lines) + "\n")
