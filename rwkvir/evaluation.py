"""How good a network is on a set of pictures: where test sets lie, how they are degraded, measured and averaged.

    task = parse_task("x4")
    scores = evaluate(network, find_pairs(find_set("Set5", ["datasets"]), task), task)
    psnr = sum(score.psnr for score in scores) / len(scores)

Pictures are (H, W, 3) RGB or (H, W) grey, uint8; a network sees (1, C, H, W) in [0, 1].
"""

from __future__ import annotations

import copy
import ctypes
import functools
import io
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rwkvir_data import sources  # first, since it repairs `import basicsr`

# isort: split
import numpy as np
import torch
from basicsr.metrics import calculate_psnr, calculate_ssim
from basicsr.metrics.metric_util import to_y_channel
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from rwkvir.restoration_model import OVERLAP, in_tiles
from rwkvir_data.degrade import TASKS as DEGRADATIONS
from rwkvir_data.degrade import bicubic, degrade, scale_of

# The sets that a kind of task is tested on, in the order of tables.
SETS = {
    "sr": ("Set5", "Set14", "BSD100", "Urban100", "Manga109", "ReSyn-test"),
    "denoise": ("CBSD68", "Kodak24", "McMaster", "Urban100"),
    "jpeg": ("Classic5", "LIVE1"),
}
# Other names of their folders, without case and punctuation.
ALIASES = {
    "ReSyn-test": ("resyn",),
    "BSD100": ("bsds100", "b100"),
    "LIVE1": ("live1gray", "live1grey"),
    "Classic5": ("classic5gray",),
}
# Where pictures lie in a set's folder: as of SelfExSR, BasicSR and `resyn build`; LQ is not looked for beside others.
LAYOUTS = (("HR", "LR_bicubic/X{}"), ("GTmod12", "LRbicx{}"), ("GT", "LQ_x{}"), ("test_GT.lmdb", "test_LQ_x{}.lmdb"))
BASELINES = ("bicubic", "degraded")
MIN_SIDE = 11  # of what is measured: SSIM's window
PROBE = 64  # pixels a side of the picture that a network is tried with
HD = 1280, 720  # output for which multiply-adds are counted
Y_TO_GRAY = 255 / 219  # Y of YCbCr spans 16..235


@dataclass(frozen=True)
class Task:
    """What a network is to undo: `x4`, `noise25` or `jpeg10`, and whether in grey.

    Super-resolution is measured on Y without a border of `scale` pixels, all else as it is.
    """

    degradation: str
    gray: bool = False

    @property
    def kind(self) -> str:
        return next(kind for kind, prefix in DEGRADATIONS.items() if re.fullmatch(rf"{prefix}\d+", self.degradation))

    @property
    def scale(self) -> int:
        return scale_of(self.degradation)

    @property
    def name(self) -> str:
        """`x4`, `noise25`, `jpeg10`; with a suffix what is not as in the standard: `noise25_gray`, `jpeg10_color`."""
        if self.gray == (self.kind == "jpeg"):
            return self.degradation
        return f"{self.degradation}_{'gray' if self.gray else 'color'}"

    @property
    def title(self) -> str:
        level = int(re.sub(r"\D", "", self.degradation))
        color = "grey" if self.gray else "colour"
        return {
            "sr": f"Super-resolution ×{level}",
            "denoise": f"Denoising, {color}, σ = {level}",
            "jpeg": f"JPEG artefacts, {color}, quality {level}",
        }[self.kind]

    @property
    def protocol(self) -> str:
        """How the task's pictures are made and measured, in sentences for a reader."""
        space = "grey values (of colour pictures, Y)" if self.gray else "RGB"
        return {
            "sr": f"PSNR and SSIM on Y, without a border of {self.scale} pixels; GT is cropped to a multiple of the "
            "scale.",
            "denoise": f"PSNR and SSIM on {space}, no border. Gaussian noise drawn from a seed of each picture's name, "
            "rounded and clipped to 8 bits.",
            "jpeg": f"PSNR and SSIM on {space}, no border. Compressed by OpenCV's JPEG.",
        }[self.kind]


