"""Plots of a report as inline SVG: text stays text, colours follow the page's light or dark scheme.

Only names of ours are drawn; strangers' strings (kinds of layers) go into legends that the page itself writes.
The bytes are the same in every run: no date, and identifiers that follow from the content.
"""

import io
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmquant.report.data import LaneReport
from llmquant.report.ledger import Histogram
from llmquant.report.tables import compared

if TYPE_CHECKING:
    from matplotlib.axes import Axes

N_COLOURS = 8
MARKERS = "os^DvPX*"
GLYPHS = "●■▲◆▼✚✖★"  # the same, for legends in HTML
# Colours that stand for CSS variables until the SVG is written: matplotlib knows none.
_INK, _RULE = "#0a0b01", "#0a0b02"
_COLOURS = [f"#0a0c0{i}" for i in range(N_COLOURS)]
_VARIABLES = {_INK: "var(--ink)", _RULE: "var(--rule)"} | {c: f"var(--c{i})" for i, c in enumerate(_COLOURS)}
PERCENTILES = {"kl_p50": "50%", "kl_p90": "90%", "kl_p99": "99%", "kl_p999": "99.9%", "kl_max": "max"}


def kl_against_size(lanes: Mapping[str, LaneReport]) -> str:
    """Mean KL of every lane over its bits per weight; bars are 95% intervals."""

    def draw(axes: "Axes") -> None:
        for i, (name, lane) in enumerate(compared(lanes).items()):
            colour, marker = _COLOURS[i % N_COLOURS], MARKERS[_shape(i)]
            bar = None if lane.kl_se is None else [[1.96 * lane.kl_se]]
            x, y = lane.bits_per_weight, _positive(lane.kl_mean)
            axes.errorbar([x], [y], yerr=bar, fmt=marker, color=colour, capsize=4)
            axes.annotate(name, (x, y), xytext=(8, 0), textcoords="offset points", va="center", color=_INK)
        axes.set_yscale("log")
        axes.margins(x=0.35, y=0.2)
        axes.set_xlabel("bits per weight")
        axes.set_ylabel("KL, nats per token")

    return _svg("size", draw)


def kl_percentiles(lanes: Mapping[str, LaneReport]) -> str:
    """How KL is spread over tokens: percentiles of every lane."""

    def draw(axes: "Axes") -> None:
        for i, (_, lane) in enumerate(compared(lanes).items()):
            _line(axes, i, range(len(PERCENTILES)), [_positive(getattr(lane, key)) for key in PERCENTILES])
        axes.set_xticks(range(len(PERCENTILES)), list(PERCENTILES.values()))
        axes.set_yscale("log")
        axes.set_xlabel("percentile of tokens")
        axes.set_ylabel("KL, nats")

    return _svg("percentiles", draw)


def error_by_depth(kinds: dict[str, dict[int, float]], label: str) -> str:
    """`kinds`: an error by block number for every kind of layer."""
    from matplotlib.ticker import MaxNLocator

    def draw(axes: "Axes") -> None:
        for i, errors in enumerate(kinds.values()):
            _line(axes, i, list(errors), [_positive(value) for value in errors.values()])
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("block")
        axes.set_ylabel(label)

    return _svg("depth", draw)


def histogram(name: str, label: str, counted: Histogram) -> str:
    """Bars of one of a layer's histograms; `name` must be unique on the page."""

    def draw(axes: "Axes") -> None:
        bins = len(counted.counts)
        width = (counted.high - counted.low) / bins
        middles = [counted.low + (i + 0.5) * width for i in range(bins)]
        axes.bar(middles, counted.counts, width=width, color=_COLOURS[0])
        axes.set_xlabel(label)
        axes.set_ylabel("count")

    return _svg(name, draw)


def legend(names: Sequence[str]) -> list[dict[str, str]]:
    """Name, glyph and CSS colour of each series, in the order in which they were drawn."""
    return [
        {"name": name, "glyph": GLYPHS[_shape(i)], "colour": f"var(--c{i % N_COLOURS})"} for i, name in enumerate(names)
    ]


def _shape(i: int) -> int:
    """Marker of a series: moved on by one with every round of colours, so that 64 series differ."""
    return (i + i // N_COLOURS) % len(MARKERS)


def _positive(value: float) -> float:
    """A logarithmic axis has no place for zero: a gap."""
    return value if value > 0 else math.nan


def _line(axes: "Axes", i: int, x: Sequence[int], y: Sequence[float]) -> None:
    axes.plot(x, y, marker=MARKERS[_shape(i)], color=_COLOURS[i % N_COLOURS], markersize=4, linewidth=1.2)


def _svg(name: str, draw: Callable[["Axes"], None]) -> str:
    """The drawing as an <svg> element of its own size in its viewBox only; `name` keeps its ids apart."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # notes about its font cache
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"llmquant-{name}",
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _RULE,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": _RULE,
        "grid.linewidth": 0.5,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.formatter.use_mathtext": False,
        "figure.constrained_layout.use": True,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.2, 3.4))
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(name, buffer.getvalue())


def _inline(name: str, text: str) -> str:
    """An SVG file as an element of a page: no prologue, no fixed size, ids and colours of the page."""
    text = text[text.index("<svg") :]
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    text = f'{head} role="img">{rest}'.strip()
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'xlink:href="#', f'xlink:href="#{name}-', text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text
