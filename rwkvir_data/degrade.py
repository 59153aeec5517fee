"""Degraded versions (LQ) of pictures (GT), each named as in file names: x4, noise25, jpeg10 (SPEC section 4).

Pictures are (H, W, 3) RGB or (H, W) grey, uint8, before and after: LQ is what fits into a PNG file.
"""

from __future__ import annotations

import hashlib
import math
import re

import cv2
import numpy as np
from basicsr.utils.matlab_functions import calculate_weights_indices
from scipy.sparse import csr_array

TASKS = {"sr": "x", "denoise": "noise", "jpeg": "jpeg"}  # what the names of a task's degradations begin with


def degrade(picture: np.ndarray, name: str, key: str = "", seed: int = 0) -> np.ndarray:
    """The picture after the degradation `name`; the same arguments give the same pixels, in any process.

    Args:
        name: x<scale>, MATLAB's bicubic imresize to 1/scale; noise<sigma>, Gaussian noise of that deviation (of 255),
            rounded and clipped; jpeg<quality>, through JPEG (OpenCV's, 4:2:0).
        key, seed: what noise is drawn from.

    Raises:
        ValueError: another name, or a side that is not a multiple of the scale.
    """
    match = re.fullmatch(r"(x|noise|jpeg)(\d+)", name)
    if not match or not int(match[2]):
        raise ValueError(f"'{name}' is no degradation; write x<scale>, noise<sigma> or jpeg<quality>, such as x4.")
    kind, level = match[1], int(match[2])
    if kind == "x":
        if any(side % level for side in picture.shape[:2]):
            raise ValueError(f"{picture.shape[0]}x{picture.shape[1]} pixels cannot be divided by {level}; crop first.")
        return bicubic(picture, 1 / level)
    if kind == "noise":
        return add_noise(picture, level, np.random.default_rng(_entropy(key, name, seed)))
    return through_jpeg(picture, level)


def scale_of(name: str) -> int:
    """By how much the degradation `name` makes a picture smaller."""
    return int(name[1:]) if name.startswith("x") else 1


def bicubic(picture: np.ndarray, factor: float) -> np.ndarray:
    """MATLAB's imresize of an 8-bit picture, anti-aliased when it reduces: (H, W[, 3]) to (factor H, factor W[, 3]).

    The result is rounded to 8 bits between rows and columns, too, as it must have been in the benchmarks' LR pictures:
    all of Set5 and BSD100, x2 to x4, come out equal in every bit. BasicSR's imresize, whose weights these are, does not
    round there, and differs from those pictures in 10 to 15 % of all values.
    """
    for axis in (0, 1):
        moved = picture.swapaxes(0, axis)  # (N, ...)
        matrix = _weights(len(moved), factor)
        resized = matrix @ moved.reshape(len(moved), -1).astype(np.float64)
        picture = _to_uint8(np.floor(resized + 0.5)).reshape(-1, *moved.shape[1:]).swapaxes(0, axis)
    return picture


def _weights(length: int, factor: float) -> csr_array:
    """What each of the resized values takes of each of `length` values, (length * factor, length), mirrored at ends."""
    resized = math.ceil(length * factor)
    weights, indices, before, after = calculate_weights_indices(length, resized, factor, "cubic", 4, antialiasing=True)
    mirrored = np.pad(np.arange(length), (before, after), "symmetric")
    rows = np.repeat(np.arange(resized), weights.shape[1])
    values = weights.double().numpy().ravel()
    return csr_array((values, (rows, mirrored[indices.long().numpy()].ravel())), shape=(resized, length))


def add_noise(picture: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Independent Gaussian noise in every channel; sigma is of 255."""
    return _to_uint8(picture + sigma * rng.standard_normal(picture.shape, np.float32))


def through_jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    """The picture after JPEG compression of a quality in 1..100."""
    color = picture.ndim == 3
    jpeg = cv2.imencode(".jpg", picture[..., ::-1] if color else picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    decoded = np.asarray(cv2.imdecode(jpeg, cv2.IMREAD_COLOR if color else cv2.IMREAD_GRAYSCALE))
    return decoded[..., ::-1] if color else decoded


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return np.round(np.clip(values, 0, 255)).astype(np.uint8)


def _entropy(key: str, name: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{key}".encode()).digest()[:16], "big")
