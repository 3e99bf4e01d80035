"""The verb `embed`: a feature file per slide, here or as a job array over the slides that have none."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hpcssl.embed.embedding import embed_store, missing_slides, prepare, source_of, text_of
from hpcssl.jobs.array import Call, Submitted, shares
from hpcssl.jobs.profile import Profile
from hpcssl.pipelines.display import Progress
from hpcssl.pipelines.stage import Stage, submit_stage
from hpcssl.stores.kinds import open_store


@dataclass(frozen=True, kw_only=True)
class EmbedRequest:
    """Which slides of a store are embedded, by what, and where their feature files go.

    Attributes
    ----------
    encoder : `RUN[@STEP]` or `timm:NAME…`
    weights : file of a timm model's weights; None = a run has its own, others lie where timm keeps them
    tile_px : side that tiles are resized to; None = the encoder's native size
    slides : ids of the slides; None = all of the store
    """

    store: Path
    encoder: str
    out: Path
    weights: Path | None = None
    tile_px: int | None = None
    slides: Collection[str] | None = None


def embed(request: EmbedRequest, *, threads: int, progress: Progress) -> int:
    """Embed the slides of a store that have no feature file yet, in this process; returns how many slides it has.

    A UserError as of `hpcssl.embed.embedding.embed_store`.
    """
    store, source = open_store(request.store), source_of(request.encoder, request.weights)
    slides = range(store.num_slides) if request.slides is None else missing_slides(store, request.out, request.slides)
    with progress(f"embedding {request.encoder}", len(slides), "slides") as advance:
        embed_store(
            store, source, request.out, threads=threads, tile_px=request.tile_px, slides=slides, on_progress=advance
        )
    return store.num_slides


def is_embedded(request: EmbedRequest) -> bool:
    """Return whether all slides have a feature file; FeatureError where the store lacks one of the slides."""
    return not missing_slides(open_store(request.store), request.out, request.slides)


def submit_embedding(request: EmbedRequest, profile: Profile, *, num_tasks: int) -> Submitted | None:
    """Submit an array that embeds the slides that have no feature file yet; None where none is missing.

    The slides are shared out so that every task has about the same number of tiles. A task gets one GPU where the
    profile has any; there are at most `num_tasks`. The step of a run's newest checkpoint is fixed now. UserError for
    anything that a task could not do, as of `embed`, and where SLURM refuses the job.
    """
    store, source = open_store(request.store), source_of(request.encoder, request.weights)
    prepare(store, source, request.out, request.tile_px)
    missing = missing_slides(store, request.out, request.slides)
    fixed = replace(
        request,
        store=request.store.resolve(),
        encoder=text_of(source, request.encoder),
        weights=request.weights and request.weights.resolve(),
        out=request.out.resolve(),
        slides=None,
    )
    tiles = store.slides["num_tiles"].to_numpy()[missing].tolist()
    calls = [
        Call(embed_share, {"request": fixed, "slides": [missing[i] for i in share], "threads": profile.cpus_per_gpu})
        for share in shares(tiles, num_tasks)
    ]
    stage = Stage(kind="embed", out=request.out, calls=lambda: calls, gpus=min(1, profile.gpus_per_node))
    return submit_stage(stage, profile).array


def embed_share(request: EmbedRequest, slides: Sequence[int], threads: int) -> None:
    """Embed the slides of some numbers: one task of a job array."""
    source = source_of(request.encoder, request.weights)
    store = open_store(request.store)
    embed_store(store, source, request.out, threads=threads, tile_px=request.tile_px, slides=slides)
