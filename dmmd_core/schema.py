"""Typed reading of YAML into frozen dataclasses, collecting every problem with its place.

Types are converted and checked by OmegaConf, one field at a time so that one mistake does not hide the next; bounds
come from `dmmd_core.option`.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dmmd_core.errors import FieldError, Problem, RecipeError
from dmmd_core.interfaces.component import Slot, bound_problem


@dataclass(frozen=True)
class Source:
    """Where the keys of a recipe were written.

    Attributes:
        path: The file, as the user named it.
        lines: Line of every key path in the file, counted from 1.
        overrides: Key paths set on the command line, with the text that set them.
    """

    path: str
    lines: Mapping[str, int] = field(default_factory=dict)
    overrides: Mapping[str, str] = field(default_factory=dict)

    def where(self, key: str) -> str:
        """Name the place of a key, or of the nearest key around it that was written."""
        parts = key.split(".") if key else []
        for count in range(len(parts), 0, -1):
            prefix = ".".join(parts[:count])
            if prefix in self.overrides:
                return f"override {self.overrides[prefix]!r}"
            if prefix in self.lines:
                return f"{self.path}:{self.lines[prefix]}"
        return self.path


@dataclass
class Problems:
    """Collects problems while a recipe is read; `outside` asks for those of the outside world as well."""

    source: Source
    found: list[Problem] = field(default_factory=list)
    outside: bool = True

    def add(self, key: str, message: str) -> None:
        """Note a problem at a key path."""
        self.found.append(Problem(key, message, self.source.where(key)))

    def raise_if_any(self) -> None:
        """Raise one `RecipeError` that carries everything found."""
        if self.found:
            raise RecipeError(self.found)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Read a YAML file into plain containers, and the line of every key path.

    Raises:
        RecipeError: The file cannot be read, is no YAML, repeats a key, or uses interpolation.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RecipeError([Problem("", f"cannot read the recipe: {reason}", str(path))]) from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[str, int] = {}
        if node is not None:
            _collect_lines(node, "", lines)
        loaded = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        message = f"not valid YAML: {getattr(error, 'problem', None) or error}"
        raise RecipeError([Problem("", message, where)]) from error
    except (OmegaConfBaseException, RecursionError, ValueError) as error:
        raise RecipeError([Problem("", f"not valid YAML: {_first_line(error)}", str(path))]) from error
    if not isinstance(loaded, DictConfig) or not isinstance(node, yaml.MappingNode):
        raise RecipeError([Problem("", "a recipe must be a mapping of sections at its top level", str(path))])
    content = OmegaConf.to_container(loaded, resolve=False)
    source = Source(str(path), lines)
    refuse_interpolation(content, source)
    return typing.cast("dict[str, Any]", content), lines


def refuse_interpolation(content: Any, source: Source) -> None:
    """Raise a `RecipeError` for every ``${...}``: a recipe says what it means and computes nothing."""
    problems = Problems(source)

    def walk(value: Any, key: str) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                walk(inner, join(key, str(name)))
        elif isinstance(value, list):
            for place, inner in enumerate(value):
                walk(inner, f"{key}[{place}]")
        elif isinstance(value, str) and "${" in value:
            problems.add(key, f"interpolation is not supported in recipes, got {value!r}; write the value itself")

    walk(content, "")
    problems.raise_if_any()


def join(key: str, name: str) -> str:
    """Extend a key path."""
    return f"{key}.{name}" if key else name


def unknown_key(name: str, known: typing.Iterable[str], what: str) -> str:
    """Say that a key does not exist, what was perhaps meant, and what does exist."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    guess = f"; did you mean {close[0]!r}?" if close else ""
    listing = ", ".join(names) if names else "no keys"
    return f"unknown key {name!r}{guess} ({what} takes: {listing})"


def public_fields(cls: type) -> list[dataclasses.Field[Any]]:
    """Fields of a dataclass that a recipe may set."""
    return [f for f in dataclasses.fields(cls) if not f.metadata.get("internal")]


def read_dataclass(
    cls: type,
    raw: Any,
    key: str,
    problems: Problems,
    what: str,
    internal: Mapping[str, Any] | None = None,
) -> Any:
    """Read plain containers into a frozen dataclass.

    Args:
        cls: The dataclass; fields may be dataclasses, `Slot`, lists of `Slot`, or types OmegaConf supports.
        raw: What the YAML holds.
        key: Key path of `raw`.
        problems: Takes every problem.
        what: Name of the thing in messages, for example ``section train``.
        internal: Values of fields that a recipe does not set.

    Returns:
        The instance, or None where there were problems.
    """
    before = len(problems.found)
    if not isinstance(raw, Mapping):
        problems.add(key, f"{what} must be a mapping, got {raw!r}")
        return None
    fields = {f.name: f for f in public_fields(cls)}
    hints = typing.get_type_hints(cls)
    base = OmegaConf.structured(_leaf_schema(cls, hints))
    values: dict[str, Any] = dict(internal or {})
    for name in raw:
        if name not in fields:
            problems.add(join(key, str(name)), unknown_key(str(name), fields, what))
    for name, spec in fields.items():
        place = join(key, name)
        if name not in raw:
            if spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
                problems.add(key, f"{what} lacks the key {name!r}{_help(spec)}")
            continue
        read = _reader(hints[name], spec, base)
        values[name] = read(raw[name], place, problems)
    if len(problems.found) > before:
        return None
    try:
        return cls(**values)
    except FieldError as error:
        problems.add(join(key, error.field) if error.field else key, error.message)
    except ValueError as error:
        problems.add(key, str(error))
    return None


