"""`basicsr benchmark`: every model on every test set, by one protocol, in one table beside the published figures."""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from rwkvir.evaluation import SETS, Pair, Restore, Score, Task, parse_task  # first: it repairs `import basicsr`

# isort: split
import cv2
import torch
from basicsr.archs import build_network
from basicsr.models.base_model import BaseModel
from basicsr.utils.registry import ARCH_REGISTRY
from tqdm import tqdm

from rwkvir import benchmark_page, checks, compat, evaluation, plugins
from rwkvir.benchmark_page import ImageRow, Row
from rwkvir.command_line import sentence
from rwkvir.experiment import read_options
from rwkvir.published import PUBLISHED
from rwkvir_data.page import replace

CACHE_VERSION = 1  # to be raised when the same inputs come to give other scores


class BenchmarkError(ValueError):
    """What could not be measured, a sentence each in `messages`; all else was."""

    def __init__(self, messages: list[str]) -> None:
        self.messages = messages
        super().__init__("\n".join(messages))


class Source(NamedTuple):
    """Where a model comes from: its options, `where` these stand, and its weights."""

    name: str
    where: Path
    options: dict[str, Any]
    weights: Path


@dataclass
class Model:
    """Something to measure, a network or a baseline; `fingerprint` stands for all that its results depend on."""

    name: str
    fingerprint: str
    tasks: list[Task]
    network: torch.nn.Module | None = None
    window: int = 1
    channels: int = 3
    params: int | None = None
    macs: float | None = None

    def restorer(self, task: Task, tile: int | None) -> Restore:
        if self.network is None:
            return evaluation.baseline(task)[1]
        return evaluation.restorer(self.network, self.channels, tile, self.window)

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Within, the network is on `device` and has run once, so that the first picture takes no longer."""
        if self.network is not None:
            evaluation.probe(self.network.to(device), self.window)
        yield
        if self.network is not None:
            self.network.cpu()


@dataclass
class Plan:
    """What is to be done: models, and the pictures of each task's sets."""

    models: list[Model]
    pairs: dict[Task, dict[str, list[Pair]]]
    tile: int | None
    gray_as_color: bool
    device: torch.device
    images: Path | None  # where restored pictures go
    failures: dict[tuple[str, str, str], list[str]] = field(default_factory=dict)  # model, set, reason: pictures

    def jobs(self, model: Model) -> Iterator[tuple[Task, str, list[Pair]]]:
        for task in model.tasks:
            for name, pairs in self.pairs[task].items():
                yield task, name, pairs

    def problems(self) -> list[str]:
        """What could not be measured, in sentences."""
        return [
            f"{model}, {name}, {images[0]}{f' and {len(images) - 1} more' if images[1:] else ''}: {reason}"
            for (model, name, reason), images in self.failures.items()
        ]


def main(argv: list[str]) -> int:
    """Run `basicsr benchmark` with the arguments `argv`."""
    args = _parser().parse_args(argv)
    plugins.load_plugins()
    compat.patch_training()  # for its errors about weights
    tasks = [parse_task(name) for name in args.tasks]
    found = find_models(args.models, args.opt, args.weights)
    roots = _roots(args.data)
    models = [load(source, tasks) for source in found]
    if not models and not tasks:
        raise ValueError("there is nothing to measure; give experiments, weights, or --tasks x4 for bicubic alone")
    ordered = list(dict.fromkeys([*tasks, *(task for model in models for task in model.tasks)]))
    baselines: dict[str, Model] = {}
    for task in ordered:
        name = evaluation.baseline(task)[0]
        baselines.setdefault(name, Model(name, name, [])).tasks.append(task)
    out = Path(args.output)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; give a folder with -o")
    plan = Plan(
        [*baselines.values(), *models],
        {task: find_sets(task, roots, args.sets, args.make_lq) for task in ordered},
        args.tile,
        args.gray_as_color,
        args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        out / "images" if args.save_images else None,
    )
    out.mkdir(parents=True, exist_ok=True)
    with open_cache(out / "cache.sqlite") as cache:
        images = list(run(plan, cache))
    problems = plan.problems()
    print(benchmark_page.write(out, summarize(images, plan), images, list(plan.pairs), facts(plan), problems))
    print(f"{out}: benchmark.html, benchmark.md, benchmark.csv, images.csv")
    if problems:
        raise BenchmarkError(problems)
    return 0


