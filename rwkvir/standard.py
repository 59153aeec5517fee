"""The unified training standard (arXiv 2412.03814): the one source of all files in options/.

    python -m rwkvir.standard options    writes the files again; a test holds them to this source

The standard fixes data, iterations, batch, patch, optimiser and loss per task, so that networks can be compared: the
`convergence` budget asks how fast a network learns, the `restoration` budget what it can do. A `Task` says what is
fixed, `NETWORKS` what is trained, and `FILES` which of the combinations stand in options/.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

LR_PATCH = 64  # pixels a side


@dataclass(frozen=True)
class Budget:
    """How long a run is, and when its learning rate is halved."""

    total_iter: int
    milestones: tuple[int, ...]
    source: str


@dataclass(frozen=True)
class Task:
    """What the standard fixes for one task."""

    title: str
    batch: int  # of the whole run; batch_size_per_gpu is this divided by the number of processes
    budgets: dict[str, Budget]


RESTORATION = Budget(500_000, (250_000, 400_000, 450_000, 475_000), "iterations published; milestones of the code")
TASKS = {
    "classic": Task(
        "classic super-resolution",
        batch=32,
        budgets={
            "convergence": Budget(
                100_000, (50_000, 75_000, 90_000, 95_000), "iterations published; milestones of the code"
            ),
            "restoration": RESTORATION,
        },
    ),
    "light": Task(
        "light super-resolution",
        batch=64,
        budgets={
            "convergence": Budget(
                50_000, (25_000, 40_000, 45_000, 47_500), "iterations published; milestones ours, in proportion"
            ),
            "restoration": RESTORATION,
        },
    ),
}
NETWORKS: dict[str, dict[str, Any]] = {
    "classic": {"type": "RWKVIR", "num_feat": 192, "depths": [6] * 6, "upsampler": "pixelshuffle"},
    "light": {"type": "RWKVIR", "num_feat": 48, "depths": [6] * 4, "upsampler": "pixelshuffledirect"},
}
# What the paper's figure shows and its code contradicts; the names are explained in RWKVIR's docstring.
AS_PUBLISHED = {"hidden_ratio": 3, "scan": "cross", "shift": "dc", "dc_norm": "batch", "decay_scale": "tokens"}


def super_resolution(task_name: str, scale: int, budget_name: str = "convergence") -> str:
    """The option file of a super-resolution run under the standard."""
    task, budget = TASKS[task_name], TASKS[task_name].budgets[budget_name]
    other_name = "restoration" if budget_name == "convergence" else "convergence"
    other = task.budgets[other_name]
    options = run_options(
        name=f"RWKVIR_{task_name}_x{scale}",
        scale=scale,
        network={**NETWORKS[task_name], "upscale": scale, **AS_PUBLISHED},
        train_set={
            "name": "ReSyn",
            "dataroot_gt": "datasets/ReSyn/train_GT.lmdb",
            "dataroot_lq": f"datasets/ReSyn/train_LQ_x{scale}.lmdb",
            "io_backend": {"type": "lmdb"},
        },
        val_set={
            "name": "Set5",
            "dataroot_gt": "datasets/Set5/GTmod12",
            "dataroot_lq": f"datasets/Set5/LRbicx{scale}",
            "io_backend": {"type": "disk"},
        },
        batch=task.batch,
        workers=8,
        budget=budget,
        print_freq=100,
        save_freq=5000,
    )
    milestones = ",".join(str(step) for step in other.milestones)
    header = f"""
        RWKV-IR, {task.title} x{scale}, under the unified training standard (arXiv 2412.03814).

            basicsr train -opt options/{file_name(task_name, scale)}

        Budget: {budget_name}, {budget.total_iter} iterations ({budget.source}).
        For {other_name}, add: --force_yml train:total_iter={other.total_iter} train:scheduler:milestones=[{milestones}]

        Published: network, loss, iterations, data. From the released code: LR patch {LR_PATCH}x{LR_PATCH}, total batch
        {task.batch}, Adam (0.9, 0.99) at 2e-4, seed 10, flips and 90-degree rotations. The batch is the whole run's:
        with N processes (torchrun), set datasets:train:batch_size_per_gpu to {task.batch} / N.
        Ours: validation on Set5 every 5000 iterations; PSNR and SSIM on Y, border of {scale} pixels cropped.
    """
    return render(header, options)


def demo() -> str:
    """The option file behind `make demo`: minutes on two cores, no part of the standard."""
    scale = 2
    options = run_options(
        name="rwkvir_demo",
        scale=scale,
        network={
            "type": "RWKVIR",
            "num_feat": 32,
            "depths": [2, 2],
            "upsampler": "pixelshuffledirect",
            "upscale": scale,
            **AS_PUBLISHED,
        },
        train_set={
            "name": "demo",
            "dataroot_gt": "datasets/demo/train_GT.lmdb",
            "dataroot_lq": f"datasets/demo/train_LQ_x{scale}.lmdb",
            "io_backend": {"type": "lmdb"},
        },
        val_set={
            "name": "photos",
            "dataroot_gt": "datasets/demo/val_GT.lmdb",
            "dataroot_lq": f"datasets/demo/val_LQ_x{scale}.lmdb",
            "io_backend": {"type": "lmdb"},
        },
        batch=8,
        workers=1,
        budget=Budget(3000, (1500, 2300, 2750, 2900), "ours"),
        print_freq=50,
        save_freq=250,
    )
    options["datasets"]["train"]["gt_size"] = 32 * scale
    options["train"]["optim_g"]["lr"] = 8e-4
    header = f"""
        The demo: a small RWKV-IR, x{scale}, trained for minutes on the pictures that `basicsr demo` makes.

            make demo

        Everything but the network and the loss is chosen to fit ten minutes on two cores, not by the standard.
    """
    return render(header, options)


def run_options(
    name: str,
    scale: int,
    network: dict[str, Any],
    train_set: dict[str, Any],
    val_set: dict[str, Any],
    batch: int,
    workers: int,
    budget: Budget,
    print_freq: int,
    save_freq: int,
) -> dict[str, Any]:
    """A complete BasicSR option file, as a mapping; learning rate, loss and metrics are those of the standard."""
    metric = {"crop_border": scale, "test_y_channel": True}
    return {
        "name": name,
        "model_type": "SRModel",
        "scale": scale,
        "num_gpu": "auto",
        "manual_seed": 10,
        "datasets": {
            "train": {
                "type": "ReSynPairedDataset",
                **train_set,
                "gt_size": LR_PATCH * scale,
                "use_hflip": True,
                "use_rot": True,
                "num_worker_per_gpu": workers,
                "batch_size_per_gpu": batch,
                "dataset_enlarge_ratio": 100,
                "prefetch_mode": None,
            },
            "val": {"type": "ReSynPairedDataset", **val_set},
        },
        "network_g": network,
        "path": {"pretrain_network_g": None, "strict_load_g": True, "resume_state": None},
        "train": {
            "ema_decay": 0,
            "optim_g": {"type": "Adam", "lr": 2e-4, "weight_decay": 0, "betas": [0.9, 0.99]},
            "scheduler": {"type": "MultiStepLR", "milestones": list(budget.milestones), "gamma": 0.5},
            "total_iter": budget.total_iter,
            "warmup_iter": -1,
            "pixel_opt": {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"},
        },
        "val": {
            "val_freq": save_freq,
            "save_img": False,
            "metrics": {
                "psnr": {"type": "calculate_psnr", **metric},
                "ssim": {"type": "calculate_ssim", **metric},
            },
        },
        "logger": {
            "print_freq": print_freq,
            "save_checkpoint_freq": save_freq,
            "use_tb_logger": True,
            "wandb": {"project": None, "resume_id": None},
        },
        "dist_params": {"backend": "nccl", "port": 29500},
    }


class _Dumper(yaml.SafeDumper):
    """Absent values as ~, as BasicSR's files have them."""


