"""The command lines as a user meets them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import RECIPES, ROOT, dmmd_run, environment, tiny_recipe, write_recipe

from dmmd_core import load_student
from dmmd_core.cli import run_command, sample_command

ALL_RECIPES = sorted(RECIPES.glob("*.yaml"))


def test_help_answers_at_once_and_imports_no_torch() -> None:
    probe = (
        "import sys; from dmmd_core.cli import run_command\n"
        "try:\n    run_command(['--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules and 'omegaconf' not in sys.modules, 'heavy import'"
    )
    times = []
    for _ in range(3):
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
        times.append(time.monotonic() - started)
        assert done.returncode == 0, done.stderr
        assert "exit codes" in done.stdout
    assert min(times) < 0.5


@pytest.mark.parametrize("recipe", ALL_RECIPES, ids=lambda path: path.stem)
def test_every_recipe_checks_without_writing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command([str(recipe), "--check"]) == 0
    assert "the recipe is valid" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ALL_RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_as_smoke(recipe: Path, tmp_path: Path) -> None:
    done = dmmd_run(recipe, "--smoke", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    name = yaml.safe_load(recipe.read_text())["run"]["directory"]
    directory = tmp_path / f"{name}-smoke"
    for file in ("recipe.yaml", "plugins.json", "log.jsonl", "metrics.json", "report.md", "report.html"):
        assert (directory / file).stat().st_size > 0
    assert (directory / "student" / "model.safetensors").exists()
    assert not (tmp_path / name).exists(), "a smoke run must not touch the real run's directory"
    again = dmmd_run(recipe, "--smoke", cwd=tmp_path)
    assert again.returncode == 0, again.stderr


def test_plugins_lists_components_with_provider_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--plugins"]) == 0
    out = capsys.readouterr().out
    for word in ("moment_matching", "noise_conditioned", "dmmd 0.1.0", "plugin processes", "schedule"):
        assert word in out


def test_progress_tells_rate_and_eta_and_the_end_tells_figures(tmp_path: Path) -> None:
    done = dmmd_run(write_recipe(tmp_path, tiny_recipe(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert re.search(r"distill: 6/6  [\d.]+ it/s  ETA \d+:\d\d", done.stderr)
    assert "token" in done.stdout
    assert "report.html" in done.stdout
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["schema"] == 1
    row = next(row for row in metrics["results"] if row["model"] == "student")
    assert set(row) >= {
        "model", "num_steps", "trained_num_steps", "metric", "value", "standard_error", "num_samples", "seed",
        "sampler", "dtype", "ema", "reference",
    }  # fmt: skip
    assert {"teacher", "student"} <= {row["model"] for row in metrics["results"]}
    assert set(metrics["timing"]) >= {"data", "initialize", "distill", "evaluate"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on digits with class labels."""
    folder = tmp_path_factory.mktemp("trained")
    train = {"steps": 3, "batch_size": 8, "log_every": 1}
    recipe = tiny_recipe(
        folder,
        data={"name": "digits", "params": {"codec": {"name": "kmeans_patches", "params": {"codes": 16}}}},
        backbone={"name": "transformer", "params": {"width": 16, "depth": 1, "heads": 2, "class_conditional": True}},
        teacher={"objective": {"name": "denoising"}, "train": train},
        distill={"num_steps": 2, **train},
    )
    assert run_command([str(write_recipe(folder, recipe))]) == 0
    return folder / "run"


