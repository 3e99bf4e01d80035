"""Writing the index of an online store: what was found in the slides, one after the other.

The index has a folder of its own in the store, and `store.json`, replaced last, names it: so a store that is extended
is whole at any moment, for those, too, who have it open.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hpcssl.core.arrays import map_array, npy_header
from hpcssl.core.atomic import digest_file, sync_dir, write_atomic
from hpcssl.stores.online import ARRAYS, INDEX_FILES, OnlineStore, identity_of
from hpcssl.stores.store import FORMAT

_CHUNK = 1 << 22  # entries of an array that are copied at a time


def write_online(
    out: Path,
    slides: pd.DataFrame,
    found: Sequence[Path],
    about: Mapping[str, Any],
    *,
    base: OnlineStore | None,
    held: pd.DataFrame,
    work_in: Path,
) -> None:
    """Write a store of some slides, behind those of `base`.

    Parameters
    ----------
    out : folder of the store, which is there
    slides : those that are new
    found : of each the file with what was found in it (see `hpcssl.stores.online_build.look_at`)
    about : what the header says of the options
    base : the store at `out` that is extended
    held : the slides of `base`, as its table is to be
    work_in : folder on the same file system
    """
    folder = work_in / "index"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    facts, counts = _join_arrays(found, folder, base)
    table = slides.assign(**pd.DataFrame(facts, index=slides.index), num_tiles=counts)
    if base is not None:
        table = pd.concat([held, table], ignore_index=True).fillna("") if len(table) else held
    table = table.assign(first_tile=table["num_tiles"].cumsum() - table["num_tiles"])
    table.to_parquet(folder / "slides.parquet", index=False)
    _write_texts(folder, "paths", table["path"].tolist())
    before = int(base.index.name.removeprefix("index-")) if base else 0
    header = {"format": FORMAT, "kind": "slides", "index": f"index-{before + 1:06d}", **about}
    header |= {"num_slides": len(table), "num_tiles": int(table["num_tiles"].sum())}
    header["files"] = {name: _synced_digest(folder / name) for name in INDEX_FILES}
    header |= identity_of(table, header)
    new = out / header["index"]
    shutil.rmtree(new, ignore_errors=True)  # of a try that was killed before it wrote store.json
    sync_dir(folder)
    os.replace(folder, new)
    sync_dir(out)
    write_atomic(out / "store.json", json.dumps(header, indent=1) + "\n")
    for other in out.glob("index-*"):
        if other not in (new, base and base.index):
            shutil.rmtree(other, ignore_errors=True)


class _Growing:
    """A one-dimensional .npy file that grows by what is appended."""

    def __init__(self, path: Path, dtype: str):
        self._stream, self._dtype, self.length = path.open("wb"), dtype, 0
        self._stream.write(npy_header(dtype, 0))

    def append(self, values: NDArray[Any]) -> None:
        self._stream.write(values.astype(self._dtype).tobytes())
        self.length += values.size

    def close(self) -> None:
        header = npy_header(self._dtype, self.length)
        assert len(header) == len(npy_header(self._dtype, 0)), header
        self._stream.seek(0)
        self._stream.write(header)
        self._stream.close()

    def append_file(self, path: Path) -> None:
        array = map_array(path)
        for start in range(0, len(array), _CHUNK):
            self.append(array[start : start + _CHUNK])


def _join_arrays(
    found: Sequence[Path], folder: Path, base: OnlineStore | None
) -> tuple[list[dict[str, Any]], list[int]]:
    """Write the arrays of all slides, one after the other; returns facts and numbers of tiles of those found."""
    arrays = {name: _Growing(folder / name, dtype) for name, dtype in ARRAYS.items()}
    if base is not None:
        for name, array in arrays.items():
            array.append_file(base.index / name)
    facts, counts = [], []
    for file in found:
        with np.load(file) as content:
            facts.append(json.loads(str(content["facts"])))
            counts.append(len(content["corners.npy"]) // 2)
            arrays["areas.npy"].append(arrays["run_ends.npy"].length + np.cumsum(content["num_runs"]))
            for name in ("corners.npy", "run_starts.npy", "run_ends.npy"):
                arrays[name].append(content[name])
    for array in arrays.values():
        array.close()
    return facts, counts


def _write_texts(folder: Path, stem: str, texts: Sequence[str]) -> None:
    """Write what `hpcssl.stores.store.Texts` reads."""
    encoded = [text.encode() for text in texts]
    (folder / f"{stem}.bin").write_bytes(b"".join(encoded))
    np.save(folder / f"{stem}.npy", np.cumsum([len(text) for text in encoded], dtype="<u8"))


def _synced_digest(file: Path) -> str:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
    return digest_file(file)
