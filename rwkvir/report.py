"""`basicsr report`: what one or more training runs have come to, as one HTML file and its figures."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rwkvir.comparison import Comparison, Example, compare, psnr_options  # first, since it repairs `import basicsr`

# isort: split
import numpy as np

from rwkvir import report_figures as charts
from rwkvir.experiment import Curve, Experiment, read_experiments
from rwkvir_data import analyze, page

ABSENT = "–"
AXES = {"iterations": False, "hours": True}  # whether a chart is drawn over hours
WITHIN = (0.1, 0.05)  # dB below the final value, at which a run counts as converged
MAX_ROW = 4  # crops side by side
WHOLE = 560  # longest side of a picture on the page, in pixels


class Strip(NamedTuple):
    """An example on the page: GT as a data URI, the window in it (left, top, width, height in %), and crops as (label,
    value, data URI)."""

    name: str
    caption: str
    whole: str | None
    window: list[float]
    crops: list[tuple[str, str, str | None]]

    @property
    def columns(self) -> int:
        """One row of crops, or two."""
        return len(self.crops) if len(self.crops) <= MAX_ROW else -(-len(self.crops) // 2)


class Convergence(NamedTuple):
    """How fast a run came to its final PSNR. An entry of `reached` is (iterations, hours), None if it never was.

    reached: the first validation within 0.1 dB of the run's own final value; within 0.05 dB; not below the lowest final
        value of all runs.
    area: PSNR's mean over the iterations that all runs have validated, by the trapezoid rule, in dB; or None.
    """

    label: str
    final: float
    reached: list[tuple[int, float] | None]
    area: float | None


def main(argv: list[str]) -> int:
    """Run `basicsr report` with the arguments `argv`."""
    args = _parser().parse_args(argv)
    if args.pictures < 0:
        raise ValueError(f"--pictures is {args.pictures}; give 0 or more")
    runs = read_experiments(args.experiments)
    compared = compare(runs, args.pictures) if args.pictures else Comparison([], [], "")
    text, figures = report(runs, compared, args.title)
    page.write(Path(args.output), text, figures)
    for run in runs:
        for note in run.notes:
            print(f"basicsr report: {run.label}: {note}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="basicsr report",
        description="Compare training runs on one HTML page: learning curves, convergence, options, pictures. It reads "
        "what `basicsr train` or BasicSR itself wrote into experiments/NAME.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("experiments", nargs="+", metavar="EXPERIMENT", help="the folder of a run: experiments/NAME")
    parser.add_argument("-o", "--output", default="report.html", help="the HTML file; figures go to NAME_figures/")
    parser.add_argument("--title", default="Training runs", help="what the page is called")
    parser.add_argument(
        "--pictures",
        type=int,
        default=4,
        metavar="N",
        help="how many validation pictures to show; 0: run no network, show the curves only",
    )
    return parser


def report(runs: Sequence[Experiment], compared: Comparison, title: str) -> tuple[str, dict[str, bytes]]:
    """The page, and the PNG files of its figures by name."""
    looks = charts.looks([run.label for run in runs])
    curves = {dataset: found for dataset in _datasets(runs) if (found := _psnr_curves(runs, dataset))}
    drawn = {
        "Learning curves": {
            f"psnr_{dataset}_{axis}": charts.psnr_chart(runs, some, dataset, by_hours, _baseline(compared, dataset))
            for dataset, some in curves.items()
            for axis, by_hours in AXES.items()
        },
        "Training loss": {
            f"{loss}_{axis}": charts.loss_chart(runs, loss, by_hours)
            for loss in _losses(runs)
            for axis, by_hours in AXES.items()
        },
        "Complexity": {
            name: charts.complexity_chart(compared, looks, gain)
            for name, gain in (("complexity", False), ("complexity_gain", True))
            if len(compared.pictures) >= charts.MIN_PICTURES and len(compared.labels()) > 1
        },
    }
    text = page.template(Path(__file__).with_name("report_template.html")).render(
        title=title,
        tiles=_tiles(runs, curves),
        runs=[(run.label, _summary(run)) for run in runs],
        colors={label: color for label, (_, color) in looks.items()},
        notes=[(run.label, note) for run in runs for note in run.notes],
        charts={
            heading: {name: page.data_uri(chart, "png") for name, chart in some.items()}
            for heading, some in drawn.items()
        },
        within=WITHIN,
        convergence={dataset: convergence(some) for dataset, some in curves.items()},
        finals=finals(runs),
        differences=differences(runs),
        strips=[_strip(example) for example in compared.examples],
        rhos=_rhos(compared),
        baseline=compared.baseline,
        duration=duration,
    )
    figures = {name.replace("/", "_"): chart for some in drawn.values() for name, chart in some.items()}
    figures |= {f"picture_{number}": charts.strip(example) for number, example in enumerate(compared.examples, 1)}
    return text, figures


def convergence(curves: dict[str, Curve]) -> list[Convergence]:
    """How fast each of the `curves`, PSNR on one dataset by the labels of runs, came to its last value."""
    first = max(curve.iters[0] for curve in curves.values())
    last = min(curve.iters[-1] for curve in curves.values())
    lowest = min(curve.values[-1] for curve in curves.values())
    rows = []
    for label, curve in curves.items():
        final = curve.values[-1]
        levels = [*(final - within for within in WITHIN), lowest]
        rows.append(Convergence(label, final, [_reached(curve, level) for level in levels], mean(curve, first, last)))
    return rows


def mean(curve: Curve, first: int, last: int) -> float | None:
    """The mean of a curve, linear between its points, over the iterations from `first` to `last`; None if none lie
    between."""
    if last <= first:
        return None
    iters = np.unique([first, *(iteration for iteration in curve.iters if first < iteration < last), last])
    return float(np.trapezoid(np.interp(iters, curve.iters, curve.values), iters) / (last - first))


def _reached(curve: Curve, level: float) -> tuple[int, float] | None:
    points = zip(curve.iters, curve.hours, curve.values, strict=True)
    return next(((iteration, hours) for iteration, hours, value in points if value >= level), None)


def finals(runs: Sequence[Experiment]) -> dict[str, tuple[list[str], list[tuple[str, list[dict[str, Any] | None]]]]]:
    """dataset -> (metrics, rows); a row is a run's label and, for each metric, its last and best value, `iter` of the
    best, and whether each is the `top` of all runs."""
    tables = {}
    for dataset in _datasets(runs):
        metrics = list(dict.fromkeys(name for run in runs for data, name in run.validated() if data == dataset))
        columns = [[_final(run, dataset, metric) for run in runs] for metric in metrics]
        for column in columns:
            values = [cell for cell in column if cell]
            for kind in ("last", "best"):
                top = max((cell["sign"] * cell[kind] for cell in values), default=None)
                for cell in values:
                    cell[f"{kind}_is_top"] = len(values) > 1 and cell["sign"] * cell[kind] == top
        rows = zip(*columns, strict=True)
        tables[dataset] = (metrics, [(run.label, list(row)) for run, row in zip(runs, rows, strict=True)])
    return tables


def _final(run: Experiment, dataset: str, metric: str) -> dict[str, Any] | None:
    """A cell of `finals`; None where the run did not measure it."""
    curve = run.curve(dataset, metric)
    if not curve.values:
        return None
    options = ((run.options.get("val") or {}).get("metrics") or {}).get(metric) or {}
    sign = -1 if options.get("better") == "lower" else 1
    best = int(np.argmax(sign * np.array(curve.values)))
    return {"sign": sign, "last": curve.values[-1], "best": curve.values[best], "iter": curve.iters[best]}


def differences(runs: Sequence[Experiment]) -> dict[str, list[str]]:
    """Options that are not the same in all runs: `train:optim_g:lr` -> each run's value, as text."""
    known = [flattened(run.options) for run in runs if run.options]
    keys = [key for key in dict.fromkeys(itertools.chain(*known)) if key != "name"]
    columns = [flattened(run.options) for run in runs]
    differing = [key for key in keys if len({str(options.get(key, ABSENT)) for options in known}) > 1]
    return {key: [str(options.get(key, ABSENT)) for options in columns] for key in differing}


