"""Which jobs a store in parts needs, given what is built and what is under way (on SLURM: tests/slurm)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hpcssl.jobs import stages
from hpcssl.jobs.array import Call, Submitted
from hpcssl.jobs.profile import Profile
from hpcssl.stores.scan import BuildOptions
from hpcssl.stores.store import Store


@pytest.fixture
def under_way(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Kinds of job that are under way; nothing else is submitted than in the list `calls`."""
    kinds: set[str] = set()
    monkeypatch.setattr(
        stages, "jobs_under_way", lambda name: ["7"] if any(name.startswith(f"hpcssl-{k}") for k in kinds) else []
    )
    return kinds


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, under_way: set[str]) -> list[tuple[str, list[Call], list[str]]]:
    """(kind, calls, after) of every job that was submitted; its id is its number among them."""
    found: list[tuple[str, list[Call], list[str]]] = []

    def submit(calls: Sequence[Call], out: Path, profile: Any, *, kind: str, after: Sequence[str] = ()) -> Submitted:
        if kind in under_way:
            return Submitted(job="7", tasks=0)
        found.append((kind, list(calls), list(after)))
        return Submitted(job=str(len(found)), tasks=len(calls))

    monkeypatch.setattr(stages, "submit_calls", submit)
    return found


@pytest.fixture
def build(small: ModuleType, tmp_path: Path):
    """Submits the build of a store of six slides in three parts."""
    tiles = small.make_tiles(tmp_path / "tiles")
    options = BuildOptions(pack=True)

    def submit() -> Any:
        return stages.submit_store_build(
            tiles, tmp_path / "store", table=None, options=options, profile=Profile(), num_tasks=3
        )

    return submit


def test_an_array_builds_the_parts_and_a_job_after_it_joins_them(build, calls, tmp_path):
    array, join = build()
    assert (array, join) == (Submitted(job="1", tasks=3), Submitted(job="2", tasks=1))
    assert [(kind, len(given), after) for kind, given, after in calls] == [
        ("store-parts", 3, []),
        ("store-join", 1, ["1"]),
    ]
    for _, given, _ in calls:
        for call in given:
            call()
    assert Store.open(tmp_path / "store").num_slides == 6


def test_what_failed_is_submitted_alone(build, calls):
    build()
    for call in calls[0][1][:2]:
        call()
    calls.clear()
    array, join = build()
    assert (array.tasks, join.tasks) == (1, 1)
    assert [call.arguments["number"] for call in calls[0][1]] == [2]
    calls[0][1][0]()
    calls.clear()
    assert build() == (None, Submitted(job="1", tasks=1)), "only the joining was left"
    assert calls[0][2] == []


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ({"store-parts", "store-join"}, (None, Submitted(job="7", tasks=0))),
        ({"store-join"}, (None, Submitted(job="7", tasks=0))),
        ({"store-parts"}, (Submitted(job="7", tasks=0), None)),
    ],
)
def test_nothing_is_submitted_beside_what_is_under_way(build, calls, under_way, kinds, expected):
    build()
    calls.clear()
    under_way |= kinds
    assert build() == expected
    assert calls == []
