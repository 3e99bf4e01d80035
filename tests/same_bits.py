# ruff: noqa: T201
"""Digests of what hpcssl computes, so that a change of its code can be shown to change no number.

    python tests/same_bits.py --work DIR --out digests.json         computes, prints and writes the digests
    python tests/same_bits.py --work DIR --against digests.json     computes them anew and compares
    python tests/same_bits.py --work DIR --against REV              compares with a revision of git, on this machine

A comparison ends with exit code 0 only where all are the same. Floats depend on the processor and on the versions of
libraries: compare files of one machine, or a revision. Everything is asked for by the command line, in one thread, from
inputs that are drawn here. Digests are of contents: names of files, absolute paths, times and messages are no part.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import tifffile
from numpy.typing import ArrayLike
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
MAIN = "import sys; from hpcssl.cli.main import main; sys.exit(main())"
TIMES = {"tiles_per_s", "read_s", "decode_s", "augment_s", "read_wait_s", "memory_gib", "time"}
RECIPES = ("dino-demo", "dino-vitb16", "dino-vits16", "dino-vits16-opal", "mae-demo", "mae-vitb16", "mae-vitl16-opal")
STEPS = ("stop_after=0.2", "train.threads=1", "train.watch_every_steps=4", "optim.warmup_pseudo_epochs=0.06")
DINO = ("encoder.drop_path=0.2", "dino.freeze_last_layer_pseudo_epochs=0.1", "augment.local_views.blur=[0.5,0.5]")
Command = Callable[..., str]  # runs `hpcssl …` and returns what it prints


def digest(parts: Iterable[bytes | str]) -> str:
    """Return the SHA-256 of some parts and of their lengths."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(f"{len(data)} ".encode() + data)
    return whole.hexdigest()


def digest_array(array: ArrayLike) -> str:
    """Return the digest of an array: type, shape and bytes."""
    array = np.asarray(array)
    return digest([array.dtype.str, str(array.shape), array.tobytes()])


def digest_arrays(folder: Path) -> str:
    """Return the digest of the arrays in a folder, in the order of their names, as a schedule has its pseudo-epochs."""
    return digest(digest_array(np.load(file)) for file in sorted(folder.glob("*.npy")))


def digest_files(folder: Path, pattern: str, read: Callable[[Path], str]) -> str:
    """Return the digest of what is read from the files below a folder, in any order."""
    found = sorted(read(file) for file in folder.rglob(pattern))
    assert found, f"{folder}: no {pattern}"
    return digest(found)


def read_table(file: Path) -> str:
    """Return the digest of a table: its rows as text, sorted, without columns of paths."""
    table = pd.read_parquet(file).astype(str) if file.suffix == ".parquet" else pd.read_csv(file, dtype=str)
    table = table.drop(columns=["path", "file", "imgpath"], errors="ignore").fillna("")
    return digest([*table.columns, *sorted("\t".join(row) for row in table.itertuples(index=False))])


def read_features(file: Path) -> str:
    """Return the digest of a slide's features and coordinates."""
    with h5py.File(file) as slide:
        return digest([file.stem, digest_array(slide["features"][()]), digest_array(slide["coords"][()])])


def digest_tiles(folder: Path) -> str:
    """Return the digest of the names and bytes of the tiles in files below a folder, or in its tar shards."""
    tiles = {str(file.relative_to(folder)): file.read_bytes() for file in folder.glob("*/*/*.jpg")}
    for shard in folder.glob("*.tar"):
        with tarfile.open(shard) as tar:
            tiles |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    return digest(part for name in sorted(tiles) for part in (name, tiles[name]))


def digests_of_store(folder: Path) -> dict[str, str]:
    """Return the digest of a store's index, and those that the store states."""
    header = json.loads((folder / "store.json").read_text())
    files = [file for file in folder.rglob("*") if not file.name.startswith("paths.")]
    arrays = [digest_array(np.load(file)) for file in files if file.suffix == ".npy"]
    texts = [digest([file.read_bytes()]) for file in files if file.suffix == ".bin"]
    stated = " ".join(str(header[key]) for key in ("digest", "slides_digest", "num_slides", "num_tiles"))
    return {"index": digest(sorted([*arrays, *texts, digest_files(folder, "*.parquet", read_table)])), "stated": stated}


