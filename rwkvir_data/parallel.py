"""Worker processes for work on many pictures, which outlive a picture that kills one of them."""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import cv2
import torch
from tqdm import tqdm

AHEAD = 2  # chunks per core that are given out; each result may be tens of megabytes
KILLED = "its decoding kills the process, for lack of memory or by a fault of the decoder"

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def positive(text: str) -> int:
    """The value of an option that is a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def add_workers_option(parser: argparse.ArgumentParser) -> None:
    """Let a command take --workers, the number of processes."""
    parser.add_argument(
        "--workers", type=positive, default=available_cores(), metavar="N", help="processes (default: %(default)s)"
    )


@contextmanager
def workers(number: int) -> Iterator[Executor]:
    """A pool of processes of one thread each. An exception, Ctrl-C too, ends it without doing what still waits."""
    pool = _Workers(number)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def bounded_map(
    pool: Executor,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    killed: Callable[[Item], Result] | None = None,
    size: int = 1,
    ahead: int | None = None,
) -> Iterator[Result]:
    """Executor.map, in order, that takes no more items than keep the workers busy, so that memory stays flat.

    When a worker is killed, what was given out and is lost is done again, an item at a time; an item that kills its
    worker then too gives `killed(item)`.

    Args:
        pool: of `workers`, or a Dask cluster's.
        size: items that a worker is given at a time, a chunk.
        ahead: chunks that are given out at a time, by default AHEAD for each core.

    Raises:
        ValueError: an item kills its worker, and there is no `killed`.
        OSError: all workers are killed, whatever they do.
    """
    given: deque[tuple[list[Item], Future[list[Result]]]] = deque()
    left, limit = iter(items), ahead or AHEAD * available_cores()
    try:
        while True:
            while len(given) < limit and (chunk := list(itertools.islice(left, size))):
                given.append((chunk, pool.submit(_apply, function, chunk)))
            if not given:
                return
            if _is_lost(given[0][1]):
                yield from _again(pool, function, given, killed)
            else:
                yield from given.popleft()[1].result()
    finally:
        for _, future in given:
            future.cancel()


def _apply(function: Callable[[Item], Result], chunk: list[Item]) -> list[Result]:
    return [function(item) for item in chunk]


def _is_lost(future: Future) -> bool:
    """Wait for the future; was its worker, or one beside it, killed?"""
    error = future.exception()
    return isinstance(error, BrokenExecutor) or type(error).__name__ == "KilledWorker"  # Dask's


def _again(
    pool: Executor,
    function: Callable[[Item], Result],
    given: deque[tuple[list[Item], Future[list[Result]]]],
    killed: Callable[[Item], Result] | None,
) -> Iterator[Result]:
    """The results of all that is given out. Nothing else runs while an item is done again: it is to blame or not."""
    concurrent.futures.wait([future for _, future in given])
    lost = sum(len(chunk) for chunk, future in given if _is_lost(future))
    tqdm.write(f"A worker was killed; pictures that are now tried again, one by one: {lost}", sys.stderr)
    _restart(pool)
    while given:
        chunk, future = given.popleft()
        if not _is_lost(future):
            yield from future.result()
            continue
        for item in chunk:
            again = pool.submit(function, item)
            if not _is_lost(again):
                yield again.result()
                continue
            _restart(pool)
            if killed is None:
                name = item if isinstance(item, str) else " ".join(map(str, item))  # type: ignore[call-overload]
                raise ValueError(f"{name}: {KILLED}; remove it")
            yield killed(item)


def _restart(pool: Executor) -> None:
    """A cluster starts workers itself."""
    if isinstance(pool, _Workers):
        pool.restart()


class _Workers(Executor):
    """Processes that can be started again after one was killed, which ends all."""

    def __init__(self, number: int):
        context = multiprocessing.get_context("forkserver")  # imports once for all workers, and no thread is forked
        context.set_forkserver_preload(["rwkvir_data.build"])
        self._start = functools.partial(ProcessPoolExecutor, number, context, _start_worker)
        self._pool = self._start()

    def submit(self, function: Callable, /, *args: Any, **options: Any) -> Future:
        """As of any Executor, but where a worker was killed the future says so."""
        try:
            return self._pool.submit(function, *args, **options)
        except BrokenExecutor as error:
            future: Future = Future()
            future.set_exception(error)
            return future

    def restart(self) -> None:
        """Raises OSError where the new workers are killed whatever they do."""
        self.shutdown()
        self._pool = self._start()
        if _is_lost(self.submit(os.getpid)):
            raise OSError(
                "every worker is killed as soon as it starts, perhaps for lack of memory; try fewer --workers"
            )

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._pool.shutdown(wait, cancel_futures=cancel_futures)


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
