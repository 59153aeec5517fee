"""The charts of `basicsr report`: each a PNG file that is readable at half the width of a page, and so on a phone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from rwkvir.comparison import Comparison, Example
from rwkvir.experiment import Curve, Experiment
from rwkvir.panels import Panel, grid
from rwkvir_data import page

COLORS = (page.BLUE, page.ORANGE, page.GREEN, page.PURPLE, "#b8434e", "#7a6a53", "#c48a00", "#3f9c9c")
LINES = ("-", "--", ":", "-.")
SIZE = (5.6, 3.5)  # inches
STYLE: Any = {"lines.linewidth": 1.6, "lines.markersize": 3.5, "legend.fontsize": 9, "legend.frameon": True}
STYLE |= {"legend.framealpha": 0.8, "legend.edgecolor": "none"}
MARKED = 40  # points up to which each is marked
MIN_PICTURES = 3  # below this a correlation says nothing
SMOOTHING = 20  # a training loss is averaged over this share of its curve: 1 / SMOOTHING

Looks = dict[str, tuple[str, str]]  # a run's line and colour, by its label


def looks(labels: Sequence[str]) -> Looks:
    """Lines that can be told apart, in an order that does not change."""
    return dict(zip(labels, itertools.cycle(itertools.product(LINES, COLORS)), strict=False))


def psnr_chart(
    runs: Sequence[Experiment],
    curves: dict[str, Curve],
    dataset: str,
    by_hours: bool,
    baseline: tuple[str, float] | None,
) -> bytes:
    """PSNR on one dataset, and the baseline's. Thin lines are milestones of the learning rate, triangles on the axis
    where a run was resumed."""

    def draw(axes: Any) -> None:
        values = [value for curve in curves.values() for value in curve.values]
        for run, (line, color) in zip(runs, looks([run.label for run in runs]).values(), strict=True):
            if run.label not in curves:
                continue
            curve = curves[run.label]
            marker = "o" if len(curve.iters) <= MARKED else None
            axes.plot(axis(run, curve.iters), curve.values, line, color=color, label=run.label, marker=marker)
            for milestone in axis(run, [m for m in run.milestones if m < run.iterations]):
                axes.axvline(milestone, color=color, linewidth=0.7, alpha=0.6)
            bottom = {"transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": 3}
            axes.plot(axis(run, run.resumes), np.zeros(len(run.resumes)), "^", color=color, markersize=8, **bottom)
        if baseline:
            axes.axhline(baseline[1], linestyle="--", color=page.GREY, label=baseline[0])
            values.append(baseline[1])
        axes.set(title=f"PSNR on {dataset}, dB", xlabel=unit, ylim=_upper_part(values))
        axes.legend(loc="lower right")

    unit, axis = _axis(runs, by_hours)
    return _chart(draw)


def loss_chart(runs: Sequence[Experiment], loss: str, by_hours: bool) -> bytes:
    """A training loss: as logged, pale, and smoothed."""

    def draw(axes: Any) -> None:
        drawn = []
        for run, (line, color) in zip(runs, looks([run.label for run in runs]).values(), strict=True):
            curve = run.curve("", loss)
            if curve.values:
                drawn.append(-smoothed(curve.values))
                axes.plot(axis(run, curve.iters), curve.values, color=color, linewidth=0.6, alpha=0.25)
                axes.plot(axis(run, curve.iters), -drawn[-1], line, color=color, label=run.label)
        low, high = _upper_part(np.concatenate(drawn)) if drawn else (-1, 0)
        axes.set(title=f"training loss {loss}", xlabel=unit, ylim=(-high, -low))
        axes.legend(loc="upper right")

    unit, axis = _axis(runs, by_hours)
    return _chart(draw)


def complexity_chart(compared: Comparison, looks: Looks, gain: bool) -> bytes:
    """PSNR, or its gain on the baseline, over the complexity of GT: a point a picture, and lines of least squares."""

    def draw(axes: Any) -> None:
        for label in compared.labels()[1 if gain else 0 :]:
            line, color = looks.get(label, ("-", page.GREY))
            points = compared.points(label)
            if len(points) < MIN_PICTURES:
                continue
            x, y = points[:, 0], points[:, 2 if gain else 1]
            ends = np.array([x.min(), x.max()])
            axes.scatter(x, y, s=14, color=color, alpha=0.6, linewidths=0)
            axes.plot(ends, np.polyval(np.polyfit(x, y, 1), ends), line, color=color, label=label)
        axes.axvline(0, color=page.INK, linewidth=0.8, alpha=0.5)
        what = f"gain on {compared.baseline}" if gain else "PSNR"
        axes.set(title=f"{what} against complexity, dB", xlabel="complexity of GT")
        axes.legend()

    return _chart(draw)


def strip(example: Example) -> bytes:
    """GT with the window marked, and the window in every version."""
    whole = Panel(f"{example.scored.name} ({example.scored.dataset})", example.gt, example.window().mark(example.lq))
    psnr = {label: f"{label} {value:.2f} dB" for label, value in example.scored.psnr.items()}
    return page.png(grid([[whole, *(Panel(psnr.get(label, label), crop) for label, crop in example.crops().items())]]))


def smoothed(values: Sequence[float]) -> np.ndarray:
    """The mean of each value and its neighbours, 1 / SMOOTHING of all together; near the ends, of those there are."""
    window = np.ones(min(len(values) // SMOOTHING | 1, len(values)))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def time_unit(hours: float) -> tuple[str, int]:
    """In what to tell a time, and how many of these an hour has."""
    units = {"hours": 1, "minutes": 60}
    return next(((unit, factor) for unit, factor in units.items() if hours * factor >= 1), ("seconds", 3600))


def _axis(runs: Sequence[Experiment], by_hours: bool) -> tuple[str, Callable[[Experiment, Sequence[int]], np.ndarray]]:
    """An axis' label, and where on it a run's iterations are."""
    if not by_hours:
        return "iterations", lambda run, iters: np.array(iters)
    unit, factor = time_unit(max(run.hours for run in runs))
    return unit, lambda run, iters: factor * run.hours_at(iters)


def _chart(draw: Callable[[Any], None]) -> bytes:
    with matplotlib.rc_context({**page.STYLE, **STYLE}):
        fig = Figure(figsize=SIZE, layout="constrained")
        draw(fig.subplots())
        return page.png(fig)


def _upper_part(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The range to show of values that begin far below where they end: to four times their upper three quarters."""
    low, quarter, high = np.percentile(values, [0, 25, 100])
    low = max(low, quarter - 3 * (high - quarter))
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin
