"""What every command promises: help with an example, one line for a user's error, exit codes, a quick start."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpcssl.cli import main as main_module
from hpcssl.cli.main import COMMANDS, main

pytestmark = pytest.mark.timeout(120)

ACTIONS = [
    *(("store", action) for action in ("build", "verify", "stats")),
    *(("schedule", action) for action in ("build", "verify", "inspect", "diff", "export")),
    *(("plan", action) for action in ("show", "draw")),
]


@pytest.fixture
def refused(capsys):
    """Runs a command that must end as a user's error: exit 2, one line, no traceback; returns the line."""

    def run(*arguments: object) -> str:
        assert main([str(a) for a in arguments]) == 2
        out, err = capsys.readouterr()
        lines = err.strip().splitlines()
        assert lines[-1].startswith("hpcssl: error: "), err
        assert len(lines) == 1, err
        assert "Traceback" not in out + err
        return lines[-1]

    return run


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


@pytest.mark.parametrize("arguments", [["no-such-command"], ["store"], ["store", "unbuild"], ["pretrain", "dino-demo"]])
def test_a_command_line_that_is_not_understood_exits_2(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("hpcssl: error: ")
    assert len(err.splitlines()) == 1


def test_options_are_not_abbreviated(capsys):
    """--sched may mean another option tomorrow."""
    with pytest.raises(SystemExit):
        main(["pretrain", "dino-demo", "--store", "s", "--sched", "s", "--out", "o"])
    assert "required: --schedule" in capsys.readouterr().err


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
    ("changed", "told"),
    [
        ("store", "no tile store (no store.json); make one with hpcssl store build"),
        ("schedule", "no schedule (no schedule.json); make one with hpcssl schedule build"),
        ("recipe", "did you mean dino-demo?"),
        ("recipe file", "no such file"),
    ],
)
def test_what_is_missing_is_told_and_makes_no_run_folder(refused, small, data, tmp_path, changed, told):
    nowhere, recipe = tmp_path / "nowhere", "dino-demo"
    if changed == "store":
        data = small.Data(data.tiles, nowhere, data.schedule_path)
    elif changed == "schedule":
        data = small.Data(data.tiles, data.store_path, nowhere)
    else:
        recipe = "dino-dmo" if changed == "recipe" else nowhere / "recipe.yaml"
    line = refused(*_pretrain(data, tmp_path / "run", recipe=recipe))
    assert told in line
    assert changed.startswith("recipe") or str(nowhere) in line
    assert not (tmp_path / "run").exists()


def test_a_schedule_of_other_slides_is_refused(refused, small, data, tmp_path, capsys):
    small.make_tiles(tmp_path / "tiles", slides=2)
    assert main(["store", "build", str(tmp_path / "tiles"), "--out", str(tmp_path / "store")]) == 0
    capsys.readouterr()
    other = small.Data(tmp_path / "tiles", tmp_path / "store", data.schedule_path)
    assert "was built for other slides" in refused(*_pretrain(other, tmp_path / "run"))
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


@pytest.fixture
def tiles(small, tmp_path) -> Path:
    return small.make_tiles(tmp_path / "tiles")


BAD_TILES = {
    "empty": "no tiles below it; expected <organ>/<slide_id>/<name>.jpg",
    "missing": "no such folder of tiles",
    "no slide folders": "no tiles below it",
    "empty slide": "slide breast-1 has no tiles",
    "zero bytes": "1 of 30 tile files are no whole JPEG",
    "text": "not a JPEG",
    "truncated": "truncated",
    "a file": "no such folder of tiles",
}


