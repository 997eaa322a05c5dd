"""Recipes and models of another version, and components whose plugin is gone, are told with the way out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from helpers import ROOT, tiny_recipe, write_recipe

from dmmd_core import CheckpointError, RecipeError, Run, load_plugins, load_recipe, load_student, run
from dmmd_core.cli import run_command


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (0, "got 0; the recipe is of an older dmmd: bring it up to date .* or run it with the version"),
        (2, "got 2; the recipe is of a newer dmmd: upgrade dmmd"),
    ],
)
def test_a_recipe_of_another_schema_is_told_what_to_do(schema: int, words: str, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, tiny_recipe(tmp_path, schema=schema))
    with pytest.raises(RecipeError, match=r"recipe\.yaml:1: schema: must be 1 for this version of dmmd, " + words):
        load_recipe(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with a process of a plugin in a file."""
    folder = tmp_path_factory.mktemp("upgrading")
    recipe = write_recipe(folder, tiny_recipe(folder, process={"name": "late_masked"}))
    return run(recipe, registry=load_plugins(files=[ROOT / "examples" / "late_masked.py"]), quiet=True)


def test_a_model_whose_component_is_gone_names_provider_and_version(finished: Run) -> None:
    provider = finished.plan.process.entry.provider
    with pytest.raises(RecipeError) as caught:
        load_student(finished.directory)
    text = str(caught.value)
    assert "no process named 'late_masked'" in text
    assert f"process:late_masked from plugin 'late_masked' of package {provider.package} {provider.version}" in text


def test_a_run_whose_component_is_gone_names_provider_and_version(
    finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    provider = finished.plan.process.entry.provider
    assert run_command([str(finished.directory.parent / "recipe.yaml")]) == 2
    told = capsys.readouterr().err
    assert "no process named 'late_masked'" in told
    assert (
        f"process 'late_masked' came from plugin 'late_masked' of package {provider.package} {provider.version} when "
        "this run began; install that version, or give the file with --plugin"
    ) in told


def test_a_model_of_another_schema_names_the_version_that_wrote_it(tmp_path: Path) -> None:
    content = json.dumps({"schema": 0, "versions": {"dmmd": "0.0.7"}})
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    digest = hashlib.sha256(content.encode()).hexdigest()
    (tmp_path / "manifest.json").write_text(json.dumps({"config.json": digest}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"has schema 0, .* dmmd reads 1; load it with .* \(0\.0\.7\)"):
        load_student(tmp_path)
