"""Cutting slides into a store: what is cut, what fails, and the same bytes after any kill."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

from hpcssl.core.errors import ConfigError, StoreError
from hpcssl.slides import cutting
from hpcssl.slides.cutting import CutOptions
from hpcssl.slides.opening import open_slide
from hpcssl.slides.sampling import read_tile, sample
from hpcssl.slides.slide import Slide
from hpcssl.slides.slide_list import slides_to_read
from hpcssl.stores import tiling
from hpcssl.stores.kinds import open_store
from hpcssl.stores.tiling import Tiling, TilingOptions, tile_slides
from hpcssl.synthetic.drawn_slides import draw_slide

TILE_PX = 64
CUT = CutOptions(mpp=0.5, tile_px=TILE_PX)
LOOSE, PACKED = TilingOptions(cut=CUT, threads=2), TilingOptions(cut=CUT, pack=True, shard_gb=1e-5, threads=2)
SLIDES = {
    "a": {"seed": 1, "mpp": 0.25, "downsamples": (1, 4)},  # exact halves
    "b": {"seed": 2, "mpp": 0.499, "downsamples": (1,), "kind": "svs"},
    "c": {"seed": 3, "mpp": 0.31, "downsamples": (1, 2)},  # resampled
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    for name, kind in SLIDES.items():
        draw_slide(folder / f"{name}.tif", width=1000, height=800, **kind)
    rows = [f"{name},{'lung' if name == 'b' else 'skin'},{name}.tif,p{name}" for name in SLIDES]
    (folder / "slides.csv").write_text("\n".join(["slide_id,organ,path,patient_id", *rows]) + "\n")
    return folder


@pytest.fixture(scope="module")
def slides(folder: Path) -> pd.DataFrame:
    return slides_to_read(folder / "slides.csv")


@pytest.fixture(scope="module")
def tiled(slides: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiled") / "tiles"
    assert tile_slides(slides, out, LOOSE)[1] == []
    return out


def files(folder: Path) -> dict[str, bytes]:
    """All files, but for the place of the folder, which store.json tells."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: data.replace(str(folder).encode(), b"TILES") for name, data in found.items()}


def test_a_tile_is_the_slides_pixels_within_the_error_of_the_jpeg(tiled: Path) -> None:
    store = open_store(tiled)
    store.verify(deep=True)
    assert store.slides["slide_id"].tolist() == ["a", "b", "c"]
    errors = []
    for number, row in enumerate(store.slides.to_dict("records")):
        slide = open_slide(row["path"])
        sampling = sample(slide, slide_mpp=row["mpp"], mpp=0.5, tile_px=TILE_PX)
        first, count = store.tiles_of_slide(number)
        assert count > 5
        for tile in range(first, first + count):
            x, y = store.coordinates_of(tile)
            assert 0 <= x <= slide.width - sampling.side
            assert 0 <= y <= slide.height - sampling.side
            written = np.asarray(Image.open(io.BytesIO(store.fetch(0, tile)))).astype(int)
            assert written.shape == (TILE_PX, TILE_PX, 3)
            errors.append(np.abs(written - read_tile(slide, sampling, x, y)).mean())
            if tile == first:
                elsewhere = read_tile(slide, sampling, x + 5, y).astype(int)
                assert np.abs(written - elsewhere).mean() > 2 * errors[-1]
    assert max(errors) < 4
    assert np.mean(errors) < 2


def test_the_slide_table_says_what_reading_told(tiled: Path) -> None:
    table = pd.read_parquet(open_store(tiled).index / "slides.parquet").set_index("slide_id")
    assert table["mpp"].tolist() == pytest.approx([0.25, 0.499, 0.31], rel=1e-4)
    assert table["scanner"].tolist() == ["", "Aperio DRAWN", ""]
    assert table["reader"].tolist() == ["tiff"] * 3
    assert table["patient_id"].tolist() == ["pa", "pb", "pc"]
    for row in table.itertuples():
        covered = row.num_tiles * (TILE_PX * 0.5 / 1000) ** 2
        assert 0.6 * row.tissue_mm2 < covered < 1.3 * row.tissue_mm2
    again = pd.read_csv(tiled / "slides.csv")
    assert again["num_tiles"].tolist() == table["num_tiles"].tolist()
    for name in SLIDES:
        assert max(Image.open(tiled / "qc" / f"{name}.jpg").size) == 1024
    assert list((tiled / ".tiling").iterdir()) == []


