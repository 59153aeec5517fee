"""Time of the Bi-WKV operator against what plain torch can do, forward and forward + backward.

    python benchmarks/bi_wkv.py [--sizes 1x4096x48,...] [--dtype float32] [--device cpu] [--repeats 7] [--threads 2]

Baselines, all float32 and differentiable by autograd:
    loop        two Python loops over T, one step of the running-maximum recurrence each
    vectorised  the best torch expression found: cumulative sums within chunks of tokens, a short loop over the chunks
                (`--verify` compares it with the reference)

Every round times each contender once, in turn; the table gives the median and the spread (max - min) / median over the
rounds. The loop is timed once, on at most 4096 tokens, and its time is scaled to T, which flatters it: it grows faster
than T, and its graph of 65536 tokens takes more than 24 GB. --no-loop leaves it out.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rwkvir_arch import bi_wkv, bi_wkv_reference
from rwkvir_arch.bi_wkv import build_info

LOOP_TOKENS = 4096
SIZES = "1x4096x48,1x4096x192,1x65536x48,1x65536x60,1x262144x48"


def loop(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bi-WKV by the recurrence with a running maximum, one token a step."""

    def scan(order):
        top = torch.full_like(k[:, 0], -torch.inf)
        n = d = torch.zeros_like(top)
        states = []
        for t in order:
            states.append((top, n, d))
            new_top = torch.maximum(top - w, k[:, t])
            a, b = torch.exp(top - w - new_top), torch.exp(k[:, t] - new_top)
            top, n, d = new_top, a * n + b * v[:, t], a * d + b
        return states

    T = k.shape[1]
    left, right = scan(range(T)), scan(range(T - 1, -1, -1))[::-1]
    y = []
    for t in range(T):
        (lt, ln, ld), (rt, rn, rd) = left[t], right[t]
        own = u + k[:, t]
        top = torch.maximum(torch.maximum(lt, rt), own)
        a, b, c = torch.exp(lt - top), torch.exp(rt - top), torch.exp(own - top)
        y.append((a * ln + b * rn + c * v[:, t]) / (a * ld + b * rd + c))
    return torch.stack(y, dim=1)


def vectorised(w: Tensor, u: Tensor, k: Tensor, v: Tensor, chunk: int = 256) -> Tensor:
    """Bi-WKV by cumulative sums within chunks. Needs |w| * chunk and the spread of k within float32's range."""
    B, T, C = k.shape
    N = -(-T // chunk)
    k = torch.nn.functional.pad(k, (0, 0, 0, N * chunk - T), value=-60.0).view(B, N, chunk, C)
    v = torch.nn.functional.pad(v, (0, 0, 0, N * chunk - T)).view(B, N, chunk, C)
    e = torch.exp(k - k.amax(dim=(1, 2), keepdim=True))
    items = torch.stack((e * v, e))  # (2, B, N, chunk, C)
    t = torch.arange(chunk, dtype=k.dtype, device=k.device)[:, None]
    grow, shrink = torch.exp(w * t), torch.exp(-w * t)  # (chunk, C)
    decay = torch.exp(-w * chunk)

    def enter(sums: Tensor) -> Tensor:
        """The state that enters each chunk, from the chunks' own sums: (2, B, N, C)."""
        state, states = torch.zeros_like(sums[:, :, 0]), []
        for j in range(N):
            states.append(state)
            state = decay * state + sums[:, :, j]
        return torch.stack(states, dim=2)

    inside = torch.cumsum(items * grow, dim=3)  # (2, B, N, chunk, C)
    left = (inside - items * grow) * shrink * torch.exp(w)
    left = left + enter(inside[:, :, :, -1] * torch.exp(-w * (chunk - 1)))[:, :, :, None] * shrink
    fade = items * shrink
    inside = torch.cumsum(fade, dim=3)
    total = inside[:, :, :, -1:]
    right = (total - inside) * grow * torch.exp(w)
    carried = enter(total[:, :, :, 0].flip(2)).flip(2)[:, :, :, None]
    right = right + carried * shrink.flip(0)
    n, d = left + right + torch.exp(u) * items
    return (n / d).view(B, N * chunk, C)[:, :T]


def example(B: int, T: int, C: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """w, u, k, v as the network's first iterations have them: decays of a few units over the whole image."""
    generator = torch.Generator().manual_seed(0)
    w = torch.linspace(-5, 3, C) / T
    u = torch.randn(C, generator=generator) / T
    k, v = torch.randn(2, B, T, C, generator=generator).unbind()
    return [x.to(device, dtype if x.dim() == 3 else torch.float32).requires_grad_() for x in (w, u, k, v)]


def timed(function, inputs: list[Tensor], backward: bool) -> float:
    for x in inputs:
        x.grad = None
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    if backward:
        y = function(*inputs)
        y.backward(inputs[2].detach().to(y.dtype))
    else:
        with torch.no_grad():
            function(*inputs)
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(contenders: dict[str, Callable[[], float]], repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds and relative spread of each contender, timed in turns after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(repeats):
        for name, run in contenders.items():
            times[name].append(run())
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {name: (medians[name], (max(values) - min(values)) / medians[name]) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=SIZES, help="BxTxC, separated by commas")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-loop", action="store_true", help="leave the Python loop out")
    parser.add_argument("--verify", action="store_true", help="compare the baselines with the reference first")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    if args.verify:
        inputs = example(1, 1000, 8, torch.float32, "cpu")
        reference = bi_wkv_reference(*inputs)
        for function in (loop, vectorised):
            error = (function(*inputs).double() - reference).abs().max() / reference.abs().max()
            print(f"{function.__name__}: {error:.1e} of max|y| from the reference")

    print(
        f"{platform.machine()}, {args.threads} threads, {args.device}, {args.dtype}, torch {torch.__version__}, "
        f"kernel {build_info()['cuda' if args.device == 'cuda' else 'cpu']}\n"
    )
    print("| B×T×C | pass | rwkvir ms (spread) | ns/element | vectorised torch | ratio | Python loop | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for size in args.sizes.split(","):
        B, T, C = (int(x) for x in size.split("x"))
        ours = example(B, T, C, getattr(torch, args.dtype), args.device)
        theirs = [x.detach().float().requires_grad_() for x in ours]
        for backward in (False, True):
            contenders = {
                "ours": partial(timed, bi_wkv, ours, backward),
                "vectorised": partial(timed, vectorised, theirs, backward),
            }
            result = in_turns(contenders, args.repeats)
            seconds, spread = result["ours"]
            torch_seconds, torch_spread = result["vectorised"]
            row = f"| {size} | {'f + b' if backward else 'f'} | {seconds * 1e3:.2f} ({spread:.0%}) "
            row += f"| {seconds / (B * T * C) * 1e9:.2f} | {torch_seconds * 1e3:.1f} ({torch_spread:.0%}) "
            row += f"| {torch_seconds / seconds:.0f}x "
            if args.no_loop:
                row += "| | |"
            else:
                shorter = [x.detach()[:, :LOOP_TOKENS].requires_grad_() if x.dim() == 3 else x for x in theirs]
                loop_seconds = timed(loop, shorter, backward) * T / min(T, LOOP_TOKENS)
                row += f"| {loop_seconds * 1e3:.0f} | {loop_seconds / seconds:.0f}x |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
