"""Results of the benchmark as a checked table, and as one matrix (splits × epochs) for every encoder of every task."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from hpcssl.core.errors import UserError

FILE_NAME = "results.csv"
TASKS_NAME = "tasks.csv"
SCORES = ("auc", "r2")  # a task is judged by the first of these that it has
COLUMNS = ("task", "encoder", "checkpoint", "split", "replica", "epoch", "metric", "value")
UNTRAINED = "0"
_RUN = ["task", "encoder", "checkpoint", "split", "replica"]
_MISSING = ("", "nan", "na", "none", "null")


class ReportError(UserError):
    """An input from which no report can be made."""


class Arm(NamedTuple):
    """What one line of a figure stands for: a checkpoint of an encoder on a task."""

    task: str
    encoder: str
    checkpoint: str


def read_results(folder: Path) -> pd.DataFrame:
    """Read RESULTS/results.csv and check it (see `checked`).

    Its `attrs` hold `val_per_train`: of every task in RESULTS/tasks.csv, validation slides for one training slide.

    Raises
    ------
    ReportError
        If there is none, or it is empty, is not CSV, lacks a column, or holds a value that is no number.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise ReportError(f"{folder}: no {FILE_NAME}; expected the folder that `hpcssl mccv --out` wrote to the end")
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except pd.errors.EmptyDataError:
        raise ReportError(f"{path}: the file is empty; run `hpcssl mccv` again") from None
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ReportError(f"{path}: not a CSV table ({error}); expected {', '.join(COLUMNS)}") from None
    frame.attrs["val_per_train"] = _val_per_train(folder / TASKS_NAME)
    return checked(frame, where=str(path))


def checked(frame: pd.DataFrame, *, where: str = "results") -> pd.DataFrame:
    """Return a results table in its canonical types: names as text, epoch int64, value float64 (not finite = NaN).

    Raises
    ------
    ReportError
        If columns are missing, there are no rows, a number is none, or a row comes twice.
    """
    missing = [name for name in COLUMNS if name not in frame.columns]
    if missing:
        raise ReportError(f"{where}: no column {', '.join(missing)}; expected {', '.join(COLUMNS)}")
    if frame.empty:
        raise ReportError(f"{where}: no rows; run `hpcssl mccv` again")
    result = pd.DataFrame({name: _texts(frame[name]) for name in COLUMNS[:-1]})
    result["checkpoint"] = result["checkpoint"].map({c: _step_text(c) for c in result["checkpoint"].unique()})
    epoch = _numbers(frame["epoch"], f"{where}: epoch")
    if not (np.isfinite(epoch) & (epoch == np.floor(epoch))).all():
        raise ReportError(f"{where}: an epoch is not a whole number; expected 1, 2, 3 …")
    result["epoch"] = epoch.astype("int64")
    result["value"] = _numbers(frame["value"], f"{where}: value")
    result.attrs = dict(frame.attrs)
    twice = result.duplicated([*_RUN, "epoch", "metric"])
    if twice.any():
        row = result[twice].iloc[0]
        raise ReportError(
            f"{where}: task {row.task}, encoder {row.encoder}, checkpoint {row.checkpoint or '(none)'}, "
            f"split {row.split}, replica {row.replica}, epoch {row.epoch}, {row.metric} comes twice; expected it once"
        )
    return result


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
    held = results.groupby("task")["metric"].unique()
    chosen = {str(task): next((m for m in SCORES if m in metrics), None) for task, metrics in held.items()}
    return {task: metric for task, metric in chosen.items() if metric}


def score_matrices(results: pd.DataFrame) -> dict[Arm, pd.DataFrame]:
    """Return `split_matrices` of each task's own metric."""
    metrics = score_metrics(results)
    found = {metric: split_matrices(results, metric) for metric in set(metrics.values())}
    arms = {arm: m for metric, table in found.items() for arm, m in table.items() if metrics[arm.task] == metric}
    return {arm: arms[arm] for arm in sorted(arms, key=arm_order)}


def replicas_with_value(results: pd.DataFrame) -> pd.Series:
    """Return how many replicas have a score at the last epoch of their arm, by (task, encoder, checkpoint, split)."""
    rows = results[results["metric"] == results["task"].map(score_metrics(results))]
    last = rows.groupby(["task", "encoder", "checkpoint"])["epoch"].transform("max")
    return rows[rows["epoch"] == last].groupby(["task", "encoder", "checkpoint", "split"])["value"].count()


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


def _val_per_train(path: Path) -> dict[str, float]:
    """Return the ratio of every task; none where the results come from elsewhere."""
    if not path.is_file():
        return {}
    try:
        table = pd.read_csv(path, dtype={"task": str})
        return dict(zip(table["task"], (table["val"] / table["train"]).astype(float)))
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ReportError(f"{path}: not the table that `hpcssl mccv` writes ({error}); run it again") from None


def _texts(column: pd.Series) -> pd.Series:
    return column.astype(object).where(column.notna(), "").map(str).str.strip()


def _step_text(text: str) -> str:
    """Return a step as a plain integer, also where a table with blanks had made it a float (`20.0`)."""
    match = re.fullmatch(r"([0-9]+)(\.0*)?", text)
    return str(int(match[1])) if match else ("" if text.lower() in _MISSING else text)


def _numbers(column: pd.Series, where: str) -> pd.Series:
    numbers = pd.to_numeric(column, errors="coerce").astype("float64")
    if not pd.api.types.is_numeric_dtype(column):
        bad = numbers.isna() & ~_texts(column).str.lower().isin(_MISSING)
        if bad.any():
            raise ReportError(f"{where}: {column[bad].iloc[0]!r} in row {int(np.argmax(bad)) + 1} is not a number")
    return numbers.where(np.isfinite(numbers))
