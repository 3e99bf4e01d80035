"""What a rank gets for a step depends on the step alone."""

from __future__ import annotations

import functools
import threading
import time

import numpy as np
import pytest
import torch

import hpcssl.loader.stream
from hpcssl.core.errors import ConfigError, ScheduleError
from hpcssl.core.world import World
from hpcssl.loader.stream import Batch, LoaderConfig, TileStream
from hpcssl.plan.draw import draw_plan


@pytest.fixture
def stream(small, data):
    """Makes a stream of the tiny store."""

    def make(*, store=data.store, **more) -> TileStream:
        return small.stream_of(store, data.schedule, **more)

    return make


def _tensors(batch: Batch) -> list[torch.Tensor]:
    """Return all tensors of a batch, the tiles along the first axis."""
    masks = [] if batch.mask is None else [batch.mask]
    return [torch.from_numpy(batch.positions), *masks, *(t.transpose(0, 1) for t in batch.views + batch.drop_path)]


def _same(a: Batch, b: Batch) -> bool:
    return a.step == b.step and all(torch.equal(x, y) for x, y in zip(_tensors(a), _tensors(b), strict=True))


def test_batches_hold_the_steps_positions_views_and_masks(small, stream):
    for objective, shapes, patches, kept in (
        ("dino", [(2, 12, 32, 32, 3), (2, 12, 16, 16, 3)], None, [(2, 12, 4), (2, 12, 4)]),
        ("mae", [(1, 12, 32, 32, 3)], (12, 16), []),
    ):
        batches = list(stream(objective=objective))
        assert [b.step for b in batches] == list(range(small.STEPS))
        assert np.concatenate([b.positions for b in batches]).tolist() == list(range(small.STEPS * 12))
        assert [tuple(v.shape) for v in batches[0].views] == shapes
        assert all(v.dtype is torch.uint8 for v in batches[0].views)
        assert (None if batches[0].mask is None else tuple(batches[0].mask.shape)) == patches
        assert [tuple(k.shape) for k in batches[0].drop_path] == kept


