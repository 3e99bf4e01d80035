"""Figure: what the training loss cost in hours, the speed, and how long runs waited for tiles."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from hpcssl.report.formats import by_run
from hpcssl.report.style import GREY, Chart, add_run_legend, draw, run_lines

WAIT_LIMIT = 0.05
"""Share of the time that a run may wait for tiles before it is called slowed down by them."""
_REQUIRED = ("step", "samples_seen", "pseudo_epoch", "loss", "tiles_per_s", "read_wait_s")
_COLUMNS = ("step", "pseudo_epoch", "hours", "process_hours", "loss_smoothed", "tiles_per_s", "wait_share")
_SMOOTHED_SHARE, _MOST_ROWS = 1 / 30, 4000
_BEGINNING = 1 / 50  # of the steps
_PACK = "hpcssl store build --pack"
_FASTER = "raise loader.threads where cores are free, or set loader.backend=dali where there are GPUs"
_CAUSES = {
    "read_s": f"reading from the storage: raise loader.threads, and pack the store ({_PACK}) on a parallel file system",
    "decode_s": f"decoding: {_FASTER}",
    "augment_s": f"augmenting: {_FASTER}",
}


def running_mean(values: pd.Series) -> pd.Series:
    """Return the running mean over a thirtieth of a run; a value that is not finite is left out."""
    window = max(1, round(len(values) * _SMOOTHED_SHARE))
    return values.rolling(window, center=True, min_periods=1).mean()


def thin(steps: pd.DataFrame) -> pd.DataFrame:
    """Thin a long run evenly, keeping its last step."""
    every = -(-len(steps) // _MOST_ROWS)
    return steps.iloc[(len(steps) - 1) % every :: every]


def step_times(trace: pd.DataFrame) -> pd.DataFrame | None:
    """Return a trace with what its steps took, or None where that was not recorded.

    Added are `seconds` of a step, `hours` since the beginning (stops between starts left out) and `process_hours`, that
    times the processes, each of which has one GPU where there are GPUs.
    """
    if any(name not in trace.columns for name in _REQUIRED):
        return None
    numbers = [*_REQUIRED, *(name for name in (*_CAUSES, "processes") if name in trace.columns)]
    times = trace[numbers].apply(pd.to_numeric, errors="coerce")
    times = times[(times["tiles_per_s"] > 0) & (times["step"] > 0)].reset_index(drop=True)
    if times.empty:
        return None
    times["seconds"] = times["samples_seen"] / times["step"] / times["tiles_per_s"]
    times["hours"] = times["seconds"].cumsum() / 3600
    if "processes" in times:
        times["process_hours"] = (times["seconds"] * times["processes"]).cumsum() / 3600
    return times


def wait_share(times: pd.DataFrame) -> float:
    """Return the share of the time in which the run waited for tiles."""
    return float(times["read_wait_s"].sum() / times["seconds"].sum())


def wait_text(times: pd.DataFrame) -> str:
    """Say how much of the time a run waited for tiles, and where it is too much, why that probably was."""
    share = wait_share(times)
    waited = f"waited for tiles {share:.1%} of the time"
    if share <= WAIT_LIMIT:
        return waited
    return f"{waited}, more than {WAIT_LIMIT:.0%}; likely cause: {_cause(times)}"


def times_chart(traces: Mapping[str, pd.DataFrame]) -> Chart | None:
    """Return the figure of the runs (name to trace) that recorded their times; None where none did."""
    recorded = {name: times for name, trace in traces.items() if (times := step_times(trace)) is not None}
    if not recorded:
        return None
    summaries = " ".join(f"{name}: {_describe(times)}." for name, times in recorded.items())
    drawn = {name: _smoothed(times) for name, times in recorded.items()}
    return Chart(
        name="times",
        title="Time, speed and waiting for tiles",
        caption=(
            "Running means over a thirtieth of the run. Hours are those of training steps, without the stops between "
            "starts; process-hours are hours times processes, of one GPU each where there are GPUs. Dotted: "
            f"{WAIT_LIMIT:.0%}, above which waiting for tiles slows a run down. " + summaries
        ),
        alt=summaries,
        png=draw(2.4 + 0.25 * (len(drawn) > 1), lambda figure: _paint(figure, drawn)),
        table=by_run(drawn, _COLUMNS),
    )


def _cause(times: pd.DataFrame) -> str:
    beginning = max(1, round(len(times) * _BEGINNING))
    if times["read_wait_s"].iloc[:beginning].sum() > 0.5 * times["read_wait_s"].sum():
        return f"the beginning: most of it fell into the first {beginning:,} of {len(times):,} steps"
    spent = {name: float(times[name].sum()) for name in _CAUSES if name in times}
    if not sum(spent.values()) > 0:
        return "unknown, what the loader spent its time on was not recorded"
    name = max(spent, key=lambda key: spent[key])
    return f"{_CAUSES[name]} ({spent[name] / sum(spent.values()):.0%} of the loader's time)"


def _describe(times: pd.DataFrame) -> str:
    hours = f"{times['hours'].iloc[-1]:.3g} hours"
    if "process_hours" in times:
        hours += f" ({times['process_hours'].iloc[-1]:.3g} process-hours)"
    return f"{hours}, {times['tiles_per_s'].median():,.3g} tiles/s in the median, {wait_text(times)}"


def _smoothed(times: pd.DataFrame) -> pd.DataFrame:
    seconds = running_mean(times["seconds"])
    smooth = times.assign(
        loss_smoothed=running_mean(times["loss"].where(np.isfinite(times["loss"]))),
        wait_share=running_mean(times["read_wait_s"]) / seconds,
        tiles_per_s=running_mean(times["samples_seen"] / times["step"]) / seconds,
    )
    return thin(smooth)


def _paint(figure: Figure, drawn: Mapping[str, pd.DataFrame]) -> None:
    lines = run_lines(drawn)
    cost = "process_hours" if all("process_hours" in times for times in drawn.values()) else "hours"
    panels = figure.subplots(1, 3)
    for run, times in drawn.items():
        look = lines[run]
        dot = "o" if len(times) == 1 else ""
        panels[0].plot(times[cost], times["loss_smoothed"], marker=dot, **look)
        panels[1].plot(times["pseudo_epoch"], times["tiles_per_s"], marker=dot, **look)
        panels[2].plot(times["pseudo_epoch"], 100 * times["wait_share"], marker=dot, **look)
    panels[2].axhline(100 * WAIT_LIMIT, color=GREY, linestyle=":", linewidth=1)
    titles = ("training loss", "tiles per second", "waiting for tiles, %")
    names = (cost.replace("_", "-"), "pseudo-epochs", "pseudo-epochs")
    for axes, title, name in zip(panels, titles, names):
        axes.set(title=title, xlabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    for axes in panels[1:]:
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    panels[1].yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    add_run_legend(figure, lines)
