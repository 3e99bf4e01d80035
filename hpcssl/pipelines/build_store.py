"""`store build`: an index of tiles, shards of them, or a store of slides, in this process or by a job array.

An array builds parts of a store of tiles, and a job after it joins them; of a store of slides, it looks at the slides,
and the job after it writes the store.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from hpcssl.core.errors import SlideError
from hpcssl.jobs.array import Call
from hpcssl.jobs.profile import Profile
from hpcssl.pipelines.stage import Stage, StageJobs, submit_stage
from hpcssl.pipelines.tile import submit_work
from hpcssl.slides.slide_list import FAILED, slides_to_read
from hpcssl.stores.online import OnlineStore
from hpcssl.stores.online_build import Looking, OnlineOptions, build_online
from hpcssl.stores.parts import build_part, join_parts, parts_folder, plan_parts
from hpcssl.stores.scan import BuildOptions


@dataclass(frozen=True, kw_only=True)
class BuiltOnline:
    """A store of the slides that can be used: all of `num_slides` but `num_failed`."""

    store: OnlineStore
    num_slides: int
    num_failed: int

    def check(self) -> None:
        """Raise SlideError, with how many slides failed, where any did."""
        if self.num_failed:
            raise SlideError(
                f"{self.num_failed} of {self.num_slides} slides failed (all are in {self.store.path / FAILED});"
                " mend them, then add them with --append"
            )


def build_from_slides(
    source: Path,
    out: Path,
    options: OnlineOptions,
    *,
    append: bool = False,
    on_total: Callable[[int], None] = lambda n: None,
    on_progress: Callable[[int], None] = lambda n: None,
) -> BuiltOnline:
    """Build a store of a table or a folder of slides; parameters and errors as `build_online`."""
    slides = slides_to_read(source)
    on_total(len(slides))
    store = build_online(slides, out, options, append=append, on_progress=on_progress)
    failed = ~slides["slide_id"].isin(store.slides["slide_id"])
    return BuiltOnline(store=store, num_slides=len(slides), num_failed=int(failed.sum()))


def submit_from_slides(
    source: Path, out: Path, options: OnlineOptions, *, profile: Profile, num_tasks: int
) -> StageJobs:
    """Submit at most `num_tasks` tasks that look at slides not looked at yet; a job after them writes the store.

    Threads are the profile's. UserError for a table or folder that cannot be used, if the store exists, and where SLURM
    refuses a job.
    """
    work = Looking(out.resolve(), replace(options, threads=profile.cpus_per_gpu))
    return submit_work(work, source, profile, num_tasks, kinds=("store-look", "store-write"), last=_write_store)


def submit_parts(
    tiles: Path, out: Path, *, table: Path | None, options: BuildOptions, profile: Profile, num_tasks: int
) -> StageJobs:
    """Submit an array that builds the parts of a store that are missing, and a job after it that joins them.

    There are at most `num_tasks` parts; the other parameters as for `hpcssl.stores.scan.build_store`. UserError if the
    store exists, its parts were begun with other settings, or SLURM refuses a job.
    """
    whole = {"out": out.resolve()}

    def calls() -> list[Call]:
        missing = plan_parts(tiles, out, table=table, options=options, num_parts=num_tasks)
        return [Call(build_part, {**whole, "number": number}) for number in missing]

    last = ("store-join", Call(join_parts, whole))
    return submit_stage(Stage(kind="store-parts", out=parts_folder(out), calls=calls, last=last), profile)


def _write_store(source: Path, work: Looking) -> None:
    build_from_slides(source, work.out, work.options).check()
