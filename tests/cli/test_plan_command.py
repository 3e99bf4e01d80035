"""`hpcssl plan`: the table, the contact sheet, and what both refuse, each in one line."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpcssl.cli.main import main
from hpcssl.loader import pillow
from hpcssl.loader.sheet import contact_sheet
from hpcssl.plan.draw import Q16, draw_plan
from hpcssl.plan.recipe import dino_augment
from hpcssl.train.pretrain_config import load_recipe

pytestmark = pytest.mark.timeout(120)

HISTOLOGY = [
    argument
    for kind in ("global_views", "local_views")
    for setting in ("stain=0.5", "quarter_turns=true", "flip_vertical=0.5")
    for argument in ("--set", f"augment.{kind}.{setting}")
]


def run(*arguments: object) -> int:
    return main(["plan", *map(str, arguments)])


# show


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[list[str], str]:
    """The table's lines, and what follows them."""
    capsys.readouterr()
    assert run("show", *arguments) == 0
    table, _, rest = capsys.readouterr().out.partition("\n\n")
    return table.splitlines(), rest


def test_show_prints_one_line_a_view_and_the_digest(capsys: pytest.CaptureFixture[str]) -> None:
    table, rest = shown(capsys, "--positions", "5:8")
    plan = draw_plan(dino_augment(), 0, np.arange(5, 8))
    assert len(table) == 1 + 3 * 10
    assert rest.splitlines()[-1] == f"plan digest {plan.digest()}"
    assert "recipe dino-vits16-opal, seed 0, positions 5:8" in rest
    views, windows = plan.kinds[1], plan.kinds[1].windows(224, 224)
    for p in range(3):
        for v in range(8):
            words = table[1 + 10 * p + 2 + v].split()
            assert words[:3] == [str(5 + p), "local", str(v + 1)]
            assert words[3:7] == [str(n) for n in windows[p, v]]
            assert words[7] == ("h" if views.flip[p, v] else "-")
            assert (f"{views.sigma[p, v] / Q16:.2f}" in words[8:]) == bool(views.blur[p, v])
            jitter = {"BCSH"[i] for i in range(4)} if views.jitter[p, v] else set()
            assert set("BCSH") & set(words[8:]) == jitter


def test_show_takes_seed_settings_and_tile_size(capsys: pytest.CaptureFixture[str]) -> None:
    plain, rest = shown(capsys, "--positions", "0:2")
    seeded = shown(capsys, "--positions", "0:2", "--seed", 1)
    assert seeded[0] != plain
    assert seeded[1] != rest
    for same in (["--set", "seed=1"], ["--set", "seed=2", "--seed", 1]):
        table, after = shown(capsys, "--positions", "0:2", *same)
        assert table == seeded[0]
        assert after.splitlines()[-1] == seeded[1].splitlines()[-1], "the digest"
    larger, told = shown(capsys, "--positions", "0:2", "--tile-px", 448)
    assert larger != plain
    assert told.splitlines()[-1] == rest.splitlines()[-1], "the plan is the same for any tile"
    assert "448 x 448" in told


def test_show_tells_the_histology_options(capsys: pytest.CaptureFixture[str]) -> None:
    table, rest = shown(capsys, "--positions", "0:12", "--recipe", "dino-demo", *HISTOLOGY)
    text = "\n".join(table)
    for turn in ("90", "180", "270"):
        assert re.search(rf"  {turn}  ", text)
    assert re.search(r"  v +", text)
    assert len(re.findall(r"(?:[01]\.\d{3}[+-]0\.\d{3} ?){3}", text)) > 10
    assert "haematoxylin" in rest


def test_show_counts_the_masked_patches(capsys: pytest.CaptureFixture[str]) -> None:
    _, rest = shown(capsys, "--positions", "0:2", "--recipe", "mae-demo")
    recipe = load_recipe("mae-demo")
    assert "27 of 36 patches are hidden" in rest
    plan = draw_plan(recipe.augment, recipe.seed, np.arange(2), num_patches=36)
    assert rest.splitlines()[-1] == f"plan digest {plan.digest()}"


# draw


@pytest.fixture
def recipe_file(small, tmp_path: Path) -> Path:
    """A small DINO recipe: 2 views of 32 px and 2 of 16."""
    path: Path = small.write_recipe(tmp_path / "small.yaml", small.dino_recipe())
    return path


def drawing(data, recipe: object, out: Path, *more: object) -> list[object]:
    source = ["--store", data.store_path, "--schedule", data.schedule_path, "--recipe", recipe]
    return ["draw", *source, "--out", out, *more]


