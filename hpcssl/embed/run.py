"""Embedding every slide of a store: one feature file a slide, written whole; what is there is not computed again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from hpcssl.core.atomic import read_json
from hpcssl.core.config import first_difference
from hpcssl.core.errors import ConfigError, FeatureError
from hpcssl.embed.baseline import Baseline
from hpcssl.embed.encoder import Embedder, Source, best_device
from hpcssl.features.files import SUFFIX, write_slide
from hpcssl.features.folder import INDEX_NAME, write_index
from hpcssl.loader.pillow import whole_tile
from hpcssl.tiles.store import Store

_BATCH = 128  # tiles of one slide in a forward pass; batches never mix slides, so a slide's features depend on it alone
_TILES_AHEAD = 1024  # decoded before their slide's turn: bounds the memory to the largest slide and so many tiles


def embed_store(
    store: Store,
    source: Source | Baseline,
    out: Path,
    *,
    threads: int,
    tile_px: int | None = None,
    on_progress: Callable[[int], None] = lambda n: None,
) -> None:
    """Write the features of every slide that has no file yet.

    Parameters
    ----------
    threads : for decoding; as many compute on the CPU
    tile_px : side that tiles are resized to; None = the encoder's native size
    on_progress : called with 1 after every slide

    Raises
    ------
    FeatureError
        If `out` holds features of another encoder, size or store.
    """
    if threads < 1:
        raise ConfigError(f"threads = {threads}; expected at least 1")
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
    torch.set_num_threads(threads)
    device = best_device()
    encoder.module.to(device)
    slides = store.slides
    todo = [i for i, slide_id in enumerate(slides["slide_id"]) if not (out / f"{slide_id}{SUFFIX}").exists()]
    on_progress(len(slides) - len(todo))
    for index, pixels in _read_ahead(store, todo, px, threads):
        slide = slides.iloc[index]
        first = int(slide["first_tile"])
        features = np.concatenate(
            [_embed(encoder, pixels[i : i + _BATCH], device) for i in range(0, len(pixels), _BATCH)]
        )
        coordinates = [store.coordinates_of(t) for t in range(first, first + int(slide["num_tiles"]))]
        write_slide(out / f"{slide['slide_id']}{SUFFIX}", features, np.array(coordinates, np.int64))
        on_progress(1)


def _prepare(out: Path, about: dict) -> None:
    """Make the folder with its features.json, or check that the one there is of the same making."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / INDEX_NAME).exists():
        damaged = FeatureError(f"{out / INDEX_NAME}: damaged; remove {out} and embed again")
        found = read_json(out / INDEX_NAME, damaged)
        difference = first_difference({k: found.get(k) for k in about}, about)
        if difference:
            key, before, now = difference
            raise FeatureError(f"{out}: holds features with {key} = {before}, asked for is {now}; choose another --out")
        return
    if any(not e.name.startswith(".") for e in out.iterdir()):  # hidden names are what a killed start left
        raise FeatureError(f"{out}: not empty and no feature folder (no {INDEX_NAME}); choose another --out")
    write_index(out, **about)


def _read_ahead(store: Store, slides: list[int], px: int, threads: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (slide number, its tiles (N, px, px, 3) uint8), decoding a few slides ahead."""
    table = store.slides

    def read(tile: int) -> np.ndarray:
        return whole_tile(store.fetch(tile, tile), px, name=str(store.file_of(tile)))

    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[tuple[int, list[Future[np.ndarray]]]] = deque()

        def finish() -> tuple[int, np.ndarray]:
            slide, futures = ahead.popleft()
            return slide, np.stack([f.result() for f in futures])

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
