"""`hpcssl demo`: from whole slides or tiles to a benchmark report, on this machine's CPU, by the code of a cluster run.

Every stage leaves its result whole or not at all, and one that is there is not computed again; so a demo that was
stopped goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcssl.cli.demo_inputs import check_label, cut_tiles, demo_spec

if TYPE_CHECKING:
    from hpcssl.schedule.file import Schedule
    from hpcssl.stores.store import Store
    from hpcssl.train.pretrain_config import PretrainConfig, Timeline

SUMMARY = "everything, end to end, on this machine's CPU: tiles to benchmark report in minutes"
EXAMPLE = "hpcssl demo --tiles TILES --out demo-out"
RECIPE, SPEC, PRESET = "dino-demo", "demo", "mccv-demo"
_PROCESSES = 2
_STAGES = 7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--out", type=Path, default=Path("demo-out"), help="folder for everything; continued where it was (%(default)s)"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--slides", type=Path, metavar="TABLE", help="slide table of whole slides: slide_id, organ, path, mpp, label"
    )
    source.add_argument(
        "--tiles",
        type=Path,
        help="JPEG tiles as <organ>/<slide_id>/<name>.jpg, with or without slides.csv (default: draw some)",
    )
    parser.add_argument(
        "--label", metavar="COLUMN", help="column of the slide table to predict (default: label, if there)"
    )
    parser.add_argument(
        "--assume-mpp", type=float, metavar="MPP", help="of slides whose MPP neither the table nor the file says"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run the stages that are not done."""
    begun = time.monotonic()
    demo = Demo(args.out, args.tiles, args.slides, args.label, args.seed, args.assume_mpp)
    demo.claim()
    print(
        "about 5 minutes on 2 cores; stop it whenever you like: the same command goes on where it was", file=sys.stderr
    )
    demo.prepare_tiles()
    demo.build_store()
    demo.write_splits()
    demo.build_schedule()
    demo.pretrain()
    demo.embed()
    demo.benchmark()
    demo.report()
    print(f"{args.out / 'report.html'} (this took {time.monotonic() - begun:.0f} s)")
    return 0


