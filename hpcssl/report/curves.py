"""Figures: loss and AUC over the epochs of the benchmark, one figure a task (the paper's Figure 2)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import count
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from hpcssl.report.arms import SCORES, Arm, split_matrices
from hpcssl.report.intervals import RESAMPLES, mean_interval
from hpcssl.report.style import SOLID, Chart, Look, draw, elided, looks, say_empty
from hpcssl.report.summary import METRICS as SUMMARY_NAMES

METRICS = {"train_loss": "training loss", "val_loss": "validation loss", "auc": "validation AUC", "r2": "validation R²"}
_MAX_BANDS = 6
_MAX_MARKED_EPOCHS = 12
WHAT_THE_INTERVAL_IS = (
    f"the 95 % bootstrap interval ({RESAMPLES:,} resamples of the splits) of the mean over the splits: the variability "
    "over the splits, which share slides, and so narrower than the uncertainty of the AUC itself"
)


def curve_charts(results: pd.DataFrame) -> list[Chart]:
    """Return one figure for each task of a checked results table; what was not trained (epoch 0) has no curve."""
    results = results[results["epoch"] > 0]
    if results.empty:
        return []
    tables = {metric: split_matrices(results, metric) for metric in METRICS}
    everything = looks([arm for table in tables.values() for arm in table])
    points = pd.concat([_points(metric, arm, m) for metric, table in tables.items() for arm, m in table.items()])
    tasks = sorted(points["task"].unique())
    return [
        _part(task, name, points[points["task"] == task], everything) for task, name in zip(tasks, file_names(tasks))
    ]


def file_names(tasks: list[str]) -> list[str]:
    """Return a file name's stem for each task, all different.

    >>> file_names(["lung: EGFR", "lung/EGFR"])
    ['curves_lung-EGFR', 'curves_lung-EGFR-2']
    """
    names: list[str] = []
    for task in tasks:
        stem = "curves_" + (re.sub(r"[^A-Za-z0-9_]+", "-", task).strip("-")[:60] or "task")
        taken = {name.lower() for name in names}
        numbered = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
        names.append(next(name for name in numbered if name.lower() not in taken))
    return names


def _points(metric: str, arm: Arm, matrix: pd.DataFrame) -> pd.DataFrame:
    mean, low, high = mean_interval(matrix.to_numpy(), arm.task)
    known = matrix.notna().sum().to_numpy()
    columns = {"metric": metric, "epoch": matrix.columns, "mean": mean, "low": low, "high": high, "splits": known}
    return pd.DataFrame({**arm._asdict(), **columns})


def _part(task: str, name: str, points: pd.DataFrame, everything: Mapping[tuple[str, str], Look]) -> Chart:
    present = set(zip(points["encoder"], points["checkpoint"]))
    used = {key: look for key, look in everything.items() if key in present}
    banded = _banded(list(used))
    metric = next((m for m in SCORES if (points["metric"] == m).any()), SCORES[0])
    score, scores = SUMMARY_NAMES[metric], points[points["metric"] == metric]
    most, fewest = int(points["splits"].max()), int(scores["splits"].min()) if len(scores) else 0
    caption = [f"Mean over {most} split{'s' if most != 1 else ''}, replicas of a split averaged first."]
    if most > 1:
        which = "Shaded" if len(banded) == len(used) else "Shaded, for the first and the last checkpoint only,"
        caption.append(f"{which} is {WHAT_THE_INTERVAL_IS}.")
    else:
        caption.append("With one split there is no interval.")
    if len(scores) and fewest < most:
        caption.append(f"Some splits have no {score} (as few as {fewest} of {most} have one) and are left out there.")
    last = [
        f"{look.label} {rows['mean'].iloc[-1]:.3f}"
        for key, look in used.items()
        if len(rows := scores[(scores["encoder"] == key[0]) & (scores["checkpoint"] == key[1])])
    ]
    return Chart(
        name=name,
        title=f"{task}: loss and {score} over the epochs",
        caption=" ".join(caption),
        alt=f"Training loss, validation loss and {score} by epoch on {task}. "
        f"{score} at the last epoch: {', '.join(last)}.",
        png=draw(5.6, lambda figure: _paint(figure, points, used, banded)),
        table=points,
    )


def _banded(keys: list[tuple[str, str]]) -> set[tuple[str, str]]:
    """Choose the lines that get a band: all, or, where bands would hide each other, each encoder's first and last."""
    if len(keys) <= _MAX_BANDS:
        return set(keys)
    first, last = ({key[0]: key for key in order} for order in (reversed(keys), keys))
    ends = {*first.values(), *last.values()}
    return ends if len(ends) <= _MAX_BANDS else set()


def _paint(
    figure: Figure, points: pd.DataFrame, used: Mapping[tuple[str, str], Look], banded: set[tuple[str, str]]
) -> None:
    grid = figure.subplots(2, 2, sharex=False).ravel()
    measured = [name for name in METRICS if name not in SCORES or (points["metric"] == name).any()]
    for axes, metric in zip(grid, measured if len(measured) > 2 else METRICS):
        label, rows = METRICS[metric], points[points["metric"] == metric]
        for key, look in used.items():
            line = rows[(rows["encoder"] == key[0]) & (rows["checkpoint"] == key[1])]
            if line.empty:
                continue
            marker = look.marker if len(line) <= _MAX_MARKED_EPOCHS else ""
            z = 2.5 if look.dash == SOLID else 2.4
            axes.plot(line["epoch"], line["mean"], **_style(look, marker), zorder=z)
            if key in banded:
                axes.fill_between(line["epoch"], line["low"], line["high"], color=look.colour, alpha=0.16, linewidth=0)
        if not rows["mean"].notna().any():
            say_empty(axes)
        axes.set(title=label, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10], min_n_ticks=1))
        if metric == "auc" and np.nanmin([*axes.get_ylim(), 1]) < 0.5 < axes.get_ylim()[1]:
            axes.axhline(0.5, color="#999999", linewidth=0.8, linestyle=":")
    _legend(grid[3], used, marked=points["epoch"].nunique() <= _MAX_MARKED_EPOCHS)


def _legend(axes: Axes, used: Mapping[tuple[str, str], Look], *, marked: bool) -> None:
    axes.set_axis_off()
    encoders = {encoder for encoder, _ in used}
    title = elided(next(iter(encoders)), 40) if len(encoders) == 1 else "encoder, checkpoint"
    handles = [
        Line2D([], [], **_style(look, look.marker if marked else ""), label=look.label) for look in used.values()
    ]
    size = 8.5 if len(used) <= 14 else 6.5 if len(used) <= 26 else 5.0
    columns = 1 if len(used) <= 18 or len(encoders) > 1 else 2
    place: dict[str, Any] = {"loc": "center left", "handlelength": 3, "alignment": "left"}
    axes.legend(handles=handles, title=title, fontsize=size, ncols=columns, **place)


def _style(look: Look, marker: str) -> dict[str, Any]:
    return {"color": look.colour, "linestyle": look.dash, "marker": marker, "markersize": 3}
