"""Pairs of a picture (GT) and its degraded version (LQ), for training and validation in BasicSR's loop."""

from __future__ import annotations

import difflib
import os
import random
from pathlib import Path

import cv2
import numpy as np
import torch
from basicsr.utils.color_util import bgr2ycbcr
from basicsr.utils.registry import DATASET_REGISTRY

from rwkvir_data.picture_store import open_store

OWN_OPTIONS = (
    "name type phase scale dataroot_gt dataroot_lq io_backend filename_tmpl meta_info_file gt_size use_hflip use_rot "
    "color"
).split()
# Read by BasicSR's data loader and training loop, not here.
LOADER_OPTIONS = (
    "batch_size_per_gpu num_worker_per_gpu dataset_enlarge_ratio prefetch_mode num_prefetch_queue pin_memory "
    "persistent_workers use_shuffle sampler"
).split()
COLORS = ("rgb", "y", "gray")


@DATASET_REGISTRY.register()
class ReSynPairedDataset(torch.utils.data.Dataset):
    """Stored GT and LQ pictures of one name, from folders or LMDBs, in the order of their names.

    Takes the options of BasicSR's PairedImageDataset, but says what is wrong with them or with a picture. LQ is smaller
    than GT by `scale`. With phase 'train', an item is a random crop of gt_size, flipped and turned at random; else it
    is the whole picture, where GT may have up to scale - 1 more rows and columns than LQ accounts for (they are cut).

    Options:
        dataroot_gt, dataroot_lq: folders, or LMDBs with `io_backend: {type: lmdb}`.
        filename_tmpl: LQ's name for GT's, without extension. Default '{}'; e.g. '{}x4'.
        meta_info_file: a text file whose lines begin with a GT picture's name: use only these. Default: all.
        gt_size: side of the GT crop, a multiple of scale.
        use_hflip, use_rot: augment by flips, and by vertical flips and transpositions. Default true.
        color: rgb | y (ITU-R BT.601 luma, 16..235 of 255) | gray (the decoder's luma, 0..255). Default rgb.

    An item is a dict: gt (C, H, W) and lq (C, H/scale, W/scale), float32, [0, 1], RGB or one channel; gt_path and
    lq_path, str, a file's path or an LMDB's key.

    Raises:
        ValueError: an option is unknown, missing or impossible; or, from an item, a picture cannot be decoded, is too
            small, or has no counterpart of the right size.
        FileNotFoundError: a folder, an LMDB or a part of it does not exist.
    """

    def __init__(self, opt: dict):
        _check_options(opt)
        self.opt = opt
        backend = opt["io_backend"]["type"]
        self.gt_store, self.lq_store = open_store(opt["dataroot_gt"], backend), open_store(opt["dataroot_lq"], backend)
        self.keys = self.gt_store.keys()
        if opt.get("meta_info_file"):
            self.keys = _select(self.keys, opt)
        template = opt.get("filename_tmpl", "{}")
        self.lq_keys = [template.format(key) for key in self.keys]
        _check_present(self.lq_keys, self.lq_store.keys(), opt)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict:
        key, lq_key = self.keys[index], self.lq_keys[index]
        gt_path, lq_path = self.gt_store.path(key), self.lq_store.path(lq_key)
        color = self.opt.get("color", "rgb")
        gt = _decode(self.gt_store.read(key), color, gt_path, self.opt["dataroot_gt"])
        lq = _decode(self.lq_store.read(lq_key), color, lq_path, self.opt["dataroot_lq"])
        gt = self._match(gt, lq, gt_path)
        if self.opt["phase"] == "train":
            gt, lq = self._augment(gt, lq, gt_path, self.rng_for(index))
        return {"lq": _to_tensor(lq, color), "gt": _to_tensor(gt, color), "lq_path": lq_path, "gt_path": gt_path}

    def rng_for(self, index: int):
        """What the crop and flips of item `index` draw from: the process's `random`, which BasicSR seeds."""
        return random

    def _match(self, gt: np.ndarray, lq: np.ndarray, gt_path: str) -> np.ndarray:
        """GT, without what LQ does not account for."""
        scale = self.opt["scale"]
        height, width = lq.shape[0] * scale, lq.shape[1] * scale
        spare = 0 if self.opt["phase"] == "train" else scale - 1
        if not (0 <= gt.shape[0] - height <= spare and 0 <= gt.shape[1] - width <= spare):
            raise ValueError(
                f"GT '{gt_path}' has {gt.shape[0]}x{gt.shape[1]} pixels, but LQ has {lq.shape[0]}x{lq.shape[1]}, "
                f"which at scale {scale} wants {height}x{width}; correct `scale`, or make the LQ picture again."
            )
        return gt[:height, :width]

    def _augment(self, gt: np.ndarray, lq: np.ndarray, gt_path: str, rng) -> tuple[np.ndarray, np.ndarray]:
        """A crop of gt_size, flipped and transposed, from the same numbers in the same order as in BasicSR."""
        scale, size = self.opt["scale"], self.opt["gt_size"]
        lq_size = size // scale
        if min(gt.shape[:2]) < size:
            raise ValueError(
                f"GT '{gt_path}' has {gt.shape[0]}x{gt.shape[1]} pixels, fewer than gt_size {size}; "
                "lower gt_size or remove the picture."
            )
        top, left = rng.randint(0, lq.shape[0] - lq_size), rng.randint(0, lq.shape[1] - lq_size)
        hflip, vflip, transpose = (
            self.opt.get(option, True) and rng.random() < 0.5 for option in ("use_hflip", "use_rot", "use_rot")
        )

        def cut(picture: np.ndarray, factor: int, side: int) -> np.ndarray:
            picture = picture[top * factor :, left * factor :][:side, :side]
            picture = picture[:: -1 if vflip else 1, :: -1 if hflip else 1]
            return picture.swapaxes(0, 1) if transpose else picture

        return cut(gt, scale, size), cut(lq, 1, lq_size)