def test_samples_are_written_as_pictures_and_tokens(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert sample_command([str(trained), "--num", "5", "--steps", "3", "--out", str(tmp_path), "--label", "3"]) == 0
    files = capsys.readouterr().out.split()
    assert sorted(Path(file).suffix for file in files) == [".npy", ".png"]
    tokens = np.load(next(file for file in files if file.endswith(".npy")))
    assert tokens.shape == (5, 16)


def test_samples_depend_on_the_seed_and_not_on_the_batch(trained: Path) -> None:
    model = load_student(trained)
    assert model.trained_num_steps == 2
    first = model.sample(7, seed=1)
    assert (first == model.sample(7, seed=1, batch_size=2)).all()
    assert not (first == model.sample(7, seed=2)).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no/such/run"], ["no model folder"]),
        (["{run}", "--label", "10"], ["0..9"]),
        (["{run}", "--num", "0"], ["at least 1"]),
        (["{run}", "--steps", "-1"], ["at least 1"]),
        (["{run}", "--model", "teacher"], ["steps"]),
        (["{run}", "--device", "cuda:99"], ["CUDA devices found"]),
    ],
)
def test_bad_sampling_requests_are_one_clear_error(
    arguments: list[str], words: list[str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    out = tmp_path / "out"
    assert sample_command([*(a.format(run=trained) for a in arguments), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not out.exists()


def test_a_teacher_of_another_run_is_loaded_strictly(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load((trained / "recipe.yaml").read_text())
    content["teacher"] = {"load": {"name": "from_run", "params": {"path": str(trained)}}}
    content["run"]["directory"] = str(tmp_path / "run")
    content["evaluate"]["metrics"] = []
    path = write_recipe(tmp_path, content)
    assert run_command([str(path)]) == 0
    teacher = (trained / "samples" / "teacher_1" / "samples.safetensors").read_bytes()
    assert (tmp_path / "run" / "samples" / "teacher_1" / "samples.safetensors").read_bytes() == teacher
    capsys.readouterr()
    other = [str(path), f"run.directory={tmp_path / 'other'}"]
    assert run_command([*other, "backbone.params.width=32"]) == 2
    assert "do not fit" in capsys.readouterr().err
    other = [str(path), f"run.directory={tmp_path / 'fourth'}"]
    assert run_command([*other, "backbone.params.heads=1"]) == 2, "the same tensors, another function"
    message = capsys.readouterr().err
    assert "trained with heads: 2 where this recipe has 1" in message
    assert str(trained) in message
    other = [str(path), f"run.directory={tmp_path / 'third'}"]
    assert run_command([*other, "data.params.codec.params.seed=5"]) == 2
    assert "trained on tokens of codec" in capsys.readouterr().err


def test_twin_recipes_differ_in_the_generator_alone() -> None:
    with_noise, without = (
        yaml.safe_load((RECIPES / f"exact_markov_masked{suffix}.yaml").read_text()) for suffix in ("", "_no_noise")
    )
    differing = {key for key in with_noise if with_noise[key] != without[key]}
    assert differing == {"name", "generator", "run"}
    assert with_noise["generator"]["name"] == "noise_conditioned"
    assert without["generator"]["name"] == "deterministic"


def test_import_has_no_side_effects() -> None:
    probe = (
        "import torch\n"
        "before = (torch.get_default_dtype(), torch.get_rng_state().sum(), torch.is_grad_enabled(), "
        "torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32)\n"
        "import dmmd_core, dmmd_core.cli\n"
        "dmmd_core.load_plugins()\n"
        "after = (torch.get_default_dtype(), torch.get_rng_state().sum(), torch.is_grad_enabled(), "
        "torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32)\n"
        "assert before == after, (before, after)\n"
        "import sys\n"
        "heavy = {'xformers', 'datasets', 'torchvision', 'transformers', 'diffusers', 'matplotlib', 'sklearn'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], env=environment(), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m dmmd_core --plugins | head -1"
    done = subprocess.run(
        command, shell=True, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr


def test_public_names_are_listed_and_exist() -> None:
    import dmmd_core

    assert sorted(dmmd_core.__all__) == sorted(dmmd_core._HOME_OF)
    for name in dmmd_core.__all__:
        assert getattr(dmmd_core, name) is not None


def test_the_python_example_runs(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_recipe(tmp_path))
    command = [sys.executable, "examples/use_from_python.py", str(recipe), str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "samples: tokens (16, 3)" in done.stdout
