"""The report: one self-contained page, and beside it each figure as PNG and its numbers as CSV."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from hpcssl.core.atomic import write_atomic
from hpcssl.report.formats import csv_text, table_files
from hpcssl.report.results import UNTRAINED, ReportError, read_results, short_step
from hpcssl.report.style import Part
from hpcssl.report.summary import METRICS, difference_text, interval_text, summarise, verdict, verdict_text
from hpcssl.report.table_files import TablePart, comparison_tables

_TEMPLATE = Path(__file__).with_name("report.html.j2")


def write_report(
    out: Path,
    *,
    results: Path | None,
    runs: Sequence[Path] = (),
    schedule: Path | None = None,
    title: str,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write `report.html`, its figures and its tables into `out`; the same inputs give the same bytes.

    Parameters
    ----------
    results : folder with results.csv
    runs : folders with metrics.jsonl
    schedule : folder with schedule.json
    notes : rows of the table "What was run"

    Returns
    -------
    Path of report.html. A part without input is left out.

    Raises
    ------
    UserError
        If an input cannot be used; nothing is written then.
    """
    if out.exists() and not out.is_dir():
        raise ReportError(f"{out}: is a file; expected a folder, new or old, for the report")
    table = None if results is None else read_results(results)
    summary = None if table is None else summarise(table)
    sections = _sections(table, summary, runs, schedule, results)
    tables = [] if table is None or summary is None else comparison_tables(table, summary, runs)
    page = _page(title, dict(notes or {}), sections, summary, tables)
    out.mkdir(parents=True, exist_ok=True)
    for one in tables:
        for name, text in one.files.items():
            write_atomic(out / name, text)
    for part in (part for _, parts in sections for part in parts):
        write_atomic(out / f"{part.name}.png", part.png)
        write_atomic(out / f"{part.name}.csv", csv_text(part.table))
    if summary is not None:
        for name, text in table_files("summary", summary, *summary_rows(summary)).items():
            write_atomic(out / name, text)
        write_atomic(out / "verdict.txt", verdict_text(summary) + "\n")
    write_atomic(out / "report.html", page)
    return out / "report.html"


def summary_rows(summary: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the closing table as text, for the page and for the terminal.

    Runs are told as splits × replicas.
    """
    score = " or ".join(METRICS[metric] for metric in summary["metric"].unique())
    header = ["task", "encoder", "checkpoint", f"{score} (95 % interval)", "difference to untrained", "runs"]
    rows = [
        [
            row["task"],
            row["encoder"],
            _checkpoint(row["checkpoint"]),
            interval_text(row["score"], row["score_low"], row["score_high"]),
            difference_text(row["difference"], row["difference_low"], row["difference_high"]),
            f"{row['splits']} × {row['replicas']}",
        ]
        for row in summary.to_dict("records")
    ]
    return header, rows


def _checkpoint(name: str) -> str:
    if name == UNTRAINED or not name.isdigit():
        return short_step(name) or "–"
    return f"{int(name):,}"


def _sections(
    table: pd.DataFrame | None,
    summary: pd.DataFrame | None,
    runs: Sequence[Path],
    schedule: Path | None,
    results: Path | None,
) -> list[tuple[str, list[Part]]]:
    """Return (heading, figures) in the order of the page; the figures' modules are imported where they are needed."""
    sections: list[tuple[str, list[Part]]] = []
    if schedule is not None:
        from hpcssl.report.shares import organ_shares_part

        sections.append(("Data", [organ_shares_part(schedule)]))
    if runs:
        from hpcssl.report.training import training_parts

        sections.append(("Pretraining", training_parts(runs)))
    if table is not None and summary is not None:
        from hpcssl.report.checkpoints import checkpoints_part
        from hpcssl.report.curves import curve_parts

        sections.append(("Benchmark", [checkpoints_part(table, summary), *curve_parts(table)]))
    if results is not None:
        from hpcssl.report.attention_maps import attention_parts

        maps = attention_parts(results)
        sections += [("Attention", maps)] if maps else []
    return sections


def _page(
    title: str,
    notes: Mapping[str, str],
    sections: list[tuple[str, list[Part]]],
    summary: pd.DataFrame | None,
    tables: Sequence[TablePart],
) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = lambda png: "data:image/png;base64," + base64.b64encode(png).decode()
    header, rows = ([], []) if summary is None else summary_rows(summary)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        notes=notes,
        sections=sections,
        tables=tables,
        header=header,
        rows=rows,
        verdicts=[] if summary is None else verdict(summary),
    )
