"""How complex a picture is: ENT - ENE + DISS of the co-occurrence of neighbouring grey levels, in 5 x 5 windows.

arXiv 2412.03814 names the three terms; the definition here reproduces its curves on BSD100 and has no fitted constant:

1. Y = floor(0.299 R + 0.587 G + 0.114 B), in float64; q = Y * 8 // 256, one of 8 levels.
2. At each pixel the pair (i, j) = (q[y, x], q[y, x + 1]); the last column pairs with itself.
3. In the 5 x 5 window around each pixel, the pairs' counts n_ij, which sum to 25. The map of pairs is mirrored at its
   borders without repeating the edge (reflect-101: ..2 1 [0 1 2 3] 2 1..), again and again where it is smaller than
   the window; one row or column is repeated.
4. ENT = sum of -p ln p over all 64 cells, p = (n_ij + 1) / 25; ENE = sqrt(sum of n_ij^2); DISS = sum of n_ij |i - j|.
5. The score is the mean over all pixels of ENT - ENE + DISS.

A constant picture has the lowest score, 8.0708 - 25 + 0 = -16.9292; zero is the paper's threshold between simple and
complex. What a score depends on besides the content:

- orientation: pairs are horizontal, so transposing a picture moves its score, by 1.3 on average on BSD100 (up to 5.5).
  orientation='mean' does not depend on it.
- resolution: at half the size neighbours differ more. Compare pictures of similar size.
- grey levels: they are absolute, so brightness and contrast move it.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import cv2
import numba
import numpy as np

LEVELS = 8
WINDOW = 5
CELLS = LEVELS * LEVELS
RADIUS = WINDOW // 2
PAIRS = WINDOW * WINDOW  # in a window
ROWS = 2  # of windows that the kernel slides together: the CPU overlaps their chains of updates

_P = (np.arange(PAIRS + 1) + 1) / PAIRS
ENTROPY = -_P * np.log(_P)  # of a cell, by its count
ROOT = np.sqrt(np.arange(PAIRS**2 + 1))
# A window's state is one integer: the sum of n |i - j|, 16 bits of the sum of n^2, and 32 bits of ENT in fixed point,
# whose rounding adds up to less than 1e-7. STEP[n] takes a cell from n to n + 1, WEIGHT[pair] adds a pair's |i - j|.
FIXED = 1 << 28
STEP = ((2 * np.arange(PAIRS) + 1) << 32) + np.round(np.diff(ENTROPY) * FIXED).astype(np.int64)
WEIGHT = (np.abs(np.arange(LEVELS)[:, None] - np.arange(LEVELS)) << 48).reshape(-1)
EMPTY = round(CELLS * ENTROPY[0] * FIXED)

Orientation = Literal["horizontal", "mean"]


class Complexity(NamedTuple):
    """The three terms, each the mean over all pixels, and score = ent - ene + diss."""

    ent: float
    ene: float
    diss: float
    score: float


@overload
def complexity(image: np.ndarray, orientation: Orientation = ..., map: Literal[False] = ...) -> Complexity: ...
@overload
def complexity(
    image: np.ndarray, orientation: Orientation = ..., map: Literal[True] = ...
) -> tuple[Complexity, np.ndarray]: ...
def complexity(image, orientation="horizontal", map=False):
    """The complexity of a picture, by sliding histograms.

    A 4 x 4 example: each row of luma is 0 0 255 255, of levels 0 0 7 7, of pairs (written ij) 00 07 77 77. The rows are
    alike, so the window around column 0 holds the columns 2 1 0 1 2 of the pairs five times, and so on:

        column 0: 77 07 00 07 77: n_00 = 5, n_07 = 10, n_77 = 10; ENE = sqrt(225) = 15, DISS = 7 * 10 = 70
        column 1: 07 00 07 77 77: the same counts
        column 2: 00 07 77 77 77: n_00 = 5, n_07 = 5, n_77 = 15; ENE = sqrt(275), DISS = 35
        column 3: 07 77 77 77 07: n_07 = 10, n_77 = 15; ENE = sqrt(325), DISS = 70

    With T(m) = -m/25 ln(m/25), ENT is 61 T(1) + T(6) + 2 T(11) in columns 0 and 1, 61 T(1) + 2 T(6) + T(16) in column
    2, 62 T(1) + T(11) + T(16) in column 3. The means are ENT 8.8231, ENE 16.1527, DISS 61.25: the score is 53.9204.

    Args:
        image: (H, W, 3) uint8 RGB, or (H, W) uint8 luma. Any H, W >= 1.
        orientation: 'horizontal', the paper's, or 'mean', over the four rotations: the same for a transposed picture.
        map: whether to return the score of each pixel, too.

    Returns:
        The terms and the score; with `map` a tuple of them and of each pixel's score, (H, W) float32.

    Raises:
        ValueError: another shape or dtype, no pixels, or an unknown orientation.
    """
    luma = _checked_luma(image, orientation)
    if orientation == "horizontal":
        terms, scores = _horizontal(luma, map)
    else:
        turned = [_horizontal(np.ascontiguousarray(np.rot90(luma, turn)), map) for turn in range(4)]
        terms = np.mean([terms for terms, _ in turned], axis=0)
        scores = np.mean([np.rot90(scores, -turn) for turn, (_, scores) in enumerate(turned)], axis=0) if map else None
    ent, ene, diss = terms.tolist()
    result = Complexity(ent, ene, diss, ent - ene + diss)
    return (result, scores) if map else result


def complexity_reference(image: np.ndarray, orientation: Orientation = "horizontal") -> tuple[Complexity, np.ndarray]:
    """What `complexity` returns with map=True, from the definition: dense, (8, 8, H, W), slow."""
    luma = _checked_luma(image, orientation)
    if orientation == "mean":
        turned = [complexity_reference(np.rot90(luma, turn)) for turn in range(4)]
        maps = [np.rot90(scores, -turn) for turn, (_, scores) in enumerate(turned)]
        return Complexity(*np.mean([terms for terms, _ in turned], axis=0)), np.mean(maps, axis=0)
    H, W = luma.shape
    q = luma.astype(int) * LEVELS // 256  # (H, W)
    right = np.concatenate([q[:, 1:], q[:, -1:]], axis=1)  # (H, W)
    level = np.arange(LEVELS)
    is_pair = (q == level[:, None, None, None]) & (right == level[:, None, None])  # (8, 8, H, W)
    mirrored = np.pad(is_pair, ((0, 0), (0, 0), (RADIUS, RADIUS), (RADIUS, RADIUS)), mode="reflect")
    n = sum(mirrored[:, :, y : y + H, x : x + W].astype(int) for y in range(WINDOW) for x in range(WINDOW))
    p = (n + 1) / PAIRS
    ent = np.sum(-p * np.log(p), axis=(0, 1))  # (H, W)
    ene = np.sqrt(np.sum(n**2, axis=(0, 1)))  # (H, W)
    diss = np.sum(n * np.abs(level[:, None] - level)[:, :, None, None], axis=(0, 1))  # (H, W)
    scores = ent - ene + diss
    return Complexity(ent.mean(), ene.mean(), diss.mean(), scores.mean()), scores.astype(np.float32)


@numba.njit(cache=True, nogil=True)
def to_luma(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB to (H, W) uint8: floor(0.299 R + 0.587 G + 0.114 B), evaluated in float64.

    Where the exact sum is an integer, float64 may round to just below it: R = G = B = 64 gives 63.
    """
    height, width, _ = image.shape
    luma = np.empty((height, width), np.uint8)
    for y in range(height):
        for x in range(width):
            luma[y, x] = np.uint8(0.299 * image[y, x, 0] + 0.587 * image[y, x, 1] + 0.114 * image[y, x, 2])
    return luma


