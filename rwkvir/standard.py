"""The unified training standard (arXiv 2412.03814): the one source of all option files.

    basicsr standard --arch SwinIR --task light --scale 4 > my.yml
    python -m rwkvir.standard options    writes the committed files again; a test holds them to this source

The standard fixes data, iterations, batch, patch, optimiser and loss per task, so that networks can be compared: the
`convergence` budget asks how fast a network learns, the `restoration` budget what it can do. `TASKS` says what is
fixed, `NETWORKS` which configurations are published, and `committed_files` what stands in options/.
"""

import argparse
import inspect
import math
import re
import shlex
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rwkvir import checks

SAVE_FREQ = 5000  # iterations between validations, and between checkpoints
PUBLISHED, RELEASED, OURS = "Published", "From the released code", "Ours"  # where a choice comes from


@dataclass(frozen=True)
class Budget:
    """How long a run is, and when its learning rate is halved."""

    total_iter: int
    milestones: tuple[int, ...]
    iterations_from: str
    milestones_from: str


@dataclass(frozen=True)
class Task:
    """What the standard fixes for one task; the defaults are those of super-resolution.

    Its level is a scale, a noise level (of 255) or a JPEG quality.
    """

    title: str
    batch: int  # of the whole run; batch_size_per_gpu is this divided by the number of processes
    budgets: dict[str, Budget]
    flag: str = "scale"  # what gives the level on the command line
    levels: tuple[int, ...] = (2, 3, 4)
    degradation: str = "x"  # as rwkvir_data names it, without the level
    color: str = "rgb"
    patch: int = 64  # pixels a side, of LQ
    patch_from: str = RELEASED
    loss: str = "L1Loss"
    loss_from: str = PUBLISHED
    test_sets: tuple[str, ...] = ("Set5", "Set14", "BSD100", "Urban100", "Manga109")  # the first one is validated on
    scored_on: str = "Y, without a border of {scale} pixels"
    decisions: str = "LR of test pictures is made by MATLAB's bicubic"  # ours

    @property
    def enlarges(self) -> bool:
        return self.flag == "scale"


def restoring(title: str, **options: Any) -> Task:
    """A task without enlargement, for which only one budget is known."""
    budget = Budget(100_000, (50_000, 75_000, 90_000, 95_000), OURS, OURS)
    options.update(patch_from=OURS, loss="CharbonnierLoss", loss_from=RELEASED)
    return Task(title, 16, {"convergence": budget}, **options)


RESTORATION = Budget(500_000, (250_000, 400_000, 450_000, 475_000), PUBLISHED, RELEASED)
CLASSIC = Budget(100_000, (50_000, 75_000, 90_000, 95_000), PUBLISHED, RELEASED)
LIGHT = Budget(50_000, (25_000, 40_000, 45_000, 47_500), PUBLISHED, OURS)
TASKS = {
    "classic": Task("classic super-resolution", 32, {"convergence": CLASSIC, "restoration": RESTORATION}),
    "light": Task("light super-resolution", 64, {"convergence": LIGHT, "restoration": RESTORATION}),
    "denoise": restoring(
        "colour denoising",
        flag="sigma",
        levels=(15, 25, 50),
        degradation="noise",
        patch=128,
        test_sets=("CBSD68", "Kodak24", "McMaster", "Urban100"),
        scored_on="RGB, the whole picture",
        decisions="noise is drawn anew for each patch, and always the same for a test picture",
    ),
    "jpeg": restoring(
        "grey JPEG artefact reduction",
        flag="quality",
        levels=(10, 20, 30, 40),
        degradation="jpeg",
        color="gray",
        patch=126,
        test_sets=("Classic5", "LIVE1"),
        scored_on="the whole grey picture",
        decisions="pictures are read as grey, then compressed",
    ),
}
BUDGETS = tuple(TASKS["classic"].budgets)


