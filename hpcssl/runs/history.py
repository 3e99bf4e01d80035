"""The restart history of a run: its starts, and how the newest of them ended.

`restarts.jsonl` has one line a start, written as it begins (`hpcssl.runs.run_folder.record_start`). Why a start ended
is known only afterwards, often to another process: whoever knows it first writes `end.json`, and the next start takes
the reason over into its own line.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hpcssl.core.atomic import read_json_lines, write_atomic
from hpcssl.runs.run_folder import newest_generation, read_claims

RESTARTS = "restarts.jsonl"
END = "end.json"


@dataclass(frozen=True, kw_only=True)
class End:
    """How a start ended.

    Attributes
    ----------
    start : names the start, as in its line in the restart history
    job : SLURM's job id; None elsewhere
    state : `finished`, `stopped` (goes on when it is started again), `requeued` (SLURM starts it again) or `failed`
    why : the reason, in words
    step : newest checkpoint
    failures : how many starts of this job have failed since there was a newer checkpoint
    generation : newest claim on the folder when this was written
    time : seconds since the epoch
    """

    start: str
    job: str | None
    state: str
    why: str
    step: int
    failures: int = 0
    generation: int = 0
    time: float = 0.0


def read_starts(run: Path) -> list[dict[str, Any]]:
    """Return the lines of the restart history; for a start that died before its line was whole, what its claim says."""
    starts = list(read_json_lines(run / RESTARTS))
    numbers = {start.get("generation") for start in starts}
    claims = [claim for number, claim in read_claims(run).items() if number not in numbers and "start" in claim]
    return sorted([*starts, *claims], key=lambda start: start.get("generation", 0)) if claims else starts


def read_end(run: Path) -> End | None:
    """Return how the newest start ended; None while it goes on, and where it left no word."""
    end = _last_end(run)
    return end if end and end.generation == newest_generation(run) else None


def record_end(
    run: Path, *, start: str, job: str | None, state: str, why: str, step: int, is_failure: bool = False
) -> End:
    """Write how a start ended, unless that is written already; returns what is written.

    A failure is the run's own fault: only so many in a row are allowed without a newer checkpoint.
    """
    before = _last_end(run)
    if before and before.start == start:
        return before
    so_far = before.failures if before and (before.job, before.step) == (job, step) else 0
    end = End(
        start=start,
        job=job,
        state=state,
        why=why,
        step=step,
        failures=so_far + is_failure,
        generation=newest_generation(run),
        time=time.time(),
    )
    _write(run, end)
    return end


def fail_end(run: Path, why: str) -> None:
    """Say of the end that was written last that it failed after all, and why."""
    end = _last_end(run)
    if end:
        _write(run, replace(end, state="failed", why=why, time=time.time()))


def _write(run: Path, end: End) -> None:
    write_atomic(run / END, json.dumps(asdict(end)) + "\n")


def _last_end(run: Path) -> End | None:
    try:
        return End(**json.loads((run / END).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # none yet, or of another version: then nothing is known
        return None
