import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from hpcssl.core.errors import RunError
from hpcssl.evaluate.results import ResultsError
from hpcssl.report.arms import ReportError
from hpcssl.report.page import Inputs, write_report

PARTS = ["auc_by_checkpoint", "curves_breast", "curves_lung", "organ_shares", "schedules", "training"]


class Page(HTMLParser):
    """Links, sources, ids, alternative texts and the words of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.sources, self.links, self.ids, self.alts, self.words, self.scripts = [], [], set(), [], "", 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.sources += [values[key] for key in ("src", "srcset", "data", "poster") if key in values]
        self.links += [values["href"]] if "href" in values else []
        self.ids |= {values["id"]} if "id" in values else set()
        self.alts += [values.get("alt", "")] if tag == "img" else []
        self.scripts += tag == "script"

    def handle_data(self, data):
        self.words += data


def test_the_whole_report(tmp_path: Path, inputs: Inputs) -> None:
    out = tmp_path / "deep" / "report"
    path = write_report(out, inputs, title="A <title>", notes={"seed": "7", "tiles": "<b>&"}).page
    assert path == out / "report.html"
    expected = {f"{part}.{ending}" for part in PARTS for ending in ("png", "csv")}
    expected |= {f"{table}.{ending}" for table in ("summary", "saturation") for ending in ("csv", "md", "tex")}
    assert {p.name for p in out.iterdir()} == expected | {"report.html", "verdict.txt"}
    summary = pd.read_csv(out / "summary.csv").set_index(["task", "checkpoint"])
    assert summary.loc[("lung", 200), "difference_low"] > 0
    by_checkpoint = pd.read_csv(out / "auc_by_checkpoint.csv").groupby(["task", "checkpoint"])["score"].mean()
    pd.testing.assert_series_equal(by_checkpoint, summary["score"], rtol=1e-5, check_names=False)
    page = Page(path)
    assert len(page.sources) == len(page.alts) == len(PARTS)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert all(len(alt) > 20 for alt in page.alts)
    for link in page.links:
        assert link == "data:," or link[1:] in page.ids or (out / link).is_file(), link
    assert page.scripts == 0
    assert not re.search(r"https?://|url\(|@import", path.read_text(encoding="utf-8"))
    assert "A <title>" in page.words
    assert "<b>&" in page.words
    summary = pd.read_csv(out / "summary.csv").set_index(["task", "checkpoint"])
    curves = pd.read_csv(out / "curves_lung.csv").query("metric == 'auc' and epoch == 5").set_index("checkpoint")
    assert curves.loc[200, "low"] == pytest.approx(summary.loc[("lung", 200), "score_low"])
    assert pd.read_csv(out / "training.csv")["step"].tolist() == list(range(1, 61))
    for line in (out / "verdict.txt").read_text(encoding="utf-8").splitlines():
        assert line.strip() in page.words
    for part in PARTS:
        with Image.open(out / f"{part}.png") as image:
            assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
            assert image.width == 1080
            assert image.convert("L").getextrema() != (255, 255), "something is drawn on white paper"
            assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path, inputs: Inputs) -> None:
    first, second = (write_report(tmp_path / name, inputs, title="t").page.parent for name in "ab")
    for path in sorted(first.iterdir()):
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("kept", "present"), [("results", PARTS[:3]), ("runs", ["schedules", "training"]), ("schedule", ["organ_shares"])]
)
def test_a_part_without_input_is_left_out(tmp_path: Path, inputs: Inputs, kept: str, present: list[str]) -> None:
    out = write_report(tmp_path / "out", Inputs(**{kept: getattr(inputs, kept)}), title="t").page.parent
    assert sorted(p.stem for p in out.glob("*.png")) == present
    page = Page(out / "report.html")
    assert ("summary" in page.ids) == (kept == "results")
    assert len(page.alts) == len(present)


def test_nothing_is_written_when_an_input_is_bad(tmp_path: Path, inputs: Inputs) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError):
        write_report(tmp_path / "out", replace(inputs, runs=(tmp_path / "empty",)), title="t")
    with pytest.raises(ResultsError):
        write_report(tmp_path / "out", replace(inputs, results=tmp_path / "empty"), title="t")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("x")
    with pytest.raises(ReportError, match="is a file"):
        write_report(tmp_path / "out", inputs, title="t")


def test_no_torch() -> None:
    modules = "page, checkpoints, curves, schedules, training; import hpcssl.runs.trace, hpcssl.schedule.inspect, sys"
    absent = "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", f"from hpcssl.report import {modules}; {absent}"], check=True)
