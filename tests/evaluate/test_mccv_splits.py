import numpy as np
import pandas as pd
import pytest

from hpcssl.core.errors import SlideError, SplitError
from hpcssl.evaluate.splits import check_splits, make_splits, read_splits, split_columns, target_kind, without_missing
from hpcssl.slides.slide_table import read_slides


def slides(targets, patients=None):
    table = pd.DataFrame({"slide_id": [f"s{i:03d}" for i in range(len(targets))], "label": targets})
    return table if patients is None else table.assign(patient_id=patients)


def test_train_counts_are_exact_in_every_class():
    table = make_splits(slides(["a"] * 122 + ["b"] * 124 + ["c"] * 3), "label")
    assert split_columns(table) == [f"mccv{k}" for k in range(1, 21)]
    for column in split_columns(table):
        train = table[table[column] == "train"]["target"].value_counts()
        assert train.to_dict() == {"a": 98, "b": 99, "c": 2}
    assert len({tuple(table[column]) for column in split_columns(table)}) == 20
    # in binary 0.35 · 10 + 0.5 is just below 4
    table = make_splits(slides(["a"] * 10 + ["b"] * 10), "label", num=1, train=0.35)
    assert (table["mccv1"] == "train").sum() == 8


def test_draws_are_a_function_of_seed_and_slide_not_of_the_tables_order():
    table = slides(["a", "b"] * 20)
    first = make_splits(table, "label", num=3)
    assert first.equals(make_splits(table.sample(frac=1, random_state=0), "label", num=3))
    assert not first.equals(make_splits(table, "label", num=3, seed=1))
    # over many draws every slide trains about equally often
    table = make_splits(slides(["a"] * 10 + ["b"] * 10), "label", num=300)
    share = (table[split_columns(table)] == "train").mean(axis=1)
    assert share.between(0.7, 0.9).all()


def test_groups_stay_on_one_side_and_counts_exact_where_possible():
    patients = [f"p{i % 17}" for i in range(100)]
    table = make_splits(slides([f"{'ab'[int(p[1:]) % 2]}" for p in patients], patients), "label", num=10)
    check_splits(table, where="x")  # no group is on both sides
    wanted = {"a": 43, "b": 37}  # 54 and 46 slides in groups of 5 and 6
    for column in split_columns(table):
        assert table.groupby("patient_id")[column].nunique().max() == 1
        train = table[table[column] == "train"]["target"].value_counts()
        assert all(abs(train[name] - count) <= 2 for name, count in wanted.items())


@pytest.mark.parametrize("num_patients", [2, 3, 6, 40])
def test_patients_with_slides_of_both_classes(num_patients):
    rng = np.random.default_rng(num_patients)
    patients = [f"p{i}" for i in range(num_patients) for _ in range(4)]
    targets = ["ab"[k] for _ in range(num_patients) for k in rng.permutation([0, 1, 1, 0])]
    table = make_splits(slides(targets, patients), "label", num=5)
    check_splits(table, where="x")
    train = (table["mccv1"] == "train").sum()
    assert abs(train - 3.2 * num_patients) <= 2 or num_patients < 5


def test_every_class_is_on_both_sides_also_where_that_is_far_from_its_count_or_rare_among_draws():
    patients = [f"p{i}" for i in range(10)] + ["q"] * 3 + ["r"] * 3  # of class b, 6 slides are nearer to 5 than 3 are
    check_splits(make_splits(slides(["a"] * 10 + ["b"] * 6, patients), "label"), where="x")
    patients = [name for name in ("ab", "bc", "cd", "de", "ef", "fa") for _ in range(2)]
    check_splits(make_splits(slides(list("abbccddeeffa"), patients), "label"), where="x")


def test_another_group_column_and_a_missing_one():
    table = slides(["a", "b"] * 20).assign(case_id=[f"c{i // 4}" for i in range(40)])
    drawn = make_splits(table, "label", num=2, group="case_id")
    assert list(drawn.columns) == ["slide", "target", "case_id", "mccv1", "mccv2"]
    check_splits(drawn, where="x", group="case_id")
    with pytest.raises(SlideError, match="no column site"):
        make_splits(table, "label", group="site")
    with pytest.raises(SplitError, match="no column typo to check; it has slide, target, case_id"):
        check_splits(drawn, where="x", group="typo")
    with pytest.raises(SplitError, match="group column slide has a name of the split file's own"):
        make_splits(table.assign(slide="x"), "label", group="slide")


