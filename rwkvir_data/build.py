"""`resyn build`: a training set for BasicSR from a score table, `select`ed, degraded, cut up and packed.

DIR/train_GT.lmdb, train_LQ_x4.lmdb, ...   sub-images; val_* and test_* hold whole pictures
DIR/train.parquet, val.parquet, ...        a row per stored key: key, source, kind, complexity, sha256 (of the GT)
DIR/selection.parquet                      the score table with `dropped`, `split` and `key` (a picture's; a
                                           sub-image's key is that, '_s' and a number)
DIR/recipe.json                            how it was made
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from rwkvir_data import degrade, sources
from rwkvir_data.aside import written_aside
from rwkvir_data.complexity import complexity
from rwkvir_data.lmdb_pack import PackedPicture, encode, lmdb_writer
from rwkvir_data.parallel import KILLED, add_workers_option, bounded_map, positive, workers
from rwkvir_data.score import measure
from rwkvir_data.select import SPLITS, Criteria, select, tally

SAMPLE = 8  # pictures made in advance to estimate the space needed
RESERVE = 1.1  # LMDB's pages, and what the sample does not tell
TABLE = pa.schema(
    [(name, pa.string()) for name in ("key", "source", "kind", "sha256")] + [("complexity", pa.float64())]
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is made of each picture that was selected."""

    degradations: tuple[str, ...] = ("x2", "x3", "x4")  # see degrade.degrade
    crop_size: int = 480  # of training sub-images; 0 keeps pictures whole
    step: int = 240
    thresh_size: int = 0  # a last strip is cut when more than this many pixels would be left over
    gray: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.crop_size and (self.crop_size % self.multiple or self.step % self.multiple or self.step < 1):
            raise ValueError(
                f"--crop-size {self.crop_size} and --step {self.step} must be multiples of {self.multiple}, so that "
                f"{', '.join(self.degradations)} fit; the default, 480 and 240, does for scales 2, 3 and 4"
            )

    @property
    def multiple(self) -> int:
        """What sides of GT are multiples of, so that every scale divides them."""
        return math.lcm(*map(degrade.scale_of, self.degradations))


class Made(NamedTuple):
    """What became of a picture: {'GT': [...], 'LQ_x2': [...]} and a row per key for the split's table, or a problem."""

    pictures: dict[str, list[PackedPicture]]
    rows: list[dict[str, Any]]
    problem: str | None = None


def main(argv: list[str]) -> int:
    """Run `resyn build` with the arguments `argv`."""
    args = _parser().parse_args(argv)
    levels = {"sr": args.scales, "denoise": args.sigmas, "jpeg": args.qualities}
    names = dict.fromkeys(f"{degrade.TASKS[task]}{level}" for task in args.task for level in levels[task])
    recipe = Recipe(tuple(names), args.crop_size, args.step, args.thresh_size, args.gray, args.seed)
    criteria = Criteria(
        min_side=args.min_side,
        blur=tuple(args.blur),
        max_flat=args.max_flat,
        distance=None if args.duplicate_distance < 0 else args.duplicate_distance,
        balance=args.balance,
        total=args.total,
        synthetic=args.synthetic,
        targets=dict(args.target),
        shuffle=args.order == "shuffled",
        val=args.val,
        test=args.test,
        seed=args.seed,
    )
    out = Path(os.path.abspath(args.output))
    _check_output(out, args.overwrite)
    table = read_scores(args.scores)
    if "split" in table.column_names:
        raise ValueError(f"{args.scores} is a selection of resyn build; give the table that resyn score wrote")
    benchmarks = {}
    if args.against and criteria.distance is None:
        raise ValueError("--against compares perceptual hashes; give a --duplicate-distance of 0 or more with it")
    if args.against:
        with workers(args.workers) as pool:
            benchmarks = benchmark_hashes(args.against, pool)
    selection, missing = select(table, criteria, benchmarks)
    print(summary(selection))
    for sentence in missing:
        print(sentence)
    if not any(selection["split"].to_pylist()):
        raise ValueError(f"nothing of {args.scores} is left to build; the reasons are in the table above")
    problems = build(selection, recipe, out, args.format, args.workers, args.overwrite, dataclasses.asdict(criteria))
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return 0


