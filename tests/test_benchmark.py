import csv
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from basicsr.archs import build_network
from basicsr.data import build_dataset
from basicsr.metrics import calculate_psnr, calculate_ssim
from basicsr.utils import tensor2img
from conftest import make_lmdb

from rwkvir import benchmark, cli, evaluation, plugins
from rwkvir.benchmark_page import quantity
from rwkvir.evaluation import Pair, Task, evaluate, find_pairs, find_set, parse_task
from rwkvir.published import PUBLISHED
from rwkvir_data.degrade import bicubic, degrade

plugins.load_plugins()
SHARED = Path("../shared/testsets")
# PSNR of bicubic at x2, x3, x4, as published.
BICUBIC = {"Set5": (33.67, 30.40, 28.43), "Set14": (30.23, 27.54, 25.99), "BSD100": (29.56, 27.21, 25.96)}
SMALL = {"type": "MSRResNet", "num_feat": 4, "num_block": 1, "upscale": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Set5 of three pictures of odd sizes, one of them with one channel, and its LR; CBSD68 and Classic5 of one."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name in ("Set5/HR", "Set5/LR_bicubic/X2", "CBSD68", "classic5_gray/GT"):
        (root / name).mkdir(parents=True)
    for i, name in enumerate("abc"):
        coarse = rng.integers(0, 256, (9, 9) if name == "c" else (9, 9, 3), dtype=np.uint8)
        gt = cv2.resize(coarse, (53 + i, 46 - i), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(root / f"Set5/HR/{name}.png"), gt)
        lr = degrade(gt[: len(gt) // 2 * 2, : gt.shape[1] // 2 * 2], "x2")
        cv2.imwrite(str(root / f"Set5/LR_bicubic/X2/{name}x2.png"), lr)
    cv2.imwrite(str(root / "CBSD68/d.png"), cv2.resize(coarse, (40, 40))[..., None].repeat(3, axis=2))
    cv2.imwrite(str(root / "classic5_gray/GT/e.png"), cv2.resize(coarse, (40, 40)))
    return root


def experiment(root, network, name="run", seed=0, **options):
    """An experiment's folder, with weights drawn from `seed`."""
    torch.manual_seed(seed)
    folder = Path(root, "experiments", name)
    (folder / "models").mkdir(parents=True)
    weights = build_network(network).state_dict()
    torch.save({"params": weights}, folder / "models" / "net_g_latest.pth")
    (folder / f"{name}.yml").write_text(yaml.safe_dump({"name": name, "network_g": network, **options}))
    return folder


def bench(data, out, *words):
    return benchmark.main([*map(str, words), "--data", str(data), "-o", str(out), "--device", "cpu"])


def rows(out, name="benchmark.csv"):
    with open(out / name) as file:
        return list(csv.DictReader(file))


def measured(out):
    return {(row["model"], row["task"], row["set"]): row for row in rows(out) if row["source"] == "measured"}


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
@pytest.mark.parametrize("make_lq", [False, True])
@pytest.mark.parametrize(
    "name", ["Set5", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Set14", "BSD100"))]
)
def test_bicubic_as_published(name, make_lq):
    for scale, published in zip((2, 3, 4), BICUBIC[name], strict=True):
        task = parse_task(f"x{scale}")
        pairs = find_pairs(find_set(name, [str(SHARED)]), task, make_lq)
        assert all((pair.lq is None) == make_lq for pair in pairs)
        restore = evaluation.baseline(task)[1]
        psnr = [evaluation.score(restore, pair, task)[0].psnr for pair in pairs]
        assert np.mean(psnr) == pytest.approx(published, abs=0.006)


def test_tasks():
    names = ["x4", "noise25", "noise25_gray", "jpeg10", "jpeg10_color"]
    tasks = [parse_task(name) for name in names]
    assert [task.name for task in tasks] == names
    assert [task.scale for task in tasks] == [4, 1, 1, 1, 1]
    assert [task.gray for task in tasks] == [False, False, True, True, False]
    for name in ("x1", "x4_gray", "blur", "noise", "jpeg10_"):
        with pytest.raises(ValueError, match=f"'{name}' is no task; write x4, noise25 or jpeg10"):
            parse_task(name)


def test_scores_are_those_of_basicsr(data):
    """The same as BasicSR's dataset, tensor2img and metrics give for colour pictures."""
    torch.manual_seed(0)
    network = build_network(SMALL)
    task = Task("x2")
    scores = {score.image: score for score in evaluate(network, find_pairs(data / "Set5", task), task)}
    assert network.training
    network.eval()
    for name in "ab":
        gt, lq = (cv2.imread(str(data / f"Set5/{file}.png")) for file in (f"HR/{name}", f"LR_bicubic/X2/{name}x2"))
        x = torch.from_numpy(np.float32(lq[..., ::-1].copy()) / 255).permute(2, 0, 1)[None]
        with torch.no_grad():
            restored = tensor2img(network(x))
        pair = restored, gt[: len(restored), : restored.shape[1]]
        how = {"crop_border": 2, "test_y_channel": True}
        assert scores[name].psnr == pytest.approx(calculate_psnr(*pair, **how), abs=1e-4)
        assert scores[name].ssim == pytest.approx(calculate_ssim(*pair, **how), abs=1e-6)


def test_a_one_channel_picture_is_measured_on_its_own_values(data):
    task = Task("x2")
    (pair,) = (pair for pair in find_pairs(data / "Set5", task) if pair.name == "c")
    restore = evaluation.baseline(task)[1]
    gt, lq = (cv2.imread("/".join(place), cv2.IMREAD_GRAYSCALE) for place in (pair.gt, pair.lq))
    gt = gt[:44, :54]
    own, _ = evaluation.score(restore, pair, task)
    assert own.psnr == pytest.approx(calculate_psnr(bicubic(lq, 2), gt, crop_border=2), abs=1e-3)
    assert own.ssim == pytest.approx(calculate_ssim(bicubic(lq, 2), gt, crop_border=2), abs=1e-4)
    as_color, _ = evaluation.score(restore, pair, task, gray_as_color=True)
    assert as_color.psnr - own.psnr == pytest.approx(20 * np.log10(255 / 219), abs=1e-4)


def test_a_network_of_one_channel_restores_y(data):
    network = torch.nn.Conv2d(1, 4, 1, bias=False)
    torch.nn.init.ones_(network.weight)
    network = torch.nn.Sequential(network, torch.nn.PixelShuffle(2))  # repeats each pixel
    for pair in find_pairs(data / "Set5", Task("x2")):
        nearest = evaluation.score(lambda lq: lq.repeat(2, 0).repeat(2, 1), pair, Task("x2"))[0]
        scores = evaluate(network, [pair], Task("x2"))
        assert scores[0].psnr == pytest.approx(nearest.psnr, abs=0.01)  # Y is rounded between network and metric


def test_noise_and_jpeg_are_those_that_training_validates_with(data):
    cases = ("CBSD68", "CBSD68", "noise25", {}), ("Classic5", "classic5_gray/GT", "jpeg10", {"color": "gray"})
    for set_name, folder, name, color in cases:
        options = {"type": "ReSynPairedDataset", "name": "a", "phase": "val", "scale": 1, "degradation": name, **color}
        item = build_dataset({**options, "dataroot_gt": str(data / folder), "io_backend": {"type": "disk"}})[0]
        task = parse_task(name)
        (pair,) = find_pairs(find_set(set_name, [str(data)]), task)
        lq, gt, _ = evaluation.read_pair(pair, task)
        assert (tensor2img(item["lq"], rgb2bgr=False) == lq).all()
        assert (tensor2img(item["gt"], rgb2bgr=False) == gt).all()
        assert (lq != gt).any()


def test_tiles_and_windows(data):
    """A network of one convolution sees no difference between tiles, padded windows and the whole."""

    class Windowed(torch.nn.Sequential):
        def forward(self, x):
            assert x.shape[2] % 8 == x.shape[3] % 8 == 0
            return super().forward(x)

    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 12, 1), torch.nn.PixelShuffle(2)
    pairs = find_pairs(data / "Set5", Task("x2"))
    whole = evaluate(torch.nn.Sequential(*layers), pairs, Task("x2"))
    for network, options in ((torch.nn.Sequential(*layers), {"tile": 16}), (Windowed(*layers), {"window": 8})):
        scores = evaluate(network, pairs, Task("x2"), **options)
        assert [score.psnr for score in scores] == pytest.approx([score.psnr for score in whole], abs=1e-3)


def test_layouts(tmp_path, pictures):
    gt, lq = sorted((pictures / "gt").iterdir()), sorted((pictures / "lq").iterdir())

    def link(folder, files, suffix=""):
        folder.mkdir(parents=True)
        for file in files:
            (folder / f"{file.stem}{suffix}.png").symlink_to(file)

    link(tmp_path / "Set5/GTmod12", gt)
    link(tmp_path / "Set5/LRbicx2", lq)
    link(tmp_path / "set14/HR", gt)
    link(tmp_path / "set14/LR_bicubic/X2", lq, "x2")
    link(tmp_path / "BSDS100", gt)
    (tmp_path / "ReSyn").mkdir()
    make_lmdb(tmp_path / "ReSyn/test_GT.lmdb", gt)
    make_lmdb(tmp_path / "ReSyn/test_LQ_x2.lmdb", lq)
    task = Task("x2")
    for name, has_lq in (("Set5", True), ("Set14", True), ("BSD100", False), ("ReSyn-test", True)):
        pairs = find_pairs(find_set(name, [str(tmp_path)]), task)
        assert [pair.name for pair in pairs] == [file.stem for file in gt]
        assert all((pair.lq is not None) == has_lq for pair in pairs)
        lq_picture, gt_picture, _ = evaluation.read_pair(pairs[3], task)
        assert (gt_picture[..., ::-1] == cv2.imread(str(gt[3]))).all()
        assert (lq_picture[..., ::-1] == cv2.imread(str(lq[3]))).all() == has_lq
    assert find_set("Set5", [str(tmp_path / "Set5")]) == tmp_path / "Set5"
    assert find_set("Urban100", [str(tmp_path)]) is None
    assert all(pair.lq is None for pair in find_pairs(tmp_path / "Set5", task, make_lq=True))


def test_a_resyn_without_a_test_split_is_no_test_set(tmp_path):
    (tmp_path / "ReSyn/train_GT.lmdb").mkdir(parents=True)
    assert find_set("ReSyn-test", [str(tmp_path)]) is None
    (tmp_path / "ReSyn/test_GT.lmdb").mkdir()
    assert find_set("ReSyn-test", [str(tmp_path)]) == tmp_path / "ReSyn"


def test_sets_that_do_not_fit_together(tmp_path, data, pictures):
    hr, lr = tmp_path / "Set5/HR", tmp_path / "Set5/LR_bicubic/X2"
    hr.mkdir(parents=True)
    with pytest.raises(ValueError, match="Set5 holds no pictures; put them there, or into HR"):
        find_pairs(tmp_path / "Set5", Task("x2"))
    lr.mkdir(parents=True)
    for name in "ab":
        (hr / f"{name}.png").symlink_to(data / f"Set5/HR/{name}.png")
    (lr / "ax2.png").symlink_to(data / "Set5/LR_bicubic/X2/bx2.png")
    with pytest.raises(ValueError, match=r"X2 has no partner for 'b\.png' \(1 without one\).*--make-lq"):
        find_pairs(tmp_path / "Set5", Task("x2"))
    for name in "bc":
        (lr / f"{name}x2.png").symlink_to(pictures / "lq/picture0.png")
    with pytest.raises(ValueError, match=r"HR has no partner for 'cx2\.png'"):
        find_pairs(tmp_path / "Set5", Task("x2"))
    (lr / "cx2.png").unlink()
    pairs = find_pairs(tmp_path / "Set5", Task("x2"))
    with pytest.raises(ValueError, match=r"bx2\.png has 16x16 pixels, not those of GT \(44x54\) divided by 2"):
        evaluation.read_pair(pairs[1], Task("x2"))
    cv2.imwrite(str(tmp_path / "small.png"), np.zeros((15, 14, 3), np.uint8))
    with pytest.raises(ValueError, match=r"small\.png has 14x14 pixels, too few for SSIM's window of 11"):
        evaluation.read_pair(Pair("small", (str(tmp_path), "small.png"), None), Task("x2"))


def test_costs():
    network = build_network({"type": "RWKVIR", "upscale": 4})
    assert round(evaluation.multiply_adds(network, 3, 4) / 1e9, 1) == 49.2
    assert evaluation.probe(network) == (3, 4)
    edsr = build_network({"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "upscale": 2, "num_feat": 8, "num_block": 1})
    assert evaluation.multiply_adds(edsr, 3, 2) > 0
    assert evaluation.probe(edsr) == (3, 2)  # also after it has been counted
    assert [quantity(x) for x in (869268, 49.2438528e9, 4.5866e12, 12, None)] == [
        "869.3 K", "49.24 G", "4.587 T", "12", "",
    ]  # fmt: skip


def test_peak_memory():
    with evaluation.peak_memory() as peak:
        np.ones(32 << 20, np.uint8)
    assert peak[0] is None or 30 < peak[0] < 60


def test_the_whole_command(data, tmp_path, capsys):
    run = experiment(tmp_path, SMALL, scale=2)
    twin = experiment(tmp_path, SMALL, "<b>other", seed=1, scale=2)
    out = tmp_path / "out"
    assert bench(data, out, run, twin, "--save-images") == 0
    printed = capsys.readouterr().out
    assert "x2: not below" in printed and "Set14, BSD100, Urban100, Manga109, ReSyn-test" in printed
    table = measured(out)
    assert list(table) == [(model, "x2", "Set5") for model in ("bicubic", "run", "<b>other")]
    row = table["run", "x2", "Set5"]
    network = build_network(SMALL)
    network.load_state_dict(torch.load(run / "models/net_g_latest.pth")["params"])
    scores = evaluate(network, find_pairs(data / "Set5", Task("x2")), Task("x2"))
    assert float(row["psnr"]) == pytest.approx(np.mean([score.psnr for score in scores]))
    assert int(row["params"]) == sum(p.numel() for p in network.parameters())
    assert int(row["images"]) == 3 and float(row["macs"]) > 0 and float(row["seconds"]) > 0
    images = rows(out, "images.csv")
    assert list(images[0]) == "model,task,scale,set,image,psnr,ssim,seconds".split(",")
    assert len(images) == 9
    restored = cv2.imread(str(out / "images/run/x2/Set5/a.png"))
    gt = cv2.imread(str(data / "Set5/HR/a.png"))[:46, :52]
    expected = next(float(one["psnr"]) for one in images if (one["model"], one["image"]) == ("run", "a"))
    assert calculate_psnr(restored, gt, crop_border=2, test_y_channel=True) == pytest.approx(expected, abs=1e-4)

    published = [row for row in rows(out) if row["source"] == "published"]
    assert {row["model"] for row in published} == {entry.model for entry in PUBLISHED if entry.task == "x2"}
    assert all(row["set"] == "Set5" and not row["seconds"] for row in published)
    text = (out / "benchmark.md").read_text()
    best = max(table.values(), key=lambda row: float(row["psnr"]))
    assert text.count("**") == 4 and f"**{float(best['psnr']):.2f}**" in text
    assert "*RWKV-IR light, 50 K, ReSyn (published)*" in text and "(published)" not in printed
    page = (out / "benchmark.html").read_text()
    assert "<b>other" not in page and "&lt;b&gt;other" in page
    assert "http" not in page.replace("http://www.w3.org", "") and "url(" not in page
    assert page.count('class="tag" title="arXiv 2412.03814"') == 4
    assert not list(out.glob("*.partial"))


def test_what_was_measured_is_kept(data, tmp_path, monkeypatch):
    run = experiment(tmp_path, SMALL, scale=2)
    out = tmp_path / "out"
    stock, calls = evaluation.score, []

    def score(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return stock(*arguments)

    monkeypatch.setattr(evaluation, "score", score)
    with pytest.raises(KeyboardInterrupt, match="interrupted after 4 of 6 pictures, which are kept; to go on, run the"):
        bench(data, out, run)
    assert not (out / "benchmark.csv").exists()
    assert bench(data, out, run) == 0
    assert len(calls) == 5 + 2
    before = (out / "images.csv").read_text()
    assert bench(data, out, run) == 0
    assert len(calls) == 7 and (out / "images.csv").read_text() == before
    assert bench(data, out, run, "--make-lq") == 0  # other input, though here with the same pixels
    assert len(calls) == 7 + 6
    (out / "cache.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(OSError, match=r"cache\.sqlite: file is not a database; .* remove the file if it is damaged"):
        bench(data, out, run)


def test_denoising_and_jpeg(data, tmp_path):
    network = {"type": "RWKVIR", "num_feat": 4, "depths": [1], "upsampler": "", "upscale": 1}
    blind = experiment(
        tmp_path, network, "blind", scale=1, datasets={"train": {"degradation": ["noise15", "noise50"]}, "val": {}}
    )
    gray = {**network, "num_in_ch": 1, "num_out_ch": 1}
    jpeg = experiment(tmp_path, gray, "jpeg", datasets={"train": {"degradation": "jpeg10"}})
    assert bench(data, tmp_path / "out", blind, jpeg) == 0
    places = [("noise15", "CBSD68"), ("noise50", "CBSD68"), ("jpeg10", "Classic5")]
    models = ["degraded"] * 3 + ["blind"] * 2 + ["jpeg"]
    expected = [(model, *place) for model, place in zip(models, [*places, *places], strict=True)]
    assert list(measured(tmp_path / "out")) == expected
    assert bench(data, tmp_path / "out", blind, "--tasks", "noise25", "x2", "--sets", "Set5") == 0
    assert [*measured(tmp_path / "out")] == [
        ("degraded", "noise25", "Set5"), ("bicubic", "x2", "Set5"), ("blind", "noise25", "Set5"),
    ]  # fmt: skip


def test_a_damaged_picture_is_told_and_the_rest_goes_on(data, tmp_path):
    for name in "abc":
        (tmp_path / "data/Set5/HR").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"data/Set5/HR/{name}.png").write_bytes((data / f"Set5/HR/{name}.png").read_bytes())
    (tmp_path / "data/Set5/HR/b.png").write_bytes((data / "Set5/HR/b.png").read_bytes()[:500])
    (tmp_path / "data/Set14").symlink_to(data / "Set5")
    with pytest.raises(benchmark.BenchmarkError) as failure:
        bench(tmp_path / "data", tmp_path / "out", "--tasks", "x2")
    (message,) = failure.value.messages
    assert message.startswith("bicubic, Set5, b: ") and "HR/b.png cannot be read" in message
    assert list(measured(tmp_path / "out")) == [("bicubic", "x2", "Set14")]  # no mean over fewer pictures
    assert len(rows(tmp_path / "out", "images.csv")) == 5
    assert "HR/b.png cannot be read" in (tmp_path / "out/benchmark.html").read_text()
    (tmp_path / "data/Set5/HR/b.png").write_bytes((data / "Set5/HR/b.png").read_bytes())
    assert bench(tmp_path / "data", tmp_path / "out", "--tasks", "x2") == 0


def test_too_little_memory(data, tmp_path, monkeypatch):
    def score(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(evaluation, "score", score)
    with pytest.raises(
        benchmark.BenchmarkError, match="bicubic, Set5, a and 2 more: too little memory; run again with --tile"
    ):
        bench(data, tmp_path / "out", "--tasks", "x2")


def test_models_that_cannot_be_had(data, tmp_path):
    run = experiment(tmp_path, SMALL, scale=2)

    def fails(*words, match):
        with pytest.raises((OSError, ValueError), match=match):
            bench(data, tmp_path / "out", *words)

    weights = run / "models/net_g_latest.pth"
    fails("nowhere", match="there is no nowhere; give the folder of an experiment or a file of weights")
    fails(tmp_path, match=f"{tmp_path} is no whole experiment: it holds no option file")
    fails(match="there is nothing to measure; give experiments")
    fails(run, run, match="two models are called run")
    fails(run, "--tasks", "x4", match="run: its network, x2 for 3 channels, does none of the --tasks x4")
    fails(run, "--sets", "Set6", match=f"x2: there is no folder Set6 below {data}; correct --data or --sets")
    fails(run, "--weights", "best", match=r"no models/net_g_best\.pth; .* with --weights latest")
    fails("-opt", run / "run.yml", match=r"run\.yml has no path:pretrain_network_g")

    other = experiment(tmp_path, {**SMALL, "upscale": 4}, "x4", scale=4)
    fails("-opt", other / "x4.yml", weights, match=r"cannot load .*net_g_latest\.pth: its keys do not fit")
    copied = tmp_path / "net.pth"
    copied.write_bytes(weights.read_bytes())
    fails(copied, match=r"net\.pth holds weights, but nothing says of what; add its option file")
    copied.write_bytes(weights.read_bytes()[:3000])
    fails("-opt", run / "run.yml", copied, match=r"cannot load .*net\.pth")
    weights.unlink()
    fails(run, match=r"no models/net_g_latest\.pth; .* it has saved nothing yet")

    lying = experiment(tmp_path, SMALL, "lying", scale=4)
    fails(lying, match="lying: its scale is 4, but its network enlarges by 2; correct one")
    silent = experiment(tmp_path, {"type": "RWKVIR", "num_feat": 4, "depths": [1], "upscale": 1, "upsampler": ""}, "s1")
    fails(silent, match="none of its datasets has a degradation.* --tasks noise25")
    (lying / "lying.yml").write_text(yaml.safe_dump({"network_g": {"type": "MSRResnet"}}))
    fails(lying, match="no plugin has the network_g:type 'MSRResnet'; did you mean MSRResNet")
    (lying / "lying.yml").write_text(yaml.safe_dump({"network_g": {"type": "MSRResNet", "features": 1}}))
    fails(lying, match="lying: network_g: .*unexpected keyword argument 'features'")


def test_weights_of_several_kinds(data, tmp_path):
    """EMA's are taken where they are there; bare parameters and an iteration's weights, too."""
    run = experiment(tmp_path, SMALL, scale=2)
    params = torch.load(run / "models/net_g_latest.pth")["params"]
    ema = {key: value * 0.5 for key, value in params.items()}
    torch.save({"params": params, "params_ema": ema}, run / "models/net_g_50.pth")
    torch.save(ema, tmp_path / "bare.pth")
    assert bench(data, tmp_path / "out", run, run / "models/net_g_50.pth") == 0
    names = [model for model, *_ in measured(tmp_path / "out")]
    assert names == ["bicubic", "run", "run net_g_50"]
    (half,) = (row["psnr"] for row in measured(tmp_path / "out").values() if row["model"] == "run net_g_50")
    assert bench(data, tmp_path / "out", "-opt", run / "run.yml", tmp_path / "bare.pth") == 0
    assert measured(tmp_path / "out")["bare", "x2", "Set5"]["psnr"] == half


def test_one_sentence(capsys):
    assert cli.main(["benchmark", "--tasks", "x2", "--data", "nowhere"]) == 1
    assert capsys.readouterr().err == (
        "basicsr benchmark: there is no folder nowhere; give one that holds test sets with --data\n"
    )