_Dumper.add_representer(type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", "~"))


def render(header: str, options: dict[str, Any]) -> str:
    """A YAML file: the header as a comment, a blank line between sections, innermost mappings on one line."""
    lines = [line.removeprefix(" " * 8) for line in header.strip("\n").rstrip().splitlines()]
    comment = "\n".join(f"# {line}".rstrip() for line in lines)
    simple = {key: value for key, value in options.items() if not isinstance(value, dict)}
    sections = [simple, *({key: value} for key, value in options.items() if isinstance(value, dict))]
    bodies = (
        yaml.dump(
            section, Dumper=_Dumper, sort_keys=False, default_flow_style=False if section is simple else None, width=120
        )
        for section in sections
    )
    return "\n".join((comment + "\n", *bodies))


def file_name(task_name: str, scale: int) -> str:
    return f"rwkvir_x{scale}.yml" if task_name == "classic" else f"rwkvir_{task_name}_x{scale}.yml"


def files() -> dict[str, str]:
    """Every file of options/: its name and its text."""
    standard = {file_name(task, scale): super_resolution(task, scale) for task in TASKS for scale in (2, 3, 4)}
    return {**standard, "rwkvir_demo.yml": demo()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rwkvir.standard", description="Write the option files of the unified standard."
    )
    parser.add_argument("folder", type=Path, help="where to write them: options")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (folder / name).write_text(text)
        print(folder / name)


if __name__ == "__main__":
    main()
