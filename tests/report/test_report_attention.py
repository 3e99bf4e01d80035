import numpy as np
import pandas as pd
import pytest

from hpcssl.report.arms import ReportError
from hpcssl.report.attention_maps import attention_charts
from hpcssl.report.page import Inputs, write_report


def test_a_map_for_every_slide_that_was_asked_for(make_results, write_results, tmp_path) -> None:
    results = write_results(make_results({("lung", "vit", "100"): 0.8}))
    y, x = (axis.ravel() * 448 for axis in np.mgrid[:12, :20])
    kept = (x / 448 - 10) ** 2 / 90 + (y / 448 - 6) ** 2 / 30 < 1
    attention = np.exp(-((x - 3000) ** 2 + (y - 2000) ** 2) / 2e6)[kept]
    folder = results / "attention" / "lung__vit__100"
    folder.mkdir(parents=True)
    table = pd.DataFrame({"x": x[kept], "y": y[kept], "attention": attention / attention.sum()})
    table.to_csv(folder / "slide-1.csv", index=False)
    (part,) = attention_charts(results)
    assert part.title == "slide-1: attention (lung, vit, 100)"
    order = np.sort(table["attention"])[::-1].cumsum()
    assert f"The {int((order < 0.5).sum()) + 1} most attended tiles hold half" in part.caption
    out = write_report(tmp_path / "out", Inputs(results=results), title="t").page.parent
    assert (out / "attention_001.png").is_file()
    assert 'id="attention_001"' in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "places", [[(0, 0)], [(5, 5), (5, 229)], [(0, 0), (10**7, 10**7), (1, 0)]], ids=["one", "column", "far"]
)
def test_odd_slides_are_drawn_too(tmp_path, places) -> None:
    folder = tmp_path / "attention" / "a"
    folder.mkdir(parents=True)
    table = pd.DataFrame(places, columns=["x", "y"]).assign(attention=1 / len(places))
    table.to_csv(folder / "s.csv", index=False)
    (part,) = attention_charts(tmp_path)
    assert part.png.startswith(b"\x89PNG")


def test_a_damaged_table_is_told(tmp_path) -> None:
    (tmp_path / "attention" / "a").mkdir(parents=True)
    for content in ("", "x,y\n1,2\n", "x,y,attention\n1,2,z\n"):
        (tmp_path / "attention" / "a" / "s.csv").write_text(content)
        with pytest.raises(ReportError, match=r"s\.csv: no table of x, y, attention"):
            attention_charts(tmp_path)
