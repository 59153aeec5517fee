"""The complexity metric: worked by hand, against its dense reference, and on BSD100."""

import math
from pathlib import Path

import numpy as np
import pytest

from rwkvir_data.complexity import complexity, complexity_reference, to_luma
from rwkvir_data.sources import decode, entries, read

BSD100 = Path(__file__).parents[2] / "shared" / "testsets" / "BSD100" / "HR"
SHAPES = [(1, 1), (1, 2), (2, 1), (1, 9), (9, 1), (2, 3), (3, 2), (3, 3), (4, 4), (5, 5), (6, 1), (17, 23), (40, 31)]


def term(m: int) -> float:
    """One cell's share of ENT, with m = n + 1."""
    return -m / 25 * math.log(m / 25)


def test_the_example_of_the_docstring_worked_by_hand():
    step = np.tile(np.array([0, 0, 255, 255], np.uint8), (4, 1))
    first = 61 * term(1) + term(6) + 2 * term(11)
    third = 61 * term(1) + 2 * term(6) + term(16)
    last = 62 * term(1) + term(11) + term(16)
    ene, diss = [15, 15, math.sqrt(275), math.sqrt(325)], [70, 70, 35, 70]
    ent = [first, first, third, last]
    wanted = np.mean([ent, ene, diss], axis=1)
    score, scores = complexity(step, map=True)
    np.testing.assert_allclose(score, [*wanted, wanted[0] - wanted[1] + wanted[2]], atol=1e-7)
    np.testing.assert_allclose(scores, np.tile(np.array(ent) - ene + diss, (4, 1)), atol=1e-5)
    assert (round(score.ent, 4), round(score.ene, 4), score.diss) == (8.8231, 16.1527, 61.25)
    assert f"the score is {score.score:.4f}" in complexity.__doc__


@pytest.mark.parametrize("value", [0, 31, 32, 255])
@pytest.mark.parametrize("orientation", ["horizontal", "mean"])
def test_a_constant_picture_scores_lowest(value, orientation):
    score = complexity(np.full((9, 7, 3), value, np.uint8), orientation)
    np.testing.assert_allclose(score, [8.07078, 25, 0, -16.9292], atol=5e-5)


@pytest.mark.parametrize("levels", [3, 256])
@pytest.mark.parametrize("orientation", ["horizontal", "mean"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_the_dense_reference(shape, orientation, levels):
    random = np.random.default_rng(sum(shape))
    picture = (random.integers(0, levels, (*shape, 3)) * 255 // (levels - 1)).astype(np.uint8)
    score, scores = complexity(picture, orientation, map=True)
    wanted, wanted_scores = complexity_reference(picture, orientation)
    np.testing.assert_allclose(score, wanted, atol=1e-6)
    np.testing.assert_allclose(scores, wanted_scores, atol=1e-5)
    assert scores.dtype == np.float32 and scores.shape == shape
    assert complexity(picture, orientation) == score


def test_every_count_from_1_to_25_is_exact():
    """Pictures from nearly constant to noise, so that windows of all counts occur."""
    random = np.random.default_rng(0)
    for share in (0.01, 0.05, 0.2, 0.5):
        picture = np.where(random.random((64, 64)) < share, random.integers(0, 256, (64, 64)), 100).astype(np.uint8)
        np.testing.assert_allclose(complexity(picture), complexity_reference(picture)[0], atol=1e-6)


def test_the_mean_over_orientations_does_not_depend_on_them():
    picture = np.random.default_rng(0).integers(0, 256, (12, 19), dtype=np.uint8)
    picture[:, ::3] = 0  # stripes, which horizontal pairs see and vertical ones do not
    variants = [np.rot90(turned, turn) for turned in (picture, picture.T) for turn in range(4)]
    mean = [complexity(variant, "mean").score for variant in variants]
    np.testing.assert_allclose(mean, mean[0], atol=1e-9)
    horizontal = [complexity(variant).score for variant in variants]
    assert max(horizontal) - min(horizontal) > 1
    np.testing.assert_allclose(mean[0], np.mean(horizontal), atol=1e-9)


def test_luma_is_the_float64_formula():
    random = np.random.default_rng(0)
    greys = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 256, 3)  # many sums are integers but for rounding
    for picture in (random.integers(0, 256, (300, 300, 3), dtype=np.uint8), greys):
        red, green, blue = np.moveaxis(picture.astype(np.float64), 2, 0)
        wanted = np.floor(0.299 * red + 0.587 * green + 0.114 * blue)
        np.testing.assert_array_equal(to_luma(picture), wanted)
        assert complexity(picture) == complexity(wanted.astype(np.uint8))


def test_views_are_scored_like_their_copies():
    picture = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    for view in (picture[::-1, ::-1, ::-1], picture[3:, 5:], picture.transpose(1, 0, 2), picture[:, :, 0]):
        assert complexity(view) == complexity(view.copy())


@pytest.mark.parametrize(
    "picture, orientation, message",
    [
        (np.zeros((4, 4, 3), np.float32), "mean", "not float32 of shape"),
        (np.zeros((4, 4, 4), np.uint8), "mean", r"\(4, 4, 4\)"),
        (np.zeros(4, np.uint8), "mean", r"\(4,\)"),
        (np.zeros((0, 4), np.uint8), "mean", r"\(0, 4\)"),
        (np.zeros((4, 4), np.uint8), "vertical", "'vertical'; write 'horizontal' or 'mean'"),
    ],
)
def test_what_it_cannot_score_is_named(picture, orientation, message):
    for function in (complexity, complexity_reference):
        with pytest.raises(ValueError, match=message):
            function(picture, orientation)


@pytest.mark.skipif(not BSD100.is_dir(), reason="BSD100 is not there")
def test_the_published_curve_of_bsd100():
    """Cut to even sides, as for bicubic x2. Whole, 63 lie below zero: one picture moves from -0.004 to 0.006."""
    pictures = [decode(read(str(BSD100), entry.name)) for entry in entries(str(BSD100))]
    scores = [complexity(picture[: len(picture) // 2 * 2, : picture.shape[1] // 2 * 2]).score for picture in pictures]
    assert len(scores) == 100
    assert (round(min(scores), 1), round(max(scores), 1), sum(score < 0 for score in scores)) == (-14.0, 17.4, 64)
