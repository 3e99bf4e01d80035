"""Building a store in parts, each by a process of its own on any machine, and joining them.

The parts are ranges of the slide table, in its order; each is built as a store in `.STORE.parts` beside the store, and
one whose build was killed goes on where it was. Joined, they are the store that one build makes: the same tile numbers,
the same digest; only the shards of a packed one end where the parts do, too.

    .STORE.parts/plan.json       what is built, from what, and where the parts end
    .STORE.parts/slides.parquet  all slides
    .STORE.parts/part-0003/      a part that is done
    .STORE.parts/joined/         the store while it is joined
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hpcssl.core.atomic import alone, atomic_file, digest_bytes, read_json, write_atomic
from hpcssl.core.claim import check_same
from hpcssl.core.errors import StoreError
from hpcssl.stores.index_writer import IndexWriter, seal
from hpcssl.stores.kinds import KINDS, open_store
from hpcssl.stores.scan import BuildOptions, Folders, tile_target
from hpcssl.stores.store import FORMAT, TABLE, Store, read_header
from hpcssl.stores.store_build import Build, move_synced, write_header
from hpcssl.stores.tar import pack_offset, shard_name
from hpcssl.stores.tile_files import slides_below

_FREE = ("threads", "commit_s")  # how, not what is built


def parts_folder(out: Path) -> Path:
    """Return the folder in which the parts of a store are built."""
    return out.with_name(f".{out.name}.parts")


def plan_parts(tiles: Path, out: Path, *, table: Path | None, options: BuildOptions, num_parts: int) -> list[int]:
    """Say which slides each part has, or check that this was said before; returns the numbers of the parts to build.

    There are at most `num_parts`, of about the same number of tiles where the table tells it, else of slides; the rest
    is as for `build_store`. StoreError where the store exists, or parts of it that were planned otherwise.
    """
    if out.exists():
        raise StoreError(f"{out}: exists already; remove it, or choose another --out")
    slides, counted = slides_below(tiles, table, out=out)
    plan = {
        "format": FORMAT,
        "tiles": str(tiles.resolve()),
        "array": num_parts,
        **asdict(options),
        "counted": counted,
        "slides": digest_bytes(slides.to_csv(index=False).encode()),
        "ends": _ends(slides["num_tiles"].to_numpy(), num_parts),
    }
    folder = parts_folder(out)
    if (folder / "plan.json").exists():
        stored = _plan_of(out) | {key: plan[key] for key in _FREE}
        check_same(stored, plan, made=f"{folder}: begun with", advice="give the same, or remove it", error=StoreError)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "slides.parquet") as temporary:
        slides.to_parquet(temporary, index=False)
    write_atomic(folder / "plan.json", json.dumps(plan, indent=1) + "\n")
    return [number for number in range(len(plan["ends"])) if not (_part(out, number) / "store.json").exists()]


def build_part(out: Path, number: int) -> None:
    """Build one part that was planned; one that is there stays. StoreError as of `build_store`, for its slides."""
    part, plan = _part(out, number), _plan_of(out)
    if (part / "store.json").exists():
        return
    first, end = [0, *plan["ends"]][number : number + 2]
    slides = pd.read_parquet(parts_folder(out) / "slides.parquet")[first:end].reset_index(drop=True)
    options = BuildOptions(**{name: plan[name] for name in asdict(BuildOptions())})
    with alone(part):
        tiles = Path(plan["tiles"])
        target = tile_target(part, tiles, slides, None, options, in_place=False)
        Build(target, Folders(tiles, target, options, counted=plan["counted"]), commit_s=options.commit_s).run()


def join_parts(out: Path) -> Store:
    """Make the store of its parts, which are used up; a killed try goes on.

    StoreError where a part is not there, or the store exists.
    """
    with alone(out):
        if out.exists():
            raise StoreError(f"{out}: exists already; remove it, or choose another --out")
        folder, plan = parts_folder(out), _plan_of(out)
        parts = [_part(out, number) for number in range(len(plan["ends"]))]
        headers = [_header_of(part) for part in parts]
        joined = folder / "joined"
        joined.mkdir(exist_ok=True)
        _join(joined, parts, headers)
        move_synced(joined, out)
        for path in folder.iterdir():
            if path.name != "logs":  # a job that does this still writes there
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return open_store(out)


def _join(joined: Path, parts: Sequence[Path], headers: Sequence[dict[str, Any]]) -> None:
    """Write the index of the whole store, and give the parts' shards their numbers in it."""
    kind = KINDS[headers[0]["kind"]]
    index = IndexWriter(joined, kind.layout)
    shards: list[int] = []
    for part, header in zip(parts, headers, strict=True):
        first = len(shards)
        index.add_index(part, offset=pack_offset(first, 0))
        for number in range(len(header.get("shards", []))):
            if not (joined / shard_name(first + number)).exists():  # else a killed try has moved it
                os.replace(part / shard_name(number), joined / shard_name(first + number))
        shards += header.get("shards", [])
    index.finish()
    slides = pd.concat([pd.read_parquet(part / TABLE) for part in parts], ignore_index=True)
    about = {"root": headers[0]["root"]} if "root" in headers[0] else {"shards": shards}
    write_header(joined, seal(joined, kind, slides, about))


def _ends(weights: np.ndarray, num_parts: int) -> list[int]:
    """Return where at most `num_parts` ranges of about the same weight end; none is empty.

    >>> _ends(np.array([1, 1, 1, 1, 4]), 2), _ends(np.array([9, 1]), 5)
    ([4, 5], [1, 2])
    """
    if num_parts < 1:
        raise StoreError(f"--array {num_parts}; expected at least 1")
    num_parts = min(num_parts, len(weights))
    sums = np.cumsum(weights)
    ends = np.searchsorted(sums, sums[-1] * np.arange(1, num_parts + 1) / num_parts) + 1
    return sorted({min(int(end), len(weights)) for end in ends})


def _part(out: Path, number: int) -> Path:
    return parts_folder(out) / f"part-{number:04d}"


def _plan_of(out: Path) -> dict[str, Any]:
    file = parts_folder(out) / "plan.json"
    try:
        return read_json(file, StoreError(f"{file}: damaged; remove {file.parent} and build again"))
    except FileNotFoundError:
        raise StoreError(f"{file}: not there; plan the parts with hpcssl store build … --array N") from None


def _header_of(part: Path) -> dict[str, Any]:
    if not (part / "store.json").exists():
        raise StoreError(f"{part}: not built yet; the same hpcssl store build … --array N builds it")
    return read_header(part)
