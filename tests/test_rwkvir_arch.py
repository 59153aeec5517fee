"""The network: sizes, options, gradients, parameter counts, independence of the crop, checkpointing, state dicts."""

import pytest
import torch
from basicsr.archs import build_network
from torch import nn

from rwkvir_arch import RWKVIR, bi_wkv_reference, cross_bi_wkv_reference
from rwkvir_arch.rwkvir_arch import SpatialMix

SMALL = {"num_feat": 8, "depths": [2, 1], "hidden_ratio": 2}
CLASSIC = {"num_feat": 192, "depths": [6] * 6, "upsampler": "pixelshuffle"}
TAILS = [
    ("pixelshuffle", 2),
    ("pixelshuffle", 3),
    ("pixelshuffle", 4),
    ("pixelshuffledirect", 3),
    ("nearest+conv", 4),
    ("", 1),
]
VARIANTS = [
    {},
    {"scan": "alternate"},
    {"scan": "sequential"},
    {"scan": "row"},
    {"shift": "q"},
    {"shift": "none"},
    {"dc_norm": "instance"},
    {"dc_norm": "none"},
    {"dc_ratio": 0.5},
    {"decay_scale": "side"},
]


def small(**options):
    torch.manual_seed(0)
    return RWKVIR(**{**SMALL, "upscale": 2, **options})


@pytest.mark.parametrize(
    "options, count",
    [
        ({"upscale": 2}, 853_692),
        ({"upscale": 3}, 860_187),
        ({"upscale": 4}, 869_280),
        ({**CLASSIC, "upscale": 2}, 19_987_523),
        ({**CLASSIC, "upscale": 3}, 20_172_163),
        ({**CLASSIC, "upscale": 4}, 20_135_235),
        ({**CLASSIC, "upsampler": "", "upscale": 1}, 19_732_611),
    ],
)
def test_parameter_counts(options, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in RWKVIR(**options).parameters()) == count


