"""Monte-Carlo splits of labelled slides: `slide, target, [patient_id], mccv1 … mccvK` with train/val in the cells."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hpcssl.core.errors import SplitError
from hpcssl.core.rng import key_of
from hpcssl.slides.slide_table import group_keys, missing, read_csv

PATIENT = "patient_id"
TRAIN, VAL = "train", "val"
CLASSES, VALUES = "classes", "values"  # kinds of target: what to tell apart, what to predict
_FEWEST_VALUES = 11  # different whole numbers from which on a target counts as values, unless told
_BINS = 5  # of a target's values, from which a split draws alike
_TRIES = 200  # draws among which the nearest is taken where groups hold several classes


def make_splits(
    frame: pd.DataFrame,
    target: str,
    num: int = 20,
    train: float = 0.8,
    group: str = PATIENT,
    seed: int = 0,
    kind: str | None = None,
) -> pd.DataFrame:
    """Draw `num` splits of a slide table, stratified by the column `target`, no group on both sides.

    Of a class with n slides ⌊n · train + 1/2⌋ train (at least 1, at most n - 1), or as near to it as whole groups
    allow. A target of values (`kind`, see `target_kind`) is stratified by fifths of the groups' means. Slides with a
    missing target are left out. A missing group, or a table without `patient_id`, makes each slide its own group. A
    draw is a function of (seed, split, group), not of the table's order. The table passes `check_splits`.

    SplitError if the target has one class, or a class cannot be on both sides, or a side has fewer than two different
    values.
    """
    if group in ("slide", "target") and group != target:
        raise SplitError(f"the group column {group} has a name of the split file's own; give it another name")
    if target not in frame.columns:
        raise SplitError(f"the slide table has no column {target}; it has {', '.join(frame.columns)}")
    if num < 1 or not 0 < train < 1:
        raise SplitError(
            f"{num} splits with {train} of the slides in train: expected at least 1, and a part between 0 and 1"
        )
    labelled = frame[~missing(frame[target])].sort_values("slide_id", ignore_index=True)
    labelled[target] = labelled[target].str.strip()
    ungrouped = group == PATIENT and PATIENT not in labelled.columns
    groups = "slide " + labelled["slide_id"] if ungrouped else group_keys(labelled, group)
    kind = target_kind(labelled[target], kind, where=f"column {target}")
    strata = labelled[target] if kind == CLASSES else _fifths(labelled[target].astype(float), groups, target)
    counts = pd.crosstab(groups, strata)
    if kind == CLASSES:
        _check_possible(counts, target)
    share = Fraction(str(train))  # the decimal as written: in binary 0.35 · 10 + 0.5 is just below 4
    quotas_C = np.array([min(max(int(n * share + Fraction(1, 2)), 1), n - 1) for n in counts.sum().tolist()])
    table = labelled[["slide_id", target]].set_axis(["slide", "target"], axis=1)
    if group in labelled.columns:
        table[group] = labelled[group]
    for split in range(1, num + 1):
        in_train = _draw(counts, quotas_C, seed, split)
        table[f"mccv{split}"] = np.where(groups.isin(in_train), TRAIN, VAL)
    return check_splits(table, where=f"column {target}", group=group, kind=kind)


def target_kind(targets: pd.Series, given: str | None = None, *, where: str) -> str:
    """Return CLASSES or VALUES: as given, else values where all are numbers and they are fractions or more than ten.

    SplitError if values are asked for and one is no number.

    >>> target_kind(pd.Series(["0", "1"]), where="x"), target_kind(pd.Series(["0.5", "1"]), where="x")
    ('classes', 'values')
    """
    if given not in (None, CLASSES, VALUES):
        raise SplitError(f"{where}: kind of target {given}; expected {CLASSES} or {VALUES}")
    if given == CLASSES:
        return CLASSES
    numbers = pd.to_numeric(targets, errors="coerce").astype(float)
    bad = ~np.isfinite(numbers)
    if given == VALUES and bad.any():
        raise SplitError(f"{where}: the target {targets[bad].iloc[0]!r} is no number; expected values to predict")
    several = (numbers % 1 != 0).any() or numbers.nunique() >= _FEWEST_VALUES
    return VALUES if given == VALUES or (not bad.any() and several) else CLASSES


def read_splits(path: Path, group: str = PATIENT, kind: str | None = None) -> pd.DataFrame:
    """Read and check a split file, all cells as text; SplitError says what is wrong and where."""
    try:
        frame = read_csv(path)
    except FileNotFoundError:
        raise SplitError(f"{path}: no such split file; make one with `hpcssl splits`") from None
    except ValueError as error:  # pandas' own and of the encoding, too
        raise SplitError(f"{path}: not a split file ({' '.join(str(error).split())})") from None
    return check_splits(frame, where=str(path), group=group, kind=kind)


def check_splits(frame: pd.DataFrame, *, where: str, group: str = PATIENT, kind: str | None = None) -> pd.DataFrame:
    """Check a split table and return it ordered by slide, its targets without blanks around them.

    Of values, each side needs two different ones.

    SplitError for a missing column (only `patient_id` may be), a column such as mccv01, a slide twice, a missing
    target, a cell that is neither train nor val, a class that a side of a split lacks, or a group on both sides of one.
    """
    columns = split_columns(frame)
    odd = [name for name in map(str, frame.columns) if re.fullmatch(r"mccv[\d.]+", name) and name not in columns]
    if odd:
        raise SplitError(f"{where}: column {odd[0]}; expected mccv1, mccv2 …, each once and without a leading zero")
    for column in ("slide", "target"):
        if column not in frame.columns:
            raise SplitError(f"{where}: no column {column}; expected slide, target, [patient_id], mccv1 …")
    if not columns or frame.empty:
        raise SplitError(f"{where}: no {'slides' if columns else 'columns mccv1, mccv2 …'} in it")
    twice = frame["slide"][frame["slide"].duplicated()]
    if len(twice):
        raise SplitError(
            f"{where}: slide {twice.iloc[0]} stands in it twice ({len(twice)} such rows); keep one row a slide"
        )
    if group != PATIENT and group not in frame.columns:
        raise SplitError(f"{where}: no column {group} to check; it has {', '.join(map(str, frame.columns))}")
    blank = frame["slide"][missing(frame["target"])]
    if len(blank):
        raise SplitError(f"{where}: slide {blank.iloc[0]} has no target ({len(blank)} such rows); leave such rows out")
    frame = frame.assign(target=frame["target"].str.strip())
    kind = target_kind(frame["target"], kind, where=where)
    classes = frame["target"].unique().tolist()
    if kind == CLASSES and len(classes) < 2:
        raise SplitError(f"{where}: every slide has the target {classes[0]}; expected at least two classes")
    groups = group_keys(frame, group, "slide") if group in frame.columns else None
    for column in columns:
        unknown = ~frame[column].isin([TRAIN, VAL])
        if unknown.any():
            row = frame[unknown].iloc[0]
            raise SplitError(
                f"{where}: {column} of slide {row['slide']} is {row[column]!r}; expected train or val"
                f" ({unknown.sum()} such cells)"
            )
        _check_sides(frame, column, where, kind, classes)
        if groups is not None:
            sides = frame.groupby(groups)[column].nunique()
            leaking = sides[sides > 1]
            if len(leaking):
                raise SplitError(
                    f"{where}: {leaking.index[0]} is on both sides of {column} ({len(leaking)} such groups);"
                    f" keep the slides of a group together"
                )
    return frame.sort_values("slide", ignore_index=True)


def with_slides(
    table: pd.DataFrame, frame: pd.DataFrame, *, where: str, target: str | None = None, group: str = PATIENT
) -> pd.DataFrame:
    """Return a split table with the groups of the slide table `frame`, where that has the column.

    SplitError for slides that `frame` lacks; for a slide of another group there; with `target`, its column there, for a
    slide of another target and for slides with a target that the splits lack.
    """
    unknown = table["slide"][~table["slide"].isin(frame["slide_id"])].tolist()
    if unknown:
        raise SplitError(
            f"{where}: the slide table lacks {listed(unknown)} ({len(unknown)} of {len(table)} slides);"
            " draw the splits again, or name the table that they are from"
        )
    rows = frame.set_index("slide_id").loc[table["slide"]].reset_index()
    if target is not None:
        if target not in frame.columns:
            raise SplitError(f"{where}: the slide table has no column {target}; it has {', '.join(frame.columns)}")
        lacking = sorted(set(frame["slide_id"][~missing(frame[target])]) - set(table["slide"]))
        if lacking:
            raise SplitError(
                f"{where}: the splits lack {listed(lacking)}, which have a {target} ({len(lacking)} slides);"
                " draw the splits again"
            )
        _refuse_other("target " + table["target"].str.strip(), "target " + rows[target].str.strip(), table, where)
    if group not in rows.columns:
        return table
    if group in table.columns:
        known = ~missing(table[group]) & ~missing(rows[group])
        here, there = group_keys(table[known], group, "slide"), group_keys(rows[known], group)
        _refuse_other(here, there, table[known], where)
    return table.assign(**{group: rows[group]})


def _refuse_other(here: pd.Series, there: pd.Series, table: pd.DataFrame, where: str) -> None:
    """Refuse splits that say something else of a slide than the slide table does."""
    other = here != there
    if other.any():
        slide, one, two = (column[other].iloc[0] for column in (table["slide"], here, there))
        raise SplitError(
            f"{where}: slide {slide} has {one} in the splits, {two} in the slide table"
            f" ({int(other.sum())} such slides); draw the splits again"
        )


def split_columns(frame: pd.DataFrame) -> list[str]:
    """Return mccv1 … mccvK, in the order of their numbers."""
    return [f"mccv{number}" for number in split_numbers(frame)]


def split_numbers(frame: pd.DataFrame) -> list[int]:
    """Return the k of every column mccvk, in order."""
    matches = (re.fullmatch(r"mccv([1-9][0-9]*)", str(name)) for name in frame.columns)
    return sorted(int(match[1]) for match in matches if match)


def without_missing(
    frame: pd.DataFrame,
    known: Sequence[str],
    *,
    where: str,
    allow_missing: bool,
    allow_extra: bool = True,
    kind: str | None = None,
) -> pd.DataFrame:
    """Return the rows whose slides have features.

    SplitError listing slides without features, unless `allow_missing`, or features without a row, unless `allow_extra`;
    and if a side of a split then lacks a class.
    """
    kind = target_kind(frame["target"], kind, where=where)
    present = frame["slide"].isin(set(known))
    lacking, extra = frame["slide"][~present].tolist(), sorted(set(known) - set(frame["slide"]))
    if lacking and not allow_missing:
        raise SplitError(
            f"{where}: slide{'s' * (len(lacking) > 1)} {listed(lacking)} without features"
            f" ({len(lacking)} of {len(frame)} slides); embed them, or leave them out with --allow-missing"
        )
    if extra and not allow_extra:
        raise SplitError(
            f"{where}: features of {listed(extra)} without a row in the splits ({len(extra)} of {len(known)} slides);"
            " add them, or leave them out with --allow-missing"
        )
    kept = frame[present].reset_index(drop=True)
    for column in split_columns(kept):
        _check_sides(kept, column, where, kind, frame["target"].unique().tolist())
    return kept


def listed(names: Sequence[str], most: int = 10) -> str:
    """Return the first names, and how many more there are.

    >>> listed(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _check_sides(frame: pd.DataFrame, column: str, where: str, kind: str, classes: Sequence[str]) -> None:
    """Refuse a split of which a side lacks a class, or has fewer than two values."""
    for side in (TRAIN, VAL):
        targets = frame["target"][frame[column] == side]
        if kind == VALUES and targets.astype(float).nunique() < 2:
            raise SplitError(f"{where}: {column} has fewer than two different targets in {side}")
        lacking = sorted(set(classes) - set(targets)) if kind == CLASSES else []
        if lacking:
            raise SplitError(
                f"{where}: {column} has no slide of class {lacking[0]} in {side}; every class must be on both sides"
            )


def _fifths(values: pd.Series, groups: pd.Series, target: str) -> pd.Series:
    """Return for every slide in which part of the groups it is, by the groups' mean values."""
    means = values.groupby(groups).mean().sort_values(kind="stable")
    parts = min(_BINS, len(means) // 2)
    if parts < 1:
        raise SplitError(f"column {target} has values in one group only; two groups are needed for train and val")
    place = pd.Series(np.arange(len(means)) * parts // len(means), index=means.index)
    return groups.map(place).rename(target)


def _check_possible(counts: pd.DataFrame, target: str) -> None:
    """Refuse a target with fewer than two classes or a class that one group holds alone."""
    if counts.shape[1] < 2:
        values = f"the one value {counts.columns[0]}" if counts.shape[1] else "no values"
        raise SplitError(f"column {target} has {values}; expected at least two classes to tell apart")
    for name in counts.columns:
        if (counts[name] > 0).sum() < 2:
            only = counts.index[counts[name] > 0][0]
            raise SplitError(
                f"class {name} of column {target} has slides in one group only ({only}); a class needs two groups"
                " to be in both train and val: leave the class out or add slides"
            )


def _draw(counts: pd.DataFrame, quotas_C: NDArray[np.int64], seed: int, split: int) -> list[str]:
    """Return the groups of one split's train side.

    Groups of one class are chosen exactly. Those of several classes are drawn first; that draw is repeated and the
    nearest of all is taken.
    """
    names, size_GC = counts.index.to_numpy(), counts.to_numpy()
    mixed = (size_GC > 0).sum(axis=1) > 1
    best_score: tuple[float, float] = (np.inf, np.inf)  # classes on one side only, slides off the quotas
    for attempt in range(_TRIES if mixed.any() else 1):
        keys = [key_of(seed, f"mccv/split={split}/try={attempt}/group={name}") for name in names]
        chosen_G = _attempt(size_GC, mixed, quotas_C, np.argsort(np.array(keys, dtype=np.uint64), kind="stable"))
        train_C = size_GC[chosen_G].sum(axis=0)
        one_sided_C = (train_C == 0) | (train_C == size_GC.sum(axis=0))
        score = (int(one_sided_C.sum()), int(np.abs(train_C - quotas_C).sum()))
        if score < best_score:
            best_score, best_G, best_one_sided_C = score, chosen_G, one_sided_C
        if score == (0, 0):
            break
    if best_score[0]:
        raise SplitError(
            f"split {split}: no draw of whole groups put class {counts.columns[best_one_sided_C][0]} in both train and"
            " val; its slides are in too few groups"
        )
    return list(names[best_G])


def _attempt(
    size_GC: NDArray[np.int64], mixed: NDArray[np.bool_], quotas_C: NDArray[np.int64], order: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Choose groups in a given order: mixed ones while they bring their own share nearer, then each class exactly."""
    chosen_G = np.zeros(len(size_GC), dtype=bool)
    total_C = size_GC.sum(axis=0)
    share_C = size_GC[mixed].sum(axis=0) * quotas_C / total_C
    for g in order[mixed[order]]:
        lacking_C = share_C - size_GC[chosen_G].sum(axis=0)
        if np.abs(lacking_C - size_GC[g]).sum() < np.abs(lacking_C).sum():
            chosen_G[g] = True
    from_mixed_C = size_GC[chosen_G].sum(axis=0)
    for c in range(size_GC.shape[1]):
        pure = [g for g in order if size_GC[g, c] and not mixed[g]]
        in_val = int(size_GC[mixed & ~chosen_G, c].sum())
        sizes = [int(size_GC[g, c]) for g in pure]
        lowest, highest = int(from_mixed_C[c] == 0), sum(sizes) - int(in_val == 0)
        chosen_G[[pure[i] for i in _subset(sizes, int(quotas_C[c] - from_mixed_C[c]), lowest, highest)]] = True
    return chosen_G


def _subset(sizes: Sequence[int], quota: int, lowest: int, highest: int) -> list[int]:
    """Return the first indices, in order, whose sizes sum as near to `quota` as possible, within lowest … highest.

    Nothing if there is no such sum.

    >>> _subset([5, 2, 2, 3], 4, 1, 11), _subset([5, 2, 2, 3], 6, 1, 11)
    ([1, 2], [0])
    """
    reachable = [1]  # of the last i sizes: bit s is set if some of them sum to s
    for size in reversed(sizes):
        reachable.append(reachable[-1] | reachable[-1] << size)
    reachable.reverse()
    sums = [s for s in range(max(lowest, 0), highest + 1) if reachable[0] >> s & 1]
    if not sums:
        return []
    rest = min(sums, key=lambda s: (abs(s - quota), s))
    chosen = []
    for i, size in enumerate(sizes):
        if rest >= size and reachable[i + 1] >> (rest - size) & 1:
            chosen.append(i)
            rest -= size
    return chosen
