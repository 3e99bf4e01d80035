"""`--cluster slurm --array N --profile NAME` of `embed` and `store build`: what is refused before a job waits."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcssl.cli.main import main

SLURM = ("--cluster", "slurm", "--array", "2", "--profile", "local")


@pytest.fixture
def command(data, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs `embed` or `store build` where there is no SLURM; returns exit code and errors."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def run(which: str, *more: str) -> tuple[int, str]:
        given = {
            "embed": ("embed", "--store", data.store_path, "--encoder", "timm:resnet18:random"),
            "build": ("store", "build", data.tiles),
            "online": ("store", "build", tmp_path, "--online"),
        }[which]
        code = main([*map(str, given), "--out", str(tmp_path / "out"), *more])
        out, err = capsys.readouterr()
        assert out == ""
        return code, err

    return run


@pytest.mark.parametrize("which", ["embed", "build"])
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
def test_arguments_that_lack_each_other(command, tmp_path, which, more, words):
    code, err = command(which, *more)
    assert code == 2
    assert words in err
    assert len(err.splitlines()) == 1
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
    ],
)
def test_what_an_array_cannot_do(command, tmp_path, which, more, words):
    code, err = command(which, *SLURM, *more)
    assert (code, words in err) == (2, True), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("which", ["embed", "build"])
def test_without_slurm_it_says_so(command, which):
    code, err = command(which, *SLURM)
    assert (code, "no squeue on PATH; run this on a login node" in err) == (2, True), err
