"""`resyn report`: what a score table or a built set holds and what was dropped, as one HTML file and its figures."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from rwkvir_data import page, sources
from rwkvir_data.build import read_scores
from rwkvir_data.complexity import complexity
from rwkvir_data.parallel import add_workers_option, bounded_map, workers
from rwkvir_data.select import KINDS, reasons, tally

KIND_COLORS = dict(zip(KINDS, (page.GREEN, page.PURPLE), strict=True))
DIVERGING = LinearSegmentedColormap.from_list("complexity", ["#1f4e79", page.BLUE, "#f4f4f2", page.ORANGE, "#8f3d12"])
MAP_RANGE = 20  # what the maps' colours span on either side of zero
CURVE_POINTS, BINS = 2000, 24
THUMB, MAP_SIDE = 360, 520  # longest side in pixels
PER_ROW, MAPS = 6, 6  # pictures of a kind
SHEET_ROW = 240  # pixels
MAX_PAIRS, MAX_UNREADABLE = 8, 50
# What the selection's filters drop, and how a caption shows what they saw.
FILTERS = {
    "small": "{width}×{height}",
    "blurred": "blur {blur:.0f}",
    "sharp": "blur {blur:.0f}",
    "flat": "{flatness:.0%} flat",
    "leak": "{dropped}",
}

COLUMNS = "source root name kind width height complexity blur flatness dropped split".split()

Row = dict[str, Any]


class Thumbnail(NamedTuple):
    """A picture as the page shows it: its name, a value above it, and a data URI (None: it cannot be read)."""

    name: str
    value: str
    image: str | None


def main(argv: list[str]) -> int:
    """Run `resyn report` with the arguments `argv`."""
    parser = argparse.ArgumentParser(
        prog="resyn report",
        description="Show what a score table or a built set holds, and what was dropped, as one HTML file.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("table", metavar="DIR|TABLE", help="what resyn build made, or the table of resyn score")
    parser.add_argument("-o", "--output", default="report.html", help="the HTML file; figures go to NAME_figures/")
    parser.add_argument("--reference", metavar="TABLE", help="scores of another set, DIV2K's say, to compare with")
    parser.add_argument("--title", default="ReSyn", help="what the page is called")
    add_workers_option(parser)
    args = parser.parse_args(argv)
    table, out = read_scores(args.table), Path(args.output)
    references = {Path(args.reference).stem: read_scores(args.reference)} if args.reference else {}
    with workers(args.workers) as pool:
        text, figures = report(table, args.title, pool, references)
    page.write(out, text, figures)
    return 0


def report(
    table: pa.Table, title: str, pool: Executor, references: Mapping[str, pa.Table] | None = None
) -> tuple[str, dict[str, bytes]]:
    """The page, and the PNG files of its figures by name. `references`: score tables of other sets, by their names.

    Raises:
        ValueError: no picture of the table was scored.
    """
    table = table.select([name for name in COLUMNS if name in table.column_names])
    scored = table.filter(pc.field("complexity").is_valid())
    if not len(scored):
        raise ValueError("no picture of the table could be scored; the column `dropped` says why")
    selected = scored.filter(pc.field("split").is_valid()) if "split" in table.column_names else scored.slice(0, 0)
    shown, what = (selected, "selected") if len(selected) else (scored, "scored")
    by_score = np.argsort(shown["complexity"].to_numpy(), kind="stable")
    contacts = {name: shown.take(places).to_pylist() for name, places in _contacts(by_score).items()}
    mapped = shown.take(_spread(by_score, MAPS)).to_pylist()
    dropped = {reason: table.filter(pc.equal(reasons(table), reason)) for reason in (*FILTERS, "duplicate")}
    examples = {reason: dropped[reason].slice(0, PER_ROW).to_pylist() for reason in FILTERS}
    twins = _twins(table, dropped["duplicate"].slice(0, MAX_PAIRS).to_pylist())
    unreadable = table.filter(pc.field("complexity").is_null())

    wanted = [row for some in (*contacts.values(), *examples.values(), *twins) for row in some]
    images = dict(zip(map(_label, wanted), bounded_map(pool, thumbnail, map(_place, wanted), _absent), strict=True))
    maps = list(bounded_map(pool, map_image, map(_place, mapped), _absent))

    def show(row: Row, caption: str) -> Thumbnail:
        return Thumbnail(_label(row), caption.format(**row), page.data_uri(images[_label(row)], "jpeg"))

    figures = {
        "sorted": curves(scored, selected),
        "histograms": histograms(scored, selected, references or {}),
        "contacts": _sheet([[images[_label(row)] for row in some] for some in contacts.values()]),
        "maps": _sheet([maps[i : i + 2] for i in range(0, len(maps), 2)]),
    }
    header, *counts = tally(table)
    text = page.template(Path(__file__).with_name("report_template.html")).render(
        title=title,
        tiles=_tiles(table, shown, what),
        what=what,
        header=header,
        counts=counts,
        sorted_chart=page.data_uri(figures["sorted"], "png"),
        histogram_chart=page.data_uri(figures["histograms"], "png"),
        contacts={name: [show(row, "{complexity:.1f}") for row in some] for name, some in contacts.items()},
        maps=[
            Thumbnail(_label(row), f"{row['complexity']:.1f}", page.data_uri(image, "jpeg"))
            for row, image in zip(mapped, maps, strict=True)
        ],
        filters={
            f"{reason}: {len(dropped[reason]):,}": [show(row, FILTERS[reason]) for row in rows]
            for reason, rows in examples.items()
            if rows
        },
        duplicates=len(dropped["duplicate"]),
        pairs=[(show(left, "dropped"), show(right, "original")) for left, right in twins],
        unreadable=len(unreadable),
        reasons=[(_label(row), row["dropped"]) for row in unreadable.slice(0, MAX_UNREADABLE).to_pylist()],
    )
    return text, figures


def curves(before: pa.Table, after: pa.Table) -> bytes:
    """The paper's figure, per source: complexity, sorted, before and after selection; PNG."""
    names = before["source"].unique().to_pylist()
    columns = min(len(names), 3)
    lines = -(-len(names) // columns)
    with matplotlib.rc_context(page.STYLE):
        fig = Figure(figsize=(11, 3.5 * lines), layout="constrained")
        grid = fig.subplots(lines, columns, squeeze=False, sharey=True)
        for axes, name in zip(grid.flat, names, strict=False):
            scores = _scores(before, "source", name)
            _curve(axes, scores, page.GREY, "scored")
            _curve(axes, _scores(after, "source", name), None, "selected")
            axes.axhline(0, color=page.INK, linewidth=0.9)
            drawn = f"\n{CURVE_POINTS:,} quantiles are drawn" if len(scores) > CURVE_POINTS else ""
            label = f"share of pictures, sorted (%){drawn}"
            axes.set(title=name, xlim=(0, 100), xticks=range(0, 100, 20), xlabel=label)
            axes.legend(loc="upper left")
        for axes in list(grid.flat)[len(names) :]:
            axes.set_visible(False)
        grid[0, 0].set_ylabel("complexity")
    return page.png(fig)


def _curve(axes: Any, scores: Sequence[float] | np.ndarray, color: str | None, label: str) -> None:
    """One sorted curve; without a colour it is filled in two colours, below and above zero."""
    if not len(scores):
        return
    values = np.sort(scores)
    if len(values) > CURVE_POINTS:
        values = np.quantile(values, np.linspace(0, 1, CURVE_POINTS))
    edges, steps = np.linspace(0, 100, len(values) + 1), np.append(values, values[-1])
    if color is None:
        for shade, part in ((page.BLUE, np.minimum(steps, 0)), (page.ORANGE, np.maximum(steps, 0))):
            axes.fill_between(edges, part, color=shade, alpha=0.3, linewidth=0, step="post")
    label = f"{label}: {len(scores):,}, {np.mean(np.array(scores) < 0):.0%} below zero"
    axes.step(edges, steps, color=color or page.INK, linewidth=1.6, label=label, where="post")


def histograms(before: pa.Table, after: pa.Table, references: Mapping[str, pa.Table]) -> bytes:
    """Two histograms of complexity: before and after selection, with the outlines of other sets, and by kind (after
    selection, if there is one); PNG."""
    last = after if len(after) else before
    scores, chosen, *others = (
        table["complexity"].drop_null().to_numpy() for table in (before, after, *references.values())
    )
    everything = np.concatenate([scores, *others])
    edges = np.linspace(everything.min(), everything.max() + 1e-6, BINS + 1)
    panels: dict[str, list[tuple[str, np.ndarray, str | None]]] = {
        "before and after": [
            ("scored", scores, page.GREY),
            ("selected", chosen, page.BLUE),
            *((name, values, None) for name, values in zip(references, others, strict=True)),
        ],
        f"real and synthetic, {'selected' if len(after) else 'scored'}": [
            (kind, _scores(last, "kind", kind), KIND_COLORS[kind]) for kind in KINDS
        ],
    }
    with matplotlib.rc_context(page.STYLE):
        fig = Figure(figsize=(11, 3.5), layout="constrained")
        for axes, (title, groups) in zip(fig.subplots(1, 2, sharey=True), panels.items(), strict=True):
            for label, values, color in groups:
                if len(values):
                    weights = np.full(len(values), 100 / len(values))
                    drawn: Any = {"color": color, "alpha": 0.6} if color else {"color": page.INK, "histtype": "step"}
                    axes.hist(values, edges, weights=weights, label=f"{label}: {len(values):,}", **drawn)
            axes.axvline(0, color=page.INK, linewidth=0.9)
            axes.set(title=title, xlabel="complexity", ylabel="share of pictures (%)")
            axes.legend()
    return page.png(fig)


def _scores(table: pa.Table, column: str, value: str) -> np.ndarray:
    """The complexities of the rows with this value."""
    return table.filter(pc.field(column) == value)["complexity"].to_numpy()


def thumbnail(job: tuple[str, str]) -> bytes | None:
    """The picture (root, name) as a small JPEG file, or None where it cannot be read any more."""
    try:
        picture = sources.decode(sources.read(*job))
    except (OSError, ValueError):
        return None
    return page.jpeg(page.fit(picture, THUMB))


def _absent(job: tuple[str, str]) -> None:
    """What `thumbnail` and `map_image` are of a picture whose decoding kills the process."""


def map_image(job: tuple[str, str]) -> bytes | None:
    """The picture (root, name) and its complexity map as one JPEG file, or None where it cannot be read any more."""
    try:
        picture = sources.decode(sources.read(*job))
    except (OSError, ValueError):
        return None
    _, scores = complexity(picture, map=True)
    colors = DIVERGING(np.clip(page.fit(scores, MAP_SIDE) / (2 * MAP_RANGE) + 0.5, 0, 1))[..., :3]
    return page.jpeg(np.concatenate([page.fit(picture, MAP_SIDE), np.uint8(255 * colors)], axis=1))


def _label(row: Row) -> str:
    return f"{row['source']}/{row['name']}"


def _place(row: Row) -> tuple[str, str]:
    return row["root"], row["name"]


def _tiles(table: pa.Table, shown: pa.Table, what: str) -> dict[str, str]:
    """The figures at the top of the page, by their labels."""
    real, synthetic = (len(_scores(shown, "kind", kind)) for kind in KINDS)
    pixels = shown["width"].to_numpy().astype(float) @ shown["height"].to_numpy()
    return {
        "in the sources": f"{len(table):,}",
        what: f"{len(shown):,}",
        "real / synthetic": f"{real:,} / {synthetic:,}",
        "below zero complexity": f"{np.mean(shown['complexity'].to_numpy() < 0):.0%}",
        "megapixels": f"{pixels / 1e6:,.0f}",
    }


def _contacts(by_score: np.ndarray) -> dict[str, np.ndarray]:
    """What lies at both ends and in the middle of `by_score`."""
    middle = max(len(by_score) - PER_ROW, 0) // 2
    return {"lowest": by_score[:PER_ROW], "median": by_score[middle:][:PER_ROW], "highest": by_score[-PER_ROW:]}


def _spread(by_score: np.ndarray, count: int) -> np.ndarray:
    """`count` entries, evenly from the first to the last."""
    return by_score[np.unique(np.linspace(0, len(by_score) - 1, count).round().astype(int))]


def _twins(table: pa.Table, duplicates: list[Row]) -> list[tuple[Row, Row]]:
    """Each of the duplicates with the picture that it duplicates."""
    originals = [row["dropped"].removeprefix("duplicate of ") for row in duplicates]
    labels = pc.binary_join_element_wise(table["source"], table["name"], "/")
    found = table.filter(pc.is_in(labels, pa.array(originals, pa.string()))).to_pylist()
    by_label = {_label(row): row for row in found}
    return [(row, by_label[original]) for row, original in zip(duplicates, originals, strict=True)]


def _sheet(rows: Sequence[Sequence[bytes | None]]) -> bytes:
    """JPEG files side by side, a row each, as one PNG file; what is missing stays white."""
    lines = []
    for row in rows:
        pictures = [sources.decode(jpeg) for jpeg in row if jpeg]
        scaled = [cv2.resize(p, (round(p.shape[1] * SHEET_ROW / len(p)), SHEET_ROW)) for p in pictures]
        lines.append(np.concatenate([np.empty((SHEET_ROW, 0, 3), np.uint8), *scaled], axis=1))
    width = max(1, *(line.shape[1] for line in lines))
    sheet = [np.pad(line, ((0, 0), (0, width - line.shape[1]), (0, 0)), constant_values=255) for line in lines]
    return cv2.imencode(".png", np.concatenate(sheet)[..., ::-1])[1].tobytes()
