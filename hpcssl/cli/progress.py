"""Progress: a bar with an estimate on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from hpcssl.pipelines.display import Display

_SECONDS_BETWEEN_LINES = 10.0


def progress(label: str, total: int, unit: str = "") -> AbstractContextManager[Callable[[int], None]]:
    """Show how far some work is; gives `advance(n)`, to be called after n more units.

    Without a terminal: a line at the start of longer work, every ten seconds, and at the end.
    """
    return (_bar if sys.stderr.isatty() else _lines)(label, total, unit)


@contextmanager
def late_progress(label: str, unit: str) -> Iterator[dict[str, Any]]:
    """Give `on_total` and `on_progress`, the first of which begins to show how far the work is."""
    with ExitStack() as stack:
        advance = [lambda n: None]

        def on_total(total: int) -> None:
            advance[0] = stack.enter_context(progress(label, total=total, unit=unit))

        yield {"on_total": on_total, "on_progress": lambda n: advance[0](n)}


def say(line: str) -> None:
    """Print a line beside the results, to stderr."""
    print(line, file=sys.stderr, flush=True)


def display() -> Display:
    """Return how a verb of the pipelines shows on a command line what it does."""
    return Display(progress=progress, say=say)


@contextmanager
def _bar(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    work = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*work, *times, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda n: bar.advance(task, n)


@contextmanager
def _lines(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    started = last = time.monotonic()
    first: float | None = None  # when the first units were done: what is before that is start-up, not pace
    done = before = 0
    ended = False

    def advance(n: int) -> None:
        nonlocal done, before, first, last
        if ended:  # a thread that outlives the work, after Ctrl-C
            return
        done += n
        now = time.monotonic()
        if first is None:
            first, before = now, done
        if now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            left = (now - first) / (done - before) * max(total - done, 0) if done > before else None
            estimate = f", about {left:.0f} s left" if left is not None else ""
            say(f"{label}: {done} of {total} {unit}{estimate}")

    try:
        yield advance
    finally:
        ended = True
    say(f"{label}: {done} {unit} in {time.monotonic() - started:.1f} s")
