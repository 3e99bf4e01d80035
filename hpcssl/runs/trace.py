"""The training trace of a run: `metrics.jsonl`, one JSON object a step."""

from __future__ import annotations

import itertools
import json
import math
import mmap
import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from hpcssl.core.atomic import atomic_file, read_json_lines
from hpcssl.core.errors import RunError

FILE_NAME = "metrics.jsonl"
_LINES = 50_000  # that are in memory as dictionaries at a time: a long run has millions


class MetricsWriter:
    """Appends one line a step; opened at a step, it first drops the lines of later steps and a torn last line."""

    def __init__(self, run: Path, *, next_step: int):
        path = run / FILE_NAME
        for left in run.glob(f".{FILE_NAME}.*.tmp"):  # by a killed start
            left.unlink(missing_ok=True)
        if path.exists() and path.stat().st_size:
            # a new file, so that a start that was superseded goes on writing into the old one
            with atomic_file(path) as temporary:
                shutil.copyfile(path, temporary)
                os.truncate(temporary, _length_before(path, next_step))
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

    RunError where the run has no trace yet.
    """
    path = run / FILE_NAME
    if not path.exists():
        raise RunError(f"{run}: no {FILE_NAME}; has the run begun?")
    records, frames = read_json_lines(path), []
    while some := list(itertools.islice(records, _LINES)):
        frames.append(pd.DataFrame(some))
    if not frames:
        raise RunError(f"{path}: no steps yet")
    frame = pd.concat(frames, ignore_index=True)
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


def _length_before(path: Path, next_step: int) -> int:
    """Return the bytes of a trace up to the lines of `next_step` and later, which stand last; looks at those alone."""
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as text:
        end = text.rfind(b"\n") + 1
        while end:
            begin = text.rfind(b"\n", 0, end - 1) + 1
            try:
                if json.loads(text[begin:end])["step"] < next_step:
                    break
            except ValueError:  # a torn line that another was appended to
                pass
            end = begin
        return end
