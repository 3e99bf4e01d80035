"""The same schedule, byte for byte, on numpy 1.26 and on the installed numpy 2: a second environment computes it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

PINNED = ["numpy>=1.26,<2", "pyarrow<22"]  # the extra `numpy1` of setup.py
OTHERS = ["numba", "pandas", "pydantic", "pyyaml"]
BUILD = """
import sys
from pathlib import Path
import numpy as np
import pandas as pd
from hpcssl.schedule.build import build_schedule
from hpcssl.schedule.file import Schedule
from hpcssl.schedule.spec import ScheduleSpec
out = Path(sys.argv[1])
count = np.arange(200) * 37 % 91 + 1
organ = np.array(["breast", "colon", "lung", "skin"])[np.arange(200) ** 2 % 7 % 4]
slides = pd.DataFrame({"slide_id": [f"s{i}" for i in range(200)], "organ": organ, "num_tiles": count})
spec = ScheduleSpec(num_pseudo_epochs=7, positions_per_pseudo_epoch=3001, organ_power=0.5, slide_power=0.5)
build_schedule(spec, slides, out, jobs=2)
print(np.__version__, Schedule.open(out).digest)
"""


def build(python: Path, out: Path, repository: Path) -> tuple[str, str]:
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run([python, "-c", BUILD, out], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    version, digest = done.stdout.split()
    return version, digest


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="numpy 1.26 has no build for this Python")
def test_numpy_1_and_2_make_the_same_bytes(tmp_path: Path, repository: Path) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PINNED, *OTHERS], check=True)
    old, old_digest = build(python, tmp_path / "old", repository)
    new, new_digest = build(Path(sys.executable), tmp_path / "new", repository)
    assert all(f'"{requirement}"' in (repository / "setup.py").read_text() for requirement in PINNED)
    assert old.startswith("1.26")
    assert new == np.__version__
    assert int(new.split(".")[0]) >= 2
    assert old_digest == new_digest
    for path in (tmp_path / "new").glob("*.npy"):
        assert path.read_bytes() == (tmp_path / "old" / path.name).read_bytes()
