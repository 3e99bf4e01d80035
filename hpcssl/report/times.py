"""Figure: what the training loss cost in hours, the speed, and how long runs waited for tiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from hpcssl.report.style import DASHES, GREY, PALETTE, WIDTH_INCH, Part, draw, elided

WAIT_LIMIT = 0.05
"""Share of the time that a run may wait for tiles before it is called slowed down by them."""
_REQUIRED = ("step", "samples_seen", "pseudo_epoch", "loss", "tiles_per_s", "read_wait_s")
_BEGINNING = 1 / 50  # of the steps
_PACK = "hpcssl store build --pack"
_FASTER = "raise loader.threads where cores are free, or set loader.backend=dali where there are GPUs"
_CAUSES = {
    "read_s": f"reading from the storage: raise loader.threads, and pack the store ({_PACK}) on a parallel file system",
    "decode_s": f"decoding: {_FASTER}",
    "augment_s": f"augmenting: {_FASTER}",
}


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
    told = f"waited for tiles {share:.1%} of the time"
    if share <= WAIT_LIMIT:
        return told
    return f"{told}, more than {WAIT_LIMIT:.0%}; likely cause: {_cause(times)}"


def times_part(traces: Mapping[str, pd.DataFrame], window_share: float, most_rows: int) -> Part | None:
    """Return the figure of the runs (name to trace) that recorded their times; None where none did."""
    recorded = {name: times for name, trace in traces.items() if (times := step_times(trace)) is not None}
    if not recorded:
        return None
    told = [f"{name}: {_told(times)}." for name, times in recorded.items()]
    drawn = {name: _smoothed(times, window_share, most_rows) for name, times in recorded.items()}
    columns = ["step", "pseudo_epoch", "hours", "process_hours", "loss_smoothed", "tiles_per_s", "wait_share"]
    table = pd.concat([t.reindex(columns=columns).assign(run=name) for name, t in drawn.items()])[["run", *columns]]
    return Part(
        name="times",
        title="Time, speed and waiting for tiles",
        caption=(
            "Running means over a thirtieth of the run. Hours are those of training steps, without the stops between "
            "starts; process-hours are hours times processes, of one GPU each where there are GPUs. Dotted: "
            f"{WAIT_LIMIT:.0%}, above which waiting for tiles slows a run down. " + " ".join(told)
        ),
        alt=" ".join(told),
        png=draw(WIDTH_INCH, 2.4 + 0.25 * (len(drawn) > 1), lambda figure: _paint(figure, drawn)),
        table=table,
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


def _told(times: pd.DataFrame) -> str:
    hours = f"{times['hours'].iloc[-1]:.3g} hours"
    if "process_hours" in times:
        hours += f" ({times['process_hours'].iloc[-1]:.3g} process-hours)"
    return f"{hours}, {times['tiles_per_s'].median():,.3g} tiles/s in the median, {wait_text(times)}"


def _smoothed(times: pd.DataFrame, window_share: float, most_rows: int) -> pd.DataFrame:
    window = max(1, round(len(times) * window_share))

    def over_window(values: pd.Series) -> pd.Series:
        return values.rolling(window, center=True, min_periods=1).mean()

    finite = times["loss"].where(np.isfinite(times["loss"]))
    seconds = over_window(times["seconds"])
    batch = times["samples_seen"] / times["step"]
    times = times.assign(
        loss_smoothed=over_window(finite),
        wait_share=over_window(times["read_wait_s"]) / seconds,
        tiles_per_s=over_window(batch) / seconds,
    )
    every = -(-len(times) // most_rows)
    return times.iloc[(len(times) - 1) % every :: every]


def _paint(figure: Figure, drawn: Mapping[str, pd.DataFrame]) -> None:
    looks: list[dict[str, Any]] = [
        {"color": PALETTE[i % len(PALETTE)], "linestyle": DASHES[i % len(DASHES)]} for i in range(len(drawn))
    ]
    cost = "process_hours" if all("process_hours" in times for times in drawn.values()) else "hours"
    panels = figure.subplots(1, 3)
    for look, times in zip(looks, drawn.values()):
        dot = "o" if len(times) == 1 else ""
        panels[0].plot(times[cost], times["loss_smoothed"], marker=dot, **look)
        panels[1].plot(times["pseudo_epoch"], times["tiles_per_s"], marker=dot, **look)
        panels[2].plot(times["pseudo_epoch"], 100 * times["wait_share"], marker=dot, **look)
    panels[2].axhline(100 * WAIT_LIMIT, color=GREY, linestyle=":", linewidth=1)
    titles = ("training loss", "tiles per second", "waiting for tiles, %")
    names = (cost.replace("_", "-"), "pseudo-epochs", "pseudo-epochs")
    for axes, title, name in zip(panels, titles, names):
        axes.set_title(title)
        axes.set_xlabel(name)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    for axes in panels[1:]:
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    panels[1].yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    if len(drawn) > 1:
        handles = [Line2D([], [], **look) for look in looks]
        figure.legend(handles, [elided(name, 30) for name in drawn], loc="outside lower center", ncols=3)
