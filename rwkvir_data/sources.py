"""Where pictures come from: folders, tar and zip archives, LMDBs and text lists, and how their files become RGB.

A source is a path, its `root`; a picture in it is found again by (root, name).
"""

from __future__ import annotations

import functools
import io
import os
import re
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import lmdb
import numpy as np
from PIL import Image, ImageOps

from rwkvir import compat
from rwkvir_data.picture_store import PICTURE_SUFFIXES

FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow's names
MAX_PIXELS = 178_956_970  # where Pillow, too, speaks of a decompression bomb; an RGB picture of that size is 512 MiB


class TooLargeError(ValueError):
    """A picture of more than MAX_PIXELS pixels, which is not decoded."""


class Entry(NamedTuple):
    """A picture of a source, not yet read. Names are sorted and unique within a source.

    start, size: where its bytes lie in a tar; `problem`: why it cannot be read, known before trying.
    """

    name: str
    start: int | None = None
    size: int | None = None
    problem: str | None = None


def entries(root: str) -> Iterator[Entry]:
    """The pictures of the source `root`, in the order of their names, with memory that does not grow with pictures
    read (an archive's or a list's index is held).

    By what `root` is:
        folder: its files, at any depth, whose suffix is a picture's; the name is the path below it, with '/'. Of a tar
            or zip in it, its members, as if it were a folder: 'shards/000.tar/a.jpg'.
        folder with a data.mdb: an LMDB as BasicSR lays it out; the name is the key.
        .tar, .zip: members whose suffix is a picture's; the name is the member's.
        .txt: one path a line, absolute or relative to the list's folder; the name is the line.

    What cannot be read, but is known to be there, is an entry with a `problem`: folders without permission, damaged
    archives in a folder, names that are not UTF-8, and the place where a tar is cut short.

    Raises:
        FileNotFoundError: there is no `root`.
        ValueError: `root` is nothing of the above, or damaged as a whole.
        OSError: `root` itself must not be read.
    """
    return _kind(root).entries(root)


def read(root: str, name: str) -> bytes:
    """The encoded bytes of the picture `name` of the source `root`.

    Raises:
        OSError: it is not there or cannot be read.
        ValueError: its archive or LMDB is damaged.
    """
    return _kind(root).read(root, name)


def read_entry(root: str, entry: Entry) -> bytes:
    """What `read` returns, but a tar's member is found without its index. Raises as `read`, and for a `problem`."""
    if entry.problem:
        raise ValueError(entry.problem)
    if entry.start is None or entry.size is None:
        return read(root, entry.name)
    archive, _ = _in_archive(root, entry.name)
    return _read_part(archive or root, entry.start, entry.size)


def decode(data: bytes) -> np.ndarray:
    """Decode a JPEG, PNG, WebP, TIFF, BMP or PPM picture: (H, W, 3) uint8, RGB, contiguous, turned as its EXIF says.

    Grey becomes three equal channels, palettes and CMYK are converted, alpha is dropped (as BasicSR's reader does), and
    of 16 bits the upper 8 remain. Of several pages or frames the first counts. Colour profiles are not applied.

    Raises:
        TooLargeError: more than MAX_PIXELS pixels.
        ValueError: the bytes are no such picture, or damaged or cut short.
    """
    if not data:
        raise ValueError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures and odd EXIF; what fails, raises
            return _decode(data)
    except (TooLargeError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"more than {MAX_PIXELS} pixels ({error})") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"not a picture in one of the formats {', '.join(FORMATS)}") from error
    except Exception as error:  # damaged bytes make Pillow raise whatever they happen to mean
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def _decode(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        width, height = opened.size
        if width * height > MAX_PIXELS:
            raise TooLargeError(f"{width} x {height} pixels, more than {MAX_PIXELS}")
        image: Image.Image = opened
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16-bit grey, which Pillow's convert would clip to 255
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("floating-point pixels, whose range is not known; save it with 8 or 16 bits")
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))


class _Kind(NamedTuple):
    """How the pictures of a kind of source are listed and read."""

    entries: Callable[[str], Iterator[Entry]]
    read: Callable[[str, str], bytes]


def _kind(root: str) -> _Kind:
    path = Path(root)
    if path.is_dir():
        return LMDB if (path / "data.mdb").exists() else FOLDER
    if not path.exists():
        raise FileNotFoundError(f"there is no source '{root}'; correct the path")
    kinds = {".tar": TAR, ".zip": ZIP, ".txt": LIST}
    if path.suffix.lower() not in kinds:
        raise ValueError(
            f"'{root}' is no source of pictures; give a folder, an LMDB's folder, a .tar, a .zip, or a .txt with one "
            "path a line (unpack compressed tars first)"
        )
    return kinds[path.suffix.lower()]


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES


