"""One process of a pretraining run, from a prepared run folder."""

from __future__ import annotations

import math
import os
import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from hpcssl.core.atomic import digest_file
from hpcssl.core.errors import RunError
from hpcssl.core.world import check_divides
from hpcssl.runs.checkpoint import checkpoint_steps
from hpcssl.runs.run_folder import read_settings, record_start
from hpcssl.schedule.file import Schedule
from hpcssl.stores.kinds import open_store
from hpcssl.train.execution import dtype_name, resolve_precision
from hpcssl.train.loop import Surroundings, train
from hpcssl.train.pretrain_config import PretrainConfig
from hpcssl.train.reduce import Collectives


def pretrain(run: Path, surroundings: Surroundings) -> None:
    """Train a prepared run from its folder alone, in this process.

    RunError, ScheduleError or StoreError where the data are gone, or others than the run began with: while a job waits
    in a queue, much can happen to them.
    """
    surroundings = replace(surroundings, collectives=patient(surroundings.collectives))
    world, generation = surroundings.collectives.world, surroundings.generation
    recipe, data = read_settings(run, PretrainConfig)
    check_divides(world.size, recipe.global_batch)
    store, schedule = open_store(Path(data["store"])), Schedule.open(Path(data["schedule"]))
    saved = checkpoint_steps(run)
    digests = {"store": store.digest, "schedule": schedule.digest}
    if recipe.initial_weights and not saved:
        digests["initial_weights"] = digest_file(Path(recipe.initial_weights))
    for name, digest in digests.items():
        recorded = data[f"{name}_digest"]
        if digest != recorded:
            raise RunError(
                f"{run}: other data than the run began with: {name}_digest = {recorded} in config.yaml, {digest} found;"
                " put the old ones back, or choose another --out"
            )
    torch.set_num_threads(recipe.train.threads or max(1, surroundings.cores // surroundings.ranks_per_node))
    if recipe.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
        torch.use_deterministic_algorithms(True)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", surroundings.local_rank)
        torch.cuda.set_device(device)
    if generation:
        record_start(
            run,
            generation=generation.number,
            newest_checkpoint=saved[-1] if saved else None,
            world_size=world.size,
            device=str(device),
            precision=dtype_name(resolve_precision(recipe.train.precision, device)),
        )
    train(run, recipe, store=store, schedule=schedule, device=device, surroundings=surroundings)


def patient(collectives: Collectives) -> Collectives:
    """Return collectives whose sum over the ranks, once limited, ends with one line where another rank hangs."""
    limit_s = math.inf

    def limit_waiting(seconds: float) -> None:
        nonlocal limit_s
        limit_s = seconds
        if dist.is_initialized():
            # public in newer versions of PyTorch only, which warn of the private name
            set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
            set_timeout(timedelta(seconds=seconds))

    def all_reduce_sum(tensor: torch.Tensor) -> None:
        try:
            collectives.all_reduce_sum(tensor)
        except RuntimeError as error:
            waited = re.search(r"timed out|timing out|timeout", str(error), re.IGNORECASE)  # gloo's words, and NCCL's
            if not waited or math.isinf(limit_s):
                raise
            raise RunError(
                f"rank {collectives.world.rank}: another process has not answered for {limit_s:g} s (train.hang_s): it"
                " or its node hangs; what was saved stays, the same command goes on from there"
            ) from error

    return Collectives(world=collectives.world, all_reduce_sum=all_reduce_sum, limit_waiting=limit_waiting)
