"""Synthetic pictures by the dead-leaves model: opaque shapes of power-law size that fall on and hide one another.

Lee, Mumford, Huang, "Occlusion Models for Natural Images", IJCV 41 (2001): with radii of density r^-3 such pictures
have the scale-invariant statistics of natural images, edges at every scale. Here each leaf also has a texture.
"""

from __future__ import annotations

import cv2
import numpy as np

COVERAGE = 5.0  # area of all leaves over the picture's: e^-5 = 0.7 % of the pixels still show the ground
TEXTURE_SIDE = 1024  # side of the periodic noise textures, in rendered pixels
SHADING_PERIOD = 300  # of the slow wave that shades a leaf, in pixels of the result

# Corners (n, 2) of the two shapes, both of area about pi: a disc and a square.
_TURN = np.linspace(0, 2 * np.pi, 48, endpoint=False)
_DISC = np.stack([np.cos(_TURN), np.sin(_TURN)], axis=1)
_SQUARE = np.sqrt(np.pi) / 2 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])


def dead_leaves(
    seed: int,
    index: int,
    height: int = 512,
    width: int = 512,
    exponent: float = 3.0,
    r_min: float = 2.0,
    r_max: float = 160.0,
    supersample: int = 3,
) -> np.ndarray:
    """Picture number `index` of the series `seed`: the same arguments give the same picture, in any process.

    Args:
        exponent: radii have a density of r^-exponent between r_min and r_max, in pixels of the result.
        supersample: the picture is rendered this many times larger and averaged down, for smooth edges.

    Returns:
        (height, width, 3) uint8, RGB.

    Raises:
        ValueError: the radii do not satisfy 0 < r_min < r_max.
    """
    if not 0 < r_min < r_max:
        raise ValueError(f"dead leaves need 0 < r_min < r_max, got r_min={r_min} and r_max={r_max}; change either.")
    rng = np.random.default_rng([seed, index])
    # Leaves centred up to r_max outside reach into the picture, so that its border is like its middle.
    radii = _draw_radii(rng, exponent, r_min, r_max, area=(height + 2 * r_max) * (width + 2 * r_max))
    labels = _drop_leaves(rng, radii * supersample, height * supersample, width * supersample)
    picture = _paint(rng, labels, len(radii) + 1, supersample)
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


def _draw_radii(rng: np.random.Generator, exponent: float, r_min: float, r_max: float, area: float) -> np.ndarray:
    """Radii (n,) by inversion of their cumulative distribution, enough to cover `area` COVERAGE times."""
    power = 1 - exponent
    radii = np.empty(0)
    while np.pi * np.sum(radii**2) < COVERAGE * area:
        u = rng.random(4096)
        if power == 0:
            more = r_min * (r_max / r_min) ** u
        else:
            more = (r_min**power + u * (r_max**power - r_min**power)) ** (1 / power)
        radii = np.concatenate([radii, more])
    return radii


def _drop_leaves(rng: np.random.Generator, radii: np.ndarray, height: int, width: int) -> np.ndarray:
    """Drop discs, ellipses and rectangles of these radii, turned at random, one after the other.

    Returns (height, width) int32: the leaf on top of each pixel, i + 1 for leaf i and 0 for the ground.
    """
    n, margin, fraction_bits = len(radii), radii.max(), 4
    centres = rng.uniform(-margin, (width + margin, height + margin), (n, 2))
    angles = rng.uniform(0, np.pi, n)
    stretch = np.where(rng.random(n) < 0.4, 1, np.exp(rng.uniform(0, 0.6, n)))
    is_square = rng.random(n) < 0.4
    axes = radii[:, None] * np.stack([stretch, 1 / stretch], axis=1)
    turns = np.stack([np.cos(angles), np.sin(angles), -np.sin(angles), np.cos(angles)], axis=1).reshape(n, 2, 2)
    labels = np.zeros((height, width), np.int32)
    for i in range(n):
        points = ((_SQUARE if is_square[i] else _DISC) * axes[i]) @ turns[i] + centres[i]
        points = np.round(points * 2**fraction_bits).astype(np.int32)
        cv2.fillConvexPoly(labels, points, i + 1, cv2.LINE_8, fraction_bits)
    return labels


