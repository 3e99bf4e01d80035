import json
import os
from dataclasses import replace

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from hpcssl.core.errors import ConfigError, FeatureError, SplitError
from hpcssl.evaluate.knn import Neighbours
from hpcssl.evaluate.labelled import label_features
from hpcssl.evaluate.mil import benchmark as benchmark_module
from hpcssl.evaluate.mil.benchmark import Benchmark, Compute, plan_measurements
from hpcssl.evaluate.mil.presets import PRESETS, MccvPreset, preset_named
from hpcssl.evaluate.results import COLUMNS, read_rows
from hpcssl.evaluate.splits import make_splits
from hpcssl.features.feature_files import write_slide
from hpcssl.features.feature_folder import write_index
from hpcssl.pipelines.evaluate import find_neighbours, fit_missing

PRESET = replace(PRESETS["mccv-demo"], epochs=2, warmup_epochs=0, hidden=(8, 8), attention=4)
SLIDES = [f"s{i:02d}" for i in range(16)]


@pytest.fixture
def inputs(tmp_path, write_features):
    """Two feature folders and a split file of 3 splits."""
    rng = np.random.default_rng(0)
    for name, encoder, checkpoint in (("untrained", "timm/vit small", "0"), ("trained", "timm/vit small", "500")):
        write_features(name, SLIDES, lambda i: rng.normal(size=(rng.integers(1, 5), 6)))
        write_index(tmp_path / name, encoder=encoder, checkpoint=checkpoint, dim=6)
    table = pd.DataFrame({"slide_id": SLIDES, "label": ["a", "b"] * 8})
    make_splits(table, "label", num=3).to_csv(tmp_path / "breast.csv", index=False)
    return tmp_path


def plan(inputs, names=("trained",), splits="breast.csv", preset=PRESET, **options):
    return plan_measurements([inputs / name for name in names], [inputs / splits], Benchmark(preset=preset, **options))


def bench(inputs, names=("untrained", "trained"), preset=PRESET, out="out", **options):
    return fit_missing(plan(inputs, names, preset=preset, **options), inputs / out)


def test_results_hold_every_run_epoch_and_metric_whatever_the_order_of_the_split_file(inputs):
    table = bench(inputs)
    assert tuple(table.columns) == COLUMNS
    assert len(table) == 2 * 3 * 2 * 2 * 4
    assert set(table["metric"]) == {"train_loss", "val_loss", "auc", "accuracy"}
    assert set(table["checkpoint"]) == {"0", "500"}
    assert not table.duplicated(list(COLUMNS[:-1])).any()
    names = sorted(path.name for path in (inputs / "out" / "parts").glob("*.csv"))
    assert names == ["breast__timm-vit-small__0.csv", "breast__timm-vit-small__500.csv"]
    assert read_rows(inputs / "out" / "results.csv").equals(table)
    pd.read_csv(inputs / "breast.csv").sample(frac=1, random_state=0).to_csv(inputs / "breast.csv", index=False)
    bench(inputs, out="again")
    assert (inputs / "out" / "results.csv").read_bytes() == (inputs / "again" / "results.csv").read_bytes()


def test_done_parts_are_not_computed_again(inputs, monkeypatch):
    bench(inputs, ["untrained"])
    fitted, real = [], benchmark_module.fit_heads
    monkeypatch.setattr(benchmark_module, "fit_heads", lambda *a, **k: fitted.append(1) or real(*a, **k))
    assert len(bench(inputs)) == 96
    assert len(fitted) == 1
    before = (inputs / "out" / "results.csv").read_bytes()
    (inputs / "out" / "results.csv").unlink()
    bench(inputs)
    assert len(fitted) == 1
    assert (inputs / "out" / "results.csv").read_bytes() == before
    (inputs / "out" / "parts" / "breast__timm-vit-small__0.csv").unlink()  # killed before its table was written
    assert len(bench(inputs)) == 96
    assert len(fitted) == 2


