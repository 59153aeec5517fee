"""`resyn verify`: read every picture of BasicSR's LMDBs and of tiles, and say what is wrong with each.

An LMDB is right when data.mdb and meta_info.txt name the same keys, every picture decodes to the size noted there,
LQ and GT share keys and one scale, and the hashes of a table, if there is one, are those of the stored bytes. Tiles are
right when their checksums are and, if X.lmdb lies beside X.tiles, both hold the same pixels.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import NamedTuple

import lmdb
import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

from rwkvir import compat
from rwkvir_data import sources
from rwkvir_data.parallel import KILLED, add_workers_option, bounded_map, workers
from rwkvir_data.picture_store import open_store, opened

CHUNK = 16  # pictures that a worker is given at a time

Size = tuple[int, int]  # height, width
Wanted = tuple[str, Size, str | None]  # key, size and hash that a picture should have


class Task(NamedTuple):
    """An LMDB or tiles to check; the LMDB its pictures are degraded versions of; the table with the hashes of its
    pictures."""

    path: Path
    gt: Path | None = None
    table: Path | None = None


def main(argv: list[str]) -> int:
    """Run `resyn verify` with the arguments `argv`; 1 where anything is wrong."""
    parser = argparse.ArgumentParser(
        prog="resyn verify",
        description="Check every picture of BasicSR's LMDBs and of tiles; print a line for each fault.",
    )
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="X.lmdb, X.tiles, or a folder of them such as build makes"
    )
    parser.add_argument("--gt", metavar="LMDB", help="what the others are degraded versions of; checked as well")
    parser.add_argument(
        "--table", metavar="PARQUET", help="sha256 of the pictures as stored, by key or name: of --gt, or else of PATH"
    )
    add_workers_option(parser)
    args = parser.parse_args(argv)
    todo = list(tasks(args.paths, args.gt, args.table))
    with workers(args.workers) as pool:
        faults = 0
        for task in todo:
            for fault in verify_tiles(task.path, pool) if task.path.suffix == ".tiles" else verify(task, pool):
                tqdm.write(f"{task.path}: {fault}")
                faults += 1
    print(f"{len(todo)} checked: {faults or 'no'} fault{'s' if faults != 1 else ''}")
    return 1 if faults else 0


def tasks(paths: list[str], gt: str | None = None, table: str | None = None) -> Iterator[Task]:
    """What to check. In a folder, X_GT.lmdb belongs to X_LQ_*.lmdb, and X.parquet has its hashes.

    Raises:
        FileNotFoundError: a path is neither an LMDB nor tiles nor a folder with any, or there is no `table`.
    """
    if table and not Path(table).is_file():
        raise FileNotFoundError(f"there is no table {table}; correct the path")
    for path in map(Path, paths):
        if path.suffix == ".tiles":
            yield Task(path)
            continue
        if path.suffix == ".lmdb":
            yield Task(path, Path(gt) if gt else None, Path(table) if table and not gt else None)
            continue
        found, tiles = (sorted(path.glob(suffix)) for suffix in ("*.lmdb", "*.tiles"))
        if not found and not tiles:
            raise FileNotFoundError(f"{path} is neither an LMDB nor tiles nor a folder with any; correct the path")
        yield from map(Task, tiles)
        for file in found:
            split, _, what = file.stem.partition("_")
            own_gt, own_table = path / f"{split}_GT.lmdb", path / f"{split}.parquet"
            if what == "GT":
                yield Task(file, table=own_table if own_table.is_file() else None)
            else:
                yield Task(file, gt=own_gt if own_gt.is_dir() else None)
    if gt:
        yield Task(Path(gt), table=Path(table) if table else None)


def verify_tiles(path: Path, pool: Executor) -> Iterator[str]:
    """What is wrong with tiles, a sentence each."""
    original = path.with_suffix(".lmdb")
    try:
        keys = set(open_store(str(path), "tiles").keys())
        original_keys = set(open_store(str(original), "lmdb").keys()) if original.is_dir() else None
    except (OSError, ValueError) as error:
        yield f"cannot be read: {error}"
        return
    if original_keys is not None:
        yield from (f"'{key}' is not in {original}" for key in sorted(keys - original_keys))
        yield from (f"{original} has '{key}', which is missing here" for key in sorted(original_keys - keys))
    wanted = [(key, str(original) if key in (original_keys or ()) else None) for key in sorted(keys)]
    found = bounded_map(pool, functools.partial(_check_tiled, str(path)), wanted, _killer)
    for of_picture in tqdm(found, total=len(wanted), desc=path.name, unit="picture", disable=None):
        yield from of_picture


def _check_tiled(path: str, wanted: tuple[str, str | None]) -> list[str]:
    """What is wrong with a picture of tiles: its key, and the LMDB that it came from."""
    key, original = wanted
    try:
        tiled = opened(path).picture(key)[:, :]
        if original and not np.array_equal(tiled, opened(original).picture(key)[:, :]):
            return [f"'{key}' has other pixels than in {original}"]
    except (OSError, ValueError) as error:
        return [f"'{key}' cannot be decoded: {error}"]
    return []


def verify(task: Task, pool: Executor) -> Iterator[str]:
    """What is wrong with an LMDB, a sentence each."""
    try:
        with compat.lmdb_environment(str(task.path)).begin() as transaction:
            stored = {key.decode(errors="replace") for key in transaction.cursor().iternext(values=False)}
        sizes, faults = read_meta_info(task.path)
        gt_sizes, _ = read_meta_info(task.gt) if task.gt else (None, None)
    except (lmdb.Error, OSError) as error:
        yield f"cannot be read: {error}"
        return
    yield from faults
    yield from (f"'{key}' is stored, but not in meta_info.txt" for key in sorted(stored - set(sizes)))
    hashes = _hashes(task.table) if task.table else {}
    yield from (f"'{key}' is in {task.table}, but not in meta_info.txt" for key in sorted(set(hashes) - set(sizes)))
    if gt_sizes is not None:
        yield from pair_faults(sizes, gt_sizes)
    wanted = [(key, size, hashes.get(key)) for key, size in sorted(sizes.items())]
    found = bounded_map(pool, functools.partial(_check, str(task.path)), wanted, _killer, CHUNK)
    for of_picture in tqdm(found, total=len(wanted), desc=task.path.name, unit="picture", disable=None):
        yield from of_picture


def read_meta_info(path: Path) -> tuple[dict[str, Size], list[str]]:
    """The sizes that an LMDB's meta_info.txt notes, by key, and what is wrong with that file."""
    sizes: dict[str, Size] = {}
    faults = []
    for number, line in enumerate((path / "meta_info.txt").read_text().splitlines(), 1):
        match = re.fullmatch(r"([^.]+)\.\S+ \((\d+),(\d+),\d+\) \d+", line)
        if not match:
            faults.append(f"line {number} of meta_info.txt is '{line}', not 'key.png (height,width,channels) level'")
        elif match[1] in sizes:
            faults.append(f"'{match[1]}' is in meta_info.txt twice")
        else:
            sizes[match[1]] = (int(match[2]), int(match[3]))
    return sizes, faults if sizes or faults else ["meta_info.txt names no picture"]


