"""Writing a schedule: pseudo-epochs one by one, in any order, on any number of nodes; `schedule.json` comes last.

A folder without `schedule.json` is unfinished, and nothing opens it. Each pseudo-epoch is written under another name,
synced and renamed, then its checksum is put beside it; so a build that was killed goes on with what is missing.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Collection
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd

from hpcssl.core.atomic import atomic_file, digest_bytes, digest_file, remove_temporary, sync, write_atomic
from hpcssl.core.claim import check_same, claim
from hpcssl.core.config import to_mapping
from hpcssl.core.errors import ScheduleError
from hpcssl.schedule.builder import Builder
from hpcssl.schedule.eligible import HoldOut
from hpcssl.schedule.file import FORMAT, HEADER, HOLD_OUT, SLIDES, UNFINISHED, Schedule, header_text, pseudo_epoch_file
from hpcssl.schedule.spec import ScheduleSpec
from hpcssl.slides.slide_table import digest_slides


class _Stopped(Exception):
    """Another thread has failed."""


def build_schedule(
    spec: ScheduleSpec,
    slides: pd.DataFrame,
    out: Path,
    *,
    only: Collection[int] | None = None,
    jobs: int = 1,
    on_progress: Callable[[int], None] = lambda n: None,
) -> list[int]:
    """Write the pseudo-epochs of a schedule that `out` lacks, and `schedule.json` once none is missing.

    The same spec, slide table and hold-out list give the same bytes on any machine, with any `only` and `jobs`.

    Return the pseudo-epochs that are still missing: none, if the schedule is finished. ScheduleError where `out` holds
    another schedule or other files, or names the organ for which these slides cannot meet the spec.

    Parameters
    ----------
    only : pseudo-epochs to write; None for all. Parts may be written at the same time on several nodes
    jobs : threads; each holds the tile numbers of one pseudo-epoch in memory (260 MB of 65 million positions)
    on_progress : called with the number of positions done since the last call, from any thread
    """
    builder = Builder(spec, slides, HoldOut.read(Path(spec.hold_out)) if spec.hold_out else None)
    records = [builder.record(number) for number in range(spec.num_pseudo_epochs)]
    numbers = range(spec.num_pseudo_epochs) if only is None else sorted(set(only))
    if any(not 0 <= number < spec.num_pseudo_epochs for number in numbers):
        raise ScheduleError(
            f"pseudo-epochs {min(numbers)} to {max(numbers)}: the spec has only 0 to {spec.num_pseudo_epochs - 1}"
        )
    identity = schedule_identity(builder)
    if not _claim(out, identity):
        _clear(out)
        on_progress(len(numbers) * spec.positions_per_pseudo_epoch)
        return []
    num_bytes = len(builder.file_header) + spec.positions_per_pseudo_epoch * builder.dtype.itemsize
    records = [record | {"bytes": num_bytes} for record in records]
    missing = [number for number in numbers if not _is_whole(out, records[number])]
    on_progress((len(numbers) - len(missing)) * spec.positions_per_pseudo_epoch)
    left: list[int] = []
    try:
        _write_all(builder, out, missing, jobs, on_progress)
        left = [record["number"] for record in records if not _is_whole(out, record)]
        if not left:
            _finish(builder, out, identity, records)
    except FileNotFoundError:  # another node has finished it meanwhile, and cleared what it does not need
        if not (out / HEADER).exists():
            raise
    if (out / HEADER).exists():
        _clear(out)
        return []
    return left


def schedule_identity(builder: Builder) -> dict[str, Any]:
    """Return what `schedule.json` says before its pseudo-epochs: all that the content depends on."""
    spec = to_mapping(builder.spec)
    for name in ("organ_weights", "include", "exclude"):  # the order in which they were written down changes nothing
        spec[name] = dict(sorted(spec[name].items()))
    if not spec["mpp_weights"]:  # so that schedules of tiles stay what they were before there were stores of slides
        del spec["mpp_weights"]
    if spec["hold_out"]:
        spec["hold_out"] = HOLD_OUT
    who = builder.slides["slide_id"][builder.eligible]
    eligible: dict[str, Any] = {"slides": len(who), "tiles": int(builder.num_tiles[builder.eligible].sum())}
    eligible["sha256"] = digest_bytes("".join(f"{name}\n" for name in who).encode())
    hold_out = builder.hold_out.to_csv().encode() if spec["hold_out"] else b""
    return {
        "format": FORMAT,
        "spec": spec,
        "slides_digest": digest_slides(builder.slides),
        "num_slides": len(builder.slides),
        "num_tiles": int(builder.num_tiles.sum()),
        "eligible": eligible,
        "hold_out_sha256": digest_bytes(hold_out) if hold_out else "",
        "hold_out_bytes": len(hold_out),
        "dtype": builder.dtype.name,
    }


def _claim(out: Path, identity: dict[str, Any]) -> bool:
    """Make `out` the folder of this schedule; False if it is finished already."""
    words: Any = {"now": "where now {} is asked for", "advice": "remove it or choose another --out"}
    words |= {"error": ScheduleError, "show": repr}
    if (out / HEADER).exists():
        header = Schedule.open(out).header
        stored = {key: header.get(key) for key in identity}
        check_same(stored, identity, made=f"{out} is a schedule with", **words)
        return False
    out.mkdir(parents=True, exist_ok=True)
    others = sorted(path.name for path in out.iterdir() if not path.name.startswith(f".{UNFINISHED}."))
    if others and not (out / UNFINISHED).exists():  # after the list: another node may have started in between
        raise ScheduleError(f"{out}: holds {others[0]}, no schedule; choose another --out")
    made, damaged = f"{out} holds parts of a schedule with", f"remove {out} and build anew"
    claim(out / UNFINISHED, identity, made=made, damaged=damaged, **words)
    return True


def _is_whole(out: Path, record: dict[str, Any]) -> bool:
    file = out / record["file"]
    return _checksum(out, file.name).is_file() and file.is_file() and file.stat().st_size == record["bytes"]


def _checksum(out: Path, file: str) -> Path:
    """Return the file that holds a pseudo-epoch's checksum, in the format of sha256sum, until `schedule.json` does."""
    return (out / file).with_suffix(".sha256")


