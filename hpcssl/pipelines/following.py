"""While a run trains, a thread has its new checkpoints measured; this module, run apart, submits the jobs for it."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hpcssl.jobs.batch_script import python
from hpcssl.pipelines.followed_run import is_followed, measured_steps

_POLL_S = 20.0
_APART_S = 600.0


@contextmanager
def following(run: Path, say: Callable[[str], None]) -> Iterator[None]:
    """While a run trains here, have its new checkpoints measured; what fails is said, and does not hurt training."""
    if not is_followed(run):
        yield
        return
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(run, ended, say), name="follow", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
    watcher.join()
    _submit_apart(run, say)


def _watch(run: Path, ended: threading.Event, say: Callable[[str], None]) -> None:
    seen = None
    while not ended.is_set():
        with suppress(OSError):  # a file system that is away for a moment
            steps = measured_steps(run, every=1)
            if steps != seen:
                _submit_apart(run, say)
            seen = steps
        ended.wait(_POLL_S)


def _submit_apart(run: Path, say: Callable[[str], None]) -> None:
    """Call `submit_missing` in a process of its own."""
    try:
        subprocess.run(python(__name__, str(run)), check=True, capture_output=True, text=True, timeout=_APART_S)
    except subprocess.CalledProcessError as error:
        why = (error.stderr.strip() or "no words").splitlines()[-1]
    except (subprocess.TimeoutExpired, OSError) as error:
        why = str(error)
    else:
        return
    say(f"benchmark not submitted; hpcssl jobs benchmark {run} tries again: {why}")


if __name__ == "__main__":
    from hpcssl.pipelines.follow import submit_missing

    submit_missing(Path(sys.argv[1]), again=False)