class Network(NamedTuple):
    """A published configuration: the options but for scale, channels and patch, and where they are from.

    `levels` are those that it can be trained at, if not all of the task's.
    """

    source: str
    options: dict[str, Any]
    levels: tuple[int, ...] = ()


# What the paper's figure shows and its code contradicts; the names are explained in RWKVIR's docstring.
AS_PUBLISHED = {"hidden_ratio": 3, "scan": "cross", "shift": "dc", "dc_norm": "batch", "decay_scale": "tokens"}


def rwkvir(name: str, num_feat: int, depths: list[int], upsampler: str) -> Network:
    options = {"num_feat": num_feat, "depths": depths, "upsampler": upsampler, **AS_PUBLISHED}
    return Network(f"the paper's {name}", options)


def swinir(name: str, embed_dim: int, groups: int, upsampler: str, window: int = 8, img_range: float = 1.0) -> Network:
    depths = {"embed_dim": embed_dim, "depths": [6] * groups, "num_heads": [6] * groups}
    options = {"window_size": window, "img_range": img_range, **depths, "mlp_ratio": 2, "upsampler": upsampler}
    return Network(f"SwinIR (arXiv 2108.10257) and its released code: {name}", options)


def edsr(name: str, num_feat: int, num_block: int, res_scale: float) -> Network:
    options = {"num_feat": num_feat, "num_block": num_block, "res_scale": res_scale, **DIV2K}
    return Network(f"EDSR (arXiv 1707.02921) and BasicSR's option files: {name}", options)


DIV2K = {"img_range": 255.0, "rgb_mean": [0.4488, 0.4371, 0.4040]}
RCAN = {"num_feat": 64, "num_group": 10, "num_block": 20, "squeeze_factor": 16, "res_scale": 1, **DIV2K}
RRDBNET = {"num_feat": 64, "num_block": 23, "num_grow_ch": 32}
ECBSR = {"num_block": 4, "num_channel": 16, "with_idt": False, "act_type": "prelu"}
NETWORKS: dict[str, dict[str, Network]] = {
    "RWKVIR": {
        "classic": rwkvir("classic", 192, [6] * 6, "pixelshuffle"),
        "light": rwkvir("light", 48, [6] * 4, "pixelshuffledirect"),
        "denoise": rwkvir("classic", 192, [6] * 6, ""),
        "jpeg": rwkvir("classic", 192, [6] * 6, ""),
    },
    "SwinIR": {
        "classic": swinir("classical SR", 180, 6, "pixelshuffle"),
        "light": swinir("lightweight SR", 60, 4, "pixelshuffledirect"),
        "denoise": swinir("colour denoising", 180, 6, ""),
        "jpeg": swinir("JPEG artefact reduction", 180, 6, "", window=7, img_range=255.0),
    },
    "EDSR": {"classic": edsr("EDSR", 256, 32, 0.1), "light": edsr("EDSR-baseline", 64, 16, 1)},
    "RCAN": {"classic": Network("RCAN (arXiv 1807.02758) and BasicSR's option files", RCAN)},
    "RRDBNet": {"classic": Network("ESRGAN (arXiv 1809.00219), and BasicSR's extension to x2", RRDBNET, (2, 4))},
    "MSRResNet": {
        "light": Network(
            "SRResNet (arXiv 1609.04802) without batch norm, BasicSR's option files", {"num_feat": 64, "num_block": 16}
        ),
    },
    "ECBSR": {"light": Network("ECBSR-M4C16 (ACM MM 2021) on RGB, BasicSR's option files", ECBSR)},
}
# How constructors name what follows from the task; the first one that a constructor has is given.
SCALE_NAMES = ("upscale", "scale", "upscale_factor", "sf")
IN_NAMES = ("num_in_ch", "in_chans", "in_channels", "inp_channels", "in_ch")
OUT_NAMES = ("num_out_ch", "out_chans", "out_channels", "out_ch")