def _reader(hint: Any, spec: dataclasses.Field[Any], base: DictConfig) -> Callable[[Any, str, Problems], Any]:
    inner, optional = _strip_optional(hint)

    def read(value: Any, key: str, problems: Problems) -> Any:
        if value is None and optional:
            return None
        if inner is Slot:
            return _read_slot(value, key, problems)
        if typing.get_origin(inner) is list and typing.get_args(inner) == (Slot,):
            if not isinstance(value, list):
                problems.add(key, f"must be a list of components, got {value!r}")
                return None
            return [_read_slot(item, f"{key}[{place}]", problems) for place, item in enumerate(value)]
        if dataclasses.is_dataclass(inner):
            return read_dataclass(typing.cast("type", inner), value, key, problems, f"section {key}")
        return _read_leaf(value, key, problems, spec, base, inner)

    return read


def _read_slot(value: Any, key: str, problems: Problems) -> Slot | None:
    if not isinstance(value, Mapping):
        problems.add(key, f"must name a component as {{name: ..., params: {{...}}}}, got {value!r}")
        return None
    for name in value:
        if name not in ("name", "params"):
            problems.add(join(key, str(name)), unknown_key(str(name), ("name", "params"), "a component"))
    name, params = value.get("name"), value.get("params")
    if not isinstance(name, str):
        problems.add(key, f"lacks the name of a component, got {name!r}")
        return None
    if params is not None and not isinstance(params, Mapping):
        problems.add(join(key, "params"), f"must be a mapping, got {params!r}")
        return None
    return Slot(name=name, params=dict(params or {}))


def _read_leaf(
    value: Any, key: str, problems: Problems, spec: dataclasses.Field[Any], base: DictConfig, hint: Any
) -> Any:
    try:
        merged: Any = OmegaConf.merge(base, {spec.name: value})
        typed = merged[spec.name]
    except OmegaConfBaseException as error:
        problems.add(key, f"{_lower(_first_line(error))}{_help(spec)}")
        return None
    except TypeError:  # OmegaConf's for a mapping where a list is wanted, and the other way round
        problems.add(key, f"is a list where a mapping is wanted, or the other way round, got {value!r}{_help(spec)}")
        return None
    if isinstance(typed, DictConfig | ListConfig):
        typed = OmegaConf.to_container(typed)
    if isinstance(typed, list) and _nested(typed) and not any(map(typing.get_origin, typing.get_args(hint))):
        # OmegaConf looks at the types of values within a list, and not at lists within it.
        problems.add(key, f"must be a list of single values, got {value!r}{_help(spec)}")
        return None
    if isinstance(typed, float) and not _finite(typed):
        problems.add(key, f"must be a finite number, got {value!r}")
        return None
    broken = bound_problem(typed, spec.metadata)
    if broken:
        problems.add(key, f"{broken}{_help(spec)}")
    return typed


def _leaf_schema(cls: type, hints: Mapping[str, Any]) -> type:
    """A dataclass with the leaf fields alone, which OmegaConf converts; all of them optional to give."""
    leaves: list[Any] = []
    for spec in public_fields(cls):
        inner, _ = _strip_optional(hints[spec.name])
        slots = typing.get_origin(inner) is list and typing.get_args(inner) == (Slot,)
        if inner is Slot or slots or dataclasses.is_dataclass(inner):
            continue
        leaves.append((spec.name, hints[spec.name], field(default=typing.cast("Any", "???"))))
    return dataclasses.make_dataclass(cls.__name__, leaves)


def _strip_optional(hint: Any) -> tuple[Any, bool]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [part for part in typing.get_args(hint) if part is not type(None)]
        if len(rest) == 1:
            return rest[0], True
    return hint, False


def _nested(values: list[Any]) -> bool:
    return any(isinstance(value, list | dict) for value in values)


def _finite(value: float) -> bool:
    return value == value and value not in (float("inf"), float("-inf"))


def _collect_lines(node: yaml.Node, key: str, lines: dict[str, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            place = join(key, str(name.value))
            lines[place] = name.start_mark.line + 1
            _collect_lines(value, place, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            place = f"{key}[{index}]"
            lines[place] = value.start_mark.line + 1
            _collect_lines(value, place, lines)


def _help(spec: dataclasses.Field[Any]) -> str:
    text = spec.metadata.get("help")
    return f" ({spec.name}: {text})" if text else ""


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
