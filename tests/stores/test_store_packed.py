"""Packed tile stores: plain tar shards that other programs read, one positioned read a tile, damage told by name."""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from hpcssl.core.errors import BadTileError, StoreError
from hpcssl.stores.kinds import open_store
from hpcssl.stores.packed import PackedStore
from hpcssl.stores.scan import BuildOptions, build_store
from hpcssl.stores.shards import Shards
from hpcssl.stores.store import Store
from hpcssl.stores.tar import END, header, shard_name, unpack_offset

SMALL_SHARDS = BuildOptions(pack=True, shard_gb=10e-6)  # every shard takes two slides


@pytest.fixture
def tiles(tmp_path: Path, small: ModuleType) -> Path:
    folder: Path = small.make_tiles(tmp_path / "tiles", slides=2, tiles=3)
    (folder / "lung" / "ü 1").mkdir()
    (folder / "lung" / "ü 1" / "é_x1_y2.JPEG").write_bytes(small.jpeg(1))
    return folder


@pytest.fixture
def loose(tiles: Path, tmp_path: Path) -> Store:
    return build_store(tiles, tmp_path / "loose")


@pytest.fixture
def packed(tiles: Path, tmp_path: Path) -> Store:
    return build_store(tiles, tmp_path / "packed", options=SMALL_SHARDS)


def shards_of(store: Store) -> list[Path]:
    return sorted(store.path.glob("*.tar"))


def members(store: Store) -> list[tuple[str, bytes]]:
    """(name, content) of everything in the shards, as Python's tarfile reads it."""
    found = []
    for path in shards_of(store):
        with tarfile.open(path) as shard:
            found += [(m.name, shard.extractfile(m).read()) for m in shard.getmembers()]
    return found


# what is written


def test_it_is_the_loose_store_in_shards(loose: Store, packed: Store, tiles: Path) -> None:
    assert open_store(packed.path).kind == "packed"
    assert open_store(loose.path).kind == "loose"
    assert packed.digest == loose.digest
    assert packed.slides.equals(loose.slides)
    assert len(shards_of(packed)) == 3, "some shard is not the first"
    for tile in range(loose.num_tiles):
        assert packed.fetch(tile, tile) == loose.fetch(tile, tile), tile
        assert packed.coordinates_of(tile) == loose.coordinates_of(tile)
        shard, name = str(packed.file_of(tile)).split(":")
        assert Path(shard) in shards_of(packed)
        assert tiles / name == loose.file_of(tile)
    every = np.arange(packed.num_tiles)
    assert packed.files_of(every) == [str(packed.file_of(t)) for t in every]


def test_it_needs_the_loose_tiles_no_more_and_may_be_moved(packed: Store, tiles: Path) -> None:
    content = [packed.fetch(0, t) for t in range(packed.num_tiles)]
    tiles.rename(tiles.with_name("gone"))
    moved = packed.path.rename(packed.path.with_name("moved"))
    assert [open_store(moved).fetch(0, t) for t in range(packed.num_tiles)] == content
    open_store(moved).verify()


def test_shards_are_plain_tar_slide_after_slide(packed: Store, loose: Store) -> None:
    expected = [(str(loose.file_of(t).relative_to(loose.root)), loose.fetch(0, t)) for t in range(packed.num_tiles)]
    assert members(packed) == expected
    listed: list[str] = []
    for path in shards_of(packed):
        listed += subprocess.check_output(["tar", "--quoting-style=literal", "-tf", path], text=True).splitlines()
        assert path.stat().st_size % 512 == 0
        assert path.read_bytes()[-1024:] == bytes(1024) == END
    assert listed == [name for name, _ in expected]
    for first, count in zip(packed.slides["first_tile"], packed.slides["num_tiles"]):
        shards = {str(packed.file_of(t)).split(":")[0] for t in range(first, first + count)}
        assert len(shards) == 1, "a slide is in one shard"


def test_two_packings_are_the_same_bytes(packed: Store, tiles: Path, tmp_path: Path) -> None:
    for tile in tiles.rglob("*.jpg"):
        os.utime(tile, (1, 1))
    again = build_store(tiles, tmp_path / "again", options=BuildOptions(pack=True, shard_gb=10e-6, threads=1))
    names = sorted(p.name for p in packed.path.iterdir())
    assert names == sorted(p.name for p in again.path.iterdir())
    assert names == sorted([*PackedStore.layout.files, "store.json", *(shard_name(i) for i in range(3))])
    for name in names:
        assert (again.path / name).read_bytes() == (packed.path / name).read_bytes(), name


