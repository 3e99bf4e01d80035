"""Features of a slide are a function of the checkpoint and the slide's tiles alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hpcssl.core.errors import ConfigError, FeatureError, RunError
from hpcssl.embed import embedding as embed_module
from hpcssl.embed.embedding import embed_store
from hpcssl.embed.sources import Source, load_encoder
from hpcssl.features.feature_files import read_coords, read_slide
from hpcssl.features.feature_folder import FeatureSet
from hpcssl.models.encoder import normalised
from hpcssl.runs.checkpoint import checkpoint_path, load_checkpoint
from hpcssl.runs.run_folder import read_settings
from hpcssl.stores.scan import build_store
from hpcssl.train.pretrain_config import PretrainConfig
from hpcssl.train.state import TrainState

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def runs(small, data, tmp_path_factory) -> dict[str, Path]:
    """Runs with checkpoints of steps 0 and 7."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: small.make_trained_run(folder / f"{name}-run", data, make()) for name, make in small.RECIPES.items()}


def _embed(data, source: str, out: Path, **more) -> list[int]:
    steps: list[int] = []
    embed_store(data.store, Source.parse(source), out, threads=1, on_progress=steps.append, **more)
    return steps


def _files(folder: Path) -> dict[str, np.ndarray]:
    return {f.name: read_slide(f) for f in sorted(folder.glob("*.h5"))}


def _assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, features in one.items():
        np.testing.assert_array_equal(features, other[name], err_msg=name)


@pytest.fixture(scope="module")
def features(data, runs, tmp_path_factory) -> Path:
    """All slides by the moved DINO run."""
    out = tmp_path_factory.mktemp("features") / "f"
    _embed(data, f"{runs['dino']}@7", out)
    return out


def test_every_slide_has_its_tiles_features(data, features):
    found = FeatureSet.open(features)
    assert list(found.slides) == sorted(data.store.slides["slide_id"])
    assert (found.encoder, found.checkpoint, found.dim) == ("dino-run", "7", 24)
    for slide_id, num_tiles in zip(data.store.slides["slide_id"], data.store.slides["num_tiles"]):
        assert found.load(slide_id).shape == (num_tiles, 24)
    rows = np.concatenate(list(_files(features).values()))
    assert len(np.unique(rows, axis=0)) == len(rows), "different tiles, different features"


@pytest.mark.parametrize("objective", ["dino", "mae"])
def test_features_are_the_class_token_of_the_whole_tile(data, runs, tmp_path, objective):
    """For DINO by the teacher: the student is other."""
    out = tmp_path / "f"
    _embed(data, f"{runs[objective]}@7", out)
    state = _encoder_of(runs[objective])
    for index in (0, 5):
        slide = data.store.slides.iloc[index]
        tiles = range(slide["first_tile"], slide["first_tile"] + slide["num_tiles"])
        pixels = np.stack([_resized(data.store.file_of(t)) for t in tiles])
        with torch.no_grad():
            wanted = state(normalised(torch.from_numpy(pixels)))
        found = torch.from_numpy(read_slide(out / f"{slide['slide_id']}.h5"))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def _encoder_of(run: Path) -> torch.nn.Module:
    """Return the encoder that training would go on with (of DINO the teacher's), not through the embed room."""
    state = TrainState(read_settings(run, PretrainConfig)[0], torch.device("cpu"))
    state.from_checkpoint(*load_checkpoint(checkpoint_path(run, 7)))
    module = state.objective.module
    return module["teacher"]["encoder"] if "teacher" in dict(module.named_children()) else module.encoder


def _resized(file: Path, px: int = 32) -> np.ndarray:
    return np.array(Image.open(file).convert("RGB").resize((px, px), Image.Resampling.BICUBIC))


