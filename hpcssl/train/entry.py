"""One process of a pretraining run, from a prepared run folder: what the jobs room starts, by name."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from hpcssl.core.atomic import digest_file
from hpcssl.core.errors import RunError
from hpcssl.core.world import World, check_divides
from hpcssl.runs.checkpoint import checkpoint_steps
from hpcssl.runs.run_folder import read_settings, record_start
from hpcssl.schedule.file import Schedule
from hpcssl.stores.kinds import open_store
from hpcssl.train.execution import dtype_name, resolve_precision
from hpcssl.train.loop import Surroundings, train
from hpcssl.train.pretrain_config import PretrainConfig
from hpcssl.train.reduce import Collectives


def pretrain(
    run: Path,
    *,
    world: World,
    all_reduce_sum: Callable[[torch.Tensor], None],
    local_rank: int,
    ranks_per_node: int,
    cores: int,
    surroundings: Surroundings,
) -> None:
    """Train the run from its folder alone, in this process.

    Parameters
    ----------
    run : prepared run folder
    world, all_reduce_sum : this process among the others, and the sum over them, in place
    local_rank, ranks_per_node, cores : place on the node, for choosing its GPU and its share of the cores
    surroundings : see there

    Raises
    ------
    RunError, ScheduleError, StoreError
        If the data are gone, or others than the run began with: while a job waits in a queue, much can happen to them.
    """
    patience = _Patience(all_reduce_sum, world)
    collectives = Collectives(world=world, all_reduce_sum=patience.all_reduce_sum, limit_waiting=patience.limit)
    recipe, data = read_settings(run, PretrainConfig)
    check_divides(world.size, recipe.global_batch)
    store, schedule = open_store(Path(data["store"])), Schedule.open(Path(data["schedule"]))
    saved = checkpoint_steps(run)
    digests = {"store": store.digest, "schedule": schedule.digest}
    if recipe.initial_weights and not saved:
        digests["initial_weights"] = digest_file(Path(recipe.initial_weights))
    _check_same_data(run, digests, data)
    torch.set_num_threads(recipe.train.threads or max(1, cores // ranks_per_node))
    if recipe.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
        torch.use_deterministic_algorithms(True)
    device = _device(local_rank)
    if surroundings.generation:
        record_start(
            run,
            generation=surroundings.generation.number,
            newest_checkpoint=saved[-1] if saved else None,
            world_size=world.size,
            device=str(device),
            precision=dtype_name(resolve_precision(recipe.train.precision, device)),
        )
    train(
        run, recipe, store=store, schedule=schedule, collectives=collectives, device=device, surroundings=surroundings
    )


def _check_same_data(run: Path, digests: Mapping[str, str], data: Mapping[str, str]) -> None:
    """Refuse to go on with other data than config.yaml says, by their digests."""
    for name, digest in digests.items():
        recorded = data[f"{name}_digest"]
        if digest != recorded:
            raise RunError(
                f"{run}: other data than the run began with: {name}_digest = {recorded} in config.yaml, {digest} found;"
                " put the old ones back, or choose another --out"
            )


class _Patience:
    """A sum over ranks that ends with one line where another rank hangs."""

    def __init__(self, all_reduce_sum: Callable[[torch.Tensor], None], world: World):
        self._sum, self._world, self._seconds = all_reduce_sum, world, math.inf

    def limit(self, seconds: float) -> None:
        """Wait no longer than this for other ranks from now on."""
        self._seconds = seconds
        if dist.is_initialized():
            # public in newer versions of PyTorch only, which warn of the private name
            set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
            set_timeout(timedelta(seconds=seconds))

    def all_reduce_sum(self, tensor: torch.Tensor) -> None:
        """Sum over the ranks, in place."""
        try:
            self._sum(tensor)
        except RuntimeError as error:
            waited = re.search(r"timed out|timing out|timeout", str(error), re.IGNORECASE)  # gloo's words, and NCCL's
            if not waited or math.isinf(self._seconds):
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
