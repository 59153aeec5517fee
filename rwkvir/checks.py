"""Checks of an option file that take seconds and name in one sentence what would otherwise fail late or unclearly.

Each check is a generator of findings; a new one is written as a function and joins `CHECKS`. Keys are written as
BasicSR's --force_yml writes them: `train:optim_g:lr`.
"""

import copy
import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rwkvir import compat, option_keys

REQUIRED = ("name", "model_type", "num_gpu", "path:", "datasets:")  # a colon at the end: a section
REQUIRED_BY_TRAIN = (
    "datasets:train:batch_size_per_gpu",
    "datasets:train:num_worker_per_gpu",
    "train:total_iter",
    "logger:print_freq",
    "logger:save_checkpoint_freq",
    "logger:use_tb_logger",
)
REQUIRED_BY_SR_MODEL = ("network_g:type", "train:optim_g:type", "train:scheduler:type")
REQUIRED_BY_PAIRED_DATASET = ("dataroot_gt", "dataroot_lq", "io_backend:type")
REQUIRED_BY_PAIRED_TRAINING = ("gt_size", "use_hflip", "use_rot")


class Finding(NamedTuple):
    """One thing that is wrong: the key of the option, and a sentence about it that says what to do.

    One that is not `fatal` lets the run begin.
    """

    key: str
    message: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.key} {self.message}"


class OptionError(ValueError):
    """An option file with findings. `messages` holds a sentence each; the exception's own text is all of them."""

    def __init__(self, path: str, findings: list[Finding]) -> None:
        self.messages = [f"{path}: {finding}" for finding in findings]
        super().__init__("\n".join(self.messages))


def refuse(path: str, options: dict[str, Any], is_train: bool, resuming: bool = False) -> None:
    """Print what `check_options` finds to be doubtful, and raise OptionError for what is wrong."""
    findings = check_options(options, is_train, resuming)
    for finding in findings:
        if not finding.fatal:
            print(f"warning: {path}: {finding}", file=sys.stderr)
    if any(finding.fatal for finding in findings):
        raise OptionError(path, [finding for finding in findings if finding.fatal])


