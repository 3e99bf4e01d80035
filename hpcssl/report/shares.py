"""Figure: organ shares before and after balancing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hpcssl.report.style import PALETTE, Chart, draw, elided
from hpcssl.schedule.inspect import organ_shares

_BAR = 0.38
_FEW = 16


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
        png=draw(height, lambda figure: _paint(figure, table)),
        table=table,
    )


def _paint(figure: Figure, table: pd.DataFrame) -> None:
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
