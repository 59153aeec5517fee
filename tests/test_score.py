"""`resyn score`: the table, going on after every kind of end, one run at a time, a cluster, and flat memory."""

import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import imagehash
import lmdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rwkvir_data import cli, score
from rwkvir_data.complexity import complexity
from rwkvir_data.score import SCHEMA, Source, make_sources
from rwkvir_data.sources import decode, read

RESYN = [sys.executable, "-m", "rwkvir_data", "score"]


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    picture = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()


def make_pictures(folder: Path, count: int, side: int = 24) -> Path:
    folder.mkdir()
    contents = [png(width, side) for width in range(side, side + 3)]
    for index in range(count):
        (folder / f"{index:05d}.png").write_bytes(contents[index % 3])
    return folder


def rows_of(table: Path) -> list[dict]:
    assert pq.read_schema(table).equals(SCHEMA)
    rows = pq.read_table(table).to_pylist()
    keys = [(row["source"], row["name"]) for row in rows]
    assert keys == sorted(set(keys))
    return rows


def test_the_table(tmp_path, capsys):
    real, synthetic = make_pictures(tmp_path / "b", 20), make_pictures(tmp_path / "real folder", 3)
    (real / "empty.png").touch()
    (real / "gone.jpg").symlink_to("absent")
    (real / "new\nline ü.png").write_bytes((real / "00000.png").read_bytes())
    table = tmp_path / "scores.parquet"
    assert cli.main(["score", str(real), "--synthetic", f"a={synthetic}", "-o", str(table), "--workers", "2"]) == 0
    assert "scores.parquet: 26 pictures, 2 unreadable." in capsys.readouterr().out
    rows = rows_of(table)
    assert [(row["source"], row["kind"], row["root"]) for row in rows] == [("a", "synthetic", str(synthetic))] * 3 + [
        ("b", "real", str(real))
    ] * 23
    dropped = {row["name"]: row["dropped"] for row in rows if row["dropped"]}
    assert dropped == {
        "empty.png": "unreadable: the file is empty",
        "gone.jpg": "unreadable: No such file or directory",
    }
    texts = {"source", "root", "name", "kind", "dropped"}
    for row in rows:
        assert [key for key, value in row.items() if value is None and key not in texts] == (
            [key for key in SCHEMA.names if key not in texts] if row["dropped"] else []
        )
        if not row["dropped"]:
            data = read(row["root"], row["name"])
            terms = complexity(decode(data))
            assert (row["ent"], row["ene"], row["diss"], row["complexity"]) == terms
            assert (row["height"], row["width"]) == decode(data).shape[:2] and row["bytes"] == len(data)
            assert row["sha256"] == hashlib.sha256(data).hexdigest() and len(row["phash"]) == 16
    assert not table.with_name("scores.parquet.parts").exists()


