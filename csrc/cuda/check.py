"""Compiles every CUDA kernel for every architecture, without a GPU, and gates what the compiler made of it.

    python csrc/cuda/check.py [--out docs/cuda.md]

builds libpyllm_cuda.so with the nvcc of this machine, or with PyPI's in an environment of its own, reads registers,
stack and instructions of each kernel from the machine code, writes the table as Markdown, and exits with 1 if a kernel
spills, has a stack frame in local memory, lacks 128-bit accesses, or if an architecture is missing.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "pyllm" / "libpyllm_cuda.so"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")
COMPILER = [f"nvidia-{part}==13.0.*" for part in ("cuda-nvcc", "cuda-runtime", "cuda-crt", "nvvm", "cuda-cccl")]
DTYPES = {"float": "fp32", "__half": "fp16", "__nv_bfloat16": "bf16"}
NARROW = ("column_sum",)  # a warp reads 32 columns of a row of partial sums, whose width may be odd
FEWEST_REGISTERS = 16  # no kernel here does its work in fewer


@dataclass(frozen=True)
class Row:
    """A kernel on one architecture, or the worst of its instances for a dtype. Bytes of stack, local memory and spills
    are per thread, of static shared memory per block; loads and stores are 128-bit instructions."""

    kernel: str
    dtypes: str
    architecture: str
    registers: int
    stack: int = 0
    shared: int = 0
    local_accesses: int = 0
    loads: int = 0
    stores: int = 0
    instances: int = 1


def verdict(row: Row) -> str | None:
    """Why the gate refuses this row, or None if it does not."""
    if row.stack or row.local_accesses:
        return f"spills: {row.stack} B of local memory a thread, {row.local_accesses} accesses to it"
    if row.registers < FEWEST_REGISTERS:
        return f"has only {row.registers} registers: its body was optimised away"
    if row.kernel not in NARROW and not (row.loads and row.stores):
        return "has no 128-bit loads or stores"
    return None


def parse(resources: str, sass: str) -> list[Row]:
    """A row for each kernel and architecture, from what cuobjdump prints with --dump-resource-usage and -sass."""
    instructions = {}
    for architecture, symbol, body in _by_function(sass, r"\tcode for (\S+)", r"\t\tFunction : (\S+)"):
        instructions[architecture, symbol] = (
            len(re.findall(r"\b(?:LDL|STL)\b", body)),
            len(re.findall(r"\bLDG\.[\w.]*\b128\b", body)),
            len(re.findall(r"\bSTG\.[\w.]*\b128\b", body)),
        )
    rows = []
    for architecture, symbol, body in _by_function(resources, r"arch = (\S+)", r" Function (\S+):"):
        registers, stack, shared, local = (
            int(re.search(rf"\b{field}:(\d+)", body)[1]) for field in ("REG", "STACK", "SHARED", "LOCAL")
        )
        local_accesses, loads, stores = instructions[architecture, symbol]
        rows.append(Row(symbol, "", architecture, registers, stack + local, shared, local_accesses, loads, stores))
    names = _demangled([row.kernel for row in rows])
    return [replace(row, kernel=kernel, dtypes=dtypes) for row, (kernel, dtypes) in zip(rows, names, strict=True)]


def _by_function(text: str, architecture: str, function: str) -> Iterator[tuple[str, str, str]]:
    """(architecture, symbol, text) of each function of a listing with headings for both."""
    for part in re.split(rf"^(?={architecture})", text, flags=re.MULTILINE):
        if heading := re.match(architecture, part):
            for body in re.split(rf"^(?={function})", part, flags=re.MULTILINE):
                if symbol := re.match(function, body):
                    yield heading[1], symbol[1], body


def _demangled(symbols: Sequence[str]) -> list[tuple[str, str]]:
    """(kernel, dtypes) of each mangled instance of a template."""
    told = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    names = []
    for line in told.splitlines():
        name, arguments = re.search(r"(\w+)(?:<(.*?)>)?\(", line).groups()
        dtypes = [DTYPES[a] for a in re.split(r", ", arguments or "") if a in DTYPES]
        names.append((name, " ".join(dict.fromkeys(dtypes)) or "any"))
    return names


def worst(rows: Iterable[Row]) -> list[Row]:
    """One row for each kernel, dtype and architecture: the most of what is bad, the least of what is good."""

    def key(row: Row) -> tuple:
        return row.kernel, row.dtypes, ARCHITECTURES.index(row.architecture)

    summary = []
    for _, group in groupby(sorted(rows, key=key), key):
        instances = list(group)
        most = {f: max(getattr(r, f) for r in instances) for f in ("registers", "stack", "shared", "local_accesses")}
        least = {f: min(getattr(r, f) for r in instances) for f in ("loads", "stores")}
        summary.append(replace(instances[0], **most, **least, instances=len(instances)))
    return summary


def markdown(rows: Sequence[Row], compiler: str) -> str:
    lines = [
        "# CUDA kernels, compiled",
        "",
        f"Written by `make check-cuda` with {compiler}, without a GPU. What compiles here has not thereby run: see",
        "[verified.md](verified.md). A line is the worst of a kernel's instances for a dtype (of x and of the residual",
        "stream): most registers a thread, bytes of local memory a thread (spills and stack frames) and of static",
        "shared memory a block (1 KiB is the system's own); fewest 128-bit loads and stores of global memory among its",
        "instructions. What is asked for at launch comes on top: less than 1 KiB for reductions, and up to 4 KiB for",
        "sums of columns.",
        "",
        f"{sum(row.instances for row in rows)} kernels; none may use local memory.",
        "",
        "| kernel | dtypes | architecture | instances | registers | local | shared | loads | stores |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        cells = (r.kernel, r.dtypes, r.architecture, r.instances, r.registers, r.stack, r.shared, r.loads, r.stores)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def nvcc_folder() -> Path:
    """Where nvcc is: on the path, in CUDA_HOME, or installed from PyPI for this purpose."""
    at_home = os.path.join(os.environ.get("CUDA_HOME", ""), "bin")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=at_home)
    if found:
        return Path(found).parent
    environment = ROOT / "build" / "nvcc"
    if not list(environment.rglob("nvcc")):
        venv.create(environment, with_pip=True, clear=True)
        subprocess.run([environment / "bin" / "pip", "install", "--quiet", *COMPILER], check=True)
    return next(path for path in environment.rglob("bin/nvcc") if path.is_file()).parent


def build(nvcc: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYLLM_CUDA_ARCHS"}
    environment |= {"PYLLM_CUDA": "1", "PATH": f"{nvcc}{os.pathsep}{environment['PATH']}"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def cuobjdump(*options: str) -> str:
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    return subprocess.run([tool, *options, LIBRARY], capture_output=True, text=True, check=True).stdout


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write the Markdown table")
    arguments = parser.parse_args(argv)
    nvcc = nvcc_folder()
    build(nvcc)
    rows = parse(cuobjdump("--dump-resource-usage"), cuobjdump("-sass"))
    release = subprocess.run([nvcc / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    compiler = "nvcc " + re.search(r"V([\d.]+)", release)[1]
    if arguments.out:
        arguments.out.write_text(markdown(worst(rows), compiler))
    problems = [f"{row.kernel} [{row.dtypes}] {row.architecture}: {why}" for row in rows if (why := verdict(row))]
    problems += [f"{a} was not compiled" for a in ARCHITECTURES if all(row.architecture != a for row in rows)]
    print(f"{len(rows)} kernels by {compiler}, {len(problems)} refused")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