def _paint(rng: np.random.Generator, labels: np.ndarray, n: int, supersample: int) -> np.ndarray:
    """Give each of the labels 0..n-1 a colour and a texture: labels (H, W) int32 to (H, W, 3) uint8 RGB.

    A leaf's texture is a grey-level function of its own turned coordinates (a wave, sine or hard stripes, plus noise,
    plus slow shading) that moves each pixel's colour along a line in RGB.
    """
    palette = _palette(rng, 6)
    base = np.clip(palette[rng.integers(len(palette), size=n)] + rng.normal(0, 0.05, (n, 3)), 0.04, 0.96)
    direction = 1 + rng.normal(0, 0.35, (n, 3))
    textured = rng.random((3, n)) < np.array([[0.45], [0.7], [0.8]])
    wave, noise, shading = rng.gamma(2, np.array([[0.05], [0.04], [0.04]]), (3, n)) * textured
    frequency = 2 * np.pi / (supersample * np.exp(rng.uniform(np.log(3), np.log(40), n)))  # periods of 3..40 pixels
    sharpness = np.where(rng.random(n) < 0.5, 1, rng.uniform(2, 12, n))  # 1: a sine; above: stripes
    phase = rng.uniform(0, 2 * np.pi, n)
    angle = rng.uniform(0, 2 * np.pi, n)
    origin = rng.uniform(0, TEXTURE_SIDE, (2, n))
    textures = _noise_textures(rng)
    kind = rng.integers(len(textures), size=n)

    def each(parameter):  # leaf's parameter -> (H, W)
        return parameter.astype(np.float32)[labels]

    y, x = np.mgrid[: labels.shape[0], : labels.shape[1]].astype(np.float32)
    cos, sin = each(np.cos(angle)), each(np.sin(angle))
    u, v = cos * x + sin * y, cos * y - sin * x
    grey = each(wave) * np.clip(np.sin(each(frequency) * u + each(phase)) * each(sharpness), -1, 1)
    row, column = ((c + each(o)).astype(np.int32) % TEXTURE_SIDE for c, o in zip((v, u), origin, strict=True))
    grey += each(noise) * textures[kind[labels], row, column]
    grey += each(shading) * np.sin(2 * np.pi / (supersample * SHADING_PERIOD) * u + each(phase))
    picture = np.stack([each(base[:, c]) + grey * each(direction[:, c]) for c in range(3)], axis=2)
    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def _palette(rng: np.random.Generator, n: int) -> np.ndarray:
    """Base colours (n, 3) in [0, 1] RGB: any luma, mostly muted chroma."""
    luma = rng.uniform(0.08, 0.92, (n, 1))
    return luma + rng.normal(0, 0.08, (n, 3))


def _noise_textures(rng: np.random.Generator) -> np.ndarray:
    """Periodic noise of zero mean and unit deviation, (3, TEXTURE_SIDE, TEXTURE_SIDE): fine, coarse, grained."""
    fy, fx = np.fft.fftfreq(TEXTURE_SIDE)[:, None], np.fft.rfftfreq(TEXTURE_SIDE)[None]
    spectrum = np.fft.rfft2(rng.standard_normal((TEXTURE_SIDE, TEXTURE_SIDE)))
    radius2 = np.stack([fy**2 + fx**2, fy**2 + fx**2, fy**2 + 100 * fx**2])
    radius2[:, 0, 0] = np.inf
    slope = np.array([0.8, 1.2, 1.0]).reshape(3, 1, 1)
    fields = np.fft.irfft2(spectrum * radius2 ** (-slope / 2))
    return (fields / fields.std(axis=(1, 2), keepdims=True)).astype(np.float32)
