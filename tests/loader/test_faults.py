"""Tiles that cannot be used: what is tried again, what is substituted and recorded, and when a run stops."""

from __future__ import annotations

import csv
import errno
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from hpcssl.core.errors import BadTileError, StoreError
from hpcssl.core.world import World
from hpcssl.loader import cpu, faults
from hpcssl.loader.faults import BadTiles, read_patiently, substitutes
from hpcssl.loader.stream import TileStream


class Faulty:
    """A store of which some tiles are rubbish, missing, or fail for some tries."""

    def __init__(self, store, rubbish=(), missing=(), failing=()):
        self._store = store
        self.rubbish, self.missing, self.failing = set(rubbish), set(missing), dict(failing)
        self.fetched: list[int] = []

    def fetch(self, position: int, tile: int) -> bytes:
        self.fetched.append(tile)
        if self.failing.get(tile, 0):
            self.failing[tile] -= 1
            raise OSError(errno.EIO, "Input/output error")
        if tile in self.missing:
            raise BadTileError(f"{self.file_of(tile)}: tile {tile} is gone")
        whole = self._store.fetch(position, tile)
        return whole[:200] if tile in self.rubbish else whole

    def drawn_by(self, seed, mpp_weights):
        return self

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_PAUSES_S", (0.0, 0.0, 0.0))


@pytest.fixture
def stream(small, data) -> Callable[..., TileStream]:
    return lambda store, **more: small.stream_of(store, data.schedule, **{"max_bad_tiles": 1.0, **more})


def pixels(batches) -> torch.Tensor:
    return torch.cat([b.views[0] for b in batches], dim=1)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("backend", ["pillow", "cpu", "dali"])
@pytest.mark.parametrize("fault", ["rubbish", "missing"])
def test_a_bad_tile_is_replaced_recorded_and_the_rest_untouched(stream, data, tmp_path, backend, fault) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    tiles = data.schedule.tiles_at(0, data.schedule.num_positions)
    bad = int(tiles[5])
    whole = pixels(stream(data.store, backend=backend))
    found = pixels(stream(Faulty(data.store, **{fault: [bad]}), backend=backend, bad_tiles=tmp_path / "bad.csv"))
    differs = (whole != found).flatten(2).any(dim=2).any(dim=0).numpy()
    at = np.flatnonzero(tiles[: len(differs)] == bad)
    assert set(np.flatnonzero(differs)) == set(at)
    rows = rows_of(tmp_path / "bad.csv")
    assert [row["tile"] for row in rows] == [str(bad)], "once, however often it is met"
    assert rows[0]["file"] == str(data.store.file_of(bad))
    assert ("is gone" if fault == "missing" else "cannot be decoded") in rows[0]["reason"]


def test_the_substitute_is_a_function_of_the_position(stream, data, tmp_path) -> None:
    tiles = data.schedule.tiles_at(0, data.schedule.num_positions)
    bad = {int(t) for t in tiles[[3, 17, 40]]}
    plain = pixels(stream(Faulty(data.store, rubbish=bad)))
    for world in (2, 3):
        ranks = [stream(Faulty(data.store, rubbish=bad), world=World(rank=r, size=world)) for r in range(world)]
        joined = torch.cat([torch.cat([b.views[0] for b in step], dim=1) for step in zip(*ranks, strict=True)], dim=1)
        assert torch.equal(plain, joined), f"{world} ranks"
    threads = pixels(stream(Faulty(data.store, rubbish=bad), threads=4, prefetch_steps=5))
    assert torch.equal(plain, threads)


