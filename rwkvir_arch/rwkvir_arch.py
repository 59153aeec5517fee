"""RWKV-IR (arXiv 2412.03814): image restoration in time and memory linear in the number of pixels.

Axis letters: B batch, H height, W width, T = H W tokens, C channels. Between the first and the last convolution the
features stay (B, H, W, C) in memory: tokens for the linear layers and the scans, and channels_last for the
convolutions, which see them through a permuted view.
"""

import math
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

from rwkvir_arch.bi_wkv import bi_wkv, cross_bi_wkv

SCANS = ("cross", "alternate", "sequential", "row")
SHIFTS = ("dc", "q", "none")
DC_NORMS = ("batch", "instance", "none")
DECAY_SCALES = ("tokens", "side")
UPSAMPLERS = ("pixelshuffle", "pixelshuffledirect", "nearest+conv", "")
RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K, as in SwinIR


def to_image(x: Tensor) -> Tensor:
    """(B, H, W, C) as (B, C, H, W) in channels_last memory; a view."""
    return x.permute(0, 3, 1, 2)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) as (B, H, W, C), contiguous; a view if x is in channels_last memory."""
    return x.permute(0, 2, 3, 1).contiguous()


class TokenConv2d(nn.Conv2d):
    """A convolution of (B, H, W, C) tokens, with the parameters of nn.Conv2d."""

    def forward(self, x: Tensor) -> Tensor:
        return to_tokens(super().forward(to_image(x)))  # (B, H, W, C_out)


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution, (B, C, H, W) -> (B, C_out, H, W), as a matrix product: faster if memory is channels_last."""

    def __init__(self, C: int, C_out: int) -> None:
        super().__init__(C, C_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return to_image(F.linear(to_tokens(x), self.weight.flatten(1), self.bias))


def dc_shift_norm(kind: str, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.InstanceNorm2d(channels, affine=True) if kind == "instance" else nn.Identity()


class DCShift(nn.Module):
    """Depthwise-convolutional token shift (the paper's DC-Shift): (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, C: int, ratio: float, norm: str) -> None:
        super().__init__()
        m = max(1, round(C * ratio))
        self.body = nn.Sequential(
            PointwiseConv2d(C, m),
            dc_shift_norm(norm, m),
            nn.GELU(),
            nn.Conv2d(m, m, 3, padding=1, groups=m, bias=False),
            nn.GELU(),
            PointwiseConv2d(m, C),
            dc_shift_norm(norm, C),
        )

    def forward(self, x: Tensor) -> Tensor:
        return to_tokens(self.body(to_image(x)))

    def can_fold(self) -> bool:
        """Neither folded already, nor normalised by the statistics of each picture."""
        return isinstance(self.body[-1], (nn.BatchNorm2d, nn.Identity))

    def fold(self) -> PointwiseConv2d:
        """Fold the normalisations into the convolutions, and take the last one, which is returned, out of the body."""
        first, norm, gelu, depthwise, _, last, last_norm = self.body
        self.body = nn.Sequential(with_norm(first, norm), gelu, depthwise, gelu)
        return with_norm(last, last_norm)


def with_norm(conv: Any, norm: nn.Module) -> PointwiseConv2d:
    """`conv`, and in eval mode what BatchNorm does after it, as one convolution."""
    return fuse_conv_bn_eval(conv, norm) if isinstance(norm, nn.BatchNorm2d) else conv


class QShift(nn.Module):
    """Quad-directional token shift of Vision-RWKV (arXiv 2403.02308, equation 2): (B, H, W, C) -> (B, H, W, C).

    Each quarter of the channels sees its neighbour to the left, to the right, above or below, zero outside the image.
    Vision-RWKV mixes it in with one weight per channel for each of r, k and v; here they share one, as they share d.
    """

    def __init__(self, C: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.full((C,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        left, right, up, down = x.tensor_split(4, dim=-1)
        shifted = torch.cat(
            (
                F.pad(left, (0, 0, 1, 0))[:, :, :-1],
                F.pad(right, (0, 0, 0, 1))[:, :, 1:],
                F.pad(up, (0, 0, 0, 0, 1, 0))[:, :-1],
                F.pad(down, (0, 0, 0, 0, 0, 1))[:, 1:],
            ),
            dim=-1,
        )
        return x + (1 - self.mix) * shifted


@dataclass(frozen=True)
class BlockOptions:
    """What all blocks of a network share; the names are those of RWKVIR's options."""

    num_feat: int
    groups: int
    hidden_ratio: float
    scan: str
    shift: str
    dc_norm: str
    dc_ratio: float
    decay_scale: str
    use_checkpoint: bool


class SpatialMix(nn.Module):
    """W_o(sigmoid(r) * WKV(k, v)), where r, k and v are linear in the shifted tokens: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, options: BlockOptions, group: int) -> None:
        super().__init__()
        C = options.num_feat
        self.scan, self.decay_scale = options.scan, options.decay_scale
        self.by_column = options.scan == "alternate" and group % 2 == 1
        self.shift: nn.Module = nn.Identity()
        if options.shift == "dc":
            self.shift = DCShift(C, options.dc_ratio, options.dc_norm)
        elif options.shift == "q":
            self.shift = QShift(C)
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)
        scans = 2 if options.scan in ("cross", "sequential") else 1
        c = torch.arange(C) / max(C - 1, 1)
        depth = group / max(options.groups - 1, 1)
        decay = -5 + 8 * c ** (0.7 + 1.3 * depth)
        bonus = math.log(0.3) + 0.5 * ((torch.arange(C) + 1) % 3 - 1)
        self.decay = nn.Parameter(decay.repeat(scans, 1))  # (S, C)
        self.bonus = nn.Parameter(bonus.repeat(scans, 1))  # (S, C)
        self.register_load_state_dict_pre_hook(refuse_other_form)

    def forward(self, x: Tensor) -> Tensor:
        d = self.shift(x)
        return self.output(self.gated_wkv(self.receptance(d), self.key(d), self.value(d)))

    def gated_wkv(self, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """sigmoid(r) * WKV(k, v), over the scans that the option `scan` names."""
        T = k.shape[1] * k.shape[2]
        if self.decay_scale == "tokens":
            w, u = self.decay / T, self.bonus / T
        else:
            w, u = F.softplus(self.decay) / math.sqrt(T), self.bonus
        if self.scan == "cross":
            return cross_bi_wkv(w, u, k, v, gate=r)
        if self.scan == "sequential":
            y = self.columns(w[1], u[1], k, bi_wkv(w[0], u[0], k, v))
        else:
            y = (self.columns if self.by_column else bi_wkv)(w[0], u[0], k, v)
        return r.sigmoid() * y

    @staticmethod
    def columns(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return bi_wkv(w, u, k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    def fuse(self) -> None:
        """Fold what is linear between the second GELU of the DC-Shift and r, k and v: see RWKVIR.fuse."""
        if not isinstance(self.shift, DCShift) or not self.shift.can_fold():
            return
        conv = self.shift.fold()
        weight = conv.weight.detach().flatten(1).double()  # (C, m)
        bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach().double()
        for linear in (self.receptance, self.key, self.value):
            matrix = linear.weight.detach().double()
            linear.in_features = weight.shape[1]
            linear.weight = nn.Parameter((matrix @ weight).to(linear.weight.dtype))  # (C, m)
            linear.bias = nn.Parameter((matrix @ bias).to(linear.weight.dtype))


def refuse_other_form(module: SpatialMix, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """A hook of load_state_dict: the weights of a fused network are those of another function."""
    fused = module.key.bias is not None
    if f"{prefix}key.bias" in state_dict and not fused:
        raise ValueError(
            "RWKVIR: these weights were saved after fuse(), and this network is not fused; call eval() and fuse() on "
            "it first, or load the weights that were saved before"
        )
    if f"{prefix}key.weight" in state_dict and f"{prefix}key.bias" not in state_dict and fused:
        raise ValueError("RWKVIR: this network is fused, and these weights are not; load them first, then call fuse()")


class SquaredReLU(torch.autograd.Function):
    """relu(x)^2; autograd's own gradient of it takes twice as many passes over the network's widest tensor."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        h = x.relu()
        ctx.save_for_backward(h)
        return h * h

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        return (g * h).mul_(2)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2, in place where no gradient is wanted."""
    return SquaredReLU.apply(x) if torch.is_grad_enabled() else x.relu_().square_()


class ChannelMix(nn.Module):
    """skip + sigmoid(W_r x) * W_v(relu(W_k x)^2): (B, H, W, C), (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, C: int, hidden_ratio: float) -> None:
        super().__init__()
        hidden = round(C * hidden_ratio)
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, hidden, bias=False)
        self.value = nn.Linear(hidden, C, bias=False)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        gate = self.receptance(x).sigmoid_()
        return torch.addcmul(skip, gate, self.value(squared_relu(self.key(x))))


class GLLB(nn.Module):
    """Global & local linear attention block: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, options: BlockOptions, group: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(options.num_feat)
        self.spatial = SpatialMix(options, group)
        self.norm2 = nn.LayerNorm(options.num_feat)
        self.channel = ChannelMix(options.num_feat, options.hidden_ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.spatial(self.norm1(x))
        return self.channel(self.norm2(x), x)


class GLLL(nn.Module):
    """A residual group of blocks, closed by a convolution: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, options: BlockOptions, group: int, depth: int) -> None:
        super().__init__()
        C = options.num_feat
        self.use_checkpoint = options.use_checkpoint
        self.blocks = nn.ModuleList(GLLB(options, group) for _ in range(depth))
        self.conv = TokenConv2d(C, C, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        z = x
        for block in self.blocks:
            if self.use_checkpoint and self.training and torch.is_grad_enabled():
                contexts = lambda block=block: (nullcontext(), frozen_statistics(block))  # noqa: E731
                z = checkpoint(block, z, use_reentrant=False, context_fn=contexts)
            else:
                z = block(z)
        return x + self.conv(z)


@contextmanager
def frozen_statistics(module: nn.Module):
    """Keeps the recomputation of a checkpointed block from counting its batch in the running statistics again."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.sub_(1)
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def upsample_by_pixelshuffle(C: int, C_out: int, upscale: int) -> nn.Sequential:
    """The tail of the classic network: (B, C, H, W) -> (B, C_out, H s, W s)."""
    steps = [3] if upscale == 3 else [2] * (upscale.bit_length() - 1)
    body: list[nn.Module] = [nn.Conv2d(C, 64, 3, padding=1), nn.LeakyReLU(0.01)]
    for step in steps:
        body += [nn.Conv2d(64, 64 * step * step, 3, padding=1), nn.PixelShuffle(step)]
    return nn.Sequential(*body, nn.Conv2d(64, C_out, 3, padding=1))


def upsample_by_nearest(C: int, C_out: int, upscale: int) -> nn.Sequential:
    """SwinIR's tail for real-world pictures, free of checkerboards: (B, C, H, W) -> (B, C_out, H s, W s)."""
    body: list[nn.Module] = [nn.Conv2d(C, 64, 3, padding=1), nn.LeakyReLU(0.01)]
    for _ in range(upscale.bit_length() - 1):
        body += [nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(64, 64, 3, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*body, nn.Conv2d(64, 64, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(64, C_out, 3, padding=1))


@ARCH_REGISTRY.register()
class RWKVIR(nn.Module):
    """RWKV-IR: (B, num_in_ch, H, W) in [0, 1] -> (B, num_out_ch, H * upscale, W * upscale). Any H and W.

    The defaults are the paper's light x4 network; classic is `num_feat=192, depths=[6] * 6, upsampler="pixelshuffle"`.

    Args:
        num_in_ch: channels of the input; 3 is RGB and 1 is grey.
        num_out_ch: channels of the output.
        num_feat: C, channels of the features.
        depths: number of blocks in each residual group.
        hidden_ratio: hidden channels of the channel mix, as a multiple of C.
        upscale: s; 1 for denoising and JPEG.
        upsampler: `pixelshuffle` (classic), `pixelshuffledirect` (light), `nearest+conv` (real-world pictures) or an
            empty string: no upsampling, the network adds a correction to its input.
        img_range: what the input, less its mean, is multiplied by.
        scan: `cross` (the sum of the row-major and the column-major scan, the paper's figure), `alternate` (rows in
            even groups, columns in odd ones, the released code), `sequential` (columns over the result of rows), `row`.
        shift: `dc` (the paper's DC-Shift), `q` (Vision-RWKV's Q-Shift) or `none`.
        dc_norm: normalisation in the DC-Shift: `batch` (the paper's figure), `instance` (the released code; ties each
            pixel to its crop) or `none`.
        dc_ratio: inner channels of the DC-Shift, as a multiple of C.
        decay_scale: what the raw decay w and bonus u become. `tokens`: w / T and u / T, as the paper's network has it.
            `side`: softplus(w) / sqrt(T) and u, so that reach grows with the image's side (ours; no published result).
        use_checkpoint: recompute each block's activations in the backward pass: less memory, about a third more time.

    Raises:
        ValueError: an option outside the listed ones, or an input with other channels.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        num_feat: int = 48,
        depths: Sequence[int] = (6, 6, 6, 6),
        hidden_ratio: float = 3,
        upscale: int = 4,
        upsampler: str = "pixelshuffledirect",
        img_range: float = 1.0,
        scan: str = "cross",
        shift: str = "dc",
        dc_norm: str = "batch",
        dc_ratio: float = 1.0,
        decay_scale: str = "tokens",
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        one_of("scan", scan, SCANS)
        one_of("shift", shift, SHIFTS)
        one_of("dc_norm", dc_norm, DC_NORMS)
        one_of("decay_scale", decay_scale, DECAY_SCALES)
        one_of("upsampler", upsampler, UPSAMPLERS)
        check_upscale(upsampler, upscale, num_in_ch, num_out_ch)
        C = num_feat
        self.num_in_ch, self.img_range, self.upsampler = num_in_ch, img_range, upsampler
        self.mean_in: Tensor
        self.mean_out: Tensor
        self.register_buffer("mean_in", channel_mean(num_in_ch), persistent=False)
        self.register_buffer("mean_out", channel_mean(num_out_ch), persistent=False)

        options = BlockOptions(
            num_feat, len(depths), hidden_ratio, scan, shift, dc_norm, dc_ratio, decay_scale, use_checkpoint
        )
        self.conv_first = nn.Conv2d(num_in_ch, C, 3, padding=1)
        self.norm_first = nn.LayerNorm(C)
        self.layers = nn.ModuleList(GLLL(options, group, depth) for group, depth in enumerate(depths))
        self.norm_last = nn.LayerNorm(C)
        self.conv_last = TokenConv2d(C, C, 3, padding=1)
        if upsampler == "pixelshuffle":
            self.tail = upsample_by_pixelshuffle(C, num_out_ch, upscale)
        elif upsampler == "pixelshuffledirect":
            self.tail = nn.Sequential(nn.Conv2d(C, num_out_ch * upscale**2, 3, padding=1), nn.PixelShuffle(upscale))
        elif upsampler == "nearest+conv":
            self.tail = upsample_by_nearest(C, num_out_ch, upscale)
        else:
            self.tail = nn.Sequential(nn.Conv2d(C, num_out_ch, 3, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.num_in_ch:
            raise ValueError(
                f"RWKVIR takes pictures of {self.num_in_ch} channels, (B, {self.num_in_ch}, H, W), got {tuple(x.shape)}"
                "; set num_in_ch (and num_out_ch) in network_g to what the dataset gives: 3 for RGB, 1 for grey"
            )
        x = ((x - self.mean_in) * self.img_range).contiguous(memory_format=torch.channels_last)
        f = to_tokens(self.conv_first(x))  # (B, H, W, C)
        z = self.norm_first(f)
        for layer in self.layers:
            z = layer(z)
        f = self.conv_last(self.norm_last(z)) + f
        y = self.tail(to_image(f))  # (B, C_out, H s, W s)
        if not self.upsampler:
            y = x + y
        return y / self.img_range + self.mean_out

    def fuse(self) -> "RWKVIR":
        """For inference: fold BatchNorm into the convolutions beside it, and these into the linear layers that follow.

        In place, once, and exactly but for rounding. Networks with `shift` other than `dc` or `dc_norm: instance` have
        nothing to fold and stay as they are. The state dict of a fused network has other entries: it loads into a fused
        network only, and load_state_dict of the other kind says so.

        Returns:
            the network itself.

        Raises:
            ValueError: the network is in training mode, in which BatchNorm is not a constant.
        """
        if self.training:
            raise ValueError("RWKVIR.fuse folds BatchNorm's running statistics; call eval() on the network first")
        for module in self.modules():
            if isinstance(module, SpatialMix):
                module.fuse()
        return self


def channel_mean(channels: int) -> Tensor:
    mean = RGB_MEAN if channels == 3 else (0.0,) * channels
    return torch.tensor(mean).view(1, channels, 1, 1)


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"RWKVIR: {name} is {value!r}; it must be one of {', '.join(map(repr, known))}")


def check_upscale(upsampler: str, upscale: int, num_in_ch: int, num_out_ch: int) -> None:
    power_of_two = upscale >= 1 and upscale & (upscale - 1) == 0
    if upsampler == "" and (upscale != 1 or num_in_ch != num_out_ch):
        raise ValueError(
            f"RWKVIR: without an upsampler, upscale must be 1 and num_out_ch must be num_in_ch, got upscale {upscale}, "
            f"num_in_ch {num_in_ch}, num_out_ch {num_out_ch}; name an upsampler to enlarge"
        )
    if upsampler == "pixelshuffle" and not (power_of_two or upscale == 3):
        raise ValueError(f"RWKVIR: upsampler 'pixelshuffle' enlarges by 3 or a power of two, got upscale {upscale}")
    if upsampler == "nearest+conv" and not power_of_two:
        raise ValueError(f"RWKVIR: upsampler 'nearest+conv' enlarges by a power of two, got upscale {upscale}")
