"""Work in other processes: its order, how much of it is given out, and pictures that kill who decodes them."""

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from rwkvir_data import parallel
from rwkvir_data.parallel import AHEAD, KILLED, available_cores, bounded_map, workers


def kill(_):
    os.kill(os.getpid(), signal.SIGKILL)


def negative(number):
    if number in (5, 30):
        kill(number)
    return -number


@pytest.mark.parametrize("size", [1, 4])
def test_an_item_that_kills_its_worker_does_not_end_the_map(size):
    with workers(2) as pool:
        found = list(bounded_map(pool, negative, range(40), lambda number: f"{number} kills", size))
    assert found == [f"{number} kills" if number in (5, 30) else -number for number in range(40)]


def test_an_item_that_kills_its_worker_is_named():
    with workers(1) as pool, pytest.raises(ValueError, match=f"^a b: {KILLED}; remove it$"):
        list(bounded_map(pool, kill, [("a", "b")]))


def test_workers_that_cannot_live_end_the_map(monkeypatch):
    monkeypatch.setattr(parallel, "_start_worker", os.abort)
    with (
        workers(1) as pool,
        pytest.raises(OSError, match=r"every worker is killed as soon as it starts, .*; try fewer"),
    ):
        list(bounded_map(pool, negative, [1, 2]))


def test_the_map_is_in_order_and_takes_few_items_ahead():
    taken = []

    def items():
        for i in range(200):
            taken.append(i)
            yield i

    with ThreadPoolExecutor(2) as pool:
        for count, result in enumerate(bounded_map(pool, lambda i: -i, items())):
            assert result == -count
            assert len(taken) <= count + AHEAD * available_cores() + 1
    assert len(taken) == 200


DEADLY = b"this kills the decoder"
DECODERS = f"""
import multiprocessing, os, signal
import cv2
from PIL import Image

def die_of(data):
    if os.environ.get("DEADLY") and {DEADLY!r} in data and multiprocessing.parent_process():
        os.kill(os.getpid(), signal.SIGKILL)

def open_picture(file, *args, stock=Image.open, **options):
    die_of(file.getvalue())
    return stock(file, *args, **options)

def imdecode(data, *args, stock=cv2.imdecode):
    die_of(data.tobytes())
    return stock(data, *args)

Image.open, cv2.imdecode = open_picture, imdecode
"""


@pytest.fixture
def resyn(tmp_path):
    """Runs `resyn` in tmp_path, where a picture that holds DEADLY kills the worker that decodes it, if `deadly`."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(DECODERS)

    def run(*words, deadly=True):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "DEADLY": "yes" * deadly}
        command = [sys.executable, "-m", "rwkvir_data", *words, "--workers", "2"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    (tmp_path / "in").mkdir()
    for i in range(20):
        picture = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        data = cv2.imencode(".png", cv2.resize(picture[: 4 + i], (64, 64)))[1].tobytes()
        (tmp_path / "in" / f"{i:02}.png").write_bytes(data + DEADLY * (i == 7))
    return run


def test_a_deadly_picture_is_a_row_with_the_reason(resyn, tmp_path):
    result = resyn("score", "in", "-o", "scores.parquet")
    assert result.returncode == 0, result.stderr
    assert "scores.parquet: 20 pictures, 1 unreadable." in result.stdout
    assert re.search(r"A worker was killed; pictures that are now tried again, one by one: \d+", result.stderr)
    rows = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    assert {row["name"]: row["dropped"] for row in rows if row["dropped"]} == {"07.png": f"unreadable: {KILLED}"}


@pytest.mark.slow
def test_a_deadly_picture_is_a_row_with_the_reason_on_a_cluster(resyn, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    from dask import config

    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("DEADLY", "yes")
    few_deaths = config.set({"distributed.scheduler.allowed-failures": 0})  # before a task is given up, 3 by default
    with few_deaths, distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=None) as cluster:
        result = resyn("score", "in", "-o", "scores.parquet", "--cluster", cluster.scheduler_address)
    assert result.returncode == 0, result.stderr
    rows = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    assert {row["name"]: row["dropped"] for row in rows if row["dropped"]} == {"07.png": f"unreadable: {KILLED}"}


@pytest.mark.slow
def test_a_deadly_picture_ends_no_other_command(resyn, tmp_path):
    """Scored where it did no harm, as on a machine of more memory."""
    assert resyn("score", "in", "-o", "scores.parquet", deadly=False).returncode == 0
    result = resyn("report", "scores.parquet")
    assert result.returncode == 0 and (tmp_path / "report.html").exists(), result.stderr
    lenient = ["--min-side", "8", "--blur", "0", "1e9", "--max-flat", "1", "--duplicate-distance", "-1", "--no-balance"]
    result = resyn("build", "scores.parquet", "-o", "set", *lenient, "--scales", "2", "--synthetic", "0")
    assert result.returncode == 0, result.stderr
    assert f"left out: in/07.png: unreadable: {KILLED}\n" in result.stderr
    kept = pq.read_table(tmp_path / "set" / "selection.parquet").to_pylist()
    assert [row["name"] for row in kept if not row["split"]] == ["07.png"]
    result = resyn("pack", "--tiles", "in", "-o", "in.tiles")
    assert result.returncode == 1 and f"resyn pack: 07: {KILLED}; remove it\n" in result.stderr
    assert not list(tmp_path.glob("in.tiles*"))


@pytest.mark.slow
def test_a_deadly_picture_is_a_fault_of_its_lmdb(resyn, tmp_path):
    from rwkvir_data import encode, write_lmdb

    pictures = [encode(f"p{i}", np.full((8, 8, 3), i, np.uint8)) for i in range(40)]
    pictures[33] = pictures[33]._replace(png=pictures[33].png + DEADLY)
    write_lmdb(tmp_path / "x.lmdb", pictures)
    result = resyn("verify", "x.lmdb")
    assert result.returncode == 1
    assert result.stdout == f"x.lmdb: 'p33' cannot be decoded: {KILLED}\n1 checked: 1 fault\n"
