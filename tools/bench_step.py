#!/usr/bin/env python3
"""Times our training step against a plain implementation of the published loops (`plain_step.py`), on synthetic tiles.

`python tools/bench_step.py [--size paper|cpu|toy] [--batch N] [--objective dino mae] [--precision fp32 bf16]`:
`paper` (default with a GPU) is DINO ViT-S/16 on 2 × 224 + 8 × 96 px and MAE ViT-L/16; `cpu` (default without) has the
same DINO with four tiles and MAE ViT-B/16; `toy` checks in seconds that all of it runs, its ratios mean nothing. Both
sides start from the same weights and see the same tiles, lying on the device, in the same precision. First each is
run alone for a few steps without drop-path: the losses must agree, and the memory is measured. Then both are timed in
turns. The peak is the rate of a matrix product measured in the same run: bf16, 8192³ on a GPU; 2048³ in the precision
of the steps on a CPU. Prints one JSON object last: rates, and the ratio's median and spread over the repeats.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import timm
import torch
from measuring import device_name, median, options, ratios, repeated, seconds, short, with_spread
from plain_step import PlainDino, PlainMae
from torch.utils.flop_counter import FlopCounterMode

from hpcssl.core.config import build, to_mapping
from hpcssl.core.errors import ConfigError
from hpcssl.loader.stream import Batch
from hpcssl.models.decoder import MaeDecoderConfig, sincos_position
from hpcssl.models.encoder import Encoder, EncoderConfig, normalised
from hpcssl.models.heads import DinoHeadConfig
from hpcssl.objectives.dino.dino_objective import DinoConfig
from hpcssl.objectives.mae.mae_objective import MaeConfig
from hpcssl.objectives.registry import present_layout
from hpcssl.plan.draw import PlanNeeds, draw_plan
from hpcssl.plan.recipe import AugmentRecipe, ViewRecipe, dino_augment, mae_augment
from hpcssl.train.execution import resolve_precision
from hpcssl.train.pretrain_config import OptimConfig, PretrainConfig, Timeline, TrainConfig
from hpcssl.train.reduce import Collectives
from hpcssl.train.state import TrainState
from hpcssl.train.step import train_step

Step = Callable[[], float]
TOY_ENCODER = EncoderConfig(image_px=32, patch_px=8, embed_dim=24, depth=2, num_heads=2)
TRACE_STEPS = 4
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the losses, relative


def dino_recipe(size: str, batch: int) -> PretrainConfig:
    """Return DINO at a size, all of its schedules past their beginning."""
    encoder, augment, head = EncoderConfig(), dino_augment(), DinoHeadConfig()
    if size == "toy":
        views = [ViewRecipe(count=n, view_px=px, scale=(0.2, 1.0)) for n, px in ((2, 32), (3, 16))]
        augment = AugmentRecipe(global_views=views[0], local_views=views[1])
        encoder, head = TOY_ENCODER, DinoHeadConfig(out_dim=64)
    dino = DinoConfig(head=head, freeze_last_layer_pseudo_epochs=0)
    optim = OptimConfig(lr_per_256=1e-4 * 256 / batch, warmup_pseudo_epochs=0, clip=1.0)
    return PretrainConfig(objective=dino, global_batch=batch, encoder=encoder, augment=augment, optim=optim)


def mae_recipe(size: str, batch: int) -> PretrainConfig:
    """Return MAE at a size."""
    name = "vit_large_patch16_224" if size == "paper" else "vit_base_patch16_224"
    encoder, augment, decoder = EncoderConfig(name=name, drop_path=0.0), mae_augment(), MaeDecoderConfig()
    if size == "toy":
        encoder = dataclasses.replace(TOY_ENCODER, drop_path=0.0)
        view = ViewRecipe(count=1, view_px=32, scale=(0.2, 1.0))
        augment = AugmentRecipe(global_views=view, mask_ratio=0.75)
        decoder = MaeDecoderConfig(embed_dim=16, num_heads=2)
    optim = OptimConfig(lr_per_256=1e-4 * 256 / batch, warmup_pseudo_epochs=0, betas=(0.9, 0.95))
    mae = MaeConfig(decoder=decoder)
    return PretrainConfig(objective=mae, global_batch=batch, encoder=encoder, augment=augment, optim=optim)


def synthetic_batch(recipe: PretrainConfig, needs: PlanNeeds, device: torch.device) -> Batch:
    """Return smooth random tiles on the device, with planned masks and drop-path."""
    generator = torch.Generator().manual_seed(0)
    positions = np.arange(recipe.global_batch)
    views = []
    for kind in recipe.augment.kinds:
        shape = (kind.count * recipe.global_batch, 3, kind.view_px, kind.view_px)
        coarse = torch.rand((*shape[:2], 8, 8), generator=generator) * 255
        pixels = torch.nn.functional.interpolate(coarse, shape[2:], mode="bilinear").permute(0, 2, 3, 1)
        views.append(pixels.to(torch.uint8).unflatten(0, (kind.count, -1)).contiguous().to(device))
    return Batch.of(0, tuple(views), draw_plan(recipe.augment, recipe.seed, positions, **vars(needs)))


class Case:
    """One objective at one size and precision; makes either side from the same weights."""

    def __init__(self, recipe: PretrainConfig, device: torch.device):
        self.recipe, self.device = recipe, device
        each = 1000 * recipe.global_batch
        schedule: Any = SimpleNamespace(  # as much of one as the values of a run depend on
            positions_per_pseudo_epoch=each, num_pseudo_epochs=50, num_positions=50 * each, path=Path("synthetic")
        )
        self.timeline = Timeline(recipe, schedule)
        self.precision = resolve_precision(recipe.train.precision, device)
        self.batch = synthetic_batch(recipe, TrainState(recipe, device).objective.needs, device)

    def ours(self) -> Step:
        """Return our step."""
        state, collectives = TrainState(self.recipe, self.device), Collectives()

        def step() -> float:
            record = train_step(state, self.batch, self.recipe, self.timeline, collectives, self.device)
            return record["loss"]

        return step

    def plain(self) -> Step:
        """Return the plain step."""
        state = TrainState(self.recipe, self.device)
        weights = {name: w.cpu().clone() for name, w in state.objective.module.state_dict().items()}
        encoder: Encoder = state.objective.trained.get_submodule("encoder")  # type: ignore[assignment]
        del state
        images = [normalised(v) for kind in self.batch.views for v in kind]
        values = map(self.timeline.values, range(self.timeline.total_steps))
        if self.recipe.objective.kind == "dino":
            dino = PlainDino(self.recipe, encoder, weights, self.device)
            return lambda: dino.step(images, self.precision, next(values))
        mae = PlainMae(self.recipe, encoder, weights, self.device)
        assert self.batch.mask is not None
        masked = int(self.batch.mask[0].sum())
        ties = torch.linspace(0, 0.5, self.batch.mask.shape[1])  # keeps the visible patches in their order
        noise = (self.batch.mask.float() + ties).to(self.device)
        position = sincos_position(self.recipe.objective.decoder.embed_dim, encoder.grid_size).to(self.device)
        return lambda: mae.step(images[0], noise, masked, position, self.precision, next(values))


def flop_of_a_step(step: Step) -> int:
    """Return the operations of a step by torch's count: a multiply-add is two, what is elementwise is left out."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def peak_tflops(device: torch.device, precision: str) -> float:
    """Return the device's best rate of a large matrix product, in 10¹² operations a second."""
    side = 8192 if device.type == "cuda" else 2048
    dtype = torch.float32 if precision == "fp32" and device.type == "cpu" else torch.bfloat16
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = 10 if device.type == "cuda" else 1
    return max(2 * side**3 / timed(lambda: a @ b, times, device) / 1e12 for _ in range(6))


