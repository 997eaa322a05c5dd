"""The door: find plugins by entry point, import them, and freeze what they register."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pluggy

from dmmd_core import hookspecs
from dmmd_core.errors import PluginError
from dmmd_core.registry import Entry, PluginRegistrar, Provider, Registry

GROUP = "dmmd.plugins"
DISABLE = "DMMD_DISABLE_PLUGINS"


@dataclass(frozen=True)
class _Found:
    """A plugin that has not been imported yet."""

    provider: Provider
    origin: str
    load: Callable[[], Any]


def load_plugins(entries: Iterable[EntryPoint] | None = None, *, files: Iterable[str | Path] = ()) -> Registry:
    """Load every plugin that is installed and not disabled, and plugins that are single files.

    ``DMMD_DISABLE_PLUGINS`` names plugins (comma separated) that are not even imported.

    Args:
        entries: Entry points to load instead of the installed ones of group ``dmmd.plugins``.
        files: Python files with hooks (``--plugin``), each a plugin of the file's name without a package; its version
            is a digest of its content.

    Returns:
        The frozen registry of components, with the observers' hooks.

    Raises:
        PluginError: Two plugins of one name, an import that fails, a component that breaks its contract, two
            providers of one component, an unknown hook; names plugin, package and version.
    """
    installed = sorted(entry_points(group=GROUP) if entries is None else entries, key=lambda entry: entry.name)
    found = [_Found(_provider(entry), entry.value, entry.load) for entry in installed]
    found += [_file(Path(path)) for path in files]
    known = {one.provider.plugin for one in found}
    disabled = {name.strip() for name in os.environ.get(DISABLE, "").split(",") if name.strip()}
    if disabled - known:
        names = ", ".join(sorted(disabled - known))
        raise PluginError(f"{DISABLE} names unknown plugins: {names} (installed: {', '.join(sorted(known))})")
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    components: dict[tuple[str, str], Entry] = {}
    providers: dict[str, Provider] = {}
    for one in found:
        provider = one.provider
        if provider.plugin in disabled:
            continue
        taken = providers.get(provider.plugin)
        if taken is not None:
            raise PluginError(
                f"two plugins are named {provider.plugin!r}: one of package {taken.package} {taken.version}, one of "
                f"package {provider.package} {provider.version}; uninstall one, or rename its entry point or "
                "file"
            )
        providers[provider.plugin] = provider
        plugin = _import(one)
        _check_hooks(plugin, provider)
        _register(manager, plugin, provider)
        _collect(manager, plugin, provider, components)
    return Registry(components, tuple(providers.values()), manager.hook)


def _provider(entry: EntryPoint) -> Provider:
    if entry.dist is None:
        return Provider(entry.name, entry.value, "unknown")
    return Provider(entry.name, entry.dist.name, entry.dist.version)


def _file(path: Path) -> _Found:
    """A plugin in a file of its own; the same content is imported once in a process."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PluginError(f"the plugin file {path} cannot be read: {error.strerror}") from error
    if path.suffix != ".py":
        raise PluginError(f"the plugin file {path} must be a Python file (.py)")
    digest = hashlib.sha256(content).hexdigest()[:12]
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"dmmd_plugin_file_{path.stem}_{place}_{digest}"

    def load() -> Any:
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module  # dataclasses and type hints look their module up there
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[name]
                raise
        return sys.modules[name]

    return _Found(Provider(path.stem, str(path), digest), str(path), load)


def _import(one: _Found) -> Any:
    try:
        return one.load()
    except (Exception, SystemExit) as error:  # whatever a stranger's module raises becomes one clear error
        raise PluginError(
            f"{one.provider} cannot be imported from {one.origin!r}: {_one_line(error)}; mend or uninstall it, or set "
            f"{DISABLE}={one.provider.plugin}"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")


def _check_hooks(plugin: Any, provider: Provider) -> None:
    """Refuse what pluggy would pass over in silence: unknown hooks, hooks without the marker, no hook at all."""
    specified = {name for name in vars(hookspecs) if name.startswith("dmmd_")}
    marked = []
    for name in dir(plugin):
        if not name.startswith("dmmd_") or isinstance(getattr(plugin, name), types.ModuleType):
            continue
        if name not in specified:
            raise PluginError(f"{provider} has an unknown hook {name!r}; the hooks are {', '.join(sorted(specified))}")
        if not hasattr(getattr(plugin, name), f"{hookspecs.PROJECT}_impl"):
            raise PluginError(f"{provider}: {name} lacks the decorator @dmmd_core.hookimpl and would never be called")
        marked.append(name)
    if not marked:
        raise PluginError(f"{provider} implements no hook; it needs at least one of {', '.join(sorted(specified))}")


def _register(manager: pluggy.PluginManager, plugin: Any, provider: Provider) -> None:
    taken = manager.get_name(plugin)
    if taken is not None:
        raise PluginError(f"{provider} is the same object as plugin {taken!r}; remove one of the two entry points")
    try:
        manager.register(plugin, name=provider.plugin)
        manager.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        raise PluginError(f"{provider} does not fit the hooks: {str(error).splitlines()[-1]}") from error


def _collect(
    manager: pluggy.PluginManager, plugin: Any, provider: Provider, components: dict[tuple[str, str], Entry]
) -> None:
    others = [other for other in manager.get_plugins() if other is not plugin]
    call = manager.subset_hook_caller("dmmd_register", remove_plugins=others)
    registrar = PluginRegistrar(provider, components)
    try:
        call(registry=registrar)
    except PluginError:
        raise
    except (Exception, SystemExit) as error:  # as above: a stranger's code
        raise PluginError(
            f"{provider} failed in dmmd_register: {_one_line(error)}; mend or uninstall it, or set "
            f"{DISABLE}={provider.plugin}"
        ) from error
    registrar.close()
