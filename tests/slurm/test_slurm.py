"""`hpcssl pretrain --cluster slurm` on a real SLURM: two nodes of two ranks each, disturbed in the ways SLURM has."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from hpcssl.runs.checkpoint import checkpoint_path, checkpoint_steps, load_checkpoint
from hpcssl.runs.history import read_starts
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
PAIR = ("--nodes", 2, "--gpus-per-node", 1)
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
        going = ("PENDING", "CONFIGURING", "RUNNING", "SIGNALING", "COMPLETING", "REQUEUED")
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

    def starts(self) -> list[dict]:
        """Return the restart history: the starts that have got as far as training."""
        return [start for start in read_starts(self.run) if "newest_checkpoint" in start]

    def whys(self) -> list[str]:
        """Return why every start began."""
        return [start["why"] for start in self.starts()]

    def newest_checkpoint(self) -> int:
        """Return the step of the newest checkpoint; -1 before the first."""
        return max(checkpoint_steps(self.run), default=-1)

    def seconds_running(self) -> float:
        """Return since when SLURM has had the job running."""
        found = re.search(r" StartTime=(\d\S+)", self.tell("scontrol", "show", "job", self.id))
        return (datetime.now() - datetime.fromisoformat(found[1])).total_seconds() if found else 0.0

    def ranks(self) -> dict[int, int]:
        """Return the process of every rank that runs."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (process / "cmdline").read_bytes().split(b"\0")
                if b"hpcssl.jobs.rank" in words and str(self.run).encode() in words and b"srun" not in words:
                    rank = re.search(rb"\0SLURM_PROCID=(\d+)\0", (process / "environ").read_bytes())
                    if rank:
                        found[int(rank[1])] = int(process.name)
        return found


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
    """The run of two ranks on two nodes that nothing disturbs."""
    job = submit("undisturbed", *PAIR)
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert job.whys() == ["first start"]
    return job.run


def _assert_same_run(run: Path, reference: Path) -> None:
    """Check that two runs end in the same bits after the same trace."""
    assert read_metrics(run).drop(columns=TIMES).equals(read_metrics(reference).drop(columns=TIMES))
    one, other = (load_checkpoint(checkpoint_path(folder, STEPS))[0] for folder in (run, reference))
    assert one.keys() == other.keys()
    assert not [name for name, tensor in other.items() if not torch.equal(one[name], tensor)]


def _send(number: signal.Signals, ranks: dict[int, int]) -> None:
    """Send a signal to the processes of some ranks that are still there."""
    for pid in ranks.values():
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def test_two_nodes_of_two_give_the_losses_of_this_machine(submit, pretrain, work):
    job = submit("two-by-two", *TWO_BY_TWO)
    assert job.wait_for_end() == "COMPLETED", job.log()
    (start,) = job.starts()
    assert (start["generation"], start["world_size"], start["nodes"]) == (1, 4, ["node1", "node2"])
    local = pretrain("local", "--cluster", "local", "--gpus-per-node", 2)
    assert local.returncode == 0, local.stderr
    slurm, here = (read_metrics(folder)["loss"].to_numpy() for folder in (job.run, work / "local"))
    assert len(slurm) == len(here) == STEPS
    assert len(set(here)) > STEPS // 2, "the losses move, so that equal ones say something"
    np.testing.assert_allclose(slurm, here, rtol=1e-5)


def test_requeued_by_an_administrator_it_goes_on(submit, undisturbed):
    job = submit("requeued", *PAIR)
    reached = job.wait_for_step(EARLY)
    job.tell("scontrol", "requeue", job.id)
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert job.whys() == ["first start", "requeued by an administrator or by hand"]
    assert reached <= job.starts()[1]["newest_checkpoint"] < STEPS, "what it saved when SLURM ended it"
    assert "Traceback" not in job.log(), job.log()
    assert not list(job.run.glob("logs/failure-*")), "nothing has failed"
    _assert_same_run(job.run, undisturbed)


def test_preempted_it_saves_and_makes_room_and_comes_back(submit, undisturbed):
    """The cluster requeues only jobs that ask for it, and warns them with the signal that they asked for."""
    job = submit("preempted", *PAIR)
    reached = job.wait_for_step(EARLY)
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "srun sleep 1")
    job.tell("sbatch", "--wait", *urgent)
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert job.whys() == ["first start", "preempted"]
    assert reached <= job.starts()[1]["newest_checkpoint"] < STEPS, "what it saved where it stopped"
    assert "Traceback" not in job.log(), job.log()
    assert not list(job.run.glob("logs/failure-*")), "nothing has failed"
    _assert_same_run(job.run, undisturbed)


