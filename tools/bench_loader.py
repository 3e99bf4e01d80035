#!/usr/bin/env python3
"""Times the loader's backends against what everybody starts from: torchvision's transforms on Pillow images.

`python tools/bench_loader.py --tiles DIR [--num 64] [--repeats 5]`: DIR holds JPEG tiles at any depth. All runs on one
core with one thread: a tile is decoded, cropped and coloured (DINO: 2 × 224 px and 8 × 96 px; MAE: 1 × 224 px).
The reference ends with normalised float tensors, as in its DataLoader; the backends end with uint8, normalised on the
device. Prints one JSON object last: tiles/s and ratios, medians over the repeats, both sides in turns; what was not
measured is null, with the reason beside it. Files that cannot be decoded are passed over and counted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: one core is measured

import numpy as np
import PIL
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms

from hpcssl.core.errors import BadTileError
from hpcssl.loader import cpu, pillow
from hpcssl.plan.draw import draw_plan
from hpcssl.plan.recipe import AugmentRecipe, dino_augment, mae_augment

_BICUBIC = transforms.InterpolationMode.BICUBIC


class _RandomBlur:
    """Gaussian blur of Pillow with probability p, sigma 0.1 to 2."""

    def __init__(self, p: float):
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def _solarize(image: Image.Image) -> Image.Image:
    return ImageOps.solarize(image) if random.random() < 0.2 else image


def dino_reference() -> Callable[[Image.Image], list[torch.Tensor]]:
    """Return DINO's multi-crop in torchvision."""
    colour = [
        transforms.RandomHorizontalFlip(0.5),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        transforms.RandomGrayscale(0.2),
    ]
    end = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]

    def view(px: int, scale: tuple[float, float], *more: Callable[[Image.Image], Image.Image]) -> transforms.Compose:
        crop = transforms.RandomResizedCrop(px, scale=scale, interpolation=_BICUBIC)
        return transforms.Compose([crop, *colour, *more, *end])

    first, second = view(224, (0.4, 1.0), _RandomBlur(1.0)), view(224, (0.4, 1.0), _RandomBlur(0.1), _solarize)
    local = view(96, (0.05, 0.4), _RandomBlur(0.5))
    return lambda image: [first(image), second(image), *(local(image) for _ in range(8))]


def mae_reference() -> Callable[[Image.Image], list[torch.Tensor]]:
    """Return MAE's augmentation in torchvision."""
    one = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=_BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    return lambda image: [one(image)]


def of_reference(views: Callable[[Image.Image], object], tiles: Sequence[bytes]) -> Callable[[], None]:
    """Return the work of the reference on all tiles."""

    def work() -> None:
        for jpeg in tiles:
            views(Image.open(io.BytesIO(jpeg)).convert("RGB"))

    return work


def of_backend(execute: Callable[..., None], recipe: AugmentRecipe, tiles: Sequence[bytes]) -> Callable[[], None]:
    """Return the work of a backend on all tiles, the drawing of the plan included."""
    out = [np.empty((kind.count, len(tiles), kind.view_px, kind.view_px, 3), np.uint8) for kind in recipe.kinds]

    def work() -> None:
        plan = draw_plan(recipe, 0, np.arange(len(tiles)), num_patches=196)
        for index, jpeg in enumerate(tiles):
            execute(jpeg, recipe, plan, index, out, name="tile")

    return work


def of_dali(recipe: AugmentRecipe, tiles: Sequence[bytes], device: torch.device, threads: int) -> Callable[[], None]:
    """Return the work of DALI on all tiles as one batch, the drawing of the plan included."""
    from hpcssl.loader import dali

    executor = dali.Dali(recipe, batch=len(tiles), threads=threads, device=device)

    def work() -> None:
        plan = draw_plan(recipe, 0, np.arange(len(tiles)), num_patches=196)
        executor.execute([dali.decode(jpeg, name="tile") for jpeg in tiles], plan)

    return work


def tiles_per_second(work: Callable[[], None], num: int) -> float:
    """Return the rate of some work on `num` tiles."""
    begun = time.perf_counter()
    work()
    return num / (time.perf_counter() - begun)


