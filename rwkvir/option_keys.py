"""Which keys of an option file something reads, so that those which nothing reads can be named.

BasicSR's loop reads what `LOOP` lists. A model or dataset, of whatever package, takes its keys out of a mapping: known
are all words that stand as text in its module, in those of its base classes, and in what these import from their own
package. Everything else in an option file becomes arguments of a call, of which the signature tells.
"""

import ast
import functools
import inspect
import sys
import textwrap
from typing import Any

# Section -> what BasicSR's train.py, test.py, options.py, loader and logger read, and rwkvir's learning_curve.py.
LOOP = {
    "": "name model_type scale num_gpu manual_seed datasets path train val logger dist_params find_unused_parameters",
    "datasets": "name type io_backend batch_size_per_gpu num_worker_per_gpu dataset_enlarge_ratio prefetch_mode "
    "num_prefetch_queue pin_memory persistent_workers use_shuffle sampler",  # use_shuffle: in BasicSR's own files
    "path": "resume_state ignore_resume_networks",
    "train": "total_iter warmup_iter",
    "val": "val_freq save_img suffix metrics pbar",
    "logger": "print_freq save_checkpoint_freq use_tb_logger wandb save_best",
    "logger:wandb": "project resume_id",
    "dist_params": "backend port",
}
OF_A_NETWORK = ("pretrain_network", "strict_load", "param_key")  # each followed by _g, _d, ... in `path`
OWN_PACKAGES = ("basicsr", "rwkvir", "rwkvir_data", "rwkvir_arch")


def known_keys(section: str, options: dict[str, Any], reader: Any) -> set[str]:
    """The keys of `section` that BasicSR's loop or the class `reader` reads."""
    known = set(LOOP[section].split()) | (words_of(reader) if reader else set())
    if section == "path":
        networks = [key.removeprefix("network_") for key in options if key.startswith("network_")]
        known |= {f"{name}_{network}" for name in OF_A_NETWORK for network in networks}
    return known


def is_own(reader: type) -> bool:
    """Whether `reader` and its bases are BasicSR's or rwkvir's, where every key has been seen to be found."""
    return all(package in (*OWN_PACKAGES, "torch", "builtins", "typing") for package in map(_package, reader.__mro__))


@functools.cache
def words_of(reader: type) -> set[str]:
    """Every word that may be a key to `reader`."""
    words: set[str] = set()
    for cls in reader.__mro__:
        if _package(cls) not in ("torch", "builtins", "typing"):
            module = sys.modules[cls.__module__]
            near = {
                getattr(value, "__module__", None) or getattr(value, "__name__", "") for value in vars(module).values()
            }
            names = {name for name in near if isinstance(name, str) and name.split(".")[0] == _package(cls)}
            for name in names | {cls.__module__}:
                if name in sys.modules:
                    words |= _words_in(_source(sys.modules[name]))
    return words


def _source(of: Any) -> str:
    """Raises ValueError where it is not to be had: then nobody can tell which keys are read."""
    try:
        return inspect.getsource(of)
    except (OSError, TypeError) as error:
        raise ValueError(f"the source of {of.__name__} is not there, so its options cannot be checked") from error


@functools.cache
def _words_in(source: str) -> frozenset[str]:
    """Texts in `source` that are names, and the words of those that are `.split()`."""
    words = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            words.add(node.value)
        elif isinstance(node, ast.Attribute) and node.attr == "split" and isinstance(node.value, ast.Constant):
            words |= set(str(node.value.value).split())
    return frozenset(words)


def _package(cls: type) -> str:
    return cls.__module__.split(".")[0]


def ignores_others(called: Any) -> bool:
    """Whether nothing reads the arguments that `called` does not name: it has no **kwargs, or never uses them."""
    function = inspect.unwrap(called.__init__ if inspect.isclass(called) else called)
    code = getattr(function, "__code__", None)
    if code is None or not code.co_flags & inspect.CO_VARKEYWORDS:
        return True
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    name = code.co_varnames[code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)]
    return not any(isinstance(node, ast.Name) and node.id in (name, "locals") for node in ast.walk(tree))
