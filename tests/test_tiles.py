"""`resyn pack --tiles`, and the crops that ReSynPairedDataset reads from what it wrote."""

import multiprocessing
import os
import pickle
import random
import resource

import cv2
import numpy as np
import pytest
import torch

from rwkvir_data import ReSynPairedDataset, encode, pack, tiles, write_lmdb
from rwkvir_data.picture_store import open_store
from rwkvir_data.tiles import Tiles, cut, write_tiles

SIDE = 16


def picture(seed, height, width):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)  # BGR


PICTURES = {
    f"p{i}": picture(i, height, width) for i, (height, width) in enumerate([(64, 48), (47, 65), (16, 16), (5, 7)])
}


@pytest.fixture
def file(tmp_path):
    write_tiles(tmp_path / "x.tiles", (cut(key, PICTURES[key], SIDE) for key in reversed(PICTURES)), SIDE)
    return tmp_path / "x.tiles"


@pytest.mark.parametrize("key", PICTURES)
def test_every_crop_has_the_bytes_of_the_whole(file, key):
    whole, tiled = PICTURES[key], Tiles(str(file)).picture(key)
    assert tiled.shape == whole.shape
    assert np.array_equal(tiled[:, :], whole)
    edges = [0, 1, 15, 16, 17, 31, 32, 33, 40]
    for top, left in [(top, left) for top in edges for left in edges if top < whole.shape[0] and left < whole.shape[1]]:
        for size in (1, 16, 21):
            assert np.array_equal(tiled[top : top + size, left : left + size], whole[top:, left:][:size, :size])


def test_only_the_tiles_that_a_crop_touches_are_decoded(file, monkeypatch):
    decoded = []
    restore = tiles._restore
    monkeypatch.setattr(tiles, "_restore", lambda cut: decoded.append(cut.shape[:2]) or restore(cut))
    tiled = Tiles(str(file)).picture("p0")
    for top, bottom, left, right in [(0, 16, 0, 16), (1, 17, 0, 16), (15, 33, 15, 48)]:
        tiled[top:bottom, left:right]
    assert decoded == [(1, 1), (2, 1), (3, 3)]


def test_a_file_may_be_replaced(file):
    Tiles(str(file)).picture("p0")[:, :]
    file.unlink()
    write_tiles(file, [cut("new", PICTURES["p3"])])
    assert np.array_equal(Tiles(str(file)).picture("new")[:, :], PICTURES["p3"])


def test_keys_are_in_the_order_of_their_names(file):
    assert Tiles(str(file)).keys() == sorted(PICTURES)


def sums(store):
    return [int(store.picture(key)[:, :].sum()) for key in store.keys()]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_may_be_forked_and_pickled(file, method):
    store = Tiles(str(file))
    expected = sums(store)
    assert sums(pickle.loads(pickle.dumps(store))) == expected
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(sums, (store,)) == expected


@pytest.fixture
def roots(tmp_path):
    """Folders of 8 pairs at scale 2, and what `resyn pack` makes of them."""
    for kind in ("gt", "lq"):
        (tmp_path / kind).mkdir()
    for i in range(8):
        gt = picture(i, 90, 70 + 2 * i)
        for kind, content in (("gt", gt), ("lq", gt[::2, ::2])):
            cv2.imwrite(f"{tmp_path / kind}/p {i}é.png", content)
    for kind in ("gt", "lq"):
        assert pack.main(["--tiles", str(tmp_path / kind), "-o", str(tmp_path / f"{kind}.tiles"), "--side", "16"]) == 0
    return tmp_path


