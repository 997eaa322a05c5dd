"""What every component has in common: a kind, a typed Config, declared capabilities."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dmmd_core.errors import FieldError

KINDS: tuple[str, ...] = (
    "process",
    "schedule",
    "backbone",
    "generator",
    "objective",
    "teacher",
    "data",
    "codec",
    "image_source",
    "sampler",
    "metric",
    "features",
    "language_model",
    "observer",
)


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A place in a recipe or Config that a component fills: its registered name and its parameters."""

    name: str
    params: dict[str, Any] = field(default_factory=dict)


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    same_weights: bool = False,
) -> Any:
    """Declare a field of a Config: default, one line of help, and bounds that the recipe loader checks.

    Args:
        default: The default; leave out for a mandatory field. A list is copied for every instance.
        help: One line shown by ``dmmd-run --plugins`` and in error messages.
        minimum: Smallest value allowed (for a list: of every item).
        above: The value must be greater than this.
        maximum: Largest value allowed.
        below: The value must be less than this.
        same_weights: For a backbone: weights trained with one value may be used with another, as with the attention
            kernel or dropout. Weights of a saved model are refused where any other field differs.
    """
    metadata = {
        "help": help,
        "bounds": {"minimum": minimum, "above": above, "maximum": maximum, "below": below},
        "same_weights": same_weights,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    if default is dataclasses.MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


def slot(kind: str, default: str | Slot | Any | None = dataclasses.MISSING, *, help: str, many: bool = False) -> Any:
    """Declare a field of a Config that another component fills.

    The built component reaches the constructor as a keyword argument of the field's name.

    Args:
        kind: The kind of component, one of `KINDS`.
        default: The default component, as its name or with parameters as a `Slot`; None for an empty slot; left
            out where the recipe must say.
        help: One line of help.
        many: The field is a list of slots; its default is the empty list.
    """
    metadata = {"help": help, "slot": kind, "bounds": {}}
    if many:
        return field(default_factory=list, metadata=metadata)
    if default is dataclasses.MISSING:
        return field(metadata=metadata)
    if default is None:
        return field(default=None, metadata=metadata)
    filled = default if isinstance(default, Slot) else Slot(name=default)
    return field(default_factory=lambda: Slot(name=filled.name, params=dict(filled.params)), metadata=metadata)


def bound_problem(value: Any, metadata: Mapping[str, Any]) -> str | None:
    """Say how `value` breaks the bounds in a field's metadata, or return None."""
    checks: dict[str, tuple[str, Callable[[float, float], bool]]] = {
        "minimum": ("at least", operator.ge),
        "above": ("above", operator.gt),
        "maximum": ("at most", operator.le),
        "below": ("below", operator.lt),
    }
    values = value if isinstance(value, list | tuple) else [value]
    for name, bound in metadata.get("bounds", {}).items():
        if bound is None:
            continue
        words, holds = checks[name]
        for item in values:
            if item is not None and not holds(item, bound):
                return f"must be {words} {bound:g}, got {item!r}"
    return None


@dataclass(frozen=True)
class Requirement:
    """A capability that a component needs from the component in another role of the recipe.

    Attributes:
        role: Section of the recipe that must provide it, for example ``data``.
        capability: Name of the capability.
        reason: Why it is needed, shown to the user.
        field: The Config field that causes it; empty where the component as such does.
    """

    role: str
    capability: str
    reason: str
    field: str = ""


class Component:
    """Base of everything that a recipe can name.

    A subclass of one of the interfaces carries a nested frozen keyword-only dataclass `Config` and a constructor
    ``__init__(self, config, *, ...)`` whose keyword arguments are taken from what assembly offers to its kind
    (`dmmd_core.offers.OFFERS`) and from the Config's slots.
    """

    kind: ClassVar[str]

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """No parameters."""

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """Capabilities of this component when configured so."""
        return frozenset()

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """Capabilities needed from other roles of the recipe when configured so."""
        return ()

    @classmethod
    def check(cls, config: Any) -> None:
        """Raise a `FieldError` where the outside world (a path, an installed library) forbids this Config.

        Called while the recipe is validated, before anything is built or written.
        """

    @classmethod
    def smoke(cls, config: Any) -> Any:
        """Return a Config for ``--smoke``: the same code path at a size of seconds."""
        return config


def check_positive_divides(field_name: str, whole: int, part: int, what: str) -> None:
    """Raise a `FieldError` unless `part` divides `whole`."""
    if part <= 0 or whole % part:
        raise FieldError(field_name, f"must divide {what}, which is {whole}, got {part}")
