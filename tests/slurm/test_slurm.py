"""`hpcssl pretrain --cluster slurm` on a real SLURM: two nodes, disturbed in the ways SLURM has."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hpcssl.runs.trace import read_metrics
from hpcssl.schedule.file import Schedule
from hpcssl.stores.kinds import open_store

PAIR = ("--nodes", 2, "--gpus-per-node", 1)
OFTEN = ("--set", "checkpoint.every_min=1e-5")  # after every step

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def undisturbed(small, pretraining) -> Path:
    """The run of two ranks that nothing disturbs; on this machine, where its bits are those of two nodes."""
    data = ("--store", "store", "--schedule", "schedule", "--out", "undisturbed")
    command = small.commandline("pretrain", "recipe.yaml", *data, "--gpus-per-node", 2)
    subprocess.run(command, cwd=pretraining, env=small.environment(), check=True, timeout=300)
    return pretraining / "undisturbed"


def test_two_nodes_of_two_give_the_losses_of_this_machine(submit, undisturbed):
    """With two GPUs on each node, as far as SLURM is concerned; the ranks say that they see none."""
    job = submit("two-by-two", "--nodes", 2, "--profile", "gpus.yaml")
    assert job.wait_for_end() == "COMPLETED", job.log()
    (start,) = job.starts()
    assert (start["generation"], start["world_size"], start["nodes"]) == (1, 4, ["node1", "node2"])
    assert "gpu:2" in job.facts()["TresPerNode"]
    assert "GPUs of the first node: 2" in job.log().splitlines()
    assert "[rank 0] WARNING: its GPU was asked for, and PyTorch sees none here" in job.log()
    slurm, here = (read_metrics(folder)["loss"].to_numpy() for folder in (job.run, undisturbed))
    assert len(slurm) == len(here) == job.STEPS
    assert len(set(here)) > job.STEPS // 2, "the losses move, so that equal ones say something"
    np.testing.assert_allclose(slurm, here, rtol=1e-5)


def test_preempted_or_requeued_it_saves_and_makes_room_and_comes_back(small, submit, hold, thaw, undisturbed):
    """The cluster requeues only jobs that ask for it, and warns them with the signal that they asked for.

    One partition has a grace time, in which the run goes by itself; from the other one it is taken away.
    """
    warned, taken = jobs = [submit("warned", *PAIR), submit("taken", *PAIR, "--partition", "abrupt")]
    first = hold(*jobs)
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "srun sleep 1")
    warned.tell("sbatch", *urgent)
    warned.wait(lambda: warned.facts().get("PreemptTime", "over already") != "None")
    taken.wait(lambda: taken.state() != "RUNNING")
    thaw(*first)
    second = hold(*jobs, start=2)
    for job in jobs:
        job.tell("scontrol", "requeue", job.id)
    thaw(*second)
    for job, *reached in zip(jobs, first, second, strict=True):
        assert job.wait_for_end() == "COMPLETED", job.log()
        assert job.whys() == ["first start", "preempted", "requeued by an administrator or by hand"]
        saved = [start["newest_checkpoint"] for start in job.starts()[1:]]
        assert all(held.step <= step < job.STEPS for held, step in zip(reached, saved, strict=True)), "all of it"
        assert "Traceback" not in job.log(), job.log()
        assert not list(job.run.glob("logs/failure-*")), "nothing has failed"
        small.assert_same_run(job.run, undisturbed, job.STEPS)


def _waits(number: signal.Signals, pid: int) -> bool:
    """Return whether a process that stands still will find a signal when it goes on."""
    (waiting,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("ShdPnd:"))
    return bool(int(waiting.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.long
def test_out_of_time_it_goes_on(small, submit, make_pretraining, hold, thaw, undisturbed, tmp_path):
    """One run stands still until SLURM has warned it; another cannot read a tile, and SLURM has to end it."""

    def limit(job, state="PENDING", *, minutes: int) -> None:
        job.wait(job.state, lambda now: now == state)
        job.tell("scontrol", "update", f"JobId={job.id}", f"TimeLimit={minutes}")

    profile = "gpus_per_node: 0\ncpus_per_gpu: 1\nsignal_lead_s: 20\ntimeout_min: "
    for minutes in (1, 60):
        (make_pretraining(tmp_path / str(minutes)) / "profile.yaml").write_text(f"{profile}{minutes}\n")
    tiles = open_store(tmp_path / "1" / "store"), Schedule.open(tmp_path / "1" / "schedule").tiles_at(0, 1)
    tile = tiles[0].file_of(int(tiles[1][0]))
    content = tile.read_bytes()
    tile.unlink()
    os.mkfifo(tile)
    long = (*PAIR, "--set", "train.hang_s=600")
    stuck, warned = jobs = [submit("run", *long, folder=tmp_path / minutes) for minutes in ("1", "60")]
    (held,) = hold(warned)
    limit(warned, "RUNNING", minutes=int(warned.seconds_running() + 30) // 60 + 1)
    stuck.wait_for_start(1)
    ranks = stuck.ranks()
    warned.wait(lambda: warned.state() != "RUNNING" or _waits(signal.SIGUSR2, held.ranks[0]))
    thaw(held)
    limit(warned, minutes=60)
    stuck.wait(lambda: not any(map(small.alive, ranks.values())))
    tile.unlink()
    tile.write_bytes(content)
    limit(stuck, minutes=60)
    for job in jobs:
        assert job.wait_for_end() == "COMPLETED", job.log()
        assert job.whys()[1] == "time limit"
        small.assert_same_run(job.run, undisturbed, job.STEPS)
    assert warned.starts()[1]["newest_checkpoint"] >= held.step
    assert stuck.starts()[1]["newest_checkpoint"] == 0


def test_a_killed_rank_ends_the_job_at_once_and_it_goes_on(small, submit, hold, thaw, undisturbed):
    """One by its node's system, and all by `scancel` of the step that they are."""
    job = submit("killed", *PAIR, *OFTEN)
    (held,) = hold(job)
    assert sorted(held.ranks) == [0, 1]
    thaw(replace(held, ranks={0: held.ranks[0]}))
    os.kill(held.ranks[1], signal.SIGKILL)
    small.wait_until(lambda: not any(map(small.alive, held.ranks.values())), 20, "the other ranks end")
    hold(job, start=2)
    job.tell("scancel", "--signal=KILL", f"{job.id}.0")
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert job.whys()[:2] == ["first start", "rank 1 died on node2: Killed"]
    assert job.whys()[2] in [f"rank {rank} died on node{rank + 1}: Killed" for rank in (0, 1)]
    assert 0 < job.starts()[1]["newest_checkpoint"] < job.starts()[2]["newest_checkpoint"] < job.STEPS
    small.assert_same_run(job.run, undisturbed, job.STEPS)


