"""What came out: one row per task, encoder and checkpoint, and a verdict in words.

A new column of the report is added here: its number in `summarise`, its text in `SHOWN`.

The score of a fit is the AUC of its last epoch (R² where values are predicted), never the best one; replicas of a
split are averaged first. A difference to the untrained weights is taken split by split, because all encoders share the
splits, and its interval is corrected for the overlap of the splits (see `hpcssl.report.intervals`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from hpcssl.evaluate.results import check_rows
from hpcssl.report import arms
from hpcssl.report.arms import UNTRAINED, ReportError, short_step, val_per_train
from hpcssl.report.intervals import Difference, corrected, mean_interval

METRICS = {"auc": "AUC", "r2": "R²"}


class Column(NamedTuple):
    """A column of the closing table."""

    header: str
    """`{score}` stands for the metrics of the table."""
    cell: Callable[[Mapping[Any, Any]], str]
    """Text of a row of the summary."""
    min_width: int
    """Characters on a terminal."""


SHOWN = (
    Column("task", lambda row: row["task"], min_width=6),
    Column("encoder", lambda row: row["encoder"], min_width=10),
    Column("checkpoint", lambda row: _checkpoint(row["checkpoint"]), min_width=10),
    Column("{score} (95 % interval)", lambda row: interval_text(*triple(row, "score")), min_width=13),
    Column("difference to untrained", lambda row: difference_text(*triple(row, "difference")), min_width=10),
    Column("runs", lambda row: f"{row['splits']} × {row['replicas']}", min_width=6),
)
"""The closing table of page, terminal, Markdown and LaTeX."""


def summarise(results: pd.DataFrame) -> pd.DataFrame:
    """Return one row per task, encoder and checkpoint of a results table; what cannot be computed is NaN.

    ResultsError if it is no results table, ReportError if it holds no score.
    """
    table = check_rows(results)
    matrices, metrics = arms.score_matrices(table), arms.score_metrics(table)
    if not matrices:
        raise ReportError("results: no rows of the metric auc or r2; expected one for every epoch of every run")
    counts = arms.replicas_with_value(table)
    rows = []
    for arm, matrix in matrices.items():
        last = matrix.iloc[:, -1]
        base = matrices.get(arm._replace(checkpoint=UNTRAINED)) if arm.checkpoint != UNTRAINED else None
        score, low, high = (float(v[0]) for v in mean_interval(last.to_numpy()[:, None], arm.task))
        gain = corrected([] if base is None else last - base.iloc[:, -1], val_per_train(table, arm.task))
        rows.append(
            {
                **arm._asdict(),
                "metric": metrics[arm.task],
                "last_epoch": int(matrix.columns[-1]),
                "splits": int(last.notna().sum()),  # that have a score
                "replicas": int(counts.loc[arm].max()),  # of the split that has most
                "score": score,
                "score_low": low,  # of the bootstrap interval over the splits
                "score_high": high,
                "difference": gain.mean,  # to the untrained weights, over the splits that both have
                "difference_low": gain.low,  # of the corrected interval
                "difference_high": gain.high,
                "paired_splits": gain.splits,
            }
        )
    return pd.DataFrame(rows)


def summary_rows(summary: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the closing table as text."""
    score = " or ".join(METRICS[metric] for metric in summary["metric"].unique())
    rows = [[column.cell(row) for column in SHOWN] for row in summary.to_dict("records")]
    return [column.header.format(score=score) for column in SHOWN], rows


def triple(row: Any, name: str) -> tuple[float, float, float]:
    """Return a value of a row and the ends of its interval."""
    return row[name], row[f"{name}_low"], row[f"{name}_high"]


def _checkpoint(name: str) -> str:
    return f"{int(name):,}" if name.isdigit() and name != UNTRAINED else short_step(name) or "–"


def verdict(summary: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """Return, for each encoder, how its last checkpoint did against its untrained weights: (overall, task by task).

    "Beat" and "fell behind" mean that the interval of the paired difference excludes zero.
    """
    sentences = []
    for encoder, rows in summary.groupby("encoder", sort=True):
        trained = rows[rows["checkpoint"].str.isdigit() & (rows["checkpoint"] != UNTRAINED)]
        untrained = rows[rows["checkpoint"] == UNTRAINED].set_index("task")["score"]
        last = [of_task.iloc[-1] for task, of_task in trained.groupby("task", sort=True) if task in untrained.index]
        if last:
            overall = _overall(str(encoder), [_outcome(row) for row in last])
            sentences.append((overall, [_describe(row, untrained[row["task"]]) for row in last]))
    nothing = "No encoder has both its untrained weights and a later checkpoint in these results: nothing to compare."
    return sentences or [(nothing, [])]


def verdict_text(summary: pd.DataFrame) -> str:
    """Return the verdict as lines, those of the tasks indented."""
    return "\n".join(line for overall, tasks in verdict(summary) for line in (overall, *(f"  {t}" for t in tasks)))


def _outcome(row: pd.Series) -> str:
    return Difference(*triple(row, "difference"), np.nan, row["paired_splits"]).outcome


def _overall(encoder: str, outcomes: list[str]) -> str:
    words = {
        "worse": "it fell behind them",
        "unclear": "the interval of the difference includes zero",
        "unknown": "there are too few values to say",
    }
    rest = [f"on {outcomes.count(kind)} {said}" for kind, said in words.items() if kind in outcomes]
    of = f"{len(outcomes)} task{'s' if len(outcomes) > 1 else ''}"
    beat = f"{encoder}: the last checkpoint beat the untrained weights on {outcomes.count('better')} of {of}"
    return "; ".join([beat, *rest]) + "."


def _describe(row: pd.Series, untrained: float) -> str:
    task, outcome = row["task"], _outcome(row)
    if np.isnan(row["difference"]):
        return f"{task}: nothing to compare (no split has a score of both untrained weights and last checkpoint)."
    values = (
        f"{task}: {METRICS[row['metric']]} {row['score']:.3f} after step {int(row['checkpoint']):,} against "
        f"{untrained:.3f} untrained, difference {signed(row['difference'])}"
    )
    if outcome == "unknown":
        return f"{values}; one split gives no interval, so this decides nothing."
    ending = "the interval includes zero" if outcome == "unclear" else f"{outcome} than untrained"
    return f"{values} (95 % interval {signed(row['difference_low'])} to {signed(row['difference_high'])}): {ending}."


def signed(value: float) -> str:
    """Return a difference with its sign, and a true minus.

    >>> signed(0.0912), signed(-0.02), signed(float("nan"))
    ('+0.091', '−0.020', '–')
    """
    return "–" if np.isnan(value) else f"{value:+.3f}".replace("-", "−")


def interval_text(mean: float, low: float, high: float) -> str:
    """Return a mean and its interval for a table.

    >>> interval_text(0.81234, 0.79, 0.83), interval_text(0.5, float("nan"), float("nan"))
    ('0.812 (0.790–0.830)', '0.500')
    """
    if np.isnan(mean):
        return "–"
    return f"{mean:.3f}" if np.isnan(low) else f"{mean:.3f} ({low:.3f}–{high:.3f})"


def difference_text(mean: float, low: float, high: float) -> str:
    """Return a signed difference and its interval for a table.

    >>> difference_text(0.0912, 0.06, 0.12)
    '+0.091 (+0.060 to +0.120)'
    """
    return signed(mean) if np.isnan(mean) or np.isnan(low) else f"{signed(mean)} ({signed(low)} to {signed(high)})"
