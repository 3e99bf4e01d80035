"""The report: one self-contained page, and beside it each figure as PNG and its numbers as CSV."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from jinja2 import Environment, StrictUndefined

from hpcssl.core.atomic import write_atomic
from hpcssl.evaluate.results import read_results
from hpcssl.report.arms import ReportError
from hpcssl.report.attention_maps import attention_charts
from hpcssl.report.checkpoints import checkpoints_chart
from hpcssl.report.curves import curve_charts
from hpcssl.report.formats import csv_text, table_files
from hpcssl.report.schedules import organ_shares_chart
from hpcssl.report.style import Chart
from hpcssl.report.summary import summarise, summary_rows, verdict, verdict_text
from hpcssl.report.table_files import ComparisonTable, comparison_tables
from hpcssl.report.training import training_charts

PAGE = "report.html"
_TEMPLATE = Path(__file__).with_name("report.html.j2")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The folders of one report."""

    results: Path | None = None
    """Holds results.csv."""
    runs: tuple[Path, ...] = ()
    """Hold metrics.jsonl."""
    schedule: Path | None = None
    """Holds schedule.json."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was written."""

    page: Path
    summary: pd.DataFrame | None
    """Of `summarise`; None without results."""


def write_report(out: Path, inputs: Inputs, *, title: str, notes: Mapping[str, str] | None = None) -> Report:
    """Write `report.html`, its figures and its tables into `out`; the same inputs give the same bytes.

    A part without its input is left out; `notes` are the rows of the table "What was run". UserError if an input cannot
    be used; nothing is written then.
    """
    if out.exists() and not out.is_dir():
        raise ReportError(f"{out}: is a file; expected a folder, new or old, for the report")
    results = None if inputs.results is None else read_results(inputs.results)
    summary = None if results is None else summarise(results)
    sections = _sections(inputs, results, summary)
    tables = [] if results is None or summary is None else comparison_tables(results, summary, inputs.runs)
    files: dict[str, str | bytes] = {name: text for table in tables for name, text in table.files.items()}
    for chart in (chart for charts in sections.values() for chart in charts):
        files |= {f"{chart.name}.png": chart.png, f"{chart.name}.csv": csv_text(chart.table)}
    if summary is not None:
        files |= table_files("summary", summary, *summary_rows(summary))
        files["verdict.txt"] = verdict_text(summary) + "\n"
    files[PAGE] = _page(title, dict(notes or {}), sections, summary, tables)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomic(out / name, content)
    return Report(page=out / PAGE, summary=summary)


def _sections(inputs: Inputs, results: pd.DataFrame | None, summary: pd.DataFrame | None) -> dict[str, list[Chart]]:
    """Return the figures of each heading, in the order of the page."""
    sections: dict[str, list[Chart]] = {}
    if inputs.schedule is not None:
        sections["Data"] = [organ_shares_chart(inputs.schedule)]
    if inputs.runs:
        sections["Pretraining"] = training_charts(inputs.runs)
    if inputs.results is not None and results is not None and summary is not None:
        sections["Benchmark"] = [checkpoints_chart(results, summary), *curve_charts(results)]
        sections["Attention"] = attention_charts(inputs.results)
    return {heading: charts for heading, charts in sections.items() if charts}


def _page(
    title: str,
    notes: Mapping[str, str],
    sections: Mapping[str, Sequence[Chart]],
    summary: pd.DataFrame | None,
    tables: Sequence[ComparisonTable],
) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = lambda png: "data:image/png;base64," + base64.b64encode(png).decode()
    header, rows = ([], []) if summary is None else summary_rows(summary)
    verdicts = [] if summary is None else verdict(summary)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=title, notes=notes, sections=sections.items(), tables=tables, header=header, rows=rows, verdicts=verdicts
    )
