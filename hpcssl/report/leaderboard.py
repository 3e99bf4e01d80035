"""Encoders against each other: a table of encoders and tasks, paired differences with a verdict, and early saturation.

An encoder is represented by its last checkpoint. All encoders share the splits of a task, so differences are taken
split by split (see `hpcssl.report.intervals`); p-values are those of single comparisons.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from hpcssl.report.arms import UNTRAINED, Arm, arm_order, score_matrices, short_step, val_per_train
from hpcssl.report.intervals import corrected
from hpcssl.report.summary import interval_text, triple

_METRIC_NAMES = {"auc": "", "r2": " (R²)"}
_MOST_TOLD = 8  # encoders whose pairs are told in words


def representatives(summary: pd.DataFrame) -> list[tuple[str, str]]:
    """Return (encoder, last checkpoint) of every encoder, the best mean over the tasks first, those without one last.

    Without one: without a score on some task, or all of them where tasks are judged by different metrics.
    """
    arms = set(zip(summary["encoder"].map(str), summary["checkpoint"].map(str)))
    last = {encoder: (encoder, c) for encoder, c in sorted(arms, key=lambda a: arm_order(Arm("", *a)))}
    means = {arm: _mean(summary, *arm) for arm in last.values()}
    return sorted(means, key=lambda arm: (np.isnan(means[arm]), -np.nan_to_num(means[arm]), arm))


def leaderboard(summary: pd.DataFrame) -> pd.DataFrame:
    """Return one row an encoder, the best first: encoder, checkpoint, of every task the score, and their mean.

    A score is text, mean and interval; the mean is NaN unless the encoder has a score on every task, and where some
    tasks are judged by AUC and others by R².
    """
    records = summary.to_dict("records")
    names = {row["task"]: f"{row['task']}{_METRIC_NAMES[row['metric']]}" for row in records}
    scores = {(r["encoder"], r["checkpoint"], r["task"]): interval_text(*triple(r, "score")) for r in records}
    rows = []
    for arm in representatives(summary):
        of_tasks = {name: scores.get((*arm, task), "–") for task, name in names.items()}
        rows.append({"encoder": arm[0], "checkpoint": arm[1], **of_tasks, "mean": _mean(summary, *arm)})
    return pd.DataFrame(rows)


def _mean(summary: pd.DataFrame, encoder: str, checkpoint: str) -> float:
    """Return the mean score over all tasks, NaN where one is missing or they differ in their metric."""
    rows = summary[(summary["encoder"] == encoder) & (summary["checkpoint"] == checkpoint)]
    if summary["metric"].nunique() > 1 or rows["task"].nunique() < summary["task"].nunique():
        return np.nan
    return float(rows["score"].mean(skipna=False))


def pairs(results: pd.DataFrame, summary: pd.DataFrame) -> pd.DataFrame:
    """Return every pair of encoders on every task that both have: how much better the first is than the second.

    Columns: task, encoder, checkpoint, than_encoder, than_checkpoint, difference, low, high, p, splits, outcome.
    """
    matrices = score_matrices(results)
    rows = []
    for one, other in combinations(representatives(summary), 2):
        for task in sorted({arm.task for arm in matrices}):
            a, b = matrices.get(Arm(task, *one)), matrices.get(Arm(task, *other))
            if a is not None and b is not None:
                gain = corrected(a.iloc[:, -1] - b.iloc[:, -1], val_per_train(results, task))
                rows.append((task, *one, *other, *gain, gain.outcome))
    columns = ["task", "encoder", "checkpoint", "than_encoder", "than_checkpoint"]
    return pd.DataFrame(rows, columns=[*columns, "difference", "low", "high", "p", "splits", "outcome"])


def pair_verdicts(table: pd.DataFrame) -> list[str]:
    """Return a sentence for every pair, of many encoders for those with the best only.

    "Beats" means that the corrected interval of the difference is above zero.
    """
    encoders = list(dict.fromkeys([*table["encoder"], *table["than_encoder"]]))
    sentences = []
    for (one, other), rows in table.groupby(["encoder", "than_encoder"], sort=False):
        if len(encoders) > _MOST_TOLD and one != encoders[0]:
            continue
        counts = rows["outcome"].value_counts()
        better, worse = int(counts.get("better", 0)), int(counts.get("worse", 0))
        if worse > better:
            one, other, better, worse = other, one, worse, better
        of = f"{len(rows)} task{'s' if len(rows) > 1 else ''}"
        rest = [f"{worse} the other way round"] if worse else []
        undecided = len(rows) - better - worse
        rest += [f"undecided on {undecided}"] if undecided else []
        sentences.append(f"{one} beats {other} on {better} of {of}{' (' + ', '.join(rest) + ')' if rest else ''}.")
    return sentences


def saturation(results: pd.DataFrame, hours: Mapping[str, pd.DataFrame] | None = None) -> pd.DataFrame:
    """Return, for every encoder with several trained checkpoints, the first one that is not worse than the best.

    Not worse: the corrected interval of the paired difference to the checkpoint with the highest mean includes zero.
    `hours` has the columns step and process_hours of the runs of encoders.

    Columns: task, encoder, best, first, last (checkpoints), difference (first - best) with low and high, share_after
    (of the training, in steps) and gpu_hours_after (NaN where unknown).
    """
    trained: dict[tuple[str, str], dict[str, pd.Series]] = {}
    for arm, matrix in score_matrices(results).items():
        if arm.checkpoint.isdigit() and arm.checkpoint != UNTRAINED:
            trained.setdefault((arm.task, arm.encoder), {})[arm.checkpoint] = matrix.iloc[:, -1]
    rows = []
    for (task, encoder), scores in trained.items():
        if len(scores) < 2 or not any(values.notna().any() for values in scores.values()):
            continue
        means = {c: np.nan_to_num(values.mean(), nan=-np.inf) for c, values in scores.items()}
        best = max(scores, key=lambda c: (means[c], -int(c)))
        against = {c: corrected(values - scores[best], val_per_train(results, task)) for c, values in scores.items()}
        first = next(c for c in scores if c == best or against[c].outcome == "unclear")
        last = list(scores)[-1]
        spent = _hours_between((hours or {}).get(encoder), int(first), int(last))
        rows.append((task, encoder, best, first, last, *against[first][:3], 1 - int(first) / int(last), spent))
    columns = ["task", "encoder", "best", "first", "last", "difference", "low", "high", "share_after"]
    return pd.DataFrame(rows, columns=[*columns, "gpu_hours_after"])


def saturation_text(row: Mapping[Any, Any]) -> str:
    """Return a saturation in words."""
    first, best, last = (f"{int(row[name]):,}" for name in ("first", "best", "last"))
    sentence = f"{row['task']}, {row['encoder']}: step {first} is the first that is not worse than the best ({best})"
    if row["share_after"] <= 0:
        return f"{sentence}: no early saturation."
    cost = "" if np.isnan(row["gpu_hours_after"]) else f", {row['gpu_hours_after']:,.3g} GPU-hours"
    return f"{sentence}; {row['share_after']:.0%} of the training came after it, up to step {last}{cost}."


def cells(table: pd.DataFrame) -> list[list[str]]:
    """Return header and rows of a leaderboard as text."""
    steps = [short_step(checkpoint) or "–" for checkpoint in table["checkpoint"]]
    means = ["–" if np.isnan(mean) else f"{mean:.3f}" for mean in table["mean"]]
    return [list(table.columns), *table.assign(checkpoint=steps, mean=means).to_numpy().tolist()]


def _hours_between(hours: pd.DataFrame | None, first: int, last: int) -> float:
    """Return the process-hours that a run spent between two steps, NaN where its trace does not say."""
    if hours is None or "process_hours" not in hours:
        return np.nan
    upto = [hours.loc[hours["step"] <= step, "process_hours"] for step in (first, last)]
    return float(upto[1].max() - upto[0].max()) if all(len(part) for part in upto) else np.nan
