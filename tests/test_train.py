"""`basicsr train` and `basicsr test` as processes of their own, over BasicSR's unmodified loop."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import pytest
import quick_runs
import torch
from conftest import PICTURES, Workspace, tiny_options

# What trains over all back ends and worker counts below: datasets, and a network for each.
NETWORKS: dict[str, dict[str, Any]] = {
    "PairedImageDataset": {"type": "MSRResNet", "num_feat": 8, "num_block": 1, "upscale": 2},
    "ReSynPairedDataset": {"type": "RWKVIR", "num_feat": 8, "depths": [1], "upscale": 2},
}

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "rwkvir")


def iterations(log: str) -> list[int]:
    """The iterations that a log of print_freq 1 shows, in its order."""
    return [int(number.replace(",", "")) for number in re.findall(r"iter: *([\d,]+), lr", log)]


def states(workspace: Workspace) -> list[int]:
    """The iterations at which states of the run were saved, in order."""
    return sorted(int(file.stem) for file in (workspace.root / "experiments/tiny/training_states").glob("*.state"))


def resumed_from(workspace: Workspace) -> int:
    """The iteration from which the latest resumption of the run began."""
    return int(re.findall(r"Resuming training from epoch: \d+, iter: (\d+)", workspace.log())[-1])


def assert_everything_saved_loads(workspace: Workspace) -> None:
    run = workspace.root / "experiments/tiny"
    for file in [*run.glob("models/*.pth"), *run.glob("training_states/*.state")]:
        torch.load(file)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pictures) -> tuple[Workspace, dict[str, Any]]:
    """A finished run of 20 iterations, not to be changed, and its options."""
    workspace, options = Workspace(tmp_path_factory.mktemp("trained")), tiny_options(pictures)
    result = workspace.train(options)
    assert result.returncode == 0, result.stderr
    return workspace, options


def test_a_run_trains_validates_and_saves_to_its_last_iteration(trained):
    workspace, _ = trained
    log = workspace.log()
    assert iterations(log) == list(range(1, 21))
    assert states(workspace) == [5, 10, 15, 20]
    models = {file.name for file in (workspace.root / "experiments/tiny/models").iterdir()}
    assert models == {"net_g_5.pth", "net_g_10.pth", "net_g_15.pth", "net_g_20.pth", "net_g_latest.pth"}
    scores = [float(score) for score in re.findall(r"# psnr: ([\d.]+)", log)]
    assert len(scores) == 2 and all(10 < score < 60 for score in scores)


def test_a_test_from_the_checkpoint_repeats_the_validation(trained, workspace):
    training, options = trained
    options = {key: value for key, value in options.items() if key not in ("train", "logger")}
    checkpoint = training.root / "experiments/tiny/models/net_g_20.pth"
    options["path"] = {"pretrain_network_g": str(checkpoint)}
    options["datasets"] = {"test_1": options["datasets"]["val"]}
    options["val"] = {**options["val"], "save_img": True, "suffix": None}
    result = workspace.run("test", "-opt", workspace.write(options))
    assert result.returncode == 0, result.stderr
    (log,) = (workspace.root / "results/tiny").glob("*.log")
    score = re.findall(r"# psnr: [\d.]+", log.read_text())
    assert score == re.findall(r"# psnr: [\d.]+", training.log())[-1:]
    assert len(list((workspace.root / "results/tiny/visualization/tinyval").glob("*.png"))) == PICTURES


def test_a_checkpoint_of_another_configuration_is_one_sentence(trained, workspace, options, one_sentence):
    checkpoint = trained[0].root / "experiments/tiny/models/net_g_20.pth"
    options["path"]["pretrain_network_g"] = str(checkpoint)
    options["network_g"]["num_feat"] = 16
    sentence = one_sentence(workspace.train(options))
    assert str(checkpoint) in sentence and "of another shape (first conv_first.weight)" in sentence
    assert "Traceback" in workspace.log()  # kept there, for whoever wants it


def test_a_run_that_is_damaged_at_its_end_resumes_from_the_state_before(trained, workspace):
    training, options = trained
    run = workspace.root / "experiments/tiny"
    for file in ("training_states/15.state", "models/net_g_15.pth", "training_states/20.state", "models/net_g_20.pth"):
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / file).write_bytes((training.root / "experiments/tiny" / file).read_bytes())
    newest = run / "training_states/20.state"
    newest.write_bytes(newest.read_bytes()[:-50])
    options = {**options, "train": {**options["train"], "total_iter": 23}}
    result = workspace.train(options, "--auto_resume")
    assert result.returncode == 0, result.stderr
    assert "Cannot resume from" in result.stdout and "20.state" in result.stdout
    assert resumed_from(workspace) == 15
    assert iterations(workspace.log()) == list(range(16, 24))
    assert not list((workspace.root / "experiments").glob("*archived*"))


def start_long_run(workspace: Workspace, options: dict[str, Any], saved: int = 2) -> Any:
    """Start a run that does not end by itself, and wait until it has saved some states."""
    options["train"]["total_iter"] = 1_000_000
    process = workspace.start("train", "-opt", workspace.write(options))
    deadline = time.monotonic() + 60
    while len(states(workspace)) < saved:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_resumes_where_it_was_saved(workspace, options, workers):
    options["datasets"]["train"]["num_worker_per_gpu"] = workers
    process = start_long_run(workspace, options)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert_everything_saved_loads(workspace)
    newest = states(workspace)[-1]
    options["train"]["total_iter"] = newest + 3
    time.sleep(1)  # a log file is named by the second
    result = workspace.train(options, "--auto_resume")
    assert result.returncode == 0, result.stderr
    assert resumed_from(workspace) == newest
    assert iterations(workspace.log())[-3:] == [newest + 1, newest + 2, newest + 3]


def test_resuming_elsewhere_begins_anew_there_and_leaves_the_run_alone(trained, workspace):
    training, options = trained
    result = workspace.train(options, "--auto_resume")
    assert result.returncode == 0, result.stderr
    assert iterations(workspace.log())[0] == 1
    assert [file.name for file in (training.root / "experiments").iterdir()] == ["tiny"]


@pytest.mark.parametrize("number, workers, prefetch", [(signal.SIGINT, 0, None), (signal.SIGTERM, 2, "cpu")])
def test_an_interrupted_run_says_how_to_continue(workspace, options, number, workers, prefetch):
    options["datasets"]["train"].update(num_worker_per_gpu=workers, prefetch_mode=prefetch)
    process = start_long_run(workspace, options)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    newest = states(workspace)[-1]
    sentence = errors.strip().splitlines()[-1]
    assert re.fullmatch(
        rf"basicsr train: interrupted at iteration \d+, saved up to iteration {newest}; "
        "to continue, run the same command with --auto_resume",
        sentence,
    )
    assert_everything_saved_loads(workspace)


def test_a_signal_that_a_destructor_swallows_comes_again():
    code = """
