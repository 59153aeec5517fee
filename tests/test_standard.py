"""The standard's option files: current, complete, accepted by the check, and every network builds and trains."""

import shlex
from pathlib import Path

import pytest
import torch
import yaml
from basicsr.archs import build_network
from basicsr.data import build_dataset

from rwkvir import checks, cli, plugins, standard

plugins.load_plugins()
OPTIONS = Path(__file__).parents[1] / "options"
COMMITTED = standard.committed_files()
RUNS = standard.runs()
TINY = {  # configurations that train in a second
    "RWKVIR": ["num_feat=8", "depths=[1]"],
    "SwinIR": ["embed_dim=12", "depths=[1]", "num_heads=[2]", "window_size=4"],
    "ECBSR": ["num_block=1", "num_channel=4"],
}


def run_id(run: standard.Run) -> str:
    return run.name


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_files_are_current(name):
    assert (OPTIONS / name).read_text() == COMMITTED[name], "run: make options"


def test_no_other_files_stand_in_options():
    assert sorted(file.name for file in OPTIONS.iterdir()) == sorted(COMMITTED)


@pytest.mark.parametrize("is_train", [True, False], ids=["train", "test"])
@pytest.mark.parametrize("run", RUNS, ids=run_id)
def test_every_file_lacks_nothing_but_the_data(run, is_train):
    text = (standard.training_file if is_train else standard.test_file)(run)
    findings = checks.check_options(yaml.safe_load(text), is_train)
    keys = {finding.key for finding in findings} - {"path:pretrain_network_g"}
    assert keys and all(":dataroot_" in key for key in keys), findings


@pytest.mark.parametrize("run", RUNS, ids=run_id)
def test_the_header_says_what_renders_the_file_and_where_it_is_from(run, capsys):
    text = standard.training_file(run)
    header = text[: text.index("\nname:")]
    command = next(line.lstrip("# ") for line in header.splitlines() if "basicsr standard" in line)
    assert cli.main(shlex.split(command.split(">")[0])[1:]) == 0
    assert capsys.readouterr().out == text
    header = header.replace("\n# ", " ")
    for part in (
        standard.NETWORKS[run.arch][run.task_name].source[:30],
        "Published: ",
        "From the released code: ",
        "Ours: ",
    ):
        assert part in header
    assert all(len(line) <= 120 for line in text.splitlines())


PARAMETERS = {  # thousands, as published, or as counted in others' tables
    ("RWKVIR", "classic", 4): 20140,
    ("RWKVIR", "light", 4): 869,
    ("RWKVIR", "denoise", 25): 19730,
    ("SwinIR", "classic", 4): 11900,
    ("SwinIR", "light", 2): 910,
    ("SwinIR", "light", 3): 918,
    ("SwinIR", "light", 4): 930,
    ("EDSR", "classic", 4): 43090,
    ("EDSR", "light", 4): 1518,
    ("RCAN", "classic", 4): 15592,
    ("RRDBNet", "classic", 4): 16698,
    ("MSRResNet", "light", 4): 1518,
}


@pytest.mark.parametrize("cell", PARAMETERS, ids=str)
def test_networks_have_their_published_size(cell):
    with torch.device("cpu" if cell[0] == "SwinIR" else "meta"):  # whose constructor computes
        network = build_network(standard.network_options(standard.Run(*cell)))
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count / 1000 == pytest.approx(PARAMETERS[cell], rel=0.005)


