"""Watching for collapse: what the features of a fixed set of tiles look like, every so many steps.

Everything is a function of the weights alone; watching draws no random numbers and changes nothing of training.

RankMe: Garrido et al., "RankMe: Assessing the downstream performance of pretrained self-supervised representations by
their rank" (ICML 2023, arXiv 2210.02885), equations 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from hpcssl.core.world import World
from hpcssl.loader.stream import TileStream
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
LEAST_OUTPUTS = 2.0  # of the teacher's outputs, how many the tiles share out among them, effectively
MOST_ENTROPY = 0.99  # of the teacher, as a share of log K; 1 = its outputs are all equal, whatever the tile


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
    """Looks at the features of the schedule's first tiles, un-augmented.

    Parameters
    ----------
    say : is told, once, that a limit is crossed and what to try
    """

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
        self._read_tiles = partial(_fixed_tiles, recipe, store, schedule)
        warm = schedule.positions_per_pseudo_epoch * max(1.0, recipe.optim.warmup_pseudo_epochs)
        self._warm_steps = warm / recipe.global_batch

    def look(self, state: TrainState, *, last: bool = False) -> dict[str, float]:
        """Return what is worth logging of this step, nothing if it is none of those to be looked at."""
        every = self._recipe.train.watch_every_steps
        if not every or not (last or state.step % every == 0):
            return {}
        found = self.measure(state)
        if state.step >= self._warm_steps:
            for key, complaint in complaints(found, self._recipe).items():
                if key not in self._warned:
                    self._say(f"step {state.step}: {complaint}")
                    self._warned.add(key)
        return found

    @cached_property
    def _tiles(self) -> Tensor:
        return self._read_tiles()  # at the first look, not while all ranks wait for the run to begin

    @torch.no_grad()
    def measure(self, state: TrainState) -> dict[str, float]:
        """Return what the features look like and, of DINO, the centre and the teacher's outputs."""
        module = state.objective.module
        encoder = module.get_submodule(state.objective.encoder_prefix.rstrip("."))
        chunks = [encoder(normalised(tiles.to(self._device))).float() for tiles in self._tiles.split(_CHUNK)]
        features_ND = torch.cat(chunks)
        found = {
            "rank_me": rank_me(features_ND.double().cpu()),
            "feature_deviation": feature_deviation(features_ND.double().cpu()),
        }
        if self._recipe.objective == "dino":
            head, center = module.get_submodule("teacher.head"), module.get_buffer("center")
            # of the schedule's end: a function of the weights alone
            temperature = self._recipe.dino.teacher_temperature
            outputs_NK = torch.cat([((head(c) - center) / temperature).softmax(-1) for c in features_ND.split(_CHUNK)])
            found["center_norm"] = float(center.norm())
            found["watched_entropy"] = float(_entropy(outputs_NK).mean())
            found["outputs_used"] = math.exp(_entropy(outputs_NK.mean(0)))
        return found


def _entropy(shares_NK: Tensor) -> Tensor:
    return -torch.special.xlogy(shares_NK, shares_NK).sum(-1)


def complaints(found: dict[str, float], recipe: PretrainConfig) -> dict[str, str]:
    """Return, for each measurement beyond its limit, what that means and what to try."""
    told = {}
    if found["feature_deviation"] < LEAST_DEVIATION or found["rank_me"] < LEAST_RANK:
        told["features"] = (
            f"the features collapse: deviation {found['feature_deviation']:.3g} (limit {LEAST_DEVIATION}), RankMe"
            f" {found['rank_me']:.3g} (limit {LEAST_RANK:g}); try a lower optim.lr_per_256 or a longer warm-up"
            + (", and a lower dino.teacher_temperature" if recipe.objective == "dino" else "")
        )
    if recipe.objective == "dino":
        share = found["watched_entropy"] / math.log(recipe.dino.head.out_dim)
        if found["outputs_used"] < LEAST_OUTPUTS:
            told["outputs"] = (
                f"the teacher gives all tiles the same output: {found['outputs_used']:.3g} in use (limit"
                f" {LEAST_OUTPUTS:g}); try a lower dino.center_momentum or a higher dino.teacher_temperature"
            )
        if share > MOST_ENTROPY:
            told["entropy"] = (
                f"the teacher's outputs are all equal: entropy {share:.2%} of log K (limit {MOST_ENTROPY:.0%});"
                " try a lower dino.teacher_temperature"
            )
    return told


def _fixed_tiles(recipe: PretrainConfig, store: Store, schedule: Schedule) -> Tensor:
    """Return the whole of the tiles at the schedule's first positions, each once, uint8 (N, px, px, 3)."""
    count = min(MOST_TILES, schedule.num_positions)
    px = recipe.augment.global_views.view_px
    stream = TileStream(
        store=store,
        schedule=schedule,
        recipe=AugmentRecipe(global_views=ViewRecipe(count=1, view_px=px, scale=(1.0, 1.0), flip=0.0)),
        seed=0,
        global_batch=count,
        world=World(),
        start_step=0,
        stop_step=1,
        config=recipe.loader,
    )
    first = np.sort(np.unique(schedule.tiles_at(0, count), return_index=True)[1])
    return next(iter(stream)).views[0][0][torch.from_numpy(first)]
