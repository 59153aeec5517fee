"""BasicSR's own order of training pictures, and datasets whose items do not depend on who loads them."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from rwkvir_data.samplers import SAMPLER_REGISTRY, Draw, Run, RunSampler


@SAMPLER_REGISTRY.register()
class EnlargedSampler(RunSampler):
    """Draws like BasicSR's sampler of this name: all pictures, `ratio` times over, in an order that the epoch's number
    gives. A run that names no sampler gets this one.

    Pictures that do not make a share for each process are left out, where BasicSR pads: so two processes with half the
    batch each train on what one process does.
    """

    def __init__(self, dataset: torch.utils.data.Dataset, num_replicas: int, rank: int, ratio: float, run: Run):
        self.pictures: int = len(dataset)  # type: ignore[arg-type]
        self.drawn = math.ceil(self.pictures * ratio)
        shared = self.drawn // num_replicas * num_replicas
        super().__init__(dataset, num_replicas, rank, Fraction(shared, self.pictures), run)  # type: ignore[arg-type]

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        order = torch.randperm(self.drawn, generator=torch.Generator().manual_seed(self.epoch))
        return order.numpy()[: self.total_size] % self.pictures


def seeded(dataset: torch.utils.data.Dataset) -> torch.utils.data.Dataset:
    """`dataset` itself, which from now on seeds the random numbers of Python, numpy and torch (on the CPU) for a Draw
    before it makes the item: whichever process or worker makes it, and whatever came before, the item is the same.
    """
    stock: Any = type(dataset)

    class Seeded(stock):
        def __getitem__(self, index: int) -> Any:
            if isinstance(index, Draw):
                seed_all(*index.seed)
            return super().__getitem__(index)

    Seeded.__name__ = Seeded.__qualname__ = stock.__name__
    dataset.__class__ = Seeded
    return dataset


def seed_all(*numbers: int) -> None:
    """Seed the random numbers of Python, numpy and torch (on the CPU) by all of `numbers`, none of them negative."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the generator that other people's datasets draw from
    torch.default_generator.manual_seed(seed)