def test_parts_made_with_something_else_are_refused(inputs):
    bench(inputs, ["untrained"])
    with pytest.raises(ConfigError, match=r"__0\.csv: made with preset\.lr = 0\.001, now 0\.01"):
        bench(inputs, ["untrained"], replace(PRESET, lr=0.01))
    with pytest.raises(ConfigError, match=r"preset\.epochs = 2, now 3"):
        bench(inputs, ["trained"], replace(PRESET, epochs=3))
    with pytest.raises(ConfigError, match=r"preset\.precision = 'fp32', now 'bf16'"):
        bench(inputs, ["trained"], replace(PRESET, precision="bf16"))
    with pytest.raises(ConfigError, match="seed = 0, now 1"):
        bench(inputs, ["untrained"], seed=1)
    with pytest.raises(ConfigError, match="replicas = 2, now 1"):
        bench(inputs, ["untrained"], replicas=1)
    (inputs / "untrained" / "more.h5").write_bytes((inputs / "untrained" / "s00.h5").read_bytes())
    with pytest.raises(ConfigError, match="features_digest = "):
        bench(inputs, ["untrained"])
    (inputs / "untrained" / "more.h5").unlink()
    table = pd.DataFrame({"slide_id": SLIDES, "label": ["a", "b"] * 8})
    make_splits(table, "label", num=3, seed=9).to_csv(inputs / "breast.csv", index=False)
    with pytest.raises(ConfigError, match=r"breast\.csv: .*__0\.csv has the same task breast from another split table"):
        bench(inputs, ["untrained"])
    (inputs / "out" / "parts" / "breast__timm-vit-small__0.json").unlink()
    with pytest.raises(ConfigError, match=r"no readable breast__timm-vit-small__0\.json"):
        bench(inputs, ["untrained"])


def test_a_fit_alone_equals_that_fit_among_all_and_gathers_with_others_into_one_table(inputs):
    for fit in ((1, 1), (1, 2), (3, 2)):
        table = bench(inputs, ["trained"], only=fit)
    full = bench(inputs, ["trained"], out="full")
    both = full.merge(table, on=["split", "replica", "epoch", "metric"], suffixes=("_full", "_alone"))
    assert len(table) == len(both) == 3 * 8
    assert (both["value_full"] == both["value_alone"]).all()
    assert len(bench(inputs, ["trained"])) == 48
    with pytest.raises(ConfigError, match="no split 4, replica 1"):
        bench(inputs, ["trained"], only=(4, 1))


def test_features_that_cannot_be_used_are_named(inputs):
    path = inputs / "trained" / "s03.h5"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(FeatureError, match=r"s03\.h5: truncated"):
        bench(inputs, ["trained"])
    for content, message in ((np.zeros((0, 6), np.float32), "no tiles"), (np.full((2, 6), np.nan), "not finite")):
        with h5py.File(path, "w") as file:
            file["features"] = content
        with pytest.raises(FeatureError, match=rf"s03\.h5: {message}"):
            bench(inputs, ["trained"])
    assert not (inputs / "out" / "results.csv").exists()


def test_slides_without_features_and_two_inputs_of_one_name_are_refused(inputs):
    with pytest.raises(ConfigError, match=r"task breast .* is given twice"):
        bench(inputs, ["trained", "trained"])
    (inputs / "trained" / "s03.h5").unlink()
    with pytest.raises(SplitError, match=r"breast\.csv with .*trained: slide s03 without features \(1 of 16 slides\)"):
        bench(inputs)
    assert len(bench(inputs, allow_missing=True)) == 96
    record = json.loads((inputs / "out" / "parts" / "breast__timm-vit-small__500.json").read_text())
    assert record["slides"] == 15


def test_several_heads_stand_beside_each_other(inputs):
    table = bench(inputs, ["trained"], heads=["gma", "mean"])
    assert set(table["encoder"]) == {"timm/vit small", "timm/vit small, mean"}
    assert len(table) == 2 * 48
    assert len(bench(inputs, ["trained"], heads=["max"])) == 3 * 48
    with pytest.raises(ConfigError, match="head mena: no such head; did you mean mean"):
        bench(inputs, ["trained"], heads=["mena"])


def test_values_are_measured_by_r2_mae_and_spearman(inputs):
    table = pd.DataFrame({"slide_id": SLIDES, "age": [str(i / 2) for i in range(16)]})
    make_splits(table, "age", num=3).to_csv(inputs / "breast.csv", index=False)
    found = bench(inputs, ["trained"])
    assert set(found["metric"]) == {"train_loss", "val_loss", "r2", "mae", "spearman"}


