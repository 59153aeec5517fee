"""The training loop does what the option file says: exactly as many iterations, resumed to the bit, on record."""

import copy
import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_options
from quick_runs import train, train_on_two

# Epochs of 5 iterations, states at 3, 6, ..., so that every resumption is amid an epoch.
RESUMED: dict[str, dict[str, Any]] = {
    "SRModel": {},
    "workers": {"datasets": {"train": {"num_worker_per_gpu": 2}}},
    "prefetch": {"datasets": {"train": {"num_worker_per_gpu": 2, "prefetch_mode": "cpu"}}},
    "ReSynPairedDataset": {"datasets": {"train": {"type": "ReSynPairedDataset"}}},
    "drop path": {
        "datasets": {"train": {"num_worker_per_gpu": 2}},
        "network_g": {
            **{"type": "SwinIR", "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 4, "mlp_ratio": 1},
            **{"img_size": 8, "drop_path_rate": 0.5, "upscale": 2, "upsampler": "pixelshuffledirect"},
        },
    },
    "RestorationModel": {
        "model_type": "RestorationModel",
        "network_g": {"type": "RWKVIR", "num_feat": 8, "depths": [1], "upscale": 2},
        "train": {
            **{"amp": "bfloat16", "accumulate": 2, "clip_grad": 0.1, "skip_nonfinite": 3, "ema_decay": 0.9},
            "optim_g": {"type": "AdamW", "lr": 2e-4},
        },
        "val": {"tile": 12, "tile_overlap": 6, "space": "y"},
    },
}


def merged(options: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`options` with `changes`, section by section; a section with a type is replaced."""
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(options.get(key), dict) and not key.startswith("network")
        options[key] = merged(options[key], value) if nested else copy.deepcopy(value)
    return options


@pytest.fixture
def options(pictures: Path) -> dict[str, Any]:
    """A run of 11 iterations with the best checkpoint kept."""
    changes: dict[str, Any] = {
        "datasets": {"train": {"dataset_enlarge_ratio": 2}},
        "train": {"total_iter": 11},
        "val": {"val_freq": 3},
        "logger": {"save_checkpoint_freq": 3, "save_best": "psnr"},
    }
    return merged(tiny_options(pictures), changes)


def curve(root: Path) -> list[tuple[int, str, str, float]]:
    """The rows of a run's learning curve, without the hours."""
    with (root / "experiments/tiny/learning_curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [(int(row["iter"]), row["dataset"], row["name"], float(row["value"])) for row in rows]


def losses(root: Path) -> list[float]:
    return [value for _, _, name, value in curve(root) if name == "l_pix"]


def log(root: Path) -> str:
    return "".join(file.read_text() for file in sorted((root / "experiments/tiny").glob("*.log")))


def models(root: Path) -> dict[str, Any]:
    return {file.name: torch.load(file) for file in sorted((root / "experiments/tiny/models").glob("*.pth"))}


@pytest.mark.parametrize("name", RESUMED)
def test_a_killed_run_resumes_to_the_bit(tmp_path, options, name):
    merged(options, RESUMED[name])
    assert train(tmp_path / "whole", options) == ""
    assert train(tmp_path / "killed", options, dies_at=9) == ""
    assert len(losses(tmp_path / "killed")) == 8
    assert train(tmp_path / "killed", options, "--auto_resume") == ""
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 11
    torch.testing.assert_close(models(tmp_path / "killed"), models(tmp_path / "whole"), rtol=0, atol=0)


@pytest.mark.parametrize(
    "file, resumes_from", [("net_g_6.pth", 3), ("6.state", 3), ("net_g_best.pth", 3), ("net_g_latest.pth", 9)]
)
def test_a_run_that_is_killed_while_it_saves_resumes_to_the_bit(tmp_path, options, file, resumes_from):
    assert train(tmp_path / "whole", options) == ""
    run = tmp_path / "killed/experiments/tiny"
    assert train(tmp_path / "killed", options, dies_saving=file) == ""
    assert len(list(run.glob("*/*.partial"))) == 1
    assert train(tmp_path / "killed", options, "--auto_resume") == ""
    assert f"Resuming training from epoch: {resumes_from // 5}, iter: {resumes_from}." in log(tmp_path / "killed")
    assert not list(run.glob("**/*.partial"))
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    torch.testing.assert_close(models(tmp_path / "killed"), models(tmp_path / "whole"), rtol=0, atol=0)


def test_the_best_checkpoint_is_that_of_the_best_validation(tmp_path, options):
    assert train(tmp_path, options) == ""
    scores = {iteration: value for iteration, dataset, _, value in curve(tmp_path) if dataset == "tinyval"}
    assert list(scores) == [3, 6, 9, 11]
    best = max(scores, key=scores.__getitem__)
    saved = models(tmp_path)
    assert (saved["net_g_best.pth"]["best"]["iter"], saved["net_g_best.pth"]["best"]["value"]) == (best, scores[best])
    of_that_iteration = saved.get(f"net_g_{best}.pth", saved["net_g_latest.pth"])
    torch.testing.assert_close(saved["net_g_best.pth"]["params"], of_that_iteration["params"], rtol=0, atol=0)


def test_a_resumed_run_does_not_forget_its_best(tmp_path, options):
    """After a resumption with a learning rate that ruins the network, the best is the one from before."""
    assert train(tmp_path, options, dies_at=7) == ""
    scores = {iteration: value for iteration, dataset, _, value in curve(tmp_path) if dataset}
    options["train"]["total_iter"] = 9
    state = tmp_path / "experiments/tiny/training_states/6.state"
    ruined = torch.load(state)
    ruined["optimizers"][0]["param_groups"][0]["lr"] = 10.0
    torch.save(ruined, state)
    assert train(tmp_path, options, "--auto_resume") == ""
    best = models(tmp_path)["net_g_best.pth"]["best"]
    assert best["iter"] <= 6 and best["value"] == max(scores.values())
    assert "Best: {:.4f} @ {} iter".format(best["value"], best["iter"]) in log(tmp_path)


def test_the_learning_curve_has_every_loss_and_metric_once(tmp_path, options):
    options["logger"]["print_freq"] = 2
    assert train(tmp_path, options, dies_at=9) == ""
    with (tmp_path / "experiments/tiny/learning_curve.csv").open("a") as file:
        file.write("8,0.1,")  # what a full disk or a kill may leave
    assert train(tmp_path, options, "--auto_resume") == ""
    rows = curve(tmp_path)
    assert [row[:3] for row in rows if row[1]] == [(i, "tinyval", "psnr") for i in (3, 6, 9, 11)]
    assert [row[:3] for row in rows if not row[1]] == [
        (i, "", name) for i in (2, 4, 6, 8, 10) for name in ("lr", "l_pix")
    ]
    with (tmp_path / "experiments/tiny/learning_curve.csv").open() as file:
        hours = [float(row["hours"]) for row in csv.DictReader(file)]
    assert hours == sorted(hours) and 0 < hours[0] < hours[-1] < 0.1


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("batch, ratio, total", [(1, 1, 11), (2, 1.5, 11), (3, 1, 4), (4, 3, 1), (5, 1, 20)])
def test_training_ends_at_total_iter(tmp_path, options, processes, batch, ratio, total):
    options["datasets"]["train"] |= {"batch_size_per_gpu": batch, "dataset_enlarge_ratio": ratio}
    options["train"]["total_iter"] = total
    assert (train if processes == 1 else train_on_two)(tmp_path, options) == ""
    assert [row[0] for row in curve(tmp_path) if row[2] == "l_pix"] == list(range(1, total + 1))
    assert "eta: 0:00:00, time (data)" in [line for line in log(tmp_path).splitlines() if "[eta" in line][-1]
    assert [row[0] for row in curve(tmp_path) if row[1]][-1] == total


@pytest.mark.parametrize("ratio", [2, 2.3])
@pytest.mark.parametrize("model", ["SRModel", "RestorationModel"])
def test_one_process_and_two_of_half_the_batch_have_the_same_losses(tmp_path, options, model, ratio):
    options["datasets"]["train"] |= {"dataset_enlarge_ratio": ratio}
    options["model_type"] = model
    if model == "RestorationModel":
        options["train"] |= {"clip_grad": 0.05, "accumulate": 2, "skip_nonfinite": 2}
        options["val"]["all_ranks"] = True
    assert train(tmp_path / "one", options) == ""
    options["datasets"]["train"]["batch_size_per_gpu"] //= 2
    assert train_on_two(tmp_path / "two", options) == ""
    assert "world_size: 2" in log(tmp_path / "two")
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert [row[:3] for row in one] == [row[:3] for row in two]
    assert [row[3] for row in two] == pytest.approx([row[3] for row in one], rel=1e-5)


@pytest.mark.parametrize("pictures_shown", [1, 10])
def test_metrics_of_pictures_shared_among_processes_are_those_of_one(tmp_path, options, pictures, pictures_shown):
    names = [f"picture{number}.png" for number in range(pictures_shown)]
    (tmp_path / "meta.txt").write_text("\n".join(names))
    options["datasets"]["val"]["meta_info_file"] = str(tmp_path / "meta.txt")
    options["val"] |= {"save_img": True}
    options |= {"model_type": "RestorationModel", "network_g": RESUMED["RestorationModel"]["network_g"]}
    for name, all_ranks in (("one", False), ("all", True)):
        options["val"]["all_ranks"] = all_ranks
        assert train_on_two(tmp_path / name, options) == ""
        assert len(list((tmp_path / name / "experiments/tiny/visualization").glob("*/*_9.png"))) == pictures_shown
    one, shared = curve(tmp_path / "one"), curve(tmp_path / "all")
    assert [row[:3] for row in one] == [row[:3] for row in shared]
    assert [row[3] for row in shared] == pytest.approx([row[3] for row in one], rel=1e-12)


def test_a_run_on_two_processes_resumes_to_the_bit(tmp_path, options):
    options["datasets"]["train"]["batch_size_per_gpu"] = 2
    merged(options, RESUMED["RestorationModel"])
    options["val"]["all_ranks"] = True
    assert train_on_two(tmp_path / "whole", options) == ""
    options["train"]["total_iter"] = 7
    assert train_on_two(tmp_path / "parts", options) == ""
    options["train"]["total_iter"] = 11
    assert train_on_two(tmp_path / "parts", options, "--auto_resume") == ""
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_validation_on_rank_0_leaves_training_alone(tmp_path, options):
    """Batch normalisation has buffers, which DistributedDataParallel would send to the process that trains."""
    options["network_g"] = RESUMED["RestorationModel"]["network_g"]
    options["datasets"]["train"]["batch_size_per_gpu"] = 2
    for name, frequency in (("often", 1), ("never", 100)):
        options["val"]["val_freq"] = frequency
        assert train_on_two(tmp_path / name, options) == ""
    assert losses(tmp_path / "often") == losses(tmp_path / "never")


def test_a_best_checkpoint_by_no_metric_is_one_sentence(tmp_path, options):
    options["logger"]["save_best"] = "psnrr"
    assert "logger:save_best is 'psnrr', which is not among val:metrics; did you mean psnr?" in train(tmp_path, options)


@pytest.mark.parametrize(
    "environment, sentence", [({}, "needs tasks that srun began"), ({"SLURM_PROCID": "0"}, "slurm needs a GPU")]
)
def test_slurm_without_tasks_or_gpu_is_one_sentence(tmp_path, options, environment, sentence):
    assert sentence in train(tmp_path, options, "--launcher", "slurm", environment=environment)
