"""The `basicsr` command: its help, and one sentence for whatever goes wrong."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch._utils import ExceptionWrapper

from rwkvir import cli, pipeline
from rwkvir.command_line import sentence

Options = dict[str, Any]


@pytest.mark.parametrize("words, expected", [([], "commands:"), (["--version"], "rwkvir 0.")])
def test_help_and_version_need_no_torch(words, expected):
    code = f"import sys; from rwkvir import cli; cli.main({words}); assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and expected in result.stdout, result.stderr


@pytest.mark.parametrize("command", ["train", "test"])
def test_the_help_of_train_and_test_names_every_flag_of_basicsr(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for flag in ("-opt", "--launcher", "--auto_resume", "--debug", "--local_rank", "--local-rank", "--force_yml"):
        assert flag in text


def test_an_unknown_command_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["trian"])
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert all(name in errors for name in cli.COMMANDS)


def test_info_tells_versions_devices_and_the_operator(workspace):
    result = workspace.run("info")
    assert result.returncode == 0, result.stderr
    facts = [line.split(":")[0] for line in result.stdout.splitlines()]
    for name in ("rwkvir", "Python", "torch", "torchvision", "basicsr", "numpy", "cv2", "lmdb", "CPU", "CUDA devices"):
        assert name in facts
    assert any(fact.startswith("operator ") for fact in facts)


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
    "path made a folder": (lambda o, p: o["path"].update(pretrained=None), ["path:pretrained", "BasicSR makes"]),
    "GPU in words": (lambda o, p: o.update(num_gpu="two"), ["num_gpu is 'two'; write a number or auto"]),
}


def run_bad(capsys, folder: Path, options: Any, *words: str) -> str:
    """Run `basicsr train` in this process with `options`, which must fail with one line on stderr; returns it."""
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


def test_a_missing_option_file_is_named(capsys):
    assert cli.main(["train", "-opt", "absent.yml"]) == 1
    assert "the option file absent.yml does not exist" in capsys.readouterr().err


def test_an_option_file_in_the_folder_of_its_run_is_refused(capsys, tmp_path, options, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "experiments" / "tiny"
    folder.mkdir(parents=True)
    assert "copy it elsewhere" in run_bad(capsys, folder, options)


def test_a_test_needs_the_suffix_of_the_images_it_saves(capsys, tmp_path, options):
    options["val"]["save_img"] = True
    options["datasets"]["test_1"] = options["datasets"].pop("val")
    options["datasets"].pop("train")
    (tmp_path / "bad.yml").write_text(yaml.safe_dump(options))
    assert cli.main(["test", "-opt", str(tmp_path / "bad.yml")]) == 1
    assert "val:suffix is missing" in capsys.readouterr().err


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


def test_both_spellings_of_the_rank_and_the_environment_reach_basicsr(monkeypatch):
    def flags(*words: str) -> list[str]:
        return pipeline._stock_flags(pipeline._parser("train").parse_args(["-opt", "x.yml", *words]))

    assert flags("--local-rank", "3") == flags("--local_rank=3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert flags() == ["-opt", "x.yml", "--launcher", "none", "--local_rank", "3"]
    everything = ["--auto_resume", "--debug", "--force_yml", "name=x", "num_gpu=0"]
    assert flags(*everything)[-5:] == everything


@pytest.fixture
def failing(monkeypatch):
    """Makes `basicsr info` raise the given exception."""

    def install(error: BaseException) -> None:
        def raise_it(argv: list[str]) -> int:
            raise error

        monkeypatch.setattr(cli, "info", raise_it)

    return install


@pytest.mark.parametrize(
    "error, expected",
    [
        (ValueError("two\nlines"), "two lines"),
        (FileNotFoundError(2, "No such file or directory", "x.png"), "No such file or directory: x.png"),
        (OSError("disk on fire"), "disk on fire"),
        (AssertionError("lq and gt differ"), "lq and gt differ"),
        (AssertionError(), "AssertionError: no message; run again with --debug for the traceback"),
        (TypeError("no len()"), "TypeError: no len(); run again with --debug for the traceback"),
        (KeyError("scale"), "KeyError: 'scale'; run again with --debug for the traceback"),
    ],
)
def test_an_exception_is_one_sentence(capsys, failing, error, expected):
    failing(error)
    assert cli.main(["info"]) == 1
    assert capsys.readouterr().err == f"basicsr info: {expected}\n"


def test_debug_shows_the_traceback_and_an_interruption_is_130(capsys, failing):
    failing(ValueError("reason"))
    with pytest.raises(ValueError, match="reason"):
        cli.main(["info", "--debug"])
    failing(KeyboardInterrupt())
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "basicsr info: interrupted\n"


@pytest.mark.parametrize(
    "error, expected",
    [
        (ValueError("x.png is not an image"), "x.png is not an image"),
        (ValueError("two\nlines"), "two lines"),
        (KeyError("gt_size"), "KeyError: 'gt_size'; run again with --debug for the traceback"),
        (TypeError("no len()"), "TypeError: no len(); run again with --debug for the traceback"),
        (
            UnicodeDecodeError("ascii", b"\xe9", 0, 1, "ordinal not in range(128)"),
            "UnicodeDecodeError: 'ascii' codec can't decode byte 0xe9 in position 0: ordinal not in range(128); "
            "run again with --debug for the traceback",
        ),
    ],
)
def test_an_error_of_a_worker_is_the_one_that_the_worker_had(error, expected):
    try:
        raise error
    except Exception:
        passed_on = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(Exception, match=r"Caught \w+ in DataLoader worker process 0") as caught:
        passed_on.reraise()
    assert sentence(caught.value) == expected
