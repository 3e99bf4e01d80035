"""Figures of one schedule: organ shares, repeats of tiles, slides of passes, coverage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from hpcssl.core.atomic import write_atomic
from hpcssl.report.style import PALETTE, Chart, draw, elided
from hpcssl.schedule.inspect import Inspection, organ_shares

_HEIGHT_INCH = 3.0
_BAR = 0.38  # of organs: its height
_FEW = 16


def write_inspection(schedule: Path, inspection: Inspection, out: Path) -> list[Path]:
    """Write each figure as PNG with its numbers as CSV beside it into the folder `out`; returns the pictures."""
    of_table = _repeats(inspection.repeats), _passes(inspection.passes), _coverage(inspection.coverage)
    charts = [organ_shares_chart(schedule), *of_table]
    out.mkdir(parents=True, exist_ok=True)
    for chart in charts:
        write_atomic(out / f"{chart.name}.png", chart.png)
        write_atomic(out / f"{chart.name}.csv", chart.table.to_csv(index=False, lineterminator="\n"))
    return [out / f"{chart.name}.png" for chart in charts]


def organ_shares_chart(schedule: Path) -> Chart:
    """Return the figure of a schedule's organ shares: natural (by tiles) beside scheduled (by positions)."""
    table = organ_shares(schedule).sort_values(["natural_share", "organ"], ascending=[False, True], ignore_index=True)
    height = max(1.9, 1.2 + (0.32 if len(table) <= _FEW else 0.25) * len(table))
    largest, after = table.iloc[0], table["scheduled_share"]
    return Chart(
        name="organ_shares",
        title="Organ shares before and after balancing",
        caption=(
            f"Share of each organ among the {int(table['num_tiles'].sum()):,} tiles (natural) and among the "
            f"{int(table['positions'].sum()):,} positions of the schedule (scheduled)."
        ),
        alt=(
            f"Bars for {len(table)} organs. {largest['organ']} has {largest['natural_share']:.1%} of the tiles and "
            f"{largest['scheduled_share']:.1%} of the positions; after balancing the shares lie between "
            f"{after.min():.1%} and {after.max():.1%}."
        ),
        png=draw(height, lambda figure: _paint_shares(figure, table)),
        table=table,
    )


def _paint_shares(figure: Figure, table: pd.DataFrame) -> None:
    axes = figure.subplots()
    places = np.arange(len(table))
    for offset, column, colour, label in (
        (-_BAR / 2, "natural_share", "#9A9A9A", "natural, by tiles"),
        (_BAR / 2, "scheduled_share", PALETTE[0], "scheduled, by positions"),
    ):
        percent = 100 * table[column].to_numpy(dtype=float)
        bars = axes.barh(places + offset, percent, height=_BAR, color=colour, label=label)
        size = 7 if len(table) <= _FEW else 6
        axes.bar_label(bars, labels=[_percent(p) for p in percent], padding=3, fontsize=size)
    axes.set_yticks(places, [elided(str(organ), 30) for organ in table["organ"]])
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.set_xlabel("share in %")
    axes.margins(x=0.1)
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=2)


def _percent(value: float) -> str:
    """Return a share with as many digits as it needs.

    >>> _percent(33.333), _percent(0.042), _percent(0.0)
    ('33.3', '0.042', '0')
    """
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}" if value >= 0.01 else "<0.01" if value > 0 else "0"


def _repeats(table: pd.DataFrame) -> Chart:
    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.bar(table["draws"], table["tiles"], width=0.8, color=PALETTE[0])
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(bottom=0.5)
        axes.set_xlim(table["draws"].min() - 1, table["draws"].max() + 1)
        _label_counts(axes, "draws of a tile over the whole schedule", "tiles")

    most = table.iloc[-1]
    return Chart(
        name="repeats",
        title="Repeats per tile",
        caption="How many tiles the schedule draws how often; 0: never.",
        alt=f"Bars over the number of draws; the most often drawn {most['tiles']:,} tiles come {most['draws']} times.",
        png=draw(_HEIGHT_INCH, paint),
        table=table,
    )


def _passes(table: pd.DataFrame) -> Chart:
    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        bottom = pd.Series(0, index=sorted(set(table["pass"])))
        place = table.groupby("pass").cumcount()
        for number in sorted(set(place)):
            rows = table[place == number].set_index("pass")["slides"]
            colour, edge = PALETTE[number % len(PALETTE)], "white"
            axes.bar(rows.index, rows, bottom=bottom[rows.index], color=colour, edgecolor=edge, linewidth=0.5)
            bottom[rows.index] += rows
        _label_counts(axes, "pass (a colour is a pseudo-epoch of it)", "slides")

    whole = table.groupby("pass")["slides"].sum()
    return Chart(
        name="slides_per_pass",
        title="Slides per pass",
        caption="Slides that each pass uses, stacked by its pseudo-epochs; a whole pass uses every slide once.",
        alt=f"{len(whole)} bars of {whole.min():,} to {whole.max():,} slides.",
        png=draw(_HEIGHT_INCH, paint),
        table=table,
    )


def _coverage(table: pd.DataFrame) -> Chart:
    start = pd.DataFrame({"samples_seen": [0], "slides_share": [0.0], "tiles_share": [0.0]})

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        lines = pd.concat([start, table])
        for name, colour, dash in (("slides", PALETTE[1], "-"), ("tiles", PALETTE[0], "--")):  # both show if alike
            share, label = 100 * lines[f"{name}_share"], f"{name} seen"
            axes.plot(lines["samples_seen"], share, dash, color=colour, label=label, marker="o", markersize=2.5)
        axes.set(xlabel="samples seen", ylabel="share in %", ylim=(0, 104))
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(FuncFormatter(_count))
        figure.legend(loc="outside upper center", ncols=2)

    last = table.iloc[-1]
    return Chart(
        name="coverage",
        title="Coverage against samples seen",
        caption="Share of the slides and of the tiles that have been seen at least once.",
        alt=(
            f"Two rising lines; at the end {last['slides_share']:.1%} of the slides"
            f" and {last['tiles_share']:.1%} of the tiles."
        ),
        png=draw(_HEIGHT_INCH, paint),
        table=table,
    )


def _label_counts(axes: Axes, of_x: str, of_y: str) -> None:
    """Label bars that stand over whole numbers and count something."""
    axes.set(xlabel=of_x, ylabel=of_y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(_count))
    axes.grid(axis="x", visible=False)


def _count(value: float, _place: int | None = None) -> str:
    """Return a count for an axis.

    >>> _count(65_000_000), _count(1_500_000_000), _count(84_000), _count(0)
    ('65 M', '1.5 G', '84,000', '0')
    """
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:,.0f}"
