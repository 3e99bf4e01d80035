"""Tiles straight from slides, as training gets them: a function of the position, whoever computes it and whenever."""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hpcssl.core.errors import BadTileError, StoreError
from hpcssl.core.world import World
from hpcssl.loader import stream as stream_module
from hpcssl.loader.faults import BadTiles
from hpcssl.loader.stream import TileStream
from hpcssl.schedule.file import check_matches
from hpcssl.stores.online import OnlineStore
from hpcssl.stores.scan import build_store
from hpcssl.stores.store import Store

SEED = 11


@pytest.fixture(scope="module")
def store(online, online_slides, tmp_path_factory) -> OnlineStore:
    return online.build(tmp_path_factory.mktemp("store") / "store", online_slides)


@pytest.fixture(scope="module")
def schedule(online, store, tmp_path_factory) -> Any:
    return online.build_schedule_of(store, tmp_path_factory.mktemp("schedule") / "schedule", seed=SEED)


@pytest.fixture
def stream(small, schedule) -> Callable[..., TileStream]:
    def make(store: Any, *, schedule=schedule, **more) -> TileStream:
        return small.stream_of(store, schedule, **{"stop": 10, "max_bad_tiles": 1.0, **more})

    return make


def views(batches: Any) -> list[torch.Tensor]:
    """Return all views of each kind, positions one after the other."""
    return [torch.cat(kind, dim=1) for kind in zip(*(b.views for b in batches), strict=True)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def joined(ranks: list[TileStream]) -> list[torch.Tensor]:
    """Return the views of all ranks in the order of positions."""
    steps = [
        [torch.cat(kind, dim=1) for kind in zip(*(b.views for b in shares))] for shares in zip(*ranks, strict=True)
    ]
    return [torch.cat(kind, dim=1) for kind in zip(*steps, strict=True)]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_places_do_not_depend_on_the_world_size(stream, store, size) -> None:
    whole = views(stream(store, stop=6))
    assert same(whole, joined([stream(store, stop=6, world=World(rank=r, size=size)) for r in range(size)]))


def test_places_do_not_depend_on_the_start_or_on_threads(stream, store) -> None:
    whole = views(stream(store))
    for start in range(1, 10, 3):
        resumed = views(stream(store, start=start))
        assert same([v[:, start * 12 :] for v in whole], resumed), start
    assert same(whole, views(stream(store, threads=3, reads_in_flight=2, read_ahead_steps=3, read_by_slide=True)))


def test_the_check_catches_places_drawn_in_order(stream, store, monkeypatch) -> None:
    """Had places come from a generator that every reader moves on, a resumed run would read others."""
    random = np.random.default_rng(0)
    monkeypatch.setattr("hpcssl.stores.online.uniforms", lambda *identity, **more: random.integers(0, 2**32, 4))
    whole = views(stream(store, reads_in_flight=1))
    assert not same([v[:, 12:] for v in whole], views(stream(store, start=1, reads_in_flight=1)))


@pytest.mark.parametrize("backend", ["pillow", "dali"])
def test_every_backend_takes_pixels(stream, store, backend) -> None:
    pytest.importorskip("nvidia.dali" if backend == "dali" else "PIL")
    found, wanted = (views(stream(store, stop=2, backend=b))[0].float() for b in (backend, "cpu"))
    assert (found - wanted).abs().mean() < 1.0, "levels of 255"


def test_another_schedule_seed_draws_other_places(online, stream, store, schedule, tmp_path) -> None:
    tiles = schedule.tiles_at(0, 120)
    drawn = [store.drawn_by(s.seed, s.mpp_weights) for s in (schedule, online.build_schedule_of(store, tmp_path / "s"))]
    places = [[d.place_of(p, t) for p, t in enumerate(tiles.tolist())] for d in drawn]
    assert all(a != b for a, b in zip(*places, strict=True))


def test_the_spec_mixes_mpps(online, store, tmp_path) -> None:
    schedule = online.build_schedule_of(store, tmp_path / "coarse", mpp_weights={1.0: 1})
    drawn = store.drawn_by(schedule.seed, schedule.mpp_weights)
    assert {drawn.place_of(p, t).mpp for p, t in enumerate(schedule.tiles_at(0, 120).tolist())} == {1.0}
    plain = online.build_schedule_of(store, tmp_path / "plain")
    assert np.array_equal(plain.tiles_at(0, 120), schedule.tiles_at(0, 120)), "slides and order stay"
    assert plain.digest != schedule.digest
    assert "mpp_weights" not in plain.header["spec"], "as before there were such stores"


def test_weights_that_the_store_cannot_meet_stop_before_anything_is_read(online, stream, store, tmp_path) -> None:
    schedule = online.build_schedule_of(store, tmp_path / "s", mpp_weights={0.25: 1})
    with pytest.raises(StoreError, match=r"names MPP 0.25; this store has places at 0.5, 1.0"):
        stream(store, schedule=schedule)


def write_tiles(store: OnlineStore, folder: Path, quality: int) -> Store:
    """Write the tiles of the grid as JPEG files, as `hpcssl tile` does, and index them."""
    from PIL import Image

    for slide, row in enumerate(store.slides.itertuples()):
        (folder / row.organ / row.slide_id).mkdir(parents=True)
        first, count = store.tiles_of_slide(slide)
        for tile in range(first, first + count):
            x, y = store.coordinates_of(tile)
            name = f"{tile - first:05d}_x{x}_y{y}.jpg"
            image = Image.fromarray(store.fetch(0, tile))
            image.save(folder / row.organ / row.slide_id / name, quality=quality, subsampling=0)
    table = folder / "slides.csv"
    store.slides[["slide_id", "organ", "num_tiles"]].to_csv(table, index=False)
    return build_store(folder, folder.with_name("loose"))


@pytest.fixture(scope="module")
def both(online, online_slides, tmp_path_factory) -> tuple[OnlineStore, Store, Any]:
    """The same grid from slides and from tiles, and a schedule of the latter."""
    folder = tmp_path_factory.mktemp("both")
    of_grid = online.build(folder / "online", online_slides, 0.5, of_grid=True)
    loose = write_tiles(of_grid, folder / "tiles", quality=95)
    return of_grid, loose, online.build_schedule_of(loose, folder / "schedule")


def test_one_schedule_serves_tiles_and_slides_of_the_same_grid(stream, both) -> None:
    of_grid, loose, schedule = both
    check_matches(schedule, of_grid.slides, store=of_grid.path)
    a, b = (views(stream(s, schedule=schedule))[0].float() for s in (of_grid, loose))
    assert (a - b).abs().mean() < 3.0, "levels of 255: JPEG"
    assert (a - b.roll(1, dims=1)).abs().mean() > 15, "which the same tiles in another order do not meet"
    assert [of_grid.coordinates_of(t) for t in range(50)] == [loose.coordinates_of(t) for t in range(50)]


@pytest.mark.parametrize("objective", ["dino", "mae"])
def test_two_runs_from_tiles_and_from_slides_have_the_same_loss(small, both, objective, one_thread) -> None:
    of_grid, loose, schedule = both
    traces = [loss_trace(small, store, schedule, objective) for store in (of_grid, loose, of_grid)]
    assert traces[0] == traces[2]
    np.testing.assert_allclose(traces[0], traces[1], rtol=0.01)
    assert traces[0] != traces[1], "JPEG's error is there"


def loss_trace(small: Any, store: Any, schedule: Any, objective: str) -> list[float]:
    """Train eight steps in this process."""
    from hpcssl.train.state import TrainState

    recipe, data = small.RECIPES[objective](), SimpleNamespace(store=store, schedule=schedule)
    (records,) = small.advance(data, recipe, [TrainState(recipe, torch.device("cpu"))], 8)
    return [record["loss"] for record in records]


class Failing(OnlineStore):
    """A store that cannot read the scheduled tile at some positions, as where a server lost a block."""

    failing: frozenset[int]
    scheduled: list[int]

    def fetch(self, position: int, tile: int) -> np.ndarray:
        if position in self.failing and tile == self.scheduled[position]:
            raise BadTileError(f"position {position}: gone")
        return super().fetch(position, tile)


def failing(store: OnlineStore, schedule: Any, *positions: int) -> Failing:
    broken = Failing(store.path, store.header)
    broken.failing, broken.scheduled = frozenset(positions), schedule.tiles_at(0, schedule.num_positions).tolist()
    return broken


def test_a_place_that_cannot_be_read_is_bad_at_its_position_alone(
    online, online_slides, stream, tmp_path, monkeypatch
) -> None:
    """Were the tile number bad, it would be so for the ranks that have heard of it, and for others not."""
    store = online.build(tmp_path / "store", online_slides, 4.0, 0.5)  # with so few tiles that they come again
    schedule = online.build_schedule_of(store, tmp_path / "schedule")
    stream, tiles = functools.partial(stream, schedule=schedule), schedule.tiles_at(0, 120)
    again = next(p for p in range(60, 120) if tiles[p] in tiles[:12])
    first = int(np.flatnonzero(tiles == tiles[again])[0])
    broken, bad = failing(store, schedule, first), tmp_path / "bad_tiles.csv"
    clean, once = views(stream(store))[0], views(stream(broken, bad_tiles=bad))[0]
    differs = (clean != once).flatten(2).any(dim=2).any(dim=0).numpy()
    assert np.flatnonzero(differs).tolist() == [first]
    with bad.open(newline="") as file:
        assert [(row["tile"], row["position"]) for row in csv.DictReader(file)] == [(str(tiles[first]), str(first))]
    assert torch.equal(once, views(stream(broken, bad_tiles=bad))[0]), "a restart, which reads the file, changes none"
    ranks = [stream(broken, world=World(rank=r, size=2), bad_tiles=bad) for r in range(2)]
    assert torch.equal(once, joined(ranks)[0])
    monkeypatch.setattr(stream_module, "BadTiles", lambda path, *, most, of_positions: BadTiles(path, most=most))
    assert not torch.equal(once, views(stream(broken, bad_tiles=bad))[0]), "this is noticed, were the tile bad"


def test_bad_places_are_counted_against_the_schedules_positions(stream, store, schedule) -> None:
    """Of the store's tiles, of which there are more, the same share would allow all three."""
    broken = failing(store, schedule, 1, 2, 3)
    assert 2.5 / schedule.num_positions * store.num_tiles > 3
    assert len(list(stream(broken, max_bad_tiles=3.5 / schedule.num_positions))) == 10
    with pytest.raises(StoreError, match="3 tiles cannot be used, more than the 2"):
        list(stream(broken, max_bad_tiles=2.5 / schedule.num_positions))
