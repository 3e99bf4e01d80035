"""Files that are whole or absent: write under a temporary name, sync, rename; and digests to verify on read."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hpcssl.core.errors import UserError

_CHUNK = 1 << 22


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on leaving without an error, sync it and rename it to `path`.

    On an error the temporary file is removed and `path` is as it was.
    """
    # not the process id: two nodes that write into one folder may have the same
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporary(folder: Path) -> None:
    """Remove what kills in the middle of an atomic write left in a folder."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a whole small file, or leave the old one."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Give an empty folder beside `path` that takes its name on success; what a killed try left is cleared first.

    UserError where another process of this machine is making the same folder.
    """
    temporary = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for child in temporary.iterdir():
                if child.is_file():
                    sync(child)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the right to make `path`; the system gives it back when the process ends, however it ends."""
    lock = path.with_name(f".{path.name}.lock")
    busy = UserError(f"{path}: another process is making it; wait for that, or end it")
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError:  # a file system without locks: go without
            pass
        if not lock.exists() or not os.path.samestat(os.fstat(stream.fileno()), lock.stat()):
            raise busy  # its last holder removed the file between our opening it and our lock
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def read_json(path: Path, damaged: UserError) -> dict[str, Any]:
    """Read a JSON mapping; raises `damaged` where the file holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise damaged from None
    if not isinstance(content, dict):
        raise damaged
    return content


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the record of every whole line, none where there is no file; a kill may leave a line torn."""
    if path.exists():
        with path.open("rb") as stream:
            for line in stream:
                with suppress(ValueError):
                    yield json.loads(line)


def digest_bytes(data: bytes) -> str:
    """Return the SHA-256 of some bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hex, reading it in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
