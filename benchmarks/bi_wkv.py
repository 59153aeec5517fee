"""Time of the Bi-WKV operator against what plain torch can do, and against the machine's memory.

    python benchmarks/bi_wkv.py [--sections single,cross,dtypes,channels,exact] [--device cpu] [--threads 2]

single    one scan, forward and forward + backward. Baselines, all float32 and differentiable by autograd: `loop`, two
          Python loops over T, one step of the running-maximum recurrence each; `vectorised`, the best torch expression
          found: cumulative sums within chunks of tokens, a short loop over the chunks (--verify compares both with the
          reference).
cross     the fused sum of two scans with gate, against the same made of two calls of the single scan, transposed copies
          and torch's sum, sigmoid and product.
dtypes    16-bit inputs against float32.
channels  rows that no vector divides, per element, against the next wider ones that one does.
exact     inputs beyond float's range, for which a method in double precision is taken, against ordinary ones.

Every round calls each contender twice, in turn, and times the second call, which finds in the cache what the first left
there; a table gives the median and the spread (max - min) / median over the rounds. `bytes` are those that two passes
over memory must move per element (k and v twice, everything else once), and the bandwidth beside it is their share of
that of a STREAM-like triad over 3 x 64 MiB, timed in the same rounds. The loop is timed once, on at most 4096 tokens,
and its time is scaled to T, which flatters it: it grows faster than T, and its graph of 65536 tokens takes more than
24 GB. --no-loop leaves it out.
"""

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rwkvir_arch import bi_wkv, bi_wkv_reference, cross_bi_wkv
from rwkvir_arch.bi_wkv import build_info

LOOP_TOKENS = 4096
SIZES = "1x4096x48,1x4096x192,1x65536x48,1x65536x60,1x262144x48"
IMAGES = "1x64x64x48,1x64x64x192,1x180x320x48,1x512x512x48"
NARROW = "1x4096x1x48,1x3x1365x48,1x7x585x48"
TRIAD_ELEMENTS = 1 << 24
# Of k, v and y in elements per element: k and v are read twice. The backward pass also reads gy twice, and writes two
# gradients; with a gate, one more is read twice and one more is written.
FORWARD_ELEMENTS, BACKWARD_ELEMENTS = 5, 8
GATED_FORWARD_ELEMENTS, GATED_BACKWARD_ELEMENTS = 6, 11


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


