"""Links the CPU library with its AMX kernels compiled against the model of AMX in cpu/amx.h here."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "build" / "native"
BUILD = ROOT / "build" / "amx_model"
# All bindings too: each may bring the inline function that asks for the instruction set, and the linker keeps one.
MODELLED = re.compile(r"\w+\.o|\w+\.amx\.o")


def why_not() -> str | None:
    """What is missing to build it here, or None."""
    if not (NATIVE / "attention_pairs_kernel.amx.o").exists():
        return "not built from this checkout, or not for x86-64"
    return None if importlib.util.find_spec("ninja") else "ninja is not installed"


def build() -> Path:
    """The library: built as the real one, with the model's header before the real one's."""
    BUILD.mkdir(parents=True, exist_ok=True)
    text = (
        (NATIVE / "build.ninja").read_text().replace("= $cxx $cflags", f"= $cxx -I{Path(__file__).parent} $cflags", 1)
    )
    compiled, rest = text.split("build libpyllm_cpu.so: link ")
    linked = rest[: rest.index("\nbuild ")].replace("$\n", "")
    linked = re.sub(r"\S+\.o\b", lambda o: o[0] if MODELLED.fullmatch(o[0]) else str(NATIVE / o[0]), linked)
    (BUILD / "build.ninja").write_text(f"{compiled}build model.so: link {linked}\n")
    command = [sys.executable, "-m", "ninja", "-C", str(BUILD), "model.so"]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return BUILD / "model.so"
