"""What is judged: a registered component or a class, resolved and built as a recipe would, at the kit's sizes."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import yaml

from dmmd_core.assemble import build, seeded
from dmmd_core.errors import PluginError
from dmmd_core.interfaces import INTERFACES, Component, Requirement, Slot
from dmmd_core.plugins import load_plugins
from dmmd_core.registry import Entry, PluginRegistrar, Provider, Registry
from dmmd_core.resolve import Part, resolve_slot
from dmmd_core.schema import Problems, Source, read_dataclass
from dmmd_core.testing.report import Clause, clause, expect

SOURCE = Source("conformance")
ROLES = ("data", "process", "backbone", "generator", "objective", "sampler", "teacher")


@dataclass
class Case:
    """A component under test, and how to make one of it again and again.

    Attributes:
        part: The component with its typed Config and slots.
        offers: What its constructor may ask for.
        params: What its Config was read from.
        registry: All components, this one among them.
    """

    part: Part
    offers: Mapping[str, Any]
    params: Mapping[str, Any]
    registry: Registry
    made: dict[int, Any] = field(default_factory=dict)

    def prepare(self) -> None:
        """Set the kit's sizes and whatever else a constructor of this kind is offered."""

    def close(self) -> None:
        """Remove what was made on disk."""

    @property
    def config(self) -> Any:
        """The component's Config."""
        return self.part.config

    @property
    def provides(self) -> frozenset[str]:
        """Capabilities of the component and of the parts within."""
        return self.part.provides()

    def fresh(self, seed: int = 0, **more: Any) -> Any:
        """Build another one, whose random weights depend on `seed` alone."""
        with seeded(seed):
            return build(self.part, {**self.offers, **more}, SOURCE)

    @property
    def component(self) -> Any:
        """The one that all clauses share."""
        if 0 not in self.made:
            self.made[0] = self.fresh()
        return self.made[0]


def needs(part: Part, role: str) -> set[str]:
    """Capabilities that a part, or one within it, needs of a role."""
    return {need.capability for inner in part.walk() for need in inner.cls.requires(inner.config) if need.role == role}


def entry_of(component: str | type[Component], kind: str, registry: Registry) -> tuple[Entry, Registry]:
    """Find a registered component, or let a class through the door; returns a registry that holds it.

    Raises:
        PluginError: There is no such component, or the class breaks the contract of the door.
    """
    if isinstance(component, str):
        try:
            return registry.get(kind, component), registry
        except KeyError as error:
            raise PluginError(error.args[0]) from error
    for entry in registry:
        if entry.cls is component:
            return entry, registry
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", getattr(component, "__name__", "component")).lower().lstrip("_")
    provider = Provider("none", f"module {getattr(component, '__module__', 'unknown')}", "not registered")
    entries: dict[tuple[str, str], Entry] = {}
    PluginRegistrar(provider, entries).add(kind, name, component)
    known = {(entry.kind, entry.name): entry for entry in registry}
    return entries[kind, name], Registry({**known, **entries}, registry.providers, registry.hooks)


def resolved(entry: Entry, params: Mapping[str, Any] | None, registry: Registry) -> tuple[Part, dict[str, Any]]:
    """Type the parameters of a component; without any, take those of ``--smoke``.

    Raises:
        RecipeError: The parameters do not fit; carries every problem.
    """
    if params is not None:
        return _resolve(entry, dict(params), registry), dict(params)
    # What the full size needs of the outside world, --smoke may do without.
    given = smoke_params(_resolve(entry, {}, registry, outside=False), registry)
    return _resolve(entry, given, registry), given


def _resolve(entry: Entry, params: dict[str, Any], registry: Registry, *, outside: bool = True) -> Part:
    problems = Problems(SOURCE, outside=outside)
    part = resolve_slot(Slot(name=entry.name, params=params), entry.kind, "", registry, problems)
    problems.raise_if_any()
    assert part is not None
    return part


