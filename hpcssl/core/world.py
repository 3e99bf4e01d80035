"""The processes of a run, as a value."""

from __future__ import annotations

from dataclasses import dataclass

from hpcssl.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class World:
    """One rank among `size`; decides only *which* positions this process computes."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, (self.rank, self.size)

    def slice(self, start: int, stop: int) -> range:
        """Return this rank's equal, contiguous share of the positions [start, stop).

        ConfigError where the positions cannot be shared equally.

        >>> [list(World(rank=r, size=2).slice(4, 8)) for r in range(2)]
        [[4, 5], [6, 7]]
        """
        check_divides(self.size, stop - start)
        share = (stop - start) // self.size
        return range(start + self.rank * share, start + (self.rank + 1) * share)


def check_divides(size: int, global_batch: int) -> None:
    """Refuse a world size that does not divide the global batch, and list those that do.

    >>> check_divides(5, 12)
    Traceback (most recent call last):
    hpcssl.core.errors.ConfigError: 5 processes cannot share a global batch of 12 equally; 1, 2, 3, 4, 6 or 12 can
    """
    if global_batch % size:
        able = [str(d) for d in range(1, global_batch + 1) if global_batch % d == 0]
        listed = " or ".join(filter(None, [", ".join(able[:-1]), able[-1]]))
        raise ConfigError(f"{size} processes cannot share a global batch of {global_batch} equally; {listed} can")
