"""A rank that hangs: those that wait for it end with one line, in real processes over gloo."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from hpcssl.runs.checkpoint import checkpoint_steps, load_checkpoint
from hpcssl.runs.run_folder import Generation

HANG_S = 3.0

pytestmark = pytest.mark.timeout(180)


def _rank(run: Path, rank: int) -> None:
    """Train as rank 0 or 1 of two; rank 1 stops for ever after its third step."""
    import torch

    from hpcssl.core.world import World
    from hpcssl.jobs.rendezvous import all_reduce_sum, process_group
    from hpcssl.train.entry import pretrain
    from hpcssl.train.loop import Surroundings
    from hpcssl.train.reduce import Collectives

    warnings.simplefilter("error", FutureWarning)
    torch.cuda.is_available = lambda: False
    polled = []

    def asked_to_stop() -> bool:
        polled.append(1)
        if rank == 1 and len(polled) == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        return False

    outcome = "finished"
    world = World(rank=rank, size=2)
    try:
        with process_group(run / "generations", "test", world, one_node=True):
            generation = Generation.take(run) if rank == 0 else None
            collectives = Collectives(world=world, all_reduce_sum=all_reduce_sum)
            around = Surroundings(generation=generation, asked_to_stop=asked_to_stop, say=id, collectives=collectives)
            pretrain(run, around)
    except Exception as error:  # noqa: BLE001 - told to the test
        outcome = f"{type(error).__name__}: {error}"
    (run / f"outcome-{rank}.json").write_text(json.dumps(outcome))


def test_a_rank_that_hangs_is_told_and_what_was_saved_stays(small, data, tmp_path):
    recipe = small.dino_recipe()
    recipe = replace(
        recipe,
        train=replace(recipe.train, hang_s=HANG_S),
        checkpoint=replace(recipe.checkpoint, every_min=0.0, keep_last=9),
    )
    run = small.make_run(tmp_path / "run", data, recipe)
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(run, rank)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        ranks[0].join(120)
        assert ranks[0].exitcode == 0, "rank 0 still waits"
        assert ranks[1].is_alive()
    finally:
        small.kill_all([process.pid for process in ranks])
        for process in ranks:
            process.join(30)
    told = json.loads((run / "outcome-0.json").read_text())
    assert told.startswith("RunError: rank 0: another process has not answered for 3 s (train.hang_s)")
    assert "the same command goes on from there" in told
    assert checkpoint_steps(run) == [0, 1, 2]
    for step in (0, 1, 2):
        load_checkpoint(run / "checkpoints" / f"step-{step:09d}.safetensors")