def _checked_luma(image: np.ndarray, orientation: str) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or not image.size:
        raise ValueError(
            f"complexity needs uint8 of shape (H, W, 3), RGB, or (H, W), luma, not {image.dtype} of shape "
            f"{image.shape}; convert the picture"
        )
    if orientation not in ("horizontal", "mean"):
        raise ValueError(f"the orientation is '{orientation}'; write 'horizontal' or 'mean'")
    return to_luma(image) if image.ndim == 3 else np.ascontiguousarray(image)


def _horizontal(luma: np.ndarray, with_map: bool) -> tuple[np.ndarray, Any]:
    """The means of the three terms, (3,), and each pixel's score, (H, W), if it is wanted."""
    height, width = luma.shape
    # Windows below the last row complete a group of ROWS; what they hold is not used.
    margins = RADIUS, RADIUS + -height % ROWS, RADIUS, RADIUS
    mirrored = cv2.copyMakeBorder(_pairs(luma), *margins, cv2.BORDER_REFLECT_101)
    scores = np.empty((len(mirrored) - 2 * RADIUS, width), np.float32) if with_map else None
    sums = _slide(mirrored, scores)  # (rows, 3)
    return sums[:height].sum(axis=0) / luma.size, None if scores is None else scores[:height]


@numba.njit(cache=True, nogil=True)
def _pairs(luma: np.ndarray) -> np.ndarray:
    """(H, W) uint8 luma to (H, W) uint8: 8 i + j for the pair of a pixel's level i and its right neighbour's j."""
    height, width = luma.shape
    pairs = np.empty((height, width), np.uint8)
    for y in range(height):
        for x in range(width - 1):
            pairs[y, x] = luma[y, x] >> 5 << 3 | luma[y, x + 1] >> 5
        pairs[y, width - 1] = (luma[y, width - 1] >> 5) * 9
    return pairs


@numba.njit(cache=True, nogil=True)
def _slide(mirrored: np.ndarray, scores: np.ndarray | None) -> np.ndarray:
    """The sums of ENT, ENE and DISS over each row's windows, (H, 3) float64; each window's score goes to `scores`.

    mirrored: (H + 4, W + 4) uint8, pairs, H a multiple of ROWS; scores: (H, W) float32 or None.
    """
    height, width = mirrored.shape[0] - 2 * RADIUS, mirrored.shape[1] - 2 * RADIUS
    sums = np.zeros((height, 3))
    counts = np.empty((ROWS, CELLS), np.uint8)
    states = np.empty(ROWS, np.int64)
    for top in range(0, height, ROWS):
        counts[:] = 0
        states[:] = EMPTY
        for row in range(ROWS):
            for dy in range(WINDOW):
                for x in range(WINDOW):
                    pair = mirrored[top + row + dy, x]
                    states[row] += STEP[counts[row, pair]] + WEIGHT[pair]
                    counts[row, pair] += 1
        for x in range(width):
            for row in range(ROWS):
                state = states[row]
                if x > 0:
                    for dy in range(WINDOW):
                        leaving, entering = mirrored[top + row + dy, x - 1], mirrored[top + row + dy, x - 1 + WINDOW]
                        if leaving != entering:
                            counts[row, leaving] -= 1
                            state += STEP[counts[row, entering]] - STEP[counts[row, leaving]]
                            state += WEIGHT[entering] - WEIGHT[leaving]
                            counts[row, entering] += 1
                    states[row] = state
                ent, ene, diss = (state & 0xFFFFFFFF) / FIXED, ROOT[state >> 32 & 0xFFFF], state >> 48
                sums[top + row, 0] += ent
                sums[top + row, 1] += ene
                sums[top + row, 2] += diss
                if scores is not None:
                    scores[top + row, x] = ent - ene + diss
    return sums
