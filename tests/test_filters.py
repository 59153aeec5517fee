"""Blur, flatness and bits per pixel, against their definitions in numpy."""

import cv2
import numpy as np
import pytest

from rwkvir_data.filters import bits_per_pixel, flatness, laplacian_variance


def noise(height: int, width: int, strength: float = 60.0) -> np.ndarray:
    return np.random.default_rng(0).normal(128, strength, (height, width)).clip(0, 255).astype(np.uint8)


def mirrored(luma: np.ndarray) -> np.ndarray:
    return np.pad(luma.astype(np.float64), 1, mode="reflect")


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 2), (30, 41)])
def test_the_laplacian_is_the_definition(shape):
    luma = noise(*shape)
    p = mirrored(luma)
    laplacian = p[:-2, 1:-1] + p[2:, 1:-1] + p[1:-1, :-2] + p[1:-1, 2:] - 4 * p[1:-1, 1:-1]
    assert laplacian_variance(luma) == pytest.approx(laplacian.var(), rel=1e-9, abs=1e-9)


def test_blur_lowers_and_noise_raises_the_variance():
    sharp = np.kron(noise(20, 20), np.ones((6, 6), np.uint8))
    blurred = cv2.GaussianBlur(sharp, (0, 0), 3)
    assert laplacian_variance(blurred) < 150 < laplacian_variance(sharp) < laplacian_variance(noise(120, 120))
    assert laplacian_variance(np.full((9, 9), 7, np.uint8)) == 0


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (10, 10), (23, 31)])
@pytest.mark.parametrize("flat", [400.0, 4000.0, 8000.0])
def test_flatness_is_the_definition(shape, flat):
    luma = noise(*shape)
    p = mirrored(luma)
    across = p[:-2] + 2 * p[1:-1] + p[2:]
    down = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]
    magnitude = np.hypot(across[:, 2:] - across[:, :-2], down[2:] - down[:-2])
    height, width = (min(10, side) for side in shape)
    grid = magnitude[: shape[0] // height * height, : shape[1] // width * width]
    variances = grid.reshape(grid.shape[0] // height, height, -1, width).var(axis=(1, 3))
    assert flatness(luma, patch=10, flat=flat) == pytest.approx(np.mean(variances < flat))


def test_flatness_of_half_a_picture():
    luma = np.full((480, 960), 90, np.uint8)
    assert flatness(luma) == 1
    luma[:, :480] = noise(480, 480)
    assert flatness(luma) == 0.5
    assert flatness(noise(300, 500)) == 0


def test_bits_per_pixel():
    assert bits_per_pixel(300, 10, 20) == 12
