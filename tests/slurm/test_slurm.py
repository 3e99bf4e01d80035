"""`hpcssl pretrain --cluster slurm` on a real SLURM: two nodes of two ranks each, disturbed in the ways SLURM has."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from hpcssl.runs.checkpoint import checkpoint_path, checkpoint_steps, load_checkpoint
from hpcssl.runs.metrics import last_record, read_metrics

STEPS = 120
EARLY = 10  # steps to wait for before a run is disturbed
TIMES = [
    "tiles_per_s",
    "read_s",
    "decode_s",
    "augment_s",
    "read_wait_s",
    "memory_gib",
    "time",
]  # of a metrics line: when, not what
PROFILE = "gpus_per_node: 0\ncpus_per_gpu: 1\ntimeout_min: 60\n"
TWO_BY_TWO = ("--nodes", 2, "--gpus-per-node", 2)
JOB_S = 150  # for a job of this size to come to its end on a busy machine

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Job:
    """A submitted run."""

    id: str
    run: Path
    env: dict[str, str]

    def tell(self, *command: str) -> str:
        """Run one of SLURM's commands and return its words."""
        return subprocess.run(command, env=self.env, check=True, capture_output=True, text=True, timeout=30).stdout

    def state(self) -> str:
        """Return SLURM's word for the job's state."""
        found = re.search(r"JobState=(\S+)", self.tell("scontrol", "show", "job", self.id))
        assert found
        return found[1]

    def wait_for_step(self, step: int) -> int:
        """Wait until the run has made so many steps; returns how many it has made."""
        return self._wait(lambda: (last_record(self.run) or {"step": 0})["step"], lambda done: done >= step)

    def wait_for_end(self) -> str:
        """Wait until SLURM has ended the job, requeues included; returns its state."""
        going = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
        return self._wait(self.state, lambda state: state not in going)

    def _wait(self, look: Callable, enough: Callable):
        until = time.monotonic() + JOB_S
        while not enough(seen := look()):
            assert time.monotonic() < until, f"job {self.id} still at {seen} after {JOB_S} s; its log:\n{self.log()}"
            time.sleep(0.2)
        return seen

    def log(self) -> str:
        """Return what rank 0 and SLURM have written."""
        file = self.run / "logs" / f"{self.id}_0_log.err"
        return file.read_text(encoding="utf-8") if file.exists() else ""

    def begun_at(self) -> list[int]:
        """Return the step that every start of the job began at."""
        return [
            int(step) for step in re.findall(rf"^\[rank 0\] begins at step (\d+) of {STEPS} with", self.log(), re.M)
        ]


