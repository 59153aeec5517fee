import hashlib
import re
import shutil

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rwkvir_data import encode, sources, verify, write_lmdb
from rwkvir_data.tiles import cut, write_tiles

SIZES = {"a": (8, 12), "b": (8, 8), "c": (16, 4)}


def picture(key, scale=1):
    height, width = SIZES[key]
    return encode(key, np.random.default_rng(ord(key)).integers(0, 256, (height * scale, width * scale, 3), np.uint8))


@pytest.fixture
def folder(tmp_path, threads):
    """train_GT.lmdb, train_LQ_x2.lmdb and train.parquet."""
    root = tmp_path / "set"
    gts = [picture(key, 2) for key in SIZES]
    write_lmdb(root / "train_GT.lmdb", gts)
    write_lmdb(root / "train_LQ_x2.lmdb", [picture(key) for key in SIZES])
    rows = [{"key": gt.key, "sha256": hashlib.sha256(gt.png).hexdigest()} for gt in gts]
    pq.write_table(pa.Table.from_pylist(rows), root / "train.parquet")
    return root


def put(path, key, data):
    with lmdb.open(str(path)) as environment, environment.begin(write=True) as transaction:
        transaction.put(key.encode(), data) if data is not None else transaction.delete(key.encode())


def get(path, key):
    with lmdb.open(str(path), readonly=True, lock=False) as environment, environment.begin() as reader:
        return bytes(reader.get(key.encode()))


