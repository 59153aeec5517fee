"""RWKVIR light x4 beside SwinIR-light x4 (BasicSR's implementation): time and memory, training and inference.

    python benchmarks/network.py [--sizes 320x180,640x360,1280x720] [--device cpu] [--repeats 5] [--threads 2]

Forward pass and training step (forward, L1 loss, backward, Adam) on four patches of 64x64, in one process, in turns;
one forward pass on a whole picture of each size (width x height, before enlarging), each in a process of its own, in
turns. `fused` is RWKVIR after fuse(). The table gives medians and the spread (max - min) / median over the rounds;
memory is the peak less what the process held with network and picture loaded. Freed memory is kept for all of them, as
`basicsr` does (rwkvir/memory.py). Below it stands where the time goes. Linux only.
"""

import argparse
import platform
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from bi_wkv import in_turns
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import profile

from rwkvir.memory import keep_freed
from rwkvir_arch import RWKVIR

from basicsr.archs.swinir_arch import SwinIR  # isort: skip  # after rwkvir_arch, which repairs it

NETWORKS = ("RWKVIR", "fused", "SwinIR")
SIZES = "320x180,640x360,1280x720"
BATCH, PATCH, SCALE, WINDOW = 4, 64, 4, 8


class PaddedSwinIR(SwinIR):
    """SwinIR for any size: pads to whole windows and crops, as BasicSR's SwinIRModel does."""

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[-2:]
        y = super().forward(F.pad(x, (0, -W % WINDOW, 0, -H % WINDOW), "reflect"))
        return y[..., : H * SCALE, : W * SCALE]


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "SwinIR":
        return PaddedSwinIR(
            img_size=PATCH,
            embed_dim=60,
            depths=[6] * 4,
            num_heads=[6] * 4,
            window_size=WINDOW,
            mlp_ratio=2,
            upscale=SCALE,
            upsampler="pixelshuffledirect",
            resi_connection="1conv",
        )
    model = RWKVIR(upscale=SCALE)
    return model.eval().fuse() if name == "fused" else model


def timed(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def inference(name: str, width: int, height: int, device: str, batch: int = 1) -> Callable[[], Tensor]:
    model, x = network(name).eval().to(device), torch.rand(batch, 3, height, width, device=device)
    return torch.no_grad()(partial(model, x))


def training(name: str, device: str) -> Callable[[], None]:
    model = network(name).train().to(device)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-4)
    lq = torch.rand(BATCH, 3, PATCH, PATCH, device=device)
    gt = torch.rand(BATCH, 3, PATCH * SCALE, PATCH * SCALE, device=device)

    def step() -> None:
        optimiser.zero_grad()
        F.l1_loss(model(lq), gt).backward()
        optimiser.step()

    return step


def in_process_of_its_own(
    build: Callable[..., Callable[[], object]], *arguments: object, device: str, threads: int, repeats: int = 1
) -> tuple[float, float] | str:
    """Median seconds of what `build` returns, and the peak memory of its first run in MiB; or why there are none."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measured, build, arguments, device, threads, repeats).result()
        except BrokenProcessPool:
            return "killed: out of memory"
        except RuntimeError as error:
            return str(error).splitlines()[0]


def measured(
    build: Callable[..., Callable[[], object]], arguments: tuple, device: str, threads: int, repeats: int
) -> tuple[float, float]:
    torch.set_num_threads(threads)
    keep_freed()
    run = build(*arguments)
    before = memory("VmRSS", device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, to VmRSS
    seconds = [timed(run, device)]
    peak = memory("VmHWM", device)
    seconds += [timed(run, device) for _ in range(repeats - 1)]
    return statistics.median(seconds), peak - before


def memory(field: str, device: str) -> float:
    """MiB: the field of this process's status, or on a GPU what torch's allocator has held at most."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20 if field == "VmHWM" else torch.cuda.memory_allocated() / 2**20
    (kilobytes,) = re.findall(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(kilobytes) / 1024


def cell(values: list[float], scale: float, digits: int) -> str:
    median = statistics.median(values)
    return f"{median * scale:.{digits}f} ({(max(values) - min(values)) / max(median, 1e-9):.0%})"


def pictures(size: str, args: argparse.Namespace) -> None:
    """Two rows of the table: seconds and MiB of each network on a picture."""
    results: dict[str, list] = {name: [] for name in NETWORKS}
    for _ in range(args.picture_repeats):
        for name in NETWORKS:
            width, height = map(int, size.split("x"))
            results[name].append(
                in_process_of_its_own(
                    inference, name, width, height, args.device, device=args.device, threads=args.threads
                )
            )
    for index, (label, digits) in enumerate((("s", 2), ("peak MiB", 0))):
        cells, medians = [], []
        for name in NETWORKS:
            failed = [result for result in results[name] if isinstance(result, str)]
            values = [result[index] for result in results[name] if not isinstance(result, str)]
            cells.append(failed[0] if failed else cell(values, 1, digits))
            medians.append(float("nan") if failed else statistics.median(values))
        print(f"| {size}, {label} | {' | '.join(cells)} | {medians[2] / medians[0]:.1f}x |", flush=True)


def shares(run: Callable[[], object], device: str) -> str:
    """What the largest parts of a call's time are, by operator of torch; ours, both ways, is one."""
    run()
    with profile() as found:
        timed(run, device)
    time = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    parts: Counter[str] = Counter()
    for event in found.key_averages():
        parts["rwkvir::wkv" if "rwkvir" in event.key else event.key] += getattr(event, time)
    return ", ".join(f"{name} {part / parts.total():.0%}" for name, part in parts.most_common(8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=SIZES, help="WIDTHxHEIGHT of pictures, separated by commas")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=5, help="rounds on patches")
    parser.add_argument("--picture-repeats", type=int, default=3, help="rounds on pictures")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed()

    counts = {name: sum(p.numel() for p in network(name).parameters()) / 1e3 for name in ("RWKVIR", "SwinIR")}
    print(
        f"{platform.machine()}, {args.threads} threads, {args.device}, float32, torch {torch.__version__}; "
        + ", ".join(f"{name} {count:.0f} K parameters" for name, count in counts.items())
        + f"\n\n| x4 | {' | '.join(f'{name} (spread)' for name in NETWORKS)} | SwinIR / RWKVIR |\n|---|---|---|---|---|"
    )
    patches = f"{BATCH}x{PATCH}x{PATCH}"
    forward = {name: inference(name, PATCH, PATCH, args.device, BATCH) for name in NETWORKS}
    step = {name: training(name, args.device) for name in counts}
    for label, contenders in ((f"{patches} forward, ms", forward), (f"{patches} training step, ms", step)):
        result = in_turns({name: partial(timed, run, args.device) for name, run in contenders.items()}, args.repeats)
        cells = [f"{result[name][0] * 1e3:.0f} ({result[name][1]:.0%})" if name in result else "" for name in NETWORKS]
        print(f"| {label} | {' | '.join(cells)} | {result['SwinIR'][0] / result['RWKVIR'][0]:.1f}x |", flush=True)
    sizes = [size for size in args.sizes.split(",") if size]
    for size in sizes:
        pictures(size, args)
    print(f"\nWhere the time goes, training step of RWKVIR: {shares(step['RWKVIR'], args.device)}")
    for size in sizes[:1]:
        run = inference("RWKVIR", *map(int, size.split("x")), args.device)
        print(f"Where the time goes, {size}: {shares(run, args.device)}")


if __name__ == "__main__":
    main()
