"""The restart history in the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpcssl.report.restarts import kind_of
from hpcssl.report.training import training_charts

pytestmark = pytest.mark.timeout(120)


def _write(run: Path, *starts: dict) -> None:
    text = "".join(json.dumps({"time": "2026-11-21T15:00:00+0000", "host": "h", **start}) + "\n" for start in starts)
    (run / "restarts.jsonl").write_text(text + '{"torn')


def _part(*runs: Path):
    return next((part for part in training_charts(runs) if part.name == "restarts"), None)


def test_every_cause_is_told_where_it_struck(make_run):
    run = make_run(steps=60)
    _write(
        run,
        {"newest_checkpoint": None, "why": "first start", "world_size": 4, "nodes": ["node1", "node2"]},
        {"newest_checkpoint": 20, "why": "a node failed: node2", "world_size": 2, "nodes": ["node1"]},
        {"newest_checkpoint": 40, "why": "preempted", "world_size": 4, "nodes": ["node1", "node2"]},
    )
    part = _part(run)
    told = "started again 2 times: at step 20 (a node failed: node2; 2 processes), step 40 (preempted; 4 processes)."
    assert told in part.alt
    assert told in part.caption
    assert part.table["step"].tolist() == [0, 20, 40]
    assert part.table["nodes"].tolist() == ["node1 node2", "node1", "node1 node2"]
    assert part.png.startswith(b"\x89PNG")


def test_of_several_runs_those_started_again_are_told_and_old_lines_without_a_cause_are_unknown(make_run):
    quiet, restarted = make_run("quiet"), make_run("restarted")
    assert _part(quiet) is None
    _write(quiet, {"newest_checkpoint": None, "world_size": 1})
    assert _part(quiet) is None
    _write(restarted, {"newest_checkpoint": None, "world_size": 1}, {"newest_checkpoint": 7, "world_size": 2})
    part = _part(quiet, restarted)
    assert part.alt == "restarted was started again once: at step 7 (unknown; 2 processes)."
    assert part.table["why"].tolist() == ["first start", "first start", "unknown"]


def test_kinds_of_causes():
    for why in ("0-3 died on node1: Killed", "1 failed: KeyError('x'); see log", "0: tile.jpg cannot be read"):
        assert kind_of(f"rank {why}") == "a rank died"
    assert kind_of("requeued by an administrator or by hand") == "requeued by an administrator or by hand"
