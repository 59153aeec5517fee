"""Pictures in tiles: a crop is read by decoding only what it touches.

A tile is `side` x `side` pixels, BGR, of a picture that is continued beyond its right and lower edge. What is stored is
its second differences, modulo 256: blue and red less green, then each value less the one above, then less the one to
the left; as planes (3, side, side), compressed by Zstandard. A file X.tiles is, with all numbers little-endian:

    for each picture: the sizes in bytes and the CRC-32 of its tiles, (tiles, 2) uint32; then its tiles, row by row
    the index, JSON: {"side": 64, "pictures": {key: [height, width, offset of the picture], ...}}
    the index's offset, uint64; its CRC-32, uint32; MAGIC
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import cv2
import numba
import numpy as np
import pyarrow

from rwkvir_data.aside import written_aside

MAGIC = b"ReSyn tiles 1\n"
END = struct.Struct(f"<QI{len(MAGIC)}s")
LEVEL = 1  # of Zstandard; higher ones save less than 2 %
SIDE = 64  # smaller tiles cost more calls and bytes, larger ones more pixels outside of a crop


class CutPicture(NamedTuple):
    """A picture ready to be stored: its key, height and width, and its tiles."""

    key: str
    size: tuple[int, int]
    tiles: list[bytes]


def cut(key: str, picture: np.ndarray, side: int = SIDE) -> CutPicture:
    """Compress a picture, (H, W, 3) BGR uint8, for `write_tiles`; may run in any process."""
    height, width = picture.shape[:2]
    bgr = np.pad(picture, ((0, -height % side), (0, -width % side), (0, 0)), "edge")
    planes = np.stack((bgr[..., 0] - bgr[..., 1], bgr[..., 1], bgr[..., 2] - bgr[..., 1]))  # (3, H, W)
    tiles = planes.reshape(3, bgr.shape[0] // side, side, -1, side).transpose(1, 3, 0, 2, 4).reshape(-1, 3, side, side)
    zero = np.uint8(0)
    differences = np.diff(np.diff(tiles, axis=2, prepend=zero), axis=3, prepend=zero)
    codec = pyarrow.Codec("zstd", LEVEL)
    return CutPicture(key, (height, width), [codec.compress(tile.tobytes(), asbytes=True) for tile in differences])


def write_tiles(path: str | os.PathLike, pictures: Iterable[CutPicture], side: int = SIDE) -> int:
    """Store `pictures`, cut by `side`, with flat memory, and return how many there were.

    `path` appears when all is done; see `written_aside`.

    Raises:
        FileExistsError: `path` exists. It is not touched.
        ValueError: `path` does not end in .tiles, another process is writing it, there are no pictures, or a key occurs
            twice.
        OSError: the disk is full or cannot be written.
    """
    path = Path(path)
    if path.suffix != ".tiles":
        raise ValueError(f"'{path}' does not end in .tiles; name it '{path}.tiles'.")
    index: dict[str, tuple[int, int, int]] = {}
    with written_aside(path) as partial, open(partial, "xb") as file:
        for key, size, tiles in pictures:
            if key in index:
                raise ValueError(f"the key '{key}' occurs twice; rename one of the two pictures.")
            index[key] = (*size, file.tell())
            file.write(np.array([(len(tile), zlib.crc32(tile)) for tile in tiles], "<u4").tobytes())
            file.writelines(tiles)
        if not index:
            raise ValueError(f"there are no pictures to write to '{path}'; check where they should come from.")
        text, start = json.dumps({"side": side, "pictures": index}).encode(), file.tell()
        file.write(text + END.pack(start, zlib.crc32(text), MAGIC))
        file.flush()
        os.fsync(file.fileno())
    return len(index)


class Tiles:
    """The pictures in a file that `resyn pack --tiles` wrote. It holds no open file: it may be forked and pickled.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is another kind of file, or cut short.
    """

    def __init__(self, root: str):
        self.root = root
        if not os.path.isfile(root):
            raise FileNotFoundError(
                f"there is no file '{root}'; correct the path or make it with `resyn pack --tiles`."
            )
        _mapped.cache_clear()  # the file may have been replaced
        content = _mapped(root) if os.path.getsize(root) > END.size else bytes(END.size)
        start, crc, magic = END.unpack(content[-END.size :])
        text = content[start : -END.size]
        if magic != MAGIC or zlib.crc32(text) != crc:
            raise ValueError(f"'{root}' is cut short or was not written by `resyn pack --tiles`; make it again.")
        index = json.loads(text)
        self.side: int = index["side"]
        self.pictures: dict[str, tuple[int, int, int]] = index["pictures"]

    def keys(self) -> list[str]:
        return sorted(self.pictures)

    def path(self, key: str) -> str:
        """What the dataset hands on as lq_path and gt_path: the key alone, as for an LMDB."""
        return key

    def picture(self, key: str, gray: bool = False) -> TiledPicture:
        return TiledPicture(self, key, gray)


class TiledPicture:
    """A picture of which `picture[top:bottom, left:right]` decodes what it needs: (H, W, 3) BGR or (H, W) gray, uint8.

    Gray is OpenCV's luma of the colours, from which a PNG decoder's differs by up to 1.
    """

    def __init__(self, store: Tiles, key: str, gray: bool):
        height, width, self._offset = store.pictures[key]
        self.shape = (height, width) if gray else (height, width, 3)
        self._store, self._key, self._gray = store, key, gray

    def __getitem__(self, window: tuple[slice, slice]) -> np.ndarray:
        (top, bottom, _), (left, right, _) = (part.indices(n) for part, n in zip(window, self.shape[:2], strict=True))
        side, content = self._store.side, _mapped(self._store.root)
        rows, columns = (-(-n // side) for n in self.shape[:2])
        data = self._offset + 8 * rows * columns
        sizes, crcs = np.frombuffer(content[self._offset : data], "<u4").reshape(rows, columns, 2).transpose(2, 0, 1)
        ends = data + np.cumsum(sizes, dtype=np.int64).reshape(rows, columns)
        touched = np.s_[top // side : -(-bottom // side), left // side : -(-right // side)]
        stored = [content[end - size : end] for end, size in zip(ends[touched].flat, sizes[touched].flat, strict=True)]
        if [zlib.crc32(tile) for tile in stored] != crcs[touched].ravel().tolist():
            raise ValueError(f"'{self._key}' in '{self._store.root}' is damaged; make the file again.")
        tiles = b"".join([_CODEC.decompress(tile, 3 * side * side, asbytes=True) for tile in stored])
        bgr = _restore(np.frombuffer(tiles, np.uint8).reshape(*ends[touched].shape, 3, side, side))
        part = bgr[top % side :, left % side :][: bottom - top, : right - left]
        return cv2.cvtColor(part, cv2.COLOR_BGR2GRAY) if self._gray else part


_CODEC = pyarrow.Codec("zstd")


@numba.njit(cache=True)
def _restore(tiles: np.ndarray) -> np.ndarray:
    """BGR, (rows * side, columns * side, 3), from the differences of tiles, (rows, columns, 3, side, side).

    All steps are linear modulo 256, so that green may be added back before the differences are summed up.
    """
    rows, columns, _, side, _ = tiles.shape
    bgr = np.empty((rows * side, columns * side, 3), np.uint8)
    for row in range(rows):
        for column in range(columns):
            tile = tiles[row, column]
            for y in range(side):
                b = g = r = 0
                for x in range(side):
                    g += tile[1, y, x]
                    b += tile[0, y, x] + tile[1, y, x]
                    r += tile[2, y, x] + tile[1, y, x]
                    i, j = row * side + y, column * side + x
                    bgr[i, j, 0] = b + (bgr[i - 1, j, 0] if y else 0)
                    bgr[i, j, 1] = g + (bgr[i - 1, j, 1] if y else 0)
                    bgr[i, j, 2] = r + (bgr[i - 1, j, 2] if y else 0)
    return bgr


@functools.cache
def _mapped(path: str) -> mmap.mmap:
    """The content of a file, which stays open for as long as the process lives, and in those forked from it."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
