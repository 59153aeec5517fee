"""`basicsr ablate`: what each option of a network is worth, with the spread over seeds.

Every run of the grid is an ordinary experiment, trained by `basicsr train` in a process of its own. Runs of one seed
see the same patches in the same order, so that their differences are paired.
"""

from __future__ import annotations

import argparse
import copy
import csv
import inspect
import io
import itertools
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rwkvir import checks, pipeline, plugins, standard
from rwkvir.comparison import psnr_options  # repairs `import basicsr`

# isort: split
import torch
import yaml
from basicsr.utils.registry import ARCH_REGISTRY
from tqdm import tqdm

from rwkvir.ablation_report import BASELINE, Row, chart, markdown, summary
from rwkvir.command_line import sentence
from rwkvir.experiment import CURVE, read_curve, read_experiment
from rwkvir.report import duration
from rwkvir_arch.rwkvir_arch import DC_NORMS, DECAY_SCALES, SCANS, SHIFTS
from rwkvir_data import aside, page
from rwkvir_data.demo_data import build_demo_data

CHOICES = {"shift": SHIFTS, "scan": SCANS, "decay_scale": DECAY_SCALES, "dc_norm": DC_NORMS}  # of RWKVIR
ITERATIONS = 300  # of the miniature
ROUNDS, SECONDS = 9, 20  # steps are timed in turns until one of these is reached


class Variant(NamedTuple):
    """A network of the grid: the options in which it differs from the baseline's."""

    changes: dict[str, Any]
    options: dict[str, Any]  # network_g

    @property
    def label(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.changes.items()) or BASELINE

    def build(self) -> torch.nn.Module:
        """The network, with weights that are drawn anew. Raises ValueError for values that it does not take."""
        arguments = {name: value for name, value in self.options.items() if name != "type"}
        try:
            return checks.registered(self.options["type"], ARCH_REGISTRY)(**arguments)
        except Exception as error:  # of the network's author
            raise ValueError(f"{self.label}: {sentence(error)}") from error


class Run(NamedTuple):
    """A variant trained from one seed: an option file, and the experiment that it makes."""

    variant: Variant
    seed: int
    options: dict[str, Any]
    file: Path

    @property
    def folder(self) -> Path:
        return Path("experiments", self.options["name"])

    @property
    def iterations(self) -> int:
        return self.options["train"]["total_iter"]

    def write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        header = f"{self.variant.label}, seed {self.seed}: a run of basicsr ablate, which writes this file."
        page.replace(self.file, standard.render(header, self.options).encode())

    def is_same(self) -> bool:
        """Whether the experiment that is there, if there is one, has been trained with these options."""
        used = self.folder / self.file.name
        return used.is_file() and checks.load_options(str(used)) == self.options

    def progress(self) -> int:
        """How many iterations have been recorded."""
        curve = self.folder / CURVE
        return max((row.iter for row in read_curve(curve, [])), default=0) if curve.is_file() else 0

    def scores(self) -> dict[str, float]:
        """PSNR in dB after the last iteration, by validation set; empty if it has not come so far."""
        if not (self.is_same() and (self.folder / "models/net_g_latest.pth").is_file()):
            return {}
        name = psnr_options(self.options)[0]
        rows = read_experiment(self.folder, self.variant.label).records
        return {
            row.dataset: row.value for row in rows if row.iter == self.iterations and row.dataset and row.name == name
        }


