"""The documentation keeps step with the code."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from helpers import ROOT

from dmmd_core import PluginRegistrar, cli, hookspecs, load_plugins, recipe
from dmmd_core.offers import OFFERS
from dmmd_core.registry import Entry, Provider

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


def _keys(section: type, prefix: str, *, without: type | None = None) -> dict[str, Any]:
    """Key paths of a section of the recipe and their defaults; MISSING where a recipe must say."""
    hints = typing.get_type_hints(section)
    skipped = {field.name for field in dataclasses.fields(without)} if without else set()
    found: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        if field.metadata.get("internal") or field.name in skipped:
            continue
        key = f"{prefix}{field.name}"
        inner = [kind for kind in (hints[field.name], *typing.get_args(hints[field.name])) if kind in SECTIONS]
        if not inner:
            factory = field.default_factory
            found[key] = field.default if factory is dataclasses.MISSING else factory()
        elif inner[0] is recipe.TrainSection:
            found[key] = field.default
        else:
            if field.default is None:
                found[key] = None
            training = issubclass(inner[0], recipe.TrainSection)
            found |= _keys(inner[0], f"{key}.", without=recipe.TrainSection if training else None)
    return found


SECTIONS = {value for value in vars(recipe).values() if isinstance(value, type) and value.__module__ == recipe.__name__}


def test_every_key_of_a_recipe_is_explained_with_its_default() -> None:
    told: dict[str, Any] = {}
    for keys, defaults, meaning in (row for row in _rows(_text("recipes.md")) if row[0].startswith("`")):
        names = re.findall(r"`([^`]+)`", keys)
        values = yaml.safe_load(f"[{defaults.replace('`', '')}]") or [dataclasses.MISSING] * len(names)
        assert meaning
        assert not told.keys() & set(names)
        told |= dict(zip(names, values, strict=True))
    wanted = _keys(recipe.Recipe, "") | _keys(recipe.TrainSection, "")
    assert len(wanted) > 30
    assert told.keys() == wanted.keys()
    for key, value in wanted.items():
        number = isinstance(value, int | float)
        assert (float(told[key]) if number else told[key]) == value, key


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


def test_the_picture_of_the_import_directions_is_true() -> None:
    lines = re.findall(r"^  (\S+) --> (.+)$", _text("architecture.md"), flags=re.MULTILINE)
    arrows = {(start, end) for start, ends in lines for end in ends.split(" & ")}
    assert len(arrows) > 20
    for start, end in arrows:
        place = ROOT / "dmmd_core" / start.removesuffix(".py")
        files = list(place.glob("*.py")) or [place.with_suffix(".py")]
        code = "\n".join(file.read_text(encoding="utf-8") for file in files)
        module = end.removesuffix(".py")
        imports = rf"from dmmd_core\.{module}[. ]|from dmmd_core import .*\b{module}\b"
        assert re.search(imports, code), f"{start} does not import {end}"


def test_every_capability_is_in_the_table() -> None:
    rows = _rows(_text("architecture.md"))
    names = {name for row in rows if len(row) == 3 for name in re.findall(r"`(\w+)`", row[0])}
    for entry in load_plugins():
        for capability in entry.cls.provides(entry.cls.Config()) if _has_defaults(entry.cls.Config) else ():
            assert capability in names, f"{entry.kind} {entry.name}: {capability}"


def _has_defaults(config: type) -> bool:
    return all(
        field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        for field in dataclasses.fields(config)
    )


PAGES = sorted(DOCS.glob("*.md")) + sorted(ROOT.glob("examples/**/README.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("examples", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(block, namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_understood_and_their_recipes_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_guard", lambda work: 0)  # parse, and do nothing
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for name, rest in re.findall(r"(?:^|`)(dmmd-run|dmmd-sample) ([^`#\n]+)", text, flags=re.MULTILINE):
        words = shlex.split(rest)
        if "--help" in words:
            continue
        assert {"dmmd-run": cli.run_command, "dmmd-sample": cli.sample_command}[name](words) == 0
        for word in words:
            if word.endswith(".yaml") and "=" not in word and f'title="{word.removeprefix("./")}"' not in text:
                assert (ROOT / word).exists() or (page.parent / word).exists(), word


def _commands(page: str) -> list[str]:
    text = _text(page).replace("\\\n", " ")
    return re.findall(r"^dmmd-run (.+)$", text, flags=re.MULTILINE)


@pytest.mark.parametrize("command", _commands("images.md"))
def test_commands_for_images_are_valid(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, *overrides = shlex.split(command)
    monkeypatch.chdir(tmp_path)
    assert cli.run_command([str(ROOT / recipe), *overrides, "--check"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_source_of_the_page_passes_the_door_and_gives_pictures() -> None:
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", _text("images.md"), flags=re.DOTALL):
        exec(block, namespace)
    entries: dict[tuple[str, str], Entry] = {}
    namespace["dmmd_register"](PluginRegistrar(Provider("page", "docs", "1.0"), entries))
    assert set(entries) == {("image_source", "squares")}
    source = namespace["Squares"](namespace["Squares"].Config())
    assert source.read("train", 7).image.getpixel((0, 0)) == 7
    assert {row[0].strip("`") for row in _rows(_text("images.md")) if row[0].startswith("`")} >= {
        *(entry.name for entry in load_plugins() if entry.kind == "image_source")
    }


def test_the_example_plugins_of_the_page_pass_the_door() -> None:
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", _text("write_a_plugin.md"), flags=re.DOTALL):
        exec(block, namespace)
    entries: dict[tuple[str, str], Entry] = {}
    registrar = PluginRegistrar(Provider("page", "docs", "1.0"), entries)
    namespace["dmmd_register"](registrar)
    registrar.add("metric", "repeats", namespace["Repeats"])
    assert set(entries) == {("schedule", "squared"), ("metric", "repeats")}
    schedule = namespace["Squared"](namespace["Squared"].Config())
    t = torch.linspace(0, 1, 11, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(schedule.alpha(t).sum(), t)
    assert schedule.alpha(t)[[0, -1]].tolist() == [1, 0]
    torch.testing.assert_close(slope[1:-1], schedule.alpha_prime(t)[1:-1])  # the clamp has none at its ends
    config = namespace["Repeats"].Config()
    tokens = torch.tensor([[0, 0, 1, 2], [3, 3, 3, 3]])
    values = namespace["Repeats"](config, length=4).evaluate(SimpleNamespace(tokens=tokens))
    assert [value.value for value in values] == [pytest.approx(4 / 6)]


def test_the_tests_that_the_page_on_reliability_names_are_there() -> None:
    """Every row names a test, and there is such a test."""
    first_table = (ROOT / "docs" / "reliability.md").read_text().split("\n## ")[0]
    rows = [line for line in first_table.splitlines() if line.startswith("| ")][2:]
    files = ("safety", "resume", "distributed", "fault_campaign")
    sources = "".join((ROOT / "tests" / f"test_{name}.py").read_text() for name in files)
    assert len(rows) >= 10
    for row in rows:
        (name,) = re.findall(r"`(test_\w+)` \|$", row)
        assert f"def {name}(" in sources
