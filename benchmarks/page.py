"""Turns a folder of results into one HTML page, which loads nothing, and into a Markdown table (`pyllm report`)."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from pyllm.benchmarks import charts, report
from pyllm.benchmarks.catalogue import BENCHMARKS
from pyllm.benchmarks.charts import Bar
from pyllm.benchmarks.report import Row

# What timing.machine tells of a machine; the rest of a file's facts are limits as measured beside its rows.
FACTS = ("device", "gpu", "cuda", "cpu", "threads", "pyllm", "torch", "torch_isa", "pyllm_isa")
UNKNOWN = {"machine": "not recorded: results in CSV alone have no machine"}


class NoResults(Exception):
    """There is nothing to report, or it cannot be read; the message says what and where."""


@dataclass
class Machine:
    """All that was measured on one machine with one set of versions. limits: their values, by name."""

    facts: dict[str, str]
    limits: dict[str, list[str]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        f = self.facts
        if "machine" in f:
            return "Machine not recorded"
        threads = f"{f['threads']} thread{'s' * (f['threads'] != '1')}"
        device = f["gpu"] if "gpu" in f else f"{f['cpu']}, {threads}"
        return f"{device}, PyTorch {f['torch']}"


def read(folder: Path) -> list[Machine]:
    """The results of every JSON file that `pyllm bench` or `make gpu` wrote, and of CSV files that have no such JSON.

    Raises NoResults where there are none.
    """
    machines: dict[tuple, Machine] = {}
    read_from = set()
    for path in sorted(folder.rglob("*.json")):
        for facts, rows in _results(path):
            read_from.add(path.with_suffix(".csv"))
            _add(machines, facts, rows)
    for path in sorted(set(folder.rglob("*.csv")) - read_from):
        with open(path, newline="") as file:
            rows = [{n: _value(t) for n, t in row.items() if t} for row in csv.DictReader(file)]
        if all({"op", "pass", "backend"} <= row.keys() for row in rows):
            _add(machines, UNKNOWN, rows)
    found = [machine for machine in machines.values() if machine.rows]
    if not found:
        raise NoResults(f"there are no results of pyllm bench in {folder}")
    return found


def _results(path: Path) -> Iterator[tuple[dict, list[Row]]]:
    """(machine, rows) of a file; nothing for JSON of another kind."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise NoResults(f"{path}: {error}") from error
    if isinstance(content, dict) and "machine" in content:
        parts = content.get("parts", {}).values()
        rows = content.get("results", [row for part in parts for row in part["rows"]])
        yield content["machine"], [{n: v for n, v in row.items() if v is not None} for row in rows]


def _value(text: str) -> str | float | bool:
    if text in ("True", "False"):
        return text == "True"
    try:
        return float(text)
    except ValueError:
        return text


def _add(machines: dict[tuple, Machine], facts: dict, rows: Sequence[Row]) -> None:
    own = {name: str(facts[name]) for name in (*FACTS, "machine") if name in facts}
    machine = machines.setdefault(tuple(own.items()), Machine(own))
    machine.rows += rows
    for name, value in facts.items():
        if name not in own:
            values = machine.limits.setdefault(name, [])
            values += [value] if value not in values else []


# --- charts ---


def _groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each operator that are to be drawn: not the red ones, nor calls that are nothing but overhead."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        tiny = row["op"] in BENCHMARKS and row["shape"] == "x".join(map(str, BENCHMARKS[row["op"]].tiny))
        end_to_end = row.get("end_to_end", False)
        if "problem" not in row and not (tiny and end_to_end):
            groups.setdefault(row["op"] + (", end to end" if end_to_end else ""), []).append(row)
    return groups


def _label(row: Row) -> str:
    return f"{report.case(row).removeprefix(row['op'])} {row['pass']}".strip()


Cases = list[tuple[str, list[Bar]]]


def _speed(rows: Sequence[Row]) -> Cases:
    cases = []
    for row in rows:
        ratios = {peer: report.against(row, peer) for peer in ("eager", *report.peers([row]))}
        bars = [Bar(ratio, f"{ratio:.2f} × {peer}", peer, row["spread"]) for peer, ratio in ratios.items() if ratio]
        cases.append((_label(row), bars))
    return cases


def _memory(measure: str, rows: Sequence[Row]) -> Cases:
    """Shares of what eager takes."""
    cases = []
    for row in rows:
        sizes = {name: row.get(f"{measure}_{name}") for name in ("pyllm", *report.peers([row], measure))}
        whole = row.get(f"{measure}_eager")
        if whole:
            bars = [Bar(n / whole, f"{n / whole:.2f} × ({_size(n)}) {name}", name) for name, n in sizes.items() if n]
            cases.append((_label(row), bars))
    return cases


def _size(size: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 2**10:.1f} KiB"


def _tokens(rows: Sequence[Row]) -> Cases:
    cases = []
    for row in rows:
        measure = "tokens_per_second"
        rates = {n: row.get(f"{measure}_{n}") for n in ("pyllm", "eager", *report.peers([row], measure))}
        if rates["pyllm"]:
            cases.append((_label(row), [Bar(rate, f"{rate:,.0f} {name}", name) for name, rate in rates.items()]))
    return cases


