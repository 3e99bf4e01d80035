import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hpcssl.core.errors import FeatureError
from hpcssl.mccv import fit as fit_module
from hpcssl.mccv.bags import Bags
from hpcssl.mccv.fit import Run, fit
from hpcssl.mccv.presets import PRESETS

_spec = importlib.util.spec_from_file_location("plain", Path(__file__).with_name("plain.py"))
plain = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plain)

DEMO = PRESETS["mccv-demo"]
SMALL = replace(DEMO, epochs=3, warmup_epochs=1, hidden=(16, 12), attention=8)


def planted(num=60, dim=16, classes=2, shift=3.0, seed=0):
    """Slides of 1 to 9 tiles, of which one carries the label."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num) % classes
    slides = [rng.normal(size=(rng.integers(1, 10), dim)).astype(np.float32) for _ in range(num)]
    for slide, label in zip(slides, labels, strict=True):
        slide[rng.integers(len(slide)), label] += shift
    return slides, labels


def drawn(num_slides, lengths, seed=0):
    """One run per length of its train side; the first slides, of all classes, stand on either side."""
    rng = np.random.default_rng(seed)
    runs = []
    for number, length in enumerate(lengths, start=1):
        order = np.concatenate([[0, 1, 2], 6 + rng.permutation(num_slides - 6), [3, 4, 5]])
        runs.append(Run(split=number, replica=1, train=np.sort(order[:length]), val=np.sort(order[length:])))
    return runs


def values(table, run):
    part = table[(table["split"] == run.split) & (table["replica"] == run.replica)]
    return {(row.epoch, row.metric): row.value for row in part.itertuples()}


def assert_alike(found, expected, loss=1e-4, auc=1e-3):
    assert found.keys() == expected.keys()
    for (epoch, metric), value in expected.items():
        assert found[epoch, metric] == pytest.approx(value, abs=auc if metric == "auc" else loss), (epoch, metric)


@pytest.mark.parametrize("classes", [2, 3])
def test_stacked_runs_equal_the_plain_loop_also_with_unequal_lengths(classes):
    slides, labels = planted(30, classes=classes)
    runs = drawn(30, [20, 24, 17])
    preset = replace(SMALL, lr=3e-3, weight_decay=1.0, final_weight_decay=8.0)  # so strong that it shows where it acts
    table = fit(Bags.of(slides), labels, runs, preset)
    for run in runs:
        assert_alike(values(table, run), plain.fit_plain(slides, labels.tolist(), run, preset))


def test_the_papers_head_equals_the_plain_loop():
    slides, labels = planted(10)
    preset = replace(PRESETS["gma-50"], epochs=2, warmup_epochs=1)
    (run,) = drawn(10, [6])
    assert_alike(values(fit(Bags.of(slides), labels, [run], preset), run), plain.fit_plain(slides, labels, run, preset))


def test_a_run_alone_equals_that_run_among_others():
    slides, labels = planted(40)
    runs = drawn(40, [25, 30, 28, 30])
    among = fit(Bags.of(slides), labels, runs, SMALL)
    for run in runs:
        assert_alike(values(fit(Bags.of(slides), labels, [run], SMALL), run), values(among, run), loss=1e-5, auc=1e-9)


def test_same_inputs_same_bits_whatever_the_threads(monkeypatch):
    slides, labels = planted(30)
    runs = drawn(30, [20, 24, 17, 20])
    monkeypatch.setattr(fit_module, "STACKED_PARAMETERS", 1500)  # stacks of one and two
    first = fit(Bags.of(slides), labels, runs, SMALL)
    assert first.equals(fit(Bags.of(slides), labels, runs[::-1], SMALL, threads=3))
    assert not first.equals(fit(Bags.of(slides), labels, runs, SMALL, seed=1))


def test_replicas_of_a_split_differ():
    slides, labels = planted(20)
    (run,) = drawn(20, [14])
    table = fit(Bags.of(slides), labels, [run, replace(run, replica=2)], SMALL)
    losses = table[table["metric"] == "val_loss"].pivot(index="epoch", columns="replica", values="value")
    assert (losses[1] != losses[2]).all()


def test_a_planted_tile_is_found_and_shuffled_labels_are_not():
    slides, labels = planted(100, shift=6.0)
    runs = drawn(100, [80] * 6)
    found = last_auc(fit(Bags.of(slides), labels, runs, DEMO))
    assert found > 0.95
    shuffled = np.random.default_rng(1).permutation(labels)
    shuffled[:6] = labels[:6]
    assert 0.3 < last_auc(fit(Bags.of(slides), shuffled, runs, DEMO)) < 0.65


def last_auc(table):
    return table[(table["metric"] == "auc") & (table["epoch"] == table["epoch"].max())]["value"].mean()


def test_each_epoch_visits_every_training_slide_in_an_order_of_its_own():
    (run,) = drawn(40, [30])
    orders = [run.order(0, epoch).tolist() for epoch in (1, 2)]
    assert orders[0] != orders[1] != run.train.tolist()
    assert sorted(orders[0]) == sorted(orders[1]) == run.train.tolist()


def test_progress_counts_epochs_of_runs_and_torch_keeps_its_threads():
    slides, labels = planted(20)
    counted = []
    before = torch.get_num_threads()
    fit(Bags.of(slides), labels, drawn(20, [14, 12]), SMALL, on_progress=counted.append)
    assert sum(counted) == 2 * SMALL.epochs
    assert torch.get_num_threads() == before


def test_a_diverging_run_is_named():
    slides, labels = planted(20)
    with pytest.raises(FeatureError, match="split 1, replica 1: the loss is"):
        fit(Bags.of([np.sign(slide) * np.float32(3e38) for slide in slides]), labels, drawn(20, [14]), SMALL)
