"""Packed stores: plain tar shards of many gigabytes, slide after slide.

offsets.npy       uint64, shard << 40 | offset of every tile's bytes in it
tiles-000000.tar  shards, members named <organ>/<slide_id>/<name>; store.json says the bytes of each
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hpcssl.stores.shards import Shards
from hpcssl.stores.store import IndexLayout
from hpcssl.stores.tar import unpack_offset
from hpcssl.stores.tile_store import SIZES, TEXTS, TileStore


class PackedStore(TileStore):
    """An opened store of shards."""

    kind = "packed"
    layout = IndexLayout(texts=TEXTS, arrays={**SIZES, "offsets.npy": "<u8"})

    def __init__(self, path: Path, header: dict[str, Any]):
        super().__init__(path, header)
        self.offsets = self._array("offsets.npy", self.num_tiles)  # where the bytes of every tile are
        self.shards = Shards(path, header["shards"])
        self.shards.check()

    def _prefix(self, tile: int) -> str:
        return f"{self.shards.path(unpack_offset(int(self.offsets[tile]))[0])}:"

    def fetch(self, position: int, tile: int) -> bytes:
        """See `Store.fetch`; StoreError if the tile's shard is not there, or ends before the tile does."""
        return self.shards.read(int(self.offsets[tile]), int(self.sizes[tile]))

    def expect(self, tiles: Iterable[int]) -> None:
        """See `Store.expect`."""
        for tile in tiles:
            self.shards.expect(int(self.offsets[tile]), int(self.sizes[tile]))

    def describe_tiles(self) -> str:
        """See `Store.describe_tiles`."""
        return f"all {len(self.header['shards'])} shards of {self.num_tiles} tiles"

    def _check_tiles(self, on_progress: Callable[[int], None], *, deep: bool, threads: int) -> None:
        self.shards.check()
        if deep:
            self._check_pixels(on_progress, threads=threads)
        else:
            on_progress(self.num_tiles)
