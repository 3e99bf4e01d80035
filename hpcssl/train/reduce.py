"""Data parallelism: collectives as values, and gradients reduced in a layout that is fixed from step 0.

torch's DistributedDataParallel rebuilds its buckets after the first step it runs, so a resumed run of three or more
ranks sums in another order than the uninterrupted one and parts from it in the last bits. Here all gradients are views
into one buffer whose layout follows from the model alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hpcssl.core.world import World


def _nothing(argument: object) -> None:
    """Do what a world of one has to do together."""


@dataclass(frozen=True, kw_only=True)
class Collectives:
    """What ranks do together.

    `all_reduce_sum` sums a tensor over all ranks, in place; after `limit_waiting(seconds)` it raises a RunError where
    another rank does not answer for so long.
    """

    world: World = field(default_factory=World)
    all_reduce_sum: Callable[[Tensor], None] = _nothing
    limit_waiting: Callable[[float], None] = _nothing


class GradientBuffer:
    """The gradients of some parameters, in one flat tensor in the order given."""

    def __init__(self, parameters: Sequence[Tensor]):
        self._parameters = list(parameters)
        sizes = [p.numel() for p in self._parameters]
        first = self._parameters[0]
        self._flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        self._views = [v.view_as(p) for v, p in zip(self._flat.split(sizes), self._parameters, strict=True)]

    def zero(self) -> None:
        """Set all gradients to zero and let backward passes accumulate into the buffer."""
        self._flat.zero_()
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view

    def mean_over_ranks(self, collectives: Collectives) -> None:
        """Replace every gradient by its mean over the ranks, whose shares of the batch are equal."""
        collectives.all_reduce_sum(self._flat)
        self._flat /= collectives.world.size