class Run(NamedTuple):
    """One cell of the standard: what is trained on what, and for how long."""

    arch: str
    task_name: str
    level: int
    budget_name: str = "convergence"
    changes: tuple[str, ...] = ()  # key=value, of the network

    @property
    def task(self) -> Task:
        return TASKS[self.task_name]

    @property
    def budget(self) -> Budget:
        return self.task.budgets[self.budget_name]

    @property
    def scale(self) -> int:
        return self.level if self.task.enlarges else 1

    @property
    def channels(self) -> int:
        return 1 if self.task.color == "gray" else 3

    @property
    def label(self) -> str:
        return f"{ {'scale': 'x', 'sigma': 'sigma', 'quality': 'q'}[self.task.flag] }{self.level}"

    @property
    def name(self) -> str:
        """The name of the experiment."""
        budget = "" if self.budget_name == "convergence" else f"_{self.budget_name}"
        changes = (re.sub(r"[^\w.-]+", "-", f"_{change}") for change in self.changes)
        return f"{self.arch}_{self.task_name}_{self.label}{budget}{''.join(changes)}"

    def command(self, test: bool) -> str:
        """What renders this run's option file."""
        words = ["basicsr standard", f"--arch {self.arch} --task {self.task_name} --{self.task.flag} {self.level}"]
        words += [f"--budget {self.budget_name}", *(["--test"] if test else [])]
        return " ".join([*words, *(["--network", shlex.join(self.changes)] if self.changes else [])])


def make_run(arch: str, task_name: str, levels: dict[str, int | None], budget_name: str, changes: list[str]) -> Run:
    """The run that the command line asks for; `levels` are --scale, --sigma and --quality.

    Raises ValueError, with the nearest known names, for what the standard does not have.
    """
    if task_name not in TASKS:
        raise ValueError(f"--task {task_name} is not in the standard; {checks.nearest(task_name, TASKS)}")
    task = TASKS[task_name]
    if budget_name not in BUDGETS:
        raise ValueError(f"--budget {budget_name} is not in the standard; {checks.nearest(budget_name, BUDGETS)}")
    if budget_name not in task.budgets:
        raise ValueError(
            f"--budget {budget_name} is not known for {task.title}: neither the paper nor its code gives one; use "
            f"--budget {' or '.join(task.budgets)}"
        )
    for flag, level in levels.items():
        if flag != task.flag and level is not None:
            raise ValueError(f"--{flag} means nothing for {task.title}; give --{task.flag} in its place")
    published = NETWORKS.get(arch, {}).get(task_name)
    known = (published and published.levels) or task.levels
    level = levels[task.flag]
    if level not in known:
        given = "is missing" if level is None else f"{level} is not in the standard of {arch}, {task.title}"
        raise ValueError(f"--{task.flag} {given}; give one of {', '.join(map(str, known))}")
    return Run(arch, task_name, level, budget_name, tuple(changes))


def network_options(run: Run) -> dict[str, Any]:
    """The section network_g: the published configuration or the constructor's defaults, the task's own, the changes.

    Raises ValueError for a network that is not registered, cannot take the task's scale or channels, or misses options.
    """
    from basicsr.utils.registry import ARCH_REGISTRY

    arch = checks.registered(run.arch, ARCH_REGISTRY)
    if arch is None:
        known = checks.nearest(run.arch, ARCH_REGISTRY.keys())
        raise ValueError(f"--arch {run.arch} is not a registered network; {known} Else install the plugin that has it")
    changes = dict(_changed(change) for change in run.changes)
    parameters, own = inspect.signature(arch).parameters, {}
    from_task = {SCALE_NAMES: run.scale, IN_NAMES: run.channels, OUT_NAMES: run.channels, ("img_size",): run.task.patch}
    for names, value in from_task.items():
        taken = [name for name in names if name in parameters][:1]
        own.update(dict.fromkeys(taken, value))
        if not taken and not changes and value != {SCALE_NAMES: 1, IN_NAMES: 3}.get(names, value):
            raise ValueError(
                f"{run.arch} takes no {' or '.join(names)}; give what it takes with --network NAME={value}"
            )
    if "window_size" in parameters:  # SwinIRModel reads it, and pads pictures to its multiples
        own["window_size"] = parameters["window_size"].default
    published = NETWORKS.get(run.arch, {}).get(run.task_name)
    options = {"type": run.arch, **own, **(published.options if published else {}), **changes}
    for finding in checks.check_arguments("--network", arch, set(options) - {"type"}):
        if finding.fatal:
            raise ValueError(str(finding))
    if not published:
        _try(run, arch, options)
    return options