def test_targets_that_cannot_be_split():
    with pytest.raises(SplitError, match="column label has the one value a"):
        make_splits(slides(["a"] * 5), "label")
    with pytest.raises(SplitError, match="column label has no values"):
        make_splits(slides([""] * 5), "label")
    with pytest.raises(SplitError, match="class b of column label has slides in one group only"):
        make_splits(slides(["a", "a", "b", "b"], ["1", "2", "3", "3"]), "label")
    with pytest.raises(SplitError, match="no column grade; it has slide_id, label"):
        make_splits(slides(["a", "b"]), "grade")
    with pytest.raises(SplitError, match="between 0 and 1"):
        make_splits(slides(["a", "b"] * 2), "label", train=1.0)
    # three patients, each pair shares a class: one of the three is never on both sides
    with pytest.raises(SplitError, match=r"no draw of whole groups put class [abc] in both"):
        make_splits(slides(["a", "b", "b", "c", "c", "a"], ["1", "1", "2", "2", "3", "3"]), "label")


def test_real_slides_by_patient(real_data):
    frame = read_slides(real_data / "tiles" / "slides.csv")
    table = make_splits(frame[frame["organ"] == "breast"], "label")
    check_splits(table, where="x")
    for column in split_columns(table):
        train = table[table[column] == "train"]["target"].value_counts().to_dict()
        assert train == {"benign": 9, "malignant": 13}


GOOD = make_splits(slides(["a", "b"] * 6, [f"p{i // 2}" for i in range(12)]), "label", num=2)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (GOOD.assign(mccv2=["train", "val"] * 6), "mccv2 has no slide of class b in train"),
        (GOOD.assign(mccv1=["train"] * 12), "mccv1 has no slide of class a in val"),
        (GOOD.assign(mccv1=["train", "test"] + ["val"] * 10), "mccv1 of slide s001 is 'test'; expected train or val"),
        (GOOD.assign(mccv1=["train", ""] + ["val"] * 10), "mccv1 of slide s001 is ''"),
        (GOOD.assign(mccv1=["train"] * 3 + ["val"] * 9), "patient_id p1 is on both sides of mccv1"),
        (GOOD.assign(slide=["s"] * 12), "slide s stands in it twice"),
        (GOOD.assign(target=["a"] * 12), "every slide has the target a"),
        (GOOD.assign(target=["", *GOOD["target"][1:]]), "slide s000 has no target"),
        (GOOD.assign(target=[" NA", *GOOD["target"][1:]]), "slide s000 has no target"),
        (GOOD.rename(columns={"mccv2": "mccv02"}), "column mccv02; expected mccv1, mccv2"),
        (GOOD.rename(columns={"mccv2": "mccv0"}), "column mccv0; expected"),
        (GOOD.rename(columns={"mccv2": "mccv1"}), r"column mccv1\.1; expected"),
        (GOOD.drop(columns=["mccv1", "mccv2"]), "no columns mccv1"),
        (GOOD.drop(columns="target"), "no column target"),
        (GOOD.iloc[:0], "no slides"),
    ],
)
def test_bad_split_files_are_refused(tmp_path, table, message):
    path = tmp_path / "bad.csv"
    table.to_csv(path, index=False)
    with pytest.raises(SplitError, match=message) as error:
        read_splits(path)
    assert str(error.value).startswith(str(path))


def test_good_file_comes_back_and_missing_foreign_or_shifted_ones_are_named(tmp_path):
    GOOD.sample(frac=1, random_state=1).to_csv(tmp_path / "good.csv", index=False)
    assert read_splits(tmp_path / "good.csv").equals(GOOD)
    with pytest.raises(SplitError, match="no such split file"):
        read_splits(tmp_path / "gone.csv")
    (tmp_path / "image.csv").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(SplitError, match=r"image\.csv"):
        read_splits(tmp_path / "image.csv")
    header, *rows = GOOD.to_csv(index=False).splitlines()
    (tmp_path / "long.csv").write_text("\n".join([header, *(f"{row},train" for row in rows)]))
    with pytest.raises(SplitError, match="rows have more fields than its header"):
        read_splits(tmp_path / "long.csv")


