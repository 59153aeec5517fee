"""Builds the Bi-WKV operator from csrc/: for the CPU always, for CUDA where a toolkit matches the installed torch.

Whether CUDA is built depends on CUDA_HOME (or nvcc on PATH) and on torch being a CUDA build, never on a visible GPU.
TORCH_CUDA_ARCH_LIST, CXX and MAX_JOBS are read as in every torch extension.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # one binary for every torch from 2.10 on
# Nobody asks for the flags of floating-point exceptions, and without them more loops become vectors.
CXX_FLAGS = ["-O3", "-fno-trapping-math", "-std=c++17", "-Wno-psabi", "-fvisibility=hidden", STABLE_ABI]
# Division to 2 units in the last place instead of half a one: a tenth of the kernels' instructions less.
CUDA_FLAGS = ["-O3", "-std=c++17", "-prec-div=false", "-Xcompiler=-fvisibility=hidden"]

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    sys.exit(
        "rwkvir: torch must be installed before rwkvir is built. Run `pip install torch torchvision setuptools ninja`, "
        "then `pip install --no-build-isolation .`"
    )


def require_compiler() -> None:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        sys.exit(
            f"rwkvir: no C++ compiler: `{compiler}` is not on PATH. Install one (Debian, Ubuntu: apt-get install g++; "
            "Fedora: dnf install gcc-c++; macOS: xcode-select --install) or name yours in CXX, then run this again."
        )


def matching_cuda_home() -> str | None:
    """The CUDA toolkit of the same major version as torch's, or None; says on stderr why one was passed over."""
    home = cpp_extension.CUDA_HOME
    if torch.version.cuda is None or home is None:
        return None
    nvcc = Path(home) / "bin" / "nvcc"
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc.exists() else ""
    found = re.search(r"release (\d+)\.", text)
    if found is None or found[1] != torch.version.cuda.split(".")[0]:
        print(
            f"rwkvir: building for the CPU only: torch is built for CUDA {torch.version.cuda}, and {nvcc} is "
            f"{'CUDA ' + found[1] if found else 'not there'}. Set CUDA_HOME to a matching toolkit to build for both.",
            file=sys.stderr,
        )
        return None
    return home


def extension():
    sources = ["csrc/bindings.cpp", "csrc/bi_wkv_cpu.cpp"]
    if matching_cuda_home() is None:
        return cpp_extension.CppExtension(
            "rwkvir_arch._C", sources, extra_compile_args={"cxx": CXX_FLAGS}, py_limited_api=True
        )
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "7.5;8.0;8.6;8.9;9.0+PTX")
    built = cpp_extension.CUDAExtension(
        "rwkvir_arch._C",
        [*sources, "csrc/bi_wkv_cuda.cu"],
        define_macros=[("WITH_CUDA", None)],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": CUDA_FLAGS},
        py_limited_api=True,
    )
    # The CUDA runtime is linked in, so that the library also loads beside a CPU build of torch.
    dynamic = {"cudart", "c10_cuda", "torch_cuda"}
    built.libraries = [name for name in built.libraries if name not in dynamic] + ["cudart_static", "dl", "rt"]
    return built


require_compiler()
setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": cpp_extension.BuildExtension.with_options(no_python_abi_suffix=True)},
)
