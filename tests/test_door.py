"""The plugin door: every collision and failure is one error that names plugin, package and version."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, PathDistribution
from pathlib import Path

import pytest

from dmmd_core import KINDS, PluginError, load_plugins
from dmmd_core.plugins import GROUP

HEAD = """
from dataclasses import dataclass
from dmmd_core import Schedule, Slot, hookimpl, option, slot

class Flat(Schedule):
    def __init__(self, config):
        pass
    def alpha(self, t):
        return 1 - t
    def alpha_prime(self, t):
        return -1 + 0 * t
"""
REGISTER = """
@hookimpl
def dmmd_register(registry):
    registry.add({arguments})
"""


class Shop:
    """Makes packages with entry points in a folder on the path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: list[EntryPoint] = []

    def add(self, plugin: str, code: str, package: str = "", version: str = "1.2") -> None:
        """Write a module and the metadata of the distribution that carries it."""
        package = package or f"{plugin}-package"
        module = f"shop_{self.folder.name}_{package}_{plugin}".replace("-", "_")
        (self.folder / f"{module}.py").write_text(code)
        info = self.folder / f"{package}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        entry = EntryPoint(plugin, module, GROUP)
        vars(entry).update(dist=PathDistribution(info))
        self.entries.append(entry)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    monkeypatch.syspath_prepend(str(tmp_path))
    return Shop(tmp_path)


def _registering(arguments: str, more: str = "") -> str:
    return HEAD + more + REGISTER.format(arguments=arguments)


GOOD = _registering('"schedule", "flat", Flat')


def test_a_good_plugin_is_listed_with_its_provider(shop: Shop) -> None:
    shop.add("good", GOOD)
    registry = load_plugins(shop.entries)
    entry = registry.get("schedule", "flat")
    assert str(entry.provider) == "plugin 'good' of package good-package 1.2"
    assert registry.names("schedule") == ["flat"]


BAD = {
    "import failure": ("import no_such_module_at_all", ["cannot be imported", "ModuleNotFoundError"]),
    "failing register": (HEAD + "@hookimpl\ndef dmmd_register(registry):\n    1 / 0\n", ["ZeroDivisionError"]),
    "missing method": (
        _registering('"schedule", "lazy", Lazy', "class Lazy(Schedule):\n    def __init__(self, config): pass\n"),
        ["lacks the methods alpha, alpha_prime"],
    ),
    "unknown hook": (GOOD + "@hookimpl\ndef dmmd_after_lunch(run): pass\n", ["unknown hook 'dmmd_after_lunch'"]),
    "unmarked hook": (GOOD + "def dmmd_after_run(run, error): pass\n", ["lacks the decorator"]),
    "wrong argument": (GOOD + "@hookimpl\ndef dmmd_after_run(run, mistake): pass\n", ["does not fit the hooks"]),
    "no hook": ("x = 1\n", ["implements no hook"]),
    "unknown kind": (_registering('"shedule", "flat", Flat'), ["unknown kind", "schedule"]),
    "bad name": (_registering('"schedule", "Flat-1", Flat'), ["lower case"]),
    "wrong interface": (_registering('"process", "flat", Flat'), ["not a subclass of dmmd_core.Process"]),
    "no class": (_registering('"schedule", "flat", 3'), ["not a subclass of dmmd_core.Schedule"]),
    "config not frozen": (
        _registering(
            '"schedule", "flat", Mine', "class Mine(Flat):\n    @dataclass\n    class Config:\n        a: int = 1\n"
        ),
        ["frozen=True, kw_only=True"],
    ),
    "config no dataclass": (
        _registering('"schedule", "flat", Mine', "class Mine(Flat):\n    class Config: pass\n"),
        ["must be a dataclass"],
    ),
    "asks for too much": (
        _registering('"schedule", "flat", Mine', "class Mine(Flat):\n    def __init__(self, config, *, moon): pass\n"),
        ["asks for 'moon'"],
    ),
    "takes anything": (
        _registering('"schedule", "flat", Mine', "class Mine(Flat):\n    def __init__(self, config, **more): pass\n"),
        ["name its arguments"],
    ),
    "no config": (
        _registering('"schedule", "flat", Mine', "class Mine(Flat):\n    def __init__(self): pass\n"),
        ["must take 'config' first"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_plugin_is_one_error_that_names_it(name: str, shop: Shop) -> None:
    code, words = BAD[name]
    shop.add("bad", code)
    with pytest.raises(PluginError) as caught:
        load_plugins(shop.entries)
    message = str(caught.value)
    for word in ["'bad'", "bad-package", "1.2", *words]:
        assert word in message, message
    assert "\n" not in message


def test_two_plugins_of_one_name_are_refused(shop: Shop) -> None:
    shop.add("same", GOOD, "first-package")
    shop.add("same", GOOD, "second-package", "2.0")
    with pytest.raises(PluginError, match=r"two plugins are named 'same'.*first-package 1\.2.*second-package 2\.0"):
        load_plugins(shop.entries)


def test_two_providers_of_one_component_are_refused(shop: Shop) -> None:
    shop.add("first", GOOD)
    shop.add("second", GOOD, version="2.0")
    with pytest.raises(PluginError) as caught:
        load_plugins(shop.entries)
    for word in ("'second'", "second-package 2.0", "'first'", "first-package 1.2", "schedule 'flat'"):
        assert word in str(caught.value)


def test_a_disabled_plugin_is_not_even_imported(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.add("good", GOOD)
    shop.add("bad", "raise RuntimeError('imported')")
    monkeypatch.setenv("DMMD_DISABLE_PLUGINS", "bad")
    registry = load_plugins(shop.entries)
    assert [provider.plugin for provider in registry.providers] == ["good"]
    assert shop.entries[0].value in sys.modules
    assert shop.entries[1].value not in sys.modules


def test_disabling_something_unknown_is_an_error(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.add("good", GOOD)
    monkeypatch.setenv("DMMD_DISABLE_PLUGINS", "god")
    with pytest.raises(PluginError, match=r"unknown plugins: god \(installed: good\)"):
        load_plugins(shop.entries)


def test_the_installed_registry_is_whole_and_frozen() -> None:
    registry = load_plugins()
    assert {entry.kind for entry in registry} == set(KINDS)
    for kind, name in [("process", "masked"), ("objective", "moment_matching"), ("teacher", "exact")]:
        assert registry.get(kind, name).provider.package == "dmmd"
    assert not hasattr(registry, "add")
    with pytest.raises(KeyError, match=r"no process named 'maskd'.*did you mean 'masked'"):
        registry.get("process", "maskd")


def test_observers_may_add_problems_to_a_recipe(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from helpers import tiny_recipe

    from dmmd_core import RecipeError
    from dmmd_core.resolve import resolve
    from dmmd_core.saved import recipe_from_plain

    code = (
        "from dmmd_core import Problem, hookimpl\n"
        "@hookimpl\n"
        "def dmmd_check_recipe(recipe):\n"
        "    return [Problem('name', 'is taken')] if recipe.name == 'tiny' else []\n"
    )
    shop.add("observer", code)
    from importlib.metadata import entry_points

    registry = load_plugins([*entry_points(group=GROUP), *shop.entries])
    with pytest.raises(RecipeError, match="name: is taken"):
        resolve(recipe_from_plain(tiny_recipe(tmp_path), "recipe"), registry)