def read_scores(path: str) -> pa.Table:
    """The score table at `path`. Raises ValueError where it is none."""
    if os.path.isdir(path):
        path = os.path.join(path, "selection.parquet")
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no {path}; make it with: resyn score SOURCE... -o {path}")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a Parquet file ({error}); make it with: resyn score SOURCE...") from error
    wanted = "source root name kind width height bytes complexity blur flatness phash sha256 dropped".split()
    lacking = [column for column in wanted if column not in table.column_names]
    if lacking:
        raise ValueError(f"{path} has no column {', '.join(lacking)}; make the table with: resyn score SOURCE...")
    if not len(table):
        raise ValueError(f"{path} has no rows; score a source that has pictures")
    return table


def summary(selection: pa.Table) -> str:
    """What became of each source's pictures, as lines of text."""
    rows = [[str(cell) for cell in row] for row in tally(selection)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def benchmark_hashes(roots: Iterable[str], pool: Executor) -> dict[str, int]:
    """The perceptual hashes of all pictures of `roots`, as 64-bit numbers, by 'ROOT/NAME'.

    Raises:
        ValueError: a source without pictures, or a picture that cannot be read.
    """
    jobs = []
    for root in roots:
        named = [(root, entry.name) for entry in sources.entries(root)]
        if not named:
            raise ValueError(f"--against {root} has no pictures; correct the path")
        jobs += named
    hashes = bounded_map(pool, _hash_of, tqdm(jobs, desc="benchmarks", unit="picture", disable=None))
    return {f"{root}/{name}": value for (root, name), value in zip(jobs, hashes, strict=True)}


def _hash_of(job: tuple[str, str]) -> int:
    try:
        return int(measure(sources.read(*job))["phash"], 16)
    except (OSError, ValueError) as error:
        raise ValueError(f"{'/'.join(job)}, of --against, cannot be read: {error}; replace or remove it") from error


def build(
    selection: pa.Table,
    recipe: Recipe,
    out: Path,
    layout: str = "lmdb",
    processes: int = 1,
    overwrite: bool = False,
    criteria: dict[str, Any] | None = None,
) -> list[str]:
    """Make the set of a table that `select` returned, in the order of its rows; `out` appears when all is done.

    A fault or an interruption leaves nothing behind, and what was `out` before is kept until then; see `written_aside`.

    Args:
        layout: lmdb, or folder: folders of PNG files, each with a text for BasicSR's meta_info_file.
        processes: how many work on it.
        criteria: to be noted in recipe.json.

    Returns:
        A sentence for each picture that was left out, since it has changed or cannot be read any more.

    Raises:
        FileExistsError: `out` exists, and `overwrite` is false or it is not such a set.
        ValueError: another process is writing `out`.
        OSError: there is not space enough, or the disk cannot be written.
    """
    rows = selection.filter(pc.is_valid(selection["split"])).to_pylist()
    problems: dict[str, str] = {}  # key: why the picture was left out
    with written_aside(out, functools.partial(_check_output, overwrite=overwrite)) as partial:
        partial.mkdir()
        with workers(processes) as pool:
            _check_space(partial, rows, recipe, pool)
            with tqdm(total=len(rows), unit="picture", disable=None) as bar:
                for split in SPLITS:
                    of_split = [row for row in rows if row["split"] == split]
                    for key, problem in _write_split(partial, split, of_split, recipe, layout, pool):
                        bar.update()
                        if problem:
                            problems[key] = problem
        pq.write_table(_without(selection, problems), partial / "selection.parquet")
        notes = {**dataclasses.asdict(recipe), "criteria": criteria}
        (partial / "recipe.json").write_text(json.dumps(notes, indent=2) + "\n")
    return [f"{row['source']}/{row['name']}: {problems[row['key']]}" for row in rows if row["key"] in problems]


def sub_image_starts(length: int, crop_size: int, step: int, thresh_size: int = 0) -> list[int]:
    """Where sub-images begin along a side, as in BasicSR's extract_subimages: [0, 240, 320] for 800, 480, 240.

    A side shorter than `crop_size` gives one, of that length.
    """
    starts = list(range(0, max(length - crop_size, 0) + 1, step))
    if length - (starts[-1] + crop_size) > thresh_size:
        starts.append(length - crop_size)
    return starts


def make(row: dict[str, Any], recipe: Recipe) -> Made:
    """Read the picture of a row of the selection, degrade it, cut it up and encode it."""
    try:
        data = sources.read(row["root"], row["name"])
        if hashlib.sha256(data).hexdigest() != row["sha256"]:
            raise ValueError("it has changed since it was scored")
        picture = sources.decode(data)
        if min(picture.shape[:2]) < recipe.multiple:
            raise ValueError(f"it has fewer than {recipe.multiple} rows or columns")
    except (OSError, ValueError) as error:
        return Made({}, [], f"unreadable: {error}")
    height, width = (side // recipe.multiple * recipe.multiple for side in picture.shape[:2])
    picture = picture[:height, :width]
    gt = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) if recipe.gray else picture
    versions = {"GT": gt}
    versions.update({f"LQ_{name}": degrade.degrade(gt, name, row["key"], recipe.seed) for name in recipe.degradations})
    made = Made({name: [] for name in versions}, [])
    for key, rows, columns in _windows(row, height, width, recipe):
        for name, version in versions.items():
            scale = height // version.shape[0]
            window = version[rows.start // scale : rows.stop // scale, columns.start // scale : columns.stop // scale]
            made.pictures[name].append(encode(key, window))
        entry = {"key": key, "source": row["source"], "kind": row["kind"]}
        entry["complexity"] = complexity(np.ascontiguousarray(picture[rows, columns])).score
        entry["sha256"] = hashlib.sha256(made.pictures["GT"][-1].png).hexdigest()
        made.rows.append(entry)
    return made


def _made(rows: list[dict[str, Any]], recipe: Recipe, pool: Executor) -> Iterator[Made]:
    return bounded_map(
        pool, functools.partial(make, recipe=recipe), rows, lambda row: Made({}, [], f"unreadable: {KILLED}")
    )


def _windows(row: dict[str, Any], height: int, width: int, recipe: Recipe) -> Iterator[tuple[str, slice, slice]]:
    """(key, rows, columns) of what is stored of a picture: itself, or in training its sub-images, row by row."""
    if row["split"] != "train" or not recipe.crop_size:
        yield row["key"], slice(0, height), slice(0, width)
        return
    size, cut = recipe.crop_size, (recipe.crop_size, recipe.step, recipe.thresh_size)
    corners = itertools.product(sub_image_starts(height, *cut), sub_image_starts(width, *cut))
    for number, (top, left) in enumerate(corners, 1):  # named as by BasicSR
        yield f"{row['key']}_s{number:03d}", slice(top, min(top + size, height)), slice(left, min(left + size, width))


def _write_split(
    folder: Path, split: str, rows: list[dict[str, Any]], recipe: Recipe, layout: str, pool: Executor
) -> Iterator[tuple[str, str | None]]:
    """Make and store the pictures of a split; yields each one's key, and what kept it from being made."""
    if not rows:
        return
    names = ["GT", *(f"LQ_{name}" for name in recipe.degradations)]
    writer = {"lmdb": _lmdb, "folder": _folder}[layout]
    tables = []
    with ExitStack() as stack:
        add = {name: stack.enter_context(writer(folder, f"{split}_{name}")) for name in names}
        for row, made in zip(rows, _made(rows, recipe, pool), strict=True):
            tables.append(pa.Table.from_pylist(made.rows, TABLE))
            for name, pictures in made.pictures.items():
                for picture in pictures:
                    add[name](picture)
            yield row["key"], made.problem
    pq.write_table(pa.concat_tables(tables), folder / f"{split}.parquet")


def _without(selection: pa.Table, problems: dict[str, str]) -> pa.Table:
    """The selection with the pictures of these keys dropped."""
    failed = pc.is_in(selection["key"], pa.array(list(problems), pa.string()))
    reasons = pa.array([problems.get(key) for key in selection["key"].to_pylist()], pa.string())
    changes = {"dropped": reasons, "split": pa.nulls(len(selection), pa.string())}
    for name, values in changes.items():
        index = selection.column_names.index(name)
        selection = selection.set_column(index, name, pc.if_else(failed, values, selection[name]))
    return selection


@contextmanager
def _lmdb(folder: Path, name: str) -> Iterator[Callable[[PackedPicture], None]]:
    with lmdb_writer(folder / f"{name}.lmdb") as writer:
        yield writer.add


@contextmanager
def _folder(folder: Path, name: str) -> Iterator[Callable[[PackedPicture], None]]:
    """A folder of PNG files and, as BasicSR's `meta_info_file`, meta_info_<name>.txt."""
    (folder / name).mkdir()
    with open(folder / f"meta_info_{name}.txt", "w") as meta:

        def add(picture: PackedPicture) -> None:
            (folder / name / f"{picture.key}.png").write_bytes(picture.png)
            meta.write(f"{picture.key}.png ({','.join(map(str, picture.shape))})\n")

        yield add


def _check_space(folder: Path, rows: list[dict[str, Any]], recipe: Recipe, pool: Executor) -> None:
    """Make a few of the pictures, and raise OSError where all of them, by their pixels, will not fit on the disk."""
    sample = rows[:: math.ceil(len(rows) / SAMPLE)]
    made = _made(sample, recipe, pool)
    size = sum(len(picture.png) for one in made for pictures in one.pictures.values() for picture in pictures)
    pixels = [sum(row["width"] * row["height"] for row in some) for some in (rows, sample)]
    need = size * pixels[0] / pixels[1] * RESERVE
    free = shutil.disk_usage(folder).free
    if need > free:
        raise OSError(
            f"the set needs about {need / 1e9:.1f} GB, but the disk of {folder.parent} has {free / 1e9:.1f} GB free; "
            "free space, choose another disk with -o, or fewer scales or pictures"
        )


def _check_output(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{out} exists and is left as it is; give another name with -o, or add --overwrite")
    if not (out / "recipe.json").is_file():
        raise FileExistsError(f"{out} is no set that resyn build made, and is not overwritten; delete it yourself")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="resyn build",
        description="Build a training set for BasicSR from a score table: filter, remove duplicates, balance, split, "
        "degrade, pack. The same table, options and seed give the same set.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("scores", help="the table that resyn score wrote")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="where the set goes, datasets/ReSyn say")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a set that is there, once the new one is whole"
    )

    filters = parser.add_argument_group("which pictures")
    filters.add_argument("--min-side", type=int, default=Criteria.min_side, metavar="PIXELS", help="smallest side")
    filters.add_argument(
        "--blur",
        type=float,
        nargs=2,
        default=Criteria.blur,
        metavar=("MIN", "MAX"),
        help="variance of the Laplacian: lower is blurred, higher is noise or text",
    )
    filters.add_argument("--max-flat", type=float, default=Criteria.max_flat, help="share of flat patches")
    filters.add_argument(
        "--duplicate-distance",
        type=int,
        default=Criteria.distance,
        choices=range(-1, 17),
        metavar="BITS",
        help="bits of 64 by which the perceptual hashes of duplicates may differ; -1 keeps duplicates",
    )
    filters.add_argument(
        "--against", nargs="+", default=[], metavar="SOURCE", help="benchmarks whose pictures must not be in the set"
    )

    counts = parser.add_argument_group("how many")
    counts.add_argument(
        "--balance", action=argparse.BooleanOptionalAction, default=True, help="as many below zero complexity as above"
    )
    counts.add_argument("--total", type=int, default=Criteria.total, help="pictures, if there are so many")
    counts.add_argument("--synthetic", type=_share, default=Criteria.synthetic, help="share of synthetic pictures")
    counts.add_argument(
        "--target", type=_target, nargs="+", default=[], metavar="SOURCE=COUNT", help="a count for each source instead"
    )
    counts.add_argument(
        "--order", choices=("shuffled", "table"), default="shuffled", help="in which pictures are taken"
    )
    counts.add_argument("--val", type=_share, default=Criteria.val, help="share for validation")
    counts.add_argument("--test", type=_share, default=Criteria.test, help="share for testing")
    counts.add_argument("--seed", type=int, default=0, help="of the order and the noise")

    pairs = parser.add_argument_group("what is made of them")
    pairs.add_argument("--task", nargs="+", choices=degrade.TASKS, default=["sr"], help="what the pairs are for")
    pairs.add_argument("--scales", type=positive, nargs="+", default=[2, 3, 4], help="of sr")
    pairs.add_argument("--sigmas", type=positive, nargs="+", default=[15, 25, 50], help="of denoise, of 255")
    pairs.add_argument("--qualities", type=positive, nargs="+", default=[10, 20, 30, 40], help="of jpeg")
    pairs.add_argument("--gray", action="store_true", help="store gray pictures, as the standard has it for jpeg")
    pairs.add_argument(
        "--crop-size", type=int, default=Recipe.crop_size, help="side of training sub-images; 0 keeps pictures whole"
    )
    pairs.add_argument("--step", type=int, default=Recipe.step, help="from one sub-image to the next")
    pairs.add_argument(
        "--thresh-size", type=int, default=Recipe.thresh_size, help="do not cut a last strip that adds fewer pixels"
    )
    pairs.add_argument("--format", choices=("lmdb", "folder"), default="lmdb", help="how the set is stored")
    add_workers_option(parser)
    return parser


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share; write a number from 0 to 1")
    return share


def _target(text: str) -> tuple[str, int]:
    source, _, count = text.rpartition("=")
    if not source or not count.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form SOURCE=COUNT")
    return source, int(count)
