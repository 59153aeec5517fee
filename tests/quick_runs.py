"""`basicsr train` in processes that are forked from one which has imported everything: a run in tenths of a second."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

import rwkvir.restoration_model  # noqa: F401 - registers it
from rwkvir import pipeline
from rwkvir.command_line import sentence

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["quick_runs", "rwkvir_arch", "rwkvir_data", "basicsr.train"])


def train(root: Path, options: dict[str, Any], *words: str, **how: Any) -> str:
    """Run `basicsr train` in the folder `root` to its end, and return the sentence that it failed with, or ''.

    how: dies_at, an iteration before which it is killed; dies_saving, the name of a file amid writing which it is
    killed; environment, variables to set.
    """
    return finish(start(root, options, *words, **how), root)


def train_on_two(root: Path, options: dict[str, Any], *words: str) -> str:
    """As `train`, in two processes that share the work; the sentence is that of rank 0."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    ranks = [{**world, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    processes = [start(root, options, "--launcher", "pytorch", *words, environment=rank) for rank in ranks]
    failure, _ = (finish(process, root) for process in processes)
    return failure


def start(root: Path, options: dict[str, Any], *words: str, **how: Any) -> Any:
    root.mkdir(exist_ok=True)
    (root / "tiny.yml").write_text(yaml.safe_dump(options))
    process = context.Process(target=_run, args=(root, words), kwargs=how)
    process.start()
    return process


def finish(process: Any, root: Path) -> str:
    process.join(120)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode in (0, 1, -signal.SIGKILL), process.exitcode
    return (root / f"failure{process.pid}").read_text() if process.exitcode == 1 else ""


def _run(
    root: Path, words: tuple[str, ...], dies_at: int = 0, dies_saving: str = "", environment: dict | None = None
) -> None:
    os.chdir(root)
    os.environ.update(environment or {})
    from basicsr.models.base_model import BaseModel

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)
    stock_begin, stock_replace = BaseModel.update_learning_rate, os.replace

    def begin(self: Any, current_iter: int, warmup_iter: int = -1) -> None:
        if current_iter == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        stock_begin(self, current_iter, warmup_iter)

    def replace(source: str, target: str) -> None:
        if Path(target).name == dies_saving:
            os.kill(os.getpid(), signal.SIGKILL)
        stock_replace(source, target)

    BaseModel.update_learning_rate, os.replace = begin, replace
    with Path("output").open("a") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            pipeline.train(["-opt", "tiny.yml", *words])
        except Exception as error:
            Path(f"failure{os.getpid()}").write_text(sentence(error))
            sys.exit(1)
