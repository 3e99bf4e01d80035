"""`hpcssl demo --slides`: its first stages; the others do not know where tiles are from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from hpcssl.cli.progress import display
from hpcssl.core.errors import ConfigError, SlideError
from hpcssl.pipelines.demo import Demo
from hpcssl.stores.kinds import open_store
from hpcssl.synthetic.drawn_slides import draw_slide


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo-slides")
    for name in ("a", "b"):
        draw_slide(folder / f"{name}.tif", seed=len(name), width=1800, height=1500, mpp=0.5, with_mpp=False)
    rows = ["slide_id,organ,path,mpp,label", "a,skin,a.tif,0.5,benign", "b,colon,b.tif,0.5,malignant"]
    (folder / "slides.csv").write_text("\n".join([*rows, "c,skin,gone.tif,0.5,benign"]) + "\n")
    (folder / "blind.csv").write_text("\n".join(["slide_id,organ,path", "a,skin,a.tif"]) + "\n")
    return folder / "slides.csv"


def make_demo(out: Path, slides: Path | None, **more: Any) -> Demo:
    return Demo(out=out, slides=slides, display=display(), **more)


def test_tiles_are_cut_once_and_what_cannot_be_read_is_told(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = make_demo(tmp_path / "demo", table)
    demo.claim()
    demo.prepare_tiles()
    demo.build_store()
    assert "1 of 3 slides are left out" in capsys.readouterr().err
    store = open_store(tmp_path / "demo" / "store")
    slides = store.slides[["slide_id", "organ", "label"]].to_numpy().tolist()
    assert slides == [["a", "skin", "benign"], ["b", "colon", "malignant"]]
    before = (store.path / "store.json").stat().st_mtime_ns
    demo.prepare_tiles()
    assert (store.path / "store.json").stat().st_mtime_ns == before
    demo.write_splits()
    assert not list((tmp_path / "demo" / "splits").glob("*.csv")), "two slides allow no benchmark"
    with pytest.raises(ConfigError, match="a demo with tiles = cut from"):
        make_demo(tmp_path / "demo", None).claim()


def first_stages(demo: Demo) -> list[str]:
    demo.claim()
    demo.prepare_tiles()
    demo.build_store()
    demo.write_splits()
    return demo.store.slides["slide_id"].tolist()


def test_what_was_left_out_is_taken_in_until_the_schedule_is_made(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a corrected table, or as the refusal advises; afterwards it is told again."""
    mended, out = tmp_path / "mended.csv", tmp_path / "demo"
    text = table.read_text().replace(",a.tif", f",{table.parent}/a.tif").replace(",b.tif", f",{table.parent}/b.tif")
    mended.write_text(text.replace("b.tif,0.5", "b.tif,"))
    assert first_stages(make_demo(out, mended)) == ["a"]
    assert "2 of 3 slides are left out, see" in capsys.readouterr().err
    assert "colon" not in (out / "splits" / "left_out.json").read_text()
    mended.write_text(text.replace("a.tif,0.5", "a.tif,"))  # it is held already: nothing to say anew
    assert first_stages(make_demo(out, mended)) == ["a", "b"]
    assert "1 of 3 slides are left out, see" in capsys.readouterr().err
    assert "colon" in (out / "splits" / "left_out.json").read_text(), "the splits are those of the store that has grown"
    shutil.copy(table.parent / "a.tif", tmp_path / "gone.tif")
    (out / "schedule").mkdir()
    assert first_stages(make_demo(out, mended)) == ["a", "b"]
    assert "1 of 3 slides are left out for good, as the schedule is made, see" in capsys.readouterr().err


def test_an_mpp_to_assume_may_be_said_as_the_refusal_advises(table: Path, tmp_path: Path) -> None:
    arguments = (tmp_path / "demo", table.with_name("blind.csv"))
    with pytest.raises(SlideError, match=r"none of 1 slides can be used; first: .*no MPP.*or say --assume-mpp"):
        first_stages(make_demo(*arguments))
    assert first_stages(make_demo(*arguments, assume_mpp=0.5)) == ["a"]
    with pytest.raises(ConfigError, match="--assume-mpp is of whole slides; give --slides, too"):
        make_demo(tmp_path / "other", None, assume_mpp=0.5).claim()


def test_a_mistyped_label_is_refused_before_slides_are_cut(table: Path, tmp_path: Path) -> None:
    with pytest.raises(SlideError, match=r"--label lable: no such column in the slide table; it has .*, label"):
        first_stages(make_demo(tmp_path / "demo", table, label="lable"))
    assert not (tmp_path / "demo").exists()
    assert first_stages(make_demo(tmp_path / "demo", table, label="label")) == ["a", "b"]
