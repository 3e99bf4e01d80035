"""Arms: a checkpoint of an encoder on a task, and its results as one matrix (splits × epochs)."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd

from hpcssl.core.errors import UserError

SCORES = ("auc", "r2")  # a task is judged by the first of these that it has
UNTRAINED = "0"
VAL_PER_TRAIN = 0.25  # of the paper's splits, 80 to 20


class ReportError(UserError):
    """An input from which no report can be made."""


class Arm(NamedTuple):
    """What one line of a figure stands for."""

    task: str
    encoder: str
    checkpoint: str


def split_matrices(results: pd.DataFrame, metric: str) -> dict[Arm, pd.DataFrame]:
    """Return for every arm, in the order of the figures, a frame (splits × epochs).

    The replicas of a split are averaged. A replica without a value is left out of its split's average; a split
    without any is NaN.
    """
    rows = results[results["metric"] == metric]
    means = rows.groupby(["task", "encoder", "checkpoint", "split", "epoch"], sort=True)["value"].mean()
    tables = {Arm(*map(str, key)): part for key, part in means.groupby(level=[0, 1, 2])}
    return {arm: tables[arm].droplevel([0, 1, 2]).unstack("epoch") for arm in sorted(tables, key=arm_order)}


def score_metrics(results: pd.DataFrame) -> dict[str, str]:
    """Return the metric by which each task is judged: auc, or r2 where values are predicted."""
    measured = results.groupby("task")["metric"].unique()
    chosen = {str(task): next((m for m in SCORES if m in metrics), None) for task, metrics in measured.items()}
    return {task: metric for task, metric in chosen.items() if metric}


def score_matrices(results: pd.DataFrame) -> dict[Arm, pd.DataFrame]:
    """Return `split_matrices` of each task's own metric."""
    metrics = score_metrics(results)
    of_metric = {metric: split_matrices(results, metric) for metric in set(metrics.values())}
    arms = {arm: m for metric, table in of_metric.items() for arm, m in table.items() if metrics[arm.task] == metric}
    return {arm: arms[arm] for arm in sorted(arms, key=arm_order)}


def replicas_with_value(results: pd.DataFrame) -> pd.Series:
    """Return how many replicas have a score at the last epoch of their arm, by (task, encoder, checkpoint, split)."""
    rows = results[results["metric"] == results["task"].map(score_metrics(results))]
    last = rows.groupby(["task", "encoder", "checkpoint"])["epoch"].transform("max")
    return rows[rows["epoch"] == last].groupby(["task", "encoder", "checkpoint", "split"])["value"].count()


def val_per_train(results: pd.DataFrame, task: str) -> float:
    """Return a task's validation slides for one training slide; those of the paper's splits where nothing says."""
    return float(results.attrs.get("val_per_train", {}).get(task, VAL_PER_TRAIN))


def arm_order(arm: Arm) -> tuple[str, str, int, int, str]:
    """Sort by task, encoder and step; other names of checkpoints come after the numbers."""
    number = int(arm.checkpoint) if arm.checkpoint.isdigit() else -1
    named = bool(arm.checkpoint) and number < 0
    return arm.task, arm.encoder, int(named), number, arm.checkpoint


def short_step(checkpoint: str, digits: int = 3) -> str:
    """Name a checkpoint where room is scarce.

    >>> [short_step(s) for s in ("0", "450", "62530", "1500000", "final")]
    ['untrained', '450', '62.5k', '1.5M', 'final']
    """
    if checkpoint == UNTRAINED:
        return "untrained"
    if not checkpoint.isdigit() or int(checkpoint) < 10_000:
        return f"{int(checkpoint):,}" if checkpoint.isdigit() else checkpoint
    scale, unit = (1e6, "M") if int(checkpoint) >= 1_000_000 else (1e3, "k")
    return f"{int(checkpoint) / scale:.{digits}g}{unit}"
