"""Encoders against each other: a table of encoders and tasks, paired differences with a verdict, and early saturation.

An encoder is represented by its last checkpoint. All encoders share the splits of a task, so differences are taken
split by split (see `hpcssl.report.paired`); p-values are those of single comparisons.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import pandas as pd

from hpcssl.report.arms import UNTRAINED, Arm, arm_order, score_matrices, short_step
from hpcssl.report.paired import VAL_PER_TRAIN, corrected
from hpcssl.report.summary import interval_text

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
    tasks = summary.drop_duplicates("task").set_index("task")["metric"]
    by_arm = summary.set_index(["encoder", "checkpoint", "task"])
    rows = []
    for encoder, checkpoint in representatives(summary):
        row: dict[str, object] = {"encoder": encoder, "checkpoint": checkpoint}
        for task, metric in tasks.items():
            key = (encoder, checkpoint, task)
            found = by_arm.loc[key] if key in by_arm.index else None
            told = "–" if found is None else interval_text(found["score"], found["score_low"], found["score_high"])
            row[f"{task}{_METRIC_NAMES[metric]}"] = told
        row["mean"] = _mean(summary, encoder, checkpoint)
        rows.append(row)
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
    ratios = results.attrs.get("val_per_train", {})
    rows = []
    for one, other in combinations(representatives(summary), 2):
        for task in sorted({arm.task for arm in matrices}):
            a, b = matrices.get(Arm(task, *one)), matrices.get(Arm(task, *other))
            if a is not None and b is not None:
                found = corrected(a.iloc[:, -1] - b.iloc[:, -1], ratios.get(task, VAL_PER_TRAIN))
                rows.append((task, *one, *other, *found, found.outcome))
    columns = ["task", "encoder", "checkpoint", "than_encoder", "than_checkpoint"]
    return pd.DataFrame(rows, columns=[*columns, "difference", "low", "high", "p", "splits", "outcome"])


def pair_verdicts(table: pd.DataFrame) -> list[str]:
    """Return a sentence for every pair, of many encoders for those with the best only.

    "Beats" means that the corrected interval of the difference is above zero.
    """
    encoders = list(dict.fromkeys([*table["encoder"], *table["than_encoder"]]))
    told = []
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
        told.append(f"{one} beats {other} on {better} of {of}{' (' + ', '.join(rest) + ')' if rest else ''}.")
    return told


def saturation(results: pd.DataFrame, hours: Mapping[str, pd.DataFrame] | None = None) -> pd.DataFrame:
    """Return, for every encoder with several trained checkpoints, the first one that is not worse than the best.

    Not worse: the corrected interval of the paired difference to the checkpoint with the highest mean includes zero.

    Parameters
    ----------
    hours : of an encoder's run, columns step and process_hours

    Returns
    -------
    Columns: task, encoder, best, first, last (checkpoints), difference (first - best) with low and high, share_after
    (of the training, in steps) and gpu_hours_after (NaN where unknown).
    """
    ratios = results.attrs.get("val_per_train", {})
    trained: dict[tuple[str, str], dict[str, pd.Series]] = {}
    for arm, matrix in score_matrices(results).items():
        if arm.checkpoint.isdigit() and arm.checkpoint != UNTRAINED:
            trained.setdefault((arm.task, arm.encoder), {})[arm.checkpoint] = matrix.iloc[:, -1]
    rows = []
    for (task, encoder), found in trained.items():
        if len(found) < 2 or not any(values.notna().any() for values in found.values()):
            continue
        best = max(found, key=lambda c: (np.nan_to_num(found[c].mean(), nan=-np.inf), -int(c)))
        ratio = ratios.get(task, VAL_PER_TRAIN)
        against = {c: corrected(values - found[best], ratio) for c, values in found.items()}
        first = next(c for c in found if c == best or against[c].outcome == "unclear")
        last = list(found)[-1]
        rows.append(
            {
                "task": task,
                "encoder": encoder,
                "best": best,
                "first": first,
                "last": last,
                **dict(zip(("difference", "low", "high"), against[first][:3])),
                "share_after": 1 - int(first) / int(last),
                "gpu_hours_after": _hours_between((hours or {}).get(encoder), int(first), int(last)),
            }
        )
    columns = ["task", "encoder", "best", "first", "last", "difference", "low", "high", "share_after"]
    return pd.DataFrame(rows, columns=[*columns, "gpu_hours_after"])


def saturation_text(row: Mapping[str, object]) -> str:
    """Return a saturation in words."""
    first, last = (f"{int(str(row[name])):,}" for name in ("first", "last"))
    told = f"{row['task']}, {row['encoder']}: step {first} is the first that is not worse than the best"
    told += f" ({int(str(row['best'])):,})"
    share, spent = float(str(row["share_after"])), float(str(row["gpu_hours_after"]))
    if share <= 0:
        return f"{told}: no early saturation."
    cost = "" if np.isnan(spent) else f", {spent:,.3g} GPU-hours"
    return f"{told}; {share:.0%} of the training came after it, up to step {last}{cost}."


def cells(table: pd.DataFrame) -> list[list[str]]:
    """Return header and rows of a leaderboard as text."""
    rows = [[_cell(name, row[name]) for name in table.columns] for row in table.to_dict("records")]
    return [list(table.columns), *rows]


def _cell(column: str, value: object) -> str:
    if column == "checkpoint":
        return short_step(str(value)) or "–"
    if isinstance(value, float):
        return "–" if np.isnan(value) else f"{value:.3f}"
    return str(value)


def _hours_between(hours: pd.DataFrame | None, first: int, last: int) -> float:
    """Return the process-hours that a run spent between two steps, NaN where its trace does not say."""
    if hours is None or "process_hours" not in hours:
        return np.nan
    upto = [hours.loc[hours["step"] <= step, "process_hours"] for step in (first, last)]
    return float(upto[1].max() - upto[0].max()) if all(len(part) for part in upto) else np.nan
