"""What `basicsr ablate` reports: differences to the baseline, with their spread over seeds."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from rwkvir_data import page

BASELINE = "baseline"
PUBLISHED = {"shift=q": -0.87, "scan=row": -0.75}  # arXiv 2412.03814, its ablations: dB against the whole network


class Row(NamedTuple):
    """A variant on a validation set: PSNR by seed, what it is more than the baseline's of that seed, and costs."""

    label: str
    dataset: str
    psnr: list[float]
    gains: list[float]
    parameters: int
    cost: float  # time of a step, the baseline's being 1

    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean gain by Student's t; None for a single seed."""
        if len(self.gains) < 2:
            return None
        middle, error = np.mean(self.gains), np.std(self.gains, ddof=1) / math.sqrt(len(self.gains))
        half = stats.t.ppf(0.975, len(self.gains) - 1) * error
        return float(middle - half), float(middle + half)


def markdown(rows: Sequence[Row]) -> str:
    """A table for each validation set."""
    known = PUBLISHED if any(row.label in PUBLISHED for row in rows) else {}
    blocks = []
    for dataset, some in itertools.groupby(rows, key=lambda row: row.dataset):
        head = ["variant", "parameters", "time", f"PSNR on {dataset}, dB", "difference, dB", "95 % interval"]
        lines = [[*head, *["published"][: len(known)]]]
        for row in some:
            interval = row.interval()
            cells = [row.label, f"{row.parameters:,}", f"{row.cost:.2f}", _spread(row.psnr, ".2f")]
            if row.label == BASELINE:
                cells += ["", ""]
            else:
                cells += [_spread(row.gains, "+.3f"), "{:+.3f} .. {:+.3f}".format(*interval) if interval else "unknown"]
            lines.append([*cells, *[f"{known[row.label]:+.2f}" if row.label in known else ""][: len(known)]])
        lines.insert(1, ["---"] * len(lines[0]))
        blocks.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    return "\n\n".join(blocks) + "\n"


def _spread(values: Sequence[float], form: str) -> str:
    deviation = f" ± {np.std(values, ddof=1):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{deviation}"


def summary(rows: Sequence[Row], base: dict[str, Any], seeds: int, command: Sequence[str]) -> str:
    """The report in Markdown: what was done, the tables, and what they can and cannot show.

    base: the baseline's option file, whose seed is the first one.
    """
    train, iterations = base["datasets"]["train"], base["train"]["total_iter"]
    network = ", ".join(f"{name} {value}" for name, value in base["network_g"].items())
    last = base["manual_seed"] + seeds - 1
    facts = [
        f"Baseline: {network}. Each run: {iterations} iterations of {train['batch_size_per_gpu']} GT patches of "
        f"{train['gt_size']}×{train['gt_size']} pixels, scale {base['scale']}, seeds {base['manual_seed']}..{last}.",
        "PSNR and differences are means over seeds ± standard deviation; the interval is that of the mean difference "
        "by Student's t. A difference is taken between runs of one seed, which see the same patches in the same order; "
        "initial weights are the same only up to the first layer that differs. Time is that of a forward and backward "
        "pass, measured in turns, the baseline's being 1.",
    ]
    if any(row.label in PUBLISHED for row in rows):
        facts.append(
            "Published: the differences of arXiv 2412.03814, whose networks are larger and trained for longer."
        )
    parts = ["# Ablation", f"    {shlex.join(command)}", markdown(rows).rstrip(), "![](ablation.png)"]
    return "\n\n".join([*parts, *facts, verdict(rows, iterations)]) + "\n"


def verdict(rows: Sequence[Row], iterations: int) -> str:
    """What the rows show, and what they cannot."""
    intervals = {row.label: interval for row in rows if row.label != BASELINE and (interval := row.interval())}
    beyond = "What differs only in larger networks or after longer training"
    if not intervals:
        return (
            "One seed has no spread: no difference here can be told from chance; give --seeds 3 or more. "
            f"{beyond} than {iterations} iterations does not show at all."
        )
    apart = [label for label, (low, high) in intervals.items() if low > 0 or high < 0]
    finding = f"Apart from 0 lie the intervals of {', '.join(apart)}" if apart else "No interval lies apart from 0"
    half = np.median([(high - low) / 2 for low, high in intervals.values()])
    return (
        f"{finding}; of {len(intervals)} intervals, {len(intervals) / 20:.1f} would by chance alone. Differences below "
        f"about {half:.2f} dB cannot be told from chance with so many seeds. {beyond} than {iterations} iterations "
        "does not show: this neither confirms nor refutes it."
    )


def chart(rows: Sequence[Row]) -> bytes:
    """A PNG file: for each validation set, differences to the baseline by seed, their means and 95 % intervals."""
    sets = {dataset: list(some) for dataset, some in itertools.groupby(rows, key=lambda row: row.dataset)}
    changed = {dataset: [row for row in some if row.label != BASELINE] for dataset, some in sets.items()}
    labels = [row.label for row in next(iter(changed.values()))]
    with matplotlib.rc_context(page.STYLE):
        figure = Figure(figsize=(2 + 5 * len(sets), 1.4 + 0.36 * len(labels)), layout="constrained")
        for axes, (dataset, some) in zip(figure.subplots(1, len(sets), squeeze=False)[0], changed.items(), strict=True):
            _draw(axes, some)
            axes.set_title(f"PSNR on {dataset}, difference to the baseline in dB")
            axes.set_yticks(range(len(labels)), labels)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return page.png(figure)


def _draw(axes: Any, rows: Sequence[Row]) -> None:
    axes.axvline(0, color=page.INK, linewidth=1)
    bar = {"color": page.BLUE, "linewidth": 5, "alpha": 0.3, "solid_capstyle": "butt"}
    for place, row in enumerate(rows):
        names = ("95 % interval of the mean", "one seed", "mean") if place == 0 else ("", "", "")
        axes.plot(row.interval() or (), [place] * len(row.interval() or ()), label=names[0], **bar)
        axes.plot(row.gains, [place] * len(row.gains), "o", color=page.GREY, markersize=5, label=names[1])
        axes.plot(np.mean(row.gains), place, "D", color=page.BLUE, markersize=6, label=names[2])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
