"""Embedding the slides of a store: one feature file a slide, written whole; what is there is not computed again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcssl.core.atomic import read_json
from hpcssl.core.claim import check_same
from hpcssl.core.errors import BadTileError, ConfigError, FeatureError
from hpcssl.core.ordered import in_order
from hpcssl.embed.baseline import PREFIX, Baseline
from hpcssl.embed.sources import Embedder, Source
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

    FeatureError where `out` holds features of another encoder, size or store; BadTileError, when all other slides are
    done, for the first that has a tile which is missing or cannot be decoded.

    Parameters
    ----------
    threads : for decoding; as many compute on the CPU
    tile_px : side that tiles are resized to; None = the encoder's native size
    slides : numbers of the slides that are wanted; None = all
    on_progress : called with 1 after every slide
    """
    if threads < 1:
        raise ConfigError(f"threads = {threads}; expected at least 1")
    encoder, px = prepare(store, source, out, tile_px)
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
        with torch.inference_mode():
            batches = torch.from_numpy(pixels).split(_BATCH)
            features = torch.cat([encoder.features(batch.to(device)).float().cpu() for batch in batches]).numpy()
        coordinates = [store.coordinates_of(t) for t in range(first, first + int(slide["num_tiles"]))]
        write_slide(out / f"{slide['slide_id']}{SUFFIX}", features, np.array(coordinates, np.int64))
        on_progress(1)
    if bad:
        raise BadTileError(f"{bad[0]}; {len(bad)} of {len(requested)} slides have no features for such a tile")


def missing_slides(store: Store, out: Path, wanted: Collection[str] | None = None) -> list[int]:
    """Return the numbers of the wanted slides, by id (None = all), that have no feature file in `out`.

    FeatureError where a wanted slide is not in the store.
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

    Returns the encoder, and the side that tiles are resized to. ConfigError for a side that the encoder cannot take;
    FeatureError where `out` holds features of another encoder, size or store.
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
    out.mkdir(parents=True, exist_ok=True)
    index = out / INDEX_NAME
    if index.exists():
        stored = read_json(index, FeatureError(f"{index}: damaged; remove {out} and embed again"))
        check_same(
            {key: stored.get(key) for key in about},
            about,
            made=f"{out}: holds features with",
            now="asked for is",
            advice="choose another --out",
            error=FeatureError,
        )
    elif any(not e.name.startswith(".") for e in out.iterdir()):  # hidden names are what a killed start left
        raise FeatureError(f"{out}: not empty and no feature folder (no {INDEX_NAME}); choose another --out")
    else:
        write_index(out, **about)
    return encoder, px


def _written_slides(out: Path) -> set[str]:
    """Return the ids of the slides that have a feature file, by one look into the folder."""
    return {path.name[: -len(SUFFIX)] for path in out.glob(f"[!.]*{SUFFIX}")}


def _read_ahead(
    store: Store, slides: list[int], px: int, threads: int
) -> Iterator[tuple[int, np.ndarray | BadTileError]]:
    """Yield (slide number, its tiles (N, px, px, 3) uint8 or what is wrong with one), decoding some tiles ahead."""

    def read(tile: int) -> Any:
        try:
            return whole_tile(store.fetch(tile, tile), px, name=str(store.file_of(tile)))
        except BadTileError as error:
            return error

    firsts, counts = (store.slides[name].iloc[slides].tolist() for name in ("first_tile", "num_tiles"))
    tiles = (tile for first, count in zip(firsts, counts) for tile in range(first, first + count))
    with ThreadPoolExecutor(threads) as pool:
        decoded = in_order(pool, read, tiles, window=_TILES_AHEAD)
        try:
            for slide, count in zip(slides, counts):
                pixels = [image for _, image in islice(decoded, count)]
                bad = [image for image in pixels if isinstance(image, BadTileError)]
                yield slide, bad[0] if bad else np.stack(pixels)
        finally:
            pool.shutdown(cancel_futures=True)
