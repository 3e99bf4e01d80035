"""Building a store as a job array over slides."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from hpcssl.jobs.array import Call, Submitted, job_name, jobs_under_way, submit_calls
from hpcssl.jobs.profile import Profile

_JOIN = "store-join"


def submit_store_build(
    tiles: Path, out: Path, *, table: Path | None, options: Any, profile: Profile, num_tasks: int
) -> tuple[Submitted | None, Submitted | None]:
    """Submit an array that builds the parts of a store that are missing, and a job that joins them after it.

    Parameters
    ----------
    tiles, out, table, options : as for `hpcssl.stores.scan.build_store`
    num_tasks : parts, at most

    Returns
    -------
    The array, None where all parts are there; and the job that joins them, None where it was dropped because a part
    failed and the array still goes on. Where the latter waits or runs already, nothing is submitted.

    Raises
    ------
    UserError
        If the store exists, its parts were begun with other settings, or SLURM refuses the job.
    """
    parts = importlib.import_module("hpcssl.stores.parts")
    folder = parts.parts_folder(out)
    joining = jobs_under_way(job_name(_JOIN, folder))
    if joining:
        return None, Submitted(job=joining[0], tasks=0)
    missing = parts.plan_parts(tiles, out, table=table, options=options, num_parts=num_tasks)
    whole = {"out": out.resolve()}
    array = None
    if missing:
        calls = [Call(parts.build_part, whole | {"number": number}) for number in missing]
        array = submit_calls(calls, folder, profile, kind="store-parts")
        if not array.tasks:
            return array, None
    after = [array.job] if array else []
    join = [Call(parts.join_parts, whole)]
    return array, submit_calls(join, folder, profile, kind=_JOIN, after=after)
