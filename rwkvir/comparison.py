"""What several runs make of their validation pictures, each with its last weights, as `basicsr test` would."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rwkvir_data.complexity import complexity  # first, since it repairs `import basicsr`

# isort: split
import numpy as np
import torch
from basicsr.data import build_dataset
from basicsr.metrics import calculate_metric
from basicsr.models import build_model
from basicsr.utils import tensor2img
from torch.utils.data import DataLoader
from tqdm import tqdm

from rwkvir import compat, plugins
from rwkvir.command_line import sentence
from rwkvir.experiment import Experiment
from rwkvir.panels import Window, squared_error, window_of_most
from rwkvir_data.degrade import bicubic

PSNR = {"type": "calculate_psnr"}


class Scored(NamedTuple):
    """A validation picture: the complexity of GT, and PSNR in dB by label: the baseline's, then the runs'."""

    dataset: str
    name: str
    complexity: float
    psnr: dict[str, float]

    def extremes(self) -> tuple[str, str]:
        """The labels of the worst and the best run; of a single run and the baseline, where there is but one."""
        labels = list(self.psnr)
        ranked = sorted(labels[1:] if len(labels) > 2 else labels, key=self.psnr.__getitem__)
        return ranked[0], ranked[-1]

    def spread(self) -> float:
        """By how many dB the best run is better than the worst."""
        worst, best = self.extremes()
        return self.psnr[best] - self.psnr[worst] if self.psnr[worst] < math.inf else 0.0


class Example(NamedTuple):
    """A picture and its versions by label, (H, W, 3) uint8 RGB; lq is smaller by the scale."""

    scored: Scored
    lq: np.ndarray
    versions: dict[str, np.ndarray]
    gt: np.ndarray

    def window(self) -> Window:
        """The window in which the best run gains most on the worst."""
        worst, best = (squared_error(self.versions[label], self.gt) for label in self.scored.extremes())
        return window_of_most(worst - best, self.lq)

    def crops(self) -> dict[str, np.ndarray]:
        """The window of LQ, of each version and of GT, by their labels."""
        window, scale = self.window(), self.gt.shape[0] // self.lq.shape[0]
        whole = {"LQ": self.lq, **self.versions, "GT": self.gt}
        return {label: window.cut(picture, 1 if label == "LQ" else scale) for label, picture in whole.items()}


class Comparison(NamedTuple):
    """All pictures, and those of them on which the runs differ most in PSNR, the widest spread first.

    baseline: the label of what every network has to beat, 'bicubic' interpolation or, where nothing is enlarged, 'LQ'.
    """

    pictures: list[Scored]
    examples: list[Example]
    baseline: str

    def labels(self) -> list[str]:
        """The baseline and the runs that have pictures."""
        return list(dict.fromkeys(label for one in self.pictures for label in one.psnr))

    def points(self, label: str) -> np.ndarray:
        """(N, 3): complexity, PSNR and its gain on the baseline, of the pictures that differ from GT in both."""
        rows = [
            (one.complexity, one.psnr[label], one.psnr[label] - one.psnr[self.baseline])
            for one in self.pictures
            if label in one.psnr
        ]
        return np.array([row for row in rows if np.isfinite(row).all()]).reshape(-1, 3)


def psnr_options(options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """How a run measures PSNR: the metric's name in its log, and its options; BasicSR's defaults where it does not."""
    metrics = (options.get("val") or {}).get("metrics") or {}
    found = ((name, metric) for name, metric in metrics.items() if str(metric.get("type")).startswith(PSNR["type"]))
    return next(found, ("psnr", {**PSNR, "crop_border": options.get("scale", 1), "test_y_channel": True}))


def compare(runs: Sequence[Experiment], examples: int) -> Comparison:
    """Run the networks on the validation pictures that the option files name, and measure as the first of them does.

    Runs share a set where its name and the scale are equal. What cannot be had is noted in the run that lacks it.
    """
    plugins.load_plugins()
    compat.patch_training()
    models = {run: model for run in runs if (model := _model(run)) is not None}
    sets = _sets(list(models))
    names = [name for name, _ in sets]
    baseline = "bicubic" if any(scale > 1 for _, scale in sets) else "LQ"
    scored: list[Scored] = []
    shown: list[Example] = []
    for (name, scale), sharing in sets.items():
        dataset = _dataset(name, sharing)
        able = {run: models[run] for run in sharing if run in models}
        if dataset is None or not able:
            continue
        metric = psnr_options(next(iter(able.values())).opt)[1]
        title = name if names.count(name) == 1 else f"{name} x{scale}"
        batches = tqdm(DataLoader(dataset), desc=f"{len(able)} runs on {title}", unit="picture", disable=None)
        for batch in _readable(batches, title, sharing[0]):
            example = _example(batch, title, scale, baseline, able, metric)
            scored.append(example.scored)
            shown = sorted([*shown, example], key=lambda one: -one.scored.spread())[:examples]
    return Comparison(scored, shown, baseline)


def _example(
    batch: dict[str, Any], title: str, scale: int, baseline: str, models: dict[Experiment, Any], metric: dict[str, Any]
) -> Example:
    """A picture of the set `title`, restored by each of the models; one that fails is noted and leaves `models`."""
    lq, gt = (tensor2img(batch[kind]) for kind in ("lq", "gt"))  # (H, W, 3) BGR or (H, W), as BasicSR measures them
    versions = {baseline: bicubic(lq, scale) if scale > 1 else lq}
    psnr = {baseline: _psnr(versions[baseline], gt, metric)}
    for run, model in list(models.items()):
        try:
            model.feed_data(batch)
            model.test()
            restored = tensor2img(model.get_current_visuals()["result"])
            psnr[run.label] = _psnr(restored, gt, metric)
            versions[run.label] = restored
        except Exception as error:  # whatever a network's author lets it raise, and too little memory
            del models[run]
            run.notes.append(f"its network fails on {title} ({_reason(error)}); it is left out of the pictures")
    shown = {label: _rgb(picture) for label, picture in versions.items()}
    scored = Scored(title, Path(str(batch["gt_path"][0])).stem, complexity(_rgb(gt)).score, psnr)
    return Example(scored, _rgb(lq), shown, _rgb(gt))


def _psnr(picture: np.ndarray, gt: np.ndarray, metric: dict[str, Any]) -> float:
    if picture.shape != gt.shape:
        raise ValueError(f"its result is {picture.shape}, and GT {gt.shape}")
    return float(calculate_metric({"img": picture, "img2": gt}, metric))


def _readable(batches: Any, name: str, run: Experiment) -> Iterator[dict[str, Any]]:
    """`batches` up to one that cannot be read, which is noted."""
    iterator = iter(batches)
    for number in itertools.count():
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except (OSError, ValueError) as error:
            run.notes.append(f"validation set {name} is shown up to picture {number}: {_reason(error)}")
            return
        if "gt" not in batch:
            run.notes.append(f"validation set {name} has no GT, so that it cannot be measured; give it a dataroot_gt")
            return
        yield batch


def _rgb(picture: np.ndarray) -> np.ndarray:
    """BGR, or grey without a third axis, to RGB."""
    return np.ascontiguousarray(np.broadcast_to(np.atleast_3d(picture)[..., ::-1], (*picture.shape[:2], 3)))


def _sets(runs: Sequence[Experiment]) -> dict[tuple[str, int], list[Experiment]]:
    """Which runs validate on which set: (its name, the scale) -> runs."""
    sets: dict[tuple[str, int], list[Experiment]] = {}
    for run in runs:
        for name in _validation(run):
            sets.setdefault((name, run.options.get("scale", 1)), []).append(run)
    return sets


def _validation(run: Experiment) -> dict[str, dict[str, Any]]:
    """The options of a run's validation sets by name; their paths lead from here."""
    sets = {}
    for phase, dataset in (run.options.get("datasets") or {}).items():
        if phase.split("_")[0] == "val":
            roots = {key: _found(run, value) for key, value in dataset.items() if key.startswith(("dataroot", "meta_"))}
            sets[dataset["name"]] = {**dataset, **roots, "phase": "val", "scale": run.options.get("scale", 1)}
    return sets