@dataclass
class Demo:
    """The stages, in order; each is a few calls of the rooms."""

    out: Path
    user_tiles: Path | None
    user_slides: Path | None
    label: str | None
    seed: int
    assume_mpp: float | None = None

    def claim(self) -> None:
        """Take `out` for these arguments; refuse a folder of something else or of other arguments."""
        from hpcssl.core.atomic import read_json, write_atomic
        from hpcssl.core.config import first_difference
        from hpcssl.core.errors import ConfigError, StoreError

        if self.user_tiles and not self.user_tiles.is_dir():
            raise StoreError(f"{self.user_tiles}: no such folder of tiles")
        if self.assume_mpp is not None and not self.user_slides:
            raise ConfigError("--assume-mpp is of whole slides; give --slides, too")
        check_label(self.label, self.user_slides, self.user_tiles)
        asked: dict[str, Any] = {
            "tiles": self._source,
            "label": self.label,
            "seed": self.seed,
        }
        file = self.out / "demo.json"
        # hidden names are what a killed start left; with nothing else beside demo.json no stage was ever done
        begun = self.out.exists() and any(e != file and not e.name.startswith(".") for e in self.out.iterdir())
        if begun and not file.exists():
            raise ConfigError(f"{self.out}: not empty and no demo; choose another --out")
        damaged = ConfigError(f"{file}: damaged; remove {self.out} or choose another --out")
        if begun and (difference := first_difference(read_json(file, damaged), asked)):
            key, before, now = difference
            raise ConfigError(f"{self.out}: a demo with {key} = {before}, asked for is {now}; choose another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(asked, indent=1) + "\n")

    @property
    def _source(self) -> str:
        """Where the tiles are from, in words that `demo.json` keeps."""
        if self.user_slides:
            return f"cut from {self.user_slides.resolve()}"
        return str(self.user_tiles.resolve()) if self.user_tiles else "drawn"

    def prepare_tiles(self) -> None:
        """Cut tiles from the user's slides, or draw them where the user has neither."""
        if self.user_slides:
            _stage(1, f"tiles: cutting the slides of {self.user_slides} at 0.5 MPP")
            fixed = self._schedule_path.exists()
            lost = cut_tiles(self.user_slides, self._store_path, self.assume_mpp, threads=_cores(), fixed=fixed)
            if lost:
                _say(lost)
            return
        if self.user_tiles:
            _stage(1, f"tiles: {self.user_tiles}")
            return
        from hpcssl.cli.progress import progress
        from hpcssl.synthetic.drawn_slides import draw_tiles, plan_slides

        _stage(1, f"tiles: none given, drawing procedural tissue into {self._tiles}")
        total = sum(s.num_tiles for s in plan_slides(self.seed))
        with progress("drawing", total=total, unit="tiles") as advance:
            draw_tiles(self._tiles, seed=self.seed, on_progress=advance)

    def build_store(self) -> None:
        """Index the tiles and check that they are as indexed."""
        from hpcssl.cli.progress import progress
        from hpcssl.stores.kinds import open_store
        from hpcssl.stores.scan import build_store

        _stage(2, "tile store")
        if not self._store_path.exists():
            build_store(self._tiles, self._store_path)
        store = open_store(self._store_path)
        with progress("verifying the store", total=store.num_tiles, unit="tiles") as advance:
            store.verify(advance)

    def write_splits(self) -> None:
        """Write one split file an organ; an organ whose labels allow none is left out, and the report says why."""
        from hpcssl.core.atomic import atomic_dir, write_atomic
        from hpcssl.core.errors import SplitError
        from hpcssl.evaluate.splits import make_splits

        if (self.out / "splits").exists() and self._schedule_path.exists():
            return
        shutil.rmtree(self.out / "splits", ignore_errors=True)  # the store may have grown since
        slides, left_out = self.store.slides, {}
        label = self.label or "label"
        with atomic_dir(self.out / "splits") as folder:
            for organ, of_organ in slides.groupby("organ") if label in slides else ():
                try:
                    table = make_splits(of_organ.reset_index(drop=True), label, 20, 0.8, "patient_id", self.seed)
                    write_atomic(folder / f"{organ}.csv", table.to_csv(index=False))
                except SplitError as error:
                    left_out[organ] = str(error)
            if label not in slides:
                left_out["all organs"] = f"no column {label} in the slide table"
            write_atomic(folder / "left_out.json", json.dumps(left_out, indent=1) + "\n")
        if left_out:
            organ, reason = next(iter(left_out.items()))
            more = f" ({len(left_out)} organs are left out so)" if len(left_out) > 1 else ""
            _say(f"no benchmark of {organ}: {reason}{more}")

    def build_schedule(self) -> None:
        """Build the organ-balanced schedule and check its guarantees."""
        from hpcssl.cli.progress import progress
        from hpcssl.schedule.build import build_schedule
        from hpcssl.schedule.verify import verify_schedule

        _stage(3, "organ-balanced schedule")
        spec = demo_spec(SPEC, self.store.slides, self.seed, self.recipe.global_batch)
        build_schedule(spec, self.store.slides, self._schedule_path)
        total = spec.num_pseudo_epochs * spec.positions_per_pseudo_epoch
        with progress("verifying the schedule", total=total, unit="positions") as advance:
            verify_schedule(self._schedule_path, on_progress=advance)

    def pretrain(self) -> None:
        """Train a small ViT with DINO in two processes, through submitit's local executor."""
        from hpcssl.cli.pretrain_command import pretrain
        from hpcssl.core.errors import RunError
        from hpcssl.jobs.cluster import Resources
        from hpcssl.runs.checkpoint import checkpoint_path, load_checkpoint

        _stage(4, f"pretraining: DINO, {_PROCESSES} processes, {self.timeline.stop_step} steps")
        with contextlib.suppress(RunError):  # not there yet, or damaged: training goes on from the newest whole one
            load_checkpoint(checkpoint_path(self._run, self.timeline.stop_step))
            return
        outcome = pretrain(
            RECIPE,
            store=self._store_path,
            schedule=self._schedule_path,
            out=self._run,
            overrides=self._overrides,
            resources=Resources(processes_per_node=_PROCESSES),
            cluster="local",
        )
        if outcome != "finished":
            raise RunError(f"{self._run}: training was stopped; the same command goes on where it was")

    def embed(self) -> None:
        """Embed every slide with the untrained weights, half-way and at the end."""
        from hpcssl.cli.progress import progress
        from hpcssl.embed.embedding import embed_store
        from hpcssl.embed.sources import Source

        _stage(5, f"embedding {self.store.num_slides} slides with {len(self._steps)} checkpoints")
        with progress("embedding", total=self.store.num_slides * len(self._steps), unit="slides") as advance:
            for step in self._steps:
                source = Source.parse(f"{self._run}@{step}")
                embed_store(self.store, source, self._features(step), threads=_cores(), on_progress=advance)

    def benchmark(self) -> None:
        """Fit gated-attention heads over Monte-Carlo splits, one task an organ."""
        from hpcssl.cli.progress import progress
        from hpcssl.evaluate.mil.benchmark import Benchmark, Compute, plan_measurements
        from hpcssl.evaluate.mil.presets import preset_named
        from hpcssl.pipelines.evaluate import fit_missing

        splits = sorted((self.out / "splits").glob("*.csv"))
        _stage(6, f"benchmark: {len(splits)} tasks, 20 splits × 2 replicas of each" if splits else "benchmark: no task")
        if not splits:
            return
        benchmark = Benchmark(preset=preset_named(PRESET), seed=self.seed)
        measurements = plan_measurements([self._features(s) for s in self._steps], splits, benchmark)
        total = sum(one.num_epochs for one in measurements)
        with progress("fitting heads", total=total, unit="epochs") as advance:
            fit_missing(measurements, self._results, Compute(threads=_cores()), on_progress=advance)

    def report(self) -> None:
        """Write the report and print the closing table."""
        from rich.console import Console

        from hpcssl.cli.report_command import format_table
        from hpcssl.pipelines.report import report
        from hpcssl.report.summary import verdict_text

        _stage(7, "report")
        results = self._results if (self._results / "results.csv").exists() else None
        folders = [folder for folder in (results, self._run, self._schedule_path) if folder]
        made = report(folders, self.out, title="hpcssl demo", notes=self._notes(results))
        if made.summary is not None:
            Console().print(format_table(made.summary))
            print(verdict_text(made.summary))

    def _notes(self, results: Path | None) -> dict[str, str]:
        from hpcssl.core.provenance import provenance

        facts = provenance()
        slides = self.store.slides
        left_out = json.loads((self.out / "splits" / "left_out.json").read_text(encoding="utf-8"))
        per_organ = ", ".join(f"{organ} {n}" for organ, n in slides["organ"].value_counts().sort_index().items())
        return {
            "tiles": f"{self._tiles}, drawn by the demo" if self._source == "drawn" else self._source,
            "slides": f"{self.store.num_slides} ({per_organ})",
            "number of tiles": f"{self.store.num_tiles:,}",
            "recipe": f"{RECIPE}, global batch {self.recipe.global_batch}, {_PROCESSES} processes",
            "samples seen": f"{self.timeline.stop_step * self.recipe.global_batch:,}",
            "benchmark": f"{PRESET}: gated attention, 20 Monte-Carlo splits × 2 replicas" if results else "none",
            **{f"no benchmark of {organ}": reason for organ, reason in list(left_out.items())[:10]},
            "seed": str(self.seed),
            "hardware": f"{facts['cpu_count']} CPU cores ({facts['machine']})",
            "versions": ", ".join(f"{name} {version}" for name, version in facts["packages"].items()),
        }

    @property
    def _tiles(self) -> Path:
        return self.user_tiles or self.out / "tiles"

    @property
    def _store_path(self) -> Path:
        return self.out / "store"

    @property
    def _schedule_path(self) -> Path:
        return self.out / "schedule"

    @property
    def _run(self) -> Path:
        return self.out / RECIPE

    @property
    def _results(self) -> Path:
        return self.out / "results"

    @property
    def _overrides(self) -> list[str]:
        return [f"seed={self.seed}"]

    def _features(self, step: int) -> Path:
        return self.out / "features" / f"step-{step:06d}"

    @cached_property
    def store(self) -> Store:
        """The tile store."""
        from hpcssl.stores.kinds import open_store

        return open_store(self._store_path)

    @cached_property
    def schedule(self) -> Schedule:
        """The tile schedule."""
        from hpcssl.schedule.file import Schedule

        return Schedule.open(self._schedule_path)

    @cached_property
    def recipe(self) -> PretrainConfig:
        """The pretraining recipe."""
        from hpcssl.train.pretrain_config import load_recipe

        return load_recipe(RECIPE, self._overrides)

    @cached_property
    def timeline(self) -> Timeline:
        """Steps and pseudo-epochs of the run."""
        from hpcssl.train.pretrain_config import Timeline

        return Timeline(self.recipe, self.schedule)

    @property
    def _steps(self) -> list[int]:
        """The checkpoints that are compared: untrained, half-way, last."""
        length = self.schedule.num_pseudo_epochs
        return [self.timeline.step_at(n) for n in (0, length // 2, length)]


def _stage(number: int, text: str) -> None:
    _say(f"[{number}/{_STAGES}] {text}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0))
