"""Embedding some slides of a store: what tasks of a job array do, beside each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpcssl.core.errors import BadTileError, ConfigError, FeatureError
from hpcssl.embed.baseline import Baseline
from hpcssl.embed.embedding import embed_store, missing_slides, source_of, text_of
from hpcssl.embed.sources import Source
from hpcssl.features.feature_files import read_slide
from hpcssl.pipelines.embed import EmbedRequest, embed_share

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(small, data, tmp_path_factory) -> Path:
    return small.make_trained_run(tmp_path_factory.mktemp("runs") / "run", data, small.dino_recipe())


def _share(data, run: Path, out: Path, slides: list[int]) -> None:
    embed_share(EmbedRequest(store=data.store_path, encoder=f"{run}@7", out=out), slides, threads=1)


def _ids(data, numbers: list[int]) -> set[str]:
    return {data.store.slides["slide_id"].iloc[number] for number in numbers}


def test_shares_together_are_the_whole(data, run, tmp_path):
    embed_store(data.store, Source.parse(f"{run}@7"), tmp_path / "whole", threads=1)
    for slides in ([1, 4], [5, 0], [2, 3]):
        _share(data, run, tmp_path / "shares", slides)
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "shares").iterdir())
    for name in names:
        if name.endswith(".h5"):
            whole, shared = (read_slide(tmp_path / folder / name) for folder in ("whole", "shares"))
            np.testing.assert_array_equal(whole, shared)
    one, other = ((tmp_path / folder / "features.json").read_text() for folder in ("whole", "shares"))
    assert one == other


def test_a_share_writes_its_slides_and_no_others(data, run, tmp_path):
    _share(data, run, tmp_path / "f", [1, 4])
    assert {file.stem for file in (tmp_path / "f").glob("*.h5")} == _ids(data, [1, 4])
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "f").glob("*.h5")}
    _share(data, run, tmp_path / "f", [4, 5])
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_missing_slides(data, run, tmp_path):
    store, out = data.store, tmp_path / "f"
    assert missing_slides(store, out) == [0, 1, 2, 3, 4, 5], "all of a folder that is not there"
    _share(data, run, out, [1, 4])
    (out / ".breast-0.h5.abcd.tmp").touch()
    (out / ".breast-0.h5").touch()
    assert missing_slides(store, out) == [0, 2, 3, 5]
    assert missing_slides(store, out, ["lung-0", "lung-1", "breast-0"]) == [0, 3]
    assert missing_slides(store, out, []) == []
    with pytest.raises(FeatureError, match=r"has no slide lung-9 \(1 such slides\)"):
        missing_slides(store, out, ["lung-0", "lung-9"])


def test_a_source_means_the_same_to_every_task(run, monkeypatch, tmp_path):
    monkeypatch.chdir(run.parent)
    text = text_of(source_of("run"), "run")
    assert text == f"{run}@7", "a checkpoint that comes later is another one"
    monkeypatch.chdir(tmp_path)
    assert source_of(text) == Source(run=run, step=7)
    baseline = source_of("timm:resnet18:random")
    assert isinstance(baseline, Baseline)
    assert text_of(baseline, "timm:resnet18:random") == "timm:resnet18:random"
    with pytest.raises(ConfigError, match="is a run, which has its own"):
        source_of(str(run), tmp_path / "weights.pth")


def test_a_bad_tile_keeps_no_other_slide_from_its_features(small, run, tmp_path):
    own = small.make_data(tmp_path)
    store = own.store
    whole = {}
    for slide, fault in ((1, b"no picture"), (4, None)):
        file = store.file_of(int(store.first_tiles[slide]))
        whole[file] = file.read_bytes()
        file.write_bytes(fault) if fault else file.unlink()
    with pytest.raises(BadTileError) as caught:
        _share(own, run, tmp_path / "f", [0, 1, 2, 4, 5])
    assert str(store.file_of(int(store.first_tiles[1]))) in str(caught.value)
    assert "2 of 5 slides have no features for such a tile" in str(caught.value)
    assert {file.stem for file in (tmp_path / "f").glob("*.h5")} == _ids(own, [0, 2, 5])
    for file, content in whole.items():
        file.write_bytes(content)
    _share(own, run, tmp_path / "f", [1, 4])
    assert {file.stem for file in (tmp_path / "f").glob("*.h5")} == _ids(own, [0, 1, 2, 4, 5]), "the rest can follow"
