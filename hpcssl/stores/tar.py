"""Plain tar shards, written member by member so that the place of every member's bytes is known.

Headers are POSIX ustar with fixed owner, mode and time: the same tiles give the same bytes. A path that ustar cannot
hold (more than 100 bytes that do not split into 155 + 100 at a slash) gets a pax header in front, as tar itself does.
"""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import BinaryIO

BLOCK = 512
END = bytes(2 * BLOCK)
_TIME = 946_684_800  # 1 January 2000: tar warns of files from 1970
_MOST_NAME, _MOST_PREFIX = 100, 155
# what is the same in every header: mode, owner, group; time; type, link, magic, names of the owner, device
_OWNER = b"".join([b"0000644\0", b"0000000\0", b"0000000\0"])
_MTIME = b"%011o\0" % _TIME
_REST = b"".join([b"0", bytes(100), b"ustar\0", b"00", bytes(64), b"0000000\0", b"0000000\0"])
_FIXED_SUM = sum(_OWNER) + sum(_MTIME) + sum(_REST) + 8 * ord(" ")  # the checksum's own field counts as blanks


def header(path: bytes, size: int) -> bytes:
    """Return the header blocks of a member; its bytes follow them.

    >>> import io
    >>> shard = header(b"lung/s1/a.jpg", 3) + b"abc".ljust(512, bytes(1)) + END
    >>> tarfile.open(fileobj=io.BytesIO(shard)).getnames()
    ['lung/s1/a.jpg']
    """
    prefix, name = b"", path
    if len(path) > _MOST_NAME:
        slash = path.find(b"/", len(path) - _MOST_NAME - 1)
        if slash < 0 or slash > _MOST_PREFIX:
            return _long_header(path, size)
        prefix, name = path[:slash], path[slash + 1 :]
    length = b"%011o\0" % size
    checksum = _FIXED_SUM + sum(prefix) + sum(name) + sum(length)
    block = name.ljust(100, b"\0") + _OWNER + length + _MTIME + b"%06o\0 " % checksum + _REST + prefix
    return block.ljust(BLOCK, b"\0")


def _long_header(path: bytes, size: int) -> bytes:
    info = tarfile.TarInfo(path.decode())
    info.size, info.mtime, info.mode = size, _TIME, 0o644
    return info.tobuf(tarfile.PAX_FORMAT, encoding="utf-8")


def shard_name(number: int) -> str:
    """Return the file name of a shard; the one place that says it.

    >>> shard_name(3)
    'tiles-000003.tar'
    """
    return f"tiles-{number:06d}.tar"


class ShardWriter:
    """Writes members into shards one after the other; a shard ends with the slide that fills it.

    Attributes
    ----------
    number : the shard that is written now
    sizes : bytes of the shards before it, the first being `first`
    """

    def __init__(self, folder: Path, shard_bytes: int, *, first: int = 0):
        self._folder, self._shard_bytes, self._first = folder, shard_bytes, first
        self.number = first
        self.sizes: list[int] = []
        self._file: BinaryIO | None = None
        self._end = 0

    def state(self) -> dict:
        """Return what `resume` needs; to be asked between two slides, after `sync`."""
        return {"sizes": self.sizes, "number": self.number, "end": self._end}

    def begin(self) -> None:
        """Begin with the first shard, removing what an earlier try left of it and of those behind it."""
        self.abandon()
        self.number, self.sizes, self._end = self._first, [], 0
        self.drop_from(self._first)

    def resume(self, state: dict) -> bool:
        """Go on where `state` was taken, dropping what was written after it; False where its bytes are not there."""
        self.number, self.sizes, self._end = state["number"], state["sizes"], state["end"]
        held = [*self.sizes, *([self._end] if self._end else [])]
        for number, size in enumerate(held, self._first):
            path = self._folder / shard_name(number)
            if not path.is_file() or path.stat().st_size < size:
                return False
        self.drop_from(self._first + len(held))
        if self._end:
            self._file = (self._folder / shard_name(self.number)).open("r+b")
            self._file.truncate(self._end)
            self._file.seek(self._end)
        return True

    def drop_from(self, number: int) -> None:
        """Remove the shards from this number on: an earlier try left them."""
        for path in self._folder.glob("tiles-*.tar"):
            if path.name >= shard_name(number):
                path.unlink()

    def begin_slide(self) -> None:
        """Start a new shard where the present one is full."""
        if self._file is not None and self._end >= self._shard_bytes:
            self.close()
        if self._file is None:
            self._file = (self._folder / shard_name(self.number)).open("wb")

    def write(self, folder: str, names: list[bytes], contents: list[bytes]) -> list[tuple[int, int]]:
        """Append some tiles of one slide; returns for every one (shard, offset of its bytes)."""
        assert self._file is not None
        parts: list[bytes] = []
        places: list[tuple[int, int]] = []
        end, start = self._end, folder.encode() + b"/"
        for name, content in zip(names, contents, strict=True):
            head = header(start + name, len(content))
            places.append((self.number, end + len(head)))
            padding = bytes(-len(content) % BLOCK)
            parts += head, content, padding
            end += len(head) + len(content) + len(padding)
        self._file.write(b"".join(parts))
        self._end = end
        return places

    def sync(self) -> None:
        """Make what was written durable."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """End the shard, where one is open, and make it durable."""
        if self._file is None:
            return
        self._file.write(END)
        self.sync()
        self._file.close()
        self.sizes.append(self._end + len(END))
        self._file, self._end = None, 0
        self.number += 1

    def abandon(self) -> None:
        """Close the file as it is; a later try goes on from the last state."""
        if self._file is not None:
            self._file.close()
            self._file = None
