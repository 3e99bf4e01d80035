import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

from hpcssl.cli.main import main
from hpcssl.core.errors import ConfigError, SplitError
from hpcssl.evaluate import knn
from hpcssl.evaluate.knn import Neighbours
from hpcssl.evaluate.labelled import label_features
from hpcssl.evaluate.results import read_rows
from hpcssl.evaluate.splits import make_splits
from hpcssl.pipelines.evaluate import find_neighbours

SLIDES = [f"s{i:02d}" for i in range(24)]


@pytest.fixture
def inputs(tmp_path, write_features):
    """24 slides of 1 to 9 tiles and three classes that shift the tiles' direction."""
    rng = np.random.default_rng(0)
    labels = [f"c{i % 3}" for i in range(24)]
    write_features("uni", SLIDES, lambda i: rng.normal(size=(rng.integers(1, 10), 8)) + 1.5 * (np.arange(8) == i % 3))
    table = pd.DataFrame({"slide_id": SLIDES, "label": labels})
    make_splits(table, "label", num=3).to_csv(tmp_path / "organ.csv", index=False)
    return tmp_path


def pairs(folder):
    return label_features([folder / "uni"], [folder / "organ.csv"])


@pytest.mark.parametrize("rows", [7, 512])
def test_tiles_are_told_as_by_scikit_learn(inputs, monkeypatch, rows):
    monkeypatch.setattr(knn, "_ROWS", rows)  # chunks that end within a slide
    (data,) = pairs(inputs)
    values = Neighbours(k=5, weighted=False).measure(data).set_index(["split", "metric"])["value"]
    bags = [data.features.load(slide) for slide in data.table["slide"]]
    of = np.repeat(np.arange(24), [len(bag) for bag in bags])
    tiles, labels = np.concatenate(bags), data.table["target"].to_numpy()
    for split in (1, 2, 3):
        train = (data.table[f"mccv{split}"] == "train").to_numpy()[of]
        model = KNeighborsClassifier(5, metric="cosine").fit(tiles[train], labels[of[train]])
        votes = model.predict_proba(tiles[~train])
        expected = roc_auc_score(labels[of[~train]], votes, multi_class="ovr")
        assert values[split, "tile_auc"] == pytest.approx(expected, abs=1e-6)
        by_slide = pd.DataFrame(votes).groupby(of[~train]).mean()
        expected = roc_auc_score(labels[by_slide.index], by_slide.to_numpy(), multi_class="ovr")
        assert values[split, "auc"] == pytest.approx(expected, abs=1e-6)
        right = by_slide.to_numpy().argmax(axis=1) == [int(name[1]) for name in labels[by_slide.index]]
        assert values[split, "accuracy"] == pytest.approx(right.mean())


def test_near_neighbours_weigh_more():
    similarity, labels = torch.tensor([[1.0, 0.5, 0.5]]), torch.tensor([0, 1, 1])
    assert knn.neighbours_vote(similarity, labels, 2, 3, True)[0, 0] > 0.99
    assert knn.neighbours_vote(similarity, labels, 2, 3, False)[0, 0] == pytest.approx(1 / 3)
    assert knn.neighbours_vote(similarity, labels, 2, 1, False)[0].tolist() == [1, 0]
    assert knn.neighbours_vote(similarity, labels, 2, 99, False)[0, 1] == pytest.approx(2 / 3)


def test_slides_with_many_tiles_give_some_of_them(inputs):
    features, of = knn.sample_tiles(pairs(inputs)[0].features, SLIDES, 3)
    assert np.bincount(of).max() == 3
    torch.testing.assert_close(features.norm(dim=1), torch.ones(len(of)))


def test_results_join_those_of_the_heads(inputs, capsys):
    where = ("--features", inputs / "uni", "--splits", inputs / "organ.csv", "--out", inputs / "out")
    for command in (("mccv", *where, "--preset", "mccv-demo", "--epochs", "1"), ("knn", *where, "--k", "5")):
        assert main([str(argument) for argument in command]) == 0
    assert "uni, k-NN" in capsys.readouterr().out
    table = read_rows(inputs / "out" / "results.csv")
    assert set(table["encoder"]) == {"uni", "uni, k-NN"}
    before = (inputs / "out" / "results.csv").read_bytes()
    assert main(["knn", *map(str, where), "--k", "5"]) == 0
    assert main(["mccv", *map(str, where), "--preset", "mccv-demo", "--epochs", "1"]) == 0
    assert (inputs / "out" / "results.csv").read_bytes() == before
    assert main(["knn", *map(str, where), "--k", "6"]) == 2
    assert "made with k = 5, now 6" in capsys.readouterr().err


def test_settings_and_targets_that_cannot_be_used_and_numbers_that_are_named_classes(inputs, capsys):
    with pytest.raises(ConfigError, match="k = 0"):
        Neighbours(k=0)
    table = pd.read_csv(inputs / "organ.csv").assign(target=np.arange(24) / 2)
    table.to_csv(inputs / "organ.csv", index=False)
    with pytest.raises(SplitError, match="k-NN tells classes only"):
        find_neighbours(pairs(inputs), Neighbours())
    grades = [str(i % 3 + (i % 2) / 2) for i in range(24)]  # 0, 0.5 … 2.5
    table = pd.DataFrame({"slide_id": SLIDES, "label": grades})
    make_splits(table, "label", num=2, kind="classes").to_csv(inputs / "organ.csv", index=False)
    call = ["knn", "--features", str(inputs / "uni"), "--splits", str(inputs / "organ.csv")]
    assert main(call) == 2
    assert "--kind classes" in capsys.readouterr().err
    assert main([*call, "--kind", "classes"]) == 0