def _try(run: Run, arch: Callable[..., Any], options: dict[str, Any]) -> None:
    """Raises ValueError for a network that does not turn a small picture into one of the task's size and channels."""
    import torch

    side = math.lcm(16, options.get("window_size") or 1)
    try:
        network = arch(**{key: value for key, value in options.items() if key != "type"}).eval()
        with torch.no_grad():
            shape = tuple(network(torch.zeros(1, run.channels, side, side)).shape)
    except Exception as error:  # whatever a network raises on pictures that it is not made for
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
    else:
        if shape == (1, run.channels, side * run.scale, side * run.scale):
            return
        problem = f"it makes {shape} of {(1, run.channels, side, side)}"
    raise ValueError(
        f"{run.arch}, so configured, cannot do {run.task.title} ({problem}); give other options with --network "
        "KEY=VALUE, or another --task"
    )


def _changed(change: str) -> tuple[str, Any]:
    key, separator, value = change.partition("=")
    if not key or not separator:
        raise ValueError(f"--network {change} is not of the form key=value; correct it")
    return key, yaml.safe_load(value)


def train_options(run: Run) -> dict[str, Any]:
    """The training file of `run`, as a mapping."""
    return run_options(
        name=run.name,
        scale=run.scale,
        network=network_options(run),
        train_set={"name": "ReSyn", **_training_data(run)},
        val_set=_test_set(run, run.task.test_sets[0]),
        patch=run.task.patch,
        batch=run.task.batch,
        workers=8,
        budget=run.budget,
        loss=run.task.loss,
        print_freq=100,
        save_freq=SAVE_FREQ,
    )


def test_options(run: Run) -> dict[str, Any]:
    """The test file of `run`, as a mapping: its last weights on all test sets."""
    sets = [_test_set(run, name) for name in run.task.test_sets]
    if run.task.enlarges:
        root, lmdb = "datasets/ReSyn/test", {"io_backend": {"type": "lmdb"}}
        pairs = {"dataroot_gt": f"{root}_GT.lmdb", "dataroot_lq": f"{root}_LQ_x{run.scale}.lmdb"}
        sets.append({"type": "ReSynPairedDataset", "name": "ReSyn", **pairs, **lmdb})
    network = network_options(run)
    return {
        "name": run.name,
        "model_type": model_type(network),
        "scale": run.scale,
        "num_gpu": "auto",
        "manual_seed": 10,
        "datasets": {f"test_{number}": test_set for number, test_set in enumerate(sets, 1)},
        "network_g": network,
        "path": {"pretrain_network_g": f"experiments/{run.name}/models/net_g_latest.pth", "strict_load_g": True},
        "val": {"save_img": False, "suffix": None, "metrics": metrics(run.scale)},
    }


def _training_data(run: Run) -> dict[str, Any]:
    lq = {"dataroot_lq": f"datasets/ReSyn/train_LQ_x{run.scale}.lmdb"} if run.task.enlarges else _degraded(run)
    return {"dataroot_gt": "datasets/ReSyn/train_GT.lmdb", **lq, "io_backend": {"type": "lmdb"}}


def _test_set(run: Run, name: str) -> dict[str, Any]:
    place = {"dataroot_gt": f"datasets/{name}/HR", **_degraded(run), "io_backend": {"type": "disk"}}
    return {"type": "ReSynPairedDataset", "name": name, **place}