def test_step_0_is_the_untrained_encoder(small, data, runs, features, tmp_path):
    _embed(data, f"{runs['dino']}@0", tmp_path / "f")
    assert FeatureSet.open(tmp_path / "f").checkpoint == "0"
    encoder, state = load_encoder(Source.parse(f"{runs['dino']}@0"))
    fresh = TrainState(small.dino_recipe(), torch.device("cpu")).objective.module["teacher"]["encoder"]
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor), name
    assert state["samples_seen"] == 0
    untrained, trained = _files(tmp_path / "f"), _files(features)
    assert all(not np.allclose(untrained[name], trained[name], atol=1e-3) for name in trained)


def test_features_do_not_depend_on_the_slides_done_before(data, runs, features, tmp_path):
    """Each slide alone, and all but some, give the same bits."""
    wanted, names = _files(features), sorted(f.name for f in features.glob("*.h5"))
    out = tmp_path / "f"
    for missing in ([names[0]], names[2:], names[::2]):
        _embed(data, f"{runs['dino']}@7", out)
        _assert_same(_files(out), wanted)
        for name in missing:
            (out / name).unlink()
    assert _embed(data, f"{runs['dino']}@7", out)[0] == len(names) - len(names[::2])
    _assert_same(_files(out), wanted)


def test_done_slides_are_not_computed_again(data, runs, features, tmp_path):
    out = tmp_path / "f"
    _embed(data, f"{runs['dino']}@7", out)
    times = {f: f.stat().st_mtime_ns for f in out.iterdir()}
    assert _embed(data, f"{runs['dino']}@7", out) == [len(data.store.slides)]
    assert {f: f.stat().st_mtime_ns for f in out.iterdir()} == times


@pytest.mark.parametrize("slides", [0, 1, 4])
def test_stopped_after_some_slides_it_goes_on_to_the_same_files(data, runs, features, tmp_path, monkeypatch, slides):
    """Gone in the middle of writing one: no half file counts."""
    real, done = os.replace, []

    def dying(source, target):
        if str(target).endswith(".h5"):
            if len(done) == slides:
                raise SystemExit(9)
            done.append(target)
        real(source, target)

    out = tmp_path / "f"
    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(SystemExit):
        _embed(data, f"{runs['dino']}@7", out)
    monkeypatch.undo()
    assert len(list(out.glob("*.h5"))) == slides
    (out / ".breast-0.h5.123.tmp").write_bytes(b"what a kill -9 leaves")
    _embed(data, f"{runs['dino']}@7", out)
    _assert_same(_files(out), _files(features))


def test_killed_before_its_first_file_the_same_command_goes_on(data, runs, features, tmp_path):
    out = tmp_path / "f"
    out.mkdir()
    (out / ".features.json.123.tmp").write_text("{")
    _embed(data, f"{runs['dino']}@7", out)
    _assert_same(_files(out), _files(features))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("step", "checkpoint = 7, asked for is 0"),
        ("run", "encoder = dino-run, asked for is mae-run"),
        ("tile_px", "tile_px = 32, asked for is 48"),
        ("store", "store_digest = "),
    ],
)
def test_a_folder_of_another_making_is_refused(small, data, runs, tmp_path, change, told):
    out = tmp_path / "f"
    _embed(data, f"{runs['dino']}@7", out)
    before = {f: f.read_bytes() for f in out.iterdir()}
    source, more, store = f"{runs['dino']}@7", {}, data
    if change == "step":
        source = f"{runs['dino']}@0"
    elif change == "run":
        source = f"{runs['mae']}@7"
    elif change == "tile_px":
        more = {"tile_px": 48}
    else:
        tiles = small.make_tiles(tmp_path / "tiles", slides=2)
        build_store(tiles, tmp_path / "store")
        store = small.Data(tiles, tmp_path / "store", data.schedule_path)
    with pytest.raises(FeatureError, match=told):
        _embed(store, source, out, **more)
    assert {f: f.read_bytes() for f in out.iterdir()} == before


def test_a_folder_of_something_else_is_refused(data, runs, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FeatureError, match="not empty and no feature folder"):
        _embed(data, str(runs["dino"]), tmp_path)


