"""The stages that run as job arrays: embedding and building a store, over slides. Their rooms are called by name."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcssl.jobs.array import Call, Submitted, job_name, jobs_under_way, shares, submit_calls
from hpcssl.jobs.profile import Profile

_JOIN = "store-join"


def submit_embedding(
    store: Path,
    encoder: str,
    out: Path,
    *,
    profile: Profile,
    num_tasks: int,
    weights: Path | None = None,
    tile_px: int | None = None,
    wanted: Sequence[str] | None = None,
) -> Submitted | None:
    """Submit an array that embeds the slides that have no feature file yet; None where none is missing.

    The slides are shared out so that every task has about the same number of tiles; a GPU a task where the profile has
    any.

    Parameters
    ----------
    encoder, weights, tile_px : as for `hpcssl embed`; of a run's newest checkpoint, its step is fixed now
    num_tasks : of the array, at most
    wanted : ids of the slides that are to be embedded; None = all of the store

    Raises
    ------
    UserError
        For anything that a task could not do, as `hpcssl embed` does, and where SLURM refuses the job.
    """
    embedding = importlib.import_module("hpcssl.embed.embedding")
    opened = importlib.import_module("hpcssl.stores.store").Store.open(store)
    source = embedding.source_of(encoder, weights)
    embedding.prepare(opened, source, out, tile_px)
    missing = embedding.missing_slides(opened, out, wanted)
    if not missing:
        return None
    shared: dict[str, Any] = {
        "store": store.resolve(),
        "encoder": embedding.text_of(source, encoder),
        "weights": weights and weights.resolve(),
        "out": out.resolve(),
        "tile_px": tile_px,
        "threads": profile.cpus_per_gpu,
    }
    tiles = opened.slides["num_tiles"].to_numpy()[missing].tolist()
    calls = [
        Call("hpcssl.embed.embedding:embed_share", shared | {"slides": [missing[i] for i in share]})
        for share in shares(tiles, num_tasks)
    ]
    return submit_calls(calls, out, profile, kind="embed", gpus=min(1, profile.gpus_per_node))


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
        calls = [Call("hpcssl.stores.parts:build_part", whole | {"number": number}) for number in missing]
        array = submit_calls(calls, folder, profile, kind="store-parts")
        if not array.tasks:
            return array, None
    after = [array.job] if array else []
    join = [Call("hpcssl.stores.parts:join_parts", whole)]
    return array, submit_calls(join, folder, profile, kind=_JOIN, after=after)
