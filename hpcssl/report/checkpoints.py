"""Figure: the last epoch's AUC by checkpoint, its distribution over the splits (the paper's Figure 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hpcssl.report.arms import UNTRAINED, Arm, replicas_with_value, score_matrices, short_step
from hpcssl.report.curves import WHAT_THE_INTERVAL_IS
from hpcssl.report.style import GREY, INK, Chart, Look, draw, elided, looks, say_empty
from hpcssl.report.summary import METRICS

_GAP = 0.6
_MAX_PER_HALF_WIDTH = 14
_LOWEST_SPAN = 0.06
_FEWEST_FOR_BOX = 5


def checkpoints_chart(results: pd.DataFrame, summary: pd.DataFrame) -> Chart:
    """Return the figure of a checked results table and its summary."""
    last = {arm: matrix.iloc[:, -1] for arm, matrix in score_matrices(results).items()}
    counts = replicas_with_value(results)
    table = pd.concat([_rows(arm, values, counts.loc[arm]) for arm, values in last.items()])
    tasks = sorted({arm.task for arm in last})
    styles = looks(list(last))
    columns = 2 if len(tasks) > 1 and len(styles) <= _MAX_PER_HALF_WIDTH else 1
    height = 0.5 + 2.75 * -(-len(tasks) // columns)
    several = summary["score_low"].notna().any()
    mean = f"the mean with {WHAT_THE_INTERVAL_IS}" if several else "the mean; with one split there is no interval"
    return Chart(
        name="auc_by_checkpoint",
        title="AUC by checkpoint",
        caption=(
            "AUC after the last epoch (R² where values are predicted; never the best one), replicas of a split "
            "averaged. Dots: one per split; box: quartiles and median (whiskers: up to 1.5 times its height); black: "
            f"{mean}. Dashed: mean of the untrained weights."
        ),
        alt="Mean last-epoch AUC. " + " ".join(_describe(task, summary) for task in tasks),
        png=draw(height, lambda figure: _paint(figure, tasks, columns, last, summary, styles)),
        table=table,
    )


def _rows(arm: Arm, values: pd.Series, counts: pd.Series) -> pd.DataFrame:
    """Return an arm's splits with their scores and how many replicas have one, 0 for a split that did not get there."""
    replicas = counts.reindex(values.index, fill_value=0)
    return pd.DataFrame({**arm._asdict(), "split": values.index, "replicas": replicas, "score": values.to_numpy()})


def _describe(task: str, summary: pd.DataFrame) -> str:
    rows = summary[summary["task"] == task]
    alone = rows["encoder"].nunique() == 1
    values = [
        f"{'' if alone and c else f'{e} '}{short_step(c)} {auc:.3f}".replace("  ", " ")
        for e, c, auc in zip(rows["encoder"], rows["checkpoint"], rows["score"])
    ]
    return f"{task}: {', '.join(values)}."


def _paint(
    figure: Figure,
    tasks: Sequence[str],
    columns: int,
    last: Mapping[Arm, pd.Series],
    summary: pd.DataFrame,
    styles: Mapping[tuple[str, str], Look],
) -> None:
    grid = figure.subplots(-(-len(tasks) // columns), columns, squeeze=False).ravel()
    for axes in grid[len(tasks) :]:
        axes.set_visible(False)
    places = _places(list(styles))
    trained = sorted({encoder for encoder, checkpoint in styles if checkpoint})
    for axes, task in zip(grid, tasks):
        rows = summary[summary["task"] == task].set_index(["encoder", "checkpoint"])
        for key, place in places.items():
            values = last.get(Arm(task, *key))
            if values is not None and values.notna().any():
                _column(axes, place, values.dropna(), rows.loc[key], styles[key])
        _dress(axes, task, rows, places, trained)
    for axes in grid[::columns]:
        axes.set_ylabel(f"{' or '.join(METRICS[m] for m in summary['metric'].unique())}, last epoch")
    if len(trained) > 1:
        # the last checkpoint of an encoder has its full colour
        colours = {encoder: look.colour for (encoder, checkpoint), look in styles.items() if checkpoint}
        handles = [Patch(facecolor=colour, label=elided(encoder, 30)) for encoder, colour in colours.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)))


