"""Writes results: a table for the terminal, Markdown, CSV and JSON."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from pyllm.benchmarks.measure import Result, rate


def _peers(results: Sequence[Result]) -> list[str]:
    """Every implementation that pyllm's is compared with, besides eager."""
    return list(dict.fromkeys(p for r in results for p in r.ratio if p not in ("eager", "pyllm")))


def columns(peers: Sequence[str]) -> tuple[str, ...]:
    return (
        "case",
        "pass",
        "backend",
        "pyllm",
        "vs eager",
        "A/A",
        *(f"vs {p}" for p in peers),
        "rate",
        "of limit",
        "memory",
    )


def cells(result: Result, peers: Sequence[str]) -> tuple[str, ...]:
    """One text for each column; a red case has its problem in place of numbers."""
    case, ratio = result.case, result.ratio
    pages = "fresh pages" if result.fresh_pages else ""
    parts = (case.benchmark.name, "x".join(map(str, case.shape)), case.dtype, case.variant, pages)
    name = " ".join(part for part in parts if part)
    if result.problem:
        return (name, case.direction, result.backend, f"RED: {result.problem}", *("",) * (len(peers) + 5))
    return (
        name,
        case.direction,
        result.backend,
        duration(result.seconds["pyllm"]),
        f"{ratio['pyllm']:.2f} x",
        f"± {100 * result.spread:.0f} %",
        *(f"{ratio['pyllm'] / ratio[peer]:.2f} x" if peer in ratio else "" for peer in peers),
        rate(case, result.rate) if result.rate else "",
        f"{100 * result.share:.0f} %" if result.share else "",
        _memory(result),
    )


def _memory(result: Result) -> str:
    """What pyllm's call holds at most, and the part that this is of eager's."""
    ours, theirs = (result.memory.get(name) for name in ("pyllm", "eager"))
    return f"{ours / 2**20:.1f} MiB, {ours / theirs:.2f} x" if ours and theirs else ""


def table(results: Sequence[Result]) -> Table:
    """The results for a terminal. Ratios are a peer's time over pyllm's: above 1, pyllm is faster."""
    made, peers = Table(), _peers(results)
    for index, column in enumerate(columns(peers)):
        made.add_column(column, justify="left" if index < 3 else "right", min_width=None if index else 20)
    for result in results:
        made.add_row(*map(escape, cells(result, peers)), style="red" if result.problem else None)
    return made


def duration(seconds: float) -> str:
    return f"{1e6 * seconds:.1f} µs" if seconds < 1e-3 else f"{1e3 * seconds:.2f} ms"


def overhead_table(results: Sequence[Result]) -> Table:
    """What a call on a tiny tensor costs, pyllm's and torch's: all of it is overhead."""
    made = Table(title="Call overhead on a tiny tensor", title_justify="left")
    for column in ("operator", "call", "pyllm", "torch", "more than torch", "A/A"):
        made.add_column(column, justify="left" if column in ("operator", "call") else "right")
    words = {"forward": "without gradient", "recorded": "with gradient", "both": "with its backward"}
    for result in results:
        case, seconds = result.case, result.seconds
        label = f"{case.benchmark.name} {case.variant}".strip()
        if result.problem:
            made.add_row(label, words[case.direction], escape(f"RED: {result.problem}"), style="red")
            continue
        more = 1e6 * (seconds["pyllm"] - seconds["eager"])
        times = (duration(seconds["pyllm"]), duration(seconds["eager"]), f"{more:+.1f} µs")
        made.add_row(label, words[case.direction], *times, f"± {100 * result.spread:.0f} %")
    return made


def write_markdown(path: Path, results: Sequence[Result], machine: dict) -> None:
    """The table with the machine above it, for docs/measured.md."""
    lines = [", ".join(f"{name} {value}" for name, value in machine.items()), ""]
    peers = _peers(results)
    head = columns(peers)
    lines += [_line(head), _line("---" for _ in head), *(_line(cells(r, peers)) for r in results)]
    _write(path, "\n".join(lines) + "\n")


def _line(texts) -> str:
    return "| " + " | ".join(texts) + " |"


def write_json(path: Path, results: Sequence[Result], machine: dict) -> None:
    """{"machine": facts, "results": rows}."""
    _write(path, json.dumps({"machine": machine, "results": [r.row() for r in results]}, indent=1) + "\n")


def write_csv(path: Path, results: Sequence[Result]) -> None:
    write_rows(path, [r.row() for r in results])


def write_rows(path: Path, rows: Sequence[dict]) -> None:
    """A line for each row; the columns of all of them, empty where one has no value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
