"""The report: from folders of results, runs and a schedule to a page and its closing table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import hpcssl
from hpcssl.evaluate.results import RESULTS_NAME, ResultsFolder
from hpcssl.report.arms import ReportError
from hpcssl.report.page import Inputs, Report, write_report
from hpcssl.report.times import WAIT_LIMIT, step_times, wait_share, wait_text
from hpcssl.runs.trace import read_metrics


def report(folders: Sequence[Path], out: Path, *, title: str, notes: Mapping[str, str] | None = None) -> Report:
    """Write the report of some folders, in any order, into `out`.

    Parameters
    ----------
    notes : rows of the table "What was run"; None = the folders and the version

    UserError for a folder that is no input, or cannot be used.
    """
    inputs = sort_inputs(folders)
    return write_report(out, inputs, title=title, notes=_notes(inputs) if notes is None else notes)


def sort_inputs(folders: Sequence[Path]) -> Inputs:
    """Tell results, runs and a schedule apart by the files in them.

    ReportError for a folder that is none of them, or a second results or schedule folder.
    """
    of_kind: dict[str, list[Path]] = {RESULTS_NAME: [], "metrics.jsonl": [], "schedule.json": []}
    for folder in folders:
        kinds = [name for name in of_kind if (folder / name).is_file()]
        if not kinds:
            raise ReportError(_not_understood(folder))
        for name in kinds:
            if folder not in of_kind[name]:
                of_kind[name].append(folder)
    results, runs, schedules = of_kind.values()
    for name, several in ((RESULTS_NAME, results), ("schedule.json", schedules)):
        if len(several) > 1:
            listed = " and ".join(map(str, several[:2]))
            raise ReportError(f"{listed}: both hold {name}; expected one of them, make a report for each")
    return Inputs(results=next(iter(results), None), runs=tuple(runs), schedule=next(iter(schedules), None))


def slow_runs(folders: Sequence[Path]) -> list[str]:
    """Return a sentence for every run among the folders that waited for tiles too long."""
    recorded = ((run, step_times(read_metrics(run))) for run in sort_inputs(folders).runs)
    return [f"{run}: {wait_text(t)}" for run, t in recorded if t is not None and wait_share(t) > WAIT_LIMIT]


def _notes(inputs: Inputs) -> dict[str, str]:
    notes = {
        "results": str(inputs.results or ""),
        "runs": ", ".join(map(str, inputs.runs)),
        "schedule": str(inputs.schedule or ""),
        "hpcssl": hpcssl.__version__,
    }
    return {key: value for key, value in notes.items() if value}


def _not_understood(folder: Path) -> str:
    if not folder.exists():
        return f"{folder}: no such folder; expected results, a run or a schedule"
    if not folder.is_dir():
        return f"{folder}: a file; expected the folder of results, a run or a schedule"
    if ResultsFolder(folder).parts.is_dir():
        return (
            f"{folder}: a benchmark that is not finished (no {RESULTS_NAME}); run its `hpcssl mccv` command again first"
        )
    return f"{folder}: neither results ({RESULTS_NAME}), a run (metrics.jsonl) nor a schedule (schedule.json)"