def _shares(rows: Sequence[Row]) -> Cases:
    shown = [row for row in rows if row.get("share")]
    return [(_label(row), [Bar(100 * row["share"], f"{100 * row['share']:.0f} %")]) for row in shown]


def _figures(identity: str, rows: Sequence[Row]) -> Iterator[str]:
    kinds = (
        ("Speed", "A peer's time over pyllm's, with the A/A spread", _speed(rows), 1.0, True),
        ("Peak memory", "Of what PyTorch eager takes at most during the call", _memory("peak_bytes", rows), 1.0, False),
        ("Kept for the backward", "Of what eager's forward leaves", _memory("saved_bytes", rows), 1.0, False),
        ("Tokens per second", "Padding does not count", _tokens(rows), None, False),
        ("Share of the machine's limit", "Percent of a copy's or a matrix product's rate", _shares(rows), 100.0, False),
    )
    for index, (title, caption, cases, mark, logarithmic) in enumerate(kinds):
        if cases:
            drawn = charts.bars(f"{identity}-{index}", cases, mark, logarithmic)
            yield f"<figure><figcaption><b>{title}.</b> {caption}.</figcaption>{drawn}</figure>"


# --- page ---

STYLE = """
:root { color-scheme: light dark; --line: #0003; --soft: #0000000d; --red: #b00020; }
@media (prefers-color-scheme: dark) { :root { --line: #fff4; --soft: #ffffff14; --red: #ff8a80; } }
body { font: 1rem/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 75rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; } h3 { font-size: 1.1rem; margin-top: 2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; font-size: .9rem; }
dd { margin: 0; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; max-width: 34rem; } figure svg { display: block; width: 100%; height: auto; }
figcaption { font-size: .9rem; margin-bottom: .3rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .4rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:nth-child(2), td:nth-child(3), th:nth-child(2), th:nth-child(3) { text-align: left; }
tbody th { font-weight: normal; } tbody tr:nth-child(even) { background: var(--soft); }
tr.red td, tr.red th { color: var(--red); text-align: left; } caption { text-align: left; padding: .5rem; }
"""
INTRODUCTION = (
    "Every ratio is a peer's time over pyllm's, measured in one process in turns: above 1, pyllm is faster. A/A is the "
    "spread of PyTorch eager against itself, the noise that a ratio has. No time is reported where the numbers were "
    "wrong; such rows are red."
)


def html(machines: Sequence[Machine]) -> str:
    """The page: for each machine its facts, charts of each operator, and every number in a table."""
    parts = []
    for m, machine in enumerate(machines):
        facts = {n.replace("_", " "): t for n, t in machine.facts.items()}
        facts |= {f"limit: {name}": " / ".join(values) for name, values in machine.limits.items()}
        parts.append(f"<section><h2>{escape(str(machine))}</h2>{_facts(facts)}")
        for g, (name, rows) in enumerate(_groups(machine.rows).items()):
            drawn = "".join(_figures(f"m{m}g{g}", rows))
            parts.append(f'<h3>{escape(name)}</h3><div class="charts">{drawn}</div>')
        parts.append(f"<h3>All numbers</h3>{_table(machine)}</section>")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,"><title>pyllm: benchmarks</title>'
        f"<style>{STYLE}</style></head><body><h1>pyllm: benchmarks</h1><p>{INTRODUCTION}</p>"
        f"{''.join(parts)}</body></html>\n"
    )


def _facts(facts: dict[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(n)}</dt><dd>{escape(t)}</dd>' for n, t in facts.items())}</dl>"


def _table(machine: Machine) -> str:
    shown = report.columns(machine.rows)
    shown["eager"] = lambda row: report.duration(row["seconds_eager"]) if "seconds_eager" in row else ""
    shown["dtype"] = lambda row: row["dtype"]
    shown["machine"] = lambda _: str(machine)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in shown)
    lines = []
    for row in machine.rows:
        first, *others = (escape(text(row)) for text in shown.values())
        cells = f'<th scope="row">{first}</th>' + "".join(f"<td>{text}</td>" for text in others)
        lines.append(f'<tr class="red">{cells}</tr>' if "problem" in row else f"<tr>{cells}</tr>")
    caption = f"<caption>{len(machine.rows)} rows. {escape(str(machine))}</caption>"
    table = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="scroll" role="region" aria-label="All numbers" tabindex="0">{table}</div>'


def markdown(machines: Sequence[Machine]) -> str:
    """For each machine a line about it and a table for a README: the ratios to eager, a column for each pass."""
    texts = []
    for machine in machines:
        rows = [row for group in _groups(machine.rows).values() for row in group]
        passes = list(dict.fromkeys(row["pass"] for row in rows))
        by_case: dict[str, dict[str, str]] = {}
        for row in rows:
            ratio = f"{report.against(row, 'eager'):.2f} × ± {100 * row['spread']:.0f} %"
            name = report.case(row) + (", end to end" if row.get("end_to_end") else "")
            by_case.setdefault(name, {})[row["pass"]] = ratio
        lines = [f"{machine}. Times of PyTorch eager over pyllm's, with the A/A spread:", ""]
        lines += [f"| case | {' | '.join(passes)} |", f"|---|{'---|' * len(passes)}"]
        lines += [f"| {name} | {' | '.join(of.get(p, '') for p in passes)} |" for name, of in by_case.items()]
        texts.append("\n".join(lines) + "\n")
    return "\n".join(texts)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
