"""SRModel with what it lacks, each by one line in an option file: `model_type: RestorationModel`."""

from __future__ import annotations

import inspect
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

from rwkvir import compat
from rwkvir.checks import check_arguments, nearest

compat.apply()  # before BasicSR is imported

import torch  # noqa: E402
from basicsr.models.sr_model import SRModel  # noqa: E402
from basicsr.utils import get_root_logger  # noqa: E402
from basicsr.utils.registry import METRIC_REGISTRY, MODEL_REGISTRY  # noqa: E402
from torch.nn import functional as F  # noqa: E402

OPTIMIZERS = ("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "SGD", "ASGD", "RMSprop", "Rprop")
AMP = ("bfloat16", "float16")
SPACES = {"y": (1, 3), "rgb": (3,), "gray": (1,)}  # and how many channels the pictures may have
OVERLAP = 48  # LQ pixels that neighbouring tiles share, unless val:tile_overlap says otherwise


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


# What the model adds to SRModel's options: the section's key, what its value must be, and in words.
OWN: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "train": {
        "amp": (AMP.__contains__, " or ".join(AMP)),
        "accumulate": (_count, "a whole number above 0"),
        "clip_grad": (_positive, "a number above 0"),
        "compile": (lambda value: isinstance(value, bool | str), "true or the name of a backend of torch.compile"),
        "skip_nonfinite": (_count, "a whole number above 0"),
    },
    "val": {
        "tile": (_count, "a whole number of LQ pixels"),
        "tile_overlap": (_count, "a whole number of LQ pixels"),
        "multiple_of": (_count, "a whole number of LQ pixels"),
        "all_ranks": (lambda value: isinstance(value, bool), "true or false"),
        "space": (tuple(SPACES).__contains__, ", ".join(SPACES)),
    },
}
STOCK = {
    "train": "total_iter warmup_iter ema_decay optim_g scheduler pixel_opt perceptual_opt".split(),
    "val": "val_freq save_img suffix pbar metrics".split(),
}


