"""Where a dataset's pictures lie, a folder, an LMDB or a file of tiles: their keys, and each picture.

A key is a picture's name without extension. A store holds names, no open file: it may be forked and pickled.
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import Executor
from pathlib import Path

import cv2
import lmdb
import numpy as np

from rwkvir import compat
from rwkvir_data.tiles import Tiles

PICTURE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class _Store:
    """Encoded pictures under names, which a derived class finds."""

    root: str

    def path(self, key: str) -> str:
        """What the dataset hands on as lq_path and gt_path: the key alone, as BasicSR has it for LMDBs."""
        return key

    def read(self, key: str) -> bytes:
        raise NotImplementedError

    def picture(self, key: str, gray: bool = False) -> np.ndarray:
        """The picture as (H, W, 3) BGR or, for gray, (H, W) uint8, 0..255.

        Raises:
            ValueError: it cannot be decoded.
        """
        data = self.read(key)
        flag = cv2.IMREAD_GRAYSCALE if gray else cv2.IMREAD_COLOR
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), flag) if data else None
        if picture is None:
            raise ValueError(
                f"'{self.path(key)}' in '{self.root}' cannot be decoded: truncated or not a picture; replace or "
                "remove it."
            )
        return picture


class Folder(_Store):
    """The pictures directly in a folder.

    Raises:
        FileNotFoundError: no such folder, or no picture in it.
        ValueError: two pictures of one name that differ in their extension.
    """

    def __init__(self, root: str):
        if not os.path.isdir(root):
            raise FileNotFoundError(f"there is no folder '{root}'; correct the path or put the pictures there.")
        self.root = root
        self._files: dict[str, str] = {}
        for file in os.listdir(root):
            key, suffix = os.path.splitext(file)
            if suffix.lower() not in PICTURE_SUFFIXES:
                continue
            if key in self._files:
                both = " and ".join(sorted((file, self._files[key])))
                raise ValueError(f"{both} in '{root}' share a name; rename one of them.")
            self._files[key] = file
        if not self._files:
            raise FileNotFoundError(
                f"folder '{root}' has no pictures ({', '.join(PICTURE_SUFFIXES)}); correct the path."
            )

    def keys(self) -> list[str]:
        return sorted(self._files)

    def path(self, key: str) -> str:
        return os.path.join(self.root, self._files[key])

    def read(self, key: str) -> bytes:
        return Path(self.path(key)).read_bytes()


class Lmdb(_Store):
    """The pictures in an LMDB laid out as BasicSR's.

    Raises:
        FileNotFoundError: no such LMDB, or a part of it is missing.
        ValueError: the name does not end in .lmdb, or, from `read`, the LMDB is damaged.
    """

    def __init__(self, root: str):
        self.root = root.rstrip("/")
        if not self.root.endswith(".lmdb"):
            raise ValueError(f"'{root}' does not end in .lmdb; correct the path, or write 'type: disk' for a folder.")
        for part in ("data.mdb", "meta_info.txt"):
            if not os.path.isfile(os.path.join(self.root, part)):
                raise FileNotFoundError(f"'{self.root}' has no {part}; correct the path or make the LMDB again.")
        lines = Path(self.root, "meta_info.txt").read_text().splitlines()
        self._keys = sorted(line.split(".")[0] for line in lines if line)

    def keys(self) -> list[str]:
        return self._keys

    def read(self, key: str) -> bytes:
        try:
            with compat.lmdb_environment(self.root).begin() as transaction:
                png = transaction.get(key.encode())
        except lmdb.Error as error:
            raise ValueError(f"LMDB '{self.root}' cannot be read ({error}); make it again.") from error
        if png is None:
            raise ValueError(f"LMDB '{self.root}' lacks '{key}', which its meta_info.txt names; make it again.")
        return png


class Decoded:
    """The pictures `keys` of another store, decoded by `pool` at once and held in memory. Raises as `picture` does."""

    def __init__(self, store: Folder | Lmdb | Tiles | Decoded, keys: list[str], gray: bool, pool: Executor):
        self._store = store
        store.picture(keys[0], gray)  # opens an LMDB, which threads must not do at the same time
        pictures = pool.map(lambda key: store.picture(key, gray)[:, :], keys)
        self._pictures = dict(zip(keys, pictures, strict=True))

    def path(self, key: str) -> str:
        return self._store.path(key)

    def picture(self, key: str, gray: bool = False) -> np.ndarray:
        """The picture, in the colours that were asked for at the start."""
        return self._pictures[key]


@functools.cache
def opened(root: str) -> Folder | Lmdb | Tiles:
    """The pictures at `root`, by its suffix an LMDB, tiles or else a folder; found once in each process.

    Raises as Lmdb, Tiles and Folder.
    """
    return open_store(root, {".lmdb": "lmdb", ".tiles": "tiles"}.get(Path(root).suffix, "disk"))


BACKENDS: dict[str, type[Folder | Lmdb | Tiles]] = {"disk": Folder, "lmdb": Lmdb, "tiles": Tiles}


def open_store(root: str, backend: str) -> Folder | Lmdb | Tiles:
    """The pictures under `root`; `backend` is the `type` of BasicSR's io_backend, or tiles.

    Raises:
        ValueError: another backend. See also Folder, Lmdb and Tiles.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f"io_backend type '{backend}' is unknown; write 'disk' for a folder of pictures, 'lmdb', or 'tiles' for a "
            "file that `resyn pack --tiles` wrote."
        )
    return BACKENDS[backend](root)
