"""Whether a store is what was built: its index, its shards or files, and with `deep` every JPEG."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

from hpcssl.core.errors import StoreError
from hpcssl.core.ordered import in_order
from hpcssl.stores.tile_files import PADDING, jpeg_fault, sizes_in

if TYPE_CHECKING:
    from hpcssl.stores.store import Store

_DECODED_TOGETHER = 32
_UNDECODABLE = (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError)


def check_files(store: Store, on_progress: Callable[[int], None], *, threads: int) -> None:
    """Raise StoreError if a tile file of a loose store is gone or has another size: the first, and how many.

    `on_progress` is called with numbers of tiles.
    """

    def changed(slide: int) -> tuple[int, list[str]]:
        first, count = store.tiles_of_slide(slide)
        folder = store.folder_of_slide(slide)
        there = sizes_in(store.root, folder)
        bad = []
        for name, size in zip(store.names_of(first, count), store.sizes[first : first + count].tolist()):
            found = there.get(name)
            if found != size:
                path = store.root / folder / name.decode()
                bad.append(f"{path} is missing" if found is None else f"{path} has {found} bytes, not {size}")
        return count, bad

    total, first = _summed(changed, range(store.num_slides), on_progress, threads)
    if total:
        raise StoreError(
            f"{store.path}: {total} of {store.num_tiles} tiles changed since it was built; first: {first};"
            " build the store anew"
        )


def check_pixels(store: Store, on_progress: Callable[[int], None], *, threads: int) -> None:
    """Raise StoreError if a tile is no JPEG that can be decoded: the first, and how many."""

    def undecodable(start: int) -> tuple[int, list[str]]:
        tiles = range(start, min(start + _DECODED_TOGETHER, store.num_tiles))
        return len(tiles), [fault for fault in (_fault(store, tile) for tile in tiles) if fault]

    total, first = _summed(undecodable, range(0, store.num_tiles, _DECODED_TOGETHER), on_progress, threads)
    if total:
        raise StoreError(
            f"{store.path}: {total} of {store.num_tiles} tiles cannot be decoded; first: {first};"
            " mend or remove them and build the store anew"
        )


def _fault(store: Store, tile: int) -> str | None:
    try:
        jpeg = store.fetch(tile, tile)
    except StoreError as error:
        return str(error)
    fault = jpeg_fault(jpeg[:3], jpeg[-PADDING:])  # decoders fill a missing end with grey and say nothing
    if fault:
        return f"{store.file_of(tile)} ({fault})"
    try:
        Image.open(io.BytesIO(jpeg), formats=("JPEG",)).load()
    except _UNDECODABLE as error:
        return f"{store.file_of(tile)} ({' '.join(str(error).split())})"
    return None


def _summed(
    look: Callable[[int], tuple[int, list[str]]], at: Iterable[int], on_progress: Callable[[int], None], threads: int
) -> tuple[int, str]:
    """Return how many faults `look` finds in all places, and the first."""
    total, first = 0, ""
    with ThreadPoolExecutor(threads) as pool:
        for _, (looked_at, faults) in in_order(pool, look, at, window=4 * threads):
            total += len(faults)
            first = first or (faults[0] if faults else "")
            on_progress(looked_at)
    return total, first
