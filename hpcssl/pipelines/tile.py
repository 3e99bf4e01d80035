"""`tile`: whole slides into a store of JPEG tiles, in this process or by a job array over slides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpcssl.core.errors import SlideError
from hpcssl.jobs.array import Call
from hpcssl.jobs.profile import Profile
from hpcssl.pipelines.stage import Stage, StageJobs, submit_stage
from hpcssl.slides.slide_list import FAILED, slides_to_read
from hpcssl.stores.slide_records import SlideWork
from hpcssl.stores.tile_store import TileStore
from hpcssl.stores.tiling import Tiling, TilingOptions, tile_slides


@dataclass(frozen=True, kw_only=True)
class Tiled:
    """What came of tiling.

    Attributes
    ----------
    store : None where no slide could be cut
    failed : rows of those of `num_slides` that could not, with the `reason`
    """

    out: Path
    store: TileStore | None
    num_slides: int
    failed: Sequence[Mapping[str, Any]]

    def check(self) -> None:
        """Raise SlideError, with how many slides failed and why the first one did, where any did."""
        if self.failed:
            raise SlideError(
                f"{len(self.failed)} of {self.num_slides} slides failed (all are in {self.out / FAILED});"
                f" first: {self.failed[0]['reason']}"
            )


def tile(
    source: Path,
    out: Path,
    options: TilingOptions,
    *,
    on_total: Callable[[int], None] = lambda n: None,
    on_progress: Callable[[int], None] = lambda n: None,
) -> Tiled:
    """Tile a table or a folder of slides; parameters and errors as `hpcssl.stores.tiling.tile_slides`."""
    slides = slides_to_read(source)
    store, failed = tile_slides(slides, out, options, on_total=on_total, on_progress=on_progress)
    return Tiled(out=out, store=store, num_slides=len(slides), failed=failed)


def submit_tiling(source: Path, out: Path, options: TilingOptions, *, profile: Profile, num_tasks: int) -> StageJobs:
    """Submit at most `num_tasks` tasks that cut the slides that are missing; a job after them writes the store.

    Threads are the profile's. UserError for a table or folder that cannot be used, and where SLURM refuses a job.
    """
    work = Tiling(out.resolve(), replace(options, threads=profile.cpus_per_gpu))
    return submit_work(work, source, profile, num_tasks, kinds=("tile-cut", "tile-store"), last=_write_store)


def submit_work(
    work: SlideWork,
    source: Path,
    profile: Profile,
    num_tasks: int,
    *,
    kinds: tuple[str, str],
    last: Callable[..., None],
) -> StageJobs:
    """Submit at most `num_tasks` tasks that do what is missing of some work on slides, and `last` after them.

    Each task is for every n-th slide: neighbours are often alike. `kinds` names the array and the last job.
    """
    slides = slides_to_read(source)
    shared = {"source": source.absolute(), "work": work}  # not resolved: records of slides have its name in theirs

    def calls() -> list[Call]:
        missing = [row["slide_id"] for row in work.missing(slides)]
        num = min(num_tasks, len(missing))
        return [Call(_read_share, {**shared, "slide_ids": missing[k::num]}) for k in range(num)]

    stage = Stage(kind=kinds[0], out=work.out, calls=calls, last=(kinds[1], Call(last, shared)))
    return submit_stage(stage, profile)


def _read_share(source: Path, work: SlideWork, slide_ids: Sequence[str]) -> None:
    work.read_some(slides_to_read(source), slide_ids)


def _write_store(source: Path, work: Tiling) -> None:
    tile(source, work.out, work.options).check()
