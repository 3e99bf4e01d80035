"""Which folder is what: results, runs, schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcssl.report.results import FILE_NAME, ReportError


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The folders of one report."""

    results: Path | None
    runs: tuple[Path, ...]
    schedule: Path | None


def sorted_inputs(folders: Sequence[Path]) -> Inputs:
    """Tell results (results.csv), runs (metrics.jsonl) and a schedule (schedule.json) apart.

    Raises
    ------
    ReportError
        For a folder that is none of them, or a second results or schedule folder.
    """
    kinds: dict[str, list[Path]] = {FILE_NAME: [], "metrics.jsonl": [], "schedule.json": []}
    for folder in folders:
        held = [name for name in kinds if (folder / name).is_file()]
        if not held:
            raise ReportError(_not_understood(folder))
        for name in held:
            if folder not in kinds[name]:
                kinds[name].append(folder)
    for name in (FILE_NAME, "schedule.json"):
        if len(kinds[name]) > 1:
            listed = " and ".join(map(str, kinds[name][:2]))
            raise ReportError(f"{listed}: both hold {name}; expected one of them, make a report for each")
    results, schedule = kinds[FILE_NAME], kinds["schedule.json"]
    return Inputs(
        results=results[0] if results else None,
        runs=tuple(kinds["metrics.jsonl"]),
        schedule=schedule[0] if schedule else None,
    )


def _not_understood(folder: Path) -> str:
    if not folder.exists():
        return f"{folder}: no such folder; expected results, a run or a schedule"
    if not folder.is_dir():
        return f"{folder}: a file; expected the folder of results, a run or a schedule"
    if (folder / "parts").is_dir():
        return f"{folder}: a benchmark that is not finished (no {FILE_NAME}); run its `hpcssl mccv` command again first"
    return f"{folder}: neither results ({FILE_NAME}), a run (metrics.jsonl) nor a schedule (schedule.json)"
