"""`basicsr check`: what is wrong with an option file, and what its run will cost, before hours are lost.

The datasets and the step are tried in a process of their own (`python -m rwkvir.dry_step`), which may run out of memory
and leaves nothing behind.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

from rwkvir import checks, compat, memory, plugins
from rwkvir.command_line import sentence

SECONDS, STEPS = 15, 10  # steps are repeated until one of these is reached
GIB = 1 << 30


def main(argv: list[str]) -> int:
    """Run `basicsr check` with the arguments `argv`. Raises checks.OptionError for what is wrong."""
    args = _parser().parse_args(argv)
    compat.apply()
    plugins.load_plugins()
    options = checks.load_options(args.opt, args.force_yml)
    is_train = "train" in (options.get("datasets") or {})
    checks.refuse(args.opt, options, is_train)
    forced = ["--force_yml", *args.force_yml] if args.force_yml else []
    request = {"flags": ["-opt", args.opt, *forced], "is_train": is_train, "step": args.step}
    print(f"{args.opt}: {options['name']}, {'training' if is_train else 'testing'}", flush=True)
    problem = _try_out(request, args.debug)
    if problem:
        raise ValueError(f"{args.opt}: {problem}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="basicsr check",
        description="Check an option file for training or testing, and measure memory and time of one step of it with "
        "the real batch on the real device.",
    )
    parser.add_argument("-opt", "--opt", required=True, metavar="FILE.yml", help="the option file")
    parser.add_argument("--no-step", dest="step", action="store_false", help="do not compute a step")
    parser.add_argument("--debug", action="store_true", help="show what the step prints, and tracebacks")
    parser.add_argument("--force_yml", nargs="+", default=[], metavar="KEY:SUBKEY=VALUE", help="as basicsr train takes")
    return parser


def _try_out(request: dict[str, Any], debug: bool) -> str | None:
    """Print what a process of its own finds out as it does, and return a sentence if it fails."""
    command = [sys.executable, "-m", "rwkvir.dry_step", json.dumps(request)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=None if debug else subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                name, value = json.loads(line)
                if name == "problem":
                    return value
                print(f"  {name:<12} {value}", flush=True)
        except BaseException:
            process.kill()
            raise
    if process.returncode < 0:
        return "the step's process was killed, for want of memory perhaps; lower batch_size_per_gpu or gt_size"
    return (
        f"the step's process ended with code {process.returncode}; see why with --debug" if process.returncode else None
    )


def _child(request: dict[str, Any]) -> None:
    """Print a line of JSON for each fact, [name, value], and ["problem", sentence] for what goes wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    lines = os.fdopen(os.dup(1), "w", buffering=1)

    def tell(name: str, value: str) -> None:
        lines.write(json.dumps([name, value]) + "\n")

    try:
        with redirect_stdout(sys.stderr):
            _measure(request, tell)
    except Exception as error:
        traceback.print_exc()
        tell("problem", sentence(error))


def _measure(request: dict[str, Any], tell: Callable[[str, str], None]) -> None:
    memory.keep_freed()  # as the run itself does
    compat.apply()
    plugins.load_plugins()
    compat.patch_training()
    import logging

    import torch
    from basicsr.data import build_dataset
    from basicsr.utils import get_root_logger
    from basicsr.utils.options import parse_options

    get_root_logger(log_level=logging.ERROR)
    sys.argv = ["basicsr check", *request["flags"]]
    opt, _ = parse_options(os.getcwd(), is_train=request["is_train"])
    sets = {phase: build_dataset(dataset) for phase, dataset in opt["datasets"].items()}
    device = torch.cuda.get_device_name() if opt["num_gpu"] else f"CPU, {torch.get_num_threads()} threads"
    tell("device", device)
    for phase, dataset in sets.items():
        tell(phase, f"{opt['datasets'][phase]['name']}, {len(dataset)} pictures")
    if request["is_train"]:
        _measure_training(opt, sets["train"], request["step"], tell)
    elif request["step"]:
        _measure_test(opt, sets, tell)


def _measure_training(opt: dict[str, Any], dataset: Any, step: bool, tell: Callable[[str, str], None]) -> None:
    from basicsr.models import build_model
    from torch.utils.data import default_collate

    data, total = opt["datasets"]["train"], int(opt["train"]["total_iter"])
    batch = data["batch_size_per_gpu"] * max(opt["num_gpu"], 1)
    pictures = math.ceil(len(dataset) * data.get("dataset_enlarge_ratio", 1))
    if pictures < batch:
        raise ValueError(
            f"datasets:train holds {pictures} pictures, less than a batch of {batch}; lower batch_size_per_gpu or "
            "raise dataset_enlarge_ratio"
        )
    epochs = math.ceil(total / (pictures // batch))
    tell("run", f"{total} iterations of {batch} pictures: {epochs} epochs of up to {pictures // batch} iterations")
    if not step:
        return
    loaded = time.perf_counter()
    items = default_collate([dataset[index % len(dataset)] for index in range(batch)])
    loading = time.perf_counter() - loaded
    workers = data["num_worker_per_gpu"] * max(opt["num_gpu"], 1)
    tell(
        "batch", ", ".join(f"{kind} {'x'.join(map(str, items[kind].shape))}" for kind in ("lq", "gt") if kind in items)
    )
    model = build_model(opt)
    tell("network", _parameters(model))

    def iterate() -> None:
        model.feed_data(items)
        model.optimize_parameters(1)

    seconds = _time(iterate, bool(opt["num_gpu"]))
    tell("step", f"{seconds:.3g} s")
    tell("data", f"{loading:.3g} s a batch for one process, {workers} workers")
    tell("peak memory", _peak_memory(bool(opt["num_gpu"])))
    whole = total * (max(seconds, loading / workers) if workers else seconds + loading)
    tell("whole run", f"{_duration(whole)}, without validation")


def _measure_test(opt: dict[str, Any], sets: dict[str, Any], tell: Callable[[str, str], None]) -> None:
    from basicsr.models import build_model
    from torch.utils.data import default_collate

    model = build_model(opt)
    tell("network", _parameters(model))
    items = default_collate([next(iter(sets.values()))[0]])
    tell("picture", f"lq {'x'.join(map(str, items['lq'].shape))}, the first")

    def iterate() -> None:
        model.feed_data(items)
        model.test()

    tell("step", f"{_time(iterate, bool(opt['num_gpu'])):.3g} s")
    tell("peak memory", _peak_memory(bool(opt["num_gpu"])))


def _parameters(model: Any) -> str:
    network = model.get_bare_model(model.net_g)
    return f"{type(network).__name__}, {sum(parameter.numel() for parameter in network.parameters())} parameters"


def _time(iterate: Callable[[], None], on_gpu: bool) -> float:
    """Seconds of one call: the median but for the first, unless there is time for only one."""
    import torch

    times: list[float] = []
    while len(times) < STEPS and sum(times) < SECONDS:
        begun = time.perf_counter()
        iterate()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:] or times)


def _peak_memory(on_gpu: bool) -> str:
    import torch

    if on_gpu:
        peak, whole = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties().total_memory
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{peak / GIB:.2f} of {whole / GIB:.1f} GiB{'' if on_gpu else ', with the process itself'}"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
