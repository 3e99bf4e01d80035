"""What a schedule holds; a pseudo-epoch is a pure function of (spec, slide table, hold-out list, its number).

1. `groups`: each pass deals the slides of every organ, in keyed random order, to `num_groups` pseudo-epochs.
2. `quotas`: organ quotas within the group, then slides within the organ, by `share_out`.
3. `draws`: the j-th draw of a slide over the whole schedule is its keyed permutation number j // n at j mod n.
4. `chunks`: position i holds the draw, counted slide after slide, to which a keyed permutation sends i.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hpcssl.core.arrays import npy_header
from hpcssl.core.config import nearest
from hpcssl.core.errors import ScheduleError
from hpcssl.core.rng import below, key_of, permute, uniforms
from hpcssl.schedule.balance import power_weight, share_out, share_out_to_slides, slide_weights
from hpcssl.schedule.eligible import HoldOut, eligible_slides
from hpcssl.schedule.file import pseudo_epoch_file
from hpcssl.schedule.spec import ScheduleSpec

_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Quotas:
    """What a pseudo-epoch draws."""

    slides: NDArray[np.int32]  # (group,), the slides of its group, in the table's order
    draws: NDArray[np.int32]  # (group,), draws of each, at least 1
    wanted: dict[str, int]  # positions of every organ by its weight alone
    achieved: dict[str, int]  # positions of every organ, none above `max_repeats` times its tiles


class Builder:
    """The four guarantees, for one spec, one slide table (slide_id, organ, num_tiles) and one hold-out list.

    ScheduleError where filters, weights or the hold-out list do not fit the table.

    Attributes
    ----------
    num_tiles, first_tiles : (num_slides,) int64
    eligible : (num_slides,) bool, which slides may be drawn
    members : the eligible slides of every organ, organs in the order of their names
    dtype : of the tile numbers
    file_header : first bytes of every pseudo-epoch's file
    """

    def __init__(self, spec: ScheduleSpec, slides: pd.DataFrame, hold_out: HoldOut | None = None):
        self.spec, self.slides, self.hold_out = spec, slides, hold_out or HoldOut()
        self.num_tiles = slides["num_tiles"].to_numpy(np.int64)
        self.first_tiles = np.cumsum(self.num_tiles) - self.num_tiles
        self._slide_weights = slide_weights(self.num_tiles, spec.slide_power)
        self.dtype = np.dtype("<u4" if int(self.num_tiles.sum()) < 2**32 else "<u8")
        self.file_header = npy_header(self.dtype.str, spec.positions_per_pseudo_epoch)
        self.eligible = eligible_slides(spec, slides, self.hold_out)
        organs = slides["organ"].to_numpy(object)
        names, organ = np.unique(organs[self.eligible].astype(str), return_inverse=True)
        who = np.flatnonzero(self.eligible)
        self.members = {str(name): who[organ == number] for number, name in enumerate(names)}
        for name in spec.organ_weights:
            if name not in self.members:
                hint = nearest(name, list(self.members))
                raise ScheduleError(f"organ_weights.{name}: no slide of that organ enters; {hint}")

    def groups(self, pass_number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return of every slide its group in a pass (-1 where it never enters), and its place in its organ's order."""
        spec = self.spec
        group, order = np.full(len(self.slides), -1), np.zeros(len(self.slides), np.int64)
        for organ, members in self.members.items():
            size = len(members)
            key = key_of(spec.seed, f"groups/{organ}")
            order[members] = permute(np.arange(size), size, key, number=pass_number)
            # organs with fewer slides than groups begin anywhere, so that they do not crowd the first group
            first = below(uniforms(spec.seed, f"first group/{organ}", pass_number)[..., 0], spec.num_groups)
            group[members] = (order[members] + first) % spec.num_groups
        return group, order

    def check(self) -> None:
        """Raise ScheduleError, naming the organ, where the spec cannot be met."""
        assert len(self.quotas) == self.spec.num_pseudo_epochs

    @cached_property
    def quotas(self) -> list[Quotas]:
        """The quotas of every pseudo-epoch; ScheduleError, naming the organ, where the spec cannot be met."""
        quotas = []
        for number in range(self.spec.num_pseudo_epochs):
            pass_number, group_number = divmod(number, self.spec.num_groups)
            if group_number == 0:
                group, order = self.groups(pass_number)
            quotas.append(self._quotas_of(number, group == group_number, order))
        return quotas

    def drawn_before(self, number: int) -> NDArray[np.int64]:
        """Return how often every slide was drawn in the pseudo-epochs before `number`, (num_slides,)."""
        drawn = np.zeros(len(self.slides), np.int64)
        for quotas in self.quotas[:number]:
            drawn[quotas.slides] += quotas.draws
        return drawn

    def draws(self, number: int) -> NDArray[np.unsignedinteger]:
        """Return the tile numbers of a pseudo-epoch's draws, slide after slide, (positions_per_pseudo_epoch,)."""
        tiles = np.empty(self.spec.positions_per_pseudo_epoch, self.dtype)
        for _ in self._fill(tiles, number):
            pass
        return tiles

    def chunks(self, number: int) -> Iterator[NDArray[np.unsignedinteger]]:
        """Yield the tile numbers of a pseudo-epoch in the order of its positions, in pieces of up to 2^20.

        A piece is overwritten by the next one. The first ones, while all draws are computed, are empty: whoever takes
        them can stop there, too. Holds one pseudo-epoch's tile numbers in memory.
        """
        from hpcssl.schedule import order_kernels as kernels

        tiles = np.empty(self.spec.positions_per_pseudo_epoch, self.dtype)
        room = np.empty(min(_CHUNK, len(tiles)), self.dtype)
        for _ in self._fill(tiles, number):
            yield room[:0]
        tables = kernels.tables_for(len(tiles))
        kernels.fill_tables(tables, len(tiles), np.uint64(key_of(self.spec.seed, "order")), 0, number)
        for start in range(0, len(tiles), len(room)):
            chunk = room[: len(tiles) - start]
            kernels.take_in_order(tiles, start, tables, chunk)
            yield chunk

    def _fill(self, tiles: NDArray[np.unsignedinteger], number: int) -> Iterator[None]:
        """Fill `tiles` with a pseudo-epoch's draws, yielding after every piece of about 2^20."""
        from hpcssl.schedule import order_kernels as kernels

        quotas = self.quotas[number]
        who, ends = quotas.slides.astype(np.int64), np.cumsum(quotas.draws, dtype=np.int64)
        n, before, draws = self.num_tiles[who], self.drawn_before(number)[who], quotas.draws.astype(np.int64)
        tables = kernels.tables_for(int(n.max()))
        key = np.uint64(key_of(self.spec.seed, "tile order"))
        for piece in np.split(np.arange(len(who)), np.flatnonzero(np.diff(ends // _CHUNK)) + 1):
            slides = slice(piece[0], piece[-1] + 1)
            begin, end = ends[slides][0] - draws[slides][0], ends[slides][-1]
            of_slides = (values[slides] for values in (who, n, self.first_tiles[who], before, draws))
            kernels.draw_tiles(*of_slides, key, tables, tiles[begin:end])
            yield

    def record(self, number: int) -> dict[str, Any]:
        """Return what `schedule.json` says of a pseudo-epoch, but for its size and checksum."""
        quotas = self.quotas[number]
        organs = {o: {"wanted": quotas.wanted[o], "achieved": quotas.achieved[o]} for o in quotas.achieved}
        file, used = pseudo_epoch_file(number), len(quotas.slides)
        return {"number": number, "file": file, "slides_used": used, "organs": organs}

    def _quotas_of(self, number: int, in_group: NDArray[np.bool_], order: NDArray[np.int64]) -> Quotas:
        spec, total = self.spec, self.spec.positions_per_pseudo_epoch
        chosen = {organ: m[in_group[m]] for organ, m in self.members.items() if in_group[m].any()}
        tiles = {organ: int(self.num_tiles[m].sum()) for organ, m in chosen.items()}
        size = tiles if spec.organ_size == "tiles" else {organ: len(m) for organ, m in chosen.items()}
        weights = [power_weight(size[o], spec.organ_power, spec.organ_weights.get(o, 1.0)) for o in chosen]
        self._check_room(number, tiles)
        none = [0] * len(chosen)
        wanted = share_out(total, weights, none, [total] * len(chosen))
        achieved = share_out(total, weights, none, [spec.max_repeats * tiles[organ] for organ in chosen])
        draws = np.zeros(len(self.slides), np.int32)
        for (organ, members), quota in zip(chosen.items(), achieved, strict=True):
            if quota < len(members):
                raise ScheduleError(
                    f"pseudo-epoch {number}: the {len(members)} slides of {organ} in its group need a position each,"
                    f" but its quota is {quota} of {total}; raise positions_per_pseudo_epoch, num_groups or"
                    f" organ_weights.{organ}, or exclude the organ"
                )
            dealt = members[np.argsort(order[members])]  # so that ties of the remainder fall on other slides each pass
            most = np.minimum(spec.max_repeats * self.num_tiles[dealt], quota)
            draws[dealt] = share_out_to_slides(quota, self._slide_weights[dealt], most)
        slides = np.flatnonzero(draws).astype(np.int32)
        by_weight, capped = dict(zip(chosen, wanted)), dict(zip(chosen, achieved))
        return Quotas(slides=slides, draws=draws[slides], wanted=by_weight, achieved=capped)

    def _check_room(self, number: int, tiles: dict[str, int]) -> None:
        spec, total = self.spec, self.spec.positions_per_pseudo_epoch
        if not tiles:
            raise ScheduleError(
                f"pseudo-epoch {number}: no slide falls into its group; {int(self.eligible.sum())} slides are too few"
                f" for num_groups = {spec.num_groups}; lower num_groups"
            )
        if spec.max_repeats * sum(tiles.values()) < total:
            most = max(tiles, key=lambda organ: tiles[organ])
            raise ScheduleError(
                f"pseudo-epoch {number}: its {sum(tiles.values())} tiles, {spec.max_repeats} times each (max_repeats),"
                f" fill fewer than {total} positions; even {most}, its largest organ, has only {tiles[most]} tiles;"
                " raise max_repeats or lower positions_per_pseudo_epoch"
            )