@pytest.mark.parametrize(
    "task, level, iterations, milestones, patch, batch, loss",
    [
        ("classic", 3, 100_000, [50_000, 75_000, 90_000, 95_000], 64, 32, "L1Loss"),
        ("light", 3, 50_000, [25_000, 40_000, 45_000, 47_500], 64, 64, "L1Loss"),
        ("denoise", 25, 100_000, [50_000, 75_000, 90_000, 95_000], 128, 16, "CharbonnierLoss"),
        ("jpeg", 10, 100_000, [50_000, 75_000, 90_000, 95_000], 126, 16, "CharbonnierLoss"),
    ],
)
def test_the_standard_is_what_the_paper_and_its_code_say(task, level, iterations, milestones, patch, batch, loss):
    """The standard once more and by hand."""
    options = standard.train_options(standard.Run("RWKVIR", task, level))
    scale, y = (level, True) if task in ("classic", "light") else (1, False)
    train = options["train"]
    assert train["total_iter"] == iterations and train["scheduler"]["milestones"] == milestones
    assert train["optim_g"] == {"type": "Adam", "lr": 2e-4, "weight_decay": 0, "betas": [0.9, 0.99]}
    assert (train["warmup_iter"], train["ema_decay"], options["manual_seed"]) == (-1, 0, 10)
    assert train["pixel_opt"]["type"] == loss
    data = options["datasets"]["train"]
    assert (data["gt_size"], data["batch_size_per_gpu"]) == (patch * scale, batch)
    border = scale if y else 0
    assert options["val"]["metrics"]["psnr"] == {"type": "calculate_psnr", "crop_border": border, "test_y_channel": y}


@pytest.mark.parametrize("task", ["classic", "light"])
def test_the_long_budget_of_super_resolution(task):
    train = standard.train_options(standard.Run("RWKVIR", task, 2, "restoration"))["train"]
    assert train["total_iter"] == 500_000
    assert train["scheduler"]["milestones"] == [250_000, 400_000, 450_000, 475_000]


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--arch SwinIRR --task light --scale 2", "--arch SwinIRR is not a registered network; did you mean SwinIR?"),
        ("--task lihgt --scale 2", "--task lihgt is not in the standard; did you mean light?"),
        ("--scale 2", "--task is missing; give one of classic, light, denoise, jpeg"),
        ("--task light", "--scale is missing; give one of 2, 3, 4"),
        ("--task light --scale 8", "--scale 8 is not in the standard of RWKVIR, light super-resolution; give one of 2"),
        ("--task classic --scale 3 --arch RRDBNet", "give one of 2, 4"),
        (
            "--task jpeg --scale 2",
            "--scale means nothing for grey JPEG artefact reduction; give --quality in its place",
        ),
        ("--task light --scale 2 --budget convergnce", "did you mean convergence?"),
        (
            "--task jpeg --quality 10 --budget restoration",
            "neither the paper nor its code gives one; use --budget conv",
        ),
        (
            "--task light --scale 2 --network num_faet=2",
            "--network:num_faet is not an option of RWKVIR; did you mean num_f",
        ),
        ("--task light --scale 2 --network num_feat", "--network num_feat is not of the form key=value"),
        ("--task jpeg --quality 10 --arch EDSR", "EDSR, so configured, cannot do grey JPEG artefact reduction"),
        ("--task jpeg --quality 10 --arch RIDNet", "--network:mid_channels is missing, and RIDNet has no default"),
        ("--task light --scale 2 --arch SpyNet", "SpyNet takes no upscale or scale"),
    ],
)
def test_what_the_standard_lacks_is_one_sentence(capsys, words, expected):
    code = cli.main(["standard", *words.split()])
    captured = capsys.readouterr()
    assert code == 1 and captured.out == "" and captured.err.count("\n") == 1
    assert expected in captured.err


def test_the_list_shows_every_task_budget_and_network(capsys):
    assert cli.main(["standard", "--list"]) == 0
    text = capsys.readouterr().out
    for name in (*standard.TASKS, *standard.BUDGETS, *standard.NETWORKS):
        assert name in text
    assert len([line for line in text.splitlines() if line.startswith(tuple(standard.TASKS))]) == 6
    assert text.count(", ReSyn\n") == 4


def test_grey_pictures_change_the_channels():
    assert standard.network_options(standard.Run("SwinIR", "jpeg", 10))["in_chans"] == 1
    options = standard.network_options(standard.Run("RRDBNet", "jpeg", 10, changes=("num_block=1",)))
    assert options == {"type": "RRDBNet", "num_in_ch": 1, "num_out_ch": 1, "scale": 1, "num_block": 1}


