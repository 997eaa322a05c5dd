"""Guidance as a user meets it: in a run, in its cost, from the command line, in a teacher of another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import tiny_recipe, write_recipe

from dmmd_backbones.transformer import Transformer
from dmmd_core import load_student, load_teacher
from dmmd_core.cli import run_command, sample_command

TRAIN = {"steps": 3, "batch_size": 8, "log_every": 1}
# Long and fast enough that labels matter: gates that listen to them start at zero.
FAST = {"steps": 12, "batch_size": 8, "ema": 0.0, "optimizer": {"learning_rate": 0.05}}


def _recipe(folder: Path, **sections: Any) -> dict[str, Any]:
    """Digits with labels, a teacher with label dropout, its guidance absorbed, the teacher sampled with it."""
    codec = {"name": "kmeans_patches", "params": {"codes": 16}}
    given: dict[str, Any] = {
        "data": {"name": "digits", "params": {"codec": codec}},
        "backbone": {"name": "transformer", "params": {"width": 16, "depth": 1, "heads": 2, "class_conditional": True}},
        "teacher": {"objective": {"name": "denoising", "params": {"label_dropout": 0.2}}, "train": FAST},
        "objective": {"name": "moment_matching", "params": {"guidance": 2.0}},
        "distill": {"num_steps": 2, **TRAIN},
    }
    recipe = tiny_recipe(folder, **given)
    recipe["evaluate"]["teacher_sampler"] = {"name": "ancestral", "params": {"guidance": 2.0}}
    recipe["evaluate"]["metrics"] = []
    recipe.update(sections)
    return recipe


@pytest.fixture(scope="module")
def guided_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """A finished run, and how often its networks were called: in training, and in sampling teacher and student."""
    folder = tmp_path_factory.mktemp("guided")
    path = write_recipe(folder, _recipe(folder))
    calls: dict[str, int] = {"training": 0, "sampling": 0}
    features = Transformer.features

    def counted(self: Transformer, *arguments: Any) -> Any:
        calls["training" if arguments[0].shape[0] == TRAIN["batch_size"] else "sampling"] += 1
        return features(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transformer, "features", counted)
        assert run_command([str(path)]) == 0
    return folder / "run", calls


def test_guidance_costs_one_teacher_call_and_nothing_at_the_student(guided_run: tuple[Path, dict[str, int]]) -> None:
    _, calls = guided_run
    # Teacher training one call a step; distillation student, auxiliary and the teacher twice.
    assert calls["training"] == 12 * 1 + 3 * 4
    # 20 samples, one batch: the teacher's one step twice, the student's two steps once each.
    assert calls["sampling"] == 1 * 2 + 2 * 1


def test_a_teacher_is_guided_from_the_command_line(guided_run: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    run, _ = guided_run

    def sample(*arguments: str) -> np.ndarray:
        out = tmp_path / "_".join(arguments or ("none",))
        words = [str(run), "--model", "teacher", "--steps", "3", "--num", "40", "--label", "3", "--out", str(out)]
        assert sample_command([*words, *arguments]) == 0
        return np.load(next(out.glob("*.npy")))

    drawn = {scale: sample("--guidance", scale) for scale in ("1", "2", "40")}
    assert (sample() == drawn["2"]).all(), "without the option the recipe's sampler guides"
    assert (drawn["1"] != drawn["2"]).any()
    assert (drawn["2"] != drawn["40"]).any()
    model = load_teacher(run)
    assert model.guidable
    assert (model.sample(40, steps=3, label=3, guidance=40).numpy() == drawn["40"]).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--guidance", "2"], ["cannot be guided", "absorbed"]),
        (["--model", "teacher", "--steps", "2", "--guidance", "-1"], ["at least 0"]),
    ],
)
def test_guidance_that_makes_no_sense_is_one_clear_error(
    arguments: list[str],
    words: list[str],
    guided_run: tuple[Path, dict[str, int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    assert sample_command([str(guided_run[0]), *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


def test_a_student_is_sampled_without_and_a_teacher_without_label_dropout_is_not_guided(
    guided_run: tuple[Path, dict[str, int]], tmp_path: Path
) -> None:
    student = load_student(guided_run[0])
    assert not student.guidable
    assert (student.sample(5, guidance=1.0) == student.sample(5)).all()
    recipe = _recipe(tmp_path, teacher={"objective": {"name": "denoising"}, "train": TRAIN}, objective={
        "name": "moment_matching"})  # fmt: skip
    recipe["evaluate"] = {"teacher_steps": [], "student_steps": [], "num_samples": 2}
    assert run_command([str(write_recipe(tmp_path, recipe))]) == 0
    with pytest.raises(ValueError, match="never saw 'no label'"):
        load_teacher(tmp_path / "run").sample(2, steps=1, guidance=2.0)


def test_the_teacher_of_another_run_is_guided_if_it_was_trained_for_it_and_said_to_be(
    guided_run: tuple[Path, dict[str, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = guided_run

    def load(path: Path, **params: Any) -> list[str]:
        content = _recipe(tmp_path, teacher={"load": {"name": "from_run", "params": {"path": str(path), **params}}})
        content["data"] = yaml.safe_load((run / "recipe.yaml").read_text())["data"]
        return [str(write_recipe(tmp_path, content))]

    capsys.readouterr()
    assert run_command(load(run)) == 2
    assert "'unlabelled'" in capsys.readouterr().err
    assert run_command(load(run, unlabelled=True)) == 0
    config = run / "teacher" / "config.json"
    content = config.read_text()
    config.write_text(content.replace('"unlabelled"', '"something"'))
    try:
        assert run_command([*load(run, unlabelled=True), f"run.directory={tmp_path / 'other'}"]) == 2
    finally:
        config.write_text(content)
    assert "trained without label dropout" in capsys.readouterr().err
    # Where the folder is not there, --check can only take the recipe's word.
    assert run_command([*load(tmp_path / "gone", unlabelled=True), "--check"]) == 0
    assert "there is no directory" in capsys.readouterr().out
