import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rwkvir_data import encode, verify, write_lmdb

SIZES = {"a": (8, 12), "b": (8, 8), "c": (16, 4)}


def picture(key, scale=1):
    height, width = SIZES[key]
    return encode(key, np.random.default_rng(ord(key)).integers(0, 256, (height * scale, width * scale, 3), np.uint8))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """train_GT.lmdb, train_LQ_x2.lmdb and train.parquet; threads in place of processes, which take seconds to start."""

    @contextmanager
    def pool(number):
        with ThreadPoolExecutor(number) as executor:
            yield executor

    monkeypatch.setattr(verify, "workers", pool)
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
    return [line.split(".lmdb: ")[-1] for line in lines]


def test_a_whole_set(folder, capsys):
    assert faults(capsys, folder) == []
    assert faults(capsys, folder / "train_LQ_x2.lmdb", "--gt", folder / "train_GT.lmdb") == []
    assert faults(capsys, folder / "train_GT.lmdb", "--table", folder / "train.parquet") == []
    verify.main([str(folder), "--workers", "1"])
    assert capsys.readouterr().out == "2 LMDBs: no faults\n"


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
    with pytest.raises(FileNotFoundError, match="is no LMDB, nor a folder with one; correct the path"):
        verify.main([str(tmp_path)])
    with pytest.raises(FileNotFoundError, match=r"there is no table .*t\.parquet; correct the path"):
        verify.main([str(tmp_path), "--table", str(tmp_path / "t.parquet")])
