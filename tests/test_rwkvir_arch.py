"""The network: sizes, options, gradients, parameter counts, memory layout, checkpointing, fusing, state dicts."""

import pytest
import torch
from basicsr.archs import build_network
from torch import nn

from rwkvir_arch import RWKVIR, bi_wkv_reference, cross_bi_wkv_reference
from rwkvir_arch.rwkvir_arch import SpatialMix, squared_relu

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
    r, k, v = torch.randn(3, 2, 5, 6, 8).unbind()
    T = 30

    def columns(w, u, k, v):
        return bi_wkv_reference(w, u, k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    def check(module, want):
        y = module.gated_wkv(r, k, v)
        assert torch.allclose(y.double(), r.double().sigmoid() * want, rtol=0, atol=1e-5)

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


def test_squared_relu_is_exact_with_its_gradient_and_without():
    torch.manual_seed(0)
    x = torch.cat((torch.randn(1000), torch.tensor([0.0, -0.0, 1e-30, 1e4, torch.inf, -torch.inf]))).requires_grad_()
    want, gy = nn.functional.relu(x).square(), torch.randn(len(x))
    assert torch.equal(squared_relu(x), want)
    assert torch.equal(*(torch.autograd.grad(y, x, gy)[0] for y in (squared_relu(x), want)))
    with torch.no_grad():
        assert torch.equal(squared_relu(x.clone()), want)
    (first,) = torch.autograd.grad(squared_relu(x), x, gy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("options", [{}, {"dc_norm": "instance"}, {"scan": "sequential"}], ids=str)
def test_checkpointing_changes_nothing(options):
    plain, checkpointed, x = small(**options), small(use_checkpoint=True, **options), torch.rand(2, 3, 9, 7)
    for model in (plain, checkpointed):
        model(x).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name
    for (name, a), b in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("fused", [False, True])
def test_compiled_network_gives_the_same(fused):
    model, x = small().eval(), torch.rand(1, 3, 9, 7)
    if fused:
        learned(model).fuse()
    with torch.no_grad():
        assert torch.allclose(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-5)


def test_compiled_training_gives_the_same_gradients():
    plain, compiled, x = small(depths=[1]), small(depths=[1]), torch.rand(2, 3, 9, 7)
    plain(x).square().sum().backward()
    torch.compile(compiled, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-5), name


def learned(model):
    """`model` as training leaves it: running statistics and affine parameters that are not those of the start."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d | nn.LayerNorm):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.1, 4)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.3)
    return model


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fusing_changes_nothing_but_rounding(options, dtype):
    model, x = learned(small(**options)).eval().to(dtype), torch.rand(2, 3, 9, 7, dtype=dtype)
    with torch.no_grad():
        want = model(x)
        fused = model.fuse()
        got = fused(x)
        assert fused is model and got.dtype == dtype
        assert (got - want).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-12) * want.abs().max()
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.fuse()
        assert torch.equal(model(x), got) and state.keys() == model.state_dict().keys()


def test_fusing_is_for_eval_mode():
    with pytest.raises(ValueError, match=r"call eval\(\) on the network first"):
        small().fuse()


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_a_fused_network_load_into_a_fused_one_only(strict):
    plain, fused, x = learned(small()).eval(), learned(small()).eval().fuse(), torch.rand(1, 3, 9, 7)
    with pytest.raises(ValueError, match=r"saved after fuse\(\).*call eval\(\) and fuse\(\) on it first"):
        nn.Sequential(plain).load_state_dict({f"0.{k}": v for k, v in fused.state_dict().items()}, strict=strict)
    with pytest.raises(ValueError, match=r"this network is fused.*load them first, then call fuse\(\)"):
        fused.load_state_dict(plain.state_dict(), strict=strict)
    again = small().eval().fuse()
    again.load_state_dict(fused.state_dict(), strict=strict)
    with torch.no_grad():
        assert torch.equal(again(x), fused(x))


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
