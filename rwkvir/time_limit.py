"""`basicsr train --minutes N`: end before a job's time is up, with a checkpoint from which the next job goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class TimeUp(BaseException):
    """Training ends here, and is saved; the argument is a sentence for a person. No error, so nothing may handle it."""


@contextmanager
def limited(minutes: float | None, begun: float) -> Iterator[None]:
    """Within, BasicSR's training loop saves and ends when `minutes` have passed since `begun` (of time.monotonic).

    It ends between two iterations, but not before it has made one. Several processes end at the same one, by the clock
    of rank 0. Comes after rwkvir_data.samplers.join_training, whose samplers know their epoch.
    """
    import basicsr.train
    import torch
    from basicsr.models.base_model import BaseModel

    stock_create, stock_update = basicsr.train.create_train_val_dataloader, BaseModel.update_learning_rate
    deadline = begun + 60 * (minutes or 0)
    sampler: Any = None

    def create_train_val_dataloader(opt: dict, logger: Any) -> tuple:
        nonlocal sampler
        created = stock_create(opt, logger)
        sampler = created[1]
        return created

    def update_learning_rate(self: Any, current_iter: int, warmup_iter: int = -1) -> None:
        done = current_iter - 1  # iterations that are complete
        if done > self.opt.get("resume", {"iter": 0})["iter"]:
            over = torch.tensor(float(time.monotonic() >= deadline), device=self.device)
            if self.opt["dist"]:
                torch.distributed.broadcast(over, 0)
            if over:
                self.save(sampler.epoch, done)
                raise TimeUp(
                    f"stopped after {minutes:g} minutes at iteration {done} of {self.opt['train']['total_iter']}, "
                    "which is saved; --auto_resume goes on from there"
                )
        stock_update(self, current_iter, warmup_iter)

    try:
        if minutes:
            basicsr.train.create_train_val_dataloader = create_train_val_dataloader
            BaseModel.update_learning_rate = update_learning_rate
        yield
    except TimeUp as stop:
        print(stop, flush=True)
    finally:
        basicsr.train.create_train_val_dataloader = stock_create
        BaseModel.update_learning_rate = stock_update
