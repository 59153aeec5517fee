"""What a BasicSR experiment folder says of a run: its options, its learning curve, its weights, and what is amiss."""

from __future__ import annotations

import csv
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rwkvir import checks

CURVE = "learning_curve.csv"  # iter,hours,dataset,name,value
LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) [A-Z]+: (.*)")
STARTED = re.compile(r"Start training from epoch: \d+, iter: (\d+)")
LOGGED = re.compile(r"\[epoch: *\d+, iter: *([\d,]+), lr:\(([^,)]+),?[^)]*\)\](?: \[eta: [^]]*\])? (.*)")
METRIC = re.compile(r"\t # ([^:]+): (\S+)")
SETTING = re.compile(r" +(val_freq|total_iter|print_freq): (\d+)")


class Record(NamedTuple):
    """A row of a learning curve: a training loss (`dataset` is empty) or a validation metric, after `iter` iterations.

    hours: how long had been trained, resumed runs taken together.
    """

    iter: int
    hours: float
    dataset: str
    name: str
    value: float


class Curve(NamedTuple):
    """Values of one name over training, by rising iteration, equally many in each list."""

    iters: list[int]
    hours: list[float]
    values: list[float]


@dataclasses.dataclass(eq=False)
class Experiment:
    """A run. Of what its folder lacks, the field is empty or None, and `notes` hold a sentence each."""

    label: str
    folder: Path
    options: dict[str, Any]
    records: list[Record]
    resumes: list[int]  # after which iterations it was resumed
    parameters: int | None
    weights: Path | None
    notes: list[str]

    def curve(self, dataset: str, name: str) -> Curve:
        """The values of `name`, on `dataset` or, if that is empty, in training; without those that are not finite."""
        rows = [row for row in self.records if (row.dataset, row.name) == (dataset, name) and math.isfinite(row.value)]
        return Curve([row.iter for row in rows], [row.hours for row in rows], [row.value for row in rows])

    def validated(self) -> list[tuple[str, str]]:
        """(dataset, metric) of all validations, in the order of the first one."""
        return list(dict.fromkeys((row.dataset, row.name) for row in self.records if row.dataset))

    @property
    def training(self) -> dict[str, Any]:
        """The section `train` of the option file."""
        return self.options.get("train") or {}

    @property
    def milestones(self) -> list[int]:
        """After which iterations the learning rate falls."""
        return (self.training.get("scheduler") or {}).get("milestones") or []

    @property
    def iterations(self) -> int:
        """How many iterations are recorded."""
        return max((record.iter for record in self.records), default=0)

    def hours_at(self, iters: Sequence[int]) -> np.ndarray:
        """When it had trained for each of `iters`, as nearly as the records tell."""
        return np.interp(iters, [0, *(row.iter for row in self.records)], [0.0, *(row.hours for row in self.records)])

    @property
    def hours(self) -> float:
        """How long it trained for these."""
        return max((record.hours for record in self.records), default=0.0)


def read_experiments(folders: Sequence[str]) -> list[Experiment]:
    """The runs of several folders, each labelled by its folder's name, or by its path where names are equal.

    Raises:
        FileNotFoundError, ValueError: one of them is not an experiment's folder.
    """
    names = [Path(folder).resolve().name for folder in folders]
    unique = len(set(names)) == len(names)
    return [
        read_experiment(folder, name if unique else folder.rstrip("/"))
        for folder, name in zip(folders, names, strict=True)
    ]


