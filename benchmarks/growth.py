"""Time and peak memory of operator and network against the number of tokens T, beside softmax attention's.

    python benchmarks/growth.py [--powers 10-20] [--device cpu] [--limit 60] [--repeats 3] [--threads 2]

operator: cross_bi_wkv on 48 channels. network: RWKVIR light x4, fused. attention: torch's scaled_dot_product_attention
with one head of 48 channels. All forward only, float32, on one picture of T pixels (2:1 where T is no square), each T
in a process of its own; median time, and the peak memory of the first run less what was held before. A contender leaves
the race when its next T would take longer than --limit seconds, at the growth of its last two. Prints the table with
each contender's exponent of T (least squares on logarithms, from 2^14 on) and draws docs/growth.png. Linux only.
"""

import argparse
import math
import platform
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from network import in_process_of_its_own, inference
from torch.nn import functional as F

from rwkvir_arch import cross_bi_wkv

C = 48
FIT_FROM = 2**14
FIGURE = Path(__file__).parents[1] / "docs" / "growth.png"


def operator(width: int, height: int, device: str) -> Callable[[], torch.Tensor]:
    w, u = torch.linspace(-5, 3, C, device=device).expand(2, C) / (width * height), torch.zeros(2, C, device=device)
    k, v = torch.randn(2, 1, height, width, C, device=device).unbind()
    return lambda: cross_bi_wkv(w, u, k, v)


def attention(width: int, height: int, device: str) -> Callable[[], torch.Tensor]:
    q, k, v = torch.randn(3, 1, 1, height * width, C, device=device).unbind()
    return lambda: F.scaled_dot_product_attention(q, k, v)


def network(width: int, height: int, device: str) -> Callable[[], torch.Tensor]:
    return inference("fused", width, height, device)


Result = tuple[float, float] | str  # seconds and MiB, or why there are none
CONTENDERS = {"operator": operator, "network": network, "attention": attention}


def entry(build: Callable, power: int, earlier: list[Result], args: argparse.Namespace) -> Result:
    """The result for T = 2^power of a contender whose earlier results are given."""
    if earlier and isinstance(earlier[-1], str):
        return earlier[-1]
    if len(earlier) > 1 and earlier[-1][0] ** 2 / earlier[-2][0] > args.limit:
        return f"over {args.limit:.0f} s"
    width, height = 2 ** (power - power // 2), 2 ** (power // 2)
    return in_process_of_its_own(
        build, width, height, args.device, device=args.device, threads=args.threads, repeats=args.repeats
    )


def exponent(points: dict[int, float]) -> float:
    """n of the fit T^n to `points` from FIT_FROM on; nan for fewer than three."""
    fitted = {T: y for T, y in points.items() if T >= FIT_FROM and y > 0}
    if len(fitted) < 3:
        return math.nan
    return float(np.polyfit(np.log([*fitted]), np.log([*fitted.values()]), 1)[0])


def draw(points: dict[str, tuple[dict[int, float], dict[int, float]]], path: str) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for index, (panel, label) in enumerate(zip(panels, ("seconds", "peak memory, MiB"), strict=True)):
        for name, series in points.items():
            panel.loglog(*zip(*series[index].items(), strict=True), "o-", base=10, markersize=4, label=name)
        panel.set_xscale("log", base=2)
        panel.set(xlabel="tokens T (pixels of the input)", ylabel=label)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--powers", default="10-20", help="T from 2^FIRST to 2^LAST")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--limit", type=float, default=60, help="seconds that one run may be expected to take")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--figure", default=str(FIGURE), help="the plot to write")
    args = parser.parse_args()
    first, last = map(int, args.powers.split("-"))
    powers = range(first, last + 1)

    print(f"{platform.machine()}, {args.threads} threads, {args.device}, float32, torch {torch.__version__}\n")
    print(f"| T | {' | '.join(f'{name}, s | MiB' for name in CONTENDERS)} |\n|{'---|' * (2 * len(CONTENDERS) + 1)}")
    results: dict[str, list[Result]] = {name: [] for name in CONTENDERS}
    for power in powers:
        for name, build in CONTENDERS.items():
            results[name].append(entry(build, power, results[name], args))
        rows = [results[name][-1] for name in CONTENDERS]
        cells = (f"{row} | " if isinstance(row, str) else f"{row[0]:.3g} | {row[1]:.0f}" for row in rows)
        print(f"| 2^{power} | {' | '.join(cells)} |", flush=True)

    points = {}
    for name, rows in results.items():
        measured = {2**power: row for power, row in zip(powers, rows, strict=True) if isinstance(row, tuple)}
        points[name] = {T: row[0] for T, row in measured.items()}, {T: row[1] for T, row in measured.items()}
    exponents = (" | ".join(f"T^{exponent(series):.2f}" for series in points[name]) for name in CONTENDERS)
    print(f"| grows as | {' | '.join(exponents)} |")
    draw(points, args.figure)


if __name__ == "__main__":
    main()
