"""Compiles every Triton kernel ahead of time, without a GPU, and gates what the compiler reports.

    python -m pyllm.kernels.aot [--out docs/triton.md] [--append] [--targets sm_90 gfx942] [--every N] [--current FILE]

prints a line for each compiled variant, writes the table as Markdown, and exits with 1 if a kernel does not compile,
wants more shared memory than a block may have on the card, or spills more registers than SPILLS has a reason for.
--append adds the table of this version of Triton to what another one has written. --every compiles one variant in N.
--current only says whether a table is of the sources as they are.

Each module named in MODULES offers its kernels through

    def aot_variants(target: str) -> Iterator[tuple[str, JITFunction, dict, dict, dict]]

which yields (variant, kernel, signature, constexprs, options) as the launchers would compile them on `target`, a key of
TARGETS (tile sizes may depend on it). variant: what sets it apart, such as "bf16 N=4096". signature: type of each
argument that is no constexpr, by name: "*bf16", "*i64", "i32", "fp32"; with ":16" after it for a pointer or an integer
that is known to be a multiple of 16, as nearly all are ("*bf16:16"); for a tuple, a tuple of these. constexprs: value
by name, or by (position, position in the tuple, ...), which includes pointers that are None. options: num_warps,
num_stages.
"""

import argparse
import hashlib
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pyllm.kernels._common import map_tuple

MODULES = ("activation", "attention", "attention_decode", "cross_entropy", "dropout_add", "norm", "rotary", "softmax")

# Name: (backend, architecture, lanes in a warp, bytes of shared memory that one block may have).
TARGETS = {
    "sm_80": ("cuda", 80, 32, 166_912),
    "sm_90": ("cuda", 90, 32, 232_448),
    "sm_100": ("cuda", 100, 32, 232_448),
    "sm_120": ("cuda", 120, 32, 101_376),
    "gfx942": ("hip", "gfx942", 64, 65_536),
}

SECTIONS = 2  # of docs/triton.md: one for each Triton of `make check-triton`

# No kernel here does its work in fewer on NVIDIA's; Triton has compiled one to 4, without an error.
FEWEST_REGISTERS = 16


@dataclass(frozen=True)
class Allowance:
    """Spills that are reported, not refused: of kernels, variants, targets (patterns), up to `most` B a thread."""

    kernel: str
    variant: str
    target: str
    most: int
    why: str


SPILLS = (
    Allowance(
        r"attention_\w+", "float64 .*", ".*", 1024, "numbers of two registers; sm_100 has no tensor cores for them"
    ),
    Allowance(
        "attention_bwd_key_kernel",
        "bfloat16 D=128 .*",
        "sm_90",
        320,
        "32 x 128 takes three quarters of the instructions of 32 x 32, which does not spill, and multiplies on wgmma",
    ),
    Allowance(
        "attention_bwd_key_kernel",
        "bfloat16 D=256 .*",
        "sm_90",
        640,
        "dk and dv alone are 128 registers; tiles that do not spill have twice the instructions, and no wgmma",
    ),
    Allowance("attention_bwd_mask_kernel", "bfloat16 D=128 .*", "sm_90", 128, "it has the tiles of dq's, which do not"),
    Allowance("attention_fwd_kernel", "bfloat16 D=256 t5 .*", "sm_90", 32, "a few numbers outside the loop"),
    Allowance(
        "attention_fwd_kernel", "float32 .*", "sm_90", 8, "one number, with Triton 3.6, for one block an SM more"
    ),
    Allowance("(rotary|activation_bwd|norm_bwd)_kernel", ".*", r"sm_\d+", 16, "a number or two, for a block more"),
)


@dataclass(frozen=True)
class Row:
    """One variant on one target. shared: bytes a block; registers: per thread; spills: bytes per thread."""

    kernel: str
    variant: str
    target: str
    shared: int = 0
    registers: int = 0
    spills: int = 0
    error: str = ""


def verdict(row: Row) -> str | None:
    """Why the gate refuses this row, or None if it does not."""
    limit = TARGETS[row.target][3]
    if row.error:
        return f"does not compile: {row.error}"
    if row.shared > limit:
        return f"wants {row.shared:,} B of shared memory, {row.target} has {limit:,}"
    if row.target.startswith("sm_") and row.registers < FEWEST_REGISTERS:
        return f"has only {row.registers} registers: its body was optimised away"
    if row.spills and not allowance(row):
        return f"spills {row.spills} B of registers per thread"
    return None


def allowance(row: Row) -> Allowance | None:
    """Why this row may spill what it spills."""
    for one in SPILLS:
        names = ((one.kernel, row.kernel), (one.variant, row.variant), (one.target, row.target))
        if row.spills <= one.most and all(re.fullmatch(*pair) for pair in names):
            return one
    return None


def _bare(ty: str | tuple) -> str | tuple:
    return map_tuple(_bare, ty) if isinstance(ty, tuple) else ty.removesuffix(":16")


def _leaves(types: tuple, path: tuple = ()) -> Iterator[tuple[tuple, str]]:
    """(path, type) of each argument and of each element of a tuple argument."""
    for i, ty in enumerate(types):
        if isinstance(ty, tuple):
            yield from _leaves(ty, (*path, i))
        else:
            yield (*path, i), ty


