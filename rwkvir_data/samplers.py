"""Samplers by name, which BasicSR lacks: a registry, and what all of them share.

A plugin adds one by deriving it from RunSampler and registering it:

    @SAMPLER_REGISTRY.register()
    class MySampler(RunSampler):
        def draw(self, generator): ...

An option file then names it: `datasets: {train: {sampler: {type: MySampler, ...}}}`.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from basicsr.utils.registry import Registry

SAMPLER_REGISTRY = Registry("sampler")


class Run(NamedTuple):
    """What a sampler knows of the training run, the same on every process."""

    seed: int
    batch_size: int  # of one process
    epoch: int  # where it begins or resumes
    iteration: int


class Draw(int):
    """An index into a dataset which carries the seed of its augmentation: (run's seed, epoch, position in the epoch).

    A dataset that does not look at `seed` sees an int.
    """

    seed: tuple[int, int, int]

    def __new__(cls, index: int, seed: tuple[int, int, int]) -> Draw:
        draw = super().__new__(cls, index)
        draw.seed = seed
        return draw

    def __getnewargs__(self) -> tuple[int, tuple[int, int, int]]:  # type: ignore[override]  # of int, which has one
        return int(self), self.seed


class RunSampler(torch.utils.data.Sampler):
    """Draws an epoch, the same on all processes, of which each takes its share; resumes at the very draw.

    As long as BasicSR's EnlargedSampler: ceil(len(dataset) * ratio / num_replicas) Draws. A run that resumes amid an
    epoch goes on with the draw after its last, unless batch size, processes or dataset have changed: then it begins
    that epoch anew, and says so in the log.
    """

    def __init__(self, dataset: torch.utils.data.Dataset, num_replicas: int, rank: int, ratio: float, run: Run):
        self.num_replicas, self.rank, self.run = num_replicas, rank, run
        self.epoch = run.epoch
        self.num_samples = math.ceil(len(dataset) * ratio / num_replicas)  # type: ignore[arg-type]
        self.total_size = self.num_samples * num_replicas
        self.epoch_iterations = self.num_samples // run.batch_size  # BasicSR drops the last batch if it is smaller
        self.skipped = run.iteration - run.epoch * self.epoch_iterations  # iterations of the epoch that lie behind
        if not 0 <= self.skipped <= self.epoch_iterations:
            self.skipped = 0
            logging.getLogger("basicsr").warning(
                f"Iteration {run.iteration} is not in epoch {run.epoch} of {self.epoch_iterations} iterations each: "
                "batch size, processes or dataset have changed. The epoch begins anew; to resume exactly, change them "
                "back."
            )

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        """The indices of the epoch `self.epoch`: (total_size,) integers, from nothing but `generator` and the epoch."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Draw]:
        indices = self.draw(np.random.default_rng([self.run.seed, self.epoch]))
        positions = range(self.rank, self.total_size, self.num_replicas)
        if self.epoch == self.run.epoch:
            positions = positions[self.skipped * self.run.batch_size :]
        return (Draw(indices[position], (self.run.seed, self.epoch, position)) for position in positions)

    def __len__(self) -> int:
        return self.num_samples

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def iterations(self) -> np.ndarray:
        """For each position of the epoch `self.epoch`, the iteration that trains on it: (total_size,), from 0."""
        first = self.run.iteration - self.skipped + (self.epoch - self.run.epoch) * self.epoch_iterations
        return first + np.arange(self.total_size) // (self.run.batch_size * self.num_replicas)


@functools.cache
def join_training() -> None:
    """Let BasicSR's training loop draw by the option `datasets:train:sampler`, and without it in BasicSR's own order.

    Either way a resumed run goes on with the very next item, augmented as it would have been. Comes after all plugins
    are imported, and once per process.
    """
    import basicsr.train

    from rwkvir_data.enlarged_sampler import seeded

    stock_create, stock_build = basicsr.train.create_train_val_dataloader, basicsr.train.build_dataset

    def create_train_val_dataloader(opt: dict, logger: logging.Logger) -> tuple:
        train = opt["datasets"]["train"]
        options = dict(train.get("sampler") or {"type": "EnlargedSampler"})
        done = opt.get("resume", {"epoch": 0, "iter": 0})
        batch_size = train["batch_size_per_gpu"] * (1 if opt["dist"] else max(opt["num_gpu"], 1))
        run = Run(opt["manual_seed"], batch_size, done["epoch"], done["iter"])
        sampler = SAMPLER_REGISTRY.get(options.pop("type"))
        basicsr.train.EnlargedSampler = functools.partial(sampler, run=run, **options)
        return stock_create(opt, logger)

    def build_dataset(opt: dict) -> torch.utils.data.Dataset:
        dataset = stock_build(opt)
        return seeded(dataset) if opt["phase"] == "train" else dataset

    basicsr.train.create_train_val_dataloader = create_train_val_dataloader
    basicsr.train.build_dataset = build_dataset
