"""How every figure looks: size, fonts, colours that colour-blind readers can tell apart, and the charts of a report."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hpcssl.report.arms import UNTRAINED, Arm

DPI = 150
WIDTH_INCH = 7.2
INK = "#222222"
GREY = "#767676"
# Okabe and Ito, "Color Universal Design" (2008), without yellow, which is faint on white
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")
_MARKERS = "osD^vP"
Dash = tuple[float, tuple[float, ...]]
SOLID: Dash = (0, ())
_UNTRAINED_DASH: Dash = (0, (3, 1.5))
_FIXED_DASH: Dash = (0, (5, 1.5, 1, 1.5))
_SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "axes.titlesize": 9.5,
    **dict.fromkeys(("font.size", "axes.labelsize"), 9),
    "legend.fontsize": 8.5,
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 8),
    "axes.titleweight": "bold",
    "axes.edgecolor": GREY,
    **dict.fromkeys(("axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("text.parse_math", "axes.formatter.useoffset"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One figure of the report: its picture, its numbers and its words."""

    name: str
    """Stem of the PNG and the CSV beside the report."""
    title: str
    caption: str
    alt: str
    png: bytes
    table: pd.DataFrame


@dataclass(frozen=True, kw_only=True)
class Look:
    """How an arm is drawn."""

    colour: str
    dash: Dash
    marker: str
    label: str


def draw(height_inch: float, paint: Callable[[Figure], None]) -> bytes:
    """Return the PNG of what `paint` puts on an empty figure; nothing global is changed."""
    with mpl.rc_context(_SETTINGS), io.BytesIO() as stream:
        figure = Figure(figsize=(WIDTH_INCH, height_inch), dpi=DPI, layout="constrained", facecolor="white")
        paint(figure)
        figure.savefig(stream, format="png", dpi=DPI)
        return stream.getvalue()


def looks(arms: Sequence[Arm]) -> dict[tuple[str, str], Look]:
    """Give every (encoder, checkpoint) its look, the same in all figures.

    Checkpoints of one encoder run along a ramp of colours in the order of their steps; untrained weights are dashed.
    """
    checkpoints: dict[str, list[str]] = {}
    for _, encoder, checkpoint in dict.fromkeys(arm._replace(task="") for arm in arms):
        checkpoints.setdefault(encoder, []).append(checkpoint)
    trained = [encoder for encoder, names in checkpoints.items() if names != [""]]
    chosen = {}
    for index, (encoder, names) in enumerate(checkpoints.items()):
        base, marker = PALETTE[index % len(PALETTE)], _MARKERS[index % len(_MARKERS)]
        later = [name for name in names if name not in ("", UNTRAINED)]
        for name in names:
            colour, dash = base, SOLID
            if name == UNTRAINED:
                colour, dash = (GREY if len(trained) == 1 else _mixed(base, 0.45)), _UNTRAINED_DASH
            elif name == "":
                dash = _FIXED_DASH
            elif len(trained) == 1:
                colour = to_hex(mpl.colormaps["plasma"](0.03 + 0.69 * (later.index(name) / max(len(later) - 1, 1))))
            elif len(later) > 1:
                colour = _mixed(base, 0.65 + 0.35 * later.index(name) / (len(later) - 1))
            label = arm_label(encoder, name, alone=len(checkpoints) == 1)
            chosen[encoder, name] = Look(colour=colour, dash=dash, marker=marker, label=label)
    return chosen


def arm_label(encoder: str, checkpoint: str, *, alone: bool) -> str:
    """Name a line in a legend; `alone`: there is no other encoder.

    >>> arm_label("vit-demo", "1200", alone=True), arm_label("resnet50", "", alone=False)
    ('step 1,200', 'resnet50')
    """
    if not checkpoint:
        return elided(encoder, 34)
    what = "untrained" if checkpoint == UNTRAINED else checkpoint
    if checkpoint.isdigit() and checkpoint != UNTRAINED:
        what = f"step {int(checkpoint):,}"
    return what if alone else f"{elided(encoder, 22)}, {what}"


def elided(text: str, length: int) -> str:
    """Shorten a name in its middle, and keep matplotlib from dropping one that starts with an underscore.

    >>> elided("a-very-long-name-of-an-encoder", 15)
    'a-very-…encoder'
    """
    if len(text) > length:
        text = f"{text[: length // 2]}…{text[-(length - length // 2 - 1) :]}"
    return f" {text}" if text.startswith("_") else text


def run_lines(runs: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return how the line of each run is drawn."""
    return {
        run: {"color": PALETTE[i % len(PALETTE)], "linestyle": DASHES[i % len(DASHES)]} for i, run in enumerate(runs)
    }


def add_run_legend(figure: Figure, lines: Mapping[str, dict[str, Any]]) -> None:
    """Name the lines of several runs below the panels."""
    if len(lines) > 1:
        handles = [Line2D([], [], **line) for line in lines.values()]
        figure.legend(handles, [elided(run, 30) for run in lines], loc="outside lower center", ncols=3)


def say_empty(axes: Axes, words: str = "no values") -> None:
    """Write into an empty panel that it is empty."""
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", color=GREY)


def _mixed(colour: str, strength: float) -> str:
    """Return a colour mixed with white."""
    red, green, blue = (1 - strength * (1 - channel) for channel in to_rgb(colour))
    return to_hex((red, green, blue))
