"""Files and folders that appear whole or not at all, and are written by one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_absent(path: Path) -> None:
    """Raises FileExistsError where `path` exists."""
    if path.exists():
        raise FileExistsError(f"'{path}' exists and is left as it is; delete it or write under another name.")


@contextmanager
def locked(folder: Path, output: Path) -> Iterator[None]:
    """Make `folder`, in which `output` is prepared, and keep other processes out; the lock goes with the process,
    however it ends.

    Raises:
        ValueError: another process has it.
        FileExistsError: `folder` exists, and was not made here.
    """
    lock = folder / "lock"
    if folder.exists() and not lock.exists():
        raise FileExistsError(f"'{folder}' is in the way, and not of this program's making; rename or delete it.")
    folder.mkdir(exist_ok=True)
    with open(lock, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.stat(lock)  # the process that had it may have removed it
        except (BlockingIOError, PermissionError, FileNotFoundError) as error:
            raise ValueError(f"another run is writing {output}; wait for it, or write under another name.") from error
        yield


@contextmanager
def written_aside(path: Path, check: Callable[[Path], None] = check_absent) -> Iterator[Path]:
    """Where to write the file or folder that is to be `path`: in `<path>.partial`, from where it moves in the end.

    What was `path` before, if `check` allows one, is kept until then. A fault removes `<path>.partial`; a killed
    process leaves it behind, for the next that writes `path` to clear.

    Args:
        check: raises an exception where `path` must not be written.

    Raises:
        ValueError: another process is writing `path`.
        OSError: the disk is full.
    """
    aside = path.with_name(f"{path.name}.partial")
    aside.parent.mkdir(parents=True, exist_ok=True)
    with locked(aside, path):
        target, former = aside / path.name, aside / "former"
        try:
            _restore(former, path)
            check(path)
            _clear(aside)
            yield target
            check(path)  # somebody else may have made it meanwhile
            if path.exists():
                path.rename(former)
            target.rename(path)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise OSError(
                f"cannot write '{path}': {error.strerror}; free space or use another disk, then start again."
            ) from error
        finally:
            _restore(former, path)
            shutil.rmtree(aside, ignore_errors=True)


def _restore(former: Path, path: Path) -> None:
    """What was `path` is there again, if the new one has not come to its place."""
    if former.exists() and not path.exists():
        former.rename(path)


def _clear(aside: Path) -> None:
    """Remove what a killed process left, but not the lock."""
    for left in aside.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        elif left.name != "lock":
            left.unlink()
