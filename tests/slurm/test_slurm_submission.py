"""Submissions to a real SLURM: odd names, refusals, dry runs, numbers of nodes; and `hpcssl jobs`."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from hpcssl.runs.checkpoint import checkpoint_steps
from hpcssl.runs.trace import read_metrics

UNAVAILABLE = "node configuration is not available"

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def test_names_with_blanks_and_quotes_by_the_stand_alone_entry(submit, pretraining, repository, slurm, tmp_path):
    """On two nodes that SLURM has, of which one alone can share the batch; three could as well."""

    def entry(out, *arguments, folder):
        words = [sys.executable, repository / "launch" / "submit_pretrain.py", "recipe.yaml"]
        data = ("--store", "store", "--schedule", "schedule", "--out", out)
        options = {"cwd": folder, "env": slurm, "capture_output": True, "text": True, "timeout": 300}
        return subprocess.run([*words, *data, *map(str, arguments)], **options)

    folder = tmp_path / 'it\'s a "quoted" $place'
    folder.mkdir()
    for name in ("store", "schedule", "recipe.yaml", "profile.yaml"):
        (folder / name).symlink_to(pretraining / name)
    fifteen = ("--gpus", "1..3", "--gpus-per-node", 1, "--set", "global_batch=15", "--set", "stop_after=0.5")
    job = submit('my "first" run', *fifteen, folder=folder, command=entry)
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert read_metrics(job.run)["step"].tolist() == list(range(1, job.STEPS // 8 * 12 // 15 + 1))
    assert job.facts()["NumNodes"] == "2"
    assert [(start["world_size"], start["nodes"]) for start in job.starts()] == [(1, ["node1"])]


@pytest.mark.parametrize(
    ("asked", "words", "fix"),
    [
        (("--partition", "nowhere"), "nvalid partition", "there are main, "),
        (("--partition", "team", "--account", "wrong"), "nvalid account", "set account in the profile, or --account"),
        (("--profile", "gpus.yaml", "--gpus-per-node", 3), UNAVAILABLE, "main has 2 nodes of 2 cores"),
        (("--gpus", "6..12", "--gpus-per-node", 6), UNAVAILABLE, "GPUs gpu:2"),
        (("--profile", "h900.yaml"), "nvalid feature", "set constraint in the profile"),
    ],
)
def test_a_refusal_is_told_in_slurms_words_with_the_fix(pretrain, pretraining, asked, words, fix):
    (pretraining / "h900.yaml").write_text("constraint: h900\ngpus_per_node: 1\ncpus_per_gpu: 1\n")
    done = pretrain("refused", "--cluster", "slurm", "--profile", "profile.yaml", *asked)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("hpcssl: error: SLURM refused the job: ")
    assert words in line
    assert fix in line
    assert not (pretraining / "refused").exists(), "no run is left that never was"


def test_a_dry_run_prints_the_batch_script_and_writes_nothing(pretrain, pretraining):
    before = sorted(pretraining.rglob("*"))
    size = ("--nodes", 2, "--gpus-per-node", 2)
    done = pretrain("dry", "--cluster", "slurm", "--profile", "profile.yaml", *size, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "2 nodes x 2 processes, 3 tiles of the global batch of 12 each" in done.stdout
    for line in ("#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=2", "#SBATCH --requeue", "#SBATCH --time=60"):
        assert line in done.stdout.splitlines()
    assert "--kill-on-bad-exit=1" in done.stdout
    assert sorted(pretraining.rglob("*")) == before


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


def test_cancelled_it_stays_away_until_it_is_wanted_again(hpcssl_in, submit, hold, thaw, pretraining):
    """It is listed, cancelled, and submitted again from the run folder alone; logs and what submitit wrote are gone."""

    def jobs(*arguments: object) -> subprocess.CompletedProcess[str]:
        return hpcssl_in(pretraining, "jobs", *arguments)

    job = submit("listed", "--partition", "team", "--account", "team", "--gpus-per-node", 1)
    (held,) = hold(job)
    listed = jobs("list", "listed").stdout
    assert re.search(rf"listed +running +{job.id} +\d+ of {job.STEPS} .* node1 +1 +0", listed), listed
    assert "[rank 0] begins at step 0" in jobs("logs", "listed").stdout
    assert jobs("cancel", "listed").returncode == 0
    thaw(held)
    assert job.wait_for_end() == "CANCELLED", job.log()
    saved = max(checkpoint_steps(job.run))
    assert saved >= held.step
    assert "Traceback" not in job.log(), job.log()
    time.sleep(1)
    assert job.state() == "CANCELLED"
    assert job.whys() == ["first start"]
    shutil.rmtree(job.run / "logs")
    (job.run / "logs").mkdir()
    done = jobs("requeue", "listed")
    assert done.returncode == 0, done.stderr
    found = re.match(r"job (\d+) submitted", done.stdout)
    assert found
    second = replace(job, id=found[1])
    assert second.wait_for_end() == "COMPLETED", second.log()
    assert second.starts()[1]["newest_checkpoint"] == saved
    assert re.search(rf"listed +finished +{second.id} +{job.STEPS} of {job.STEPS} ", jobs("list", ".").stdout)
