"""What the README tells is so: its commands parse, its code runs, its table is complete, its links exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from dmmd_core import Registry, Schedule, load_plugins
from dmmd_core.cli import run_command

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("#")[0].strip() for line in README.splitlines() if line.startswith("dmmd-run ")]


@pytest.mark.parametrize("command", [line for line in COMMANDS if ".yaml" in line])
def test_commands_are_valid(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(ROOT / word) if word.endswith(".yaml") else word for word in shlex.split(command)[1:]]
    words = [word for word in words if word not in ("--smoke", "--check", "--dry-run")]
    assert run_command([*words, "--check"]) == 0


def test_the_two_commands_stand_in_one_line_each_and_ci_runs_the_second() -> None:
    run = "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/dmmd-run recipes/quickstart.yaml"
    test = "python3 -m venv .venv && .venv/bin/pip install tox && .venv/bin/tox"
    assert run in README.splitlines()
    assert test in README.splitlines()
    assert test in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_the_schedule_of_the_example_is_a_schedule() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    namespace: dict[str, object] = {}
    exec(block, namespace)
    added: list[tuple[str, str, type]] = []

    class Listener:
        def add(self, kind: str, name: str, cls: type) -> None:
            added.append((kind, name, cls))

    namespace["dmmd_register"](Listener())  # type: ignore[operator]
    ((kind, name, cls),) = added
    assert (kind, name) == ("schedule", "squared")
    schedule = cls(cls.Config())  # type: ignore[attr-defined]
    assert isinstance(schedule, Schedule)
    assert schedule.alpha(torch.tensor([0.0, 0.5, 1.0])).tolist() == [1, 0.25, 0]
    assert schedule.alpha_prime(torch.tensor([0.5])).tolist() == [-1]


def test_the_table_of_components_is_complete() -> None:
    registry: Registry = load_plugins()
    table = README[README.index("| kind | components |") :]
    for entry in registry:
        if entry.kind != "features":
            assert f"`{entry.name}`" in table, f"{entry.kind} {entry.name} is missing in the README"


def test_links_and_pictures_exist() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "recipes" / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} points to {target}, which is not there"
