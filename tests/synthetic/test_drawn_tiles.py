"""Synthetic tiles: layout, identity, resuming, and a label that is texture and not colour."""

from __future__ import annotations

import io
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hpcssl.core.errors import ConfigError, StoreError
from hpcssl.slides.slide_table import read_slides
from hpcssl.synthetic import drawn_slides
from hpcssl.synthetic.drawn_slides import LABELS, draw_tiles, encode_jpeg, plan_slides
from hpcssl.synthetic.tissue import Materials, Slide, draw_tile

SMALL: dict[str, Any] = {"seed": 3, "organs": {"breast": (4, 4), "colon": (2, 3)}, "tile_px": 64}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_tiles(tmp_path_factory.mktemp("synthetic") / "tiles", **SMALL)


def test_layout_and_table_agree(drawn: Path) -> None:
    slides = read_slides(drawn / "slides.csv")
    assert list(slides.columns) == ["slide_id", "organ", "patient_id", "label", "num_tiles"]
    assert slides["organ"].value_counts().to_dict() == {"breast": 4, "colon": 2}
    progress: list[int] = []
    draw_tiles(drawn, on_progress=progress.append, **SMALL)
    assert progress == slides["num_tiles"].tolist()
    for slide in slides.itertuples():
        tiles = sorted((drawn / slide.organ / slide.slide_id).iterdir())
        assert len(tiles) == slide.num_tiles
        for tile in tiles:
            with Image.open(tile) as image:
                assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))
    assert len(list(drawn.rglob("*.jpg"))) == slides["num_tiles"].sum()


def test_the_demo_is_imbalanced_in_organs_and_even_in_labels_and_alters_only_positive_slides_in_part() -> None:
    frame = pd.DataFrame(plan_slides(0), columns=Slide._fields)
    share = frame.groupby("organ")["num_tiles"].sum() / frame["num_tiles"].sum()
    assert share.to_dict() == pytest.approx({"breast": 0.60, "lung": 0.25, "colon": 0.15}, abs=0.05)
    assert frame["num_tiles"].sum() == pytest.approx(3000, rel=0.1)
    assert frame.groupby("organ")["num_tiles"].nunique().min() > 5
    assert set(frame.groupby("patient_id").size()) == {1, 2}
    assert frame.groupby("patient_id")["label"].nunique().max() == 1
    assert frame.groupby("organ")["label"].apply(lambda c: (c == "malignant").mean()).between(0.4, 0.6).all()
    altered = frame["altered"].map(len) / frame["num_tiles"]
    assert altered.where(frame["label"] == LABELS[1], 0.5).between(0.33, 0.67).all()
    assert (altered[frame["label"] == LABELS[0]] == 0).all()


def test_a_tile_is_a_function_of_its_identity(drawn: Path) -> None:
    """The same tile alone, in another order and in a larger draw; another seed, slide or index gives another tile."""
    slides, materials = plan_slides(3, {"colon": (2, 3)}), Materials(3)
    tiles = []
    for slide, i in reversed([(s, i) for s in slides for i in range(s.num_tiles)]):
        tiles.append(draw_tile(materials, slide, i, tile_px=64))
        assert encode_jpeg(tiles[-1]) == (drawn / "colon" / slide.slide_id / f"{i:03d}.jpg").read_bytes()
    materials.seed = 4
    tiles.append(draw_tile(materials, slides[0], 0, tile_px=64))
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(tiles, 2))


@pytest.mark.parametrize("stop_at", [1, 4, 6])
def test_stopped_and_started_again_gives_the_same_bytes(drawn: Path, tmp_path: Path, stop_at: int) -> None:
    out, calls = tmp_path / "tiles", itertools.count(1)

    def stop(_: int) -> None:
        if next(calls) == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_tiles(out, on_progress=stop, **SMALL)
    assert not (out / "slides.csv").exists()
    if stop_at < 6:  # what kill -9 inside the last slide leaves
        (out / "colon" / ".colon_001.partial").mkdir(parents=True)
        (out / "colon" / ".colon_001.partial" / "000.jpg").write_bytes(b"half a til")
    assert contents(draw_tiles(out, **SMALL)) == contents(drawn)