def main(argv: list[str]) -> int:
    """Run `basicsr ablate` with the arguments `argv`."""
    args = _parser().parse_args(argv)
    plugins.load_plugins()
    base = base_options(args)
    out = Path("results/ablate", base["name"])
    variants = make_variants(base["network_g"], args.what, args.grid)
    parameters = {one.label: sum(weights.numel() for weights in one.build().parameters()) for one in variants}
    runs = [make_run(base, one, base["manual_seed"] + number, out) for number in range(args.seeds) for one in variants]
    if not (args.list or args.opt):
        build_demo_data(Path(base["datasets"]["val"]["dataroot_gt"]).parent)
    if not args.list:
        checks.refuse(args.opt or "the demo's options", base, is_train=True)
    jobs = min(args.jobs or (1 if torch.cuda.is_available() else os.cpu_count() or 1), len(runs))
    torch.set_num_threads(max((os.cpu_count() or 1) // jobs, 1))
    print(
        f"{base['name']}: {len(variants)} variants × {args.seeds} seeds = {len(runs)} runs of {runs[0].iterations} "
        f"iterations, {jobs} at a time, {torch.get_num_threads()} threads each",
        flush=True,
    )
    seconds = step_seconds(variants, base)
    torch.cuda.empty_cache()  # the memory is the runs' to have
    print(overview(parameters, seconds, runs, jobs), flush=True)
    if args.list:
        return 0
    out.mkdir(parents=True, exist_ok=True)
    with aside.locked(out / "in_use", out):
        train(runs, jobs)
        rows = collect(runs, parameters, seconds)
        page.replace(out / "ablation.csv", table_of_runs(runs).encode())
        page.replace(out / "ablation.png", chart(rows))
        page.replace(out / "ablation.md", summary(rows, base, args.seeds, ["basicsr", "ablate", *argv]).encode())
    print(markdown(rows))
    print(
        f"{out}: ablation.md, ablation.csv, ablation.png; learning curves: basicsr report experiments/{base['name']}_*"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="basicsr ablate",
        description="Train variants of a network from several seeds, one option changed at a time, and report what "
        "each change is worth, with its spread.",
        epilog="basicsr ablate --what shift,scan dc_ratio=0.5 --seeds 3",
    )
    parser.add_argument(
        "--what",
        nargs="+",
        default=[",".join(CHOICES)],
        metavar="NAME,NAME|NAME=VALUE,VALUE",
        help=f"options of the network: all values of {', '.join(CHOICES)}, or those that are given",
    )
    parser.add_argument("--seeds", type=_positive, default=3, metavar="N", help="runs of each variant (%(default)s)")
    parser.add_argument(
        "-opt",
        "--opt",
        metavar="FILE.yml",
        help="the baseline's option file; by default the demo's made small, for minutes on a CPU",
    )
    parser.add_argument(
        "--iterations", type=_positive, metavar="N", help=f"of each run (the option file's; by default {ITERATIONS})"
    )
    parser.add_argument(
        "--data", metavar="FOLDER", help="train on these pictures, or .lmdb or .tiles, and make LQ of them"
    )
    parser.add_argument(
        "--name", help="of the ablation; its runs are experiments/NAME_VARIANT_SEED (the option file's)"
    )
    parser.add_argument("--grid", action="store_true", help="all combinations of the values, not one change at a time")
    parser.add_argument("--jobs", type=_positive, metavar="N", help="runs at a time (1 on a GPU, else one per core)")
    parser.add_argument("--list", action="store_true", help="show what would be trained and about how long, and stop")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0; give one")
    return int(text)


def base_options(args: argparse.Namespace) -> dict[str, Any]:
    """The option file of the baseline, as a mapping."""
    options = checks.load_options(args.opt) if args.opt else miniature()
    if args.opt:
        missing = next(checks.check_required(options, is_train=True), None)
        if missing:
            raise ValueError(f"{args.opt}: {missing}")
        if not (options.get("val") or {}).get("metrics"):
            raise ValueError(f"{args.opt}: val:metrics is missing, by which variants are compared; add psnr there")
        if "scale" not in options or "gt_size" not in options["datasets"]["train"]:
            raise ValueError(f"{args.opt}: scale or datasets:train:gt_size is missing, to time a step by; add it")
    options["name"] = name = args.name or options["name"]
    if not re.fullmatch(r"[\w.+-]+", name) or "debug" in name:
        raise ValueError(
            f"'{name}' cannot name folders of runs (nor can what has debug in it); give another with --name"
        )
    options["manual_seed"] = options.get("manual_seed") or 0
    if args.iterations:
        set_iterations(options, args.iterations)
    if args.data:
        train = options["datasets"]["train"]
        place = ("dataroot_lq", "sources", "sampler", "meta_info_file", "filename_tmpl")
        kind = {".lmdb": "lmdb", ".tiles": "tiles"}.get(Path(args.data).suffix, "disk")
        options["datasets"]["train"] = {
            **{name: value for name, value in train.items() if name not in place},
            **{"type": "ReSynPairedDataset", "dataroot_gt": args.data, "io_backend": {"type": kind}},
            "degradation": train.get("degradation") or f"x{options['scale']}",
        }
    return options


def miniature() -> dict[str, Any]:
    """The demo's options, made small enough for a grid on a CPU: ITERATIONS of these suffice to surpass bicubic."""
    options = yaml.safe_load(standard.demo())
    options["name"] = "ablation"
    options["network_g"].update(num_feat=16, depths=[2, 2])
    options["datasets"]["train"].update(gt_size=48, batch_size_per_gpu=4)
    options["train"]["optim_g"]["lr"] = 3e-3
    options["val"].update(val_freq=ITERATIONS, metrics={"psnr": options["val"]["metrics"]["psnr"]})
    options["logger"]["use_tb_logger"] = False
    set_iterations(options, ITERATIONS)
    return options


def set_iterations(options: dict[str, Any], iterations: int) -> None:
    """Shorten or lengthen a training, in place; its schedule keeps its proportions."""
    train, logger = options["train"], options["logger"]
    factor = iterations / train["total_iter"]
    train["total_iter"] = iterations
    for name in ("milestones", "periods", "restarts"):
        if name in train["scheduler"]:
            train["scheduler"][name] = [round(step * factor) for step in train["scheduler"][name]]
    options["val"]["val_freq"] = min(options["val"]["val_freq"], iterations)
    logger["save_checkpoint_freq"] = min(logger["save_checkpoint_freq"], math.ceil(iterations / 4))
    logger["print_freq"] = min(logger["print_freq"], math.ceil(iterations / 10))


def make_variants(network: dict[str, Any], words: Sequence[str], grid: bool) -> list[Variant]:
    """The baseline, which is `network`, and its variants: one change each, or all combinations.

    words: `NAME,NAME` for options whose values are known, or `NAME=VALUE,VALUE`.

    Raises ValueError for an option that the network does not have, or where there is nothing to compare.
    """
    arch = checks.registered(network["type"], ARCH_REGISTRY)
    if arch is None:
        raise ValueError(
            f"network_g:type is {network['type']}, which is not registered; "
            f"{checks.nearest(network['type'], ARCH_REGISTRY.keys())}"
        )
    choices = CHOICES if network["type"] == "RWKVIR" else {}
    asked: dict[str, Sequence[Any]] = {}
    for word in words:
        asked |= _given_values(word) if "=" in word else {name: choices.get(name, ()) for name in word.split(",")}
    parameters = inspect.signature(arch).parameters
    for name, values in asked.items():
        if name not in parameters:
            known = checks.nearest(name, parameters)
            raise ValueError(f"--what {name} is not an option of {arch.__name__}; {known}")
        if not values:
            raise ValueError(f"--what {name} needs the values to try; give them as {name}=VALUE,VALUE")
    own = {name: network.get(name, parameters[name].default) for name in asked}
    columns = [
        [(name, own[name]), *((name, value) for value in values if value != own[name])]
        for name, values in asked.items()
    ]
    combinations = itertools.product(*columns) if grid else _one_at_a_time(columns)
    changes = [{name: value for name, value in some if value != own[name]} for some in combinations]
    if len(changes) < 2:
        raise ValueError(f"--what {' '.join(words)} has only the baseline's own values; add others")
    return [Variant(some, {**network, **some}) for some in changes]


def _given_values(word: str) -> dict[str, list[Any]]:
    name, _, values = word.partition("=")
    try:
        return {name: yaml.safe_load(f"[{values}]")}
    except yaml.YAMLError as error:
        raise ValueError(f"--what {word} is not of the form NAME=VALUE,VALUE; correct it") from error


def _one_at_a_time(columns: Sequence[Sequence[Any]]) -> list[tuple]:
    return [(), *((change,) for column in columns for change in column[1:])]


def make_run(base: dict[str, Any], variant: Variant, seed: int, out: Path) -> Run:
    """The run of `variant` from `seed`, with nothing else changed in the options `base`."""
    name = f"{base['name']}_{re.sub(r'[^A-Za-z0-9.+]+', '-', variant.label).strip('-')}_seed{seed}"
    options = {**copy.deepcopy(base), "name": name, "manual_seed": seed, "network_g": variant.options}
    return Run(variant, seed, options, out / "options" / f"{name}.yml")


def step_seconds(variants: Sequence[Variant], base: dict[str, Any]) -> dict[str, float]:
    """Seconds of a forward and backward pass over a training batch, by label: medians, measured in turns, of noise.

    On a CPU, where the memory is everybody's, at most 4 patches of the batch are computed, and their time is scaled.
    """
    train, network = base["datasets"]["train"], base["network_g"]
    side = train["gt_size"] // base["scale"]
    channels = next((network[name] for name in standard.IN_NAMES if name in network), 3)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = train["batch_size_per_gpu"]
    computed = batch if device == "cuda" else min(batch, 4)
    x = torch.rand(computed, channels, side, side, device=device)
    networks = {variant.label: variant.build().to(device) for variant in variants}
    times: dict[str, list[float]] = {label: [] for label in networks}
    begun = time.perf_counter()
    for _ in range(ROUNDS):
        for label, built in networks.items():
            step_begun = time.perf_counter()
            built(x).mean().backward()
            if device == "cuda":
                torch.cuda.synchronize()
            times[label].append(time.perf_counter() - step_begun)
        if time.perf_counter() - begun > SECONDS:
            break
    return {label: statistics.median(some[1:] or some) * batch / computed for label, some in times.items()}


def overview(parameters: dict[str, int], seconds: dict[str, float], runs: Sequence[Run], jobs: int) -> str:
    """The variants as a text table, and an estimate of the time that is left."""
    left = [run for run in runs if not run.scores()]
    work = sum(seconds[run.variant.label] * (run.iterations - (run.progress() if run.is_same() else 0)) for run in left)
    width = max(map(len, seconds))
    lines = [
        f"  {label:<{width}} {parameters[label]:>12,} parameters {step:8.3f} s/iteration"
        for label, step in seconds.items()
    ]
    done = f"{len(runs) - len(left)} runs are finished"
    rest = f"the others need about {duration(work / jobs / 3600)}, and beyond it start, loading and validation"
    return "\n".join([*lines, f"{done}; {rest}." if left else f"All {done}."])


def train(runs: Sequence[Run], jobs: int) -> None:
    """Train what is not finished, `jobs` runs at a time, each by `basicsr train` in a process of its own.

    Raises:
        ValueError: a run fails; the others are stopped, and go on when this is called again.
        KeyboardInterrupt: with a sentence about how to go on; also upon SIGTERM.
    """
    for run in runs:
        run.write()
    waiting = [run for run in runs if not run.scores()]
    done = len(runs) - len(waiting)
    running: list[tuple[Run, subprocess.Popen, Any]] = []
    previous = signal.signal(signal.SIGTERM, _interrupt)
    with tqdm(total=sum(run.iterations for run in runs), unit="iteration", disable=None, smoothing=0.02) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(_start(waiting.pop(0)))
                time.sleep(0.3)
                for entry in [entry for entry in running if entry[1].poll() is not None]:
                    running.remove(entry)
                    scores = _ended(*entry)
                    done += 1
                    values = ", ".join(f"{value:.2f} dB on {dataset}" for dataset, value in scores.items())
                    with tqdm.external_write_mode():
                        run = entry[0]
                        print(f"{done} of {len(runs)}: {run.variant.label}, seed {run.seed}: {values}", flush=True)
                bar.n = done * runs[0].iterations + sum(run.progress() for run, *_ in running)
                bar.refresh()
        except KeyboardInterrupt as stop:
            stop.args = (f"interrupted with {done} of {len(runs)} runs finished; to go on, run the same command again",)
            raise
        finally:
            for _, process, _ in running:
                process.kill()  # a run goes on to the bit from any kill
                process.wait()
            signal.signal(signal.SIGTERM, previous)


def _interrupt(number: int, _: Any) -> None:
    raise pipeline.Interrupted(number)


def _start(run: Run) -> tuple[Run, subprocess.Popen, Any]:
    """Begin or continue `run`: (run, its process, what it says on stderr)."""
    resume = ["--auto_resume"] if run.is_same() else []  # else BasicSR moves away what is there
    errors = tempfile.TemporaryFile("w+")
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "rwkvir", "train", "-opt", str(run.file), *resume]
    return run, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment), errors