def flattened(options: dict[str, Any], above: str = "") -> dict[str, Any]:
    """{'train': {'optim_g': {'lr': 1}}} as {'train:optim_g:lr': 1}."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{above}{key}:")
        else:
            flat[f"{above}{key}"] = value
    return flat


def _datasets(runs: Sequence[Experiment]) -> list[str]:
    return list(dict.fromkeys(dataset for run in runs for dataset, _ in run.validated()))


def _losses(runs: Sequence[Experiment]) -> list[str]:
    """The names of all training losses: BasicSR's begin with l_."""
    names = dict.fromkeys(row.name for run in runs for row in run.records if not row.dataset)
    return [name for name in names if name.startswith("l_")]


def _psnr_curves(runs: Sequence[Experiment], dataset: str) -> dict[str, Curve]:
    found = {run.label: run.curve(dataset, psnr_options(run.options)[0]) for run in runs}
    return {label: curve for label, curve in found.items() if curve.values}


def _summary(run: Experiment) -> dict[str, str]:
    """A run's row in the first table."""
    train = (run.options.get("datasets") or {}).get("train") or {}
    batch, patch, total = train.get("batch_size_per_gpu"), train.get("gt_size"), run.training.get("total_iter")
    return {
        "network": str((run.options.get("network_g") or {}).get("type", ABSENT)),
        "parameters": f"{run.parameters:,}" if run.parameters else ABSENT,
        "batch × GT patch": f"{batch} × {patch}²" if batch and patch else ABSENT,
        "iterations": f"{run.iterations:,}" + (f" of {total:,}" if total and total != run.iterations else ""),
        "time": duration(run.hours),
        "s / iteration": f"{run.hours * 3600 / run.iterations:.3f}" if run.iterations else ABSENT,
        "resumed at": ", ".join(f"{resume:,}" for resume in run.resumes) or ABSENT,
        "weights shown": run.weights.name if run.weights else ABSENT,
    }


