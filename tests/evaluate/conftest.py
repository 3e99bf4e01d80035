"""What the tests of the evaluations share."""

import importlib.util
import sys
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def plain(repository) -> ModuleType:
    """The plain training of one head (tools/plain_head.py)."""
    spec = importlib.util.spec_from_file_location("plain_head", repository / "tools" / "plain_head.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["plain_head"] = module
    spec.loader.exec_module(module)
    return module
