"""``--profile``: traces that a viewer can read, of the steps that were meant, without a change of the results."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import dmmd_run, tiny_recipe, write_recipe

from dmmd_core import load_plugins
from dmmd_core.cli import run_command
from dmmd_core.distributed import Processes
from dmmd_core.pipeline import Run
from dmmd_core.profiling import Profiler
from dmmd_core.recipe import load_recipe
from dmmd_core.resolve import resolve
from dmmd_core.saved import recipe_from_plain


def _annotations(path: Path) -> Counter[str]:
    """Names of steps and parts in a trace."""
    events = json.loads(path.read_text())["traceEvents"]
    assert all("ph" in event for event in events)
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation")


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Directory of a run with ``--profile``, and what the terminal showed."""
    directory = tmp_path_factory.mktemp("profiled")
    recipe = tiny_recipe(directory)
    recipe["distill"]["steps"] = 14
    done = dmmd_run(write_recipe(directory, recipe), "--profile")
    assert done.returncode == 0, done.stderr
    return directory / "run", done.stderr


def test_every_stage_and_a_sampling_call_are_traced(profiled: tuple[Path, str]) -> None:
    directory, shown = profiled
    names = {"initialize", "distill", "sampling_student_2"}
    files = {f"{name}.{kind}" for name in names for kind in ("trace.json", "txt")}
    assert {path.name for path in (directory / "profile").iterdir()} == files
    for file in files:
        assert f"profile/{file}" in shown
    assert "USDT" not in shown, "the library keeps its messages to itself"


def test_a_trace_names_the_steps_after_the_warm_up_and_their_parts(profiled: tuple[Path, str]) -> None:
    found = _annotations(profiled[0] / "profile" / "distill.trace.json")
    assert {name: count for name, count in found.items() if name.startswith("ProfilerStep")} == {
        "ProfilerStep#7": 1, "ProfilerStep#8": 1, "ProfilerStep#9": 1
    }  # fmt: skip
    for part in ("student_forward", "teacher_forward", "auxiliary_forward", "loss", "backward", "data"):
        assert found[part] == 3, part
    assert found["optimizer"] == 6  # the norms of the gradients apart from the update


def test_a_table_lists_ten_operators_the_dearest_first(profiled: tuple[Path, str]) -> None:
    head, _, *rows = (profiled[0] / "profile" / "distill.txt").read_text().splitlines()[:13]
    assert head.startswith("distill: the 10 dearest operators, by time of their own on cpu")
    spent = [float(row.split()[0]) for row in rows[1:]]
    assert len(spent) == 10
    assert spent == sorted(spent, reverse=True)
    assert all("::" in row.split()[3] or row.split()[3][0].isupper() for row in rows[1:])
    assert not any("forward" in row.split()[3] or "ProfilerStep" in row for row in rows[1:]), "labels are no operators"


def _weights(recipe: dict[str, Any], *, profile: bool) -> tuple[Run, dict[str, torch.Tensor]]:
    registry = load_plugins()
    run = Run(resolve(recipe_from_plain(recipe, "recipe"), registry), registry, quiet=True, profile=profile)
    run.execute()
    from safetensors.torch import load_file

    return run, load_file(run.directory / "student" / "model.safetensors")


def test_profiling_changes_no_result(tmp_path: Path) -> None:
    runs = []
    for profile in (False, True):
        folder = tmp_path / str(profile)
        folder.mkdir()
        runs.append(_weights(tiny_recipe(folder), profile=profile))
    (plain, expected), (traced, found) = runs
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert traced.metrics["results"] == plain.metrics["results"]
    assert not (plain.directory / "profile").exists()


@pytest.mark.parametrize(
    ("steps", "traced"), [(1, [0]), (3, [0, 1, 2]), (4, [1, 2, 3]), (6, [3, 4, 5]), (10, [7, 8, 9]), (40, [7, 8, 9])]
)
def test_a_stage_of_few_steps_is_traced_too(steps: int, traced: list[int], tmp_path: Path) -> None:
    said: list[str] = []
    profiler = Profiler(tmp_path, torch.device("cpu"), said.append)
    with profiler.steps("short", steps) as step_is_over:
        for _ in range(steps):
            torch.ones(2) + 1
            step_is_over()
    assert set(_annotations(tmp_path / "short.trace.json")) == {f"ProfilerStep#{step}" for step in traced}
    assert profiler.traced == ["short"]
    assert len(said) == 1


def test_a_finished_run_says_that_there_is_nothing_to_trace(profiled: tuple[Path, str], tmp_path: Path) -> None:
    directory, _ = profiled
    recipe = load_recipe(directory.parent / "recipe.yaml")
    registry = load_plugins()
    run = Run(resolve(recipe, registry), registry, profile=True)
    said: list[str] = []
    assert run.profiler is not None
    run.profiler._say = said.append
    run.execute()
    assert said == [
        "profile: nothing was traced, since every stage was finished before; give another run.directory=..."
    ]


def test_only_the_first_of_several_processes_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = load_plugins()
    plan = resolve(recipe_from_plain(tiny_recipe(tmp_path), "recipe"), registry)
    for is_main in (True, False):
        monkeypatch.setattr(Processes, "is_main", property(lambda self, value=is_main: value))
        assert (Run(plan, registry, profile=True).profiler is not None) is is_main


@pytest.mark.parametrize("mode", ["--check", "--dry-run", "--plugins"])
def test_modes_that_run_nothing_take_no_profile(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = [] if mode == "--plugins" else [str(write_recipe(tmp_path, tiny_recipe(tmp_path)))]
    with pytest.raises(SystemExit):
        run_command([*recipe, mode, "--profile"])
    assert "--profile goes with a run or --smoke" in capsys.readouterr().err
