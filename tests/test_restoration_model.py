"""RestorationModel: each option does what it says and resumes exactly; without options it is SRModel."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.models import build_model
from basicsr.models.sr_model import SRModel
from conftest import tiny_options

import rwkvir_arch  # noqa: F401 - registers RWKVIR
from rwkvir import restoration_model
from rwkvir.restoration_model import RestorationModel, in_tiles

# Every option of training, and all of them together.
TRAINING: dict[str, dict[str, Any]] = {
    "none": {},
    "bfloat16": {"amp": "bfloat16"},
    "float16": {"amp": "float16"},
    "accumulate": {"accumulate": 2},
    "clip": {"clip_grad": 0.01},
    "compile": {"compile": "aot_eager"},
    "skip": {"skip_nonfinite": 3},
    "ema": {"ema_decay": 0.9},
    "AdamW": {"optim_g": {"type": "AdamW", "lr": 2e-4, "weight_decay": 0.1}},
}
TRAINING["all"] = {key: value for options in TRAINING.values() for key, value in options.items()}
SMALL = {"type": "MSRResNet", "num_feat": 4, "num_block": 1, "upscale": 2}
NORMALISED = {"type": "RWKVIR", "num_feat": 4, "depths": [1], "upscale": 2, "dc_norm": "batch"}


@pytest.fixture
def make(pictures: Path, tmp_path: Path):
    """Makes a model that trains, with changed options of `train` and `val`, in the folder of a run."""

    def make(train: dict | None = None, val: dict | None = None, **changes: Any) -> SRModel:
        options = tiny_options(pictures)
        options["train"].update(copy.deepcopy(train or {}))
        options["val"].update(copy.deepcopy(val or {}))
        options.update(model_type="RestorationModel", network_g=dict(SMALL), is_train=True, dist=False, rank=0)
        options["path"] |= {"experiments_root": str(tmp_path)}
        for folder in ("models", "training_states"):
            (tmp_path / folder).mkdir(exist_ok=True)
            options["path"][folder] = str(tmp_path / folder)
        torch.manual_seed(0)
        return build_model({**options, "world_size": 1, **changes})

    return make


def batch(iteration: int, size: int = 4) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(iteration)
    lq, gt = torch.rand(size, 3, 8, 8, generator=generator), torch.rand(size, 3, 16, 16, generator=generator)
    return {"lq": lq, "gt": gt, "lq_path": [f"{iteration}.png"], "gt_path": [f"{iteration}.png"]}


def train(model: SRModel, first: int, last: int) -> list[float]:
    """Do as the training loop does in these iterations; returns the losses."""
    losses = []
    for iteration in range(first, last + 1):
        model.update_learning_rate(iteration)
        model.feed_data(batch(iteration))
        model.optimize_parameters(iteration)
        losses.append(model.get_current_log()["l_pix"])
    return losses


def weights(model: SRModel) -> dict[str, dict[str, torch.Tensor]]:
    networks = {"net_g": model.net_g, "net_g_ema": getattr(model, "net_g_ema", None)}
    return {name: copy.deepcopy(net.state_dict()) for name, net in networks.items() if net is not None}


def assert_equal(first: Any, second: Any) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("network", [SMALL, NORMALISED], ids=lambda network: network["type"])
def test_without_options_it_is_srmodel(make, network):
    ours, stock = make(network_g=dict(network)), make(network_g=dict(network), model_type="SRModel")
    assert type(ours) is RestorationModel
    assert train(ours, 1, 3) == train(stock, 1, 3)
    assert_equal(weights(ours), weights(stock))


@pytest.mark.parametrize("name", TRAINING)
def test_a_resumed_run_is_the_uninterrupted_one(make, tmp_path, name):
    whole = make(TRAINING[name])
    train(whole, 1, 2)
    whole.save(0, 2)
    rest = train(whole, 3, 4)
    resumed = make(
        TRAINING[name], path={**whole.opt["path"], "pretrain_network_g": str(tmp_path / "models/net_g_2.pth")}
    )
    resumed.resume_training(torch.load(tmp_path / "training_states/2.state"))
    assert train(resumed, 3, 4) == rest
    assert_equal(weights(resumed), weights(whole))
    assert resumed.steps.state_dict() == whole.steps.state_dict()


def test_the_scaler_and_the_counts_survive_a_resumption(make, tmp_path):
    model = make(TRAINING["all"] | {"compile": False})
    train(model, 1, 1)
    model.steps.scaler.update(128.0)
    model.steps.skipped, model.steps.skipped_in_a_row = 7, 2
    model.save_training_state(0, 2)
    resumed = make(TRAINING["all"])
    resumed.resume_training(torch.load(tmp_path / "training_states/2.state"))
    assert resumed.steps.scaler.get_scale() == 128.0
    assert (resumed.steps.skipped, resumed.steps.skipped_in_a_row) == (7, 2)


@pytest.mark.parametrize("options", [{}, TRAINING["all"]], ids=["none", "all"])
def test_a_run_of_srmodel_goes_on_here(make, tmp_path, options):
    stock = make(options.get("optim_g") and {"optim_g": {"type": "Adam", "lr": 2e-4}}, model_type="SRModel")
    train(stock, 1, 2)
    stock.save(0, 2)
    path = {**stock.opt["path"], "pretrain_network_g": str(tmp_path / "models/net_g_2.pth")}
    resumed = make({**options, "optim_g": {"type": "Adam", "lr": 2e-4}}, path=path)
    resumed.resume_training(torch.load(tmp_path / "training_states/2.state"))
    losses = train(resumed, 3, 4)
    if not options:
        assert losses == train(stock, 3, 4)
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("name", TRAINING)
def test_checkpoints_have_the_keys_of_srmodels(make, tmp_path, name):
    make(TRAINING[name]).save(0, 2)
    make(model_type="SRModel").save(0, 3)
    saved = torch.load(tmp_path / "models/net_g_2.pth")
    assert saved["params"].keys() == torch.load(tmp_path / "models/net_g_3.pth")["params"].keys()
    assert saved.get("params_ema", saved["params"]).keys() == saved["params"].keys()


def gradients(model: SRModel) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.net_g.parameters()]


def test_parts_of_a_batch_give_the_gradient_of_the_batch(make):
    whole, parts = make(), make({"accumulate": 4})
    assert train(parts, 1, 1) == pytest.approx(train(whole, 1, 1), rel=1e-6)
    torch.testing.assert_close(gradients(parts), gradients(whole), rtol=1e-5, atol=1e-9)


def test_clipped_gradients_have_the_given_norm(make):
    free, clipped = make(), make({"clip_grad": 0.01})
    train(free, 1, 1)
    train(clipped, 1, 1)
    norm = torch.cat([gradient.flatten() for gradient in gradients(free)]).norm()
    assert norm > 0.02
    torch.testing.assert_close(gradients(clipped), [0.01 / norm * gradient for gradient in gradients(free)])


@pytest.mark.parametrize("amp", restoration_model.AMP)
def test_the_network_computes_in_the_narrow_type_and_the_loss_does_not(make, amp):
    model, seen = make({"amp": amp}), []
    model.net_g.conv_hr.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    model.cri_pix.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    exact = train(make(), 1, 3)
    assert train(model, 1, 3) == pytest.approx(exact, rel=2e-2)
    assert seen == [getattr(torch, amp), torch.float32] * 3
    assert model.steps.scaler.is_enabled() == (amp == "float16")
    model.feed_data(batch(0))
    model.test()
    assert model.output.dtype == torch.float32


def test_compiled_training_is_uncompiled_training_and_validation_is_not_compiled(make):
    compiled = make({"compile": "aot_eager"})
    assert train(compiled, 1, 3) == pytest.approx(train(make(), 1, 3), rel=1e-5)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert before > 0
    compiled.feed_data({"lq": torch.rand(1, 3, 9, 7)})
    compiled.test()
    assert compiled.output.shape == (1, 3, 18, 14)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_the_average_of_a_network_has_its_running_statistics(make):
    model = make({"ema_decay": 0.9}, network_g=dict(NORMALISED))
    train(model, 1, 2)
    buffers = dict(model.net_g.named_buffers())
    assert any("running_mean" in name for name in buffers)
    assert_equal(dict(model.net_g_ema.named_buffers()), buffers)


@pytest.mark.parametrize("name", restoration_model.OPTIMIZERS)
def test_every_optimiser_trains(make, name):
    model = make({"optim_g": {"type": name, "lr": 1e-4}})
    before = weights(model)
    assert all(map(math.isfinite, train(model, 1, 2)))
    assert any((weights(model)["net_g"][key] != value).any() for key, value in before["net_g"].items())


def nonfinite(iteration: int) -> dict[str, Any]:
    data = batch(iteration)
    data["lq"][0, 0, 0, 0] = math.nan
    return data


@pytest.mark.parametrize("amp", [None, "float16"])
def test_a_batch_that_gives_no_finite_loss_leaves_no_trace(make, amp):
    model = make({"skip_nonfinite": 3, "ema_decay": 0.5, "amp": amp}, network_g=dict(NORMALISED))
    train(model, 1, 2)
    before = weights(model)
    model.feed_data(nonfinite(3))
    model.optimize_parameters(3)
    assert_equal(weights(model), before)
    assert math.isnan(model.get_current_log()["l_pix"]) and model.get_current_log()["skipped"] == 1
    assert all(map(math.isfinite, train(model, 4, 5)))
    assert (model.steps.skipped, model.steps.skipped_in_a_row) == (1, 0)


def test_finite_batches_train_as_without_the_option(make):
    guarded, stock = make({"skip_nonfinite": 3}), make()
    assert train(guarded, 1, 3) == train(stock, 1, 3)
    assert_equal(weights(guarded), weights(stock))


def test_an_infinite_gradient_of_a_finite_loss_is_skipped_too(make):
    model = make({"skip_nonfinite": 3})
    next(model.net_g.parameters()).register_hook(lambda gradient: gradient * math.inf)
    before = weights(model)
    assert math.isfinite(train(model, 1, 1)[0])
    assert_equal(weights(model), before)
    assert model.steps.skipped == 1


def test_too_many_in_a_row_end_the_run_with_the_batch_saved(make, tmp_path):
    model = make({"skip_nonfinite": 2})
    model.feed_data(nonfinite(1))
    model.optimize_parameters(1)
    train(model, 2, 2)
    model.feed_data(nonfinite(3))
    model.optimize_parameters(3)
    model.feed_data(nonfinite(4))
    with pytest.raises(
        ValueError, match=r"not finite in 2 .* the last being 4; .*nonfinite_4_rank0\.pth .*4\.png.*lower"
    ):
        model.optimize_parameters(4)
    saved = torch.load(tmp_path / "nonfinite_4_rank0.pth")
    assert saved["iter"] == 4
    torch.testing.assert_close(saved["lq"], nonfinite(4)["lq"], equal_nan=True, rtol=0, atol=0)


def reach(pixels: int, scale: int) -> torch.nn.Module:
    """A network whose output depends on LQ pixels at most `pixels` away, and on all of those."""
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 3 * scale**2, 2 * pixels + 1, padding=pixels)
    return torch.nn.Sequential(convolution, torch.nn.PixelShuffle(scale)).eval()


@pytest.mark.parametrize("size", [(40, 61), (17, 90), (24, 24), (7, 9), (49, 48)])
@pytest.mark.parametrize("scale", [1, 3])
def test_tiles_give_the_whole_picture_where_the_network_reaches_no_further_than_a_third_of_the_overlap(size, scale):
    lq = torch.rand(2, 3, *size)
    with torch.no_grad():
        network = reach(4, scale)
        torch.testing.assert_close(in_tiles(network, lq, tile=24, overlap=12), network(lq), rtol=0, atol=2e-6)


def test_tiles_never_exceed_their_size_and_cover_the_picture():
    seen = []

    def network(part: torch.Tensor) -> torch.Tensor:
        seen.append(part.shape[-2:])
        return part

    lq = torch.rand(1, 1, 100, 50)
    torch.testing.assert_close(in_tiles(network, lq, tile=32, overlap=6), lq)
    assert set(seen) == {(32, 32)} and len(seen) == 4 * 2


def test_tiles_of_a_global_network_differ_without_a_seam():
    """What the network gathers from all pixels differs between tiles; the difference fades in over pixels."""

    def network(part: torch.Tensor) -> torch.Tensor:
        return part - part.mean()

    ramp = torch.linspace(0, 1, 200).expand(1, 1, 20, 200)
    tiled = in_tiles(network, ramp, tile=64, overlap=30)
    assert (tiled - network(ramp)).abs().max() > 0.1
    steps = (tiled - ramp).diff(dim=-1).abs().max()
    assert 0 < steps < 0.02  # a hard seam between the two tiles' means, 0.17 apart, would be one step of 0.17


def restore(model: SRModel, lq: torch.Tensor) -> torch.Tensor:
    model.feed_data({"lq": lq})
    model.test()
    return model.output


def test_a_model_validates_in_tiles(make):
    lq = torch.rand(1, 3, 70, 50)
    whole = restore(make(), lq)
    torch.testing.assert_close(restore(make(val={"tile": 48, "tile_overlap": 24}), lq), whole, rtol=0, atol=2e-6)


def test_windows_get_whole_multiples_and_the_picture_its_size(make):
    sizes = []
    model = make(val={"multiple_of": 8})
    model.net_g.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[-2:]))
    assert restore(model, torch.rand(1, 3, 13, 16)).shape == (1, 3, 26, 32)
    assert sizes == [(16, 16)]


@pytest.mark.parametrize("space, on_y", [("y", True), ("rgb", False), ("gray", False)])
def test_the_space_of_the_metrics_is_set(make, space, on_y):
    assert make(val={"space": space}).opt["val"]["metrics"]["psnr"]["test_y_channel"] is on_y


@pytest.mark.parametrize(
    "space, channels, fits", [("y", 1, True), ("rgb", 1, False), ("gray", 3, False), ("gray", 1, True)]
)
def test_pictures_must_fit_the_space(make, space, channels, fits):
    model = make(val={"space": space}, network_g={**SMALL, "num_in_ch": channels, "num_out_ch": channels})
    model.feed_data({"lq": torch.rand(1, channels, 8, 8), "lq_path": ["some.png"]})
    model.test()
    if fits:
        model.get_current_visuals()
    else:
        with pytest.raises(ValueError, match=rf"space is {space}, but the result of some\.png has {channels} channels"):
            model.get_current_visuals()


@pytest.mark.parametrize(
    "section, options, sentence",
    [
        ("train", {"ampp": "bfloat16"}, r"train:ampp is not an option of RestorationModel; did you mean amp\?"),
        ("train", {"clip_grd": 1}, r"train:clip_grd .* did you mean clip_grad\?"),
        ("val", {"tiles": 256}, r"val:tiles .* did you mean tile"),
        ("train", {"amp": "float8"}, "train:amp is 'float8'; write bfloat16 or float16"),
        ("train", {"accumulate": 3}, "accumulate is 3, which does not divide batch_size_per_gpu 4"),
        ("train", {"accumulate": 2, "pixel_opt": {"type": "L1Loss", "reduction": "sum"}}, "reduction: mean, not sum"),
        ("train", {"accumulate": 0}, "train:accumulate is 0; write a whole number above 0"),
        ("train", {"clip_grad": -1}, "train:clip_grad is -1; write a number above 0"),
        ("train", {"optim_g": {"type": "AdamV", "lr": 1}}, r"optim_g:type is 'AdamV', .*did you mean Adam or"),
        ("train", {"optim_g": {"type": "SGD", "lr": 1, "beta": 1}}, "optim_g:beta is not an option of SGD"),
        ("val", {"tile": 64}, "tile is 64, less than twice the overlap of 48; raise it"),
        ("val", {"tile_overlap": 64}, "tile_overlap means nothing without val:tile"),
        ("val", {"tile": 100, "multiple_of": 8}, "tile is 100, not a multiple of val:multiple_of, 8; make it 96"),
        ("val", {"space": "Y"}, "val:space is 'Y'; write y, rgb, gray"),
        (
            "val",
            {"space": "rgb", "metrics": {"psnr": {"type": "calculate_psnr", "test_y_channel": True}}},
            "space is rgb, but val:metrics:psnr:test_y_channel is true; remove one",
        ),
    ],
)
def test_an_impossible_option_is_one_sentence(make, section, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(**{section: options})
