"""One process of a pretraining run, from a prepared run folder: what the jobs room starts, by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from hpcssl.core.config import build
from hpcssl.core.errors import RunError
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
    patience = _Patience(all_reduce_sum, world)
    collectives = Collectives(world=world, all_reduce_sum=patience.all_reduce_sum, limit_waiting=patience.limit)
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


class _Patience:
    """A sum over ranks that ends with one line where another rank hangs."""

    def __init__(self, all_reduce_sum: Callable[[torch.Tensor], None], world: World):
        self._sum, self._world, self._seconds = all_reduce_sum, world, math.inf

    def limit(self, seconds: float) -> None:
        """Wait no longer than this for other ranks from now on."""
        self._seconds = seconds
        if dist.is_initialized():
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), dist.group.WORLD)

    def all_reduce_sum(self, tensor: torch.Tensor) -> None:
        """Sum over the ranks, in place."""
        try:
            self._sum(tensor)
        except RuntimeError as error:
            if "timed out" not in str(error).lower() or math.isinf(self._seconds):
                raise
            raise RunError(
                f"rank {self._world.rank}: another process has not answered for {self._seconds:g} s (train.hang_s): it"
                " or its node hangs; what was saved stays, the same command goes on from there"
            ) from error


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
