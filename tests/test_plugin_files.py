"""A plugin in a single file, and an in-tree component with one method changed, used without a package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import dmmd_run, tiny_recipe, write_recipe

from dmmd_core import PluginError, load_plugins, load_student
from dmmd_core.cli import run_command
from dmmd_core.testing import check_process

FORK = '''
"""Masked diffusion whose loss is weighted towards clean times."""

from __future__ import annotations

from dataclasses import dataclass

from dmmd_core import hookimpl, option
from dmmd_processes.masked import Masked


class LateMasked(Masked):
    """Masked, with a weight that falls with time."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Masked.Config):
        """Parameters."""

        tilt: float = option(0.5, help="weight at t = 1", above=0, maximum=1)

    def loss_weight(self, s):
        return 1 - (1 - self.config.tilt) * s


@hookimpl
def dmmd_register(registry):
    registry.add("process", "late_masked", LateMasked)
'''


@pytest.fixture
def fork(tmp_path: Path) -> Path:
    path = tmp_path / "late.py"
    path.write_text(FORK, encoding="utf-8")
    return path


def test_a_file_is_a_plugin_with_its_content_as_version(fork: Path) -> None:
    registry = load_plugins(files=[fork])
    entry = registry.get("process", "late_masked")
    assert entry.provider.plugin == "late"
    assert entry.provider.package == str(fork)
    assert len(entry.provider.version) == 12
    assert load_plugins(files=[fork]).get("process", "late_masked").cls is entry.cls
    fork.write_text(FORK.replace("0.5", "0.25"), encoding="utf-8")
    changed = load_plugins(files=[fork]).get("process", "late_masked")
    assert changed.provider.version != entry.provider.version
    assert changed.cls.Config().tilt == 0.25  # type: ignore[attr-defined]
    assert "late_masked" not in load_plugins().names("process")
    check_process("late_masked", {"tilt": 0.3}, registry=registry)


def test_a_fork_of_one_method_runs_from_a_recipe_and_is_recorded(fork: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_recipe(tmp_path, process={"name": "late_masked", "params": {"tilt": 0.2}}))
    done = dmmd_run(recipe, "--plugin", fork, "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
    plugins = json.loads((tmp_path / "run" / "plugins.json").read_text())
    assert plugins["components"]["process:late_masked"] == "late"
    assert {"plugin": "late", "package": str(fork)}.items() <= plugins["plugins"][-1].items()
    student = load_student(tmp_path / "run", registry=load_plugins(files=[fork]))
    assert student.sample(2).shape == (2, 3)
    without = dmmd_run(recipe)
    assert without.returncode == 2
    assert "no process named 'late_masked'" in without.stderr


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("gone.py", None, "the plugin file .*gone.py cannot be read: No such file"),
        ("notes.txt", "x = 1", "must be a Python file"),
        ("broken.py", "1 / 0", "plugin 'broken' of package .*broken.py .*ZeroDivisionError"),
        ("empty.py", "x = 1", "implements no hook"),
        ("processes.py", FORK, "two plugins are named 'processes'"),
        ("twice.py", FORK.replace("late_masked", "masked"), "process 'masked': the name is also provided by"),
    ],
)
def test_a_bad_file_is_one_error_that_names_it(name: str, code: str | None, words: str, tmp_path: Path) -> None:
    if code is not None:
        (tmp_path / name).write_text(code, encoding="utf-8")
    with pytest.raises(PluginError, match=words):
        load_plugins(files=[tmp_path / name])


def test_every_mode_takes_a_file(fork: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--explain", "late_masked", "--plugin", str(fork)]) == 0
    told = capsys.readouterr().out
    assert "weight at t = 1" in told
    assert "plugin 'late'" in told
    assert run_command(["--conformance", "process:late_masked", "tilt=0.2", "--plugin", str(fork)]) == 0
    assert run_command(["--conformance", "process:late_masked", "tilt=2", "--plugin", str(fork)]) == 2
    assert "must be at most 1, got 2" in capsys.readouterr().out
