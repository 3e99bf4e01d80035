"""The report in a real browser: all pictures show, nothing is too wide, every inner link leads somewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from hpcssl.report.page import write_report

# put at the end of a copy of the page: what a reader would stumble over, as JSON in the document
MEASURE = """<script>addEventListener("load", () => {
  const all = (query) => [...document.querySelectorAll(query)];
  const found = {
    pictures: all("img").map((i) => [i.naturalWidth, i.getBoundingClientRect().width]),
    width: innerWidth,
    needed: document.documentElement.scrollWidth,
    lost: all("a[href^='#']").map((a) => a.hash.slice(1)).filter((id) => !document.getElementById(id)),
    rows: all("table tr").length,
    hidden: all("h1, h2, h3, figcaption, table").filter((e) => !e.getBoundingClientRect().height).length,
  };
  const told = document.createElement("pre");
  told.id = "found";
  told.textContent = JSON.stringify(found);
  document.body.append(told);
});</script>"""

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> list[str]:
    """The command of a Chromium without a window, which apt installs where this is root's machine."""
    names = ("chromium", "chromium-browser", "google-chrome")
    if not any(map(shutil.which, names)) and os.geteuid() == 0 and shutil.which("apt-get"):
        install = "apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium"
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["bash", "-c", install], env=env, capture_output=True, check=False)
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("needs Chromium: apt install chromium")
    options = "--headless --no-sandbox --disable-gpu --hide-scrollbars --virtual-time-budget=5000"
    return [found, *options.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]


def _chromium(browser: list[str], width: int, *more: object) -> str:
    command = [*browser, f"--window-size={width},1000", *map(str, more)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.parametrize("width", [1280, 520])
def test_a_reader_sees_all_of_it(browser, tmp_path, inputs, width) -> None:
    page = write_report(tmp_path / "report", inputs, title="A report").page
    measured = tmp_path / "measured.html"
    text = page.read_text(encoding="utf-8")
    assert "default-src 'none'" in text, "the page itself lets no script run"
    measured.write_text(text.replace("default-src 'none'", "script-src 'unsafe-inline'") + MEASURE, encoding="utf-8")
    document = _chromium(browser, width, "--dump-dom", measured.as_uri())
    found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', document)[1])
    assert found["width"] == width
    assert found["needed"] <= width, "the page scrolls sideways"
    assert len(found["pictures"]) >= 6
    assert all(natural > 1000 and shown >= 470 for natural, shown in found["pictures"])
    assert found["lost"] == []
    assert found["rows"] > 5
    assert found["hidden"] == 0
    picture = tmp_path / "page.png"
    _chromium(browser, width, f"--screenshot={picture}", page.as_uri())
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape[1] == width
    assert 0.01 < (pixels < 128).mean() < 0.4, "words on white"
