"""The frozen registry of components, and what a plugin writes into it."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pluggy import HookRelay

from dmmd_core.errors import PluginError
from dmmd_core.interfaces import INTERFACES, Component


@dataclass(frozen=True)
class Provider:
    """Who brought a component.

    Attributes:
        plugin: Name of the entry point (or file) of the plugin.
        package: Distribution that carries it.
        version: Version of that distribution.
    """

    plugin: str
    package: str
    version: str

    def __str__(self) -> str:
        """Return ``plugin 'x' of package y 1.0``."""
        return f"plugin {self.plugin!r} of package {self.package} {self.version}"


@dataclass(frozen=True)
class Entry:
    """One registered component."""

    kind: str
    name: str
    cls: type[Component]
    provider: Provider


class Registry:
    """All components by kind and name; immutable once the plugins are loaded.

    Args:
        entries: The components, free of collisions.
        providers: All plugins that were loaded, including those that only observe.
        hooks: Calls the hooks of all plugins (pluggy's relay).
    """

    def __init__(
        self, entries: dict[tuple[str, str], Entry], providers: tuple[Provider, ...], hooks: HookRelay
    ) -> None:
        self._entries = dict(sorted(entries.items()))
        self._providers = providers
        self._hooks = hooks

    @property
    def providers(self) -> tuple[Provider, ...]:
        """All plugins that were loaded, sorted by name."""
        return self._providers

    @property
    def hooks(self) -> HookRelay:
        """Calls the hooks of all plugins."""
        return self._hooks

    def __iter__(self) -> Iterator[Entry]:
        """Iterate over the entries, sorted by kind and name."""
        return iter(self._entries.values())

    def names(self, kind: str) -> list[str]:
        """Names registered for a kind, sorted."""
        return [name for of_kind, name in self._entries if of_kind == kind]

    def get(self, kind: str, name: str) -> Entry:
        """Return a component's entry.

        Raises:
            KeyError: With a sentence that lists what there is and guesses what was meant.
        """
        entry = self._entries.get((kind, name))
        if entry is None:
            raise KeyError(self.missing(kind, name))
        return entry

    def missing(self, kind: str, name: str) -> str:
        """Say that a component does not exist, what does, and what may have been meant."""
        names = self.names(kind)
        close = difflib.get_close_matches(name, names, n=1)
        guess = f"; did you mean {close[0]!r}?" if close else ""
        listing = ", ".join(names) or "none"
        return f"no {kind} named {name!r} is installed{guess} (available: {listing})"


class PluginRegistrar:
    """Handed to one plugin's ``dmmd_register``; checks each component as it comes in."""

    def __init__(self, provider: Provider, entries: dict[tuple[str, str], Entry]) -> None:
        self.provider = provider
        self._entries = entries
        self._open = True

    def close(self) -> None:
        """Take no more components: the plugin's turn is over."""
        self._open = False

    def add(self, kind: str, name: str, cls: type[Component]) -> None:
        """Register a component under a name.

        Args:
            kind: One of `dmmd_core.KINDS`.
            name: What recipes write; lower case with underscores.
            cls: A concrete subclass of the kind's interface with a nested frozen keyword-only ``Config``.

        Raises:
            PluginError: The component breaks the contract, or the name is taken.
        """
        where = f"{self.provider}: {kind} {name!r}"
        if not self._open:
            raise PluginError(f"{where}: components are registered in dmmd_register and never later")
        if kind not in INTERFACES:
            raise PluginError(f"{where}: unknown kind; the kinds are {', '.join(INTERFACES)}")
        if not (isinstance(name, str) and name.isidentifier() and name == name.lower()):
            raise PluginError(f"{where}: a name must be lower case letters, digits and underscores")
        interface = INTERFACES[kind]
        if not (inspect.isclass(cls) and issubclass(cls, interface)):
            raise PluginError(f"{where}: {cls!r} is not a subclass of dmmd_core.{interface.__name__}")
        missing = sorted(getattr(cls, "__abstractmethods__", ()))
        if missing:
            raise PluginError(f"{where}: {cls.__qualname__} lacks the methods {', '.join(missing)}")
        _check_config(where, cls)
        _check_constructor(where, kind, cls)
        taken = self._entries.get((kind, name))
        if taken is not None:
            raise PluginError(
                f"{where}: the name is also provided by {taken.provider}; "
                f"switch one off with DMMD_DISABLE_PLUGINS={self.provider.plugin} or ={taken.provider.plugin}"
            )
        self._entries[kind, name] = Entry(kind, name, cls, self.provider)


def _check_config(where: str, cls: type[Component]) -> None:
    config: Any = cls.Config
    if not (inspect.isclass(config) and dataclasses.is_dataclass(config)):
        raise PluginError(f"{where}: {cls.__qualname__}.Config must be a dataclass")
    params: Any = config.__dataclass_params__  # type: ignore[attr-defined]
    if not params.frozen or any(not field.kw_only for field in dataclasses.fields(config)):
        raise PluginError(f"{where}: {cls.__qualname__}.Config must be @dataclass(frozen=True, kw_only=True)")
    try:
        typing.get_type_hints(config)
    except (NameError, TypeError, SyntaxError) as error:
        raise PluginError(
            f"{where}: the types of {cls.__qualname__}.Config cannot be read: {error}; import them where the module "
            "is imported, and not for type checking alone"
        ) from error
    for field in dataclasses.fields(config):
        kind = field.metadata.get("slot")
        if kind is not None and kind not in INTERFACES:
            raise PluginError(
                f"{where}: slot {field.name!r} is of unknown kind {kind!r}; the kinds are {', '.join(INTERFACES)}"
            )


def _check_constructor(where: str, kind: str, cls: type[Component]) -> None:
    from dmmd_core.offers import OFFERS  # kept apart so that the table can be documented on its own

    slots = {field.name for field in dataclasses.fields(cls.Config) if "slot" in field.metadata}
    offered = OFFERS[kind] | slots
    parameters = list(inspect.signature(cls).parameters.values())
    if not parameters or parameters[0].name != "config":
        raise PluginError(f"{where}: {cls.__qualname__}.__init__ must take 'config' first")
    for parameter in parameters[1:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            raise PluginError(f"{where}: {cls.__qualname__}.__init__ must name its arguments instead of **kwargs")
        if parameter.default is parameter.empty and parameter.name not in offered:
            raise PluginError(
                f"{where}: {cls.__qualname__}.__init__ asks for {parameter.name!r}, but a {kind} is offered only "
                f"{', '.join(sorted(offered)) or 'its config'}"
            )
    unused = slots - {parameter.name for parameter in parameters}
    if unused:
        raise PluginError(f"{where}: {cls.__qualname__}.__init__ does not take the slot {', '.join(sorted(unused))}")
