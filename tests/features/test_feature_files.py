import h5py
import numpy as np
import pytest
import torch

from hpcssl.core.errors import FeatureError
from hpcssl.features.feature_files import read_coords, read_slide, write_slide

COORDS = np.array([[0, 0], [224, 0], [448, 0]])


def test_features_come_back_and_half_precision_stays_so_on_disk(tmp_path):
    features = np.random.default_rng(0).normal(size=(3, 5))
    write_slide(tmp_path / "a.h5", features, COORDS)
    back = read_slide(tmp_path / "a.h5")
    assert back.dtype == np.float32
    assert np.array_equal(back, features.astype(np.float32))
    assert np.array_equal(read_coords(tmp_path / "a.h5"), COORDS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]
    write_slide(tmp_path / "a.h5", np.ones((3, 5), np.float16), COORDS)
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["features"].dtype == np.float16
        assert file["coords"].dtype == np.int64
    assert read_slide(tmp_path / "a.h5").dtype == np.float32


@pytest.mark.parametrize(
    ("features", "coords", "message"),
    [
        (np.array([[1.0, np.nan]]), COORDS[:1], "not finite .* 1 of 1 tiles"),
        (np.ones((0, 5)), COORDS[:0], "no tiles"),
        (np.ones(5), COORDS, "tiles × size"),
        (np.ones((2, 5), int), COORDS[:2], "expected floats"),
        (np.ones((2, 5)), COORDS, "coords of shape"),
    ],
)
def test_unusable_features_are_not_written(tmp_path, features, coords, message):
    with pytest.raises(FeatureError, match=message):
        write_slide(tmp_path / "a.h5", features, coords)
    assert not list(tmp_path.iterdir())


def test_nan_and_wrong_size_are_refused_on_reading(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = np.array([[1.0, np.inf], [1.0, 2.0]])
    with pytest.raises(FeatureError, match="1 of 2 tiles"):
        read_slide(tmp_path / "a.h5")
    write_slide(tmp_path / "b.h5", np.ones((3, 5)), COORDS)
    with pytest.raises(FeatureError, match="size 5; expected 4"):
        read_slide(tmp_path / "b.h5", 4)


def test_a_leading_axis_of_one_is_dropped_and_other_datasets_are_named(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = np.ones((1, 4, 5), np.float32)
    assert read_slide(tmp_path / "a.h5").shape == (4, 5)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["feats"] = np.ones((1, 2))
    with pytest.raises(FeatureError, match="no dataset features; it has feats"):
        read_slide(tmp_path / "a.h5")


class Harmful:
    def __reduce__(self):
        return (exit, (3,))


def test_tensors_are_read_without_running_code_in_any_precision_and_nothing_else_is(tmp_path):
    torch.save({"x": Harmful()}, tmp_path / "a.pt")
    with pytest.raises(FeatureError, match=r"a\.pt: truncated or not a tensor"):
        read_slide(tmp_path / "a.pt")
    torch.save([torch.ones(2, 2)], tmp_path / "a.pt")
    with pytest.raises(FeatureError, match="holds list; expected a tensor"):
        read_slide(tmp_path / "a.pt")
    torch.save(torch.ones(2, 2, dtype=torch.bfloat16), tmp_path / "b.pt")
    assert read_slide(tmp_path / "b.pt").dtype == np.float32
    with pytest.raises(FeatureError, match="holds no coordinates"):
        read_coords(tmp_path / "b.pt")


@pytest.mark.parametrize(
    ("name", "kind", "write"),
    [
        ("a.h5", "HDF5", lambda path: write_slide(path, np.ones((300, 50)), np.zeros((300, 2)))),
        ("a.pt", "a tensor", lambda path: torch.save(torch.ones(300, 50), path)),
        ("a.npy", "a numpy array", lambda path: np.save(path, np.ones((300, 50)))),
    ],
)
def test_missing_and_damaged_files(tmp_path, name, kind, write):
    path = tmp_path / name
    with pytest.raises(FeatureError, match=rf"{name}: no such feature file"):
        read_slide(path)
    write(path)
    for content in (path.read_bytes()[:3000], b"", b"garbage"):
        path.write_bytes(content)
        with pytest.raises(FeatureError, match=rf"{name}: truncated or not {kind}") as error:
            read_slide(path)
        assert "\n" not in str(error.value)
