"""Which jobs a store needs, given what is done and what is under way; that the jobs make the store of one process."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

from hpcssl.core.errors import RunError, SlideError
from hpcssl.jobs.array import Call, Submitted
from hpcssl.jobs.profile import Profile
from hpcssl.pipelines import stage
from hpcssl.pipelines.build_store import build_from_slides, submit_from_slides, submit_parts
from hpcssl.pipelines.stage import StageJobs
from hpcssl.pipelines.tile import submit_tiling, tile
from hpcssl.slides.cutting import CutOptions
from hpcssl.slides.slide_list import slides_to_read
from hpcssl.stores.kinds import open_store
from hpcssl.stores.scan import BuildOptions, build_store
from hpcssl.stores.tiling import Tiling, TilingOptions

CUT = TilingOptions(cut=CutOptions(mpp=0.5, tile_px=64), threads=2)
JOBS = {
    "tile": ("tile-cut", "tile-store"),
    "online": ("store-look", "store-write"),
    "parts": ("store-parts", "store-join"),
}


@pytest.fixture
def under_way(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Kinds of job that are under way."""
    kinds: set[str] = set()
    monkeypatch.setattr(
        stage, "jobs_under_way", lambda name: ["7"] if any(name.startswith(f"hpcssl-{k}-") for k in kinds) else []
    )
    return kinds


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, under_way: set[str]) -> list[tuple[str, list[Call], list[str]]]:
    """(kind, calls, after) of every job that was submitted; its id is its number among them."""
    submitted: list[tuple[str, list[Call], list[str]]] = []

    def submit(
        calls: Sequence[Call], out: Path, profile: Any, *, kind: str, gpus: int = 0, after: Sequence[str] = ()
    ) -> Submitted:
        if kind in under_way:
            return Submitted(job="7", tasks=0)
        submitted.append((kind, pickle.loads(pickle.dumps(list(calls))), list(after)))
        return Submitted(job=str(len(submitted)), tasks=len(calls))

    monkeypatch.setattr(stage, "submit_calls", submit)
    return submitted


@pytest.fixture(scope="module")
def slides(online: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three slides, and a file that is none."""
    folder = tmp_path_factory.mktemp("array") / "skin"
    for seed, name in enumerate("abc"):
        online.draw_slide(folder / f"{name}.tif", seed=seed)
    (folder / "d.tif").write_bytes(b"no slide")
    return folder


@pytest.fixture
def submit(request: pytest.FixtureRequest, slides: Path, small: ModuleType, online: ModuleType, tmp_path: Path, jobs):
    """Submits the building of `out` in so many tasks."""
    out, profile = tmp_path / "out", Profile(gpus_per_node=0, cpus_per_gpu=1)
    if request.param == "parts":
        tiles = small.make_tiles(tmp_path / "tiles", slides=2)
        fixed = {"table": None, "options": BuildOptions(pack=True), "profile": profile}
        return lambda num: submit_parts(tiles, out, **fixed, num_tasks=num)
    work, options = {"tile": (submit_tiling, CUT), "online": (submit_from_slides, online.options_of())}[request.param]
    return lambda num, source=slides: work(source, out, options, profile=profile, num_tasks=num)


@pytest.fixture
def build(request: pytest.FixtureRequest, slides: Path, online: ModuleType, tmp_path: Path) -> Callable[[Path], Any]:
    """Does the same in one process."""
    return {
        "tile": lambda out: tile(slides, out, CUT).store,
        "online": lambda out: build_from_slides(slides, out, online.options_of()).store,
        "parts": lambda out: build_store(tmp_path / "tiles", out),
    }[request.param]


def parametrized(*fixtures: str, kinds: Sequence[str] = tuple(JOBS)) -> Any:
    return pytest.mark.parametrize(fixtures, [(kind,) * len(fixtures) for kind in kinds], indirect=True, ids=kinds)


@parametrized("submit")
def test_nothing_is_written_where_slurm_does_not_answer(submit, tmp_path, monkeypatch) -> None:
    """Else the corrected command would be refused: another number of tasks, another MPP."""

    def away(name: str) -> list[str]:
        raise RunError("squeue gave no answer within 60 s")

    monkeypatch.setattr(stage, "jobs_under_way", away)
    with pytest.raises(RunError, match="gave no answer"):
        submit(3)
    assert {path.name for path in tmp_path.iterdir()} <= {"tiles"}


@parametrized("submit", "build")
def test_an_array_and_a_job_after_it_make_the_store_of_one_process(submit, build, jobs, tmp_path, request) -> None:
    kind = request.node.callspec.id
    assert submit(3) == StageJobs(array=Submitted(job="1", tasks=3), last=Submitted(job="2", tasks=1))
    first, second = JOBS[kind]
    assert [(name, len(calls), after) for name, calls, after in jobs] == [(first, 3, []), (second, 1, ["1"])]
    (_, array, _), (_, (last,), _) = jobs
    for call in reversed(array):
        call()
    assert not (tmp_path / "out" / "store.json").exists()
    if kind == "parts":
        last()
    else:
        with pytest.raises(SlideError, match=r"1 of 4 slides failed \(all are in"):
            last()
    whole, store = build(tmp_path / "alone"), open_store(tmp_path / "out")
    assert store.digest == whole.digest
    if kind != "parts":
        assert pd.read_csv(tmp_path / "out" / "failed_slides.csv")["slide_id"].tolist() == ["d"]
        assert store.header["files"] == whole.header["files"], "the same bytes"
    store.verify(deep=True)


@parametrized("submit")
def test_a_second_submission_does_only_what_is_missing(submit, jobs, request) -> None:
    submit(2)
    jobs[0][1][0]()
    jobs.clear()
    submit(2)
    (_, calls, _) = jobs[0]
    key, values = {"parts": ("number", [1])}.get(request.node.callspec.id, ("slide_ids", [["b"], ["d"]]))
    assert [call.arguments[key] for call in calls] == values


@parametrized("submit", kinds=["parts"])
def test_where_only_the_joining_is_left_it_is_submitted_alone(submit, jobs) -> None:
    submit(3)
    for call in jobs[0][1]:
        call()
    jobs.clear()
    assert submit(3) == StageJobs(array=None, last=Submitted(job="1", tasks=1))
    assert jobs[0][2] == []


@parametrized("submit")
@pytest.mark.parametrize("which", [(0, 1), (1,), (0,)])
def test_nothing_is_submitted_beside_what_is_under_way(submit, jobs, under_way, request, which) -> None:
    names = JOBS[request.node.callspec.params["submit"]]
    submit(2)
    jobs.clear()
    under_way |= {names[number] for number in which}
    ends = StageJobs(array=None, last=Submitted(job="7", tasks=0))
    assert submit(2) == (ends if 1 in which else StageJobs(array=Submitted(job="7", tasks=0), last=None))
    assert jobs == []


@parametrized("submit", kinds=["tile"])
def test_tasks_cut_the_slides_of_a_folder_that_is_a_link_named_from_where_one_is(
    submit, slides, tmp_path, jobs, monkeypatch
) -> None:
    (tmp_path / "skin").symlink_to(slides)
    monkeypatch.chdir(tmp_path)
    submit(2, Path("skin"))
    monkeypatch.chdir("/")
    jobs[0][1][0]()
    missing = Tiling(tmp_path / "out", CUT).missing(slides_to_read(tmp_path / "skin"))
    assert [row["slide_id"] for row in missing] == ["b", "d"]
