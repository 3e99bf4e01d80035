"""A SLURM of two nodes on this machine, for as long as the tests that use it run, and runs that are jobs there."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from datetime import datetime
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import ClassVar
from unittest.mock import patch

import pytest

from hpcssl.cli.main import main
from hpcssl.pipelines import pretrain_rank
from hpcssl.runs.history import read_starts
from hpcssl.runs.trace import last_record

SCRIPT = Path(__file__).with_name("start_slurm.sh")
NODES, CPUS = 2, 2
CANNOT = 3
PROFILE = "gpus_per_node: 0\ncpus_per_gpu: 1\ntimeout_min: 60\n"
GPUS = """
gpus_per_node: 2
cpus_per_gpu: 1
setup: ['echo "GPUs of the first node: $SLURM_GPUS_ON_NODE" >&2']
"""


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


@dataclass(frozen=True)
class Job:
    """A submitted run."""

    STEPS: ClassVar[int] = 120
    EARLY: ClassVar[int] = 10  # steps to wait for before it is disturbed
    PATIENCE_S: ClassVar[float] = 150  # for a job of this size to come to its end on a busy machine
    id: str
    run: Path
    env: dict[str, str] = field(compare=False)

    def tell(self, *command: str) -> str:
        """Run one of SLURM's commands and return its words."""
        return subprocess.run(command, env=self.env, check=True, capture_output=True, text=True, timeout=90).stdout

    def facts(self) -> dict[str, str]:
        """Return what SLURM says of the job, by its names."""
        words = self.tell("scontrol", "--oneliner", "show", "job", self.id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self) -> str:
        """Return SLURM's word for the job's state."""
        return self.facts()["JobState"]

    def step(self) -> int:
        """Return how many steps the run has made."""
        return (last_record(self.run) or {"step": 0})["step"]

    def wait_for_start(self, number: int) -> dict:
        """Wait until a start, counted from 1, has got as far as training; returns its line in the history."""
        self.wait(self.starts, lambda starts: len(starts) >= number)
        return self.starts()[number - 1]

    def wait_for_end(self) -> str:
        """Wait until SLURM has ended the job, requeues included; returns its state."""
        going = ("PENDING", "CONFIGURING", "RUNNING", "SIGNALING", "COMPLETING", "REQUEUED")
        return self.wait(self.state, lambda state: state not in going)

    def wait(self, look: Callable, enough: Callable = bool):
        """Look until it is enough; returns what is seen then."""
        until = time.monotonic() + self.PATIENCE_S
        while not enough(seen := look()):
            assert time.monotonic() < until, f"job {self.id}: still {seen} after so long; its log:\n{self.log()}"
            time.sleep(0.2)
        return seen

    def log(self) -> str:
        """Return what rank 0 and SLURM have written."""
        file = self.run / "logs" / f"{self.id}_0_log.err"
        return file.read_text(encoding="utf-8") if file.exists() else ""

    def starts(self) -> list[dict]:
        """Return the restart history: the starts that have got as far as training."""
        return [start for start in read_starts(self.run) if "newest_checkpoint" in start]

    def whys(self) -> list[str]:
        """Return why every start began."""
        return [start["why"] for start in self.starts()]

    def seconds_running(self) -> float:
        """Return since when SLURM has had the job running; if it has it no more, for ever."""
        facts = self.facts()
        if facts["JobState"] != "RUNNING":
            return math.inf
        return (datetime.now() - datetime.fromisoformat(facts["StartTime"])).total_seconds()

    def ranks(self) -> dict[int, int]:
        """Return the process of every rank that runs."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = set((process / "cmdline").read_bytes().split(b"\0"))
                is_rank = {pretrain_rank.__name__.encode(), str(self.run).encode()} <= words and b"srun" not in words
                environment = (process / "environ").read_bytes() if is_rank else b""
                if rank := re.search(rb"\0SLURM_PROCID=(\d+)\0", environment):
                    found[int(rank[1])] = int(process.name)
        return found


@pytest.fixture(scope="session")
def make_pretraining(small: ModuleType) -> Callable[[Path], Path]:
    """Fills a folder with store, schedule (of `Job.STEPS` steps), recipe and profiles, always the same."""

    def make(folder: Path) -> Path:
        small.make_data(folder, pseudo_epochs=4, positions=Job.STEPS * small.GLOBAL_BATCH // 4)
        small.write_recipe(folder / "recipe.yaml", small.dino_recipe())
        (folder / "profile.yaml").write_text(PROFILE)
        (folder / "gpus.yaml").write_text(GPUS)
        return folder

    return make


@pytest.fixture(scope="session")
def pretraining(make_pretraining: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One such folder."""
    return make_pretraining(tmp_path_factory.mktemp("pretraining"))


