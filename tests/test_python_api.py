"""dmmd from Python: a run in one call, samples by generator and prompt, progress in a notebook."""

from __future__ import annotations

import inspect
import sys
import types
import typing
from pathlib import Path

import pytest
import torch
from helpers import tiny_recipe, write_recipe

import dmmd_core
from dmmd_core import RecipeError, SavedModel, load_recipe, load_student, run
from dmmd_core.progress import show_progress


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dmmd_core.Run:
    folder = tmp_path_factory.mktemp("api")
    return run(write_recipe(folder, tiny_recipe(folder)), quiet=True)


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> SavedModel:
    """A student of text."""
    folder = tmp_path_factory.mktemp("speaker")
    (folder / "text.txt").write_text("the cat sat on the mat\n" * 100, encoding="utf-8")
    recipe = tiny_recipe(folder)
    data = {"length": 12, "files": [str(folder / "text.txt")], "unit": "line", "tokenizer": {"name": "char"}}
    recipe["data"] = {"name": "text", "params": {**data, "cache": str(folder / "cache")}}
    recipe["teacher"] = {"objective": {"name": "denoising"}, "train": {"steps": 2, "batch_size": 4}}
    recipe["distill"] = {"num_steps": 2, "steps": 2, "batch_size": 4}
    recipe["evaluate"] = {}
    return load_student(run(write_recipe(folder, recipe), quiet=True).directory)


def test_a_finished_run_comes_back_with_its_figures(finished: dmmd_core.Run) -> None:
    assert set(finished.stages) == {"data", "initialize", "distill", "evaluate"}
    assert {row["model"] for row in finished.metrics["results"]} == {"train", "test", "teacher", "student"}
    again = run(finished.plan.recipe, quiet=True)
    assert again.stages == finished.stages
    assert again.metrics == finished.metrics


def test_a_recipe_in_hand_takes_overrides_and_smoke(finished: dmmd_core.Run, tmp_path: Path) -> None:
    recipe = load_recipe(finished.directory.parent / "recipe.yaml")
    small = run(recipe, [f"run.directory={tmp_path / 'other'}", "evaluate.num_samples=5"], smoke=True, quiet=True)
    assert small.directory == tmp_path / "other"  # as the caller says
    assert {row["num_samples"] for row in small.metrics["results"] if row["model"] == "student"} == {5}
    with pytest.raises(RecipeError, match=r"override 'distill.num_steps=0': distill.num_steps: must be at least 1"):
        run(recipe, ["distill.num_steps=0"])
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+: process.name: .*no process named 'maskd'"):
        run(write_recipe(tmp_path, tiny_recipe(tmp_path, process={"name": "maskd"})))


def test_a_generator_gives_other_samples_every_time_and_the_same_again(finished: dmmd_core.Run) -> None:
    student = load_student(finished.directory)

    def draws(seed: int) -> list[list[list[int]]]:
        generator = torch.Generator().manual_seed(seed)
        return [student.sample(20, steps=2, generator=generator).tolist() for _ in range(2)]

    first, second = draws(3)
    assert first != second
    assert draws(3) == [first, second]
    assert draws(4)[0] != first
    assert student.sample(4).tolist() == student.sample(4, seed=0).tolist() != student.sample(4, seed=1).tolist()
    with pytest.raises(ValueError, match="seed and generator exclude each other"):
        student.sample(2, seed=1, generator=torch.Generator())


def test_nothing_global_is_drawn_from(finished: dmmd_core.Run) -> None:
    student = load_student(finished.directory)
    before = torch.get_rng_state()
    student.sample(2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_begin_with_the_prompt_and_end_with_the_suffix(speaker: SavedModel, finished: dmmd_core.Run) -> None:
    texts = speaker.codec.decode(speaker.sample(3, prompt="the ", suffix=" mat"))
    assert all(text.startswith("the ") and text.endswith(" mat") for text in texts)
    with pytest.raises(ValueError, match="exclude each other"):
        speaker.sample(1, prompt="the", template=torch.full((12,), -1))
    with pytest.raises(ValueError, match="does not speak text"):
        load_student(finished.directory).sample(1, prompt="the")


class ZMQInteractiveShell:
    """Stands in for what a notebook runs in; it goes by this name."""


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("IPython")
    module.get_ipython = ZMQInteractiveShell  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.delenv("DMMD_QUIET", raising=False)


def test_a_notebook_shows_bars(notebook: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dmmd_core.in_notebook()
    recipe = write_recipe(tmp_path, tiny_recipe(tmp_path))
    run(recipe)
    shown = capsys.readouterr().err
    assert "\rdistill: 100%|" in shown
    assert "6/6" in shown
    assert "student_loss" in shown
    assert list(show_progress(range(3), "reading", total=3)) == [0, 1, 2]
    assert "reading:" in capsys.readouterr().err
    run(recipe, quiet=True)
    assert capsys.readouterr() == ("", "")


def test_elsewhere_it_is_no_notebook() -> None:
    assert not dmmd_core.in_notebook()


@pytest.mark.parametrize("name", ["load_plugins", "load_recipe", "load_student", "load_teacher", "run"])
def test_the_public_functions_are_typed_and_documented(name: str) -> None:
    function = getattr(dmmd_core, name)
    signature = inspect.signature(function)
    assert set(typing.get_type_hints(function, vars(sys.modules[function.__module__]))) == {
        *signature.parameters,
        "return",
    }
    for parameter in signature.parameters:
        assert name == "load_teacher" or f"{parameter}:" in function.__doc__, parameter
