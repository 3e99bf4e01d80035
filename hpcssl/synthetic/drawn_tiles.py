"""Procedural H&E-like tiles for the demo where the user has none.

A tile is two maps of stain, haematoxylin and eosin; a table per slide turns them into colour by the law of Beer and
Lambert, so that stain and scanner vary from slide to slide. The label is carried by texture in about half of a
positive slide's tiles: large, irregular nuclei in disorder and ragged glands against small, even nuclei in rows.
Nuclei cover the same area under both labels, and stain, cellularity and white space vary between slides far more than
between labels, so that mean colour tells little.

Every tile is a function of (seed, organ, slide, tile) alone.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpcssl.core.atomic import atomic_dir, write_atomic
from hpcssl.core.errors import ConfigError, StoreError
from hpcssl.core.rng import key_of
from hpcssl.synthetic.materials import ATLAS_PX, Materials, colour_table, prepare
from hpcssl.synthetic.tissue import COARSE_PX, ORGANS, Look, draw_tissue

LABELS = ("benign", "malignant")
DEMO_ORGANS = ("breast", "lung", "colon")
DEMO_SLIDES = (75, 45, 30)
DEMO_TILES = (24, 17, 15)
_FORMAT = 1
_JPEG_QUALITY = 90
_WRITERS = 8  # threads that write and sync; one alone waits on the disk for longer than a tile takes to draw


@dataclass(frozen=True, kw_only=True)
class Slide:
    """One slide to draw: its row of the table, and its look."""

    slide_id: str
    organ: str
    patient_id: str
    label: str
    num_tiles: int
    altered: frozenset[int]  # tiles that carry the texture of the positive label; empty on a negative slide
    look: Look


def draw_tiles(
    out: Path,
    *,
    seed: int,
    organs: Sequence[str] = DEMO_ORGANS,
    slides_per_organ: Sequence[int] = DEMO_SLIDES,
    tiles_per_slide: Sequence[int] = DEMO_TILES,
    tile_px: int = 224,
    on_progress: Callable[[int], None] = lambda n: None,
) -> Path:
    """Draw `<out>/<organ>/<slide_id>/<tile>.jpg` and, last, `<out>/slides.csv`; goes on where it was stopped.

    Parameters
    ----------
    slides_per_organ, tiles_per_slide : one number an organ; a slide holds 0.5 to 1.5 times its organ's tiles
    tile_px : side of a tile, a multiple of 4
    on_progress : called with the number of tiles after every slide, also for slides that were there already

    Raises
    ------
    ConfigError
        For an organ that is not known, or numbers that cannot be drawn.
    StoreError
        If `out` holds something else than a draw with these settings.
    """
    _check(organs, slides_per_organ, tiles_per_slide, tile_px)
    _claim(out, [seed, list(organs), list(slides_per_organ), list(tiles_per_slide), tile_px])
    slides = plan_slides(seed, organs, slides_per_organ, tiles_per_slide)
    materials = prepare(_random(seed, "materials"))
    for slide in slides:
        folder = out / slide.organ / slide.slide_id
        if not folder.is_dir():
            with (
                atomic_dir(folder) as partial,
                ThreadPoolExecutor(_WRITERS) as writers,
            ):  # no thread outlives the folder
                written = [
                    writers.submit(
                        _write_synced,
                        partial / f"{i:03d}.jpg",
                        _jpeg(draw_tile(materials, slide, i, seed=seed, tile_px=tile_px)),
                    )
                    for i in range(slide.num_tiles)
                ]
                for tile in written:
                    tile.result()
        on_progress(slide.num_tiles)
    rows = ["slide_id,organ,patient_id,label,num_tiles"]
    rows += [f"{s.slide_id},{s.organ},{s.patient_id},{s.label},{s.num_tiles}" for s in slides]
    write_atomic(out / "slides.csv", "\n".join(rows) + "\n")
    return out


def plan_slides(
    seed: int,
    organs: Sequence[str] = DEMO_ORGANS,
    slides_per_organ: Sequence[int] = DEMO_SLIDES,
    tiles_per_slide: Sequence[int] = DEMO_TILES,
) -> list[Slide]:
    """Return every slide's row and look; half of an organ's patients are positive, every third has two slides."""
    slides = []
    for organ, count, mean_tiles in zip(organs, slides_per_organ, tiles_per_slide):
        patients = [p for p in range(count) for _ in range(2 if p % 3 == 0 else 1)][:count]
        labels = _random(seed, f"labels/{organ}").permutation(patients[-1] + 1) % 2
        for i, patient in enumerate(patients):
            slides.append(_plan_slide(seed, organ, i, patient, bool(labels[patient]), mean_tiles))
    return slides


def draw_tile(materials: Materials, slide: Slide, index: int, *, seed: int, tile_px: int) -> NDArray[np.uint8]:
    """Return one tile of a slide, (tile_px, tile_px, 4) uint8: RGB and a pad."""
    random = _random(seed, f"tile/{slide.organ}/{slide.slide_id}/{index}")
    return draw_tissue(random, materials, slide.look, altered=index in slide.altered, tile_px=tile_px)


def _plan_slide(seed: int, organ: str, index: int, patient: int, positive: bool, mean_tiles: int) -> Slide:
    random = _random(seed, f"slide/{organ}/{index}")
    num_tiles = int(random.integers(max(1, mean_tiles // 2), mean_tiles + (mean_tiles + 1) // 2 + 1))
    share = random.uniform(0.4, 0.6)
    altered = random.permutation(num_tiles)[: max(1, round(share * num_tiles))] if positive else ()
    usual = ORGANS[organ]
    look = Look(
        architecture=replace(
            usual,
            present=min(1.0, usual.present * random.uniform(0.75, 1.25)),
            radius=usual.radius * random.uniform(0.9, 1.1),
            wall=usual.wall * random.uniform(0.85, 1.15),
        ),
        cellularity=random.uniform(0.5, 1.6),
        looseness=random.uniform(0.0, 0.55),
        crowding=random.uniform(0.6, 1.0),
        cytoplasm=(random.uniform(0.14, 0.42), random.uniform(0.35, 0.65)),
        colours=colour_table(random),
    )
    return Slide(
        slide_id=f"{organ}_{index:03d}",
        organ=organ,
        patient_id=f"{organ}_p{patient:03d}",
        label=LABELS[positive],
        num_tiles=num_tiles,
        altered=frozenset(int(i) for i in altered),
        look=look,
    )


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    height, width, _ = pixels.shape
    image = Image.frombuffer("RGBX", (width, height), pixels, "raw", "RGBX", 0, 1)
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def _random(seed: int, identity: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(key_of(seed, f"synthetic/{identity}")))


def _check(organs: Sequence[str], slides: Sequence[int], tiles: Sequence[int], tile_px: int) -> None:
    unknown = [organ for organ in organs if organ not in ORGANS]
    if unknown:
        raise ConfigError(f"synthetic tiles: organ {unknown[0]} is not known; known: {', '.join(ORGANS)}")
    if not organs or not len(organs) == len(slides) == len(tiles) or min(*slides, *tiles) < 1:
        raise ConfigError(
            f"synthetic tiles: {len(organs)} organs, slides {list(slides)}, tiles {list(tiles)};"
            " expected one positive number of each an organ"
        )
    if tile_px % COARSE_PX or not 32 <= tile_px <= ATLAS_PX:
        raise ConfigError(
            f"synthetic tiles: tile_px {tile_px}; expected a multiple of {COARSE_PX} from 32 to {ATLAS_PX}"
        )


def _claim(out: Path, settings: list[object]) -> None:
    """Note the settings in the folder before the first tile; refuse a folder of anything else."""
    note, wanted = out / "drawn.json", json.dumps([_FORMAT, *settings])
    if note.exists():
        found = note.read_text(encoding="utf-8").strip()
        if found != wanted:
            raise StoreError(f"{out}: holds tiles drawn with {found}, not {wanted}; choose another folder")
    elif out.is_dir() and any(out.iterdir()):
        raise StoreError(f"{out}: not empty and not drawn here; choose another folder for the tiles")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(note, wanted + "\n")
