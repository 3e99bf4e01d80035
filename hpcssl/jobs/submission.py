"""The last submission of a run, in its folder: `submission.json` holds all that it takes to submit it again."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

from hpcssl.core.atomic import read_json, write_atomic
from hpcssl.core.config import build, settings, to_mapping
from hpcssl.core.errors import RunError
from hpcssl.jobs.profile import Resources

FILE = "submission.json"


@settings
class Submission:
    """The last command that started a run on a `cluster` (`none`, `local` or `slurm`), and the process that it was.

    The largest number of nodes was worth `wait_min` minutes of waiting; `job` is SLURM's id, None elsewhere.
    """

    cluster: str
    resources: Resources
    wait_min: float = 0.0
    job: str | None = None
    host: str = ""
    pid: int = 0

    def is_here(self) -> bool:
        """Return whether the process that starts a run on this machine, and waits for it, is alive."""
        if self.cluster == "slurm" or self.host != platform.node():
            return False
        try:
            return b"hpcssl" in Path(f"/proc/{self.pid}/cmdline").read_bytes()
        except OSError:
            return False


def write_submission(
    run: Path, cluster: str, resources: Resources, *, wait_min: float = 0.0, job: str | None = None
) -> None:
    """Write what this process has asked for."""
    submission = Submission(
        cluster=cluster, resources=resources, wait_min=wait_min, job=job, host=platform.node(), pid=os.getpid()
    )
    write_atomic(run / FILE, json.dumps(to_mapping(submission), indent=1) + "\n")


def read_submission(run: Path) -> Submission | None:
    """Return what was asked for last; None where nothing was, RunError where the file is damaged."""
    file = run / FILE
    if not file.exists():
        return None
    damaged = RunError(f"{file}: damaged; remove it, then start the run again with hpcssl pretrain")
    return build(Submission, read_json(file, damaged), where=str(file))
