"""Pictures into an LMDB, laid out as BasicSR reads it: X.lmdb/{data.mdb, lock.mdb, meta_info.txt}."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cv2
import lmdb
import numpy as np

from rwkvir_data.aside import written_aside

BATCH_BYTES = 64 << 20  # what is held in memory and committed at once
MAX_KEY = 511  # LMDB's own limit, in bytes


class PackedPicture(NamedTuple):
    """A picture ready to be stored: its key, its PNG file, its shape (H, W, C) and the level it was compressed at."""

    key: str
    png: bytes
    shape: tuple[int, int, int]
    compress_level: int


def encode(key: str, picture: np.ndarray, compress_level: int = 1) -> PackedPicture:
    """Compress a picture for `write_lmdb`; may run in any process.

    Args:
        picture: (H, W, 3) RGB or (H, W) grey, uint8; other kinds would be read back as something else.
        compress_level: PNG's, 0 (fast) to 9 (small).

    Raises:
        ValueError: the picture is of another kind; the message names the key.
    """
    is_rgb = picture.ndim == 3 and picture.shape[2] == 3
    if picture.dtype != np.uint8 or not (is_rgb or picture.ndim == 2):
        raise ValueError(
            f"picture '{key}' is {picture.dtype} of shape {picture.shape}, but BasicSR reads 8-bit RGB or grey; "
            "convert it to uint8 (H, W, 3) or (H, W)."
        )
    bgr = picture[..., ::-1] if is_rgb else picture
    png = cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, compress_level])[1]
    return PackedPicture(key, png.tobytes(), (*picture.shape[:2], 3 if is_rgb else 1), compress_level)


def write_lmdb(path: str | os.PathLike, pictures: Iterable[PackedPicture]) -> int:
    """Store `pictures` as they come, and return how many there were; see `lmdb_writer`."""
    with lmdb_writer(path) as writer:
        for picture in pictures:
            writer.add(picture)
    return writer.count


@contextmanager
def lmdb_writer(path: str | os.PathLike) -> Iterator[_Writer]:
    """An LMDB that is filled picture by picture, with flat memory: `with lmdb_writer(path) as w: w.add(picture)`.

    `path` appears when all is done; see `written_aside`.

    Raises:
        FileExistsError: `path` exists. It is not touched.
        ValueError: `path` does not end in .lmdb, another process is writing it, there are no pictures, or a key occurs
            twice, is empty, longer than 511 characters, not printable ASCII, or has a dot (BasicSR cuts names at the
            first one).
        OSError: the disk is full or cannot be written.
    """
    path = Path(path)
    if path.suffix != ".lmdb":
        raise ValueError(f"BasicSR wants names of LMDBs to end in .lmdb, got '{path}'; rename it to '{path}.lmdb'.")
    with written_aside(path) as partial:
        try:
            with lmdb.open(str(partial), map_size=2 * BATCH_BYTES) as environment:
                writer = _Writer(partial, environment)
                yield writer
                writer.commit()
        except lmdb.Error as error:
            raise OSError(errno.ENOSPC, str(error)) from error
        if not writer.count:
            raise ValueError(f"there are no pictures to write to '{path}'; check where they should come from.")


class _Writer:
    """Collects pictures and stores them batch by batch."""

    def __init__(self, folder: Path, environment: lmdb.Environment) -> None:
        self.count = 0
        self._folder, self._environment = folder, environment
        self._batch: list[PackedPicture] = []
        self._batch_bytes = 0

    def add(self, picture: PackedPicture) -> None:
        """Store a picture, now or together with those that follow."""
        _check_key(picture.key)
        self.count += 1
        self._batch.append(picture)
        self._batch_bytes += len(picture.png)
        if self._batch_bytes >= BATCH_BYTES:
            self.commit()

    def commit(self) -> None:
        """Store what has been collected."""
        _commit(self._environment, self._batch)
        with open(self._folder / "meta_info.txt", "a") as meta:
            meta.writelines(f"{key}.png ({h},{w},{c}) {level}\n" for key, _, (h, w, c), level in self._batch)
        self._batch, self._batch_bytes = [], 0


def _check_key(key: str) -> None:
    if not (key.isascii() and key.isprintable() and 0 < len(key) <= MAX_KEY and "." not in key):
        raise ValueError(
            f"'{key}' cannot be a key: BasicSR's LMDBs need 1 to {MAX_KEY} printable ASCII letters, no dot; rename it."
        )


def _commit(environment: lmdb.Environment, batch: list[PackedPicture]) -> None:
    """Store a batch, all of it or nothing, with a larger map whenever the present one is full."""
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for picture in batch:
                    if not transaction.put(picture.key.encode(), picture.png, overwrite=False):
                        raise ValueError(f"the key '{picture.key}' occurs twice; rename one of the two pictures.")
            return
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])
