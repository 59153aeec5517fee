"""Plugins: distributions that add networks, datasets, models, losses, metrics or samplers to BasicSR.

A distribution names modules in the entry-point group `basicsr.plugins`; importing such a module registers its classes:

    [project.entry-points."basicsr.plugins"]
    my_archs = "my_package.archs"
"""

import functools
import importlib
import sys
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
    """Import every plugin: ours, which others may import, then those in the order of their names.

    Raises:
        ImportError: a plugin fails; the message names the first one that does.
    """
    ours = ("rwkvir_arch", "rwkvir_data")
    return tuple(
        _load(entry) for entry in sorted(entry_points(group=GROUP), key=lambda e: (e.name not in ours, e.name))
    )


def registered_names() -> dict[str, set[str]]:
    """The names in each of BasicSR's registries and, once it is imported, that of samplers: {'dataset': {...}, ...}."""
    compat.apply()
    from basicsr.utils import registry

    # Importing it here would register a plugin's names before that plugin is asked for them.
    modules = filter(None, (registry, sys.modules.get("rwkvir_data.samplers")))
    registries = (value for module in modules for key, value in vars(module).items() if key.endswith("_REGISTRY"))
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
    added = {registry: sorted(names - before.get(registry, set())) for registry, names in registered_names().items()}
    return Plugin(
        entry.name, entry.module, distribution, version, {key: names for key, names in added.items() if names}
    )
