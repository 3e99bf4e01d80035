"""The signals that ask a process to save and stop. Nothing heavy is imported here: ranks listen before they import."""

from __future__ import annotations

import signal

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


def catch_stop_signals() -> list[int]:
    """Collect, from now on, the signals that ask this process to stop; returns the list that they are appended to."""
    received: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: received.append(number))
    return received


def ignore_stop_signals() -> None:
    """Ignore them: Python takes its handlers back before it ends, and a signal would kill it then."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
