"""What is wrong with an option file is said in sentences, by `basicsr train` and `basicsr check`; nothing else is."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from basicsr.utils.registry import ARCH_REGISTRY, MODEL_REGISTRY

from rwkvir import checks, cli, dry_step, option_keys, plugins, restoration_model

plugins.load_plugins()
Options = dict[str, Any]


def with_sources(dataset: Options, second: str) -> Options:
    """The training set with its folders in `sources`, and beside them a source whose GT is in `second`."""
    places = {key: dataset[key] for key in ("dataroot_gt", "dataroot_lq")}
    rest = {key: value for key, value in dataset.items() if key not in places}
    return {**rest, "type": "ReSynPairedDataset", "sources": [places, {**places, "dataroot_gt": second}]}


# Each entry: a change to good options, or a whole text in their place, and what the sentence must name.
BAD_OPTIONS: dict[str, tuple[Callable[[Options, Path], Any], list[str]]] = {
    "not YAML": (lambda o, p: "name: [tiny", ["is not YAML", "line 1"]),
    "not a mapping": (lambda o, p: "- tiny", ["holds no mapping but list"]),
    "empty": (lambda o, p: "", ["holds no mapping"]),
    "no num_gpu": (lambda o, p: o.pop("num_gpu"), ["num_gpu is missing"]),
    "no name": (lambda o, p: o.__delitem__("name"), ["name is missing"]),
    "no train set": (lambda o, p: o["datasets"].pop("train"), ["datasets:train is missing"]),
    "no use_tb_logger": (lambda o, p: o["logger"].pop("use_tb_logger"), ["logger:use_tb_logger is missing"]),
    "no val_freq": (lambda o, p: o["val"].pop("val_freq"), ["val:val_freq is missing"]),
    "no optimiser": (lambda o, p: o["train"].pop("optim_g"), ["train:optim_g is missing"]),
    "no network": (lambda o, p: o.pop("network_g"), ["network_g is missing"]),
    "no gt_size": (lambda o, p: o["datasets"]["train"].pop("gt_size"), ["datasets:train:gt_size is missing"]),
    "no crop_border": (
        lambda o, p: o["val"]["metrics"]["psnr"].pop("crop_border"),
        ["val:metrics:psnr:crop_border is missing", "calculate_psnr"],
    ),
    "dataset no section": (lambda o, p: o["datasets"].update(val=None), ["datasets:val is None, not a section"]),
    "name no text": (lambda o, p: o.update(name=1), ["name is 1, not text"]),
    "path no section": (lambda o, p: o.update(path="here"), ["path is 'here', not a section"]),
    "unknown network": (lambda o, p: o["network_g"].update(type="msrresnett"), ["network_g:type", "mean MSRResNet"]),
    "unknown model": (lambda o, p: o.update(model_type="SRModle"), ["model_type is 'SRModle'", "SRModel"]),
    "unknown dataset": (
        lambda o, p: o["datasets"]["val"].update(type="Zebra"),
        ["datasets:val:type", "PairedImageDataset"],
    ),
    "unknown metric": (
        lambda o, p: o["val"]["metrics"]["psnr"].update(type="calculate_psrn"),
        ["val:metrics:psnr:type", "calculate_psnr"],
    ),
    "unknown loss": (lambda o, p: o["train"]["pixel_opt"].update(type="L1"), ["train:pixel_opt:type", "L1Loss"]),
    "unknown argument": (lambda o, p: o["network_g"].update(num_blocks=2), ["network_g:num_blocks", "mean num_block"]),
    "text as number": (
        lambda o, p: yaml.safe_dump(o).replace("lr: 0.0002", "lr: 2e-4"),
        ["train:optim_g:lr is the text '2e-4'", "write 2.0e-4 or !!float 2e-4"],
    ),
    "text in list": (lambda o, p: o["train"]["scheduler"].update(milestones=["25e1"]), ["milestones", "25.0e+1"]),
    "no dataroot": (
        lambda o, p: o["datasets"]["train"].update(dataroot_gt="/absent"),
        ["datasets:train:dataroot_gt is /absent", "does not exist"],
    ),
    "empty dataroot": (
        lambda o, p: o["datasets"]["val"].update(dataroot_lq=str(p)),
        ["datasets:val:dataroot_lq", "an empty folder"],
    ),
    "lmdb without suffix": (
        lambda o, p: o["datasets"]["train"].update(dataroot_gt=str(p), io_backend={"type": "lmdb"}, dataroot_lq=None),
        ["datasets:train:dataroot_gt", "does not end in .lmdb"],
    ),
    "no pretrained network": (
        lambda o, p: o["path"].update(pretrain_network_g="absent.pth"),
        ["path:pretrain_network_g is absent.pth", "not a file"],
    ),
    "no resume state": (
        lambda o, p: o["path"].update(resume_state="absent.state"),
        ["path:resume_state is absent.state"],
    ),
    "path made a folder": (
        lambda o, p: o["path"].update(pretrain_model_g="x.pth"),
        ["path:pretrain_model_g is read by nothing, and BasicSR makes a folder", "mean pretrain_network_g?"],
    ),
    "unread key of train": (
        lambda o, p: o["train"].update(ema_decy=0.9),
        ["train:ema_decy is read by nothing; did you mean ema_decay?"],
    ),
    "unread key of a dataset": (
        lambda o, p: o["datasets"]["val"].update(filname_tmpl="{}x2"),
        ["datasets:val:filname_tmpl is read by nothing; did you mean filename_tmpl?"],
    ),
    "unread key of the logger": (
        lambda o, p: o["logger"].update(print_frq=1),
        ["logger:print_frq is read by nothing; did you mean print_freq?"],
    ),
    "unread key of the file": (lambda o, p: o.update(manual_sed=1), ["manual_sed is read", "mean manual_seed?"]),
    "argument that is swallowed": (
        lambda o, p: o["val"]["metrics"]["psnr"].update(test_y_chanel=True),
        ["val:metrics:psnr:test_y_chanel is not an option of calculate_psnr; did you mean test_y_channel"],
    ),
    "unknown optimiser": (
        lambda o, p: o["train"]["optim_g"].update(type="Adm"),
        ["train:optim_g:type is 'Adm', which SRModel does not know; did you mean Adam?"],
    ),
    "unknown option of the optimiser": (
        lambda o, p: o["train"]["optim_g"].update(beta=[0.9, 0.99]),
        ["train:optim_g:beta is not an option of Adam; did you mean betas?"],
    ),
    "unknown option of the scheduler": (
        lambda o, p: o["train"]["scheduler"].update(gama=0.5),
        ["train:scheduler:gama is not an option of MultiStepRestartLR; did you mean gamma?"],
    ),
    "periods that end early": (
        lambda o, p: o["train"].update(
            scheduler={"type": "CosineAnnealingRestartLR", "periods": [5, 10], "restart_weights": [1, 1]}
        ),
        ["train:scheduler:periods end at iteration 15, where training would fail before total_iter 20"],
    ),
    "no iterations": (lambda o, p: o["train"].update(total_iter=0), ["train:total_iter is 0"]),
    "patch that the scale splits": (
        lambda o, p: o["datasets"]["train"].update(gt_size=15),
        ["datasets:train:gt_size is 15, which scale 2 does not divide; make it 14"],
    ),
    "windows without a size": (
        lambda o, p: o.update(model_type="SwinIRModel"),
        ["network_g:window_size is missing"],
    ),
    "option of the model": (
        lambda o, p: o.update(model_type="RestorationModel", train={**o["train"], "amp": "int8"}),
        ["train:amp is 'int8'; write bfloat16 or float16"],
    ),
    "place in a source": (
        lambda o, p: o["datasets"].update(train=with_sources(o["datasets"]["train"], str(p))),
        ["datasets:train:sources:2:dataroot_gt is ", "an empty folder"],
    ),
    "table of the sampler": (
        lambda o, p: o["datasets"]["train"].update(
            sampler={"type": "ComplexitySampler", "mode": "balanced", "table": "absent.parquet"}
        ),
        ["datasets:train:sampler:table is absent.parquet, which does not exist"],
    ),
    "GPU in words": (lambda o, p: o.update(num_gpu="two"), ["num_gpu is 'two'; write a number or auto"]),
}


def run_bad(capsys, folder: Path, options: Any, *words: str) -> str:
    """Run `basicsr train` in this process with `options`, which it must refuse in one line on stderr; returns it."""
    file = folder / "bad.yml"
    file.write_text(options if isinstance(options, str) else yaml.safe_dump(options))
    code = cli.main(["train", "-opt", str(file), *words])
    errors = capsys.readouterr().err
    assert code == 1
    assert errors.startswith("basicsr train: ") and errors.count("\n") == 1, errors
    assert "Traceback" not in errors
    return errors


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_is_one_sentence_that_names_it(capsys, tmp_path, options, case):
    change, expected = BAD_OPTIONS[case]
    (tmp_path / "empty").mkdir()
    changed = change(options, tmp_path / "empty")
    text = run_bad(capsys, tmp_path, changed if isinstance(changed, str) else options)
    assert all(part in text for part in ["bad.yml", *expected]), text


def test_a_gpu_where_there_is_none_is_one_sentence(capsys, tmp_path, options, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options["num_gpu"] = 1
    assert "num_gpu is 1, but torch sees no CUDA device; write 0 or auto" in run_bad(capsys, tmp_path, options)


def test_every_finding_gets_a_line(capsys, tmp_path, options):
    options["network_g"]["type"] = "Zebra"
    options["datasets"]["val"]["dataroot_gt"] = "/absent"
    (tmp_path / "bad.yml").write_text(yaml.safe_dump(options))
    assert cli.main(["train", "-opt", str(tmp_path / "bad.yml")]) == 1
    assert [line.split(" ")[3] for line in capsys.readouterr().err.splitlines()] == [
        "network_g:type",
        "datasets:val:dataroot_gt",
    ]


def truncate(data: Path) -> None:
    data.write_bytes(data.read_bytes()[:9000])


@pytest.mark.parametrize(
    "harm, expected",
    [
        (lambda path: shutil.rmtree(path), "does not exist"),
        (lambda path: (path / "meta_info.txt").unlink(), "holds no meta_info.txt"),
        (lambda path: (path / "data.mdb").unlink(), "holds no data.mdb"),
        (lambda path: (path / "meta_info.txt").write_text(""), "lists no pictures"),
        (lambda path: (path / "meta_info.txt").write_text("zebra.png (1,1,3) 1\n"), "lists the key 'zebra'"),
        (lambda path: (path / "data.mdb").write_bytes(bytes(16384)), "is damaged"),
        (lambda path: truncate(path / "data.mdb"), "data.mdb is truncated: 9000 of "),
    ],
)
def test_a_bad_lmdb_is_named(capsys, tmp_path, pictures, options, harm, expected):
    shutil.copytree(pictures / "gt.lmdb", tmp_path / "copy.lmdb")
    harm(tmp_path / "copy.lmdb")
    options["datasets"]["train"].update(
        dataroot_gt=str(tmp_path / "copy.lmdb"), dataroot_lq=str(pictures / "lq.lmdb"), io_backend={"type": "lmdb"}
    )
    text = run_bad(capsys, tmp_path, options)
    assert "datasets:train:dataroot_gt is " in text and "copy.lmdb" in text and expected in text


@pytest.mark.parametrize(
    "forced, expected",
    [
        ("train:total_iter", "--force_yml train:total_iter is not of the form"),
        ("trian:total_iter=5", "the option file has no section trian"),
        ("train:optim_g:lr=1e-4", "train:optim_g:lr is the text '1e-4'"),
        ("train:warmup_iter=-1", "train:warmup_iter is the text '-1', not a number; write !!float -1"),
        ("network_g:type=Zebra", "network_g:type is 'Zebra'"),
    ],
)
def test_forced_options_are_checked_too(capsys, tmp_path, options, forced, expected):
    assert expected in run_bad(capsys, tmp_path, options, "--force_yml", forced)


def test_a_test_needs_the_suffix_of_the_images_it_saves(capsys, tmp_path, options):
    options["val"]["save_img"] = True
    options["datasets"]["test_1"] = options["datasets"].pop("val")
    options["datasets"].pop("train")
    (tmp_path / "bad.yml").write_text(yaml.safe_dump(options))
    assert cli.main(["test", "-opt", str(tmp_path / "bad.yml")]) == 1
    assert "val:suffix is missing" in capsys.readouterr().err


def test_an_option_file_in_the_folder_of_its_run_is_refused(capsys, tmp_path, options, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "experiments" / "tiny"
    folder.mkdir(parents=True)
    assert "copy it elsewhere" in run_bad(capsys, folder, options)


@pytest.mark.parametrize(
    "environment, words, expected",
    [
        ({}, ["--launcher", "pytorch"], "torchrun --nproc_per_node=2 -m rwkvir"),
        (
            {"RANK": "1", "WORLD_SIZE": "2"},
            [],
            "basicsr train: rank 1: 2 processes run, but --launcher pytorch is missing",
        ),
    ],
)
def test_launcher_and_processes_must_agree(capsys, tmp_path, options, monkeypatch, environment, words, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert expected in run_bad(capsys, tmp_path, options, *words)


# What is read by the loop, by a model, by a dataset or by a metric's bookkeeping, and may look as if it were not.
ACCEPTED: dict[str, Callable[[Options], Any]] = {
    "as it is": lambda o: None,
    "leftovers of BasicSR's own files": lambda o: o["datasets"]["train"].update(
        use_shuffle=True, dataset_enlarge_ratio=1, prefetch_mode=None
    ),
    "loader": lambda o: o["datasets"]["train"].update(
        pin_memory=True, persistent_workers=False, num_prefetch_queue=1, filename_tmpl="{}", color="y", mean=0, std=1
    ),
    "metric": lambda o: o["val"]["metrics"]["psnr"].update(better="higher", input_order="HWC"),
    "several sets": lambda o: o["datasets"].update(val_2=o["datasets"]["val"]),
    "logger": lambda o: o["logger"].update(wandb={"project": None, "resume_id": None}, save_best="psnr"),
    "top": lambda o: o.update(find_unused_parameters=True, dist_params={"backend": "nccl", "port": 29500}),
    "path": lambda o: o["path"].update(param_key_g="params_ema", ignore_resume_networks=[]),
    "ema": lambda o: o["train"].update(ema_decay=0.999, warmup_iter=-1),
    "cosine": lambda o: o["train"].update(
        scheduler={"type": "CosineAnnealingRestartLR", "periods": [20], "restart_weights": [1], "eta_min": 1e-7}
    ),
    "GAN": lambda o: (
        o.update(model_type="ESRGANModel", network_d={"type": "VGGStyleDiscriminator", "num_in_ch": 3, "num_feat": 8}),
        o["path"].update(pretrain_network_d=None, strict_load_d=True),
        o["train"].update(
            optim_d={"type": "Adam", "lr": 1e-4},
            gan_opt={"type": "GANLoss", "gan_type": "vanilla", "loss_weight": 1.0},
            perceptual_opt={"type": "PerceptualLoss", "layer_weights": {"conv5_4": 1}},
            net_d_iters=1,
            net_d_init_iters=0,
        ),
    ),
    "EDVR": lambda o: (o.update(model_type="EDVRModel"), o["train"].update(tsa_iter=50, dcn_lr_mul=1)),
    "RestorationModel": lambda o: (
        o.update(model_type="RestorationModel"),
        o["train"].update(amp="bfloat16", clip_grad=1.0, accumulate=2, optim_g={"type": "AdamW", "lr": 1e-4}),
        o["val"].update(tile=128),
    ),
    "ReSyn": lambda o: [
        section.update(type="ReSynPairedDataset", filename_tmpl="{}", color="gray")
        for section in o["datasets"].values()
    ],
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_is_read_is_no_finding(options, case):
    ACCEPTED[case](options)
    assert checks.check_options(options, is_train=True) == []


DOUBTFUL: dict[str, tuple[Callable[[Options], Any], str]] = {
    "name of another model": (
        lambda o: o["train"].update(net_d_iters=1),
        "train:net_d_iters is read by nothing; remove it",
    ),
    "late validation": (lambda o: o["val"].update(val_freq=50), "val:val_freq is 50, beyond total_iter 20"),
    "late checkpoint": (lambda o: o["logger"].update(save_checkpoint_freq=50), "save_checkpoint_freq is 50, beyond"),
    "late milestone": (
        lambda o: o["train"]["scheduler"].update(milestones=[10, 30]),
        "milestones has 30, which total_iter",
    ),
}


@pytest.mark.parametrize("case", DOUBTFUL)
def test_what_is_only_doubtful_lets_the_run_begin(capsys, options, case):
    change, expected = DOUBTFUL[case]
    change(options)
    checks.refuse("x.yml", options, is_train=True)
    assert capsys.readouterr().err.startswith("warning: x.yml: ") and [
        finding.fatal for finding in checks.check_options(options, is_train=True) if expected in str(finding)
    ] == [False]


def test_keys_that_cannot_be_known_are_told(options, monkeypatch):
    class TakesAny(torch.nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.options = options

    monkeypatch.setitem(ARCH_REGISTRY._obj_map, "TakesAny", TakesAny)
    options["network_g"] = {"type": "TakesAny", "anything": 1}
    (finding,) = checks.check_options(options, is_train=True)
    assert not finding.fatal and str(finding) == (
        "network_g is not checked for misspelt options, since TakesAny takes any"
    )


def test_every_key_of_basicsr_models_is_found_in_its_source():
    for name, keys in {
        "SRModel": "ema_decay pixel_opt perceptual_opt optim_g scheduler",
        "EDVRModel": "tsa_iter dcn_lr_mul",
        "StyleGAN2Model": "r1_reg_weight path_batch_shrink net_g_reg_every mixing_prob",
        restoration_model.RestorationModel.__name__: "ema_decay amp accumulate clip_grad compile tile all_ranks",
    }.items():
        assert set(keys.split()) <= option_keys.words_of(MODEL_REGISTRY.get(name)), name


@pytest.fixture
def run_check(workspace, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs `basicsr check` with options in an empty folder: its exit code, and what it prints and complains of."""
    monkeypatch.chdir(workspace.root)

    def run(options: Options, *words: str) -> tuple[int, str, str]:
        code = cli.main(["check", "-opt", workspace.write(options), *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_check_shows_what_a_run_will_cost(run_check, workspace, options):
    options["datasets"]["train"]["dataset_enlarge_ratio"] = 2
    code, output, errors = run_check(options)
    assert (code, errors) == (0, "")
    facts = {line.split()[0]: line for line in output.splitlines()[1:]}
    assert "20 iterations of 4 pictures: 4 epochs of up to 5 iterations" in facts["run"]
    assert "lq 4x3x8x8, gt 4x3x16x16" in facts["batch"]
    assert "MSRResNet" in facts["network"] and "GiB" in facts["peak"] and "without validation" in facts["whole"]
    assert {"device", "train", "val", "step", "data"} <= set(facts)
    assert [path.name for path in workspace.root.iterdir()] == ["tiny.yml"]


def test_check_of_a_test_file_tries_the_first_picture(run_check, options):
    options["datasets"] = {"test_1": options["datasets"]["val"]}
    code, output, _ = run_check({key: value for key, value in options.items() if key not in ("train", "logger")})
    assert code == 0 and "testing" in output and "lq 1x3x16x16, the first" in output and "peak memory" in output


@pytest.mark.parametrize(
    "section, change, words, expected",
    [
        ("datasets", {"batch_size_per_gpu": 11}, ["--no-step"], "datasets:train holds 10 pictures, less than a batch"),
        ("datasets", {"gt_size": 64}, [], "LQ (16, 16) is smaller than patch size (32, 32)"),
        ("network_g", {"upscale": 4}, [], "The size of tensor a"),
        ("network_g", {"num_fat": 4}, [], "network_g:num_fat is not an option of MSRResNet; did you mean num_feat"),
    ],
)
def test_what_a_run_would_die_of_is_one_sentence(run_check, options, section, change, words, expected):
    (options["datasets"]["train"] if section == "datasets" else options[section]).update(change)
    code, _, errors = run_check(options, *words)
    assert code == 1 and errors.startswith("basicsr check: tiny.yml: ") and errors.count("\n") == 1
    assert expected in errors


@pytest.mark.parametrize(
    "script, expected",
    [
        ("kill -9 $$", "was killed, for want of memory perhaps; lower"),
        ("exit 3", "ended with code 3; see why with --debug"),
    ],
)
def test_a_step_whose_process_dies_is_one_sentence(monkeypatch, script, expected):
    popen = dry_step.subprocess.Popen
    monkeypatch.setattr(dry_step.subprocess, "Popen", lambda command, **kinds: popen(["sh", "-c", script], **kinds))
    assert expected in dry_step._try_out({}, debug=False)
