"""What a submission that is refused leaves: SLURM's commands are played by scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from submitit.core.utils import DelayedSubmission

from hpcssl.cli.main import main
from hpcssl.core.atomic import alone
from hpcssl.core.errors import ConfigError, RunError, UserError
from hpcssl.jobs.cluster import Batch, check_cluster, submit_array
from hpcssl.jobs.launch import reserved
from hpcssl.jobs.profile import Profile, Resources
from hpcssl.jobs.submission import FILE, read_submission, write_submission

ACCEPTS = "echo Submitted batch job 7"
REFUSES = "echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1"


@pytest.fixture
def slurm(commands):
    """Sets what SLURM's commands do."""
    commands(srun="", squeue="", sbatch=ACCEPTS)
    return commands


@pytest.fixture
def pretrain(small, data, tmp_path):
    """Starts a run `run` and returns the exit code."""
    recipe = small.write_recipe(tmp_path / "recipe.yaml", small.dino_recipe())
    (tmp_path / "profile.yaml").write_text("gpus_per_node: 0\ncpus_per_gpu: 1\n")

    def start(cluster: str = "slurm", *more: str) -> int:
        where = ("--store", data.store_path, "--schedule", data.schedule_path, "--out", tmp_path / "run")
        profile = ("--profile", tmp_path / "profile.yaml") if cluster == "slurm" else ()
        return main([str(word) for word in ("pretrain", recipe, *where, "--cluster", cluster, *profile, *more)])

    return start


def test_the_stand_alone_entry_submits_as_the_command_does(slurm, small, data, tmp_path, repository):
    recipe = small.write_recipe(tmp_path / "recipe.yaml", small.dino_recipe())
    slurm(sbatch=f"cp $1 {tmp_path}/script; {ACCEPTS}")
    where = ("--store", data.store_path, "--schedule", data.schedule_path, "--out", tmp_path / "run")
    entry = [sys.executable, repository / "launch" / "submit_pretrain.py", recipe, *where, "--nodes", "3"]
    done = subprocess.run(entry, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"job 7 submitted; run folder {tmp_path}/run")
    assert read_submission(tmp_path / "run").job == "7"
    assert "#SBATCH --nodes=3" in (tmp_path / "script").read_text().splitlines()


def _array(folder: Path, profile: Profile | None = None) -> str:
    return submit_array([print, print], folder, profile or Profile(), name="n", gpus=0, after=())


def _batch(folder: Path, profile: Profile | None = None) -> Batch:
    resources = Resources(profile=profile or Profile(gpus_per_node=0))
    return Batch(name="n", token="t", folder=folder, resources=resources, command=("a",), afterwards=("b",))


def _content(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_of_a_new_run_that_is_refused_nothing_is_left_and_one_that_was_there_outlives_it(slurm, pretrain, tmp_path):
    slurm(sbatch=REFUSES)
    assert pretrain() == 2
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".mine").write_text("x")
    assert pretrain() == 2
    assert [file.name for file in (tmp_path / "run").iterdir()] == [".mine"], "made before, and not by us"
    slurm(sbatch=ACCEPTS)
    assert pretrain() == 0
    assert read_submission(tmp_path / "run").job == "7"
    slurm(sbatch=REFUSES)
    assert pretrain() == 2
    assert (tmp_path / "run" / "config.yaml").exists()