def _tiles(runs: Sequence[Experiment], curves: dict[str, dict[str, Curve]]) -> dict[str, str]:
    """The figures at the top of the page, by their labels."""
    tiles = {"runs": str(len(runs)), "of training": duration(sum(run.hours for run in runs))}
    for dataset, some in curves.items():
        value, label = max((max(curve.values), label) for label, curve in some.items())
        tiles[f"best on {dataset}, by {label}"] = f"{value:.2f} dB"
    return tiles


def _baseline(compared: Comparison, dataset: str) -> tuple[str, float] | None:
    """The label and mean PSNR of the baseline on a dataset; None where it was not measured, or equals GT somewhere."""
    values = [one.psnr[compared.baseline] for one in compared.pictures if one.dataset == dataset]
    return (compared.baseline, float(np.mean(values))) if values and np.isfinite(values).all() else None


def _strip(example: Example) -> Strip:
    psnr = example.scored.psnr
    crops = {label: page.png_file(crop) for label, crop in example.crops().items()}
    return Strip(
        example.scored.name,
        f"{example.scored.dataset}, complexity {example.scored.complexity:.1f}",
        page.data_uri(page.jpeg(page.fit(example.gt, WHOLE)), "jpeg"),
        [100 * share for share in example.window().mark(example.lq)],
        [
            (label, f"{psnr[label]:.2f} dB" if label in psnr else "", page.data_uri(crop, "png"))
            for label, crop in crops.items()
        ],
    )


def _rhos(compared: Comparison) -> list[tuple[str, int, float, float]]:
    """(label, pictures, mean PSNR, Pearson's rho of PSNR and complexity), where there are pictures enough."""
    rows = []
    for label in compared.labels():
        points = compared.points(label)
        if len(points) >= charts.MIN_PICTURES:
            scores = [analyze.Score("", complexity, psnr, 0) for complexity, psnr, _ in points]
            rows.append((label, len(points), points[:, 1].mean(), analyze.correlate(scores, "psnr").pearson))
    return rows


def duration(hours: float) -> str:
    """0.07 as '4.2 min', 12.34 as '12.3 h'."""
    unit, factor = charts.time_unit(hours)
    return f"{hours * factor:.1f} {dict(hours='h', minutes='min', seconds='s')[unit]}"
