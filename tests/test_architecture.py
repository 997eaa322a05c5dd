"""Import directions, and a core that names nothing concrete."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

from dmmd_core import load_plugins

CORE = sorted((ROOT / "dmmd_core").rglob("*.py"))
PLUGINS = sorted((ROOT / "plugins").rglob("*.py"))
HEAVY = {"xformers", "datasets", "torchvision", "transformers", "diffusers", "matplotlib", "sklearn", "PIL", "jinja2"}

# Every module may import from its own floor's list and no other part of the core (type checking apart).
BASE = {"errors", "draws", "interfaces"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "draws": set(),
    "interfaces": BASE,
    "offers": set(),
    "hookspecs": set(),
    "loss": BASE,
    "shaping": BASE,
    "registry": BASE | {"offers"},
    "plugins": {"errors", "hookspecs", "registry"},
    "schema": BASE,
    "recipe": BASE | {"schema"},
    "resolve": BASE | {"schema", "recipe", "registry"},
    "assemble": BASE | {"schema", "resolve"},
    "checkpoint": {"errors"},
    "distributed": {"errors"},
    "ema": set(),
    "precision": BASE,
    "optim": BASE | {"recipe"},
    "media": {"interfaces"},
    "smoke": BASE | {"resolve"},
    "listing": BASE | {"registry"},
    "saved": BASE | {"assemble", "checkpoint", "plugins", "recipe", "registry", "resolve", "schema"},
    "train": BASE | {"checkpoint", "ema", "optim", "precision", "recipe"},
    "pipeline": BASE | {"assemble", "checkpoint", "distributed", "precision", "recipe", "registry", "resolve", "saved"}
    | {"schema", "train"},
    "cli": {"errors", "listing", "media", "pipeline", "plugins", "precision", "recipe", "resolve", "saved", "smoke"},
}  # fmt: skip


def _outside_type_checking(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        yield node
        yield from _outside_type_checking(node)


def _imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else _outside_type_checking(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            if node.module == "dmmd_core":
                found |= {f"dmmd_core.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_core_imports_go_one_way(path: Path) -> None:
    room = path.relative_to(ROOT / "dmmd_core").parts[0].removesuffix(".py")
    imported = {name.split(".")[1] for name in _imports(path) if name.startswith("dmmd_core.")}
    if room.startswith("__"):
        return  # the public names, and the entry of python -m
    assert imported - {room} <= ALLOWED[room], f"{path.name} imports {imported - ALLOWED[room]}"


def test_every_room_of_the_core_is_in_the_table() -> None:
    rooms = {path.relative_to(ROOT / "dmmd_core").parts[0].removesuffix(".py") for path in CORE}
    assert {room for room in rooms if not room.startswith("__")} == set(ALLOWED)


@pytest.mark.parametrize("path", CORE + PLUGINS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_heavy_library_is_imported_with_a_module(path: Path) -> None:
    assert not {name.split(".")[0] for name in _imports(path, top_level_only=True)} & HEAVY


def test_core_never_imports_a_plugin_and_plugins_never_import_each_other() -> None:
    packages = {path.name for path in (ROOT / "plugins").iterdir() if path.is_dir()}
    for path in CORE:
        assert not {name.split(".")[0] for name in _imports(path)} & packages, path
    for path in PLUGINS:
        own = path.relative_to(ROOT / "plugins").parts[0]
        others = {name.split(".")[0] for name in _imports(path)} & packages - {own}
        assert not others, f"{path} imports {others}"


def test_plugins_use_public_names_of_the_core() -> None:
    # Two helpers for writing files and pictures are shared by observers and are named here on purpose.
    allowed = {"dmmd_core.checkpoint", "dmmd_core.media"}
    for path in PLUGINS:
        modules = {name for name in _imports(path) if name.startswith("dmmd_core.")}
        deep = {name for name in modules if name.split(".")[1][0].islower() and name.count(".") == 1}
        names = {name for name in deep if (ROOT / "dmmd_core" / f"{name.split('.')[1]}.py").exists()}
        assert names <= allowed, f"{path} imports {names - allowed}"


def _docstrings(tree: ast.AST) -> set[int]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                found.add(id(first.value))
    return found


# Words that are also names of components, each with another meaning in the core.
OTHER_MEANINGS = {"linear", "cosine"}  # how the learning rate falls: recipe.py, optim.py


def test_core_names_no_component() -> None:
    names = {entry.name for entry in load_plugins()} - OTHER_MEANINGS
    for path in CORE:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = _docstrings(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                assert node.value not in names, f"{path.name}:{node.lineno} names the component {node.value!r}"
