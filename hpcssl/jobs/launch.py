"""Starting a run's processes: in this process, on this machine, or on SLURM, through submitit; and waiting for them."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hpcssl.core.atomic import alone
from hpcssl.core.errors import RunError, UserError
from hpcssl.jobs import lifecycle
from hpcssl.jobs.batch_script import python
from hpcssl.jobs.causes import read_words
from hpcssl.jobs.cluster import Batch, submit_local
from hpcssl.jobs.elastic import begin_in_s
from hpcssl.jobs.local_processes import ask_to_stop, live_ranks, stop_local
from hpcssl.jobs.profile import Resources
from hpcssl.jobs.rank_place import start_name
from hpcssl.jobs.run_start import WORDS, Outcome, RunStart, Work
from hpcssl.jobs.slurm import queued
from hpcssl.jobs.stop_signals import STOP_SIGNALS, catch_stop_signals
from hpcssl.jobs.submission import FILE, read_submission, write_submission
from hpcssl.runs.history import record_end
from hpcssl.runs.run_folder import newest_generation, read_claims
from hpcssl.runs.trace import last_record

_POLL_S = 0.2
_FULL_BYTES = 1 << 20
_MISSING_S = 5.0  # how long a rank may be gone without a word while others run; the first seconds are its start
_GRACE_S = 30.0  # for a step and a checkpoint
_REPORT_S = 1.0
_ASK_AGAIN_S = 2.0
_STOPPING = "asked to stop: ends the step, writes a checkpoint"


@contextmanager
def reserved(run: Path) -> Iterator[None]:
    """Hold the right to prepare and submit a run, of which no job of SLURM's is under way.

    UserError where another process prepares or submits it at this moment, a job of it waits or runs, or SLURM does not
    answer. Without SLURM's commands here, its jobs cannot be asked for, and are taken to be over.
    """
    run.mkdir(parents=True, exist_ok=True)
    with alone(run / FILE):
        before = read_submission(run)
        under_way = queued([before.job]) if before and before.job and shutil.which("squeue") else {}
        for job, line in under_way.items():
            raise RunError(f"{run}: job {job} of this run is {line.state.lower()}; hpcssl jobs cancel {run} ends it")
        yield


def launch(
    run: Path,
    resources: Resources,
    cluster: Literal["none", "local"],
    *,
    work: Work,
    on_step: Callable[[int], None],
    on_words: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Start a prepared run on this machine, and wait for its end.

    SIGUSR1, SIGUSR2 and SIGTERM have it save and stop. Ctrl-C does the same and then raises KeyboardInterrupt; a second
    Ctrl-C raises it at once. RunError with the cause in one line where it is known, else with the log to read.

    Parameters
    ----------
    work : what every rank does
    on_step : called while waiting with the number of steps done so far
    on_words : called with every line that the run says through rank 0, such as a damaged checkpoint that it passed
        over; in this process (`none`) these lines go to stderr by themselves
    """
    attempt = _Launch(run=run, work=work, on_step=on_step, on_words=on_words)
    before = newest_generation(run)
    try:
        with _stop_signals(interrupts=cluster == "none") as received:
            write_submission(run, cluster, resources)
            outcome = attempt.local(resources, received) if cluster == "local" else attempt.here(received)
    except Exception as error:
        claims, start = read_claims(run), start_name(attempt.token)
        newest = max(claims, default=0)
        if newest <= before or claims[newest].get("start") == start:  # else another has taken the run over
            why = str(error) if isinstance(error, UserError) else repr(error)
            record_end(run, start=start, job=None, state="failed", why=why, step=lifecycle.newest_step(run))
        raise
    attempt.report()
    if outcome == "stopped" and signal.SIGINT in received:
        raise KeyboardInterrupt
    return outcome


def batch_of(run: Path, resources: Resources, *, work: Work, wait_min: float) -> Batch:
    """Return the batch job of a run; asks SLURM when it could start where several numbers of nodes will do.

    RunError with SLURM's words, and what to do about them, where it would refuse the job.
    """
    run, token = run.resolve(), _new_token()
    start, end = (python(module, str(run), token) for module in (work.__module__, lifecycle.__name__))
    batch = Batch(
        name=f"hpcssl-{run.name}", token=token, folder=run / "logs", resources=resources, command=start, afterwards=end
    )
    return replace(batch, begin_in_s=begin_in_s(batch, wait_min=wait_min))