def parse_task(name: str) -> Task:
    """The task called `name`, as Task.name has it.

    Raises:
        ValueError: no task is called so.
    """
    match = re.fullmatch(r"(x[2-9]|noise[1-9]\d*|jpeg[1-9]\d*)(_gray|_color)?", name)
    if not match or (match[1].startswith("x") and match[2]):
        raise ValueError(f"'{name}' is no task; write x4, noise25 or jpeg10, with other numbers where you need them")
    return Task(match[1], match[2] == "_gray" or (match[1].startswith("jpeg") and match[2] != "_color"))


class Pair(NamedTuple):
    """A picture of a test set: its name, and its files as (source, name there); lq is None where it is to be made."""

    name: str
    gt: tuple[str, str]
    lq: tuple[str, str] | None


class Score(NamedTuple):
    """What was measured on a picture: PSNR in dB, SSIM, seconds, and the memory that the network took beyond its
    weights in MiB (None where the system does not tell)."""

    image: str
    psnr: float
    ssim: float
    seconds: float
    peak_mib: float | None


# A network, or what stands for one: a picture to a picture that is larger by the scale.
Restore = Callable[[np.ndarray], np.ndarray]


def find_set(name: str, roots: Iterable[str]) -> Path | None:
    """The folder of the test set `name` below `roots`, or a root that is this folder; None if there is none.

    What `resyn build` made without a share for testing is no test set.
    """
    wanted = {_plain(name), *ALIASES.get(name, ())}
    for root in map(Path, roots):
        for called, folder in ((root.resolve().name, root), *((path.name, path) for path in sorted(root.iterdir()))):
            only_training = (folder / "train_GT.lmdb").exists() and not (folder / "test_GT.lmdb").exists()
            if folder.is_dir() and _plain(called) in wanted and not only_training:
                return folder
    return None


def find_pairs(folder: Path, task: Task, make_lq: bool = False) -> list[Pair]:
    """The pictures of the test set in `folder`, in the order of their names.

    Without `make_lq`, LQ of super-resolution is what the set holds for the scale, if it does.

    Raises:
        ValueError: no pictures, or files without a partner.
    """
    for gt_name, lq_name in LAYOUTS:
        if (folder / gt_name).is_dir():
            gt, lq = folder / gt_name, folder / lq_name.format(task.scale)
            break
    else:
        gt, lq = folder, folder / "nothing"
    gt_names = _by_stem(gt)
    if not gt_names:
        raise ValueError(
            f"{folder} holds no pictures; put them there, or into {' or '.join(name for name, _ in LAYOUTS)} below it"
        )
    if task.kind != "sr" or make_lq or not lq.is_dir():
        return [Pair(stem, (str(gt), name), None) for stem, name in gt_names.items()]
    lq_names = {
        stem if stem in gt_names else re.sub(rf"_?x{task.scale}$", "", stem, flags=re.IGNORECASE): name
        for stem, name in _by_stem(lq).items()
    }
    for some, others, lacking in ((gt_names, lq_names, lq), (lq_names, gt_names, gt)):
        alone = sorted(set(some) - set(others))
        if alone:
            raise ValueError(
                f"{lacking} has no partner for '{some[alone[0]]}' ({len(alone)} without one); complete the set, or "
                "ignore its LQ with --make-lq"
            )
    return [Pair(stem, (str(gt), name), (str(lq), lq_names[stem])) for stem, name in gt_names.items()]