def find_models(words: Sequence[str], option_file: str | None, label: str) -> list[Source]:
    """What `words` name: folders of experiments, of which the weights net_g_<label>.pth count, or files of weights.

    Without words, the option file's own path:pretrain_network_g.

    Raises:
        OSError: a file or folder is missing.
        ValueError: an experiment without readable options, weights without any, two models of one name.
    """
    found = []
    given = checks.load_options(option_file) if option_file else {}
    for path in map(Path, words):
        if path.is_dir():
            found.append(Source(path.resolve().name, path, _options(path), _weights(path, label)))
        elif not path.is_file():
            raise FileNotFoundError(f"there is no {path}; give the folder of an experiment or a file of weights")
        elif option_file:
            found.append(Source(path.stem, Path(option_file), given, path))
        elif path.resolve().parent.name == "models":
            run = path.resolve().parent.parent
            found.append(Source(f"{run.name} {path.stem}", run, _options(run), path))
        else:
            raise ValueError(f"{path} holds weights, but nothing says of what; add its option file: -opt FILE.yml")
    if option_file and not words:
        weights = (given.get("path") or {}).get("pretrain_network_g")
        if not weights:
            raise ValueError(f"{option_file} has no path:pretrain_network_g; set it, or give the weights after -opt")
        found.append(Source(Path(option_file).stem, Path(option_file), given, Path(weights).expanduser()))
    names = [*evaluation.BASELINES, *(source.name for source in found)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two models are called {name}; rename a folder or file, the table tells them by that")
    return found


def load(source: Source, wanted: Sequence[Task] = ()) -> Model:
    """Build the network of an option file, load its weights (those of EMA, if they are there), and try it.

    wanted: the tasks to measure, of which the network's scale picks; without them, what the option file trains for.

    Raises:
        FileNotFoundError: no option file, or no weights.
        ValueError: unknown network or options of it; weights that are damaged or of another network; another scale than
            the option file says; no task.
    """
    options = source.options
    network = _build(source)
    if not source.weights.is_file():
        raise FileNotFoundError(f"there are no weights {source.weights}; correct the path in {source.where}")
    BaseModel({"num_gpu": 0, "is_train": False}).load_network(network, str(source.weights), True, _key(source.weights))
    network.eval().requires_grad_(False)
    window = (options.get("val") or {}).get("multiple_of") or options["network_g"].get("window_size")
    window = window if isinstance(window, int) else 1
    try:
        channels, scale = evaluation.probe(network, window)
    except ValueError as error:
        raise ValueError(f"{source.where}: {error}; correct network_g") from error
    if options.get("scale", scale) != scale:
        raise ValueError(
            f"{source.where}: its scale is {options['scale']}, but its network enlarges by {scale}; correct one"
        )
    fitting = [task for task in wanted if task.scale == scale and (task.kind == "sr" or task.gray == (channels == 1))]
    tasks = fitting or ([] if wanted else _trained_tasks(source, scale, channels == 1))
    if not tasks:
        raise ValueError(
            f"{source.where}: its network, x{scale} for {channels} channels, does none of the --tasks "
            f"{' '.join(task.name for task in wanted)}; leave it out or name its task"
        )
    built = json.dumps([options["network_g"], window], sort_keys=True)
    return Model(
        source.name,
        hashlib.sha256(source.weights.read_bytes() + built.encode()).hexdigest(),
        tasks,
        network,
        window,
        channels,
        sum(parameter.numel() for parameter in network.parameters()),
        evaluation.multiply_adds(network, channels, scale, window),
    )


def find_sets(task: Task, roots: Sequence[str], names: Sequence[str], make_lq: bool) -> dict[str, list[Pair]]:
    """The pictures of the sets `names`, or of those of the task's own that are below `roots`.

    Raises:
        FileNotFoundError: a set that was asked for is not there, or none is.
        ValueError: a set's files do not fit together.
    """
    below = f"below {', '.join(roots)}"
    known = {name.lower(): name for name in itertools.chain(*SETS.values())}
    names = [known.get(name.lower(), name) for name in names]
    folders = {name: evaluation.find_set(name, roots) for name in names or SETS[task.kind]}
    missing = [name for name, folder in folders.items() if folder is None]
    if missing and (names or len(missing) == len(folders)):
        raise FileNotFoundError(
            f"{task.name}: there is no folder {' or '.join(missing)} {below}; correct --data or --sets"
        )
    if missing:
        print(f"{task.name}: not {below}, and so left out: {', '.join(missing)}")
    return {name: evaluation.find_pairs(folder, task, make_lq) for name, folder in folders.items() if folder}


def run(plan: Plan, cache: sqlite3.Connection) -> Iterator[ImageRow]:
    """Measure all that the cache does not hold. What fails joins `plan.failures`; the rest goes on.

    Raises:
        KeyboardInterrupt: with a sentence about how to go on.
        OSError: a picture cannot be saved.
    """
    total = sum(len(pairs) for model in plan.models for *_, pairs in plan.jobs(model))
    with tqdm(total=total, unit="picture", disable=None, smoothing=0.05) as bar:
        done = 0
        try:
            for model in plan.models:
                with model.on(plan.device):
                    for task, name, pairs in plan.jobs(model):
                        bar.set_postfix_str(f"{model.name}, {name} {task.name}")
                        restore = model.restorer(task, plan.tile)
                        for pair in pairs:
                            try:
                                score = _score(plan, cache, model, task, name, pair, restore)
                                yield ImageRow(model.name, task.name, task.scale, name, *score)
                            except (OSError, sqlite3.Error):
                                raise
                            except Exception as error:  # of a damaged picture, or of the network's author
                                plan.failures.setdefault((model.name, name, _explain(error)), []).append(pair.name)
                            done += 1
                            bar.update()
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(
                f"interrupted after {done} of {total} pictures, which are kept; to go on, run the same command again"
            ) from stop


def summarize(images: Sequence[ImageRow], plan: Plan) -> list[Row]:
    """Means over the sets, without sets that lack pictures; then what is published for the same tasks and sets."""
    rows = []
    for model in plan.models:
        for task, name, pairs in plan.jobs(model):
            some = [row for row in images if (row.model, row.task, row.set) == (model.name, task.name, name)]
            if len(some) == len(pairs):
                psnr, ssim, seconds = (fmean(getattr(row, key) for row in some) for key in ("psnr", "ssim", "seconds"))
                peak = max((row.peak_mib for row in some if row.peak_mib is not None), default=None)
                costs = model.params, model.macs, seconds, peak
                rows.append(Row(model.name, task.name, task.scale, name, len(some), psnr, ssim, *costs, "measured"))
    for entry in PUBLISHED:
        for task in (task for task in plan.pairs if task.name == entry.task):
            rows += [
                Row(entry.model, task.name, task.scale, name, None, psnr, params=entry.params, macs=entry.macs)
                for name, psnr in entry.psnr.items()
                if name in plan.pairs[task]
            ]
    return rows


def facts(plan: Plan) -> list[str]:
    """How everything was measured, in sentences."""
    device = f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if plan.device.type == "cuda":
        device = torch.cuda.get_device_name(plan.device)
    tiles = f"overlapping tiles of {plan.tile} pixels of LQ" if plan.tile else "whole pictures"
    made = {
        task.degradation: ", ".join(name for name, pairs in sets.items() if pairs[0].lq is None)
        for task, sets in plan.pairs.items()
        if task.kind == "sr"
    }
    lq = "; ".join(f"×{task[1:]} of {names}" for task, names in made.items() if names)
    facts = [
        f"{device}, torch {torch.__version__}, float32, {tiles}.",
        "Seconds are the mean over pictures, each timed when it was first measured; memory is the most that a picture "
        "took beyond the weights.",
        "MACs: multiply-adds of convolutions, linear layers and matrix products for an output of 1280×720, as counted "
        "by torch's FlopCounterMode; scans and element-wise work are left out.",
    ]
    if made:
        facts.append(
            f"LQ made from GT by MATLAB's bicubic: {lq}." if lq else "LQ of super-resolution is the sets' own."
        )
        facts.append(
            "One-channel pictures were taken as colour, as BasicSR's own test takes them."
            if plan.gray_as_color
            else "Super-resolution of a picture stored with one channel, as one of Set14's is, is measured on its own "
            "values, as in the published figures of bicubic; BasicSR's own test takes it as colour (--gray-as-color), "
            "where its PSNR is 1.32 dB higher."
        )
    return facts


@contextmanager
def open_cache(path: Path) -> Iterator[sqlite3.Connection]:
    """Scores by key, each stored at once and whole.

    Raises:
        OSError: the file is damaged, or the disk is full.
    """
    try:
        with closing(sqlite3.connect(path, isolation_level=None, timeout=60)) as cache:
            cache.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score TEXT)")
            yield cache
    except sqlite3.Error as error:
        raise OSError(f"{path}: {error}; make room there, or remove the file if it is damaged") from error


