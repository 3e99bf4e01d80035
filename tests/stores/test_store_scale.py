"""Stores of many tiles: memory does not grow with them, opening takes no time, files are not opened without need."""

from __future__ import annotations

import builtins
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

from hpcssl.core import atomic
from hpcssl.core.errors import StoreError, UserError
from hpcssl.core.ordered import in_order
from hpcssl.stores import loose, scan
from hpcssl.stores.index_writer import IndexWriter, SlideEntry, seal
from hpcssl.stores.kinds import open_store
from hpcssl.stores.loose import LooseStore
from hpcssl.stores.scan import BuildOptions, build_store
from hpcssl.stores.stats import per_organ, spread_of
from hpcssl.stores.store_build import write_header
from hpcssl.stores.tile_files import Tiles

MIB = 1 << 20


def write_index(folder: Path, num_tiles: int, per_slide: int = 1000) -> Path:
    """Write the index of a loose store whose tiles are not there."""
    folder.mkdir()
    writer = IndexWriter(folder, LooseStore.layout)
    names = [f"tile_x{tile * 224}_y0.jpg".encode() for tile in range(per_slide)]
    for slide in range(num_tiles // per_slide):
        writer.add(f"organ/slide-{slide}", Tiles(names=names, sizes=[15_000] * per_slide).entry)
    counts = writer.finish()
    slides = pd.DataFrame({"slide_id": [f"slide-{i}" for i in range(len(counts))], "organ": "organ"})
    write_header(folder, seal(folder, LooseStore, slides.assign(num_tiles=counts), {"root": str(folder)}))
    return folder


def peak_mib(work: Callable[[], object]) -> float:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] / MIB
    finally:
        tracemalloc.stop()


def test_a_store_of_a_million_tiles_opens_without_reading_its_index(tmp_path: Path) -> None:
    folder = write_index(tmp_path / "store", 1_000_000)
    store = open_store(folder)
    assert store.num_tiles == 1_000_000
    assert peak_mib(lambda: open_store(folder)) < 0.5
    assert str(store.file_of(999_999)) == f"{folder}/organ/slide-999/tile_x{999 * 224}_y0.jpg"
    assert store.coordinates_of(123_456) == (456 * 224, 0)


def build_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slides: int, *, pack: bool = False, per_slide: int = 400
) -> float:
    """Build a store of slides whose tiles are made up; returns the peak of memory in MiB."""
    for slide in range(slides):
        (tmp_path / f"tiles-{slides}" / "organ" / f"slide-{slide:04d}").mkdir(parents=True)

    def names(root: Path, folder: str) -> list[bytes]:
        return [f"{folder[-4:]}-{tile:08d}.jpg".encode() for tile in range(per_slide)]

    def read(root: Path, folder: str, names: list[bytes], *, check: bool) -> Tiles:
        return Tiles(names=names, sizes=[3] * len(names), contents=[b"abc"] * len(names))

    monkeypatch.setattr(scan, "list_names", names)
    monkeypatch.setattr(scan, "read_tiles", read)
    monkeypatch.setattr(scan, "list_tiles", lambda *a: Tiles(names=names(*a), sizes=[3] * per_slide))
    monkeypatch.setattr(atomic, "_CHUNK", 1 << 16)  # what a checksum reads at a time would hide the rest
    options = BuildOptions(pack=pack, check=False, threads=2, commit_s=0.05)
    out = tmp_path / f"store-{slides}"
    peak = peak_mib(lambda: build_store(tmp_path / f"tiles-{slides}", out, options=options))
    assert open_store(out).num_tiles == slides * per_slide
    return peak


