"""Compiles every CUDA kernel for every architecture, without a GPU, and gates what the compiler made of it.

    python csrc/cuda/check.py [--out docs/cuda.md] [--current docs/cuda.md]

builds libpyllm_cuda.so with the nvcc of this machine, or with PyPI's in an environment of its own, reads registers,
stack and instructions of each kernel from the machine code, and what it is launched with from pyllm._C, writes the
table as Markdown, and exits with 1 if a kernel breaks the rule for its name, or if an architecture is missing. Where
PYLLM_CUDA_ARCHS names some of them, the others are not looked at and no table is written. --current only says whether a
table is of the sources as they are.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "pyllm" / "libpyllm_cuda.so"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")
COMPILER = [f"nvidia-{part}==13.0.*" for part in ("cuda-nvcc", "cuda-runtime", "cuda-crt", "nvvm", "cuda-cccl")]
DTYPES = {"float": "fp32", "__half": "fp16", "__nv_bfloat16": "bf16"}
FEWEST_REGISTERS = 16  # no kernel here does its work in fewer
SMALLEST_SHARED = {"sm_80": 99 << 10}  # of the devices that an architecture's machine code runs on (8.6, 8.9)
SHARED = 227 << 10

# What is counted among a kernel's instructions, and there: in all of them, or in its loops.
COUNTED = {
    "local_accesses": (r"\b(?:LDL|STL)\b", "accesses to local memory", False),
    "loads": (r"\bLDG\.[\w.]*\b128\b", "128-bit loads", False),
    "stores": (r"\bSTG\.[\w.]*\b128\b", "128-bit stores", False),
    "products": (r"\bHMMA\b", "products on tensor cores in its loops (HMMA)", True),
    "copies": (r"\bLDGSTS\b", "asynchronous copies in its loops (LDGSTS)", True),
    "matrices": (r"\bLDSM\b", "loads of matrices in its loops (LDSM)", True),
}


@dataclass(frozen=True)
class Rule:
    """What the kernels of some names must have.

    needs: of COUNTED, at least one each. spills_above: the head_dim above which local memory is reported, not refused.
    """

    kernels: str
    needs: tuple[str, ...] = ("loads", "stores")
    spills_above: int | None = None


# The first one whose pattern is the whole name holds.
RULES = (
    Rule("column_sum", ()),  # a warp reads 32 columns of a row of partial sums, whose width may be odd
    Rule("attention_decode_append", ()),  # a few rows, in pairs of columns that may begin anywhere
    Rule(r"attention_decode\w*"),
    Rule("attention_delta_rows", ("loads",)),  # writes two numbers a row
    Rule("attention_sum_addends"),
    Rule("attention_divide_far_rows"),
    Rule(r"attention_\w+", ("products", "copies", "matrices"), spills_above=128),
    Rule(r"\w+"),
)


@dataclass(frozen=True)
class Row:
    """A kernel on one architecture, or the worst of its instances for a dtype and head_dim.

    Bytes of stack are per thread, with local memory; of shared memory per block: static, and dynamic, as launched. The
    rest is COUNTED.
    """

    kernel: str
    dtypes: str
    architecture: str
    registers: int
    stack: int = 0
    shared: int = 0
    local_accesses: int = 0
    loads: int = 0
    stores: int = 0
    products: int = 0
    copies: int = 0
    matrices: int = 0
    head_dim: int = 0  # 0: not a template of it
    dynamic: int = 0
    instances: int = 1


def verdict(row: Row) -> str | None:
    """Why the gate refuses this row, or None if it does not."""
    rule = next(rule for rule in RULES if re.fullmatch(rule.kernels, row.kernel))
    may_spill = rule.spills_above is not None and row.head_dim > rule.spills_above
    if (row.stack or row.local_accesses) and not may_spill:
        return f"spills: {row.stack} B of local memory a thread, {row.local_accesses} accesses to it"
    if row.registers < FEWEST_REGISTERS:
        return f"has only {row.registers} registers: its body was optimised away"
    if missing := [COUNTED[name][1] for name in rule.needs if not getattr(row, name)]:
        return f"has no {', no '.join(missing)}"
    if "copies" in rule.needs and not row.dynamic:
        return "takes dynamic shared memory of which cuda/shared_memory.h does not tell"
    if row.dynamic > SMALLEST_SHARED.get(row.architecture, SHARED):
        return f"takes {row.dynamic} B of dynamic shared memory, more than some devices have"
    return None


def parse(resources: str, sass: str, dynamic: Mapping[tuple[str, int], int]) -> list[Row]:
    """A row for each kernel and architecture, from what cuobjdump prints with --dump-resource-usage and -sass.

    dynamic: bytes of shared memory by kernel and head_dim.
    """
    counts = {}
    for architecture, symbol, body in _by_function(sass, r"\tcode for (\S+)", r"\t\tFunction : (\S+)"):
        texts = {False: body, True: loops(body)}
        counts[architecture, symbol] = {
            name: len(re.findall(pattern, texts[looped])) for name, (pattern, _, looped) in COUNTED.items()
        }
    rows = []
    for architecture, symbol, body in _by_function(resources, r"arch = (\S+)", r" Function (\S+):"):
        registers, stack, shared, local = (
            int(re.search(rf"\b{field}:(\d+)", body)[1]) for field in ("REG", "STACK", "SHARED", "LOCAL")
        )
        counted = counts[architecture, symbol]
        rows.append(Row(symbol, "", architecture, registers, stack + local, shared, **counted))
    names = _demangled([row.kernel for row in rows])
    return [
        replace(row, kernel=kernel, dtypes=dtypes, head_dim=dim, dynamic=dynamic.get((kernel, dim), 0))
        for row, (kernel, dtypes, dim) in zip(rows, names, strict=True)
    ]


def loops(body: str) -> str:
    """The instructions of a function that a branch goes back over."""
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/(.*)", body, re.MULTILINE)
    ranges = []
    for address, text in lines:
        target = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < int(address, 16):
            ranges.append((int(target[1], 16), int(address, 16)))
    return "\n".join(text for at, text in lines if any(first <= int(at, 16) <= last for first, last in ranges))


def _by_function(text: str, architecture: str, function: str) -> Iterator[tuple[str, str, str]]:
    """(architecture, symbol, text) of each function of a listing with headings for both."""
    for part in re.split(rf"^(?={architecture})", text, flags=re.MULTILINE):
        if heading := re.match(architecture, part):
            for body in re.split(rf"^(?={function})", part, flags=re.MULTILINE):
                if symbol := re.match(function, body):
                    yield heading[1], symbol[1], body


def _demangled(symbols: Sequence[str]) -> list[tuple[str, str, int]]:
    """(kernel, dtypes, head_dim) of each mangled instance of a template, whose first number is its head_dim."""
    told = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    names = []
    for line in told.splitlines():
        name, arguments = re.search(r"(\w+)(?:<(.*?)>)?\(", line).groups()
        words = re.findall(r"\w+", arguments or "")
        dtypes = [DTYPES[word] for word in words if word in DTYPES]
        head_dim = next((int(word) for word in words if word.isdigit()), 0)
        names.append((name, " ".join(dict.fromkeys(dtypes)) or "any", head_dim))
    return names


def worst(rows: Iterable[Row]) -> list[Row]:
    """One row for each kernel, dtype, head_dim and architecture: the most of what is bad, the least of what is good."""
    bad = ("registers", "stack", "shared", "dynamic", "local_accesses")
    good = [name for name in COUNTED if name not in bad]

    def key(row: Row) -> tuple:
        return row.kernel, row.dtypes, row.head_dim, ARCHITECTURES.index(row.architecture)

    summary = []
    for _, group in groupby(sorted(rows, key=key), key):
        instances = list(group)
        most = {f: max(getattr(r, f) for r in instances) for f in bad}
        least = {f: min(getattr(r, f) for r in instances) for f in good}
        summary.append(replace(instances[0], **most, **least, instances=len(instances)))
    return summary


def fingerprint(root: Path = ROOT) -> str:
    """Of all that the kernels are compiled from."""
    digest = hashlib.sha256()
    for path in sorted([root / "setup.py", *root.glob("csrc/*.h"), *root.glob("csrc/cuda/*.*")]):
        digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def markdown(rows: Sequence[Row], compiler: str) -> str:
    lines = [
        "# CUDA kernels, compiled",
        "",
        f"Written by `make check-cuda` with {compiler}, without a GPU. What compiles here has not thereby run: see",
        "[verified.md](verified.md). A line is the worst of a kernel's instances for a dtype (of x and of the residual",
        "stream) and head_dim: most registers a thread, bytes of local memory a thread (spills and stack frames) and",
        "of shared memory a block, static (1 KiB is the system's own) and as launched (not told of row kernels: less",
        "than 1 KiB for reductions, and up to 4 KiB for sums of columns); fewest 128-bit loads and stores of global",
        "memory among its instructions, and of HMMA, LDGSTS (asynchronous copies) and LDSM in its loops.",
        "",
        f"{sum(row.instances for row in rows)} kernels, of sources {fingerprint()}. Only attention of head_dim above "
        "128 may use local memory.",
        "",
        "| kernel | dtypes | head_dim | architecture | instances | registers | local | static | launched "
        "| loads | stores | HMMA | LDGSTS | LDSM |",
        "|---|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        cells = (r.kernel, r.dtypes, r.head_dim or "", r.architecture, r.instances, r.registers, r.stack, r.shared)
        cells += (r.dynamic or "", r.loads, r.stores, r.products or "", r.copies or "", r.matrices or "")
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
    environment = os.environ | {"PYLLM_CUDA": "1", "PATH": f"{nvcc}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYLLM_CUDA_HEAD_DIMS", None)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def cuobjdump(*options: str) -> str:
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    return subprocess.run([tool, *options, LIBRARY], capture_output=True, text=True, check=True).stdout


def dynamic_shared() -> dict[tuple[str, int], int]:
    """What the kernels of csrc/cuda/shared_memory.h are launched with, by kernel and head_dim."""
    from pyllm import _C

    return {(kernel, dim): size for kernel, dim, size in _C.cuda_shared_memory()}


def without_instance() -> list[str]:
    """Functions of pyllm that the library calls and does not have: linking says nothing of them, loading fails."""
    command = ["nm", "--dynamic", "--undefined-only", "--demangle", LIBRARY]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r" U (.*pyllm::cuda::.*)", told)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write the Markdown table")
    parser.add_argument("--current", type=Path, help="exit with 0 where this table is of the sources, with 1 elsewhere")
    arguments = parser.parse_args(argv)
    if arguments.current:
        return int(f"sources {fingerprint()}." not in arguments.current.read_text())
    asked = os.environ.get("PYLLM_CUDA_ARCHS")
    wanted = [f"sm_{a}" for a in re.split(r"[,; ]+", asked)] if asked else ARCHITECTURES
    nvcc = nvcc_folder()
    build(nvcc)
    rows = parse(cuobjdump("--dump-resource-usage"), cuobjdump("-sass"), dynamic_shared())
    release = subprocess.run([nvcc / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    compiler = "nvcc " + re.search(r"V([\d.]+)", release)[1]
    if arguments.out and not asked:
        arguments.out.write_text(markdown(worst(rows), compiler))
    problems = [f"{row.kernel} [{row.dtypes}] {row.architecture}: {why}" for row in rows if (why := verdict(row))]
    problems += [f"{a} was not compiled" for a in wanted if all(row.architecture != a for row in rows)]
    problems += [f"{function} has no instance" for function in without_instance()]
    print(f"{len(rows)} kernels by {compiler}, {len(problems)} refused")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