def test_pictures_that_look_alike_have_close_hashes():
    random = np.random.default_rng(0)
    one = np.kron(random.integers(0, 256, (8, 8), dtype=np.uint8), np.ones((32, 32), np.uint8))
    other = np.kron(random.integers(0, 256, (8, 8), dtype=np.uint8), np.ones((32, 32), np.uint8))
    hashes = []
    for picture, size, kind in [(one, 256, "PNG"), (one, 128, "JPEG"), (other, 256, "PNG")]:
        file = io.BytesIO()
        Image.fromarray(picture).resize((size, size)).save(file, kind)
        hashes.append(imagehash.hex_to_hash(score.measure(file.getvalue())["phash"]))
    assert hashes[0] - hashes[1] <= 4 < 16 < hashes[0] - hashes[2]


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """All processes below `pid`."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    below = [int(child) for task in tasks for child in task.read_text().split()]
    return below + [deeper for child in below for deeper in children(child)]


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


MANY = 1200  # pictures of 120 x 120, enough for a run that is stopped after its first part


def parts_of(table: Path) -> list[Path]:
    return list(table.with_name(f"{table.name}.parts").glob("*.parquet"))


def go_on_from_spoilt(folder: Path, table: Path) -> None:
    """Finish a stopped run after spoiling what is done: read again, it would be dropped. Another picture is new."""
    assert not table.exists()
    done = [row for file in parts_of(table) for row in rows_of(file)]
    assert 0 < len(done) < MANY
    for row in done:
        (folder / row["name"]).write_bytes(b"spoilt")
    (folder / "00000 is new.png").write_bytes(png(9, 9))
    score.score(make_sources([str(folder)], []), table, workers=2)
    rows = rows_of(table)
    assert len(rows) == MANY + 1 and not any(row["dropped"] for row in rows)
    assert not table.with_name(f"{table.name}.parts").exists()


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    folder, table = make_pictures(tmp_path / "in", MANY, 120), tmp_path / "out.parquet"
    process = subprocess.Popen([*RESYN, str(folder), "-o", str(table), "--workers", "2"])
    wait_for(lambda: parts_of(table))
    workers = children(process.pid)
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(is_running, workers)))
    go_on_from_spoilt(folder, table)


def after_the_first_part(table: Path, action) -> None:
    """Call `action` in another thread as soon as the table has its first part."""

    def wait() -> None:
        wait_for(lambda: parts_of(table))
        action()

    threading.Thread(target=wait).start()


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(score, "PART_SECONDS", 0)
    folder, table = make_pictures(tmp_path / "in", MANY, 120), tmp_path / "out.parquet"
    after_the_first_part(table, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT))
    assert cli.main(["score", str(folder), "-o", str(table), "--workers", "2"]) == 130
    assert f"resyn score: interrupted; {score.GO_ON}\n" in capsys.readouterr().err
    go_on_from_spoilt(folder, table)


def test_a_killed_worker_loses_nothing(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(score, "PART_SECONDS", 0)
    folder, table = make_pictures(tmp_path / "in", MANY, 120), tmp_path / "out.parquet"
    after_the_first_part(table, lambda: os.kill(max(children(os.getpid())), signal.SIGKILL))
    assert cli.main(["score", str(folder), "-o", str(table), "--workers", "2"]) == 0
    assert "A worker was killed; " in capfd.readouterr().err
    rows = rows_of(table)
    assert len(rows) == MANY and not any(row["dropped"] for row in rows)


def test_two_runs_on_one_table_refuse_each_other(tmp_path, one_sentence):
    folder = make_pictures(tmp_path / "in", 3)
    table = tmp_path / "out.parquet"
    sources = make_sources([str(folder)], [])
    parts = tmp_path / "out.parquet.parts"
    code = (
        "import sys, time; from pathlib import Path; from rwkvir_data.score import _locked\n"
        "with _locked(Path(sys.argv[1]), Path(sys.argv[2])): print('locked', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(parts), str(table)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=r"another run is writing .*out\.parquet; wait for it"):
            score.score(sources, table)
    finally:
        other.kill()
        other.wait()
    score.score(sources, table)
    assert len(rows_of(table)) == 3


def test_a_finished_table_is_kept(tmp_path, capsys):
    folder = make_pictures(tmp_path / "in", 3)
    table = tmp_path / "out.parquet"
    sources = make_sources([str(folder)], [])
    score.score(sources, table)
    before = table.stat().st_mtime_ns
    score.score(sources, table)
    assert "nothing to do" in capsys.readouterr().out and table.stat().st_mtime_ns == before
    (folder / "more.png").write_bytes((folder / "00000.png").read_bytes())
    with pytest.raises(ValueError, match=r"exists and lacks 1 pictures of the sources; .*--overwrite"):
        score.score(sources, table)
    assert table.stat().st_mtime_ns == before
    score.score(sources, table, overwrite=True)
    assert len(rows_of(table)) == 4
    assert sorted(os.listdir(tmp_path)) == ["in", "out.parquet"]


def no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_one_sentence_and_leaves_nothing_behind(tmp_path, monkeypatch):
    folder = make_pictures(tmp_path / "in", 2)
    monkeypatch.setattr(score.os, "fsync", no_space)
    with pytest.raises(OSError, match=r"cannot write .*No space left on device.*; make room there, then run"):
        score.score(make_sources([str(folder)], []), tmp_path / "out.parquet")
    assert os.listdir(tmp_path) == ["in"]


def test_an_unfinished_table_of_other_sources_is_not_mixed_up(tmp_path, monkeypatch):
    one, other = make_pictures(tmp_path / "one", 2), make_pictures(tmp_path / "other", 3)
    table = tmp_path / "out.parquet"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(score, "_merge", no_space)
        score.score(make_sources([str(one)], []), table)
    assert len(parts_of(table)) == 1
    with pytest.raises(ValueError, match="holds an unfinished table of other sources"):
        score.score(make_sources([str(other)], []), table)
    score.score(make_sources([str(other)], []), table, overwrite=True)
    assert len(rows_of(table)) == 3


def test_a_folder_of_tars_is_scored_once(tmp_path, monkeypatch):
    folder, table = make_pictures(tmp_path / "in", 2), tmp_path / "out.parquet"
    with tarfile.open(folder / "0.tar", "w") as tar:
        tar.add(folder / "00000.png", "a.png")
        tar.add(folder / "00001.png", "b.png")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(score, "_merge", no_space)
        score.score(make_sources([str(folder)], []), table)
    (folder / "00002.png").write_bytes(png(9, 9))
    monkeypatch.setattr(score, "_delete_parts", lambda parts: None)
    score.score(make_sources([str(folder)], []), table)
    runs = score._runs(tmp_path / "out.parquet.parts")
    assert [sum(len(rows_of(part)) for part in run) for run in runs] == [4, 1]
    rows = rows_of(table)
    assert [row["name"] for row in rows] == ["0.tar/a.png", "0.tar/b.png", "00000.png", "00001.png", "00002.png"]
    for row in rows:
        assert hashlib.sha256(read(row["root"], row["name"])).hexdigest() == row["sha256"]


def test_labels(tmp_path):
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert make_sources([f"z={tmp_path}", str(odd)], ["in.tar"]) == [
        Source("a=b", str(odd), "real"),
        Source("in.tar", os.path.abspath("in.tar"), "synthetic"),
        Source("z", str(tmp_path), "real"),
    ]


@pytest.mark.parametrize(
    "words, message",
    [
        (["-o", "x.parquet"], "no source is given"),
        (
            ["a/b", "--synthetic", "c/b", "-o", "x.parquet"],
            "2 sources are called 'b'; tell them apart by giving LABEL=PATH",
        ),
        (["absent", "-o", "x.parquet"], "there is no source '{}/absent'"),
        (["empty", "-o", "x.parquet"], "there are no pictures in {}/empty"),
        (["list.txt", "empty", "-o", "x.parquet"], "there are no pictures in {}/empty;"),
        (["empty", "-o", "x.csv"], "must end in .parquet"),
        (["empty", "-o", "absent/x.parquet"], "No such file or directory"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("a.png")
    assert cli.main(["score", *words]) == 1
    errors = capsys.readouterr().err
    assert message.format(tmp_path) in errors and errors.count("\n") == 1
    assert sorted(os.listdir()) == ["empty", "list.txt"]


@pytest.mark.slow
def test_a_dask_worker_killed_half_way_loses_nothing(tmp_path):
    distributed = pytest.importorskip("distributed")
    folder, table = make_pictures(tmp_path / "in", MANY, 120), tmp_path / "out.parquet"
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        after_the_first_part(table, lambda: os.kill(cluster.workers[0].pid, signal.SIGKILL))
        score.score(make_sources([str(folder)], []), table, cluster=cluster.scheduler_address)
    rows = rows_of(table)
    assert len(rows) == MANY and not any(row["dropped"] for row in rows)


PEAKS = """
import re, sys, threading, time
from pathlib import Path
from rwkvir_data import score