def load_options(path: str, forced: Collection[str] = ()) -> dict[str, Any]:
    """The options of the YAML file `path`, after `forced`, a list of `a:b=value` as --force_yml takes them.

    Raises FileNotFoundError or ValueError with a sentence for a person.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"the option file {path} does not exist; give an existing YAML file with -opt")
    try:
        options = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        detail = f"line {mark.line + 1}, {getattr(error, 'problem', '')}" if mark else str(error)
        raise ValueError(f"{path} is not YAML ({detail}); correct it there") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} holds no mapping but {type(options).__name__}; start from a file in options/")
    for entry in forced:
        _force(options, entry)
    return options


def check_options(options: dict[str, Any], is_train: bool, resuming: bool = False) -> list[Finding]:
    """All findings for one run; BasicSR's registries must hold the plugins' classes already.

    Where required keys are missing, only those are reported, since the other checks read them. Of a key, only the first
    is.
    """
    findings = list(check_required(options, is_train))
    if not findings:
        findings = [finding for check in CHECKS for finding in check(options, is_train, resuming)]
    return list({finding.key: finding for finding in reversed(findings)}.values())[::-1]


def check_required(options: dict[str, Any], is_train: bool) -> Iterator[Finding]:
    """Keys without which BasicSR ends in a KeyError, some of them only after hours."""
    required = [*REQUIRED, *(REQUIRED_BY_TRAIN if is_train else ["val:save_img"])]
    if is_train and options.get("val") is not None:
        required += ["val:val_freq", "val:save_img"]
    if not is_train and _get(options, "val:save_img"):
        required.append("val:suffix")
    for phase in options["datasets"] if isinstance(options.get("datasets"), dict) else ():
        required += [f"datasets:{phase}:name", f"datasets:{phase}:type"]
        if _get(options, f"datasets:{phase}:type") == "PairedImageDataset":
            keys = REQUIRED_BY_PAIRED_DATASET + (REQUIRED_BY_PAIRED_TRAINING if phase == "train" else ())
            required += ["scale", *(f"datasets:{phase}:{key}" for key in keys)]
    required += [f"{network}:type" for network in options if network.startswith("network_")]
    if is_train and _is_sr_model(options.get("model_type")):
        required += REQUIRED_BY_SR_MODEL
    if options.get("model_type") == "SwinIRModel":
        required.append("network_g:window_size")
    absent = (_absent(options, key) for key in required)
    yield from dict.fromkeys(finding for finding in absent if finding)
    if not isinstance(options.get("name"), str | None):
        yield Finding("name", f"is {options['name']!r}, not text; put it in quotes")


def check_numbers(options: dict[str, Any], is_train: bool, resuming: bool) -> Iterator[Finding]:
    """Text where a number is meant: to YAML 1.1 `1e-4` is text, and so is a `-1` given to --force_yml."""
    for key, value in _leaves(options):
        number = isinstance(value, str) and re.fullmatch(r"([+-]?\d+)(\.\d*)?(?:e([+-]?)(\d+))?", value, re.IGNORECASE)
        if number and key.split(":")[-1] not in ("name", "suffix"):
            whole, fraction, sign, exponent = number.groups()
            literal = f"{whole}{fraction or '.0'}e{sign or '+'}{exponent} or " if exponent else ""
            yield Finding(key, f"is the text '{value}', not a number; write {literal}!!float {value}")


def check_types(options: dict[str, Any], is_train: bool, resuming: bool) -> Iterator[Finding]:
    """Names that no registry knows; arguments that the named network, metric or loss does not take or still needs."""
    from basicsr.utils import registry

    yield from _check_type("model_type", options["model_type"], registry.MODEL_REGISTRY)
    for phase, dataset in options["datasets"].items():
        yield from _check_type(f"datasets:{phase}:type", dataset["type"], registry.DATASET_REGISTRY)
    for network in (key for key in options if key.startswith("network_")):
        yield from _check_built(network, options[network], registry.ARCH_REGISTRY)
    for name, metric in (_get(options, "val:metrics") or {}).items():
        own = {key: value for key, value in metric.items() if key != "better"} if isinstance(metric, dict) else metric
        yield from _check_built(f"val:metrics:{name}", own, registry.METRIC_REGISTRY, given=("img", "img2"))
    for name, section in (options.get("train") or {}).items() if is_train else ():
        if name.endswith("_opt") and isinstance(section, dict):
            yield from _check_built(f"train:{name}", section, registry.LOSS_REGISTRY)


def check_optimisation(options: dict[str, Any], is_train: bool, resuming: bool) -> Iterator[Finding]:
    """Optimisers and schedulers: their names, as far as the model knows them, and their arguments."""
    import torch
    from basicsr.models import lr_scheduler
    from basicsr.utils.registry import MODEL_REGISTRY

    model = registered(options["model_type"], MODEL_REGISTRY)
    for name, section in (options.get("train") or {}).items() if is_train and model else ():
        if name == "scheduler" or name.startswith("optim_"):
            home = lr_scheduler if name == "scheduler" else torch.optim
            known = {word for word in option_keys.words_of(model) if inspect.isclass(getattr(home, word, None))}
            if home is lr_scheduler:
                known.add("MultiStepLR")  # BasicSR's name for its MultiStepRestartLR
            if section["type"] not in known and option_keys.is_own(model):
                message = (
                    f"is '{section['type']}', which {model.__name__} does not know; {nearest(section['type'], known)}"
                )
                yield Finding(f"train:{name}:type", message)
            elif section["type"] in known:
                called = getattr(home, section["type"].replace("MultiStepLR", "MultiStepRestartLR"))
                yield from check_arguments(f"train:{name}", called, set(section) - {"type"}, ("params", "optimizer"))


def check_keys(options: dict[str, Any], is_train: bool, resuming: bool) -> Iterator[Finding]:
    """Keys that nothing reads, in the sections that are no arguments of a call."""
    from basicsr.utils.registry import DATASET_REGISTRY, MODEL_REGISTRY

    model = registered(options["model_type"], MODEL_REGISTRY)
    if model is None:
        return
    for section in option_keys.LOOP:
        if section != "datasets":
            keys = _get(options, section) if section else options
            reader = None if section.startswith(("logger", "dist_params")) else model
            yield from _check_read(section, keys, options, section, reader, MODEL_REGISTRY)
    for phase, dataset in options["datasets"].items():
        reader = registered(dataset["type"], DATASET_REGISTRY)
        if reader:
            yield from _check_read(f"datasets:{phase}", dataset, options, "datasets", reader, DATASET_REGISTRY)


def _check_read(
    key: str, keys: Any, options: dict[str, Any], section: str, reader: Any, registry: Any
) -> Iterator[Finding]:
    """Findings for `keys`, the section at `key`, that `reader`, one of `registry`, does not read.

    A name that another of them reads is only doubtful: BasicSR's own files have some of these.
    """
    known = option_keys.known_keys(section, options, reader)
    for name in keys if isinstance(keys, dict) else ():
        if name not in known and not name.startswith("network_"):
            elsewhere = reader and any(name in option_keys.words_of(other) for _, other in registry)
            close = [] if elsewhere else difflib.get_close_matches(name, known, 1, 0.6)
            folder = ", and BasicSR makes a folder of it" if section == "path" else ""
            message = f"is read by nothing{folder}; {f'did you mean {close[0]}?' if close else 'remove it'}"
            fatal = section == "path" or not (elsewhere or (reader and not option_keys.is_own(reader)))
            yield Finding(f"{key}:{name}".lstrip(":"), message, fatal)


def check_model(options: dict[str, Any], is_train: bool, resuming: bool) -> Iterator[Finding]:
    """What the model's own module finds: its `check_options(opt)`, if it has one, raises ValueError."""
    from basicsr.utils.registry import MODEL_REGISTRY

    model = registered(options["model_type"], MODEL_REGISTRY)
    own = getattr(sys.modules[model.__module__], "check_options", None) if model else None
    try:
        if own:
            own(copy.deepcopy(options))
    except ValueError as error:
        key, message = str(error).split(" ", 1)
        yield Finding(key, message)


