"""Writing a store so that no tile stays in memory and a kill costs seconds: files only grow, and commits say how far.

A commit first makes the growing files durable, then replaces `state.json`, which holds their lengths. What a killed
build had written beyond its last commit is cut off when the next one goes on, so that both end with the same bytes.

Nothing is written behind a slide with bad files: the build will fail, and goes on there once they are mended. What was
looked at until then is in `whole.bin`: 16 bytes for every slide that is whole, a digest of its names and sizes.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

from hpcssl.core.arrays import npy_header
from hpcssl.core.atomic import digest_file, read_json, remove_temporary, write_atomic
from hpcssl.core.errors import StoreError
from hpcssl.stores.shards import pack_places
from hpcssl.stores.store import Store, index_files
from hpcssl.stores.tar import ShardWriter
from hpcssl.stores.tile_files import Tiles

_ARRAYS = {"folders.npy": "<u8", "names.npy": "<u8", "sizes.npy": "<u4", "offsets.npy": "<u8"}
_HEADER = 128  # bytes of the header of a .npy file; numpy leaves room in it for any length of the array
_STATE = "state.json"
_COUNTS = "counts.bin"
_WHOLE = "whole.bin"
_MARK_BYTES = 16


class StoreWriter:
    """The index of a store, and its shards if it is packed, slide after slide in a folder of their own.

    Attributes
    ----------
    num_tiles : tiles added so far
    num_bad, first_bad : files that are no tiles, and the first of them with what is wrong
    whole : what `mark` gives of the slides that tries before this one found whole
    """

    def __init__(self, folder: Path, shards: ShardWriter | None, *, about: dict[str, Any], root: Path, bad_list: Path):
        """Prepare to write.

        Parameters
        ----------
        folder, shards : where the index and the tiles go
        about : what must be the same for a killed build to go on: root, options, the store that is extended
        root, bad_list : of the tiles; CSV file of all below it that are none, written only if there are any
        """
        self._folder, self._shards, self._about = folder, shards, about
        self._root, self._bad_list = root, bad_list
        self._streams: dict[str, BinaryIO] = {}
        self._marks: BinaryIO | None = None
        self._bad: TextIO | None = None
        self.whole: set[bytes] = set()
        self.num_bad, self.first_bad = 0, ""
        self.num_tiles = 0

    @property
    def files(self) -> list[str]:
        """Names of the files that grow; all but the last are the index's."""
        return [name for name in index_files(packed=self._shards is not None) if name != "slides.parquet"] + [_COUNTS]

    def begin(self, base: Store | None) -> None:
        """Begin in an empty folder, or with a copy of the index that is extended."""
        self.close()
        for name in self.files:
            path = self._folder / name
            if base is None:
                path.write_bytes(bytes(_HEADER if name in _ARRAYS else 0))
            elif name == _COUNTS:
                base.slides["num_tiles"].to_numpy().astype("<u8").tofile(path)
            else:
                shutil.copyfile(base.index / name, path)
        if self._shards is not None:
            self._shards.begin()
        self._open()
        self.num_tiles = base.num_tiles if base else 0
        self._marks = (self._folder / _WHOLE).open("wb")
        self._marks.write(b"".join(self.whole))
        self.commit()

    def resume(self, folders: list[str]) -> int:
        """Go on after the last commit; returns the number of slides done, 0 where there is nothing to go on from.

        Parameters
        ----------
        folders : of all slides; those of the slides done must be the first of them
        """
        marks = self._folder / _WHOLE
        data = marks.read_bytes() if marks.is_file() else b""
        self.whole = {data[i : i + _MARK_BYTES] for i in range(0, len(data) - _MARK_BYTES + 1, _MARK_BYTES)}
        try:
            state = read_json(self._folder / _STATE, StoreError("damaged"))
        except (StoreError, FileNotFoundError, NotADirectoryError):
            return 0
        if state.get("about") != self._about or not marks.is_file():
            return 0
        for name, length in state["lengths"].items():
            path = self._folder / name
            if not path.is_file() or path.stat().st_size < length:
                return 0
            os.truncate(path, length)
        done = self._folders()
        if done != folders[: len(done)] or (self._shards and not self._shards.resume(state["shards"])):
            return 0
        self.num_tiles = state["num_tiles"]
        self._open()
        os.truncate(marks, _MARK_BYTES * (len(data) // _MARK_BYTES))
        self._marks = marks.open("ab")
        return len(done)

    def mark(self, folder: str, found: Tiles) -> bytes:
        """Return what tells a slide of these names and sizes, looked at in this way, from every other."""
        text = json.dumps([self._about, folder, len(found.names)]).encode() + b"\0".join(found.names)
        return hashlib.blake2b(text + np.array(found.sizes, "<u8").tobytes(), digest_size=_MARK_BYTES).digest()

    def add(self, folder: str, found: Tiles, places: list[tuple[int, int]]) -> None:
        """Append a slide; `places` of its tiles in the shards are for a packed store.

        From the first slide with bad files on, slides are only counted.
        """
        assert self._marks is not None
        self.num_tiles += len(found.names)
        for path, fault in found.bad:
            self._note_bad(path, fault)
        if not found.bad and (mark := self.mark(folder, found)) not in self.whole:
            self._marks.write(mark)
        if self.num_bad:
            return
        streams = self._streams
        self._append_texts("folders", [folder.encode()])
        self._append_texts("names", found.names)
        streams["sizes.npy"].write(np.array(found.sizes, "<u4").tobytes())
        streams[_COUNTS].write(np.array([len(found.names)], "<u8").tobytes())
        if self._shards is not None:
            streams["offsets.npy"].write(pack_places(places).astype("<u8").tobytes())

    def commit(self) -> None:
        """Make what was added durable: a build that is killed later goes on from here, or from the first bad slide."""
        assert self._marks is not None
        for stream in (self._marks, *self._streams.values()):
            stream.flush()
            os.fsync(stream.fileno())
        if self.num_bad:
            return
        state: dict[str, Any] = {"about": self._about, "num_tiles": self.num_tiles}
        state["lengths"] = {name: s.tell() for name, s in self._streams.items()}
        if self._shards is not None:
            self._shards.sync()
            state["shards"] = self._shards.state()
        write_atomic(self._folder / _STATE, json.dumps(state) + "\n")

    def finish(self) -> np.ndarray:
        """End shards and arrays; returns the number of tiles of every slide, (slides,) int64."""
        if self._shards is not None:
            self._shards.close()
        for name, dtype in _ARRAYS.items():
            if name in self._streams:
                stream = self._streams[name]
                stream.flush()
                length = (stream.tell() - _HEADER) // np.dtype(dtype).itemsize
                stream.seek(0)
                header = npy_header(dtype, length)
                assert len(header) == _HEADER, len(header)
                stream.write(header)
        self.close()
        return np.fromfile(self._folder / _COUNTS, "<u8").astype(np.int64)

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of every file of the index, and make them durable; `finish` was called before."""
        names = index_files(packed=self._shards is not None)
        for name in names:
            with (self._folder / name).open("rb") as stream:
                os.fsync(stream.fileno())
        return {name: digest_file(self._folder / name) for name in names}

    def forget(self) -> None:
        """Remove what only a build that goes on needs."""
        remove_temporary(self._folder)
        (self._folder / _STATE).unlink(missing_ok=True)
        (self._folder / _COUNTS).unlink(missing_ok=True)
        (self._folder / _WHOLE).unlink(missing_ok=True)

    def close(self) -> None:
        """Close all files as they are."""
        for stream in (*self._streams.values(), self._marks, self._bad):
            if stream is not None:
                stream.close()
        self._streams, self._marks, self._bad = {}, None, None
        if self._shards is not None:
            self._shards.abandon()

    def _open(self) -> None:
        for name in self.files:
            stream = self._streams[name] = (self._folder / name).open("r+b")
            stream.seek(0, os.SEEK_END)

    def _note_bad(self, path: str, fault: str) -> None:
        if self._bad is None:
            self._bad = self._bad_list.open("w", encoding="utf-8", errors="backslashreplace", newline="")
            csv.writer(self._bad, lineterminator="\n").writerow(["file", "fault"])
        csv.writer(self._bad, lineterminator="\n").writerow([f"{self._root}/{path}", fault])
        self.first_bad = self.first_bad or f"{self._root}/{path} ({fault})"
        self.num_bad += 1

    def _append_texts(self, stem: str, texts: list[bytes]) -> None:
        stream = self._streams[f"{stem}.bin"]
        ends = stream.tell() + np.cumsum([len(text) for text in texts], dtype="<u8")
        stream.write(b"".join(texts))
        self._streams[f"{stem}.npy"].write(ends.tobytes())

    def _folders(self) -> list[str]:
        """Return the folders of the slides done."""
        text = (self._folder / "folders.bin").read_bytes()
        ends = np.fromfile(self._folder / "folders.npy", "<u8", offset=_HEADER).tolist()
        return [text[start:end].decode() for start, end in zip([0, *ends], ends)]
