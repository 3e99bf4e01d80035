"""The tables of the report that compare encoders: on the page, and beside it as CSV, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from hpcssl.report import leaderboard as compare
from hpcssl.report.arms import short_step
from hpcssl.report.formats import table_files
from hpcssl.report.summary import difference_text
from hpcssl.report.times import step_times
from hpcssl.runs.trace import read_metrics


@dataclass(frozen=True, kw_only=True)
class ComparisonTable:
    """A table of the page."""

    name: str
    title: str
    sentences: Sequence[str] = ()
    """What it says in words, before it."""
    header: list[str]
    rows: list[list[str]]
    note: str
    table: pd.DataFrame
    """Its numbers."""

    @property
    def files(self) -> Mapping[str, str]:
        """Name to content of the files beside the page."""
        return table_files(self.name, self.table, self.header, self.rows)


def comparison_tables(results: pd.DataFrame, summary: pd.DataFrame, runs: Sequence[Path] = ()) -> list[ComparisonTable]:
    """Return leaderboard and pairs, where there are several encoders, and early saturation, where several checkpoints.

    `runs` tell what the training after saturation cost: a run's folder has the encoder's name.
    """
    tables = []
    if summary["encoder"].nunique() > 1:
        tables += [_leaderboard(summary), _pairs(results, summary)]
    times = {run.resolve().name: step_times(read_metrics(run)) for run in runs}
    saturated = compare.saturation(results, {name: t for name, t in times.items() if t is not None})
    return [*tables, _saturation(saturated)] if len(saturated) else tables


def _leaderboard(summary: pd.DataFrame) -> ComparisonTable:
    table = compare.leaderboard(summary)
    header, *rows = compare.cells(table)
    return ComparisonTable(
        name="leaderboard",
        title="Leaderboard",
        header=header,
        rows=rows,
        note="The last checkpoint of every encoder, the best mean first; 95 % bootstrap intervals over the splits.",
        table=table,
    )


def _pairs(results: pd.DataFrame, summary: pd.DataFrame) -> ComparisonTable:
    table = compare.pairs(results, summary)
    words = {"better": "first is better", "worse": "second is better", "unclear": "undecided", "unknown": "too few"}
    rows = [
        [
            row["task"],
            _arm_name(row["encoder"], row["checkpoint"]),
            _arm_name(row["than_encoder"], row["than_checkpoint"]),
            difference_text(row["difference"], row["low"], row["high"]),
            "–" if np.isnan(row["p"]) else f"{row['p']:.3f}" if row["p"] >= 0.001 else "< 0.001",
            words[row["outcome"]],
        ]
        for row in table.to_dict("records")
    ]
    return ComparisonTable(
        name="pairs",
        title="Encoder against encoder",
        sentences=compare.pair_verdicts(table),
        header=["task", "first", "second", "difference (95 % interval)", "p", "verdict"],
        rows=rows,
        note="Differences first − second, split by split; intervals and p-values of the t-test that is corrected for "
        "the overlap of the splits (Nadeau and Bengio 2003), each for this comparison alone.",
        table=table,
    )


def _saturation(table: pd.DataFrame) -> ComparisonTable:
    records = table.to_dict("records")
    rows = [
        [
            row["task"],
            row["encoder"],
            *(short_step(row[name]) for name in ("first", "best", "last")),
            difference_text(row["difference"], row["low"], row["high"]),
            f"{row['share_after']:.0%}",
            "–" if np.isnan(row["gpu_hours_after"]) else f"{row['gpu_hours_after']:,.3g}",
        ]
        for row in records
    ]
    return ComparisonTable(
        name="saturation",
        title="Early saturation",
        sentences=[compare.saturation_text(row) for row in records],
        header=["task", "encoder", "first", "best", "last", "first − best", "training after", "GPU-hours after"],
        rows=rows,
        note="First: the earliest trained checkpoint whose corrected interval of the difference to the best one "
        "includes zero, of those that were measured.",
        table=table,
    )


def _arm_name(encoder: str, checkpoint: str) -> str:
    return f"{encoder}, {short_step(checkpoint)}" if checkpoint else encoder
