"""The one file that meets basicsr.train and basicsr.test: `basicsr train` and `basicsr test`."""

import argparse
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rwkvir import checks, compat, plugins


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM stopped a run. `args` holds a sentence for a person; `exit_code` is 128 + the signal."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted")
        self.exit_code = 128 + number


def train(argv: list[str], root_path: str | None = None) -> int:
    """Run BasicSR's training pipeline with its own flags `argv`. It writes below `root_path`, by default `.`.

    Raises checks.OptionError, Interrupted, and whatever BasicSR raises.
    """
    return _run("train", argv, root_path or os.getcwd())


def test(argv: list[str], root_path: str | None = None) -> int:
    """Run BasicSR's test pipeline with its own flags `argv`. It writes below `root_path`, by default `.`."""
    return _run("test", argv, root_path or os.getcwd())


def _run(command: str, argv: list[str], root_path: str) -> int:
    begun = time.monotonic()
    args = _parser(command).parse_args(argv)
    _check_launcher(args.launcher)
    checks.load_options(args.opt)  # before the imports, which take seconds
    compat.apply()
    plugins.load_plugins()
    compat.patch_training()
    options = checks.load_options(args.opt, args.force_yml)
    checks.refuse(args.opt, options, command == "train", resuming=args.auto_resume)
    _check_place(args.opt, Path(root_path, "experiments", options["name"]))

    import torch.distributed
    from basicsr.test import test_pipeline
    from basicsr.train import train_pipeline

    from rwkvir import learning_curve, time_limit
    from rwkvir_data import samplers

    samplers.join_training()
    learning_curve.join_training()
    sys.argv = [f"basicsr {command}", *_stock_flags(args)]
    with _traceback_logged(), _interruptible(), time_limit.limited(args.minutes, begun):
        (train_pipeline if command == "train" else test_pipeline)(root_path)
    # Only after success: tearing down a group of which a process has failed can wait for that process for ever.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"basicsr {command}",
        description=f"Run BasicSR's own {command} pipeline, with all plugins registered. It writes below the current "
        "folder (experiments/, results/, tb_logger/), so --auto_resume works from the folder that the run began in.",
        epilog="Several processes: torchrun --nproc_per_node=2 -m rwkvir "
        f"{command} -opt FILE.yml --launcher pytorch (gloo without a GPU, else NCCL).",
        allow_abbrev=False,
    )
    parser.add_argument("-opt", "--opt", required=True, metavar="FILE.yml", help="the option file")
    parser.add_argument(
        "--launcher", choices=["none", "pytorch", "slurm"], default="none", help="what started the processes"
    )
    parser.add_argument("--auto_resume", action="store_true", help="continue from the newest whole training state")
    parser.add_argument("--debug", action="store_true", help="BasicSR's debug mode (short intervals), and tracebacks")
    parser.add_argument(
        "--local_rank",
        "--local-rank",
        type=int,
        default=int(os.environ.get("LOCAL_RANK", 0)),
        help="of the launcher",
    )
    parser.add_argument(
        "--force_yml", nargs="+", default=[], metavar="KEY:SUBKEY=VALUE", help="override options: train:total_iter=1000"
    )
    parser.set_defaults(minutes=None)
    if command == "train":
        parser.add_argument("--minutes", type=_minutes, metavar="N", help="save, and end after so many")
    return parser


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is no time to train for; give minutes above 0")
    return minutes


def _stock_flags(args: argparse.Namespace) -> list[str]:
    """`args` as BasicSR's own parser spells them."""
    flags = ["-opt", args.opt, "--launcher", args.launcher, "--local_rank", str(args.local_rank)]
    flags += ["--auto_resume"] if args.auto_resume else []
    flags += ["--debug"] if args.debug else []
    return flags + (["--force_yml", *args.force_yml] if args.force_yml else [])


def _check_launcher(launcher: str) -> None:
    """Processes that do not know of each other would work on the same run at once, in the same folder."""
    start = "start it with: torchrun --nproc_per_node=2 -m rwkvir train|test -opt FILE.yml --launcher pytorch"
    if launcher == "pytorch" and "RANK" not in os.environ:
        raise ValueError(f"--launcher pytorch needs processes that torchrun began; {start}")
    if launcher == "slurm" and "SLURM_PROCID" not in os.environ:
        raise ValueError(
            "--launcher slurm needs tasks that srun began; inside the job, start it with: "
            "srun basicsr train|test -opt FILE.yml --launcher slurm"
        )
    if launcher == "none" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"{os.environ['WORLD_SIZE']} processes run, but --launcher pytorch is missing; {start}")


def _check_place(option_file: str, experiment: Path) -> None:
    """BasicSR moves an existing run's folder away, or keeps it, and then copies the option file into it."""
    if Path(option_file).resolve().parent == experiment.resolve():
        raise ValueError(f"{option_file} lies in the folder of the run itself; copy it elsewhere and pass the copy")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM raise Interrupted, which then says where the run stands."""

    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for repeated in previous:
            signal.signal(repeated, signal.SIG_DFL)  # a second one ends the process at once
        signal.signal(signal.SIGCHLD, lambda *_: None)  # a worker that the signal reached too is no error
        sys.unraisablehook = lambda _: None  # nor is an iterator over the data that was being made
        signal.signal(signal.SIGALRM, lambda *_: stop(number, None))
        signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)  # raise it again, should a destructor swallow it
        raise Interrupted(number)

    os.register_at_fork(after_in_child=_leave_interruption_to_the_parent)
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        try:
            yield
        except Exception:
            time.sleep(0.1)  # a signal to all processes can end another one, and so raise this, before it arrives here
            if not asked:
                raise
            raise Interrupted(asked[0]) from None
    except Interrupted as interrupted:
        signal.setitimer(signal.ITIMER_REAL, 0)
        interrupted.args = (_where_stopped(interrupted),)
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _leave_interruption_to_the_parent() -> None:
    """In a forked worker: Ctrl-C reaches the parent too, which ends its workers with SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _where_stopped(stop: BaseException) -> str:
    """One sentence from the local variables of BasicSR's train_pipeline, at which `stop` passed."""
    from basicsr.train import train_pipeline

    during = stop.__context__.__traceback__ if stop.__context__ else None
    frames = (frame for frame, _ in (*traceback.walk_tb(stop.__traceback__), *traceback.walk_tb(during)))
    state: dict[str, Any] = next((frame.f_locals for frame in frames if frame.f_code is train_pipeline.__code__), {})
    if "current_iter" not in state:
        return "interrupted; run the same command again"
    saved = [int(path.stem) for path in Path(state["opt"]["path"]["training_states"]).glob("*.state")]
    if not saved:
        return f"interrupted at iteration {state['current_iter']} before anything was saved; run the same command again"
    return (
        f"interrupted at iteration {state['current_iter']}, saved up to iteration {max(saved)}; "
        "to continue, run the same command with --auto_resume"
    )


@contextmanager
def _traceback_logged() -> Iterator[None]:
    """Write an error's traceback into the run's log file: after days of training nobody wants to provoke it again."""
    try:
        yield
    except Exception as error:
        record = logging.LogRecord("basicsr", logging.ERROR, __file__, 0, "%s", (error,), sys.exc_info())
        for handler in logging.getLogger("basicsr").handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handle(record)
        raise
