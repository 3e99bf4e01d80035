"""What every rank of a pretraining does; SLURM's batch script runs this module, with the run folder and a token.

It listens to SLURM's warnings first, and then imports what it takes to train.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING

from hpcssl.jobs.stop_signals import catch_stop_signals, ignore_stop_signals

if TYPE_CHECKING:
    from hpcssl.jobs.run_start import Rank


def train_rank(rank: Rank) -> bool:
    """Train until the end of the run; returns False where it was asked to stop before."""
    from hpcssl.pipelines.following import following
    from hpcssl.train.entry import pretrain
    from hpcssl.train.loop import Stopped, Surroundings
    from hpcssl.train.reduce import Collectives

    place = rank.place
    try:
        with following(rank.run, rank.say) if rank.generation else nullcontext():
            surroundings = Surroundings(
                generation=rank.generation,
                asked_to_stop=rank.asked_to_stop,
                say=rank.say,
                collectives=Collectives(world=place.world, all_reduce_sum=rank.all_reduce_sum),
                local_rank=place.local_rank,
                ranks_per_node=max(1, place.world.size // len(place.nodes)),
                cores=place.cores,
            )
            pretrain(rank.run, surroundings)
    except Stopped:
        return False
    return True


def main(run: str, token: str) -> None:
    """Do what the batch script asks of a rank."""
    received = catch_stop_signals()
    from hpcssl.jobs.run_start import RunStart

    RunStart(run, train_rank, token).on_rank(received)
    ignore_stop_signals()


if __name__ == "__main__":
    main(*sys.argv[1:])
