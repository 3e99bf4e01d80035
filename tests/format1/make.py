"""Writes the files of this folder, by the command line alone: `python tests/format1/make.py NEW-FOLDER`.

They are kept as commit c19bdf5 wrote them, for `tests/test_format1.py`: later versions shall read them and go on with
them, so nothing here is ever written anew. /HERE stands for the path of the folder, "node" for the machine's name.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image
from safetensors.numpy import load_file

MAIN = "import sys; from hpcssl.cli.main import main; sys.exit(main())"
WRITTEN = 1_700_000_000  # results tell when features were written
BENCH = {"store": "loose", "splits": ["splits/label.csv"], "profile": "local", "preset": "mccv-demo", "replicas": 1}


def draw(here: Path) -> None:
    """Write tiles of 2 organs × 5 slides × 2 or 3 tiles, and a whole slide."""
    rows = []
    for number in range(10):
        slide = here / "tiles" / ("breast", "lung")[number % 2] / f"s{number}"
        slide.mkdir(parents=True)
        random = np.random.default_rng(number)
        for tile in range(2 + number % 2):
            pixels = random.integers(60, 230, (5, 5, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
            Image.fromarray(pixels).save(slide / f"{tile}_x{40 * tile}_y0.jpg", quality=90)
        rows.append(f"s{number},{slide.parent.name},p{number},{'ab'[number // 2 % 2]},{2 + number % 2}\n")
    (here / "tiles" / "slides.csv").write_text("slide_id,organ,patient_id,label,num_tiles\n" + "".join(rows))
    y, x = np.mgrid[:320, :384]
    colours = np.random.default_rng(0).integers((150, 60, 130), (230, 140, 200), (40, 48, 3)).repeat(8, 0).repeat(8, 1)
    pixels = np.where(((y - 150) ** 2 + (x - 180) ** 2 < 120**2)[..., None], colours, 244).astype(np.uint8)
    (here / "slides" / "skin").mkdir(parents=True)
    about = {"resolution": (20_000, 20_000), "resolutionunit": 3, "tile": (128, 128), "compression": "jpeg"}
    tifffile.imwrite(here / "slides" / "skin" / "w0.tif", pixels, photometric="rgb", **about)


def digest_tensors(file: Path) -> str:
    """Return the digest of the tensors of a file, by name."""
    tensors = sorted(load_file(file).items())
    parts = (f"{name} {tensor.dtype} {tensor.shape} ".encode() + tensor.tobytes() for name, tensor in tensors)
    return hashlib.sha256(b"".join(parts)).hexdigest()


def make(here: Path) -> None:
    """Write everything into a new folder."""
    draw(here)
    for recipe in ("dino", "mae"):
        shutil.copy(Path(__file__).with_name(f"{recipe}.yaml"), here)
    (here / "squeue").write_text("#!/bin/sh\n")
    (here / "squeue").chmod(0o755)  # an empty queue: the benchmark of a run asks for one
    path = f"{here}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": path}

    def hpcssl(line: str, *, code: int = 0) -> None:
        done = subprocess.run([sys.executable, "-c", MAIN, *line.split()], cwd=here, env=environment, check=False)
        assert done.returncode == code, line

    sizes = "--set num_pseudo_epochs=3 --set positions_per_pseudo_epoch=40 --set max_repeats=200"
    hpcssl("store build tiles --out loose")
    hpcssl("store build tiles --out packed --pack")
    hpcssl(f"schedule build --store packed --spec demo --out schedule --set num_groups=2 {sizes}")
    # a place that moves with the folder, as a store keeps whole paths of slides
    hpcssl("store build /proc/self/cwd/slides --out online --online --mpp 0.5,1.0 --tile-px 32 --threads 1")
    hpcssl(f"schedule build --store online --spec demo --out online-schedule --set num_groups=1 {sizes}")
    hpcssl("splits --slides tiles/slides.csv --target label --num 2 --out splits/label.csv")
    (here / "bench.yaml").write_text(json.dumps(BENCH))
    pretrain = "--store packed --schedule schedule --cluster none"
    hpcssl(f"pretrain dino.yaml {pretrain} --out dino --set stop_after=1.5 --benchmark-with bench.yaml")
    hpcssl(f"pretrain mae.yaml {pretrain} --out mae --set stop_after=1.5")
    (here / "bench.yaml").unlink()
    hpcssl("embed --store loose --encoder dino --out features/dino --threads 1")
    hpcssl("embed --store online --encoder dino --out features/online --threads 1")
    for step in (0, 3):
        hpcssl(f"embed --store loose --encoder dino@{step} --out dino/benchmark/features/step-{step:09d} --threads 1")
    for file in here.rglob("*.h5"):
        os.utime(file, (WRITTEN, WRITTEN))
    mccv = "--splits splits/label.csv --preset mccv-demo --threads 1"
    hpcssl(f"mccv --features features/dino {mccv} --out results")
    steps = "dino/benchmark/features/step-000000000 dino/benchmark/features/step-000000003"
    hpcssl(f"mccv --features {steps} {mccv} --replicas 1 --out dino/benchmark/results")
    hpcssl("report results dino --out report")
    for table in ("curves_label", "summary", "times", "training"):
        shutil.copy(here / "report" / f"{table}.csv", here / "expected")
    expected = {"cpu_capability": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}
    for recipe in ("dino", "mae"):
        hpcssl(f"export {recipe} --out report/{recipe}.safetensors")
        went_on = here / "report" / recipe
        shutil.copytree(here / recipe, went_on, ignore=shutil.ignore_patterns("benchmark"))
        hpcssl(f"pretrain {recipe}.yaml {pretrain} --out {went_on}")
        hpcssl(f"export {went_on} --out expected/{recipe}.safetensors")
        expected[recipe] = {
            "exported": digest_tensors(here / "report" / f"{recipe}.safetensors"),
            "loss": [json.loads(line)["loss"].hex() for line in (went_on / "metrics.jsonl").read_text().splitlines()],
            "tensors": digest_tensors(went_on / "checkpoints" / "step-000000010.safetensors"),
        }
    (here / "expected" / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def tidy(here: Path) -> None:
    """Remove what is large and not read, and this machine's paths and name."""
    for folder in ("report", "dino/tensorboard", "mae/tensorboard"):
        shutil.rmtree(here / folder)
    (here / "mae" / "checkpoints" / "step-000000003.safetensors").unlink()
    for file in (here / "squeue", *here.rglob(".*"), *here.glob("expected/*.md")):
        file.unlink()
    for file in here.rglob("*"):
        if file.suffix in ("", ".json", ".jsonl", ".yaml") and file.is_file():
            text = file.read_text().replace(str(here), "/HERE").replace(f'"{platform.node()}"', '"node"')
            file.write_text(text)


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    (folder / "expected").mkdir(parents=True)
    make(folder)
    tidy(folder)