def _score(
    plan: Plan, cache: sqlite3.Connection, model: Model, task: Task, name: str, pair: Pair, restore: Restore
) -> Score:
    digests = [_digest(pair.gt), _digest(pair.lq) if pair.lq else pair.name]
    settings = [plan.tile, plan.gray_as_color, str(plan.device), CACHE_VERSION]
    key = json.dumps([model.fingerprint, task.name, *digests, *settings])
    picture = plan.images and plan.images / model.name / task.name / name / f"{pair.name}.png"
    known = cache.execute("SELECT score FROM scores WHERE key = ?", (key,)).fetchone()
    if known and (picture is None or picture.is_file()):
        return Score(pair.name, *json.loads(known[0]))
    score, restored = evaluation.score(restore, pair, task, plan.gray_as_color)
    if picture:
        png = cv2.imencode(".png", restored[..., ::-1] if restored.ndim == 3 else restored)[1]
        picture.parent.mkdir(parents=True, exist_ok=True)
        replace(picture, png.tobytes())
    cache.execute("INSERT OR REPLACE INTO scores VALUES (?, ?)", (key, json.dumps(score[1:])))
    return score


@functools.cache
def _digest(place: tuple[str, str]) -> str:
    return hashlib.sha256(evaluation.read_file(place)).hexdigest()