def simd_rate(folder: Path, arguments: Sequence[str]) -> float:
    """Return the rate of the `pillow` backend on DINO's recipe with the pillow-simd of a folder, in its own process."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, __file__, *arguments, "--only-pillow"]
    told = json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert "simd" in told["module"] or str(folder) in told["module"], told
    return float(told["tiles_per_s"])


def measure(
    tiles: Sequence[bytes], repeats: int, simd: Path | None = None, arguments: Sequence[str] = ()
) -> dict[str, object]:
    """Return the rates and ratios of all backends."""
    dino, mae = dino_augment(), mae_augment()
    works = {
        "dino_reference": of_reference(dino_reference(), tiles),
        "dino_pillow": of_backend(pillow.execute, dino, tiles),
        "dino_cpu": of_backend(cpu.execute, dino, tiles),
        "mae_reference": of_reference(mae_reference(), tiles),
        "mae_pillow": of_backend(pillow.execute, mae, tiles),
        "mae_cpu": of_backend(cpu.execute, mae, tiles),
        "decode_only": lambda: [cpu.decode(jpeg, name="tile") for jpeg in tiles] and None,
    }
    if importlib.util.find_spec("nvidia.dali"):
        works["dino_dali_cpu"] = of_dali(dino, tiles, torch.device("cpu"), 1)
        works["mae_dali_cpu"] = of_dali(mae, tiles, torch.device("cpu"), 1)
    rates: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            rate = tiles_per_second(work, len(tiles))
            if repeat:  # the first is the warm-up
                rates[name].append(rate)
        if repeat and simd:
            rates.setdefault("dino_pillow_simd", []).append(simd_rate(simd, arguments))
        if repeat:
            print("  ".join(f"{name} {values[-1]:.0f}/s" for name, values in rates.items()), file=sys.stderr)
    told: dict[str, object] = {f"{name}_tiles_per_s": round(statistics.median(v), 1) for name, v in rates.items()}
    pairs = [("dino_cpu", "dino_reference"), ("dino_pillow", "dino_reference"), ("mae_cpu", "mae_reference")]
    pairs += [(f"{name}_dali_cpu", f"{name}_reference") for name in ("dino", "mae") if f"{name}_dali_cpu" in works]
    for name, over in [*pairs, *([("dino_pillow_simd", "dino_pillow")] if simd else [])]:
        ratios = [a / b for a, b in zip(rates[name], rates[over], strict=True)]
        label = "pillow_simd_vs_pillow" if "simd" in name else f"{name}_vs_reference"
        told |= {label: round(statistics.median(ratios), 2)}
        told[f"{label}_spread"] = [round(min(ratios), 2), round(max(ratios), 2)]
    if not simd:
        told |= {"pillow_simd_vs_pillow": None, "pillow_simd_vs_pillow_reason": "no --simd FOLDER was given"}
    if torch.cuda.is_available() and "dino_dali_cpu" in works:
        threads = len(os.sched_getaffinity(0))
        many = [tiles[i % len(tiles)] for i in range(512)]
        work = of_dali(dino, many, torch.device("cuda", 0), threads)
        rates["dali_gpu"] = [tiles_per_second(work, len(many)) for _ in range(repeats + 2)][2:]  # it compiles first
        told["dali_gpu_tiles_per_s"] = round(statistics.median(rates["dali_gpu"]), 1)
        told["device"] = torch.cuda.get_device_name(0)
    versions = {"pillow": PIL.__version__, "torch": torch.__version__, "numpy": np.__version__}
    return told | {"tiles": len(tiles), "repeats": repeats, "machine": platform.machine()} | versions


def decodable(files: Sequence[Path]) -> list[bytes]:
    """Return the contents of those files that can be decoded."""
    tiles = []
    for path in files:
        with contextlib.suppress(OSError, BadTileError):
            jpeg = path.read_bytes()
            pillow.decode(jpeg, name=str(path))
            tiles.append(jpeg)
    return tiles


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=Path, required=True, help="folder of JPEG tiles, at any depth")
    parser.add_argument("--num", type=int, default=64, help="tiles, taken evenly from the folder (default: 64)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--simd", type=Path, help="folder of `pip install --no-deps --target FOLDER pillow-simd`")
    parser.add_argument("--only-pillow", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    files = sorted(path for path in args.tiles.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        sys.exit(f"bench_loader: {args.tiles}: no JPEG files below it")
    torch.set_num_threads(1)
    files = files[:: max(1, len(files) // args.num)][: args.num]
    tiles = decodable(files)
    if not tiles:
        sys.exit(f"bench_loader: {args.tiles}: none of {len(files)} JPEG files taken from it can be decoded")
    if args.only_pillow:
        work = of_backend(pillow.execute, dino_augment(), tiles)
        work()
        print(json.dumps({"tiles_per_s": tiles_per_second(work, len(tiles)), "module": PIL.__file__}))
    else:
        told = measure(tiles, args.repeats, args.simd, sys.argv[1:])
        told["tiles_passed_over"] = len(files) - len(tiles)
        if "dali_gpu_tiles_per_s" in told:  # in a process of its own, with all cores
            command = [sys.executable, str(Path(__file__).with_name("bench_fed.py")), "--tiles", str(args.tiles)]
            environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
            fed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            told["fed_vs_synthetic"] = json.loads(fed.stdout.splitlines()[-1])["fed_vs_synthetic"]
        print(json.dumps(told))


if __name__ == "__main__":
    main()
