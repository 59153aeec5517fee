"""Bidirectional WKV (arXiv 2412.03814): the operator, and the reference that says what it computes.

    w, u: (C)   k, v: (B, T, C)   ->   y: (B, T, C)

          sum_{i != t} e^{-(|t-i|-1) w + k_i} v_i  +  e^{u + k_t} v_t
    y_t = -----------------------------------------------------------
          sum_{i != t} e^{-(|t-i|-1) w + k_i}      +  e^{u + k_t}

Axis letters: B batch, H height, W width, T = H W tokens in row-major order, C channels.
"""

from pathlib import Path

import torch
from torch import Tensor

CHUNK = 64  # tokens whose state is kept for the gradients as one; kChunkTokens in csrc/bi_wkv_scan.h
LANES = 16  # channels a state row is padded to a multiple of; kLanes there
TILE = 32  # rows and columns of pixels that a sum of two scans takes at once; kTileRows and kTileColumns there
NARROW = 16  # columns up to which segments are of several rows; kNarrow there
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BUILD_COMMAND = "pip install --no-build-isolation ."

_library = Path(__file__).with_name("_C.so")


def bi_wkv_reference(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bi-WKV straight from the formula, in float64 and O(T^2) time and memory.

    Args and result as for :func:`bi_wkv`. Every weight is e to the power of a score, so y is a softmax over tokens.
    """
    if k.dim() == 4:
        return bi_wkv_reference(w, u, k.flatten(1, 2), v.flatten(1, 2)).view_as(k)
    w, u, k, v = (x.double() for x in (w, u, k, v))
    t = torch.arange(k.shape[1], device=k.device)
    distance = (t[:, None] - t[None, :]).abs()[:, :, None]
    bias = torch.where(distance == 0, u, -(distance - 1) * w)  # (T, T, C)
    return torch.einsum("btic,bic->btc", (bias + k[:, None]).softmax(dim=2), v)  # (B, T, C)


def cross_bi_wkv_reference(w: Tensor, u: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None) -> Tensor:
    """Cross-Bi-WKV straight from the formula: args and result as for :func:`cross_bi_wkv`, in float64."""
    rows = bi_wkv_reference(w[0], u[0], k, v)
    columns = bi_wkv_reference(w[1], u[1], k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    y = rows + columns
    return y if gate is None else gate.double().sigmoid() * y


def bi_wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bidirectional WKV over all tokens, in time and memory linear in T.

    Args:
        w: (C), decay per token. Taken as it is: negative values are allowed, and nothing is divided by T.
        u: (C), bonus of a token for itself.
        k: (B, T, C), or (B, H, W, C) for the tokens of an image in row-major order. Any strides: pass
            `k.transpose(1, 2)` to scan an image in column-major order, without a copy.
        v: like k.

    Returns:
        y, with the shape, strides and dtype of k.

    float32, float64, bfloat16 and float16; 16-bit inputs are accumulated in float32. Under autocast everything is
    computed in float32. Differentiable once. A constant v comes out as it went in; torch.vmap goes through its axis
    one by one.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, with what was given and what is wanted.
        NotImplementedError: the operator is not built, or not for this device.
    """
    if k.dim() not in (3, 4):
        raise ValueError(f"bi_wkv: k must be (B, T, C) or (B, H, W, C), got {_describe(k)}")
    _check("bi_wkv", w, u, k, v, parameters=(k.shape[-1],))
    if k.dim() == 3:
        return _wkv(w[None], u[None], k[:, None], v[:, None]).squeeze(1)  # (B, T, C), without a copy of its gradient
    return _wkv(w[None], u[None], k, v)


def cross_bi_wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None) -> Tensor:
    """Cross-Bi-WKV: the sum of a Bi-WKV over the row-major and one over the column-major token order.

    Args:
        w: (2, C), decay per token; row 0 for the row-major scan, row 1 for the column-major one.
        u: (2, C), bonus of a token for itself, likewise.
        k: (B, H, W, C), any strides.
        v: like k.
        gate: like k, or None. The sum is multiplied by its sigmoid, before it is rounded.

    Returns:
        y, with the shape, strides and dtype of k. Dtypes, autocast, gradients and errors as for :func:`bi_wkv`.
    """
    if k.dim() != 4:
        raise ValueError(f"cross_bi_wkv: k must be (B, H, W, C), got {_describe(k)}")
    _check("cross_bi_wkv", w, u, k, v, parameters=(2, k.shape[-1]), gate=gate)
    return _wkv(w, u, k, v, gate)


def build_info() -> dict[str, str | None]:
    """What is built, for `basicsr info`.

    Returns:
        path: the library's file. cpu: the instruction set in use. cuda: the toolkit's version, or None. error: why the
        operator cannot be used, or None.
    """
    info: dict[str, str | None] = {"path": str(_library), "cpu": None, "cuda": None, "error": None}
    try:
        _require_build()
    except NotImplementedError as error:
        return {**info, "error": str(error)}
    cpu, cuda = (field.split("=")[1] for field in torch.ops.rwkvir.build_info().split())
    version = int(cuda)
    return {**info, "cpu": cpu, "cuda": f"{version // 1000}.{version % 1000 // 10}" if version else None}


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"


