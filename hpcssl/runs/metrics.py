"""The training trace of a run: `metrics.jsonl`, one JSON object a step."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pandas as pd

from hpcssl.core.errors import RunError

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends one line a step; opened at a step, it first drops the lines of later steps and a torn last line."""

    def __init__(self, run: Path, *, next_step: int):
        path = run / FILE_NAME
        if path.exists():
            kept = [line for line, record in _records(path) if record["step"] < next_step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(kept), encoding="utf-8")
            temporary.replace(path)
        self._stream = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one step's record; it is in the file when this returns. A number that is not finite becomes null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._stream.write(json.dumps(finite) + "\n")
        self._stream.flush()

    def sync(self) -> None:
        """Make the trace durable, so that no checkpoint is ahead of it."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_metrics(run: Path) -> pd.DataFrame:
    """Return one row a step, in order; of a step that was computed twice the later line counts.

    Raises
    ------
    RunError
        If the run has no trace yet.
    """
    path = run / FILE_NAME
    if not path.exists():
        raise RunError(f"{run}: no {FILE_NAME}; has the run begun?")
    frame = pd.DataFrame([record for _, record in _records(path)])
    if frame.empty:
        raise RunError(f"{path}: no steps yet")
    return frame.drop_duplicates("step", keep="last").sort_values("step").reset_index(drop=True)


def last_record(run: Path) -> dict[str, Any] | None:
    """Return the newest whole line of a trace that may be growing, or None."""
    path = run / FILE_NAME
    if not path.exists():
        return None
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 8192))
        for line in reversed(stream.read().split(b"\n")):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict):
                return record
    return None


def _records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return (line, record) of every whole line; a process that was killed may leave the last one torn."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            found.append((line.rstrip("\n") + "\n", json.loads(line)))
        except json.JSONDecodeError:
            continue
    return found
