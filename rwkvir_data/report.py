"""`resyn report`: what a score table or a built set holds and what was dropped, as one HTML file and its figures."""

from __future__ import annotations

import argparse
import base64
import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import jinja2
import matplotlib
import numpy as np
import pyarrow as pa
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from rwkvir_data import sources
from rwkvir_data.build import read_scores
from rwkvir_data.complexity import complexity
from rwkvir_data.parallel import available_cores, bounded_map, workers
from rwkvir_data.select import KINDS, reason_of, tally

INK, BELOW, ABOVE, BEFORE = "#1d2430", "#3b75af", "#d9773f", "#aab2bf"
KIND_COLORS = dict(zip(KINDS, ("#2f8f6b", "#8a5ea8"), strict=True))
DIVERGING = LinearSegmentedColormap.from_list("complexity", ["#1f4e79", BELOW, "#f4f4f2", ABOVE, "#8f3d12"])
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#eceef1",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}
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
    parser.add_argument("--title", default="ReSyn", help="what the page is called")
    parser.add_argument("--workers", type=int, default=available_cores(), help="processes")
    args = parser.parse_args(argv)
    table, out = read_scores(args.table), Path(args.output)
    with workers(args.workers) as pool:
        page, figures = report(table, args.title, pool)
    folder = out.with_name(f"{out.stem}_figures")
    folder.mkdir(parents=True, exist_ok=True)
    for name, png in figures.items():
        (folder / f"{name}.png").write_bytes(png)
    out.write_text(page, encoding="utf-8")
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB) and {folder}: {', '.join(f'{name}.png' for name in figures)}")
    return 0


def report(table: pa.Table, title: str, pool: Executor) -> tuple[str, dict[str, bytes]]:
    """The page, and the PNG files of its figures by name.

    Raises:
        ValueError: no picture of the table was scored.
    """
    rows = table.to_pylist()
    scored = [row for row in rows if row["complexity"] is not None]
    if not scored:
        raise ValueError("no picture of the table could be scored; the column `dropped` says why")
    selected = [row for row in scored if row.get("split")]
    shown = sorted(selected or scored, key=lambda row: row["complexity"])
    contacts, mapped = _contacts(shown), _spread(shown, MAPS)
    filtered = {reason: [row for row in rows if reason_of(row) == reason] for reason in FILTERS}
    twins = _twins(rows)

    wanted = [row for some in contacts.values() for row in some]
    wanted += [row for some in filtered.values() for row in some[:PER_ROW]]
    wanted += [row for pair in twins[:MAX_PAIRS] for row in pair]
    images = dict(zip(map(_label, wanted), bounded_map(pool, thumbnail, map(_place, wanted)), strict=True))
    maps = list(bounded_map(pool, map_image, map(_place, mapped)))

    def show(row: Row, caption: str) -> Thumbnail:
        return Thumbnail(_label(row), caption.format(**row), _data_uri(images[_label(row)], "jpeg"))

    figures = {
        "sorted": curves(scored, selected),
        "histograms": histograms(scored, selected),
        "contacts": _sheet([[images[_label(row)] for row in some] for some in contacts.values()]),
        "maps": _sheet([maps[i : i + 2] for i in range(0, len(maps), 2)]),
    }
    header, *counts = tally(table)
    page = _template().render(
        title=title,
        tiles=_tiles(rows, shown, "selected" if selected else "scored"),
        what="selected" if selected else "scored",
        header=header,
        counts=counts,
        sorted_chart=_data_uri(figures["sorted"], "png"),
        histogram_chart=_data_uri(figures["histograms"], "png"),
        contacts={name: [show(row, "{complexity:.1f}") for row in some] for name, some in contacts.items()},
        maps=[
            Thumbnail(_label(row), f"{row['complexity']:.1f}", _data_uri(image, "jpeg"))
            for row, image in zip(mapped, maps, strict=True)
        ],
        filters={
            f"{reason}: {len(some)}": [show(row, FILTERS[reason]) for row in some[:PER_ROW]]
            for reason, some in filtered.items()
            if some
        },
        duplicates=len(twins),
        pairs=[(show(left, "dropped"), show(right, "original")) for left, right in twins[:MAX_PAIRS]],
        unreadable=[(_label(row), row["dropped"]) for row in rows if row["complexity"] is None][:MAX_UNREADABLE],
    )
    return page, figures


def curves(before: Sequence[Row], after: Sequence[Row]) -> bytes:
    """The paper's figure, per source: complexity, sorted, before and after selection; PNG."""
    names = list(dict.fromkeys(row["source"] for row in before))
    columns = min(len(names), 3)
    lines = -(-len(names) // columns)
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(11, 3.5 * lines), layout="constrained")
        grid = fig.subplots(lines, columns, squeeze=False, sharey=True)
        for axes, name in zip(grid.flat, names, strict=False):
            _curve(axes, [row["complexity"] for row in before if row["source"] == name], BEFORE, "scored")
            _curve(axes, [row["complexity"] for row in after if row["source"] == name], None, "selected")
            axes.axhline(0, color=INK, linewidth=0.9)
            axes.set(title=name, xlim=(0, 100), xticks=range(0, 100, 20), xlabel="share of pictures, sorted (%)")
            axes.legend(loc="upper left")
        for axes in list(grid.flat)[len(names) :]:
            axes.set_visible(False)
        grid[0, 0].set_ylabel("complexity")
    return _png(fig)


