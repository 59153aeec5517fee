"""Files and folders that are written aside: after a fault, after a kill, by two at once, on a full disk."""

import errno
import multiprocessing
import os
import signal

import pytest

from rwkvir_data import aside
from rwkvir_data.aside import written_aside


def allow(path):
    """A check that lets anything be overwritten."""


def killed(work):
    """Do `work` in a process that it kills."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("former", [False, True])
def test_a_folder_appears_whole(tmp_path, former):
    path = tmp_path / "deep" / "x"
    if former:
        path.mkdir(parents=True)
        (path / "old").touch()
    with written_aside(path, allow) as partial:
        partial.mkdir()
        (partial / "new").touch()
        assert path.exists() == former
    assert os.listdir(path.parent) == ["x"] and os.listdir(path) == ["new"]


def test_a_fault_leaves_what_was_there(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(ZeroDivisionError), written_aside(tmp_path / "x", allow) as partial:
        partial.write_text(str(1 / 0))
    with pytest.raises(FileNotFoundError), written_aside(tmp_path / "x", allow):
        """Nothing is written, so that there is nothing to move."""
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "old"


def test_what_exists_is_left_as_it_is(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(FileExistsError, match="x' exists and is left as it is; delete it or"):
        with written_aside(tmp_path / "x"):
            raise AssertionError
    (tmp_path / "x").unlink()
    with pytest.raises(FileExistsError, match="x' exists and is left as it is; delete it or"):
        with written_aside(tmp_path / "x") as partial:
            partial.write_text("new")
            (tmp_path / "x").write_text("another's")
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "another's"


def test_what_a_killed_process_leaves_is_cleared(tmp_path):
    def work():
        with written_aside(tmp_path / "x") as partial:
            partial.mkdir()
            (partial / "half").touch()
            kill()

    for _ in range(2):
        killed(work)
        assert os.listdir(tmp_path) == ["x.partial"]
    with written_aside(tmp_path / "x") as partial:
        assert not partial.exists()
        partial.write_text("new")
    assert os.listdir(tmp_path) == ["x"]


def test_what_was_there_comes_back_after_a_kill_at_the_last_moment(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("old")

    def work():
        monkeypatch.setattr(aside, "_restore", lambda former, path: former.exists() and kill())
        with written_aside(tmp_path / "x", allow):
            """What should now move to its place is not there."""

    killed(work)
    assert os.listdir(tmp_path) == ["x.partial"]
    with pytest.raises(FileExistsError), written_aside(tmp_path / "x"):
        raise AssertionError
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "old"


def test_two_at_once(tmp_path):
    def work():
        with pytest.raises(ValueError, match=r"another run is writing .*/x; wait for it, or write under another name"):
            with written_aside(tmp_path / "x"):
                raise AssertionError
        kill()

    with written_aside(tmp_path / "x") as partial:
        partial.write_text("first")
        killed(work)
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "first"


def test_a_folder_of_somebody_else_is_not_cleared(tmp_path):
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "treasure").touch()
    with pytest.raises(FileExistsError, match=r"x\.partial' is in the way, and not of this program's making; rename"):
        with written_aside(tmp_path / "x"):
            raise AssertionError
    assert (tmp_path / "x.partial" / "treasure").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk(tmp_path, number):
    with pytest.raises(OSError, match=r"cannot write '.*x': .+; free space or use another disk, then start again"):
        with written_aside(tmp_path / "x"):
            raise OSError(number, os.strerror(number))
    with pytest.raises(PermissionError), written_aside(tmp_path / "x"):
        raise PermissionError(errno.EACCES, "Permission denied", "a picture")
    assert os.listdir(tmp_path) == []
