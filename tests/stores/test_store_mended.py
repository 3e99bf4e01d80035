"""Builds that found bad files, and what changes between two tries: mended files are seen, whole ones not read again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from hpcssl.core.errors import StoreError
from hpcssl.slides.cutting import CutOptions
from hpcssl.slides.slide_list import slides_to_read
from hpcssl.stores import scan, store_build
from hpcssl.stores.kinds import open_store
from hpcssl.stores.scan import BuildOptions, build_store
from hpcssl.stores.store import Store
from hpcssl.stores.tiling import TilingOptions, tile_slides
from hpcssl.synthetic.drawn_slides import draw_slide

Interrupt = Callable[..., None]
KINDS = {
    "loose": BuildOptions(commit_s=0, threads=2),
    "unchecked": BuildOptions(commit_s=0, threads=2, check=False),
    "packed": BuildOptions(pack=True, shard_gb=5e-6, commit_s=0, threads=2),
}
ORDER = ["breast/breast-0", "breast/breast-1", "lung/lung-0", "lung/lung-1"]
each_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


@pytest.fixture
def tiles(small: ModuleType, tmp_path: Path) -> Path:
    folder: Path = small.make_tiles(tmp_path / "tiles", slides=2, tiles=3)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def first_of(tiles: Path, slide: str) -> Path:
    return sorted((tiles / slide).iterdir())[0]


def opened_by(monkeypatch: pytest.MonkeyPatch, build: Callable[[], Store]) -> tuple[Store, list[str]]:
    """Return the store and the slides whose files were opened for it."""
    opened: list[str] = []
    with monkeypatch.context() as patch:
        for name in ("check_tiles", "read_tiles"):
            real = getattr(scan, name)
            patch.setattr(scan, name, lambda r, key, *a, real=real, **k: opened.append(key) or real(r, key, *a, **k))
        return build(), sorted(set(opened))


@each_kind
def test_once_bad_files_are_mended_the_slides_found_whole_are_not_opened(
    options: BuildOptions, tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build_store(tiles, tmp_path / "whole", options=options)
    out, bad = tmp_path / "store", first_of(tiles, ORDER[1])
    content = bad.read_bytes()
    bad.write_bytes(b"")
    for _ in range(2):  # the second try, nothing mended, finds the same
        with pytest.raises(StoreError, match="1 of 14 tile files are no whole JPEG"):
            build_store(tiles, out, options=options)
        assert pd.read_csv(tmp_path / "store.bad_tiles.csv").to_numpy().tolist() == [[str(bad), "zero bytes"]]
    bad.write_bytes(content)
    store, opened = opened_by(monkeypatch, lambda: build_store(tiles, out, options=options))
    assert files(store.path) == files(whole.path)
    assert opened == (ORDER[1:] if options.pack else ORDER[1:2] if options.check else [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store", "tiles", "whole"], "nothing is left"


CHANGES: dict[str, Callable[[Path], object]] = {
    "mended": lambda file: file.write_bytes(b"\xff\xd8\xff mended \xff\xd9"),
    "renamed": lambda file: file.rename(file.with_name("other.jpg")),
    "added": lambda file: file.with_name("zz.jpg").write_bytes(file.read_bytes()),
    "gone": lambda file: file.unlink(),
    "another size": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
}


@each_kind
@pytest.mark.parametrize("change", CHANGES)
def test_a_slide_changed_after_a_kill_is_taken_as_it_is(
    interrupt: Interrupt, options: BuildOptions, change: str, tiles: Path, tmp_path: Path
) -> None:
    if change == "mended":
        first_of(tiles, ORDER[1]).write_bytes(b"")
    interrupt(tiles, tmp_path / "store", options, after=3)
    CHANGES[change](first_of(tiles, ORDER[1]))
    store = build_store(tiles, tmp_path / "store", options=options)
    store.verify()
    assert files(store.path) == files(build_store(tiles, tmp_path / "whole", options=options).path)
    assert not (tmp_path / "store.bad_tiles.csv").exists()


def test_what_was_not_opened_does_not_count_as_whole(interrupt: Interrupt, tiles: Path, tmp_path: Path) -> None:
    first_of(tiles, ORDER[0]).write_bytes(b"text")
    interrupt(tiles, tmp_path / "store", KINDS["unchecked"], after=3)
    with pytest.raises(StoreError, match=r"1 of 14 tile files .* \(not a JPEG\)"):
        build_store(tiles, tmp_path / "store", options=KINDS["loose"])


@each_kind
def test_an_error_keeps_what_took_long_and_discards_the_rest(
    options: BuildOptions, tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One folder may not be read: the slides before it were done, and the next try goes on behind them."""
    real = scan.in_order

    def denied(pool, work, items, *, window):
        for item, result in real(pool, work, items, window=window):
            if ORDER[3] == (item[0] if options.pack else item):
                raise PermissionError(13, "Permission denied", str(tiles / ORDER[3]))
            yield item, result

    for commit_s in (3600, 0):
        with monkeypatch.context() as patch:
            patch.setattr(scan, "in_order", denied)
            with pytest.raises(PermissionError):
                build_store(tiles, tmp_path / "store", options=replace(options, commit_s=commit_s))
        assert (tmp_path / ".store.partial").exists() == (commit_s == 0)
    _, opened = opened_by(monkeypatch, lambda: build_store(tiles, tmp_path / "store", options=options))
    assert opened == ([] if not options.check else ORDER[3:])


def test_a_packed_tiling_stopped_while_it_is_published_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its slides have no folders: what was done is compared with what was cut."""
    (tmp_path / "slides").mkdir()
    draw_slide(tmp_path / "slides" / "a.tif", width=600, height=600, seed=1, mpp=0.5, downsamples=(1,))
    slides = slides_to_read(tmp_path / "slides")
    options = TilingOptions(cut=CutOptions(mpp=0.5, tile_px=64), pack=True)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store_build, "seal", stop)
        with pytest.raises(KeyboardInterrupt):
            tile_slides(slides, tmp_path / "tiles", options)
    tile_slides(slides, tmp_path / "tiles", options)
    tile_slides(slides, tmp_path / "whole", options)
    open_store(tmp_path / "tiles").verify()
    assert files(tmp_path / "tiles") == files(tmp_path / "whole")
