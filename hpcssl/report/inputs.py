"""Which folder is what: results, runs, schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcssl.evaluate.results import RESULTS_NAME, ResultsFolder
from hpcssl.report.arms import ReportError


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The folders of one report."""

    results: Path | None = None
    """Holds results.csv."""
    runs: tuple[Path, ...] = ()
    """Hold metrics.jsonl."""
    schedule: Path | None = None
    """Holds schedule.json."""


def sort_inputs(folders: Sequence[Path]) -> Inputs:
    """Tell results, runs and a schedule apart by the files in them.

    Raises
    ------
    ReportError
        For a folder that is none of them, or a second results or schedule folder.
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
