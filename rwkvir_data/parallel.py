"""Worker processes for work on many pictures."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import cv2
import torch

AHEAD = 2  # items per core that are given out; each result may be tens of megabytes

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def workers(number: int) -> Iterator[Executor]:
    """A pool of processes of one thread each. An exception, Ctrl-C too, ends it without doing what still waits.

    Raises:
        OSError: a worker was killed.
    """
    context = multiprocessing.get_context("forkserver")  # imports once for all workers, and no thread is forked
    context.set_forkserver_preload(["rwkvir_data.build"])
    pool = ProcessPoolExecutor(number, context, _start_worker)
    try:
        yield pool
    except BrokenExecutor as error:
        raise OSError("a worker was killed, perhaps for lack of memory; try again with fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def bounded_map(pool: Executor, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Executor.map, in order, that takes no more items than keep the workers busy, so that memory stays flat."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > AHEAD * available_cores():
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _start_worker() -> None:
    """One thread; Ctrl-C is for the parent; the worker ends with it even where it was killed."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker"
    parent.join()
    os._exit(1)
