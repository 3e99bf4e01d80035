"""A table of the report as the files beside the page: CSV with the numbers, Markdown and LaTeX as it is shown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import pandas as pd


def table_files(name: str, table: pd.DataFrame, header: Sequence[str], rows: Sequence[Sequence[str]]) -> dict[str, str]:
    """Return file name to content of a table: its numbers, and the cells that are shown."""
    shown = [list(header), *map(list, rows)]
    return {f"{name}.csv": csv_text(table), f"{name}.md": markdown(shown), f"{name}.tex": latex(shown)}


def by_run(tables: Mapping[str, pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    """Join some columns of the tables of runs, NaN where a run lacks one, with the run's name in the first column."""
    joined = pd.concat([table.reindex(columns=list(columns)).assign(run=run) for run, table in tables.items()])
    return joined[["run", *columns]]


def csv_text(table: pd.DataFrame) -> str:
    """Return a table as CSV; six digits, enough for every figure, and the same text whatever the last bits of a sum."""
    return str(table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def markdown(shown: Sequence[Sequence[str]]) -> str:
    """Return a header and rows as Markdown; a bar in a name is escaped."""
    lines = ["| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |" for cells in shown]
    lines.insert(1, "|" + " --- |" * len(shown[0]))
    return "\n".join(lines) + "\n"


def latex(shown: Sequence[Sequence[str]]) -> str:
    """Return a header and rows for LaTeX with the package booktabs; columns of numbers stand on the right."""
    lines = [" & ".join(map(_escaped, cells)) + r" \\" for cells in shown]
    sides = "".join(
        "r" if all(re.match(r"[-−+–<]? ?\d|–$", cell) for cell in column) else "l" for column in zip(*shown[1:])
    )
    begin = rf"\begin{{tabular}}{{{sides}}}"
    return "\n".join([begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"]) + "\n"


def _escaped(text: str) -> str:
    r"""Return text that LaTeX prints as it is.

    >>> print(_escaped("vit_s 90% (0.7–0.8)"))
    vit\_s 90\% (0.7--0.8)
    """
    words = {"\\": r"\textbackslash{}", "–": "--", "−": "$-$", "×": r"$\times$", "²": "$^2$"}
    words |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"}
    words |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
    return "".join(words.get(letter, letter) for letter in text)