def _explain(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error):
        return "too little memory; run again with --tile 256 or less"
    return sentence(error)


def _options(run: Path) -> dict[str, Any]:
    """The options that an experiment was trained with."""
    notes: list[str] = []
    options = read_options(run, notes)
    if notes:
        raise ValueError(f"{run} is no whole experiment: {notes[0]}")
    return options


def _weights(run: Path, label: str) -> Path:
    weights = run / "models" / f"net_g_{label}.pth"
    if not weights.is_file():
        others = sorted((run / "models").glob("net_g_*.pth"), key=lambda path: path.stat().st_mtime)
        newest = others[-1].stem.removeprefix("net_g_") if others else ""
        advice = f"or measure what it has last saved with --weights {newest}" if newest else "it has saved nothing yet"
        raise FileNotFoundError(f"{run} has no models/{weights.name}; finish its training with --auto_resume, {advice}")
    return weights


def _build(source: Source) -> torch.nn.Module:
    network = source.options.get("network_g")
    if not isinstance(network, dict) or "type" not in network:
        raise ValueError(f"{source.where} has no network_g:type; give the option file of a run of BasicSR")
    if network["type"] not in ARCH_REGISTRY:
        hint = checks.nearest(network["type"], ARCH_REGISTRY.keys())
        raise ValueError(f"{source.where}: no plugin has the network_g:type '{network['type']}'; {hint}")
    try:
        return build_network(network)
    except Exception as error:  # of the network's author
        raise ValueError(f"{source.where}: network_g: {sentence(error)}") from error


