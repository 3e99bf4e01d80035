"""The README's own commands, in order, on what the demo left; a block that is not run says so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

NOT_RUN = "# not run by the tests"
TWO_COMMANDS = "bash tools/demo.sh"  # run by `demo_folder` and by whoever runs this


def blocks(readme: Path) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", readme.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_only_marked_blocks_are_not_run(repository: Path) -> None:
    found = blocks(repository / "README.md")
    assert len(found) >= 8
    assert sum(block.startswith(NOT_RUN) for block in found) == 1
    assert sum(TWO_COMMANDS in block for block in found) == 1


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_walk_through_the_stages(repository: Path, demo_folder: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    run = partial(subprocess.run, cwd=demo_folder, env=environment, capture_output=True, text=True, timeout=900)
    for block in blocks(repository / "README.md"):
        if not (block.startswith(NOT_RUN) or TWO_COMMANDS in block):
            done = run(["bash", "-euo", "pipefail", "-c", block], check=False)
            assert done.returncode == 0, f"{block}\n{done.stderr[-2000:]}"
    assert (demo_folder / "walk" / "report" / "report.html").is_file()
