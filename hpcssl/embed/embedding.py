"""Embedding the slides of a store: one feature file a slide, written whole; what is there is not computed again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from hpcssl.core.atomic import read_json
from hpcssl.core.claim import check_same
from hpcssl.core.errors import BadTileError, ConfigError, FeatureError
from hpcssl.embed.baseline import PREFIX, Baseline
from hpcssl.embed.sources import Embedder, Source, best_device
from hpcssl.features.feature_files import SUFFIX, write_slide
from hpcssl.features.feature_folder import INDEX_NAME, write_index
from hpcssl.loader.pillow import whole_tile
from hpcssl.stores.store import Store

_BATCH = 128  # tiles of one slide in a forward pass; batches never mix slides, so a slide's features depend on it alone
_TILES_AHEAD = 1024  # decoded before their slide's turn: bounds the memory to the largest slide and so many tiles


def source_of(encoder: str, weights: Path | None = None) -> Source | Baseline:
    """Return what `RUN[@STEP]` or `timm:NAME…` means; `weights` are of a timm model alone, else ConfigError."""
    if encoder.startswith(PREFIX):
        return Baseline.parse(encoder, weights)
    if weights is not None:
        raise ConfigError(f"--weights {weights}: {encoder} is a run, which has its own; expected timm:NAME")
    return Source.parse(encoder)


def text_of(source: Source | Baseline, encoder: str) -> str:
    """Return the text that means this source from any folder and at any time: a run's step is in it."""
    return f"{source.run.resolve()}@{source.step}" if isinstance(source, Source) else encoder


def embed_store(
    store: Store,
    source: Source | Baseline,
    out: Path,
    *,
    threads: int,
    tile_px: int | None = None,
    slides: Sequence[int] | None = None,
    on_progress: Callable[[int], None] = lambda n: None,
) -> None:
    """Write the features of every slide that has no file yet.

    Parameters
    ----------
    threads : for decoding; as many compute on the CPU
    tile_px : side that tiles are resized to; None = the encoder's native size
    slides : numbers of the slides that are wanted; None = all
    on_progress : called with 1 after every slide

    Raises
    ------
    FeatureError
        If `out` holds features of another encoder, size or store.
    BadTileError
        When all other slides are done, for the first that has a tile which is missing or cannot be decoded.
    """
    if threads < 1:
        raise ConfigError(f"threads = {threads}; expected at least 1")
    encoder, px = prepare(store, source, out, tile_px)
    torch.set_num_threads(threads)
    device = best_device()
    encoder.module.to(device)
    table = store.slides
    requested = range(len(table)) if slides is None else slides
    written = _written_slides(out)
    todo = [i for i in requested if table["slide_id"].iloc[i] not in written]
    on_progress(len(requested) - len(todo))
    bad: list[BadTileError] = []
    for index, pixels in _read_ahead(store, todo, px, threads):
        if isinstance(pixels, BadTileError):
            bad.append(pixels)
            continue
        slide = table.iloc[index]
        first = int(slide["first_tile"])
        features = np.concatenate(
            [_embed(encoder, pixels[i : i + _BATCH], device) for i in range(0, len(pixels), _BATCH)]
        )
        coordinates = [store.coordinates_of(t) for t in range(first, first + int(slide["num_tiles"]))]
        write_slide(out / f"{slide['slide_id']}{SUFFIX}", features, np.array(coordinates, np.int64))
        on_progress(1)
    if bad:
        raise BadTileError(f"{bad[0]}; {len(bad)} of {len(requested)} slides have no features for such a tile")


def missing_slides(store: Store, out: Path, wanted: Collection[str] | None = None) -> list[int]:
    """Return the numbers of the slides, of those whose id is wanted (None = all), that have no feature file in `out`.

    Raises
    ------
    FeatureError
        If a wanted slide is not in the store.
    """
    ids = store.slides["slide_id"].tolist()
    chosen = set(ids if wanted is None else wanted)
    lacking = sorted(chosen.difference(ids))
    if lacking:
        raise FeatureError(f"{store.path}: has no slide {lacking[0]} ({len(lacking)} such slides); embed another store")
    chosen -= _written_slides(out)
    return [i for i, slide_id in enumerate(ids) if slide_id in chosen]


def prepare(store: Store, source: Source | Baseline, out: Path, tile_px: int | None) -> tuple[Embedder, int]:
    """Make the folder of features with its features.json, or check that the one there is of the same making.

    Returns
    -------
    The encoder, and the side that tiles are resized to.

    Raises
    ------
    ConfigError
        For a side that the encoder cannot take.
    FeatureError
        If `out` holds features of another encoder, size or store.
    """
    encoder = source.load()
    px = encoder.image_px if tile_px is None else tile_px
    if px < 1 or px % encoder.multiple_px:
        raise ConfigError(f"tiles of {px} px; expected a multiple of the encoder's patch of {encoder.multiple_px} px")
    about = {
        "encoder": source.name,
        "checkpoint": source.checkpoint,
        "dim": encoder.dim,
        **encoder.about,
        "tile_px": px,
        "store_digest": store.digest,
    }
    _prepare(out, about)
    return encoder, px


def _written_slides(out: Path) -> set[str]:
    """Return the ids of the slides that have a feature file, by one look into the folder."""
    return {path.name[: -len(SUFFIX)] for path in out.glob(f"[!.]*{SUFFIX}")}


def _prepare(out: Path, about: dict) -> None:
    """Make the folder with its features.json, or check that the one there is of the same making."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / INDEX_NAME).exists():
        damaged = FeatureError(f"{out / INDEX_NAME}: damaged; remove {out} and embed again")
        stored = read_json(out / INDEX_NAME, damaged)
        check_same(
            {key: stored.get(key) for key in about},
            about,
            made=f"{out}: holds features with",
            now="asked for is",
            advice="choose another --out",
            error=FeatureError,
        )
        return
    if any(not e.name.startswith(".") for e in out.iterdir()):  # hidden names are what a killed start left
        raise FeatureError(f"{out}: not empty and no feature folder (no {INDEX_NAME}); choose another --out")
    write_index(out, **about)


def _read_ahead(
    store: Store, slides: list[int], px: int, threads: int
) -> Iterator[tuple[int, np.ndarray | BadTileError]]:
    """Yield (slide number, its tiles (N, px, px, 3) uint8 or what is wrong with one), decoding a few slides ahead."""
    table = store.slides

    def read(tile: int) -> np.ndarray:
        return whole_tile(store.fetch(tile, tile), px, name=str(store.file_of(tile)))

    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[tuple[int, list[Future[np.ndarray]]]] = deque()

        def finish() -> tuple[int, np.ndarray | BadTileError]:
            slide, futures = ahead.popleft()
            try:
                return slide, np.stack([f.result() for f in futures])
            except BadTileError as error:
                return slide, error

        try:
            for slide in slides:
                first, count = int(table["first_tile"].iloc[slide]), int(table["num_tiles"].iloc[slide])
                ahead.append((slide, [pool.submit(read, t) for t in range(first, first + count)]))
                while len(ahead) > 1 and sum(len(tiles) for _, tiles in ahead) > _TILES_AHEAD:
                    yield finish()
            while ahead:
                yield finish()
        finally:
            pool.shutdown(cancel_futures=True)


@torch.inference_mode()
def _embed(encoder: Embedder, pixels: np.ndarray, device: torch.device) -> np.ndarray:
    return encoder.features(torch.from_numpy(pixels).to(device)).float().cpu().numpy()
