"""`hpcssl jobs`: how runs are, what they say, and stopping or starting them again."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hpcssl.cli.actions import Actions

if TYPE_CHECKING:
    from hpcssl.jobs.run_states import RunState
    from hpcssl.jobs.submission import Submission

SUMMARY = "runs with state, step, speed, time left, nodes and restarts; their logs; cancel and requeue"
EXAMPLE = "hpcssl jobs list runs"
_POLL_S = 0.5
_NUMBERS = ("step", "samples seen", "tiles/s", "time left", "processes", "restarts")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions; without one, the runs below the current folder are listed."""
    actions = Actions(parser, required=False)
    parser.set_defaults(run=list_, folders=[Path()])
    listed = actions.add("list", list_, "how runs are", EXAMPLE)
    text = "run folders, or folders with runs up to two levels below (default: the current folder)"
    listed.add_argument("folders", nargs="*", type=Path, default=[Path()], metavar="FOLDER", help=text)
    logs = actions.add("logs", logs_, "what a run's newest start says", "hpcssl jobs logs runs/a --follow")
    logs.add_argument("--rank", type=int, default=0, help="of which process (%(default)s)")
    logs.add_argument("--lines", type=int, default=40, help="how many of the last ones (%(default)s)")
    logs.add_argument("--follow", action="store_true", help="go on with what comes, until Ctrl-C")
    text = "let a run save and stop; on SLURM it has the cluster's KillWait for that, 30 s as a rule"
    cancel = actions.add("cancel", cancel_, text, "hpcssl jobs cancel runs/a")
    text = "start a run's job again, from its newest checkpoint; where it is gone, submit it as it was"
    requeue = actions.add("requeue", requeue_, text, "hpcssl jobs requeue runs/a")
    text = "submit what the benchmark of a run lacks (see hpcssl pretrain --benchmark-with)"
    benchmark = actions.add("benchmark", benchmark_, text, "hpcssl jobs benchmark runs/a")
    for action in (logs, cancel, requeue, benchmark):
        action.add_argument("folder", type=Path, metavar="RUN", help="run folder")


def list_(args: argparse.Namespace) -> int:
    """Print a table: of a terminal's width on a terminal, else as wide as it is."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from hpcssl.jobs.run_states import find_runs, list_runs

    states = list_runs(find_runs(args.folders))
    if not states:
        print(f"no runs in {', '.join(str(folder.resolve()) for folder in args.folders)}, up to two levels below")
        return 0
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    rows = [_row(state) for state in states]
    for name in rows[0]:
        table.add_column(name, overflow="fold", justify="right" if name in _NUMBERS else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row.values()))
    Console(width=None if sys.stdout.isatty() else 240).print(table)
    for state in states:
        if state.why:
            print(f"{state.run}: {state.state}: {state.why}")
    return 0


def _row(state: RunState) -> dict[str, str]:
    from hpcssl.jobs.run_states import human_time

    return {
        "run": str(state.run),
        "state": state.state,
        "job": state.job or "–",
        "step": f"{state.step:,} of {state.stop_step:,}",
        "samples seen": f"{state.samples_seen:,}",
        "tiles/s": "–" if state.tiles_per_s is None else f"{state.tiles_per_s:,.0f}",
        "time left": "–" if state.eta_s is None else human_time(state.eta_s),
        "nodes": state.nodes or "–",
        "processes": "–" if state.processes is None else str(state.processes),
        "restarts": str(max(0, state.starts - 1)),
    }


def logs_(args: argparse.Namespace) -> int:
    """Print the end of a log, and with --follow what comes."""
    from hpcssl.jobs.run_states import newest_log, tail
    from hpcssl.runs.run_folder import read_config

    read_config(args.folder)  # refuses what is no run
    file = newest_log(args.folder, args.rank)
    print(f"{file}:", file=sys.stderr)
    with file.open(encoding="utf-8", errors="replace") as stream:
        stream.seek(0, 2)
        for line in tail(file, args.lines):
            print(line)
        while args.follow:
            print(stream.read(), end="", flush=True)
            time.sleep(_POLL_S)
    return 0


def cancel_(args: argparse.Namespace) -> int:
    """Let a run save and stop."""
    import os
    import signal

    from hpcssl.core.errors import RunError
    from hpcssl.jobs.slurm import cancel, queued

    submission = _submission(args.folder)
    if submission.job and queued([submission.job]):
        cancel(submission.job)
        print(f"job {submission.job} of {args.folder} is cancelled; it saves first, within SLURM's KillWait")
    elif submission.is_here():
        os.kill(submission.pid, signal.SIGINT)
        print(f"{args.folder}: its launcher (process {submission.pid}) is asked to stop; it saves first")
    else:
        where = "" if submission.job else f" on {submission.host}"
        raise RunError(f"{args.folder}: nothing of it runs{where}; see hpcssl jobs list")
    return 0


def requeue_(args: argparse.Namespace) -> int:
    """Start a run's job again."""
    from hpcssl.core.errors import RunError
    from hpcssl.jobs.launch import reserved, submit
    from hpcssl.jobs.slurm import queued, requeue
    from hpcssl.pipelines.pretrain_rank import train_rank

    submission = _submission(args.folder)
    if submission.cluster != "slurm":
        raise RunError(
            f"{args.folder}: runs without SLURM; give its hpcssl pretrain command again, it goes on where it was"
        )
    under_way = queued([submission.job]) if submission.job else {}
    for job, line in under_way.items():
        if line.state == "PENDING":
            raise RunError(f"{args.folder}: job {job} waits already ({line.reason})")
        requeue(job)
        print(f"job {job} of {args.folder} saves and starts again")
        return 0
    with reserved(args.folder):
        job = submit(args.folder, submission.resources, work=train_rank, wait_min=submission.wait_min)
    print(f"job {job} submitted; run folder {args.folder}")
    return 0


def _submission(run: Path) -> Submission:
    """Return what a run was asked for; RunError where there is no run, or none that was ever started."""
    from hpcssl.core.errors import RunError
    from hpcssl.jobs.submission import read_submission
    from hpcssl.runs.run_folder import read_config

    read_config(run)
    submission = read_submission(run)
    if submission is None:
        raise RunError(f"{run}: was never started; give its hpcssl pretrain command")
    return submission


def benchmark_(args: argparse.Namespace) -> int:
    """Submit what is neither there nor under way; the run's own job does the same at every new checkpoint."""
    from hpcssl.pipelines.follow import submit_missing

    submitted = submit_missing(args.folder)
    for what, job in submitted:
        print(f"job {job.job} {what}: {job.tasks} {'task' if job.tasks == 1 else 'tasks'}")
    if not submitted:
        print(f"{args.folder}: nothing to submit: all that its checkpoints allow is measured, or under way")
    return 0
