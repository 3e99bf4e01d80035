import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from hpcssl.core.errors import FeatureError
from hpcssl.evaluate.mil import fits as fits_module
from hpcssl.evaluate.mil.bags import Bags
from hpcssl.evaluate.mil.fits import Fit, fit_heads
from hpcssl.evaluate.mil.presets import HEADS, PRESETS

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
    """One fit per length of its train side; the first slides, of all classes, stand on either side."""
    rng = np.random.default_rng(seed)
    fits = []
    for number, length in enumerate(lengths, start=1):
        order = np.concatenate([[0, 1, 2], 6 + rng.permutation(num_slides - 6), [3, 4, 5]])
        fits.append(Fit(split=number, replica=1, train=np.sort(order[:length]), val=np.sort(order[length:])))
    return fits


def values(table, fit):
    part = table[(table["split"] == fit.split) & (table["replica"] == fit.replica)]
    return {(row.epoch, row.metric): row.value for row in part.itertuples()}


def assert_alike(found, expected, loss=1e-4, auc=1e-3):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=auc if key[1] in ("auc", "accuracy") else loss), key


@pytest.fixture(params=["stacked", "single"])
def way(request, monkeypatch):
    """Both ways of a CPU: small heads in stacks, large ones fit by fit."""
    if request.param == "single":
        monkeypatch.setattr(fits_module, "SMALL_BAG", 0)
    return request.param


@pytest.mark.parametrize("classes", [2, 3])
def test_stacked_runs_equal_the_plain_loop_also_with_unequal_lengths(plain, classes, way):
    slides, labels = planted(30, classes=classes)
    fits = drawn(30, [20, 24, 17])
    preset = replace(SMALL, lr=3e-3, weight_decay=1.0, final_weight_decay=8.0)  # so strong that it shows where it acts
    table = fit_heads(Bags(slides), labels, fits, preset)
    for fit in fits:
        assert_alike(values(table, fit), plain.fit_plain(Bags(slides), labels, fit, preset))


@pytest.mark.parametrize("head", ["abmil", "mean", "max", "the paper's"])
def test_other_heads_equal_the_plain_loop(plain, head, way):
    slides, labels = planted(20)
    paper = replace(PRESETS["gma-50"], epochs=2, warmup_epochs=1)
    preset = replace(SMALL, head=head, **HEADS[head]) if head in HEADS else paper
    (fit,) = drawn(20, [14])
    found = values(fit_heads(Bags(slides), labels, [fit], preset), fit)
    assert_alike(found, plain.fit_plain(Bags(slides), labels, fit, preset))


def test_half_precision_changes_no_answer_but_the_digits():
    """20 splits x 2 replicas of a task of middling difficulty."""
    slides, labels = planted(100, shift=2.0)
    preset = replace(DEMO, epochs=4, warmup_epochs=1)
    fits = [replace(fit, replica=r) for fit in drawn(100, [50] * 20) for r in (1, 2)]
    tables = {p: fit_heads(Bags(slides), labels, fits, replace(preset, precision=p)) for p in ("fp32", "bf16")}
    losses = [table[table["metric"] == "train_loss"]["value"].to_numpy() for table in tables.values()]
    assert np.abs(losses[0] - losses[1]).max() > 0
    found = {precision: last_auc(table) for precision, table in tables.items()}
    assert 0.6 < found["fp32"] < 0.97
    assert abs(found["bf16"] - found["fp32"]) < 0.002


def test_the_same_bits_alone_and_among_others_whatever_the_order_and_the_threads(way):
    slides, labels = planted(40)
    fits = drawn(40, [25, 30, 28, 30])
    first = fit_heads(Bags(slides), labels, fits, SMALL)
    for fit in fits:
        assert values(fit_heads(Bags(slides), labels, [fit], SMALL), fit) == values(first, fit)
    assert first.equals(fit_heads(Bags(slides), labels, fits[::-1], SMALL, threads=3))
    assert not first.equals(fit_heads(Bags(slides), labels, fits, SMALL, seed=1))
    again = values(fit_heads(Bags(slides), labels, [replace(fits[0], replica=2)], SMALL), replace(fits[0], replica=2))
    assert all(again[key] != value for key, value in values(first, fits[0]).items() if key[1] == "val_loss")


def test_a_planted_tile_is_found_and_shuffled_labels_are_told_no_better_than_by_chance():
    """40 permutations, of each 60 slides train and 40 validate: the mean AUC is within three of its standard errors."""
    slides, labels = planted(100, shift=6.0)
    assert last_auc(fit_heads(Bags(slides), labels, drawn(100, [80] * 6), DEMO)) > 0.95
    permutations, rng = 40, np.random.default_rng(1)
    shuffled = np.concatenate([rng.permutation(labels) for _ in range(permutations)])
    fits = []
    for number in range(permutations):
        of_class = [100 * number + np.flatnonzero(shuffled[100 * number :][:100] == k) for k in (0, 1)]
        train, val = (np.sort(np.concatenate([c[part] for c in of_class])) for part in (slice(30), slice(30, None)))
        fits.append(Fit(split=number + 1, replica=1, train=train, val=val))
    table = fit_heads(Bags(slides * permutations), shuffled, fits, replace(DEMO, epochs=5, warmup_epochs=1))
    by_chance = np.sqrt((20 + 20 + 1) / (12 * 20 * 20) / permutations)  # deviation of the mean of Mann-Whitney's AUC
    assert by_chance < 0.015
    assert abs(last_auc(table) - 0.5) < 3 * by_chance


