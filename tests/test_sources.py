"""Every kind of source lists and reads the same pictures; every kind of file becomes RGB; what is broken says so."""

import io
import os
import tarfile
import zipfile
import zlib
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest
from PIL import Image

from rwkvir_data import sources
from rwkvir_data.sources import TooLargeError, decode, entries, read, read_entry

NAMES = ["a b.png", "a.png", "a/deep/er.PNG", "a/line\nbreak.png", "ünï→.png"]  # in their order


def picture(height: int = 6, width: int = 9) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PNG = encoded(Image.fromarray(picture()))
CONTENTS = {name: PNG + bytes(index) for index, name in enumerate(NAMES)}  # PNG allows what follows its end


def make_folder(root: Path, contents: dict[str, bytes]) -> Path:
    for name, data in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def make_tar(path: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def make_zip(path: Path, contents: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


def make_lmdb(path: Path, contents: dict[str, bytes]) -> Path:
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for name, data in contents.items():
            transaction.put(name.encode(), data)
    return path


def make_list(path: Path, contents: dict[str, bytes]) -> Path:
    make_folder(path.parent / "listed", contents)
    path.write_text("".join(f"listed/{name}\r\n" for name in (*contents, *contents)) + "\n")
    return path


def others(contents: dict[str, bytes]) -> dict[str, bytes]:
    """Shuffled, and among files that are no pictures."""
    return {"a/notes.json": b"{}", **{name: contents[name] for name in sorted(contents, reverse=True)}, "b.txt": b""}


@pytest.mark.parametrize("make, suffix", [(make_folder, ""), (make_tar, ".tar"), (make_zip, ".zip")])
def test_folders_and_archives(tmp_path, make, suffix):
    root = str(make(tmp_path / f"pictures{suffix}", others(CONTENTS)))
    found = list(entries(root))
    assert [entry.name for entry in found] == NAMES
    assert [read(root, entry.name) for entry in found] == list(CONTENTS.values())
    assert [read_entry(root, entry) for entry in found] == list(CONTENTS.values())


def test_archives_in_a_folder(tmp_path):
    make_folder(tmp_path, {"a.png": PNG, "b.tar.png": PNG, "b.tar0/c.png": PNG, "bad.tar": b"x" * 2000})
    make_tar(tmp_path / "b.tar", others(CONTENTS))
    make_zip(tmp_path / "b.tar0" / "D.ZIP", others(CONTENTS))
    (tmp_path / "gone.zip").symlink_to(tmp_path / "absent")
    (tmp_path / "linked.tar").symlink_to(tmp_path / "b.tar")
    (tmp_path / "folder.tar" / "x.tar").mkdir(parents=True)
    make_folder(tmp_path / "folder.tar", {"x.tar/y.png": PNG})
    found = {entry.name: entry for entry in entries(str(tmp_path))}
    wanted = {"a.png": PNG, "b.tar.png": PNG, **{f"b.tar/{name}": data for name, data in CONTENTS.items()}}
    wanted |= {**{f"b.tar0/D.ZIP/{name}": data for name, data in CONTENTS.items()}, "b.tar0/c.png": PNG}
    wanted |= {"bad.tar/": None, "folder.tar/x.tar/y.png": PNG, "gone.zip/": None}
    wanted |= {f"linked.tar/{name}": data for name, data in CONTENTS.items()}
    assert list(found) == sorted(found) == list(wanted)
    assert "the archive cannot be listed: '" in found["bad.tar/"].problem and "not a tar" in found["bad.tar/"].problem
    assert "there is no source" in found["gone.zip/"].problem
    for name, data in wanted.items():
        if data:
            assert read(str(tmp_path), name) == read_entry(str(tmp_path), found[name]) == data


def test_a_cut_tar_in_a_folder_is_an_entry(tmp_path):
    whole = make_tar(tmp_path / "whole.tar", {"a.png": PNG, "b.png": PNG}).read_bytes()
    (tmp_path / "whole.tar").rename(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(whole[:1100])
    good, bad = entries(str(tmp_path))
    assert good.name == "x.tar/a.png" and read_entry(str(tmp_path), good) == PNG
    assert bad.name.startswith("x.tar/") and "cut short" in bad.problem


def test_lmdb_and_list(tmp_path):
    contents = {"a b": PNG, "a/c": PNG + b"c"}
    database = str(make_lmdb(tmp_path / "pictures.lmdb", contents))
    assert {entry.name: read(database, entry.name) for entry in entries(database)} == contents
    listing = str(make_list(tmp_path / "pictures.txt", contents))
    listed = {f"listed/{name}": data for name, data in contents.items()}
    assert {entry.name: read(listing, entry.name) for entry in entries(listing)} == listed
    assert [entry.name for entry in entries(listing)] == sorted(listed)


@pytest.mark.parametrize("make, suffix", [(make_folder, ""), (make_tar, ".tar"), (make_zip, ".zip"), (make_lmdb, "")])
def test_a_name_that_is_not_there(tmp_path, make, suffix):
    root = str(make(tmp_path / f"pictures{suffix}", {"a.png": PNG}))
    with pytest.raises(FileNotFoundError):
        read(root, "b.png")


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda p: p / "absent", FileNotFoundError, "there is no source"),
        (lambda p: make_folder(p, {"x.pdf": b"x"}) / "x.pdf", ValueError, "is no source of pictures; give a folder"),
        (lambda p: make_folder(p, {"x.tar": b"x" * 2000}) / "x.tar", ValueError, "is not a tar"),
        (lambda p: make_folder(p, {"x.zip": b"x" * 2000}) / "x.zip", ValueError, "is not a whole zip"),
        (lambda p: make_folder(p, {"data.mdb": b"x" * 2000}), ValueError, "cannot be read as an LMDB"),
        (lambda p: make_lmdb(p / "x.lmdb", {"ü": PNG}), ValueError, "keys are ASCII"),
    ],
)
def test_what_is_no_source_says_so(tmp_path, make, error, message):
    with pytest.raises(error, match=message):
        list(entries(str(make(tmp_path))))


