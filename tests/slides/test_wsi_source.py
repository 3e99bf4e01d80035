"""Which slides a table or a folder names, and what is told of a table that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcssl.core.errors import SlideError
from hpcssl.slides.opening import open_slide
from hpcssl.slides.slide_list import mpp_of, slides_to_read
from hpcssl.synthetic.drawn_slides import draw_slide


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    for name in "abc":
        draw_slide(folder / f"{name}.tif", seed=0, width=128, height=128)
    return folder


def test_the_table_says_where_slides_are_and_its_mpp_goes_first(tmp_path, folder):
    table = tmp_path / "t.csv"
    table.write_text("slide_id,organ,path,mpp\nx,skin,sub/x.svs,0.3\ny,skin,s3://b/y.svs,\n")
    slides = slides_to_read(table)
    assert slides["path"].tolist() == [str(tmp_path / "sub/x.svs"), "s3://b/y.svs"]
    slide = open_slide(folder / "a.tif")
    assert [mpp_of(slide, row, 0.7) for row in slides.to_dict("records")] == [0.3, 0.25]
    found = slides_to_read(folder)
    assert found["slide_id"].tolist() == ["a", "b", "c"]
    assert set(found["organ"]) == {folder.name}
    for text, match in (
        ("slide_id,organ,path\nx,skin,\n", "row 1 has no path"),
        ("slide_id,organ,path,mpp\n,skin,x.tif,abc\n", "row 1 has no slide_id"),  # which is told before its MPP
        ("slide_id,organ,path,mpp\nx,skin,a.svs,20x\n", "slide x has mpp '20x'"),
    ):
        table.write_text(text)
        with pytest.raises(SlideError, match=match):
            slides_to_read(table)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SlideError, match="no slides in it"):
        slides_to_read(tmp_path / "empty")


def test_a_folder_of_slides_is_the_same_from_wherever_it_is_named(folder, tmp_path, monkeypatch):
    """So its table serves elsewhere, too, and no slide is cut twice because a job names the folder in full."""
    absolute = slides_to_read(folder)
    assert absolute["path"].tolist() == [str(folder / f"{name}.tif") for name in "abc"]
    monkeypatch.chdir(folder.parent)
    for named in (folder.name, f"{folder.name}/../{folder.name}"):
        assert slides_to_read(Path(named)).equals(absolute)
    monkeypatch.chdir(folder)
    assert slides_to_read(Path()).equals(absolute)


def test_links_in_a_folder_of_slides_count_for_what_they_are_called(folder, tmp_path):
    root = tmp_path / "by-organ"
    (root / "prostate").mkdir(parents=True)
    (root / "prostate" / "p1.tif").symlink_to(folder / "a.tif")
    (root / ".snapshot" / "old").mkdir(parents=True)
    (root / ".snapshot" / "old" / "o.tif").touch()
    (tmp_path / "elsewhere").mkdir()
    for name in ("k.tif", "L.SVS", "notes.txt", ".hidden.tif"):
        (tmp_path / "elsewhere" / name).touch()
    (root / "kidney").symlink_to(tmp_path / "elsewhere")
    (root / "prostate" / "round").symlink_to(root)
    found = slides_to_read(root)
    assert found[["slide_id", "organ", "path"]].to_numpy().tolist() == [
        ["L", "kidney", str(root / "kidney" / "L.SVS")],
        ["k", "kidney", str(root / "kidney" / "k.tif")],
        ["p1", "prostate", str(root / "prostate" / "p1.tif")],
    ]


@pytest.mark.parametrize(
    ("header", "column", "found"),
    [
        ("slide_id;organ;path;mpp", "slide_id", "'slide_id;organ;path;mpp'"),
        ("slide_id\torgan\tpath", "slide_id", r"'slide_id\torgan\tpath'"),
        ("organ,path,mpp", "slide_id", "'organ', 'path', 'mpp'"),
        ("slide_id,path,mpp", "organ", "'slide_id', 'path', 'mpp'"),
        ("slide_id, organ, path", "organ", "'slide_id', ' organ', ' path'"),
        ("slide_id,organ,Path", "path", "'slide_id', 'organ', 'Path'"),
    ],
)
def test_a_table_without_a_column_is_told_what_it_has(tmp_path, header, column, found):
    """And never of num_tiles, which nobody knows before."""
    table = tmp_path / "t.csv"
    table.write_text(f"{header}\n" + "x" + header.count(",") * ",x" + "\n")  # an MPP that cannot be used, too
    with pytest.raises(SlideError) as caught:
        slides_to_read(table)
    expected = "expected slide_id, organ, path, separated by commas alone"
    assert str(caught.value) == f"{table}: no column {column}; {expected}, found {found}"