def read_experiment(folder: str | Path, label: str) -> Experiment:
    """The run of one folder, from its learning curve or, where BasicSR itself trained it, from its log files.

    Raises:
        FileNotFoundError, ValueError: it is not an experiment's folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; give a run's folder, experiments/NAME say")
    curve, logs = folder / CURVE, sorted(folder.glob("train_*.log"))
    if not (curve.is_file() or logs):
        raise ValueError(
            f"{folder} is not an experiment's folder: it holds neither {CURVE} nor train_*.log; give the folder of a "
            "run, experiments/NAME say"
        )
    notes: list[str] = []
    options = read_options(folder, notes)
    log = _Log(notes)
    for file in logs:
        log.read(file)
    records = read_curve(curve, notes) if curve.is_file() else log.records
    if not any(record.dataset for record in records):
        notes.append("nothing was validated yet, so that it has no PSNR; let it train up to val:val_freq")
    broken = next((record for record in records if not math.isfinite(record.value)), None)
    if broken:
        notes.append(f"{broken.name} is {broken.value} at iteration {broken.iter}; look for the cause before that")
    weights = _weights(folder / "models")
    return Experiment(label, folder, options, records, log.resumes, log.parameters, weights, notes)


def read_curve(path: Path, notes: list[str]) -> list[Record]:
    """The rows of a learning_curve.csv, by rising iteration; those that cannot be read are counted in `notes`."""
    rows, damaged = [], 0
    for row in csv.DictReader(_whole_lines(path)):
        try:
            rows.append(Record(int(row["iter"]), float(row["hours"]), row["dataset"], row["name"], float(row["value"])))
        except (KeyError, TypeError, ValueError):
            damaged += 1
    if damaged:
        notes.append(f"{damaged} rows of {path.name} are damaged and left out; compare with the log")
    return _first_of_each(rows)


class _Log:
    """What the log files of one run say, read in the order in which they were written.

    BasicSR does not log after which iteration it validated: it is the multiple of val_freq that is due then, and after
    the end of training the last iteration, which is known to within print_freq where training ended early.
    """

    def __init__(self, notes: list[str]) -> None:
        self.records: list[Record] = []
        self.resumes: list[int] = []
        self.parameters: int | None = None
        self._notes = notes

    def read(self, path: Path) -> None:
        """Add a log; where it resumes after an iteration, what earlier ones say of later iterations is dropped."""
        settings: dict[str, int] = {}
        rows: list[Record] = []
        begun: datetime | None = None
        hours = trained = 0.0
        printed = truncated = 0
        validated: dict[str, int] = {}
        dataset, at = "", 0
        ended = False
        for line in _whole_lines(path):
            stamped = LINE.match(line)
            if not stamped:
                metric, setting = METRIC.match(line), SETTING.match(line)
                if metric and dataset:
                    rows.append(Record(at, hours, dataset, metric[1], _number(metric[2])))
                elif setting:
                    settings.setdefault(setting[1], int(setting[2]))
                continue
            time, text = datetime.strptime(stamped[1], "%Y-%m-%d %H:%M:%S,%f"), stamped[2]
            hours = trained + (time - begun).total_seconds() / 3600 if begun else 0.0
            dataset = ""
            if parameters := re.search(r"with parameters: ([\d,]+)", text):
                self.parameters = self.parameters or int(parameters[1].replace(",", ""))
            elif started := STARTED.match(text):
                begun, printed = time, int(started[1])
                self._continue_from(printed)
                trained = max((record.hours for record in self.records), default=0.0)
            elif logged := LOGGED.search(text):
                printed = int(logged[1].replace(",", ""))
                losses = re.findall(r"(\S+): (\S+)", logged[3])
                rows += [Record(printed, hours, "", name, _number(value)) for name, value in losses]
                rows.append(Record(printed, hours, "", "lr", _number(logged[2])))
            elif "[epoch:" in text:
                truncated += 1
            elif text.startswith("End of training"):
                ended = True
            elif text.startswith("Validation "):
                dataset = text.removeprefix("Validation ").strip()
                if ended:
                    last = printed + settings.get("print_freq", 1) - 1
                    at = min(last, settings.get("total_iter", last))
                else:
                    every = settings.get("val_freq", 1)
                    at = max(-(-printed // every) * every, validated.get(dataset, 0) + every)
                    validated[dataset] = at
        if truncated:
            self._notes.append(f"{truncated} lines of {path.name} are damaged and left out; the rest of it counts")
        self.records = _first_of_each([*self.records, *rows])

    def _continue_from(self, iteration: int) -> None:
        if iteration:
            self.resumes.append(iteration)
        self.resumes = [resume for resume in self.resumes if resume <= iteration]
        self.records = [record for record in self.records if record.iter <= iteration]


def _whole_lines(path: Path) -> Iterator[str]:
    """The lines of a text, without the last one where it was cut short."""
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            if line.endswith("\n"):
                yield line.rstrip("\r\n")


def _first_of_each(records: Iterable[Record]) -> list[Record]:
    """`records` by rising iteration; of what is recorded twice (the last validation, by BasicSR) the first one."""
    found: dict[tuple, Record] = {}
    for record in records:
        found.setdefault((record.iter, record.dataset, record.name), record)
    return sorted(found.values(), key=lambda record: record.iter)


def _number(text: str) -> float:
    """A number as a log has it; nan where it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def read_options(folder: Path, notes: list[str]) -> dict[str, Any]:
    """The options of the newest option file in `folder`, overridden as by the command line that BasicSR noted in it."""
    files = sorted((*folder.glob("*.yml"), *folder.glob("*.yaml")), key=lambda file: file.stat().st_mtime)
    if not files:
        notes.append("it holds no option file, so that its options are unknown; copy the one it was trained with there")
        return {}
    command = re.search(r"^# CMD:\n# (.*)", files[-1].read_text(errors="replace"), re.MULTILINE)
    forced = re.search(r"--force_yml ((?:[^-\s]\S* ?)+)", command[1]) if command else None
    try:
        return checks.load_options(str(files[-1]), forced[1].split() if forced else ())
    except ValueError as error:
        notes.append(str(error))
        return {}


def _weights(models: Path) -> Path | None:
    """The last weights of net_g, or None."""
    numbered = [file for file in models.glob("net_g_*.pth") if file.stem.removeprefix("net_g_").isdigit()]
    latest = models / "net_g_latest.pth"
    if latest.is_file():
        return latest
    return max(numbered, key=lambda file: int(file.stem.removeprefix("net_g_")), default=None)
