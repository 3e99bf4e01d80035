"""A folder of feature files and what made them (`features.json`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hpcssl.core.atomic import digest_bytes, write_atomic
from hpcssl.core.errors import FeatureError
from hpcssl.features.feature_files import SUFFIXES, read_slide

INDEX_NAME = "features.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """The features of many slides by one encoder."""

    folder: Path
    """Where they were looked for: a folder, or a table of tensors."""
    encoder: str
    checkpoint: str
    """Step of the run, "0" untrained, "" for a fixed model."""
    dim: int
    paths: Mapping[str, Path]
    """Slide id to file, sorted."""
    about: dict[str, Any] = field(default_factory=dict)
    """Further keys of features.json."""

    @classmethod
    def open(cls, folder: Path) -> FeatureSet:
        """Open features as users have them.

        A folder of .h5, .pt or .npy files named by slide; without features.json (CLAM's and TRIDENT's folders) its name
        is the encoder. Or a table like the one that Campanella et al. publish, `slide_data.csv@ENCODER`, with columns
        slide, tensor_root and tensor_name: the tensor of a slide is tensor_root/ENCODER/tensor_name.

        FeatureError if there is no such folder, no feature file in it, or its features.json cannot be used.
        """
        if ".csv" in folder.name and not folder.is_dir():
            return cls._of_table(folder)
        if not folder.is_dir():
            raise FeatureError(f"{folder}: no such folder of features")
        paths = _files(folder)
        if (folder / INDEX_NAME).exists():
            about = _read_index(folder / INDEX_NAME)
        else:
            about = {"encoder": folder.resolve().name, "checkpoint": "", "dim": _dim(paths)}
        known = {key: about.pop(key) for key in ("encoder", "checkpoint", "dim")}
        return cls(folder=folder, paths=paths, about=about, **known)

    @classmethod
    def _of_table(cls, where: Path) -> FeatureSet:
        """Open `slide_data.csv@ENCODER`; a tensor_root that is relative starts at the table's folder."""
        name, _, encoder = where.name.partition("@")
        table = where.with_name(name)
        try:
            frame = pd.read_csv(table, dtype=str, keep_default_na=False)
        except FileNotFoundError:
            raise FeatureError(f"{table}: no such table of tensors") from None
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
            raise FeatureError(f"{table}: not a table ({' '.join(str(error).split())})") from None
        lacking = [column for column in ("slide", "tensor_root", "tensor_name") if column not in frame.columns]
        if lacking:
            raise FeatureError(f"{table}: no column {lacking[0]}; expected slide, tensor_root and tensor_name")
        paths = {
            row.slide: table.parent / row.tensor_root / encoder / row.tensor_name
            for row in frame.sort_values("slide").itertuples()
        }
        foreign = next((path for path in paths.values() if path.suffix not in SUFFIXES), None)
        if foreign:
            raise FeatureError(f"{table}: tensor_name {foreign.name}: expected one ending in {', '.join(SUFFIXES)}")
        present = {slide: path for slide, path in paths.items() if path.is_file()}
        if not present:
            example = next(iter(paths.values()), "none")
            raise FeatureError(f"{where}: none of its {len(paths)} tensors is there (looked for {example})")
        return cls(folder=where, encoder=encoder or table.stem, checkpoint="", dim=_dim(present), paths=present)

    @property
    def slides(self) -> tuple[str, ...]:
        """Slide ids that have a file, sorted."""
        return tuple(self.paths)

    def load(self, slide_id: str) -> NDArray[np.float32]:
        """Return one slide's features, float32 (N, D); FeatureError says what is wrong with a file."""
        return read_slide(self.paths[slide_id], self.dim)

    def digest(self) -> str:
        """Return a digest of what made the features and of the files' names and sizes, without reading them."""
        listing = "".join(f"{slide}\t{path.stat().st_size}\n" for slide, path in self.paths.items())
        about = json.dumps([self.encoder, self.checkpoint, self.dim, self.about], sort_keys=True)
        return digest_bytes(f"{about}\n{listing}".encode())

    def written(self) -> str:
        """Return when the newest file was written, and a digest of when each was: embedded again, it is another.

        A copy that keeps the times (cp -p, rsync -t) is the same.
        """
        times = {slide: path.stat().st_mtime_ns for slide, path in self.paths.items()}
        newest = datetime.fromtimestamp(max(times.values()) / 1e9, timezone.utc).isoformat(" ", "seconds")
        listing = "".join(f"{slide}\t{time}\n" for slide, time in times.items())
        return f"{newest} ({digest_bytes(listing.encode())[:8]})"


def write_index(folder: Path, *, encoder: str, checkpoint: str, dim: int, **more: Any) -> None:
    """Write features.json, whole or not at all; further keys are carried along."""
    index = {"format": FORMAT, "encoder": encoder, "checkpoint": checkpoint, "dim": dim, **more}
    write_atomic(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")


def _files(folder: Path) -> dict[str, Path]:
    """Return a folder's feature files by slide, all of one kind."""
    kinds = {suffix: sorted(folder.glob(f"[!.]*{suffix}")) for suffix in SUFFIXES}
    suffixes = [suffix for suffix, files in kinds.items() if files]
    if not suffixes:
        below = next((path for suffix in SUFFIXES for path in folder.glob(f"*/*{suffix}")), None)
        hint = f"; name the folder that has them, perhaps {below.parent}" if below else ""
        raise FeatureError(f"{folder}: no feature files ({', '.join(SUFFIXES)}) in it{hint}")
    if len(suffixes) > 1:
        raise FeatureError(f"{folder}: holds {' and '.join(suffixes)} files; expected one kind, one file a slide")
    return dict(sorted((path.stem, path) for path in kinds[suffixes[0]]))


def _dim(paths: Mapping[str, Path]) -> int:
    return read_slide(next(iter(paths.values()))).shape[1]


def _read_index(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FeatureError(f"{path}: not JSON ({error}); delete it and embed again") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        stored = about.get("format") if isinstance(about, dict) else type(about).__name__
        raise FeatureError(f"{path}: format {stored!r}; this version reads format {FORMAT}")
    for key, kind in (("encoder", str), ("checkpoint", str), ("dim", int)):
        if not isinstance(about.get(key), kind):
            raise FeatureError(f"{path}: {key} is {about.get(key)!r}; expected {kind.__name__}")
    return about