@pytest.mark.parametrize("cut", [1, 512, 513, 700, 1024, 1500, 1536 * 2 - 600, 1536 * 3 - 1, 1536 * 3, 1536 * 3 + 10])
def test_a_tar_cut_short_gives_what_is_before_the_cut_and_one_error(tmp_path, cut):
    """A member takes a block of 512 bytes for its header and two for its 1024 bytes of content."""
    contents = {f"{index}.png": PNG.ljust(1024, b"\0") for index in range(3)}
    assert len(PNG) <= 1024
    whole = make_tar(tmp_path / "whole.tar", contents).read_bytes()
    cut_short = tmp_path / "cut.tar"
    cut_short.write_bytes(whole[:cut])
    if cut < 512:
        with pytest.raises(ValueError, match="is not a tar"):
            list(entries(str(cut_short)))
        return
    good = [entry for entry in entries(str(cut_short)) if not entry.problem]
    (bad,) = [entry for entry in entries(str(cut_short)) if entry.problem]
    assert [entry.name for entry in good] == list(contents)[: cut // 1536]
    assert all(read_entry(str(cut_short), entry) == contents[entry.name] for entry in good)
    assert "cut short" in bad.problem
    with pytest.raises(ValueError, match="cut short"):
        read_entry(str(cut_short), bad)


def test_of_two_members_of_one_name_the_later_counts(tmp_path):
    path = make_tar(tmp_path / "x.tar", {"a.png": b"old"})
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("a.png")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"new"))
    (entry,) = entries(str(path))
    assert read_entry(str(path), entry) == read(str(path), "a.png") == b"new"


def test_a_tar_that_changes_is_read_anew(tmp_path):
    path = make_tar(tmp_path / "x.tar", {"a.png": b"old"})
    assert read(str(path), "a.png") == b"old"
    make_tar(path, {"b.png": b"newer", "a.png": b"new"})
    os.utime(path, (1, 1))
    assert read(str(path), "a.png") == b"new"


def test_what_a_folder_cannot_give_is_an_entry(tmp_path):
    make_folder(tmp_path, {"good/a.png": PNG, "shut/b.png": PNG})
    (tmp_path / "broken.png").symlink_to(tmp_path / "absent")
    (tmp_path / "circle").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / os.fsdecode(b"latin\xe9.png")).write_bytes(PNG)
    (tmp_path / os.fsdecode(b"folder\xe9")).mkdir()
    found = {entry.name: entry for entry in entries(str(tmp_path))}
    assert list(found) == sorted(found) == [
        "broken.png", "circle/", "folder\\udce9/", "good/a.png", "latin\\udce9.png", "shut/b.png",
    ]  # fmt: skip
    assert "circle" in found["circle/"].problem
    assert "not UTF-8" in found["latin\\udce9.png"].problem and "not UTF-8" in found["folder\\udce9/"].problem
    with pytest.raises(FileNotFoundError):
        read_entry(str(tmp_path), found["broken.png"])