@pytest.fixture(scope="module")
def work(small, tmp_path_factory) -> Path:
    """A folder with store, schedule (of 120 steps), recipe and profile."""
    folder = tmp_path_factory.mktemp("work")
    small.make_data(folder, pseudo_epochs=4, positions=STEPS * small.GLOBAL_BATCH // 4)
    small.write_recipe(folder / "recipe.yaml", small.dino_recipe())
    (folder / "profile.yaml").write_text(PROFILE)
    return folder


@pytest.fixture(scope="module")
def pretrain(small, work, slurm):
    """Returns `hpcssl pretrain` with arguments, run in the work folder or another one like it."""

    def run(out: str, *arguments: object, folder: Path = work) -> subprocess.CompletedProcess[str]:
        data = ("--store", "store", "--schedule", "schedule", "--out", out)
        command = small.commandline("pretrain", "recipe.yaml", *data, *arguments)
        return subprocess.run(
            command, cwd=folder, env=slurm, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
        )

    return run


@pytest.fixture(scope="module")
def submit(pretrain, work, slurm):
    """Returns the submission of a run as a job; all of its jobs end with the module."""
    jobs = []

    def run(out: str, *arguments: object, folder: Path = work) -> Job:
        done = pretrain(out, "--cluster", "slurm", "--profile", "profile.yaml", *arguments, folder=folder)
        assert done.returncode == 0, done.stderr
        found = re.match(r"job (\d+) submitted", done.stdout)
        assert found, done.stdout
        jobs.append(Job(found[1], folder / out, slurm))
        return jobs[-1]

    yield run
    for job in jobs:
        subprocess.run(["scancel", job.id], env=slurm, check=False)


@pytest.fixture(scope="module")
def undisturbed(submit) -> Path:
    """The run of four ranks on two nodes that nothing disturbs."""
    job = submit("undisturbed", *TWO_BY_TWO)
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert job.begun_at() == [0]
    return job.run


def _starts(run: Path) -> list[tuple[int, int]]:
    """Return (generation, world size) of every start in the restart history."""
    lines = [json.loads(line) for line in (run / "restarts.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["generation"], line["world_size"]) for line in lines]


def _assert_same_run(run: Path, reference: Path) -> None:
    """Check that two runs end in the same bits after the same trace."""
    assert read_metrics(run).drop(columns=TIMES).equals(read_metrics(reference).drop(columns=TIMES))
    one, other = (load_checkpoint(checkpoint_path(folder, STEPS))[0] for folder in (run, reference))
    assert one.keys() == other.keys()
    assert not [name for name, tensor in other.items() if not torch.equal(one[name], tensor)]


def test_two_nodes_give_the_losses_of_this_machine(pretrain, undisturbed, work):
    local = pretrain("local", "--cluster", "local", "--gpus-per-node", 4)
    assert local.returncode == 0, local.stderr
    slurm, here = (read_metrics(folder)["loss"].to_numpy() for folder in (undisturbed, work / "local"))
    assert len(slurm) == len(here) == STEPS
    assert len(set(here)) > STEPS // 2, "the losses move, so that equal ones say something"
    np.testing.assert_allclose(slurm, here, rtol=1e-5)
    assert _starts(undisturbed) == [(1, 4)]


def test_requeued_by_an_administrator_it_goes_on(submit, undisturbed):
    job = submit("requeued", *TWO_BY_TWO)
    reached = job.wait_for_step(EARLY)
    job.tell("scontrol", "requeue", job.id)
    assert job.wait_for_end() == "COMPLETED", job.log()
    first, second = job.begun_at()
    assert first == 0
    assert reached <= second < STEPS, "what it saved when SLURM ended it"
    assert _starts(job.run) == [(1, 4), (2, 4)]
    assert "Traceback" not in job.log(), job.log()
    assert not list(job.run.glob("logs/failure-*")), "nothing has failed"
    _assert_same_run(job.run, undisturbed)


def test_warned_it_saves_and_requeues_itself(submit, undisturbed):
    """What happens before the time limit and before preemption; the cluster requeues only jobs that ask for it."""
    job = submit("warned", *TWO_BY_TWO)
    reached = job.wait_for_step(EARLY)
    job.tell("scancel", "--signal=USR2", job.id)  # to the steps, as SLURM's warning is
    assert job.wait_for_end() == "COMPLETED", job.log()
    first, second = job.begun_at()
    assert first == 0
    assert reached <= second < STEPS, "what it saved where it stopped"
    assert _starts(job.run) == [(1, 4), (2, 4)]
    assert "Traceback" not in job.log(), job.log()
    assert not list(job.run.glob("logs/failure-*")), "nothing has failed"
    _assert_same_run(job.run, undisturbed)


def test_cancelled_it_saves_and_stays_away(submit):
    job = submit("cancelled", "--nodes", 1, "--gpus-per-node", 1)
    reached = job.wait_for_step(EARLY)
    job.tell("scancel", job.id)  # the command that the submission tells
    assert job.wait_for_end() == "CANCELLED", job.log()
    assert max(checkpoint_steps(job.run)) >= reached
    time.sleep(1)
    assert job.state() == "CANCELLED"
    assert _starts(job.run) == [(1, 1)]
    assert "Traceback" not in job.log(), job.log()


def test_names_with_blanks_and_quotes(submit, work, tmp_path):
    folder = tmp_path / 'it\'s a "quoted" $place'
    folder.mkdir()
    for name in ("store", "schedule", "recipe.yaml", "profile.yaml"):
        (folder / name).symlink_to(work / name)
    job = submit('my "first" run', "--set", "stop_after=0.5", folder=folder)
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert read_metrics(job.run)["step"].tolist() == list(range(1, STEPS // 8 + 1))


def test_a_refusal_is_told_in_slurms_words(pretrain):
    done = pretrain("refused", "--cluster", "slurm", "--profile", "profile.yaml", "--partition", "nowhere")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("hpcssl: error: SLURM refused the job: ")
    assert "invalid partition specified: nowhere" in line