def digest_weights(file: Path) -> str:
    """Return the digest of all tensors of a safetensors file, by name: type, shape and bytes."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8:start])
    tensors.pop("__metadata__", None)
    parts = []
    for name, about in sorted(tensors.items()):
        first, last = about["data_offsets"]
        parts += [name, about["dtype"], str(about["shape"]), data[start + first : start + last]]
    return digest(parts)


def digests_of_run(run: Path) -> dict[str, str]:
    """Return the losses of a run as hexadecimal floats, and digests of its other metrics and of its last weights."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [{key: float(value or 0).hex() for key, value in line.items() if key not in TIMES} for line in lines]
    return {
        "loss": " ".join(step["loss"] for step in steps),
        "metrics": digest([json.dumps(step, sort_keys=True) for step in steps]),
        "weights": digest_weights(max(run.rglob("*.safetensors"), key=lambda file: file.name)),
    }


def draw_tiles(folder: Path) -> None:
    """Write JPEG tiles of 2 organs × 10 slides × 4 to 8 tiles, and their slide table with labels."""
    rows = []
    for o, organ in enumerate(("breast", "lung")):
        for s in range(10):
            slide, random = folder / organ / f"{organ}-{s}", np.random.default_rng([o, s])
            slide.mkdir(parents=True)
            for t in range(4 + s % 5):
                blocks = random.integers(60, 230, (16, 16, 3)).repeat(8, 0).repeat(8, 1)
                pixels = (blocks + random.integers(0, 25, blocks.shape)).astype(np.uint8)
                Image.fromarray(pixels).save(slide / f"{t}_x{t * 128}_y{s * 64}.jpg", quality=92)
            rows.append(f"{slide.name},{organ},{organ}-p{s},{'ab'[s % 2]},{4 + s % 5}\n")
    (folder / "slides.csv").write_text("slide_id,organ,patient_id,label,num_tiles\n" + "".join(rows))


def draw_slides(folder: Path) -> None:
    """Write two whole slides, TIFF pyramids of tissue on white glass at 0.5 and 0.31 MPP, and their table."""
    folder.mkdir()
    for number, mpp in enumerate((0.5, 0.31)):
        random = np.random.default_rng(number)
        rows, columns = np.mgrid[:320, : 384 - 32 * number]
        tissue = (rows - 150) ** 2 + (columns - 130 - 40 * number) ** 2 < 110**2
        colours = random.integers((150, 60, 130), (230, 140, 200), (*tissue.shape, 3))
        pixels = np.where(tissue[..., None], colours, 244).repeat(4, 0).repeat(4, 1).astype(np.uint8)
        with tifffile.TiffWriter(folder / f"s{number}.tif") as file:
            for step in (1, 2, 4):
                about = {"subfiletype": 1} if step > 1 else {"subifds": 2}
                about |= {"resolution": (10_000 / (mpp * step),) * 2, "resolutionunit": 3, "tile": (256, 256)}
                file.write(pixels[::step, ::step].copy(), photometric="rgb", compression="jpeg", **about)
    (folder / "slides.csv").write_text("slide_id,organ,path,mpp\ns0,breast,s0.tif,\ns1,lung,s1.tif,\n")


def plans(work: Path, hpcssl: Command) -> dict[str, str]:
    """Return 32 rows of every recipe that ships, with the digest that the command states of the whole plan."""
    found = {}
    for recipe in RECIPES:
        lines = hpcssl("plan", "show", "--positions", "0:32", "--recipe", recipe).splitlines()
        rows = [line for line in lines if line.strip()[:1].isdigit()]
        assert len(rows) >= 32
        found[f"plan/{recipe}/rows"], found[f"plan/{recipe}/stated"] = digest(rows), lines[-1].split()[-1]
    return found