def test_one_says_how_many_nodes_or_gpus_and_not_both(slurm, pretrain, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        pretrain("slurm", "--nodes", "2", "--gpus", "1..4")
    assert caught.value.code == 2
    assert "--gpus: not allowed with argument --nodes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("cluster", ["slurm", "local", "none"])
def test_a_run_under_way_is_neither_changed_nor_started_beside_its_job(slurm, pretrain, tmp_path, capsys, cluster):
    assert pretrain() == 0
    before = _content(tmp_path / "run")
    slurm(squeue="echo '7|PENDING|Priority|'")
    assert pretrain(cluster, "--set", "train.hang_s=99") == 2
    assert "job 7 of this run is pending; hpcssl jobs cancel" in capsys.readouterr().err
    assert _content(tmp_path / "run") == before


def test_of_two_submissions_at_once_one_is_refused_and_harms_nothing(slurm, pretrain, tmp_path, capsys):
    assert pretrain() == 0
    before = _content(tmp_path / "run")
    with alone(tmp_path / "run" / FILE):  # the other one is still at it
        assert pretrain() == 2
    assert "another process is making it" in capsys.readouterr().err
    assert _content(tmp_path / "run") == before
    with reserved(tmp_path / "run"), pytest.raises(UserError, match="another process"), reserved(tmp_path / "run"):
        pass


def test_without_slurms_commands_its_jobs_are_over(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    write_submission(tmp_path, "slurm", Resources(), job="7")
    with reserved(tmp_path):
        pass


def test_a_store_whose_tiles_are_gone_is_refused_before_anything_is_submitted(slurm, small, tmp_path, capsys):
    own = small.make_data(tmp_path)
    own.tiles.rename(tmp_path / "elsewhere")
    recipe = small.write_recipe(tmp_path / "recipe.yaml", small.dino_recipe())
    given = (recipe, "--store", own.store_path, "--schedule", own.schedule_path, "--out", tmp_path / "run")
    assert main(["pretrain", *map(str, given), "--cluster", "slurm"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{own.store_path}: its tiles are gone, no folder {own.tiles}; is its file system mounted?" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["a%j", "100 %", "a\\b", "a\nb"])
def test_a_path_that_slurm_misreads_is_refused_in_one_line(slurm, data, tmp_path, capsys, name):
    given = ("--store", data.store_path, "--schedule", data.schedule_path, "--out", tmp_path / name / "run")
    assert main(["pretrain", "dino-vits16-opal", *map(str, given), "--cluster", "slurm"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no logs can go to a path with" in line
    assert not (tmp_path / name).exists()
    with pytest.raises(ConfigError, match="no logs can go to"):
        _array(tmp_path / name)


def test_a_path_with_a_percent_sign_is_refused_on_this_machine_only_where_it_is_misread(tmp_path):
    check_cluster("local", Resources(), tmp_path / "100 %" / "a\\b")
    check_cluster("none", Resources(), tmp_path / "a%j")
    for name in ("a%j", "a%t", "50%A", "50%a"):
        with pytest.raises(ConfigError, match=f"no logs can go to a path with '{name[-2:]}'"):
            check_cluster("local", Resources(), tmp_path / name / "run")


def test_what_slurm_says_that_submitit_does_not_understand_is_told(slurm, pretrain, tmp_path, capsys):
    slurm(sbatch="echo accepted, but no number")
    assert pretrain() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "accepted, but no number" in line
    with pytest.raises(RunError, match=r"SLURM refused the job: .*accepted, but no number"):
        _array(tmp_path / "array")


def test_no_job_has_a_workload_key_of_submitits(slurm, tmp_path):
    slurm(sbatch=f"cp $1 {tmp_path}/script; {ACCEPTS}")
    assert _array(tmp_path / "array") == "7"
    for script in ((tmp_path / "script").read_text(), _batch(tmp_path).script()):
        assert "#SBATCH --job-name=n" in script
        assert "wckey" not in script


def test_tasks_of_an_array_go_on_however_often_they_run_out_of_time(slurm, tmp_path):
    _array(tmp_path / "array")
    files = sorted((tmp_path / "array").glob("*_submitted.pkl"))
    assert len(files) == 2
    assert all(DelayedSubmission.load(file)._timeout_countdown > 10_000 for file in files)


def test_what_a_job_asks_for_is_not_outranked_by_the_environment(slurm, monkeypatch, tmp_path):
    """The users' own settings stay where the profile says nothing."""
    slurm(sbatch=f"env >{tmp_path}/env; {ACCEPTS}")
    theirs = {"SBATCH_TIMELIMIT": "1", "SBATCH_PARTITION": "other", "SBATCH_ACCOUNT": "bio", "SBATCH_MEM_PER_CPU": "1"}
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    profile = Profile(partition="main", gpus_per_node=0, cpus_per_gpu=1)
    for submit in (_batch(tmp_path, profile).submit, lambda: _array(tmp_path, profile)):
        assert submit() == "7"
        seen = {line for line in (tmp_path / "env").read_text().splitlines() if line.startswith("SBATCH_")}
        assert seen == {"SBATCH_ACCOUNT=bio", "SBATCH_MEM_PER_CPU=1"}
    assert theirs.items() <= os.environ.items()
