"""A step whose loss or gradients are not finite: what is saved of it, and how to repeat it.

RUN/failed-step-000000123/
    step.json                 what happened: loss, gradient norm, the gradients that are not finite, versions
    state.safetensors         the state before the step, in the format of a checkpoint
    batch-rank0of2.safetensors …   each rank's share: positions, views, mask, and the digest of its plan
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from hpcssl.core.atomic import read_json, write_atomic
from hpcssl.core.errors import RunError
from hpcssl.core.provenance import provenance
from hpcssl.core.world import World
from hpcssl.loader.stream import Batch
from hpcssl.plan.draw import draw_plan
from hpcssl.runs.checkpoint import load_checkpoint, write_state
from hpcssl.runs.run_folder import read_settings
from hpcssl.schedule.file import Schedule
from hpcssl.train.pretrain_config import PretrainConfig, Timeline
from hpcssl.train.reduce import Collectives
from hpcssl.train.state import TrainState
from hpcssl.train.step import NotFiniteError, train_step

_STATE, _ABOUT = "state.safetensors", "step.json"


def failed_step_folder(run: Path, step: int) -> Path:
    """Return where the step is saved."""
    return run / f"failed-step-{step:09d}"


def save_failed_step(
    run: Path, state: TrainState, batch: Batch, recipe: PretrainConfig, error: NotFiniteError, *, world: World
) -> Path:
    """Save what it takes to repeat a step, every rank its share, rank 0 the state before it; return the folder."""
    folder = failed_step_folder(run, batch.step)
    folder.mkdir(exist_ok=True)
    tensors = {f"view{i}": view for i, view in enumerate(batch.views)}
    tensors["positions"] = torch.from_numpy(np.ascontiguousarray(batch.positions))
    if batch.mask is not None:
        tensors["mask"] = batch.mask
    patches = state.objective.needs.num_patches
    plan = draw_plan(recipe.augment, recipe.seed, batch.positions, num_patches=patches)
    facts = {"plan_digest": plan.digest(), "seed": recipe.seed, "rank": world.rank, "world_size": world.size}
    write_state(_share_file(folder, world), batch.step, tensors, facts)
    if world.rank == 0:
        write_state(folder / _STATE, batch.step, *state.to_checkpoint())
        about = {
            "step": batch.step,
            "loss": repr(error.loss),
            "grad_norm": repr(error.norm),
            "gradients_not_finite": error.gradients,
            "skipped_steps_before": state.skipped_steps,
            "first_position": batch.step * recipe.global_batch,
            "global_batch": recipe.global_batch,
            "world_size": world.size,
            "threads": torch.get_num_threads(),
            **provenance(),
        }
        write_atomic(folder / _ABOUT, json.dumps(about, indent=1) + "\n")
    return folder


def repeat_failed_step(folder: Path, schedule: Schedule, device: torch.device) -> dict[str, float]:
    """Compute a saved step again, all ranks' shares in one batch, and return its record should it be finite here.

    NotFiniteError as in the run; RunError where something of the step is missing or damaged.
    """
    recipe, _ = read_settings(folder.parent, PretrainConfig)
    recipe = replace(recipe, train=replace(recipe.train, max_skipped_steps=0))
    state = TrainState(recipe, device)
    state.from_checkpoint(*load_checkpoint(folder / _STATE))
    batch, needs = load_batch(folder), state.objective.needs
    plan = draw_plan(recipe.augment, recipe.seed, batch.positions, **vars(needs))
    batch = replace(batch, drop_path=Batch.of(batch.step, batch.views, plan).drop_path)
    return train_step(state, batch, recipe, Timeline(recipe, schedule), Collectives(), device)


def load_batch(folder: Path) -> Batch:
    """Return the batch of a saved step, the shares of all ranks in the order of their positions, without drop-path."""
    size = read_json(folder / _ABOUT, RunError(f"{folder / _ABOUT}: damaged"))["world_size"]
    shares = [load_checkpoint(_share_file(folder, World(rank=rank, size=size))) for rank in range(size)]
    parts = [tensors for tensors, _ in shares]
    kinds = sum(name.startswith("view") for name in parts[0])
    return Batch(
        step=shares[0][1]["step"],
        positions=torch.cat([p["positions"] for p in parts]).numpy(),
        views=tuple(torch.cat([p[f"view{i}"] for p in parts], dim=1) for i in range(kinds)),
        mask=torch.cat([p["mask"] for p in parts]) if "mask" in parts[0] else None,
    )


def _share_file(folder: Path, world: World) -> Path:
    return folder / f"batch-rank{world.rank}of{world.size}.safetensors"
