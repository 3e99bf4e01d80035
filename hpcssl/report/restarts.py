"""Figure: when runs were started again, why, and with how many processes they went on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from hpcssl.core.atomic import read_json_lines
from hpcssl.report.style import GREY, PALETTE, Chart, draw, elided, run_lines

_MOST_TOLD = 12  # causes in the words beside the figure; all of them stand in the table


def restarts_chart(runs: Mapping[str, Path], last_steps: Mapping[str, int]) -> Chart | None:
    """Return the restart history of runs by their names; None where none of them was started more than once."""
    table = pd.concat([_history(name, run) for name, run in runs.items()], ignore_index=True)
    again = table[table["start"] > 1]
    if again.empty:
        return None
    sentences = " ".join(_describe(str(name), starts) for name, starts in again.groupby("run", sort=False))
    what = "The processes of a run by its steps; a dot is a restart, at the checkpoint that it went on from."
    return Chart(
        name="restarts",
        title="Restarts",
        caption=f"{what} {sentences}",
        alt=sentences,
        png=draw(2.6, lambda figure: _paint(figure, table, last_steps)),
        table=table,
    )


def kind_of(why: str) -> str:
    """Return the kind of a cause: what stays of it without ranks, nodes and messages.

    >>> kind_of("rank 2 died on node1: Killed"), kind_of("a node failed: node2"), kind_of("time limit")
    ('a rank died', 'a node failed', 'time limit')
    """
    kind = why.partition(":")[0]
    return "a rank died" if re.match(r"rank [\d,-]+( died on .*| failed)?$", kind) else kind


def _history(name: str, run: Path) -> pd.DataFrame:
    """Return one row a start; of a run without a history none."""
    rows = [
        (
            name,
            number,
            start.get("time", ""),
            start.get("newest_checkpoint") or 0,
            start.get("why") or ("unknown" if number > 1 else "first start"),
            start.get("world_size"),
            " ".join(start.get("nodes") or [start.get("host", "")]),
        )
        for number, start in enumerate(read_json_lines(run / "restarts.jsonl"), start=1)
    ]
    return pd.DataFrame(rows, columns=["run", "start", "time", "step", "why", "processes", "nodes"])


def _describe(name: str, again: pd.DataFrame) -> str:
    causes = [
        f"step {row['step']:,} ({row['why']}; {row['processes']} processes)"
        for row in again.head(_MOST_TOLD).to_dict("records")
    ]
    more = f", and {len(again) - _MOST_TOLD} more" if len(again) > _MOST_TOLD else ""
    times = "once" if len(again) == 1 else f"{len(again)} times"
    return f"{name} was started again {times}: at {', '.join(causes)}{more}."


def _paint(figure: Figure, table: pd.DataFrame, last_steps: Mapping[str, int]) -> None:
    axes = figure.subplots()
    kinds = list(dict.fromkeys(kind_of(why) for why in table.loc[table["start"] > 1, "why"]))
    colours = {kind: PALETTE[i % len(PALETTE)] for i, kind in enumerate(kinds)}
    handles = [Line2D([], [], color=c, marker="o", linestyle="", label=elided(k, 40)) for k, c in colours.items()]
    lines = run_lines(map(str, table["run"].unique()))
    for name, starts in table.groupby("run", sort=False):
        look = lines[str(name)] | {"color": GREY}
        steps = [*starts["step"], max(last_steps[str(name)], starts["step"].iloc[-1])]
        axes.step(steps, [*starts["processes"], starts["processes"].iloc[-1]], where="post", **look)
        again = starts[starts["start"] > 1]
        axes.scatter(again["step"], again["processes"], color=[colours[kind_of(w)] for w in again["why"]], zorder=3)
        if table["run"].nunique() > 1:
            handles.append(Line2D([], [], **look, label=elided(str(name), 30)))
    axes.set_ylim(0, 1.15 * table["processes"].max())
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.set(xlabel="steps", ylabel="processes")
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
