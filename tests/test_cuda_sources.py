"""The CUDA kernels compile on a machine without a GPU, and keep their numbers in registers."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
ARCHITECTURES = ("sm_80", "sm_90")


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")


@pytest.mark.skipif(nvcc() is None, reason="no nvcc on PATH and no CUDA_HOME")
def test_kernels_compile_without_spills(tmp_path):
    targets = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in ARCHITECTURES]
    command = [
        nvcc(),
        "-std=c++17",
        "-O3",
        "-Xptxas=-v",
        *targets,
        "-c",
        "bi_wkv_cuda.cu",
        "-o",
        tmp_path / "kernels.o",
    ]
    run = subprocess.run(command, cwd=CSRC, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", run.stderr)
    assert spills and set(spills) == {("0", "0")}, run.stderr