def test_a_folder_without_permission(tmp_path, monkeypatch):
    """Tests may run as root, whom no mode keeps out."""
    make_folder(tmp_path, {"a.png": PNG, "shut/b.png": PNG})
    listed = os.scandir

    def scandir(path: str):
        if str(path).rstrip("/").endswith("shut"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    first, second = entries(str(tmp_path))
    assert first.name == "a.png" and first.problem is None
    assert second.name == "shut/" and second.problem == "the folder cannot be listed: Permission denied"
    with pytest.raises(PermissionError):
        list(entries(str(tmp_path / "shut")))


RGB = Image.fromarray(picture())
GREY16 = Image.fromarray((np.arange(54, dtype=np.uint16) * 1200).reshape(6, 9))


def rgb16_png() -> bytes:
    return cv2.imencode(".png", picture()[..., ::-1].astype(np.uint16) * 257)[1].tobytes()


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values.astype(np.uint8)[..., None], 3, axis=2)


EXACT = {
    "PNG": (PNG, picture()),
    "BMP": (encoded(RGB, "BMP"), picture()),
    "TIFF": (encoded(RGB, "TIFF"), picture()),
    "PPM": (encoded(RGB, "PPM"), picture()),
    "lossless WebP": (encoded(RGB, "WEBP", lossless=True), picture()),
    "alpha": (encoded(Image.fromarray(np.dstack([picture(), np.full((6, 9), 255, np.uint8)]))), picture()),
    "grey": (encoded(Image.fromarray(picture()[..., 0])), grey(picture()[..., 0])),
    "grey and alpha": (encoded(Image.fromarray(picture()[..., 0]).convert("LA")), grey(picture()[..., 0])),
    "16-bit grey PNG": (encoded(GREY16), grey(np.asarray(GREY16) >> 8)),
    "16-bit grey TIFF": (encoded(GREY16, "TIFF"), grey(np.asarray(GREY16) >> 8)),
    "16-bit RGB PNG": (rgb16_png(), picture()),
    "1 bit": (encoded(Image.fromarray(picture()[..., 0] > 99)), grey((picture()[..., 0] > 99) * 255)),
    "palette": (encoded(Image.fromarray(picture() // 255 * 255).quantize(8)), picture() // 255 * 255),
    "pages": (encoded(RGB, "TIFF", save_all=True, append_images=[Image.new("RGB", (3, 3))]), picture()),
}


@pytest.mark.parametrize("kind", EXACT)
def test_every_kind_of_picture_becomes_rgb(kind):
    data, wanted = EXACT[kind]
    image = decode(data)
    assert image.dtype == np.uint8 and image.flags.c_contiguous
    np.testing.assert_array_equal(image, wanted)


@pytest.mark.parametrize(
    "kind, mode, tolerance", [("JPEG", "RGB", 4), ("JPEG", "L", 4), ("JPEG", "CMYK", 8), ("WEBP", "RGB", 4)]
)
def test_lossy_pictures(kind, mode, tolerance):
    smooth = np.linspace(0, 255, 32 * 32).reshape(32, 32)
    image = decode(encoded(Image.fromarray(grey(smooth)).convert(mode), kind, quality=95))
    assert np.abs(image.astype(int) - grey(smooth)).max() <= tolerance


def test_exif_rotation():
    exif = Image.Exif()
    exif[274] = 6  # to be turned clockwise by 90 degrees
    np.testing.assert_array_equal(decode(encoded(RGB, "PNG", exif=exif)), np.rot90(picture(), -1))


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "the file is empty"),
        (b"no picture", "not a picture in one of the formats"),
        (PNG[: len(PNG) // 2], "truncated"),
        (encoded(RGB, "JPEG")[:-100], "Truncated"),
        (encoded(Image.fromarray(np.ones((3, 3), np.float32)), "TIFF"), "floating-point"),
    ],
)
def test_what_cannot_be_decoded_says_why(data, message):
    with pytest.raises(ValueError, match=message):
        decode(data)


@pytest.mark.parametrize("side", [14_000, 40_000])
def test_a_bomb_is_refused_before_it_is_decoded(side):
    header = encoded(Image.new("1", (1, 1)))
    width_at = header.index(b"IHDR") + 4
    bomb = header[:width_at] + side.to_bytes(4, "big") * 2 + header[width_at + 8 :]
    end = width_at + 13
    bomb = bomb[:end] + zlib.crc32(bomb[width_at - 4 : end]).to_bytes(4, "big") + bomb[end + 4 :]
    with pytest.raises(TooLargeError, match=str(sources.MAX_PIXELS)):
        decode(bomb)