def _curve(axes: Any, scores: Sequence[float], color: str | None, label: str) -> None:
    """One sorted curve; without a colour it is filled in two colours, below and above zero."""
    if not len(scores):
        return
    values = np.sort(scores)
    if len(values) > CURVE_POINTS:
        values = np.quantile(values, np.linspace(0, 1, CURVE_POINTS))
    edges, steps = np.linspace(0, 100, len(values) + 1), np.append(values, values[-1])
    if color is None:
        for shade, part in ((BELOW, np.minimum(steps, 0)), (ABOVE, np.maximum(steps, 0))):
            axes.fill_between(edges, part, color=shade, alpha=0.3, linewidth=0, step="post")
    label = f"{label}: {len(scores)}, {np.mean(np.array(scores) < 0):.0%} below zero"
    axes.step(edges, steps, color=color or INK, linewidth=1.6, label=label, where="post")


def histograms(before: Sequence[Row], after: Sequence[Row]) -> bytes:
    """Two histograms of complexity: before and after selection, and by kind (after it, if there is one); PNG."""
    scores = np.array([row["complexity"] for row in before])
    edges = np.linspace(scores.min(), scores.max() + 1e-6, BINS + 1)
    panels: dict[str, list[tuple[str, Sequence[Row], str]]] = {
        "before and after": [("scored", before, BEFORE), ("selected", after, BELOW)],
        f"real and synthetic, {'selected' if after else 'scored'}": [
            (kind, [row for row in after or before if row["kind"] == kind], KIND_COLORS[kind]) for kind in KINDS
        ],
    }
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(11, 3.5), layout="constrained")
        for axes, (title, groups) in zip(fig.subplots(1, 2, sharey=True), panels.items(), strict=True):
            for label, rows, color in groups:
                if rows:
                    weights = np.full(len(rows), 100 / len(rows))
                    values = [row["complexity"] for row in rows]
                    axes.hist(values, edges, weights=weights, color=color, alpha=0.6, label=f"{label}: {len(rows)}")
            axes.axvline(0, color=INK, linewidth=0.9)
            axes.set(title=title, xlabel="complexity", ylabel="share of pictures (%)")
            axes.legend()
    return _png(fig)


def thumbnail(job: tuple[str, str]) -> bytes | None:
    """The picture (root, name) as a small JPEG file, or None where it cannot be read any more."""
    try:
        picture = sources.decode(sources.read(*job))
    except (OSError, ValueError):
        return None
    return _jpeg(_fit(picture, THUMB))


def map_image(job: tuple[str, str]) -> bytes | None:
    """The picture (root, name) and its complexity map as one JPEG file, or None where it cannot be read any more."""
    try:
        picture = sources.decode(sources.read(*job))
    except (OSError, ValueError):
        return None
    _, scores = complexity(picture, map=True)
    colors = DIVERGING(np.clip(_fit(scores, MAP_SIDE) / (2 * MAP_RANGE) + 0.5, 0, 1))[..., :3]
    return _jpeg(np.concatenate([_fit(picture, MAP_SIDE), np.uint8(255 * colors)], axis=1))


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report_template.html")


def _label(row: Row) -> str:
    return f"{row['source']}/{row['name']}"


def _place(row: Row) -> tuple[str, str]:
    return row["root"], row["name"]


def _tiles(rows: Sequence[Row], shown: Sequence[Row], what: str) -> dict[str, str]:
    """The figures at the top of the page, by their labels."""
    kinds = Counter(row["kind"] for row in shown)
    return {
        "in the sources": f"{len(rows):,}",
        what: f"{len(shown):,}",
        "real / synthetic": f"{kinds['real']:,} / {kinds['synthetic']:,}",
        "below zero complexity": f"{np.mean([row['complexity'] < 0 for row in shown]):.0%}",
        "megapixels": f"{sum(row['width'] * row['height'] for row in shown) / 1e6:,.0f}",
    }


def _contacts(by_score: Sequence[Row]) -> dict[str, Sequence[Row]]:
    """The pictures at both ends and in the middle of the sorted `by_score`."""
    middle = max(len(by_score) - PER_ROW, 0) // 2
    return {"lowest": by_score[:PER_ROW], "median": by_score[middle:][:PER_ROW], "highest": by_score[-PER_ROW:]}


def _spread(by_score: Sequence[Row], count: int) -> list[Row]:
    """`count` of the pictures, evenly from the lowest to the highest."""
    places = np.unique(np.linspace(0, len(by_score) - 1, count).round().astype(int))
    return [by_score[place] for place in places]


def _twins(rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """Each duplicate with the picture that it duplicates."""
    by_label = {_label(row): row for row in rows}
    originals = ((row, re.fullmatch("duplicate of (.*)", row["dropped"] or "", re.DOTALL)) for row in by_label.values())
    return [(row, by_label[match[1]]) for row, match in originals if match]


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


def _png(fig: Figure) -> bytes:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=170)
    return buffer.getvalue()


def _fit(picture: np.ndarray, side: int) -> np.ndarray:
    """The picture (H, W[, 3]) reduced so that its longest side is at most `side`."""
    factor = min(1, side / max(picture.shape[:2]))
    height, width = (max(round(length * factor), 1) for length in picture.shape[:2])
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


def _jpeg(picture: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes()


def _data_uri(image: bytes | None, kind: str) -> str | None:
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}" if image else None
