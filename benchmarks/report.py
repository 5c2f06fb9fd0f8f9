"""Writes results: a table for the terminal, Markdown, CSV and JSON. A row is what `Result.row` makes of one."""

import csv
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from pyllm.benchmarks.measure import Result, rate

Row = dict


def peers(rows: Sequence[Row], measure: str = "ratio") -> list[str]:
    """Every implementation that has a measure, besides eager and pyllm."""
    prefix = f"{measure}_"
    names = dict.fromkeys(n.removeprefix(prefix) for row in rows for n in row if n.startswith(prefix))
    return [name for name in names if name not in ("eager", "pyllm")]


def columns(rows: Sequence[Row]) -> dict[str, Callable[[Row], str]]:
    """What a table of these rows shows: a text of each row, by column; empty where it has none."""
    shown: dict[str, Callable[[Row], str]] = {
        "case": case,
        "pass": lambda row: row["pass"],
        "backend": lambda row: row["backend"],
        "pyllm": _time,
        "vs eager": partial(_against, "eager"),
        "A/A": lambda row: f"± {100 * row['spread']:.0f} %" if "spread" in row else "",
    }
    shown |= {f"vs {peer}": partial(_against, peer) for peer in peers(rows)}
    shown["rate"] = lambda row: rate(row["rate"], row["rate_unit"]) if {"rate", "rate_unit"} <= row.keys() else ""
    shown["of limit"] = lambda row: f"{100 * row['share']:.0f} %" if "share" in row else ""
    tokens = "tokens_per_second_pyllm"
    if any(tokens in row for row in rows):
        shown["tokens/s"] = lambda row: f"{row[tokens]:,.0f}" if tokens in row else ""
    shown["memory"] = partial(_memory, "peak_bytes")
    if any("saved_bytes_pyllm" in row for row in rows):
        shown["saved"] = partial(_memory, "saved_bytes")
    return shown


def case(row: Row) -> str:
    pages = "fresh pages" if row.get("fresh_pages") else ""
    return " ".join(part for part in (row["op"], row["shape"], row["dtype"], row.get("variant"), pages) if part)


def _time(row: Row) -> str:
    """A red case has its problem in place of numbers."""
    return f"RED: {row['problem']}" if row.get("problem") else duration(row["seconds_pyllm"])


def _against(peer: str, row: Row) -> str:
    ratio = against(row, peer)
    return "" if ratio is None else f"{ratio:.2f} x"


def against(row: Row, peer: str) -> float | None:
    """A peer's time over pyllm's, from the ratios to eager's; None where it was not timed."""
    theirs = row.get(f"ratio_{peer}")
    return row["ratio_pyllm"] / theirs if theirs else None


def _memory(measure: str, row: Row) -> str:
    """What pyllm's call takes, and the part that this is of eager's."""
    ours, theirs = (row.get(f"{measure}_{name}") for name in ("pyllm", "eager"))
    return f"{ours / 2**20:.1f} MiB, {ours / theirs:.2f} x" if ours and theirs else ""


def plain(results: Sequence[Result]) -> list[Row]:
    """The rows without what they have no value for."""
    return [{name: value for name, value in r.row().items() if value is not None} for r in results]


def table(results: Sequence[Result]) -> Table:
    """The results for a terminal. Ratios are a peer's time over pyllm's: above 1, pyllm is faster."""
    made, rows = Table(), plain(results)
    shown = columns(rows)
    for index, column in enumerate(shown):
        made.add_column(column, justify="left" if index < 3 else "right", min_width=None if index else 20)
    for row in rows:
        made.add_row(*(escape(text(row)) for text in shown.values()), style="red" if row.get("problem") else None)
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
    _write(path, markdown(plain(results), machine))


def markdown(rows: Sequence[Row], machine: dict) -> str:
    """A line with the machine, and a table of the rows."""
    shown = columns(rows)
    lines = [", ".join(f"{name} {value}" for name, value in machine.items()), ""]
    lines += [_line(shown), _line("---" for _ in shown)]
    lines += [_line(text(row) for text in shown.values()) for row in rows]
    return "\n".join(lines) + "\n"


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
