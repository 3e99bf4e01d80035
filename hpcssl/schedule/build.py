"""Building a schedule; a pseudo-epoch is a pure function of (spec, slide table, its number).

1. `groups`: each pass deals the slides of every organ, in keyed random order, to `num_groups` pseudo-epochs.
2. `quotas`: organ quotas within the group, then slides within the organ, by `share_out`.
3. `draw_tiles`: the j-th draw of a slide over the whole schedule is its keyed permutation number j // n at j mod n.
4. `chunks`: draw i, slide after slide, goes to the place that a keyed permutation of the positions gives it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hpcssl.core.atomic import atomic_dir, digest_file
from hpcssl.core.config import to_mapping
from hpcssl.core.errors import ScheduleError
from hpcssl.core.rng import below, key_of, permute, uniforms
from hpcssl.schedule.balance import power_weight, share_out, share_out_by_tiles
from hpcssl.schedule.spec import ScheduleSpec
from hpcssl.tiles.slides import digest_slides

FORMAT = 1
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Quotas:
    """What a pseudo-epoch draws.

    Attributes
    ----------
    draws : (num_slides,) draws of every slide; 0 outside the pseudo-epoch's group
    wanted : positions of every organ by its weight alone
    achieved : positions of every organ within the bounds (one draw a slide; `max_repeats` a tile)
    """

    draws: NDArray[np.int64]
    wanted: dict[str, int]
    achieved: dict[str, int]


class Builder:
    """The four guarantees, for one spec and one slide table (slide_id, organ, num_tiles)."""

    def __init__(self, spec: ScheduleSpec, slides: pd.DataFrame):
        self.spec = spec
        self.slides = slides
        self.num_tiles = slides["num_tiles"].to_numpy(np.int64)
        self.first_tiles = np.cumsum(self.num_tiles) - self.num_tiles
        organs = slides["organ"].to_numpy(object)
        self.members = {organ: np.flatnonzero(organs == organ) for organ in sorted(set(organs))}

    def groups(self, pass_number: int) -> NDArray[np.int64]:
        """Return the group (0 to num_groups - 1) of every slide in a pass, stratified by organ."""
        group = np.empty(len(self.slides), np.int64)
        for organ, members in self.members.items():
            size = len(members)
            order = permute(np.arange(size), size, self._key(f"groups/{organ}", pass_number))
            # organs with fewer slides than groups begin anywhere, so that they do not crowd the first group
            first = below(uniforms(self.spec.seed, f"first group/{organ}", pass_number)[..., 0], self.spec.num_groups)
            group[members] = (order + first) % self.spec.num_groups
        return group

    def quotas(self, number: int) -> Quotas:
        """Return the draws of pseudo-epoch `number`; ScheduleError where the spec cannot be met."""
        spec = self.spec
        pass_number, group_number = divmod(number, spec.num_groups)
        in_group = self.groups(pass_number) == group_number
        chosen = {organ: m[in_group[m]] for organ, m in self.members.items() if in_group[m].any()}
        tiles = {organ: int(self.num_tiles[m].sum()) for organ, m in chosen.items()}
        self._check_bounds(number, {organ: len(m) for organ, m in chosen.items()}, tiles)
        total = spec.positions_per_pseudo_epoch
        weights = [power_weight(tiles[organ], spec.organ_power) for organ in chosen]
        wanted = share_out(total, weights, [0] * len(chosen), [total] * len(chosen))
        achieved = share_out(
            total, weights, [len(m) for m in chosen.values()], [spec.max_repeats * tiles[organ] for organ in chosen]
        )
        draws = np.zeros(len(self.slides), np.int64)
        for (_organ, members), quota in zip(chosen.items(), achieved, strict=True):
            n = self.num_tiles[members]
            draws[members] = share_out_by_tiles(quota, n, np.ones_like(n), spec.max_repeats * n)
        return Quotas(draws=draws, wanted=dict(zip(chosen, wanted)), achieved=dict(zip(chosen, achieved)))

    @cached_property
    def all_quotas(self) -> list[Quotas]:
        """The quotas of every pseudo-epoch."""
        return [self.quotas(number) for number in range(self.spec.num_pseudo_epochs)]

    def draws_before(self, number: int) -> NDArray[np.int64]:
        """Return how often every slide was drawn in the pseudo-epochs before `number`, (num_slides,)."""
        return sum((q.draws for q in self.all_quotas[:number]), np.zeros(len(self.slides), np.int64))

    def draw_tiles(self, slide: NDArray[np.int64], draw: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tile number of the `draw`-th draw (counted over the whole schedule) of each slide."""
        n = self.num_tiles[slide]
        words = uniforms(self.spec.seed, "tile order", slide, view=draw // n).astype(np.uint64)
        key = words[..., 0] | (words[..., 1] << np.uint64(32))
        return self.first_tiles[slide] + permute(draw % n, n, key)

    def chunks(self, number: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield (place in the pseudo-epoch, tile number) of its draws, in bounded pieces."""
        draws = self.all_quotas[number].draws
        before = self.draws_before(number)
        ends = np.cumsum(draws)
        total = int(ends[-1])
        key = self._key("order", number)
        for start in range(0, total, _CHUNK):
            index = np.arange(start, min(start + _CHUNK, total))
            slide = np.searchsorted(ends, index, side="right")
            draw = before[slide] + index - (ends[slide] - draws[slide])
            yield permute(index, total, key), self.draw_tiles(slide, draw)

    def record(self, number: int) -> dict[str, Any]:
        """Return what `schedule.json` says of a pseudo-epoch, but for its checksum."""
        quotas = self.all_quotas[number]
        return {
            "number": number,
            "file": f"pseudo_epoch_{number:04d}.npy",
            "slides_used": int((quotas.draws > 0).sum()),
            "organs": {
                organ: {"wanted": quotas.wanted[organ], "achieved": quotas.achieved[organ]} for organ in quotas.achieved
            },
        }

    def _key(self, purpose: str, number: int) -> int:
        return key_of(self.spec.seed, f"{purpose}/{number}")

    def _check_bounds(self, number: int, slides: dict[str, int], tiles: dict[str, int]) -> None:
        spec, total = self.spec, self.spec.positions_per_pseudo_epoch
        if not slides:
            raise ScheduleError(
                f"pseudo-epoch {number}: no slide falls into its group; {len(self.slides)} slides are too few for"
                f" num_groups = {spec.num_groups}; lower num_groups"
            )
        if sum(slides.values()) > total:
            most = max(slides, key=lambda organ: slides[organ])
            raise ScheduleError(
                f"pseudo-epoch {number}: {total} positions cannot hold one tile of each of its"
                f" {sum(slides.values())} slides ({slides[most]} of them {most});"
                " raise positions_per_pseudo_epoch or num_groups"
            )
        if spec.max_repeats * sum(tiles.values()) < total:
            most = max(tiles, key=lambda organ: tiles[organ])
            raise ScheduleError(
                f"pseudo-epoch {number}: its {sum(tiles.values())} tiles, {spec.max_repeats} times each (max_repeats),"
                f" fill fewer than {total} positions; even {most}, its largest organ, has only {tiles[most]} tiles;"
                " raise max_repeats or lower positions_per_pseudo_epoch"
            )


def build_schedule(
    spec: ScheduleSpec, slides: pd.DataFrame, out: Path, *, on_progress: Callable[[int], None] = lambda n: None
) -> None:
    """Write a schedule folder; the same spec and slide table give the same bytes on any machine.

    Raises
    ------
    ScheduleError
        If `out` exists or the spec cannot be met by these slides (naming the organ).
    """
    if out.exists():
        raise ScheduleError(f"{out}: exists already; remove it or choose another --out")
    builder = Builder(spec, slides)
    dtype = np.uint32 if int(builder.num_tiles.sum()) < 2**32 else np.uint64
    with atomic_dir(out) as partial:
        records = [
            _write_pseudo_epoch(builder, number, partial, dtype, on_progress)
            for number in range(len(builder.all_quotas))
        ]
        patient = slides["patient_id"] if "patient_id" in slides else pd.Series([""] * len(slides))
        table = slides[["slide_id", "organ", "num_tiles"]].assign(patient_id=patient, first_tile=builder.first_tiles)
        table.to_parquet(partial / "slides.parquet", index=False)
        header = {
            "format": FORMAT,
            "spec": to_mapping(spec),
            "slides_digest": digest_slides(slides),
            "num_slides": len(slides),
            "num_tiles": int(builder.num_tiles.sum()),
            "slides_file_sha256": digest_file(partial / "slides.parquet"),
            "pseudo_epochs": records,
        }
        (partial / "schedule.json").write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")


def _write_pseudo_epoch(
    builder: Builder, number: int, folder: Path, dtype: type[np.unsignedinteger], on_progress: Callable[[int], None]
) -> dict[str, Any]:
    record = builder.record(number)
    name, total = record["file"], builder.spec.positions_per_pseudo_epoch
    tiles = np.lib.format.open_memmap(folder / name, mode="w+", dtype=dtype, shape=(total,))
    with (folder / name).open("r+b") as stream:  # a full disk is an error here; in a mapping it would be a bus error
        os.posix_fallocate(stream.fileno(), 0, os.fstat(stream.fileno()).st_size)
    for place, tile in builder.chunks(number):
        tiles[place] = tile
        on_progress(len(place))
    tiles.flush()
    return {**record, "sha256": digest_file(folder / name)}
