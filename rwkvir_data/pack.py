"""`resyn pack`: store pictures so that a training crop is cheap to read."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Iterator

from tqdm import tqdm

from rwkvir_data.parallel import add_workers_option, bounded_map, workers
from rwkvir_data.picture_store import opened
from rwkvir_data.tiles import SIDE, CutPicture, cut, write_tiles


def main(argv: list[str]) -> int:
    """Run `resyn pack` with `argv`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="resyn pack",
        description="Cut pictures into losslessly compressed tiles, of which ReSynPairedDataset decodes only what a "
        "crop touches: dataroot_gt: X.tiles and io_backend: {type: tiles}.",
    )
    parser.add_argument("--tiles", required=True, metavar="SRC", help="folder of pictures, or an .lmdb of BasicSR's")
    parser.add_argument("-o", "--output", required=True, metavar="X.tiles", help="the file to write")
    parser.add_argument("--side", type=int, default=SIDE, help=f"of a tile, in pixels; default {SIDE}")
    add_workers_option(parser)
    args = parser.parse_args(argv)
    if args.side < 8:
        parser.error("--side must be 8 or more")
    keys = opened(args.tiles).keys()
    count = write_tiles(args.output, _cut_all(args.tiles, keys, args.side, args.workers), args.side)
    print(f"{count} pictures in {args.output}, {os.path.getsize(args.output) / 1e6:.1f} MB")
    return 0


def _cut_all(source: str, keys: list[str], side: int, processes: int) -> Iterator[CutPicture]:
    with workers(processes) as pool:
        pictures = bounded_map(pool, functools.partial(_cut_one, source, side), keys)
        yield from tqdm(pictures, total=len(keys), unit="picture", disable=None)


def _cut_one(source: str, side: int, key: str) -> CutPicture:
    return cut(key, opened(source).picture(key)[:, :], side)
