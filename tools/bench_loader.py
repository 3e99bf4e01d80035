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
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: one core is measured

import numpy as np
import PIL
import torch
from measuring import machine, median, options, ratios, repeated, seconds, with_spread
from PIL import Image, ImageFilter
from torchvision import transforms

from hpcssl.core.errors import BadTileError
from hpcssl.loader import cpu, pillow
from hpcssl.plan.draw import draw_plan
from hpcssl.plan.recipe import AugmentRecipe, dino_augment, mae_augment

_NORMALISED = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]


def crop(px: int, scale: tuple[float, float]) -> transforms.RandomResizedCrop:
    """Return the crop that both recipes begin with."""
    return transforms.RandomResizedCrop(px, scale=scale, interpolation=transforms.InterpolationMode.BICUBIC)


def blur(p: float) -> transforms.RandomApply:
    """Gaussian blur of Pillow with probability p, sigma 0.1 to 2."""
    once = transforms.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))))
    return transforms.RandomApply([once], p=p)


def dino_reference() -> Callable[[Image.Image], list[torch.Tensor]]:
    """Return DINO's multi-crop in torchvision."""
    colour = [
        transforms.RandomHorizontalFlip(0.5),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        transforms.RandomGrayscale(0.2),
    ]

    def view(px: int, scale: tuple[float, float], *more: Callable[[Image.Image], Image.Image]) -> transforms.Compose:
        return transforms.Compose([crop(px, scale), *colour, *more, *_NORMALISED])

    first = view(224, (0.4, 1.0), blur(1.0))
    second = view(224, (0.4, 1.0), blur(0.1), transforms.RandomSolarize(128, p=0.2))
    local = view(96, (0.05, 0.4), blur(0.5))
    return lambda image: [first(image), second(image), *(local(image) for _ in range(8))]


def mae_reference() -> Callable[[Image.Image], list[torch.Tensor]]:
    """Return MAE's augmentation in torchvision."""
    one = transforms.Compose([crop(224, (0.2, 1.0)), transforms.RandomHorizontalFlip(), *_NORMALISED])
    return lambda image: [one(image)]


def of_reference(views: Callable[[Image.Image], object], tiles: Sequence[bytes]) -> Callable[[], object]:
    """Return the work of the reference on all tiles."""
    return lambda: [views(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in tiles] and None


def of_backend(backend: Any, recipe: AugmentRecipe, tiles: Sequence[bytes]) -> Callable[[], None]:
    """Return the work of a backend on all tiles, the drawing of the plan included."""
    out = [np.empty((kind.count, len(tiles), kind.view_px, kind.view_px, 3), np.uint8) for kind in recipe.kinds]

    def work() -> None:
        plan = draw_plan(recipe, 0, np.arange(len(tiles)), num_patches=196)
        for index, jpeg in enumerate(tiles):
            backend.augment(backend.decode(jpeg, name="tile"), recipe, plan, index, out)

    return work


def of_dali(recipe: AugmentRecipe, tiles: Sequence[bytes], device: torch.device, threads: int) -> Callable[[], None]:
    """Return the work of DALI on all tiles as one batch, the drawing of the plan included."""
    from hpcssl.loader import dali

    executor = dali.Dali(recipe, batch=len(tiles), threads=threads, device=device)

    def work() -> None:
        plan = draw_plan(recipe, 0, np.arange(len(tiles)), num_patches=196)
        executor.execute([dali.decode(jpeg, name="tile") for jpeg in tiles], plan)

    return work


def simd_rate(folder: Path, arguments: Sequence[str]) -> float:
    """Return the rate of the `pillow` backend on DINO's recipe with the pillow-simd of a folder, in its own process."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, __file__, *arguments, "--only-pillow"]
    figures = json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert "simd" in figures["module"] or str(folder) in figures["module"], figures
    return float(figures["tiles_per_s"])


def measure(
    tiles: Sequence[bytes], repeats: int, simd: Path | None = None, arguments: Sequence[str] = ()
) -> dict[str, object]:
    """Return the rates and ratios of all backends."""
    dino, mae = dino_augment(), mae_augment()
    works = {
        "dino_reference": of_reference(dino_reference(), tiles),
        "dino_pillow": of_backend(pillow, dino, tiles),
        "dino_cpu": of_backend(cpu, dino, tiles),
        "mae_reference": of_reference(mae_reference(), tiles),
        "mae_pillow": of_backend(pillow, mae, tiles),
        "mae_cpu": of_backend(cpu, mae, tiles),
        "decode_only": lambda: [cpu.decode(jpeg, name="tile") for jpeg in tiles] and None,
    }
    if importlib.util.find_spec("nvidia.dali"):
        works["dino_dali_cpu"] = of_dali(dino, tiles, torch.device("cpu"), 1)
        works["mae_dali_cpu"] = of_dali(mae, tiles, torch.device("cpu"), 1)

    def take() -> dict[str, float]:
        rates = {name: len(tiles) / seconds(work) for name, work in works.items()}
        return rates | ({"dino_pillow_simd": simd_rate(simd, arguments)} if simd else {})

    rates = repeated(take, repeats)
    figures: dict[str, object] = {f"{name}_tiles_per_s": median(values) for name, values in rates.items()}
    pairs = [("dino_cpu", "dino_reference"), ("dino_pillow", "dino_reference"), ("mae_cpu", "mae_reference")]
    pairs += [(f"{name}_dali_cpu", f"{name}_reference") for name in ("dino", "mae") if f"{name}_dali_cpu" in works]
    for name, over in pairs:
        figures |= with_spread(f"{name}_vs_reference", ratios(rates[name], rates[over]))
    if simd:
        figures |= with_spread("pillow_simd_vs_pillow", ratios(rates["dino_pillow_simd"], rates["dino_pillow"]))
    else:
        figures |= {"pillow_simd_vs_pillow": None, "pillow_simd_vs_pillow_reason": "no --simd FOLDER was given"}
    if torch.cuda.is_available() and "dino_dali_cpu" in works:
        threads = len(os.sched_getaffinity(0))
        many = [tiles[i % len(tiles)] for i in range(512)]
        work = of_dali(dino, many, torch.device("cuda", 0), threads)
        rows = repeated(lambda: {"dali_gpu": len(many) / seconds(work)}, repeats, warm_ups=2)  # it compiles first
        figures["dali_gpu_tiles_per_s"] = median(rows["dali_gpu"])
        figures["device"] = torch.cuda.get_device_name(0)
    return {**figures, "tiles": len(tiles), "repeats": repeats, **machine("pillow", "torch", "numpy")}


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
    parser = options(__doc__, tiles=Path, num=64, repeats=5, simd=None)
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
        work = of_backend(pillow, dino_augment(), tiles)
        work()
        print(json.dumps({"tiles_per_s": len(tiles) / seconds(work), "module": PIL.__file__}))
    else:
        figures = measure(tiles, args.repeats, args.simd, sys.argv[1:])
        figures["tiles_passed_over"] = len(files) - len(tiles)
        if "dali_gpu_tiles_per_s" in figures:  # in a process of its own, with all cores
            command = [sys.executable, str(Path(__file__).with_name("bench_fed.py")), "--tiles", str(args.tiles)]
            environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
            fed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            figures["fed_vs_synthetic"] = json.loads(fed.stdout.splitlines()[-1])["fed_vs_synthetic"]
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
