"""The plugin door: every collision and failure is one error that names plugin, package and version."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import EntryPoint, PathDistribution
from pathlib import Path

import pytest
from helpers import ROOT, environment

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
CONFIG = """
class Mine(Flat):
    @dataclass(frozen=True, kw_only=True)
    class Config:
        {field}

    def __init__(self, config{arguments}):
        pass
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
    "exit at import": ("raise SystemExit(3)", ["cannot be imported", "SystemExit: 3"]),
    "exit in register": (
        HEAD + "@hookimpl\ndef dmmd_register(registry):\n    raise SystemExit\n", ["dmmd_register: SystemExit;"]
    ),
    "failure of several lines": ("raise RuntimeError('one\\ntwo')", ["RuntimeError: one two"]),
    "marked function that is no hook": (GOOD + "@hookimpl\ndef lunch(run): pass\n", ["unknown hook 'lunch'"]),
    "types that cannot be read": (
        _registering('"schedule", "flat", Mine', CONFIG.format(field="a: 'Tensor' = 1", arguments="")),
        ["the types of Mine.Config cannot be read", "'Tensor'"],
    ),
    "slot of an unknown kind": (
        _registering(
            '"schedule", "flat", Mine',
            CONFIG.format(field="a: Slot = slot('shedule', 'flat', help='')", arguments=", *, a"),
        ),
        ["slot 'a' is of unknown kind 'shedule'", "schedule"],
    ),
    "slot that nobody takes": (
        _registering(
            '"schedule", "flat", Mine',
            CONFIG.format(field="a: Slot = slot('schedule', 'flat', help='')", arguments=""),
        ),
        ["does not take the slot a"],
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


def test_one_module_under_two_names_is_refused(shop: Shop) -> None:
    shop.add("one", GOOD)
    other = EntryPoint("two", shop.entries[0].value, GROUP)
    vars(other).update(dist=vars(shop.entries[0])["dist"])
    with pytest.raises(PluginError, match=r"plugin 'two' of package one-package 1\.2.*same object as plugin 'one'"):
        load_plugins([*shop.entries, other])


def test_the_command_line_shows_one_line_and_the_way_out(tmp_path: Path) -> None:
    info = tmp_path / "broken_package-3.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-package\nVersion: 3.1\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nbroken = broken_module\n")
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('of no use')\n")

    def plugins(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "dmmd_core", "--plugins"],
            env=environment(PYTHONPATH=str(tmp_path), **more),
            capture_output=True,
            text=True,
            check=False,
        )

    done = plugins()
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for word in ("'broken'", "broken-package 3.1", "of no use", "DMMD_DISABLE_PLUGINS=broken"):
        assert word in done.stderr
    done = plugins(DMMD_DISABLE_PLUGINS="broken")
    assert done.returncode == 0, done.stderr
    assert "broken" not in done.stdout


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


def test_the_installed_registry_holds_every_component_of_the_tree() -> None:
    written = set()
    for path in (ROOT / "plugins").glob("*/plugin.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add":
                written.add(tuple(ast.literal_eval(argument) for argument in node.args[:2]))
    registry = load_plugins()
    assert {(entry.kind, entry.name) for entry in registry if entry.provider.package == "dmmd"} == written
    assert {kind for kind, _ in written} == set(KINDS)
    folders = {path.parent.name.removeprefix("dmmd_") for path in (ROOT / "plugins").glob("*/plugin.py")}
    assert {provider.plugin for provider in registry.providers if provider.package == "dmmd"} == folders
    with pytest.raises(KeyError, match=r"no process named 'maskd'.*did you mean 'masked'"):
        registry.get("process", "maskd")


def test_the_registry_is_frozen(shop: Shop) -> None:
    keeping = HEAD + "kept = []\n@hookimpl\ndef dmmd_register(registry):\n    kept.append((registry, Flat))\n"
    shop.add("late", keeping)
    registry = load_plugins(shop.entries)
    registrar, component = sys.modules[shop.entries[0].value].kept[0]
    with pytest.raises(PluginError, match=r"'late' of package late-package 1\.2.*never later"):
        registrar.add("schedule", "flat", component)
    assert list(registry) == []
    assert not hasattr(registry, "add")
    for name in ("providers", "hooks"):
        with pytest.raises(AttributeError):
            setattr(registry, name, ())
    listed = registry.names("schedule")
    listed.append("flat")
    assert registry.names("schedule") == []


def test_observers_may_add_problems_to_a_recipe(shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
