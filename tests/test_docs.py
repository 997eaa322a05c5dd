"""The documentation keeps step with the code."""

from __future__ import annotations

import dataclasses
import importlib
import re
from typing import Any

import pytest
from helpers import ROOT

from dmmd_core import hookspecs, recipe
from dmmd_core.offers import OFFERS

DOCS = ROOT / "docs"


def _text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def _rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_every_function_and_test_of_the_mathematics_exists() -> None:
    rows = [row for row in _rows(_text("maths.md")) if len(row) == 3 and "`tests/" in row[2]]
    assert len(rows) > 15
    for _, functions, tests in rows:
        for path in re.findall(r"`([\w.]+)`", functions):
            parts = path.split(".")
            found: Any = None
            for cut in range(len(parts), 0, -1):
                try:
                    found = importlib.import_module(".".join(parts[:cut]))
                except ModuleNotFoundError:
                    continue
                for name in parts[cut:]:
                    found = getattr(found, name)
                break
            assert callable(found), path
        for path in re.findall(r"`(tests/[^`]+)`", tests):
            file, name = path.split("::")
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), path


def test_every_key_of_a_recipe_is_explained() -> None:
    text = _text("recipes.md")
    classes = [value for value in vars(recipe).values() if dataclasses.is_dataclass(value)]
    sections = [cls for cls in classes if cls.__module__ == recipe.__name__]
    assert len(sections) > 5
    for section in sections:
        for field in dataclasses.fields(section):
            if field.metadata.get("internal"):
                continue
            assert re.search(rf"[`.]{field.name}[`.]", text), f"{section.__name__}.{field.name}"


def test_offers_and_hooks_are_those_of_the_code() -> None:
    rows = _rows(_text("write_a_plugin.md"))
    told = {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[1])) for row in rows if row[0].strip("`") in OFFERS}
    assert told == {kind: set(names) for kind, names in OFFERS.items()}
    hooks = {row[0].strip("`") for row in rows if row[0].startswith("`dmmd_")}
    assert hooks == {name for name in vars(hookspecs) if name.startswith("dmmd_")}


def test_every_core_module_has_its_room_in_the_architecture() -> None:
    text = _text("architecture.md")
    for path in (ROOT / "dmmd_core").glob("*.py"):
        if not path.name.startswith("__"):
            assert path.name in text, path.name
    for path in (ROOT / "plugins").glob("dmmd_*"):
        assert path.name in text, path.name


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_code_runs_and_commands_name_recipes_that_exist(page: str) -> None:
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", _text(page), flags=re.DOTALL):
        exec(block, namespace)
    for name in re.findall(r"^dmmd-run (\S+\.yaml)", _text(page), flags=re.MULTILINE):
        assert (ROOT / name).exists(), name