@pytest.mark.long
def test_out_of_time_it_saves_and_goes_on(submit, work, freeze, undisturbed):
    """Its ranks stand still until SLURM has warned it, so that it cannot be done before."""
    (work / "short.yaml").write_text(PROFILE.replace("timeout_min: 60", "timeout_min: 1\nsignal_lead_s: 20"))
    job = submit("timed-out", *PAIR, "--profile", "short.yaml")
    job.wait_for_step(EARLY)
    ranks = job.ranks()
    freeze(ranks)
    while len(job.starts()) == 1 and job.seconds_running() < 45:  # limits are looked at every 30 s
        time.sleep(1)
    _send(signal.SIGCONT, ranks)
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert job.whys()[:2] == ["first start", "time limit"]
    _assert_same_run(job.run, undisturbed)


def test_a_killed_rank_ends_the_job_at_once_and_it_goes_on(small, submit, undisturbed):
    job = submit("killed", *PAIR, "--set", f"checkpoint.every_min={0.5 / 60}")
    small.wait_until(lambda: job.newest_checkpoint() >= EARLY, JOB_S, "a checkpoint")
    ranks = job.ranks()
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[1], signal.SIGKILL)
    small.wait_until(lambda: not any(map(small.alive, ranks.values())), 20, "the other ranks end")
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert job.whys() == ["first start", "rank 1 died on node2: Killed"]
    assert EARLY <= job.starts()[1]["newest_checkpoint"] < STEPS
    _assert_same_run(job.run, undisturbed)


def test_it_stops_with_the_cause_after_three_failures_without_progress(submit):
    job = submit("in-vain", "--nodes", 1, "--gpus-per-node", 1)
    (job.run / "config.yaml").write_text("objective: dino\n")  # which no start can use
    assert job.wait_for_end() == "FAILED", job.log()
    assert job.log().count("[hpcssl] start ") == 3
    said = job.log().splitlines()[-1]
    assert "failed 3 times without getting beyond step 0; the last time: rank 0" in said
    assert "KeyError" in said


@pytest.fixture
def freeze(small):
    """Lets processes stand still, as those of a node that hangs; none of them outlives the test."""
    frozen: dict[int, int] = {}

    def stop(ranks: dict[int, int]) -> None:
        frozen.update(ranks)
        _send(signal.SIGSTOP, ranks)

    yield stop
    small.kill_all([pid for pid in frozen.values() if small.alive(pid)])


@pytest.mark.long
def test_a_node_fails_and_it_goes_on_with_the_other_and_then_with_both(small, submit, slurm, freeze, undisturbed):
    often = "checkpoint.every_min=1e-5"  # after every step, which also makes the run longer
    job = submit("elastic", "--gpus", "1..2", "--gpus-per-node", 1, "--set", often)
    job.wait_for_step(EARLY)
    frozen = {1: job.ranks()[1]}
    freeze(frozen)
    os.kill(int((Path(slurm["SLURM_ROOT"]) / "pid" / "node2").read_text()), signal.SIGKILL)
    small.wait_until(lambda: len(job.starts()) == 2, JOB_S, "the second start")
    assert job.whys()[1] == "a node failed: node2"
    alone_at = job.starts()[1]["newest_checkpoint"]
    assert alone_at >= EARLY - 1
    small.wait_until(lambda: (last_record(job.run) or {}).get("processes") == 1, JOB_S, "a step on one node")
    reached = job.wait_for_step(alone_at + EARLY)
    _send(signal.SIGCONT, frozen)
    subprocess.run(["slurmd", "-N", "node2", "-f", slurm["SLURM_CONF"]], env=slurm, check=True)
    small.wait_until(lambda: "node2" in job.tell("sinfo", "-h", "-N", "-t", "idle", "-o", "%N"), 60, "node2 is back")
    job.tell("scontrol", "requeue", job.id)
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert job.whys()[2] == "requeued by an administrator or by hand"
    assert [start["world_size"] for start in job.starts()] == [2, 1, 2]
    assert [start["nodes"] for start in job.starts()] == [["node1", "node2"], ["node1"], ["node1", "node2"]]
    assert job.starts()[2]["newest_checkpoint"] >= reached
    assert not any(map(small.alive, frozen.values())), "the rank that stood still has found out that it is too late"
    losses, expected = (read_metrics(run)["loss"].to_numpy() for run in (job.run, undisturbed))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_cancelled_it_saves_and_stays_away(submit):
    job = submit("cancelled", "--nodes", 1, "--gpus-per-node", 1)
    reached = job.wait_for_step(EARLY)
    job.tell("scancel", job.id)  # the command that the submission tells
    assert job.wait_for_end() == "CANCELLED", job.log()
    assert max(checkpoint_steps(job.run)) >= reached
    time.sleep(1)
    assert job.state() == "CANCELLED"
    assert job.whys() == ["first start"]
    assert "Traceback" not in job.log(), job.log()


