"""How the tests of every command see a refusal."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hpcssl.cli.main import main


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must end as a user's error: exit 2, one line, no traceback; returns the line."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        try:
            code: object = main([*map(str, arguments)])
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        assert (code, out) == (2, ""), err
        (line,) = err.strip().splitlines()
        assert line.startswith("hpcssl: error: "), err
        assert "Traceback" not in err
        return line

    return run