@MODEL_REGISTRY.register()
class RestorationModel(SRModel):
    """BasicSR's SRModel, and with each option that is given:

    train:
        amp: bfloat16 | float16, in which the network computes in training (autocast); the loss stays float32, and
            gradients of float16 are scaled. Validation is in float32.
        accumulate: in how many parts a batch goes through the network, one after the other. Their gradients add up to
            the batch's, so that iteration, learning rate and batch_size_per_gpu mean what they do without; memory is a
            part's. Batch normalisation sees the parts.
        clip_grad: the largest norm of all gradients together; larger ones are scaled down to it.
        compile: true, or a backend's name: torch.compile for training. Validation runs uncompiled, since every size of
            picture would be compiled anew. Checkpoints have the same keys.
        skip_nonfinite: leave out the step of an iteration whose loss or gradients are not finite, and count it; after
            this number of them in a row, save the batch beside the experiment and stop.
        optim_g: type: one of OPTIMIZERS.
        ema_decay: as SRModel's, but buffers (running statistics of batch normalisation) are copied too.
    val:
        tile, tile_overlap: compute pictures in tiles of this many LQ pixels a side: see `in_tiles`. Overlap 48.
        multiple_of: reflect LQ at its bottom and right to a multiple of this many pixels, and crop the result, for
            networks of windows; as BasicSR's SwinIRModel.
        all_ranks: share the pictures out among the processes. The metrics are those of all pictures.
        space: y (luma of RGB pictures, or of one channel as it is) | rgb | gray (one channel), in which every metric is
            taken; pictures with other channels are an error.

    A training state holds what these need, so that a resumed run is the same; SRModel's states resume here too.

    Raises:
        ValueError: an option is unknown or impossible, pictures do not fit `space`, or too many losses are not finite.
    """

    metric_results: dict[str, float]  # of the latest validation
    sharing = False  # while a process validates its share of the pictures, and what it finds is not yet the metric

    def __init__(self, opt: dict):
        check_options(opt)
        super().__init__(opt)

    def model_to_device(self, net: torch.nn.Module) -> torch.nn.Module:
        compiled = (self.opt.get("train") or {}).get("compile")
        if compiled:
            net.compile(backend="inductor" if compiled is True else compiled)  # in place: keys stay as they are
        return super().model_to_device(net)

    def init_training_settings(self) -> None:
        train = self.opt["train"]
        self.amp = getattr(torch, train["amp"]) if train.get("amp") else None
        self.parts = train.get("accumulate") or 1
        self.most_skipped = train.get("skip_nonfinite")
        self.max_norm = train.get("clip_grad") or math.inf
        self.steps = _Steps(torch.amp.GradScaler(self.device.type, enabled=self.amp == torch.float16))
        super().init_training_settings()
        self.schedulers.append(self.steps)

    def get_optimizer(self, optim_type: str, params: list, lr: float, **options: Any) -> torch.optim.Optimizer:
        if optim_type not in OPTIMIZERS:
            raise ValueError(
                f"train:optim_g:type is '{optim_type}', not an optimiser; {nearest(optim_type, OPTIMIZERS)}"
            )
        optimizer = getattr(torch.optim, optim_type)
        for finding in check_arguments("train:optim_g", optimizer, {*options, "lr"}, given=["params"]):
            raise ValueError(str(finding))
        return optimizer(params, lr, **options)

    def feed_data(self, data: dict) -> None:
        super().feed_data(data)
        self.batch = data

    def optimize_parameters(self, current_iter: int) -> None:
        self.optimizer_g.zero_grad()
        network = self.get_bare_model(self.net_g)
        buffers = [buffer.clone() for buffer in network.buffers()] if self.most_skipped else []
        losses = self._backward()
        self.steps.scaler.unscale_(self.optimizer_g)
        norm = torch.zeros(())
        if self.most_skipped or self.max_norm < math.inf:
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), self.max_norm)
        if self.most_skipped and not self._finite(losses, norm):
            for buffer, before in zip(network.buffers(), buffers, strict=True):
                buffer.copy_(before)
            self._skip(current_iter)
        else:
            self.steps.skipped_in_a_row = 0
            self.steps.scaler.step(self.optimizer_g)
            if self.ema_decay > 0:
                self.model_ema(self.ema_decay)
        self.steps.scaler.update()
        self.log_dict = self.reduce_loss_dict(losses)
        if self.most_skipped:
            self.log_dict["skipped"] = self.steps.skipped

    def model_ema(self, decay: float = 0.999) -> None:
        super().model_ema(decay)
        for ema, buffer in zip(self.net_g_ema.buffers(), self.get_bare_model(self.net_g).buffers(), strict=True):
            ema.copy_(buffer)

    def resume_training(self, resume_state: dict) -> None:
        if len(resume_state["schedulers"]) == len(self.schedulers) - 1:  # of an SRModel
            resume_state = {**resume_state, "schedulers": [*resume_state["schedulers"], self.steps.state_dict()]}
        super().resume_training(resume_state)

    def test(self) -> None:
        # Not what DistributedDataParallel wraps around it, which would wait for the other processes.
        network = getattr(self, "net_g_ema", None) or self.get_bare_model(self.net_g)
        network.eval()
        compiled = (self.opt.get("train") or {}).get("compile")
        with torch.no_grad(), torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            self.output = self._restore(network)
        self.net_g.train()

    def get_current_visuals(self) -> OrderedDict:
        visuals, space = super().get_current_visuals(), self.opt["val"].get("space")
        for kind in ("result", "gt"):
            channels = visuals[kind].shape[1] if kind in visuals else 0
            if space and channels and channels not in SPACES[space]:
                raise ValueError(
                    f"val:space is {space}, but the {kind} of {self.batch['lq_path'][0]} has {channels} channels; "
                    "correct val:space, the network's channels or the dataset's color"
                )
        return visuals

    def dist_validation(self, dataloader: Any, current_iter: int, tb_logger: Any, save_img: bool) -> None:
        if not self.opt["val"].get("all_ranks"):
            super().dist_validation(dataloader, current_iter, tb_logger, save_img)
            return
        dataset, rank = dataloader.dataset, self.opt["rank"]
        share = torch.utils.data.Subset(dataset, range(rank, len(dataset), self.opt["world_size"]))
        share.opt = dataset.opt  # type: ignore[attr-defined]
        names = list(self.opt["val"].get("metrics") or ())
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        if len(share):
            self.sharing = True
            self.nondist_validation(torch.utils.data.DataLoader(share), current_iter, tb_logger, save_img)
            self.sharing = False
            sums += len(share) * sums.new_tensor([self.metric_results[name] for name in names])
        torch.distributed.all_reduce(sums)
        if rank == 0 and names:
            self.metric_results = dict(zip(names, (sums / len(dataset)).tolist(), strict=True))
            self._initialize_best_metric_results(dataset.opt["name"])
            for name, value in self.metric_results.items():
                self._update_best_metric_result(dataset.opt["name"], name, value, current_iter)
            self._log_validation_metric_values(current_iter, dataset.opt["name"], tb_logger)

    def _update_best_metric_result(self, dataset_name: str, metric: str, val: float, current_iter: int) -> None:
        if not self.sharing:
            super()._update_best_metric_result(dataset_name, metric, val, current_iter)

    def _log_validation_metric_values(self, current_iter: int, dataset_name: str, tb_logger: Any) -> None:
        if not self.sharing:
            super()._log_validation_metric_values(current_iter, dataset_name, tb_logger)

    def _backward(self) -> dict[str, torch.Tensor]:
        """Gradients of the whole batch, and its losses by name."""
        mean: dict[str, torch.Tensor] = {}
        for part, (lq, gt) in enumerate(zip(self.lq.chunk(self.parts), self.gt.chunk(self.parts), strict=True), 1):
            apart = self.opt["dist"] and part < self.parts
            with self.net_g.no_sync() if apart else nullcontext():
                with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
                    self.output = self.net_g(lq)
                losses = self._losses(self.output.float(), gt)
                total = torch.stack(list(losses.values())).sum() / self.parts
                self.steps.scaler.scale(total).backward()
            for name, loss in losses.items():
                mean[name] = mean.get(name, 0) + loss.detach() / self.parts
        return mean

    def _losses(self, output: torch.Tensor, gt: torch.Tensor) -> dict[str, torch.Tensor]:
        losses = {"l_pix": self.cri_pix(output, gt)} if self.cri_pix else {}
        if self.cri_perceptual:
            losses.update(zip(("l_percep", "l_style"), self.cri_perceptual(output, gt), strict=True))
        return {name: loss for name, loss in losses.items() if loss is not None}

    def _finite(self, losses: dict[str, torch.Tensor], norm: torch.Tensor) -> bool:
        """Whether losses and gradients are finite on all processes. An overflow of float16 is the scaler's affair."""
        values = [*losses.values(), *([] if self.steps.scaler.is_enabled() else [norm])]
        finite = torch.stack([value.isfinite().all() for value in values]).all().int()
        if self.opt["dist"]:
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        return bool(finite)

    def _skip(self, current_iter: int) -> None:
        self.steps.skipped += 1
        self.steps.skipped_in_a_row += 1
        pictures = ", ".join(map(str, self.batch.get("gt_path", ["of unknown name"])))
        get_root_logger().warning(f"Iteration {current_iter} is skipped: its loss or gradients are not finite.")
        if self.steps.skipped_in_a_row >= self.most_skipped:
            name = f"nonfinite_{current_iter}_rank{self.opt['rank']}.pth"
            file = os.path.join(self.opt["path"]["experiments_root"], name)
            torch.save({"iter": current_iter, **self.batch}, file)
            raise ValueError(
                f"the loss or its gradients were not finite in {self.most_skipped} iterations in a row, the last being "
                f"{current_iter}; its batch is in {file} (pictures {pictures}): repair what is wrong there and "
                "continue with --auto_resume, or begin again with a lower train:optim_g:lr"
            )

    def _restore(self, network: torch.nn.Module) -> torch.Tensor:
        val, (height, width) = self.opt["val"], self.lq.shape[-2:]
        multiple, tile = val.get("multiple_of") or 1, val.get("tile")
        lq = F.pad(self.lq, (0, -width % multiple, 0, -height % multiple), "reflect")
        result = in_tiles(network, lq, tile, val.get("tile_overlap") or OVERLAP) if tile else network(lq)
        scale = result.shape[-1] // lq.shape[-1]
        return result[..., : height * scale, : width * scale]