def check_schedule(options: dict[str, Any], is_train: bool, resuming: bool) -> Iterator[Finding]:
    """Iterations that are never reached: nothing happens at them, or the schedule ends before."""
    total = _get(options, "train:total_iter")
    if not is_train or not isinstance(total, int | float):
        return
    if total < 1:
        yield Finding("train:total_iter", f"is {total}, and nothing would be trained; raise it")
        return
    for key, what in (("val:val_freq", "validation"), ("logger:save_checkpoint_freq", "checkpoint")):
        every = _get(options, key)
        if isinstance(every, int | float) and every > total:
            message = (
                f"is {every}, beyond total_iter {total}: the only {what} comes at the end; lower it for earlier ones"
            )
            yield Finding(key, message, fatal=False)
    schedule = _get(options, "train:scheduler") or {}
    late = [step for step in schedule.get("milestones") or () if isinstance(step, int | float) and step > total]
    if late:
        message = f"has {late[0]}, which total_iter {total} does not reach; shorten it, or the learning rate stays high"
        yield Finding("train:scheduler:milestones", message, fatal=False)
    periods = schedule.get("periods") or ()
    if periods and all(isinstance(period, int | float) for period in periods) and sum(periods) < total:
        message = f"end at iteration {sum(periods)}, where training would fail before total_iter {total}; lengthen them"
        yield Finding("train:scheduler:periods", message)


def check_sampler(options: dict[str, Any], is_train: bool, resuming: bool) -> Iterator[Finding]:
    """The sampler of the training set: its name, its arguments, and the seed that all processes draw from."""
    from rwkvir_data.samplers import SAMPLER_REGISTRY

    sampler = _get(options, "datasets:train:sampler")
    if is_train and sampler is not None:
        given = ("dataset", "num_replicas", "rank", "ratio", "run")
        yield from _check_built("datasets:train:sampler", sampler, SAMPLER_REGISTRY, given)
        if options.get("manual_seed") is None:
            yield Finding("manual_seed", "is missing, from which the sampler of datasets:train draws; add a number")