def test_a_failed_write_leaves_no_slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        if path.name == "001.jpg":
            raise OSError(28, "No space left on device")
        time.sleep(0.05)  # still writing when the first one has failed
        path.write_bytes(data)

    monkeypatch.setattr(drawn_slides, "_write_synced", full)
    with pytest.raises(OSError, match="No space"):
        draw_tiles(tmp_path / "tiles", **SMALL)
    assert sorted(contents(tmp_path / "tiles")) == ["drawn.json"]


def test_other_settings_or_other_files_are_refused(drawn: Path, tmp_path: Path) -> None:
    before = contents(drawn)
    for change in ({"seed": 4}, {"tile_px": 96}):
        with pytest.raises(StoreError, match="choose another folder"):
            draw_tiles(drawn, **SMALL | change)
    assert contents(drawn) == before
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(StoreError, match="not empty"):
        draw_tiles(tmp_path, **SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"organs": {"breast": (4, 4), "colno": (2, 3)}}, "colno.*known: breast, lung, colon"),
        ({"organs": {"breast": (4, 4), "colon": (2, 0)}}, "one positive number"),
        ({"organs": {}}, "one positive number"),
        ({"tile_px": 63}, "multiple of 4"),
    ],
)
def test_settings_that_cannot_be_drawn(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        draw_tiles(tmp_path / "tiles", **SMALL | change)
    assert not (tmp_path / "tiles").exists()


def test_colours_are_those_of_haematoxylin_and_eosin(real_data: Path) -> None:
    """Tissue is pink to purple (green least), nuclei are bluer than stroma, and the spread is that of real tiles."""
    materials, slides = Materials(0), plan_slides(0, {"breast": (8, 2), "lung": (8, 2), "colon": (8, 2)})
    synthetic = np.stack([draw_tile(materials, s, 0, tile_px=224)[..., :3] for s in slides]).astype(float)
    files = sorted((real_data / "tiles").rglob("*.jpg"))[::230]
    real = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files]).astype(float)
    for tiles in (synthetic, real):
        red, green, blue = np.moveaxis(tiles[tiles.min(axis=-1) < 200], -1, 0)
        assert np.mean(green <= np.minimum(red, blue)) > 0.8
        assert np.mean(blue > red) > np.mean(green > red)
    assert np.abs(synthetic.mean(axis=(0, 1, 2)) - real.mean(axis=(0, 1, 2))).max() < 40
    assert 0.5 < synthetic.std() / real.std() < 2


def bulk(tile: np.ndarray) -> float:
    """Return the share of the dark area that lies in the middle of a dark square of 9 pixels: large nuclei."""
    red = tile[..., 0].astype(float)
    dark = red < (np.percentile(red, 1) + np.median(red)) / 2
    sums = np.pad(dark.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    full = sums[9:, 9:] - sums[:-9, 9:] - sums[9:, :-9] + sums[:-9, :-9]
    return (full > 0.9 * 81).sum() / max(dark.sum(), 1)


def auc_by_patient(features: list[np.ndarray], slides: list[Slide]) -> float:
    """Return the cross-validated AUC of a logistic regression, patients kept together, organs centred."""
    frame = pd.DataFrame(np.array(features))
    centred = frame - frame.groupby([s.organ for s in slides]).transform("mean")
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1))
    positive, patients = [s.label == LABELS[1] for s in slides], [s.patient_id for s in slides]
    scores = cross_val_predict(model, centred, positive, groups=patients, cv=GroupKFold(5), method="predict_proba")
    return float(roc_auc_score(positive, scores[:, 1]))


@pytest.mark.parametrize("seed", [0, 1])
def test_texture_tells_the_label_and_colour_does_not(seed: int) -> None:
    materials, slides = Materials(seed), plan_slides(seed, {"breast": (40, 8), "lung": (40, 8), "colon": (40, 8)})
    colours, textures = [], []
    for slide in slides:
        jpegs = [encode_jpeg(draw_tile(materials, slide, i, tile_px=224)) for i in range(slide.num_tiles)]
        tiles = np.stack([np.asarray(Image.open(io.BytesIO(jpeg))) for jpeg in jpegs])
        histograms = [np.histogram(tiles[..., c], 16, (0, 256), density=True)[0] * 256 for c in range(3)]
        colours.append(np.concatenate(histograms))
        textures.append(np.quantile([bulk(tile) for tile in tiles], [0.5, 0.8]))
    colour, texture = auc_by_patient(colours, slides), auc_by_patient(textures, slides)
    assert colour < 0.65, (colour, texture)
    assert texture > 0.8, (colour, texture)
