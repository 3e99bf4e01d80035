"""Writing checkpoints while training goes on: a copy in host memory, and one thread that writes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class BackgroundWriter:
    """Hands a copy of some tensors to a thread; at most one write is under way.

    The copy lies in buffers that are used again, pinned where the tensors are a GPU's, so that training stands still
    for the copy alone. What the thread raises is raised by the next call here.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._buffers: dict[str, Tensor] = {}

    def start(self, tensors: Mapping[str, Tensor], write: Callable[[Mapping[str, Tensor]], None]) -> None:
        """Wait for the former write, copy the tensors, and begin `write(copies)`."""
        self.wait()
        self._pending = self._thread.submit(write, self._copied(tensors))

    def check(self) -> None:
        """Raise the error of a write that has failed; does not wait."""
        if self._pending and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the write under way, and raise its error if it fails."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def close(self) -> None:
        """Let the write under way end, and the thread with it; an error that nobody has asked for is dropped."""
        self._thread.shutdown(wait=True)

    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in tensors.items():
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._buffers[name] = buffer
            buffer.copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()  # the copies are whole before training changes what they are copies of
        return {name: self._buffers[name] for name in tensors}
