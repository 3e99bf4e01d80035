"""One process of a pretraining run, from a prepared run folder: what the jobs room starts, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from hpcssl.core.config import build
from hpcssl.core.world import World, check_divides
from hpcssl.runs.checkpoint import checkpoint_steps
from hpcssl.runs.folder import Generation, read_config, record_start
from hpcssl.schedule.file import Schedule
from hpcssl.tiles.store import Store
from hpcssl.train.config import PretrainConfig
from hpcssl.train.loop import train
from hpcssl.train.reduce import Collectives


def pretrain(
    run: Path,
    *,
    world: World,
    all_reduce_sum: Callable[[torch.Tensor], None],
    local_rank: int,
    ranks_per_node: int,
    cores: int,
    generation: Generation | None,
    asked_to_stop: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    """Train the run from its folder alone, in this process.

    Parameters
    ----------
    run : prepared run folder
    world, all_reduce_sum : this process among the others, and the sum over them, in place
    local_rank, ranks_per_node, cores : place on the node, for choosing its GPU and its share of the cores
    generation, asked_to_stop, say : see `hpcssl.train.loop.train`
    """
    collectives = Collectives(world=world, all_reduce_sum=all_reduce_sum)
    settings = read_config(run)
    data = settings.pop("data")
    settings.pop("derived")
    recipe = build(PretrainConfig, settings, where=str(run / "config.yaml"))
    check_divides(world.size, recipe.global_batch)
    torch.set_num_threads(recipe.train.threads or max(1, cores // ranks_per_node))
    device = _device(local_rank)
    if recipe.train.deterministic:
        torch.use_deterministic_algorithms(True)
    if generation:
        saved = checkpoint_steps(run)
        newest = saved[-1] if saved else None
        facts = {"generation": generation.number, "newest_checkpoint": newest}
        record_start(run, **facts, world_size=world.size, device=str(device))
    train(
        run,
        recipe,
        store=Store.open(Path(data["store"])),
        schedule=Schedule.open(Path(data["schedule"])),
        collectives=collectives,
        device=device,
        generation=generation,
        asked_to_stop=asked_to_stop,
        say=say,
    )


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
