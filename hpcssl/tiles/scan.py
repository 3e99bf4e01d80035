"""Building a loose store: one pass over `<organ>/<slide_id>/*.jpg`, so that nothing lists folders twice."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from hpcssl.core.atomic import atomic_dir, digest_file
from hpcssl.core.errors import StoreError
from hpcssl.tiles.slides import check_slides, read_slides
from hpcssl.tiles.store import FORMAT, INDEX_FILES, Store, identity

_SUFFIXES = (".jpg", ".jpeg")
_JPEG_START = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_THREADS = 8


@dataclass
class _Slide:
    """What one slide's folder holds."""

    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


def build_store(
    tiles: Path, out: Path, *, table: Path | None = None, on_progress: Callable[[int], None] = lambda n: None
) -> Store:
    """Index a folder of JPEG tiles laid out as `<organ>/<slide_id>/<name>.jpg`.

    Parameters
    ----------
    tiles : root of the tiles
    out : folder of the store; must not exist
    table : slide table that selects and orders the slides and adds columns; else `tiles/slides.csv` where there is one,
        else every folder, by organ and slide_id
    on_progress : called with 1 after every slide

    Raises
    ------
    StoreError
        For an empty folder, files that are no whole JPEG (with their number), or a table that does not match.
    """
    if out.exists():
        raise StoreError(f"{out}: exists already; remove it or choose another --out")
    slides, counted = _slides_below(tiles, table)
    folders = [f"{organ}/{slide_id}" for organ, slide_id in zip(slides["organ"], slides["slide_id"], strict=True)]
    with atomic_dir(out) as partial:
        counts, sizes, bad = _write_names(partial, tiles, folders, on_progress)
        if bad:
            raise StoreError(
                f"{tiles}: {len(bad)} of {len(sizes) + len(bad)} tile files are no whole JPEG; first: {bad[0]};"
                " mend or remove them and build again"
            )
        _check_counts(slides, counts, tiles, counted=counted)
        slides = slides.assign(num_tiles=counts, first_tile=np.cumsum(counts) - counts)
        slides.to_parquet(partial / "slides.parquet", index=False)
        _write_texts(partial, "folders", folders)
        np.save(partial / "sizes.npy", np.array(sizes, np.uint32))
        files = {name: digest_file(partial / name) for name in INDEX_FILES}
        header = {
            "format": FORMAT,
            "kind": "loose",
            "root": str(tiles.resolve()),
            "num_slides": len(slides),
            "num_tiles": int(counts.sum()),
            **identity(slides, files),
            "files": files,
        }
        (partial / "store.json").write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
    return Store.open(out)


def _slides_below(tiles: Path, table: Path | None) -> tuple[pd.DataFrame, bool]:
    """Return the slides to index, of the table, else of the folders; and whether `num_tiles` is the user's claim."""
    if not tiles.is_dir():
        raise StoreError(f"{tiles}: no such folder of tiles")
    if table or (tiles / "slides.csv").exists():
        return read_slides(table or tiles / "slides.csv"), True
    rows = [
        {"slide_id": slide, "organ": organ, "num_tiles": "1"}
        for organ in _subfolders(tiles)
        for slide in _subfolders(tiles / organ)
    ]
    if not rows:
        raise StoreError(f"{tiles}: no tiles below it; expected <organ>/<slide_id>/<name>.jpg")
    return check_slides(pd.DataFrame(rows), where=str(tiles)), False


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _write_names(
    partial: Path, tiles: Path, folders: list[str], on_progress: Callable[[int], None]
) -> tuple[np.ndarray, array[int], list[str]]:
    """Scan the folders in parallel and write the names in order; return counts per slide, sizes, and bad files."""
    counts = np.zeros(len(folders), np.int64)
    sizes = array("I")
    bad: list[str] = []

    def names() -> Iterable[str]:
        with ThreadPoolExecutor(_THREADS) as pool:
            for i, slide in enumerate(pool.map(lambda folder: _scan(tiles, folder), folders)):
                counts[i] = len(slide.names)
                sizes.extend(slide.sizes)
                bad.extend(slide.bad)
                on_progress(1)
                yield from slide.names

    _write_texts(partial, "names", names())
    return counts, sizes, bad


def _scan(tiles: Path, folder: str) -> _Slide:
    """List one slide's folder and look at both ends of every JPEG."""
    found = _Slide()
    try:
        with os.scandir(tiles / folder) as entries:
            tiles_here = (e for e in entries if e.name.lower().endswith(_SUFFIXES) and not e.name.startswith("."))
            names = sorted(e.name for e in tiles_here if not e.is_dir())
    except FileNotFoundError:
        raise StoreError(f"{tiles / folder}: no such folder, but the slide table lists this slide") from None
    for name in names:
        path = tiles / folder / name
        fault, size = _jpeg_fault(path)
        if fault:
            found.bad.append(f"{path} ({fault})".encode(errors="replace").decode())
        else:
            found.names.append(name)
            found.sizes.append(size)
    return found


def _jpeg_fault(path: Path) -> tuple[str | None, int]:
    """Return (what is wrong or None, size in bytes)."""
    try:
        os.fspath(path.name).encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8", 0
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        if size == 0:
            return "zero bytes", 0
        if os.pread(fd, 3, 0) != _JPEG_START:
            return "not a JPEG", size
        # some writers pad the end; the marker must stand within the last 64 bytes
        return (None if _JPEG_END in os.pread(fd, 64, max(0, size - 64)) else "truncated"), size
    finally:
        os.close(fd)


def _check_counts(slides: pd.DataFrame, counts: np.ndarray, tiles: Path, *, counted: bool) -> None:
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        slide = slides.iloc[empty[0]]
        raise StoreError(
            f"{tiles}: slide {slide['slide_id']} has no tiles ({len(empty)} such slides);"
            f" expected JPEG files in {slide['organ']}/{slide['slide_id']}"
        )
    differs = np.flatnonzero(slides["num_tiles"].to_numpy() != counts)
    if counted and len(differs):
        slide = slides.iloc[differs[0]]
        raise StoreError(
            f"{tiles}: slide {slide['slide_id']} has {counts[differs[0]]} tiles, but the slide table says"
            f" {slide['num_tiles']} ({len(differs)} such slides); correct the table"
        )


def _write_texts(folder: Path, stem: str, texts: Iterable[str]) -> None:
    ends = array("Q")
    with (folder / f"{stem}.bin").open("wb") as stream:
        for text in texts:
            stream.write(text.encode())
            ends.append(stream.tell())
    np.save(folder / f"{stem}.npy", np.array(ends, np.uint64))
