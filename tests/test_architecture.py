"""Import directions, and a core that names nothing concrete."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from helpers import ROOT

from dmmd_core import load_plugins

CORE = sorted((ROOT / "dmmd_core").rglob("*.py"))
PLUGINS = sorted((ROOT / "plugins").rglob("*.py"))
HEAVY = {"xformers", "datasets", "torchvision", "transformers", "diffusers", "matplotlib", "sklearn", "PIL", "jinja2"}
HEAVY |= {"tensorboard", "wandb"}

# Every module may import from its own floor's list and no other part of the core (type checking apart).
BASE = {"errors", "draws", "interfaces"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "draws": set(),
    "interfaces": BASE,
    "offers": set(),
    "blocks": BASE,
    "hookspecs": set(),
    "gradients": set(),
    "hub": {"errors"},
    "card": set(),
    "loss": BASE | {"gradients"},
    "shaping": BASE,
    "registry": BASE | {"offers"},
    "plugins": {"errors", "hookspecs", "registry"},
    "schema": BASE,
    "recipe": BASE | {"schema"},
    "resolve": BASE | {"schema", "recipe", "registry"},
    "assemble": BASE | {"schema", "resolve"},
    "checkpoint": {"distributed", "errors"},
    "compilation": BASE,
    "distributed": {"errors"},
    "sharding": BASE | {"compilation"},
    "ema": set(),
    "progress": set(),
    "usage": set(),
    "profiling": {"checkpoint"},
    "precision": BASE,
    "optim": BASE | {"recipe"},
    "media": {"interfaces"},
    "records": {"checkpoint", "errors", "recipe", "saved", "schema"},
    "soundness": BASE,
    "smoke": BASE | {"records", "resolve"},
    "agenda": {"checkpoint", "records", "resolve"},
    "shipped": {"errors"},
    "listing": BASE | {"agenda", "registry"},
    "saved": BASE | {"assemble", "card", "checkpoint", "distributed", "hub", "plugins", "recipe", "registry", "resolve"}
    | {"schema", "shaping", "sharding"},
    "train": BASE | {"checkpoint", "compilation", "distributed", "ema", "optim", "precision", "recipe", "sharding"}
    | {"soundness", "usage"},
    "pipeline": BASE | {"assemble", "checkpoint", "compilation", "distributed", "precision", "recipe", "registry"}
    | {"media", "profiling", "records", "resolve", "saved", "soundness"}
    | {"train"},
    "api": {"errors", "pipeline", "plugins", "recipe", "records", "registry", "resolve", "smoke"},
    "testing": BASE | {"assemble", "plugins", "registry", "resolve", "schema"},
    "cli": {"agenda", "api", "errors", "listing", "media", "pipeline", "plugins", "precision", "recipe", "resolve"}
    | {"saved", "shipped", "testing"},
}  # fmt: skip


def _outside_type_checking(tree: ast.AST, functions: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        if not functions and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield node
        yield from _outside_type_checking(node, functions)


def _imports(path: Path, functions: bool = True) -> set[str]:
    """Modules that a file imports, with those inside functions or without; type checking apart."""
    found = set()
    for node in _outside_type_checking(ast.parse(path.read_text(encoding="utf-8")), functions):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}:{node.lineno} is a relative import"
            deeper = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in deeper if name in MODULES} or {str(node.module)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path) for path in CORE}


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_core_imports_go_one_way(path: Path) -> None:
    room = path.relative_to(ROOT / "dmmd_core").parts[0].removesuffix(".py")
    imported = {name.split(".")[1] for name in _imports(path) if name.startswith("dmmd_core.")}
    if room.startswith("__"):
        return  # the public names, and the entry of python -m
    assert imported - {room} <= ALLOWED[room], f"{path.name} imports {imported - ALLOWED[room]}"


def test_no_import_of_the_core_leads_back_to_itself() -> None:
    graph = {_module(path): _imports(path) & MODULES - {"dmmd_core"} for path in CORE}
    assert sum(map(len, graph.values())) > 100
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_every_room_of_the_core_is_in_the_table() -> None:
    rooms = {path.relative_to(ROOT / "dmmd_core").parts[0].removesuffix(".py") for path in CORE}
    assert {room for room in rooms if not room.startswith("__")} == set(ALLOWED)


@pytest.mark.parametrize("path", CORE + PLUGINS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_heavy_library_is_imported_with_a_module(path: Path) -> None:
    assert not {name.split(".")[0] for name in _imports(path, functions=False)} & HEAVY


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
    allowed = {"dmmd_core", "dmmd_core.checkpoint", "dmmd_core.media"}
    for path in PLUGINS:
        inner = {name for name in _imports(path) if name.split(".")[0] == "dmmd_core"}
        assert inner <= allowed, f"{path} imports {inner - allowed}"


def _docstrings(tree: ast.AST) -> set[int]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                found.add(id(first.value))
    return found


# Words that are also names of components, each with another meaning in the core.
OTHER_MEANINGS = {
    ("card", "text"): "what tokens stand for",
    ("cli", "text"): "what a prompt is",
    ("codec", "text"): "what tokens stand for",
    ("saved", "text"): "what tokens stand for",
    ("worlds", "text"): "a capability",
    ("data", "text"): "what tokens stand for",
    ("recipe", "linear"): "how the learning rate falls",
    ("recipe", "cosine"): "how the learning rate falls",
    ("optim", "linear"): "how the learning rate falls",
    ("optim", "cosine"): "how the learning rate falls",
    ("registry", "digits"): "what the name of a component may consist of",
}


def test_core_names_no_component() -> None:
    names = {entry.name for entry in load_plugins()}
    assert {"masked", "uniform", "transformer", "digits", "moment_matching", "ancestral", "exact"} <= names
    found = set()
    for path in CORE:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = _docstrings(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found |= {(path.stem, name) for name in names & set(re.findall(r"[A-Za-z_]\w*", node.value))}
    assert found - set(OTHER_MEANINGS) == set(), "the core names components"
    assert set(OTHER_MEANINGS) <= found, "the table of exceptions names something that is not there"