def pair_faults(lq: Mapping[str, Size], gt: Mapping[str, Size]) -> Iterator[str]:
    """Keys that LQ and GT do not share, and sizes that do not fit the scale of most. GT may have up to scale - 1 more
    rows and columns, as in BasicSR, which cuts them off in validation."""
    yield from (f"'{key}' is not in GT" for key in sorted(set(lq) - set(gt)))
    yield from (f"GT has '{key}', which is missing here" for key in sorted(set(gt) - set(lq)))
    both = sorted(key for key in set(lq) & set(gt) if min(lq[key]) > 0)
    if not both:
        return
    scale = Counter(gt[key][0] // lq[key][0] for key in both).most_common(1)[0][0]
    for key in both:
        if not all(0 <= large - small * scale < max(scale, 1) for large, small in zip(gt[key], lq[key], strict=True)):
            sizes = " and ".join("{}x{}".format(*size) for size in (lq[key], gt[key]))
            yield f"'{key}' and its GT have {sizes} pixels, which is not scale {scale}"


def _hashes(table: Path) -> dict[str, str]:
    columns = pq.read_schema(table).names
    key = "key" if "key" in columns else "name"
    if key not in columns or "sha256" not in columns:
        raise ValueError(f"{table} needs the columns key (or name) and sha256, but has {', '.join(columns)}")
    rows = pq.read_table(table, columns=[key, "sha256"])
    return dict(zip(rows[key].to_pylist(), rows["sha256"].to_pylist(), strict=True))


def _check(path: str, wanted: Wanted) -> list[str]:
    """What is wrong with a picture of an LMDB."""
    return [f"'{wanted[0]}' {fault}" for fault in _picture_faults(path, *wanted)]


def _killer(wanted: tuple) -> list[str]:
    return [f"'{wanted[0]}' cannot be decoded: {KILLED}"]


def _picture_faults(path: str, key: str, size: Size, digest: str | None) -> Iterator[str]:
    try:
        data = sources.read(path, key)
    except FileNotFoundError:
        yield "is in meta_info.txt, but not stored"
        return
    except (OSError, ValueError) as error:
        yield f"cannot be read: {error}"
        return
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        yield "is not the picture of the table: their sha256 differ"
    try:
        height, width, _ = sources.decode(data).shape
    except ValueError as error:
        yield f"cannot be decoded: {error}"
        return
    if (height, width) != size:
        yield "has {}x{} pixels, but {}x{} in meta_info.txt".format(height, width, *size)
