"""Positions → bytes → pixels, ahead of the trainer.

A stream is made for steps [start, stop) of one rank; starting it anywhere costs the same. Nothing in it has a
state of its own: what it gives for a step depends on the step alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from hpcssl.core.errors import ConfigError
from hpcssl.core.world import World
from hpcssl.loader import pillow
from hpcssl.plan.draw import draw_plan
from hpcssl.plan.recipe import AugmentRecipe
from hpcssl.schedule.file import Schedule
from hpcssl.tiles.store import Store


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How tiles are read; none of it changes what is read.

    Attributes
    ----------
    backend : what executes the plan
    threads : decoding and augmenting, for every rank
    prefetch_steps : steps prepared ahead; bounds the memory to (1 + prefetch_steps) batches of uint8 views
    """

    backend: str = "pillow"
    threads: int = 1
    prefetch_steps: int = 2

    def __post_init__(self) -> None:
        if self.backend != "pillow":
            raise ConfigError(f"loader.backend = {self.backend!r}; known: pillow")
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
    """Where time went, in seconds; read, decode and augment are summed over the threads."""

    tiles: int = 0
    read_s: float = 0.0
    augment_s: float = 0.0
    read_wait_s: float = 0.0
    begun: float = field(default_factory=time.perf_counter)


class TileStream:
    """Iterates over the batches of one rank for the steps [start_step, stop_step), in order."""

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
    ):
        self._store, self._schedule, self._recipe = store, schedule, recipe
        self._seed, self._global_batch, self._world = seed, global_batch, world
        self._steps = range(start_step, stop_step)
        self._num_patches = num_patches
        self._config = config or LoaderConfig()
        self.stats = StreamStats()

    def __iter__(self) -> Iterator[Batch]:
        with ThreadPoolExecutor(self._config.threads, thread_name_prefix="tiles") as pool:
            ahead: deque[tuple[Batch, list[Future[tuple[float, float]]]]] = deque()
            try:
                for step in self._steps:
                    ahead.append(self._begin(step, pool))
                    if len(ahead) > self._config.prefetch_steps:
                        yield self._finish(*ahead.popleft())
                while ahead:
                    yield self._finish(*ahead.popleft())
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self, step: int, pool: ThreadPoolExecutor) -> tuple[Batch, list[Future[tuple[float, float]]]]:
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

        def one(index: int) -> tuple[float, float]:
            begun = time.perf_counter()
            tile = int(tiles[index])
            jpeg = self._store.fetch(int(positions[index]), tile)
            read = time.perf_counter()
            pillow.execute(jpeg, self._recipe, plan, index, out, name=str(self._store.file_of(tile)))
            return read - begun, time.perf_counter() - read

        futures = [pool.submit(one, i) for i in range(len(share))]
        mask = None if plan.mask is None else torch.from_numpy(plan.mask)
        return Batch(step=step, positions=positions, views=views, mask=mask), futures

    def _finish(self, batch: Batch, futures: Sequence[Future[tuple[float, float]]]) -> Batch:
        """Wait for a step's tiles; the first error of a thread ends the stream."""
        begun = time.perf_counter()
        for future in futures:
            read_s, augment_s = future.result()
            self.stats.read_s += read_s
            self.stats.augment_s += augment_s
        self.stats.read_wait_s += time.perf_counter() - begun
        self.stats.tiles += len(futures)
        return batch
