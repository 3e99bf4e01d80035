"""Which jobs tiling needs, given what is cut and what is under way."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hpcssl.core.errors import SlideError
from hpcssl.jobs import tiling
from hpcssl.jobs.array import Call, Submitted
from hpcssl.jobs.profile import Profile
from hpcssl.slides.cutting import CutOptions
from hpcssl.slides.slide_list import slides_to_read
from hpcssl.stores.store import Store
from hpcssl.stores.tiling import TilingOptions, slides_to_cut, tile_source
from hpcssl.synthetic.drawn_slides import draw_slide

OPTIONS = TilingOptions(cut=CutOptions(tile_px=64), threads=2)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("array")
    for name in ("a", "b", "c"):
        draw_slide(folder / f"{name}.tif", seed=ord(name), width=800, height=700)
    (folder / "d.tif").write_bytes(b"no slide")
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[Call], list[str]]]:
    """(kind, calls, after) of every job that was submitted; its id is its number among them."""
    found: list[tuple[str, list[Call], list[str]]] = []

    def submit(calls: Sequence[Call], out: Path, profile: Any, *, kind: str, after: Sequence[str] = ()) -> Submitted:
        found.append((kind, pickle.loads(pickle.dumps(list(calls))), list(after)))
        return Submitted(job=str(len(found)), tasks=len(calls))

    monkeypatch.setattr(tiling, "submit_calls", submit)
    monkeypatch.setattr(tiling, "jobs_under_way", lambda name: [])
    return found


def test_an_array_cuts_and_a_job_after_it_writes_the_store_of_one_process(slides: Path, tmp_path: Path, calls) -> None:
    out = tmp_path / "out"
    array, last = tiling.submit_tiling(slides, out, options=OPTIONS, profile=Profile(), num_tasks=3)
    assert (array, last) == (Submitted(job="1", tasks=3), Submitted(job="2", tasks=1))
    (_, cutting, _), (_, (writing,), after) = calls
    assert after == ["1"]
    for call in reversed(cutting):
        call()
    assert not (out / "store.json").exists()
    with pytest.raises(SlideError, match="1 of 4 slides failed"):
        writing()
    with pytest.raises(SlideError, match="1 of 4 slides failed"):
        tile_source(slides, tmp_path / "alone", OPTIONS)
    assert Store.open(out).digest == Store.open(tmp_path / "alone").digest


def test_a_second_submission_cuts_only_what_is_missing(slides: Path, tmp_path: Path, calls) -> None:
    tiling.submit_tiling(slides, tmp_path / "out", options=OPTIONS, profile=Profile(), num_tasks=2)
    calls[0][1][0]()  # of four slides, the first and the third
    calls.clear()
    array, _ = tiling.submit_tiling(slides, tmp_path / "out", options=OPTIONS, profile=Profile(), num_tasks=9)
    assert array.tasks == 2
    assert [call.arguments["slide_ids"] for call in calls[0][1]] == [["b"], ["d"]]


def test_tasks_cut_the_slides_of_a_folder_that_is_a_link_named_from_where_one_is(
    slides: Path, tmp_path: Path, calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "skin").symlink_to(slides)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    tiling.submit_tiling(Path("skin"), out, options=OPTIONS, profile=Profile(), num_tasks=2)
    monkeypatch.chdir("/")
    calls[0][1][0]()
    assert slides_to_cut(slides_to_read(tmp_path / "skin"), out, OPTIONS) == ["b", "d"]


def test_nothing_is_submitted_beside_the_job_that_writes_the_store(
    slides: Path, tmp_path: Path, calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiling, "jobs_under_way", lambda name: ["7"] if "tile-store" in name else [])
    found = tiling.submit_tiling(slides, tmp_path / "out", options=OPTIONS, profile=Profile(), num_tasks=2)
    assert found == (None, Submitted(job="7", tasks=0))
    assert calls == []
