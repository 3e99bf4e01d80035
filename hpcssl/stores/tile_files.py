"""What a slide's folder holds, and whether its files are whole JPEGs."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import pandas as pd

from hpcssl.core.errors import StoreError
from hpcssl.slides.slide_table import check_slides, read_slides
from hpcssl.stores.index_writer import SlideEntry

_SUFFIXES = (b".jpg", b".jpeg")
_JPEG_START = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
PADDING = 64  # some writers pad the end; the end marker must stand within the last so many bytes
_MOST_BYTES = 2**32 - 1  # sizes are uint32
_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # what a link may lead to


@dataclass
class Tiles:
    """Some tiles of one slide, in the order of their names."""

    names: list[bytes] = field(default_factory=list)  # of the files, UTF-8
    sizes: list[int] = field(default_factory=list)  # bytes of every file
    contents: list[bytes] = field(default_factory=list)  # of the files where they were asked for, else empty
    bad: list[tuple[str, str]] = field(default_factory=list)  # files that are no tiles: (path below the root, fault)

    @property
    def entry(self) -> SlideEntry:
        """What the index of a store holds of them."""
        return SlideEntry(count=len(self.names), arrays={"sizes.npy": self.sizes}, names=self.names, bad=self.bad)


def slides_below(tiles: Path, table: Path | None, *, out: Path | None = None) -> tuple[pd.DataFrame, bool]:
    """Return the slides of the table, else of the folders; and whether `num_tiles` is the user's claim.

    Without a table, a store `out` that is to be made must not lie among the folders: the next build would take it for
    slides.
    """
    if not tiles.is_dir():
        raise StoreError(f"{tiles}: no such folder of tiles")
    if table or (tiles / "slides.csv").exists():
        return read_slides(table or tiles / "slides.csv"), True
    if out and out.resolve().is_relative_to(tiles.resolve()):
        raise StoreError(
            f"{out}: lies below {tiles}, all folders of which are taken for slides; choose an --out elsewhere,"
            " or name the slides with --slides"
        )
    rows = [(slide, organ, "1") for organ in _subfolders(tiles) for slide in _subfolders(tiles / organ)]
    if not rows:
        raise StoreError(f"{tiles}: no tiles below it; expected <organ>/<slide_id>/<name>.jpg")
    return check_slides(pd.DataFrame(rows, columns=["slide_id", "organ", "num_tiles"]), where=str(tiles)), False


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    for name in names:
        if _name_fault(os.fsencode(name)):
            raise StoreError(f"{folder}/{os.fsencode(name).decode(errors='replace')}: its name is not UTF-8; rename it")
    return names


def list_names(root: Path, folder: str) -> list[bytes]:
    """Return the names of a slide's JPEG files, sorted; StoreError where there is no such folder."""
    return [name for name, _ in _entries(root, folder, sizes=False)]


def list_tiles(root: Path, folder: str) -> Tiles:
    """Return names and sizes of a slide's JPEG files without opening them; an empty one is bad all the same."""
    tiles = Tiles()
    for name, size in _entries(root, folder, sizes=True):
        _add(tiles, folder, name, size, _name_fault(name) or _size_fault(size))
    return tiles


def sizes_in(root: Path, folder: str) -> dict[bytes, int]:
    """Return the size of every JPEG file of a slide by its name; empty where there is no such folder."""
    try:
        return {name: size for name, size in _entries(root, folder, sizes=True) if size >= 0}
    except StoreError:
        return {}


def check_tiles(root: Path, folder: str) -> Tiles:
    """Return names and sizes of a slide's JPEG files, having looked at both ends of each."""
    return _look_inside(root, folder, list_names(root, folder), check=True, keep=False)


def read_tiles(root: Path, folder: str, names: list[bytes], *, check: bool) -> Tiles:
    """Return these files of a slide with their bytes; every file is opened once."""
    return _look_inside(root, folder, names, check=check, keep=True)


def _look_inside(root: Path, folder: str, names: list[bytes], *, check: bool, keep: bool) -> Tiles:
    """Return these files of a slide, with their bytes where `keep`, having looked at both ends of each for `check`."""
    tiles = Tiles()
    start = f"{root / folder}/"
    for name in names:
        fault, size, content = _name_fault(name), 0, b""
        if not fault:
            try:
                fd = os.open(start + name.decode(), os.O_RDONLY)
            except OSError as error:
                if error.errno not in _NOWHERE:
                    raise
                fault = _size_fault(-1)
            else:
                try:
                    if keep:
                        content = FileIO(fd, closefd=False).readall()
                        size, ends = len(content), (content[:3], content[-PADDING:])
                    else:
                        size = os.fstat(fd).st_size
                        ends = os.pread(fd, 3, 0), os.pread(fd, PADDING, max(0, size - PADDING))
                finally:
                    os.close(fd)
                fault = _size_fault(size) or (jpeg_fault(*ends) if check else None)
        if _add(tiles, folder, name, size, fault) and keep:
            tiles.contents.append(content)
    return tiles


def jpeg_fault(start: bytes, end: bytes) -> str | None:
    """Return what is wrong with a JPEG of these first and last bytes, or None."""
    if not start.startswith(_JPEG_START):
        return "not a JPEG"
    return None if _JPEG_END in end else "truncated"


def _add(tiles: Tiles, folder: str, name: bytes, size: int, fault: str | None) -> bool:
    """Note a file as a tile or as bad; returns whether it is a tile."""
    if fault:
        tiles.bad.append((f"{folder}/{name.decode(errors='replace')}", fault))
        return False
    tiles.names.append(name)
    tiles.sizes.append(size)
    return True


def _entries(root: Path, folder: str, *, sizes: bool) -> list[tuple[bytes, int]]:
    path = root / folder
    try:
        with os.scandir(os.fsencode(path)) as entries:
            tiles = (e for e in entries if e.name.lower().endswith(_SUFFIXES) and not e.name.startswith(b"."))
            return sorted((e.name, size) for e in tiles if (size := _size_of(e, ask=sizes)) is not None)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not path.is_dir():
            raise StoreError(f"{path}: no such folder, but the slide table lists this slide") from None
        error.filename = os.fsdecode(error.filename or path)  # bytes would be told as b'...'
        raise


def _size_of(entry: os.DirEntry[bytes], *, ask: bool) -> int | None:
    """Return the bytes of a file, 0 where they are not asked for, -1 where a link leads nowhere; None for a folder."""
    try:
        if entry.is_dir():
            return None
        return entry.stat().st_size if ask else 0
    except OSError as error:
        if error.errno not in _NOWHERE:
            raise
        return -1


def _name_fault(name: bytes) -> str | None:
    try:
        name.decode()
    except UnicodeDecodeError:
        return "its name is not UTF-8"
    return None


def _size_fault(size: int) -> str | None:
    if size <= 0:
        return "zero bytes" if size == 0 else "dangling link"
    return "4 GiB or more" if size > _MOST_BYTES else None
