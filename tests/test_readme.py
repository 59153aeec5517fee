"""What the README tells people to do works."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from basicsr.archs import build_network

from rwkvir import cli, pipeline

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines()]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, tmp_path):
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_network_of_the_option_file_builds():
    (block,) = blocks("yaml")
    build_network(yaml.safe_load(block)["network_g"])


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
    else:
        assert words[0] == "basicsr"
        check_run(words[1:])


def check_run(words: list[str]) -> None:
    assert words[0] in cli.COMMANDS
    if words[0] in ("train", "test"):
        assert (ROOT / pipeline._parser(words[0]).parse_args(words[1:]).opt).is_file()


def test_torch_is_the_pair_of_the_makefile():
    pair = re.search(r"^TORCH \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert f"pip install {pair} " in README


def test_files_and_make_targets_in_the_text_exist():
    for name in re.findall(r"`((?:options|rwkvir|benchmarks|csrc|docs)/[\w./]*)`", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(rwkvir_(?:light_)?x\d\.yml)`", README):
        assert (ROOT / "options" / name).is_file(), name
    for target in re.findall(r"`make ([\w-]+)`", README):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_basicsr_info_runs():
    run = subprocess.run([sys.executable, "-m", "rwkvir", "info"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "RWKVIR" in run.stdout and "ReSynPairedDataset" in run.stdout and "operator cpu" in run.stdout
