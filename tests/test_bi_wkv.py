"""The operator against the reference: tolerances, edge lengths, strides, dtypes, extreme values, torch's own checks."""

import itertools
import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvir_arch import bi_wkv, bi_wkv_reference, cross_bi_wkv, cross_bi_wkv_reference
from rwkvir_arch.bi_wkv import build_info

# Largest error, as a share of the largest reference value. The 16-bit rows hold one rounding of the output.
FORWARD = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
BACKWARD = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
EDGE_LENGTHS = [1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200]
LONG = [4095, 4096, 4097, 65537]
# Around the edges of tiles of 32 x 32 pixels, and of images so narrow (16) that several rows are walked as one.
IMAGES = [(1, 1, 1, 3), (2, 1, 70, 16), (2, 70, 1, 16), (1, 67, 3, 3), (1, 3, 67, 3), (2, 7, 7, 20), (1, 16, 17, 2)]
IMAGES += [(1, 17, 16, 2), (1, 33, 16, 2), (1, 13, 21, 20), (1, 32, 33, 1), (1, 34, 31, 2)]


@pytest.fixture(
    autouse=True,
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))],
)
def device(request):
    """Every test of this file runs on each device there is: tensors are made on it unless they say otherwise."""
    if request.param == "cuda" and build_info()["cuda"] is None:
        pytest.fail("there is a GPU, and the operator was built for the CPU only; set CUDA_HOME and build it again")
    torch.set_default_device(request.param)
    yield request.param
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def poison_uninitialised_memory(device):
    """torch.empty comes back full of NaN, so that an output nobody wrote shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def example(*shape, dtype=torch.float32, decay=3.0, key=1.0):
    """w, u, k, v; (B, T, C) for one scan, (B, H, W, C) for two. Decays reach +-`decay` over all tokens."""
    scans = (2,) if len(shape) == 4 else ()
    C, T = shape[-1], max(1, math.prod(shape[1:-1]))
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    w = torch.empty(*scans, C, dtype=parameters).uniform_(-abs(decay), abs(decay)) / T
    u = torch.randn(*scans, C, dtype=parameters)
    k, v = (torch.randn(shape, dtype=parameters).mul(scale).to(dtype) for scale in (key, 1.0))
    return [w, u, k, v]


def gradients(function, inputs, gy):
    inputs = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, gy.to(y.dtype))]


def assert_matches_reference(inputs, gy=None, dtype=None):
    """Checks y and all gradients; a fifth input is the gate.

    A gradient may be the small difference of large terms; it is then given the rounding of those terms: 1e-6 of them in
    float32 (measured: 3e-7 at most), beside the table's share of the gradient itself.
    """
    cross = inputs[0].dim() == 2
    function, reference = (cross_bi_wkv, cross_bi_wkv_reference) if cross else (bi_wkv, bi_wkv_reference)
    dtype = dtype or inputs[2].dtype
    gy = torch.randn(inputs[2].shape) if gy is None else gy
    gy = gy.to(inputs[2].dtype)
    ours = gradients(function, inputs, gy)
    doubles = [x.double() for x in inputs]
    theirs = gradients(reference, doubles, gy.double())
    absolute = gradients(reference, [*doubles[:3], doubles[3].abs(), *doubles[4:]], gy.double().abs())
    terms_k = (absolute[4] * doubles[3].abs()).max().item()
    T = inputs[2][0, ..., 0].numel()
    terms_u = (gy.double().abs() * (doubles[3].abs().amax())).sum(dim=tuple(range(gy.dim() - 1))).max().item()
    rounding = 1e-6 * FORWARD[dtype] / FORWARD[torch.float32]
    assert ours[0].dtype == inputs[2].dtype and ours[0].shape == inputs[2].shape
    for name, got, want, terms in zip(
        ("y", "gw", "gu", "gk", "gv", "ggate")[: len(ours)],
        ours,
        theirs,
        (0, terms_u * T, terms_u, terms_k, 0, 0)[: len(ours)],
        strict=True,
    ):
        tolerance = (FORWARD if name == "y" else BACKWARD)[dtype]
        if name in ("gw", "gu"):  # summed and returned in float32 also for 16-bit k and v
            tolerance = max(BACKWARD[torch.float32], tolerance) if dtype != torch.float64 else 1e-9
        assert got.isfinite().all(), name
        error, size = (got.double() - want).abs().max().item(), want.abs().max().item()
        assert error <= tolerance * size + rounding * terms, f"{name}: off by {error:.2e}, largest value {size:.2e}"


@pytest.mark.parametrize("T", EDGE_LENGTHS)
@pytest.mark.parametrize("C", [1, 15, 16, 17, 48])
def test_edge_lengths(T, C):
    assert_matches_reference(example(2, T, C))


@pytest.mark.parametrize("T", LONG)
def test_long(T):
    """Against the same recurrence in float64, which other tests hold to the reference."""
    inputs, gy = example(1, T, 2), torch.randn(1, T, 2)
    doubles = gradients(bi_wkv, [x.double() for x in inputs], gy)
    for i, (got, want) in enumerate(zip(gradients(bi_wkv, inputs, gy), doubles, strict=True)):
        assert (got.double() - want).abs().max() <= (2e-5 if i or T > 4097 else 2e-6) * want.abs().max()


def test_every_number_of_channels():
    """Each channel is computed as if it were alone, whatever vector it falls into."""
    for T in (1, 70):
        inputs, gy = example(1, T, 300), torch.randn(1, T, 300)
        whole = gradients(bi_wkv, inputs, gy)
        for C in range(1, 300):
            some = gradients(bi_wkv, [x[..., :C].contiguous() for x in inputs], gy[..., :C])
            for got, want in zip(some, whole, strict=True):
                assert torch.allclose(got, want[..., :C], rtol=1e-5, atol=1e-5), C


@pytest.mark.parametrize("shape", IMAGES)
def test_cross_is_the_sum_of_both_orders(shape):
    assert_matches_reference(example(*shape))


def stripes(shape, axis, low):
    """Keys that fall by `low` in bands along an axis: a tile's scale does not fit all of its rows or columns."""
    w, u, k, v = example(*shape)
    bands = (torch.arange(shape[axis]) // 5 % 2 == 1).view([-1 if i == axis else 1 for i in range(4)])
    return [w * 20, u, torch.where(bands, k + low, k), v]


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("low", [-20.0, -35.0, -100.0, -3000.0, -torch.inf])
def test_rows_and_columns_far_below_the_rest(axis, low):
    w, u, k, v = inputs = stripes((1, 34, 35, 2), axis, low)
    gate, gy = torch.randn_like(k), torch.randn_like(k)
    if low > -torch.inf:
        return assert_matches_reference([*inputs, gate], gy)
    expected = cross_bi_wkv_reference(w, u, k, v, gate)
    assert torch.allclose(cross_bi_wkv(w, u, k, v, gate).double(), expected, rtol=0, atol=2e-6)
    assert all(x.isfinite().all() for x in gradients(cross_bi_wkv, [*inputs, gate], gy))


@pytest.mark.parametrize(
    "change", [(2, 1e3), (2, 1e6), (3, 1e30), (3, 1e-30), (0, 1e4), (0, -1e4), (1, 1e4), (1, -1e4)]
)
def test_extremes_of_the_cross_scan(change):
    inputs = [*example(1, 33, 20, 3), torch.randn(1, 33, 20, 3)]
    index, size = change
    inputs[index] = torch.rand(2, 3) * size / 660 if index == 0 else inputs[index] * size
    assert_matches_reference(inputs)


def test_nan_of_the_cross_scan_stays_in_its_channel_and_batch():
    w, u, k, v = example(2, 33, 20, 20)
    gate = torch.randn_like(k)
    clean = cross_bi_wkv(w, u, k, v, gate)
    k[0, 7, 7, 3] = v[1, 30, 19, 5] = gate[1, 2, 3, 4] = torch.nan
    y = cross_bi_wkv(w, u, k, v, gate)
    spoilt = torch.zeros_like(y, dtype=torch.bool)
    spoilt[0, ..., 3] = spoilt[1, ..., 5] = spoilt[1, 2, 3, 4] = True
    assert y[spoilt].isnan().all()
    assert torch.allclose(y[~spoilt], clean[~spoilt], rtol=0, atol=4e-6)


@pytest.mark.parametrize("dtype", FORWARD)
@pytest.mark.parametrize("value", [0.5, -4.0, 0.7, 1e-3, 3e4])
def test_constant_values_come_through(value, dtype, device):
    """Exactly, also beyond what float will do for; on CUDA e^k v and its sums are rounded."""
    for key in (10.0, 1e4):
        w, u, k, _ = example(1, 33, 20, 3, key=key, dtype=dtype)
        v = torch.full_like(k, value)
        exact = torch.equal if device == "cpu" else partial(torch.allclose, rtol=2e-6, atol=0)
        assert exact(cross_bi_wkv(w, u, k, v), 2 * v)
        assert exact(bi_wkv(w[0], u[0], k, v), v)


@pytest.mark.parametrize("offset", [10.0, 1e4])
def test_what_all_values_have_in_common_costs_no_digits(offset, device):
    if device == "cuda":
        pytest.skip("only the CPU kernels subtract it")
    w, u, k, v = example(2, 33, 20, 3)
    v = v + offset
    inputs, gate, gy = [w, u, k, v], torch.randn_like(k), torch.randn_like(k)
    ours = gradients(cross_bi_wkv, [*inputs, gate], gy)
    theirs = gradients(cross_bi_wkv_reference, [x.double() for x in (*inputs, gate)], gy.double())
    for i, (got, want) in enumerate(zip(ours, theirs, strict=True)):
        assert (got.double() - want).abs().max() <= (2e-6 if i == 0 else 2e-5) * want.abs().max(), i


def test_what_only_some_values_have_in_common_costs_the_others_no_digits():
    T = 4096
    v = torch.where(torch.arange(T) < 2600, 1e4 + torch.randn(T), 1e-3 * torch.randn(T)).view(1, T, 1)
    w, u, k = torch.tensor([0.1]), torch.zeros(1), torch.randn(1, T, 1)
    y, expected = (bi_wkv(w, u, k.to(x.dtype), x)[0, 3000:, 0].double() for x in (v, v.double()))
    assert (y - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_a_sum_beyond_float_is_still_gated():
    w, u, k, _ = example(1, 9, 17, 3)
    v, gate = torch.full_like(k, 2e38), torch.full_like(k, -3.0)
    assert torch.allclose(cross_bi_wkv(w, u, k, v, gate), torch.tensor(4e38 / (1 + math.e**3)), rtol=1e-6)


def test_values_behind_masks_are_not_what_others_have_in_common():
    w, u, k, v = example(2, 33, 20, 3)
    k[:, 1:] = -torch.inf
    v[:, 1:] = 1e30
    assert torch.allclose(
        cross_bi_wkv(w, u, k, v)[:, 0].double(), cross_bi_wkv_reference(w, u, k, v)[:, 0], rtol=0, atol=4e-6
    )


# Results that are written around the cache (whole lines, more than csrc's kLarge bytes) or asked for early.
LARGE = [(1, 66, 64, 48), (1, 67, 65, 60), (1, 4099, 48), (1, 2500, 60), (1, 9000, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", LARGE)
def test_large_results(shape, dtype):
    assert_matches_doubles(shape, dtype)


def assert_matches_doubles(shape, dtype):
    """Against float64, in memory as it comes and with channels first."""
    cross = len(shape) == 4
    inputs, gy = example(*shape, dtype=dtype), torch.randn(shape).to(dtype)
    inputs += [torch.randn(shape).to(dtype)] * cross
    function = cross_bi_wkv if cross else bi_wkv
    want = gradients(function, [x.double() for x in inputs], gy.double())
    strided = [x.movedim(-1, 1).contiguous().movedim(1, -1) if x.dim() == len(shape) else x for x in inputs]
    for given_inputs in (inputs, strided):
        for i, (got, expected) in enumerate(zip(gradients(function, given_inputs, gy), want, strict=True)):
            tolerance = (BACKWARD if i else FORWARD)[torch.float32 if got.dtype == torch.float32 else dtype]
            error = (got.double() - expected).abs().max()
            assert error <= tolerance * expected.abs().max(), f"{shape}, result {i}: off by {error}"


@pytest.mark.parametrize("dtype", FORWARD)
@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 7, 40, 3), (1, 40, 3, 18)])
def test_gate(shape, dtype):
    inputs = example(*shape, dtype=dtype)
    gate = torch.randn(shape, dtype=inputs[0].dtype).mul(10).to(dtype)
    assert_matches_reference([*inputs, gate])
    assert_matches_reference([*inputs, gate.transpose(1, 2).contiguous().transpose(1, 2)])
    inputs[2][..., :2] *= 1e4  # beyond what float will do for
    assert_matches_reference([*inputs, gate])


@pytest.mark.parametrize("dtype", FORWARD)
@pytest.mark.parametrize("shape", [(2, 150, 20), (1, 9, 17, 20)])
def test_dtypes(dtype, shape):
    assert_matches_reference(example(*shape, dtype=dtype))


@pytest.mark.parametrize("T", [64, 1000, 4096])
def test_decay_over_the_image(T):
    _, u, k, v = example(1, T, 4, key=8.0)
    w = torch.tensor([-5.0, 0.5, 20.0, 100.0]) / T
    assert_matches_reference([w, u, k.clamp(-30, 30), v])


def test_a_quarter_of_a_million_tokens():
    """The longest T that has a tolerance of its own, 2e-5, against the same recurrence in float64."""
    w, u, k, v = example(1, 262144, 4)
    inputs = [w.abs() + 50 / 262144, u, k, v]
    want = bi_wkv(*(x.double() for x in inputs))
    assert (bi_wkv(*inputs).double() - want).abs().max() <= 2e-5 * want.abs().max()
    short = [x[:, :300] if x.dim() == 3 else x for x in inputs]
    assert torch.allclose(bi_wkv(*(x.double() for x in short)), bi_wkv_reference(*short), rtol=0, atol=1e-12)


@pytest.mark.parametrize("key", [1e3, 1e6, 1e10])
def test_large_keys(key):
    assert_matches_reference(example(1, 150, 20, key=key))


@pytest.mark.parametrize("total_decay", [-1e4, -1e3, 1e3, 1e4])
def test_large_decays(total_decay):
    _, u, k, v = example(1, 150, 20)
    assert_matches_reference([torch.rand(20) * total_decay / 150, u, k, v])


@pytest.mark.parametrize("bonus", [-1e4, -30.0, 30.0, 1e4])
def test_large_bonus(bonus):
    w, _, k, v = example(1, 150, 20)
    assert_matches_reference([w, torch.full((20,), bonus), k, v])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_values_and_gradients_of_any_size(scale):
    w, u, k, v = example(1, 150, 20)
    assert_matches_reference([w, u, k, v * scale])
    assert_matches_reference([w, u, k, v], gy=torch.randn(1, 150, 20) * scale)


@pytest.mark.parametrize("scale", [1e-34, 1e8, 1e28, 1e30])
def test_gradients_of_any_size_with_decays_at_the_limit(scale):
    _, u, k, v = example(2, 64, 20)
    gy = torch.randn(2, 64, 20)
    for decay, bonus in ((-0.3, 0.0), (0.085, 15.2)):
        inputs = [torch.full((20,), decay), u + bonus, k, v]
        ours = gradients(bi_wkv, inputs, gy * scale)
        theirs = gradients(bi_wkv, [x.double() for x in inputs], (gy * scale).double())
        for got, want in zip(ours, theirs, strict=True):
            assert (got.double() - want).abs().max() <= 2e-5 * want.abs().max()


def limits_of_float():
    """w, u, k, v and gy up to where csrc/bi_wkv.h gives them to the float kernels, and beyond."""
    for size, grown, decay, bonus, slope in itertools.product(
        (2e-12, 1e-12, 1.0, 1e6, 7e11), (1e-18, 1e6, 7e11), (-0.31, 0.31), (-20.0, 20.0), (-1.0, 0.0, 0.3)
    ):
        _, _, k, v = example(1, 130, 3)
        w, u = torch.full((3,), decay), torch.full((3,), bonus)
        k = k + slope * torch.arange(130)[:, None]
        yield [w, u, k, v.clamp(-1, 1) * size], torch.randn(1, 130, 3).clamp(-1, 1) * grown


def large_values_in_the_neighbouring_chunk():
    _, u, k, v = example(1, 128, 3)
    v[:, :64] *= 1e30
    k[:, 64:127] -= 20
    k[:, 127] = 31
    return [torch.full((3,), 0.31), u, k, v]


def test_the_limits_of_float():
    for inputs, gy in limits_of_float():
        assert_matches_reference(inputs, gy=gy)
    assert_matches_reference(large_values_in_the_neighbouring_chunk())


@pytest.mark.parametrize("slope", [-400.0, 400.0])
def test_ramps(slope):
    w, u, k, v = example(1, 150, 20)
    assert_matches_reference([w, u, k + torch.linspace(0, slope, 150)[:, None], v])


def test_spikes():
    w, u, k, v = example(1, 200, 20)
    k[:, 70], k[:, 150] = 80, -1000
    assert_matches_reference([w, u, k, v])


def largest_finite_numbers():
    largest = torch.finfo(torch.float32).max
    for sign in (-1, 1):
        w, u, k, v = example(1, 150, 20)
        k[:, ::7], v[:, ::5] = sign * largest, largest / 2
        yield w, u, k, v
        yield w + sign * largest / 2, u, k, v


def test_the_largest_finite_numbers_stay_finite():
    assert all(bi_wkv(*inputs).isfinite().all() for inputs in largest_finite_numbers())


def test_keys_of_minus_infinity_are_masks():
    w, u, k, v = example(1, 130, 20)
    k[:, 40:125] = -torch.inf
    v[:, 60] = torch.nan
    masked = v.masked_fill(k == -torch.inf, 0)
    assert torch.allclose(bi_wkv(w, u, k, v).double(), bi_wkv_reference(w, u, k, masked), rtol=0, atol=2e-6)


def test_nan_stays_in_its_channel_and_batch():
    w, u, k, v = example(2, 130, 20)
    k[0, 7, 3] = v[1, 80, 5] = torch.nan
    y = bi_wkv(w, u, k, v).isnan()
    assert y[0, :, 3].all() and y[1, :, 5].all() and y.sum() == 2 * 130


def test_any_strides():
    w, u, _, _ = example(2, 13, 21, 20)
    _, _, k, v = example(2, 20, 21, 13)
    channels_first = [x.permute(0, 3, 2, 1) for x in (k, v)]
    expanded = [torch.randn(1, 13, 1, 20).expand(2, 13, 21, 20), torch.randn(20).expand(2, 13, 21, 20)]
    sliced = [torch.randn(2, 26, 21, 40)[:, ::2, :, 1::2], torch.randn(2, 13, 63, 20)[:, :, ::3]]
    for k, v in (channels_first, expanded, sliced):
        assert_matches_reference([w, u, k, v])
        y = cross_bi_wkv(w, u, k, v)
        assert torch.equal(y, cross_bi_wkv(w, u, k.contiguous(), v.contiguous()))


def test_transposing_the_image_exchanges_the_scans():
    w, u, k, v = example(2, 13, 21, 20)
    transposed = cross_bi_wkv(w.flip(0), u.flip(0), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    assert torch.allclose(cross_bi_wkv(w, u, k, v), transposed, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0), (1, 0, 4, 3)])
