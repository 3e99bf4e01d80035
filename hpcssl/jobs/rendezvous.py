"""How the ranks of one start find each other: rank 0 opens a port that the system chooses and writes it down."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcssl.core.atomic import write_atomic
from hpcssl.core.errors import RunError
from hpcssl.core.world import World

if TYPE_CHECKING:
    from torch import Tensor

_WAIT_S = 300.0
_POLL_S = 0.05
_COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@contextmanager
def process_group(folder: Path, token: str, world: World, *, one_node: bool) -> Iterator[None]:
    """Join the process group of one start, and leave it on the way out; RunError where rank 0 does not appear.

    The ranks share `folder`; `token` is the same on all ranks of this start, and on no other's.
    """
    import torch
    import torch.distributed as dist

    if one_node and Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name that does not resolve is no obstacle
    store = _meet(folder / f"rendezvous-{token}.json", world, one_node=one_node)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=_COLLECTIVE_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def all_reduce_sum(tensor: Tensor) -> None:
    """Sum a tensor over all ranks, in place."""
    import torch.distributed as dist

    dist.all_reduce(tensor)


def _meet(file: Path, world: World, *, one_node: bool) -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if world.rank == 0:
        host = "127.0.0.1" if one_node else os.environ.get("SLURMD_NODENAME", socket.gethostname())
        store = TCPStore(host, 0, world.size, is_master=True, wait_for_workers=False, timeout=_COLLECTIVE_TIMEOUT)
        write_atomic(file, json.dumps({"host": host, "port": store.port}))
        return store
    until = time.monotonic() + _WAIT_S
    while not file.exists():
        if time.monotonic() > until:
            raise RunError(f"rank {world.rank}: rank 0 did not appear within {_WAIT_S:.0f} s (waited for {file})")
        time.sleep(_POLL_S)
    address = json.loads(file.read_text(encoding="utf-8"))
    return TCPStore(address["host"], address["port"], world.size, is_master=False, timeout=_COLLECTIVE_TIMEOUT)
