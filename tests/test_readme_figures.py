"""What README says was measured stands in tools/bench/RESULTS.md, and is what was measured there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

# 5 to 9 times; 97 %; about a minute on two cores
PHRASE = re.compile(
    r"\d[\d.]*(?: to [\d.]+)? times\b|\d[\d.]* %|about (?:a|\d+) (?:minutes?|seconds?)(?: on \w+ cores)?"
)
NOT_MEASURED = {"0.5 %"}  # how far from square pixels may be
TITLE = "## Figures that README states"


def phrases(readme: str) -> set[str]:
    """The phrases of README's prose that tell a measurement."""
    prose = re.sub(r"```.*?```", "", readme, flags=re.DOTALL)
    return set(PHRASE.findall(" ".join(prose.split()))) - NOT_MEASURED


def check_figures(readme: str, results: str) -> None:
    """Every phrase has a row, every row a phrase; a row's figure stands below, and its numbers are those of README."""
    before, _, after = results.partition(TITLE)
    table, _, below = after.partition("\n## ")
    rows = re.findall(r"^\| ([^|]+?) \| ([^|]+?) \| ([^|]+?) \|$", table, re.MULTILINE)[1:]
    stated = {phrase: (figure, name) for phrase, figure, name in rows}
    assert stated.keys() == phrases(readme)
    for phrase, (figure, name) in stated.items():
        measured = [line for line in (before + below).splitlines() if name in line]
        assert any(re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.]*\d)", line) for line in measured), (figure, name)
        told = [float(n) for n in re.findall(r"\d+(?:\.\d+)?", phrase)]
        found = [float(n) * (100 if "%" in phrase else 1) for n in re.findall(r"\d+(?:\.\d+)?", figure)]
        assert not told or told == [round(n) if "%" in phrase else n for n in found], phrase


def test_readme_states_what_was_measured(repository: Path) -> None:
    readme, results = (repository / name for name in ("README.md", "tools/bench/RESULTS.md"))
    check_figures(readme.read_text(encoding="utf-8"), results.read_text(encoding="utf-8"))


RESULTS = f"""{TITLE}

| README | figure | of |
|---|---|---|
| 3 times | 3.0 | `fast` |

## Speed

| `fast` | 3.0 | 2–4 |
"""


@pytest.mark.parametrize(
    ("readme", "results"),
    [
        ("4 times as fast", RESULTS),
        ("3 times as fast, on 97 % of all", RESULTS),
        ("no word of it", RESULTS),
        ("3 times as fast", RESULTS.replace("| 3.0 | 2–4 |", "| 3.05 | 2–4 |")),
        ("3 times as fast", RESULTS.replace("| 3.0 |", "| 3.5 |")),
        ("3 times as fast", RESULTS.replace("| `fast` | 3.0 | 2–4 |", "| `slow` | 3.0 | 2–4 |")),
    ],
)
def test_a_figure_that_was_not_measured_is_found(readme: str, results: str) -> None:
    check_figures("It is 3 times\nas fast; ```on 5 % of all```", RESULTS)
    with pytest.raises(AssertionError):
        check_figures(readme, results)
