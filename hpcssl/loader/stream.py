"""Positions → bytes → pixels, ahead of the trainer.

A stream is made for steps [start, stop) of one rank; starting it anywhere costs the same. Nothing in it has a
state of its own: what it gives for a step depends on the step alone.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcssl.core.config import AtLeast1, Share, fixed, free, settings
from hpcssl.core.errors import BadTileError, ConfigError, StoreError, UnreachableTileError
from hpcssl.core.world import World
from hpcssl.loader.execute import Decode, Finish, open_executor
from hpcssl.loader.faults import BadTiles, read_patiently, substitutes
from hpcssl.plan.draw import Plan, PlanNeeds, draw_plan
from hpcssl.plan.recipe import AugmentRecipe
from hpcssl.schedule.file import Schedule
from hpcssl.stores.store import Store, TileData

_MOST_UNREACHABLE = 3  # tiles tried at a position; each may take a minute, and then no server answers
BACKENDS = {"auto": "cpu", "cpu": "cpu", "pillow": "pillow", "dali": "dali"}


@settings
class LoaderConfig:
    """How tiles are read; none of it changes what is read.

    The schedule says which tiles come next, so reading is ahead of decoding, and decoding ahead of training. Memory is
    bound to 1 + prefetch_steps batches of uint8 views and the tiles' bytes of 1 + prefetch_steps + 2 · read_ahead_steps
    batches, JPEG or, from slides, pixels, whatever the sizes of store and schedule.

    Attributes
    ----------
    backend : what executes the plan: `cpu` (fast), `pillow` (the reference), `dali` (on the GPU where there is one),
        or `auto`, the fastest that was measured: `cpu`
    threads : decoding and augmenting, for every rank
    prefetch_steps : steps prepared ahead of training
    reads_in_flight : tiles read at a time, for every rank; a parallel file system answers many at once, each late
    read_ahead_steps : steps read together, while the same number before them is decoded
    read_by_slide : read the tiles of these steps slide by slide, for disks that seek and for caches of whole slides
    max_bad_tiles : share of the store's tiles, or of the schedule's positions where these draw places, that may be
        unusable before the run stops; one always may
    """

    backend: str = fixed("auto")
    threads: AtLeast1 = free(1)
    prefetch_steps: AtLeast1 = free(2)
    reads_in_flight: AtLeast1 = free(16)
    read_ahead_steps: AtLeast1 = free(2)
    read_by_slide: bool = free(False)
    max_bad_tiles: Share = free(0.001)

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ConfigError(f"loader.backend = {self.backend!r}; known: {', '.join(BACKENDS)}")
        object.__setattr__(self, "backend", BACKENDS[self.backend])  # what is recorded is what computes


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's share of a step.

    Attributes
    ----------
    step : optimiser step
    positions : (B,) int64, global positions
    views : one uint8 tensor for each kind of view, (views, B, px, px, 3); on the GPU if DALI made them there
    mask : (B, patches) bool tensor, True = hidden; None without masks
    drop_path : for each kind of view a bool tensor (views, B, residual branches), True = kept; () where none is dropped
    """

    step: int
    positions: np.ndarray
    views: tuple[torch.Tensor, ...]
    mask: torch.Tensor | None
    drop_path: tuple[torch.Tensor, ...] = ()

    @classmethod
    def of(cls, step: int, views: tuple[torch.Tensor, ...], plan: Plan) -> Batch:
        """Return the batch of a step's views and of their plan."""
        return cls(
            step=step,
            positions=plan.positions,
            views=views,
            mask=None if plan.mask is None else torch.from_numpy(plan.mask),
            drop_path=tuple(torch.from_numpy(kept.transpose(1, 0, 2)) for kept in plan.drop_path),
        )


@dataclass(frozen=True, kw_only=True)
class StreamRequest:
    """What a rank asks of a stream: its slice of `steps`, `global_batch` positions each, planned for seed and needs."""

    recipe: AugmentRecipe
    seed: int
    global_batch: int
    steps: range
    needs: PlanNeeds = field(default_factory=PlanNeeds)
    world: World = field(default_factory=World)


@dataclass
class StreamStats:
    """Where time went, in seconds.

    Attributes
    ----------
    read_s, decode_s, augment_s : of the threads, summed; DALI's decoding is in augment_s, that of slides in read_s
    read_wait_s : the consumer waited for tiles
    """

    read_s: float = 0.0
    decode_s: float = 0.0
    augment_s: float = 0.0
    read_wait_s: float = 0.0