def compile_variant(target: str, variant: str, kernel, signature: dict, constexprs: dict, options: dict) -> Row:
    """Compiles one variant, as `aot_variants` yields it, for one target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = [("constexpr" if name in constexprs else signature[name]) for name in kernel.arg_names]
    source = ASTSource(
        fn=kernel,
        signature=dict(zip(kernel.arg_names, map(_bare, types), strict=True)),
        constexprs=constexprs,
        attrs={path: [["tt.divisibility", 16]] for path, ty in _leaves(tuple(types)) if ty.endswith(":16")},
    )
    name = kernel.__name__
    try:
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[target][:3]), options=options)
        registers, spills = _resources(compiled.asm)
    except Exception as problem:  # whatever stops a compiler is a row of the table
        return Row(name, variant, target, error=f"{type(problem).__name__}: {problem}".splitlines()[0])
    return Row(name, variant, target, compiled.metadata.shared, registers, spills)


def _resources(asm: dict) -> tuple[int, int]:
    """(registers, bytes spilled) per thread, from the machine code."""
    if "amdgcn" in asm:
        vector, accumulation, spilled = (
            int(re.search(rf"\.{field}_count:\s+(\d+)", asm["amdgcn"]).group(1))
            for field in ("vgpr", "agpr", "vgpr_spill")
        )
        return max(vector, accumulation), 4 * spilled
    from triton.backends import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups()
    return int(registers), int(stack)


def _compile_module(task: tuple[str, str, int]) -> list[Row]:
    module, target, every = task
    variants: Iterator = importlib.import_module(f"pyllm.kernels.{module}").aot_variants(target)
    # Rows of fp64 are plain arithmetic: one target tells. Attention's have tensor cores of their own on each.
    wanted = (v for v in variants if target == "sm_90" or module.startswith("attention") or "float64" not in v[0])
    return [compile_variant(target, *variant) for variant in islice(wanted, 0, None, every)]


def compile_all(targets: Sequence[str], workers: int = 2, every: int = 1) -> Iterator[Row]:
    """A row for each variant of each module on each target, or for one in `every`."""
    os.environ.pop("TRITON_INTERPRET", None)  # the workers must see compilable kernels, not interpreted ones
    tasks = [(module, target, every) for module in MODULES for target in targets]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for rows in pool.imap(_compile_module, tasks):
            yield from rows


def fingerprint() -> str:
    """Of all that the kernels are compiled from."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def is_current(table: Path) -> bool:
    """Whether a table is of the sources as they are, and nothing in it was refused."""
    text = table.read_text()
    refused = re.findall(r"^\d+ compilations, (\d+) refused\.$", text, re.MULTILINE)
    return f"Of sources {fingerprint()}." in text and refused == ["0"] * SECTIONS


def markdown(rows: Sequence[Row]) -> str:
    limits = "; ".join(f"{name} {limit:,}" for name, (*_, limit) in TARGETS.items())
    lines = [
        "# Triton kernels, compiled ahead of time",
        "",
        "Written by `python -m pyllm.kernels.aot`, without a GPU. What compiles here has not thereby run: see",
        "[verified.md](verified.md). Shared memory is in bytes a block, registers are per thread, spills in bytes per",
        "thread. Bytes of shared memory that a block may have: " + limits + ".",
        "",
        f"Of sources {fingerprint()}.",
        "",
        "Spills that are not refused:",
        "",
        *(f"- `{one.kernel}`, `{one.variant}` on `{one.target}`, up to {one.most} B: {one.why}" for one in SPILLS),
        "",
    ]
    return "\n".join(lines) + section(rows)


def section(rows: Sequence[Row]) -> str:
    """The table of this version of Triton."""
    import triton

    refused = sum(verdict(row) is not None for row in rows)
    lines = [
        "",
        f"## Triton {triton.__version__}",
        "",
        f"{len(rows)} compilations, {refused} refused.",
        "",
        "| kernel | variant | target | shared | registers | spills | verdict |",
        "|---|---|---|--:|--:|--:|---|",
    ]
    for row in rows:
        cells = (
            row.kernel,
            row.variant,
            row.target,
            f"{row.shared:,}",
            row.registers,
            row.spills,
            verdict(row) or ("ok, spills" if row.spills else "ok"),
        )
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pyllm.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write the Markdown table")
    parser.add_argument("--append", action="store_true", help="keep what is there")
    parser.add_argument("--current", type=Path, help="exit with 0 where this table is of the sources, with 1 elsewhere")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--every", type=int, default=1, metavar="N", help="compile one variant in N")
    arguments = parser.parse_args(argv)
    if arguments.current:
        return int(not is_current(arguments.current))
    rows = []
    for row in compile_all(arguments.targets, every=arguments.every):
        rows.append(row)
        print(
            f"{row.target:7} {row.kernel} [{row.variant}] shared={row.shared} registers={row.registers}",
            f"spills={row.spills} {verdict(row) or 'ok'}",
            flush=True,
        )
    if arguments.out:
        rows.sort(key=lambda row: (row.kernel, row.variant))
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        text = arguments.out.read_text() + section(rows) if arguments.append else markdown(rows)
        arguments.out.write_text(text)
    refused = [row for row in rows if verdict(row) is not None]
    print(f"{len(rows)} compilations, {len(refused)} refused")
    for row in refused:
        print(f"{row.target} {row.kernel} [{row.variant}]: {verdict(row)}", file=sys.stderr)
    return 1 if refused or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