def test_empty(shape):
    inputs = [x.requires_grad_() for x in example(*shape)]
    y = (cross_bi_wkv if len(shape) == 4 else bi_wkv)(*inputs)
    assert y.shape == shape
    y.sum().backward()
    assert all(x.grad.shape == x.shape and not x.grad.any() for x in inputs)


@settings(max_examples=30, deadline=None)
@given(T=st.integers(1, 200), C=st.integers(1, 40), seed=st.integers(0, 2**31), shift=st.floats(-1e3, 1e3))
def test_symmetries(T, C, seed, shift):
    torch.manual_seed(seed)
    w, u, k, v = example(1, T, C)
    y = bi_wkv(w, u, k, v)
    tolerance = 4e-6 * max(1.0, v.abs().max().item())
    assert torch.allclose(y, bi_wkv(w, u, k.flip(1), v.flip(1)).flip(1), rtol=0, atol=tolerance)
    order = torch.randperm(C)
    assert torch.allclose(
        y[..., order], bi_wkv(w[order], u[order], k[..., order], v[..., order]), rtol=0, atol=tolerance
    )
    shifted = (k.double() + shift, v.double())
    assert torch.allclose(y.double(), bi_wkv(w.double(), u.double(), *shifted), rtol=0, atol=tolerance)
    assert (y.amax(1) <= v.amax(1) + tolerance).all() and (y.amin(1) >= v.amin(1) - tolerance).all()


