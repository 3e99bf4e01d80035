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
_OFFSET_BITS = 40  # shard << 40 | offset: shards of up to 1 TiB, 16 million of them
MOST_SHARD_BYTES = 1 << _OFFSET_BITS
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
            info = tarfile.TarInfo(path.decode())
            info.size, info.mtime, info.mode = size, _TIME, 0o644
            return info.tobuf(tarfile.PAX_FORMAT, encoding="utf-8")
        prefix, name = path[:slash], path[slash + 1 :]
    length = b"%011o\0" % size
    checksum = _FIXED_SUM + sum(prefix) + sum(name) + sum(length)
    block = name.ljust(100, b"\0") + _OWNER + length + _MTIME + b"%06o\0 " % checksum + _REST + prefix
    return block.ljust(BLOCK, b"\0")


def shard_name(number: int) -> str:
    """Return the file name of a shard; the one place that says it.

    >>> shard_name(3)
    'tiles-000003.tar'
    """
    return f"tiles-{number:06d}.tar"


def pack_offset(shard: int, offset: int) -> int:
    """Return the number that the index holds for an offset in a shard.

    >>> unpack_offset(pack_offset(3, 512))
    (3, 512)
    """
    return shard << _OFFSET_BITS | offset


def unpack_offset(packed: int) -> tuple[int, int]:
    """Return (shard, offset) of an index entry."""
    return packed >> _OFFSET_BITS, packed & (MOST_SHARD_BYTES - 1)


class ShardWriter:
    """Writes members into shards one after the other; a shard ends with the slide that fills it."""

    def __init__(self, folder: Path, shard_bytes: int, *, first: int = 0):
        self._folder, self._shard_bytes = folder, shard_bytes
        self.number = first  # of the shard that is written now
        self.sizes: list[int] = []  # bytes of the shards before it, the first being `first`
        self._file: BinaryIO | None = None
        self._end = 0

    def skip(self, folder: str, names: list[bytes], sizes: list[int]) -> list[int] | None:
        """Pass over a slide that an earlier try wrote; returns what `write` did, None where its bytes are not there."""
        number, end, before = self.number, self._end, self.sizes
        if end >= self._shard_bytes:
            number, end, before = number + 1, 0, [*before, end + len(END)]
        offsets = []
        for name, size in zip(names, sizes, strict=True):
            path = folder.encode() + b"/" + name
            end += BLOCK if len(path) <= _MOST_NAME else len(header(path, size))
            offsets.append(pack_offset(number, end))
            end += size + -size % BLOCK
        for shard, size in ((number, end), *(((number - 1, before[-1]),) if number > self.number else ())):
            file = self._folder / shard_name(shard)
            if not file.is_file() or file.stat().st_size < size:
                return None
        self.number, self._end, self.sizes = number, end, before
        return offsets

    def begin(self) -> None:
        """Begin behind what was skipped, dropping what an earlier try wrote there."""
        self.drop_from(self.number + bool(self._end))
        if self._end:
            self._file = (self._folder / shard_name(self.number)).open("r+b")
            self._file.truncate(self._end)
            self._file.seek(self._end)

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

    def write(self, folder: str, names: list[bytes], contents: list[bytes]) -> list[int]:
        """Append some tiles of one slide; returns for every one where its bytes are, as the index holds it."""
        assert self._file is not None
        parts: list[bytes] = []
        offsets: list[int] = []
        end, start = self._end, folder.encode() + b"/"
        for name, content in zip(names, contents, strict=True):
            head = header(start + name, len(content))
            offsets.append(pack_offset(self.number, end + len(head)))
            padding = bytes(-len(content) % BLOCK)
            parts += head, content, padding
            end += len(head) + len(content) + len(padding)
        self._file.write(b"".join(parts))
        self._end = end
        return offsets

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
