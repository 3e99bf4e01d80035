"""The state of runs, from their folders and SLURM's queue, and nothing else."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcssl.core.errors import RunError, UserError
from hpcssl.jobs.causes import WITHOUT_A_WORD, log_file, why_ended
from hpcssl.jobs.slurm import Queued, queued
from hpcssl.jobs.submission import FILE, Submission, read_submission
from hpcssl.runs.history import read_end, read_starts
from hpcssl.runs.run_folder import CONFIG, read_config
from hpcssl.runs.trace import FILE_NAME

_DEPTH = 2
_TAIL_BYTES = 1 << 16
_RECENT = 50  # steps whose speed is the run's


@dataclass(frozen=True, kw_only=True)
class RunState:
    """How a run is.

    Its state is `pending`, `running` or another word of SLURM's queue; `finished`, `stopped`, `requeued` or `failed`,
    as its newest start ended; `not started`; `lost` where nobody left a word; `unknown` where SLURM does not answer.
    """

    run: Path
    state: str
    why: str  # it waits, stopped or failed; empty while it runs
    job: str | None  # SLURM's id
    step: int
    stop_step: int
    samples_seen: int
    tiles_per_s: float | None  # median over its newest steps; None before the first
    eta_s: float | None  # seconds to its end at this speed; None unless it runs
    nodes: str  # that it runs on, or ran on last
    starts: int
    processes: int | None  # of its newest start


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """Return the run folders among some folders and up to two levels below; RunError for a folder that is not there."""
    runs = []
    for folder in folders:
        if not folder.is_dir():
            raise RunError(f"{folder}: no such folder; give a run folder, or one with run folders in it")
        runs += sorted(_runs_in(folder, _DEPTH))
    return list(dict.fromkeys(runs))


def list_runs(runs: Sequence[Path]) -> list[RunState]:
    """Return how some runs are; asks SLURM once where one of them is its job."""
    submissions = {run: read_submission(run) for run in runs}
    jobs = [submission.job for submission in submissions.values() if submission and submission.job]
    queue: dict[str, Queued] | None = None
    with suppress(RunError):  # no SLURM here, or one that does not answer: the folders still tell most
        queue = queued(jobs)
    return [_state(run, submission, queue) for run, submission in submissions.items()]


def tail(file: Path, lines: int) -> list[str]:
    """Return the last whole lines of a text file that may be growing; at most those in its last 64 KiB."""
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - _TAIL_BYTES))
        return stream.read().decode(errors="replace").splitlines()[-lines:]


def newest_log(run: Path, rank: int) -> Path:
    """Return the newest log of a rank; RunError where there is none."""
    logs = sorted(run.glob(f"logs/{log_file(run, '*', rank).name}"), key=lambda file: file.stat().st_mtime)
    if not logs:
        advice = "it has not started yet, or has fewer processes: hpcssl jobs list"
        raise RunError(f"{run}: no log of rank {rank}; {advice}")
    return logs[-1]


def _runs_in(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / CONFIG).is_file() and (folder / "generations").is_dir():
        yield folder
    elif depth:
        for child in folder.iterdir():
            if child.is_dir() and not child.name.startswith("."):
                yield from _runs_in(child, depth - 1)


def _state(run: Path, submission: Submission | None, queue: Mapping[str, Queued] | None) -> RunState:
    derived, starts = _derived(run), read_starts(run)
    newest: dict[str, Any] = starts[-1] if starts else {}
    records = _newest_records(run)
    last = records[-1] if records else {"step": 0, "samples_seen": 0}
    speed = statistics.median(record["tiles_per_s"] for record in records) if records else None
    job = submission.job if submission else None
    waiting = queue.get(job) if queue and job else None
    if queue is None and job:
        state, why = "unknown", "SLURM, whose job it is, does not answer here"
    else:
        state, why = _state_and_why(run, submission, waiting, newest)
    left = derived["samples"] - last["samples_seen"]
    return RunState(
        run=run,
        state=state,
        why=why,
        job=job,
        step=last["step"],
        stop_step=derived["stop_step"],
        samples_seen=last["samples_seen"],
        tiles_per_s=speed,
        eta_s=left / speed if speed and state == "running" else None,
        nodes=waiting.nodes if waiting and waiting.nodes else ",".join(newest.get("nodes") or [newest.get("host", "")]),
        starts=len(starts),
        processes=newest.get("world_size"),
    )


def _state_and_why(
    run: Path, submission: Submission | None, waiting: Queued | None, start: Mapping[str, Any]
) -> tuple[str, str]:
    if waiting:
        return waiting.state.lower(), "" if waiting.reason == "None" else waiting.reason
    end = read_end(run)
    is_here = submission is not None and submission.is_here()
    if is_here and not (end and end.time >= (run / FILE).stat().st_mtime):
        return "running", ""
    if end:
        return end.state, "" if end.state == "finished" else end.why
    if not start:
        return "not started", ""
    why, is_failure = why_ended(run, start, by_slurm=False)  # it left no word, but SLURM may have
    if why == WITHOUT_A_WORD:
        return "lost", "its last start left no word; start it again"
    return "failed" if is_failure else "stopped", why


def _derived(run: Path) -> dict[str, Any]:
    """Return what a run's config.yaml derives; of one that cannot be used, nothing, so that the others are listed."""
    try:
        return dict(read_config(run)["derived"])
    except (UserError, KeyError, TypeError):
        return {"stop_step": 0, "samples": 0}


def _newest_records(run: Path) -> list[dict[str, Any]]:
    """Return the newest whole lines of the trace."""
    records = []
    for line in tail(run / FILE_NAME, _RECENT + 1) if (run / FILE_NAME).exists() else ():
        with suppress(json.JSONDecodeError):  # it is being written, or its beginning is beyond the tail
            records.append(json.loads(line))
    return records


def human_time(seconds: float) -> str:
    """Return a time in its two largest units.

    >>> human_time(59), human_time(3700), human_time(90000)
    ('0m 59s', '1h 01m', '1d 01h')
    """
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days}d {hours % 24:02d}h"
    return f"{hours}h {minutes % 60:02d}m" if hours else f"{minutes}m {int(seconds) % 60:02d}s"