def check_data(options: dict[str, Any], is_train: bool, resuming: bool) -> Iterator[Finding]:
    """Folders, files and LMDBs of the datasets that are missing, empty or damaged; patches that the scale splits."""
    scale = options.get("scale")
    for phase, dataset in options["datasets"].items():
        lmdb = _get(dataset, "io_backend:type") == "lmdb"
        for key, value in _leaves(dataset, f"datasets:{phase}"):
            name = key.split(":")[-1]
            if value is not None and (name.startswith(("dataroot", "meta_info")) or key.endswith("sampler:table")):
                problem = data_problem(os.path.expanduser(str(value)), lmdb and name.startswith("dataroot"))
                if problem:
                    spare = "" if is_train or len(options["datasets"]) == 1 else f", or remove datasets:{phase}"
                    yield Finding(key, f"is {value}, {problem}{spare}")
        size = dataset.get("gt_size")
        if isinstance(size, int) and isinstance(scale, int) and size % scale:
            message = f"is {size}, which scale {scale} does not divide; make it {max(size // scale, 1) * scale}, say"
            yield Finding(f"datasets:{phase}:gt_size", message)


def check_path(options: dict[str, Any], is_train: bool, resuming: bool) -> Iterator[Finding]:
    """The `path` section: files that do not exist."""
    resuming = resuming or options["path"].get("resume_state") is not None
    for key, value in options["path"].items():
        ignored = resuming and "pretrain_network" in key
        if value is not None and not ignored and ("pretrain_network" in key or key == "resume_state"):
            if not os.path.isfile(os.path.expanduser(str(value))):
                yield Finding(f"path:{key}", f"is {value}, which is not a file; give an existing one, or ~ for none")


def check_gpu(options: dict[str, Any], is_train: bool, resuming: bool) -> Iterator[Finding]:
    """A GPU asked for where there is none. How many are needed depends on the launcher; that is left to BasicSR."""
    import torch

    wanted = options["num_gpu"]
    if wanted != "auto" and not isinstance(wanted, int):
        yield Finding("num_gpu", f"is {wanted!r}; write a number or auto")
    elif wanted not in ("auto", 0) and not torch.cuda.is_available():
        yield Finding("num_gpu", f"is {wanted}, but torch sees no CUDA device; write 0 or auto")


CHECKS = (
    check_numbers,
    check_types,
    check_optimisation,
    check_sampler,
    check_keys,
    check_model,
    check_data,
    check_path,
    check_schedule,
    check_gpu,
)


def data_problem(path: str, lmdb: bool) -> str | None:
    """What is wrong with a dataset's file or folder (`lmdb`: an LMDB folder), as half a sentence, or None."""
    if lmdb and not path.endswith(".lmdb"):
        return "which does not end in .lmdb, as BasicSR's LMDB back end demands; rename it or set io_backend:type: disk"
    if not os.path.exists(path):
        return "which does not exist; make it or correct the path"
    if os.path.isdir(path) and not os.listdir(path):
        return "an empty folder; fill it or correct the path"
    return lmdb_problem(path) if lmdb else None


def lmdb_problem(path: str) -> str | None:
    """What is wrong with the LMDB folder `path`, as half a sentence, or None. Reads its header and two entries."""
    import lmdb

    again = "make the LMDB again"
    meta, data = Path(path, "meta_info.txt"), Path(path, "data.mdb")
    for file in (meta, data):
        if not file.is_file():
            return f"which holds no {file.name}; {again}"
    keys = [line.split(".")[0] for line in meta.read_text().splitlines() if line.strip()]
    if not keys:
        return f"whose meta_info.txt lists no pictures; {again}"
    try:
        with compat.lmdb_environment(path).begin() as transaction:
            absent = [key for key in (keys[0], keys[-1]) if transaction.get(key.encode()) is None]
    except lmdb.Error as error:
        return f"whose data.mdb is damaged ({error}); {again}"
    return f"whose meta_info.txt lists the key '{absent[0]}', which data.mdb does not hold; {again}" if absent else None


def registered(name: str, registry: Any) -> Any:
    """What `registry` holds under `name`, which BasicSR also looks up with its suffix, or None."""
    return next((registry.get(full) for full in (name, f"{name}_basicsr") if full in registry), None)