def _degraded(run: Run) -> dict[str, Any]:
    color = {} if run.task.color == "rgb" else {"color": run.task.color}
    return {"degradation": f"{run.task.degradation}{run.level}", **color}


def metrics(scale: int) -> dict[str, Any]:
    """PSNR and SSIM: on Y without a border where pictures are enlarged, else on all of all channels."""
    options = {"crop_border": scale if scale > 1 else 0, "test_y_channel": scale > 1}
    return {name: {"type": f"calculate_{name}", **options} for name in ("psnr", "ssim")}


def model_type(network: dict[str, Any]) -> str:
    """BasicSR's model for a network: where attention has windows, the one that pads pictures to their multiples."""
    return "SwinIRModel" if "window_size" in network else "SRModel"


def run_options(
    name: str,
    scale: int,
    network: dict[str, Any],
    train_set: dict[str, Any],
    val_set: dict[str, Any],
    patch: int,
    batch: int,
    workers: int,
    budget: Budget,
    loss: str,
    print_freq: int,
    save_freq: int,
) -> dict[str, Any]:
    """A complete BasicSR option file, as a mapping; optimiser and augmentation are those of the standard."""
    return {
        "name": name,
        "model_type": model_type(network),
        "scale": scale,
        "num_gpu": "auto",
        "manual_seed": 10,
        "datasets": {
            "train": {
                "type": "ReSynPairedDataset",
                **train_set,
                "gt_size": patch * scale,
                "use_hflip": True,
                "use_rot": True,
                "num_worker_per_gpu": workers,
                "batch_size_per_gpu": batch,
                "dataset_enlarge_ratio": 100,
                "prefetch_mode": None,
            },
            "val": val_set,
        },
        "network_g": network,
        "path": {"pretrain_network_g": None, "strict_load_g": True, "resume_state": None},
        "train": {
            "ema_decay": 0,
            "optim_g": {"type": "Adam", "lr": 2e-4, "weight_decay": 0, "betas": [0.9, 0.99]},
            "scheduler": {"type": "MultiStepLR", "milestones": list(budget.milestones), "gamma": 0.5},
            "total_iter": budget.total_iter,
            "warmup_iter": -1,
            "pixel_opt": {"type": loss, "loss_weight": 1.0, "reduction": "mean"},
        },
        "val": {"val_freq": save_freq, "save_img": False, "metrics": metrics(scale)},
        "logger": {
            "print_freq": print_freq,
            "save_checkpoint_freq": save_freq,
            "use_tb_logger": True,
            "wandb": {"project": None, "resume_id": None},
        },
        "dist_params": {"backend": "nccl", "port": 29500},
    }


def training_file(run: Run) -> str:
    """The training file of `run`; its header says where everything in it comes from."""
    task, budget = run.task, run.budget
    facts: dict[str, list[str]] = {PUBLISHED: [], RELEASED: [], OURS: []}
    facts[budget.iterations_from].append(f"{budget.total_iter} iterations")
    facts[budget.milestones_from].append("milestones")
    facts[task.patch_from].append(f"patches of {task.patch}x{task.patch} pixels (LQ)")
    facts[task.loss_from].append(task.loss)
    facts[PUBLISHED].append("training on ReSyn")
    facts[RELEASED] += [f"total batch {task.batch}", "Adam (0.9, 0.99) at 2e-4", "seed 10", "flips and 90-degree turns"]
    facts[OURS] += [f"validation on {task.test_sets[0]} every {SAVE_FREQ} iterations", _scored(run)]
    body = [f"{source}: {'; '.join(texts)}." for source, texts in facts.items()]
    body.append(
        f"The batch is the whole run's: with N processes (torchrun), set datasets:train:batch_size_per_gpu to "
        f"{task.batch} / N."
    )
    return render(_header(run, body), train_options(run))


