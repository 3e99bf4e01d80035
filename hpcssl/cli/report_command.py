"""`hpcssl report`: tables and figures from result files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

SUMMARY = "write report.html, its figures and its tables from results, runs and a schedule"
EXAMPLE = "hpcssl report RESULTS RUN SCHED --out REPORT"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add, folders = parser.add_argument, "results of `hpcssl mccv`, runs of `hpcssl pretrain`, a schedule; in any order"
    add("inputs", nargs="+", type=Path, metavar="FOLDER", help=folders)
    add("--out", required=True, type=Path, metavar="DIR", help="folder to write into")
    add("--title", default="Pretraining and benchmark", help="title of the page")


def run(args: argparse.Namespace) -> int:
    """Write the report, and print the closing table and the verdict."""
    from rich.console import Console

    from hpcssl.pipelines.report import report, slow_runs
    from hpcssl.report.summary import verdict_text

    made = report(args.inputs, args.out, title=args.title)
    if made.summary is not None:
        Console().print(format_table(made.summary))
        print(verdict_text(made.summary))
    for line in slow_runs(args.inputs):
        print(line)
    print(made.page)
    return 0


def format_table(summary: pd.DataFrame) -> Table:
    """Return the closing table of a terminal; a sole encoder is its title."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from hpcssl.report.summary import SHOWN, summary_rows

    header, rows = summary_rows(summary)
    encoders = sorted(set(summary["encoder"]))
    shown = [place for place, name in enumerate(header) if name != "encoder" or len(encoders) > 1]
    # Text: a name with [brackets] is no markup
    title = Text(f"Last-epoch AUC of {encoders[0]}" if len(encoders) == 1 else "Last-epoch AUC")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    for place in shown:
        # on a narrow terminal cells are folded, and numbers only between their parts
        whole = header[place] == "runs"
        table.add_column(header[place], overflow="fold", min_width=SHOWN[place].min_width, no_wrap=whole)
    for row, following in zip(rows, [*rows[1:], None]):
        table.add_row(*(Text(row[place]) for place in shown), end_section=bool(following and following[0] != row[0]))
    return table
