"""Watching for collapse: what the features of a fixed set of tiles look like, every so many steps.

Everything is a function of the weights alone; watching draws no random numbers and changes nothing of training.

RankMe: Garrido et al., "RankMe: Assessing the downstream performance of pretrained self-supervised representations by
their rank" (ICML 2023, arXiv 2210.02885), equations 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hpcssl.loader.stream import StreamRequest, TileStream
from hpcssl.models.encoder import normalised
from hpcssl.plan.recipe import AugmentRecipe, ViewRecipe
from hpcssl.schedule.file import Schedule
from hpcssl.stores.store import Store
from hpcssl.train.pretrain_config import PretrainConfig
from hpcssl.train.state import TrainState

MOST_TILES = 256
_CHUNK = 32
_EPSILON = 1e-7  # RankMe's
# what is called a collapse, once the warm-up is over
LEAST_DEVIATION = 0.1  # of the features' directions; the mean cosine of two tiles is then 0.99
LEAST_RANK = 3.0  # dimensions that the features span, effectively; 1 = all tiles have the same direction


def rank_me(features_ND: Tensor) -> float:
    """Return the exponential of the entropy of the singular values' shares: how many dimensions the features span."""
    values = torch.linalg.svdvals(features_ND)
    shares = values / values.sum() + _EPSILON
    return float(torch.exp(-(shares * shares.log()).sum()))


def feature_deviation(features_ND: Tensor) -> float:
    """Return the mean over the dimensions of the standard deviation of the features' directions, times the root of D.

    1 for directions all over the sphere, 0 where all tiles have the same one.
    """
    directions_ND = torch.nn.functional.normalize(features_ND, dim=-1)
    return float(directions_ND.std(0).mean()) * math.sqrt(features_ND.shape[1])


class CollapseWatch:
    """Looks at the features of the schedule's first tiles, un-augmented; says, once, which limit is crossed."""

    def __init__(
        self,
        recipe: PretrainConfig,
        store: Store,
        schedule: Schedule,
        device: torch.device,
        *,
        say: Callable[[str], None],
    ):
        self._recipe, self._device, self._say = recipe, device, say
        self._warned: set[str] = set()
        self._store, self._schedule = store, schedule
        warm = schedule.positions_per_pseudo_epoch * max(1.0, recipe.optim.warmup_pseudo_epochs)
        self._warm_steps = warm / recipe.global_batch

    def look(self, state: TrainState, *, last: bool = False) -> dict[str, float]:
        """Return what is worth logging of this step, nothing if it is none of those to be looked at."""
        every = self._recipe.train.watch_every_steps
        if not every or not (last or state.step % every == 0):
            return {}
        measurements = self.measure(state)
        if state.step >= self._warm_steps:
            objective = state.objective
            messages = complaints(measurements, objective.advice) | objective.complaints(measurements)
            for key, message in messages.items():
                if key not in self._warned:
                    self._say(f"step {state.step}: {message}")
                    self._warned.add(key)
        return measurements

    @cached_property
    def _tiles(self) -> Tensor:
        """The whole of the tiles at the schedule's first positions, each once, uint8 (N, px, px, 3).

        They are read at the first look, not while all ranks wait for the run to begin.
        """
        count = min(MOST_TILES, self._schedule.num_positions)
        px = self._recipe.augment.global_views.view_px
        whole = AugmentRecipe(global_views=ViewRecipe(count=1, view_px=px, scale=(1.0, 1.0), flip=0.0))
        request = StreamRequest(recipe=whole, seed=0, global_batch=count, steps=range(1))
        stream = TileStream(self._store, self._schedule, request, config=self._recipe.loader)
        first = np.sort(np.unique(self._schedule.tiles_at(0, count), return_index=True)[1])
        return next(iter(stream)).views[0][0][torch.from_numpy(first)]

    @torch.no_grad()
    def measure(self, state: TrainState) -> dict[str, float]:
        """Return what the features look like, and what the objective measures beside them."""
        objective = state.objective
        encoder = objective.module.get_submodule(objective.encoder_prefix.rstrip("."))
        chunks = [encoder(normalised(tiles.to(self._device))).float() for tiles in self._tiles.split(_CHUNK)]
        features_ND = torch.cat(chunks)
        exact_ND = features_ND.double().cpu()
        measurements = {"rank_me": rank_me(exact_ND), "feature_deviation": feature_deviation(exact_ND)}
        return measurements | objective.measure(features_ND)


def complaints(measurements: Mapping[str, float], advice: str = "") -> dict[str, str]:
    """Return, where the features are beyond a limit, what that means and what to try; `advice` ends the line."""
    deviation, rank = measurements["feature_deviation"], measurements["rank_me"]
    if not (deviation < LEAST_DEVIATION or rank < LEAST_RANK):
        return {}
    return {
        "features": f"the features collapse: deviation {deviation:.3g} (limit {LEAST_DEVIATION}), RankMe {rank:.3g}"
        f" (limit {LEAST_RANK:g}); try a lower optim.lr_per_256 or a longer warm-up{advice}"
    }
