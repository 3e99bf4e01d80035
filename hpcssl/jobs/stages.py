"""Embedding as a job array over slides. Its room is called by name."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcssl.jobs.array import Call, Submitted, shares, submit_calls
from hpcssl.jobs.profile import Profile


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
    opened = importlib.import_module("hpcssl.stores.kinds").open_store(store)
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
        Call(embedding.embed_share, shared | {"slides": [missing[i] for i in share]})
        for share in shares(tiles, num_tasks)
    ]
    return submit_calls(calls, out, profile, kind="embed", gpus=min(1, profile.gpus_per_node))