def test_the_authors_layout_is_both_features_and_splits(inputs):
    folder = inputs / "breast_ihc_er"
    (folder / "tensors" / "uni").mkdir(parents=True)
    table = make_splits(pd.DataFrame({"slide_id": SLIDES, "label": ["0", "1"] * 8}), "label", num=2)
    table["tensor_root"], table["tensor_name"] = "tensors", table["slide"] + "_features.pt"
    table.to_csv(folder / "slide_data.csv", index=False)
    for number, name in enumerate(table["tensor_name"]):
        features = torch.randn(3, 6, generator=torch.Generator().manual_seed(number))
        torch.save(features, folder / "tensors" / "uni" / name)
    table = fit_missing(plan(folder, ["slide_data.csv@uni"], "slide_data.csv", allow_extra=False), inputs / "out")
    assert set(table["task"]) == {"breast_ihc_er"}
    assert set(table["encoder"]) == {"uni"}


def test_the_memory_bound_changes_no_number(inputs):
    streamed = fit_missing(plan(inputs), inputs / "b", Compute(memory_gib=0))
    assert fit_missing(plan(inputs), inputs / "a").equals(streamed)
    assert sorted(p.name for p in (inputs / "b").iterdir()) == ["parts", "results.csv", "tasks.csv"]


def validated(inputs):
    """A slide that is in validation in split 2."""
    table = pd.read_csv(inputs / "breast.csv")
    return table["slide"][table["mccv2"] == "val"].iloc[0]


def placed(folder, slide, tiles=4):
    rng = np.random.default_rng(1)
    write_slide(folder / f"{slide}.h5", rng.normal(size=(tiles, 6)), np.array([[224 * i, 0] for i in range(tiles)]))


def test_attention_is_the_mean_over_the_heads_that_did_not_train_on_the_slide(inputs):
    slide = validated(inputs)
    placed(inputs / "trained", slide)
    (one,) = plan(inputs)
    full = fit_missing([one], inputs / "plain")
    assert fit_missing([one], inputs / "out", attention=[slide]).equals(full)
    row = one.data.table.set_index("slide").loc[slide]
    held_out = [k for k in (1, 2, 3) if row[f"mccv{k}"] == "val"]
    assert held_out
    path = inputs / "out" / "attention" / one.name / f"{slide}.csv"
    found = pd.read_csv(path)
    assert found["x"].tolist() == [0, 224, 448, 672]
    assert found["attention"].sum() == pytest.approx(1, abs=1e-5)
    alone = []
    for split in held_out:
        for replica in (1, 2):
            fit_missing(plan(inputs, only=(split, replica)), inputs / f"only{split}{replica}", attention=[slide])
            (file,) = (inputs / f"only{split}{replica}" / "attention").glob(f"*/{slide}.csv")
            alone.append(pd.read_csv(file)["attention"])
    np.testing.assert_allclose(found["attention"], np.mean(alone, axis=0), atol=1e-6)
    path.unlink()
    fit_missing([one], inputs / "out", attention=[slide])
    assert path.exists()


def test_no_map_without_places(inputs):
    slide = validated(inputs)
    write_slide(inputs / "trained" / f"{slide}.h5", np.ones((2, 6)), np.full((2, 2), -1))
    with pytest.raises(FeatureError, match="the places of its tiles are unknown"):
        fit_missing(plan(inputs), inputs / "out", attention=[slide])
    table = pd.read_csv(inputs / "breast.csv")
    trained = table["slide"][(table[["mccv1", "mccv2", "mccv3"]] == "train").all(axis=1)].iloc[0]
    with pytest.raises(ConfigError, match=f"slide {trained}: in validation in no run"):
        fit_missing(plan(inputs), inputs / "out", attention=[trained])


def test_feature_sets_are_compared_on_the_slides_that_all_have(inputs):
    (inputs / "trained" / "s03.h5").unlink()
    (inputs / "untrained" / "s04.h5").unlink()
    measurements = plan(inputs, ("trained", "untrained"), allow_missing=True)
    for one in measurements:
        assert one.data.table["slide"].tolist() == [s for s in SLIDES if s not in ("s03", "s04")]
        assert one.data.left_out == ("s03", "s04")
    assert len({one.record["splits_digest"] for one in measurements}) == 1
    (alone,) = plan(inputs, allow_missing=True)
    assert alone.data.left_out == ("s03",)


