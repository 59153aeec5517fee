"""Data for the demo, with no download: photographs that come with scikit-image, and dead leaves.

Training and validation share no scene: the two views of the motorcycle, one scene, are both for training.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import skimage.data
from basicsr.utils.matlab_functions import imresize
from tqdm import tqdm

from rwkvir_data.dead_leaves import dead_leaves
from rwkvir_data.lmdb_pack import PackedPicture, encode, write_lmdb

TRAIN_PHOTOS = (
    "brick.png camera.png coins.png grass.png gravel.png hubble_deep_field.jpg ihc.png motorcycle_left.png "
    "motorcycle_right.png retina.jpg"
).split()
VAL_PHOTOS = "astronaut.png chelsea.png coffee.png rocket.jpg".split()
LEAVES_SIDE = 480
MAX_TILE = 480  # longest side of a training picture, so that decoding one for a crop is cheap
RECIPE_VERSION = 1  # to be raised when the same arguments come to mean other pictures


Draw = Callable[[], np.ndarray]  # makes a GT picture: (H, W, 3) uint8, RGB


def build_demo_data(
    root: str | Path, scales: tuple[int, ...] = (2, 4), leaves: int = 48, seed: int = 0, workers: int = 2
) -> Path:
    """Write train_GT.lmdb, train_LQ_x<scale>.lmdb, val_GT.lmdb and val_LQ_x<scale>.lmdb into `root`, which is returned.

    LQ is GT reduced as by MATLAB's bicubic imresize. A complete set of the same arguments is left as it is; anything
    else under these names is replaced. `leaves` is the number of dead-leaves pictures, drawn from `seed`.

    Raises:
        FileNotFoundError: scikit-image came without one of the photographs.
        OSError: the disk is full.
    """
    root = Path(root)
    recipe = json.dumps({"version": RECIPE_VERSION, "scales": scales, "leaves": leaves, "seed": seed})
    recipe_file = root / "recipe.json"  # written last: where it stands, the set is complete
    kinds = ["GT", *(f"LQ_x{scale}" for scale in scales)]
    packed: dict[str, list[PackedPicture]] = {
        f"{phase}_{kind}.lmdb": [] for phase in ("train", "val") for kind in kinds
    }
    is_whole = all((root / name).is_dir() for name in packed)
    if is_whole and recipe_file.is_file() and recipe_file.read_text() == recipe:
        return root

    recipe_file.unlink(missing_ok=True)
    print(f"Building the demo's data in {root}, once ...", flush=True)
    draws = _draws(leaves, seed)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:  # torch's threads do not survive a fork
        made = pool.map(partial(_make, scales=scales), *zip(*draws, strict=True))
        for pictures in tqdm(made, total=len(draws), unit="picture", disable=None):
            for name, picture in pictures.items():
                packed[name].append(picture)
    for name, contents in packed.items():
        shutil.rmtree(root / name, ignore_errors=True)
        write_lmdb(root / name, contents)
    recipe_file.write_text(recipe)
    return root


def _draws(leaves: int, seed: int) -> list[tuple[str, str, Draw]]:
    """(phase, key, how to draw) of every picture."""
    whole = [("val", Path(file).stem, partial(_photo, file)) for file in VAL_PHOTOS]
    tiles = [("train", key, tile) for file in TRAIN_PHOTOS for key, tile in _tiles(file)]
    synthetic = [
        ("train", f"leaves_{i:04d}", partial(dead_leaves, seed, i, LEAVES_SIDE, LEAVES_SIDE)) for i in range(leaves)
    ]
    return whole + tiles + synthetic


def _tiles(file: str) -> Iterator[tuple[str, Draw]]:
    """A photograph cut into equal tiles, as few as keep their sides up to MAX_TILE: (key, how to draw)."""
    shape = _photo(file).shape[:2]
    rows, columns = (_spans(length) for length in shape)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            yield f"{Path(file).stem}_{i}{j}", partial(_photo, file, row, column)


def _spans(length: int) -> list[slice]:
    n = math.ceil(length / MAX_TILE)
    return [slice(i * length // n, (i + 1) * length // n) for i in range(n)]


def _photo(file: str, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
    """A photograph of scikit-image's, or a tile of it: (H, W, 3) uint8, RGB; grey ones have three equal channels."""
    path = Path(skimage.data.__file__).with_name(file)
    picture = cv2.imread(str(path))
    if picture is None:
        raise FileNotFoundError(f"scikit-image comes without {path}; install it again: pip install scikit-image.")
    return picture[rows, columns, ::-1]


def _make(phase: str, key: str, draw: Draw, scales: tuple[int, ...]) -> dict[str, PackedPicture]:
    """Draw GT, reduce it to each scale's LQ, and compress them: LMDB's name -> picture."""
    gt, step = draw(), math.lcm(*scales)
    gt = np.ascontiguousarray(gt[: gt.shape[0] // step * step, : gt.shape[1] // step * step])
    pictures = {f"{phase}_GT.lmdb": encode(key, gt)}
    for scale in scales:
        pictures[f"{phase}_LQ_x{scale}.lmdb"] = encode(key, bicubic(gt, 1 / scale))
    return pictures


def bicubic(picture: np.ndarray, factor: float) -> np.ndarray:
    """MATLAB's imresize, with anti-aliasing when it reduces: (H, W, 3) uint8 to (H * factor, W * factor, 3) uint8."""
    resized = imresize(np.float32(picture) / 255, factor)
    return np.round(np.clip(resized, 0, 1) * 255).astype(np.uint8)
