"""What every command promises: help with an example, one line for a user's error, exit codes, a quick start."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from hpcssl.cli import main as main_module
from hpcssl.cli.main import COMMANDS, main

pytestmark = pytest.mark.timeout(120)

ACTIONS = [
    *(("store", action) for action in ("build", "verify", "stats")),
    *(("schedule", action) for action in ("build", "verify", "inspect", "diff", "export")),
    *(("plan", action) for action in ("show", "draw")),
]


HEAVY = ("torch", "numpy", "pandas", "timm", "matplotlib", "sklearn", "pydantic", "submitit", "PIL", "h5py", "rich")


def test_no_help_imports_anything_heavy():
    """That is what makes them quick: none of these is loaded after any of them."""
    code = (
        "import sys, hpcssl.cli.main as m\n"
        f"for arguments in {[['--help'], ['--version'], *([command, '--help'] for command in COMMANDS)]!r}:\n"
        "    try: m.main(arguments)\n"
        "    except SystemExit as error: assert not error.code\n"
        f"    print('HEAVY', arguments, [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    heavy = [line for line in done.stdout.splitlines() if line.startswith("HEAVY ")]
    assert len(heavy) == 2 + len(COMMANDS)
    assert all(line.endswith(" []") for line in heavy), heavy


@pytest.mark.parametrize("command", [*((c,) for c in COMMANDS), *ACTIONS])
def test_every_help_has_an_example_of_the_command(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    _, found, example = out.partition("example: ")
    assert found
    assert example.startswith(f"hpcssl {' '.join(command)}")


def test_every_example_is_understood():
    """Its options exist: the example parses."""
    for command in COMMANDS:
        parser = main_module._parser(command)
        example = sys.modules[f"hpcssl.cli.{command}_command"].EXAMPLE
        for line in example.splitlines():
            name, *arguments = line.split()
            assert name == "hpcssl"
            assert parser.parse_args(arguments).run


def test_the_overview_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(re.search(rf"^ +{command} ", out, re.MULTILINE) for command in COMMANDS)


def test_no_command_shows_the_help_and_is_no_success(capsys):
    assert main([]) == 2
    assert "commands" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["no-such-command"], "invalid choice"),
        (["store"], "required: ACTION"),
        (["store", "unbuild"], "invalid choice"),
        (["pretrain", "dino-demo"], "required: --store"),
        (["demo", "--slides", "t.csv", "--tiles", "tiles"], "not allowed with"),
        (["pretrain", "dino-demo", "--store", "s", "--sched", "s", "--out", "o"], "required: --schedule"),
    ],
)
def test_a_command_line_that_is_not_understood_exits_2(refused, arguments, told):
    """--sched, too: options are not abbreviated, as it may mean another one tomorrow."""
    assert told in refused(*arguments)


def _pretrain(data, out: Path, *more: object, recipe: object = "dino-demo") -> list[object]:
    return [
        *("pretrain", recipe, "--store", data.store_path, "--schedule", data.schedule_path),
        *("--out", out, "--cluster", "none", *more),
    ]


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("optim.lr_per_255=1e-3", "did you mean lr_per_256?"),
        ("seeds=1", "did you mean seed?"),
        ("dino.head.outdim=3", "unknown setting objective.head.outdim; did you mean out_dim?"),
        ("global_batch=many", "global_batch"),
        ("seed", "expected key=value"),
        ("seed.x=1", "seed = {'x': 1}: input should be a valid integer"),
        ("global_batch=7.5", "global_batch"),
        ("augment.mask_ratio=1.5", "mask_ratio = 1.5"),
        ("checkpoint.keep_last=0", "keep_last = 0"),
    ],
)
def test_a_setting_with_a_typo_names_the_nearest_and_makes_no_run_folder(refused, data, tmp_path, setting, told):
    assert told in refused(*_pretrain(data, tmp_path / "run", "--set", setting))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("recipe", "more", "told"),
    [
        (
            "dino-demo",
            ("--store", "nowhere"),
            "nowhere: no tile store (no store.json); make one with hpcssl store build",
        ),
        ("dino-demo", ("--schedule", "nowhere"), "nowhere: no schedule (no schedule.json); make one with hpcssl sched"),
        ("dino-dmo", (), "did you mean dino-demo?"),
        ("nowhere/recipe.yaml", (), "no such file"),
    ],
)
def test_what_is_missing_is_told_and_makes_no_run_folder(refused, data, tmp_path, recipe, more, told):
    assert told in refused(*_pretrain(data, tmp_path / "run", *more, recipe=recipe))
    assert not (tmp_path / "run").exists()


def test_a_schedule_of_other_slides_is_refused(refused, small, data, tmp_path):
    tiles, store = small.make_tiles(tmp_path / "tiles", slides=2), tmp_path / "store"
    assert main(["store", "build", str(tiles), "--out", str(store)]) == 0
    assert "was built for other slides" in refused(*_pretrain(data, tmp_path / "run", "--store", store))
    assert not (tmp_path / "run").exists()


def test_a_world_that_cannot_share_the_batch_is_refused_before_it_starts(refused, data, tmp_path):
    line = refused(*_pretrain(data, tmp_path / "run", "--gpus-per-node", 5, "--cluster", "local"))
    assert "5 processes cannot share a global batch of 32 equally; 1, 2, 4, 8, 16 or 32 can" in line
    assert not (tmp_path / "run").exists()


def test_another_run_in_the_folder_is_refused_with_both_values(refused, small, data, tmp_path):
    recipe = small.dino_recipe()
    run = small.make_run(tmp_path / "run", data, recipe)
    file = small.write_recipe(tmp_path / "recipe.yaml", recipe)
    line = refused(*_pretrain(data, run, "--set", "seed=3", recipe=file))
    assert f"{run}: this run has seed = 0, asked for is 3" in line


def test_tiles_that_cannot_be_indexed_are_told_and_leave_nothing(refused, small, tmp_path):
    tiles, flat = small.make_tiles(tmp_path / "tiles"), tmp_path / "flat"
    tile = tiles / "breast" / "breast-1" / "tile-2.jpg"
    (flat / "breast").mkdir(parents=True)
    shutil.copy(tile, flat / "breast")
    out = ("--out", tmp_path / "store")
    assert "no such folder of tiles" in refused("store", "build", tile, *out)
    assert "no tiles below it" in refused("store", "build", flat, *out)
    tile.write_bytes(b"")
    line = refused("store", "build", tiles, *out)
    assert "1 of 30 tile files are no whole JPEG" in line
    assert str(tile) in line
    assert [f.name for f in tmp_path.iterdir() if "store" in f.name] == ["store.bad_tiles.csv"], "nothing half-written"


def _schedule(data, out: Path, *settings: str) -> list[object]:
    more = [part for setting in settings for part in ("--set", setting)]
    return ["schedule", "build", "--store", data.store_path, "--spec", "demo", "--out", out, *more]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["num_group=2"], "did you mean num_groups?"),
        (["positions_per_pseudo_epoch=0"], "at least 1"),
        (["positions_per_pseudo_epoch=1", "num_groups=1"], "raise positions_per_pseudo_epoch"),
        (["positions_per_pseudo_epoch=100000", "max_repeats=1"], "raise max_repeats"),
    ],
)
def test_a_spec_that_cannot_be_met_is_told_and_leaves_nothing(refused, data, tmp_path, settings, told):
    assert told in refused(*_schedule(data, tmp_path / "schedule", *settings))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("own_process")
def test_a_run_in_this_process_tells_its_steps(small, data, tmp_path, capsys):
    file = small.write_recipe(tmp_path / "recipe.yaml", small.mae_recipe(stop_after=1))
    assert main([str(a) for a in _pretrain(data, tmp_path / "run", recipe=file)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("finished: ")
    assert "pretraining: 3 steps in" in err


@pytest.mark.parametrize("encoder", ["nowhere", "nowhere@3"])
def test_embed_of_no_run_is_told(refused, data, tmp_path, encoder):
    line = refused("embed", "--store", data.store_path, "--encoder", tmp_path / encoder, "--out", tmp_path / "f")
    assert "no run" in line
    assert not (tmp_path / "f").exists()


@pytest.fixture
def untrained(small, data, tmp_path) -> Path:
    import torch

    from hpcssl.runs.checkpoint import save_checkpoint
    from hpcssl.train.state import TrainState

    recipe = small.dino_recipe()
    run = small.make_run(tmp_path / "run", data, recipe)
    save_checkpoint(run, 0, *TrainState(recipe, torch.device("cpu")).to_checkpoint())
    return run


@pytest.mark.usefixtures("one_thread")
def test_embed_writes_a_file_a_slide(data, untrained, tmp_path, capsys):
    arguments = ["embed", "--store", data.store_path, "--encoder", untrained, "--out", tmp_path / "f", "--threads", 1]
    for _ in range(2):
        assert main([str(a) for a in arguments]) == 0
        assert len(list((tmp_path / "f").glob("*.h5"))) == 6
        assert "features of 6 slides" in capsys.readouterr().out


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("option", [["--threads", 0], ["--tile-px", -5]])
def test_numbers_that_embed_cannot_use_are_refused(refused, data, untrained, tmp_path, option):
    refused("embed", "--store", data.store_path, "--encoder", untrained, "--out", tmp_path / "f", *option)


MAE = ("--set=objective=mae", "--set=augment.mask_ratio=0.75")
UNTRAINABLE = {
    "a view that the patch does not divide": ["--set=augment.global_views.view_px=30"],
    "an encoder that timm does not have": ["--set=encoder.name=vit_tiny_patch17_224"],
    "MAE with drop-path": [*MAE, "--set=encoder.drop_path=0.1"],
    "MAE on views of another size": [*MAE, "--set=encoder.drop_path=0", "--set=augment.global_views.view_px=48"],
    "a warm-up longer than the schedule": ["--set=optim.warmup_pseudo_epochs=50"],
    "a negative micro-batch": ["--set=train.micro_batch=-1"],
    "a negative number of threads": ["--set=train.threads=-1"],
    "no nodes": ["--cluster", "local", "--nodes", 0],
    "negative processes": ["--cluster", "local", "--gpus-per-node", -1],
    "two nodes on this machine": ["--cluster", "local", "--nodes", 2],
    "SLURM where there is none": ["--cluster", "slurm"],
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("fault", UNTRAINABLE)
def test_what_cannot_train_is_refused_before_it_is_launched(refused, small, data, tmp_path, monkeypatch, fault):
    from hpcssl.pipelines import pretrain

    monkeypatch.setattr(pretrain, "launch", lambda *rest, **more: "finished")
    monkeypatch.setenv("PATH", str(tmp_path))
    file = small.write_recipe(tmp_path / "recipe.yaml", small.dino_recipe())
    refused(*_pretrain(data, tmp_path / "run", *UNTRAINABLE[fault], recipe=file))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "hpcssl: stopped; the same command goes on where it was"),
        (OSError(28, "No space left on device", "out/x"), 2, "hpcssl: error: out/x: the disk is full"),
        (PermissionError(13, "Permission denied", "tiles/a"), 2, "hpcssl: error: tiles/a: permission denied"),
    ],
)
def test_how_a_command_ends(monkeypatch, capsys, error, code, told):
    monkeypatch.setattr("hpcssl.cli.store_command._verify", mock.Mock(side_effect=error))
    assert main(["store", "verify", "s"]) == code
    assert capsys.readouterr().err.strip().startswith(told)


def test_an_error_of_ours_shows_its_traceback(monkeypatch):
    monkeypatch.setattr("hpcssl.cli.store_command._verify", mock.Mock(side_effect=ValueError("ours")))
    with pytest.raises(ValueError, match="ours"):
        main(["store", "verify", "s"])


def test_ctrl_c_exits_130_with_one_line(small, data, tmp_path):
    """A real SIGINT, while a schedule of many positions is built."""
    command = small.commandline(
        *_schedule(data, tmp_path / "s", "num_groups=1", "positions_per_pseudo_epoch=40000000", "max_repeats=90000000")
    )
    process = subprocess.Popen(command, env=small.environment(), stderr=subprocess.PIPE, text=True)
    try:
        small.wait_until(lambda: list(tmp_path.glob("s/.pseudo_epoch_*.tmp")), 60, "the build begins")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)  # the chunk that is computed is ended first
    finally:
        process.kill()
        process.wait(30)
    assert process.returncode == 130, err
    assert err.strip().splitlines()[-1] == "hpcssl: stopped; the same command goes on where it was"
    assert "Traceback" not in err
    left = {path.name for path in (tmp_path / "s").iterdir()}
    assert "schedule.json" not in left, "nothing that looks finished"
    assert not any(name.endswith(".tmp") for name in left), "what was begun is gone"
