"""The `basicsr` command. A subcommand joins with a line in `COMMANDS`; what it needs is imported when it is called."""

import argparse
import importlib

from rwkvir import command_line, memory
from rwkvir.command_line import Command, version

COMMANDS = {
    "train": Command("rwkvir.pipeline:train", "train a network with BasicSR's own loop", takes_debug=True),
    "test": Command("rwkvir.pipeline:test", "test a network with BasicSR's own loop", takes_debug=True),
    "check": Command(
        "rwkvir.dry_step:main", "find what is wrong with an option file, and measure a step", takes_debug=True
    ),
    "standard": Command("rwkvir.standard:main", "print the option file of a run under the training standard"),
    "info": Command("rwkvir.cli:info", "show versions, devices, plugins and what they registered"),
    "benchmark": Command("rwkvir.benchmark:main", "measure models on test sets, beside published figures"),
    "report": Command("rwkvir.report:main", "compare training runs on one HTML page"),
    "ablate": Command("rwkvir.ablate:main", "train variants of a network and report what each option is worth"),
    "demo": Command("rwkvir.demo:main", "train a small network in minutes and show what it has learnt"),
}


def main(argv: list[str] | None = None) -> int:
    """Run `basicsr` with `argv`, by default the process's own arguments, and return its exit code."""
    memory.keep_freed()
    return command_line.run("basicsr", "BasicSR with its plugins.", COMMANDS, ("rwkvir", "basicsr"), argv)


def info(argv: list[str]) -> int:
    """Print what a report of a problem needs: versions and devices, the plugins, how the operator was built."""
    argparse.ArgumentParser(prog="basicsr info", description=COMMANDS["info"].help).parse_args(argv)
    from rwkvir import plugins

    _print_facts(_machine())
    for plugin in plugins.load_plugins():
        names = "; ".join(f"{registry} {', '.join(names)}" for registry, names in plugin.registered.items())
        print(f"plugin {plugin.name} (module {plugin.module} of {plugin.distribution} {plugin.version}): {names}")
    build = importlib.import_module("rwkvir_arch.bi_wkv").build_info()
    _print_facts({f"operator {key}": value or "none" for key, value in build.items()})
    return 0


def _machine() -> dict[str, object]:
    from rwkvir import compat

    compat.apply()
    import platform

    import torch
    import torchvision

    cuda = [
        f"{device.name}, compute capability {device.major}.{device.minor}, {device.total_memory >> 20} MiB"
        for device in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    return {
        "rwkvir": version("rwkvir"),
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU'}",
        "torchvision": torchvision.__version__,
        **{package: version(package) for package in ("basicsr", "numpy", "cv2", "lmdb")},
        "CPU": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "CUDA devices": "; ".join(cuda) or "none",
    }


def _print_facts(facts: dict[str, object]) -> None:
    for name, value in facts.items():
        print(f"{name}: {value}")
