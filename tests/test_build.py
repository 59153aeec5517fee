import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from basicsr.data.paired_image_dataset import PairedImageDataset

from rwkvir import compat
from rwkvir_data import build, sources
from rwkvir_data.complexity import complexity
from rwkvir_data.degrade import degrade
from rwkvir_data.score import SCHEMA, measure

LENIENT = ["--min-side", "50", "--blur", "0", "1e9", "--max-flat", "1"]  # what the tests' pictures need
SMALL = [*LENIENT, "--crop-size", "48", "--step", "24", "--val", "0.1", "--test", "0.1"]


def score_table(path, **kinds):
    """Write a score table of the folders SOURCE=KIND beside it, and return its path."""
    rows = [
        {"source": source, "root": str(file.parent), "name": file.name, "kind": kind, **measure(file.read_bytes())}
        for source, kind in kinds.items()
        for file in sorted((path.parent / source).iterdir())
    ]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path)
    return path


def make_pictures(folder, count, seed=0):
    """`count` different pictures of 99 x 125 pixels: every other one plain, the others busy."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(count):
        coarse = rng.integers(0, 256, (5, 5, 3) if i % 2 == 0 else (40, 50, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"pic {i}.png"), cv2.resize(coarse, (125, 99), interpolation=cv2.INTER_LINEAR))


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    root = tmp_path_factory.mktemp("scored")
    make_pictures(root / "photos", 12)
    make_pictures(root / "drawn", 8, seed=1)
    return score_table(root / "scores.parquet", photos="real", drawn="synthetic")


@pytest.fixture(scope="module")
def built(scores, tmp_path_factory):
    """A set built by processes, as from the command line."""
    out = tmp_path_factory.mktemp("built") / "ReSyn"
    words = [str(scores), "-o", str(out), *SMALL, "--task", "sr", "denoise", "--scales", "2", "3", "--sigmas", "25"]
    assert build.main([*words, "--workers", "2"]) == 0
    return out


def contents(path):
    with compat.lmdb_environment(str(path)).begin() as reader:
        return {key.decode(): bytes(value) for key, value in reader.cursor()}


def dataset(out, split, what, scale, **options):
    options = {"io_backend": {"type": "lmdb"}, "phase": split, "scale": scale, **options}
    return PairedImageDataset(
        {"dataroot_gt": f"{out}/{split}_GT.lmdb", "dataroot_lq": f"{out}/{split}_{what}.lmdb", **options}
    )


def to_uint8(tensor):
    return np.round(tensor.numpy().transpose(1, 2, 0) * 255).astype(np.uint8)


def test_the_layout(built):
    stored = [f"{what}.lmdb" for what in ("GT", "LQ_noise25", "LQ_x2", "LQ_x3")] + ["parquet"]
    files = [
        f"{split}{'_' if what != 'parquet' else '.'}{what}" for split in ("train", "val", "test") for what in stored
    ]
    assert sorted(file.name for file in built.iterdir()) == sorted([*files, "selection.parquet", "recipe.json"])
    assert not list(built.parent.glob("*partial*"))
    assert json.loads((built / "recipe.json").read_text())["degradations"] == ["x2", "x3", "noise25"]


@pytest.mark.parametrize(("what", "scale"), [("LQ_x2", 2), ("LQ_x3", 3), ("LQ_noise25", 1)])
@pytest.mark.parametrize("split", ["val", "test"])
def test_stock_basicsr_reads_whole_pictures(built, scores, split, what, scale):
    rows = {row["key"]: row for row in pq.read_table(built / "selection.parquet").to_pylist() if row["split"] == split}
    items = list(dataset(built, split, what, scale))
    assert [item["gt_path"] for item in items] == sorted(rows)
    for item in items:
        row = rows[item["gt_path"]]
        gt = sources.decode(sources.read(row["root"], row["name"]))[:96, :120]  # multiples of 6
        assert np.array_equal(to_uint8(item["gt"]), gt)
        assert np.array_equal(to_uint8(item["lq"]), degrade(gt, what[3:], row["key"]))


def test_stock_basicsr_reads_training_crops(built):
    options = {"gt_size": 24, "use_hflip": True, "use_rot": True}
    for what, scale in (("LQ_x2", 2), ("LQ_noise25", 1)):
        items = dataset(built, "train", what, scale, **options)
        assert len(items) == len(contents(built / "train_GT.lmdb"))
        assert {tuple(item["lq"].shape) for item in items} == {(3, 24 // scale, 24 // scale)}


def test_sub_images_are_those_of_the_whole_picture_and_its_lq(built):
    gts, lqs = contents(built / "train_GT.lmdb"), contents(built / "train_LQ_x2.lmdb")
    rows = [r for r in pq.read_table(built / "selection.parquet").to_pylist() if r["split"] == "train"]
    # BasicSR's extract_subimages cuts 96 x 120 so, with crop_size 48, step 24 and thresh_size 0.
    corners = [(top, left) for top in (0, 24, 48) for left in (0, 24, 48, 72)]
    assert len(gts) == len(rows) * len(corners) and gts.keys() == lqs.keys()
    for row in rows:
        whole = sources.decode(sources.read(row["root"], row["name"]))[:96, :120]
        small = degrade(whole, "x2")
        for number, (top, left) in enumerate(corners, 1):
            key = f"{row['key']}_s{number:03d}"
            assert np.array_equal(sources.decode(gts[key]), whole[top : top + 48, left : left + 48])
            part = small[top // 2 : top // 2 + 24, left // 2 : left // 2 + 24]
            assert np.array_equal(sources.decode(lqs[key]), part)


@pytest.mark.parametrize(
    ("length", "thresh_size", "expected"),
    [(480, 0, [0]), (800, 0, [0, 240, 320]), (800, 80, [0, 240]), (960, 0, [0, 240, 480]), (300, 0, [0])],
)
def test_where_sub_images_begin(length, thresh_size, expected):
    assert build.sub_image_starts(length, 480, 240, thresh_size) == expected


def test_the_tables(built, scores):
    selection = pq.read_table(built / "selection.parquet")
    assert selection.drop_columns(["dropped", "split", "key"]).equals(pq.read_table(scores).drop_columns(["dropped"]))
    for split in ("train", "val", "test"):
        stored = contents(built / f"{split}_GT.lmdb")
        rows = pq.read_table(built / f"{split}.parquet").to_pylist()
        assert sorted(row["key"] for row in rows) == sorted(stored)
        whose = {r["key"]: (r["source"], r["kind"]) for r in selection.to_pylist() if r["split"] == split}
        for row in rows:
            png = stored[row["key"]]
            assert row["sha256"] == hashlib.sha256(png).hexdigest()
            assert row["complexity"] == complexity(sources.decode(png)).score
            assert whose[row["key"].rpartition("_s")[0] if split == "train" else row["key"]] == (
                row["source"],
                row["kind"],
            )


def test_a_seed_gives_one_set(built, scores, tmp_path, threads):
    words = [str(scores), *SMALL, "--task", "sr", "denoise", "--scales", "2", "3", "--sigmas", "25"]
    assert build.main([*words, "-o", str(tmp_path / "same"), "--workers", "3"]) == 0
    assert build.main([*words, "-o", str(tmp_path / "other"), "--seed", "1"]) == 0
    for file in built.glob("*.lmdb"):
        assert contents(file) == contents(tmp_path / "same" / file.name)
    for what in ("GT", "LQ_noise25"):
        name = f"train_{what}.lmdb"
        assert contents(built / name) != contents(tmp_path / "other" / name)


def test_folders(built, scores, tmp_path, threads, monkeypatch):
    words = [str(scores), *SMALL, "--task", "sr", "denoise", "--scales", "2", "3", "--sigmas", "25"]
    assert build.main([*words, "-o", str(tmp_path / "set"), "--format", "folder"]) == 0
    for file in built.glob("*.lmdb"):
        folder = tmp_path / "set" / file.stem
        assert {path.stem: path.read_bytes() for path in folder.iterdir()} == contents(file)
    root = tmp_path / "set"
    data = dataset(
        root,
        "val",
        "LQ_x2",
        2,
        dataroot_gt=f"{root}/val_GT",
        dataroot_lq=f"{root}/val_LQ_x2",
        meta_info_file=f"{root}/meta_info_val_GT.txt",
        io_backend={"type": "disk"},
    )
    assert len(data) == len(contents(built / "val_GT.lmdb"))
    assert data[0]["gt"].shape == (3, 96, 120)
    assert (root / "meta_info_val_GT.txt").read_text().splitlines()[0].endswith(".png (96,120,3)")


def test_gray_jpeg(scores, tmp_path, threads):
    words = [str(scores), "-o", str(tmp_path / "set"), *SMALL, "--task", "jpeg", "--qualities", "10", "--gray"]
    assert build.main(words) == 0
    row = next(r for r in pq.read_table(tmp_path / "set" / "selection.parquet").to_pylist() if r["split"] == "val")
    gray = cv2.cvtColor(sources.decode(sources.read(row["root"], row["name"])), cv2.COLOR_RGB2GRAY)
    for what, expected in (("GT", gray), ("LQ_jpeg10", degrade(gray, "jpeg10"))):
        png = contents(tmp_path / "set" / f"val_{what}.lmdb")[row["key"]]
        assert np.array_equal(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED), expected)


def test_benchmarks_do_not_leak(scores, tmp_path, threads, capsys):
    bench = tmp_path / "Set5"
    bench.mkdir()
    picture = cv2.imread(str(scores.parent / "photos" / "pic 1.png"))
    cv2.imwrite(str(bench / "bird.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, 80])
    words = [str(scores), "-o", str(tmp_path / "set"), *SMALL, "--scales", "2", "--against", str(bench)]
    assert build.main(words) == 0
    dropped = pq.read_table(tmp_path / "set" / "selection.parquet").to_pylist()
    leaked = {row["name"]: row["dropped"] for row in dropped if (row["dropped"] or "").startswith("leak")}
    assert leaked == {"pic 1.png": f"leak: {bench}/bird.jpg"}
    assert capsys.readouterr().out.splitlines()[0].split() == [
        *["source", "pictures", "leak", "surplus"],
        *["train", "val", "test"],
    ]
    (bench / "broken.png").touch()
    with pytest.raises(ValueError, match=r"Set5/broken\.png, of --against, cannot be read: the file is empty; replace"):
        build.main([*words[:2], str(tmp_path / "b"), *SMALL, "--against", str(bench)])
    with pytest.raises(ValueError, match=r"--against .*empty has no pictures; correct the path"):
        (tmp_path / "empty").mkdir()
        build.main([*words[:2], str(tmp_path / "b"), *SMALL, "--against", str(tmp_path / "empty")])


def test_an_existing_output(scores, tmp_path, threads):
    words = [str(scores), "-o", str(tmp_path / "set"), *SMALL, "--scales", "2"]
    assert build.main(words) == 0
    with pytest.raises(FileExistsError, match=r"set exists and is left as it is; .* or add --overwrite"):
        build.main(words)
    (tmp_path / "set" / "mark").touch()
    assert build.main([*words, "--overwrite"]) == 0
    assert not (tmp_path / "set" / "mark").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    (tmp_path / "set" / "recipe.json").unlink()
    with pytest.raises(FileExistsError, match="set is no set that resyn build made, and is not overwritten"):
        build.main([*words, "--overwrite"])


def test_another_run_finished_first(scores, tmp_path, threads, monkeypatch):
    check_space = build._check_space

    def other_run(*args):
        shutil.copytree(scores.parent, tmp_path / "set")
        check_space(*args)

    monkeypatch.setattr(build, "_check_space", other_run)
    with pytest.raises(FileExistsError, match="set exists and is left as it is"):
        build.main([str(scores), "-o", str(tmp_path / "set"), *SMALL, "--scales", "2"])
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_full_disk_is_known_before(scores, tmp_path, threads, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(50_000))
    with pytest.raises(OSError, match=r"the set needs about 0\.0 GB, but the disk of .* has 0\.0 GB free; free space"):
        build.main([str(scores), "-o", str(tmp_path / "set"), *SMALL, "--scales", "2"])
    assert not any(tmp_path.iterdir())


def test_the_estimate_of_space(built, scores, tmp_path, threads, monkeypatch):
    """Between half and twice of what the pictures take, though there are few to estimate it from."""
    stored = sum(len(png) for file in built.glob("*.lmdb") for png in contents(file).values())
    words = [str(scores), *SMALL, "--task", "sr", "denoise", "--scales", "2", "3", "--sigmas", "25"]
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(stored / 2))
    with pytest.raises(OSError, match="free space"):
        build.main([*words, "-o", str(tmp_path / "set")])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2 * stored))
    assert build.main([*words, "-o", str(tmp_path / "set")]) == 0


def test_pictures_that_changed_or_vanished(scores, tmp_path, threads, capsys):
    shutil.copytree(scores.parent / "photos", tmp_path / "photos")
    table = score_table(tmp_path / "scores.parquet", photos="real")
    (tmp_path / "photos" / "pic 0.png").unlink()
    shutil.copy(tmp_path / "photos" / "pic 3.png", tmp_path / "photos" / "pic 2.png")
    assert build.main([str(table), "-o", str(tmp_path / "set"), *SMALL, "--scales", "2", "--val", "0"]) == 0
    selection = pq.read_table(tmp_path / "set" / "selection.parquet").to_pylist()
    fates = {row["name"]: (row["dropped"] or "").split(": ")[0] or row["split"] for row in selection}
    assert fates["pic 0.png"] == fates["pic 2.png"] == "unreadable"
    assert set(fates.values()) == {"unreadable", "train", "test"}
    stored = {key.rpartition("_s")[0] for key in contents(tmp_path / "set" / "train_GT.lmdb")}
    assert stored == {row["key"] for row in selection if row["split"] == "train"}
    lines = capsys.readouterr().err.splitlines()
    assert "left out: photos/pic 2.png: unreadable: it has changed since it was scored" in lines


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_one_and_the_next(scores, tmp_path, threads, stop):
    code = "import sys; from rwkvir_data import build; build.main(sys.argv[1:])"
    words = [str(scores), "-o", str(tmp_path / "set"), *SMALL, "--crop-size", "12", "--step", "12", "--workers", "1"]
    run = subprocess.Popen(
        [sys.executable, "-c", f"if __name__ == '__main__': {code}", *words],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*.partial/set/*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(run.pid, stop)
    assert run.wait(60) != 0
    assert os.listdir(tmp_path) == ([] if stop == signal.SIGINT else ["set.partial"])
    assert build.main(words) == 0
    assert os.listdir(tmp_path) == ["set"]


@pytest.mark.parametrize("layout", ["lmdb", "folder"])
def test_a_disk_that_fills_up_half_way(scores, tmp_path, threads, layout):
    """A limit on the size of files stands in for the disk."""
    words = [str(scores), "-o", str(tmp_path / "set"), *SMALL, "--scales", "2", "--format", layout]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if layout == "lmdb" else 5_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write '.*/set.*': .*; free space or use another disk, then start"):
            build.main(words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not any(tmp_path.iterdir())
    assert build.main(words) == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--crop-size", "50"], "--crop-size 50 and --step 24 must be multiples of 12"),
        (["--min-side", "5000"], "nothing of .* is left to build"),
        (["--against", ".", "--duplicate-distance", "-1"], "--against compares perceptual hashes; give a --duplicate"),
        (["--target", "photos=1"], "--target names photos, but the table's sources are photos, drawn"),
    ],
)
def test_impossible_requests(scores, tmp_path, words, sentence):
    with pytest.raises(ValueError, match=sentence):
        build.main([str(scores), "-o", str(tmp_path / "set"), *SMALL, *words])
    assert not any(tmp_path.iterdir())


def test_tables_that_are_none(tmp_path):
    (tmp_path / "text").write_text("name,score")
    pq.write_table(pa.table({"name": ["a"]}), tmp_path / "other.parquet")
    pq.write_table(pa.Table.from_pylist([], SCHEMA), tmp_path / "empty.parquet")
    row = {**dict.fromkeys(SCHEMA.names), "split": "train"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "selection.parquet")
    for name, sentence in (
        ("missing", "there is no .*missing; make it with: resyn score SOURCE"),
        ("text", "is not a Parquet file"),
        ("other.parquet", "has no column source, root, kind, .*; make the table with: resyn score"),
        ("selection.parquet", "is a selection of resyn build; give the table that resyn score wrote"),
        ("empty.parquet", "has no rows; score a source that has pictures"),
    ):
        with pytest.raises((ValueError, OSError), match=sentence):
            build.main([str(tmp_path / name), "-o", str(tmp_path / "set")])


@pytest.mark.skipif(not Path("../shared/testsets/Set5").is_dir(), reason="needs ../shared")
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_is_that_of_the_published_benchmarks(scale):
    for file in sorted(Path("../shared/testsets/Set5/HR").iterdir()):
        gt = sources.decode(file.read_bytes())
        gt = gt[: gt.shape[0] // scale * scale, : gt.shape[1] // scale * scale]
        published = file.parents[1] / "LR_bicubic" / f"X{scale}" / f"{file.stem}x{scale}.png"
        lq = sources.decode(published.read_bytes())
        assert np.array_equal(degrade(gt, f"x{scale}")[: lq.shape[0], : lq.shape[1]], lq)


def test_noise_and_its_name():
    gray = np.full((200, 200), 128, np.uint8)
    noisy = degrade(gray, "noise25", "key", 3)
    assert abs(noisy.std() - 25) < 0.5 and abs(noisy.mean() - 128) < 0.5
    assert np.array_equal(noisy, degrade(gray, "noise25", "key", 3))
    assert not np.array_equal(noisy, degrade(gray, "noise25", "other", 3))
    for name in ("y2", "x", "x0", "jpeg-1"):
        with pytest.raises(ValueError, match=f"'{name}' is no degradation; write x<scale>, noise<sigma> or jpeg"):
            degrade(gray, name)
    with pytest.raises(ValueError, match="200x200 pixels cannot be divided by 3; crop first"):
        degrade(gray, "x3")
