"""Training in pieces: a time limit, pictures decoded once, a checkpoint that travels, weights with a card."""

import contextlib
import csv
import hashlib
import io
import multiprocessing
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
import pytest
import torch
import yaml
from quick_runs import context, train, train_on_two
from safetensors.torch import load_file
from test_loop import curve

from rwkvir_data import ReSynPairedDataset
from rwkvir_data.samplers import Draw

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import model_card
import train_light

NAME = train_light.RUN.name
SMALL = (
    "network_g:num_feat=8 network_g:depths=[1] datasets:train:gt_size=32 datasets:train:batch_size_per_gpu=2".split()
)
SMALL += [
    "datasets:train:num_worker_per_gpu=0",
    "train:total_iter=6",
    "logger:print_freq=1",
    "train:scheduler:milestones=[4]",
]
AT_ONCE = "0.000001"  # minutes: a piece of one iteration


def picture(seed: int, height: int, width: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def pictures_with_manifest(tmp_path_factory) -> Path:
    """Four JPEG files, one of which is flagged, and their MANIFEST.tsv."""
    root = tmp_path_factory.mktemp("train")
    (root / "real").mkdir()
    with (root / "MANIFEST.tsv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow("file source licence width height sha256 author flags".split())
        for number, (author, licence, flags) in enumerate(
            [
                ("", "CC0-1.0", ""),
                ('"A" Name', "CC-BY-4.0", "tile"),
                ("B", "CC-BY-4.0", ""),
                ("C", "MIT", "lossy anime-merge"),
            ]
        ):
            path = root / "real" / f"p.{number}.jpg"
            cv2.imwrite(str(path), picture(number, 48, 64))
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            writer.writerow([f"real/{path.name}", f"github:o/r@1:{path.name}", licence, 64, 48, digest, author, flags])
    return root


@pytest.fixture(scope="module")
def testsets(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("testsets")
    for seed, name in enumerate(model_card.SETS, 10):
        (root / name / "HR").mkdir(parents=True)
        cv2.imwrite(str(root / name / "HR" / "a.png"), picture(seed, 48, 52))
    return root


@pytest.fixture(scope="module")
def data(pictures_with_manifest, testsets, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("data") / "data"
    words = [
        "--train",
        str(pictures_with_manifest),
        "--val",
        str(testsets / "Set5"),
        "--leaves",
        "1",
        "-o",
        str(output),
    ]
    assert train_light.main(["prepare", *words]) == 0
    return output


def step(*words: Any) -> str:
    """Run a step of the driver in a process of its own, and return what it says on stderr if it fails, or ''."""
    with tempfile.NamedTemporaryFile("r") as said:
        process = context.Process(target=_step, args=([str(word) for word in words], said.name))
        process.start()
        process.join(120)
        return said.read() if process.exitcode else ""


def _step(words: list[str], said: str) -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)
    with open(said, "w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(io.StringIO()):
        sys.exit(train_light.main(words))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """Six iterations in one piece."""
    work = tmp_path_factory.mktemp("whole")
    assert step("piece", "--data", data, "--work", work, "--option", *SMALL) == ""
    return work


def saved(work: Path) -> dict[str, Any]:
    folder = work / "experiments" / NAME
    files = [folder / "models/net_g_6.pth", folder / "training_states/6.state"]
    return {file.name: torch.load(file) for file in files}


def rows(work: Path) -> list[list[str]]:
    """The learning curve, without the hours."""
    with (work / "experiments" / NAME / "learning_curve.csv").open() as file:
        return [[row[0], *row[2:]] for row in csv.reader(file)]


def test_pictures_are_packed_as_they_are(data, pictures_with_manifest):
    with (
        lmdb.open(str(data / "train_GT.lmdb"), readonly=True, lock=False) as environment,
        environment.begin() as packed,
    ):
        content = {key.decode(): bytes(value) for key, value in packed.cursor()}
    assert sorted(content) == ["leaves/0000", "real/p_0", "real/p_1", "real/p_2"]
    assert content["real/p_1"] == (pictures_with_manifest / "real" / "p.1.jpg").read_bytes()
    lines = (data / "train_GT.lmdb" / "meta_info.txt").read_text().splitlines()
    assert lines[0] == "real/p_0.png (48,64,3) 0"
    assert (data / "val" / "Set5" / "a.png").is_file()


def test_a_changed_picture_is_not_packed(pictures_with_manifest, tmp_path, capsys):
    copy = shutil.copytree(pictures_with_manifest, tmp_path / "train")
    cv2.imwrite(str(copy / "real" / "p.2.jpg"), picture(9, 48, 64))
    assert train_light.main(["prepare", "--train", str(copy), "-o", str(tmp_path / "data")]) == 1
    assert "real/p.2.jpg is not the file that its MANIFEST.tsv describes; get it again" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_what_is_too_large_to_take_along_is_not_kept(pictures_with_manifest, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_light, "MOST_MB", 0.001)
    words = ["--train", str(pictures_with_manifest), "--leaves", "0", "-o", str(tmp_path / "data")]
    assert train_light.main(["prepare", *words]) == 1
    assert "more than 0.001; lower --leaves or give fewer --val" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_pieces_on_several_machines_are_one_run_to_the_bit(whole, data, tmp_path):
    works = [tmp_path / name for name in "abc"]
    limits = [["--minutes", AT_ONCE, "--option", *SMALL], ["--minutes", AT_ONCE], []]
    for number, (work, limit) in enumerate(zip(works, limits, strict=True)):
        if number:
            work.mkdir()
            shutil.copy(works[number - 1] / "checkpoint.tar", work)
        assert step("piece", "--data", data, "--work", work, *limit) == ""
        iteration = [1, 2, 6][number]
        assert [file.name for file in work.glob("experiments/*/training_states/*")] == [f"{iteration}.state"]
    torch.testing.assert_close(saved(works[-1]), saved(whole), rtol=0, atol=0)
    assert rows(works[-1]) == rows(whole)
    assert sum(row[2] == "l_pix" for row in rows(whole)) == 6
    assert sum(row[1] == "Set5" for row in rows(whole)) == 1


def test_a_finished_run_is_left_as_it_is(whole, data):
    before = (whole / "checkpoint.tar").read_bytes()
    assert step("piece", "--data", data, "--work", whole) == ""
    assert (whole / "checkpoint.tar").read_bytes() == before


def test_a_run_does_not_change_its_options(whole, data):
    said = step("piece", "--data", data, "--work", whole, "--option", "train:optim_g:lr=0.1")
    assert "was begun with another train:optim_g:lr: 0.1 (0.0002); leave --option out" in said


def test_a_damaged_checkpoint_is_named(whole, data, tmp_path):
    content = (whole / "checkpoint.tar").read_bytes()
    (tmp_path / "checkpoint.tar").write_bytes(content[: len(content) // 2])
    assert "checkpoint.tar is damaged" in step("piece", "--data", data, "--work", tmp_path)


def test_the_checkpoint_of_the_light_network_is_small(data, tmp_path):
    small = [option for option in SMALL if not option.startswith("network_g")]
    assert step("piece", "--data", data, "--work", tmp_path, "--minutes", AT_ONCE, "--option", *small) == ""
    assert 13e6 < (tmp_path / "checkpoint.tar").stat().st_size < 16e6


def test_status(whole, capsys):
    assert train_light.main(["status", "--work", str(whole)]) == 0
    output = capsys.readouterr().out
    assert f"{NAME}: 6 of 6 iterations (100.0%)" in output
    assert "Set5, psnr: " in output
    assert train_light.main(["status", "--work", str(whole / "nowhere")]) == 1
    assert "begin it with: piece --data DATA" in capsys.readouterr().err


@pytest.fixture(scope="module")
def weights(whole, data, testsets, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("weights")
    words = ["--data", data, "--work", whole, "--testsets", testsets, "--note", "A test.", "-o", output]
    assert step("card", *words) == ""
    return output


def test_the_weights_are_those_of_the_run(whole, weights):
    content = saved(whole)["net_g_6.pth"]
    for name, key in (("", "params"), ("_ema", "params_ema")):
        torch.testing.assert_close(
            load_file(weights / f"rwkvir_light_x4_6{name}.safetensors"), dict(content[key]), rtol=0, atol=0
        )


def test_the_card_says_where_the_weights_come_from(weights):
    text = (weights / "rwkvir_light_x4_6.md").read_text()
    assert "**A test.**" in text
    assert "6 of 50,000 iterations, **partial: 0.0% of the budget**" in text
    assert '| CC-BY-4.0 | 2 | "A" Name, B | github:o/r |' in text
    assert "| generated by rwkvir | 1 | not named | rwkvir:dead_leaves |" in text
    assert "- network_g:num_feat: 8 (48)" in text
    assert "--test --network num_feat=8 depths=[1] > test.yml" in text
    assert "| *BSRN, 352 K parameters (published)* | *32.35* | *28.73* | *27.65* |" in text
    assert sum(line.startswith(("| bicubic ", "| rwkvir_light_x4_6")) for line in text.splitlines()) == 3


def test_basicsr_tests_safetensors(weights, testsets, whole, tmp_path, workspace):
    (metrics,) = [
        line
        for line in (weights / "rwkvir_light_x4_6.md").read_text().splitlines()
        if line.startswith("| rwkvir_light_x4_6_ema |")
    ]
    used = yaml.safe_load((whole / f"{NAME}.yml").read_text())
    place = {"type": "ReSynPairedDataset", "degradation": "x4", "io_backend": {"type": "disk"}}
    options = {
        **{key: used[key] for key in ("scale", "network_g")},
        **{"name": "tested", "model_type": "SRModel", "num_gpu": 0, "val": {**used["val"], "suffix": None}},
        "datasets": {"test_1": {"name": "Set5", "dataroot_gt": str(testsets / "Set5" / "HR"), **place}},
        "path": {"pretrain_network_g": str(weights / "rwkvir_light_x4_6_ema.safetensors"), "strict_load_g": True},
    }
    result = workspace.run("test", "-opt", workspace.write(options))
    assert result.returncode == 0, result.stderr
    (found,) = [line.split()[2] for line in result.stderr.splitlines() if "# psnr" in line]
    assert float(found) == pytest.approx(float(metrics.split()[3]), abs=0.006)


@pytest.mark.parametrize("launch", [train, train_on_two])
def test_a_time_limit_ends_training_after_an_iteration(options, tmp_path, launch):
    for iteration in (1, 2):
        assert launch(tmp_path, options, "--auto_resume", "--minutes", AT_ONCE) == ""
        states = sorted((tmp_path / "experiments/tiny/training_states").iterdir())
        assert [state.name for state in states] == [f"{number}.state" for number in range(1, iteration + 1)]
    assert (
        f"stopped after {float(AT_ONCE):g} minutes at iteration 2 of 20, which is saved"
        in (tmp_path / "output").read_text()
    )


def test_a_time_limit_changes_nothing(options, tmp_path):
    assert train(tmp_path / "whole", options) == ""
    for _ in range(6):  # an epoch has two iterations
        assert train(tmp_path / "pieces", options, "--auto_resume", "--minutes", AT_ONCE) == ""
    assert train(tmp_path / "pieces", options, "--auto_resume", "--minutes", "9") == ""
    assert curve(tmp_path / "pieces") == curve(tmp_path / "whole")
    runs = [torch.load(tmp_path / name / "experiments/tiny/models/net_g_latest.pth") for name in ("whole", "pieces")]
    torch.testing.assert_close(*runs, rtol=0, atol=0)


@pytest.mark.parametrize("minutes", ["0", "-1", "x", "nan", "inf"])
def test_a_time_limit_is_a_time(workspace, options, minutes):
    result = workspace.train(options, "--minutes", minutes)
    assert result.returncode == 2
    assert f"'{minutes}' is no time to train for; give minutes above 0" in result.stderr


@pytest.mark.parametrize("lq", [{"degradation": "x2"}, {"dataroot_lq": "lq"}, {"degradation": ["noise25", "jpeg20"]}])
@pytest.mark.parametrize("color", ["rgb", "y", "gray"])
@pytest.mark.parametrize("phase", ["train", "val"])
def test_decoded_pictures_give_the_same_items(pictures, lq, color, phase):
    lq = {key: str(pictures / value) if key == "dataroot_lq" else value for key, value in lq.items()}
    scale = 1 if isinstance(lq.get("degradation"), list) else 2
    if scale == 1 and phase == "val":
        lq["degradation"] = "noise25"
    opt = {"name": "t", "phase": phase, "scale": scale, "gt_size": 16, "color": color, **lq}
    opt |= {"dataroot_gt": str(pictures / "gt"), "io_backend": {"type": "disk"}}
    usual, cached = (ReSynPairedDataset({**opt, "cache": cache}) for cache in (False, True))
    for index in range(len(usual)):
        one, other = (dataset[Draw(index, (0, 0, index))] for dataset in (usual, cached))
        assert torch.equal(one.pop("gt"), other.pop("gt")) and torch.equal(one.pop("lq"), other.pop("lq"))
        assert one == other


def test_decoded_pictures_are_read_once(data, monkeypatch):
    place = {"dataroot_gt": str(data / "train_GT.lmdb"), "io_backend": {"type": "lmdb"}}
    dataset = ReSynPairedDataset(
        {"name": "t", "phase": "train", "scale": 4, "gt_size": 32, "degradation": "x4", "cache": True, **place}
    )
    monkeypatch.setattr(cv2, "imdecode", None)
    monkeypatch.setattr("rwkvir_data.degraded_picture.degrade", None)
    assert [tuple(dataset[index]["lq"].shape) for index in range(len(dataset))] == [(3, 8, 8)] * 4