@pytest.mark.parametrize("path", ["lung/s1/a.jpg", "lung/é/ü.jpg", "o/" + "s" * 120 + "/" + "n" * 96 + ".jpg"])
def test_a_header_is_what_tarfile_writes(path: str) -> None:
    info = tarfile.TarInfo(path)
    info.size, info.mtime, info.mode = 123_456, 946_684_800, 0o644
    theirs = bytearray(info.tobuf(tarfile.USTAR_FORMAT, encoding="utf-8"))
    ours = bytearray(header(path.encode(), 123_456))
    # device numbers: zeros here, nothing there for a plain file; and the checksum over them
    for block in (ours, theirs):
        block[329:345] = block[148:156] = b""
    assert ours == theirs


@pytest.mark.parametrize("length", [90, 99, 100, 101, 150, 200, 250])
def test_any_path_comes_back(length: int, tmp_path: Path, small: ModuleType) -> None:
    slide = tmp_path / "t" / "organ" / ("s" * length)
    slide.mkdir(parents=True)
    name = "n" * (length - 4) + ".jpg"
    (slide / name).write_bytes(small.jpeg(0))
    (slide / "z.jpg").write_bytes(small.jpeg(1))
    store = build_store(tmp_path / "t", tmp_path / "s", options=SMALL_SHARDS)
    assert [store.fetch(0, t) for t in range(2)] == [small.jpeg(0), small.jpeg(1)]
    assert [n for n, _ in members(store)] == [f"organ/{'s' * length}/{n}" for n in (name, "z.jpg")]


@pytest.mark.parametrize("size", [1, 511, 512, 513])
def test_members_are_padded_to_blocks(size: int, tmp_path: Path) -> None:
    slide = tmp_path / "t" / "o" / "s"
    slide.mkdir(parents=True)
    for name in "ab":
        (slide / f"{name}.jpg").write_bytes(name.encode() * size)
    store = build_store(tmp_path / "t", tmp_path / "s", options=BuildOptions(pack=True, check=False))
    assert [content for _, content in members(store)] == [store.fetch(0, t) for t in range(2)]
    assert store.fetch(0, 1) == b"b" * size


# reading


def test_a_tile_is_one_positioned_read(packed: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for tile in range(packed.num_tiles):
        packed.fetch(0, tile)
    calls: list[str] = []
    with monkeypatch.context() as patch:
        for name in ("pread", "open", "read", "stat", "fstat", "lseek"):
            real = getattr(os, name)
            patch.setattr(os, name, lambda *a, name=name, real=real, **k: calls.append(name) or real(*a, **k))
        packed.fetch(0, 4)
    assert calls == ["pread"]


def open_shards(folder: Path) -> int:
    """Count this process's descriptors of shards of a folder; others come and go with the garbage collector."""
    targets = (str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
    return sum(target.startswith(f"{folder.resolve()}/") and ".tar" in target for target in targets)


def test_open_descriptors_are_bounded_and_threads_may_share_a_store(packed: Store) -> None:
    packed.shards = Shards(packed.path, packed.header["shards"], most_open=2)
    content = [packed.fetch(0, t) for t in range(packed.num_tiles)]
    assert open_shards(packed.path) == 2
    order = np.random.default_rng(0).integers(0, packed.num_tiles, 4000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda t: packed.fetch(0, t) == content[t], order)) == [True] * 4000
    assert open_shards(packed.path) == 2
    packed.shards = Shards(packed.path, packed.header["shards"], most_open=3)
    assert open_shards(packed.path) == 0, "descriptors are closed with their store"


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "expected"),
    [
        (1024, 4096, 100, (100, 1024)),  # (stay open, soft limit afterwards)
        (1024, 4096, 1000, (1000, 2000)),
        (1024, 4096, 3000, (2048, 4096)),
        (1024, -1, 3000, (3000, 6000)),
        (-1, -1, 3000, (3000, -1)),
        (1024, 1024, 3000, (512, 1024)),
    ],
)
def test_the_shards_of_a_large_store_all_stay_open_where_the_system_allows(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, wanted: int, expected: tuple[int, int]
) -> None:
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.append(new))
    assert (Shards(Path(), [1] * wanted)._most_open, limits[-1][0]) == expected


