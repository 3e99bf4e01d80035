"""Synthetic tiles: layout, identity, resuming, speed, and a label that is texture and not colour."""

from __future__ import annotations

import io
import itertools
import time
from pathlib import Path

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
from hpcssl.synthetic import drawn_tiles as synthetic
from hpcssl.synthetic.drawn_tiles import LABELS, Slide, draw_tile, draw_tiles, plan_slides, prepare

SMALL = {"organs": ("breast", "colon"), "slides_per_organ": (4, 2), "tiles_per_slide": (4, 3), "tile_px": 64}


def materials_of(seed: int) -> synthetic.Materials:
    return prepare(np.random.default_rng(seed))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_layout_and_table_agree(tmp_path: Path) -> None:
    seen: list[int] = []
    out = draw_tiles(tmp_path / "tiles", seed=3, on_progress=seen.append, **SMALL)
    slides = read_slides(out / "slides.csv")
    assert list(slides.columns) == ["slide_id", "organ", "patient_id", "label", "num_tiles"]
    assert slides["organ"].value_counts().to_dict() == {"breast": 4, "colon": 2}
    assert seen == slides["num_tiles"].tolist()
    for slide in slides.itertuples():
        tiles = sorted((out / slide.organ / slide.slide_id).iterdir())
        assert len(tiles) == slide.num_tiles
        for tile in tiles:
            with Image.open(tile) as image:
                assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))
    assert len(list(out.rglob("*.jpg"))) == slides["num_tiles"].sum()


def test_defaults_are_imbalanced_in_organs_and_even_in_labels() -> None:
    slides = plan_slides(0, ("breast", "lung", "colon"), (75, 45, 30), (24, 17, 15))
    frame = pd.DataFrame([(s.organ, s.patient_id, s.label, s.num_tiles) for s in slides])
    frame.columns = ["organ", "patient", "label", "tiles"]
    share = frame.groupby("organ")["tiles"].sum() / frame["tiles"].sum()
    assert share["breast"] == pytest.approx(0.60, abs=0.05)
    assert share["lung"] == pytest.approx(0.25, abs=0.05)
    assert share["colon"] == pytest.approx(0.15, abs=0.05)
    assert frame["tiles"].sum() == pytest.approx(3000, rel=0.1)
    assert frame.groupby("organ")["tiles"].nunique().min() > 5
    assert set(frame.groupby("patient").size()) == {1, 2}
    assert frame.groupby("patient")["label"].nunique().max() == 1
    assert frame.groupby("organ")["label"].apply(lambda c: (c == "malignant").mean()).between(0.4, 0.6).all()


def test_only_positive_slides_are_altered_and_only_in_part() -> None:
    for slide in plan_slides(5, ("lung",), (40,), (20,)):
        share = len(slide.altered) / slide.num_tiles
        assert share == 0 if slide.label == LABELS[0] else 0.33 <= share <= 0.67


def test_a_tile_is_a_function_of_its_identity(tmp_path: Path) -> None:
    """The same tile alone, in another order and in a larger draw; another seed, slide or index gives another tile."""
    out = draw_tiles(tmp_path / "tiles", seed=3, **SMALL)
    slides = plan_slides(3, ("colon",), (2,), (3,))
    materials = prepare(synthetic._random(3, "materials"))
    drawn = {}
    for slide, i in reversed([(s, i) for s in slides for i in range(s.num_tiles)]):
        drawn[slide.slide_id, i] = draw_tile(materials, slide, i, seed=3, tile_px=64)
        expected = (out / "colon" / slide.slide_id / f"{i:03d}.jpg").read_bytes()
        assert synthetic._jpeg(drawn[slide.slide_id, i]) == expected
    for a, b in itertools.combinations(drawn.values(), 2):
        assert not np.array_equal(a, b)
    other = draw_tile(materials, slides[0], 0, seed=4, tile_px=64)
    assert not np.array_equal(other, drawn[slides[0].slide_id, 0])


def test_stopped_and_started_again_gives_the_same_bytes(tmp_path: Path) -> None:
    whole = contents(draw_tiles(tmp_path / "whole", seed=3, **SMALL))
    for stop_at in (1, 4, 6):
        out = tmp_path / f"stopped{stop_at}"
        calls = iter(range(1, 100))

        def stop(_: int, calls=calls, stop_at=stop_at) -> None:
            if next(calls) == stop_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            draw_tiles(out, seed=3, on_progress=stop, **SMALL)
        assert not (out / "slides.csv").exists()
        if stop_at < 6:  # what kill -9 inside the last slide leaves
            (out / "colon" / ".colon_001.partial").mkdir(parents=True)
            (out / "colon" / ".colon_001.partial" / "000.jpg").write_bytes(b"half a til")
        draw_tiles(out, seed=3, **SMALL)
        assert contents(out) == whole


def test_a_failed_write_leaves_no_slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        if path.name == "001.jpg":
            raise OSError(28, "No space left on device")
        time.sleep(0.05)  # still writing when the first one has failed
        path.write_bytes(data)

    monkeypatch.setattr(synthetic, "_write_synced", full)
    with pytest.raises(OSError, match="No space"):
        draw_tiles(tmp_path / "tiles", seed=3, **SMALL)
    assert sorted(contents(tmp_path / "tiles")) == ["drawn.json"]