def test_substitutes_come_from_the_same_pseudo_epoch(data) -> None:
    size = data.schedule.positions_per_pseudo_epoch
    for position in (0, size - 1, size, 2 * size + 7):
        found = list(substitutes(data.schedule, 0, position))
        assert set(found) <= set(data.schedule.pseudo_epoch(position // size).tolist())
        assert found == list(substitutes(data.schedule, 0, position))
        assert found != list(substitutes(data.schedule, 1, position))
    assert list(substitutes(data.schedule, 0, 0)) != list(substitutes(data.schedule, 0, 1))


def test_a_resumed_run_replays_what_was_recorded(stream, data, tmp_path) -> None:
    """The file was mended meanwhile: the run still sees its substitute, and does not look at the file again."""
    bad = int(data.schedule.tiles_at(30, 31)[0])
    record = tmp_path / "bad_tiles.csv"
    before = pixels(stream(Faulty(data.store, rubbish=[bad]), bad_tiles=record))
    mended = Faulty(data.store)
    after = pixels(stream(mended, bad_tiles=record))
    assert torch.equal(before, after)
    assert bad not in mended.fetched
    assert len(rows_of(record)) == 1


def test_a_transient_error_is_tried_again_and_then_ends_the_run(stream, data) -> None:
    tile = int(data.schedule.tiles_at(2, 3)[0])
    assert torch.equal(pixels(stream(Faulty(data.store, failing={tile: 3}))), pixels(stream(data.store)))
    store = Faulty(data.store, failing={tile: 4})
    with pytest.raises(StoreError, match=r"cannot be read, tried 4 times \(Input/output error\)") as caught:
        read_patiently(store, 2, tile)
    assert not isinstance(caught.value, BadTileError), "it is not substituted"
    with pytest.raises(StoreError, match="tried 4 times"):
        list(stream(Faulty(data.store, failing={tile: 99})))
    assert not [t for t in threading.enumerate() if t.name.startswith("tiles") and t.is_alive()]


def test_a_store_that_is_gone_is_not_a_million_bad_tiles(small, tmp_path) -> None:
    own = small.make_data(tmp_path)
    own.tiles.rename(tmp_path / "unmounted")
    with pytest.raises(StoreError, match="is its file system mounted") as caught:
        own.store.fetch(0, 0)
    assert not isinstance(caught.value, BadTileError)


def test_several_ranks_append_to_one_record(tmp_path: Path) -> None:
    path = tmp_path / "bad_tiles.csv"
    records = [BadTiles(path, most=1000) for _ in range(4)]

    def add(rank: int) -> None:
        for tile in range(100):
            records[rank].add(rank * 1000 + tile, tile, f"organ/slide, {rank}/a.jpg", "cut\nshort")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    again = BadTiles(path, most=1000)
    assert all((rank * 1000 + tile, 0) in again for rank in range(4) for tile in range(100))
    assert (400, 0) not in again


def test_more_than_the_allowed_stop_the_run_with_a_total_and_a_restart_before_it(stream, data, tmp_path) -> None:
    """The same command again stops before its first step, on what the one before recorded."""
    tiles = list(dict.fromkeys(data.schedule.tiles_at(0, 60).tolist()))
    record, one = tmp_path / "bad.csv", 1.5 / data.store.num_tiles
    list(stream(Faulty(data.store, rubbish=tiles[:1]), max_bad_tiles=one))
    broken = Faulty(data.store, rubbish=tiles[:2])
    for start in range(3):
        with pytest.raises(
            StoreError, match=r"2 tiles cannot be used, more than the 1 that loader\.max_bad_tiles allows"
        ):
            list(stream(broken, max_bad_tiles=one, bad_tiles=record))
        assert len(rows_of(record)) == 2
        assert bool(broken.fetched) == (start == 0)
        broken.fetched.clear()
    assert len(list(stream(broken, max_bad_tiles=4 * one, bad_tiles=record))) > 0, "more may be allowed"


def test_all_ranks_count_together_and_name_a_tile_once(tmp_path: Path) -> None:
    path = tmp_path / "bad_tiles.csv"
    ranks = [BadTiles(path, most=3) for _ in range(3)]
    for rank in ranks:
        rank.add(5, 50, "a.jpg", "gone")
    assert len(rows_of(path)) == 1
    ranks[0].add(6, 60, "b.jpg", "gone")
    ranks[1].add(7, 70, "c.jpg", "gone")
    with pytest.raises(StoreError, match=r"4 tiles cannot be used, more than the 3 that loader\.max_bad_tiles allows"):
        ranks[2].add(8, 80, "d.jpg", "gone")
    assert [row["tile"] for row in rows_of(path)] == ["5", "6", "7", "8"]


@pytest.mark.parametrize("torn", ["123", "123,", "123,4", "123,4,f.jp", '123,4,"f, g.jpg', "\0\0\0", "\xff", "1\r2"])
def test_a_line_cut_short_spoils_no_other(tmp_path: Path, torn: str) -> None:
    """A rank was killed while it wrote: the next line begins on its own, and the run goes on."""
    path = tmp_path / "bad_tiles.csv"
    BadTiles(path, most=9).add(5, 50, "a.jpg", "cut, short\r\nby half")
    with path.open("ab") as stream:
        stream.write(torn.encode("latin-1"))
    BadTiles(path, most=9).add(6, 60, 'b, "c".jpg', "gone")
    again = BadTiles(path, most=2)
    assert (5, 0) in again
    assert (6, 0) in again
    assert (123, 0) not in again
    lines = path.read_bytes().decode("latin-1").split("\n")
    assert lines[1:] == ['5,50,a.jpg,"cut, short\\r\\nby half"', torn, '6,60,"b, ""c"".jpg",gone', ""]


def test_stats_tell_where_time_went(stream, data, monkeypatch) -> None:
    for name, wait_s in (("decode", 0.003), ("augment", 0.002)):
        real = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *a, real=real, s=wait_s, **more: time.sleep(s) or real(*a, **more))
    made = stream(data.store, stop=3)
    assert len(list(made)) == 3
    assert made.stats.decode_s >= 36 * 0.003
    assert made.stats.augment_s >= 36 * 0.002
    assert min(made.stats.read_s, made.stats.read_wait_s) > 0