def _key(weights: Path) -> str | None:
    """Under which key BasicSR's file holds what is to be measured; None where it holds nothing but parameters."""
    try:
        content = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception:  # load_network says what is wrong with it
        return "params"
    return next((key for key in ("params_ema", "params") if key in content), None)


def _trained_tasks(source: Source, scale: int, gray: bool) -> list[Task]:
    """What the option file's datasets say that the network is for."""
    if scale > 1:
        return [Task(f"x{scale}")]
    named = [dataset.get("degradation") for dataset in (source.options.get("datasets") or {}).values()]
    names = [name for item in named if item for name in (item if isinstance(item, list) else [item])]
    if not names:
        raise ValueError(
            f"{source.where}: none of its datasets has a degradation, which would tell what the network is for; "
            "say it with --tasks noise25, say"
        )
    return [Task(name, gray) for name in dict.fromkeys(names)]


def _roots(roots: Iterable[str]) -> list[str]:
    for root in roots:
        if not os.path.isdir(root):
            raise FileNotFoundError(f"there is no folder {root}; give one that holds test sets with --data")
    return list(roots)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="basicsr benchmark",
        description="Measure models on the test sets of their tasks, with BasicSR's metrics: one table as CSV, Markdown"
        " and HTML, beside the published figures. What has been measured is not measured again.",
        epilog="Sets: " + "; ".join(f"{kind}: {', '.join(names)}" for kind, names in SETS.items()) + ". Each a folder "
        "NAME with HR and LR_bicubic/X4, GTmod12 and LRbicx4, or pictures; LQ that is not there is made.",
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="folders of experiments, or files of weights")
    parser.add_argument("-opt", "--opt", metavar="FILE.yml", help="the option file of weights outside of an experiment")
    parser.add_argument(
        "--data", nargs="+", default=["datasets"], metavar="FOLDER", help="where test sets lie (datasets)"
    )
    parser.add_argument(
        "--sets", nargs="+", default=[], metavar="NAME", help="these sets, in place of those of the task"
    )
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="TASK", help="x4, noise25, jpeg10; else what models were trained for"
    )
    parser.add_argument("--weights", default="latest", metavar="LABEL", help="an experiment's: latest, best, or 50000")
    parser.add_argument("--make-lq", action="store_true", help="make LQ from HR also where a set holds it")
    parser.add_argument("--gray-as-color", action="store_true", help="take one-channel pictures as BasicSR's test does")
    parser.add_argument("--tile", type=_side, metavar="PIXELS", help="restore by tiles of LQ, to save memory")
    parser.add_argument(
        "--device", type=_device, metavar="NAME", help="cpu or cuda; by default cuda where there is one"
    )
    parser.add_argument("--save-images", action="store_true", help="keep the restored pictures, in OUTPUT/images")
    parser.add_argument("-o", "--output", default="results/benchmark", metavar="FOLDER", help="(results/benchmark)")
    return parser


def _side(text: str) -> int:
    if not text.isdigit() or int(text) < 16:
        raise argparse.ArgumentTypeError(f"'{text}' is no side of a tile; give 16 pixels or more")
    return int(text)


def _device(text: str) -> torch.device:
    kind, _, index = text.partition(":")
    count = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(kind, 0)
    if not (index or "0").isdigit() or int(index or 0) >= count:
        raise argparse.ArgumentTypeError(
            f"there is no device '{text}'; give cpu, cuda or cuda:1, as far as torch sees it"
        )
    return torch.device(text)
