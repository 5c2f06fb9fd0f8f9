"""The command line: pyllm doctor | check | bench | tune | report."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import pyllm
from pyllm.backend import BACKENDS

DTYPES = ("fp32", "bf16", "fp16", "fp64")
AUTOCAST = "autocast"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Exit code: 0, 1 for a failed run, argparse's 2 for arguments that do not fit."""
    parser = argparse.ArgumentParser(prog="pyllm", description=pyllm.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what is installed, what can be used, and why anything is missing")
    _add_check(
        commands.add_parser("check", help="compare every kernel with fp64 on this device, and keep the verdicts")
    )
    _add_bench(commands.add_parser("bench", help="measure operators and layers against PyTorch on this machine"))
    _add_tune(
        commands.add_parser("tune", help="measure this machine's tiles for the Triton attention, or default backends")
    )
    _add_report(
        commands.add_parser("report", help="make a page with plots, or a Markdown table, of a folder of results")
    )
    arguments = parser.parse_args(argv)
    if arguments.command == "report":
        return _report(arguments)
    if arguments.command == "tune":
        return _tune(arguments, parser)
    if arguments.command == "check":
        return _check(arguments, parser)
    if arguments.command == "doctor":
        from pyllm import doctor

        return doctor.main(wide_console())
    return _bench(arguments, parser)


def wide_console():
    """The terminal as wide as it is; 140 columns for a file or a pipe, where nothing needs to be cut."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=140)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Runs every kernel on small awkward calls, forward and backward, and compares them with fp64 within the error "
        "budget. The verdicts are kept in check.json in pyllm's cache directory (XDG_CACHE_HOME), for this device, its "
        "driver and this build: a GPU's kernels become the default by passing, and none is that fails. Exit code 1: a "
        "kernel has failed."
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    parser.add_argument(
        "--backend", action="append", choices=("native", "triton", "torch"), help="default: all that can run"
    )
    parser.add_argument("--op", action="append", metavar="NAME", help="such as softmax; default: every operator")
    parser.add_argument("--json", type=Path, metavar="FILE")


def _check(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from pyllm import check

    for name in arguments.op or ():
        if name not in check.operators():
            parser.error(f"--op: unknown operator {name!r}: expected {', '.join(check.operators())}")
    device = _device(arguments, parser)
    return check.main(wide_console(), device, arguments.backend, arguments.op, arguments.json)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Checks the numbers, then times pyllm, PyTorch eager and torch.compile in one process, interleaved. Ratios are "
        "the peer's time over pyllm's, with the spread of eager against itself (A/A) beside them."
    )
    parser.add_argument("op", help="an operator or a layer; `layers` is every layer, `all` all, `list` lists them")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    parser.add_argument(
        "--dtype",
        action="append",
        choices=(*DTYPES, AUTOCAST),
        help="default: fp32; autocast: layers with parameters in fp32, under torch.autocast to bf16",
    )
    parser.add_argument("--shape", action="append", type=_shape, metavar="AxBx...", help="default: the operator's own")
    parser.add_argument("--variant", action="append", help="such as `causal`; default: the operator's own")
    parser.add_argument(
        "--pass",
        dest="direction",
        action="append",
        choices=("forward", "backward", "both", "step"),
        help="forward: without gradient; both: forward and backward; step: with fused AdamW, layers only; "
        "default: all but step",
    )
    parser.add_argument("--backend", choices=BACKENDS, help="default: what pyllm chooses by itself")
    parser.add_argument(
        "--peer",
        action="append",
        metavar="NAME",
        help="what is timed besides PyTorch eager: compile, a backend's name, liger, sdpa-flash, sdpa-cudnn, "
        "sdpa-efficient, flex, hf (Hugging Face's layer) or graphed (pyllm's in a CUDA graph) where there is one; "
        "`eager`: nothing; default: compile, sdpa-flash, sdpa-cudnn, hf",
    )
    parser.add_argument("--quick", action="store_true", help="see that it works: few rounds, tiny shapes, no compile")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")


def _add_tune(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Times the tiles that fit this GPU against the shipped ones, on right numbers only, and keeps what is faster "
        "in attention_tiles.json in pyllm's cache directory (XDG_CACHE_HOME). Delete that file to be as shipped again. "
        "With --emit: times every backend instead, and writes which is the fastest."
    )
    parser.add_argument(
        "--step", action="append", choices=("fwd", "key", "query", "decode"), help="default: all passes"
    )
    widths = ("16-bit-64", "16-bit-128", "16-bit-256", "32-bit-64", "wide")
    parser.add_argument("--width", action="append", choices=widths, help="dtype and head_dim; default: all")
    parser.add_argument("--load", action="append", choices=("plain", "busy", "distances"), help="default: all")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--candidates", type=_tiles, metavar="MxNxWARPSxSTAGES[xtma],...", help="the tiles to try")
    which.add_argument("--short", action="store_true", help="try a few tiles of each pass: minutes in place of hours")
    parser.add_argument("--minutes", type=float, help="begin no tile after so many")
    emit = parser.add_argument_group("the table of default backends, in place of the tiles")
    emit.add_argument("--emit", type=Path, metavar="FILE", help="measure this machine's rows of pyllm/dispatch.csv")
    emit.add_argument("--op", action="append", help="default: every operator that has a choice")
    emit.add_argument("--dtype", action="append", choices=DTYPES, help="default: fp32, bf16 and fp16")
    emit.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    emit.add_argument("--quick", action="store_true", help="see that it works: few rounds, small tensors")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Reads every JSON file that `pyllm bench --json` or `make gpu` wrote into a folder, or CSV where there is no "
        "JSON, and makes one HTML page with plots that loads nothing, or a Markdown table."
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--html", type=Path, metavar="FILE", help="default: DIR/report.html")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="ratios to PyTorch eager alone, as for a README")


def _report(arguments: argparse.Namespace) -> int:
    from pyllm.benchmarks import page

    console = wide_console()
    if arguments.html is None and arguments.markdown is None:
        arguments.html = arguments.folder / "report.html"
    try:
        machines = page.read(arguments.folder)
        for path, make in ((arguments.html, page.html), (arguments.markdown, page.markdown)):
            if path is not None:
                page.write(path, make(machines))
                console.print(f"written: {path}", markup=False, soft_wrap=True)
    except (page.NoResults, OSError) as error:
        console.print(f"pyllm report: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    except ModuleNotFoundError as error:
        console.print(f"pyllm report: the plots need matplotlib: {error}", style="red", markup=False)
        return 1
    return 0


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r}: expected positive sizes as in 2048x768")
    return tuple(map(int, sizes))


def _tiles(text: str) -> list[str]:
    tiles = text.split(",")
    for tile in tiles:
        if not re.fullmatch(r"\d+x\d+x\d+x\d+(xtma)?", tile):
            raise argparse.ArgumentTypeError(f"{tile!r}: expected a tile as in 64x128x8x3 or 64x128x8x3xtma")
    return tiles


def _tune(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from pyllm.benchmarks import defaults, tune

    if arguments.emit is None:
        which = (arguments.load, arguments.candidates, arguments.short, arguments.minutes)
        return tune.main(wide_console(), arguments.step, arguments.width, *which)
    operators = arguments.op or defaults.OPERATORS
    for name in operators:
        if name not in defaults.OPERATORS:
            parser.error(f"--op: unknown operator {name!r}: expected {', '.join(defaults.OPERATORS)}")
    dtypes = arguments.dtype or DTYPES[:3]
    device = _device(arguments, parser)
    return defaults.emit(arguments.emit, wide_console(), operators, dtypes, device, arguments.quick)


def _device(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no CUDA device")
    if arguments.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return arguments.device


def _bench(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from rich.progress import track

    from pyllm.benchmarks import measure, report, timing
    from pyllm.benchmarks.catalogue import BENCHMARKS

    console = wide_console()
    if arguments.op == "list":
        for benchmark in BENCHMARKS.values():
            console.print(f"{benchmark.name:16} {benchmark.axes:36} {', '.join(filter(None, benchmark.variants))}")
        return 0
    cases, tiny = _cases(arguments, parser)
    peers = arguments.peer or (() if arguments.quick else measure.DEFAULT_PEERS)

    def measured(some: list, label: str, peers: Sequence[str], end_to_end: bool) -> list:
        return [
            result
            for case in track(some, label, console=console, transient=True)
            for result in measure.measure(case, arguments.backend, peers, arguments.quick, end_to_end)
        ]

    try:
        results = measured(cases, "measuring", peers, False)
        overhead = measured(tiny, "call overhead", (), True)
    except RuntimeError as error:
        console.print(f"pyllm bench: {error}", style="red", markup=False)
        return 1
    machine = timing.machine(arguments.device) | measure.limits(cases, arguments.quick)
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()))
    console.print(report.table(results), report.overhead_table(overhead))
    for refusal in dict.fromkeys(f"{name}: {why}" for result in results for name, why in result.refused.items()):
        console.print(f"not measured: {refusal}", markup=False)
    everything = [*results, *overhead]
    if arguments.json:
        report.write_json(arguments.json, everything, machine)
    if arguments.csv:
        report.write_csv(arguments.csv, everything)
    if arguments.markdown:
        report.write_markdown(arguments.markdown, results, machine)
    return 1 if any(result.problem for result in everything) else 0


def _cases(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[list, list]:
    """The cases that the arguments ask for, and those on tiny tensors; ends the program where there are none."""
    from pyllm.benchmarks import measure
    from pyllm.benchmarks.catalogue import BENCHMARKS, GROUPS

    for peer in set(arguments.peer or ()) - {"eager", *measure.PEERS}:
        parser.error(f"unknown peer {peer!r}: expected eager, {', '.join(measure.PEERS)}")
    if arguments.op not in GROUPS and arguments.op not in BENCHMARKS:
        parser.error(f"unknown operator {arguments.op!r}: expected list, {', '.join([*GROUPS, *BENCHMARKS])}")
    arguments.device = _device(arguments, parser)
    cases, tiny = [], []
    for benchmark in GROUPS.get(arguments.op) or (BENCHMARKS[arguments.op],):
        for shape in arguments.shape or ():
            if len(shape) != len(benchmark.tiny):
                parser.error(f"--shape: {benchmark.name} takes {benchmark.axes}, got {'x'.join(map(str, shape))}")
        for variant in arguments.variant or ():
            if variant not in benchmark.variants:
                known = ", ".join(map(repr, benchmark.variants))
                parser.error(f"--variant: {benchmark.name} has {known}, not {variant!r}")
        for dtype in arguments.dtype or ():
            if dtype == AUTOCAST and not benchmark.autocasts:
                parser.error(f"--dtype: {benchmark.name} is no layer: {AUTOCAST} has no meaning for it")
        common = {"device": arguments.device, "variants": arguments.variant, "dtypes": arguments.dtype or ["fp32"]}
        shapes = arguments.shape or ([benchmark.tiny] if arguments.quick else None)
        directions = arguments.direction
        cases += measure.cases(benchmark, shapes=shapes, directions=directions, **common)
        tiny += measure.cases(benchmark, shapes=[benchmark.tiny], directions=measure.OVERHEAD_PASSES, **common)
    if not cases:
        parser.error(f"--pass: {arguments.op} has none of {', '.join(arguments.direction)}")
    return cases, tiny