def stores_and_schedules(work: Path, hpcssl: Command) -> dict[str, str]:
    """Draw the inputs; return digests of stores of all kinds, of what is read from them, and of schedules."""
    draw_tiles(work / "tiles")
    draw_slides(work / "slides")
    table = work / "slides" / "slides.csv"
    hpcssl("store", "build", work / "tiles", "--out", work / "loose")
    hpcssl("store", "build", work / "tiles", "--out", work / "packed", "--pack", "--shard-gb", "0.0002")
    hpcssl("tile", table, "--out", work / "cut", "--tile-px", 64, "--threads", 1)
    online = ("--online", "--mpp", "0.5,1.0", "--tile-px", 64, "--threads", 1)
    hpcssl("store", "build", table, "--out", work / "online", *online)
    found = {"inputs/tiles": digest_tiles(work / "tiles"), "packed/tiles": digest_tiles(work / "packed")}
    found |= {"inputs/slides": digest(file.read_bytes() for file in sorted((work / "slides").glob("*.tif")))}
    found |= {"cut/tiles": digest_tiles(work / "cut"), "cut/table": read_table(work / "cut" / "slides.csv")}
    found |= {"cut/pictures": digest_files(work / "cut" / "qc", "*.jpg", lambda file: digest_array(Image.open(file)))}
    sizes = ("--set", "positions_per_pseudo_epoch=64", "--set", "num_pseudo_epochs=2", "--set", "num_groups=1")
    for kind, more in {"loose": (), "packed": (), "cut": sizes, "online": sizes}.items():
        store, schedule = work / kind, work / f"{kind}-schedule"
        found |= {f"{kind}/{name}": value for name, value in digests_of_store(store).items()}
        hpcssl("schedule", "build", "--store", store, "--spec", "demo", "--out", schedule, *more)
        found[f"schedule/demo of {kind}"] = digest_arrays(schedule)
        sheet, data = work / f"{kind}.png", ("--recipe", "dino-demo", "--store", store, "--schedule", schedule)
        hpcssl("plan", "draw", "--positions", "0:12", *data, "--out", sheet)
        found[f"{kind}/sheet"] = digest_array(Image.open(sheet))
    random = np.random.default_rng(0)
    organs = [f"organ {organ}" for organ in random.integers(0, 20, (2, 4000)).min(0)]
    large = {"slide_id": range(4000), "organ": organs, "num_tiles": random.integers(1, 1000, 4000)}
    pd.DataFrame(large).to_csv(work / "large.csv", index=False)
    sizes = ("--set", "positions_per_pseudo_epoch=400000", "--set", "num_pseudo_epochs=10", "--jobs", 1)
    hpcssl("schedule", "build", "--slides", work / "large.csv", "--spec", "opal-3b", "--out", work / "opal", *sizes)
    hpcssl("schedule", "inspect", work / "opal", "--out", work / "inspected")
    found["schedule/opal-3b of 2 million tiles"] = digest_arrays(work / "opal")
    return found | {"schedule/opal-3b inspected": digest_files(work / "inspected", "*.csv", read_table)}


def runs(work: Path, hpcssl: Command) -> dict[str, str]:
    """Return losses and last weights of DINO and MAE at one and two processes; DINO at one stops and goes on."""
    found: dict[str, str] = {}

    def pretrain(recipe: str, store: str, processes: int, *settings: str) -> Path:
        run = work / f"{recipe}-{store}-{processes}"
        command = ("pretrain", recipe, "--store", work / store, "--schedule", work / f"{store}-schedule", "--out", run)
        changes = [part for setting in settings for part in ("--set", setting)]
        hpcssl(*command, "--cluster", "local", "--gpus-per-node", processes, *changes)
        found.update({f"{run.name}/{name}": value for name, value in digests_of_run(run).items()})
        return run

    pretrain("dino-demo", "packed", 1, *STEPS, *DINO, "stop_after=0.1")
    pretrain("dino-demo", "online", 1, *STEPS, "stop_after=2")
    for recipe, settings in {"dino-demo": (*STEPS, *DINO), "mae-demo": STEPS}.items():
        pretrain(recipe, "packed", 2, *settings)
        run = pretrain(recipe, "packed", 1, *settings)
        hpcssl("export", run, "--out", work / f"{recipe}.safetensors")
        found[f"{run.name}/exported"] = digest_weights(work / f"{recipe}.safetensors")
    return found


