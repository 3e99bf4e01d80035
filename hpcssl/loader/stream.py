"""Positions → bytes → pixels, ahead of the trainer.

A stream is made for steps [start, stop) of one rank; starting it anywhere costs the same. Nothing in it has a
state of its own: what it gives for a step depends on the step alone.
"""

from __future__ import annotations

import importlib
import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcssl.core.errors import BadTileError, ConfigError, StoreError
from hpcssl.core.world import World
from hpcssl.loader.faults import BadTiles, read_patiently, substitutes
from hpcssl.plan.draw import draw_plan
from hpcssl.plan.recipe import AugmentRecipe
from hpcssl.schedule.file import Schedule
from hpcssl.tiles.store import Store

Times = tuple[float, float, float]  # seconds of reading, decoding and augmenting a tile
BACKENDS = {"auto": "cpu", "cpu": "cpu", "pillow": "pillow"}


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How tiles are read; none of it changes what is read.

    Attributes
    ----------
    backend : what executes the plan: `cpu` (fast), `pillow` (the reference), or `auto`, the fastest that works here
    threads : decoding and augmenting, for every rank
    prefetch_steps : steps prepared ahead; bounds the memory to (1 + prefetch_steps) batches of uint8 views
    max_bad_tiles : share of the store's tiles that may turn out unusable before the run stops; one always may
    """

    backend: str = "auto"
    threads: int = 1
    prefetch_steps: int = 2
    max_bad_tiles: float = 0.001

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ConfigError(f"loader.backend = {self.backend!r}; known: {', '.join(BACKENDS)}")
        object.__setattr__(self, "backend", BACKENDS[self.backend])  # what is recorded is what computes
        if not 0 <= self.max_bad_tiles <= 1:
            raise ConfigError(f"loader.max_bad_tiles = {self.max_bad_tiles}; expected a share, 0 to 1")
        if self.threads < 1 or self.prefetch_steps < 1:
            raise ConfigError(
                f"loader: threads = {self.threads}, prefetch_steps = {self.prefetch_steps}; expected at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's share of a step.

    Attributes
    ----------
    step : optimiser step
    positions : (B,) int64, global positions
    views : one uint8 tensor for each kind of view, (views, B, px, px, 3)
    mask : (B, patches) bool tensor, True = hidden; None without masks
    """

    step: int
    positions: np.ndarray
    views: tuple[torch.Tensor, ...]
    mask: torch.Tensor | None


@dataclass
class StreamStats:
    """Where time went, in seconds.

    Attributes
    ----------
    tiles : given to the consumer so far
    read_s, decode_s, augment_s : of the threads, summed
    read_wait_s : the consumer waited for tiles
    consumer_s : the stream waited for the consumer
    """

    tiles: int = 0
    read_s: float = 0.0
    decode_s: float = 0.0
    augment_s: float = 0.0
    read_wait_s: float = 0.0
    consumer_s: float = 0.0
    begun: float = field(default_factory=time.perf_counter)

    @property
    def tiles_per_s(self) -> float:
        """Tiles given to the consumer per second since the stream was made."""
        return self.tiles / (time.perf_counter() - self.begun)


class TileStream:
    """Iterates over the batches of one rank for the steps [start_step, stop_step), in order.

    A tile that cannot be used is recorded in the file `bad_tiles`, and its place taken by the tile at another position
    of the same pseudo-epoch, a function of the position alone; so nothing that the schedule keeps out comes in.
    """

    def __init__(
        self,
        *,
        store: Store,
        schedule: Schedule,
        recipe: AugmentRecipe,
        seed: int,
        global_batch: int,
        world: World,
        start_step: int,
        stop_step: int,
        num_patches: int = 0,
        config: LoaderConfig | None = None,
        bad_tiles: Path | None = None,
    ):
        self._store, self._schedule, self._recipe = store, schedule, recipe
        self._seed, self._global_batch, self._world = seed, global_batch, world
        self._steps = range(start_step, stop_step)
        self._num_patches = num_patches
        self._config = config or LoaderConfig()
        self._backend = importlib.import_module(f"hpcssl.loader.{self._config.backend}")
        self._bad = BadTiles(bad_tiles, most=max(1, int(self._config.max_bad_tiles * store.num_tiles)))
        self.stats = StreamStats()

    def __iter__(self) -> Iterator[Batch]:
        with ThreadPoolExecutor(self._config.threads, thread_name_prefix="tiles") as pool:
            ahead: deque[tuple[Batch, list[Future[Times]]]] = deque()
            try:
                for step in self._steps:
                    ahead.append(self._begin(step, pool))
                    if len(ahead) > self._config.prefetch_steps:
                        yield from self._give(*ahead.popleft())
                while ahead:
                    yield from self._give(*ahead.popleft())
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self, step: int, pool: ThreadPoolExecutor) -> tuple[Batch, list[Future[Times]]]:
        """Draw the plan of a step and hand its tiles to the threads."""
        share = self._world.slice(step * self._global_batch, (step + 1) * self._global_batch)
        tiles = self._schedule.tiles_at(share.start, share.stop)
        positions = np.arange(share.start, share.stop)
        plan = draw_plan(self._recipe, self._seed, positions, num_patches=self._num_patches)
        views = tuple(
            torch.empty((kind.count, len(share), kind.view_px, kind.view_px, 3), dtype=torch.uint8)
            for kind in self._recipe.kinds
        )
        out = [v.numpy() for v in views]

        def one(index: int) -> Times:
            image, read_s, decode_s = self._image(int(positions[index]), int(tiles[index]))
            begun = time.perf_counter()
            self._backend.augment(image, self._recipe, plan, index, out)
            return read_s, decode_s, time.perf_counter() - begun

        futures = [pool.submit(one, i) for i in range(len(share))]
        mask = None if plan.mask is None else torch.from_numpy(plan.mask)
        return Batch(step=step, positions=positions, views=views, mask=mask), futures

    def _image(self, position: int, tile: int) -> tuple[Any, float, float]:
        """Return the decoded tile of a position, or of its substitute, and the seconds of reading and of decoding."""
        read_s = decode_s = 0.0
        for candidate in itertools.chain([tile], substitutes(self._schedule, self._seed, position)):
            if candidate in self._bad:
                continue
            begun = time.perf_counter()
            try:
                jpeg = read_patiently(self._store, position, candidate)
                read_s += time.perf_counter() - begun
                begun = time.perf_counter()
                return (
                    self._backend.decode(jpeg, name=str(self._store.file_of(candidate))),
                    read_s,
                    (decode_s + time.perf_counter() - begun),
                )
            except BadTileError as error:
                self._bad.add(candidate, position, str(self._store.file_of(candidate)), str(error))
        raise StoreError(f"position {position}: neither its tile {tile} nor any of its substitutes can be used")

    def _give(self, batch: Batch, futures: Sequence[Future[Times]]) -> Iterator[Batch]:
        """Wait for a step's tiles and give them; the first error of a thread ends the stream."""
        begun = time.perf_counter()
        for future in futures:
            read_s, decode_s, augment_s = future.result()
            self.stats.read_s += read_s
            self.stats.decode_s += decode_s
            self.stats.augment_s += augment_s
        now = time.perf_counter()
        self.stats.read_wait_s += now - begun
        self.stats.tiles += len(futures)
        yield batch
        self.stats.consumer_s += time.perf_counter() - now