def _check_options(opt: dict) -> None:
    where = f"dataset '{opt.get('name', '?')}'"
    known = OWN_OPTIONS + LOADER_OPTIONS
    for key in opt:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise ValueError(f"{where}: unknown option '{key}'; {hint}Known are {', '.join(sorted(known))}.")
    required = ["phase", "scale", "dataroot_gt", "dataroot_lq", "io_backend"]
    if opt.get("phase") == "train":
        required.append("gt_size")
    for key in required:
        if opt.get(key) is None:
            raise ValueError(f"{where}: option '{key}' is missing; add it to the option file.")
    if opt["phase"] == "train" and opt["gt_size"] % opt["scale"]:
        nearest = max(opt["gt_size"] // opt["scale"], 1) * opt["scale"]
        raise ValueError(
            f"{where}: gt_size {opt['gt_size']} is not a multiple of scale {opt['scale']}; make it {nearest}, say."
        )
    if opt.get("color", "rgb") not in COLORS:
        raise ValueError(f"{where}: unknown color '{opt['color']}'; write one of {', '.join(COLORS)}.")


def _select(keys: list[str], opt: dict) -> list[str]:
    """The keys that meta_info_file names."""
    file = opt["meta_info_file"]
    if not os.path.isfile(file):
        raise FileNotFoundError(f"meta_info_file '{file}' does not exist; correct the path or remove the option.")
    lines = Path(file).read_text().splitlines()
    selected = sorted(os.path.splitext(line.split(" ")[0])[0] for line in lines if line)
    missing = set(selected).difference(keys)
    if missing:
        raise ValueError(
            f"'{min(missing)}' of '{file}' is not in '{opt['dataroot_gt']}' ({len(missing)} missing in all); "
            "correct the file or add the picture."
        )
    return selected


def _check_present(lq_keys: list[str], present: list[str], opt: dict) -> None:
    missing = set(lq_keys).difference(present)
    if missing:
        raise ValueError(
            f"'{opt['dataroot_lq']}' has no '{min(missing)}' ({len(missing)} of {len(lq_keys)} missing), which "
            f"'{opt['dataroot_gt']}' asks for; make the missing pictures or correct filename_tmpl."
        )


def _decode(data: bytes, color: str, path: str, root: str) -> np.ndarray:
    """An encoded picture as (H, W, 3) BGR or, for gray, (H, W) uint8."""
    flag = cv2.IMREAD_GRAYSCALE if color == "gray" else cv2.IMREAD_COLOR
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), flag) if data else None
    if picture is None:
        raise ValueError(f"'{path}' in '{root}' cannot be decoded: truncated or not a picture; replace or remove it.")
    return picture


def _to_tensor(picture: np.ndarray, color: str) -> torch.Tensor:
    """What `_decode` returns as (C, H, W) float32 in [0, 1]: RGB, or one channel of luma."""
    values = picture.astype(np.float32) / 255
    if color == "rgb":
        values = values[..., ::-1].transpose(2, 0, 1)
    elif color == "y":
        values = bgr2ycbcr(values, y_only=True)[None]
    else:
        values = values[None]
    return torch.from_numpy(np.ascontiguousarray(values))
