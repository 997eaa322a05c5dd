"""Bad recipes: one readable error naming file, line and key, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import tiny_recipe, write_recipe

from dmmd_core.cli import run_command

DIGITS = {
    "data": {"name": "digits"},
    "teacher": {"objective": {"name": "denoising"}, "train": {"steps": 2}},
    "distill": {"num_steps": 2, "steps": 2},
}
CLASSES = {**DIGITS, "backbone": {"name": "transformer", "params": {"class_conditional": True}}}
DROPPING = {
    **CLASSES,
    "teacher": {"objective": {"name": "denoising", "params": {"label_dropout": 0.1}}, "train": {"steps": 2}},
}
REMOVE = object()

# (what is wrong, sections replaced, key path changed, new value, key named in the error, words of the error)
CASES: list[tuple[str, dict[str, Any], str, Any, str, list[str]]] = [
    ("unknown section", {}, "distil", {}, "distil", ["unknown key", "did you mean 'distill'"]),
    ("unknown key", {}, "distill.step", 3, "distill.step", ["unknown key", "did you mean 'steps'"]),
    ("unknown nested key", {}, "distill.optimizer", {"lr": 1}, "distill.optimizer.lr", ["unknown key"]),
    ("unknown parameter", {}, "backbone.params.widht", 3, "backbone.params.widht", ["did you mean 'width'"]),
    ("unknown slot key", {}, "process.parms", {}, "process.parms", ["did you mean 'params'"]),
    ("missing key", {}, "distill.num_steps", REMOVE, "distill", ["lacks the key 'num_steps'"]),
    ("missing section", {}, "sampler", REMOVE, "", ["lacks the key 'sampler'"]),
    ("wrong type", {}, "distill.steps", "many", "distill.steps", ["could not be converted to Integer"]),
    ("float for integer", {}, "distill.steps", 2.5, "distill.steps", ["could not be converted to Integer"]),
    ("boolean for integer", {}, "distill.steps", True, "distill.steps", ["could not be converted to Integer"]),
    ("wrong type in params", {}, "backbone.params.width", "wide", "backbone.params.width", ["Integer"]),
    ("section is no mapping", {}, "distill", 3, "distill", ["must be a mapping"]),
    ("slot is no mapping", {}, "process", "masked", "process", ["must name a component"]),
    ("slot without a name", {}, "process", {"params": {}}, "process", ["lacks the name"]),
    ("params is no mapping", {}, "process.params", [1], "process.params", ["must be a mapping"]),
    ("metrics is no list", {}, "evaluate.metrics", {"name": "x"}, "evaluate.metrics", ["must be a list"]),
    ("not finite", {}, "distill.optimizer", {"learning_rate": float("nan")},
     "distill.optimizer.learning_rate", ["finite"]),
    ("missing plugin", {}, "process.name", "maskd", "process.name", ["no process named", "did you mean 'masked'"]),
    ("missing metric", {}, "evaluate.metrics", [{"name": "fidd"}], "evaluate.metrics[0].name", ["no metric named"]),
    ("missing nested", {}, "process.params", {"schedule": {"name": "cosin"}}, "process.params.schedule.name",
     ["no schedule named", "'cosine'"]),
    ("choice", {}, "run.precision", "float8", "run.precision", ["invalid value", "bfloat16"]),
    ("choice in params", {}, "process.params", {"weight": "round"}, "process.params.weight", ["elbo"]),
    ("zero steps", {}, "distill.steps", 0, "distill.steps", ["at least 1"]),
    ("zero sampling steps", {}, "distill.num_steps", 0, "distill.num_steps", ["at least 1"]),
    ("zero in list", {}, "evaluate.student_steps", [4, 0], "evaluate.student_steps", ["at least 1"]),
    ("list in a list", {}, "evaluate.student_steps", [[4, 8]], "evaluate.student_steps", ["list of single values"]),
    ("mapping for a list", {}, "evaluate.student_steps", {"a": 4}, "evaluate.student_steps", ["the other way round"]),
    ("zero batch", {}, "distill.batch_size", 0, "distill.batch_size", ["at least 1"]),
    ("negative seed", {}, "run.seed", -1, "run.seed", ["at least 0"]),
    ("ema of 1", {}, "distill.ema", 1.0, "distill.ema", ["below 1"]),
    ("negative temperature", {}, "objective.params", {"temperature": -1.0}, "objective.params.temperature",
     ["above 0"]),
    ("top-p above 1", {}, "objective.params", {"top_p": 1.5}, "objective.params.top_p", ["at most 1"]),
    ("impossible heads", {}, "backbone", {"name": "transformer", "params": {"width": 64, "heads": 3}},
     "backbone.params.heads", ["must divide width"]),
    ("impossible head width", {}, "backbone", {"name": "transformer", "params": {"width": 12, "heads": 4}},
     "backbone.params.heads", ["multiple of 2"]),
    ("world too large", {}, "data.params", {"letters": 20, "length": 20}, "data.params.length", ["too many"]),
    ("patch does not divide", DIGITS, "data.params", {"codec": {"name": "kmeans_patches", "params": {"patch": 3}}},
     "data.params.codec.params.patch", ["must divide 8"]),
    ("codec of another kind", DIGITS, "data.params", {"codec": {"name": "integers"}}, "data.params.codec", ["codec"]),
    ("mismatched loss", {}, "process", {"name": "uniform", "params": {"loss": "posterior_kl", "weight": "elbo"}},
     "process.params.parametrization", ["leave_one_out"]),
    ("mismatched weight", {}, "process", {"name": "uniform", "params": {"weight": "elbo"}}, "process.params.weight",
     ["flat"]),
    ("labels without classes", {}, "backbone", {"name": "transformer", "params": {"class_conditional": True}},
     "backbone.params.class_conditional", ["labels", "markov_chain"]),
    ("grid without grid", {}, "generator.params", {"latent": "pyramid"}, "generator.params.latent", ["grid"]),
    ("soft target for uniform", {"process": {"name": "uniform"}}, "objective.params", {"auxiliary_target": "soft"},
     "objective.params.auxiliary_target", ["soft_targets", "uniform"]),
    ("exact teacher of digits", {"data": {"name": "digits"}}, "name", "x", "teacher.load", ["enumerable", "digits"]),
    ("metric of images on letters", {}, "evaluate.metrics", [{"name": "frechet_distance"}], "evaluate.metrics[0]",
     ["images"]),
    ("exact metric on digits", DIGITS, "evaluate.metrics", [{"name": "total_variation"}], "evaluate.metrics[0]",
     ["enumerable"]),
    ("no weights to start from", {}, "distill.initialize", REMOVE, "distill", ["no weights", "distill.initialize"]),
    ("initialize without need", DIGITS, "distill.initialize",
     {"objective": {"name": "denoising", "params": {"target": "teacher"}}, "steps": 1},
     "distill.initialize.objective.params.target", ["loaded"]),
    ("teacher of nothing", {}, "teacher", {}, "teacher", ["either load, or objective and train"]),
    ("teacher of both", {}, "teacher.train", {"steps": 1}, "teacher", ["either load, or objective and train"]),
    ("teacher without train", {}, "teacher", {"objective": {"name": "denoising"}}, "teacher", ["train is missing"]),
    ("objective that distils nothing", {}, "objective", {"name": "denoising"}, "objective", ["cannot distil"]),
    ("teacher objective that distils", DIGITS, "teacher.objective", {"name": "moment_matching"}, "teacher.objective",
     ["cannot train a teacher"]),
    ("unreadable teacher", {}, "teacher", {"load": {"name": "from_run", "params": {"path": "no/such/run"}}},
     "teacher.load.params.path", ["no directory 'no/such/run'"]),
    ("label dropout of 1", CLASSES, "teacher.objective.params", {"label_dropout": 1.0},
     "teacher.objective.params.label_dropout", ["below 1"]),
    ("label dropout without labels", DIGITS, "teacher.objective.params", {"label_dropout": 0.1},
     "teacher.objective.params.label_dropout", ["labels", "mlp"]),
    ("negative guidance", DROPPING, "objective.params", {"guidance": -1.0}, "objective.params.guidance",
     ["at least 0"]),
    ("guidance without label dropout", CLASSES, "objective.params", {"guidance": 2.0}, "objective.params.guidance",
     ["unlabelled", "label dropout", "trained in the run"]),
    ("guidance of an exact teacher", {}, "objective.params", {"guidance": 2.0}, "objective.params.guidance",
     ["unlabelled", "exact"]),
    ("guided sampling without label dropout", CLASSES, "evaluate.teacher_sampler",
     {"name": "ancestral", "params": {"guidance": 2.0}}, "evaluate.teacher_sampler.params.guidance",
     ["unlabelled", "label dropout"]),
    ("confidence without masks", {"process": {"name": "uniform"}}, "sampler", {"name": "confidence"}, "sampler",
     ["'masks'", "uniform"]),
    ("class accuracy without classes", DIGITS, "evaluate.metrics", [{"name": "class_accuracy"}],
     "evaluate.metrics[0]", ["labels", "mlp"]),
    ("guided student", DROPPING, "sampler.params", {"guidance": 2.0}, "sampler",
     ["never guided", "evaluate.teacher_sampler"]),
    ("other format", {}, "schema", 2, "schema", ["must be 1"]),
    ("interpolation", {}, "name", "${oc.env:HOME}", "name", ["interpolation is not supported"]),
]  # fmt: skip


def _line_of(text: str, key: str) -> int:
    """Line of the last part of a key path that YAML's own parser finds, counted from 1."""
    node = yaml.compose(text)
    line = None
    for part in key.replace("]", "").replace("[", ".").split("."):
        children = (
            {name.value: (name, value) for name, value in node.value}
            if isinstance(node, yaml.MappingNode)
            else {str(i): (value, value) for i, value in enumerate(node.value)}
            if isinstance(node, yaml.SequenceNode)
            else {}
        )
        if part not in children:
            break
        mark, node = children[part]
        line = mark.start_mark.line + 1
    return line or 0