import os, signal, time
from rwkvir import compat, pipeline
compat.apply()

class Slow:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)

try:
    with pipeline._interruptible():
        Slow()
        time.sleep(30)
except pipeline.Interrupted as stop:
    raise SystemExit(stop.exit_code)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=25)
    assert (result.returncode, result.stderr) == (143, "")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("backend", ["disk", "lmdb"])
@pytest.mark.parametrize("dataset", NETWORKS)
def test_every_back_end_reaches_exactly_total_iter(workspace, options, pictures, dataset, backend, workers):
    suffix = ".lmdb" if backend == "lmdb" else ""
    for section in options["datasets"].values():
        section.update(
            type=dataset,
            dataroot_gt=f"{pictures}/gt{suffix}",
            dataroot_lq=f"{pictures}/lq{suffix}",
            io_backend={"type": backend},
        )
    options["datasets"]["train"].update(num_worker_per_gpu=workers, batch_size_per_gpu=3)
    options["network_g"] = NETWORKS[dataset]
    options["train"]["total_iter"] = 8
    options["val"]["val_freq"] = 4
    assert quick_runs.train(workspace.root, options) == ""
    assert iterations(workspace.log()) == list(range(1, 9))


@pytest.mark.parametrize("backend, workers", [("disk", 0), ("lmdb", 2)])
def test_two_processes_train_without_a_gpu(workspace, options, pictures, backend, workers):
    suffix = ".lmdb" if backend == "lmdb" else ""
    for section in options["datasets"].values():
        section.update(dataroot_gt=f"{pictures}/gt{suffix}", dataroot_lq=f"{pictures}/lq{suffix}")
        section["io_backend"] = {"type": backend}
    options["datasets"]["train"].update(num_worker_per_gpu=workers, batch_size_per_gpu=2)
    options["train"]["total_iter"] = 10
    result = workspace.run("train", "-opt", workspace.write(options), "--launcher", "pytorch", python=TORCHRUN)
    assert result.returncode == 0, result.stderr
    assert iterations(workspace.log()) == list(range(1, 11))
    assert "world_size: 2" in workspace.log()
    assert len(re.findall("# psnr", workspace.log())) == 1


