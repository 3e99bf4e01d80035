"""A store built in parts and joined is the store that is built in one go, whatever is killed on the way."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

from hpcssl.core.errors import StoreError
from hpcssl.stores import parts
from hpcssl.stores.loose import LooseStore
from hpcssl.stores.scan import BuildOptions, build_store
from hpcssl.stores.store import Store

PACKED = BuildOptions(pack=True, shard_gb=10e-6)  # every shard takes one slide or two


@pytest.fixture
def tiles(tmp_path: Path, small: ModuleType) -> Path:
    """Two organs of four slides, 4 to 7 tiles each."""
    folder: Path = small.make_tiles(tmp_path / "tiles", slides=4, tiles=4)
    return folder


@pytest.fixture
def in_parts(tiles: Path, tmp_path: Path) -> Callable[..., Store]:
    """Builds a store in parts, one after the other."""

    def build(num: int, options: BuildOptions, table: Path | None = None) -> Store:
        out = tmp_path / f"store-{num}"
        for number in parts.plan_parts(tiles, out, table=table, options=options, num_parts=num):
            parts.build_part(out, number)
        return parts.join_parts(out)

    return build


def assert_same_store(store: Store, whole: Store) -> None:
    """Check that both hold the same tiles under the same numbers."""
    assert store.digest == whole.digest
    pd.testing.assert_frame_equal(store.slides, whole.slides)
    for tile in range(whole.num_tiles):
        assert store.fetch(0, tile) == whole.fetch(0, tile)
        assert str(store.file_of(tile)).rpartition(":")[2] == str(whole.file_of(tile)).rpartition(":")[2]
    store.verify(deep=True)


@pytest.mark.parametrize("num", [1, 3, 8, 20])
def test_a_loose_store_in_parts_is_the_same_files(tiles: Path, tmp_path: Path, in_parts: Callable, num: int) -> None:
    whole, store = build_store(tiles, tmp_path / "whole"), in_parts(num, BuildOptions())
    assert_same_store(store, whole)
    for name in LooseStore.layout.files[1:]:
        assert (store.path / name).read_bytes() == (whole.path / name).read_bytes(), name
    header, expected = (opened.header | {"files": list(opened.header["files"])} for opened in (store, whole))
    assert header == expected
    assert not parts.parts_folder(store.path).exists() or not any(parts.parts_folder(store.path).iterdir())


@pytest.mark.parametrize("num", [1, 3, 8])
def test_a_packed_store_in_parts_holds_the_same_tiles(
    tiles: Path, tmp_path: Path, in_parts: Callable, num: int
) -> None:
    whole, store = build_store(tiles, tmp_path / "whole", options=PACKED), in_parts(num, PACKED)
    assert_same_store(store, whole)
    assert len(store.header["shards"]) >= num
    names = [f"tiles-{number:06d}.tar" for number in range(len(store.header["shards"]))]
    assert sorted(path.name for path in store.path.glob("*.tar")) == names
    if num == 1:
        assert store.header["shards"] == whole.header["shards"]


def test_the_table_selects_orders_and_labels(tiles: Path, tmp_path: Path, in_parts: Callable) -> None:
    rows = [("lung-2", "lung", 6, "a"), ("breast-0", "breast", 4, ""), ("lung-0", "lung", 4, "c")]
    table = tmp_path / "slides.csv"
    pd.DataFrame(rows, columns=["slide_id", "organ", "num_tiles", "label"]).to_csv(table, index=False)
    store = in_parts(2, BuildOptions(), table)
    assert_same_store(store, build_store(tiles, tmp_path / "whole", table=table))
    assert store.slides["label"].tolist() == ["a", "", "c"]


def test_a_table_that_counts_wrongly_is_told_by_the_part(tiles: Path, tmp_path: Path) -> None:
    table = tmp_path / "slides.csv"
    pd.DataFrame({"slide_id": ["lung-2"], "organ": ["lung"], "num_tiles": [5]}).to_csv(table, index=False)
    (number,) = parts.plan_parts(tiles, tmp_path / "s", table=table, options=BuildOptions(), num_parts=3)
    with pytest.raises(StoreError, match="slide lung-2 has 6 tiles, but the slide table says 5"):
        parts.build_part(tmp_path / "s", number)


def test_what_is_built_is_not_built_again(tiles: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "store", BuildOptions()
    assert parts.plan_parts(tiles, out, table=None, options=options, num_parts=3) == [0, 1, 2]
    parts.build_part(out, 1)
    header = parts.parts_folder(out) / "part-0001" / "store.json"
    before = header.stat().st_mtime_ns
    with pytest.raises(StoreError, match=r"part-0000: not built yet; the same hpcssl store build"):
        parts.join_parts(out)
    assert parts.plan_parts(tiles, out, table=None, options=options, num_parts=3) == [0, 2]
    for number in range(3):
        parts.build_part(out, number)
    assert header.stat().st_mtime_ns == before
    assert_same_store(parts.join_parts(out), build_store(tiles, tmp_path / "whole"))
    with pytest.raises(StoreError, match="exists already"):
        parts.plan_parts(tiles, out, table=None, options=options, num_parts=3)


def test_other_settings_are_refused_naming_both(tiles: Path, tmp_path: Path) -> None:
    def plan(num_parts: int = 3, **options: object) -> list[int]:
        given = BuildOptions(**options)  # type: ignore[arg-type]
        return parts.plan_parts(tiles, tmp_path / "s", table=None, options=given, num_parts=num_parts)

    plan()
    assert plan(threads=2) == [0, 1, 2], "how fast, not what"
    with pytest.raises(StoreError, match="begun with array = 3, now 4; give the same, or remove it"):
        plan(4)
    with pytest.raises(StoreError, match="begun with pack = False, now True"):
        plan(pack=True)
    shutil.rmtree(tiles / "lung" / "lung-3")
    with pytest.raises(StoreError, match="begun with slides = "):
        plan()
    with pytest.raises(StoreError, match="--array 0; expected at least 1"):
        plan(0)


@pytest.mark.parametrize("moved", [0, 1, 3])
def test_a_killed_join_goes_on(tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int) -> None:
    """Killed when some shards have their new numbers already."""
    out, real, left = tmp_path / "store", parts.os.replace, [moved]
    for number in parts.plan_parts(tiles, out, table=None, options=PACKED, num_parts=3):
        parts.build_part(out, number)

    def replace(source: Path, target: Path) -> None:
        if Path(target).suffix == ".tar":
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        real(source, target)

    monkeypatch.setattr(parts.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        parts.join_parts(out)
    assert not out.exists()
    monkeypatch.setattr(parts.os, "replace", real)
    assert parts.plan_parts(tiles, out, table=None, options=PACKED, num_parts=3) == []
    assert_same_store(parts.join_parts(out), build_store(tiles, tmp_path / "whole", options=PACKED))


def test_parts_weigh_about_the_same() -> None:
    weights = np.random.default_rng(0).integers(1, 1000, 500)
    ends = parts._ends(weights, 7)
    sums = [part.sum() for part in np.split(weights, ends[:-1])]
    assert ends[-1] == 500
    assert len(sums) == 7
    assert max(sums) - min(sums) < 2 * weights.max()
