"""A sampler that chooses training pictures by their complexity."""

from __future__ import annotations

import os

import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from rwkvir_data.samplers import SAMPLER_REGISTRY, Run, RunSampler

MODES = {"balanced": None, "uniform": "bins", "curriculum": "iterations", "weights": "column"}  # and what each needs
CURRICULUM_START = 0.1  # share of the pictures, the lowest, with which a curriculum begins


@SAMPLER_REGISTRY.register()
class ComplexitySampler(RunSampler):
    """Draws pictures by their complexity, or by a weight, which a table gives.

    Options:
        table: a Parquet file with the columns `key` (a picture's name without extension) and `complexity`, as
            `resyn build` writes it beside its LMDBs. It may hold more pictures than the dataset.
        mode: balanced: half of an epoch's draws below zero, half above or at it.
            uniform: an equal share for each of `bins` equally wide ranges of complexity, leaving out empty ones.
            curriculum: at first from the lowest tenth of the pictures, then from a share of them that grows linearly,
                from iteration `iterations` on from all (Platanios et al., arXiv 1903.09848, with linear competence).
            weights: in proportion to the table's `column`.

    The draws are systematic: every epoch has each picture within one of as often as its weight asks for.

    Raises:
        ValueError: an option is missing, unknown or impossible; the table is damaged or lacks pictures of the dataset.
        FileNotFoundError: there is no table.
    """

    def __init__(
        self,
        dataset: torch.utils.data.Dataset,
        num_replicas: int,
        rank: int,
        ratio: float,
        run: Run,
        *,
        mode: str,
        table: str,
        bins: int | None = None,
        iterations: int | None = None,
        column: str | None = None,
    ):
        super().__init__(dataset, num_replicas, rank, ratio, run)
        _check_options(mode, {"bins": bins, "iterations": iterations, "column": column})
        self.mode, self.curriculum = mode, iterations
        self.values = read_column(table, column or "complexity", dataset_keys(dataset))  # (len(dataset),)
        if mode == "weights" and (self.values.min() < 0 or self.values.sum() == 0):
            raise ValueError(f"'{column}' of '{table}' holds negative weights or zeros alone; correct it.")
        if mode == "balanced" and len(np.unique(self.values < 0)) == 1:
            raise ValueError(f"all pictures lie on one side of zero in '{table}'; choose another mode or add pictures.")
        self.bins = np.linspace(self.values.min(), self.values.max(), bins + 1)[1:-1] if bins else np.zeros(1)

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        count = len(self.values)
        # One number in each of total_size equal parts of [0, 1), in random order.
        numbers = (generator.permutation(self.total_size) + generator.random()) / self.total_size
        if self.mode == "curriculum":
            progress = np.minimum(self.iterations() / self.curriculum, 1)
            admitted = np.ceil(count * (CURRICULUM_START + (1 - CURRICULUM_START) * progress))
            return np.argsort(self.values, kind="stable")[(numbers * admitted).astype(int)]
        # Random order within groups, which lie side by side, so that each gets its share to within one draw.
        order = generator.permutation(count)
        if self.mode == "weights":
            weights = self.values[order]
        else:
            groups = np.digitize(self.values, self.bins)
            order = order[np.argsort(groups[order], kind="stable")]
            weights = 1 / np.bincount(groups)[groups[order]]
        ends = np.cumsum(weights)
        return order[np.searchsorted(ends[:-1], numbers * ends[-1], side="right")]


def dataset_keys(dataset: torch.utils.data.Dataset) -> list[str]:
    """The pictures' names without extension, in the order of the indices: of ReSynPairedDataset or one of BasicSR's.

    Raises:
        ValueError: the dataset does not tell.
    """
    if hasattr(dataset, "keys"):
        return dataset.keys
    if not hasattr(dataset, "paths"):
        raise ValueError(f"{type(dataset).__name__} does not tell its pictures' names; use ReSynPairedDataset.")
    files = [path["gt_path"] if isinstance(path, dict) else path for path in dataset.paths]
    in_lmdb = dataset.opt["io_backend"]["type"] == "lmdb"  # type: ignore[attr-defined]
    return files if in_lmdb else [os.path.splitext(os.path.basename(file))[0] for file in files]


def read_column(path: str, column: str, keys: list[str]) -> np.ndarray:
    """The values of `column` for `keys`, (len(keys),) float64, from the Parquet file `path` with a column `key`.

    Raises:
        ValueError: not such a file, or it has no finite value for one of the keys.
        FileNotFoundError: no such file.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"the sampler's table '{path}' does not exist; correct the path or run `resyn build`.")
    try:
        names = pyarrow.parquet.read_schema(path).names
        missing = [name for name in ("key", column) if name not in names]
        if missing:
            raise ValueError(
                f"the sampler's table '{path}' has no column '{missing[0]}', but {', '.join(names)}; "
                "give one that `resyn build` wrote or correct the name."
            )
        table = pyarrow.parquet.read_table(path, columns=["key", column])
        values = dict(zip(table["key"].to_pylist(), table[column].cast("float64").to_pylist(), strict=True))
    except pyarrow.ArrowException as error:
        raise ValueError(f"the sampler's table '{path}' cannot be read ({error}); make it again.") from error
    found = np.array([values.get(key) for key in keys], dtype=float)  # None becomes nan
    absent = np.flatnonzero(~np.isfinite(found))
    if absent.size:
        raise ValueError(
            f"the sampler's table '{path}' has no {column} for '{keys[absent[0]]}' ({absent.size} of {len(keys)} "
            "pictures lack one); give the table that belongs to this dataset, or remove the pictures."
        )
    return found


def _check_options(mode: str, options: dict[str, object]) -> None:
    if mode not in MODES:
        raise ValueError(f"the sampler's mode '{mode}' is unknown; write one of {', '.join(MODES)}.")
    for name, value in options.items():
        needed = name == MODES[mode]
        if (value is not None) != needed:
            raise ValueError(
                f"the sampler's mode {mode} needs '{name}'; add it."
                if needed
                else f"the sampler's option '{name}' means nothing with mode {mode}; remove it or correct the mode."
            )
        if needed and name != "column" and not (isinstance(value, int) and value > 0):
            raise ValueError(f"the sampler's '{name}' must be a whole number above 0, not {value!r}; correct it.")
