"""Figures: the training loss against the paper's three x-axes (its Figure 1), and the schedules of the optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hpcssl.report.arms import ReportError
from hpcssl.report.formats import by_run
from hpcssl.report.restarts import restarts_chart
from hpcssl.report.style import PALETTE, Chart, add_run_legend, draw, elided, run_lines, say_empty
from hpcssl.report.times import running_mean, thin, times_chart
from hpcssl.runs.trace import read_metrics

IMAGENET_IMAGES = 1_281_167
_REQUIRED = ("step", "samples_seen", "pseudo_epoch", "loss")
_SETTINGS = {"lr": "learning rate", "weight_decay": "weight decay", "momentum": "teacher momentum"}
# of a panel, in inches: its axes' height, and the room above (title) and below (three x-axes)
_PANEL, _ABOVE, _BELOW, _AXIS = 2.2, 0.35, 1.45, 0.5


def training_charts(runs: Sequence[Path]) -> list[Chart]:
    """Return the figures of the loss and, where runs recorded them, of times, restarts and the optimiser's values."""
    recorded = {name: (run, read_metrics(run)) for name, run in zip(_names(runs), runs)}
    traces = {name: _trace(run, frame) for name, (run, frame) in recorded.items()}
    last_steps = {name: int(trace["step"].max()) for name, trace in traces.items()}
    charts = [
        _loss_chart(traces),
        times_chart({name: frame for name, (_, frame) in recorded.items()}),
        restarts_chart({name: run for name, (run, _) in recorded.items()}, last_steps),
        _settings_chart(traces),
    ]
    return [chart for chart in charts if chart]


def _names(runs: Sequence[Path]) -> list[str]:
    """Name runs by their folders, with so many parents as it takes to tell them apart."""
    resolved = [run.resolve() for run in runs]
    for depth in range(1, max((len(r.parts) for r in resolved), default=1) + 1):
        names = ["/".join(r.parts[-depth:]) for r in resolved]
        if len(set(names)) == len(names):
            break
    return names


def _trace(run: Path, frame: pd.DataFrame) -> pd.DataFrame:
    """Smooth the loss in a run's metrics, and thin a long run evenly, keeping its last step."""
    missing = [name for name in _REQUIRED if name not in frame.columns]
    if missing:
        raise ReportError(f"{run}: its metrics lack {', '.join(missing)}; expected the folder of a pretraining run")
    frame = frame[[*_REQUIRED, *(s for s in _SETTINGS if s in frame.columns)]].apply(pd.to_numeric, errors="coerce")
    frame = frame.dropna(subset=["step", "samples_seen", "pseudo_epoch"])
    if frame.empty:
        raise ReportError(f"{run}: its metrics hold no step with samples_seen and pseudo_epoch")
    frame = frame.astype({"step": "int64", "samples_seen": "int64"})
    frame["loss"] = frame["loss"].where(np.isfinite(frame["loss"]))
    frame["loss_smoothed"] = running_mean(frame["loss"])
    frame["imagenet_epoch"] = frame["samples_seen"] / IMAGENET_IMAGES
    return thin(frame).reset_index(drop=True)