def nearest(name: str, known: Collection[str]) -> str:
    """The end of a sentence about an unknown name: the known names most like it, or else all of them."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = [by_lower[match] for match in difflib.get_close_matches(str(name).lower(), by_lower, n=3, cutoff=0.5)]
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(sorted(known))}"


def _check_type(key: str, name: str, registry: Any) -> Iterator[Finding]:
    if registered(name, registry) is None:
        yield Finding(key, f"is '{name}', which is not a registered {registry._name}; {nearest(name, registry.keys())}")


def _check_built(key: str, options: Any, registry: Any, given: Collection[str] = ()) -> Iterator[Finding]:
    """Check a section that BasicSR turns into a call: `type` names what is called, the other keys are its arguments."""
    if not isinstance(options, dict) or "type" not in options:
        yield Finding(key, "must be a mapping with a type")
        return
    unknown = list(_check_type(f"{key}:type", options["type"], registry))
    if unknown:
        yield from unknown
        return
    yield from check_arguments(key, registered(options["type"], registry), set(options) - {"type"}, given)


def check_arguments(key: str, called: Callable, names: set[str], given: Collection[str] = ()) -> Iterator[Finding]:
    """`names` that `called` does not take, and arguments that it needs but that are neither there nor in `given`."""
    parameters = {name: p for name, p in inspect.signature(called).parameters.items() if name not in given}
    if option_keys.ignores_others(called):
        named = [name for name, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        for name in sorted(names - set(named)):
            yield Finding(f"{key}:{name}", f"is not an option of {called.__name__}; {nearest(name, named)}")
    else:
        yield Finding(key, f"is not checked for misspelt options, since {called.__name__} takes any", fatal=False)
    for name, parameter in parameters.items():
        variadic = parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        if parameter.default is inspect.Parameter.empty and not variadic and name not in names:
            yield Finding(f"{key}:{name}", f"is missing, and {called.__name__} has no default for it; add it")


def _is_sr_model(name: Any) -> bool:
    from basicsr.models.sr_model import SRModel
    from basicsr.utils.registry import MODEL_REGISTRY

    return name in MODEL_REGISTRY and issubclass(MODEL_REGISTRY.get(name), SRModel)


def _force(options: dict[str, Any], entry: str) -> None:
    """Set one `a:b=value` in place, reading the value as BasicSR does."""
    from basicsr.utils.options import _postprocess_yml_value

    keys, separator, value = entry.partition("=")
    if not separator or "=" in value:
        raise ValueError(f"--force_yml {entry} is not of the form key:subkey=value; correct it")
    *sections, last = keys.strip().split(":")
    section = _get(options, ":".join(sections)) if sections else options
    if not isinstance(section, dict):
        raise ValueError(f"--force_yml {entry}: the option file has no section {':'.join(sections)}; add it there")
    section[last] = _postprocess_yml_value(value.strip())


def _get(options: Any, key: str) -> Any:
    """The value of `a:b:c`, or None where a part of it is absent."""
    for part in key.split(":"):
        options = options.get(part) if isinstance(options, dict) else None
    return options


def _absent(options: Any, key: str) -> Finding | None:
    """A finding for the first part of `a:b:c` that is absent or no section, or None. A key `a:` asks for a section."""
    parts = key.split(":")
    for depth, part in enumerate(parts):
        if not isinstance(options, dict):
            return Finding(":".join(parts[:depth]), f"is {options!r}, not a section; write its options below it")
        if part and part not in options:
            return Finding(":".join(parts[: depth + 1]), "is missing; add it")
        options = options.get(part)
    return None


def _leaves(options: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All values below `options` that are neither mappings nor lists, with their keys. A list's items share its key;
    those that are mappings are numbered from 1.
    """
    if isinstance(options, dict):
        for name, value in options.items():
            yield from _leaves(value, f"{key}:{name}" if key else str(name))
    elif isinstance(options, list):
        for number, value in enumerate(options, 1):
            yield from _leaves(value, f"{key}:{number}" if isinstance(value, dict) else key)
    else:
        yield key, options