def test_a_failing_process_of_two_is_named_by_its_rank(workspace, options):
    options["datasets"]["train"]["batch_size_per_gpu"] = PICTURES
    result = workspace.run("train", "-opt", workspace.write(options), "--launcher", "pytorch", python=TORCHRUN)
    assert result.returncode == 1
    assert re.search(r"^basicsr train: rank [01]: datasets:train holds 5 pictures per process", result.stderr, re.M)


@pytest.mark.parametrize("workers, prefetch", [(0, "cpu"), (2, None)])
def test_a_corrupt_picture_is_named(workspace, options, pictures, one_sentence, workers, prefetch):
    broken = workspace.root / "broken"
    broken.mkdir()
    for file in (pictures / "gt").iterdir():
        (broken / file.name).write_bytes(b"no picture")
    options["datasets"]["train"].update(dataroot_gt=str(broken), num_worker_per_gpu=workers, prefetch_mode=prefetch)
    sentence = one_sentence(workspace.train(options))
    assert re.match(r"basicsr train: \S+/broken/picture\d\.png \(10 bytes\) is not an image", sentence)


def test_an_unexpected_error_says_how_to_see_more(workspace, options, one_sentence):
    options["datasets"]["train"]["gt_size"] = [16]
    process = workspace.train(options)
    sentence = one_sentence(process)
    assert sentence.startswith("basicsr train: TypeError: ")
    assert sentence.endswith("run again with --debug for the traceback")
    assert "Traceback" in workspace.train(options, "--debug").stderr


def test_a_batch_larger_than_the_dataset_is_an_error(workspace, options, one_sentence):
    options["datasets"]["train"]["batch_size_per_gpu"] = PICTURES + 1
    assert "less than a batch of 11; lower batch_size_per_gpu" in one_sentence(workspace.train(options))


def test_basicsrs_own_loop_trains_the_model_after_an_import(workspace, options):
    options |= {
        "model_type": "RestorationModel",
        "val": {**options["val"], "space": "y", "tile": 12, "tile_overlap": 6},
    }
    options["train"] |= {"amp": "bfloat16", "accumulate": 2, "clip_grad": 1, "skip_nonfinite": 5, "total_iter": 4}
    options["val"]["val_freq"] = 2
    code = "import rwkvir.restoration_model, basicsr.train; basicsr.train.train_pipeline('.')"
    result = workspace.run("-opt", workspace.write(options), python=("-c", code))
    assert result.returncode == 0, result.stderr
    assert len(re.findall("# psnr", workspace.log())) == 3  # BasicSR's loop validates once more at its end
    assert torch.load(workspace.root / "experiments/tiny/models/net_g_latest.pth")["params"]


@pytest.mark.slow
def test_two_nodes_train_as_one_process_does(tmp_path, pictures, options):
    """Two agents of torchrun that meet over the network, as on two nodes, with a process each."""
    options["train"]["total_iter"] = 6
    one, two = Workspace(tmp_path / "one"), Workspace(tmp_path / "two")
    for workspace in (one, two):
        workspace.root.mkdir()
    assert one.train(options).returncode == 0
    options["datasets"]["train"]["batch_size_per_gpu"] //= 2
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = f"localhost:{free.getsockname()[1]}"
    flags = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={meeting}", "--rdzv-id=1"]
    command = ("-m", "torch.distributed.run", *flags, "--local-addr=localhost", "-m", "rwkvir")
    words = ("train", "-opt", two.write(options), "--launcher", "pytorch")
    agents = [two.start(*words, python=command) for _ in range(2)]
    for agent in agents:
        _, errors = agent.communicate(timeout=120)
        assert agent.returncode == 0, errors
    assert "world_size: 2" in two.log()
    losses = [[float(loss) for loss in re.findall(r"l_pix: (\S+)", workspace.log())] for workspace in (one, two)]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)  # as far as the log writes them
