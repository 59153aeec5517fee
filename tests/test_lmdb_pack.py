import errno
import subprocess
import sys

import lmdb
import numpy as np
import pytest
from basicsr.data.paired_image_dataset import PairedImageDataset

from rwkvir_data import encode, lmdb_pack, write_lmdb


def picture(seed, shape=(12, 10, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_layout(tmp_path):
    path = tmp_path / "a.lmdb"
    contents = [encode("x_1", picture(0)), encode("grey", picture(1, (4, 6)), compress_level=9)]
    assert write_lmdb(path, iter(contents)) == 2
    assert sorted(file.name for file in path.iterdir()) == ["data.mdb", "lock.mdb", "meta_info.txt"]
    assert (path / "meta_info.txt").read_text() == "x_1.png (12,10,3) 1\ngrey.png (4,6,1) 9\n"
    assert [file.name for file in tmp_path.iterdir()] == ["a.lmdb"]


def test_stock_basicsr_reads_it(tmp_path):
    gts = {f"p{i}": picture(i, (16, 24, 3)) for i in range(3)}
    write_lmdb(tmp_path / "gt.lmdb", (encode(key, gt) for key, gt in gts.items()))
    write_lmdb(tmp_path / "lq.lmdb", (encode(key, gt[::4, ::4]) for key, gt in gts.items()))
    dataset = PairedImageDataset(
        {
            "phase": "val",
            "scale": 4,
            "dataroot_gt": str(tmp_path / "gt.lmdb"),
            "dataroot_lq": str(tmp_path / "lq.lmdb"),
            "io_backend": {"type": "lmdb"},
        }
    )
    assert len(dataset) == 3
    for item in dataset:
        gt = gts[item["gt_path"]]
        assert np.array_equal(item["gt"].numpy() * 255, gt.transpose(2, 0, 1))
        assert np.array_equal(item["lq"].numpy() * 255, gt[::4, ::4].transpose(2, 0, 1))


def test_the_map_grows(tmp_path, monkeypatch):
    monkeypatch.setattr(lmdb_pack, "BATCH_BYTES", 20_000)  # a map of 40 KB to begin with
    contents = [encode(f"k{i}", picture(i, (60, 60, 3))) for i in range(30)]
    contents.append(encode("large", picture(99, (300, 300, 3))))
    write_lmdb(tmp_path / "a.lmdb", contents)
    with lmdb.open(str(tmp_path / "a.lmdb"), readonly=True, lock=False) as environment, environment.begin() as reader:
        assert all(reader.get(item.key.encode()) == item.png for item in contents)
        assert reader.stat()["entries"] == 31
    assert len((tmp_path / "a.lmdb" / "meta_info.txt").read_text().splitlines()) == 31


@pytest.mark.parametrize("key", ["", "a.b", "ä", "a\nb", "k" * 512])
def test_impossible_keys(tmp_path, key):
    with pytest.raises(ValueError, match=r"cannot be a key: .* printable ASCII letters, no dot; rename it"):
        write_lmdb(tmp_path / "a.lmdb", [encode("fine", picture(0)), encode(key, picture(1))])
    assert not any(tmp_path.iterdir())


def test_a_key_that_occurs_twice(tmp_path, monkeypatch):
    for batch_bytes in (1, 10**6):  # in two batches, in one
        monkeypatch.setattr(lmdb_pack, "BATCH_BYTES", batch_bytes)
        with pytest.raises(ValueError, match="the key 'same' occurs twice; rename one"):
            write_lmdb(tmp_path / "a.lmdb", [encode("same", picture(0)), encode("same", picture(1))])
        assert not any(tmp_path.iterdir())


def test_an_existing_lmdb_is_left_as_it_is(tmp_path):
    write_lmdb(tmp_path / "a.lmdb", [encode("old", picture(0))])
    with pytest.raises(
        FileExistsError, match=r"a\.lmdb' exists and is left as it is; delete it or write under another"
    ):
        write_lmdb(tmp_path / "a.lmdb", [encode("new", picture(0))])
    assert (tmp_path / "a.lmdb" / "meta_info.txt").read_text().startswith("old.png")


def test_nothing_is_left_of_an_interrupted_one(tmp_path):
    def contents():
        yield encode("a", picture(0))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_lmdb(tmp_path / "a.lmdb", contents())
    assert not any(tmp_path.iterdir())


def test_a_full_disk(tmp_path):
    """A limit on the size of files stands in for the disk: writing fails in the middle of a commit."""
    code = (
        "import resource, sys; import numpy as np; from rwkvir_data import encode, write_lmdb\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))\n"
        "noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)\n"
        "try: write_lmdb(sys.argv[1], (encode(str(i), noise) for i in range(9)))\n"
        "except OSError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.lmdb")]
    out = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    assert out.startswith(f"cannot write '{tmp_path}/a.lmdb': ")
    assert out.endswith("free space or use another disk, then start again.\n")
    assert not any(tmp_path.iterdir())


def test_a_full_disk_while_writing_names(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lmdb_pack, "open", full, raising=False)
    with pytest.raises(OSError, match=r"cannot write .*No space left on device; free space"):
        write_lmdb(tmp_path / "a.lmdb", [encode("a", picture(0))])
    assert not any(tmp_path.iterdir())


def test_no_pictures(tmp_path):
    with pytest.raises(ValueError, match=r"there are no pictures to write to .*; check where"):
        write_lmdb(tmp_path / "a.lmdb", [])
    assert not any(tmp_path.iterdir())


def test_a_name_that_basicsr_would_not_accept(tmp_path):
    with pytest.raises(ValueError, match=r"to end in \.lmdb, got .*; rename it to .*a\.lmdb'"):
        write_lmdb(tmp_path / "a", [encode("a", picture(0))])


@pytest.mark.parametrize("shape", [(4, 4, 4), (4, 4, 1)])
def test_pictures_of_another_kind(shape):
    with pytest.raises(
        ValueError, match=r"picture 'a' is uint8 of shape .*; convert it to uint8 \(H, W, 3\) or \(H, W\)"
    ):
        encode("a", picture(0, shape))


def test_pictures_of_another_depth():
    with pytest.raises(ValueError, match="picture 'a' is uint16 of shape"):
        encode("a", picture(0).astype(np.uint16))