def _is_archive(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in (".tar", ".zip")


def _entry(name: str, problem: str | None = None) -> Entry:
    """An entry whose name can be written as UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return Entry(name.encode(errors="backslashreplace").decode(), problem="its name is not UTF-8; rename it")
    return Entry(name, problem=problem)


def _read_part(path: str, start: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)


def _folder_entries(root: str) -> Iterator[Entry]:
    os.scandir(root).close()  # only folders below the root may refuse to be read
    yield from _walk(root, "")


def _walk(root: str, below: str) -> Iterator[Entry]:
    try:
        with os.scandir(os.path.join(root, below)) as listing:
            # What leads to others sorts with its '/', which makes the walk's order that of whole paths.
            found = [_entry(f"{below}{item.name}{'/' * (item.is_dir() or _is_archive(item.name))}") for item in listing]
    except OSError as error:
        yield Entry(below, problem=f"the folder cannot be listed: {error.strerror}")
        return
    for entry in sorted(found, key=lambda entry: entry.name):
        path = os.path.join(root, entry.name[:-1])
        if not entry.name.endswith("/"):
            if _is_picture(entry.name):
                yield entry
        elif entry.problem:
            yield entry
        elif not os.path.isdir(path):
            yield from _members(path, entry.name)
        elif os.path.islink(path):
            yield entry._replace(
                problem="it links to a folder, which may lead in a circle; give that folder as a source"
            )
        else:
            yield from _walk(root, entry.name)


def _members(archive: str, below: str) -> Iterator[Entry]:
    """The entries of an archive in a folder, with `below` before their names."""
    try:
        for entry in entries(archive):
            yield entry._replace(name=below + entry.name)
    except (OSError, ValueError) as error:
        yield Entry(below, problem=f"the archive cannot be listed: {getattr(error, 'strerror', None) or error}")


def _in_archive(root: str, name: str) -> tuple[str | None, str]:
    """The archive in the folder `root` that `name` leads into, and the name there; or None and `name`."""
    for end in (match.start() for match in re.finditer("/", name)):
        archive = os.path.join(root, name[:end])
        if _is_archive(archive) and os.path.isfile(archive):
            return archive, name[end + 1 :]
    return None, name


def _folder_read(root: str, name: str) -> bytes:
    archive, member = _in_archive(root, name)
    return read(archive, member) if archive else Path(root, name).read_bytes()


def _tar_entries(root: str) -> Iterator[Entry]:
    yield from sorted(_tar_index(root).values())


def _tar_read(root: str, name: str) -> bytes:
    index = _tar_index(root)
    if name not in index:
        raise FileNotFoundError(f"'{root}' has no member '{name}'; the tar has changed, score it again")
    return read_entry(root, index[name])


def _tar_index(root: str) -> dict[str, Entry]:
    status = os.stat(root)
    return _index_of_tar(root, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _index_of_tar(root: str, size: int, changed: int) -> dict[str, Entry]:
    """Name -> entry. Of two members of one name the later one counts, as when unpacking."""
    index = {}
    try:
        with tarfile.open(root, "r:") as tar:
            while member := _next_member(tar, size):
                if isinstance(member, Entry):
                    index[member.name] = member
                    break
                if member.isfile() and _is_picture(member.name):
                    entry = _entry(member.name)
                    index[entry.name] = entry._replace(start=member.offset_data, size=member.size)
    except tarfile.ReadError as error:
        raise ValueError(f"'{root}' is not a tar ({error}); replace it (unpack compressed tars first)") from error
    return index


def _next_member(tar: tarfile.TarFile, size: int) -> tarfile.TarInfo | Entry | None:
    """The next member; an entry with a problem where the tar is cut short; None at its end mark, a block of zeros."""
    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them
    start = tar.offset  # type: ignore[attr-defined]
    try:
        member = tar.next()
    except tarfile.ReadError:
        member = None
    if member is None:
        with open(tar.name, "rb") as file:  # type: ignore[arg-type]
            file.seek(start)
            is_end = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
        return None if is_end else Entry(f"byte {start}", problem="the tar is cut short or damaged here; get it again")
    if member.offset_data + member.size > size:
        return _entry(member.name, "the tar is cut short here; get it again")
    return member


@functools.lru_cache(maxsize=8)
def _open_zip(root: str, pid: int) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(root)
    except zipfile.BadZipFile as error:
        raise ValueError(f"'{root}' is not a whole zip ({error}); get it again, or repair it with zip -FF") from error


def _zip_entries(root: str) -> Iterator[Entry]:
    names = {member.filename for member in _open_zip(root, os.getpid()).infolist() if not member.is_dir()}
    yield from map(_entry, sorted(filter(_is_picture, names)))


def _zip_read(root: str, name: str) -> bytes:
    try:
        return _open_zip(root, os.getpid()).read(name)
    except KeyError as error:
        raise FileNotFoundError(f"'{root}' has no member '{name}'; the zip has changed, score it again") from error
    except Exception as error:  # a damaged member raises what its compression's library raises
        raise ValueError(f"the member cannot be unpacked: {error}") from error


def _lmdb_entries(root: str) -> Iterator[Entry]:
    with _environment(root).begin() as transaction:
        for key in transaction.cursor().iternext(keys=True, values=False):
            if not key.isascii():
                raise ValueError(f"'{root}' has the key {key!r}, but BasicSR's keys are ASCII; make the LMDB again")
            yield Entry(key.decode())


def _lmdb_read(root: str, name: str) -> bytes:
    with _environment(root).begin() as transaction:
        data = transaction.get(name.encode())
    if data is None:
        raise FileNotFoundError(f"'{root}' has no key '{name}'; the LMDB has changed, score it again")
    return data


def _environment(root: str) -> lmdb.Environment:
    try:
        return compat.lmdb_environment(root)
    except lmdb.Error as error:
        raise ValueError(f"'{root}' cannot be read as an LMDB ({error}); make it again") from error


def _list_entries(root: str) -> Iterator[Entry]:
    lines = {line.rstrip(b"\r") for line in Path(root).read_bytes().split(b"\n")}
    yield from sorted(_entry(os.fsdecode(line)) for line in lines - {b""})


def _list_read(root: str, name: str) -> bytes:
    return Path(Path(root).parent, name).read_bytes()


FOLDER = _Kind(_folder_entries, _folder_read)
TAR = _Kind(_tar_entries, _tar_read)
ZIP = _Kind(_zip_entries, _zip_read)
LMDB = _Kind(_lmdb_entries, _lmdb_read)
LIST = _Kind(_list_entries, _list_read)
