"""The verb `demo`: from whole slides or tiles to a benchmark report, on this machine's CPU, by the code of a cluster.

Every stage leaves its result whole or not at all, and one that is there is not computed again; so a demo that was
stopped goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from hpcssl.core.atomic import atomic_dir, write_atomic
from hpcssl.core.claim import claim
from hpcssl.core.errors import ConfigError, RunError, SplitError, StoreError
from hpcssl.core.provenance import provenance
from hpcssl.embed.embedding import embed_store, source_of
from hpcssl.evaluate.mil.benchmark import Benchmark, Compute, plan_measurements
from hpcssl.evaluate.mil.presets import preset_named
from hpcssl.evaluate.splits import make_splits
from hpcssl.jobs.profile import Resources
from hpcssl.pipelines.demo_inputs import check_label, cut_tiles, demo_spec
from hpcssl.pipelines.display import Display
from hpcssl.pipelines.evaluate import fit_missing
from hpcssl.pipelines.pretrain import PretrainRequest, plan_pretraining, pretrain
from hpcssl.pipelines.report import report
from hpcssl.runs.checkpoint import checkpoint_path, load_checkpoint
from hpcssl.schedule.build import build_schedule
from hpcssl.schedule.file import Schedule
from hpcssl.schedule.verify import verify_schedule
from hpcssl.slides.cutting import CutOptions
from hpcssl.stores.kinds import open_store
from hpcssl.stores.scan import build_store
from hpcssl.stores.store import Store
from hpcssl.stores.tiling import TilingOptions
from hpcssl.synthetic.drawn_slides import draw_tiles, plan_slides
from hpcssl.train.pretrain_config import Timeline, load_recipe

RECIPE, SPEC, PRESET = "dino-demo", "demo", "mccv-demo"
_PROCESSES = 2
_STAGES = 7
_NO_TASK = "benchmark: no task"


@dataclass(kw_only=True)
class Demo:
    """The stages, in order; each is a few calls of the rooms.

    Attributes
    ----------
    out : folder for everything; continued where it was
    tiles : JPEG tiles as `<organ>/<slide_id>/<name>.jpg`
    slides : table of whole slides, instead of tiles; with neither, tiles are drawn
    label : column of the slide table to predict; None = `label`, if there
    seed : of everything that is drawn
    assume_mpp : of slides whose MPP neither the table nor the file says
    """

    out: Path
    display: Display
    tiles: Path | None = None
    slides: Path | None = None
    label: str | None = None
    seed: int = 0
    assume_mpp: float | None = None

    def __post_init__(self) -> None:
        self.store_path, self.schedule_path = self.out / "store", self.out / "schedule"
        self.run, self.splits, self.results = self.out / RECIPE, self.out / "splits", self.out / "results"
        self.recipe = load_recipe(RECIPE, [f"seed={self.seed}"])

    def claim(self) -> None:
        """Take `out` for these arguments; refuse a folder of something else or of other arguments."""
        if self.tiles and not self.tiles.is_dir():
            raise StoreError(f"{self.tiles}: no such folder of tiles")
        if self.assume_mpp is not None and not self.slides:
            raise ConfigError("--assume-mpp is of whole slides; give --slides, too")
        check_label(self.label, self.slides, self.tiles)
        arguments = {"tiles": self._source, "label": self.label, "seed": self.seed}
        file = self.out / "demo.json"
        # hidden names are what a killed start left; with nothing else beside demo.json no stage was ever done
        started = self.out.exists() and any(e != file and not e.name.startswith(".") for e in self.out.iterdir())
        if started and not file.exists():
            raise ConfigError(f"{self.out}: not empty and no demo; choose another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        if not started:
            file.unlink(missing_ok=True)
        made, now, advice = f"{self.out}: a demo with", "asked for is", "choose another --out"
        damaged = f"remove {self.out} or {advice}"
        claim(file, arguments, made=made, now=now, advice=advice, damaged=damaged, error=ConfigError)

    def run_stages(self) -> pd.DataFrame | None:
        """Do what is not done of all stages; returns the summary of the results, None where no label allows any."""
        self.prepare_tiles()
        self.build_store()
        self.write_splits()
        self.build_schedule()
        self.pretrain()
        self.embed()
        self.benchmark()
        return self.report()

    def prepare_tiles(self) -> None:
        """Cut tiles from the user's slides, or draw them where the user has neither."""
        if self.slides:
            self._begin(1, f"tiles: cutting the slides of {self.slides} at 0.5 MPP")
            fixed, progress = self.schedule_path.exists(), self.display.progress
            options = TilingOptions(cut=CutOptions(assume_mpp=self.assume_mpp), threads=_cores())
            left_out = cut_tiles(self.slides, self.store_path, options, fixed=fixed, progress=progress)
            if left_out:
                self.display.say(left_out)
        elif self.tiles:
            self._begin(1, f"tiles: {self.tiles}")
        else:
            self._begin(1, f"tiles: none given, drawing procedural tissue into {self._tiles_path}")
            total = sum(slide.num_tiles for slide in plan_slides(self.seed))
            with self.display.progress("drawing", total, "tiles") as advance:
                draw_tiles(self._tiles_path, seed=self.seed, on_progress=advance)

    def build_store(self) -> None:
        """Index the tiles and check that they are as indexed."""
        self._begin(2, "tile store")
        if not self.store_path.exists():
            build_store(self._tiles_path, self.store_path)
        with self.display.progress("verifying the store", self.store.num_tiles, "tiles") as advance:
            self.store.verify(advance)

    def write_splits(self) -> None:
        """Write one split file an organ; an organ whose labels allow none is left out, and the report says why."""
        if self.splits.exists() and self.schedule_path.exists():
            return
        shutil.rmtree(self.splits, ignore_errors=True)  # the store may have grown since
        slides, left_out = self.store.slides, {}
        label = self.label or "label"
        with atomic_dir(self.splits) as folder:
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
            self.display.say(f"no benchmark of {organ}: {reason}{more}")

    def build_schedule(self) -> None:
        """Build the organ-balanced schedule and check its guarantees."""
        self._begin(3, "organ-balanced schedule")
        spec = demo_spec(SPEC, self.store.slides, self.seed, self.recipe.global_batch)
        build_schedule(spec, self.store.slides, self.schedule_path)
        total = spec.num_pseudo_epochs * spec.positions_per_pseudo_epoch
        with self.display.progress("verifying the schedule", total, "positions") as advance:
            verify_schedule(self.schedule_path, on_progress=advance)

    def pretrain(self) -> None:
        """Train a small ViT with DINO in two processes, through submitit's local executor."""
        self._begin(4, f"pretraining: DINO, {_PROCESSES} processes, {self.timeline.stop_step} steps")
        with contextlib.suppress(RunError):  # not there yet, or damaged: training goes on from the newest whole one
            load_checkpoint(checkpoint_path(self.run, self.timeline.stop_step))
            return
        request = PretrainRequest(
            recipe=RECIPE,
            store=self.store_path,
            schedule=self.schedule_path,
            out=self.run,
            overrides=[f"seed={self.seed}"],
            resources=Resources(processes_per_node=_PROCESSES),
        )
        if pretrain(plan_pretraining(request), self.display).state != "finished":
            raise RunError(f"{self.run}: training was stopped; the same command goes on where it was")

    def embed(self) -> None:
        """Embed every slide with the untrained weights, half-way and at the end."""
        store, steps = self.store, self._steps
        self._begin(5, f"embedding {store.num_slides} slides with {len(steps)} checkpoints")
        with self.display.progress("embedding", store.num_slides * len(steps), "slides") as advance:
            for step in steps:
                source = source_of(f"{self.run}@{step}")
                embed_store(store, source, self._features(step), threads=_cores(), on_progress=advance)

    def benchmark(self) -> None:
        """Fit gated-attention heads over Monte-Carlo splits, one task an organ."""
        splits = sorted(self.splits.glob("*.csv"))
        self._begin(6, f"benchmark: {len(splits)} tasks, 20 splits × 2 replicas of each" if splits else _NO_TASK)
        if not splits:
            return
        benchmark = Benchmark(preset=preset_named(PRESET), seed=self.seed)
        measurements = plan_measurements([self._features(step) for step in self._steps], splits, benchmark)
        total = sum(one.num_epochs for one in measurements)
        with self.display.progress("fitting heads", total, "epochs") as advance:
            fit_missing(measurements, self.results, Compute(threads=_cores()), on_progress=advance)

    def report(self) -> pd.DataFrame | None:
        """Write the report; returns the summary of the results, None without any."""
        self._begin(7, "report")
        results = self.results if (self.results / "results.csv").exists() else None
        folders = [folder for folder in (results, self.run, self.schedule_path) if folder]
        return report(folders, self.out, title="hpcssl demo", notes=self._notes(has_results=bool(results))).summary

    def _notes(self, *, has_results: bool) -> dict[str, str]:
        facts, slides, source = provenance(), self.store.slides, self._source
        left_out = json.loads((self.splits / "left_out.json").read_text(encoding="utf-8"))
        per_organ = ", ".join(f"{organ} {n}" for organ, n in slides["organ"].value_counts().sort_index().items())
        return {
            "tiles": f"{self._tiles_path}, drawn by the demo" if source == "drawn" else source,
            "slides": f"{self.store.num_slides} ({per_organ})",
            "number of tiles": f"{self.store.num_tiles:,}",
            "recipe": f"{RECIPE}, global batch {self.recipe.global_batch}, {_PROCESSES} processes",
            "samples seen": f"{self.timeline.stop_step * self.recipe.global_batch:,}",
            "benchmark": f"{PRESET}: gated attention, 20 Monte-Carlo splits × 2 replicas" if has_results else "none",
            **{f"no benchmark of {organ}": reason for organ, reason in list(left_out.items())[:10]},
            "seed": str(self.seed),
            "hardware": f"{facts['cpu_count']} CPU cores ({facts['machine']})",
            "versions": ", ".join(f"{name} {version}" for name, version in facts["packages"].items()),
        }

    def _begin(self, number: int, stage: str) -> None:
        self.display.say(f"[{number}/{_STAGES}] {stage}")

    def _features(self, step: int) -> Path:
        return self.out / "features" / f"step-{step:06d}"

    @property
    def _source(self) -> str:
        """Where the tiles are from, in words that `demo.json` keeps."""
        if self.slides:
            return f"cut from {self.slides.resolve()}"
        return str(self.tiles.resolve()) if self.tiles else "drawn"

    @property
    def _tiles_path(self) -> Path:
        return self.tiles or self.out / "tiles"

    @cached_property
    def store(self) -> Store:
        """The tile store."""
        return open_store(self.store_path)

    @cached_property
    def schedule(self) -> Schedule:
        """The tile schedule."""
        return Schedule.open(self.schedule_path)

    @cached_property
    def timeline(self) -> Timeline:
        """Steps and pseudo-epochs of the run."""
        return Timeline(self.recipe, self.schedule)

    @property
    def _steps(self) -> list[int]:
        """The checkpoints that are compared: untrained, half-way, last."""
        length = self.schedule.num_pseudo_epochs
        return [self.timeline.step_at(n) for n in (0, length // 2, length)]


def _cores() -> int:
    return len(os.sched_getaffinity(0))
