"""Tables for the terminal: what is installed, and what a recipe would build."""

from __future__ import annotations

import dataclasses
import typing
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from dmmd_core.interfaces.component import KINDS, Slot
from dmmd_core.registry import Entry, Registry

if TYPE_CHECKING:
    from dmmd_core.pipeline import Run


def print_plugins(registry: Registry) -> None:
    """Print every component by kind: name, what it is, provider and version, and its parameters with defaults."""
    console = Console(highlight=False)
    for kind in KINDS:
        entries = [entry for entry in registry if entry.kind == kind]
        if not entries:
            continue
        console.print(f"[bold]{kind}[/bold]")
        for entry in entries:
            provider = f"{entry.provider.package} {entry.provider.version}, plugin {entry.provider.plugin}"
            console.print(f"  [bold cyan]{entry.name}[/bold cyan]  ({provider})")
            console.print(Padding(escape(_summary(entry)), (0, 0, 0, 4)))
            table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
            for row in _parameters(entry):
                table.add_row(*map(escape, row))
            if table.row_count:
                console.print(Padding(table, (0, 0, 0, 6)))
        console.print()
    listing = ", ".join(f"{p.plugin} ({p.package} {p.version})" for p in registry.providers)
    console.print(f"plugins: {listing}")


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


def _summary(entry: Entry) -> str:
    return (entry.cls.__doc__ or "").strip().split("\n")[0]


def _parameters(entry: Entry) -> list[tuple[str, str, str]]:
    hints = typing.get_type_hints(entry.cls.Config)
    rows = []
    for spec in dataclasses.fields(entry.cls.Config):
        kind = f"<{spec.metadata['slot']}>" if "slot" in spec.metadata else _type_name(hints[spec.name])
        rows.append((spec.name, f"{kind}{_default(spec)}", spec.metadata.get("help", "")))
    return rows


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _default(spec: dataclasses.Field[Any]) -> str:
    value: Any
    if spec.default is not dataclasses.MISSING:
        value = spec.default
    elif spec.default_factory is not dataclasses.MISSING:
        value = spec.default_factory()
    else:
        return ""
    return f" = {value.name if isinstance(value, Slot) else value}"
