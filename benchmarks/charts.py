"""Bar charts of results as SVG to put into a page: its font and colours, no ids in common, nothing loaded."""

import io
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

# Legible on white and on black; every bar also says whose it is.
COLOURS = {"pyllm": "#0e83c4", "eager": "#7a7f87", "compile": "#12a37a", "hf": "#d9730d"}
OTHERS = ("#b866a0", "#a58a00", "#5b6ee1", "#c4534f")
INK = "#010203"  # stands for the page's text colour
WIDTH = 4.2  # inches: as wide as a phone, where the page does not scale it
LABEL = 46  # characters in a line
UNIT = 0.2  # inches of a line
AXIS = 1.6  # lines


@dataclass(frozen=True)
class Bar:
    """text is written behind the bar, which has the colour of an implementation; spread: a part of the value."""

    value: float
    text: str
    implementation: str = "pyllm"
    spread: float = 0.0

    @property
    def colour(self) -> str:
        return COLOURS.get(self.implementation) or OTHERS[zlib.crc32(self.implementation.encode()) % len(OTHERS)]


def bars(identity: str, cases: Sequence[tuple[str, Sequence[Bar]]], mark: float | None, logarithmic: bool) -> str:
    """An SVG element with a group of horizontal bars for each case, below its name.

    identity: a word that no other chart of the page has. mark: a value at which there is a line; bars start there if
    the axis is logarithmic.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": identity, "font.size": 10, "font.family": "sans-serif"}
    style |= {name: INK for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color")}
    everything = [bar for _, some in cases for bar in some]
    top = 1.05 * max([bar.value * (1 + bar.spread) for bar in everything] + [mark or 0.0])
    start, least = 0.0, 0.0
    if logarithmic:
        start, least = mark, 0.9 * min([bar.value * max(1 - bar.spread, 0.5) for bar in everything] + [mark])
    with matplotlib.rc_context(style):
        lines = 0.6 + sum(2.0 + len(some) + _lines(name).count("\n") for name, some in cases)
        figure = Figure(figsize=(WIDTH, UNIT * (lines + AXIS)))
        axes = figure.add_axes((0.02, 0.0, 0.96, lines / (lines + AXIS)))
        y = 0.6
        for name, some in cases:
            axes.annotate(
                _lines(name), (0, y), (2, 0), ("axes fraction", "data"), "offset points", va="top", weight="bold"
            )
            y += 1.6 + _lines(name).count("\n")
            for i, bar in enumerate(some):
                axes.barh(y + i, bar.value - start, left=start, height=0.85, color=bar.colour)
                low, high = bar.value * (1 - bar.spread), bar.value * (1 + bar.spread)
                if bar.spread:
                    axes.plot([max(low, least), high], [y + i] * 2, color=INK, linewidth=1.2)
                behind = max(high, mark or 0.0)
                axes.annotate(bar.text, (behind, y + i), (4, 0), textcoords="offset points", va="center", fontsize=9)
            if mark is not None:
                axes.plot([mark] * 2, [y - 0.6, y + len(some) - 0.4], color=INK, linewidth=1, linestyle="--")
            y += len(some) + 0.4
        if logarithmic:
            axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1e4 else f"{value / 1e3:g}k")
        axes.set(xlim=(least, top * (top / least) ** 0.6 if logarithmic else 1.8 * top), ylim=(lines, 0.0), yticks=[])
        axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False)
        axes.spines[["left", "right", "bottom"]].set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return _inline(text.getvalue(), identity)


def _lines(name: str) -> str:
    return "\n".join(wrap(name, LABEL))


def _inline(svg: str, identity: str) -> str:
    """The element alone, scaled by the page, in its text colour."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for size in ("width", "height"):
        svg = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(?<=[" ])id="', f'id="{identity}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{identity}-", svg)
    svg = re.sub(r"font-family: [^;]*sans-serif", "font-family: inherit", svg)
    return svg.replace(INK, "currentColor").replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
