"""The verb `export`: an encoder's weights for timm, and a model card beside them."""

from __future__ import annotations

from pathlib import Path

from hpcssl.core.atomic import write_atomic
from hpcssl.core.errors import RunError, UserError
from hpcssl.embed.exported import model_card, write_weights
from hpcssl.embed.sources import Source
from hpcssl.runs.run_folder import read_config
from hpcssl.schedule.file import Schedule
from hpcssl.schedule.inspect import organ_shares


def export(run_and_step: str, out: Path, *, student: bool = False) -> Path:
    """Write an encoder of `RUN[@STEP]` into `out`, and its model card beside it; returns the card.

    The folder of `out` is made. RunError if the name does not end in .safetensors, there is no such checkpoint, or it
    has no student.
    """
    if out.suffix != ".safetensors":
        raise RunError(f"--out {out}: expected a name that ends in .safetensors")
    source = Source.parse(run_and_step)
    out.parent.mkdir(parents=True, exist_ok=True)
    state, objective = write_weights(source, out, student=student)
    data, card = read_config(source.run)["data"], out.with_suffix(".md")
    organs = _organs(Path(data["schedule"]), data["schedule_digest"])
    write_atomic(card, model_card(source, out, state, objective=objective, organs=organs))
    return card


def _organs(schedule: Path, digest: str) -> str:
    """Return a table of the organs and their shares of the schedule, if it still lies where the run found it."""
    try:
        same = Schedule.open(schedule).digest == digest
        shares = organ_shares(schedule) if same else None
    except (UserError, OSError):
        shares = None
    if shares is None:
        return "The run's schedule was not at hand when this card was written."
    shares = shares.sort_values("scheduled_share", ascending=False)
    rows = [
        f"| {row.organ} | {row.num_tiles:,} | {row.natural_share:.2%} | {row.scheduled_share:.2%} |"
        for row in shares.itertuples()
    ]
    return "\n".join(["| organ | tiles | share of tiles | share of positions |", "|---|---|---|---|", *rows])
