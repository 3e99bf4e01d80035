"""The batch script of a run, with SLURM's commands played by scripts."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace

import pytest

from hpcssl.jobs.batch_script import OUT_OF_TIME, requeue_before_the_limit
from hpcssl.jobs.cluster import Batch
from hpcssl.jobs.profile import Profile, Resources


@pytest.fixture
def batch(tmp_path, commands):
    """A batch job whose ranks are `true`, on a SLURM of shell scripts."""
    commands(
        srun='while [ "${1#-}" != "$1" ]; do case $1 in --output|--error) shift;; esac; shift; done; exec "$@"',
        scontrol=f'echo "$@" >>{tmp_path}/asked; [ $(wc -l <{tmp_path}/asked) -gt 1 ]',
    )
    resources = Resources(profile=Profile(gpus_per_node=0, cpus_per_gpu=1, timeout_min=1, signal_lead_s=30))
    return Batch(
        name="n", token="t", folder=tmp_path, resources=resources, command=("true",), afterwards=("sh", "-c", "exit $0")
    )


def _run(batch: Batch, *, sleep: str = "exec /bin/sleep $1") -> subprocess.CompletedProcess[str]:
    script = batch.folder / "bin" / "sleep"
    script.write_text(f"#!/bin/sh\n{sleep}\n")
    script.chmod(0o755)
    env = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1"}
    with (batch.folder / "log").open("w") as log:  # a file, which what is left behind may keep open
        return subprocess.run(
            ["bash"], input=batch.script(), env=env, stdout=log, stderr=log, text=True, timeout=60, check=False
        )


@pytest.mark.parametrize("code", [0, 3])
def test_the_job_ends_with_what_its_last_command_says(small, batch, code):
    pid = batch.folder / "pid"
    command = ("sh", "-c", f"until [ -s {pid} ]; do /bin/sleep 0.1; done; exit {code}")
    assert _run(replace(batch, command=command), sleep=f"echo $$ >{pid}; exec /bin/sleep $1").returncode == code
    small.wait_until(lambda: not small.alive(int(pid.read_text())), 10, "nothing of it is left")
    assert not (batch.folder / "asked").exists(), "the timer was not waited for"


def test_before_the_time_limit_it_asks_for_another_start_until_slurm_agrees(batch):
    """Sleeping is noted, and over at once."""
    batch = replace(batch, command=("/bin/sleep", "3"))
    assert _run(batch, sleep=f"echo $1 >>{batch.folder}/slept").returncode == 0
    assert (batch.folder / "slept").read_text().split() == ["50", "5"], "10 s before the limit, then again"
    assert (batch.folder / "asked").read_text().splitlines() == ["requeue 7"] * 2
    assert OUT_OF_TIME in (batch.folder / "log").read_text().splitlines()


def test_a_timer_that_is_ended_by_slurms_signal_asks_for_nothing(batch):
    """SLURM's signal goes to all processes of the job, and may reach the sleep before the shell that waits for it."""
    batch = replace(batch, command=("/bin/sleep", "1"))
    assert _run(batch, sleep="kill -TERM $$").returncode == 0
    assert not (batch.folder / "asked").exists()
    assert OUT_OF_TIME not in (batch.folder / "log").read_text()


def test_the_timer_is_later_than_the_warning_and_earlier_than_the_limit():
    for lead_s in (1, 2, 3, 59):
        line = requeue_before_the_limit(Profile(timeout_min=1, signal_lead_s=lead_s))[0]
        after_s = int(line.partition("; sleep ")[2].split()[0])
        assert 60 - lead_s <= after_s < 60


@pytest.mark.parametrize(("there_are", "used"), [(3, 3), (2, 1), (1, 1)])
def test_of_the_nodes_that_there_are_as_many_are_used_as_share_the_batch(batch, monkeypatch, there_are, used):
    """With two ranks on each, one node and three will do, two will not."""
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", str(there_are))
    told = batch.folder / "told"
    resources = replace(batch.resources, nodes=3, fewer_nodes=(1,), processes_per_node=2)
    command = ("sh", "-c", f'echo "$SLURM_JOB_NUM_NODES $SLURM_NNODES $SLURM_NTASKS" >{told}')
    batch = replace(batch, resources=resources, command=command)
    assert "#SBATCH --nodes=1-3" in batch.script().splitlines()
    assert _run(batch).returncode == 0
    assert told.read_text() == f"{used} {used} {2 * used}\n"
