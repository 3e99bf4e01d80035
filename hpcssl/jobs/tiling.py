"""`hpcssl tile` as a job array over slides. Its room is called by name."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpcssl.jobs.array import Call, Submitted, job_name, jobs_under_way, submit_calls
from hpcssl.jobs.profile import Profile

_CUT, _STORE = "tile-cut", "tile-store"


def submit_tiling(
    source: Path, out: Path, *, options: Any, profile: Profile, num_tasks: int
) -> tuple[Submitted | None, Submitted | None]:
    """Submit an array that cuts the slides that are missing, and a job after it that writes the store.

    Parameters
    ----------
    source, out, options : as for `hpcssl.stores.tiling.tile_source`; threads are the profile's
    num_tasks : of the array, at most

    Returns
    -------
    The array, None where all slides are cut; and the job that writes the store, None where the array is under way
    already. Where the job that writes the store waits or runs, nothing is submitted.

    Raises
    ------
    UserError
        For a table or folder that cannot be used, and where SLURM refuses the job.
    """
    tiling = importlib.import_module("hpcssl.stores.tiling")
    slides = importlib.import_module("hpcssl.slides.slide_list").slides_to_read(source)
    writing = jobs_under_way(job_name(_STORE, out))
    if writing:
        return None, Submitted(job=writing[0], tasks=0)
    shared = {
        "source": source.absolute(),  # and not resolved: records of slides have its name in theirs
        "out": out.resolve(),
        "options": replace(options, threads=profile.cpus_per_gpu),
    }
    missing = tiling.slides_to_cut(slides, out, options)
    num_tasks = min(num_tasks, len(missing))
    calls = [Call(tiling.cut_slides, shared | {"slide_ids": missing[k::num_tasks]}) for k in range(num_tasks)]
    array = submit_calls(calls, out, profile, kind=_CUT) if calls else None
    if array and not array.tasks:
        return array, None
    last = [Call(tiling.tile_source, shared)]
    return array, submit_calls(last, out, profile, kind=_STORE, after=[array.job] if array else [])
