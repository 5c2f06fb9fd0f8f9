"""What is known of the kernels on a device: where the project has run them, and what `pyllm check` found there.

proven.csv names the architectures on which the project's own tests have passed with a backend's kernels. A machine's
verdicts lie in check.json in the cache directory, by device, driver and versions: a kernel that passed may be the
default as a proven one may, one that failed may not. Read at the first call of an operator, not at import.
"""

import csv
import functools
import hashlib
import json
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from pyllm import _library, dispatch

PROVEN = Path(__file__).parent / "proven.csv"
KERNELS = ("native", "triton")  # the backends whose kernels are this project's
ADVICE = "run `pyllm check` to use pyllm's kernels here"
KEPT = 32  # devices and versions, the latest


def path() -> Path:
    from pyllm.kernels.attention_tiles import cache  # not at import, which loads no kernels

    return cache() / "check.json"


_assumed = False


def assume(passed: bool) -> None:
    """Whether every kernel counts as one that has passed, whatever is known of it: for what tests or times them all."""
    global _assumed
    _assumed = passed


def standing(operator: str, backend: str, place: torch.device) -> str | None:
    """ "passed", "failed", or None where a backend's kernel of an operator was never checked on a device like this."""
    if _assumed:
        return "passed"
    verdict = of(place).get(f"{operator} {backend}")
    if verdict is not None:
        return "passed" if verdict["passed"] else "failed"
    return "passed" if (dispatch.architecture(place), backend) in proven() else None


def is_trusted(operator: str, backend: str, place: torch.device) -> bool:
    """Whether a backend may be a default: on a CPU until a check fails, on a GPU once one has passed."""
    if backend not in KERNELS:
        return True
    state = standing(operator, backend, place)
    return state == "passed" or (state is None and place.type != "cuda")


@functools.cache
def proven() -> frozenset[tuple[str, str]]:
    """(architecture, backend) pairs of proven.csv."""
    with open(PROVEN, newline="") as file:
        return frozenset((line["architecture"], line["backend"]) for line in csv.DictReader(file))


def of(place: torch.device) -> dict[str, dict]:
    """The verdicts of a device as it is now, by "operator backend"."""
    return _kept().get(key(place), {}) if _kept() else {}


@functools.cache
def _kept() -> dict[str, dict[str, dict]]:
    """The verdicts of all devices and versions; none where there is no file. Raises ValueError if it holds another."""
    try:
        text = path().read_text()
    except (OSError, RuntimeError):  # no such file, or no home to have one in
        return {}
    try:
        kept = json.loads(text)
        assert all(isinstance(one["passed"], bool) for verdicts in kept.values() for one in verdicts.values())
    except (ValueError, AssertionError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path()}: holds no verdicts of pyllm check: delete it") from error
    return kept


def save(place: torch.device, found: dict[str, dict]) -> Path:
    """Adds verdicts by "operator backend" to those of a device, at once for readers. Raises OSError."""
    forget()
    kept = dict(_kept())
    kept[key(place)] = kept.pop(key(place), {}) | found  # the latest last
    target = path()
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(dict(list(kept.items())[-KEPT:]), indent=1) + "\n")
    fresh.replace(target)
    forget()
    return target


def forget() -> None:
    """What was read from the file is read anew."""
    _kept.cache_clear()


@functools.cache
def key(place: torch.device) -> str:
    """All that a verdict holds for: device, driver, instruction set, versions, and the build of the kernels."""
    build_here = build("cpu" if place.type == "cpu" else "cuda")
    parts = [device_name(place), f"torch {torch.__version__}", f"triton {_triton_version()}", f"pyllm {build_here}"]
    return ", ".join(parts)


def device_name(place: torch.device) -> str:
    """A GPU with its driver, or a processor with the instruction set that the kernels use."""
    if place.type != "cpu":
        return f"{dispatch.device_name(place)}, driver {_driver()}"
    build = _library.facts()
    try:
        isa = "unknown instructions" if build is None else build.cpu_isa()
    except RuntimeError:  # PYLLM_CPU_ISA names what this processor has not
        isa = "no instruction set"
    return f"{dispatch.processor()}, {isa}"


def _driver() -> str:
    """The version of NVIDIA's driver; without its file, the one of CUDA that it serves."""
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)?", file.read_text()) if file.exists() else None
    if found:
        return found[0]
    return str(torch._C._cuda_getDriverVersion()) if hasattr(torch._C, "_cuda_getDriverVersion") else "unknown"


def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


@functools.cache
def build(device: str) -> str:
    """The version, and a digest of the kernels for a kind of device, Triton's sources and the library."""
    import pyllm

    library = _library.PATH if device == "cpu" else _library.CUDA_PATH
    digest = hashlib.sha256(platform.machine().encode())
    for file in [*sorted((Path(__file__).parent / "kernels").glob("*.py")), library]:
        digest.update(file.read_bytes() if file.exists() else b"none")
    return f"{pyllm.__version__} {digest.hexdigest()[:12]}"
