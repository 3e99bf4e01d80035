"""`hpcssl report`: tables and figures from result files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

SUMMARY = "write report.html, its figures and its tables from results, runs and a schedule"
EXAMPLE = "hpcssl report RESULTS RUN SCHED --out REPORT"
_MIN_WIDTHS = (6, 10, 10, 13, 10, 6)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "inputs",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="results of `hpcssl mccv`, runs of `hpcssl pretrain`, a schedule; in any order",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write into")
    parser.add_argument("--title", default="Pretraining and benchmark", help="title of the page")


def run(args: argparse.Namespace) -> int:
    """Write the report, and print the verdict and the closing table."""
    from hpcssl import __version__
    from hpcssl.report.inputs import sorted_inputs
    from hpcssl.report.page import write_report
    from hpcssl.report.results import read_results
    from hpcssl.report.summary import summarise, verdict_text

    found = sorted_inputs(args.inputs)
    notes = {
        "results": str(found.results or ""),
        "runs": ", ".join(map(str, found.runs)),
        "schedule": str(found.schedule or ""),
        "hpcssl": __version__,
    }
    page = write_report(
        args.out,
        results=found.results,
        runs=found.runs,
        schedule=found.schedule,
        title=args.title,
        notes={key: value for key, value in notes.items() if value},
    )
    if found.results:
        from rich.console import Console

        summary = summarise(read_results(found.results))
        Console().print(format_table(summary))
        print(verdict_text(summary))
    for line in slowed_down(found.runs):
        print(line)
    print(page)
    return 0


def slowed_down(runs: Sequence[Path]) -> list[str]:
    """Return a sentence for every run that waited for tiles too long."""
    from hpcssl.report.times import WAIT_LIMIT, step_times, wait_share, wait_text
    from hpcssl.runs.trace import read_metrics

    recorded = ((run, step_times(read_metrics(run))) for run in runs)
    return [f"{run}: {wait_text(t)}" for run, t in recorded if t is not None and wait_share(t) > WAIT_LIMIT]


def format_table(summary: pd.DataFrame) -> Table:
    """Return the closing table of a terminal, from `hpcssl.report.summary.summarise`; a sole encoder is its title."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from hpcssl.report.page import summary_rows

    header, rows = summary_rows(summary)
    encoders = {row[1] for row in rows}
    shown = [place for place, name in enumerate(header) if name != "encoder" or len(encoders) > 1]
    # Text: a name with [brackets] is no markup
    title = Text(f"Last-epoch AUC of {encoders.pop()}" if len(encoders) == 1 else "Last-epoch AUC")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    for place in shown:
        # on a narrow terminal cells are folded, and numbers only between their parts
        table.add_column(header[place], overflow="fold", min_width=_MIN_WIDTHS[place], no_wrap=header[place] == "runs")
    for row, following in zip(rows, [*rows[1:], None]):
        table.add_row(*(Text(row[place]) for place in shown), end_section=bool(following and following[0] != row[0]))
    return table