def _write_all(builder: Builder, out: Path, numbers: list[int], jobs: int, on_progress: Callable[[int], None]) -> None:
    """Write pseudo-epochs in `jobs` threads, and in one more that only waits for the disk."""
    computing, stop = threading.Semaphore(0), threading.Event()

    def write(number: int) -> None:
        path, digest = out / pseudo_epoch_file(number), hashlib.sha256()
        # `computing` is given back before the file is synced: another thread computes meanwhile
        with atomic_file(path) as temporary, computing, temporary.open("wb") as stream:
            _put(stream, builder.file_header, digest)
            for chunk in builder.chunks(number):
                if stop.is_set():
                    raise _Stopped
                _put(stream, chunk.data.cast("B"), digest)
                on_progress(len(chunk))
        write_atomic(_checksum(out, path.name), f"{digest.hexdigest()}  {path.name}\n")

    with ThreadPoolExecutor(jobs + 1) as pool:
        try:
            tasks = [pool.submit(write, number) for number in numbers]
            computing.release(jobs)  # not before: Ctrl-C then finds this thread waiting, not starting others
            done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
            failed = next((task for task in tasks if task in done and task.exception()), None)
        finally:
            stop.set()
            computing.release(jobs)
            pool.shutdown(cancel_futures=True)
    if failed:
        failed.result()


def _put(stream: BinaryIO, data: bytes | memoryview, digest: Any) -> None:
    digest.update(data)
    stream.write(data)


def _finish(builder: Builder, out: Path, identity: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Write what belongs to the whole, `schedule.json` last; then remove what only an unfinished build needs."""
    for record in records:
        text = _checksum(out, record["file"]).read_text(encoding="utf-8")
        if not re.fullmatch(rf"[0-9a-f]{{64}}  {re.escape(record['file'])}\n", text):
            raise ScheduleError(f"{_checksum(out, record['file'])}: damaged; remove it and build again")
        record["sha256"] = text[:64]
    slides = builder.slides
    table = slides[["slide_id", "organ", "num_tiles"]].assign(patient_id=slides.get("patient_id", ""))
    table = table.assign(first_tile=builder.first_tiles, eligible=builder.eligible)
    filtered = [column for column in [*builder.spec.include, *builder.spec.exclude] if column not in table]
    with atomic_file(out / SLIDES) as temporary:  # what reading and verifying need of the slides
        table.assign(**{column: slides[column] for column in filtered}).to_parquet(temporary, index=False)
    if identity["spec"]["hold_out"]:
        write_atomic(out / HOLD_OUT, builder.hold_out.to_csv())
    table_file = {"slides_file_sha256": digest_file(out / SLIDES), "slides_file_bytes": (out / SLIDES).stat().st_size}
    write_atomic(out / HEADER, header_text(identity | table_file | {"pseudo_epochs": records}))
    _clear(out)


def _clear(out: Path) -> None:
    """Remove what only an unfinished build needs."""
    for path in (out / UNFINISHED, *out.glob("*.sha256")):
        path.unlink(missing_ok=True)
    remove_temporary(out)
    sync(out)
