"""Pictures side by side with the part enlarged where they differ most."""

from typing import NamedTuple

import cv2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle


class Panel(NamedTuple):
    """One picture of a figure, and a part of it to mark: (x, y, width, height) as shares of its sides."""

    title: str
    picture: np.ndarray
    mark: tuple[float, float, float, float] | None = None


class Window(NamedTuple):
    """A part of a photograph, in pixels of its LQ version."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, picture: np.ndarray, scale: int) -> np.ndarray:
        """The window in a picture that is `scale` times as large as LQ."""
        top, left, height, width = (scale * length for length in self)
        return picture[top : top + height, left : left + width]

    def mark(self, lq: np.ndarray) -> tuple[float, float, float, float]:
        height, width = lq.shape[:2]
        return self.left / width, self.top / height, self.width / width, self.height / height


def squared_error(picture: np.ndarray, gt: np.ndarray) -> np.ndarray:
    """(H, W) float32, the mean over the channels of two (H, W, 3) pictures."""
    return np.square(np.float32(picture) - gt).mean(axis=2)


def window_of_most(values: np.ndarray, lq: np.ndarray, share: float = 0.2) -> Window:
    """The window, `share` of each side long, over which the mean of `values`, (H, W) as GT, is highest."""
    height, width = lq.shape[:2]
    tall, wide = max(round(height * share), 1), max(round(width * share), 1)
    reduced = cv2.resize(values.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    means = cv2.boxFilter(reduced, -1, (wide, tall), anchor=(0, 0))[: height - tall + 1, : width - wide + 1]
    top, left = np.unravel_index(means.argmax(), means.shape)
    return Window(int(top), int(left), tall, wide)


def grid(rows: list[list[Panel]], width: float = 4.0) -> Figure:
    """Rows of panels, each `width` inches wide; the panels of a row have the same aspect ratio."""
    gap = 0.08
    heights = [width * row[0].picture.shape[0] / row[0].picture.shape[1] for row in rows]
    heads = [0.35 if row[0].title else gap for row in rows]
    size = (len(rows[0]) * (width + gap) + gap, sum(heights) + sum(heads) + gap)
    figure = Figure(figsize=size, dpi=100)
    bottom = size[1]
    for row, height, head in zip(rows, heights, heads, strict=True):
        bottom -= height + head
        for i, panel in enumerate(row):
            left = gap + i * (width + gap)
            axes = figure.add_axes((left / size[0], bottom / size[1], width / size[0], height / size[1]))
            axes.imshow(panel.picture, interpolation="nearest", extent=(0, 1, 1, 0), aspect="auto")
            axes.set_axis_off()
            axes.set_title(panel.title, fontsize=13, pad=5)
            if panel.mark:
                x, y, wide, tall = panel.mark
                axes.add_patch(Rectangle((x, y), wide, tall, fill=False, edgecolor="red", linewidth=2))
    return figure