peak = 0

def watch():
    global peak
    while True:
        peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024)
        time.sleep(0.01)

if __name__ == "__main__":
    score.ROW_GROUP = score.PART_ROWS = 512  # what may be held is held early
    threading.Thread(target=watch, daemon=True).start()
    for path in sys.argv[1:]:
        score.score(score.make_sources([path], []), Path(path + ".parquet"), workers=2)
        print(peak)
"""


def peaks(tmp_path: Path, *counts: int) -> list[float]:
    """Score LMDBs of so many tiny pictures, one after the other in one process, and return its peak memory after each.

    In MiB, without the pages of the LMDBs' own files, which the kernel may drop at any time.
    """
    paths, tiny = [str(tmp_path / f"{count}.lmdb") for count in counts], png(1, 1)
    for path, count in zip(paths, counts, strict=True):
        with lmdb.open(path, map_size=count * 500 + (1 << 20)) as environment, environment.begin(write=True) as writing:
            for index in range(count):
                writing.put(f"{index:08d}".encode(), tiny, append=True)
    script = tmp_path / "peaks.py"
    script.write_text(PEAKS)
    result = subprocess.run([sys.executable, str(script), *paths], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for path, count in zip(paths, counts, strict=True):
        assert pq.read_metadata(f"{path}.parquet").num_rows == count
    return [float(line) for line in result.stdout.splitlines()[1::2]]


@pytest.mark.slow
def test_memory_is_flat(tmp_path):
    first, then = peaks(tmp_path, 2000, 20_000)
    assert then - first < 15  # 18,000 rows would take about 27


@pytest.mark.slow
def test_memory_is_flat_over_a_million_pictures(tmp_path):
    first, then = peaks(tmp_path, 100_000, 1_000_000)
    assert then - first < 10