def _places(keys: list[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """Return where each (encoder, checkpoint) stands on the x-axis; a gap parts the encoders."""
    places, x = {}, 0.0
    for before, key in zip([None, *keys], keys):
        x += 1 + (_GAP if before and before[0] != key[0] and (before[1] or key[1]) else 0)
        places[key] = x
    return places


def _tick_names(keys: list[tuple[str, str]]) -> list[str]:
    """Name the columns, with so many digits as it takes to tell an encoder's checkpoints apart.

    >>> _tick_names([("vit", "0"), ("vit", "1250000"), ("vit", "1253000")])
    ['untrained', '1.25M', '1.253M']
    """
    for digits in (3, 4, 5, 9):
        names = [(e, short_step(c, digits) if c else elided(e, 18)) for e, c in keys]
        if len(set(names)) == len(names):
            break
    return [name for _, name in names]


def _column(axes: Axes, place: float, values: pd.Series, row: pd.Series, look: Look) -> None:
    if len(values) >= _FEWEST_FOR_BOX:
        _box(axes, place - 0.14, values, look)
    # spread in a fixed pattern, so that equal input gives the same picture
    sideways = ((np.arange(len(values)) * 7 + 5) % 11 / 10 - 0.5) * 0.3
    axes.plot(place - 0.14 + sideways, values.to_numpy(), "o", color=look.colour, markersize=2.6, alpha=0.65, zorder=3)
    if np.isfinite(row["score_low"]):
        axes.vlines(place + 0.24, row["score_low"], row["score_high"], color=INK, linewidth=1.8, zorder=4)
    axes.plot([place + 0.24], [row["score"]], "D", color=INK, markersize=3, zorder=5)


def _box(axes: Axes, place: float, values: pd.Series, look: Look) -> None:
    thin = {"color": look.colour, "linewidth": 1}
    lines: dict[str, Any] = {"whiskerprops": thin, "capprops": thin, "medianprops": thin | {"linewidth": 1.4}}
    lines |= {"patch_artist": True, "boxprops": {"facecolor": "white", "edgecolor": look.colour, "linewidth": 1}}
    axes.boxplot([values.to_numpy()], positions=[place], widths=0.42, showfliers=False, manage_ticks=False, **lines)


def _dress(
    axes: Axes, task: str, rows: pd.DataFrame, places: Mapping[tuple[str, str], float], trained: Sequence[str]
) -> None:
    if not rows["score"].notna().any():
        say_empty(axes)
    for encoder in trained:
        mean = rows["score"].get((encoder, UNTRAINED), np.nan)
        xs = [place for key, place in places.items() if key[0] == encoder]
        if np.isfinite(mean) and len(xs) > 1:
            axes.hlines(mean, min(xs) - 0.4, max(xs) + 0.45, color=GREY, linestyle=(0, (4, 2)), linewidth=0.9, zorder=1)
    low, high = axes.get_ylim()
    if high - low < _LOWEST_SPAN:
        low, high = (low + high - _LOWEST_SPAN) / 2, (low + high + _LOWEST_SPAN) / 2
    axes.set_ylim(max(low, -0.03), min(high, 1.03))
    names = _tick_names(list(places))
    crowded = len(names) > 7 or (len(names) > 4 and max(map(len, names)) > 9)
    turned: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axes.set_xticks(list(places.values()), names, **turned)
    axes.set(xlim=(min(places.values()) - 0.6, max(places.values()) + 0.6), title=elided(task, 44))
    axes.grid(axis="x", visible=False)
    if trained:
        axes.set_xlabel("step of the checkpoint" if len(trained) > 1 else f"step of {elided(trained[0], 30)}")
