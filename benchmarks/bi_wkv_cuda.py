"""Time of the Bi-WKV operator on a GPU, against the memory's limit and against the layout of the published kernels.

    python benchmarks/bi_wkv_cuda.py [--sizes 8x64x64x192,...] [--repeats 30]

Every call is captured in a CUDA graph, over several sets of inputs in turn, so that none finds its inputs in the cache
and Python's time does not count; the table gives the median and the spread (max - min) / median over the replays.

limit       the time to move what an algorithm of two passes has to move (every input twice, every output once), at the
            bandwidth of a large copy measured in the same run
published   the layout of the CUDA kernels that circulate (published_layout.cu, compiled by nvcc when the benchmark
            starts): one thread for each batch, channel and 32nd of the tokens. Forward, row order, float32 only

A size is BxHxWxC. `rows` is one scan; `cross` is both, with the gate.
"""

import argparse
import ctypes
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.cpp_extension import CUDA_HOME

from rwkvir_arch.bi_wkv import build_info

SIZES = "8x64x64x192,4x64x64x48,32x64x64x192,1x180x320x48,1x720x1280x60"
SETS = 3  # of inputs, used in turn
# Words that two passes move per element, (forward, backward).
WORDS = {"rows": (5, 8), "cross": (6, 11)}


def inputs(B: int, H: int, W: int, C: int, scan: str, dtype: torch.dtype) -> list[Tensor | None]:
    """w, u, k, v and the gate of the last of `scan`, as a network's first iterations have them."""
    w = torch.linspace(-5, 3, C, device="cuda").div(H * W).expand(1 + (scan == "cross"), C).contiguous()
    k, v, gate = torch.randn(3, B, H, W, C, device="cuda").to(dtype).unbind()
    return [w, torch.randn_like(w), k, v, gate if scan == "cross" else None]


def seconds(calls: list[Callable[[], object]], repeats: int) -> tuple[float, float]:
    """Median time of a call, and the relative spread, over replays of a graph of all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = []
    for repeat in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if repeat >= 3:  # the first ones warm up
            times.append(start.elapsed_time(end) / 1e3 / len(calls))
    median = statistics.median(times)
    return median, (max(times) - min(times)) / median


def copy_bandwidth(repeats: int) -> float:
    """Bytes per second of a device-to-device copy, read and written."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds([lambda: target.copy_(source)], repeats)[0]


def published_layout() -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Compiles the baseline: w, u: (1, C) and k, v: (B, H, W, C), float32 and contiguous, to y."""
    folder = tempfile.mkdtemp()
    library = Path(folder, "published_layout.so")
    command = [Path(CUDA_HOME or "/usr/local/cuda", "bin", "nvcc"), "-O3", "-arch=native", "-shared"]
    command += ["-Xcompiler=-fPIC", Path(__file__).with_name("published_layout.cu"), "-o", library]
    subprocess.run(command, check=True)
    launch = ctypes.CDLL(str(library)).published_layout
    launch.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 3 + [ctypes.c_void_p]

    def forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = torch.empty_like(k)
        B, H, W, C = k.shape
        pointers = (x.data_ptr() for x in (w, u, k, v, y))
        error = launch(*pointers, B, H * W, C, torch.cuda.current_stream().cuda_stream)
        if error:
            raise RuntimeError(f"the baseline's launch failed with CUDA error {error}")
        return y

    return forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=SIZES, help="BxHxWxC, separated by commas")
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU; benchmarks/bi_wkv.py is the one for the CPU")
    torch.manual_seed(0)
    bandwidth, baseline = copy_bandwidth(args.repeats), published_layout()
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e12:.2f} TB/s, torch {torch.__version__}, ", end="")
    print(f"operator built by CUDA {build_info()['cuda']}\n")
    print("| B×H×W×C | scan | dtype | pass | µs (spread) | limit µs | × limit | published µs | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in args.sizes.split(","):
        shape = [int(x) for x in size.split("x")]
        for scan in WORDS:
            for dtype in (torch.float32, torch.bfloat16):
                sets = [inputs(*shape, scan, dtype) for _ in range(SETS)]
                calls = [lambda x=x: torch.ops.rwkvir.wkv(*x) for x in sets]
                forward = seconds(calls, args.repeats)
                states = [call()[1] for call in calls]
                backward = seconds(
                    [
                        lambda x=x, state=state: torch.ops.rwkvir.wkv_backward(x[3], *x, state)
                        for x, state in zip(sets, states, strict=True)
                    ],
                    args.repeats,
                )
                for name, words, (ours, spread) in zip(("f", "b"), WORDS[scan], (forward, backward), strict=True):
                    limit = words * sets[0][2].nbytes / bandwidth
                    row = f"| {size} | {scan} | {str(dtype).removeprefix('torch.')} | {name} "
                    row += f"| {ours * 1e6:.1f} ({spread:.0%}) | {limit * 1e6:.1f} | {ours / limit:.1f} "
                    if scan == "rows" and dtype == torch.float32 and name == "f":
                        theirs, _ = seconds([lambda x=x: baseline(*x[:4]) for x in sets], args.repeats)
                        row += f"| {theirs * 1e6:.1f} | {theirs / ours:.1f} |"
                    else:
                        row += "| | |"
                    print(row, flush=True)


if __name__ == "__main__":
    main()