def benchmarks(work: Path, hpcssl: Command) -> dict[str, str]:
    """Return features of 20 slides, and the tables of two tasks that are measured on them."""
    found, features = {}, [work / "features" / name for name in ("dino-demo", "mae-demo", "online")]
    dino, mae = (work / f"{recipe}-packed-1" for recipe in ("dino-demo", "mae-demo"))
    for out, encoder, store in zip(features, (dino, mae, f"{dino}@0"), ("loose", "packed", "online"), strict=True):
        hpcssl("embed", "--store", work / store, "--encoder", encoder, "--out", out, "--threads", 1)
        found[f"features/{out.name} of {store}"] = digest_files(out, "*.h5", read_features)
    tasks = [work / "splits" / f"{organ}.csv" for organ in ("breast", "lung")]
    for task in tasks:
        drawn = ("--target", "label", "--organ", task.stem, "--num", 3, "--out", task)
        hpcssl("splits", "--slides", work / "tiles" / "slides.csv", *drawn)
    measured = ("--features", *features[:2], "--allow-missing", "--splits")
    heads = ("--head", "gma", "mean", "--preset", "mccv-demo", "--epochs", 4, "--threads", 1)
    hpcssl("mccv", *measured, *tasks, "--out", work / "mccv", *heads)
    hpcssl("knn", *measured, tasks[0], "--out", work / "knn")
    hpcssl("report", work / "mccv", work / "packed-schedule", "--out", work / "report")
    found |= {name: digest_files(work / name, "*.csv", read_table) for name in ("splits", "report")}
    return found | {name: read_table(work / name / "results.csv") for name in ("mccv", "knn")}


def compute(work: Path, tree: Path) -> dict[str, str]:
    """Return the digests of what the hpcssl of a checkout computes in a new folder."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def hpcssl(*arguments: object) -> str:
        command = [sys.executable, "-c", MAIN, *map(str, arguments)]
        done = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"hpcssl {' '.join(command[3:])}\n{done.stdout}{done.stderr}")
        return done.stdout

    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    found = {}
    for part in (plans, stores_and_schedules, runs, benchmarks):
        begun = time.monotonic()
        found |= part(work, hpcssl)
        print(f"{part.__name__}: {time.monotonic() - begun:.0f} s", file=sys.stderr)
    return found


def digests_of_revision(revision: str, work: Path) -> dict[str, str]:
    """Return the digests of what a revision of git computes, from a worktree of its own."""
    tree = work / "revision"
    subprocess.run(["git", "worktree", "add", "--force", "--detach", tree, revision], cwd=ROOT, check=True)
    try:
        return compute(work / "bits", tree)
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)


def main() -> int:
    """Compute, and write or compare."""
    parser = argparse.ArgumentParser(description="Digests of what hpcssl computes.")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="DIR/bits is made anew")
    parser.add_argument("--out", type=Path, metavar="digests.json", help="file to write")
    parser.add_argument("--against", metavar="digests.json|REV", help="what to compare with")
    args = parser.parse_args()
    work, before = args.work.resolve(), None
    if args.against:
        is_file = Path(args.against).is_file()
        before = json.loads(Path(args.against).read_text()) if is_file else digests_of_revision(args.against, work)
    found = compute(work / "bits", ROOT)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    if before is None:
        print(json.dumps(found, indent=1))
    for name in sorted({*before, *found} if before else ()):
        print(f"{'same' if before.get(name) == found.get(name) else 'DIFFERENT':<10} {name}")
    return int(before not in (None, found))


if __name__ == "__main__":
    sys.exit(main())
