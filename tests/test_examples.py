"""The plugins in `examples/` keep their contracts and run from the commands that their page gives."""

from __future__ import annotations

import csv
import inspect
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

from dmmd_core import load_plugins
from dmmd_core.cli import run_command

PAGE = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^dmmd-run (.+)$", PAGE, flags=re.MULTILINE)
RUNS = [command for command in COMMANDS if "--conformance" not in command]
JUDGED = [command for command in COMMANDS if "--conformance" in command]


def _words(command: str) -> list[str]:
    return [str(ROOT / word) if word.startswith("examples/") else word for word in shlex.split(command)]


def test_every_file_is_on_the_page_and_in_a_command() -> None:
    files = {path.name for path in (ROOT / "examples").glob("*.py")} - {"use_from_python.py"}
    assert len(files) == 5
    for name in files:
        assert f"[{name}]({name})" in PAGE
        assert any(name in command for command in RUNS), name
        if load_plugins(files=[ROOT / "examples" / name]).providers[-1].plugin != "timeline":
            assert any(name in command for command in JUDGED), name


@pytest.mark.parametrize("command", RUNS)
def test_the_commands_of_the_page_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DMMD_QUIET", "1")  # what --quiet sets, taken back after the test
    assert run_command([*_words(command), "--smoke", "--quiet"]) == 0
    (directory,) = [path.parent for path in tmp_path.rglob("recipe.yaml")]
    recipe = yaml.safe_load((directory / "recipe.yaml").read_text(encoding="utf-8"))
    file = Path(shlex.split(command)[-1]).stem
    assert file in [one["plugin"] for one in json.loads((directory / "plugins.json").read_text())["plugins"]]
    results = json.loads((directory / "metrics.json").read_text())["results"]
    if file == "distinct":
        shares = {row["model"]: row["value"] for row in results if row["metric"] == "distinct"}
        assert {"train", "teacher", "student"} <= set(shares)
        assert all(0 < share <= 1 for share in shares.values())
    elif file == "timeline":
        with (directory / "timeline.csv").open(encoding="utf-8") as lines:
            events = [(row[1], row[2]) for row in csv.reader(lines)]
        assert events[0] == ("", "begin")
        assert events[-1] == ("evaluate", "end")
        for stage in ("data", "initialize", "distill", "evaluate"):
            assert (stage, "stage") in events
        assert ("distill", "step") in events
        assert ("distill", "checkpoint") in events
    else:
        used = [section["name"] for section in recipe.values() if isinstance(section, dict) and "name" in section]
        assert {"two_steps", "bert", "late_masked"} & set(used)
        assert results


@pytest.mark.parametrize("command", JUDGED)
def test_the_components_keep_their_contracts(command: str) -> None:
    assert run_command(_words(command)) == 0


def test_the_distillation_loss_takes_under_forty_lines() -> None:
    registry = load_plugins(files=[ROOT / "examples" / "two_steps.py"])
    assert len(inspect.getsource(registry.get("objective", "two_steps").cls).splitlines()) < 40


def test_the_fork_of_the_page_and_of_the_file_are_one() -> None:
    registry = load_plugins(files=[ROOT / "examples" / "late_masked.py"])
    fork, original = (registry.get("process", name).cls for name in ("late_masked", "masked"))
    own = {name for name in vars(fork) if not name.startswith("_")}
    assert own == {"Config", "loss_weight"}
    assert issubclass(fork, original)
