"""A stranger's package beside the built wheel of dmmd, in an environment without the source tree."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import ROOT, environment

EXAMPLE = ROOT / "examples" / "third_party_plugin"
PAGE = (ROOT / "docs" / "write_a_plugin.md").read_text(encoding="utf-8")
_OFFLINE = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]


@dataclass(frozen=True)
class Clean:
    """A virtual environment with wheels; what they depend on is that of the tests, the source tree is out of sight."""

    folder: Path

    def install(self, source: Path) -> None:
        """Build a wheel of a source tree and install it."""
        wheels = self.folder / "wheels" / source.name
        _succeed([sys.executable, "-m", "pip", "wheel", *_OFFLINE, "--wheel-dir", str(wheels), str(source)])
        (wheel,) = wheels.glob("*.whl")
        python = str(self.folder / "bin" / "python")
        install = ["install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", str(wheel)]
        _succeed([sys.executable, "-m", "pip", "--python", python, *install])

    def run(self, *command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment."""
        more = environment(**variables)
        more.pop("PYTHONPATH", None)
        program = str(self.folder / "bin" / command[0])
        return subprocess.run(
            [program, *command[1:]], cwd=cwd, env=more, capture_output=True, text=True, timeout=300, check=False
        )


def _succeed(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Clean:
    """An environment with dmmd and the example, both from their wheels."""
    folder = tmp_path_factory.mktemp("clean")
    source = folder / "dmmd_source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("dmmd_core", "plugins", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(EXAMPLE, folder / "example_source", ignore=ignored)
    _succeed([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")])
    made = Clean(folder / "env")
    inside = made.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout
    # A path in a .pth file is searched last, and .pth files in it (an editable install) are not read.
    (Path(inside.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    made.install(source)
    made.install(folder / "example_source")
    return made


def test_the_wheel_is_what_runs(clean: Clean, tmp_path: Path) -> None:
    code = "import dmmd_core, dmmd_processes; print(dmmd_core.__file__, dmmd_processes.__file__)"
    done = clean.run("python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for file in done.stdout.split():
        assert Path(file).is_relative_to(clean.folder), file


def test_it_is_listed_with_its_package_and_version(clean: Clean, tmp_path: Path) -> None:
    done = clean.run("dmmd-run", "--plugins", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any("hybrid" in line and "dmmd-hybrid" in line and "0.1.0" in line for line in lines), done.stdout


def test_it_passes_the_conformance_kit(clean: Clean, tmp_path: Path) -> None:
    done = clean.run("dmmd-run", "--conformance", "process:hybrid", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["holds"] is True


def test_its_recipe_runs(clean: Clean, tmp_path: Path) -> None:
    recipe = str(EXAMPLE / "recipe.yaml")
    done = clean.run("dmmd-run", recipe, "--smoke", f"run.directory={tmp_path / 'x'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x" / "report.html").exists()
    assert "dmmd-hybrid" in (tmp_path / "x" / "plugins.json").read_text()


def test_its_own_tests_pass(clean: Clean, tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE / "tests", tmp_path / "tests")
    done = clean.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_quickstart_runs_from_the_wheel_alone(clean: Clean, tmp_path: Path) -> None:
    done = clean.run("dmmd-run", "--copy-recipes", "recipes", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = clean.run("dmmd-run", "recipes/quickstart.yaml", "--smoke", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "quickstart-smoke" / "report.html").exists()


def test_the_page_leads_from_an_empty_folder_to_a_run(clean: Clean, tmp_path: Path) -> None:
    folder = tmp_path / "my_dmmd"
    files = re.findall(r'```\w+ title="([^"]+)"\n(.*?)```', PAGE, flags=re.DOTALL)
    assert {name for name, _ in files} == {
        "pyproject.toml", "recipe.yaml", "src/my_dmmd/__init__.py", "src/my_dmmd/plugin.py", "tests/test_squared.py",
    }  # fmt: skip
    for name, content in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    (block,) = [one for one in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL) if "pip install -e ." in one]
    install, *commands = block.strip().splitlines()
    assert install.startswith("pip install -e .")
    clean.install(folder)
    assert len(commands) == 4
    for command in commands:
        words = shlex.split(command)
        words = ["python", "-m", *words] if words[0] == "pytest" else words
        done = clean.run(*words, cwd=folder)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    assert (folder / "runs" / "squared" / "report.html").exists()


def test_without_it_the_recipe_is_refused_by_name() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dmmd_core", str(EXAMPLE / "recipe.yaml"), "--check"],
        cwd=ROOT,
        env=environment(PYTHONPATH=os.environ.get("PYTHONPATH", "")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "no process named 'hybrid'" in done.stderr


def test_it_can_be_switched_off(clean: Clean, tmp_path: Path) -> None:
    done = clean.run("dmmd-run", "--plugins", cwd=tmp_path, DMMD_DISABLE_PLUGINS="hybrid")
    assert done.returncode == 0, done.stderr
    assert "hybrid" not in done.stdout
