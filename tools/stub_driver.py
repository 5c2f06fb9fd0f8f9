"""Triton's real compiler, binder and launcher on CPU tensors, over a stub of libcuda: no number is computed.

    import stub_driver            # before anything is launched, and without TRITON_INTERPRET
    stub_driver.launches()        # how many kernels were launched
    stub_driver.microseconds(f)   # what a call of f costs the host

As a plugin of pytest it runs the tests of Triton's kernels for what the interpreter cannot show, whether all compiles
and is accepted for launch; outcomes of tests count for nothing:

    PYTHONPATH=tools python -m pytest -p stub_driver -k triton tests/test_attention.py

prints what failed to compile or to launch, and exits with 1 if anything did. tools/launches.py runs it on all of them.
"""

import collections
import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime.jit import JITFunction

TARGET, CAPABILITY, PROCESSORS = "sm_90", (9, 0), 132


def _build() -> ctypes.CDLL:
    """The stub as a library, where Triton looks for libcuda."""
    folder = tempfile.mkdtemp(prefix="stub_driver_")
    library = f"{folder}/libcuda.so.1"
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = Path(__file__).with_suffix(".c")
    command = ["cc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-I", headers, "-o", library, source]
    subprocess.run(command, check=True)
    os.symlink(library, f"{folder}/libcuda.so")
    os.environ["TRITON_LIBCUDA_PATH"] = folder
    return ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)


class _Driver(CudaDriver):
    def __init__(self):
        super().__init__()
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None
        self.get_device_capability = lambda device=0: CAPABILITY
        self.get_current_stream = lambda device=0: 0


_library = _build()
triton.runtime.driver.set_active(_Driver())

import pyllm
from pyllm import backend
from pyllm.kernels import _common, attention, attention_decode, attention_tiles, norm, rows

# CPU tensors may reach Triton's kernels, which take them for those of a GPU.
pyllm._library._triton_interpreted = True
for _module in (attention_tiles, attention, attention_decode):
    _module.target_of = lambda device: TARGET
for _module in (_common, attention_decode, norm, rows):
    if hasattr(_module, "processors"):
        _module.processors = lambda device: PROCESSORS

failures: dict[tuple[str, str], list[str]] = collections.OrderedDict()  # (kernel, error): where
compiled: list[tuple[str, float]] = []  # (kernel, seconds)
_test = ""


def launches() -> int:
    return ctypes.c_long.in_dll(_library, "stub_launches").value


def grid() -> list[int]:
    """The last launch's."""
    return list((ctypes.c_uint * 3).in_dll(_library, "stub_grid"))


def microseconds(call: Callable, number: int = 300) -> float:
    """Of the host, a call: the least of several averages."""
    for _ in range(10):
        call()
    return 1e6 * min(_seconds(call, number) for _ in range(5)) / number


def _seconds(call: Callable, number: int) -> float:
    start = time.perf_counter()
    for _ in range(number):
        call()
    return time.perf_counter() - start


def _noted(method: str) -> Callable:
    """JITFunction.method, whose failures are listed."""
    original = getattr(JITFunction, method)

    def call(self, *args, **kwargs):
        start = time.perf_counter()
        try:
            result = original(self, *args, **kwargs)
        except Exception as error:
            key = (self.__name__, (str(error).strip() or repr(error)).splitlines()[0][:160])
            tests = failures.setdefault(key, [])
            if _test not in tests:
                tests.append(_test)
            raise
        if method == "_do_compile":
            compiled.append((self.__name__, time.perf_counter() - start))
        return result

    return call


JITFunction._do_compile = _noted("_do_compile")
JITFunction.run = _noted("run")


# --- as a plugin of pytest ---


def pytest_configure(config):
    import pyllm.testing

    backend.use_backend(None)
    torch.manual_seed(0)
    pyllm.testing.check = lambda function, inputs, name, seed=0, **_: pyllm.testing.evaluate(
        function, inputs, name, seed
    )
    pyllm.testing.assert_within_budget = lambda *_, **__: None


def pytest_runtest_setup(item):
    global _test
    _test = item.nodeid


def pytest_sessionfinish(session, exitstatus):
    session.exitstatus = 1 if failures or not compiled else 0


def pytest_terminal_summary(terminalreporter):
    seconds = sum(seconds for _, seconds in compiled)
    terminalreporter.write_line(
        f"stub driver, Triton {triton.__version__}: {len(compiled)} compilations in {seconds:.0f} s, "
        f"{launches()} launches, {len(failures)} failures"
    )
    for (kernel, error), tests in failures.items():
        terminalreporter.write_line(f"{kernel}: {error} ({len(tests)} tests, {tests[0]})")