def test_slides_without_features_and_features_without_a_row_are_refused_unless_allowed():
    with pytest.raises(SplitError, match=r"slide s000 without features \(1 of 12 slides\)"):
        without_missing(GOOD, GOOD["slide"][1:].tolist(), where="x", allow_missing=False)
    assert len(without_missing(GOOD, GOOD["slide"][1:].tolist(), where="x", allow_missing=True)) == 11
    with pytest.raises(SplitError, match="no slide of class b"):
        without_missing(GOOD, GOOD["slide"][GOOD["target"] == "a"].tolist(), where="x", allow_missing=True)
    known = [*GOOD["slide"], "t1", "t0"]
    with pytest.raises(SplitError, match=r"features of t0, t1 without a row in the splits \(2 of 14 slides\)"):
        without_missing(GOOD, known, where="x", allow_missing=False, allow_extra=False)
    assert len(without_missing(GOOD, known, where="x", allow_missing=False)) == 12


@pytest.mark.parametrize(
    ("targets", "given", "kind"),
    [
        (["a", "b"], None, "classes"),
        (["0", "1", "2"], None, "classes"),
        ([str(i) for i in range(11)], None, "values"),
        (["0.5", "1"], None, "values"),
        (["0.5", "1"], "classes", "classes"),
        (["0", "1"], "values", "values"),
        (["0.5", "inf"], None, "classes"),
    ],
)
def test_the_kind_of_target_is_read_from_the_column_or_given(targets, given, kind):
    assert target_kind(pd.Series(targets), given, where="x") == kind
    with pytest.raises(SplitError, match="is no number; expected values"):
        target_kind(pd.Series([*targets, "a"]), "values", where="x")


@pytest.mark.parametrize("per_patient", [1, 3])
def test_values_are_stratified_and_patients_kept_together(per_patient):
    values = np.random.default_rng(0).lognormal(size=100).round(3)
    patients = [f"p{i // per_patient:02d}" for i in range(100)]
    table = make_splits(slides([str(v) for v in values], patients), "label", num=10)
    check_splits(table, where="x")
    fifth = np.argsort(np.argsort(values)) // 20
    for column in split_columns(table):
        train = (table[column] == "train").to_numpy()
        assert abs(train.sum() - 80) <= 5 * (per_patient > 1)  # whole patients, in each fifth
        if per_patient == 1:
            assert [int(train[fifth == f].sum()) for f in range(5)] == [16] * 5


def test_values_need_two_groups_and_two_values_on_each_side():
    with pytest.raises(SplitError, match="values in one group only"):
        make_splits(slides(["0.5", "1.5"], ["p", "p"]), "label")
    with pytest.raises(SplitError, match="fewer than two different targets in"):  # what a check refuses is not drawn
        make_splits(slides(["0.5", "1.5"]), "label", num=1)
    table = slides(["0.5", "1.5", "2.5"]).set_axis(["slide", "target"], axis=1)
    with pytest.raises(SplitError, match="mccv1 has fewer than two different targets in val"):
        check_splits(table.assign(mccv1=["train", "train", "val"]), where="x")


def test_patients_written_in_two_ways_are_one_and_missing_ones_are_none():
    sides = ["train", "train", "val", "val"] * 3
    targets = ["a", "b"] * 6
    table = pd.DataFrame({"slide": [f"s{i}" for i in range(12)], "target": targets, "mccv1": sides})
    check_splits(table.assign(patient_id=["NA", "nan", "None", " "] * 3), where="x")
    blank = make_splits(slides(["a", "b"] * 20, [""] * 40), "label", num=1)
    assert (blank["mccv1"] == "train").sum() == 32, "a blank patient is a group of its own"
    for one, other in (("7", "7.0"), ("p", " p ")):
        with pytest.raises(SplitError, match=f"patient_id {one} is on both sides of mccv1"):
            check_splits(table.assign(patient_id=["", one, other, *[""] * 9]), where="x")
        drawn = make_splits(slides(targets, [one, one, other, other, *[f"q{i}" for i in range(8)]]), "label", num=20)
        assert (drawn[split_columns(drawn)].iloc[:4].nunique() == 1).all()
    with pytest.raises(SplitError, match="007 is on both"):  # 7 and 007 may be two
        check_splits(table.assign(patient_id=["7", "007", "007", *[""] * 9]), where="x")


def test_words_for_no_target_are_no_class_and_blanks_around_one_make_no_other():
    table = make_splits(slides(["a", "b ", "NA", " a", "b", "null"] * 4), "label", num=2)
    assert table["target"].value_counts().to_dict() == {"a": 8, "b": 8}
    values = make_splits(slides([*(f"{i}.5" for i in range(12)), "nan", " "]), "label", num=2)
    assert target_kind(values["target"], where="x") == "values"
