"""Weights to give away: plain and EMA as safetensors, and a card that says where they come from and what they score."""

from __future__ import annotations

import csv
import json
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save

from rwkvir import benchmark, checks, standard
from rwkvir.command_line import version
from rwkvir.published import PUBLISHED
from rwkvir_data.page import replace

SETS = ("Set5", "Set14", "BSD100")
BESIDE = ("RWKV-IR light", "BSRN")  # what published models are called that belong beside ours
# Options that change with the machine and not what is trained.
OF_A_MACHINE = ("name", "dataroot_gt", "dataroot_lq", "num_worker_per_gpu", "prefetch_mode", "pin_memory", "cache")
KINDS = {"": "params", "_ema": "params_ema"}


def write(
    output: Path, name: str, note: str, run: standard.Run, weights: Path, iteration: int, data: Path, testsets: str
) -> None:
    """Write NAME.safetensors, NAME_ema.safetensors and NAME.md into `output`; below the budget, NAME_ITERATION.

    Args:
        note: a sentence for the card to begin with.
        run: of the standard, which these weights are trained by.
        weights: BasicSR's net_g_ITERATION.pth of a run with EMA, in the folder of its experiment.
        data: what `train_light.py prepare` has written.
        testsets: the folder that holds SETS.
    """
    budget = run.budget.total_iter
    name = name if iteration == budget else f"{name}_{iteration}"
    options = checks.load_options(str(weights.parents[1] / f"{run.name}.yml"))
    content = torch.load(weights, map_location="cpu", weights_only=True)
    metadata = {"network_g": json.dumps(options["network_g"]), "iteration": str(iteration), "commit": commit()}
    output.mkdir(parents=True, exist_ok=True)
    files = {kind: output / f"{name}{kind}.safetensors" for kind in KINDS}
    for kind, file in files.items():
        replace(file, save({key: value.contiguous() for key, value in content[KINDS[kind]].items()}, metadata))
    rows = measured(options, files.values(), testsets, weights.parents[1] / "benchmark")
    text = card(name, note, run, options, iteration, list(rows), list(manifest(data)))
    replace(output / f"{name}.md", text.encode())
    sizes = ", ".join(f"{file.name} ({file.stat().st_size / 1e6:.2f} MB)" for file in files.values())
    print(f"{output}: {sizes}, {name}.md")


def commit() -> str:
    """That of the checkout which this file is in, with '-dirty' where something in it is not committed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() or f"no git checkout, {version('rwkvir')}"


def measured(
    options: dict[str, Any], files: Iterable[Path], testsets: str, scores: Path
) -> Iterator[tuple[str, list[str]]]:
    """(model, PSNR / SSIM on each of SETS), of bicubic and of each of the files, by `basicsr benchmark` on the CPU.

    It keeps its results in the folder `scores`, and measures nothing twice.
    """
    scores.mkdir(exist_ok=True)
    option_file = scores / "options.yml"
    option_file.write_text(yaml.safe_dump({key: options[key] for key in ("name", "scale", "network_g")}))
    words = ["-opt", str(option_file), *map(str, files), "--data", testsets, "--sets", *SETS]
    benchmark.main([*words, "--device", "cpu", "-o", str(scores)])
    with (scores / "benchmark.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "measured"]
    for model in dict.fromkeys(row["model"] for row in rows):
        by_set = {row["set"]: row for row in rows if row["model"] == model}
        yield model, [f"{float(by_set[name]['psnr']):.2f} / {float(by_set[name]['ssim']):.4f}" for name in SETS]


def published(task: str) -> Iterator[tuple[str, list[str]]]:
    for entry in PUBLISHED:
        if entry.task == task and entry.model.startswith(BESIDE):
            params = f", {entry.params / 1e3:.0f} K parameters" if entry.params else ""
            yield f"*{entry.model}{params} (published)*", [f"*{entry.psnr[name]:.2f}*" for name in SETS]


def manifest(data: Path) -> Iterator[str]:
    """Lines of a table: licence, number of pictures, and all authors who are named."""
    with (data / "manifest.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    for licence in sorted({row["licence"] for row in rows}):
        some = [row for row in rows if row["licence"] == licence]
        authors = ", ".join(sorted({row["author"] for row in some} - {""}))
        sources = ", ".join(sorted({re.split("[@=]", row["source"])[0] for row in some}))
        yield f"| {licence} | {len(some)} | {authors or 'not named'} | {sources} |"


def card(
    name: str,
    note: str,
    run: standard.Run,
    options: dict[str, Any],
    iteration: int,
    rows: Sequence[tuple[str, list[str]]],
    pictures: Sequence[str],
) -> str:
    """The model card, as Markdown."""
    budget, usual = run.budget.total_iter, standard.train_options(run)
    changes = differences(options["network_g"], usual["network_g"])
    network = (
        f" --network {' '.join(change.split(' (')[0].replace(': ', '=') for change in changes)}" if changes else ""
    )
    sections = {key: options[key] for key in ("network_g", "train", "manual_seed")}
    others = differences({**sections, "datasets": {"train": options["datasets"]["train"]}}, usual)
    state = (
        "the whole budget"
        if iteration == budget
        else f"**partial: {iteration / budget:.1%} of the budget**, to be continued"
    )
    table = [
        ["", *SETS],
        ["---"] * (1 + len(SETS)),
        *([model, *cells] for model, cells in (*rows, *published(run.label))),
    ]
    lines = [
        f"# {name}",
        "",
        *([f"**{note}**", ""] if note else []),
        f"RWKV-IR ({run.task.title}, ×{run.scale}; arXiv 2412.03814), trained from scratch by rwkvir's "
        f"`benchmarks/train_light.py`; this card was written at commit `{commit()}`.",
        "",
        f"- Budget: {iteration:,} of {budget:,} iterations, {state}.",
        f"- `{name}.safetensors` holds the last weights, `{name}_ema.safetensors` their moving average (decay "
        f"{options['train']['ema_decay']:g}).",
        "- Weights: Apache-2.0, as the code. The pictures they were trained on keep their licences (below).",
        "",
        "```bash",
        f"{run.command(test=True)}{network} > test.yml",
        f"basicsr test -opt test.yml --force_yml path:pretrain_network_g=weights/{name}_ema.safetensors",
        "```",
        "",
        "## Results",
        "",
        f"PSNR in dB / SSIM on Y, border of {run.scale} pixels cropped, float32 on a CPU, by `basicsr benchmark`. "
        "Published rows: PSNR, of networks that were trained on DIV2K, DF2K or ReSyn, for 50,000 iterations or more.",
        "",
        *(f"| {' | '.join(cells)} |" for cells in table),
        "",
        "## Data",
        "",
        "| licence | pictures | authors | from |",
        "|---|---|---|---|",
        *pictures,
        "",
        "## Options",
        "",
        "The unified training standard's, but for:",
        "",
        *(f"- {difference}" for difference in others),
        "",
        "```yaml",
        yaml.safe_dump(sections, sort_keys=False, default_flow_style=None, width=110).rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def differences(own: dict[str, Any], other: dict[str, Any], prefix: str = "") -> list[str]:
    """What `own` has otherwise than `other`, as `section:key: value (other's value)`, but for OF_A_MACHINE."""
    found = []
    for key, mine in own.items():
        theirs = other.get(key)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            found += differences(mine, theirs, f"{prefix}{key}:")
        elif mine != theirs and key not in OF_A_MACHINE:
            found.append(f"{prefix}{key}: {mine} ({'absent' if theirs is None else theirs})")
    return found
