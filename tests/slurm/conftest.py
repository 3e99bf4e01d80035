"""A SLURM of two nodes on this machine, for as long as the tests that use it run."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).with_name("start_slurm.sh")
NODES, CPUS = 2, 2
CANNOT = 3


@pytest.fixture(scope="session")
def slurm(small: ModuleType) -> Iterator[dict[str, str]]:
    """Environment variables of commands that use the cluster; skips where there can be none."""
    root = Path(tempfile.mkdtemp(prefix="hpcssl-slurm-", dir="/tmp"))  # a short path: a socket lies in it
    env = {**small.environment(), "SLURM_ROOT": str(root), "SLURM_CONF": str(root / "slurm.conf")}
    hosts = Path("/etc/hosts").read_text()
    try:
        begun = subprocess.run(
            ["bash", SCRIPT, "start", str(NODES), str(CPUS)], env=env, stderr=subprocess.PIPE, text=True, check=False
        )
        if begun.returncode == CANNOT:
            pytest.skip(begun.stderr.strip().splitlines()[-1])
        assert begun.returncode == 0, begun.stderr
        daemons = {file.name: int(file.read_text()) for file in (root / "pid").iterdir()}
        assert set(daemons) == {"munged", "slurmctld", *(f"node{n + 1}" for n in range(NODES))}
        assert all(small.alive(pid) for pid in daemons.values()), daemons
        yield env
        daemons |= {file.name: int(file.read_text()) for file in (root / "pid").iterdir()}  # started again by tests
    finally:
        subprocess.run(["bash", SCRIPT, "stop"], env=env, check=True)
        shutil.rmtree(root)
    assert not [name for name, pid in daemons.items() if small.alive(pid)], "daemons are left behind"
    assert Path("/etc/hosts").read_text().rstrip() == hosts.rstrip()
