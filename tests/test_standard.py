"""The option files: current, complete, every key read by something, and every network builds."""

import inspect
import re
from pathlib import Path

import basicsr
import pytest
import torch
import yaml
from basicsr.archs import build_network
from basicsr.utils import dist_util
from basicsr.utils.registry import ARCH_REGISTRY, LOSS_REGISTRY, METRIC_REGISTRY

import rwkvir
import rwkvir_arch
import rwkvir_data
from rwkvir import checks, standard

OPTIONS = Path(__file__).parents[1] / "options"
FILES = sorted(standard.files())
# Sections whose keys are the arguments of what they name: (section, the function or class that takes them).
ARGUMENTS = {
    "dist_params": lambda section: dist_util._init_dist_slurm,
    "network_g": lambda section: ARCH_REGISTRY.get(section["type"]),
    "optim_g": lambda section: getattr(torch.optim, section["type"]),
    "scheduler": lambda section: getattr(torch.optim.lr_scheduler, section["type"]),
    "pixel_opt": lambda section: LOSS_REGISTRY.get(section["type"]),
    "psnr": lambda section: METRIC_REGISTRY.get(section["type"]),
    "ssim": lambda section: METRIC_REGISTRY.get(section["type"]),
}


def source_of(*packages) -> str:
    files = (file for package in packages for file in Path(package.__file__).parent.rglob("*.py"))
    return "\n".join(file.read_text() for file in files if file.name != "standard.py")


SOURCE = source_of(basicsr, rwkvir, rwkvir_arch, rwkvir_data)


def unread(options: dict, path: str = "") -> list[str]:
    """Keys that nothing reads: no argument of what the section names, no string in any source file."""
    found = []
    for key, value in options.items():
        if isinstance(value, dict) and key in ARGUMENTS:
            known = inspect.signature(ARGUMENTS[key](value)).parameters
            found += [f"{path}{key}:{name}" for name in value if name != "type" and name not in known]
        else:
            free_name = path in ("datasets:", "val:metrics:")
            if not free_name and not re.search(
                rf"""(['"]){re.escape(key)}\1|\b{re.escape(key)}\b.*\.split\(\)""", SOURCE
            ):
                found.append(f"{path}{key}")
            if isinstance(value, dict):
                found += unread(value, f"{path}{key}:")
    return found


@pytest.mark.parametrize("name", FILES)
def test_files_are_current(name):
    assert (OPTIONS / name).read_text() == standard.files()[name], "run: make options"


def test_no_other_files():
    assert sorted(file.name for file in OPTIONS.iterdir()) == FILES


@pytest.mark.parametrize("name", FILES)
def test_every_key_has_a_reader(name):
    assert unread(yaml.safe_load((OPTIONS / name).read_text())) == []


def test_a_key_without_a_reader_is_found():
    options = yaml.safe_load((OPTIONS / "rwkvir_x4.yml").read_text())
    options["train"]["totl_iter"] = options["network_g"]["num_faet"] = 1
    assert unread(options) == ["network_g:num_faet", "train:totl_iter"]


@pytest.mark.parametrize("name", FILES)
def test_only_the_data_is_missing(name):
    """BasicSR and the plugins accept the file as it stands; what they miss is the data it names."""
    options = checks.load_options(str(OPTIONS / name))
    findings = checks.check_options(options, is_train=True)
    assert findings and all(":dataroot_" in finding.key for finding in findings)


@pytest.mark.parametrize("name", FILES)
def test_every_network_builds_and_restores(name):
    options = checks.load_options(str(OPTIONS / name))
    scale, train = options["scale"], options["datasets"]["train"]
    assert train["gt_size"] % scale == 0
    network = build_network(options["network_g"]).eval()
    with torch.no_grad():
        assert network(torch.rand(1, 3, 8, 9)).shape == (1, 3, 8 * scale, 9 * scale)


@pytest.mark.parametrize("task", standard.TASKS)
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_standard_is_what_the_paper_and_its_code_say(task, scale):
    """Section 5 of the specification, once more and by hand."""
    iterations, batch = {"classic": (100_000, 32), "light": (50_000, 64)}[task]
    milestones = {"classic": [50_000, 75_000, 90_000, 95_000], "light": [25_000, 40_000, 45_000, 47_500]}[task]
    options = yaml.safe_load(standard.super_resolution(task, scale))
    train = options["train"]
    assert train["total_iter"] == iterations and train["scheduler"]["milestones"] == milestones
    assert train["optim_g"] == {"type": "Adam", "lr": 2e-4, "weight_decay": 0, "betas": [0.9, 0.99]}
    assert (train["warmup_iter"], train["ema_decay"], options["manual_seed"]) == (-1, 0, 10)
    data = options["datasets"]["train"]
    assert (data["gt_size"], data["batch_size_per_gpu"]) == (64 * scale, batch)
    assert options["val"]["metrics"]["psnr"] == {"type": "calculate_psnr", "crop_border": scale, "test_y_channel": True}
    longer = yaml.safe_load(standard.super_resolution(task, scale, "restoration"))["train"]
    assert longer["total_iter"] == 500_000
    assert longer["scheduler"]["milestones"] == [250_000, 400_000, 450_000, 475_000]
