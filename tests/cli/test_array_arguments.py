"""`--cluster slurm --array N --profile NAME` of the commands that have it: what is refused before a job waits."""

from __future__ import annotations

from pathlib import Path

import pytest

SLURM = ("--cluster", "slurm", "--array", "2", "--profile", "local")


@pytest.fixture
def refusal(refused, data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The error of a command where there is no SLURM."""
    monkeypatch.setenv("PATH", str(tmp_path))
    commands = {
        "embed": ("embed", "--store", data.store_path, "--encoder", "timm:resnet18:random"),
        "build": ("store", "build", data.tiles),
        "online": ("store", "build", tmp_path, "--online"),
        "tile": ("tile", data.tiles),
    }

    return lambda which, *more: refused(*commands[which], "--out", tmp_path / "out", *more)


@pytest.mark.parametrize("which", ["embed", "build", "tile"])
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--array", "2"), "--array is of a job array; give --cluster slurm, too"),
        (("--profile", "local"), "--profile is of a job array; give --cluster slurm, too"),
        (SLURM[:4], "no --profile; expected --cluster slurm --array N --profile NAME"),
        (("--cluster", "slurm", "--profile", "local"), "no --array; expected"),
        (("--cluster", "slurm", "--array", "0", "--profile", "local"), "--array 0; expected at least 1"),
        (("--cluster", "slurm", "--array", "2", "--profile", "lokal"), "did you mean local?"),
    ],
)
def test_arguments_that_lack_each_other(refusal, tmp_path, which, more, words):
    assert words in refusal(which, *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("which", "more", "words"),
    [
        ("embed", ("--threads", "2"), "has the profile's cpus_per_gpu"),
        ("embed", ("--weights", "none.pth"), "random weights and --weights none.pth"),
        ("build", ("--append",), "--append is done by one process; leave out --cluster slurm"),
        ("build", ("--shard-gb", "1"), "give --pack, too"),
        ("online", ("--append",), "--append is done by one process; leave out --cluster slurm"),
        ("online", ("--threads", "2"), "the tasks of an array have theirs; leave it out"),
        ("tile", ("--threads", "2"), "--threads: the tasks of an array have theirs"),
    ],
)
def test_what_an_array_cannot_do(refusal, tmp_path, which, more, words):
    assert words in refusal(which, *SLURM, *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("which", ["embed", "build"])
def test_without_slurm_it_says_so(refusal, which):
    assert "no squeue on PATH; run this on a login node" in refusal(which, *SLURM)