def test_options_of_any_network_follow_the_task_and_the_command_line():
    run = standard.Run("SRVGGNetCompact", "light", 2, changes=("num_conv=4", "act_type=relu"))
    options = standard.train_options(run)
    network = {
        "type": "SRVGGNetCompact",
        "upscale": 2,
        "num_in_ch": 3,
        "num_out_ch": 3,
        "num_conv": 4,
        "act_type": "relu",
    }
    assert options["network_g"] == network and options["model_type"] == "SRModel"
    assert options["name"] == "SRVGGNetCompact_light_x2_num_conv-4_act_type-relu"  # no other run's folder
    assert "with num_conv=4 act_type=relu" in standard.training_file(run).replace("\n# ", " ")


@pytest.fixture(scope="module")
def standard_data(tmp_path_factory, pictures) -> Path:
    """A folder with `datasets`, laid out as the files expect it, of tiny pictures."""
    root = tmp_path_factory.mktemp("standard")
    sets = {name for task in standard.TASKS.values() for name in task.test_sets}
    for name in sets:
        (root / "datasets" / name).mkdir(parents=True)
        (root / "datasets" / name / "HR").symlink_to(pictures / "gt")
    (root / "datasets/ReSyn").mkdir()
    for name, kind in (("train_GT", "gt"), ("train_LQ_x2", "lq"), ("test_GT", "gt"), ("test_LQ_x2", "lq")):
        (root / f"datasets/ReSyn/{name}.lmdb").symlink_to(pictures / f"{kind}.lmdb")
    return root


@pytest.mark.parametrize("is_train", [True, False], ids=["train", "test"])
@pytest.mark.parametrize("task, level", [("light", 2), ("denoise", 25), ("jpeg", 10)])
def test_every_dataset_of_the_files_reads_what_resyn_builds(standard_data, monkeypatch, task, level, is_train):
    monkeypatch.chdir(standard_data)
    run = standard.Run("RWKVIR", task, level)
    options = (standard.train_options if is_train else standard.test_options)(run)
    findings = checks.check_options(options, is_train)
    assert [finding.key for finding in findings] == ([] if is_train else ["path:pretrain_network_g"])
    for phase, dataset in options["datasets"].items():
        small = {"gt_size": 8 * run.scale} if phase == "train" else {}
        item = build_dataset({**dataset, **small, "scale": run.scale, "phase": phase.split("_")[0]})[0]
        assert item["lq"].shape[0] == run.channels
        assert item["gt"].shape[1:] == tuple(run.scale * side for side in item["lq"].shape[1:])


@pytest.mark.parametrize(
    "arch, task, level",
    [
        ("RWKVIR", "light", 2),
        ("SwinIR", "jpeg", 10),
        ("ECBSR", "light", 2),
    ],
)
def test_a_rendered_file_trains_and_its_test_file_tests(standard_data, workspace, arch, task, level):
    (workspace.root / "datasets").symlink_to(standard_data / "datasets")
    run = standard.Run(arch, task, level, changes=tuple(TINY[arch]))
    patch = 8 * run.scale
    train = ["train:total_iter=2", "val:val_freq=2", f"datasets:train:gt_size={patch}", "logger:use_tb_logger=false"]
    train += ["datasets:train:batch_size_per_gpu=2", "datasets:train:num_worker_per_gpu=0"]
    file = workspace.write(standard.training_file(run), "train.yml")
    result = workspace.run("train", "-opt", file, "--force_yml", *train)
    assert result.returncode == 0, result.stderr
    assert f"Validation {run.task.test_sets[0]}" in workspace.log(run.name)
    result = workspace.run("test", "-opt", workspace.write(standard.test_file(run), "test.yml"))
    assert result.returncode == 0, result.stderr
    (log,) = (workspace.root / "results" / run.name).glob("*.log")
    assert log.read_text().count("# psnr") == len(run.task.test_sets) + run.task.enlarges
