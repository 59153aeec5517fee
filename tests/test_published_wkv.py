"""The closed form of the published kernels against their recurrences, and where it is and is not Bi-WKV."""

from math import exp, inf

import pytest
import torch

from rwkvir_arch import bi_wkv_reference
from rwkvir_arch.published_wkv import published_wkv_reference


def published_recurrences(w, u, k, v, token_split):
    """One channel, token by token, as the kernels go: k and v are lists of floats.

    A state is (numerator, denominator, scale): sums of e^{score - scale} v and of e^{score - scale}.
    """

    def add(state, score, n, d):
        scale = max(state[2], score)
        old, new = exp(state[2] - scale), exp(score - scale)
        return old * state[0] + new * n, old * state[1] + new * d, scale

    T = len(k)
    chunk = -(-T // token_split)
    starts = range(0, T, chunk)
    nothing = (0.0, 0.0, -inf)

    # A chunk's tokens as the token behind it sees them, and as its own first token does: decayed by one step per token.
    behind, ahead = [], []
    for start in starts:
        tokens = range(start, min(start + chunk, T))
        left = right = nothing
        for i in tokens:
            left = add(left, k[i] - w * (tokens.stop - i), v[i], 1)
            right = add(right, k[i] - w * (i - start), v[i], 1)
        behind.append(left)
        ahead.append(right)

    y = []
    for index, start in enumerate(starts):
        left = right = nothing
        for other, (n, d, scale) in enumerate(behind[:index]):
            left = add(left, scale - w * chunk * (index - other - 1), n, d)
        for other, (n, d, scale) in enumerate(ahead[index:]):
            right = add(right, scale - w * chunk * other, n, d)
        right = add(right, k[start], -v[start], -1)
        for t in range(start, min(start + chunk, T)):
            own = u + k[t]
            scale = max(left[2], right[2], own)
            a, b, c = exp(left[2] - scale), exp(right[2] - scale), exp(own - scale)
            n = a * left[0] + b * right[0] + c * v[t]
            y.append(n / (a * left[1] + b * right[1] + c + 1e-6))
            left = add((*left[:2], left[2] - w), k[t], v[t], 1)
            if t + 1 < T:  # decay is undone after the next token has been taken away, not before
                right = add((*right[:2], right[2] + w), k[t + 1] + w, -v[t + 1], -1)
    return y


def example(T, C=6, decay=3.0, B=2):
    torch.manual_seed(0)
    w = torch.linspace(-decay, decay, C, dtype=torch.float64) / T
    return [w, *(torch.randn(shape, dtype=torch.float64) for shape in ((C,), (B, T, C), (B, T, C)))]


@pytest.mark.parametrize("token_split", [1, 2, 16, 32, 64])
@pytest.mark.parametrize("T", [1, 2, 31, 33, 49, 64, 100, 196])
def test_closed_form_is_what_the_recurrences_compute(T, token_split):
    w, u, k, v = example(T)
    y = published_wkv_reference(w, u, k, v, token_split)
    for b in range(len(k)):
        for c in range(len(w)):
            want = published_recurrences(
                w[c].item(), u[c].item(), k[b, :, c].tolist(), v[b, :, c].tolist(), token_split
            )
            assert y[b, :, c].tolist() == pytest.approx(want, rel=1e-9, abs=1e-9)


def test_without_decay_it_is_bi_wkv():
    w, u, k, v = example(100, decay=0)
    assert (published_wkv_reference(w, u, k, v) - bi_wkv_reference(w, u, k, v)).abs().max() < 1e-5


def test_with_a_token_a_chunk_it_is_bi_wkv_of_another_bonus():
    w, u, k, v = example(32)
    assert (published_wkv_reference(w, u, k, v, 32) - bi_wkv_reference(w, u + w, k, v)).abs().max() < 1e-5


def test_elsewhere_it_is_not_and_depends_on_the_split():
    w, u, k, v = example(256, decay=20)
    ys = [bi_wkv_reference(w, u, k, v), *(published_wkv_reference(w, u, k, v, split) for split in (16, 32, 64))]
    for first, second in ((0, 1), (0, 2), (0, 3), (1, 2), (2, 3)):
        assert (ys[first] - ys[second]).abs().max() > 1e-2 * ys[0].abs().max()


def test_gradients():
    w, u, k, v = example(7, C=3, B=1)
    inputs = [x.requires_grad_() for x in (w, u, k, v)]
    assert torch.autograd.gradcheck(lambda *inputs: published_wkv_reference(*inputs, token_split=2), inputs)


def test_images_are_scanned_by_rows_and_large_keys_are_finite():
    w, u, k, v = example(12)
    rows = published_wkv_reference(w, u, k.unflatten(1, (3, 4)), v.unflatten(1, (3, 4)))
    assert torch.equal(rows.flatten(1, 2), published_wkv_reference(w, u, k, v))
    assert published_wkv_reference(w, u, 1e4 * k, v).isfinite().all()


def test_a_bad_split_is_named():
    with pytest.raises(ValueError, match="token_split is 0; it must be at least 1"):
        published_wkv_reference(*example(4), token_split=0)
