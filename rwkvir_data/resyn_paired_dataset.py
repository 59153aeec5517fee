"""Pairs of a picture (GT) and its degraded version (LQ), for training and validation in BasicSR's loop."""

from __future__ import annotations

import difflib
import random
import re
from collections import Counter

import numpy as np
import torch
from basicsr.utils.color_util import bgr2ycbcr
from basicsr.utils.registry import DATASET_REGISTRY

from rwkvir_data.degraded_picture import DegradedPicture
from rwkvir_data.paired_source import PairedSource
from rwkvir_data.samplers import Draw
from rwkvir_data.tiles import TiledPicture

PLACE_OPTIONS = "dataroot_gt dataroot_lq filename_tmpl meta_info_file".split()
SOURCE_OPTIONS = [*PLACE_OPTIONS, "share", "kind"]
OWN_OPTIONS = [
    *PLACE_OPTIONS,
    *"name type phase scale sources io_backend degradation gt_size use_hflip use_rot color cache".split(),
]
# Read by BasicSR's data loader and training loop, not here.
LOADER_OPTIONS = (
    "batch_size_per_gpu num_worker_per_gpu dataset_enlarge_ratio prefetch_mode num_prefetch_queue pin_memory "
    "persistent_workers use_shuffle sampler"
).split()
COLORS = ("rgb", "y", "gray")
KINDS = ("real", "synthetic")
SHARE_ERROR = 0.005  # by which a source's share may differ from what is asked for


@DATASET_REGISTRY.register()
class ReSynPairedDataset(torch.utils.data.Dataset):
    """GT and LQ pictures of one name, from folders, LMDBs or tiles, in the order of their names; or GT pictures alone,
    of which LQ is made when it is needed.

    Takes the options of BasicSR's PairedImageDataset, but says what is wrong with them or with a picture. LQ is smaller
    than GT by `scale`. With phase 'train', an item is a random crop of gt_size, flipped and turned at random; else it
    is the whole picture, where GT may have up to scale - 1 more rows and columns than LQ accounts for (they are cut).

    Options:
        dataroot_gt, dataroot_lq: folders, or LMDBs with `io_backend: {type: lmdb}`, or files that `resyn pack --tiles`
            wrote with `io_backend: {type: tiles}`, of which a crop decodes only what it touches.
        filename_tmpl: LQ's name for GT's, without extension. Default '{}'; e.g. '{}x4'.
        meta_info_file: a text file whose lines begin with a GT picture's name: use only these. Default: all.
        sources: in place of the four options above, a list of mappings with these options and
            share: of an epoch, in any unit, to within half a percent; to give to all sources or none. Default: as many
                as there are. Pictures of a source whose share is above its number come up more often, all alike.
            kind: real | synthetic, which items hand on. Default real.
        degradation: in place of dataroot_lq: x<scale>, noise<sigma> or jpeg<quality>, as `resyn build` names them, or a
            list, from which training draws one for each item.
        gt_size: side of the GT crop, a multiple of scale.
        use_hflip, use_rot: augment by flips, and by vertical flips and transpositions. Default true.
        color: rgb | y (ITU-R BT.601 luma, 16..235 of 255) | gray (the decoder's luma, 0..255). Default rgb.
        cache: true: decode every picture once, at the start, and hold it in memory, which forked workers share: a byte
            for each pixel and colour of GT and LQ, also of LQ that is GT reduced. Items are the same. Default false.

    An item is a dict: gt (C, H, W) and lq (C, H/scale, W/scale), float32, [0, 1], RGB or one channel; gt_path and
    lq_path, str, a file's path or a key (for LQ that is made, GT's); kind. With a sampler of rwkvir_data.samplers, an
    item in training depends on the run's seed, the epoch and the position in it alone, whoever computes it.

    Raises:
        ValueError: an option is unknown, missing or impossible; or, from an item, a picture cannot be decoded, is too
            small, or has no counterpart of the right size.
        FileNotFoundError: a folder, an LMDB or a part of it does not exist.
    """

    def __init__(self, opt: dict):
        _check_options(opt)
        self.opt = opt
        options = opt.get("sources") or [opt]
        sources = [PairedSource(source, opt["io_backend"]["type"]) for source in options]
        _check_distinct(sources)
        names = opt.get("degradation") or []
        self._degradations = [names] if isinstance(names, str) else names
        if opt.get("cache"):
            for source in sources:
                source.decode(opt.get("color") == "gray", self._degradations[0] if opt["scale"] > 1 and names else "")
        repeats = [1] * len(sources)
        if "share" in options[0]:
            repeats = whole_repeats([len(source.keys) for source in sources], [source["share"] for source in options])
        listed = [source for source, times in zip(sources, repeats, strict=True) for _ in range(times)]
        self.keys = [key for source in listed for key in source.keys]
        self._sources = [source for source in listed for _ in source.keys]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict:
        key, source, rng = self.keys[index], self._sources[index], self.rng_for(index)
        scale, color, train = self.opt["scale"], self.opt.get("color", "rgb"), self.opt["phase"] == "train"
        gt_path = lq_path = source.gt_store.path(key)
        gt = source.gt_store.picture(key, color == "gray")
        lq: np.ndarray | TiledPicture | DegradedPicture
        if source.lq_store:
            lq_path = source.lq_store.path(source.lq_key(key))
            lq = source.lq_store.picture(source.lq_key(key), color == "gray")
            _check_sizes(gt.shape, lq.shape, scale, 0 if train else scale - 1, gt_path)
        else:
            seed = rng.getrandbits(32) if train else 0
            made = DegradedPicture(gt, rng.choice(self._degradations) if train else self._degradations[0], key, seed)
            lq = source.reduced.get(key, made)
        height, width = lq.shape[:2]
        top, left, flips = 0, 0, [False] * 3
        if train:
            _check_large_enough(gt.shape, self.opt["gt_size"], gt_path)
            side = self.opt["gt_size"] // scale
            # The same numbers in the same order as in BasicSR.
            top, left = rng.randint(0, height - side), rng.randint(0, width - side)
            flips = [self.opt.get(name, True) and rng.random() < 0.5 for name in ("use_hflip", "use_rot", "use_rot")]
            height = width = side

        def tensor(picture, factor: int) -> torch.Tensor:
            bottom, right = top + height, left + width
            return _to_tensor(
                _flip(picture[top * factor : bottom * factor, left * factor : right * factor], *flips), color
            )

        return {
            "lq": tensor(lq, 1),
            "gt": tensor(gt, scale),
            "lq_path": lq_path,
            "gt_path": gt_path,
            "kind": source.kind,
        }

    def rng_for(self, index: int):
        """What the crop and flips of item `index` draw from: its own seed, or the process's `random`."""
        return random.Random(repr(index.seed)) if isinstance(index, Draw) else random


