"""What the batch script runs on every rank: it catches SLURM's warnings first, then imports what it takes to train."""

from __future__ import annotations

import importlib
import signal
import sys

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


def catch_stop_signals() -> list[int]:
    """Collect, from now on, the signals that ask this process to stop; returns the list that they are appended to."""
    asked: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda received, frame: asked.append(received))
    return asked


if __name__ == "__main__":
    caught = catch_stop_signals()
    importlib.import_module("hpcssl.jobs.worker").PretrainJob(*sys.argv[1:]).on_rank(caught)
    for warning in STOP_SIGNALS:  # Python takes its handlers back before it ends, and a warning would kill it then
        signal.signal(warning, signal.SIG_IGN)
