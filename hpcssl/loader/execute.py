"""Executing the plan of a step: tile by tile in threads, or all tiles as one batch.

An executor is given, for every tile, how to get it decoded, and starts at once; what it returns waits for the views.
"""

from __future__ import annotations

import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from hpcssl.core.errors import ConfigError
from hpcssl.plan.draw import Plan
from hpcssl.plan.recipe import AugmentRecipe

Decode = Callable[..., Any]  # decode(tile, name=…)
Source = Callable[[int, Decode], tuple[Any, float, float]]  # (index, decode) → tile, seconds of reading and decoding
Times = tuple[float, float, float]  # seconds of reading, decoding and augmenting, summed over the tiles
Finish = Callable[[], tuple[tuple[Tensor, ...], Times]]


class Executor(ABC):
    """Computes the views of steps, in the order in which they were started."""

    _pool: ThreadPoolExecutor

    @abstractmethod
    def start(self, source: Source, plan: Plan) -> Finish:
        """Begin a step; the returned function waits for its views, (views, B, px, px, 3) uint8 for each kind."""

    def close(self) -> None:
        """Drop what was started, and wait for what is under way."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def open_executor(backend: str, recipe: AugmentRecipe, *, batch: int, threads: int, device: torch.device) -> Executor:
    """Return what executes plans of `batch` tiles on a backend: cpu, pillow or dali.

    ConfigError where DALI cannot be imported.
    """
    if backend == "dali":
        return _BatchExecutor(recipe, batch=batch, threads=threads, device=device)
    return _TileExecutor(importlib.import_module(f"hpcssl.loader.{backend}"), recipe, threads, device)


class _TileExecutor(Executor):
    """Every tile on its own; the views are in memory, page-locked where a GPU will fetch them."""

    def __init__(self, backend: Any, recipe: AugmentRecipe, threads: int, device: torch.device):
        self._backend, self._recipe, self._pinned = backend, recipe, device.type == "cuda"
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tiles")

    def start(self, source: Source, plan: Plan) -> Finish:
        num = len(plan.positions)
        views = tuple(
            torch.empty((kind.count, num, kind.view_px, kind.view_px, 3), dtype=torch.uint8, pin_memory=self._pinned)
            for kind in self._recipe.kinds
        )
        out = [v.numpy() for v in views]

        def one(index: int) -> Times:
            image, read_s, decode_s = source(index, self._backend.decode)
            begun = time.perf_counter()
            self._backend.augment(image, self._recipe, plan, index, out)
            return read_s, decode_s, time.perf_counter() - begun

        futures = [self._pool.submit(one, index) for index in range(num)]

        def finish() -> tuple[tuple[Tensor, ...], Times]:
            read_s, decode_s, augment_s = (sum(times) for times in zip(*(f.result() for f in futures), strict=True))
            return views, (read_s, decode_s, augment_s)

        return finish


class _BatchExecutor(Executor):
    """All tiles of a step at once, by DALI; its decoding counts as augmenting, for DALI does not tell them apart."""

    def __init__(self, recipe: AugmentRecipe, *, batch: int, threads: int, device: torch.device):
        try:
            self._dali = importlib.import_module("hpcssl.loader.dali")
        except ImportError as error:
            raise ConfigError(
                f"loader.backend = dali: DALI cannot be imported ({error}); pip install '.[dali]', or set"
                " loader.backend=cpu"
            ) from None
        self._pipeline = self._dali.Dali(recipe, batch=batch, threads=threads, device=device)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="dali")

    def start(self, source: Source, plan: Plan) -> Finish:
        return self._pool.submit(self._work, source, plan).result

    def _work(self, source: Source, plan: Plan) -> tuple[tuple[Tensor, ...], Times]:
        tiles, read_s, decode_s = _all_of(source, self._dali.decode, plan)
        begun = time.perf_counter()
        try:
            views = self._pipeline.execute(tiles, plan)
        except self._dali.Undecodable:  # Pillow finds which tile it is, and decodes what it can
            tiles, more_s, _ = _all_of(source, self._dali.decode_fully, plan)
            read_s += more_s
            views = self._pipeline.execute(tiles, plan)
        return views, (read_s, decode_s, time.perf_counter() - begun)


def _all_of(source: Source, decode: Decode, plan: Plan) -> tuple[list[Any], float, float]:
    tiles, read_s, decode_s = zip(*(source(index, decode) for index in range(len(plan.positions))), strict=True)
    return list(tiles), sum(read_s), sum(decode_s)
