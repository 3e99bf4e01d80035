"""A run on as many nodes as there are: which numbers will do, and whether the largest is worth waiting for.

The job is submitted with the range of its numbers of nodes, so that SLURM chooses anew whenever it starts again.
"""

from __future__ import annotations

import re
from dataclasses import replace

from hpcssl.core.errors import ConfigError, RunError
from hpcssl.jobs.batch_script import heeding
from hpcssl.jobs.cluster import Batch
from hpcssl.jobs.profile import Resources
from hpcssl.jobs.refusal import with_fix
from hpcssl.jobs.slurm import could_start_in_s


def parse_gpus(text: str) -> tuple[int, int]:
    """Return the fewest and the most GPUs of a range.

    >>> parse_gpus("8..24")
    (8, 24)
    """
    match = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--gpus {text}: expected MIN..MAX, such as 8..24")
    return int(match[1]), int(match[2])


def with_gpus(resources: Resources, fewest: int, most: int, *, global_batch: int) -> Resources:
    """Return resources with every number of nodes whose processes are within the limits and share the global batch.

    >>> with_gpus(Resources(processes_per_node=4), 8, 24, global_batch=1080).nodes
    6
    >>> with_gpus(Resources(processes_per_node=4), 8, 24, global_batch=1080).fewer_nodes
    (2, 3, 5)
    """
    each = resources.processes_per_node
    counts = [n for n in range(-(-fewest // each), most // each + 1) if global_batch % (n * each) == 0]
    if not counts:
        raise ConfigError(
            f"--gpus {fewest}..{most}: no number of nodes of {each} processes each lies in it and shares a global"
            f" batch of {global_batch} equally; choose another range or --gpus-per-node"
        )
    return replace(resources, nodes=counts[-1], fewer_nodes=tuple(counts[:-1]))


def begin_in_s(batch: Batch, *, wait_min: float) -> float:
    """Return how long to hold a job back so that it starts on the most nodes that SLURM can give it within the wait.

    0 where that is now, and where SLURM expects the wait to bring nothing; RunError where it would refuse the job.
    """
    if not batch.resources.fewer_nodes:
        return 0.0
    script, expected = batch.script(), []
    for nodes in sorted({batch.resources.nodes, *batch.resources.fewer_nodes}, reverse=True):
        with heeding(batch.resources.profile):
            seconds = could_start_in_s(script, nodes)
        if seconds is not None and seconds <= 60 * wait_min:
            return seconds
        expected.append(seconds)
    if all(seconds is None for seconds in expected):
        raise RunError(with_fix("Requested node configuration is not available"))
    return 0.0
