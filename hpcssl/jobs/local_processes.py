"""The processes of a job on this machine: they ignore a terminal's Ctrl-C, and are asked to stop, or ended."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def ignoring_interrupts() -> Iterator[None]:
    """Let what starts meanwhile ignore Ctrl-C, which a terminal sends to all: its launcher then asks it to stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def ask_to_stop(job: Any) -> None:
    """Ask the ranks of a job on this machine to save and stop; one that only starts may not hear it, or end at once."""
    job._process.send_signal(signal.SIGTERM)  # submitit's controller hands it to the ranks


def stop_local(job: Any, *, grace_s: float) -> None:
    """Ask the ranks of a job on this machine to save and stop, and end what is left after `grace_s` seconds."""
    ask_to_stop(job)
    until = time.monotonic() + grace_s
    while not job.done() and time.monotonic() < until:
        time.sleep(0.05)
    if not job.done():
        for pid in live_ranks(job) or []:
            os.kill(pid, signal.SIGKILL)
        job._process.wait()


def live_ranks(job: Any) -> list[int] | None:
    """Return the process ids of a local job's ranks that still run; None where the system does not tell."""
    controller = job._process.pid
    try:
        return [int(pid) for pid in Path(f"/proc/{controller}/task/{controller}/children").read_text().split()]
    except OSError:
        return None