def test_pixels_are_those_of_the_scheduled_tiles_also_across_pseudo_epochs(small, stream, data):
    """Step 3 stands on both sides of the boundary at 40."""
    from hpcssl.loader import pillow

    recipe, schedule, store = small.dino_recipe().augment, data.schedule, data.store
    batch = next(iter(stream(start=3, backend="pillow")))
    assert batch.positions.tolist() == list(range(36, 48))
    files = [schedule.pseudo_epoch(p // 40)[p % 40] for p in range(36, 48)]
    plan = draw_plan(recipe, 0, batch.positions)
    out = [np.zeros_like(v.numpy()) for v in batch.views]
    for index, tile in enumerate(files):
        pillow.augment(pillow.decode(store.file_of(int(tile)).read_bytes(), name=""), recipe, plan, index, out)
    for views, wanted in zip(batch.views, out, strict=True):
        np.testing.assert_array_equal(views.numpy(), wanted)


@pytest.mark.parametrize("backend", ["cpu", "dali"])
@pytest.mark.parametrize("objective", ["dino", "mae"])
def test_neither_start_nor_prefetch_nor_threads_change_a_step(stream, objective, backend):
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    stream = functools.partial(stream, objective=objective, stop=7, backend=backend)
    plain = list(stream())
    for start in range(7):
        resumed = stream(start=start)
        assert all(_same(a, b) for a, b in zip(plain[start:], resumed, strict=True)), start
    for threads, prefetch, in_flight in ((1, 1, 1), (4, 1, 16), (3, 5, 2)):
        other = stream(threads=threads, prefetch_steps=prefetch, reads_in_flight=in_flight, read_ahead_steps=prefetch)
        assert all(_same(a, b) for a, b in zip(plain, other, strict=True)), (threads, prefetch)


@pytest.mark.parametrize("objective", ["dino", "mae"])
@pytest.mark.parametrize("size", [2, 3, 4, 12])
def test_the_shares_of_all_ranks_are_the_batch_of_one(stream, objective, size):
    ranks = [stream(objective=objective, stop=5, world=World(rank=r, size=size)) for r in range(size)]
    for whole, *shares in zip(stream(objective=objective, stop=5), *ranks, strict=True):
        joined = [torch.cat(parts) for parts in zip(*map(_tensors, shares), strict=True)]
        assert all(torch.equal(x, y) for x, y in zip(joined, _tensors(whole), strict=True)), whole.step


def test_the_seed_changes_the_plan_but_not_the_positions(stream):
    a, b = (next(iter(stream(seed=s, objective="mae"))) for s in (0, 1))
    assert np.array_equal(a.positions, b.positions)
    assert not torch.equal(a.views[0], b.views[0])
    assert not torch.equal(a.mask, b.mask)


def test_a_position_drawn_again_is_drawn_otherwise(stream, data):
    """The same tile at two positions has two crops: the plan is of the position, not of the tile."""
    tiles = data.schedule.tiles_at(0, 156)
    batches = list(stream())
    pixels = torch.cat([b.views[0] for b in batches], dim=1)
    first, second = np.flatnonzero(tiles == tiles[0])[:2]
    assert not torch.equal(pixels[:, first], pixels[:, second])


def test_a_world_that_cannot_share_the_batch_is_refused(stream):
    with pytest.raises(ConfigError, match="5 processes cannot share"):
        next(iter(stream(world=World(rank=0, size=5))))


def test_steps_beyond_the_schedule_are_refused(small, stream):
    with pytest.raises(ScheduleError, match="positions"):
        list(stream(stop=small.STEPS + 1))


class _Slow:
    """A store that counts, and waits where told."""

    def __init__(self, store, wait_s=0.0):
        self._store, self._wait_s = store, wait_s
        self.fetched: list[int] = []

    def fetch(self, position: int, tile: int) -> bytes:
        self.fetched.append(position)
        time.sleep(self._wait_s)
        return self._store.fetch(position, tile)

    def drawn_by(self, seed, mpp_weights):
        return self

    def __getattr__(self, name: str):
        return getattr(self._store, name)


def _tile_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith(("tiles", "reads", "dali")) and t.is_alive()]


@pytest.mark.parametrize("threads", [1, 4])
def test_leaving_early_leaves_no_threads_and_reads_no_further(stream, data, threads):
    store = _Slow(data.store, wait_s=0.002)
    batches = iter(stream(store=store, threads=threads, prefetch_steps=4))
    next(batches)
    assert _tile_threads(), "they do work ahead"
    batches.close()
    assert not _tile_threads()
    count = len(store.fetched)
    time.sleep(0.05)
    assert len(store.fetched) == count < 13 * 12


def test_an_exception_in_the_loop_leaves_no_threads(stream):
    def loop() -> None:
        for _ in stream(threads=3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert not _tile_threads()


@pytest.mark.parametrize("place", ["read", "decode"])
@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_an_error_in_a_thread_ends_the_stream_with_itself(small, stream, data, monkeypatch, backend, place):
    module = pytest.importorskip(f"hpcssl.loader.{backend}")
    store = _Slow(data.store)

    def broken(*args, **kwargs):
        raise MemoryError("of a worker")

    if place == "read":
        store.fetch = broken
    else:
        monkeypatch.setattr(module, "decode", broken)
    with small.within(20), pytest.raises(MemoryError, match="of a worker"):
        list(stream(store=store, backend=backend, threads=3))
    assert not _tile_threads()


@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_no_more_batches_are_begun_than_promised(small, stream, monkeypatch, prefetch):
    begun = []

    def counted(recipe, seed, positions, **settings):
        begun.append(int(positions[0]) // small.GLOBAL_BATCH)
        return draw_plan(recipe, seed, positions, **settings)

    monkeypatch.setattr(hpcssl.loader.stream, "draw_plan", counted)
    for taken, batch in enumerate(stream(prefetch_steps=prefetch), start=1):
        assert batch.step == taken - 1
        # the batch that is yielded is among the (1 + prefetch) whose memory is held
        assert begun == list(range(min(taken + prefetch, small.STEPS)))


@pytest.mark.parametrize("read_ahead", [1, 2, 3])
def test_no_more_is_read_ahead_than_promised(small, stream, data, read_ahead):
    store = _Slow(data.store)
    for taken, _ in enumerate(stream(store=store, prefetch_steps=1, read_ahead_steps=read_ahead), start=1):
        time.sleep(0.02)
        held = 1 + 1 + 2 * read_ahead  # batches of bytes: the one given, the one decoded, and two windows
        assert len(store.fetched) <= 12 * (taken - 1 + held)
    assert len(store.fetched) == 12 * small.STEPS, "each once"


def test_tiles_are_read_slide_by_slide_where_asked(stream, data):
    """One reader shows the order; the batches are the same."""
    orders, batches = {}, {}
    for by_slide in (False, True):
        store = _Slow(data.store)
        settings = {"reads_in_flight": 1, "read_ahead_steps": 2, "read_by_slide": by_slide}
        batches[by_slide] = list(stream(store=store, stop=4, **settings))
        orders[by_slide] = [int(data.schedule.tiles_at(p, p + 1)[0]) for p in store.fetched]
    assert all(_same(a, b) for a, b in zip(batches[False], batches[True], strict=True))
    assert orders[False] == data.schedule.tiles_at(0, 48).tolist()
    assert orders[True] == sorted(orders[False][:24]) + sorted(orders[False][24:])


def test_the_store_is_told_what_comes(stream, data):
    told = []
    store = _Slow(data.store)
    store.expect = lambda tiles: told.extend(tiles)
    list(stream(store=store, stop=4))
    assert sorted(told) == sorted(data.schedule.tiles_at(0, 48).tolist())


def test_the_stream_works_ahead(small, stream, data):
    """While the trainer computes, the next steps are read: then it does not wait for them."""
    store = _Slow(data.store, wait_s=0.003)
    made = stream(store=store, threads=4, prefetch_steps=2, stop=3)
    batches = iter(made)
    next(batches)
    before = made.stats.read_wait_s
    small.wait_until(lambda: len(store.fetched) == 36, 30, "all three steps are read without being asked for")
    time.sleep(2)  # the trainer computes
    assert len(next(batches).positions) == 12
    assert made.stats.read_wait_s - before < 1, "its own time is no waiting"
    assert made.stats.read_s >= 24 * 0.003


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"threads": 0}, "threads = 0"),
        ({"max_bad_tiles": 1.5}, "max_bad_tiles = 1.5"),
        ({"backend": "dali2"}, "known: auto, cpu, pillow, dali"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(setting, told):
    with pytest.raises(ConfigError, match=told):
        LoaderConfig(**setting)


def test_a_finished_run_reads_nothing(small, stream, data):
    store = _Slow(data.store)
    assert list(stream(store=store, start=small.STEPS)) == []
    assert not store.fetched
