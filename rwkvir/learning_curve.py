"""What BasicSR's loop forgets when it ends: losses and metrics over training, and the best checkpoint so far.

`learning_curve.csv` in a run's folder holds iter,hours,dataset,name,value: a row per logged training loss (and `lr`),
whose dataset is empty, and a row per metric of every validation. `hours` are those of training, resumed runs together.
"""

import csv
import functools
import io
import os
import time
from pathlib import Path
from typing import Any

from rwkvir.checks import nearest
from rwkvir.experiment import CURVE, Record, read_curve

NO_LOSSES = ("epoch", "iter", "lrs", "time", "data_time")  # of what BasicSR's loop logs


class LearningCurve:
    """The learning curve of the run in `folder`, which goes on after `iteration`: rows of later ones are dropped."""

    def __init__(self, folder: Path, iteration: int) -> None:
        self.path = folder / CURVE
        rows = read_curve(self.path, []) if self.path.exists() else []
        self.rows = [row for row in rows if row.iter <= iteration]
        self._before = max((row.hours for row in self.rows), default=0.0)
        self._since = time.monotonic()
        aside = self.path.with_suffix(".partial")
        aside.write_text(_lines([Record._fields, *self.rows]))
        os.replace(aside, self.path)

    def add(self, iteration: int, dataset: str, values: dict[str, float]) -> None:
        """Append `values` by name, in one piece."""
        hours = round(self._before + (time.monotonic() - self._since) / 3600, 6)
        rows = [Record(iteration, hours, dataset, name, float(value)) for name, value in values.items()]
        with self.path.open("a") as file:
            file.write(_lines(rows))


@functools.cache
def join_training() -> None:
    """Let BasicSR's training loop keep a learning curve, and with `logger: {save_best: METRIC}` the best checkpoint.

    net_g_best.pth is that of the first validation set's best METRIC, also over resumptions; besides the networks it
    holds `best`: {iter, value}. A validation that an interruption prevented is made up for. Comes after compat's.
    """
    import basicsr.train
    import torch
    from basicsr.models.base_model import BaseModel
    from basicsr.models.sr_model import SRModel
    from basicsr.utils import MessageLogger

    stock_create, stock_resume = basicsr.train.create_train_val_dataloader, BaseModel.resume_training
    stock_log, stock_log_metrics = MessageLogger.__call__, SRModel._log_validation_metric_values
    stock_initialize = BaseModel._initialize_best_metric_results
    # Of the run in this process: the curve, which rank 0 keeps, and the loaders of the validation sets.
    curve: LearningCurve | None = None
    val_loaders: list = []

    def create_train_val_dataloader(opt: dict, logger: Any) -> tuple:
        nonlocal curve, val_loaders
        check_save_best(opt)
        created = stock_create(opt, logger)
        val_loaders = created[2]
        if opt["rank"] == 0:
            curve = LearningCurve(Path(opt["path"]["experiments_root"]), opt.get("resume", {"iter": 0})["iter"])
        return created

    def resume_training(self: Any, resume_state: dict) -> None:
        stock_resume(self, resume_state)
        val, iteration = self.opt.get("val"), resume_state["iter"]
        if val and val.get("metrics") and iteration % val["val_freq"] == 0:
            done = [{row.dataset for row in curve.rows if row.iter == iteration} if curve else set()]
            if self.opt["dist"]:
                torch.distributed.broadcast_object_list(done)
            for loader in val_loaders:
                if loader.dataset.opt["name"] not in done[0]:
                    self.validation(loader, iteration, None, val["save_img"])

    def log(self: Any, log_vars: dict) -> None:
        if curve:
            losses = {name: log_vars[name] for name in log_vars if name not in NO_LOSSES}
            curve.add(log_vars["iter"], "", {"lr": log_vars["lrs"][0], **losses})
        stock_log(self, log_vars)

    def initialize_best_metric_results(self: Any, dataset_name: str) -> None:
        known = dataset_name in getattr(self, "best_metric_results", ())
        stock_initialize(self, dataset_name)
        for row in curve.rows if curve and self.is_train and not known else ():
            if row.dataset == dataset_name and row.name in self.best_metric_results[dataset_name]:
                BaseModel._update_best_metric_result(self, dataset_name, row.name, row.value, row.iter)

    def log_validation_metric_values(self: Any, current_iter: int, dataset_name: str, tb_logger: Any) -> None:
        stock_log_metrics(self, current_iter, dataset_name, tb_logger)
        if curve and self.is_train:
            metric = self.opt["logger"].get("save_best")
            if metric and dataset_name == val_loaders[0].dataset.opt["name"]:
                best = self.best_metric_results[dataset_name][metric]
                if best["iter"] == current_iter:
                    save_best(self, best)
            curve.add(current_iter, dataset_name, self.metric_results)

    def save_best(model: Any, best: dict) -> None:
        record = torch.nn.Module()
        record.register_buffer("iter", torch.tensor(best["iter"]))
        record.register_buffer("value", torch.tensor(best["val"], dtype=torch.float64))
        networks = {"params": model.net_g, "params_ema": getattr(model, "net_g_ema", None), "best": record}
        networks = {key: network for key, network in networks.items() if network is not None}
        model.save_network(list(networks.values()), "net_g", "best", param_key=list(networks))

    basicsr.train.create_train_val_dataloader = create_train_val_dataloader
    BaseModel.resume_training = resume_training
    MessageLogger.__call__ = log
    BaseModel._initialize_best_metric_results = initialize_best_metric_results
    SRModel._log_validation_metric_values = log_validation_metric_values


def check_save_best(opt: dict) -> None:
    """Raise ValueError if `logger: save_best` names no metric of the validation."""
    metric, metrics = opt["logger"].get("save_best"), (opt.get("val") or {}).get("metrics") or {}
    if metric is not None and metric not in metrics:
        raise ValueError(f"logger:save_best is '{metric}', which is not among val:metrics; {nearest(metric, metrics)}")


def _lines(rows: list) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
