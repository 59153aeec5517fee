"""Plugins: distributions that add networks, datasets, models, losses or metrics to BasicSR.

A distribution names modules in the entry-point group `basicsr.plugins`; importing such a module registers its classes:

    [project.entry-points."basicsr.plugins"]
    my_archs = "my_package.archs"
"""

import functools
import importlib
from importlib.metadata import EntryPoint, entry_points
from typing import NamedTuple

from rwkvir import compat

GROUP = "basicsr.plugins"


class Plugin(NamedTuple):
    """An imported plugin, and the names that its import added to each registry, as {'arch': ['RWKVIR'], ...}."""

    name: str
    module: str
    distribution: str
    version: str
    registered: dict[str, list[str]]


@functools.cache
def load_plugins() -> tuple[Plugin, ...]:
    """Import every plugin, in the order of their names. Raises ImportError for the first one that fails, naming it."""
    return tuple(_load(entry) for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name))


def registered_names() -> dict[str, set[str]]:
    """The names in each of BasicSR's registries, as {'dataset': {...}, 'arch': {...}, ...}."""
    compat.apply()
    from basicsr.utils import registry

    registries = (value for key, value in vars(registry).items() if key.endswith("_REGISTRY"))
    return {entry._name: set(entry.keys()) for entry in registries}


def _load(entry: EntryPoint) -> Plugin:
    before = registered_names()
    distribution, version = (entry.dist.name, entry.dist.version) if entry.dist else ("unknown", "unknown")
    try:
        importlib.import_module(entry.module)
    except Exception as error:
        raise ImportError(
            f"the BasicSR plugin '{entry.name}' of {distribution} {version} cannot be imported "
            f"({type(error).__name__}: {error}); repair it, or remove it with: pip uninstall {distribution}"
        ) from error
    added = ((registry, sorted(names - before[registry])) for registry, names in registered_names().items())
    return Plugin(entry.name, entry.module, distribution, version, {key: names for key, names in added if names})