@pytest.mark.parametrize("upsampler, upscale", TAILS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (9, 14)])
def test_any_size_rgb_and_grey(upsampler, upscale, channels, size):
    model = small(upsampler=upsampler, upscale=upscale, num_in_ch=channels, num_out_ch=channels).eval()
    with torch.no_grad():
        y = model(torch.rand(2, channels, *size))
    assert y.shape == (2, channels, size[0] * upscale, size[1] * upscale) and y.isfinite().all()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_parameter_gets_a_gradient(options):
    model = small(**options)
    model(torch.rand(2, 3, 9, 7)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_the_batch_does_not_matter_in_eval(options):
    model, x = small(**options).eval(), torch.rand(3, 3, 9, 7)
    with torch.no_grad():
        assert torch.allclose(model(x)[1:2], model(x[1:2]), atol=1e-6)


def test_memory_format_of_the_input_does_not_matter():
    model, x = small().eval(), torch.rand(2, 3, 9, 7)
    with torch.no_grad():
        assert torch.allclose(model(x), model(x.contiguous(memory_format=torch.channels_last)), atol=1e-6)


def mix(**options):
    module = small(**options).layers[1].blocks[0].spatial
    assert isinstance(module, SpatialMix)
    with torch.no_grad():
        module.bonus.copy_(torch.randn_like(module.bonus))
    return module


def test_scans_are_what_their_names_say():
    k, v = torch.randn(2, 2, 5, 6, 8).unbind()
    T = 30

    def columns(w, u, k, v):
        return bi_wkv_reference(w, u, k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    def check(module, want):
        assert torch.allclose(module.wkv(k, v).double(), want, rtol=0, atol=1e-5)

    cross = mix(scan="cross")
    w, u = cross.decay / T, cross.bonus / T
    check(cross, cross_bi_wkv_reference(w, u, k, v))
    sequential = mix(scan="sequential")
    w, u = sequential.decay / T, sequential.bonus / T
    check(sequential, columns(w[1], u[1], k, bi_wkv_reference(w[0], u[0], k, v)))
    row = mix(scan="row")
    check(row, bi_wkv_reference(row.decay[0] / T, row.bonus[0] / T, k, v))
    alternate = mix(scan="alternate")  # of the second group
    check(alternate, columns(alternate.decay[0] / T, alternate.bonus[0] / T, k, v))
    side = mix(scan="row", decay_scale="side")
    check(side, bi_wkv_reference(nn.functional.softplus(side.decay[0]) / T**0.5, side.bonus[0], k, v))


def test_initial_decays_and_bonuses():
    first, last = (RWKVIR(num_feat=5, depths=[1, 1, 1]).layers[g].blocks[0].spatial for g in (0, 2))
    c = torch.arange(5) / 4
    assert torch.allclose(first.decay[0], -5 + 8 * c**0.7) and torch.allclose(last.decay[1], -5 + 8 * c**2.0)
    assert torch.allclose(first.bonus[0].exp(), 0.3 * torch.tensor([0.0, 0.5, -0.5, 0.0, 0.5]).exp())


def test_q_shift_moves_each_quarter_its_way():
    x = torch.arange(9.0).view(1, 3, 3, 1).expand(1, 3, 3, 4)
    shift = small(shift="q", num_feat=4).layers[0].blocks[0].spatial.shift
    with torch.no_grad():
        shift.mix.zero_()
        moved = (shift(x) - x)[0].permute(2, 0, 1)
    rightwards = [[0, 0, 1], [0, 3, 4], [0, 6, 7]]
    leftwards = [[1, 2, 0], [4, 5, 0], [7, 8, 0]]
    downwards = [[0, 0, 0], [0, 1, 2], [3, 4, 5]]
    upwards = [[3, 4, 5], [6, 7, 8], [0, 0, 0]]
    assert moved.tolist() == [rightwards, leftwards, downwards, upwards]


def test_activations_stay_channels_last():
    """No convolution inside the body sees or makes anything but channels_last memory."""
    model, seen = small().eval(), []

    def note(module, inputs, output):
        x = inputs[0] if inputs[0].shape[1] == module.in_channels else inputs[0].permute(0, 3, 1, 2)
        seen.append(x.is_contiguous(memory_format=torch.channels_last))

    for module in model.layers.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(torch.rand(1, 3, 9, 7))
    assert len(seen) == 3 * 3 + 2 and all(seen)


def test_checkpointing_changes_nothing():
    plain, checkpointed, x = small(), small(use_checkpoint=True), torch.rand(2, 3, 9, 7)
    for model in (plain, checkpointed):
        model(x).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name
    for (name, a), b in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_compiled_network_gives_the_same():
    model, x = small().eval(), torch.rand(1, 3, 9, 7)
    with torch.no_grad():
        assert torch.allclose(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-5)


def test_autocast_runs_and_stays_close():
    model, x = small().eval(), torch.rand(1, 3, 9, 7)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    with torch.no_grad():
        assert (y - model(x)).abs().max() < 0.05


def test_state_dict_loads_strictly_and_holds_only_what_was_learned():
    model = small()
    state = model.state_dict()
    assert not any("mean_" in name for name in state)
    small().load_state_dict(state, strict=True)


def test_basicsr_builds_it_by_name():
    assert isinstance(build_network({"type": "RWKVIR", **SMALL}), RWKVIR)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scan": "crss"}, "scan is 'crss'; it must be one of 'cross', 'alternate', 'sequential', 'row'"),
        ({"shift": "dcc"}, "shift is 'dcc'"),
        ({"dc_norm": "layer"}, "dc_norm is 'layer'"),
        ({"decay_scale": "T"}, "decay_scale is 'T'"),
        ({"upsampler": "bicubic"}, "upsampler is 'bicubic'"),
        ({"upsampler": "", "upscale": 4}, "upscale must be 1"),
        ({"upsampler": "pixelshuffle", "upscale": 6}, "3 or a power of two"),
        ({"upsampler": "nearest+conv", "upscale": 3}, "a power of two"),
    ],
)
def test_bad_options_say_what_is_possible(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_wrong_channels_say_what_to_set():
    with pytest.raises(ValueError, match=r"takes pictures of 3 channels.*got \(1, 1, 8, 8\).*set num_in_ch"):
        small()(torch.rand(1, 1, 8, 8))
