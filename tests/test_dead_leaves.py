import subprocess
import sys

import cv2
import numpy as np
import pytest

from rwkvir_data import dead_leaves
from rwkvir_data.dead_leaves import _draw_radii


def test_shape_and_kind():
    picture = dead_leaves(1, 2, height=40, width=56)
    assert picture.shape == (40, 56, 3)
    assert picture.dtype == np.uint8


def test_the_same_numbers_give_the_same_picture_whatever_the_threads():
    picture = dead_leaves(3, 4, 64, 64)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        assert np.array_equal(dead_leaves(3, 4, 64, 64), picture)
    finally:
        cv2.setNumThreads(threads)


def test_the_same_numbers_give_the_same_picture_in_another_process():
    code = (
        "import sys; from rwkvir_data import dead_leaves; sys.stdout.buffer.write(dead_leaves(3, 4, 64, 64).tobytes())"
    )
    out = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout
    assert out == dead_leaves(3, 4, 64, 64).tobytes()


@pytest.mark.parametrize("other", [(3, 5), (4, 4)])
def test_other_numbers_give_another_picture(other):
    assert not np.array_equal(dead_leaves(3, 4, 64, 64), dead_leaves(*other, 64, 64))


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0])
def test_radii_follow_the_power_law(exponent):
    """At the median of drawn radii the exact cumulative distribution is a half, at the quartiles 1/4 and 3/4."""
    radii = _draw_radii(np.random.default_rng(0), exponent, 2.0, 64.0, area=1e7)
    assert radii.min() >= 2
    assert radii.max() <= 64
    grid = np.geomspace(2, 64, 100_001)
    density = grid**-exponent
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(grid))])
    for share in (0.25, 0.5, 0.75):
        expected = np.interp(share, cumulative / cumulative[-1], grid)
        assert np.quantile(radii, share) == pytest.approx(expected, rel=0.05)


def test_pictures_are_neither_flat_nor_saturated():
    picture = dead_leaves(0, 0, 128, 128).astype(float)
    assert picture.std() > 25
    assert np.mean((picture == 0) | (picture == 255)) < 0.5
    assert np.abs(np.diff(picture, axis=0)).mean() > 5


def test_edges_are_smoothed():
    """Rendered larger and averaged down, an edge has values between those of the leaves at its sides."""
    sharp, smooth = (dead_leaves(0, 0, 96, 96, r_min=12, supersample=n) for n in (1, 3))
    assert cv2.Laplacian(smooth, cv2.CV_64F).var() < 0.7 * cv2.Laplacian(sharp, cv2.CV_64F).var()


@pytest.mark.parametrize(("r_min", "r_max"), [(0, 10), (10, 10), (20, 10)])
def test_impossible_radii(r_min, r_max):
    with pytest.raises(ValueError, match=f"0 < r_min < r_max, got r_min={r_min} and r_max={r_max}; change"):
        dead_leaves(0, 0, r_min=r_min, r_max=r_max)
