"""The slides of a task: in memory up to a bound, beyond it in a scratch file that is read slide by slide.

Shapes: S slides, N tiles of one slide (padded), D feature size, R fits.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MEMORY_GIB = 8.0  # features of one task that stay in memory, unless asked otherwise


class Bags:
    """Features of S slides: `counts` are the tiles of each, [S], and `dim` is D."""

    def __init__(
        self,
        slides: Iterable[NDArray[np.float32]],
        *,
        memory_gib: float = MEMORY_GIB,
        scratch: Path | None = None,
        device: torch.device | str = "cpu",
    ):
        """Take over the slides, each (N, D).

        If they exceed `memory_gib`, all go into a file in the folder `scratch` (None: the system's), which vanishes
        with the process; then a slide is in memory only while it is used.
        """
        self.device = torch.device(device)
        self._in_memory: list[Tensor] = []
        self._file: IO[bytes] | None = None
        counts: list[int] = []
        size = 0
        for slide in slides:
            counts.append(len(slide))
            size += slide.nbytes
            self.dim = slide.shape[1]
            if self._file is None and size > memory_gib * 2**30:
                self._file = tempfile.TemporaryFile(dir=scratch, buffering=0)  # noqa: SIM115 (lives as long as the bags)
                for earlier in self._in_memory:
                    earlier.cpu().numpy().tofile(self._file)
                self._in_memory = []
            if self._file is None:
                self._in_memory.append(torch.from_numpy(slide).to(self.device))
            else:
                slide.tofile(self._file)
        self.counts = np.array(counts, dtype=np.int64)
        self._starts = np.cumsum(self.counts) - self.counts

    @property
    def streamed(self) -> bool:
        """Whether slides are read from the scratch file."""
        return self._file is not None

    def slide(self, index: int) -> Tensor:
        """Return the features of one slide, [N, D]."""
        if self._file is None:
            return self._in_memory[index]
        x_ND = np.empty((self.counts[index], self.dim), np.float32)
        view, start = memoryview(x_ND.data).cast("B"), int(self._starts[index]) * self.dim * 4
        done = 0
        while done < len(view):
            got = os.preadv(self._file.fileno(), [view[done:]], start + done)
            assert got, "the scratch file is whole"
            done += got
        return torch.from_numpy(x_ND).to(self.device)

    def gather(self, slides_R: Sequence[int] | NDArray[np.int64], num_tiles: int = 0) -> tuple[Tensor, Tensor | None]:
        """Return bags padded to the longest, at least `num_tiles`, [R, N, D], and which tiles are there [R, N].

        One bag alone is not padded, and all its tiles are there: None.
        """
        if len(slides_R) == 1:
            return self.slide(slides_R[0])[None], None
        counts = self.counts[list(slides_R)]
        x_RND = torch.zeros(len(slides_R), max(int(counts.max()), num_tiles), self.dim, device=self.device)
        for x_ND, index in zip(x_RND, slides_R, strict=True):
            x_ND[: self.counts[index]] = self.slide(index)
        tile_N = torch.arange(x_RND.shape[1], device=self.device)
        return x_RND, tile_N < torch.from_numpy(counts).to(self.device)[:, None]
