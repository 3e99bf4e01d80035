"""One slide's features: HDF5 in the layout that CLAM and TRIDENT write, and so do we (`features` N × D, `coords`
N × 2); a tensor saved by PyTorch; or an array saved by numpy.

Shapes: N tiles, D feature size.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from hpcssl.core.atomic import atomic_file
from hpcssl.core.errors import FeatureError

SUFFIX, TENSOR, ARRAY = ".h5", ".pt", ".npy"
_KINDS = {SUFFIX: "HDF5", TENSOR: "a tensor", ARRAY: "a numpy array"}
SUFFIXES = tuple(_KINDS)


def write_slide(path: Path, features_ND: NDArray[np.floating], coords_N2: NDArray[np.integer]) -> None:
    """Write one slide's file, whole or not at all; float16 stays float16, all else becomes float32.

    FeatureError for no tiles, coordinates of another number, or a value that is not finite.
    """
    features_ND, coords_N2 = np.asarray(features_ND), np.asarray(coords_N2)
    _check(path, features_ND)
    if coords_N2.shape != (len(features_ND), 2):
        raise FeatureError(
            f"{path}: coords of shape {coords_N2.shape}; expected {(len(features_ND), 2)}, one row a tile"
        )
    dtype = np.float16 if features_ND.dtype == np.float16 else np.float32
    with atomic_file(path) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("features", data=features_ND.astype(dtype))
        file.create_dataset("coords", data=coords_N2.astype(np.int64))


def read_slide(path: Path, dim: int | None = None) -> NDArray[np.float32]:
    """Return one slide's features, float32 (N, D); a leading axis of one, which some published sets have, is dropped.

    A tensor's file is read without unpickling code. FeatureError for a missing, truncated or foreign file, no tiles,
    another feature size than `dim`, or a value that is not finite.
    """
    features = _read(path)
    if features.ndim == 3 and features.shape[0] == 1:
        features = features[0]
    _check(path, features)
    if dim is not None and features.shape[1] != dim:
        raise FeatureError(
            f"{path}: features of size {features.shape[1]}; expected {dim} as in the rest of the folder; embed it again"
        )
    return features.astype(np.float32)


def read_coords(path: Path) -> NDArray[np.int64]:
    """Return the level-0 pixel coordinates of one slide's tiles, int64 (N, 2); FeatureError as for `read_slide`."""
    if path.suffix != SUFFIX:
        raise FeatureError(f"{path}: holds no coordinates; expected an HDF5 file ({SUFFIX}) with coords")
    return _read(path, "coords").reshape(-1, 2).astype(np.int64)


def _read(path: Path, dataset: str = "features") -> NDArray:
    """Return what a file holds, in the precision that it is in; of an HDF5 file, one dataset."""
    if not path.is_file():
        raise FeatureError(f"{path}: no such feature file; embed this slide first")
    try:
        if path.suffix == ARRAY:
            return np.asarray(np.load(path, allow_pickle=False))
        if path.suffix == SUFFIX:
            with h5py.File(path, "r") as file:
                if dataset not in file:
                    raise FeatureError(f"{path}: no dataset {dataset}; it has {', '.join(file) or 'none'}")
                return np.asarray(file[dataset][()])
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FeatureError(
            f"{path}: truncated or not {_KINDS[path.suffix]} ({reason}); delete it and embed this slide again"
        ) from None
    if not isinstance(tensor, torch.Tensor):
        raise FeatureError(f"{path}: holds {type(tensor).__name__}; expected a tensor, tiles × size")
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()


def _check(path: Path, features: NDArray) -> None:
    if features.ndim != 2 or features.dtype.kind != "f":
        raise FeatureError(
            f"{path}: features of shape {features.shape}, {features.dtype}; expected floats, tiles × size"
        )
    if not features.size:
        raise FeatureError(f"{path}: no tiles; leave the slide out")
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        raise FeatureError(f"{path}: not finite (NaN or infinite) in {bad.sum()} of {len(bad)} tiles; embed it again")
