"""Train RWKV-IR light x4 as the unified standard has it, in pieces of any length, on any machine.

    python benchmarks/train_light.py prepare --train ../shared/train --val ../shared/testsets/Set5 -o DATA
    python benchmarks/train_light.py cost
    python benchmarks/train_light.py choose --data DATA --work WORK --seeds 1 --minutes 9
    python benchmarks/train_light.py piece --data DATA --work WORK --minutes 9 --option network_g:decay_scale=side
    python benchmarks/train_light.py status --work WORK
    python benchmarks/train_light.py card --data DATA --work WORK --testsets ../shared/testsets -o weights

prepare: the pictures of a MANIFEST.tsv whose generators' licences allow weights to be given away, and dead leaves, as
    an LMDB, and the test sets to validate on: at most 45 MB, all that training takes along besides the checkpoint.
piece: 50,000 iterations of batch 64, patches of 64x64 (LQ), L1, Adam at 2e-4, in bfloat16, with EMA 0.999; BasicSR's
    own loop, by `basicsr train`. A piece ends after --minutes with WORK/checkpoint.tar (15 MB: network, EMA, optimiser,
    schedule, learning curve). Copied into an empty WORK elsewhere, that file is all the next piece needs to go on to
    the bit (on a GPU as far as its kernels are deterministic). --option is needed only by the first piece.
choose: `basicsr ablate` over decay_scale and dc_norm, each run a whole schedule of 3,000 iterations.
card: the weights, plain and EMA, as safetensors with a model card beside them.

An ideal step at batch 64 (`cost`) has 1.34 TFLOP, 1.7 ms of an H100's measured 798 TFLOP/s in bfloat16. It keeps 19 GB
for the backward pass; to write and read that once takes 13 ms of its measured 3.0 TB/s. One operation after the other,
as torch runs it without compiling, reads and writes 136 GB: 45 ms, or 22 it/s at most. Memory decides, not arithmetic:
more than about 20 it/s needs `--option train:compile=true`.

In half an hour on one H100, in this order; the machine should be kept between the calls, or DATA is sent again:
1. (about 5 minutes) build with CUDA_HOME set, `pytest tests/test_bi_wkv.py`, compute-sanitizer over the CUDA tests,
   `python benchmarks/bi_wkv_cuda.py`.
2. (2 minutes) `piece --minutes 1` twice into folders of their own, with and without `--option train:compile=true`;
   `status` tells it/s and the share of waiting for data. The faster one goes on; R is its it/s.
3. `choose --seeds 1`: 4 runs of 3,000 iterations, 12,000 / R seconds: 10 minutes at 20 it/s, 20 at 10. The second
   seed takes the same again (run it with --seeds 2: finished runs stay). So at 20 it/s both seeds fit and 3 minutes
   are left; at 10 it/s one seed, and nothing is left.
4. `piece --minutes 9` in the better form for what is left; the 50,000 iterations take 42 minutes at 20 it/s.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import model_card
import torch
import yaml
from tqdm import tqdm

from rwkvir import checks, pipeline, plugins, standard
from rwkvir.command_line import Command, run
from rwkvir.experiment import CURVE, read_experiment
from rwkvir_data import sources
from rwkvir_data.aside import written_aside
from rwkvir_data.dead_leaves import dead_leaves
from rwkvir_data.lmdb_pack import PackedPicture, write_lmdb
from rwkvir_data.page import replace
from rwkvir_data.parallel import available_cores

RUN = standard.Run("RWKVIR", "light", 4)
UNSHIPPED = ("sd3-community", "anime-merge")  # flags of pictures whose generator's licence reaches its pictures
MOST_MB = 45
LEAVES_SIDE, LEAVES_QUALITY = 512, 95
CHECKPOINT = "checkpoint.tar"
SAVE_FREQ = 2500


def main(argv: list[str] | None = None) -> int:
    helps = {
        "prepare": "pack pictures and dead leaves",
        "cost": "count arithmetic and memory traffic of a training step",
        "choose": "compare decay_scale and dc_norm on short runs",
        "piece": "train for a while, from the newest checkpoint",
        "status": "tell how far training is",
        "card": "write weights and model card",
    }
    commands = {name: Command(f"{__name__}:{name}", text) for name, text in helps.items()}
    return run("train_light", "Train RWKV-IR light x4 in pieces.", commands, ("rwkvir", "basicsr"), argv)


def prepare(argv: list[str]) -> int:
    parser = _parser("prepare")
    parser.add_argument("--train", required=True, metavar="FOLDER", help="pictures, with their MANIFEST.tsv")
    parser.add_argument("--val", nargs="+", default=[], metavar="FOLDER", help="test sets to validate on: NAME/HR")
    parser.add_argument("--leaves", type=int, default=14, metavar="N", help="pictures of dead leaves (%(default)s)")
    parser.add_argument("-o", "--output", required=True, metavar="DATA", help="the folder to write")
    args = parser.parse_args(argv)
    output = Path(args.output)
    manifest = Path(args.train, "MANIFEST.tsv")
    if not manifest.is_file():
        raise FileNotFoundError(f"there is no {manifest}; give --train a folder of pictures that has one")
    with manifest.open(newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if not any(f in row["flags"] for f in UNSHIPPED)]
    with written_aside(output) as partial:
        partial.mkdir()
        write_lmdb(
            partial / "train_GT.lmdb", tqdm(_packed(args.train, rows, args.leaves), unit="picture", disable=None)
        )
        for folder in map(Path, args.val):
            shutil.copytree(folder / "HR", partial / "val" / folder.name)
        with (partial / "manifest.tsv").open("w", newline="") as file:
            writer = csv.DictWriter(
                file, ("file", "source", "licence", "author"), delimiter="\t", extrasaction="ignore"
            )
            writer.writeheader()
            writer.writerows(rows)
            writer.writerows(
                {
                    "file": _leaves_key(i),
                    "source": f"rwkvir:dead_leaves={i}",
                    "licence": "generated by rwkvir",
                    "author": "",
                }
                for i in range(args.leaves)
            )
        size = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file()) / 1e6
        if size > MOST_MB:
            raise ValueError(
                f"{output} would have {size:.1f} MB, more than {MOST_MB}; lower --leaves or give fewer --val"
            )
    print(f"{output}: {len(rows)} pictures and {args.leaves} of dead leaves, {size:.1f} MB")
    return 0


def _packed(folder: str, rows: list[dict[str, str]], leaves: int) -> Iterator[PackedPicture]:
    """The files as they are, then dead leaves as JPEG: readers decode what they find, whatever meta_info.txt says."""
    for row in rows:
        content = sources.read(folder, row["file"])
        if hashlib.sha256(content).hexdigest() != row["sha256"]:
            raise ValueError(f"{folder}/{row['file']} is not the file that its MANIFEST.tsv describes; get it again")
        key = str(Path(row["file"]).with_suffix("")).replace(".", "_")
        yield PackedPicture(key, content, (int(row["height"]), int(row["width"]), 3), 0)
    quality = [cv2.IMWRITE_JPEG_QUALITY, LEAVES_QUALITY]
    quality += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    for index in range(leaves):
        picture = dead_leaves(0, index, LEAVES_SIDE, LEAVES_SIDE)
        content = cv2.imencode(".jpg", picture[..., ::-1], quality)[1].tobytes()
        yield PackedPicture(_leaves_key(index), content, picture.shape, 0)


def _leaves_key(index: int) -> str:
    return f"leaves/{index:04}"


def piece(argv: list[str]) -> int:
    parser = _training_parser("piece")
    args = parser.parse_args(argv)
    plugins.load_plugins()
    work, folder = Path(args.work), _folder(args.work)
    if (work / CHECKPOINT).exists():
        unpack(work / CHECKPOINT, folder)
    file = work / f"{RUN.name}.yml"
    used = folder / file.name
    begun = checks.load_options(str(used)) if used.exists() else {}
    options = write_options(file, begun, args.data, args.option)
    changed = model_card.differences(options, begun) if begun else []
    if changed:
        raise ValueError(f"{work} was begun with another {changed[0]}; leave --option out, or give another --work")
    if newest(folder) < options["train"]["total_iter"]:
        limit = ["--minutes", str(args.minutes)] if args.minutes is not None else []
        try:
            pipeline.train(["-opt", str(file), "--auto_resume", *limit], root_path=str(work))
        except pipeline.Interrupted as stop:
            stop.args = (
                f"interrupted, saved up to iteration {newest(folder)}; to continue, run the same command again",
            )
            raise
        pack(folder, work / CHECKPOINT)
    return status(["--work", args.work])


def write_options(file: Path, begun: dict[str, Any], data: str, changes: list[str]) -> dict[str, Any]:
    """Write, and return, the options of a run that has `begun` with some or, if these are empty, with the standard's.

    Data and loading are those of this machine; `changes` are as --force_yml takes them.
    """
    root, cuda = Path(os.path.abspath(data)), torch.cuda.is_available()
    options = begun or first_options(root)
    train, *val = options["datasets"].values()
    train.update(dataroot_gt=str(root / "train_GT.lmdb"), num_worker_per_gpu=max(available_cores() - 2, 1))
    train.update(prefetch_mode="cuda" if cuda else None, pin_memory=cuda)
    for dataset in val:
        dataset["dataroot_gt"] = str(root / "val" / dataset["name"])
    header = f"{RUN.arch}, {RUN.task.title}, {RUN.label}: written by benchmarks/train_light.py, and for this machine."
    file.parent.mkdir(parents=True, exist_ok=True)
    replace(file, standard.render(header, options).encode())
    options = checks.load_options(str(file), changes)
    total = options["train"]["total_iter"]
    options["logger"]["save_checkpoint_freq"] = math.gcd(SAVE_FREQ, total)  # so that the last iteration is saved too
    options["val"]["val_freq"] = min(options["val"]["val_freq"], total)
    replace(file, standard.render(header, options).encode())
    return options


def first_options(data: Path) -> dict[str, Any]:
    """The standard's, with RestorationModel's bfloat16 and EMA, and with the pictures of `data`, decoded once."""
    options = standard.train_options(RUN)
    made = {"type": "ReSynPairedDataset", "degradation": f"x{RUN.scale}"}
    train = {key: value for key, value in options["datasets"]["train"].items() if key != "dataroot_lq"}
    options["datasets"] = {"train": {**train, **made, "name": "train", "cache": True}}
    for number, folder in enumerate(sorted((data / "val").glob("*")), 1):
        options["datasets"][f"val_{number}"] = {**made, "name": folder.name, "io_backend": {"type": "disk"}}
    options["model_type"] = "RestorationModel"
    options["train"].update(ema_decay=0.999, amp="bfloat16")
    options["val"].update(val_freq=SAVE_FREQ, metrics={"psnr": standard.metrics(RUN.scale)["psnr"]})
    options["logger"]["use_tb_logger"] = False
    return options


def newest(folder: Path) -> int:
    """The iteration up to which the run in `folder` is saved."""
    return max((int(file.stem) for file in (folder / "training_states").glob("*.state")), default=0)


def pack(folder: Path, checkpoint: Path) -> None:
    """Write the newest state of the run in `folder` to a file, and remove older ones from the folder."""
    iteration = newest(folder)
    kept = [f"models/net_g_{iteration}.pth", CURVE, f"{RUN.name}.yml", f"training_states/{iteration}.state"]
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name in kept:
            tar.add(folder / name, name)
    replace(checkpoint, content.getvalue())
    for file in (*folder.glob("models/net_g_[0-9]*.pth"), *folder.glob("training_states/*.state")):
        if str(file.relative_to(folder)) not in kept:
            file.unlink()


def unpack(checkpoint: Path, folder: Path) -> None:
    """Bring the run in `folder` to the state in `checkpoint`, if that is newer. The state itself comes last."""
    try:
        with tarfile.open(checkpoint) as tar:
            content = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
        iteration = int(Path(list(content)[-1]).stem)
    except (tarfile.TarError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(
            f"{checkpoint} is damaged ({error}); copy it here again, or remove it to begin anew"
        ) from error
    if iteration > newest(folder):
        for name in ("models", "training_states"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for name, data in content.items():
            replace(folder / name, data)


def status(argv: list[str]) -> int:
    args = _parser("status", work=True).parse_args(argv)
    folder = _folder(args.work)
    if not newest(folder):
        raise FileNotFoundError(f"there is no run in {args.work}; begin it with: piece --data DATA --work {args.work}")
    experiment = read_experiment(folder, RUN.name)
    iteration, total = newest(folder), experiment.training["total_iter"]
    print(f"{RUN.name}: {iteration} of {total} iterations ({iteration / total:.1%})")
    speeds = re.findall(
        r"time \(data\): ([\d.]+) \(([\d.]+)\)", "".join(log.read_text() for log in folder.glob("*.log"))
    )
    if speeds:
        step, loading = map(float, speeds[-1])
        print(f"last logged: {1 / max(step, 1e-3):.3g} it/s, of which {loading / max(step, 1e-3):.0%} waiting for data")
    for dataset, name in [("", "l_pix"), *experiment.validated()]:
        curve = experiment.curve(dataset, name)
        if curve.iters:
            print(f"{dataset or 'training'}, {name}: {curve.values[-1]:.4f} after {curve.iters[-1]} iterations")
    size = (Path(args.work) / CHECKPOINT).stat().st_size / 1e6
    print(f"{args.work}/{CHECKPOINT}: {size:.1f} MB; weights and card: card --data DATA --work {args.work}")
    return 0


def choose(argv: list[str]) -> int:
    parser = _training_parser("choose")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="runs of each form (%(default)s)")
    parser.add_argument("--iterations", type=int, default=3000, metavar="N", help="of each run (%(default)s)")
    args = parser.parse_args(argv)
    plugins.load_plugins()
    work = Path(args.work)
    write_options(work / "choose.yml", {}, args.data, ["name=choose", *args.option])
    grid = ["decay_scale=tokens,side", "dc_norm=batch,none"]
    command = [sys.executable, "-m", "rwkvir", "ablate", "-opt", "choose.yml", "--grid", "--what", *grid]
    command += ["--seeds", str(args.seeds), "--iterations", str(args.iterations)]
    with subprocess.Popen(command, cwd=work) as process:
        try:
            return process.wait(args.minutes and 60 * args.minutes)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait()
    print(f"stopped after {args.minutes:g} minutes; to go on, run the same command again")
    return 0


def cost(argv: list[str]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    from rwkvir_arch import RWKVIR

    parser = _parser("cost")
    parser.add_argument("--option", nargs="+", default=[], metavar="KEY=VALUE", help="of the network")
    args = parser.parse_args(argv)
    options = {key: yaml.safe_load(value) for key, value in (word.split("=", 1) for word in args.option)}
    task, network = RUN.task, RWKVIR(upscale=RUN.scale, **options).train()
    traffic, kept = _Traffic(), []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(_bytes(tensor))
        return tensor

    with traffic, FlopCounterMode(display=False) as forward, torch.autocast("cpu", torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = network(torch.rand(1, 3, task.patch, task.patch))
    with traffic:
        y.float().abs().mean().backward()
    print(f"A step on {task.batch} patches of {task.patch}x{task.patch} in bfloat16:")
    flops, gigabyte = 3 * forward.get_total_flops() * task.batch, 1e9 / task.batch
    print(f"  arithmetic  {flops / 1e12:.2f} TFLOP, the backward pass being two forward passes")
    print(f"  kept        {sum(kept) / gigabyte:.1f} GB for the backward pass, to be written once and read once")
    print(f"  traffic     {traffic.bytes / gigabyte:.0f} GB, if each of {traffic.calls} operations goes through memory")
    return 0


class _Traffic(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes of all tensors that operations take and return; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            self.bytes += sum(map(_bytes, torch.utils._pytree.tree_leaves((args, kwargs, result))))
            self.calls += 1
        return result


def _bytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size() if isinstance(tensor, torch.Tensor) else 0


def card(argv: list[str]) -> int:
    parser = _parser("card", data=True, work=True)
    parser.add_argument("--testsets", required=True, metavar="FOLDER", help="that holds Set5, Set14 and BSD100")
    parser.add_argument("--name", default=f"{RUN.arch.lower()}_{RUN.task_name}_{RUN.label}", help="(%(default)s)")
    parser.add_argument("--note", default="", help="a sentence to begin the card with")
    parser.add_argument("-o", "--output", default="weights", metavar="FOLDER", help="(%(default)s)")
    args = parser.parse_args(argv)
    folder, data = _folder(args.work), Path(args.data)
    if not newest(folder):
        raise FileNotFoundError(f"there is no run in {args.work}; begin it with: piece --data DATA --work {args.work}")
    plugins.load_plugins()
    weights = folder / "models" / f"net_g_{newest(folder)}.pth"
    model_card.write(Path(args.output), args.name, args.note, RUN, weights, newest(folder), data, args.testsets)
    return 0


def _folder(work: str) -> Path:
    return Path(work, "experiments", RUN.name)


def _training_parser(name: str) -> argparse.ArgumentParser:
    parser = _parser(name, data=True, work=True)
    parser.add_argument("--minutes", type=float, metavar="N", help="end after so many; the same command goes on")
    parser.add_argument("--option", nargs="+", default=[], metavar="KEY:SUBKEY=VALUE", help="other than the standard's")
    return parser


def _parser(name: str, data: bool = False, work: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"train_light {name}")
    if data:
        parser.add_argument("--data", required=True, metavar="DATA", help="what `prepare` has written")
    if work:
        parser.add_argument("--work", required=True, metavar="WORK", help="the folder to train in")
    return parser


if __name__ == "__main__":
    sys.exit(main())
