"""Published figures to compare with: PSNR in dB on Y, border of `scale` pixels cropped."""

from __future__ import annotations

from typing import NamedTuple

PAPER = "arXiv 2412.03814"
ELSEWHERE = "their own papers; trained to convergence"
LITERATURE = "the literature on super-resolution"
COLUMNS = ("Set5", "Set14", "BSD100", "Urban100", "Manga109", "ReSyn-test")


class Published(NamedTuple):
    """A row of a published table: PSNR by set, and where it stands; parameters and multiply-adds where given."""

    model: str
    task: str
    psnr: dict[str, float]
    where: str
    params: float | None = None
    macs: float | None = None


def _row(
    model: str, scale: int, psnr: str, where: str = PAPER, params: float | None = None, macs: float | None = None
) -> Published:
    """`psnr` holds a figure for each of COLUMNS in their order, or - where none is published."""
    figures = {name: float(figure) for name, figure in zip(COLUMNS, psnr.split(), strict=False) if figure != "-"}
    return Published(model, f"x{scale}", figures, where, params, macs)


_LIGHT = {2: (863e3, 198.5e9), 3: (873e3, 91.7e9), 4: (887e3, 51.6e9)}

PUBLISHED = (
    _row("bicubic", 2, "33.67 30.23 29.56", LITERATURE),
    _row("bicubic", 3, "30.40 27.54 27.21", LITERATURE),
    _row("bicubic", 4, "28.42 26.00 25.96 23.14 24.89"),
    _row("RWKV-IR light, 50 K, DIV2K", 2, "37.98 33.51 32.13 32.15 38.66 34.96", PAPER, *_LIGHT[2]),
    _row("RWKV-IR light, 50 K, ReSyn", 2, "37.79 33.36 32.09 31.98 38.65 35.11", PAPER, *_LIGHT[2]),
    _row("RWKV-IR light, 50 K, DIV2K", 3, "34.35 30.20 29.07 28.13 33.57 31.95", PAPER, *_LIGHT[3]),
    _row("RWKV-IR light, 50 K, ReSyn", 3, "34.29 30.14 29.06 28.15 33.46 32.05", PAPER, *_LIGHT[3]),
    _row("SwinIR-light, 50 K, DIV2K", 4, "31.97 28.47 27.48 25.76 30.06 30.11"),
    _row("SwinIR-light, 50 K, ReSyn", 4, "31.93 28.42 27.45 25.74 30.04 30.14"),
    _row("MambaIR-light, 50 K, DIV2K", 4, "32.12 28.51 27.51 25.94 30.27 30.22"),
    _row("MambaIR-light, 50 K, ReSyn", 4, "32.09 28.53 27.52 26.02 30.36 30.31"),
    _row("RWKV-IR light, 50 K, DIV2K", 4, "32.14 28.46 27.57 26.07 30.48 30.24", PAPER, *_LIGHT[4]),
    _row("RWKV-IR light, 50 K, ReSyn", 4, "32.16 28.45 27.56 26.13 30.47 30.34", PAPER, *_LIGHT[4]),
    _row("RWKV-IR light, 500 K", 4, "32.53 28.82 27.78 26.79 31.28", PAPER, *_LIGHT[4]),
    _row("SwinIR-light", 4, "32.44 - - 26.47", ELSEWHERE),
    _row("MambaIR-light, corrected", 4, "32.42 - - 26.52", ELSEWHERE),
    _row("MambaIRv2-light", 4, "32.51 - - 26.82", ELSEWHERE),
    _row("ATD-light", 4, "32.62 - - 26.97", ELSEWHERE),
    _row("BSRN", 4, "32.35 28.73 27.65", ELSEWHERE, 352e3),
    _row("ESC", 4, "32.68 - - 27.07", ELSEWHERE),
    _row("PFT-light", 4, "32.63 - - 27.20", ELSEWHERE),
    _row("RWKV-IR classic, 100 K, DF2K", 2, "38.38 34.42 32.46 33.59 39.80 35.44"),
    _row("RWKV-IR classic, 100 K, ReSyn", 2, "38.28 34.42 32.47 33.58 39.76 35.68"),
    _row("RWKV-IR classic, 100 K, DF2K", 4, "32.74 29.04 27.86 27.21 31.87 30.74"),
    _row("RWKV-IR classic, 100 K, ReSyn", 4, "32.66 29.02 27.86 27.24 31.81 30.83"),
    _row("RWKV-IR classic, 500 K", 4, "33.14 29.20 27.99 27.83 32.51"),
    _row("SwinIR", 4, "32.92 - - 27.45", ELSEWHERE),
    _row("MambaIR", 4, "33.03 - - 27.68", ELSEWHERE),
    _row("HAT", 4, "33.04 - - 27.97", ELSEWHERE),
    _row("ATD", 4, "33.10 - - 28.17", ELSEWHERE),
    _row("PFT", 4, "33.15 - - 28.20", ELSEWHERE),
)