def test_file(run: Run) -> str:
    """The test file of `run`."""
    body = [f"{OURS}: {_scored(run)}; it tests what the training file of {run.name} has trained."]
    return render(_header(run, body, test=True), test_options(run))


def _scored(run: Run) -> str:
    return f"{run.task.decisions}; PSNR and SSIM on {run.task.scored_on.format(scale=run.scale)}"


def _header(run: Run, body: list[str], test: bool = False) -> str:
    published = NETWORKS.get(run.arch, {}).get(run.task_name)
    network = published.source if published else "the constructor's defaults; no configuration of it is published here"
    changed = f", with {' '.join(run.changes)}" if run.changes else ""
    kind, file = ("test", file_name(run, "_test")) if test else ("train", file_name(run))
    title = (
        f"{run.arch}, {run.task.title}, {run.label}: {kind} file of the unified training standard (arXiv 2412.03814)"
    )
    commands = f"    {run.command(test)} > {file}\n    basicsr {kind} -opt {file}"
    paragraphs = [f"Budget: {run.budget_name}. Network: {network}{changed}.", *body]
    filled = (textwrap.fill(text, 118, break_on_hyphens=False) for text in paragraphs)
    return "\n".join([f"{title}.", "", commands, "", *filled])


def demo() -> str:
    """The option file behind `make demo`: minutes on two cores, no part of the standard."""
    scale = 2

    def pairs(name: str, split: str) -> dict[str, Any]:
        root = f"datasets/demo/{split}"
        roots = {"dataroot_gt": f"{root}_GT.lmdb", "dataroot_lq": f"{root}_LQ_x{scale}.lmdb"}
        return {"type": "ReSynPairedDataset", "name": name, **roots, "io_backend": {"type": "lmdb"}}

    small = {"num_feat": 32, "depths": [2, 2], "upsampler": "pixelshuffledirect"}
    options = run_options(
        name="rwkvir_demo",
        scale=scale,
        network={"type": "RWKVIR", "upscale": scale, **small, **AS_PUBLISHED},
        train_set=pairs("demo", "train"),
        val_set=pairs("photos", "val"),
        patch=32,
        batch=8,
        workers=1,
        budget=Budget(3000, (1500, 2300, 2750, 2900), OURS, OURS),
        loss="L1Loss",
        print_freq=50,
        save_freq=250,
    )
    options["train"]["optim_g"]["lr"] = 8e-4
    lines = [
        f"The demo: a small RWKV-IR, x{scale}, trained for minutes on the pictures that `basicsr demo` makes.",
        "",
        "    make demo",
        "",
        "Everything but the network and the loss is chosen to fit ten minutes on two cores, not by the standard.",
    ]
    return render("\n".join(lines), options)


class _Dumper(yaml.SafeDumper):
    """Absent values as ~, as BasicSR's files have them; lists that occur twice are written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", "~"))


def render(header: str, options: dict[str, Any]) -> str:
    """A YAML file: the header as a comment, a blank line between sections, innermost mappings on one line."""
    comment = "".join(f"# {line}".rstrip() + "\n" for line in header.splitlines())
    simple = {key: value for key, value in options.items() if not isinstance(value, dict)}
    sections = [simple, *({key: value} for key, value in options.items() if isinstance(value, dict))]
    bodies = (
        yaml.dump(
            section, Dumper=_Dumper, sort_keys=False, default_flow_style=False if section is simple else None, width=110
        )
        for section in sections
    )
    return "\n".join((comment, *bodies))


def file_name(run: Run, suffix: str = "") -> str:
    task = "" if run.task_name == "classic" else f"{run.task_name}_"
    budget = "" if run.budget_name == "convergence" else f"_{run.budget_name}"
    return f"{run.arch.lower()}_{task}{run.label}{budget}{suffix}.yml"


def runs() -> list[Run]:
    """Every run of the standard whose network's configuration is published."""
    return [
        Run(arch, task, level, budget)
        for arch, networks in NETWORKS.items()
        for task, network in networks.items()
        for level in network.levels or TASKS[task].levels
        for budget in TASKS[task].budgets
    ]