def _change(recipe: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for name in parents:
        recipe = recipe.setdefault(name, {})
    if value is REMOVE:
        del recipe[last]
    else:
        recipe[last] = value


def _fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    code = run_command(arguments)
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_bad_recipe_is_one_clear_error(
    case: tuple[str, dict[str, Any], str, Any, str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, sections, key, value, named, words = case
    recipe = tiny_recipe(tmp_path, **copy.deepcopy(sections))
    if sections:
        recipe["evaluate"]["metrics"] = []
    _change(recipe, key, value)
    path = write_recipe(tmp_path, recipe)
    error = _fails([str(path)], capsys)
    lines = [line for line in error.splitlines() if all(word in line for word in words)]
    assert lines, error
    assert named in lines[0]
    line = _line_of(path.read_text(), named)
    assert (f"{path}:{line}:" if line else f"{path}:") in lines[0], error
    assert sorted(tmp_path.iterdir()) == [path], "nothing may be written for a bad recipe"


def test_all_problems_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe(tmp_path)
    recipe["distill"]["steps"] = 0
    recipe["run"]["sed"] = 3
    recipe["evaluate"]["num_samples"] = "x"
    error = _fails([str(write_recipe(tmp_path, recipe))], capsys)
    assert len(error.strip().splitlines()) == 3


def test_problems_of_several_components_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe(tmp_path)
    recipe["process"]["name"] = "maskd"
    recipe["backbone"]["params"]["depth"] = 0
    recipe["generator"]["params"]["width"] = -1
    error = _fails([str(write_recipe(tmp_path, recipe))], capsys)
    assert len(error.strip().splitlines()) == 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("distill.steps=0", ["override 'distill.steps=0'", "at least 1"]),
        ("distill.stepz=3", ["override 'distill.stepz=3'", "did you mean 'steps'"]),
        ("process.name=maskd", ["override 'process.name=maskd'", "did you mean 'masked'"]),
        ("name=${x}", ["interpolation"]),
        ("run.seed", ["run.seed", "key=value"]),
        ("evaluate.metrics[7].name=x", ["evaluate.metrics[7].name"]),
        ("run.device=gpu", ["run.device", "'gpu'"]),
    ],
)
def test_overrides_are_validated_alike(
    override: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path, tiny_recipe(tmp_path))
    error = _fails([str(path), override], capsys)
    assert all(word in error for word in words), error
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["cannot read the recipe"]),
        (b"\xff\xfe\xff", ["cannot read the recipe"]),
        (b"", ["a recipe must be a mapping"]),
        (b"- 1\n", ["a recipe must be a mapping"]),
        (b"a: [1\nb: 2\n", [":2", "not valid YAML"]),
        (b"name: x\nname: y\n", ["name", "duplicate"]),
        (b"name: !!python/object:os.system x\n", ["not valid YAML"]),
    ],
)
def test_unreadable_files_are_one_clear_error(
    content: bytes | None, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_bytes(content)
    error = _fails([str(path)], capsys)
    assert str(path) in error
    assert all(word in error for word in words), error


def test_changed_recipe_for_an_existing_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(tmp_path, tiny_recipe(tmp_path))
    assert run_command([str(path)]) == 0
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    capsys.readouterr()
    error = _fails([str(path), "distill.steps=7", "run.seed=3"], capsys)
    assert "distill.steps" in error
    assert "run.seed" in error
    assert "override 'run.seed=3'" in error
    assert before == {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    error = _fails([str(write_recipe(tmp_path, tiny_recipe(tmp_path)))], capsys)
    assert "is no run directory" in error
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_new_runs_directory_may_hold_what_another_run_has_fitted(tmp_path: Path) -> None:
    kept = tmp_path / "run" / "cache" / "network-0123" / "model.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_text("weights")
    assert run_command([str(write_recipe(tmp_path, tiny_recipe(tmp_path))), "--quiet"]) == 0
    assert kept.read_text() == "weights"


def test_missing_gpu_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = _fails([str(write_recipe(tmp_path, tiny_recipe(tmp_path))), "run.device=cuda:99"], capsys)
    assert "run.device" in error
    assert "CUDA devices found" in error