def test_draw_writes_a_sheet_of_what_training_sees(data, recipe_file: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "sheet.png"
    assert run(*drawing(data, recipe_file, out, "--positions", "38:41", *HISTOLOGY)) == 0, "across pseudo-epochs"
    assert "3 positions, 4 views each" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["sheet.png"], "nothing temporary stays"
    sheet = np.asarray(Image.open(out))
    settings = [argument for argument in HISTOLOGY if argument != "--set"]
    recipe = load_recipe(str(recipe_file), settings)
    plan = draw_plan(recipe.augment, recipe.seed, np.arange(38, 41))
    views = [np.empty((k.count, 3, k.view_px, k.view_px, 3), np.uint8) for k in recipe.augment.kinds]
    for p, tile in enumerate(data.schedule.tiles_at(38, 41).tolist()):
        pillow.augment(pillow.decode(data.store.fetch(38 + p, tile), name="t"), recipe.augment, plan, p, views)
    for kind in views:
        for picture in kind.reshape(-1, *kind.shape[2:]):
            assert stands_in(sheet, picture)
    assert not stands_in(sheet, 255 - views[0][0, 0])


def stands_in(sheet: np.ndarray, picture: np.ndarray) -> bool:
    """Whether a picture stands somewhere in a sheet, pixel by pixel."""
    height, width = picture.shape[:2]
    rows = len(sheet) - height + 1
    columns = sheet.shape[1] - width + 1
    corners = (sheet[:rows, :columns] == picture[0, 0]).all(axis=-1)
    return any((sheet[y : y + height, x : x + width] == picture).all() for y, x in np.argwhere(corners))


def test_a_sheet_shows_masks_and_breaks_long_titles(small) -> None:
    recipe = replace(dino_augment(), local_views=None, mask_ratio=0.75)
    plan = draw_plan(recipe, 0, np.arange(1), num_patches=4)
    short, long = (
        contact_sheet(title, ["position 0"], [small.jpeg(0)], ["t"], recipe, plan) for title in ("a", "word " * 300)
    )
    assert long.width == short.width
    assert long.height > short.height
    hidden = (np.asarray(short) == (150, 150, 150)).all(axis=-1).sum()
    assert 3 * 112**2 <= hidden < 3.1 * 112**2


def test_a_whole_sheet_of_64_positions_is_the_same_bytes_again(data, recipe_file: Path, tmp_path: Path) -> None:
    for name in ("a.PNG", "b.png"):
        assert run(*drawing(data, recipe_file, tmp_path / name, "--positions", "0:64")) == 0
    assert Image.open(tmp_path / "a.PNG").height > 64 * 160
    assert (tmp_path / "a.PNG").read_bytes() == (tmp_path / "b.png").read_bytes()


# what is refused


@pytest.mark.parametrize("positions", ["3", "3:3", "4:2", "-1:2", "a:b", "1:2:3", "0:", "0:9999999999999999999", "٣:٤"])
def test_a_range_that_is_none_is_one_line(refused, positions: str) -> None:
    assert "expected A:B such as 64:80" in refused("plan", "show", f"--positions={positions}")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--positions", "0:10001"], "10001 positions; at most 10000 at a time, such as 0:10000"),
        (["--positions", "0:1", "--recipe", "dino-vits16-opl"], "did you mean dino-vits16-opal?"),
        (["--positions", "0:1", "--recipe", "none.yaml"], "no such file"),
        (["--positions", "0:1", "--set", "augment.stain_alpa=1"], "did you mean stain_alpha?"),
        (["--positions", "0:1", "--set", "augment.global_views.stain=2"], "stain = 2; expected at most 1"),
        (["--positions", "0:1", "--set", "augment.stain_beta=-1"], "stain_beta = -1; expected at least 0"),
        (["--positions", "0:1", "--tile-px", "0"], "expected a whole number from 1"),
        (["--positions", "0:1", "--seed", "x"], "--seed"),
        ([], "--positions"),
    ],
)
def test_show_refuses_in_one_line(refused, arguments: list[str], told: str) -> None:
    assert told in refused("plan", "show", *arguments)


def test_draw_refuses_in_one_line(small, data, recipe_file: Path, tmp_path: Path, refused) -> None:
    out, last, other = tmp_path / "sheet.png", data.schedule.num_positions, tmp_path / "other"
    tiles = small.make_tiles(tmp_path / "tiles", slides=2)
    assert main(["store", "build", str(tiles), "--out", str(other)]) == 0
    first = ("--positions", "0:1")
    for arguments, told in (
        (drawing(data, recipe_file, out, "--positions", "0:65"), "65 positions; at most 64 at a time, such as 0:64"),
        (drawing(data, recipe_file, out, "--positions", f"{last - 1}:{last + 1}"), f"its {last} positions"),
        (drawing(data, recipe_file, tmp_path / "s.jpg", *first), "ends in .png"),
        (drawing(data, "no-such", out, *first), "neither a .yaml file nor a name"),
        (drawing(data, recipe_file, out, *first, "--store", tmp_path), "no tile store"),
        (drawing(data, recipe_file, out, *first, "--store", other), "was built for other slides"),
    ):
        assert told in refused("plan", *arguments)
        assert not out.exists()


def test_draw_names_a_tile_that_cannot_be_decoded(small, recipe_file: Path, tmp_path: Path, refused) -> None:
    damaged = small.make_data(tmp_path / "data")
    file = damaged.store.file_of(int(damaged.schedule.tiles_at(0, 1)[0]))
    file.write_bytes(file.read_bytes()[:100])
    drawn = drawing(damaged, recipe_file, tmp_path / "sheet.png", "--positions", "0:1")
    assert f"{file}: cannot be decoded" in refused("plan", *drawn)
