"""Tables for the terminal: what is installed, and what a recipe would build."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from dmmd_core.agenda import Item
from dmmd_core.errors import PluginError
from dmmd_core.interfaces.component import KINDS, Slot
from dmmd_core.registry import Entry, Registry

if TYPE_CHECKING:
    from dmmd_core.pipeline import Run


_PLAIN_WIDTH = 140


def describe(entry: Entry) -> dict[str, Any]:
    """Everything worth knowing about a component, as plain containers."""
    provider = entry.provider
    return {
        "kind": entry.kind,
        "name": entry.name,
        "summary": _summary(entry),
        "provider": {"plugin": provider.plugin, "package": provider.package, "version": provider.version},
        "parameters": [
            {"name": name, "type": kind, "default": default, "mandatory": default is None, "help": meaning}
            for name, kind, default, meaning in _parameters(entry)
        ],
    }


def plugins_as_data(registry: Registry) -> dict[str, Any]:
    """Every plugin and component, as plain containers."""
    plugins = [{"plugin": p.plugin, "package": p.package, "version": p.version} for p in registry.providers]
    ordered = sorted(registry, key=lambda entry: KINDS.index(entry.kind))
    return {"plugins": plugins, "components": [describe(entry) for entry in ordered]}


def print_plugins(registry: Registry) -> None:
    """Print a table for every kind: component, parameters with type, default and meaning, provider and version."""
    console = _console()
    for kind in KINDS:
        entries = [entry for entry in registry if entry.kind == kind]
        if not entries:
            continue
        table = _table(f"[bold]{kind}[/bold]", "component, parameter", "default", "meaning", "provider")
        for entry in entries:
            provider = f"{entry.provider.package} {entry.provider.version}, plugin {entry.provider.plugin}"
            table.add_row(f"[bold cyan]{entry.name}[/bold cyan]", "", escape(_summary(entry)), escape(provider))
            for name, kind_of_value, default, meaning in _parameters(entry):
                table.add_row(f"  {name}", escape(_shown(kind_of_value, default)), escape(meaning), "")
        console.print(table)
        console.print()
    listing = ", ".join(f"{p.plugin} ({p.package} {p.version})" for p in registry.providers)
    console.print(f"plugins: {listing}", markup=False)


def find_entries(registry: Registry, name: str) -> list[Entry]:
    """Components called ``name`` or ``kind:name``.

    Raises:
        PluginError: There is none; says what may have been meant.
    """
    kind, colon, rest = name.rpartition(":")
    found = [entry for entry in registry if entry.name == rest and (not colon or entry.kind == kind)]
    if not found:
        names = sorted({entry.name for entry in registry})
        close = difflib.get_close_matches(rest, names, n=1)
        guess = f"; did you mean {close[0]!r}?" if close else ""
        raise PluginError(f"no component {name!r} is installed{guess} (dmmd-run --plugins lists them)")
    return found


def explain_as_data(entry: Entry) -> dict[str, Any]:
    """What `print_explanation` tells, as plain containers."""
    told = describe(entry)
    told["documentation"] = inspect.getdoc(entry.cls) or ""
    told["class"] = f"{entry.cls.__module__}.{entry.cls.__qualname__}"
    if not any(parameter["mandatory"] for parameter in told["parameters"]):
        config = entry.cls.Config()
        told["provides"] = sorted(entry.cls.provides(config))
        told["requires"] = [dataclasses.asdict(need) for need in entry.cls.requires(config)]
    return told


def print_explanation(entry: Entry) -> None:
    """Print all about one component: documentation, parameters, capabilities, provider, and how to check it."""
    console, told = _console(), explain_as_data(entry)
    console.print(f"[bold]{entry.kind} [cyan]{entry.name}[/cyan][/bold]")
    console.print(Padding(escape(told["documentation"]), (0, 0, 1, 2)))
    if told["parameters"]:
        table = _table("parameters", "name", "default", "meaning")
        for name, kind, default, meaning in _parameters(entry):
            table.add_row(name, escape(_shown(kind, default)), escape(meaning))
        console.print(Padding(table, (0, 0, 1, 2)))
    lines = [f"provided by  {entry.provider}", f"class        {told['class']}"]
    if told.get("provides"):
        lines.append(f"can          {', '.join(told['provides'])}  (with its defaults)")
    lines += [
        f"needs        {need['capability']} of {need['role']}, {need['reason']}" for need in told.get("requires", ())
    ]
    lines.append(f"check        dmmd-run --conformance {entry.kind}:{entry.name}")
    for line in lines:
        console.print(Padding(escape(line), (0, 0, 0, 2)))


def print_agenda(items: Sequence[Item], directory: Path) -> None:
    """Print the stages of a run and how far each has come."""
    console = _console()
    table = _table(escape(str(directory)), "stage", "state", "", "work")
    for item in items:
        table.add_row(item.stage, item.state, escape(item.detail), escape(item.work))
    console.print(table)


def check_as_data(run: Run) -> dict[str, Any]:
    """What `print_check` tells, as plain containers."""
    assert run.assembly.spec is not None
    return {
        "recipe": run.plan.recipe.name,
        "data": dataclasses.asdict(run.assembly.spec),
        "num_inputs": run.assembly.process.num_inputs,
        "parameters": dict(run.sizes),
        "choices": dict(run.choices),
        "device": str(run.device),
        "precision": str(run.precision).removeprefix("torch."),
        "directory": str(run.directory),
    }


def print_check(run: Run) -> None:
    """Print what a run would build, without data or GPU."""
    console = Console()
    recipe, spec = run.plan.recipe, run.assembly.spec
    assert spec is not None
    table = Table(title=f"{recipe.name}: the recipe is valid", title_justify="left", show_header=False)
    classes = "without labels" if spec.num_classes is None else f"{spec.num_classes} classes"
    grid = "" if spec.grid is None else f", grid {' x '.join(map(str, spec.grid))}"
    table.add_row("data", f"{recipe.data.name}: {spec.length} tokens of {spec.vocab_size}{grid}, {classes}")
    table.add_row("process", f"{recipe.process.name}: {run.assembly.process.num_inputs} input ids")
    choices = "".join(f", {name} {value}" for name, value in run.choices.items())
    table.add_row("backbone", f"{recipe.backbone.name}: {run.sizes['teacher']:,} parameters{choices}")
    table.add_row("generator", f"{recipe.generator.name}: {run.sizes['student']:,} parameters")
    if recipe.teacher.train is not None:
        table.add_row("teacher", f"{recipe.teacher.train.steps:,} steps of {recipe.teacher.train.batch_size}")
    elif recipe.teacher.load is not None:
        table.add_row("teacher", f"loaded: {recipe.teacher.load.name}")
    distill = recipe.distill
    table.add_row("distill", f"{distill.steps:,} steps of {distill.batch_size}, for {distill.num_steps} sampling steps")
    table.add_row("device", f"{run.device}, {str(run.precision).removeprefix('torch.')}")
    table.add_row("directory", str(run.directory))
    console.print(table)


def _console() -> Console:
    """A console that is wide enough for tables where nobody has said how wide it is."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _PLAIN_WIDTH)
    return console


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, no_wrap=place == 0, overflow="fold")
    return table


def _summary(entry: Entry) -> str:
    return (entry.cls.__doc__ or "").strip().split("\n")[0]


def _parameters(entry: Entry) -> list[tuple[str, str, str | None, str]]:
    """Name, type, default as text (None where a recipe must say) and meaning of every parameter."""
    hints = typing.get_type_hints(entry.cls.Config)
    rows = []
    for spec in dataclasses.fields(entry.cls.Config):
        kind = f"<{spec.metadata['slot']}>" if "slot" in spec.metadata else _type_name(hints[spec.name])
        rows.append((spec.name, kind, _default(spec), spec.metadata.get("help", "")))
    return rows


def _shown(kind: str, default: str | None) -> str:
    return kind if default is None else f"{kind} = {default}"


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _default(spec: dataclasses.Field[Any]) -> str | None:
    value: Any
    if spec.default is not dataclasses.MISSING:
        value = spec.default
    elif spec.default_factory is not dataclasses.MISSING:
        value = spec.default_factory()
    else:
        return None
    return str(value.name if isinstance(value, Slot) else value)
