"""What the README tells people to do works."""

import functools
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from basicsr.archs import build_network

import rwkvir_arch  # noqa: F401  registers RWKVIR
from rwkvir import cli, pipeline
from rwkvir_data import SAMPLER_REGISTRY, resyn_paired_dataset
from rwkvir_data import cli as resyn

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TEXT = README + (ROOT / "docs/training.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


OPTIONS = [yaml.safe_load(block) for block in blocks("yaml")]
COMMANDS = [line for block in blocks("bash") for line in block.splitlines()]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, tmp_path):
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_network_of_the_option_file_builds():
    (options,) = (options for options in OPTIONS if "network_g" in options)
    build_network(options["network_g"])


def test_the_options_of_the_data_are_known():
    (options,) = (options for options in OPTIONS if "datasets" in options)
    train = options["datasets"]["train"]
    assert set(train) <= {*resyn_paired_dataset.OWN_OPTIONS, *resyn_paired_dataset.LOADER_OPTIONS}
    sampler = SAMPLER_REGISTRY.get(train["sampler"].pop("type"))
    assert set(train["sampler"]) <= set(inspect.signature(sampler).parameters)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_real(command):
    """Each command is one of those below, with flags its parser takes and files that exist."""
    words = command.replace('"', "").split()
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[:2] == ["pip", "install"]:
        assert "--no-build-isolation" in words or words[2].startswith("torch==")
    elif words[0] == "torchrun":
        check_run(words[words.index("rwkvir") + 1 :])
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    elif words[0] == "resyn":
        assert words[1] in resyn.COMMANDS
        check_flags("rwkvir_data", words[1:])
    else:
        assert words[0] == "basicsr"
        check_run(words[1:])


def check_run(words: list[str]) -> None:
    assert words[0] in cli.COMMANDS
    if words[0] in ("train", "test"):
        assert (ROOT / pipeline._parser(words[0]).parse_args(words[1:]).opt).is_file()
    else:
        check_flags("rwkvir", words)


def check_flags(package: str, words: list[str]) -> None:
    shown = usage(package, words[0])
    assert all(re.search(rf"{word}\b", shown) for word in words if word.startswith("-"))


@functools.cache
def usage(package: str, command: str) -> str:
    run = subprocess.run([sys.executable, "-m", package, command, "--help"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_torch_is_the_pair_of_the_makefile():
    pair = re.search(r"^TORCH \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert f"pip install {pair} " in README


def test_files_and_make_targets_in_the_text_exist():
    for name in re.findall(r"`((?:options|rwkvir|rwkvir_data|benchmarks|csrc|docs)/[\w./]*)`", TEXT):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(rwkvir_(?:light_)?x\d\.yml)`", README):
        assert (ROOT / "options" / name).is_file(), name
    for target in re.findall(r"`make ([\w-]+)`", TEXT):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_basicsr_info_runs():
    run = subprocess.run([sys.executable, "-m", "rwkvir", "info"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "RWKVIR" in run.stdout and "ReSynPairedDataset" in run.stdout and "operator cpu" in run.stdout