def test_packed_is_the_same_store(slides: pd.DataFrame, tiled: Path, tmp_path: Path) -> None:
    packed, failed = tile_slides(slides, tmp_path / "packed", PACKED)
    loose = open_store(tiled)
    assert (failed, packed.kind, len(packed.header["shards"])) == ([], "packed", 3)
    packed.verify(deep=True)
    assert packed.digest == loose.digest
    for tile in range(0, loose.num_tiles, 7):
        assert packed.fetch(0, tile) == loose.fetch(0, tile)
    assert not any((tmp_path / "packed" / organ).exists() for organ in ("skin", "lung"))


def test_threads_change_no_byte(slides: pd.DataFrame, tiled: Path, tmp_path: Path) -> None:
    for threads in (1, 5):
        options = TilingOptions(cut=CUT, threads=threads)
        tile_slides(slides, tmp_path / str(threads), options)
        assert files(tmp_path / str(threads)) == files(tiled)


def killed_before(small: ModuleType, name: str, work: Callable[[], object]) -> bool:
    """Run work in a fork that is killed before it gives a file or folder this name; returns whether it came so far."""

    def run() -> None:
        real = os.replace

        def replace(source: Path, target: Path) -> None:
            if Path(target).match(name):
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)

        os.replace = replace
        work()

    return small.in_a_fork(run) != 0


STEPS = ["tiling.json", "qc/b.jpg", ".tiling/a-*.npy", ".tiling/b-*.json", "index-000001", "store.json"]
STEPS += ["failed_slides.csv", "slides.csv"]


@pytest.mark.parametrize(
    ("options", "steps"),
    [(LOOSE, [*STEPS, "skin/a", "lung/b"]), (PACKED, [*STEPS, ".tiling/b-*.jpegs"])],
    ids=["loose", "packed"],
)
def test_killed_anywhere_and_run_again_it_is_the_same_byte_for_byte(
    small: ModuleType, slides: pd.DataFrame, tmp_path: Path, options: TilingOptions, steps: list[str]
) -> None:
    slides = slides.iloc[:2]
    tile_slides(slides, tmp_path / "whole", options)
    whole = files(tmp_path / "whole")
    out = tmp_path / "killed"
    for step in steps:
        assert killed_before(small, step, lambda: tile_slides(slides, out, options)), step
        assert not (out / "store.json").exists() or open_store(out).num_slides == 2
        tile_slides(slides, out, options)
        assert files(out) == whole, f"killed before {step}"
        shutil.rmtree(out)


