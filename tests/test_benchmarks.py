"""The benchmark scripts run, at sizes at which their figures mean nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ONCE = ["--repeats", "1", "--threads", "1"]


SCRIPTS = [path.name for path in sorted((ROOT / "benchmarks").glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_benchmarks_say_what_they_take(script):
    run = subprocess.run([sys.executable, ROOT / "benchmarks" / script, "--help"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "usage" in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["bi_wkv.py", *ONCE, "--sizes", "1x100x5", "--images", "1x9x8x5", "--sections", "single,cross", "--verify"],
        ["network.py", *ONCE, "--picture-repeats", "1", "--sizes", "16x8"],
        ["growth.py", *ONCE, "--powers", "4-6", "--figure", "plot.png"],
    ],
    ids=lambda words: words[0],
)
def test_benchmarks_run_and_print_a_table(words, tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / words[0], *words[1:]]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("\n| ") >= 3