def last_auc(table):
    return table[(table["metric"] == "auc") & (table["epoch"] == table["epoch"].max())]["value"].mean()


def test_each_epoch_visits_every_training_slide_in_an_order_of_its_own():
    (fit,) = drawn(40, [30])
    orders = [fit.order(0, epoch).tolist() for epoch in (1, 2)]
    assert orders[0] != orders[1] != fit.train.tolist()
    assert sorted(orders[0]) == sorted(orders[1]) == fit.train.tolist()


def test_progress_counts_epochs_torch_keeps_its_threads_and_a_diverging_run_is_named():
    slides, labels = planted(20)
    counted, before = [], torch.get_num_threads()
    fit_heads(Bags(slides), labels, drawn(20, [14, 12]), SMALL, on_progress=counted.append)
    assert sum(counted) == 2 * SMALL.epochs
    assert torch.get_num_threads() == before
    with pytest.raises(FeatureError, match="split 1, replica 1: the loss is"):
        fit_heads(Bags([np.sign(slide) * np.float32(3e38) for slide in slides]), labels, drawn(20, [14]), SMALL)


def test_values_are_predicted_in_their_own_units_and_random_ones_are_not():
    slides, _ = planted(60, shift=0.0)
    amount = np.random.default_rng(3).normal(size=60)
    for slide, value in zip(slides, amount, strict=True):
        slide[:, 0] += 2 * value
    (fit,) = drawn(60, [45])
    preset = replace(SMALL, epochs=12, lr=1e-2)
    found = {}
    for scale, shift in ((1.0, 0.0), (100.0, 5000.0)):
        table = fit_heads(Bags(slides), scale * amount + shift, [fit], preset)
        found[scale] = {metric: value for (epoch, metric), value in values(table, fit).items() if epoch == 12}
    assert found[1.0]["r2"] > 0.6
    assert found[1.0]["spearman"] > 0.7
    assert found[1.0].keys() == {"train_loss", "val_loss", "r2", "mae", "spearman"}
    assert found[100.0]["r2"] == pytest.approx(found[1.0]["r2"], abs=1e-3)
    assert found[100.0]["mae"] == pytest.approx(100 * found[1.0]["mae"], rel=1e-3)
    slides, _ = planted(60)  # nothing in them tells the values
    table = fit_heads(Bags(slides), np.random.default_rng(3).normal(size=60), [fit], replace(SMALL, epochs=10))
    assert table[table["metric"] == "r2"]["value"].iloc[-1] < 0.3


def test_streamed_bags_give_the_same_bits_and_leave_nothing_behind(tmp_path, way):
    slides, labels = planted(30)
    fits = drawn(30, [20, 24])
    held = Bags(slides)
    streamed = Bags(slides, memory_gib=1e-6, scratch=tmp_path)
    assert streamed.streamed
    assert not held.streamed
    assert all(torch.equal(held.slide(i), streamed.slide(i)) for i in range(30))
    assert fit_heads(streamed, labels, fits, SMALL, threads=2).equals(fit_heads(held, labels, fits, SMALL))
    assert list(tmp_path.iterdir()) == []


_LARGE = """
import sys
from pathlib import Path
import numpy as np
from hpcssl.evaluate.mil.bags import Bags
from hpcssl.evaluate.mil.fits import Fit, fit_heads, head_sizes
from hpcssl.evaluate.mil.presets import preset_named

rng, counts, labels = np.random.default_rng(0), [200_000, 200_000, 1, 7, 3, 4], np.array([0, 1] * 3)
slides = (rng.standard_normal((n, 384), np.float32) for n in counts)
bags, preset = Bags(slides, memory_gib=0.01, scratch=Path(sys.argv[1])), preset_named("mccv-demo", 1)
sizes = head_sizes(preset, 384, labels)
before = 4096 * int(Path("/proc/self/statm").read_text().split()[1])
table = fit_heads(bags, labels, [Fit(split=1, replica=1, train=np.arange(4), val=np.arange(4, 6))], preset)
stated = 4 * (2 * 384 + sum(sizes.hidden) + 2 * sizes.attention) + 2 * sizes.dropout_units
(peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
taken = 1024 * int(peak.split()[1]) - before  # ru_maxrss would be that of the process that started this one, if larger
print(bags.streamed, np.isfinite(table["value"]).all(), taken / 2**20, 200_000 * stated / 2**20)
"""


def test_a_bag_of_200_000_tiles_is_fitted_in_the_memory_that_is_stated(tmp_path):
    done = subprocess.run([sys.executable, "-c", _LARGE, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    streamed, finite, taken, stated = done.stdout.split()
    assert (streamed, finite) == ("True", "True")
    assert 300 < float(taken) < float(stated) + 64  # MiB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_agrees_with_the_plain_loop_without_dropout(plain):
    slides, labels = planted(30)
    fits = drawn(30, [20, 24, 17])
    preset = replace(SMALL, dropout=0.0)
    table = fit_heads(Bags(slides, device="cuda"), labels, fits, preset)
    for fit in fits:
        assert_alike(values(table, fit), plain.fit_plain(Bags(slides), labels, fit, preset))
