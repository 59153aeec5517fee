"""The entry-point group `basicsr.plugins`, through distributions made up on the path."""

import os
from pathlib import Path

import pytest

NETWORK = """
from basicsr.utils.registry import ARCH_REGISTRY, METRIC_REGISTRY
from rwkvir_data.samplers import SAMPLER_REGISTRY, RunSampler
from torch import nn

@SAMPLER_REGISTRY.register()
class SamplerOf{name}(RunSampler):
    pass

@ARCH_REGISTRY.register()
class {name}(nn.Module):
    pass

@METRIC_REGISTRY.register()
def metric_of_{name}(img, img2):
    return 0.0
"""


@pytest.fixture
def install(workspace, tmp_path: Path):
    """Makes a distribution `NAME-plugin` 1.2 with a module `NAME_module` of the given code, for runs in `workspace`."""
    site = tmp_path / "site"
    workspace.environment["PYTHONPATH"] = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])

    def add(name: str, code: str) -> None:
        metadata = site / f"{name}_plugin-1.2.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1.2\n")
        (metadata / "entry_points.txt").write_text(f"[basicsr.plugins]\n{name} = {name}_module\n")
        (site / f"{name}_module.py").write_text(code)

    return add


def test_info_lists_plugins_and_what_each_registered(workspace, install):
    install("first", NETWORK.format(name="FirstNet"))
    install("second", NETWORK.format(name="SecondNet"))
    result = workspace.run("info")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for name in ("first", "second"):
        network = f"{name.capitalize()}Net"
        expected = (
            f"plugin {name} (module {name}_module of {name}-plugin 1.2): arch {network}; metric metric_of_{network}; "
            f"sampler SamplerOf{network}"
        )
        assert expected in lines
    assert any(line.startswith("plugin rwkvir_arch (module rwkvir_arch of rwkvir ") for line in lines)
    (data,) = (line for line in lines if line.startswith("plugin rwkvir_data (module rwkvir_data of rwkvir "))
    assert data.endswith(": dataset ReSynPairedDataset; sampler ComplexitySampler, EnlargedSampler")


@pytest.mark.parametrize(
    "code, cause",
    [
        ("import a_module_that_nobody_has", "ModuleNotFoundError: No module named 'a_module_that_nobody_has'"),
        ("raise OSError('no compiler')", "OSError: no compiler"),
        (NETWORK.format(name="EDSR"), "AssertionError: An object named 'EDSR' was already registered"),
    ],
)
@pytest.mark.parametrize("command", ["info", "train"])
def test_a_plugin_that_fails_is_named_with_its_distribution_and_the_cause(
    workspace, install, options, one_sentence, code, cause, command
):
    install("broken", code)
    words = ["info"] if command == "info" else ["train", "-opt", workspace.write(options)]
    sentence = one_sentence(workspace.run(*words))
    assert sentence.startswith(
        f"basicsr {command}: the BasicSR plugin 'broken' of broken-plugin 1.2 cannot be imported"
    )
    assert cause in sentence and sentence.endswith("pip uninstall broken-plugin")
