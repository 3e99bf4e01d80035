"""Shipped names, errors of the operating system in one line, and provenance."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest

from hpcssl.core import errors, resources
from hpcssl.core.errors import ConfigError, UserError, describe_os_error
from hpcssl.core.provenance import provenance, version_of


def test_shipped_names_are_found() -> None:
    assert {"opal-3b", "demo"} <= set(resources.names("schedule spec"))
    for kind in ("recipe", "schedule spec"):
        for name in resources.names(kind):
            assert resources.locate(kind, name).is_file()


def test_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "demo.yaml"
    path.write_text("seed: 1\n")
    assert resources.locate("schedule spec", str(path)) == path


def test_a_name_that_does_not_ship_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"schedule spec opal-3: .*did you mean opal-3b\?"):
        resources.locate("schedule spec", "opal-3")
    with pytest.raises(ConfigError, match=r"schedule spec absent/x\.yaml: no such file"):
        resources.locate("schedule spec", "absent/x.yaml")


def test_errors_a_user_can_mend_share_a_base() -> None:
    named = [value for name, value in vars(errors).items() if name.endswith("Error") and isinstance(value, type)]
    assert len(named) >= 8
    assert all(issubclass(value, UserError) for value in named)


@pytest.mark.parametrize(
    ("number", "told"),
    [(errno.ENOSPC, "disk is full"), (errno.EACCES, "permission denied"), (errno.EROFS, "read-only")],
)
def test_an_os_error_says_where_and_what(number: int, told: str) -> None:
    message = describe_os_error(OSError(number, "text of the system", "some/file"))
    assert message.startswith("some/file: ")
    assert told in message
    assert "\n" not in message
    assert describe_os_error(OSError(number, "no file named")).endswith(told) or told in message
    assert describe_os_error(OSError(errno.EIO, "Input/output error", "f")) == "f: Input/output error"


def test_provenance_holds_the_versions_in_use() -> None:
    found = json.loads(json.dumps(provenance()))
    assert found["packages"]["numpy"] == np.__version__
    assert version_of("no-such-package-at-all") is None
    assert found["cpu_count"] >= 1
