"""The demo as a person runs it: data, training, table, pictures; then again, without training."""

import re
import subprocess
import sys
from pathlib import Path

import cv2
import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_beats_bicubic_on_every_photograph(tmp_path: Path):
    def demo() -> str:
        command = [sys.executable, "-m", "rwkvir", "demo"]
        run = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert run.returncode == 0, run.stdout
        return run.stdout

    results = tmp_path / "results" / "rwkvir_demo"
    first = demo()
    assert "iter:   3,000" in first
    gains = [
        float(gain) for gain in re.findall(r"([+-]\d+\.\d+) \|$", (results / "table.md").read_text(), re.MULTILINE)
    ]
    assert len(gains) == 5 and min(gains) > 0
    for name in ("astronaut", "chelsea", "coffee", "rocket", "overview", "learning_curve"):
        assert cv2.imread(str(results / f"{name}.png")) is not None
    assert "iter:" not in demo()