def unfused(w: Tensor, u: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """Cross-Bi-WKV with gate, of the single scan, transposed copies and torch."""
    rows = bi_wkv(w[0], u[0], k, v)
    columns = bi_wkv(w[1], u[1], k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous())
    return gate.sigmoid() * (rows + columns.transpose(1, 2))


def example(*shape: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """w, u, k, v as the network's first iterations have them: decays of a few units over the whole image.

    For (B, T, C) one scan; for (B, H, W, C) two, and a gate.
    """
    generator = torch.Generator().manual_seed(0)
    C, T, scans = shape[-1], max(1, math.prod(shape[1:-1])), (2,) if len(shape) == 4 else ()
    w = (torch.linspace(-5, 3, C) / T).expand(*scans, C).clone()
    u = torch.randn(*scans, C, generator=generator) / T
    images = torch.randn(len(shape) - 1, *shape, generator=generator).unbind()
    inputs = [w, u, *(x.to(dtype) for x in images)]
    return [x.to(device).requires_grad_() for x in inputs]


def synchronised(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function: Callable[..., Tensor], inputs: list[Tensor], backward: bool) -> float:
    for x in inputs:
        x.grad = None
    start = synchronised(inputs[0].device)
    if backward:
        y = function(*inputs)
        y.backward(inputs[2].detach().to(y.dtype))
    else:
        with torch.no_grad():
            function(*inputs)
    return synchronised(inputs[0].device) - start


def triad(tensors: list[Tensor]) -> float:
    """Seconds of a = b + 3 c, which moves three times 64 MiB."""
    a, b, c = tensors
    start = synchronised(a.device)
    torch.add(b, c, alpha=3, out=a)
    return synchronised(a.device) - start


def in_turns(contenders: dict[str, Callable[[], float]], repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds and relative spread of each contender, in turns; of two calls in a row the second is timed."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            run()
            times[name].append(run())
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {name: (medians[name], (max(values) - min(values)) / medians[name]) for name, values in times.items()}


class Rounds:
    """Times contenders in turns, the triad among them."""

    def __init__(self, device: str, repeats: int) -> None:
        self.triad = partial(triad, [torch.ones(TRIAD_ELEMENTS, device=device) for _ in range(3)])
        self.repeats = repeats

    def time(self, contenders: dict[str, Callable[[], float]]) -> dict[str, tuple[float, float]]:
        return in_turns({**contenders, "triad": self.triad}, self.repeats)


def ours_cells(result: dict[str, tuple[float, float]], elements: int, moved: int) -> str:
    """Milliseconds (spread), ns per element, bytes per element and the share of the triad's bandwidth."""
    seconds, spread = result["ours"]
    bandwidth = 12 * TRIAD_ELEMENTS / result["triad"][0]
    share = moved * elements / seconds / bandwidth
    speed = f"{share:.0%} of {bandwidth / 1e9:.0f} GB/s"
    return f"| {seconds * 1e3:.2f} ({spread:.0%}) | {seconds / elements * 1e9:.2f} | {moved} | {speed} "


def theirs_cells(result: dict[str, tuple[float, float]], name: str) -> str:
    seconds, spread = result[name]
    return f"| {seconds * 1e3:.1f} ({spread:.0%}) | {seconds / result['ours'][0]:.1f}x "


def passes(forward: int, backward: int, element_size: int) -> list[tuple[bool, str, int]]:
    return [(False, "f", forward * element_size), (True, "f + b", (forward + backward) * element_size)]


def single(args: argparse.Namespace, rounds: Rounds) -> None:
    print("| B×T×C | pass | rwkvir ms (spread) | ns/element | bytes | bandwidth | vectorised | ratio | loop | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for size in args.sizes.split(","):
        B, T, C = (int(x) for x in size.split("x"))
        inputs = example(B, T, C, dtype=torch.float32, device=args.device)
        for backward, label, moved in passes(FORWARD_ELEMENTS, BACKWARD_ELEMENTS, 4):
            contenders = {
                name: partial(timed, f, inputs, backward) for name, f in (("ours", bi_wkv), ("torch", vectorised))
            }
            result = rounds.time(contenders)
            row = f"| {size} | {label} {ours_cells(result, B * T * C, moved)}{theirs_cells(result, 'torch')}"
            if not args.no_loop:
                shorter = [x.detach()[:, :LOOP_TOKENS].requires_grad_() if x.dim() == 3 else x for x in inputs]
                result["loop"] = (timed(loop, shorter, backward) * T / min(T, LOOP_TOKENS), 0)
            print(f"{row}{theirs_cells(result, 'loop') if not args.no_loop else '| | '}|", flush=True)


def cross(args: argparse.Namespace, rounds: Rounds) -> None:
    print("| B×H×W×C | pass | rwkvir ms (spread) | ns/element | bytes | bandwidth | unfused | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for size in args.images.split(","):
        shape = [int(x) for x in size.split("x")]
        inputs = example(*shape, dtype=torch.float32, device=args.device)
        for backward, label, moved in passes(GATED_FORWARD_ELEMENTS, GATED_BACKWARD_ELEMENTS, 4):
            functions = {"ours": cross_bi_wkv, "unfused": unfused}
            result = rounds.time({name: partial(timed, f, inputs, backward) for name, f in functions.items()})
            cells = ours_cells(result, inputs[2].numel(), moved)
            print(f"| {size} | {label} {cells}{theirs_cells(result, 'unfused')}|", flush=True)


def compare(args: argparse.Namespace, rounds: Rounds, cases: dict[str, tuple[list[Tensor], list[Tensor]]]) -> None:
    """A table of each case's inputs against others, per element."""
    print("| case | scans | pass | ns/element (spread) | of the other (spread) | ratio |")
    print("|---|---|---|---|---|---|")
    for case, pair in cases.items():
        function = cross_bi_wkv if pair[0][2].dim() == 4 else bi_wkv
        for backward, label, _ in passes(0, 0, 0):
            result = rounds.time({str(i): partial(timed, function, pair[i], backward) for i in range(2)})
            cells = [(result[str(i)][0] / pair[i][2].numel() * 1e9, result[str(i)][1]) for i in range(2)]
            (ours, spread), (other, other_spread) = cells
            scans = "two, gated" if pair[0][2].dim() == 4 else "one"
            row = f"| {case} | {scans} | {label} | {ours:.2f} ({spread:.0%}) | {other:.2f} ({other_spread:.0%}) "
            print(f"{row}| {ours / other:.2f} |", flush=True)


def dtypes(args: argparse.Namespace, rounds: Rounds) -> None:
    cases = {}
    for dtype in (torch.bfloat16, torch.float16):
        for shape in ((1, 4096, 192), (1, 64, 64, 192)):
            name = f"{'×'.join(map(str, shape))} {str(dtype).removeprefix('torch.')} : float32"
            cases[name] = tuple(example(*shape, dtype=d, device=args.device) for d in (dtype, torch.float32))
    compare(args, rounds, cases)


def channels(args: argparse.Namespace, rounds: Rounds) -> None:
    cases = {}
    for few, many in ((60, 64), (180, 192)):
        for tokens in ((4096,), (64, 64)):
            pair = [example(1, *tokens, C, dtype=torch.float32, device=args.device) for C in (few, many)]
            cases[f"{'×'.join(map(str, (1, *tokens)))}, C = {few} : {many}"] = (pair[0], pair[1])
    compare(args, rounds, cases)


def exact(args: argparse.Namespace, rounds: Rounds) -> None:
    cases = {}
    for shape in ((1, 4096, 48), (1, 64, 64, 48)):
        usual = example(*shape, dtype=torch.float32, device=args.device)
        large = [x.detach().clone().requires_grad_() for x in usual]
        large[2].data *= 1e5
        cases[f"{'×'.join(map(str, shape))}, |k| of 1e5 : 1"] = (large, usual)
    compare(args, rounds, cases)


SECTIONS = {"single": single, "cross": cross, "dtypes": dtypes, "channels": channels, "exact": exact}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="of single, cross, dtypes, channels, exact")
    parser.add_argument("--sizes", default=SIZES, help="BxTxC of single, separated by commas")
    parser.add_argument("--images", default=f"{IMAGES},{NARROW}", help="BxHxWxC of cross, separated by commas")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-loop", action="store_true", help="leave the Python loop out")
    parser.add_argument("--verify", action="store_true", help="compare the baselines with the reference first")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    if args.verify:
        inputs = example(1, 1000, 8, dtype=torch.float32, device="cpu")
        reference = bi_wkv_reference(*inputs)
        for function in (loop, vectorised):
            error = (function(*inputs).double() - reference).abs().max() / reference.abs().max()
            print(f"{function.__name__}: {error:.1e} of max|y| from the reference")

    kernel = torch.cuda.get_device_name() if args.device == "cuda" else build_info()["cpu"]
    print(f"{platform.machine()}, {args.threads} threads, {args.device} ({kernel}), torch {torch.__version__}")
    rounds = Rounds(args.device, args.repeats)
    for name in args.sections.split(","):
        print(f"\n{name}\n")
        SECTIONS[name](args, rounds)


if __name__ == "__main__":
    main()
