"""Small real inputs for tests: JPEG tiles, a store, a schedule, recipes; all of them are made in well under a second.

Tests reach this module by the fixture `small`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

GLOBAL_BATCH = 12  # 1, 2, 3, 4 and 6 ranks can share it
POSITIONS = 40  # of a pseudo-epoch: no multiple of the batch, so steps cross its boundaries
PSEUDO_EPOCHS = 4
STEPS = PSEUDO_EPOCHS * POSITIONS // GLOBAL_BATCH
TILE_PX = 48
# columns of metrics that say when a step was done and at what cost, not what came of it
TIMES = ["tiles_per_s", "read_s", "decode_s", "augment_s", "read_wait_s", "memory_gib", "time"]


@dataclass(frozen=True)
class Data:
    """Where tiles, store and schedule are."""

    tiles: Path
    store_path: Path
    schedule_path: Path

    @property
    def store(self) -> Any:
        """The opened store."""
        from hpcssl.stores.kinds import open_store

        return open_store(self.store_path)

    @property
    def schedule(self) -> Any:
        """The opened schedule."""
        from hpcssl.schedule.file import Schedule

        return Schedule.open(self.schedule_path)

    @property
    def identity(self) -> dict[str, str]:
        """What a run folder says of its data."""
        return {
            "store": str(self.store_path),
            "store_digest": self.store.digest,
            "schedule": str(self.schedule_path),
            "schedule_digest": self.schedule.digest,
        }


def jpeg(seed: int, px: int = TILE_PX, quality: int = 92) -> bytes:
    """Return an image of blocks in colours all over the gamut, with noise."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (6, 6, 3)).repeat(-(-px // 6), 0).repeat(-(-px // 6), 1)[:px, :px]
    pixels = np.clip(blocks + rng.normal(0, 12, blocks.shape), 0, 255).astype(np.uint8)
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def make_tiles(folder: Path, *, slides: int = 3, tiles: int = 4) -> Path:
    """Write two organs of so many slides; slide s has `tiles` + s tiles. The names of one organ's hold coordinates."""
    for o, organ in enumerate(("breast", "lung")):
        for s in range(slides):
            slide = folder / organ / f"{organ}-{s}"
            slide.mkdir(parents=True)
            for t in range(tiles + s):
                name = f"tile_x{t * 224}_y{s * 112}.jpg" if organ == "lung" else f"tile-{t}.jpg"
                (slide / name).write_bytes(jpeg(1000 * o + 100 * s + t))
    return folder


def make_data(folder: Path, *, pseudo_epochs: int = PSEUDO_EPOCHS, positions: int = POSITIONS, seed: int = 0) -> Data:
    """Write tiles, and build their store and schedule."""
    from hpcssl.schedule.build import build_schedule
    from hpcssl.schedule.spec import ScheduleSpec
    from hpcssl.stores.scan import build_store

    data = Data(make_tiles(folder / "tiles"), folder / "store", folder / "schedule")
    store = build_store(data.tiles, data.store_path)
    spec = ScheduleSpec(
        seed=seed, num_pseudo_epochs=pseudo_epochs, positions_per_pseudo_epoch=positions, num_groups=2, max_repeats=200
    )
    build_schedule(spec, store.slides, data.schedule_path)
    return data


def dino_recipe(**changes: Any) -> Any:
    """Return a DINO recipe of two blocks on 32 and 16 px, drop-path on."""
    from hpcssl.models.encoder import EncoderConfig
    from hpcssl.models.heads import DinoHeadConfig
    from hpcssl.objectives.dino.dino_objective import DinoConfig
    from hpcssl.plan.recipe import AugmentRecipe, ViewRecipe
    from hpcssl.train.pretrain_config import OptimConfig, PretrainConfig, TrainConfig

    colour = {"jitter": 0.8, "grey": 0.2}
    recipe = PretrainConfig(
        objective=DinoConfig(head=DinoHeadConfig(out_dim=64, hidden_dim=32, bottleneck_dim=16), momentum=0.9),
        global_batch=GLOBAL_BATCH,
        encoder=EncoderConfig(
            name="vit_tiny_patch16_224", image_px=32, patch_px=8, embed_dim=24, depth=2, num_heads=2, drop_path=0.3
        ),
        augment=AugmentRecipe(
            global_views=ViewRecipe(
                count=2, view_px=32, scale=(0.4, 1.0), blur=(1.0, 0.1), solarize=(0.0, 0.2), **colour
            ),
            local_views=ViewRecipe(count=2, view_px=16, scale=(0.1, 0.4), blur=(0.5, 0.5), **colour),
        ),
        optim=OptimConfig(lr_per_256=0.005, warmup_pseudo_epochs=1, clip=1.0),
        train=TrainConfig(threads=1),
    )
    return replace(recipe, **changes)


