"""Bar charts of results as SVG to put into a page: its font and colours, no ids in common, nothing loaded."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

# Legible on white and on black (Okabe and Ito's palette); every bar also says whose it is.
COLOURS = ("#0e83c4", "#d9730d", "#12a37a", "#b866a0", "#a58a00", "#7a7f87")
INK = "#010203"  # stands for the page's text colour
WIDTH = 4.7  # inches: as wide as a phone, where the page does not scale it
LABEL = 54  # characters in a line


@dataclass(frozen=True)
class Bar:
    """text is written behind the bar; spread: of the value, as a part of it; series: the index of its colour."""

    value: float
    text: str
    series: int = 0
    spread: float = 0.0


def bars(identity: str, cases: Sequence[tuple[str, Sequence[Bar]]], mark: float | None, logarithmic: bool) -> str:
    """An SVG element with a group of horizontal bars for each case, below its name.

    identity: a word that no other chart of the page has. mark: a value at which there is a line; bars start there if
    the axis is logarithmic.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": identity, "font.size": 10, "font.family": "sans-serif"}
    style |= {name: INK for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color")}
    with matplotlib.rc_context(style):
        position, drawn, names = 0.0, [], []
        for name, some in cases:
            lines = wrap(name, LABEL) or [""]
            names.append((position, "\n".join(lines)))
            position += 0.9 * len(lines)
            for bar in some:
                drawn.append((position, bar))
                position += 0.8
            position += 0.7
        figure = Figure(figsize=(WIDTH, 0.2 * position + 0.4))
        axes = figure.add_axes((0.02, 0.3 / (0.2 * position + 0.4), 0.96, 1.0 - 0.32 / (0.2 * position + 0.4)))
        start = mark if logarithmic else 0.0
        most, least = _range([bar for _, bar in drawn], mark, logarithmic)
        for at, bar in drawn:
            axes.barh(at, bar.value - start, left=start, height=0.7, color=COLOURS[bar.series % len(COLOURS)])
            if bar.spread:
                low, high = bar.value * (1 - bar.spread), bar.value * (1 + bar.spread)
                axes.plot([max(low, least), min(high, most)], [at, at], color=INK, linewidth=1.2, alpha=0.7)
            end = max(bar.value * (1 + bar.spread), start) if bar.value >= start else max(start, bar.value)
            axes.annotate(bar.text, (min(end, most), at), (4, 0), textcoords="offset points", va="center", fontsize=9)
        for at, name in names:
            axes.annotate(name, (0.0, at), (0, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                          va="center_baseline", fontsize=9.5, fontweight="bold")  # fmt: skip
        if mark is not None:
            axes.axvline(mark, color=INK, linewidth=1, linestyle=(0, (3, 2)))
        if logarithmic:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.minorticks_off()
        axes.set(xlim=(least, most * (most / least) ** 0.45 if logarithmic else most * 1.45), ylim=(position, -0.8))
        axes.set_yticks([])
        axes.spines[["left", "right", "top"]].set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return _inline(text.getvalue(), identity)


def _range(drawn: Sequence[Bar], mark: float | None, logarithmic: bool) -> tuple[float, float]:
    """(the largest value to be seen, the least)."""
    values = [bar.value * (1 + bar.spread) for bar in drawn] + ([mark] if mark else [])
    least = min([bar.value * max(1 - bar.spread, 0.5) for bar in drawn] + [mark or 1.0])
    return 1.05 * max(values), 0.9 * least if logarithmic else 0.0


def _inline(svg: str, identity: str) -> str:
    """The element alone, scaled by the page, in its text colour."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(?<=[" ])id="', f'id="{identity}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{identity}-", svg)
    svg = re.sub(r"font: ([^;]*?)'?sans-serif[^;\"]*", r"font: \1inherit", svg)
    return svg.replace(INK, "currentColor").replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