def test_other_settings_or_other_files_are_refused(tmp_path: Path) -> None:
    out = draw_tiles(tmp_path / "tiles", seed=3, **SMALL)
    before = contents(out)
    with pytest.raises(StoreError, match="choose another folder"):
        draw_tiles(out, seed=4, **SMALL)
    with pytest.raises(StoreError, match="choose another folder"):
        draw_tiles(out, seed=3, **{**SMALL, "tile_px": 96})
    assert contents(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(StoreError, match="not empty"):
        draw_tiles(tmp_path / "mine", seed=3, **SMALL)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"organs": ("breast", "colno")}, "colno.*known: breast, lung, colon"),
        ({"slides_per_organ": (4,)}, "one positive number"),
        ({"tiles_per_slide": (4, 0)}, "one positive number"),
        ({"organs": (), "slides_per_organ": (), "tiles_per_slide": ()}, "one positive number"),
        ({"tile_px": 63}, "multiple of 4"),
    ],
)
def test_settings_that_cannot_be_drawn(tmp_path: Path, change: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        draw_tiles(tmp_path / "tiles", seed=3, **{**SMALL, **change})
    assert not (tmp_path / "tiles").exists()


def test_colours_are_those_of_haematoxylin_and_eosin(real_data: Path) -> None:
    """Tissue is pink to purple (green least), nuclei are bluer than stroma, and the spread is that of real tiles."""
    materials = materials_of(0)
    slides = plan_slides(0, ("breast", "lung", "colon"), (8, 8, 8), (2, 2, 2))
    drawn = np.stack([draw_tile(materials, s, 0, seed=0, tile_px=224)[..., :3] for s in slides]).astype(float)
    files = sorted((real_data / "tiles").rglob("*.jpg"))[::230]
    real = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files]).astype(float)
    for tiles in (drawn, real):
        red, green, blue = np.moveaxis(tiles[tiles.min(axis=-1) < 200], -1, 0)
        assert np.mean(green <= np.minimum(red, blue)) > 0.8
        assert np.mean(blue > red) > np.mean(green > red)
    assert np.abs(drawn.mean(axis=(0, 1, 2)) - real.mean(axis=(0, 1, 2))).max() < 40
    assert 0.5 < drawn.std() / real.std() < 2


def histogram(tiles: np.ndarray) -> np.ndarray:
    return np.concatenate([np.histogram(tiles[..., c], 16, (0, 256), density=True)[0] * 256 for c in range(3)])


def bulk(tile: np.ndarray) -> float:
    """Return the share of the dark area that lies in the middle of a dark square of 9 pixels: large nuclei."""
    red = tile[..., 0].astype(float)
    dark = red < (np.percentile(red, 1) + np.median(red)) / 2
    sums = np.pad(dark.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    full = sums[9:, 9:] - sums[:-9, 9:] - sums[9:, :-9] + sums[:-9, :-9]
    return (full > 0.9 * 81).sum() / max(dark.sum(), 1)


def auc_by_patient(features: np.ndarray, slides: list[Slide]) -> float:
    """Return the cross-validated AUC of a logistic regression, patients kept together, organs centred."""
    organ = np.array([s.organ for s in slides])
    centred = features.copy()
    for name in set(organ):
        centred[organ == name] -= features[organ == name].mean(axis=0)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1))
    positive = np.array([s.label == LABELS[1] for s in slides])
    groups = [s.patient_id for s in slides]
    scores = cross_val_predict(model, centred, positive, groups=groups, cv=GroupKFold(5), method="predict_proba")[:, 1]
    return float(roc_auc_score(positive, scores))


@pytest.mark.parametrize("seed", [0, 1])
def test_texture_tells_the_label_and_colour_does_not(seed: int) -> None:
    materials = materials_of(seed)
    slides = plan_slides(seed, ("breast", "lung", "colon"), (40, 40, 40), (8, 8, 8))
    colours, textures = [], []
    for slide in slides:
        tiles = np.stack([draw_tile(materials, slide, i, seed=seed, tile_px=224) for i in range(slide.num_tiles)])
        # what a store holds is JPEG
        tiles = np.stack([np.asarray(Image.open(io.BytesIO(synthetic._jpeg(t)))) for t in tiles])
        colours.append(histogram(tiles))
        textures.append(np.quantile([bulk(t) for t in tiles], [0.5, 0.8]))
    colour, texture = auc_by_patient(np.array(colours), slides), auc_by_patient(np.array(textures), slides)
    assert colour < 0.65, (colour, texture)
    assert texture > 0.8, (colour, texture)


def test_250_tiles_a_second_on_one_core() -> None:
    materials = materials_of(0)
    slides = plan_slides(0, ("breast", "lung", "colon"), (2, 2, 2), (10, 10, 10))
    best = 0.0
    for _ in range(3):
        begun = time.thread_time()
        for slide in slides:
            for i in range(slide.num_tiles):
                synthetic._jpeg(draw_tile(materials, slide, i, seed=0, tile_px=224))
        best = max(best, sum(s.num_tiles for s in slides) / (time.thread_time() - begun))
    assert best > 250, best
