import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from hpcssl.core.errors import FeatureError
from hpcssl.features.feature_files import write_slide
from hpcssl.features.feature_folder import FeatureSet, write_index


def fill(folder, slides=("b", "a.1"), dim=4):
    folder.mkdir(parents=True, exist_ok=True)
    for number, slide in enumerate(slides):
        write_slide(folder / f"{slide}.h5", np.full((2, dim), float(number)), np.zeros((2, 2)))
    return folder


def test_a_folder_with_its_index(tmp_path):
    fill(tmp_path)
    write_index(tmp_path, encoder="timm/resnet50", checkpoint="500", dim=4, weights_digest="abc")
    features = FeatureSet.open(tmp_path)
    assert (features.encoder, features.checkpoint, features.dim) == ("timm/resnet50", "500", 4)
    assert features.slides == ("a.1", "b")
    assert features.about["weights_digest"] == "abc"
    assert features.load("a.1").tolist() == [[1] * 4] * 2
    assert json.loads((tmp_path / "features.json").read_text())["format"] == 1


def test_a_foreign_folder_is_readable_as_it_is_but_unfinished_files_are_no_slides(tmp_path):
    folder = fill(tmp_path / "uni_v1")
    (folder / ".c.h5.123.tmp").touch()
    (folder / "._b.h5").touch()
    features = FeatureSet.open(folder)
    assert (features.encoder, features.checkpoint, features.dim) == ("uni_v1", "", 4)
    assert features.slides == ("a.1", "b")


def test_folders_that_cannot_be_used(tmp_path):
    fill(fill(tmp_path / "sizes"), ["z"], dim=5)
    with pytest.raises(FeatureError, match=r"z\.h5: features of size 5; expected 4"):
        FeatureSet.open(tmp_path / "sizes").load("z")
    np.save(fill(tmp_path / "kinds") / "c.npy", np.ones((2, 4)))
    with pytest.raises(FeatureError, match=r"holds \.h5 and \.npy files"):
        FeatureSet.open(tmp_path / "kinds")
    with pytest.raises(FeatureError, match="no such folder"):
        FeatureSet.open(tmp_path / "gone")
    with pytest.raises(FeatureError, match=r"no feature files .* perhaps .*h5_files"):
        FeatureSet.open(fill(tmp_path / "clam" / "h5_files").parent)
    fill(tmp_path / "bad")
    for content, message in (
        ("{", "not JSON"),
        ('{"format": 2}', "reads format 1"),
        ('{"format": 1, "encoder": "x", "checkpoint": 5, "dim": 4}', "checkpoint is 5; expected str"),
        ('{"format": 1, "encoder": "x", "checkpoint": "5"}', "dim is None"),
    ):
        (tmp_path / "bad" / "features.json").write_text(content)
        with pytest.raises(FeatureError, match=message):
            FeatureSet.open(tmp_path / "bad")


def test_the_digest_follows_names_sizes_and_index(tmp_path):
    before = FeatureSet.open(fill(tmp_path / "x")).digest()
    assert FeatureSet.open(tmp_path / "x").digest() == before
    fill(tmp_path / "x", ["c"])
    more = FeatureSet.open(tmp_path / "x").digest()
    write_index(tmp_path / "x", encoder="x", checkpoint="1", dim=4)
    assert len({before, more, FeatureSet.open(tmp_path / "x").digest()}) == 3


def test_features_extracted_again_are_others_though_no_size_changed(tmp_path):
    first = FeatureSet.open(fill(tmp_path / "x"))
    digest, written = first.digest(), first.written()
    os.utime(tmp_path / "x" / "b.h5", (1.5e9, 1.5e9))
    os.utime(tmp_path / "x" / "a.1.h5", (1.6e9, 1.6e9))
    (older,) = {FeatureSet.open(tmp_path / "x").written()} - {written}
    assert older.startswith("2020-09-13 12:26:40+00:00 (")
    assert FeatureSet.open(shutil.copytree(tmp_path / "x", tmp_path / "copy")).written() == older
    os.utime(tmp_path / "x" / "b.h5", (1.4e9, 1.4e9))  # the newest file is the same
    assert FeatureSet.open(tmp_path / "x").written() != older
    assert FeatureSet.open(tmp_path / "x").digest() == digest


def save_tensor(path, array):
    torch.save(torch.from_numpy(array), path)


@pytest.mark.parametrize(("suffix", "save"), [(".pt", save_tensor), (".npy", np.save)])
def test_folders_of_tensors_and_arrays(tmp_path, suffix, save):
    for number, slide in enumerate(("b", "a.1")):
        save(tmp_path / f"{slide}{suffix}", np.full((2, 4), number, np.float16))
    features = FeatureSet.open(tmp_path)
    assert features.slides == ("a.1", "b")
    assert features.load("a.1").dtype == np.float32
    assert features.load("a.1").tolist() == [[1] * 4] * 2


def tensors(folder, **columns):
    (folder / "root" / "uni").mkdir(parents=True)
    torch.save(torch.ones(3, 4), folder / "root" / "uni" / "1.pt")
    table = pd.DataFrame({"slide": ["s1", "s2"], "tensor_root": "root", "tensor_name": ["1.pt", "2.pt"]} | columns)
    table.to_csv(folder / "slide_data.csv", index=False)
    return folder


def test_a_table_of_tensors_and_tables_that_cannot_be_used(tmp_path):
    with pytest.raises(FeatureError, match="no such table"):
        FeatureSet.open(tmp_path / "slide_data.csv@uni")
    features = FeatureSet.open(tensors(tmp_path) / "slide_data.csv@uni")
    assert (features.encoder, features.dim, features.slides) == ("uni", 4, ("s1",))
    tensors(tmp_path / "absolute", tensor_root=str(tmp_path / "root"))
    assert FeatureSet.open(tmp_path / "absolute" / "slide_data.csv@uni").load("s1").shape == (3, 4)
    with pytest.raises(FeatureError, match=r"none of its 2 tensors is there .*vits.*1\.pt"):
        FeatureSet.open(tmp_path / "slide_data.csv@vits")
    (tmp_path / "slide_data.csv").write_text("slide,tensor_root\na,b\n")
    with pytest.raises(FeatureError, match="no column tensor_name"):
        FeatureSet.open(tmp_path / "slide_data.csv@uni")
