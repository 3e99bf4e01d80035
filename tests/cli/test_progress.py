import pytest

from hpcssl.cli import progress as module
from hpcssl.cli.progress import progress


def test_lines_tell_the_pace_and_the_end(monkeypatch, capsys):
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LINES", 0.0)
    with progress("reading", total=4, unit="tiles") as advance:
        advance(1)
        advance(3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "reading: 1 of 4 tiles"
    assert lines[1].startswith("reading: 4 of 4 tiles, about 0 s left")
    assert lines[2].startswith("reading: 4 tiles in ")


def test_a_thread_that_outlives_the_work_tells_nothing_more(monkeypatch, capsys):
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LINES", 0.0)
    with pytest.raises(KeyboardInterrupt), progress("reading", total=4, unit="tiles") as advance:
        raise KeyboardInterrupt
    advance(1)
    assert capsys.readouterr().err == ""