def test_a_pickled_store_opens_again(packed: Store, loose: Store) -> None:
    for store in (packed, loose):
        data = pickle.dumps(store)
        assert len(data) < 1000, "the index is not in it"
        assert pickle.loads(data).fetch(0, 5) == store.fetch(0, 5)


# damage


@pytest.mark.parametrize("shard", [0, 2])
def test_a_damaged_shard_is_told_at_open(packed: Store, shard: int) -> None:
    path = shards_of(packed)[shard]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(StoreError, match=f"{path.name}: {len(whole) - 1} bytes, not {len(whole)}"):
        open_store(packed.path)
    path.unlink()
    with pytest.raises(StoreError, match=f"{path.name}: the shard is missing"):
        open_store(packed.path)
    path.write_bytes(whole)
    open_store(packed.path).verify()


def test_a_shard_damaged_after_opening_is_told_by_fetch(packed: Store) -> None:
    last = packed.num_tiles - 1
    path = shards_of(packed)[-1]
    os.truncate(path, unpack_offset(int(packed.offsets[last]))[1] + 10)
    with pytest.raises(StoreError, match=f"{path.name}: ends within the tile at byte") as caught:
        packed.fetch(0, last)
    assert not isinstance(caught.value, BadTileError), "no loader takes another tile for it: many are lost"
    first = shards_of(packed)[0]
    packed.shards = Shards(packed.path, packed.header["shards"])
    first.unlink()
    with pytest.raises(StoreError, match=f"{first.name}: the shard is missing"):
        packed.fetch(0, 0)


@pytest.mark.parametrize("name", PackedStore.layout.files)
def test_verify_finds_a_changed_index(packed: Store, name: str) -> None:
    path = packed.path / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if name == "slides.parquet" else -1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(StoreError, match=name.replace(".bin", "").replace(".npy", "")):
        open_store(packed.path).verify()


def spoil(store: Store, tile: int, begin: int, end: int | None) -> None:
    """Put zeros over some bytes of a tile: neither sizes nor the index tell."""
    jpeg = bytearray(store.fetch(0, tile))
    jpeg[begin:end] = bytes(len(jpeg[begin:end]))
    packed = store.kind == "packed"
    shard, offset = unpack_offset(int(store.offsets[tile])) if packed else (0, 0)
    with (store.shards.path(shard) if packed else store.file_of(tile)).open("r+b") as stream:
        stream.seek(offset)
        stream.write(jpeg)


@pytest.mark.parametrize("kind", ["loose", "packed"])
def test_deep_verify_decodes_every_tile(kind: str, request: pytest.FixtureRequest) -> None:
    store: Store = request.getfixturevalue(kind)
    seen: list[int] = []
    store.verify(seen.append, deep=True, threads=3)
    assert sum(seen) == store.num_tiles
    spoil(store, 11, 500, None)  # as a copy leaves it that was interrupted on some file systems
    spoil(store, 4, 3, -2)  # both ends are a JPEG's
    seen.clear()
    store.verify(seen.append)
    assert sum(seen) == store.num_tiles
    with pytest.raises(StoreError) as caught:
        store.verify(deep=True)
    assert f"2 of {store.num_tiles} tiles cannot be decoded; first: {store.file_of(4)} (" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_expected_is_read_ahead_and_a_missing_shard_told(
    packed: Store, loose: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    advised: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *rest: advised.append(rest))
    packed.expect([3, 0])
    assert [size for _, size, _ in advised] == [int(packed.sizes[3]), int(packed.sizes[0])]
    assert {advice for *_, advice in advised} == {os.POSIX_FADV_WILLNEED}
    assert advised[1][0] == unpack_offset(int(np.load(packed.index / "offsets.npy")[0]))[1]
    loose.expect([3, 0])  # every tile is a file of its own: there is nothing to say
    assert len(advised) == 2
    again = open_store(packed.path)
    shards_of(packed)[0].unlink()
    with pytest.raises(StoreError, match="the shard is missing"):
        again.expect([0])
