"""What the published CUDA kernels compute in place of Bi-WKV, for weights that were trained with them."""

import torch
from torch import Tensor

EPSILON = 1e-6  # added to the denominator


def published_wkv_reference(w: Tensor, u: Tensor, k: Tensor, v: Tensor, token_split: int = 32) -> Tensor:
    """The result of the kernels of Vision-RWKV and its copies, in float64 and O(T^2) time and memory.

    They split the tokens into chunks of L = ceil(T / token_split). With s the first token of t's chunk, their weights
    are

        e^{u + k_t} for j = t,  e^{-(t-j-1) w + k_j} for s <= j < t,  e^{-|t-j| w + k_j} for all others,
        and for s < j <= t, besides, (1 - e^w) e^{(t-j) w + k_j}

    where the formula of :func:`rwkvir_arch.bi_wkv` has e^{-(|t-j|-1) w + k_j} for all j != t. Both agree for w = 0,
    and for T <= token_split up to u + w in place of u. Elsewhere the difference grows like e^{w L}: an error of the
    kernels, not a variant worth training. Their 1e-6 in the denominator is here as well.

    Args:
        w: (C), decay per token, as the kernel is given it.
        u: (C), bonus of a token for itself, likewise.
        k: (B, T, C), or (B, H, W, C) for the tokens of an image in row-major order.
        v: like k.
        token_split: the kernel's TOKEN_SPLIT: 16 in Vision-RWKV, 32 in RWKV-IR, 64 in Restore-RWKV.

    Returns:
        y, with the shape of k, in float64. Differentiable: the gradients are those of this function; the kernels' own
        gradients are those of neither function.

    Raises:
        ValueError: token_split is below 1.
    """
    if token_split < 1:
        raise ValueError(f"published_wkv_reference: token_split is {token_split}; it must be at least 1")
    if k.dim() == 4:
        return published_wkv_reference(w, u, k.flatten(1, 2), v.flatten(1, 2), token_split).view_as(k)
    w, u, k, v = (x.double() for x in (w, u, k, v))
    T = k.shape[1]
    chunk = -(-T // token_split)
    t, j = torch.arange(T, device=k.device)[:, None, None], torch.arange(T, device=k.device)[:, None]
    start = t // chunk * chunk  # (T, 1, 1)
    inside, own = (start <= j) & (j < t), j == t  # (T, T, 1)
    spurious = (start < j) & (j <= t)
    score = k[:, None] + torch.where(own, u, -w * ((t - j).abs() - inside.long()))  # (B, T, T, C)
    backwards = k[:, None] + w * (t - j)

    # The scale at which the kernels add their epsilon: the largest term that they have met, cancelled ones included.
    met = torch.where(start <= j, backwards + w.clamp(min=0) * spurious, score)
    scale = torch.maximum(score, met).amax(dim=2, keepdim=True)  # (B, T, 1, C)
    weights = (score - scale).exp() - torch.where(spurious, w.expm1() * (backwards - scale).exp(), 0.0)
    return torch.einsum("btjc,bjc->btc", weights, v) / (weights.sum(dim=2) + EPSILON)