def read_pair(pair: Pair, task: Task) -> tuple[np.ndarray, np.ndarray, bool]:
    """(lq, gt, whether GT's file has one channel); GT is cropped to a multiple of the scale.

    Raises:
        ValueError: a file cannot be decoded, is too small, or LQ has another size than GT / scale.
    """
    gt, one_channel = _read(pair.gt)
    height, width = (side // task.scale * task.scale for side in gt.shape[:2])
    gt = np.ascontiguousarray(gt[:height, :width])
    if min(height, width) < MIN_SIDE + 2 * (task.scale if task.kind == "sr" else 0):
        raise ValueError(
            f"{'/'.join(pair.gt)} has {height}x{width} pixels, too few for SSIM's window of {MIN_SIDE}; remove it"
        )
    if task.gray:
        gt = gt[..., 0].copy() if one_channel else np.round(luma(gt)).astype(np.uint8)
    if pair.lq is None:
        return degrade(gt, task.degradation, pair.name), gt, one_channel
    lq, _ = _read(pair.lq)
    if lq.shape[:2] != (height // task.scale, width // task.scale):
        raise ValueError(
            f"{'/'.join(pair.lq)} has {lq.shape[0]}x{lq.shape[1]} pixels, not those of GT ({height}x{width}) divided "
            f"by {task.scale}; correct the set, or ignore its LQ with --make-lq"
        )
    return lq, gt, one_channel


def luma(picture: np.ndarray) -> np.ndarray:
    """Y of YCbCr, (H, W) float in 16..235, of an RGB picture; a grey picture's own values."""
    return picture.astype(np.float64) if picture.ndim == 2 else to_y_channel(picture[..., ::-1])[..., 0]


def measure(restored: np.ndarray, gt: np.ndarray, task: Task, one_channel: bool = False) -> tuple[float, float]:
    """PSNR in dB (inf for equal pictures) and SSIM of a restored picture, by BasicSR's metrics.

    For super-resolution, `restored` may be Y alone, (H, W). Where `one_channel` says that GT's file holds grey values,
    these are measured in place of Y, whose smaller range makes PSNR 1.32 dB higher.
    """
    if task.kind != "sr":
        return calculate_psnr(restored, gt, crop_border=0), calculate_ssim(restored, gt, crop_border=0)
    values = luma(restored), luma(gt)
    if one_channel:
        values = (values[0] - 16) * Y_TO_GRAY, (values[1] - 16) * Y_TO_GRAY
    return calculate_psnr(*values, crop_border=task.scale), calculate_ssim(*values, crop_border=task.scale)


def score(restore: Restore, pair: Pair, task: Task, gray_as_color: bool = False) -> tuple[Score, np.ndarray]:
    """Read, restore and measure one picture; the restored picture comes second. Raises as `read_pair` and `restore`."""
    lq, gt, one_channel = read_pair(pair, task)
    with peak_memory() as peak:
        begin = time.perf_counter()
        restored = restore(lq)
        seconds = time.perf_counter() - begin
    if restored.shape[:2] != gt.shape[:2]:
        raise ValueError(f"the result has {restored.shape[:2]} pixels, GT {gt.shape[:2]}; correct the network's scale")
    psnr, ssim = measure(restored, gt, task, one_channel and not gray_as_color)
    return Score(pair.name, float(psnr), float(ssim), seconds, peak[0]), restored


def evaluate(
    network: torch.nn.Module, pairs: Sequence[Pair], task: Task, tile: int | None = None, window: int = 1
) -> list[Score]:
    """Measure `network`, on the device where it is, on all `pairs`; it is set to eval and back.

    Args:
        tile: at most so many pixels of LQ a side at once, in overlapping tiles; None for whole pictures.
        window: LQ is padded to a multiple of it, for networks that need that.
    """
    was_training = network.training
    network.eval()
    try:
        channels, _ = probe(network, window)
        restore = restorer(network, channels, tile, window)
        return [score(restore, pair, task)[0] for pair in pairs]
    finally:
        network.train(was_training)


def baseline(task: Task) -> tuple[str, Restore]:
    """What every network has to beat, and its name: bicubic interpolation, or leaving the picture as it is."""
    if task.kind == "sr":
        return BASELINES[0], lambda lq: bicubic(lq, task.scale)
    return BASELINES[1], lambda lq: lq


def probe(network: torch.nn.Module, window: int = 1) -> tuple[int, int]:
    """(channels, scale) that `network` is for, found out by trying it.

    Raises:
        ValueError: it fails for three channels and for one.
    """
    errors = []
    for channels in (3, 1):
        x = torch.rand(1, channels, PROBE, PROBE, generator=torch.Generator().manual_seed(0))
        try:
            y = _run(network, x, window)
        except Exception as error:  # whatever the network's author lets it raise
            errors.append(error)
            continue
        if y.shape[1] == channels:
            return channels, y.shape[2] // PROBE
        errors.append(ValueError(f"it makes {y.shape[1]} channels of {channels}"))
    reasons = "; ".join(" ".join(str(error).split())[:150] for error in errors)
    raise ValueError(f"the network takes neither colour nor grey pictures of {PROBE}x{PROBE} pixels ({reasons})")


def restorer(network: torch.nn.Module, channels: int, tile: int | None = None, window: int = 1) -> Restore:
    """`network` as a function of pictures. One of a single channel gets Y of a colour picture, and makes Y of it."""

    def restore(lq: np.ndarray) -> np.ndarray:
        values = lq if channels == 3 else luma(lq)
        x = torch.from_numpy(np.float32(values) / 255).reshape(1, *lq.shape[:2], channels).permute(0, 3, 1, 2)
        run = functools.partial(_run, network, window=window)
        y = in_tiles(run, x, tile, min(OVERLAP, tile // 2)) if tile else run(x)
        if not y.isfinite().all():
            raise ValueError("the network's result is not finite; its weights are of no use")
        restored = (y.clamp(0, 1) * 255).round().byte()[0].permute(1, 2, 0).numpy()
        return restored if channels == 3 else restored[..., 0]

    return restore


def multiply_adds(network: torch.nn.Module, channels: int, scale: int, window: int = 1) -> float | None:
    """Multiply-adds for an output of 1280x720: of convolutions, linear layers and matrix products, as torch's
    FlopCounterMode counts them. Scans and element-wise work are left out. None where torch cannot trace the network.

    Nothing is computed: the network runs on tensors without contents.
    """
    width, height = (-(-side // scale) for side in HD)
    twin = copy.deepcopy(network)  # EDSR, for one, keeps a tensor that it has converted
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
            _run(twin, torch.empty(1, channels, height, width), window)
    except Exception:  # of an operator that knows no fake tensors, or a branch on values
        return None
    return counter.get_total_flops() / 2


@contextmanager
def peak_memory() -> Iterator[list[float | None]]:
    """Makes a list that holds, after the block, by how many MiB the memory in use grew at most within it: CUDA's where
    it is in use, else the process's resident memory, which only Linux tells (else None)."""
    peak: list[float | None] = [None]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak[0] = (torch.cuda.max_memory_allocated() - before) / 2**20
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)  # give back what earlier pictures left, or it would not count again
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        resident = _status("VmRSS")
    except (OSError, AttributeError):
        yield peak
        return
    yield peak
    peak[0] = max(_status("VmHWM") - resident, 0) / 2**10


def _run(network: torch.nn.Module, x: Tensor, window: int) -> Tensor:
    """(1, C, H, W) to (1, C, H s, W s), both on the CPU; in between padded to a multiple of `window` and cropped."""
    device = next((parameter.device for parameter in network.parameters()), x.device)
    height, width = x.shape[2:]
    bottom, right = -height % window, -width % window
    with torch.no_grad():
        y = network(F.pad(x.to(device), (0, right, 0, bottom), "reflect") if bottom or right else x.to(device))
    scale = y.shape[2] // (height + bottom)
    return y[..., : height * scale, : width * scale].float().cpu()


def read_file(place: tuple[str, str]) -> bytes:
    """The file of a picture. Raises ValueError, which names it, where it cannot be read."""
    try:
        return sources.read(*place)
    except (OSError, ValueError) as error:
        raise ValueError(f"{'/'.join(place)} cannot be read: {error}; replace it") from error


def _read(place: tuple[str, str]) -> tuple[np.ndarray, bool]:
    """An RGB picture, and whether its file has a single channel."""
    data = read_file(place)
    try:
        return sources.decode(data), Image.open(io.BytesIO(data)).mode[0] in "1LI"
    except ValueError as error:
        raise ValueError(f"{'/'.join(place)} cannot be read: {error}; replace it") from error


def _by_stem(folder: Path) -> dict[str, str]:
    """Names of the pictures in a folder or LMDB, by their stems."""
    names: dict[str, str] = {}
    for entry in sources.entries(str(folder)):
        stem = str(Path(entry.name).with_suffix("")) if not (folder / "data.mdb").exists() else entry.name
        if entry.problem:
            raise ValueError(f"{folder}/{entry.name}: {entry.problem}")
        if stem in names:
            raise ValueError(f"{folder} holds both {names[stem]} and {entry.name}; remove one")
        names[stem] = entry.name
    return names


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _status(field: str) -> Any:
    """A field of this process's status, in KiB."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]