@pytest.fixture(scope="session")
def hpcssl_in(slurm: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Returns a command of hpcssl in some folder beside the cluster; in this process, which has PyTorch already."""

    def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
        out, err, before, words = StringIO(), StringIO(), Path.cwd(), [str(word) for word in arguments]
        with patch.dict(os.environ, slurm), redirect_stdout(out), redirect_stderr(err):
            os.chdir(folder)
            try:
                code = main(words)
            finally:
                os.chdir(before)
        return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def pretrain(hpcssl_in: Callable, pretraining: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Returns `hpcssl pretrain` of the recipe with arguments, in the folder for it or another one like it."""

    def run(out: str, *arguments: object, folder: Path = pretraining) -> subprocess.CompletedProcess[str]:
        data = ("--store", "store", "--schedule", "schedule", "--out", out)
        return hpcssl_in(folder, "pretrain", "recipe.yaml", *data, *arguments)

    return run


@pytest.fixture
def submit(pretrain: Callable, pretraining: Path, slurm: dict[str, str]) -> Iterator[Callable[..., Job]]:
    """Returns the submission of a run as a job; all of its jobs end with the test."""
    jobs = []

    def run(out: str, *arguments: object, folder: Path = pretraining, command: Callable = pretrain) -> Job:
        done = command(out, "--cluster", "slurm", "--profile", "profile.yaml", *arguments, folder=folder)
        assert done.returncode == 0, done.stderr
        found = re.match(r"job (\d+) submitted", done.stdout)
        assert found, done.stdout
        jobs.append(Job(found[1], folder / out, slurm))
        return jobs[-1]

    yield run
    for job in jobs:
        subprocess.run(["scancel", job.id], env=slurm, check=False)


def send(number: signal.Signals, ranks: dict[int, int]) -> None:
    """Send a signal to the processes of some ranks that are still there."""
    for pid in ranks.values():
        with suppress(ProcessLookupError):
            os.kill(pid, number)


@dataclass(frozen=True)
class Held:
    """Where a run stands still: its step, and the process of every rank."""

    step: int
    ranks: dict[int, int]


@pytest.fixture
def thaw() -> Callable[..., None]:
    """Lets what is held go on."""

    def go_on(*held: Held) -> None:
        for one in held:
            send(signal.SIGCONT, one.ranks)

    return go_on


@pytest.fixture
def hold(small: ModuleType) -> Iterator[Callable[..., list[Held]]]:
    """Lets jobs stand still some steps into a start, counted from 1, lest they be over before they are disturbed.

    None of the processes outlives the test.
    """
    frozen: list[int] = []

    def stop(*jobs: Job, start: int = 1) -> list[Held]:
        ranks: dict[Job, dict[int, int]] = {job: {} for job in jobs}
        todo, until = list(jobs), time.monotonic() + Job.PATIENCE_S
        while todo:
            for job in todo.copy():
                assert time.monotonic() < until, f"job {job.id} is not that far; its log:\n{job.log()}"
                begun = job.starts()[start - 1 :]
                if begun and len(ranks[job]) < begun[0]["world_size"]:
                    ranks[job] = job.ranks()
                if begun and job.step() >= (begun[0]["newest_checkpoint"] or 0) + Job.EARLY:
                    send(signal.SIGSTOP, ranks[job])
                    frozen.extend(ranks[job].values())
                    todo.remove(job)
            time.sleep(0.05)
        return [Held(job.step(), ranks[job]) for job in jobs]

    yield stop
    small.kill_all([pid for pid in frozen if small.alive(pid)])