def test_it_stops_with_the_cause_after_three_failures_without_progress(submit):
    job = submit("in-vain", "--nodes", 1, "--gpus-per-node", 1)
    (job.run / "config.yaml").write_text("objective: dino\n")  # which no start can use
    assert job.wait_for_end() == "FAILED", job.log()
    assert job.log().count("[hpcssl] start ") == 3
    said = job.log().splitlines()[-1]
    assert "failed 3 times without getting beyond step 0; the last time: rank 0" in said
    assert "global_batch is missing" in said


@pytest.mark.long
def test_a_node_fails_and_it_goes_on_with_the_other_and_then_with_both(small, submit, slurm, hold, thaw, undisturbed):
    """First one whose rank hangs as well; then that of rank 0 and the batch script, which live on."""

    def end_daemon(node: str) -> None:
        os.kill(int((Path(slurm["SLURM_ROOT"]) / "pid" / node).read_text()), signal.SIGKILL)

    def begin_daemon(node: str) -> None:
        subprocess.run(["slurmd", "-N", node, "-f", slurm["SLURM_CONF"]], env=slurm, check=True)
        job.wait(lambda: node in job.tell("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N"))

    job = submit("elastic", "--gpus", "1..2", "--gpus-per-node", 1, *OFTEN)
    (hanging,) = hold(job)
    thaw(replace(hanging, ranks={0: hanging.ranks[0]}))
    end_daemon("node2")
    (alone,) = hold(job, start=2)
    begin_daemon("node2")
    job.tell("scontrol", "requeue", job.id)
    thaw(hanging, alone)

    (both,) = hold(job, start=3)  # and rank 1 goes on doing so, so that there is something left to do
    thaw(replace(both, ranks={0: both.ranks[0]}))
    end_daemon("node1")
    job.wait_for_start(4)
    small.wait_until(lambda: not any(map(small.alive, both.ranks.values())), 60, "what nobody ends has found out")
    begin_daemon("node1")
    assert job.wait_for_end() == "COMPLETED", job.log()
    causes = ["a node failed: node2", "requeued by an administrator or by hand", "a node failed: node1"]
    assert job.whys() == ["first start", *causes]
    assert [start["world_size"] for start in job.starts()] == [2, 1, 2, 1]
    nodes = [["node1", "node2"], ["node1"], ["node1", "node2"], ["node2"]]
    assert [start["nodes"] for start in job.starts()] == nodes
    reached = [held.step for held in (hanging, alone, both)]
    saved = [start["newest_checkpoint"] for start in job.starts()[1:]]
    assert all(step - 1 <= found for step, found in zip(reached, saved, strict=True)), "no more than a step is lost"
    assert not any(map(small.alive, hanging.ranks.values())), "the rank that stood still has found out it is too late"
    losses, expected = (read_metrics(run)["loss"].to_numpy() for run in (job.run, undisturbed))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