@pytest.mark.parametrize("fault", BAD_TILES)
def test_tiles_that_cannot_be_indexed_are_told_and_leave_nothing(refused, tiles, tmp_path, fault):
    root, slide = tiles, tiles / "breast" / "breast-1"
    tile = slide / "tile-2.jpg"
    if fault == "empty":
        (root := tmp_path / "none").mkdir()
    elif fault == "missing":
        root = tmp_path / "none"
    elif fault == "no slide folders":
        (root := tmp_path / "none").mkdir()
        (root / "breast").mkdir()
        (root / "breast" / "a.jpg").write_bytes(tile.read_bytes())
    elif fault == "empty slide":
        for file in slide.iterdir():
            file.unlink()
    elif fault == "a file":
        root = tile
    else:
        whole = tile.read_bytes()
        tile.write_bytes({"zero bytes": b"", "text": b"hello", "truncated": whole[: len(whole) // 2]}[fault])
    line = refused("store", "build", root, "--out", tmp_path / "store")
    assert BAD_TILES[fault] in line
    left = [f.name for f in tmp_path.iterdir() if "store" in f.name]
    if fault in ("zero bytes", "text", "truncated"):
        assert str(tile) in line
        assert left == ["store.bad_tiles.csv"], "nothing half-written"
    else:
        assert not left, "nothing half-written"


def test_a_store_is_built_verified_and_described(tiles, tmp_path, capsys):
    store = tmp_path / "store"
    assert main(["store", "build", str(tiles), "--out", str(store)]) == 0
    assert "6 slides, 30 tiles" in capsys.readouterr().out
    assert main(["store", "verify", str(store)]) == 0
    assert main(["store", "stats", str(store)]) == 0
    table = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert ["breast", "3", "15"] in table
    assert ["lung", "3", "15"] in table


def test_a_store_that_is_there_is_not_overwritten(refused, data, tiles):
    before = (data.store_path / "store.json").read_bytes()
    assert "exists already" in refused("store", "build", tiles, "--out", data.store_path)
    assert (data.store_path / "store.json").read_bytes() == before


def test_verify_notices_a_changed_tile(refused, tiles, tmp_path, capsys):
    assert main(["store", "build", str(tiles), "--out", str(tmp_path / "store")]) == 0
    capsys.readouterr()
    (tiles / "lung" / "lung-0" / "tile_x0_y0.jpg").unlink()
    assert "tile_x0_y0.jpg is missing" in refused("store", "verify", tmp_path / "store")


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


def test_a_schedule_is_built_and_verified(data, tmp_path, capsys):
    settings = ["num_groups=2", "num_pseudo_epochs=2", "positions_per_pseudo_epoch=40", "max_repeats=50"]
    assert main([str(a) for a in _schedule(data, tmp_path / "s", *settings)]) == 0
    assert main(["schedule", "verify", str(tmp_path / "s")]) == 0
    assert "2 pseudo-epochs of 40 positions" in capsys.readouterr().out


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


BAD_RESOURCES = {
    "no nodes": ["--nodes", 0],
    "negative processes": ["--gpus-per-node", -1],
    "two nodes on this machine": ["--nodes", 2],
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("resources", BAD_RESOURCES)
def test_resources_that_a_cluster_cannot_give_are_refused(refused, small, data, tmp_path, monkeypatch, resources):
    from hpcssl.pipelines import pretrain

    def launched(*arguments, **more):
        raise AssertionError("launched")

    monkeypatch.setattr(pretrain, "launch", launched)
    file = small.write_recipe(tmp_path / "recipe.yaml", small.dino_recipe())
    refused(*_pretrain(data, tmp_path / "run", "--cluster", "local", *BAD_RESOURCES[resources], recipe=file))
    assert not (tmp_path / "run").exists()


def test_slurm_where_there_is_none_is_told(refused, data, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(*_pretrain(data, tmp_path / "run", "--cluster", "slurm"))


UNTRAINABLE = {
    "a view that the patch does not divide": ["augment.global_views.view_px=30"],
    "an encoder that timm does not have": ["encoder.name=vit_tiny_patch17_224"],
    "MAE with drop-path": ["objective=mae", "augment.mask_ratio=0.75", "encoder.drop_path=0.1"],
    "MAE on views of another size": [
        *("objective=mae", "augment.mask_ratio=0.75", "encoder.drop_path=0", "augment.global_views.view_px=48")
    ],
    "a warm-up longer than the schedule": ["optim.warmup_pseudo_epochs=50"],
    "a negative micro-batch": ["train.micro_batch=-1"],
    "a negative number of threads": ["train.threads=-1"],
}


@pytest.mark.parametrize("fault", UNTRAINABLE)
def test_a_recipe_that_cannot_train_is_refused_before_it_is_launched(
    refused, small, data, tmp_path, monkeypatch, fault
):
    from hpcssl.pipelines import pretrain

    monkeypatch.setattr(pretrain, "launch", lambda *rest, **more: "finished")
    file = small.write_recipe(tmp_path / "recipe.yaml", small.dino_recipe())
    settings = [part for setting in UNTRAINABLE[fault] for part in ("--set", setting)]
    refused(*_pretrain(data, tmp_path / "run", *settings, recipe=file))
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
    import hpcssl.cli.store_command as command

    def ends(args):
        raise error

    monkeypatch.setattr(command, "_verify", ends)
    assert main(["store", "verify", "s"]) == code
    assert capsys.readouterr().err.strip().startswith(told)


def test_an_error_of_ours_shows_its_traceback(monkeypatch):
    import hpcssl.cli.store_command as command

    def ends(args):
        raise ValueError("ours")

    monkeypatch.setattr(command, "_verify", ends)
    with pytest.raises(ValueError, match="ours"):
        main(["store", "verify", "s"])


def test_ctrl_c_exits_130_with_one_line(small, data, tmp_path):
    """A real SIGINT, while a schedule of many positions is built."""
    command = small.commandline(
        *_schedule(data, tmp_path / "s", "num_groups=1", "positions_per_pseudo_epoch=15000000", "max_repeats=90000000")
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