def _found(run: Experiment, path: Any) -> Any:
    """A path of an option file: as seen from the folder that the run began in or, if it is not there, from here."""
    if not isinstance(path, str):
        return path
    begun = run.folder.resolve().parent.parent / Path(path).expanduser()
    return str(begun if begun.exists() else Path(path).expanduser())


def _dataset(name: str, runs: Sequence[Experiment]) -> Any:
    """The set as the first of `runs` whose data is there has it; None, which is noted, where nobody's is."""
    reason = ""
    for run in runs:
        try:
            return build_dataset(copy.deepcopy(_validation(run)[name]))
        except (OSError, ValueError, AssertionError, KeyError) as error:
            reason = reason or _reason(error)
    runs[0].notes.append(f"validation set {name} cannot be read ({reason}); its pictures are not shown")
    return None


def _model(run: Experiment) -> Any:
    """BasicSR's model of a run, with its last weights, for testing; None, which is noted, where that fails."""
    if not run.options:
        return None
    if run.weights is None:
        run.notes.append(f"{run.folder / 'models'} holds no net_g_*.pth; without weights there are no pictures of it")
        return None
    options = copy.deepcopy(run.options)
    uses_ema = (options.get("train") or {}).get("ema_decay", 0) > 0
    options["path"] = {
        "pretrain_network_g": str(run.weights),
        "param_key_g": "params_ema" if uses_ema else "params",
        "strict_load_g": True,
    }
    options.update(is_train=False, dist=False, rank=0, world_size=1, num_gpu=int(torch.cuda.is_available()))
    try:
        model = build_model(options)
    except Exception as error:  # whatever a plugin's constructor raises for options of another version
        run.notes.append(f"its network cannot be had ({_reason(error)}); it is left out of the pictures")
        return None
    if run.parameters is None:
        run.parameters = sum(parameter.numel() for parameter in model.net_g.parameters())
    return model


def _reason(error: Exception) -> str:
    """Why something is not on the page; --debug shows no traceback of what did not end the command."""
    return sentence(error).removesuffix("; run again with --debug for the traceback")