def smoke_params(part: Part, registry: Registry) -> dict[str, Any]:
    """Parameters of ``--smoke`` for a part and all parts within."""
    smaller = part.cls.smoke(part.config)
    params: dict[str, Any] = {}
    for spec in dataclasses.fields(smaller):
        value = getattr(smaller, spec.name)
        params[spec.name] = _plain(value, spec.metadata.get("slot"), registry)
    return params


def _plain(value: Any, kind: str | None, registry: Registry) -> Any:
    if isinstance(value, list) and kind is not None:
        return [_plain(item, kind, registry) for item in value]
    if not isinstance(value, Slot) or kind is None:
        return value
    inner = _resolve(registry.get(kind, value.name), dict(value.params), registry, outside=False)
    return {"name": value.name, "params": smoke_params(inner, registry)}


def plugins(registry: Registry | None) -> Registry:
    """The registry that was given, or that of everything installed."""
    return load_plugins() if registry is None else registry


# ---- what every component must do, whatever its kind ------------------------------------------------------------


@clause("documented", remedy="write a docstring for the class, and help=... for every option and slot of its Config")
def documented(case: Case) -> None:
    """The class and every field of its Config say what they are for."""
    cls = case.part.cls
    own = cls.__dict__.get("__doc__")
    expect(own and own.strip().split("\n")[0], f"{cls.__qualname__} has no docstring")
    silent = [spec.name for spec in dataclasses.fields(case.config) if not spec.metadata.get("help")]
    expect(not silent, f"{cls.__qualname__}.Config tells nothing of {', '.join(silent)}")


@clause("config", remedy="let __post_init__ check fields and change none; use types that YAML has")
def config_round_trip(case: Case) -> None:
    """The Config comes back the same from a recipe that is written with every default."""
    plain = yaml.safe_load(yaml.safe_dump(dataclasses.asdict(case.config)))
    problems = Problems(SOURCE)
    again = read_dataclass(type(case.config), plain, "", problems, "its Config")
    expect(not problems.found, f"it is refused: {'; '.join(map(str, problems.found))}")
    expect(again == case.config, f"it comes back as {again}, but was {case.config}")


@clause("declarations", remedy="return a frozenset of str, a sequence of Requirement, and a Config of the same class")
def declarations(case: Case) -> None:
    """`provides`, `requires` and `smoke` answer in the agreed form, and twice the same."""
    cls, config = case.part.cls, case.config
    provided = cls.provides(config)
    expect(
        isinstance(provided, frozenset) and all(isinstance(name, str) for name in provided),
        f"provides(config) gives {provided!r}",
    )
    expect(cls.provides(config) == provided, "provides(config) gives something else when asked again")
    fields = {"", *(spec.name for spec in dataclasses.fields(config))}
    wanted = cls.requires(config)
    expect(isinstance(wanted, Sequence), f"requires(config) gives {wanted!r}")
    for need in wanted:
        expect(isinstance(need, Requirement), f"requires(config) holds {need!r}")
        expect(need.role in ROLES, f"requires(config) names the role {need.role!r}; the roles are {', '.join(ROLES)}")
        expect(need.field in fields, f"requires(config) blames the field {need.field!r}, which the Config has not")
    smaller = cls.smoke(config)
    expect(type(smaller) is type(config), f"smoke(config) gives a {type(smaller).__name__}")


GENERAL: tuple[Clause, ...] = (documented, config_round_trip, declarations)


def constructor_asks_for(part: Part, name: str) -> bool:
    """Whether the constructor of a part, or of one within it, takes an argument of this name."""
    return any(name in inspect.signature(inner.cls).parameters for inner in part.walk())


def kind_of(component: str | type[Component], kind: str) -> str:
    """The kind of a component; raises a `PluginError` for a class of another kind than `kind`."""
    if isinstance(component, str):
        return kind
    found = cast("str | None", getattr(component, "kind", None))
    if found not in INTERFACES or (kind and found != kind):
        raise PluginError(f"{component!r} is no {kind or 'component'}; derive it from an interface of dmmd_core")
    return found
