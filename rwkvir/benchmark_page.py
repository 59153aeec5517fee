"""The tables of `basicsr benchmark`: benchmark.csv, images.csv, benchmark.md and benchmark.html."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from rwkvir.evaluation import Task
from rwkvir.published import PUBLISHED
from rwkvir_data.page import BLUE, GREY, INK, STYLE, data_uri, replace, template

COSTS = ("params", "MACs", "s/picture", "MiB")


class Row(NamedTuple):
    """A model on a set: means over its pictures. `source` is measured or published; what is not known is None."""

    model: str
    task: str
    scale: int
    set: str
    images: int | None
    psnr: float
    ssim: float | None = None
    params: float | None = None
    macs: float | None = None
    seconds: float | None = None
    peak_mib: float | None = None
    source: str = "published"


class ImageRow(NamedTuple):
    """A model on a picture."""

    model: str
    task: str
    scale: int
    set: str
    image: str
    psnr: float
    ssim: float
    seconds: float
    peak_mib: float | None


class Cell(NamedTuple):
    """A figure as text, and whether it is the best measured one of its column."""

    text: str
    best: bool = False


class Line(NamedTuple):
    """A row of a page's table: a model, its costs as text, and a PSNR and an SSIM for each set."""

    model: str
    where: str
    costs: list[str]
    cells: list[tuple[Cell, Cell]]


class Section(NamedTuple):
    """A task on a page. `pictures`: for each set its models, and a line of PSNR for each picture."""

    task: Task
    sets: list[str]
    measured: list[Line]
    published: list[Line]
    chart: str | None
    pictures: dict[str, tuple[list[str], list[tuple[str, list[Cell]]]]]


def write(
    out: Path,
    rows: Sequence[Row],
    images: Sequence[ImageRow],
    tasks: Iterable[Task],
    facts: Sequence[str],
    problems: Sequence[str],
) -> str:
    """Write all four files into `out`, each replacing the one before only when it is whole.

    Returns:
        The measured tables alone, as Markdown.
    """
    sections = [section(task, rows, images) for task in tasks]
    replace(out / "images.csv", _csv(ImageRow._fields[:-1], (row[:-1] for row in images)))
    replace(out / "benchmark.csv", _csv(Row._fields, rows))
    replace(out / "benchmark.md", markdown(sections, facts, problems).encode())
    page = template(Path(__file__).with_name("benchmark_template.html")).render(
        title="Benchmark", sections=sections, costs=COSTS, facts=facts, problems=problems, tiles=_tiles(rows, images)
    )
    replace(out / "benchmark.html", page.encode())
    return markdown([one._replace(published=[]) for one in sections])


def section(task: Task, rows: Sequence[Row], images: Sequence[ImageRow]) -> Section:
    """What the page shows of a task. Measured models come best first; published ones in their source's order."""
    own = [row for row in rows if row.task == task.name]
    measured = [row for row in own if row.source == "measured"]
    sets = list(dict.fromkeys(row.set for row in measured))
    models = sorted({row.model for row in measured}, key=lambda model: (-_mean(measured, model, sets), model))
    where = {(entry.model, entry.task): entry.where for entry in PUBLISHED}
    published = dict.fromkeys(row.model for row in own if row.source == "published" and row.set in sets)
    return Section(
        task,
        sets,
        [_line(model, "", measured, sets) for model in models],
        [_line(m, where[m, task.name], [r for r in own if r.source == "published"], sets) for m in published],
        chart(measured, sets),
        {name: _pictures([row for row in images if (row.task, row.set) == (task.name, name)], models) for name in sets},
    )


def markdown(sections: Sequence[Section], facts: Sequence[str] = (), problems: Sequence[str] = ()) -> str:
    """The tables as Markdown. Published rows are in italics and say so."""
    parts = ["# Benchmark\n"]
    for one in sections:
        header = ["model", *COSTS, *one.sets]
        lines = [[line.model, *line.costs, *map(_pair, line.cells)] for line in one.measured]
        lines += [
            [
                f"*{line.model} (published)*",
                *line.costs,
                *(f"*{_pair(cells)}*" if cells[0].text else "" for cells in line.cells),
            ]
            for line in one.published
        ]
        table = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
        parts.append(f"## {one.task.title}\n\nPSNR, dB / SSIM. {one.task.protocol}\n")
        parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in table) + "\n")
    if problems:
        parts.append("## Not measured\n\n" + "\n".join(f"- {problem}" for problem in problems) + "\n")
    return "\n".join([*parts, " ".join(facts)])