def test_names_with_blanks_and_quotes(submit, work, tmp_path):
    folder = tmp_path / 'it\'s a "quoted" $place'
    folder.mkdir()
    for name in ("store", "schedule", "recipe.yaml", "profile.yaml"):
        (folder / name).symlink_to(work / name)
    job = submit('my "first" run', "--set", "stop_after=0.5", folder=folder)
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert read_metrics(job.run)["step"].tolist() == list(range(1, STEPS // 8 + 1))


@pytest.mark.parametrize(
    ("asked", "words", "fix"),
    [
        (("--partition", "nowhere"), "nvalid partition", "there are main, urgent"),
        (("--profile", "gpus.yaml"), "nvalid generic resource", "main has 2 nodes of 2 cores"),
        (
            ("--gpus", "6..12", "--gpus-per-node", 6),
            "node configuration is not available",
            "main has 2 nodes of 2 cores",
        ),
    ],
)
def test_a_refusal_is_told_in_slurms_words_with_the_fix(pretrain, work, asked, words, fix):
    (work / "gpus.yaml").write_text(PROFILE.replace("gpus_per_node: 0", "gpus_per_node: 1"))
    done = pretrain("refused", "--cluster", "slurm", "--profile", "profile.yaml", *asked)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("hpcssl: error: SLURM refused the job: ")
    assert words in line
    assert fix in line
    assert not (work / "refused").exists(), "no run is left that never was"


def test_a_dry_run_prints_the_batch_script_and_writes_nothing(pretrain, work):
    before = sorted(work.rglob("*"))
    done = pretrain("dry", "--cluster", "slurm", "--profile", "profile.yaml", *TWO_BY_TWO, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "2 nodes x 2 processes, 3 tiles of the global batch of 12 each" in done.stdout
    for line in ("#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=2", "#SBATCH --requeue", "#SBATCH --time=60"):
        assert line in done.stdout.splitlines()
    assert "--kill-on-bad-exit=1" in done.stdout
    assert sorted(work.rglob("*")) == before


def test_the_most_nodes_are_waited_for_if_they_come_soon(pretrain, slurm):
    """Of two nodes one is busy, for two minutes by its job's time limit."""
    busy = ("sbatch", "--parsable", "--time=2", "--nodelist=node2", "--exclusive", "--output=/dev/null")
    job = subprocess.run((*busy, "--wrap", "sleep 120"), env=slurm, check=True, capture_output=True, text=True)
    try:
        asked = ("--cluster", "slurm", "--profile", "profile.yaml", "--gpus", "2..4", "--gpus-per-node", 2, "--dry-run")
        scripts = [pretrain("dry", *asked, "--wait-min", minutes).stdout for minutes in (5, 0)]
    finally:
        subprocess.run(["scancel", job.stdout.strip()], env=slurm, check=True)
    held_back = [re.search(r"#SBATCH --begin=now\+(\d+)", script) for script in scripts]
    assert held_back[0], scripts[0]
    assert 0 < int(held_back[0][1]) <= 150
    assert not held_back[1], "whatever there is now, rather than waiting"
    assert all("#SBATCH --nodes=1-2" in script for script in scripts)


def test_from_the_run_folder_alone(small, submit, work, slurm):
    """Logs and everything of submitit's are gone; the run is listed, submitted again, and cancelled."""

    def jobs(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = small.commandline("jobs", *arguments)
        return subprocess.run(command, cwd=work, env=slurm, capture_output=True, text=True, timeout=60, check=False)

    job = submit("listed", "--nodes", 1, "--gpus-per-node", 1)
    job.wait_for_step(EARLY)
    listed = jobs("list", "listed").stdout
    assert re.search(rf"listed +running +{job.id} +\d+ of {STEPS} .* node1 +1 +0", listed), listed
    assert "[rank 0] begins at step 0" in jobs("logs", "listed").stdout
    assert jobs("cancel", "listed").returncode == 0
    assert job.wait_for_end() == "CANCELLED"
    shutil.rmtree(job.run / "logs")
    (job.run / "logs").mkdir()
    done = jobs("requeue", "listed")
    assert done.returncode == 0, done.stderr
    found = re.match(r"job (\d+) submitted", done.stdout)
    assert found
    second = Job(found[1], job.run, slurm)
    assert second.wait_for_end() == "COMPLETED", second.log()
    assert second.starts()[1]["newest_checkpoint"] >= EARLY
    assert re.search(rf"listed +finished +{second.id} +{STEPS} of {STEPS} ", jobs("list", ".").stdout)