def test_a_killed_slide_is_not_cut_twice(slides: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut: list[str] = []
    real = tiling.plan_cut

    def stopping_once(row, *args, **more):
        cut.append(row["slide_id"])
        if cut.count("c") == 1 and row["slide_id"] == "c":
            raise RuntimeError("stopped")
        return real(row, *args, **more)

    monkeypatch.setattr(tiling, "plan_cut", stopping_once)
    with pytest.raises(RuntimeError, match="stopped"):
        tile_slides(slides, tmp_path / "out", LOOSE)
    assert sorted(cut) == ["a", "b", "c"]
    for _ in range(2):
        tile_slides(slides, tmp_path / "out", LOOSE)
        assert cut[3:] == ["c"]


def test_a_slide_whose_row_was_changed_is_cut_again(slides: pd.DataFrame, tmp_path: Path) -> None:
    Tiling(tmp_path / "out", LOOSE).read_some(slides, list(SLIDES))
    begun: list[int] = []
    store, _ = tile_slides(slides.assign(mpp=["", "", "0.4"]), tmp_path / "out", LOOSE, on_total=begun.append)
    assert begun == [1]
    assert store.slides["mpp"].iloc[2] == 0.4
    store.verify(deep=True)


def test_what_the_refusal_of_a_slide_without_mpp_advises_goes_on_in_the_same_folder(
    slides: pd.DataFrame, tmp_path: Path
) -> None:
    """Also from task to task: a slide cut with another assumption is cut again, and no other."""
    slides = pd.concat([slides.iloc[:1], unknown(tmp_path)], ignore_index=True)
    for out, held in ((tmp_path / "one", slides[1:]), (tmp_path / "both", slides)):
        tiled, failed = tile_slides(held, out, LOOSE)
        assert (tiled is None) == (len(held) == 1)
        assert "or say --assume-mpp" in failed[0]["reason"]
        begun: list[int] = []
        for assumed in (0.4, 0.25):
            assert slides_to_cut(held, out, assuming(assumed)) == ["u"]
            Tiling(out, assuming(assumed)).read_some(held, held["slide_id"].tolist())
        tiled, failed = tile_slides(held, out, assuming(0.25), on_total=begun.append)
        assert (failed, begun) == ([], [0])
        assert tiled.slides["mpp"].iloc[-1] == 0.25
        tiled.verify(deep=True)


def unknown(folder: Path) -> pd.DataFrame:
    """Draw a slide that does not say its MPP; returns its row."""
    path = folder / "unknown.tif"
    draw_slide(path, seed=9, width=1000, height=800, with_mpp=False)
    return pd.DataFrame([{"slide_id": "u", "organ": "skin", "path": str(path), "mpp": "", "patient_id": ""}])


def slides_to_cut(slides: pd.DataFrame, out: Path, options: TilingOptions) -> list[str]:
    return [row["slide_id"] for row in Tiling(out, options).missing(slides)]


def assuming(mpp: float) -> TilingOptions:
    return replace(LOOSE, cut=replace(CUT, assume_mpp=mpp))


def test_tiles_of_a_row_that_was_changed_are_removed(slides: pd.DataFrame, tiled: Path, tmp_path: Path) -> None:
    """Those under its former organ, and those of a slide that the table has no more; nothing else."""
    out = tmp_path / "out"
    former = slides.assign(organ=["skin", "lung", "colon"])
    new = slides.iloc[:1].assign(slide_id="gone")
    Tiling(out, LOOSE).read_some(pd.concat([former, new], ignore_index=True), [*SLIDES, "gone"])
    assert (out / "skin" / "gone").is_dir()
    assert (out / "colon" / "c").is_dir()
    (out / "skin" / "notes").mkdir()
    tile_slides(slides, out, LOOSE)
    assert (out / "skin" / "notes").is_dir()
    assert files(out).keys() - {"qc/gone.jpg"} == files(tiled).keys()
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == [".tiling", "index-000001", "lung", "qc", "skin"]
    tile_slides(pd.concat([slides, new], ignore_index=True).assign(organ=["skin", "lung", "skin", "x"]), out, LOOSE)
    open_store(out).verify()


def test_slides_that_cannot_be_read_stop_no_other(
    folder: Path, slides: pd.DataFrame, tiled: Path, tmp_path: Path
) -> None:
    data = (folder / "a.tif").read_bytes()
    draw_slide(tmp_path / "unknown.tif", seed=9, width=500, height=400, with_mpp=False)
    glass = np.full((400, 500, 3), 240, np.uint8)
    tifffile.imwrite(tmp_path / "blank.tif", glass, photometric="rgb", tile=(64, 64))
    (tmp_path / "cut.tif").write_bytes(data[: len(data) // 2])
    with tifffile.TiffFile(folder / "a.tif") as file:
        place, size = file.pages[0].dataoffsets[5], file.pages[0].databytecounts[5]
    (tmp_path / "broken.tif").write_bytes(data[:place] + bytes(size) + data[place + size :])
    bad = ["cut", "broken", "unknown", "blank", "absent"]
    paths, mpps = [str(tmp_path / f"{name}.tif") for name in bad], ["", "", "", "0.5", ""]
    rows = pd.DataFrame({"slide_id": bad, "organ": "skin", "path": paths, "patient_id": "", "mpp": mpps})
    mixed = pd.concat([slides.iloc[:1], rows, slides.iloc[1:]], ignore_index=True)
    store, failed = tile_slides(mixed, tmp_path / "out", LOOSE)
    assert [row["slide_id"] for row in failed] == bad
    reasons = dict(zip(bad, [row["reason"] for row in failed]))
    for words in ("no MPP", "slide unknown one in a column mpp", "--assume-mpp"):
        assert words in reasons["unknown"]
    assert "cannot be decoded" in reasons["broken"]
    assert "no tile of which 40 % is tissue" in reasons["blank"]
    assert "no such slide" in reasons["absent"]
    assert (tmp_path / "out" / "qc" / "blank.jpg").exists(), "to see why"
    assert pd.read_csv(tmp_path / "out" / "failed_slides.csv")["slide_id"].tolist() == bad
    assert store.digest == open_store(tiled).digest
    loose = {name: data for name, data in files(tmp_path / "out").items() if name.startswith(("skin", "lung"))}
    assert loose == {name: data for name, data in files(tiled).items() if name.startswith(("skin", "lung"))}


def test_whatever_a_reader_raises_is_one_slides_fault(
    folder: Path, slides: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(slide: Slide, *args: object) -> np.ndarray:
        if slide.path.endswith("b.tif"):
            raise ZeroDivisionError("in a codec")
        return read_tile(slide, *args)

    monkeypatch.setattr(cutting, "read_tile", read)
    store, failed = tile_slides(slides, tmp_path / "out", LOOSE)
    assert [row["reason"] for row in failed] == [f"{folder / 'b.tif'}: cannot be read (ZeroDivisionError: in a codec)"]
    assert store.slides["slide_id"].tolist() == ["a", "c"]


def test_a_full_disk_is_no_slides_fault(slides: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tiling, "atomic_dir", full)
    with pytest.raises(OSError, match="No space left"):
        tile_slides(slides, tmp_path / "out", LOOSE)
    monkeypatch.undo()
    assert tile_slides(slides, tmp_path / "out", LOOSE)[1] == []


def test_a_slide_that_was_mended_is_added_at_the_end(slides: pd.DataFrame, tmp_path: Path) -> None:
    mixed = pd.concat([unknown(tmp_path), slides.iloc[1:]], ignore_index=True)
    for options in (LOOSE, PACKED):
        out = tmp_path / ("packed" if options.pack else "loose")
        before, failed = tile_slides(mixed, out, options)
        assert [row["slide_id"] for row in failed] == ["u"]
        jpegs = [before.fetch(0, tile) for tile in range(before.num_tiles)]
        after, failed = tile_slides(mixed.assign(mpp=["0.25", "", ""]), out, options)
        assert failed == []
        assert after.slides["slide_id"].tolist() == ["b", "c", "u"]
        after.verify(deep=True)
        assert [after.fetch(0, tile) for tile in range(before.num_tiles)] == jpegs
        assert pd.read_csv(out / "failed_slides.csv").empty


@pytest.mark.parametrize("small_disk", ["8m"], indirect=True)
def test_tiles_are_cut_and_added_on_a_disk_of_their_own(slides: pd.DataFrame, small_disk: Path) -> None:
    """The disk's own folder, and a link to one on it: what is renamed may not come from beside it."""
    link = small_disk.with_name("link")
    (small_disk / "folder").mkdir()
    link.symlink_to(small_disk / "folder")
    for options in (LOOSE, PACKED):
        for number in (1, 2):
            store, failed = tile_slides(slides.iloc[:number], link, options)
            assert (store.num_slides, failed) == (number, [])
        store.verify(deep=True)
        shutil.rmtree(small_disk / "folder")
        (small_disk / "folder").mkdir()
    (small_disk / "folder").rmdir()
    assert tile_slides(slides.iloc[:1], small_disk, LOOSE)[0].num_slides == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"organ": "lung"}, "slide a has organ skin in it, asked for is lung"),
        ({"mpp": "0.5"}, "slide a has mpp 0.25 in it, asked for is 0.5"),
        ({"path": "/elsewhere/a.tif"}, r"slide a has path \S+/a.tif in it, asked for is /elsewhere/a.tif"),
    ],
)
def test_a_corrected_row_of_a_slide_that_the_store_holds_is_refused(
    slides: pd.DataFrame, tiled: Path, tmp_path: Path, change: dict[str, str], told: str
) -> None:
    """At once, also where an array would be submitted; to leave the row out is no correction."""
    before = files(tiled)
    new = slides.iloc[2:].assign(slide_id="new")
    corrected = pd.concat([slides.iloc[:1].assign(**change), slides.iloc[1:], new], ignore_index=True)
    begun: list[int] = []
    with pytest.raises(StoreError, match=told):
        tile_slides(corrected, tiled, LOOSE, on_total=begun.append)
    with pytest.raises(StoreError, match=told):
        slides_to_cut(corrected, tiled, LOOSE)
    assert begun == []
    assert slides_to_cut(corrected.iloc[1:], tiled, LOOSE) == ["new"]
    assert files(tiled) == before


