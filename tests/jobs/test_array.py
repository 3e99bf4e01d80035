"""Job arrays: how work is shared out; nothing is submitted beside what is under way (on SLURM: tests/slurm)."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from hpcssl.core.errors import ConfigError, RunError
from hpcssl.jobs import array
from hpcssl.jobs.array import Call, Submitted, job_name, jobs_under_way, shares, submit_calls
from hpcssl.jobs.batch_script import outside_of_a_job
from hpcssl.jobs.profile import Profile


@pytest.mark.parametrize("num_tasks", [1, 2, 7, 397, 500])
def test_every_item_is_in_one_share_and_shares_weigh_alike(num_tasks: int) -> None:
    weights = np.random.default_rng(0).integers(1, 5000, 397).tolist()
    found = shares(weights, num_tasks)
    assert sorted(item for share in found for item in share) == list(range(397))
    assert len(found) == min(num_tasks, 397)
    assert all(share == sorted(share) and share for share in found)
    sums = [sum(weights[item] for item in share) for share in found]
    assert max(sums) - min(sums) <= max(weights)
    assert found == shares(weights, num_tasks), "of the weights alone"
    assert shares([], num_tasks) == []


def test_shares_for_nobody() -> None:
    with pytest.raises(ConfigError, match="--array 0; expected at least 1"):
        shares([1], 0)


def test_a_jobs_name_is_its_folders_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = job_name("embed", Path("my, 'new' features"))
    assert name == job_name("embed", tmp_path / "my, 'new' features")
    assert "," not in name, "squeue would take it for two names"
    assert "'" not in name
    names = {job_name(kind, Path(out)) for kind in ("embed", "join") for out in ("a/f", "b/f", "f")}
    assert len(names) == 6


def test_jobs_under_way_are_asked_for_by_name(commands) -> None:
    commands(squeue="[ $2 = --name=hpcssl-x ] && printf '17\\n17\\n9\\n'")
    assert jobs_under_way("hpcssl-x") == ["17", "9"]


def test_a_slurm_that_does_not_answer_is_told(commands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands(squeue="echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1")
    with pytest.raises(RunError, match="squeue failed: slurm_load_jobs error: Unable to contact"):
        jobs_under_way("x")
    commands(squeue="exec sleep 30")
    monkeypatch.setattr(array, "_SQUEUE_S", 0.2)
    with pytest.raises(RunError, match="no answer within 0 s"):
        jobs_under_way("x")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no squeue on PATH"):
        jobs_under_way("x")


def test_nothing_is_submitted_beside_what_is_under_way(commands, monkeypatch, tmp_path: Path) -> None:
    given = []
    monkeypatch.setattr(array, "submit_array", lambda calls, *rest, **more: given.append(list(calls)) or "42")
    call = Call(print)
    commands(squeue="echo 17")
    assert submit_calls([call], tmp_path, Profile(), kind="embed") == Submitted(job="17", tasks=0)
    assert given == []
    commands(squeue="exit 0")
    assert submit_calls([call, call], tmp_path, Profile(), kind="embed") == Submitted(job="42", tasks=2)
    assert given == [[call, call]]


def test_a_call_reaches_its_function_in_another_process(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Call(shutil.rmtree, {"path": tmp_path})))()
    assert not tmp_path.exists()


def test_a_job_submits_as_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a new job inherits the number of tasks, the memory, the binding of the one that submits it."""
    before = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SUBMITIT_EXECUTOR": "slurm"}
    kept = {"SLURM_CONF": "/conf", "SBATCH_ACCOUNT": "bio", "HOME": "/home/me"}
    for name, value in (before | kept).items():
        monkeypatch.setenv(name, value)
    with outside_of_a_job():
        assert not set(before) & set(os.environ)
        assert kept.items() <= os.environ.items()
    assert (before | kept).items() <= os.environ.items()
    monkeypatch.delenv("SLURM_JOB_ID")
    with outside_of_a_job():
        assert os.environ["SLURM_NTASKS"] == "4", "no job's, but the user's own"