def committed_files() -> dict[str, str]:
    """Every file of options/, its name and its text: RWKV-IR's first budget, one level of the tasks without scale."""
    cells = [(task, scale) for task in ("classic", "light") for scale in TASKS[task].levels]
    standard = [Run("RWKVIR", *cell) for cell in (*cells, ("denoise", 25), ("jpeg", 40))]
    return {**{file_name(run): training_file(run) for run in standard}, "rwkvir_demo.yml": demo()}


def overview() -> str:
    """The standard as a text table, and which networks it has configurations of."""
    mark = {PUBLISHED: "p", RELEASED: "c", OURS: "o"}
    rows = [("task", "levels", "budget", "iterations", "milestones", "patch", "batch", "loss", "tested on")]
    for name, task in TASKS.items():
        level = f"--{task.flag} {'|'.join(map(str, task.levels))}"
        patch, batch, loss = (
            f"{task.patch} {mark[task.patch_from]}",
            f"{task.batch} c",
            f"{task.loss} {mark[task.loss_from]}",
        )
        tested_on = ", ".join([*task.test_sets, *(["ReSyn"] if task.enlarges else [])])
        for budget_name, budget in task.budgets.items():
            iterations = f"{budget.total_iter} {mark[budget.iterations_from]}"
            milestones = (
                ",".join(f"{step / 1000:g}" for step in budget.milestones) + f" K {mark[budget.milestones_from]}"
            )
            rows.append((name, level, budget_name, iterations, milestones, patch, batch, loss, tested_on))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    configured = [f"  {arch:<10} {', '.join(networks)}" for arch, networks in NETWORKS.items()]
    other = "Any other network of `basicsr info` takes its constructor's defaults and --network KEY=VALUE."
    legend = "p: published; c: from the released code; o: our decision. Always: Adam (0.9, 0.99) at 2e-4 c, seed 10 c."
    return "\n".join(
        [*lines, legend, "", "networks with a published configuration, and for which tasks:", *configured, other]
    )


def main(argv: list[str]) -> int:
    """Run `basicsr standard` with the arguments `argv`."""
    args = _parser().parse_args(argv)
    if args.list:
        print(overview())
        return 0
    if args.task is None:
        raise ValueError(f"--task is missing; give one of {', '.join(TASKS)}, or --list for the table")
    from rwkvir import plugins

    plugins.load_plugins()
    levels = {flag: getattr(args, flag) for flag in ("scale", "sigma", "quality")}
    run = make_run(args.arch, args.task, levels, args.budget, args.network)
    print((test_file if args.test else training_file)(run), end="")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="basicsr standard",
        description="Print the option file of a run under the unified training standard.",
        epilog="basicsr standard --arch SwinIR --task light --scale 4 > swinir_light_x4.yml",
    )
    parser.add_argument("--list", action="store_true", help="show what the standard fixes, and its networks")
    parser.add_argument("--arch", default="RWKVIR", help="a registered network (%(default)s)")
    parser.add_argument("--task", metavar="|".join(TASKS))
    parser.add_argument("--scale", type=int, metavar="2|3|4", help="of super-resolution")
    parser.add_argument("--sigma", type=int, metavar="15|25|50", help="of denoising")
    parser.add_argument("--quality", type=int, metavar="10|20|30|40", help="of JPEG")
    parser.add_argument("--budget", default="convergence", metavar="|".join(BUDGETS), help="(%(default)s)")
    parser.add_argument("--network", nargs="+", default=[], metavar="KEY=VALUE", help="options of the network")
    parser.add_argument("--test", action="store_true", help="the test file in place of the training file")
    return parser


if __name__ == "__main__":
    from rwkvir import plugins

    plugins.load_plugins()
    for name, text in committed_files().items():
        Path(sys.argv[1], name).write_text(text)