def chart(rows: Sequence[Row], sets: Sequence[str]) -> str | None:
    """PSNR, the mean over the sets, against multiply-adds: a picture as a data URI, if there are two such models."""
    macs = {row.model: row.macs for row in rows if row.macs}
    if len(macs) < 2:
        return None
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "benchmark"}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        axes = figure.subplots()
        for model, cost in macs.items():
            psnr = _mean(rows, model, sets)
            axes.scatter(cost / 1e9, psnr, s=70, color=BLUE)
            axes.annotate(model, (cost / 1e9, psnr), (7, 5), textcoords="offset points", color=INK)
        for model in {row.model for row in rows} - set(macs):
            axes.axhline(_mean(rows, model, sets), color=GREY, linestyle="--", label=model)
        axes.set(xscale="log", xlabel="MACs for 1280×720 output", ylabel="PSNR (dB), mean of the sets")
        for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            axis(lambda value, _: f"{value:g} G")
        axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.margins(x=0.25, y=0.2)
        axes.legend(loc="lower right")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return data_uri(buffer.getvalue(), "svg+xml")


def quantity(value: float | None) -> str:
    """A number with K, M, G or T: 869268 is 869.3 K. Empty for None."""
    if value is None:
        return ""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= factor:
            return f"{value / factor:.4g} {letter}"
    return f"{value:.0f}"


def _line(model: str, where: str, rows: Sequence[Row], sets: Sequence[str]) -> Line:
    own = {row.set: row for row in rows if row.model == model}
    any_row = next(iter(own.values()))
    pictures = sum(row.images or 0 for row in own.values())
    seconds = sum((row.seconds or 0) * (row.images or 0) for row in own.values()) / pictures if pictures else None
    peak = max((row.peak_mib for row in own.values() if row.peak_mib is not None), default=None)
    costs = [quantity(any_row.params), quantity(any_row.macs)]
    costs += ["" if seconds is None else f"{seconds:.3f}", "" if peak is None else f"{peak:.0f}"]
    cells = []
    for name in sets:
        row = own.get(name)
        column = [other for other in rows if other.set == name and other.source == "measured"]
        cells.append(
            (
                _cell(row and row.psnr, [other.psnr for other in column], ".2f"),
                _cell(row and row.ssim, [other.ssim for other in column], ".4f"),
            )
        )
    return Line(model, where, costs, cells)


def _cell(value: float | None, measured: Sequence[float | None], form: str) -> Cell:
    """A figure, the best one if none of the `measured` looks higher."""
    if value is None:
        return Cell("")
    best = len(measured) > 1 and format(value, form) == format(max(m for m in measured if m is not None), form)
    return Cell(format(value, form), best)


def _pictures(images: Sequence[ImageRow], models: Sequence[str]) -> tuple[list[str], list[tuple[str, list[Cell]]]]:
    figures = {(row.image, row.model): row.psnr for row in images}
    present = [model for model in models if any(row.model == model for row in images)]
    lines = []
    for image in dict.fromkeys(row.image for row in images):
        psnr = [figures.get((image, model)) for model in present]
        lines.append((image, [_cell(one, psnr, ".2f") for one in psnr]))
    return present, lines


def _mean(rows: Iterable[Row], model: str, sets: Sequence[str]) -> float:
    """The mean PSNR of a model over sets; one that lacks a set comes after all that do not."""
    psnr = [row.psnr for row in rows if row.model == model]
    return fmean(psnr) if len(psnr) == len(sets) else float("-inf")


def _pair(cells: tuple[Cell, Cell]) -> str:
    """PSNR and SSIM in Markdown."""
    return " / ".join(f"**{cell.text}**" if cell.best else cell.text for cell in cells if cell.text)


def _tiles(rows: Sequence[Row], images: Sequence[ImageRow]) -> dict[str, int]:
    """The figures at the top of the page, by their labels."""
    measured = [row for row in rows if row.source == "measured"]
    return {
        "models": len({row.model for row in measured}),
        "tasks": len({row.task for row in measured}),
        "test sets": len({row.set for row in measured}),
        "pictures restored": len(images),
    }


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()