class _Steps:
    """What RestorationModel carries from step to step. It stands among the schedulers, whose state BasicSR keeps."""

    def __init__(self, scaler: torch.amp.GradScaler):
        self.scaler = scaler
        self.skipped = self.skipped_in_a_row = 0

    def step(self) -> None:
        """Called for every scheduler before each iteration."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["scaler"]:  # empty without amp: float16
            self.scaler.load_state_dict(state["scaler"])
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]


def in_tiles(
    network: Callable[[torch.Tensor], torch.Tensor], lq: torch.Tensor, tile: int, overlap: int
) -> torch.Tensor:
    """`network(lq)` in overlapping tiles, put together on the CPU: memory goes by `tile`, not by the picture.

    Neighbouring tiles share at least `overlap` pixels. Of these, the third at a tile's edge is dropped, and across the
    middle third one tile fades into the next. So the result is that of the whole picture, up to rounding, for a network
    whose output depends on pixels at most overlap // 3 away, and has no visible seams for another; but what a network
    gathers from all pixels (a mean, a scan, global attention), it then gathers from the tile.

    Args:
        lq: (B, C, H, W).
        tile: side of a tile in LQ pixels; a picture that is smaller is its own tile.
        overlap: in LQ pixels, at most half of `tile`.

    Returns:
        (B, C', H * scale, W * scale), float32, on the CPU; the scale is that of the network's output.
    """
    height, width = lq.shape[-2:]
    total = weights = torch.zeros(())
    for top in _starts(height, tile, overlap):
        for left in _starts(width, tile, overlap):
            result = network(lq[..., top : top + tile, left : left + tile]).float().cpu()
            scale = result.shape[-1] // min(tile, width)
            if not total.dim():
                total = result.new_zeros(*result.shape[:2], height * scale, width * scale)
                weights = result.new_zeros(height * scale, width * scale)
            rows = _fade(top, min(tile, height), height, overlap, scale)
            weight = rows[:, None] * _fade(left, min(tile, width), width, overlap, scale)
            area = (..., slice(top * scale, (top + tile) * scale), slice(left * scale, (left + tile) * scale))
            total[area] += result * weight
            weights[area] += weight
    return total / weights


def _starts(length: int, tile: int, overlap: int) -> Iterator[int]:
    """Where tiles begin that cover 0..length in even steps, neighbours sharing `overlap` or more."""
    count = max(math.ceil((length - overlap) / (tile - overlap)), 1)
    return (round(number * (length - tile) / max(count - 1, 1)) for number in range(count))


def _fade(start: int, length: int, whole: int, overlap: int, scale: int) -> torch.Tensor:
    """A tile's weights along one axis, (length * scale,): 1 inside, and falling to 0 where a neighbour takes over."""
    position = (torch.arange(length * scale) + 0.5) / scale  # in LQ pixels
    weights = torch.ones(length * scale)
    for neighbour, distance in ((start > 0, position), (start + length < whole, length - position)):
        if neighbour:
            weights *= (distance / (overlap / 3) - 1).clamp(0, 1)
    return weights


def check_options(opt: dict) -> None:
    """Raise ValueError for the first of RestorationModel's options that is unknown or impossible, and say what to do.

    Also sets the `test_y_channel` of the metrics as `val:space` has it.
    """
    for section, own in OWN.items():
        for key, value in (opt.get(section) or {}).items():
            if key not in own and key not in STOCK[section]:
                known = [*own, *STOCK[section]]
                raise ValueError(f"{section}:{key} is not an option of RestorationModel; {nearest(key, known)}")
            if key in own and value is not None and not own[key][0](value):
                raise ValueError(f"{section}:{key} is {value!r}; write {own[key][1]}")
    if opt.get("train"):
        _check_accumulation(opt)
    if opt.get("val"):
        _check_tiles(opt["val"])
        _set_space(opt["val"])


def _check_accumulation(opt: dict) -> None:
    parts, batch = opt["train"].get("accumulate") or 1, opt["datasets"]["train"]["batch_size_per_gpu"]
    if batch % parts:
        raise ValueError(
            f"train:accumulate is {parts}, which does not divide batch_size_per_gpu {batch}; a batch goes through the "
            "network in that many equal parts: change one of them"
        )
    reduction = (opt["train"].get("pixel_opt") or {}).get("reduction", "mean")
    if parts > 1 and reduction != "mean":
        raise ValueError(f"train:accumulate needs a loss with reduction: mean, not {reduction}; change one of them")


def _check_tiles(val: dict) -> None:
    tile, overlap, multiple = val.get("tile"), val.get("tile_overlap"), val.get("multiple_of") or 1
    if overlap and not tile:
        raise ValueError("val:tile_overlap means nothing without val:tile; add it")
    if tile and tile < 2 * (overlap or OVERLAP):
        raise ValueError(
            f"val:tile is {tile}, less than twice the overlap of {overlap or OVERLAP}; raise it, or set a smaller "
            "val:tile_overlap"
        )
    if tile and tile % multiple:
        raise ValueError(
            f"val:tile is {tile}, not a multiple of val:multiple_of, {multiple}; make it {tile // multiple * multiple}"
        )


def _set_space(val: dict) -> None:
    for name, metric in (val.get("metrics") or {}).items() if val.get("space") else ():
        if "test_y_channel" in inspect.signature(METRIC_REGISTRY.get(metric["type"])).parameters:
            on_y = val["space"] == "y"
            if metric.setdefault("test_y_channel", on_y) != on_y:
                raise ValueError(
                    f"val:space is {val['space']}, but val:metrics:{name}:test_y_channel is "
                    f"{str(not on_y).lower()}; remove one of them"
                )