@settings(max_examples=30, deadline=None)
@given(H=st.integers(1, 70), W=st.integers(1, 70), C=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_symmetries_of_the_cross_scan(H, W, C, seed):
    torch.manual_seed(seed)
    w, u, k, v = example(1, H, W, C)
    gate = torch.randn_like(k)
    y = cross_bi_wkv(w, u, k, v, gate)

    def assert_same(other):
        assert torch.allclose(y, other, rtol=0, atol=8e-6 * max(1.0, v.abs().max().item()))

    assert_same(cross_bi_wkv(w, u, *(x.flip(1, 2) for x in (k, v, gate))).flip(1, 2))
    assert_same(cross_bi_wkv(w.flip(0), u.flip(0), *(x.transpose(1, 2) for x in (k, v, gate))).transpose(1, 2))
    scans = bi_wkv(w[0], u[0], k, v), bi_wkv(w[1], u[1], *(x.transpose(1, 2) for x in (k, v))).transpose(1, 2)
    assert_same(gate.sigmoid() * sum(scans))


@pytest.mark.parametrize(
    "function, shape", [(bi_wkv, (1, 70, 3)), (cross_bi_wkv, (1, 9, 8, 3)), (cross_bi_wkv, (1, 3, 33, 2))]
)
def test_gradcheck(function, shape):
    inputs = [x.requires_grad_() for x in example(*shape, dtype=torch.float64)]
    if function is cross_bi_wkv:
        inputs.append(torch.randn(shape, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("scans", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(scans, dtype, gated):
    w, u, k, v = example(2, 9, 8, 20, dtype=dtype)
    images = [k, v, torch.randn_like(k)] if gated else [k, v]
    inputs = [x.requires_grad_() for x in (w[:scans].contiguous(), u[:scans].contiguous(), *images)]
    torch.library.opcheck(torch.ops.rwkvir.wkv, inputs)
    torch.library.opcheck(torch.ops.rwkvir.wkv, [*inputs[:2], *(x.detach().transpose(1, 2) for x in images)])
    inputs = [*(x.detach() for x in inputs), *([] if gated else [None])]
    y, state = torch.ops.rwkvir.wkv(*inputs)
    torch.library.opcheck(torch.ops.rwkvir.wkv_backward, [torch.randn_like(y), *inputs, state])


def test_compile():
    inputs = [*example(2, 9, 8, 20), torch.randn(2, 9, 8, 20)]
    gy = torch.randn(2, 9, 8, 20)

    def function(w, u, k, v, gate):
        return cross_bi_wkv(w, u, k + 1, v, gate).sigmoid()

    compiled = torch.compile(function, fullgraph=True)
    for got, want in zip(gradients(compiled, inputs, gy), gradients(function, inputs, gy), strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-6)


def test_autocast_computes_in_float32(device):
    w, u, k, v = example(1, 100, 20, dtype=torch.bfloat16)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = bi_wkv(w, u, k, v)
    assert y.dtype == torch.float32
    assert torch.equal(y, bi_wkv(w, u, k.float(), v.float()))


def test_vmap_is_a_loop():
    w, u, k, v = example(3, 9, 17, 4)
    several, gate, gy = torch.stack((w, 2 * w, -w)), torch.randn_like(k), torch.randn(3, 1, 9, 17, 4)

    def mapped(w, k):
        return torch.vmap(lambda w, k: cross_bi_wkv(w, u, k[None], v[:1], gate[:1]))(w, k)

    def looped(w, k):
        return torch.stack([cross_bi_wkv(w[i], u, k[i : i + 1], v[:1], gate[:1]) for i in range(3)])

    for got, want in zip(gradients(mapped, [several, k], gy), gradients(looped, [several, k], gy), strict=True):
        assert torch.allclose(got, want, rtol=1e-6, atol=1e-6)


def test_double_backward_raises():
    inputs = [x.requires_grad_() for x in example(1, 10, 3)]
    (gv,) = torch.autograd.grad(bi_wkv(*inputs).square().sum(), inputs[3], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gv.sum().backward()


def test_gradients_are_the_same_for_any_number_of_threads():
    inputs, gy = [*example(2, 30, 70, 20), torch.randn(2, 30, 70, 20)], torch.randn(2, 30, 70, 20)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(gradients(cross_bi_wkv, inputs, gy))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """The kernels this processor would not choose, in a process that asks for them."""
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import test_bi_wkv as t\n"
        "from rwkvir_arch.bi_wkv import build_info\n"
        "print(build_info()['cpu'])\n"
        "t.torch.manual_seed(0)\n"
        "for shape in (*t.IMAGES, (2, 9, 17, 20)):\n"
        "    for dtype in t.FORWARD:\n"
        "        inputs = t.example(*shape, dtype=dtype)\n"
        "        t.assert_matches_reference([*inputs, inputs[2].flip(1)])\n"
        "for axis in (1, 2): t.assert_matches_reference(t.stripes((1, 34, 35, 2), axis, -35.0))\n"
        "t.assert_matches_reference(t.example(1, 200, 48))\n"
        "for shape in t.LARGE:\n"
        "    for dtype in (t.torch.float32, t.torch.float16): t.assert_matches_doubles(shape, dtype)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "RWKVIR_CPU": isa}, capture_output=True, text=True
    )
    if "is not a kernel this processor runs" in run.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == isa


def test_every_16_bit_number_comes_through():
    bits = torch.arange(1, 65536, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        v = bits.view(dtype).view(1, 1, -1)
        v = v[v != 0].view(1, 1, -1)  # a sum turns -0 into 0
        zero = torch.zeros(v.shape[-1])
        y = bi_wkv(zero, zero, torch.zeros_like(v), v)  # T = 1 gives v
        assert torch.equal(y.isnan(), v.isnan())
        assert torch.equal(y[~v.isnan()], v[~v.isnan()])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w, u, k, v: (w[:2], u, k, v), r"w must be \(3,\) for k of \(1, 5, 3\), got \(2,\) float32 on cpu"),
        (lambda w, u, k, v: (w, u, k, v[:, :4]), "k and v must have one shape"),
        (lambda w, u, k, v: (w, u, k, v.double()), "k and v must have one dtype"),
        (lambda w, u, k, v: (w, u, k.int(), v.int()), "k must be float32, float64, bfloat16 or float16, got .* int32"),
        (lambda w, u, k, v: (w, u, k[0], v[0]), r"k must be \(B, T, C\) or \(B, H, W, C\), got \(5, 3\)"),
        (lambda w, u, k, v: (w, u, k.to("meta"), v), "is on cpu and k on meta"),
    ],
)
def test_bad_input_says_what_was_given_and_what_is_wanted(change, message):
    with pytest.raises(ValueError, match=message):
        bi_wkv(*change(*example(1, 5, 3)))


@pytest.mark.parametrize("change", [lambda gy: gy.double(), lambda gy: gy[:, :3]])
def test_a_gradient_unlike_k_is_refused(change):
    w, u, k, v = example(1, 4, 5, 3)
    y, state = torch.ops.rwkvir.wkv(w, u, k, v)
    with pytest.raises(RuntimeError, match="gy of k's"):
        torch.ops.rwkvir.wkv_backward(change(torch.ones_like(y)), w, u, k, v, None, state)


def test_a_missing_build_names_the_command(monkeypatch, tmp_path):
    module = sys.modules["rwkvir_arch.bi_wkv"]  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "_library", tmp_path / "_C.so")
    error = module._load()
    assert "is not built" in error and "pip install --no-build-isolation ." in error
    monkeypatch.setattr(module, "_build_error", error)
    with pytest.raises(NotImplementedError, match="not built"):
        bi_wkv(*example(1, 5, 3))


def test_other_devices_say_what_to_do(monkeypatch):
    module = sys.modules["rwkvir_arch.bi_wkv"]
    monkeypatch.setattr(module, "_built_for_cuda", False)
    with pytest.raises(NotImplementedError, match=r"built for the CPU only.*Set CUDA_HOME"):
        module._require_device("cuda")
    with pytest.raises(NotImplementedError, match="not on mps; move the tensors to the CPU"):
        module._require_device("mps")
