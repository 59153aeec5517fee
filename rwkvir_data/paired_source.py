"""One source of pairs: where GT and LQ pictures lie, and which of them are used."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from rwkvir_data.degraded_picture import DegradedPicture
from rwkvir_data.parallel import available_cores
from rwkvir_data.picture_store import Decoded, Folder, Lmdb, open_store
from rwkvir_data.tiles import Tiles


class PairedSource:
    """GT pictures in the order of their names, and LQ pictures of the same names, or none.

    Options: dataroot_gt, dataroot_lq (None if LQ is made from GT), filename_tmpl, meta_info_file, kind; see
    ReSynPairedDataset.

    Raises:
        ValueError: a picture is missing, in LQ or of the meta_info_file.
        FileNotFoundError: a folder or file is missing.
    """

    def __init__(self, options: dict, backend: str):
        self.kind = options.get("kind", "real")
        self.gt_store: Folder | Lmdb | Tiles | Decoded = open_store(os.path.expanduser(options["dataroot_gt"]), backend)
        self.lq_store: Folder | Lmdb | Tiles | Decoded | None = None
        self.reduced: dict[str, np.ndarray] = {}  # LQ that was made once and for all
        self.keys = self.gt_store.keys()
        if options.get("meta_info_file"):
            self.keys = _select(self.keys, options)
        self._template = options.get("filename_tmpl", "{}")
        if options.get("dataroot_lq"):
            self.lq_store = open_store(os.path.expanduser(options["dataroot_lq"]), backend)
            _check_present([self.lq_key(key) for key in self.keys], self.lq_store.keys(), options)

    def decode(self, gray: bool, reduction: str = "") -> None:
        """Hold all pictures in memory from now on, and also LQ that is GT after the degradation `reduction`."""
        with ThreadPoolExecutor(available_cores()) as pool:
            self.gt_store = gt = Decoded(self.gt_store, self.keys, gray, pool)
            if self.lq_store:
                self.lq_store = Decoded(self.lq_store, [self.lq_key(key) for key in self.keys], gray, pool)
            if reduction:
                whole = pool.map(lambda key: DegradedPicture(gt.picture(key), reduction, key, 0)[:, :], self.keys)
                self.reduced = dict(zip(self.keys, map(np.ascontiguousarray, whole), strict=True))

    def lq_key(self, key: str) -> str:
        return self._template.format(key)


def _select(keys: list[str], options: dict) -> list[str]:
    """The keys that meta_info_file names."""
    file = options["meta_info_file"]
    if not os.path.isfile(file):
        raise FileNotFoundError(f"meta_info_file '{file}' does not exist; correct the path or remove the option.")
    lines = Path(file).read_text().splitlines()
    selected = sorted(os.path.splitext(line.split(" ")[0])[0] for line in lines if line)
    missing = set(selected).difference(keys)
    if missing:
        raise ValueError(
            f"'{min(missing)}' of '{file}' is not in '{options['dataroot_gt']}' ({len(missing)} missing in all); "
            "correct the file or add the picture."
        )
    return selected


def _check_present(lq_keys: list[str], present: list[str], options: dict) -> None:
    missing = set(lq_keys).difference(present)
    if missing:
        raise ValueError(
            f"'{options['dataroot_lq']}' has no '{min(missing)}' ({len(missing)} of {len(lq_keys)} missing), which "
            f"'{options['dataroot_gt']}' asks for; make the missing pictures or correct filename_tmpl."
        )