def submit(run: Path, resources: Resources, *, work: Work, wait_min: float) -> str:
    """Submit a prepared run, which is `reserved`, to SLURM; returns the job's id.

    RunError with SLURM's words, and what to do about them, where it refuses the job. The largest number of nodes is
    worth `wait_min` minutes of waiting, where fewer will do.
    """
    job = batch_of(run, resources, work=work, wait_min=wait_min).submit()
    write_submission(run, "slurm", resources, wait_min=wait_min, job=job)
    return job


def _new_token() -> str:
    return uuid.uuid4().hex[:12]


@contextmanager
def _stop_signals(*, interrupts: bool) -> Iterator[list[int]]:
    """Collect meanwhile the signals that ask to stop; with `interrupts` the first Ctrl-C, too."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield []
        return
    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGINT)}
    received = catch_stop_signals()

    def first_interrupt(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if interrupts:
        signal.signal(signal.SIGINT, first_interrupt)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True, kw_only=True)
class _Launch:
    """A start of a run on this machine, and who is told of it; see `launch`."""

    run: Path
    work: Work
    on_step: Callable[[int], None]
    on_words: Callable[[str], None]
    token: str = field(default_factory=_new_token)

    def report(self) -> None:
        """Tell how many steps are done."""
        if record := last_record(self.run):
            self.on_step(record["step"])

    def here(self, received: list[int]) -> Outcome:
        """Work in this process; a thread of its own tells how far it is."""
        over = threading.Event()

        def tell() -> None:
            is_stopping = False
            with suppress(OSError):  # nobody listens any more
                while not over.wait(_REPORT_S):
                    self.report()
                    if received and not is_stopping:
                        self.on_words(f"{_STOPPING}; Ctrl-C ends it at once")
                    is_stopping = bool(received)

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            return RunStart(str(self.run), self.work, self.token).on_rank(received)
        finally:
            over.set()
            teller.join()

    def local(self, resources: Resources, received: list[int]) -> Outcome:
        """Start a process for every rank, and wait for them."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        start = RunStart(str(self.run.resolve()), self.work, self.token, os.getpid(), visible)
        job = submit_local(start, self.run / "logs", resources, name=f"hpcssl-{self.run.name}")
        try:
            return self._wait(job, received)
        except RunError:  # the other ranks wait for one that is gone
            stop_local(job, grace_s=0)
            if received and not read_words(self.run, start_name(self.token)):  # it was asked before it could hear
                return "stopped"
            raise
        except BaseException:
            stop_local(job, grace_s=_GRACE_S)
            raise

    def _wait(self, job: Any, received: list[int]) -> Outcome:
        """Wait for a local job; RunError when a rank has failed, without waiting for those that wait for it."""
        ranks = job._sub_jobs or [job]
        missing_since, asked_at, heard = None, None, 0
        while not job.done():
            self.report()
            heard = self._pass_on(ranks[0].paths.stderr, heard)
            now = time.monotonic()
            if received and (asked_at is None or now - asked_at > _ASK_AGAIN_S):
                if asked_at is None:
                    self.on_words(_STOPPING)
                ask_to_stop(job)
                asked_at = now
            ended = sum(rank.paths.result_pickle.exists() for rank in ranks)
            live = live_ranks(job)
            missing = live is not None and len(live) + ended < len(ranks)
            missing_since = (missing_since or now) if missing else None
            if missing_since and now - missing_since > _MISSING_S:
                raise RunError(self._cause(job))
            time.sleep(_POLL_S)
        self._pass_on(ranks[0].paths.stderr, heard)
        if all(rank.paths.result_pickle.exists() and rank.exception() is None for rank in ranks):
            return "finished" if all(rank.result() == "finished" for rank in ranks) else "stopped"
        raise RunError(self._cause(job))

    def _pass_on(self, log: Path, heard: int) -> int:
        """Pass on what rank 0 has said in its log after so many bytes; returns how many bytes are heard now."""
        if not log.exists():
            return heard
        with log.open("rb") as stream:
            stream.seek(heard)
            whole, _, _ = stream.read().rpartition(b"\n")
        for line in whole.decode(errors="replace").splitlines():
            if line.startswith(WORDS):
                self.on_words(line.removeprefix(WORDS))
        return heard + len(whole) + bool(whole)

    def _cause(self, job: Any) -> str:
        """Return why a start failed: what a rank told, else a full disk, else where the log is."""
        run, words = self.run, read_words(self.run, start_name(self.token))
        if words and words[0]["told"]:
            return str(words[0]["message"])
        if shutil.disk_usage(run).free < _FULL_BYTES:
            return f"{run}: the disk is full; free some space, then run the same command again"
        reason = f"{words[0]['message']} on rank {words[0]['rank']}" if words else "a process ended without a word"
        log = job.paths.stderr
        return f"{run}: training failed ({reason}); the log is {log}; the same command goes on where it was"