def _loss_chart(traces: Mapping[str, pd.DataFrame]) -> Chart:
    table = by_run(traces, ("step", "samples_seen", "pseudo_epoch", "imagenet_epoch", "loss", "loss_smoothed"))
    gaps = int(table["loss"].isna().sum())
    return Chart(
        name="training",
        title="Training loss",
        caption=(
            "Loss of every step (thin; long runs thinned evenly) and its running mean over a thirtieth of the run "
            "(bold). "
            f"The same x-axis in pseudo-epochs, in ImageNet epochs (tiles seen / {IMAGENET_IMAGES:,}) and in steps."
            + (f" {gaps} of the steps drawn have no finite loss; they are gaps." if gaps else "")
        ),
        alt="Training loss against pseudo-epochs. " + " ".join(_describe(name, t) for name, t in traces.items()),
        png=draw(-(-len(traces) // 2) * (_PANEL + _ABOVE + _BELOW), lambda figure: _paint_losses(figure, traces)),
        table=table,
    )


def _describe(name: str, trace: pd.DataFrame) -> str:
    smooth = trace["loss_smoothed"].dropna()
    if smooth.empty:
        return f"{name}: no finite loss."
    last = trace.iloc[-1]
    return (
        f"{name}: smoothed loss from {smooth.iloc[0]:.3g} to {smooth.iloc[-1]:.3g} in {int(last['step']):,} steps, "
        f"{last['pseudo_epoch']:.3g} pseudo-epochs."
    )


def _paint_losses(figure: Figure, traces: Mapping[str, pd.DataFrame]) -> None:
    columns = min(2, len(traces))
    rows = -(-len(traces) // columns)
    # set in inches: automatic layouts give the further x-axes no room
    figure.set_layout_engine("none")
    height = figure.get_figheight()
    room = {"left": 0.09, "right": 0.98, "top": 1 - _ABOVE / height, "bottom": _BELOW / height}
    room |= {"wspace": 0.22, "hspace": (_ABOVE + _BELOW) / _PANEL}
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw=room).ravel()
    for axes in grid[len(traces) :]:
        axes.set_visible(False)
    for index, (axes, (name, trace)) in enumerate(zip(grid, traces.items())):
        colour = PALETTE[index % len(PALETTE)]
        dot = {"marker": "o", "markersize": 3} if len(trace) == 1 else {}
        axes.plot(trace["pseudo_epoch"], trace["loss"], color=colour, alpha=0.35, linewidth=0.7, label="step", **dot)
        axes.plot(trace["pseudo_epoch"], trace["loss_smoothed"], color=colour, label="running mean")
        if trace["loss"].notna().any():
            _limit(axes, trace)
        else:
            say_empty(axes, "no finite loss")
        axes.set_title(elided(name, 40), pad=8)
        axes.set(xlabel="pseudo-epochs", ylabel="training loss")
        _more_axes(axes, trace)


def _limit(axes: Axes, trace: pd.DataFrame) -> None:
    """Show the bulk of the raw loss and all of the smoothed one, so that a single peak does not flatten the curve."""
    raw, smooth = trace["loss"].dropna(), trace["loss_smoothed"].dropna()
    low, high = min(raw.quantile(0.002), smooth.min()), max(raw.quantile(0.998), smooth.max())
    if high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def _more_axes(axes: Axes, trace: pd.DataFrame) -> None:
    """Add ImageNet epochs and steps below the pseudo-epochs; both grow in proportion to them."""
    x = trace["pseudo_epoch"].to_numpy(dtype=float)
    if len(x) < 2 or not x[-1] > x[0]:
        return
    for place, column, label in ((-_AXIS, "imagenet_epoch", "ImageNet epochs"), (-2 * _AXIS, "step", "steps")):
        y = trace[column].to_numpy(dtype=float)
        slope = (y[-1] - y[0]) / (x[-1] - x[0])
        if not slope > 0:
            continue
        second = axes.secondary_xaxis(place / _PANEL, functions=_line(y[0] - slope * x[0], slope))
        second.set_xlabel(label)
        second.xaxis.set_major_formatter(FuncFormatter(lambda value, _, largest=y[-1]: tick_text(value, largest)))


def _line(start: float, slope: float) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Return a straight line and its inverse."""
    return lambda x: start + slope * x, lambda y: (y - start) / slope


def tick_text(value: float, largest: float) -> str:
    """Return a tick's number in the unit of its axis, whose largest value is given.

    >>> tick_text(0.002, 0.012), tick_text(1200.0, 1500.0), tick_text(5e3, 2e4), tick_text(5e5, 1.5e6)
    ('0.002', '1,200', '5k', '0.5M')
    """
    scale, unit = (1e6, "M") if largest >= 1e6 else (1e3, "k") if largest >= 1e4 else (1.0, "")
    number = value / scale
    return (f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}") + (unit if value else "")


def _settings_chart(traces: Mapping[str, pd.DataFrame]) -> Chart | None:
    """Return the figure of the optimiser's values; None where no run recorded one."""
    recorded = [s for s in _SETTINGS if any(s in t and t[s].notna().any() for t in traces.values())]
    if not recorded:
        return None
    table = by_run(traces, ("step", "pseudo_epoch", *recorded))
    spans = [f"{_SETTINGS[s]} from {table[s].min():.3g} to {table[s].max():.3g}" for s in recorded]
    return Chart(
        name="schedules",
        title="Learning rate, weight decay and momentum",
        caption="The values that the optimiser used at each step, as recorded by the run.",
        alt=f"Against pseudo-epochs: {'; '.join(spans)}.",
        png=draw(2.3 + 0.25 * (len(traces) > 1), lambda figure: _paint_settings(figure, traces, recorded)),
        table=table,
    )


def _paint_settings(figure: Figure, traces: Mapping[str, pd.DataFrame], recorded: list[str]) -> None:
    lines = run_lines(traces)
    panels = figure.subplots(1, len(recorded), squeeze=False, sharex=True).ravel()
    for axes, setting in zip(panels, recorded):
        for run, trace in traces.items():
            if setting in trace:
                axes.plot(trace["pseudo_epoch"], trace[setting], marker="o" if len(trace) == 1 else "", **lines[run])
        axes.set(title=_SETTINGS[setting], xlabel="pseudo-epochs")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        if setting == "lr":
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    add_run_legend(figure, lines)