def _ended(run: Run, process: subprocess.Popen, errors: Any) -> dict[str, float]:
    """The scores of a run whose process has ended. Raises ValueError if it failed."""
    with errors:
        errors.seek(0)
        said = [line.strip() for line in errors if line.strip()]
    if process.returncode < 0:
        raise ValueError(
            f"the run {run.options['name']} was killed by signal {-process.returncode}, for want of memory perhaps; "
            "run the same command again, with --jobs 1 if so"
        )
    if process.returncode:
        reason = said[-1].removeprefix("basicsr train: ") if said else f"exit code {process.returncode}"
        raise ValueError(f"the run {run.options['name']} failed: {reason}")
    scores = run.scores()
    if not scores:
        raise ValueError(f"{run.folder} has no PSNR at its last iteration; give val:metrics a calculate_psnr in -opt")
    return scores


def collect(runs: Sequence[Run], parameters: dict[str, int], seconds: dict[str, float]) -> list[Row]:
    """A row for each validation set and variant; the first of each set is the baseline."""
    psnr: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        for dataset, value in run.scores().items():
            psnr.setdefault((dataset, run.variant.label), []).append(value)
    rows = []
    for (dataset, label), values in psnr.items():
        gains = [value - reference for value, reference in zip(values, psnr[dataset, BASELINE], strict=True)]
        rows.append(Row(label, dataset, values, gains, parameters[label], seconds[label] / seconds[BASELINE]))
    return sorted(rows, key=lambda row: row.dataset)


def table_of_runs(runs: Sequence[Run]) -> str:
    """CSV: a line for each run and validation set."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "seed", "iterations", "dataset", "psnr", "experiment"])
    for run in runs:
        for dataset, value in run.scores().items():
            writer.writerow([run.variant.label, run.seed, run.iterations, dataset, f"{value:.4f}", run.folder])
    return text.getvalue()
