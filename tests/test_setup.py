"""The build says what it lacks, before it starts."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def build(**environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def test_a_missing_compiler_is_named():
    run = build(CXX="no-such-compiler")
    assert run.returncode != 0 and "Traceback" not in run.stderr
    assert "`no-such-compiler` is not on PATH" in run.stderr and "apt-get install g++" in run.stderr


def test_a_missing_torch_is_named(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError\n")
    run = build(PYTHONPATH=str(tmp_path))
    assert run.returncode != 0 and "Traceback" not in run.stderr
    assert "torch must be installed before rwkvir is built" in run.stderr