def timed(work: Callable[[], object], times: int, device: torch.device) -> float:
    """Return the seconds of one of so many calls, the device's work included."""
    return seconds(lambda: [work() for _ in range(times)], device) / times


class Memory:
    """The most memory that is used beyond what was in use at first, in GiB: of the GPU, or of this process."""

    def __init__(self, device: torch.device):
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            ctypes.CDLL(None).malloc_trim(0)  # gives back what was freed
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self._before = self._peak()

    def used(self) -> float:
        """Return the peak so far."""
        return (self._peak() - self._before) / 2**30

    def _peak(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024


def traces(case: Case) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Run each side alone for a few steps without drop-path; return the losses and the peak memory of each."""
    encoder = dataclasses.replace(case.recipe.encoder, drop_path=0.0)
    still = Case(dataclasses.replace(case.recipe, encoder=encoder), case.device)
    losses, memory = {}, {}
    for name, make in (("ours", still.ours), ("plain", still.plain)):
        watch = Memory(case.device)
        step = make()
        losses[name] = [step() for _ in range(TRACE_STEPS)]
        memory[name] = watch.used()
        del step
    return losses, memory


def measure(case: Case, label: str, repeats: int, steps: int, peak: float) -> dict[str, object]:
    """Return one case's figures, under names that begin with the label."""
    losses, memory = traces(case)
    difference = max(abs(a / b - 1) for a, b in zip(losses["ours"], losses["plain"], strict=True))
    moved = max(abs(loss / losses["ours"][0] - 1) for loss in losses["ours"])
    if difference > TOLERANCE[case.precision] or moved < 2 * difference:
        sys.exit(f"bench_step: {label}: the losses part, or stand still: {losses}")
    sides = {"ours": case.ours(), "plain": case.plain()}
    rows = repeated(lambda: {n: timed(step, steps, case.device) for n, step in sides.items()}, repeats, label=label)
    state = TrainState(case.recipe, case.device)
    encoder: Encoder = state.objective.trained.get_submodule("encoder")  # type: ignore[assignment]
    work = flop_of_a_step(sides["plain"]) / 1e12
    figures: dict[str, object] = {
        **with_spread(f"{label}_vs_plain", ratios(rows["plain"], rows["ours"])),
        f"{label}_trace": [round(loss, 5) for loss in losses["ours"]],
        f"{label}_trace_difference": float(f"{difference:.2g}"),
        f"{label}_batch": case.recipe.global_batch,
        f"{label}_compiled": encoder.execution.compiled,
    }
    for name, prefix in (("ours", label), ("plain", f"{label}_plain")):
        taken = median(rows[name])
        figures |= {
            f"{prefix}_steps_per_s": short(1 / taken),
            f"{prefix}_tiles_per_s": short(case.recipe.global_batch / taken),
            f"{prefix}_tflops": short(work / taken),
            f"{prefix}_share_of_peak": round(work / taken / peak, 3),
            f"{prefix}_peak_gib": round(memory[name], 3),
        }
    return figures


def main() -> None:
    """Measure and print."""
    parser = options(__doc__, set=[], repeats=5)
    parser.add_argument("--size", choices=("paper", "cpu", "toy"), help="default: paper on a GPU, else cpu")
    parser.add_argument("--batch", type=int, help="tiles of a step (default: 64 on a GPU, else 4)")
    parser.add_argument("--objective", nargs="+", choices=("dino", "mae"), default=["dino", "mae"])
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, help="steps of a repeat (default: 10 on a GPU, else 1)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and args.size != "cpu" else "cpu")
    on_gpu = device.type == "cuda"
    size = args.size or ("paper" if on_gpu else "cpu")
    name = device_name(device, f"{platform.machine()}, {torch.get_num_threads()} threads")
    peaks = {precision: peak_tflops(device, precision) for precision in args.precision}
    steps = args.steps or (10 if on_gpu else 1)
    figures: dict[str, object] = {}
    for objective, precision in itertools.product(args.objective, args.precision):
        make = {"dino": dino_recipe, "mae": mae_recipe}[objective]
        recipe = make(size, args.batch or (64 if on_gpu else 4))
        recipe = dataclasses.replace(recipe, train=TrainConfig(precision=precision))
        try:
            recipe = build(
                PretrainConfig, present_layout(to_mapping(recipe), "bench_step", args.set), where="bench_step"
            )
        except ConfigError as error:
            sys.exit(str(error))
        label = f"{objective}_{precision}"
        figures |= measure(Case(recipe, device), label, args.repeats, steps, peaks[precision])
    figures |= {f"{precision}_peak_tflops": round(peak, 3) for precision, peak in peaks.items()}
    figures |= {"size": size, "repeats": args.repeats, "device": name, "settings": args.set}
    print(json.dumps(figures | {"torch": torch.__version__, "timm": timm.__version__}))


if __name__ == "__main__":
    main()