def test_coordinates_come_from_the_names(data, features):
    """Lung's tiles are named tile_x224_y112.jpg, breast's tile-1.jpg."""
    np.testing.assert_array_equal(read_coords(features / "breast-1.h5"), np.full((5, 2), -1))
    in_order_of_names = sorted(range(6), key=lambda t: f"tile_x{t * 224}_y224.jpg")
    np.testing.assert_array_equal(read_coords(features / "lung-2.h5"), [(224 * t, 224) for t in in_order_of_names])
    assert data.store.coordinates_of(data.store.num_tiles - 1) == (224 * in_order_of_names[-1], 224)


def test_coordinates_and_features_are_of_the_same_tile(data, runs, features):
    encoder = _encoder_of(runs["dino"])
    rows = zip(read_coords(features / "lung-1.h5"), read_slide(features / "lung-1.h5"), strict=True)
    for (x, y), row in rows:
        pixels = torch.from_numpy(_resized(data.tiles / "lung" / "lung-1" / f"tile_x{x}_y{y}.jpg"))[None]
        with torch.no_grad():
            np.testing.assert_allclose(encoder(normalised(pixels))[0], row, atol=1e-5, rtol=1e-4)


def test_other_sizes_of_tile_give_other_features(data, runs, features, tmp_path):
    _embed(data, f"{runs['dino']}@7", tmp_path / "f", tile_px=48)
    larger, native = _files(tmp_path / "f"), _files(features)
    assert all(not np.allclose(larger[name], native[name], atol=1e-3) for name in native)


@pytest.mark.parametrize(("batch", "threads"), [(2, 1), (128, 3)])
def test_neither_batches_nor_threads_change_the_features(data, runs, features, tmp_path, monkeypatch, batch, threads):
    monkeypatch.setattr(embed_module, "_BATCH", batch)
    embed_store(data.store, Source.parse(f"{runs['dino']}@7"), tmp_path / "f", threads=threads)
    for name, expected in _files(features).items():
        np.testing.assert_allclose(_files(tmp_path / "f")[name], expected, atol=1e-5, rtol=1e-4)


def test_a_source_is_parsed(runs, tmp_path, monkeypatch):
    run = runs["dino"]
    assert Source.parse(str(run)) == Source(run=run, step=7)
    assert Source.parse(f"{run}@0") == Source(run=run, step=0)
    monkeypatch.chdir(run)
    assert Source.parse(".").name == "dino-run"
    with pytest.raises(RunError, match=r"no checkpoint of step 5; it has 0, 7"):
        Source.parse(f"{run}@5")
    with pytest.raises(RunError, match="no run"):
        Source.parse(str(tmp_path))
    odd = tmp_path / "run@7"
    odd.symlink_to(run)
    assert Source.parse(str(odd)) == Source(run=odd, step=7)
    assert Source.parse(f"{odd}@0") == Source(run=odd, step=0)


def test_a_run_without_checkpoints_is_told(small, data, tmp_path):
    run = small.make_run(tmp_path / "run", data, small.dino_recipe())
    with pytest.raises(RunError, match="no checkpoints yet"):
        Source.parse(str(run))


def test_a_refused_size_leaves_nothing_that_the_next_try_trips_on(data, runs, tmp_path):
    with pytest.raises(ConfigError, match="multiple of the encoder"):
        _embed(data, f"{runs['dino']}@7", tmp_path / "f", tile_px=30)
    assert not (tmp_path / "f").exists()
    _embed(data, f"{runs['dino']}@7", tmp_path / "f")


def test_what_made_the_features_stands_beside_them(data, features):
    about = json.loads((features / "features.json").read_text())
    assert about == {
        "format": 1,
        "encoder": "dino-run",
        "checkpoint": "7",
        "dim": 24,
        "samples_seen": 84,
        "tile_px": 32,
        "store_digest": data.store.digest,
    }


def test_a_run_that_moved_still_has_its_encoder(runs, tmp_path):
    """The encoder is built from the checkpoint alone."""
    shutil.copytree(runs["mae"], tmp_path / "moved")
    encoder, state = load_encoder(Source.parse(str(tmp_path / "moved")))
    assert encoder.config.embed_dim == 24
    assert state["objective"] == "mae"
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
