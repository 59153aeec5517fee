"""LQ pictures that are made from GT pictures part by part, when they are asked for."""

from __future__ import annotations

import numpy as np

from rwkvir_data.degrade import degrade, scale_of
from rwkvir_data.tiles import TiledPicture


class DegradedPicture:
    """A picture after the degradation `name` (see `degrade`), of which `picture[top:bottom, left:right]` makes a part.

    A part's pixels, also those at its border, are the ones that the degraded whole has there. Noise is drawn for the
    part.

    Args:
        gt: (H, W, 3) BGR or (H, W) gray, uint8; rows and columns beyond a multiple of the scale are not used.
        key, seed: what noise is drawn from.
    """

    def __init__(self, gt: np.ndarray | TiledPicture, name: str, key: str, seed: int):
        self._gt, self._name, self._key, self._seed = gt, name, key, seed
        self._scale = scale_of(name)
        self.shape = (gt.shape[0] // self._scale, gt.shape[1] // self._scale, *gt.shape[2:])

    def __getitem__(self, window: tuple[slice, slice]) -> np.ndarray:
        (top, bottom, _), (left, right, _) = (part.indices(n) for part, n in zip(window, self.shape[:2], strict=True))
        (y, ys), (x, xs) = self._wider(top, bottom, self.shape[0]), self._wider(left, right, self.shape[1])
        gt = self._gt[ys, xs]
        lq = degrade(gt[..., ::-1] if gt.ndim == 3 else gt, self._name, self._key, self._seed)[y:, x:]
        lq = lq[: bottom - top, : right - left]
        return lq[..., ::-1] if lq.ndim == 3 else lq

    def _wider(self, start: int, stop: int, length: int) -> tuple[int, slice]:
        """The part of GT that start..stop of LQ depends on, and where start lies in what becomes of that part."""
        scale, step, margin = self._scale, self._scale, 0
        if self._name.startswith("jpeg"):
            step = margin = 16  # a block with its halved chroma, which is interpolated from the block beside it
        elif scale > 1:
            margin = 3 * scale  # bicubic reduction reaches 2 * scale pixels beyond its own
        first = max(start * scale - margin, 0) // step * step
        last = min(-(-(stop * scale + margin) // step) * step, length * scale)
        return start - first // scale, slice(first, last)
