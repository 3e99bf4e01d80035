"""The training trace: one row a step, whatever was torn, recomputed or is still being written."""

from __future__ import annotations

import json

import pytest

from hpcssl.core.errors import RunError
from hpcssl.runs import trace as metrics
from hpcssl.runs.trace import MetricsWriter, last_record, read_metrics


def _write(run, steps, loss=1.0) -> None:
    writer = MetricsWriter(run, next_step=steps[0])
    for step in steps:
        writer.write({"step": step, "loss": loss + step})
    writer.close()


def test_a_line_is_in_the_file_when_it_is_written(tmp_path):
    writer = MetricsWriter(tmp_path, next_step=1)
    writer.write({"step": 1, "loss": 2.0})
    assert read_metrics(tmp_path)["step"].tolist() == [1]
    writer.close()


def test_steps_recomputed_after_a_restart_are_not_duplicated(tmp_path):
    _write(tmp_path, range(1, 8))
    _write(tmp_path, range(5, 10), loss=100.0)  # from the checkpoint of step 4
    lines = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == read_metrics(tmp_path)["step"].tolist() == list(range(1, 10))
    assert read_metrics(tmp_path)["loss"].tolist() == [2.0, 3.0, 4.0, 5.0, 105.0, 106.0, 107.0, 108.0, 109.0]


def test_a_reader_takes_the_later_of_two_lines_of_a_step(tmp_path):
    lines = [{"step": s, "loss": v} for s, v in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_metrics(tmp_path)["loss"].tolist() == [1.0, 20.0, 3.0]


@pytest.mark.parametrize("kept", range(1, 24))
def test_a_torn_last_line_is_dropped_by_reader_and_by_the_next_writer(tmp_path, kept):
    _write(tmp_path, [1, 2])
    torn = json.dumps({"step": 3, "loss": 4.0})[:kept]
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write(torn)
    assert read_metrics(tmp_path)["step"].tolist() == [1, 2]
    assert last_record(tmp_path)["step"] == 2
    _write(tmp_path, [3, 4])
    assert read_metrics(tmp_path)["step"].tolist() == [1, 2, 3, 4]


def test_a_line_torn_before_its_end_of_line_spoils_no_other(tmp_path):
    _write(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": 3, "loss": 4.0}))
    _write(tmp_path, [4, 5])
    assert {1, 2, 4, 5} <= set(read_metrics(tmp_path)["step"])


def test_a_writer_looks_at_the_lines_to_be_dropped_alone(tmp_path, monkeypatch):
    """The trace of a long run has millions; all ranks wait while rank 0 opens it."""
    _write(tmp_path, range(1, 1000))
    real, read = metrics.json.loads, []
    monkeypatch.setattr(metrics.json, "loads", lambda text: read.append(text) or real(text))
    _write(tmp_path, [995])
    assert len(read) == 6
    monkeypatch.undo()
    assert read_metrics(tmp_path)["step"].tolist() == list(range(1, 996))


def test_what_was_torn_within_the_lines_to_be_dropped_is_dropped_with_them(tmp_path):
    _write(tmp_path, [1, 2, 3])
    with (tmp_path / "metrics.jsonl").open("ab") as stream:
        stream.write(b'{"step": 4, "lo{"step": 5}\n' + bytes(100))
    _write(tmp_path, [3, 4])
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [1, 2, 3, 4]


def test_a_long_trace_is_read_in_parts_that_are_put_together(tmp_path, monkeypatch):
    """Of values that are measured now and then, whole parts have none."""
    writer = MetricsWriter(tmp_path, next_step=1)
    for step in range(1, 24):
        writer.write({"step": step, "loss": float(step), **({"rank_me": 7.0} if step == 20 else {})})
    writer.close()
    whole = read_metrics(tmp_path)
    monkeypatch.setattr(metrics, "_LINES", 5)
    assert read_metrics(tmp_path).equals(whole)
    assert whole["rank_me"].notna().sum() == 1


def test_what_a_killed_start_left_is_removed(tmp_path):
    _write(tmp_path, [1])
    (tmp_path / ".metrics.jsonl.0a1b.tmp").write_bytes(b"half")
    _write(tmp_path, [2])
    assert [f.name for f in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_no_trace_is_told(tmp_path):
    with pytest.raises(RunError, match="has the run begun"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(RunError, match="no steps yet"):
        read_metrics(tmp_path)


def test_the_last_record_is_the_newest_whole_line(tmp_path):
    assert last_record(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text("")
    assert last_record(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text('{"step"')
    assert last_record(tmp_path) is None
    _write(tmp_path, range(1, 2000))
    assert (tmp_path / "metrics.jsonl").stat().st_size > 3 * 8192
    assert last_record(tmp_path) == {"step": 1999, "loss": 2000.0}


def test_the_last_record_of_a_growing_file_never_goes_back(tmp_path):
    """A launcher reads while a rank writes: between any two bytes of a line it sees the line before."""
    with (tmp_path / "metrics.jsonl").open("ab", buffering=0) as stream:
        for step in range(1, 400):
            line = json.dumps({"step": step, "loss": 1.0, "more": "x" * (step % 60)}).encode() + b"\n"
            torn = 1 + step * 7 % (len(line) - 2)  # within the object, so that it is not whole
            stream.write(line[:torn])
            assert (last_record(tmp_path) or {"step": 0})["step"] == step - 1
            stream.write(line[torn:])
            assert last_record(tmp_path)["step"] == step
    assert (tmp_path / "metrics.jsonl").stat().st_size > 3 * 8192