@pytest.mark.parametrize("phase", ["train", "val"])
@pytest.mark.parametrize("color", ["rgb", "y"])
def test_the_dataset_gives_the_items_of_the_packed_folders(roots, phase, color):
    def items(suffix, backend):
        opt = {
            "name": "tiny",
            "phase": phase,
            "scale": 2,
            "io_backend": {"type": backend},
            "gt_size": 32,
            "color": color,
        }
        paths = {f"dataroot_{kind}": str(roots / f"{kind}{suffix}") for kind in ("gt", "lq")}
        dataset = ReSynPairedDataset(opt | paths)
        random.seed(0)
        return [dataset[i] for i in range(8)]

    for whole, tiled in zip(items("", "disk"), items(".tiles", "tiles"), strict=True):
        assert torch.equal(whole["gt"], tiled["gt"])
        assert torch.equal(whole["lq"], tiled["lq"])


def test_gray_pictures_stay_as_they_are(tmp_path):
    gray = picture(0, 40, 40)[..., 0]
    write_lmdb(tmp_path / "x.lmdb", [encode("p", gray)])
    pack.main(["--tiles", str(tmp_path / "x.lmdb"), "-o", str(tmp_path / "x.tiles"), "--workers", "1"])
    assert np.array_equal(Tiles(str(tmp_path / "x.tiles")).picture("p", gray=True)[3:30, 2:20], gray[3:30, 2:20])


# What goes wrong


def test_a_damaged_tile_names_its_picture(file):
    content = bytearray(file.read_bytes())
    place = Tiles(str(file)).pictures["p1"][2] + 8 * 15 + 30  # in the first tile of p1, which has 15
    content[place] ^= 1
    other = file.with_name("other.tiles")
    other.write_bytes(content)
    tiled = Tiles(str(other))
    assert np.array_equal(tiled.picture("p0")[:, :], PICTURES["p0"])
    assert np.array_equal(tiled.picture("p1")[16:, 16:], PICTURES["p1"][16:, 16:])
    with pytest.raises(ValueError, match=r"'p1' in '.*other.tiles' is damaged; make the file again"):
        tiled.picture("p1")[:4, :4]


@pytest.mark.parametrize("content", [b"", b"junk" * 100, "cut", "index"])
def test_a_file_that_is_not_whole(file, content):
    if content == "cut":
        content = file.read_bytes()[:-10]
    elif content == "index":
        content = file.read_bytes().replace(b'"p1"', b'"q1"')
    other = file.with_name("other.tiles")
    other.write_bytes(content)
    with pytest.raises(ValueError, match=r"'.*other.tiles' is cut short or was not written by `resyn pack --tiles`"):
        Tiles(str(other))


def test_a_file_that_is_missing():
    with pytest.raises(FileNotFoundError, match=r"there is no file '/none.tiles'; correct the path or make it with"):
        open_store("/none.tiles", "tiles")


def test_an_output_that_exists_is_left_alone(file):
    before = file.read_bytes()
    with pytest.raises(FileExistsError, match=r"x.tiles' exists and is left as it is; delete it or"):
        write_tiles(file, [])
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "pictures", "error", "message"),
    [
        ("x.lmdb", [], ValueError, r"x.lmdb' does not end in .tiles; name it '.*x.lmdb.tiles'"),
        ("y.tiles", [], ValueError, "there are no pictures to write"),
        ("y.tiles", ["p0", "p0"], ValueError, "the key 'p0' occurs twice; rename one"),
    ],
)
def test_what_cannot_be_written_leaves_nothing_behind(tmp_path, name, pictures, error, message):
    with pytest.raises(error, match=message):
        write_tiles(tmp_path / name, (cut(key, PICTURES[key]) for key in pictures))
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_sentence_and_leaves_nothing_behind(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write '.*x.tiles': .*; free space or use another disk, then start"):
            write_tiles(tmp_path / "x.tiles", [cut("p0", PICTURES["p0"])])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_a_picture_that_cannot_be_decoded_is_named(roots):
    (roots / "gt" / "p 3é.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"gt/p 3é.png' .* cannot be decoded: truncated or not a picture; replace or"):
        pack.main(["--tiles", str(roots / "gt"), "-o", str(roots / "again.tiles")])
    assert not list(roots.glob("again*"))
