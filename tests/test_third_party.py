"""A stranger's package, built and installed without a network, is found, listed and runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, environment

EXAMPLE = ROOT / "examples" / "third_party_plugin"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built from a copy and installed into a directory of its own."""
    folder = tmp_path_factory.mktemp("third_party")
    shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    target = folder / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run(
        [*command, "--target", str(target), str(folder / "source")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return target


def _python(installed: Path, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment(PYTHONPATH=path),
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_is_listed_with_its_package_and_version(installed: Path) -> None:
    done = _python(installed, "-m", "dmmd_core", "--plugins")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any("hybrid" in line and "dmmd-hybrid" in line and "0.1.0" in line for line in lines), done.stdout


def test_its_recipe_runs(installed: Path, tmp_path: Path) -> None:
    recipe = str(EXAMPLE / "recipe.yaml")
    done = _python(installed, "-m", "dmmd_core", recipe, "--smoke", f"run.directory={tmp_path / 'x'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x" / "report.html").exists()
    assert "dmmd-hybrid" in (tmp_path / "x" / "plugins.json").read_text()


def test_its_own_tests_pass(installed: Path) -> None:
    done = _python(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE / "tests"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_it_the_recipe_is_refused_by_name() -> None:
    done = _python(ROOT / "nowhere", "-m", "dmmd_core", str(EXAMPLE / "recipe.yaml"), "--check")
    assert done.returncode == 2
    assert "no process named 'hybrid'" in done.stderr


def test_it_can_be_switched_off(installed: Path) -> None:
    path = os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "dmmd_core", "--plugins"],
        cwd=ROOT,
        env=environment(PYTHONPATH=path, DMMD_DISABLE_PLUGINS="hybrid"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "hybrid" not in done.stdout
