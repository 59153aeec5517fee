"""`resyn score`: measure every picture of folders, archives and lists, into one Parquet table, a row a picture.

While it runs, finished rows lie in part files in `<table>.parts`, a row once only; the table is put together from them
at the end. A run that was stopped, however hard, goes on from there. Sources, parts and table are all in the order of
(source, name), so that no step holds more than a few rows of each part in memory.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import itertools
import json
import operator
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from rwkvir_data import parallel
from rwkvir_data.aside import locked
from rwkvir_data.complexity import complexity, to_luma
from rwkvir_data.filters import bits_per_pixel, flatness, laplacian_variance
from rwkvir_data.sources import Entry, TooLargeError, decode, entries, read_entry

TEXTS, INTEGERS = ("source", "root", "name", "kind"), ("width", "height")
MEASURES = ("ent", "ene", "diss", "complexity", "blur", "flatness", "bits_per_pixel")
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in TEXTS),
        *((name, pa.int32()) for name in INTEGERS),
        ("bytes", pa.int64()),
        *((name, pa.float64()) for name in MEASURES),
        *((name, pa.string()) for name in ("phash", "sha256", "dropped")),
    ]
)
ROW_KEY = operator.itemgetter("source", "name")
BATCH = 8  # pictures that a worker is given at a time
IN_FLIGHT = 8  # batches per worker that are given out; one slow picture holds up the others only after so many
PART_SECONDS, PART_ROWS = 2.0, 4096  # a part is written after the first or at the second; a kill loses no more
ROW_GROUP = 8192
GO_ON = "run the same command again, without --overwrite, to go on from what is done"


class Source(NamedTuple):
    """Pictures of one kind under a name of their own."""

    label: str
    root: str  # absolute path
    kind: str  # 'real' or 'synthetic'


def main(argv: list[str]) -> int:
    """`resyn score`; returns the exit code."""
    args = _parser().parse_args(argv)
    sources = make_sources(args.sources, args.synthetic)
    score(sources, Path(args.output), args.workers, args.cluster, args.overwrite)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="resyn score",
        description="Measure every picture of the sources, into one Parquet table. Run again, it goes on where it was.",
        epilog="A SOURCE is a folder (with all below it, also in tars and zips), a .tar, a .zip, an LMDB's folder, or "
        "a .txt with one path a line. Its label in the table is its last part, or LABEL in LABEL=PATH.",
    )
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="real pictures")
    parser.add_argument("--synthetic", nargs="+", default=[], metavar="SOURCE", help="pictures made by a machine")
    parser.add_argument("-o", "--output", required=True, metavar="TABLE.parquet", help="the table to write")
    parallel.add_workers_option(parser)
    parser.add_argument(
        "--cluster", metavar="tcp://HOST:PORT", help="work on this Dask cluster, whose machines see the same paths"
    )
    parser.add_argument("--overwrite", action="store_true", help="start afresh; a table of this name is deleted")
    return parser


def make_sources(real: Iterable[str], synthetic: Iterable[str]) -> list[Source]:
    """The sources that texts `[LABEL=]PATH` describe, in the order of their labels.

    Raises ValueError where there are none, or two of one label.
    """
    sources = []
    for kind, texts in (("real", real), ("synthetic", synthetic)):
        for text in texts:
            label, separator, path = text.partition("=")
            if not separator or os.path.exists(text):
                label, path = "", text
            root = os.path.abspath(path)
            sources.append(Source(label or os.path.basename(root), root, kind))
    if not sources:
        raise ValueError("no source is given; name a folder, an archive or a list of pictures")
    for label, count in Counter(source.label for source in sources).items():
        if count > 1:
            raise ValueError(f"{count} sources are called '{label}'; tell them apart by giving LABEL=PATH")
    return sorted(sources)


def score(
    sources: list[Source], output: Path, workers: int = 1, cluster: str | None = None, overwrite: bool = False
) -> None:
    """Write the table of the pictures of `sources`, of the columns SCHEMA, in the order of (source, name).

    Where a picture cannot be read, `dropped` says why and its measures are null. Pictures that came to the sources
    after an unfinished run began are scored as well; rows of those that went away since remain.

    workers: processes on this machine; not used with `cluster`, the address of a Dask cluster, which has its own.

    Raises:
        ValueError: a source is none or has no pictures; another run is writing `output`, or has begun to write it from
            other sources; `output` exists and lacks pictures of the sources.
        OSError: a source or `output` cannot be read or written, or no worker can live.
        KeyboardInterrupt: with a sentence that says how to go on.
    """
    parts = output.with_name(f"{output.name}.parts")
    with _locked(parts, output):
        if overwrite:
            output.unlink(missing_ok=True)
        if overwrite or output.exists():
            _delete_parts(parts)
        if output.exists():
            _check_complete(sources, output)
            print(f"{output} is finished and has every picture of the sources; nothing to do.")
            return
        _check_same_sources(parts, sources)
        try:
            _score_missing(sources, parts, workers, cluster)
            dropped = _merge(parts, output)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(f"interrupted; {GO_ON}") from stop
        _delete_parts(parts)
    rows = pq.read_metadata(output).num_rows
    reasons = "".join(f", {count} {reason}" for reason, count in sorted(dropped.items()))
    print(f"{output}: {rows} pictures{reasons}.")


@contextmanager
def _locked(parts: Path, output: Path) -> Iterator[None]:
    """Have `parts` for this process alone. Where no rows are left in it afterwards, it is removed."""
    if output.suffix != ".parquet":
        raise ValueError(f"the table '{output}' must end in .parquet; rename it")
    with locked(parts, output):
        try:
            yield
        finally:
            if not _runs(parts):
                shutil.rmtree(parts)


def _delete_parts(parts: Path) -> None:
    for file in itertools.chain.from_iterable(_runs(parts)):
        file.unlink()


def _check_complete(sources: list[Source], table: Path) -> None:
    missing = sum(1 for _ in _pending(sources, _rows([table], ["source", "name"])))
    if missing:
        raise ValueError(
            f"{table} exists and lacks {missing} pictures of the sources; write another table, or start this one "
            "afresh with --overwrite"
        )


def _check_same_sources(parts: Path, sources: list[Source]) -> None:
    """An unfinished table goes on only with the sources that it began with; they are noted when it begins."""
    note, text = parts / "sources.json", json.dumps(sources)
    if not _runs(parts):
        note.write_text(text)
    elif note.read_text() != text:
        raise ValueError(
            f"{parts} holds an unfinished table of other sources; give the same as then, or start afresh with "
            "--overwrite"
        )


def _score_missing(sources: list[Source], parts: Path, workers: int, cluster: str | None) -> None:
    """Write the rows that `parts` lacks into parts of a new run."""
    for source in sources:
        if next(entries(source.root), None) is None:
            raise ValueError(f"there are no pictures in {source.root}; correct the path or leave it out")
    runs = _runs(parts)
    done = sum(pq.read_metadata(file).num_rows for files in runs for file in files)
    left = sum(1 for _ in _pending(sources, _merged(runs, ["source", "name"])))
    pending = _pending(sources, _merged(runs, ["source", "name"]))
    complexity(np.zeros((1, 1, 3), np.uint8))  # compiled once, before the workers want it
    with (
        _executor(min(workers, max(left, 1)), cluster) as (executor, slots),
        _Writer(parts, len(runs)) as writer,
        tqdm(total=done + left, initial=done, unit="picture", disable=None) as progress,
    ):
        for row in parallel.bounded_map(executor, score_picture, pending, _killer, BATCH, IN_FLIGHT * slots):
            writer.add(row)
            progress.update()


def _pending(sources: list[Source], done: Iterator[dict]) -> Iterator[tuple[Source, Entry]]:
    """The pictures of `sources` that are not among the rows `done`; both are in order."""
    row = next(done, None)
    for source in sources:
        for entry in entries(source.root):
            key = source.label, entry.name
            while row is not None and ROW_KEY(row) < key:
                row = next(done, None)
            if row is None or ROW_KEY(row) != key:
                yield source, entry


def _runs(parts: Path) -> list[list[Path]]:
    """The part files, in order, of each run: within a run rows are in order, and no two runs have a row in common."""
    files = sorted(parts.glob("*.parquet"))
    return [list(group) for _, group in itertools.groupby(files, lambda file: file.name.split("-")[0])]


def _rows(files: Iterable[Path], columns: list[str] | None = None) -> Iterator[dict]:
    for file in files:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                yield from batch.to_pylist()


def _merged(runs: list[list[Path]], columns: list[str] | None = None) -> Iterator[dict]:
    return heapq.merge(*(_rows(files, columns) for files in runs), key=ROW_KEY)


@contextmanager
def _executor(workers: int, cluster: str | None) -> Iterator[tuple[Executor, int]]:
    """Where functions can be submitted to, and how many of them it works on at a time."""
    if cluster is None:
        with parallel.workers(workers) as pool:
            yield pool, workers
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise ImportError("--cluster needs Dask; install it with: pip install 'dask[distributed]'") from error
    with Client(cluster) as client:
        slots = sum(client.nthreads().values())
        if not slots:
            raise ValueError(f"the cluster {cluster} has no workers; start some with: dask worker {cluster}")
        yield client.get_executor(pure=False), slots


def score_picture(picture: tuple[Source, Entry]) -> dict[str, Any]:
    """The table's row for a picture, which is read and scored."""
    cv2.setNumThreads(1)  # every core has a worker of its own
    source, entry = picture
    try:
        return _row(picture) | measure(read_entry(source.root, entry))
    except TooLargeError as error:
        return _row(picture, f"too large: {error}")
    except (OSError, ValueError, MemoryError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        return _row(picture, f"unreadable: {' '.join(reason.split())}")


def _killer(picture: tuple[Source, Entry]) -> dict[str, Any]:
    return _row(picture, f"unreadable: {parallel.KILLED}")


def _row(picture: tuple[Source, Entry], dropped: str | None = None) -> dict[str, Any]:
    """What a picture's row says before it is read."""
    source, entry = picture
    row = {"source": source.label, "root": source.root, "name": entry.name, "kind": source.kind}
    return row | {"dropped": dropped}


def measure(data: bytes) -> dict[str, Any]:
    """The table's columns from `width` to `sha256` for the encoded bytes of one picture. Raises as `decode`.

    phash is imagehash's 64-bit perceptual hash of the luma, 16 hex digits: pictures that look alike differ in few bits.
    """
    luma = to_luma(decode(data))
    height, width = luma.shape
    terms = complexity(luma)
    return {
        "width": width,
        "height": height,
        "bytes": len(data),
        "ent": terms.ent,
        "ene": terms.ene,
        "diss": terms.diss,
        "complexity": terms.score,
        "blur": laplacian_variance(luma),
        "flatness": flatness(luma),
        "bits_per_pixel": bits_per_pixel(len(data), height, width),
        "phash": str(imagehash.phash(Image.fromarray(luma))),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


class _Writer:
    """Rows of run number `run` as they come, into part files that appear whole and are named by the rows before them.

    However it is interrupted, no row is written twice.
    """

    def __init__(self, parts: Path, run: int):
        self._parts, self._run = parts, run
        self._rows: list[dict] = []
        self._in_files, self._written = 0, time.monotonic()

    def add(self, row: dict) -> None:
        self._rows.append(row)
        if len(self._rows) >= PART_ROWS or time.monotonic() > self._written + PART_SECONDS:
            self._write()

    def _write(self) -> None:
        if self._rows:
            _write_table(self._parts / f"{self._run:06d}-{self._in_files:012d}.parquet", self._rows, len(self._rows))
        in_files = self._in_files + len(self._rows)
        self._rows, self._in_files, self._written = [], in_files, time.monotonic()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._write()


def _write_table(path: Path, rows: Iterable[dict], row_group: int) -> None:
    """Write the table beside `path` and move it there."""
    partial = path.with_name(f"{path.name}.partial")
    rows = iter(rows)
    try:
        with open(partial, "wb") as file:
            with pq.ParquetWriter(file, SCHEMA) as writer:
                while group := list(itertools.islice(rows, row_group)):
                    writer.write_table(pa.Table.from_pylist(group, SCHEMA))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({error.strerror or error}); make room there, then {GO_ON}") from error


def _merge(parts: Path, output: Path) -> Counter[str]:
    """Write all rows of `parts` to `output`, and return how many were dropped for each kind of reason."""
    dropped: Counter[str] = Counter()

    def counted() -> Iterator[dict]:
        for row in _merged(_runs(parts)):
            if row["dropped"]:
                dropped[row["dropped"].split(":")[0]] += 1
            yield row

    _write_table(output, counted(), ROW_GROUP)
    return dropped