@pytest.mark.parametrize(("pack", "few", "many"), [(False, 50, 500), (True, 20, 120)])
def test_the_memory_of_a_build_does_not_grow_with_its_tiles(
    pack: bool, few: int, many: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_stand_in(tmp_path, monkeypatch, 5, pack=pack)  # imports
    before = build_stand_in(tmp_path, monkeypatch, few, pack=pack)
    grown = build_stand_in(tmp_path, monkeypatch, many, pack=pack) - before
    assert grown * MIB < 4 * 400 * (many - few), "less than 4 bytes a tile"


def test_a_build_that_keeps_a_number_a_tile_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[np.ndarray] = []
    real = IndexWriter.add

    def keeping(self: IndexWriter, key: str, slide: SlideEntry, *rest: object) -> None:
        kept.append(np.array(slide.arrays["sizes.npy"], np.uint64))
        real(self, key, slide, *rest)

    monkeypatch.setattr(IndexWriter, "add", keeping)
    build_stand_in(tmp_path, monkeypatch, 5)
    kept.clear()
    before = build_stand_in(tmp_path, monkeypatch, 50)
    kept.clear()
    assert (build_stand_in(tmp_path, monkeypatch, 500) - before) * MIB > 4 * 400 * 450


def test_verify_and_stats_do_not_grow_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {f"tile_x{tile * 224}_y0.jpg".encode(): 15_000 for tile in range(1000)}
    monkeypatch.setattr(loose, "sizes_in", lambda root, folder: names)
    store = open_store(write_index(tmp_path / "store", 200_000))
    seen: list[int] = []
    assert peak_mib(lambda: store.verify(seen.append, threads=2)) < 8, "4 MiB are the buffer of the checksums"
    assert sum(seen) == 200_000
    assert peak_mib(lambda: (per_organ(store), spread_of(store.sizes))) < 8


def test_no_more_than_the_window_is_begun_ahead() -> None:
    from concurrent.futures import ThreadPoolExecutor

    begun: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        for item, result in in_order(pool, lambda i: begun.append(i) or i * i, range(100), window=8):
            assert result == item * item
            assert len(begun) <= item + 8
    assert sorted(begun) == list(range(100))


@pytest.mark.parametrize("check", [True, False])
def test_without_the_check_no_tile_is_opened(
    check: bool, small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = small.make_tiles(tmp_path / "tiles")
    opened: list[str] = []
    for module in (os, builtins):
        real = module.open
        monkeypatch.setattr(module, "open", lambda p, *a, real=real, **k: opened.append(str(p)) or real(p, *a, **k))
    store = build_store(tiles, tmp_path / "store", options=BuildOptions(check=check))
    assert any(path.endswith(".jpg") for path in opened) == check
    monkeypatch.undo()
    store.verify()
    assert store.digest == build_store(tiles, tmp_path / "again").digest


def test_a_file_of_4_gib_is_told(small: ModuleType, tmp_path: Path) -> None:
    tiles = small.make_tiles(tmp_path / "tiles")
    os.truncate(tiles / "lung/lung-0/tile_x0_y0.jpg", 1 << 32)
    (tiles / "lung" / "lung-0" / os.fsdecode(b"\xe9.jpg")).write_bytes(small.jpeg(0))
    for check in (True, False):
        with pytest.raises(StoreError, match=r"2 of 31 .*tile_x0_y0.jpg \(4 GiB or more\)"):
            build_store(tiles, tmp_path / "store", options=BuildOptions(check=check))
        assert "\ufffd.jpg,its name is not UTF-8" in (tmp_path / "store.bad_tiles.csv").read_text()


@pytest.mark.parametrize("seed", range(5))
def test_the_spread_is_that_of_sorting(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpcssl.stores import stats

    monkeypatch.setattr(stats, "_CHUNK", 100)
    random = np.random.default_rng(seed)
    values = random.integers(0, [3, 70_000, 200_000, 2**32, 66_000][seed], random.integers(1, 2000), dtype=np.uint32)
    ordered = np.sort(values)
    assert spread_of(values) == (ordered[0], ordered[(len(values) - 1) // 2], ordered[-1])


def test_sums_per_organ(small: ModuleType, tmp_path: Path) -> None:
    tiles = small.make_tiles(tmp_path / "tiles", slides=2, tiles=3)
    table = per_organ(build_store(tiles, tmp_path / "store"))
    assert table[["organ", "slides", "tiles"]].to_numpy().tolist() == [["breast", 2, 7], ["lung", 2, 7]]
    for organ, size in zip(table["organ"], table["bytes"]):
        assert size == sum(p.stat().st_size for p in (tiles / organ).rglob("*.jpg"))


@pytest.mark.parametrize("options", [{"shard_gb": 0}, {"shard_gb": float("nan")}, {"shard_gb": 2000}, {"threads": 0}])
def test_options_that_make_no_sense_are_refused(options: dict) -> None:
    with pytest.raises(UserError, match="expected"):
        BuildOptions(pack=True, **options)
