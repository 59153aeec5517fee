"""Cheap measures of a picture's quality and content, for dropping degraded pictures and for comparison."""

from __future__ import annotations

import cv2
import numpy as np

PATCH = 240  # side of the patches that are flat or not
FLAT = 800.0  # a patch whose gradient's magnitude has a variance below this is flat


def laplacian_variance(luma: np.ndarray) -> float:
    """The variance of the Laplacian (4-neighbour, reflect-101 border) of a picture (H, W) uint8, >= 0.

    Low (below 150, say) where nothing is sharp: it finds motion blur, wrong focus and enlarged pictures, but also takes
    for them a sharp picture of fog or sky. High (above 8000) for noise and halftones, but also for fine regular texture
    such as facades and foliage. It grows with the square of contrast and says nothing of compression artefacts.
    """
    _, deviation = cv2.meanStdDev(cv2.Laplacian(luma, cv2.CV_16S))
    return float(deviation[0, 0]) ** 2


def flatness(luma: np.ndarray, patch: int = PATCH, flat: float = FLAT) -> float:
    """The share, 0..1, of flat patches among the whole patches, patch x patch, of a picture (H, W) uint8.

    A patch is flat where the variance of the magnitude of its Sobel gradient (3 x 3, reflect-101 at the picture's
    border) is below `flat`. Patches lie side by side from the upper left; what is left over on the right and below does
    not count. A side shorter than a patch makes patches of that length.

    It finds pictures that are mostly sky, wall or blurred background, whatever their sharp part is like. It does not
    tell blur from emptiness, and an even texture of low contrast (sand, skin) counts as flat.
    """
    height, width = (min(patch, side) for side in luma.shape)
    patches = flat_ones = 0
    for top in range(0, luma.shape[0] - height + 1, height):
        magnitude = _gradient_magnitude(luma, top, top + height)
        for left in range(0, luma.shape[1] - width + 1, width):
            _, deviation = cv2.meanStdDev(magnitude[:, left : left + width])
            patches += 1
            flat_ones += float(deviation[0, 0]) ** 2 < flat
    return flat_ones / patches


def bits_per_pixel(size: int, height: int, width: int) -> float:
    """The bits that a picture's file of `size` bytes spends on a pixel.

    Within one format and quality it follows the amount of detail, and costs nothing to know. Between them it does not:
    a JPEG's says as much of its quality setting as of the picture, and noise costs as much as texture.
    """
    return 8 * size / (height * width)


def _gradient_magnitude(luma: np.ndarray, top: int, bottom: int) -> np.ndarray:
    """(bottom - top, W) float32 of the rows top..bottom - 1, computed from them and their neighbours alone."""
    first, last = max(top - 1, 0), min(bottom + 1, len(luma))
    dx, dy = (cv2.Sobel(luma[first:last], cv2.CV_32F, *order) for order in ((1, 0), (0, 1)))
    return cv2.magnitude(dx, dy)[top - first : bottom - first]