def test_the_kind_is_that_of_the_whole_table(inputs):
    values = [str(i % 4) for i in range(15)] + ["0.5"]  # without the last slide they look like classes
    table = pd.DataFrame({"slide_id": SLIDES, "age": values})
    make_splits(table, "age", num=3).to_csv(inputs / "breast.csv", index=False)
    (inputs / "trained" / "s15.h5").unlink()
    measurements = plan(inputs, ("untrained", "trained"), allow_missing=True)
    assert [(one.data.kind, one.record["target"]) for one in measurements] == [("values", "values")] * 2


def test_two_tables_or_kinds_of_one_task_do_not_share_results(inputs):
    labels = [str(i % 2) for i in range(16)]
    (inputs / "other").mkdir()
    for seed, folder in ((0, inputs), (9, inputs / "other")):
        table = make_splits(pd.DataFrame({"slide_id": SLIDES, "label": labels}), "label", num=3, seed=seed)
        table.to_csv(folder / "breast.csv", index=False)
    bench(inputs, ["untrained"])
    before = (inputs / "out" / "results.csv").read_bytes()
    other = plan(inputs, splits="other/breast.csv")
    message = r"other/breast\.csv: .*vit-small__0\.csv has the same task breast from another split table .*rename"
    with pytest.raises(ConfigError, match=message):
        fit_missing(other, inputs / "out")
    with pytest.raises(ConfigError, match=message):
        find_neighbours([other[0].data], Neighbours(), out=inputs / "out")
    with pytest.raises(ConfigError, match=r"another kind of target \(classes, now values\)"):
        bench(inputs, ["trained"], kind="values")
    assert (inputs / "out" / "results.csv").read_bytes() == before
    find_neighbours(label_features([inputs / "trained"], [inputs / "breast.csv"]), Neighbours(), out=inputs / "out")
    (inputs / "out" / "parts" / "breast__timm-vit-small__0.csv").unlink()
    with pytest.raises(ConfigError, match=r"k-NN__500\.csv has the same task"):
        fit_missing(other, inputs / "out")


def test_features_that_were_extracted_again_are_not_taken_for_the_old_ones(inputs):
    bench(inputs, ["untrained"])
    path = inputs / "untrained" / "s03.h5"
    size, written = path.stat().st_size, path.stat().st_mtime_ns
    with h5py.File(path, "r+") as file:
        file["features"][...] = file["features"][...] + 1
    os.utime(path, ns=(written, written + 10**9))
    assert path.stat().st_size == size
    with pytest.raises(ConfigError, match=r"__0\.csv: made with features_written = '20.*delete it to compute it again"):
        bench(inputs, ["untrained"])
    os.utime(path, ns=(written, written))
    assert len(bench(inputs, ["untrained"])) == 48
    # a part of before there were digests of whole tables is kept
    path = inputs / "out" / "parts" / "breast__timm-vit-small__0.json"
    record = json.loads(path.read_text())
    del record["table_digest"], record["features_written"], record["preset"]["precision"]
    path.write_text(json.dumps(record))
    assert len(bench(inputs)) == 96


def test_the_papers_preset_other_lengths_and_presets_that_cannot_be():
    paper = preset_named("gma-50")
    assert (paper.epochs, paper.warmup_epochs, paper.lr, paper.final_lr) == (50, 10, 5e-4, 1e-6)
    assert (paper.weight_decay, paper.final_weight_decay) == (0.04, 0.4)
    assert (paper.hidden, paper.attention, paper.dropout) == ((512, 512), 384, 0.25)
    assert (PRESETS["gma-40"].epochs, PRESETS["gma-40"].lr) == (40, 1e-4)
    assert [preset_named("gma-50", n).warmup_epochs for n in (100, 40, 8, 1)] == [10, 10, 2, 0]
    with pytest.raises(ConfigError, match=r"preset gma50: .* did you mean gma-50\?"):
        preset_named("gma50")
    with pytest.raises(ConfigError, match="0 epochs"):
        preset_named("gma-50", 0)
    with pytest.raises(ConfigError, match="dropout = 1; expected below 1"):
        MccvPreset(name="x", dropout=1)
