"""The restart history: starts explain how the one before ended, and failures without progress are counted."""

from __future__ import annotations

import json
from datetime import datetime

import pytest

from hpcssl.runs.history import END, RESTARTS, read_end, read_starts, record_end
from hpcssl.runs.run_folder import Generation, record_start


@pytest.fixture
def run(tmp_path):
    (tmp_path / "generations").mkdir()
    return tmp_path


def _end(run, start: str, step: int, job: str = "7", failed: bool = True):
    return record_end(run, start=start, job=job, state="failed", why="a reason", step=step, is_failure=failed)


def test_a_start_has_in_its_line_what_its_claim_says(run):
    generation = Generation.take(run, start="a-0", job="7", nodes=["node1"], why="first start")
    record_start(run, generation=generation.number, world_size=2)
    (start,) = read_starts(run)
    datetime.strptime(start["time"], "%Y-%m-%dT%H:%M:%S%z")
    assert (start["generation"], start["start"], start["job"], start["nodes"]) == (1, "a-0", "7", ["node1"])
    assert (start["why"], start["world_size"]) == ("first start", 2)


def test_a_torn_line_is_left_out_and_does_not_swallow_the_next(run):
    assert read_starts(run / "nowhere") == []
    (run / RESTARTS).write_text('{"generation": 1, "wor')
    assert read_starts(run) == []
    record_start(run, generation=2)
    record_start(run, generation=3)
    assert [start["generation"] for start in read_starts(run)] == [2, 3]
    assert (run / RESTARTS).read_text().count("\n") == 3


def test_a_start_that_died_before_its_line_is_told_from_its_claim(run):
    for generation in (1, 3):
        Generation.take(run, start=f"a-{generation}", job="7", nodes=["node1"], why=f"why {generation}")
        if generation == 1:
            record_start(run, generation=1, world_size=2)
            Generation.take(run)  # says nothing
    (run / "generations" / "000004").write_text('{"start": "torn')
    first, dead = read_starts(run)
    assert (first["generation"], first["world_size"]) == (1, 2)
    assert (dead["generation"], dead["start"], dead["why"], dead["nodes"]) == (3, "a-3", "why 3", ["node1"])
    datetime.strptime(dead["time"], "%Y-%m-%dT%H:%M:%S%z")
    record_start(run, generation=3, world_size=4)
    assert [start.get("world_size") for start in read_starts(run)] == [2, 4]


def test_an_end_counts_until_the_next_start(run):
    assert read_end(run) is None
    Generation.take(run)
    assert read_end(run) is None
    _end(run, "a-0", 5)
    assert read_end(run).why == "a reason"
    Generation.take(run)
    assert read_end(run) is None, "that start goes on"


def test_the_first_who_knows_why_a_start_ended_is_believed(run):
    first = _end(run, "a-0", 5)
    later = record_end(run, start="a-0", job="7", state="stopped", why="another", step=6)
    assert later == first == read_end(run)


@pytest.mark.parametrize(
    ("ends", "failures"),
    [
        ([("a", 5), ("b", 5), ("c", 5)], [1, 2, 3]),
        ([("a", 5), ("b", 6), ("c", 6)], [1, 1, 2]),  # progress
        ([("a", 0), ("b", 0)], [1, 2]),
        ([("a", 5), ("b", 5, "7", False), ("c", 5)], [1, 1, 2]),  # a preemption is no failure and forgets none
        ([("a", 5, "7"), ("b", 5, "8")], [1, 1]),  # another job
    ],
)
def test_failures_of_a_job_are_counted_until_there_is_a_newer_checkpoint(run, ends, failures):
    assert [_end(run, *end).failures for end in ends] == failures


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"start": "a-0"})])
def test_a_damaged_end_says_nothing(run, text):
    (run / END).write_text(text)
    assert read_end(run) is None
