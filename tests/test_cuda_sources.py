"""The CUDA kernels compile on a machine without a GPU, for the oldest and the newest architecture that is built and one
between, and keep their numbers in registers."""

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
ARCHITECTURES = ("sm_75", "sm_80", "sm_90")
# Registers a thread may take; of a multiprocessor's 65536, that leaves room for so many threads.
REGISTERS = {
    "chunk_kernel<0>": 72,  # summary: 896
    "chunk_kernel<1>": 80,  # emit: 768
    "chunk_kernel<2>": 128,  # backward summary: 512
    "chunk_kernel<3>": 128,  # backward emit: 512
    "exact_kernel<0>": 72,
    "exact_kernel<1>": 72,
    "exact_kernel<2>": 72,
    "exact_kernel<3>": 72,
    "carry_kernel": 64,  # a block of 1024
    "reduce_kernel": 64,
}


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")


def kernel_name(mangled: str) -> str:
    """`chunk_kernel<1>` for any chunk_kernel of phase 1."""
    name, phase = re.search(r"\d([a-z_]+_kernel)(?:ILNS\w+?PhaseE(\d))?", mangled).groups()
    return name if phase is None else f"{name}<{phase}>"


@pytest.mark.skipif(nvcc() is None, reason="no nvcc on PATH and no CUDA_HOME")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spills(architecture, tmp_path):
    target = f"-gencode=arch={architecture.replace('sm', 'compute')},code={architecture}"
    flags = ast.literal_eval(re.search(r"^CUDA_FLAGS = (\[.+\])$", (ROOT / "setup.py").read_text(), re.MULTILINE)[1])
    command = [nvcc(), *flags, "-Xptxas=-v", target, "-c", "bi_wkv_cuda.cu", "-o", tmp_path / "kernels.o"]
    run = subprocess.run(command, cwd=CSRC, capture_output=True, text=True)
    assert run.returncode == 0 and "warning" not in run.stderr, run.stderr
    reports = re.findall(
        r"Compiling entry function '(\w+)'.+?(\d+) bytes stack frame, (\d+) bytes spill stores.+?Used (\d+) registers",
        run.stderr,
        re.DOTALL,
    )
    assert {kernel_name(kernel) for kernel, *_ in reports} == set(REGISTERS)
    for kernel, stack, spills, registers in reports:
        assert (stack, spills) == ("0", "0"), f"{kernel}: {stack} bytes of stack, {spills} bytes of spills"
        assert int(registers) <= REGISTERS[kernel_name(kernel)], f"{kernel}: {registers} registers"


def test_the_bindings_compile_with_cuda_beside_any_torch():
    (abi,) = re.findall(r'"(-DTORCH_TARGET_VERSION=\w+)"', (ROOT / "setup.py").read_text())
    include = [f"-I{folder}" for folder in cpp_extension.include_paths()]
    command = ["c++", "-fsyntax-only", "-std=c++17", "-DWITH_CUDA", "-DUSE_CUDA", abi, *include, "bindings.cpp"]
    run = subprocess.run(command, cwd=CSRC, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
