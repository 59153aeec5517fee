"""The `resyn` command. A subcommand joins with a line in `COMMANDS`; what it needs is imported when it is called."""

from rwkvir import command_line
from rwkvir.command_line import Command

COMMANDS = {
    "score": Command("rwkvir_data.score:main", "measure every picture of folders and archives, into one table"),
    "build": Command("rwkvir_data.build:main", "filter, balance and split scored pictures, and write training sets"),
    "verify": Command("rwkvir_data.verify:main", "check every picture of an LMDB"),
    "report": Command("rwkvir_data.report:main", "show what a set holds and what was dropped, as one HTML file"),
    "analyze": Command("rwkvir_data.analyze:main", "PSNR and SSIM of restored pictures against their complexity"),
    "pack": Command("rwkvir_data.pack:main", "store pictures so that a crop decodes only what it needs"),
}


def main(argv: list[str] | None = None) -> int:
    """Run `resyn` with `argv`, by default the process's own arguments, and return its exit code."""
    description = "From folders of pictures to a balanced, packed training set."
    return command_line.run("resyn", description, COMMANDS, ("rwkvir",), argv)
