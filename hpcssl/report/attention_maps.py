"""Figures: which tiles of a slide the heads attend to, drawn where the tiles are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from hpcssl.evaluate.results import ATTENTION, ATTENTION_COLUMNS
from hpcssl.report.arms import ReportError
from hpcssl.report.style import GREY, WIDTH_INCH, Chart, draw, elided

_MOST_CELLS = 4_000_000  # of the picture's grid; beyond it tiles are drawn as points


def attention_charts(results: Path) -> list[Chart]:
    """Return a figure for every RESULTS/attention/<part>/<slide>.csv, in the order of their names.

    Such a file has a row a tile: x, y (level-0 pixels) and attention, which sums to one.
    """
    return [_chart(path, number) for number, path in enumerate(sorted((results / ATTENTION).glob("*/*.csv")), start=1)]


def _chart(path: Path, number: int) -> Chart:
    try:
        table = pd.read_csv(path)
        table = table[[*ATTENTION_COLUMNS]].astype(float)
    except (KeyError, ValueError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ReportError(
            f"{path}: no table of {', '.join(ATTENTION_COLUMNS)} ({error}); run `hpcssl mccv` again"
        ) from None
    slide, what = path.stem, path.parent.name.replace("__", ", ").rstrip(", ")
    half = int((table["attention"].sort_values(ascending=False).cumsum() < 0.5).sum()) + 1
    return Chart(
        name=f"attention_{number:03d}",
        title=f"{slide}: attention ({what})",
        caption=(
            f"Each square is one of {len(table):,} tiles at its place on the slide, coloured by its attention in units "
            "of the mean (1: as much as every tile would get if all got the same), averaged over the runs that had the "
            f"slide in validation. The {half:,} most attended tiles hold half of the attention."
        ),
        alt=f"Map of the attention to the tiles of {slide}; {half:,} of {len(table):,} tiles hold half of it.",
        png=draw(_height(table), lambda figure: _paint(figure, table, f"{slide}: {what}")),
        table=table,
    )


def _height(table: pd.DataFrame) -> float:
    """Return the figure's height in inches, such that the slide fills it."""
    step = _step(table)
    wide, high = (np.ptp(table[axis]) + step for axis in ("x", "y"))
    return float(np.clip((WIDTH_INCH - 1.6) * high / wide + 0.9, 2.5, 8.0))


def _step(table: pd.DataFrame) -> float:
    """Return the side of a tile: the smallest distance between columns, or rows, of tiles."""
    steps = [np.diff(np.unique(table[axis])).min(initial=np.inf) for axis in ("x", "y")]
    step = float(min(steps))
    return step if np.isfinite(step) else 1.0


def _paint(figure: Figure, table: pd.DataFrame, title: str) -> None:
    axes, step = figure.subplots(), _step(table)
    relative = table["attention"].to_numpy() * len(table)
    columns, rows = (((table[a] - table[a].min()) / step).round().astype(int).to_numpy() for a in ("x", "y"))
    shape = int(rows.max()) + 1, int(columns.max()) + 1
    left, top = table["x"].min(), table["y"].min()
    extent = (left, left + shape[1] * step, top + shape[0] * step, top)
    colours: dict[str, Any] = {"cmap": "viridis", "vmin": 0, "vmax": max(float(np.quantile(relative, 0.99)), 1.0)}
    if shape[0] * shape[1] <= _MOST_CELLS:
        total, count = np.zeros(shape), np.zeros(shape)
        np.add.at(total, (rows, columns), relative)
        np.add.at(count, (rows, columns), 1)
        with np.errstate(invalid="ignore"):
            grid = total / count
        drawn: ScalarMappable = axes.imshow(grid, extent=extent, interpolation="nearest", **colours)
    else:
        drawn = axes.scatter(table["x"], table["y"], c=relative, s=1, **colours)
        axes.set(xlim=extent[:2], ylim=extent[2:], aspect="equal")
    axes.set_facecolor("#F4F4F4")
    axes.grid(visible=False)
    axes.set(xlabel="x, level-0 pixels", ylabel="y, level-0 pixels", title=elided(title, 80))
    axes.tick_params(colors=GREY)
    figure.colorbar(drawn, ax=axes, extend="max", shrink=0.9, label="attention ÷ mean attention")
