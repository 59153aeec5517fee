"""`resyn analyze`: how the quality of restored pictures depends on the complexity of what was to be restored."""

from __future__ import annotations

import argparse
import csv
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from basicsr.metrics import calculate_psnr, calculate_ssim
from matplotlib.figure import Figure
from scipy.stats import pearsonr, spearmanr
from tqdm import tqdm

from rwkvir_data import sources
from rwkvir_data.complexity import complexity
from rwkvir_data.parallel import add_workers_option, bounded_map, workers

MAX_SPARE = 7  # rows and columns that GT may have beyond the prediction's; a scale of 8 leaves so many


class Score(NamedTuple):
    """A picture's complexity (of GT), PSNR in dB (inf for equal pictures) and SSIM."""

    name: str
    complexity: float
    psnr: float
    ssim: float


class Correlation(NamedTuple):
    """How two quantities go together, each from -1 to 1: along a line (Pearson), in their order (Spearman)."""

    pearson: float
    spearman: float


class Quartile(NamedTuple):
    """A quarter of the pictures, by complexity: how many, from where to where, and their means."""

    pictures: int
    lowest: float
    highest: float
    psnr: float
    ssim: float


def main(argv: list[str]) -> int:
    """Run `resyn analyze` with the arguments `argv`."""
    args = _parser().parse_args(argv)
    jobs = pairs(args.pred, args.gt, args.filename_tmpl)
    measure = functools.partial(score, crop_border=args.crop_border, y_channel=args.y)
    with workers(args.workers) as pool:
        scores = list(tqdm(bounded_map(pool, measure, jobs), total=len(jobs), unit="picture", disable=None))
    finite = [one for one in scores if np.isfinite(one.psnr)]
    if len(finite) < 4:
        raise ValueError(
            f"{args.pred} and {args.gt} share {len(finite)} pictures that differ; four are needed for quartiles"
        )
    channel = "Y" if args.y else "RGB"
    print(f"{len(scores)} pictures; PSNR and SSIM on {channel}, border of {args.crop_border} pixels cropped")
    if len(finite) < len(scores):
        print(
            f"{len(scores) - len(finite)} equal their GT; their PSNR is infinite, and they are left out of what follows"
        )
    rhos = {quantity: correlate(finite, quantity) for quantity in ("psnr", "ssim")}
    for quantity, rho in rhos.items():
        print(f"{quantity.upper()} against complexity: Pearson {rho.pearson:.3f}, Spearman {rho.spearman:.3f}")
    table = quartiles(finite)
    print(f"{'quartile':>8}  {'pictures':>8}  {'complexity':>16}  {'PSNR':>6}  {'SSIM':>6}")
    for number, row in enumerate(table, 1):
        span = f"{row.lowest:.2f} .. {row.highest:.2f}"
        print(f"{number:>8}  {row.pictures:>8}  {span:>16}  {row.psnr:6.2f}  {row.ssim:6.4f}")
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    _write_csv(out / "pictures.csv", Score._fields, scores)
    _write_csv(out / "quartiles.csv", Quartile._fields, table)
    figure(finite, rhos["psnr"], channel).savefig(out / "scatter.png", dpi=150)
    print(f"{out}: pictures.csv, quartiles.csv, scatter.png")
    return 0


def pairs(pred: str, gt: str, template: str = "{}") -> list[tuple[str, str, str, str]]:
    """(pred, name there, gt, name there) of every picture of the source `gt`; `template` makes pred's stem of GT's.

    Raises:
        FileNotFoundError: a source does not exist, GT is empty, or `pred` lacks a picture.
    """
    by_stem = {str(Path(entry.name).with_suffix("")): entry.name for entry in sources.entries(pred)}
    found, missing = [], []
    for entry in sources.entries(gt):
        stem = template.format(Path(entry.name).with_suffix(""))
        if stem in by_stem:
            found.append((pred, by_stem[stem], gt, entry.name))
        else:
            missing.append(stem)
    if missing:
        raise FileNotFoundError(
            f"{pred} has no '{missing[0]}' ({len(missing)} of {len(missing) + len(found)} missing), which {gt} asks "
            "for; add the pictures, or say with --filename-tmpl how they are named, '{}_x2' say"
        )
    if not found:
        raise FileNotFoundError(f"{gt} has no pictures; correct the path")
    return found


