"""What the tests of the evaluations share."""

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from hpcssl.features.feature_files import write_slide


@pytest.fixture
def write_features(tmp_path) -> Callable[..., None]:
    """Writes a folder of feature files; `tiles` gives the features of a slide by its place."""

    def write(name, slides, tiles) -> None:
        (tmp_path / name).mkdir()
        for place, slide in enumerate(slides):
            features = tiles(place)
            write_slide(tmp_path / name / f"{slide}.h5", features, np.zeros((len(features), 2)))

    return write


@pytest.fixture(scope="session")
def plain(repository) -> ModuleType:
    """The plain training of one head (tools/plain_head.py)."""
    spec = importlib.util.spec_from_file_location("plain_head", repository / "tools" / "plain_head.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["plain_head"] = module
    spec.loader.exec_module(module)
    return module