def whole_repeats(counts: list[int], shares: list[float]) -> list[int]:
    """How often to list the pictures of each source, so that they come up by `shares` to within SHARE_ERROR.

    >>> whole_repeats([9000, 3000], [0.6, 0.4])
    [1, 2]
    """
    rates = np.array(shares) / np.array(counts)
    wanted = np.array(shares) / sum(shares)
    for least in range(1, 1000):
        repeats = np.round(least * rates / rates.min())
        weights = repeats * counts
        if np.abs(weights / weights.sum() - wanted).max() <= SHARE_ERROR:
            break
    return repeats.astype(int).tolist()


def _check_options(opt: dict) -> None:
    where = f"dataset '{opt.get('name', '?')}'"
    _check_known(opt, OWN_OPTIONS + LOADER_OPTIONS, where)
    _check_given(opt, ["phase", "scale", "io_backend", *["gt_size"] * (opt.get("phase") == "train")], where)
    made = opt.get("degradation") is not None
    places = ["dataroot_gt"] if made else ["dataroot_gt", "dataroot_lq"]
    if opt.get("sources") is None:
        _check_given(opt, places, where)
    else:
        _check_sources(opt, places, where)
    if made:
        _check_degradation(opt, where)
    if opt["phase"] == "train" and opt["gt_size"] % opt["scale"]:
        nearest = max(opt["gt_size"] // opt["scale"], 1) * opt["scale"]
        raise ValueError(
            f"{where}: gt_size {opt['gt_size']} is not a multiple of scale {opt['scale']}; make it {nearest}, say."
        )
    if opt.get("color", "rgb") not in COLORS:
        raise ValueError(f"{where}: unknown color '{opt['color']}'; write one of {', '.join(COLORS)}.")


def _check_known(options: dict, known: list[str], where: str) -> None:
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise ValueError(f"{where}: unknown option '{key}'; {hint}Known are {', '.join(sorted(known))}.")


def _check_given(options: dict, required: list[str], where: str) -> None:
    for key in required:
        if options.get(key) is None:
            raise ValueError(f"{where}: option '{key}' is missing; add it to the option file.")


def _check_sources(opt: dict, places: list[str], where: str) -> None:
    misplaced = [key for key in PLACE_OPTIONS if key in opt]
    if misplaced:
        raise ValueError(f"{where}: '{misplaced[0]}' stands beside 'sources'; move it into each source.")
    if not opt["sources"]:
        raise ValueError(f"{where}: 'sources' is empty; list at least one with {' and '.join(places)}.")
    for number, source in enumerate(opt["sources"], 1):
        each = f"{where}, source {number}"
        _check_known(source, SOURCE_OPTIONS, each)
        _check_given(source, places, each)
        if source.get("kind", "real") not in KINDS:
            raise ValueError(f"{each}: unknown kind '{source['kind']}'; write one of {', '.join(KINDS)}.")
        if ("share" in source) != ("share" in opt["sources"][0]):
            raise ValueError(f"{each}: some sources have a 'share' and some have none; give it to all or to none.")
        if not source.get("share", 1) > 0:
            raise ValueError(f"{each}: share {source['share']} is not above 0; correct it or remove the source.")


def _check_degradation(opt: dict, where: str) -> None:
    names, scale = opt["degradation"], opt["scale"]
    names = [names] if isinstance(names, str) else names
    for name in names:
        if not re.fullmatch(r"(noise|jpeg)[1-9]\d*" if scale == 1 else f"x{scale}", str(name)):
            fitting = "noise<sigma> or jpeg<quality>, such as noise25" if scale == 1 else f"x{scale}"
            raise ValueError(f"{where}: degradation '{name}' does not fit scale {scale}; write {fitting}.")
    if not names or (len(names) > 1 and opt["phase"] != "train"):
        raise ValueError(f"{where}: {len(names)} degradations; only training can draw from several, give one.")
    lq = [place for place in opt.get("sources") or [opt] if place.get("dataroot_lq")]
    if lq:
        raise ValueError(f"{where}: both dataroot_lq and degradation are given; remove one of them.")


def _check_distinct(sources: list[PairedSource]) -> None:
    """Names are what tables of scores and messages go by."""
    key, times = Counter(key for source in sources for key in source.keys).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{times} sources have a picture '{key}'; rename the pictures of one.")


def _check_sizes(gt: tuple, lq: tuple, scale: int, spare: int, gt_path: str) -> None:
    height, width = lq[0] * scale, lq[1] * scale
    if not (0 <= gt[0] - height <= spare and 0 <= gt[1] - width <= spare):
        raise ValueError(
            f"GT '{gt_path}' has {gt[0]}x{gt[1]} pixels, but LQ has {lq[0]}x{lq[1]}, "
            f"which at scale {scale} wants {height}x{width}; correct `scale`, or make the LQ picture again."
        )


def _check_large_enough(gt: tuple, size: int, gt_path: str) -> None:
    if min(gt[:2]) < size:
        raise ValueError(
            f"GT '{gt_path}' has {gt[0]}x{gt[1]} pixels, fewer than gt_size {size}; "
            "lower gt_size or remove the picture."
        )


def _flip(picture: np.ndarray, horizontally: bool, vertically: bool, transpose: bool) -> np.ndarray:
    picture = picture[:: -1 if vertically else 1, :: -1 if horizontally else 1]
    return picture.swapaxes(0, 1) if transpose else picture


def _to_tensor(picture: np.ndarray, color: str) -> torch.Tensor:
    """(H, W, 3) BGR or (H, W), uint8, as (C, H, W) float32 in [0, 1]: RGB, or one channel of luma."""
    values = picture.astype(np.float32) / 255
    if color == "rgb":
        values = values[..., ::-1].transpose(2, 0, 1)
    elif color == "y":
        values = bgr2ycbcr(values, y_only=True)[None]
    else:
        values = values[None]
    return torch.from_numpy(np.ascontiguousarray(values))