def score(job: tuple[str, str, str, str], crop_border: int = 0, y_channel: bool = False) -> Score:
    """Measure one of the `pairs` with BasicSR's metrics; rows and columns that only GT has are cut, as in BasicSR.

    Raises:
        ValueError: a picture cannot be decoded, or sizes do not match.
    """
    pred_root, pred_name, gt_root, gt_name = job
    pred, gt = _read(pred_root, pred_name), _read(gt_root, gt_name)
    spare = [large - small for large, small in zip(gt.shape[:2], pred.shape[:2], strict=True)]
    if not all(0 <= rest <= MAX_SPARE for rest in spare):
        raise ValueError(
            f"{pred_root}/{pred_name} has {pred.shape[0]}x{pred.shape[1]} pixels, but its GT "
            f"{gt.shape[0]}x{gt.shape[1]}; give restored pictures of GT's size"
        )
    images = pred[..., ::-1], gt[: pred.shape[0], : pred.shape[1], ::-1]  # BGR, as the metrics expect
    psnr, ssim = (
        measure(*images, crop_border=crop_border, test_y_channel=y_channel)
        for measure in (calculate_psnr, calculate_ssim)
    )
    return Score(gt_name, complexity(gt).score, float(psnr), float(ssim))


def correlate(scores: Sequence[Score], quantity: str) -> Correlation:
    """How 'psnr' or 'ssim' goes together with complexity; PSNR must be finite."""
    both = [one.complexity for one in scores], [getattr(one, quantity) for one in scores]
    return Correlation(float(pearsonr(*both).statistic), float(spearmanr(*both).statistic))


def quartiles(scores: Iterable[Score]) -> list[Quartile]:
    """Means over the four quarters of the pictures, from the least complex to the most; four pictures at least."""
    ordered = sorted(scores, key=lambda one: one.complexity)
    groups = [[ordered[i] for i in indices] for indices in np.array_split(np.arange(len(ordered)), 4)]
    return [
        Quartile(
            len(group),
            group[0].complexity,
            group[-1].complexity,
            float(np.mean([one.psnr for one in group])),
            float(np.mean([one.ssim for one in group])),
        )
        for group in groups
    ]


def figure(scores: Sequence[Score], rho: Correlation, channel: str) -> Figure:
    """The paper's scatter plot: PSNR over complexity, a point a picture, with the straight line of least squares."""
    x, y = np.array([one.complexity for one in scores]), np.array([one.psnr for one in scores])
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        fig = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = fig.subplots()
        axes.axvline(0, color="#999999", linewidth=0.8, linestyle="--")
        axes.scatter(x, y, s=22, color="#2f6f9f", alpha=0.75, linewidths=0)
        ends = np.array([x.min(), x.max()])
        axes.plot(ends, np.polyval(np.polyfit(x, y, 1), ends), color="#c8553d", linewidth=1.6)
        axes.set(xlabel="complexity of GT (ENT - ENE + DISS)", ylabel=f"PSNR, {channel} (dB)")
        axes.set_title(f"{len(scores)} pictures   Pearson {rho.pearson:.3f}   Spearman {rho.spearman:.3f}", loc="left")
        axes.grid(alpha=0.25)
    return fig


def _read(root: str, name: str) -> np.ndarray:
    try:
        return sources.decode(sources.read(root, name))
    except (OSError, ValueError) as error:
        raise ValueError(f"{root}/{name} cannot be read: {error}; replace it") from error


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[tuple]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="resyn analyze",
        description="PSNR and SSIM of restored pictures against the complexity of the originals: correlation, table "
        "by quartile, scatter plot. Sources are folders, archives or LMDBs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--pred", required=True, metavar="DIR", help="restored pictures")
    parser.add_argument("--gt", required=True, metavar="DIR", help="the originals")
    parser.add_argument("-o", "--output", default="analysis", metavar="DIR", help="where tables and plot go")
    parser.add_argument("--crop-border", type=int, default=0, metavar="PIXELS", help="pixels to ignore at each edge")
    parser.add_argument("--y", action="store_true", help="measure on the Y channel of YCbCr instead of RGB")
    parser.add_argument("--filename-tmpl", default="{}", help="a restored picture's name, {} being that of its GT")
    add_workers_option(parser)
    return parser