def _check(
    name: str, w: Tensor, u: Tensor, k: Tensor, v: Tensor, parameters: tuple[int, ...], gate: Tensor | None = None
) -> None:
    for label, x in (("w", w), ("u", u)):
        if x.shape != parameters:
            raise ValueError(f"{name}: {label} must be {parameters} for k of {tuple(k.shape)}, got {_describe(x)}")
    like_k = {"v": v} if gate is None else {"v": v, "gate": gate}
    for label, x in {"w": w, "u": u, "k": k, **like_k}.items():
        if x.dtype not in DTYPES:
            raise ValueError(f"{name}: {label} must be float32, float64, bfloat16 or float16, got {_describe(x)}")
        if x.device != k.device:
            raise ValueError(f"{name}: {label} is on {x.device} and k on {k.device}; move them to one device")
    for label, x in like_k.items():
        if x.shape != k.shape:
            raise ValueError(
                f"{name}: k and {label} must have one shape, got k {_describe(k)} and {label} {_describe(x)}"
            )
        if x.dtype != k.dtype and not torch.is_autocast_enabled(k.device.type):
            raise ValueError(
                f"{name}: k and {label} must have one dtype, got k {_describe(k)} and {label} {_describe(x)}"
            )


def _wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None) -> Tensor:
    """One or two scans, w, u: (S, C), of k, v: (B, H, W, C), times the sigmoid of `gate`."""
    _require_build()
    _require_device(k.device.type)
    return torch.ops.rwkvir.wkv(w, u, k, v, gate)[0]


def _require_build() -> None:
    if _build_error is not None:
        raise NotImplementedError(_build_error)


def _require_device(kind: str) -> None:
    if kind == "cuda" and not _built_for_cuda:
        raise NotImplementedError(
            "the Bi-WKV operator is built for the CPU only, and k is on a GPU. Set CUDA_HOME to a CUDA toolkit of "
            f"torch's version ({torch.version.cuda}) and run `{BUILD_COMMAND}` in rwkvir's source folder again"
        )
    if kind not in ("cpu", "cuda"):
        raise NotImplementedError(
            f"the Bi-WKV operator runs on CPU and CUDA, not on {kind}; move the tensors to the CPU"
        )


def _load() -> str | None:
    if not _library.exists():
        return f"the Bi-WKV operator is not built; run `{BUILD_COMMAND}` in rwkvir's source folder"
    try:
        torch.ops.load_library(_library)
    except OSError as error:
        return (
            f"the Bi-WKV operator does not load beside torch {torch.__version__} ({error}); run `{BUILD_COMMAND}` in "
            "rwkvir's source folder again"
        )
    return None


def _state_shape(scans: int, k: Tensor) -> tuple[int, ...]:
    """The shape of what csrc/bindings.cpp keeps for the gradients: numbers of states, by channels."""
    B, H, W, C = k.shape
    lanes = _ceil(C, LANES) * LANES
    if k.device.type == "cuda":
        return scans, B, _ceil(H * W, CHUNK), 6, lanes
    if scans == 1:
        return B * _ceil(H * W, CHUNK) * 7, lanes
    if H <= NARROW and H < W:
        H, W = W, H
    tiles, segments = _ceil(H, TILE) * _ceil(W, TILE), W * _ceil(H, TILE)
    if W > NARROW:
        segments += H * _ceil(W, TILE)
    else:
        rows = next(rows for rows in (32, 16, 8, 4, 2) if rows * W <= TILE)
        segments += _ceil(H, rows)
    return B * (6 * segments + tiles), lanes


def _ceil(a: int, b: int) -> int:
    """a / b rounded up; also where `a` is a torch.SymInt."""
    return (a + b - 1) // b


def _register() -> None:
    @torch.library.register_fake("rwkvir::wkv")
    def _(w, u, k, v, gate=None):
        return torch.empty_like(k), k.new_empty(_state_shape(w.shape[0], k), dtype=torch.float64)

    @torch.library.register_fake("rwkvir::wkv_backward")
    def _(gy, w, u, k, v, gate, state):
        contiguous = torch.contiguous_format
        return (
            torch.empty_like(w, memory_format=contiguous),
            torch.empty_like(u, memory_format=contiguous),
            torch.empty_like(k),
            torch.empty_like(v),
            None if gate is None else torch.empty_like(gate),
        )

    def keep(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output[1])

    def backward(ctx, gy, gstate):
        return torch.ops.rwkvir.wkv_backward(gy, *ctx.saved_tensors)

    def refuse(ctx, *grads):
        raise RuntimeError("bi_wkv is differentiable once; its second derivative is not implemented")

    torch.library.register_autograd("rwkvir::wkv", backward, setup_context=keep)
    torch.library.register_autograd("rwkvir::wkv_backward", refuse)
    for device in ("cpu", "cuda"):
        torch.library.register_autocast("rwkvir::wkv", device, torch.float32)


_build_error = _load()
_built_for_cuda = False
if _build_error is None:
    _register()
    _built_for_cuda = build_info()["cuda"] is not None