def mae_recipe(**changes: Any) -> Any:
    """Return an MAE recipe of two blocks and one decoder block on 32 px."""
    from hpcssl.models.decoder import MaeDecoderConfig
    from hpcssl.objectives.mae.mae_objective import MaeConfig
    from hpcssl.plan.recipe import AugmentRecipe, ViewRecipe
    from hpcssl.train.pretrain_config import OptimConfig

    dino = dino_recipe()
    recipe = replace(
        dino,
        objective=MaeConfig(decoder=MaeDecoderConfig(embed_dim=16, depth=1, num_heads=2)),
        encoder=replace(dino.encoder, drop_path=0.0),
        augment=AugmentRecipe(global_views=ViewRecipe(count=1, view_px=32, scale=(0.2, 1.0)), mask_ratio=0.75),
        optim=OptimConfig(lr_per_256=0.02, final_lr=0.0, weight_decay=0.05, final_weight_decay=0.05, betas=(0.9, 0.95)),
    )
    return replace(recipe, **changes)


RECIPES: dict[str, Callable[..., Any]] = {"dino": dino_recipe, "mae": mae_recipe}


def make_run(run: Path, data: Data, recipe: Any, **digests: str) -> Path:
    """Prepare a run folder as `hpcssl pretrain` does; `digests` are of other data than store and schedule."""
    from hpcssl.runs.run_folder import prepare_run
    from hpcssl.train.pretrain_config import Timeline

    prepare_run(run, recipe, data={**data.identity, **digests}, derived=Timeline(recipe, data.schedule).derived())
    return run


def make_trained_run(run: Path, data: Data, recipe: Any) -> Path:
    """Prepare a run with checkpoints of steps 0 and 7; the weights of 7 are moved by hand, each tensor otherwise."""
    import torch

    from hpcssl.runs.checkpoint import save_checkpoint
    from hpcssl.train.state import TrainState

    make_run(run, data, recipe)
    state = TrainState(recipe, torch.device("cpu"))
    save_checkpoint(run, 0, *state.to_checkpoint())
    state.step, generator = 7, torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in state.objective.module.state_dict().values():
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
    save_checkpoint(run, 7, *state.to_checkpoint())
    return run


class Claim:
    """A generation that becomes stale on request."""

    number, stale = 1, False

    def is_stale(self) -> bool:
        return self.stale


def train_here(
    run: Path,
    recipe: Any,
    data: Data,
    *,
    collectives: Any = None,
    claim: Any = None,
    asked_to_stop: Any = lambda: False,
) -> list[str]:
    """Train a run in this process to its end, as rank 0 (a new `Claim`) or as another (False); returns what it said."""
    import torch

    from hpcssl.train.loop import Surroundings, train
    from hpcssl.train.reduce import Collectives

    said: list[str] = []
    surroundings = Surroundings(
        generation=Claim() if claim is None else claim or None,
        asked_to_stop=asked_to_stop,
        say=said.append,
        collectives=collectives or Collectives(),
    )
    cpu = torch.device("cpu")
    train(run, recipe, store=data.store, schedule=data.schedule, device=cpu, surroundings=surroundings)
    return said


def request_of(objective: str = "dino", start: int = 0, stop: int = STEPS, **changes: Any) -> Any:
    """Return what a rank asks of a stream to train a small recipe, from a step to another."""
    import torch

    from hpcssl.core.world import World
    from hpcssl.train.loop import request_of
    from hpcssl.train.state import TrainState

    recipe = RECIPES[objective]()
    request = request_of(TrainState(recipe, torch.device("cpu")), recipe, stop, World())
    return replace(request, steps=range(start, stop), **changes)


def advance(data: Data, recipe: Any, states: list[Any], stop: int, before: Callable[[Any], None] = id) -> list[Any]:
    """Train states, one a rank, up to a step; return every rank's records. `before` sees the state before each step."""
    import torch

    from hpcssl.core.world import World
    from hpcssl.loader.stream import TileStream
    from hpcssl.train.loop import request_of
    from hpcssl.train.pretrain_config import Timeline
    from hpcssl.train.reduce import Collectives
    from hpcssl.train.step import train_step

    store, schedule = data.store, data.schedule
    schedule.tiles_at(0, schedule.num_positions)  # all files are open before there are threads
    timeline, ranks, cpu = Timeline(recipe, schedule), VirtualRanks(len(states)), torch.device("cpu")

    def work(rank: int) -> list[dict[str, float]]:
        world, state, records = World(rank=rank, size=len(states)), states[rank], []
        collectives = Collectives(world=world, all_reduce_sum=ranks.all_reduce_sum(rank))
        for batch in TileStream(store, schedule, request_of(state, recipe, stop, world), config=recipe.loader):
            before(state)
            records.append(train_step(state, batch, recipe, timeline, collectives, cpu))
        return records

    return ranks.run(work)


