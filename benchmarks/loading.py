"""Training pairs per second and core: whole pictures, sub-images and tiles side by side.

    python benchmarks/loading.py FOLDER [--pictures 8] [--samples 64] [--repeats 9]

From the pictures in FOLDER (of 1020x678 pixels or more) it composes 2040x1356 ones, four to each, reduces them to a
quarter (bicubic), and stores the pairs in three ways:
    whole       LMDBs of PNG, read by BasicSR's PairedImageDataset
    sub-images  the same, in pictures of 480 pixels every 240 (LQ: 120 every 60)
    tiles       what `resyn pack --tiles` makes of the whole ones, read by ReSynPairedDataset
A sample is an augmented crop of 256x256 and its LQ, as tensors. Each round takes the samples from each in turn, in one
process on one thread, with the files in the page cache; seconds are the process's own (CPU time), and the table gives
the median and the spread (max - min) / median over the rounds. Before, it compares the crops from tiles with those from
whole pictures.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch

from rwkvir_data import ReSynPairedDataset, encode, pack, write_lmdb
from rwkvir_data.degrade import degrade
from rwkvir_data.picture_store import open_store

from basicsr.data.paired_image_dataset import PairedImageDataset  # isort: skip  # after rwkvir_data, which repairs it

HEIGHT, WIDTH, SCALE, CROP, SUB, STEP = 1356, 2040, 4, 256, 480, 240
NEEDED = 20 * 64  # samples/s: a GPU at 20 iterations/s with a batch of 64


def composed(folder: str, count: int) -> Iterator[tuple[str, np.ndarray]]:
    """`count` pictures of WIDTH x HEIGHT, RGB, each of four pictures of the folder."""
    store, cell = open_store(folder, "disk"), np.array([HEIGHT // 2, WIDTH // 2])
    large = (picture for picture in map(store.picture, store.keys()) if np.all(picture.shape[:2] >= cell))
    for number in range(count):
        a, b, c, d = (next(large)[: cell[0], : cell[1], ::-1] for _ in range(4))
        yield f"p{number}", np.vstack((np.hstack((a, b)), np.hstack((c, d))))


def sub_images(key: str, gt: np.ndarray, lq: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Pictures of SUB pixels every STEP, and flush with the right and lower edge."""
    ys, xs = (sorted({*range(0, side - SUB + 1, STEP), side - SUB}) for side in gt.shape[:2])
    for number, (y, x) in enumerate((y, x) for y in ys for x in xs):
        small = lq[y // SCALE :, x // SCALE :][: SUB // SCALE, : SUB // SCALE]
        yield f"{key}_s{number:03}", gt[y : y + SUB, x : x + SUB], small


def store(root: Path, folder: str, count: int) -> dict[str, int]:
    """Write all three below `root`; returns the bytes of each."""
    pairs = [(key, gt, degrade(gt, f"x{SCALE}")) for key, gt in composed(folder, count)]
    subs = [sub for pair in pairs for sub in sub_images(*pair)]
    for name, rows in (("whole", pairs), ("sub-images", subs)):
        for number, kind in enumerate(("gt", "lq"), 1):
            write_lmdb(root / f"{name}_{kind}.lmdb", (encode(row[0], row[number]) for row in rows))
    for kind in ("gt", "lq"):
        pack.main(["--tiles", str(root / f"whole_{kind}.lmdb"), "-o", str(root / f"tiles_{kind}.tiles")])
    return {name: sum(size_of(path) for path in root.glob(f"{name}_*")) for name in ("whole", "sub-images", "tiles")}


def size_of(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(os.stat(file).st_blocks * 512 for file in files)


def datasets(root: Path) -> dict[str, torch.utils.data.Dataset]:
    opened: dict[str, torch.utils.data.Dataset] = {}
    for name, kind, backend in (
        ("whole", PairedImageDataset, "lmdb"),
        ("sub-images", PairedImageDataset, "lmdb"),
        ("tiles", ReSynPairedDataset, "tiles"),
    ):
        opened[name] = kind(
            {
                "name": name,
                "phase": "train",
                "scale": SCALE,
                "gt_size": CROP,
                "use_hflip": True,
                "use_rot": True,
                "dataroot_gt": str(root / f"{name}_gt.{backend}"),
                "dataroot_lq": str(root / f"{name}_lq.{backend}"),
                "io_backend": {"type": backend},
            }
        )
    return opened


def samples(dataset: torch.utils.data.Dataset, count: int, seed: int) -> list[dict]:
    order = np.random.default_rng(seed).integers(0, len(dataset), count)  # type: ignore[arg-type]
    random.seed(seed)
    return [dataset[index] for index in order]


def compare(whole: torch.utils.data.Dataset, tiles: torch.utils.data.Dataset, count: int) -> None:
    """Raises AssertionError where a sample from tiles differs in any bit."""
    for one, other in zip(samples(whole, count, 0), samples(tiles, count, 0), strict=True):
        assert torch.equal(one["gt"], other["gt"]) and torch.equal(one["lq"], other["lq"]), one["gt_path"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of pictures to compose from")
    parser.add_argument("--pictures", type=int, default=8, help="how many to compose")
    parser.add_argument("--samples", type=int, default=64, help="of each round")
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as root:
        disk = store(Path(root), args.folder, args.pictures)
        contenders = datasets(Path(root))
        compare(contenders["whole"], contenders["tiles"], args.samples)
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for seed in range(args.repeats + 1):  # the first warms up
            for name, dataset in contenders.items():
                start = time.process_time()
                samples(dataset, args.samples, seed)
                rates[name].append(args.samples / (time.process_time() - start))
    medians = {name: statistics.median(values[1:]) for name, values in rates.items()}
    print(f"{platform.machine()}, one core, {args.pictures} pictures, {args.samples} samples x {args.repeats} rounds\n")
    print(f"| stored as | samples/s (spread) | x whole | x sub-images | disk, x PNG | cores for {NEEDED} samples/s |")
    print("|---|---|---|---|---|---|")
    for name, rate in medians.items():
        spread = (max(rates[name][1:]) - min(rates[name][1:])) / rate
        print(
            f"| {name} | {rate:.0f} ({spread:.0%}) | {rate / medians['whole']:.1f} | "
            f"{rate / medians['sub-images']:.1f} | {disk[name] / disk['whole']:.2f} | {NEEDED / rate:.1f} |"
        )


if __name__ == "__main__":
    main()
