"""The tables of the report that compare encoders: on the page, and beside it as CSV, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from hpcssl.report.arms import short_step
from hpcssl.report.formats import table_files
from hpcssl.report.leaderboard import (
    cells,
    leaderboard,
    pair_verdicts,
    pairs,
    saturation,
    saturation_text,
)
from hpcssl.report.summary import difference_text
from hpcssl.report.times import step_times
from hpcssl.runs.trace import read_metrics


@dataclass(frozen=True, kw_only=True)
class ComparisonTable:
    """A table of the page."""

    name: str
    title: str
    sentences: list[str]
    """What it says in words, before it."""
    header: list[str]
    rows: list[list[str]]
    note: str
    files: Mapping[str, str]
    """Name to content of the files beside the page."""


def comparison_tables(results: pd.DataFrame, summary: pd.DataFrame, runs: Sequence[Path] = ()) -> list[ComparisonTable]:
    """Return leaderboard and pairs, where there are several encoders, and early saturation, where several checkpoints.

    `runs` tell what the training after saturation cost: a run's folder has the encoder's name.
    """
    tables = []
    if summary["encoder"].nunique() > 1:
        tables += [_leaderboard(summary), _pairs(results, summary)]
    found = saturation(results, _hours(runs))
    if len(found):
        tables.append(_saturation(found))
    return tables


def _leaderboard(summary: pd.DataFrame) -> ComparisonTable:
    table = leaderboard(summary)
    header, *rows = cells(table)
    return ComparisonTable(
        name="leaderboard",
        title="Leaderboard",
        sentences=[],
        header=header,
        rows=rows,
        note="The last checkpoint of every encoder, the best mean first; 95 % bootstrap intervals over the splits.",
        files=table_files("leaderboard", table, header, rows),
    )


def _pairs(results: pd.DataFrame, summary: pd.DataFrame) -> ComparisonTable:
    table = pairs(results, summary)
    words = {"better": "first is better", "worse": "second is better", "unclear": "undecided", "unknown": "too few"}
    rows = [
        [
            str(row["task"]),
            _named(row["encoder"], row["checkpoint"]),
            _named(row["than_encoder"], row["than_checkpoint"]),
            difference_text(row["difference"], row["low"], row["high"]),
            "–" if np.isnan(row["p"]) else f"{row['p']:.3f}" if row["p"] >= 0.001 else "< 0.001",
            words[row["outcome"]],
        ]
        for row in table.to_dict("records")
    ]
    header = ["task", "first", "second", "difference (95 % interval)", "p", "verdict"]
    return ComparisonTable(
        name="pairs",
        title="Encoder against encoder",
        sentences=pair_verdicts(table),
        header=header,
        rows=rows,
        note="Differences first − second, split by split; intervals and p-values of the t-test that is corrected for "
        "the overlap of the splits (Nadeau and Bengio 2003), each for this comparison alone.",
        files=table_files("pairs", table, header, rows),
    )


def _saturation(found: pd.DataFrame) -> ComparisonTable:
    records = found.to_dict("records")
    rows = [
        [
            str(row["task"]),
            str(row["encoder"]),
            *(short_step(str(row[name])) for name in ("first", "best", "last")),
            difference_text(row["difference"], row["low"], row["high"]),
            f"{row['share_after']:.0%}",
            "–" if np.isnan(row["gpu_hours_after"]) else f"{row['gpu_hours_after']:,.3g}",
        ]
        for row in records
    ]
    header = ["task", "encoder", "first", "best", "last", "first − best", "training after", "GPU-hours after"]
    return ComparisonTable(
        name="saturation",
        title="Early saturation",
        sentences=[saturation_text({str(k): v for k, v in row.items()}) for row in records],
        header=header,
        rows=rows,
        note="First: the earliest trained checkpoint whose corrected interval of the difference to the best one "
        "includes zero, of those that were measured.",
        files=table_files("saturation", found, header, rows),
    )


def _named(encoder: object, checkpoint: object) -> str:
    step = short_step(str(checkpoint))
    return f"{encoder}, {step}" if step else str(encoder)


def _hours(runs: Sequence[Path]) -> dict[str, pd.DataFrame]:
    """Return the times of every run that recorded them, by the name of its folder."""
    recorded = {run.resolve().name: step_times(read_metrics(run)) for run in runs}
    return {name: times for name, times in recorded.items() if times is not None}