def faults(capsys, *words):
    """The lines that `resyn verify` prints, after what they all begin with."""
    code = verify.main([*map(str, words), "--workers", "1"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert code == (1 if lines else 0)
    assert last.endswith(f": {len(lines) or 'no'} fault{'s' if len(lines) != 1 else ''}")
    return [re.split(r"\.(?:lmdb|tiles): ", line)[-1] for line in lines]


def test_a_whole_set(folder, capsys):
    assert faults(capsys, folder) == []
    assert faults(capsys, folder / "train_LQ_x2.lmdb", "--gt", folder / "train_GT.lmdb") == []
    assert faults(capsys, folder / "train_GT.lmdb", "--table", folder / "train.parquet") == []
    verify.main([str(folder), "--workers", "1"])
    assert capsys.readouterr().out == "2 checked: no faults\n"


def test_a_flipped_bit_in_a_png_is_found(tmp_path, folder, capsys):
    whole = picture("b", 2)
    flipped = {
        f"at{i:04d}": whole.png[:i] + bytes([whole.png[i] ^ 16]) + whole.png[i + 1 :]
        for i in range(41, len(whole.png) - 16, 37)  # in the pixels' data and their checksum
    }
    write_lmdb(tmp_path / "bad.lmdb", [whole._replace(key=key, png=png) for key, png in flipped.items()])
    found = faults(capsys, tmp_path / "bad.lmdb")
    assert [fault.split(" cannot be decoded")[0] for fault in found] == [f"'{key}'" for key in flipped]


@pytest.mark.parametrize("cut", [0, 1, 30, 100, -1])
def test_truncated_pictures(folder, capsys, cut):
    gt = folder / "train_GT.lmdb"
    put(gt, "b", get(gt, "b")[:-60] if cut == -1 else get(gt, "b")[:cut])
    assert [fault[:21] for fault in faults(capsys, gt)] == ["'b' cannot be decoded"]


def test_another_picture_of_that_size(folder, capsys):
    put(folder / "train_GT.lmdb", "b", encode("b", np.zeros((16, 16, 3), np.uint8)).png)
    assert faults(capsys, folder) == ["'b' is not the picture of the table: their sha256 differ"]


def test_keys(folder, capsys):
    gt = folder / "train_GT.lmdb"
    put(gt, "a", None)
    put(gt, "d", b"")
    assert faults(capsys, gt) == [
        "'d' is stored, but not in meta_info.txt",
        "'a' is in meta_info.txt, but not stored",
    ]


def test_meta_info(folder, capsys):
    meta = folder / "train_LQ_x2.lmdb" / "meta_info.txt"
    meta.write_text("a.png (8,12,3) 1\nb (8,8,3)\nc.png (16,5,3) 1\na.png (8,12,3) 1\n")
    assert faults(capsys, meta.parent) == [
        "line 2 of meta_info.txt is 'b (8,8,3)', not 'key.png (height,width,channels) level'",
        "'a' is in meta_info.txt twice",
        "'b' is stored, but not in meta_info.txt",
        "'c' has 16x4 pixels, but 16x5 in meta_info.txt",
    ]
    meta.write_text("")
    assert "meta_info.txt names no picture" in faults(capsys, meta.parent)
    meta.unlink()
    (fault,) = faults(capsys, meta.parent)
    assert fault.startswith("cannot be read: ") and "meta_info.txt" in fault


def test_pairs(folder, capsys):
    lq = folder / "train_LQ_x2.lmdb"
    shutil.rmtree(lq)
    other = encode("e", np.zeros((4, 4, 3), np.uint8))
    write_lmdb(lq, [picture("a"), encode("b", np.zeros((7, 8, 3), np.uint8)), other])
    assert faults(capsys, folder) == [
        "'e' is not in GT",
        "GT has 'c', which is missing here",
        "'b' and its GT have 7x8 and 16x16 pixels, which is not scale 2",
    ]


def test_gt_may_be_larger_by_what_the_scale_leaves_over():
    lq = {"a": (10, 10), "b": (10, 10)}
    assert list(verify.pair_faults(lq, {"a": (32, 30), "b": (30, 31)})) == []
    assert len(list(verify.pair_faults(lq, {"a": (33, 30), "b": (30, 31)}))) == 1
    assert len(list(verify.pair_faults(lq, {"a": (30, 29), "b": (30, 31)}))) == 1


def test_a_cut_data_file(folder, capsys):
    data = folder / "train_GT.lmdb" / "data.mdb"
    data.write_bytes(data.read_bytes()[:9000])
    (fault,) = faults(capsys, folder / "train_GT.lmdb")
    assert fault.startswith("cannot be read: ") and "truncated" in fault


def test_tables(folder, capsys):
    table = folder / "other.parquet"
    pq.write_table(pa.table({"name": ["a", "zz"], "sha256": ["00", "00"]}), table)
    assert faults(capsys, folder / "train_GT.lmdb", "--table", table) == [
        f"'zz' is in {table}, but not in meta_info.txt",
        "'a' is not the picture of the table: their sha256 differ",
    ]
    pq.write_table(pa.table({"x": [1]}), table)
    with pytest.raises(ValueError, match=r"needs the columns key \(or name\) and sha256, but has x"):
        verify.main([str(folder / "train_GT.lmdb"), "--table", str(table)])


def test_paths_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="is neither an LMDB nor tiles nor a folder with any; correct the path"):
        verify.main([str(tmp_path)])
    with pytest.raises(FileNotFoundError, match=r"there is no table .*t\.parquet; correct the path"):
        verify.main([str(tmp_path), "--table", str(tmp_path / "t.parquet")])


def tile(path, **pictures):
    write_tiles(path, [cut(key, sources.decode(png)[..., ::-1], 8) for key, png in pictures.items()], 8)
    return path


@pytest.fixture
def tiles(folder):
    """train_GT.tiles beside train_GT.lmdb."""
    return tile(folder / "train_GT.tiles", **{key: picture(key, 2).png for key in SIZES})


def test_whole_tiles(folder, tiles, capsys):
    assert faults(capsys, tiles) == []
    verify.main([str(folder), "--workers", "1"])
    assert capsys.readouterr().out == "3 checked: no faults\n"
    shutil.rmtree(folder / "train_GT.lmdb")
    assert faults(capsys, tiles) == []


def test_every_flipped_byte_of_tiles_is_found(tmp_path, tiles, capsys):
    whole = tiles.read_bytes()
    assert len(whole) > 2000
    for place in range(0, len(whole), len(whole) // 20):
        damaged = tmp_path / f"{place}.tiles"
        damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        (fault,) = faults(capsys, damaged)
        assert re.match(r"'[abc]' cannot be decoded: '[abc]' in .* is damaged|cannot be read: .* is cut short", fault)


@pytest.mark.parametrize("length", [0, 10, 1500, -1])
def test_tiles_cut_short(tmp_path, tiles, capsys, length):
    cut_short = tmp_path / "cut.tiles"
    cut_short.write_bytes(tiles.read_bytes()[:length])
    (fault,) = faults(capsys, cut_short)
    assert fault.startswith("cannot be read: ") and "is cut short or was not written by `resyn pack" in fault


def test_tiles_of_other_pictures_than_their_lmdb(folder, capsys):
    other = tile(folder / "train_GT.tiles", a=picture("a", 2).png, b=picture("a", 2).png, z=picture("c").png)
    original = folder / "train_GT.lmdb"
    assert faults(capsys, other) == [
        f"'z' is not in {original}",
        f"{original} has 'c', which is missing here",
        f"'b' has other pixels than in {original}",
    ]
