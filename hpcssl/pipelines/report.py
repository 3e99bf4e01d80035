"""The report: from folders of results, runs and a schedule to a page and its closing table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import hpcssl
from hpcssl.report.inputs import Inputs, sort_inputs
from hpcssl.report.page import Report, write_report
from hpcssl.report.times import WAIT_LIMIT, step_times, wait_share, wait_text
from hpcssl.runs.trace import read_metrics


def report(folders: Sequence[Path], out: Path, *, title: str, notes: Mapping[str, str] | None = None) -> Report:
    """Write the report of some folders, in any order, into `out`.

    Parameters
    ----------
    notes : rows of the table "What was run"; None = the folders and the version

    Raises
    ------
    UserError
        For a folder that is no input, or cannot be used.
    """
    inputs = sort_inputs(folders)
    return write_report(out, inputs, title=title, notes=_notes(inputs) if notes is None else notes)


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