def test_an_mpp_that_was_assumed_otherwise_is_refused(slides: pd.DataFrame, tmp_path: Path) -> None:
    slides = pd.concat([slides.iloc[:1], unknown(tmp_path)], ignore_index=True)
    store, _ = tile_slides(slides, tmp_path / "out", assuming(0.4))
    assert store.slides["mpp_from"].tolist() == ["file", "assumed"]
    with pytest.raises(StoreError, match=r"slide u has mpp 0.4 in it, asked for is 0.25"):
        tile_slides(slides, tmp_path / "out", assuming(0.25))
    assert tile_slides(slides, tmp_path / "out", LOOSE)[0].num_slides == 2
    assert tile_slides(slides.iloc[:1], tmp_path / "out", assuming(0.25))[0].num_slides == 2


@pytest.mark.parametrize("options", [LOOSE, PACKED], ids=["loose", "packed"])
def test_other_columns_are_those_of_the_table(slides: pd.DataFrame, tmp_path: Path, options: TilingOptions) -> None:
    """Of a slide that it does not list, those it had; its own slides.csv, with all that was measured, changes none."""
    out = tmp_path / "out"
    before, _ = tile_slides(slides.iloc[:2], out, options)
    after, _ = tile_slides(slides.iloc[1:2].assign(patient_id="q", grade="3"), out, options)
    assert after.slides[["patient_id", "grade"]].to_numpy().tolist() == [["pa", ""], ["q", "3"]]
    after.verify(deep=True)
    assert (after.digest, after.slides["mpp"].tolist()) == (before.digest, before.slides["mpp"].tolist())
    assert pd.read_csv(out / "slides.csv")["patient_id"].tolist() == ["pa", "q"]
    whole = files(out)
    tile_slides(slides_to_read(out / "slides.csv"), out, options)
    assert files(out) == whole, "nothing is new"
    grown, _ = tile_slides(slides.assign(grade="4"), out, options)
    assert grown.slides["grade"].tolist() == ["4"] * 3
    assert grown.slides["slide_id"].tolist() == ["a", "b", "c"]
    grown.verify(deep=True)


def test_another_cut_or_another_folder_is_refused(slides: pd.DataFrame, tiled: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"quality = 90, asked for is 80"):
        tile_slides(slides, tiled, TilingOptions(cut=CutOptions(mpp=0.5, tile_px=TILE_PX, quality=80)))
    (tmp_path / "thesis.doc").write_text("x")
    with pytest.raises(StoreError, match="not empty"):
        tile_slides(slides, tmp_path, LOOSE)
    with pytest.raises(ConfigError, match=r"--quality 0; expected 1 to 100"):
        CutOptions(quality=0)
    assert json.loads((tiled / "tiling.json").read_text())["quality"] == 90


def test_a_slide_coarser_than_the_tiles_is_refused(slides: pd.DataFrame, tmp_path: Path) -> None:
    _, failed = tile_slides(slides.iloc[1:2], tmp_path / "out", TilingOptions(cut=CutOptions(mpp=0.25, tile_px=64)))
    assert "0.499 microns per pixel, coarser than --mpp 0.25" in failed[0]["reason"]
