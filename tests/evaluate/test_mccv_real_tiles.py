"""Splits that do not keep a patient's tiles together flatter features that only recognise the patient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hpcssl.evaluate.knn import Neighbours
from hpcssl.evaluate.labelled import label_features
from hpcssl.evaluate.splits import make_splits
from hpcssl.pipelines.evaluate import find_neighbours
from hpcssl.slides.slide_table import read_slides

NUM = 10


def colours_of_tiles(tiles: Path, organ: str, out: Path) -> pd.DataFrame:
    """Write each tile as a bag of its own, a colour histogram; return the tiles' labels and groups."""
    out.mkdir()
    slides = read_slides(tiles / "slides.csv")
    rows = []
    for slide in slides[slides["organ"] == organ].itertuples():
        for number, file in enumerate(sorted((tiles / organ / slide.slide_id).glob("*.jpg"))):
            pixels = np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3) // 32
            counts = np.bincount(pixels @ np.array([64, 8, 1]), minlength=512)
            name = f"{slide.slide_id}-{number}"
            np.save(out / f"{name}.npy", np.sqrt(counts / len(pixels), dtype=np.float32)[None])
            rows.append((name, slide.label, slide.patient_id or slide.slide_id))
    return pd.DataFrame(rows, columns=["slide_id", "label", "patient_id"])


def accuracy(features: Path, splits: pd.DataFrame, file: Path) -> float:
    """Return how often a tile's nearest neighbour in training has its class, mean over the splits."""
    splits.to_csv(file, index=False)
    table = find_neighbours(label_features([features], [file]), Neighbours(k=1))
    return float(table[table["metric"] == "accuracy"]["value"].mean())


@pytest.mark.long
@pytest.mark.parametrize(("organ", "least"), [("lung", 0.04), ("breast", 0.1)])
def test_random_splits_are_optimistic(real_data: Path, tmp_path: Path, organ: str, least: float) -> None:
    """Lung: 8 tiles of each photograph. Breast: 27 patients."""
    table = colours_of_tiles(real_data / "tiles", organ, tmp_path / "colour")
    grouped = make_splits(table, "label", NUM)
    at_random = make_splits(table.drop(columns="patient_id"), "label", NUM)
    honest = accuracy(tmp_path / "colour", grouped, tmp_path / f"{organ}.csv")
    flattered = accuracy(tmp_path / "colour", at_random, tmp_path / f"{organ}-random.csv")
    assert flattered - honest > least, (flattered, honest)
