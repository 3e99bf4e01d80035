"""Ranges of bytes of one file, on a local disk or behind a URL (HTTP, S3 and what else fsspec knows).

A local read is one `pread`. A remote one is bounded: it may take `TIMEOUT_S`, and is tried `TRIES` times.
"""

from __future__ import annotations

import asyncio
import io
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, BinaryIO

from hpcssl.core.errors import SlideError

TIMEOUT_S = 20.0
TRIES = 3
_PAUSE_S = 0.25  # before the second try; doubled for every further one
_PIECE = 1 << 18  # of a header, read at once


def is_remote(path: str) -> bool:
    """Say whether a path is a URL.

    >>> is_remote("s3://bucket/a.svs"), is_remote("/data/a.svs"), is_remote("file:///data/a.svs")
    (True, False, True)
    """
    return "://" in path


class Ranges:
    """An opened file of bytes; threads may share it."""

    path: str  # or URL
    size: int  # bytes

    @classmethod
    def open(cls, path: str) -> Ranges:
        """Open a local or remote file; raises as `read_many`."""
        if not is_remote(path):
            return _Local(path)
        return (_Http if path.startswith(("http://", "https://")) else _Remote)(path)

    def read_many(self, places: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes at some (offset, size), together where that is faster.

        SlideError where there is no such file, it ends before (it is truncated), or its server gives no parts of files;
        OSError where the disk or the server fails, which may answer another time. PermissionError is one of them.
        """
        raise NotImplementedError

    def stream(self) -> BinaryIO:
        """Return a seekable stream, for reading headers."""
        return io.BufferedReader(_Stream(self))


class _Local(Ranges):
    def __init__(self, path: str):
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise SlideError(f"{path}: no such slide") from None
        self.size = os.fstat(self._fd).st_size

    def read_many(self, places: Sequence[tuple[int, int]]) -> list[bytes]:
        parts = [os.pread(self._fd, size, offset) for offset, size in places]
        for data, (offset, size) in zip(parts, places, strict=True):
            if len(data) != size:
                raise SlideError(f"{self.path}: ends within the block at byte {offset} (truncated); copy it again")
        return parts

    def __del__(self) -> None:  # and not before: another thread may be reading
        if hasattr(self, "_fd"):
            os.close(self._fd)


class _Remote(Ranges):
    """A file of whatever fsspec knows."""

    def __init__(self, path: str):
        from fsspec.core import url_to_fs

        self.path = path
        try:
            self._fs, self._name = url_to_fs(path)
        except (ImportError, ValueError) as error:
            raise SlideError(f"{path}: cannot be reached ({' '.join(str(error).split())})") from None
        size = self._tried(self._size)
        if size is None:
            raise SlideError(f"{path}: its server does not tell the file's size; copy it to a disk")
        self.size = int(size)

    def read_many(self, places: Sequence[tuple[int, int]]) -> list[bytes]:
        return self._tried(lambda: self._bytes(places))

    async def _size(self) -> int | None:
        info = await self._fs._info(self._name) if self._fs.async_impl else self._fs.info(self._name)
        return info["size"]

    async def _part(self, offset: int, size: int) -> bytes:
        if not self._fs.async_impl:
            return self._fs.cat_file(self._name, start=offset, end=offset + size)
        return await self._fs._cat_file(self._name, start=offset, end=offset + size)

    async def _bytes(self, places: Sequence[tuple[int, int]]) -> list[bytes]:
        # not fsspec's _cat_ranges, whose requests go on when it is cancelled
        parts = await asyncio.gather(*(self._part(*place) for place in places))
        for data, (_, size) in zip(parts, places, strict=True):
            if len(data) != size:
                raise OSError(f"{len(data)} bytes came, not {size}")
        return parts

    def _tried(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """Do some work on the file system's event loop, several times if need be."""
        from fsspec.asyn import get_loop, sync

        async def bounded() -> Any:
            return await asyncio.wait_for(work(), TIMEOUT_S)

        for number in range(TRIES):
            try:
                return sync(self._fs.loop if self._fs.async_impl else get_loop(), bounded)
            except SlideError:
                raise
            except FileNotFoundError:
                raise SlideError(f"{self.path}: no such slide") from None
            except PermissionError as error:
                reason = f"its server refuses to give it ({error}); check the address and who may read it"
                raise PermissionError(None, reason, self.path) from None
            except Exception as error:  # file systems raise what their libraries do: aiohttp, botocore, …
                if number == TRIES - 1:
                    kind = TimeoutError if isinstance(error, (TimeoutError, asyncio.TimeoutError)) else OSError
                    text = " ".join(str(error).split()) or type(error).__name__
                    raise kind(None, f"does not answer after {TRIES} tries ({text})", self.path) from error
            time.sleep(_PAUSE_S * 2**number)
        raise AssertionError


class _Http(_Remote):
    """A file of a web server: fsspec tells each of its failures as a missing file, and takes whole files for parts."""

    async def _size(self) -> int | None:
        return (await self._asked(0, 1))[1]

    async def _part(self, offset: int, size: int) -> bytes:
        return (await self._asked(offset, size))[0]

    async def _asked(self, offset: int, size: int) -> tuple[bytes, int | None]:
        """Return some bytes, and the size of the file where the server tells it."""
        options = dict(self._fs.kwargs)
        span = {"Range": f"bytes={offset}-{offset + size - 1}", "Accept-Encoding": "identity"}
        options["headers"] = options.get("headers", {}) | span
        session = await self._fs.set_session()
        async with session.get(self._fs.encode_url(self._name), **options) as answer:
            if answer.status in (404, 410):
                raise FileNotFoundError
            if answer.status in (401, 403):
                raise PermissionError(f"{answer.status} {answer.reason}")
            if answer.status == 416:
                raise SlideError(f"{self.path}: ends before byte {offset + size:,} (truncated); copy it again")
            answer.raise_for_status()
            if answer.status != 206:  # and what comes is not read: it is the whole file
                raise SlideError(f"{self.path}: its server gives no parts of files; use another, or copy it to a disk")
            total = answer.headers.get("Content-Range", "").rpartition("/")[2]
            return await answer.read(), int(total) if total.isdecimal() else None


class _Stream(io.RawIOBase):
    """A stream over ranges; pieces of the file that it has read are kept until it is closed."""

    def __init__(self, ranges: Ranges):
        self._ranges, self._at = ranges, 0
        self._pieces: dict[int, bytes] = {}

    def close(self) -> None:
        """Forget the file: what was read by the stream may be kept without keeping that open."""
        for name in ("_ranges", "_pieces"):
            self.__dict__.pop(name, None)
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._ranges.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._ranges.size - self._at))
        if not size:
            return 0
        number, start = divmod(self._at, _PIECE)
        if size >= _PIECE:
            data = self._ranges.read_many([(self._at, size)])[0]
        else:
            if number not in self._pieces:
                first = self._at - start
                self._pieces[number] = self._ranges.read_many([(first, min(_PIECE, self._ranges.size - first))])[0]
            data = self._pieces[number][start : start + size]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
