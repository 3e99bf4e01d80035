"""Writing checkpoints while training goes on: a copy in host memory, and one thread that writes it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class BackgroundWriter:
    """Hands copies of some tensors to a thread, which writes them one after the other.

    Training stands still for the copy alone, also where the write before is still under way, as it may be on a slow
    disk; only a third one waits. A copy lies in one of two sets of buffers that are used again, pinned where the
    tensors are a GPU's; the second set is made when it is first needed. What the thread raises is raised by the next
    call here.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: deque[tuple[Future[None], dict[str, Tensor]]] = deque()
        self._free: list[dict[str, Tensor]] = [{}, {}]

    def start(self, tensors: Mapping[str, Tensor], write: Callable[[Mapping[str, Tensor]], None]) -> None:
        """Copy the tensors and begin `write(copies)`; waits where two writes are under way."""
        self.check()
        if not self._free:
            self._end_first()
        buffers = self._free.pop()
        self._pending.append((self._thread.submit(write, _copied(tensors, buffers)), buffers))

    def check(self) -> None:
        """Raise the error of a write that has failed; does not wait."""
        while self._pending and self._pending[0][0].done():
            self._end_first()

    def wait(self) -> None:
        """Wait for the writes under way, and raise the error of the first that fails."""
        while self._pending:
            self._end_first()

    def close(self) -> None:
        """Let the writes under way end, and the thread with them; an error that nobody has asked for is dropped."""
        self._thread.shutdown(wait=True)

    def _end_first(self) -> None:
        writing, buffers = self._pending.popleft()
        self._free.append(buffers)
        writing.result()


def _copied(tensors: Mapping[str, Tensor], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors into buffers of theirs, which are made where they are missing."""
    for name, tensor in tensors.items():
        buffer = buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffers[name] = buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        buffer.copy_(tensor.detach(), non_blocking=True)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()  # the copies are whole before training changes what they are copies of
    return {name: buffers[name] for name in tensors}
