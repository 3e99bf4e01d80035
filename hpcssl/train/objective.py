"""The objective of a recipe: built, checked before a job waits in a queue, started from given weights."""

from __future__ import annotations

from pathlib import Path

import torch

from hpcssl.core.errors import ConfigError
from hpcssl.core.rng import key_of
from hpcssl.models.encoder import Encoder, build_encoder
from hpcssl.models.weights import read_initial_weights
from hpcssl.objectives.contract import Objective
from hpcssl.objectives.registry import objective_of
from hpcssl.train.execution import resolve_execution
from hpcssl.train.pretrain_config import PretrainConfig


def build_objective(recipe: PretrainConfig, device: torch.device) -> Objective:
    """Build the objective with weights that depend on the seed alone, the same on every rank and device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_of(recipe.seed, "weights") >> 1)
        encoder = build_encoder(recipe.encoder, resolve_execution(recipe.train, device))
        return objective_of(recipe.objective)(recipe.objective, encoder, recipe.augment, device)


def load_initial_weights(objective: Objective, path: Path) -> str:
    """Let every encoder of a fresh objective start from a file (`read_initial_weights`); return what to say of it."""
    encoders = [module for module in objective.module.modules() if isinstance(module, Encoder)]
    weights, message = read_initial_weights(path, encoders[0])
    for encoder in encoders:
        encoder.vit.load_state_dict(weights)
    return message


def check_recipe(recipe: PretrainConfig) -> str:
    """Build the model without memory, and return what is to be said of the initial weights; empty without.

    So a recipe that cannot train is refused before a job waits in a queue: ConfigError for an encoder that cannot be
    built, views that it cannot take, or initial weights that do not fit.
    """
    with torch.device("meta"):
        encoder = build_encoder(recipe.encoder)
        for kind in recipe.augment.kinds:
            if kind.view_px % encoder.patch_px:
                raise ConfigError(
                    f"recipe: views of {kind.view_px} px; expected a multiple of the patch of {encoder.patch_px} px"
                )
        objective_of(recipe.objective)(recipe.objective, encoder, recipe.augment, torch.device("meta"))
    return read_initial_weights(Path(recipe.initial_weights), encoder)[1] if recipe.initial_weights else ""
