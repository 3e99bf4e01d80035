"""Reading tiles from tar shards: one positioned read a tile, on descriptors that stay open."""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict
from pathlib import Path

from hpcssl.core.errors import StoreError
from hpcssl.stores.tar import shard_name, unpack_offset

_MOST_OPEN = 4000


def _room_for(files: int) -> int:
    """Return how many of so many files may stay open, having asked the system for twice as many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return max(1, files)
    if soft < 2 * files:
        soft = 2 * files if hard == resource.RLIM_INFINITY else max(soft, min(2 * files, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(files, soft // 2))


class _Descriptor:
    """An open file, closed when nobody holds it any more: a thread that reads from it keeps it open."""

    def __init__(self, path: Path):
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class Shards:
    """The shards of a packed store.

    At most `most_open` of them are open at a time, the ones used last (default: all, up to 4,000 and to half of what
    the process may open; its soft limit is raised for that where the hard one allows). Threads may share an instance,
    and so may forked processes: a positioned read moves nothing.
    """

    def __init__(self, folder: Path, sizes: list[int], *, most_open: int | None = None):
        self._folder, self._sizes = folder, sizes
        self._most_open = most_open or _room_for(min(len(sizes), _MOST_OPEN))
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def path(self, number: int) -> Path:
        """Return the file of a shard."""
        return self._folder / shard_name(number)

    def check(self) -> None:
        """Raise StoreError for the first shard that is missing or has not its size."""
        for number, size in enumerate(self._sizes):
            try:
                there = self.path(number).stat().st_size
            except FileNotFoundError:
                raise self._gone(number) from None
            if there != size:
                raise StoreError(
                    f"{self.path(number)}: {there} bytes, not {size}; copy the shard again or build the store anew"
                )

    def read(self, packed: int, size: int) -> bytes:
        """Return `size` bytes at an offset of the index, by one read; StoreError if the shard is gone or ends early."""
        number, offset = unpack_offset(packed)
        descriptor = self._descriptor(number)  # in a variable: it must not be closed before the read is done
        data = os.pread(descriptor.fd, size, offset)
        if len(data) != size:
            raise StoreError(
                f"{self.path(number)}: ends within the tile at byte {offset} (truncated);"
                " copy the shard again or build the store anew"
            )
        return data

    def expect(self, packed: int, size: int) -> None:
        """Have the system read ahead what `read` will ask for; where it cannot, nothing happens."""
        if hasattr(os, "posix_fadvise"):
            number, offset = unpack_offset(packed)
            descriptor = self._descriptor(number)
            os.posix_fadvise(descriptor.fd, offset, size, os.POSIX_FADV_WILLNEED)

    def _descriptor(self, number: int) -> _Descriptor:
        with self._lock:
            descriptor = self._open.get(number)
            if descriptor is None:
                try:
                    descriptor = self._open[number] = _Descriptor(self.path(number))
                except FileNotFoundError:
                    raise self._gone(number) from None
                if len(self._open) > self._most_open:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(number)
            return descriptor

    def _gone(self, number: int) -> StoreError:
        return StoreError(f"{self.path(number)}: the shard is missing; copy it again or build the store anew")
