"""A folder of feature files and what made them (`features.json`)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcssl.core.atomic import digest_bytes, write_atomic
from hpcssl.core.errors import FeatureError
from hpcssl.features.files import SUFFIX, read_slide

INDEX_NAME = "features.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """The features of many slides by one encoder."""

    folder: Path
    encoder: str
    checkpoint: str
    """Step of the run, "0" untrained, "" for a fixed model."""
    dim: int
    slides: tuple[str, ...]
    """Slide ids that have a file, sorted."""
    about: dict[str, Any] = field(default_factory=dict)
    """Further keys of features.json."""

    @classmethod
    def open(cls, folder: Path) -> FeatureSet:
        """Open a folder; without features.json (CLAM's and TRIDENT's folders) its name is the encoder.

        Raises
        ------
        FeatureError
            If there is no such folder, no feature file in it, or its features.json cannot be used.
        """
        if not folder.is_dir():
            raise FeatureError(f"{folder}: no such folder of features")
        slides = tuple(sorted(path.name[: -len(SUFFIX)] for path in folder.glob(f"[!.]*{SUFFIX}")))
        if not slides:
            below = next(folder.glob(f"*/*{SUFFIX}"), None)
            hint = f"; name the folder that has them, perhaps {below.parent}" if below else ""
            raise FeatureError(f"{folder}: no feature files ({SUFFIX}) in it{hint}")
        if (folder / INDEX_NAME).exists():
            about = _read_index(folder / INDEX_NAME)
        else:
            dim = read_slide(folder / f"{slides[0]}{SUFFIX}").shape[1]
            about = {"encoder": folder.resolve().name, "checkpoint": "", "dim": dim}
        known = {key: about.pop(key) for key in ("encoder", "checkpoint", "dim")}
        return cls(folder=folder, slides=slides, about=about, **known)

    def path(self, slide_id: str) -> Path:
        """Return where a slide's file is."""
        return self.folder / f"{slide_id}{SUFFIX}"

    def load(self, slide_id: str) -> NDArray[np.float32]:
        """Return one slide's features, float32 (N, D); FeatureError says what is wrong with a file."""
        return read_slide(self.path(slide_id), self.dim)

    def digest(self) -> str:
        """Return a digest of what made the features and of the files' names and sizes, without reading them."""
        listing = "".join(f"{slide}\t{self.path(slide).stat().st_size}\n" for slide in self.slides)
        about = json.dumps([self.encoder, self.checkpoint, self.dim, self.about], sort_keys=True)
        return digest_bytes(f"{about}\n{listing}".encode())


def write_index(folder: Path, *, encoder: str, checkpoint: str, dim: int, **more: Any) -> None:
    """Write features.json, whole or not at all; further keys are carried along."""
    index = {"format": FORMAT, "encoder": encoder, "checkpoint": checkpoint, "dim": dim, **more}
    write_atomic(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")


def _read_index(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FeatureError(f"{path}: not JSON ({error}); delete it and embed again") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else type(about).__name__
        raise FeatureError(f"{path}: format {found!r}; this version reads format {FORMAT}")
    for key, kind in (("encoder", str), ("checkpoint", str), ("dim", int)):
        if not isinstance(about.get(key), kind):
            raise FeatureError(f"{path}: {key} is {about.get(key)!r}; expected {kind.__name__}")
    return about