class TileStream:
    """Iterates over the batches of one rank for the steps of a request, in order.

    The schedule says which tile stands at a position and, by its seed and MPP weights, where that is on a slide. A tile
    that cannot be used is recorded in the file `bad_tiles`, and its place taken by the tile at another position of the
    same pseudo-epoch, a function of the position alone; so nothing that the schedule keeps out comes in.
    """

    def __init__(
        self,
        store: Store,
        schedule: Schedule,
        request: StreamRequest,
        *,
        config: LoaderConfig | None = None,
        bad_tiles: Path | None = None,
        device: torch.device | None = None,
    ):
        self._store = store.drawn_by(schedule.seed, schedule.mpp_weights)
        self._schedule, self._request = schedule, request
        self._config = config or LoaderConfig()
        self._device = device or torch.device("cpu")
        drawn = self._store.drawn
        most = self._config.max_bad_tiles * (schedule.num_positions if drawn else store.num_tiles)
        self._bad = BadTiles(bad_tiles, most=max(1, int(most)), of_positions=drawn)
        self.stats = StreamStats()

    def __iter__(self) -> Iterator[Batch]:
        config, request = self._config, self._request
        readers = ThreadPoolExecutor(config.reads_in_flight, thread_name_prefix="reads")
        executor = open_executor(
            config.backend, request.recipe, batch=len(self._share(0)), threads=config.threads, device=self._device
        )
        ahead: deque[tuple[_Reads, Plan, Finish]] = deque()
        try:
            for reads in self._read_ahead(readers):
                plan = draw_plan(request.recipe, request.seed, reads.positions, **vars(request.needs))
                ahead.append((reads, plan, executor.start(functools.partial(self._decoded, reads), plan)))
                if len(ahead) > config.prefetch_steps:
                    yield self._batch(*ahead.popleft())
            while ahead:
                yield self._batch(*ahead.popleft())
        finally:
            readers.shutdown(wait=False, cancel_futures=True)  # so that nothing waits for reads not yet begun
            executor.close()
            readers.shutdown()

    def _share(self, step: int) -> range:
        """Return the positions of this rank in a step."""
        size = self._request.global_batch
        return self._request.world.slice(step * size, (step + 1) * size)

    def _read_ahead(self, readers: ThreadPoolExecutor) -> Iterator[_Reads]:
        """Yield the reads of every step; those of the next `read_ahead_steps` are always under way."""
        current: list[_Reads] = []
        steps, size = self._request.steps, self._config.read_ahead_steps
        for first in steps[::size]:
            following = self._read(range(first, min(first + size, steps.stop)), readers)
            yield from current
            current = following
        yield from current

    def _read(self, steps: range, readers: ThreadPoolExecutor) -> list[_Reads]:
        """Start reading the tiles of some steps."""
        reads = []
        for step in steps:
            share = self._share(step)
            first, last = share.start, share.stop
            reads.append(_Reads(step, np.arange(first, last), self._schedule.tiles_at(first, last)))
        places = [
            (tile, r, i)
            for r in reads
            for i, (tile, position) in enumerate(zip(r.tiles.tolist(), r.positions.tolist()))
            if (tile, position) not in self._bad
        ]
        if self._config.read_by_slide:
            places.sort(key=lambda place: place[0])
        readers.submit(self._store.expect, [tile for tile, _, _ in places])
        for tile, r, index in places:
            r.data[index] = readers.submit(self._timed_read, int(r.positions[index]), tile)
        return reads

    def _timed_read(self, position: int, tile: int) -> tuple[TileData, float]:
        begun = time.perf_counter()
        return read_patiently(self._store, position, tile), time.perf_counter() - begun

    def _decoded(self, reads: _Reads, index: int, decode: Decode) -> tuple[Any, float, float]:
        """Return the decoded tile of a position, or of its substitute, and the seconds of reading and of decoding."""
        position, tile = int(reads.positions[index]), int(reads.tiles[index])
        read_s = decode_s = 0.0
        unreachable = 0
        for candidate in itertools.chain([tile], substitutes(self._schedule, self._request.seed, position)):
            if (candidate, position) in self._bad:
                continue
            try:
                ahead = reads.data[index].result() if candidate == tile else None
                data, seconds = ahead or self._timed_read(position, candidate)
                read_s += seconds
                begun = time.perf_counter()
                image = decode(data, name=str(self._store.file_of(candidate)))
                return image, read_s, decode_s + time.perf_counter() - begun
            except BadTileError as error:
                self._bad.add(candidate, position, self._store.files_of(np.array([candidate]))[0], str(error))
                unreachable += isinstance(error, UnreachableTileError)
                if unreachable == _MOST_UNREACHABLE:
                    raise StoreError(
                        f"position {position}: neither its tile nor {unreachable - 1} substitutes can be reached; last:"
                        f" {error}; see to the servers, then run the same command again"
                    ) from None
        raise StoreError(f"position {position}: neither its tile {tile} nor any of its substitutes can be used")

    def _batch(self, reads: _Reads, plan: Plan, finish: Finish) -> Batch:
        """Wait for a step's tiles and return them; the first error of a thread ends the stream."""
        begun = time.perf_counter()
        views, (read_s, decode_s, augment_s) = finish()
        self.stats.read_s += read_s
        self.stats.decode_s += decode_s
        self.stats.augment_s += augment_s
        for view in views:
            if view.is_cuda:  # made on another stream, whose memory must not be taken back while this one uses it
                view.record_stream(torch.cuda.current_stream(view.device))
        self.stats.read_wait_s += time.perf_counter() - begun
        return Batch.of(reads.step, views, plan)


@dataclass
class _Reads:
    """A step's share of tiles, being read."""

    step: int
    positions: np.ndarray
    tiles: np.ndarray
    data: dict[int, Future[tuple[TileData, float]]] = field(default_factory=dict)
