"""The modes of the command line beside running: lists, explanations, dry runs, JSON, recipes to copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import RECIPES, ROOT, dmmd_run, tiny_recipe, write_recipe

from dmmd_core import load_plugins
from dmmd_core.cli import run_command, sample_command


@pytest.fixture(autouse=True)
def _loud_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let --quiet end with the test."""
    monkeypatch.setenv("DMMD_QUIET", "")


def _json(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    capsys.readouterr()
    assert run_command([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_the_table_of_plugins_tells_parameters_defaults_meaning_and_provider(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_command(["--plugins"]) == 0
    lines = capsys.readouterr().out.splitlines()
    masked = next(line for line in lines if line.split()[:1] == ["masked"])
    assert "dmmd 0.1.0, plugin processes" in masked
    row = lines[lines.index(masked) :]
    minimum = next(line for line in row if "min_time" in line)
    assert "float = 0.001" in minimum
    assert "the ELBO weight is held constant below" in minimum


def test_plugins_as_json_hold_every_component_with_its_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    told = _json(capsys, "--plugins")
    found = {(one["kind"], one["name"]): one for one in told["components"]}
    assert set(found) == {(entry.kind, entry.name) for entry in load_plugins()}
    parameters = {one["name"]: one for one in found["process", "masked"]["parameters"]}
    assert parameters["weight"] == {
        "name": "weight", "type": "flat|elbo", "default": "flat", "mandatory": False,
        "help": "loss weight w(s): 1, or the ELBO's",
    }  # fmt: skip
    assert found["teacher", "from_run"]["parameters"][0]["mandatory"] is True
    assert {"plugin": "processes", "package": "dmmd", "version": "0.1.0"} in told["plugins"]


def test_explain_tells_all_about_one_component(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--explain", "masked"]) == 0
    told = capsys.readouterr().out
    for words in ("The ELBO weight is", "flat|elbo = flat", "masks, soft_targets", "--conformance process:masked"):
        assert words in told
    for name in {entry.name for entry in load_plugins()}:
        assert run_command(["--explain", name]) == 0
    (only,) = _json(capsys, "--explain", "process:uniform")
    assert only["class"] == "dmmd_processes.uniform.Uniform"
    assert _json(capsys, "--explain", "sampler:masked", code=2)["exit_code"] == 2


def test_a_dry_run_tells_what_is_done_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(write_recipe(tmp_path, tiny_recipe(tmp_path)))
    states = [one["state"] for one in _json(capsys, recipe, "--dry-run")["stages"]]
    assert states == ["to do"] * 4
    assert not (tmp_path / "run").exists()
    done = dmmd_run(recipe, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    document = json.loads(done.stdout)
    assert document["metrics"]["results"] == json.loads((tmp_path / "run" / "metrics.json").read_text())["results"]
    assert list(document["stages"]) == ["data", "initialize", "distill", "evaluate"]
    assert run_command([recipe, "--dry-run"]) == 0
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if " done " in line]
    assert lines == [[stage, "done"] for stage in document["stages"]]
    stages = json.loads((tmp_path / "run" / "stages.json").read_text())
    del stages["distill"], stages["evaluate"]
    (tmp_path / "run" / "stages.json").write_text(json.dumps(stages))
    items = {one["stage"]: one for one in _json(capsys, recipe, "--dry-run")["stages"]}
    assert items["distill"]["state"] == "begun"
    assert items["distill"]["detail"] == "step 6 of 6"
    assert items["evaluate"]["detail"] == "4 of 4 sets judged"
    told = _json(capsys, recipe, "--dry-run", "distill.num_steps=3", code=2)
    assert "holds a run of another recipe; it differs in: distill.num_steps" in told["error"]


def test_check_as_json_tells_sizes_and_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = _json(capsys, str(RECIPES / "cifar10_masked.yaml"), "--check")
    assert told["parameters"]["student"] > 1e6
    assert told["missing"][0]["key"].startswith("data")
    bad = _json(capsys, str(write_recipe(tmp_path, tiny_recipe(tmp_path))), "--check", "distill.stepz=3", code=2)
    assert bad["problems"][0]["key"] == "distill.stepz"
    assert "did you mean 'steps'" in bad["error"]


def test_samples_as_json_and_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([str(write_recipe(tmp_path, tiny_recipe(tmp_path))), "--quiet"]) == 0
    told = capsys.readouterr()
    assert told.out == told.err == ""
    sampling = [str(tmp_path / "run"), "--num", "2", "--out", str(tmp_path / "out")]
    assert sample_command([*sampling, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert sample_command([*sampling, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["steps"] == 2
    assert all(Path(file).exists() for file in document["files"])


def test_recipes_can_be_copied_and_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    told = _json(capsys, "--copy-recipes", str(folder))
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in RECIPES.glob("*.yaml"))
    assert len(told["files"]) == len(list(folder.iterdir()))
    assert run_command(["--copy-recipes", str(folder)]) == 0
    (folder / "quickstart.yaml").write_text("mine")
    assert run_command(["--copy-recipes", str(folder)]) == 2
    assert "quickstart.yaml would be overwritten" in capsys.readouterr().err
    assert (folder / "quickstart.yaml").read_text() == "mine"


@pytest.mark.parametrize("arguments", [[], ["--plugins", "recipe.yaml"], ["--explain"], ["--plugins", "--check"]])
def test_modes_that_make_no_sense_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(arguments)
    assert caught.value.code == 2


def test_exit_codes_are_documented() -> None:
    from dmmd_core.cli import EXIT_CODES

    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for code in ("0", "1", "2", "130"):
        assert f" {code} " in EXIT_CODES
        assert f"| {code} |" in page
