"""pyllm doctor: on one screen, what is installed, what can be used, and why anything is missing."""

import importlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import pyllm
from pyllm import _library, dispatch, verdicts
from pyllm.backend import BACKENDS, backends

# What kernels look for, on x86 and Arm.
FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_fp16")
FEATURES += ("amx_tile", "amx_bf16", "asimd", "bf16", "i8mm", "sve")


def main(console: Console) -> int:
    """Prints the report; nothing that is missing is an error, so the exit code is 0."""
    facts = Table.grid(padding=(0, 2))
    for name, value in [*_versions(), *_compiled_part(), *_devices(), _defaults(), _checked(), *_settings()]:
        facts.add_row(f"[bold]{name}[/]", escape(value))
    console.print(facts)
    usable = Table("backend", "on cpu", "on cuda", title="Backends", title_justify="left")
    no_device = None if torch.cuda.is_available() else "torch sees no device"
    for name in BACKENDS:
        problems = (backends("cpu")[name], backends("cuda")[name] or no_device)
        usable.add_row(name, *(escape(problem or "usable") for problem in problems))
    console.print(usable)
    return 0


def _versions() -> list[tuple[str, str]]:
    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    return [
        ("pyllm", f"{pyllm.__version__} in {os.path.dirname(pyllm.__file__)}"),
        ("python", f"{platform.python_version()}, {platform.platform()}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}"),
        ("triton", installed("triton")),
    ]


def _compiled_part() -> list[tuple[str, str]]:
    """The binary's facts from pyllm._C, or why there are none."""
    rows = [("CPU library", _library.error or f"loaded, {_library.PATH.name}")]
    try:
        binary = importlib.import_module("pyllm._C")
    except ModuleNotFoundError:
        return [*rows, ("build", "not compiled: a C++ compiler is needed when pyllm is installed")]
    except ImportError as error:
        return [*rows, ("build", f"pyllm._C does not load: {error}")]
    info = binary.build_info()
    sets = ", ".join(info["instruction_sets"])
    rows.append(("build", f"compiler {info['compiler']}, headers of torch {info['torch']}, CPU kernels for {sets}"))
    rows.append(("CUDA kernels", ", ".join(binary.cuda_architectures()) or "none in this build"))
    try:
        isa = binary.cpu_isa()
    except RuntimeError as error:  # PYLLM_CPU_ISA names what this processor has not
        isa = str(error)
    return [*rows, ("CPU kernels use", isa)]


def _devices() -> list[tuple[str, str]]:
    capability = torch.backends.cpu.get_cpu_capability()
    rows = [
        ("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads, torch uses {capability}"),
        ("cpu features", " ".join(name for name in FEATURES if name in _cpu_flags()) or "unknown on this system"),
    ]
    if not torch.cuda.is_available():
        return [*rows, ("cuda", "torch sees no device")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        rows.append((f"cuda:{index}", f"{device.name}, sm_{device.major}{device.minor}, {memory}"))
    return rows


def _defaults() -> tuple[str, str]:
    """Where the default backends are measured ones."""
    measured = {row.device for row in dispatch.table()}
    known = [place for place in _places() if dispatch.device_name(torch.device(place)) in measured]
    return "defaults", f"measured on {', '.join(known)}" if known else "not measured on these devices"


def _checked() -> tuple[str, str]:
    """What `pyllm check` has found on these devices, with this driver and these versions."""
    told = []
    for place in _places():
        found = verdicts.of(torch.device(place))
        failed = [name for name, one in found.items() if not one["passed"]]
        state = f"{len(found) - len(failed)} kernels passed" if found else "never checked: run `pyllm check`"
        told.append(f"{place}: {state}" + (f", failed: {', '.join(failed)}" if failed else ""))
    return "pyllm check", "; ".join(told)


def _places() -> list[str]:
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def _cpu_flags() -> set[str]:
    """The processor's features as Linux names them."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}


def _settings() -> list[tuple[str, str]]:
    names = ("PYLLM_BACKEND", "PYLLM_CPU_ISA", "TRITON_INTERPRET", "OMP_NUM_THREADS")
    values = [f"{name}={os.environ[name]}" for name in names if os.environ.get(name)]
    return [("environment", " ".join(values) or "none of " + ", ".join(names))]
