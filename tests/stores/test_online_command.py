"""`hpcssl store build --online`, and the commands that take such a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hpcssl.cli.main import main
from hpcssl.stores.kinds import open_store

BUILD = ["--online", "--mpp", "0.5,1.0", "--tile-px", "64"]


@pytest.fixture(scope="module")
def folder(online, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    online.draw_slides(folder, count=2)
    return folder


@pytest.fixture(scope="module")
def store(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("store") / "store"
    assert main(["store", "build", str(folder / "slides.csv"), "--out", str(out), *BUILD]) == 0
    return out


def run(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_build_verify_and_stats_say_what_there_is(folder, store, tmp_path, capsys) -> None:
    code, out, _ = run(capsys, "store", "build", folder, "--out", tmp_path / "store", *BUILD)
    assert code == 0
    assert "2 slides" in out
    assert "tiles of 64 px at 0.5 MPP; tiles at places drawn by the position, MPP 0.5, 1" in out
    code, out, _ = run(capsys, "store", "verify", store, "--deep")
    assert (code, "all 2 slides there with their sizes, every tile decodes" in out) == (0, True)
    code, out, _ = run(capsys, "store", "stats", store)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["organ", "breast", "lung"]


def test_slides_that_failed_are_an_error_after_the_others_are_done(folder, tmp_path, capsys) -> None:
    table = tmp_path / "slides.csv"
    rows = (folder / "slides.csv").read_text().replace("s0.tif", str(folder / "s0.tif")).replace(",s1.tif", ",gone.tif")
    table.write_text(rows)
    code, _, err = run(capsys, "store", "build", table, "--out", tmp_path / "store", *BUILD)
    assert code == 2
    assert "1 of 2 slides failed (all are in" in err
    assert open_store(tmp_path / "store").num_slides == 1
    (tmp_path / "gone.tif").write_bytes((folder / "s1.tif").read_bytes())
    code, out, _ = run(capsys, "store", "build", table, "--out", tmp_path / "store", *BUILD, "--append")
    assert (code, "2 slides" in out) == (0, True)


def test_a_store_of_slides_is_not_extended_with_tiles(data, store, capsys) -> None:
    code, _, err = run(capsys, "store", "build", data.tiles, "--out", store, "--append")
    assert code == 2
    assert "a store of slides; to extend it with slides, give --online, too" in err
    assert open_store(store).num_slides == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--online", "--pack"], "--pack is not for a store of slides"),
        (["--online", "--no-check"], "--no-check is not for a store of slides"),
        (["--mpp", "0.5"], "--mpp is for a store of slides; give --online, too"),
        (["--grid"], "--grid is for a store of slides"),
        (["--online", "--mpp", "0.5,1", "--grid"], "of one MPP, not of 2"),
    ],
)
def test_arguments_of_the_other_kind_are_refused(folder, tmp_path, capsys, arguments, told) -> None:
    code, _, err = run(capsys, "store", "build", folder, "--out", tmp_path / "store", *arguments)
    assert code == 2
    assert told in err


def test_a_list_of_mpps_that_is_none_is_refused(folder, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        run(capsys, "store", "build", folder, "--out", tmp_path / "store", "--online", "--mpp", "0.5;1")
    assert caught.value.code == 2
    assert "expected numbers such as 0.25,0.5,1.0" in capsys.readouterr().err


def build_schedule(store: Path, out: Path, *settings: str) -> Path:
    settings = ("num_pseudo_epochs=2", "positions_per_pseudo_epoch=48", "num_groups=1", *settings)
    changes = [part for setting in settings for part in ("--set", setting)]
    assert main(["schedule", "build", "--store", str(store), "--spec", "demo", "--out", str(out), *changes]) == 0
    return out


@pytest.fixture
def schedule(store, tmp_path) -> Path:
    return build_schedule(store, tmp_path / "schedule", "mpp_weights={0.5: 1, 1: 3}")


def test_a_schedule_of_slides_is_verified_and_its_weights_are_compared(store, schedule, tmp_path, capsys) -> None:
    assert run(capsys, "schedule", "verify", schedule)[0] == 0
    other = build_schedule(store, tmp_path / "other")
    for pair in ((schedule, other), (other, schedule)):
        code, out, _ = run(capsys, "schedule", "diff", *pair)
        assert code == 1
        assert "spec: mpp_weights is" in out


def test_weights_for_an_mpp_that_the_store_lacks_are_refused_at_once(store, tmp_path, capsys) -> None:
    build = ("schedule", "build", "--store", store, "--spec", "demo", "--out", tmp_path / "s", "--set")
    refusals = {"{2: 1}": "names MPP 2.0; this store has places at 0.5, 1.0"}
    for weights in ("{2: 1}", "{0.5: -1}", "{0: 1}", "{fine: 1}"):
        code, _, err = run(capsys, *build, f"mpp_weights={weights}")
        assert code == 2
        assert refusals.get(weights, "mpp_weights") in err


def test_plan_draws_the_places(store, schedule, tmp_path, capsys) -> None:
    sheet = tmp_path / "sheet.png"
    data = ("--store", store, "--schedule", schedule, "--out", sheet)
    assert run(capsys, "plan", "draw", "--positions", "0:3", "--recipe", "dino-demo", *data)[0] == 0
    assert np.asarray(Image.open(sheet)).std() > 20


def test_pretrain_and_embed_take_a_store_of_slides(small, store, schedule, tmp_path, capsys, own_process) -> None:
    import h5py

    recipe = small.write_recipe(tmp_path / "recipe.yaml", small.dino_recipe())
    run_folder, features = tmp_path / "run", tmp_path / "features"
    data = ("--store", store, "--schedule", schedule, "--cluster", "none", "--set", "stop_after=1")
    assert run(capsys, "pretrain", recipe, *data, "--out", run_folder)[0] == 0
    assert run(capsys, "embed", "--store", store, "--encoder", run_folder, "--tile-px", 32, "--out", features)[0] == 0
    opened = open_store(store)
    with h5py.File(features / "s1.h5") as file:
        first, count = opened.tiles_of_slide(1)
        assert file["coords"][:].tolist() == [list(opened.coordinates_of(t)) for t in range(first, first + count)]
