"""A run that is interrupted anywhere and run again ends with the same weights bit for bit."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, dmmd_run, environment, tiny_recipe, write_recipe
from safetensors.torch import load_file

from dmmd_core.checkpoint import checkpoints, load_newest, save_checkpoint, verify_directory
from dmmd_core.errors import CheckpointError


def _recipe(tmp_path: Path, name: str, steps: int = 60) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    recipe = tiny_recipe(folder)
    for section in (recipe["distill"], recipe["distill"]["initialize"]):
        section.update({"steps": steps, "checkpoint_every": 7, "log_every": 5})
    recipe["backbone"] = {"name": "transformer", "params": {"width": 16, "depth": 1, "heads": 2, "dropout": 0.2}}
    return write_recipe(folder, recipe)


def _weights(recipe: Path) -> dict[str, torch.Tensor]:
    return load_file(recipe.parent / "run" / "student" / "model.safetensors")


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _results(recipe: Path) -> list[dict[str, object]]:
    content = json.loads((recipe.parent / "run" / "metrics.json").read_text())
    results: list[dict[str, object]] = content["results"]
    return results


def _start(recipe: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dmmd_core", str(recipe)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = _recipe(tmp_path_factory.mktemp("whole"), "a")
    done = dmmd_run(recipe)
    assert done.returncode == 0, done.stderr
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "number"), [("initialize", signal.SIGINT), ("distill", signal.SIGTERM)])
def test_a_signal_leaves_a_checkpoint_and_the_run_goes_on_bit_for_bit(
    stage: str, number: signal.Signals, whole: Path, tmp_path: Path
) -> None:
    recipe = _recipe(tmp_path, "a")
    process = _start(recipe)
    _wait_for(recipe.parent / "run" / "checkpoints" / stage / "step_000000007", process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "run the same command to go on" in stderr
    assert "Traceback" not in stderr
    again = dmmd_run(recipe)
    assert again.returncode == 0, again.stderr
    assert _same(_weights(whole), _weights(recipe))
    assert _results(whole) == _results(recipe)


@pytest.mark.slow
def test_sigkill_at_random_moments_ends_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, "a")
    source = random.Random(0)
    kills = 0
    for _ in range(4):
        process = _start(recipe)
        _wait_for(recipe.parent / "run" / "stages.json", process)
        time.sleep(source.uniform(0.05, 0.6))
        if process.poll() is None:
            process.kill()
            kills += 1
        process.communicate(timeout=120)
    assert kills > 0, "no run was alive to be killed; the test needs a longer run"
    again = dmmd_run(recipe)
    assert again.returncode == 0, again.stderr
    assert _same(_weights(whole), _weights(recipe))
    assert _results(whole) == _results(recipe)


def test_a_finished_run_is_not_redone(whole: Path) -> None:
    stages = (whole.parent / "run" / "stages.json").read_bytes()
    student = (whole.parent / "run" / "student" / "model.safetensors").stat().st_mtime_ns
    again = dmmd_run(whole)
    assert again.returncode == 0, again.stderr
    assert (whole.parent / "run" / "stages.json").read_bytes() == stages
    assert (whole.parent / "run" / "student" / "model.safetensors").stat().st_mtime_ns == student


@pytest.mark.slow
def test_damaged_checkpoint_is_passed_over_by_name(whole: Path, tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, "a")
    run = recipe.parent / "run"
    shutil.copytree(whole.parent / "run", run)
    text = (run / "recipe.yaml").read_text().replace(str(whole.parent), str(recipe.parent))
    (run / "recipe.yaml").write_text(text)
    stages = json.loads((run / "stages.json").read_text())
    del stages["distill"], stages["evaluate"]
    (run / "stages.json").write_text(json.dumps(stages))
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, "results": []}))
    shutil.rmtree(run / "student")
    newest = checkpoints(run / "checkpoints" / "distill")[0] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    again = dmmd_run(recipe)
    assert again.returncode == 0, again.stderr
    assert str(newest) in again.stderr + again.stdout
    assert _same(_weights(whole), _weights(recipe))


def test_half_written_checkpoint_is_never_taken_for_a_whole_one(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 5, {"x": torch.arange(100.0)}, {})
    verify_directory(path)
    # A crash before the rename leaves a temporary name, which does not count.
    shutil.copytree(path, tmp_path / ".incomplete-step_000000009")
    assert checkpoints(tmp_path) == [path]
    for file in list(path.iterdir()):
        for damage in ("cut", "flip", "gone"):
            copy = tmp_path / "step_000000010"
            shutil.copytree(path, copy)
            content = (copy / file.name).read_bytes()
            if damage == "cut":
                (copy / file.name).write_bytes(content[: len(content) // 2])
            elif damage == "flip":
                middle = len(content) // 2
                (copy / file.name).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
            else:
                (copy / file.name).unlink()
            with pytest.raises(CheckpointError, match=r"step_000000010"):
                verify_directory(copy)
            assert [problem is None for _, problem in load_newest(tmp_path)] == [False, True]
            shutil.rmtree(copy)


def test_damaged_model_folder_is_named(whole: Path, tmp_path: Path) -> None:
    from dmmd_core import load_student

    folder = tmp_path / "student"
    shutil.copytree(whole.parent / "run" / "student", folder)
    load_student(folder)
    model = folder / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_student(folder)


@pytest.mark.slow
def test_two_processes_never_work_in_one_directory(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, "a", steps=2000)
    process = _start(recipe)
    _wait_for(recipe.parent / "run" / "stages.json", process)
    second = dmmd_run(recipe)
    process.kill()
    process.communicate(timeout=60)
    assert second.returncode == 2
    assert "another process is working in" in second.stderr
    assert "Traceback" not in second.stderr