def stream_of(store: Any, schedule: Any, *, bad_tiles: Any = None, **more: Any) -> Any:
    """Return a stream of the small recipe's views; `more` are of `request_of`, the rest settings of the loader."""
    from hpcssl.loader.stream import LoaderConfig, TileStream

    request = request_of(
        **{key: more.pop(key) for key in ("objective", "start", "stop", "world", "seed") if key in more}
    )
    return TileStream(store, schedule, request, config=LoaderConfig(**more) if more else None, bad_tiles=bad_tiles)


def write_recipe(path: Path, recipe: Any) -> Path:
    """Write a recipe as the YAML file that a user would."""
    from hpcssl.core.config import dump_yaml, to_mapping

    path.write_text(dump_yaml(to_mapping(recipe)), encoding="utf-8")
    return path


def assert_same_run(run: Path, reference: Path, step: int) -> None:
    """Check that two runs have the same trace and the same bits at their last step."""
    import torch

    from hpcssl.runs.checkpoint import checkpoint_path, load_checkpoint
    from hpcssl.runs.trace import read_metrics

    one, other = (load_checkpoint(checkpoint_path(folder, step))[0] for folder in (run, reference))
    assert one.keys() == other.keys()
    assert not [name for name, tensor in other.items() if not torch.equal(one[name], tensor)]
    assert read_metrics(run).drop(columns=TIMES).equals(read_metrics(reference).drop(columns=TIMES))


class VirtualRanks:
    """An exact sum over the ranks of one process, each in its thread: in rank order, the same result to all."""

    def __init__(self, size: int):
        self._parts: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=60)

    def all_reduce_sum(self, rank: int) -> Callable[[Any], None]:
        """Return the collective of a rank."""

        def reduce(tensor: Any) -> None:
            self._parts[rank] = tensor.clone()
            self._barrier.wait()
            total = self._parts[0].clone()
            for part in self._parts[1:]:
                total += part
            self._barrier.wait()  # nobody may overwrite its part before all have read it
            tensor.copy_(total)

        return reduce

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """Return what every rank's work gives; the first error of a rank ends all."""
        errors: list[BaseException] = []

        def one(rank: int) -> Any:
            threading.current_thread().name = f"rank {rank}"
            try:
                return work(rank)
            except BaseException as error:  # noqa: BLE001 - told below
                errors.append(error)
                self._barrier.abort()

        with ThreadPoolExecutor(len(self._parts)) as pool:
            results = list(pool.map(one, range(len(self._parts))))
        if errors:
            raise errors[0]
        return results


def in_a_fork(work: Callable[[], object], *, kill_after: float | None = None) -> int:
    """Run work in a forked process, killed after so many seconds; returns its exit code, or minus the signal's number.

    PyTorch computes in one thread there: more stand still for ever where the process that forked had used more.
    """
    child = os.fork()
    if child == 0:
        try:
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(1)
            work()
        finally:
            os._exit(0)
    number = signal.SIGABRT if kill_after is None else signal.SIGKILL  # pytest tells where, if it hangs
    timer = threading.Timer(60 if kill_after is None else kill_after, os.kill, (child, number))
    timer.start()
    _, status = os.waitpid(child, 0)
    timer.cancel()
    timer.join()
    code = os.waitstatus_to_exitcode(status)
    assert code != -signal.SIGABRT, "the forked process stood still for a minute; stderr tells where"
    return code


def wait_until(happened: Callable[[], Any], seconds: float, what: str) -> None:
    """Poll until something is true; AssertionError after so many seconds."""
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail where a block takes longer."""
    begun = time.monotonic()
    yield
    taken = time.monotonic() - begun
    assert taken < seconds, f"took {taken:.1f} s, expected under {seconds:g} s"


def descendants(pid: int) -> list[int]:
    """Return the processes below one, from /proc; zombies are gone already."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, _, rest = stat.read_text().rpartition(")")
        except OSError:  # it ended meanwhile
            continue
        state, parent = rest.split()[:2]
        if state != "Z":
            parents[int(stat.parent.name)] = int(parent)
    below = [pid]
    for pid in below:  # grows meanwhile
        below += [child for child, parent in parents.items() if parent == pid]
    return below[1:]


def ranks_below(pid: int) -> list[int]:
    """Return the processes below one that submitit runs ranks in, rank 0 first."""
    found = {}
    for child in descendants(pid):
        with contextlib.suppress(OSError):
            if b"submitit.core._submit" in Path(f"/proc/{child}/cmdline").read_bytes():
                environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                rank = next(e for e in environment if e.startswith(b"SUBMITIT_LOCAL_GLOBALID="))
                found[int(rank.partition(b"=")[2])] = child
    return [found[rank] for rank in sorted(found)]


def alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_all(pids: list[int]) -> None:
    """End processes at once."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def commandline(*arguments: object) -> list[str]:
    """Return how `hpcssl …` is run by this interpreter."""
    return [sys.executable, "-m", "hpcssl.cli.main", *map(str, arguments)]


def environment() -> dict[str, str]:
    """Return the environment of a subprocess: one thread, no GPU."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
