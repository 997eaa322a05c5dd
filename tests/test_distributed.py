"""Several processes: the same losses as one, checkpoints for another number of them, and processes that end early."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, environment, tiny_recipe, write_recipe
from several import run_together

from dmmd_core import RunError
from dmmd_core.checkpoint import checkpoints
from dmmd_core.distributed import Processes, join_processes

STEPS = 50
TOLERANCE = 1e-5  # sums over a batch in another order, for 50 steps; 2e-7 was seen


def _recipe(directory: Path, parallel: str) -> dict[str, Any]:
    train = {"steps": STEPS, "batch_size": 12, "log_every": 1, "checkpoint_every": 20}
    recipe = tiny_recipe(directory, backbone={"name": "transformer", "params": {"width": 16, "heads": 2, "depth": 2}})
    recipe["teacher"] = {"objective": {"name": "denoising"}, "train": dict(train)}
    recipe["distill"] = {"num_steps": 2, **train}
    recipe["evaluate"] |= {"num_samples": 21, "metrics": [{"name": "token_entropy"}, {"name": "product_bound"}]}
    recipe["run"] |= {"parallel": parallel, "keep_checkpoints": 9}
    return recipe


def _losses(told: dict[str, Any], stage: str, first: int = 0) -> torch.Tensor:
    rows = [
        [value for key, value in metrics.items() if not key.endswith(("_per_second", "_share", "_gib"))]
        for name, step, metrics in told["steps"]
        if name == stage and step > first
    ]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("alone")
    (told,) = run_together(1, _recipe(directory, "ddp"), directory / "told")
    return told


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A recipe, its directory and what two processes told of it."""
    directory = tmp_path_factory.mktemp(request.param)
    recipe = _recipe(directory, request.param)
    return recipe, directory, run_together(2, recipe, directory / "told")


def test_two_processes_have_the_losses_of_one(alone: dict[str, Any], together: Any) -> None:
    _, _, told = together
    assert [one["error"] for one in told] == [None, None]
    for stage in ("teacher", "distill"):
        expected = _losses(alone, stage)
        assert len(expected) == STEPS
        torch.testing.assert_close(_losses(told[0], stage), expected, rtol=0, atol=TOLERANCE)


def test_two_processes_judge_the_samples_of_one(alone: dict[str, Any], together: Any) -> None:
    _, directory, told = together
    assert told[0]["results"] == told[1]["results"]
    assert [(r["model"], r["metric"]) for r in told[0]["results"]] == [
        (r["model"], r["metric"]) for r in alone["results"]
    ]
    values = [[row["value"] for row in each["results"]] for each in (told[0], alone)]
    assert values[0] == pytest.approx(values[1], abs=1e-3)
    assert (directory / "run" / "samples" / "student_2" / "samples.safetensors").exists()


def test_a_student_that_becomes_the_teacher_does_so_in_every_process(tmp_path: Path) -> None:
    told = {}
    for size, parallel in ((1, "ddp"), (2, "ddp"), (2, "fsdp")):
        recipe = _recipe(tmp_path / f"{parallel}{size}", parallel)
        recipe["teacher"]["train"]["steps"] = 2
        recipe["distill"]["steps"] = 9
        recipe["objective"] = {"name": "sdtt", "params": {"rounds": 3, "round_average": 0.5}}
        told[size, parallel] = run_together(size, recipe, tmp_path / f"told{parallel}{size}")[0]
        assert told[size, parallel]["error"] is None
    expected = _losses(told[1, "ddp"], "distill")
    for each in told.values():
        torch.testing.assert_close(_losses(each, "distill"), expected, rtol=0, atol=TOLERANCE)
    stopped = _recipe(tmp_path / "stopped", "fsdp") | {"objective": recipe["objective"]}
    stopped["teacher"]["train"]["steps"], stopped["distill"]["steps"] = 2, 9
    assert run_together(2, stopped, tmp_path / "first", stop=5)[0]["error"][0] == "Interrupted"
    again = run_together(1, stopped, tmp_path / "second")[0]
    assert again["error"] is None
    torch.testing.assert_close(_losses(again, "distill"), expected[6:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("size", [1, 3])
def test_a_checkpoint_of_two_processes_goes_on_in_another_number(
    size: int, alone: dict[str, Any], together: Any, tmp_path: Path
) -> None:
    recipe, directory, _ = together
    run = directory / "run"
    newest, middle, *_ = checkpoints(run / "checkpoints" / "distill")
    is_sharded = recipe["run"]["parallel"] == "fsdp"
    assert len(list(middle.glob("shard-*.safetensors"))) == 2 * is_sharded
    for path in checkpoints(run / "checkpoints" / "distill"):
        if path != middle:
            shutil.rmtree(path)
    shutil.rmtree(run / "student", ignore_errors=True)
    stages = json.loads((run / "stages.json").read_text())
    (run / "stages.json").write_text(json.dumps({name: stages[name] for name in ("data", "teacher")}))
    told = run_together(size, recipe, tmp_path / "told")
    assert [one["error"] for one in told] == [None] * size
    start = int(middle.name.removeprefix("step_"))
    expected = _losses(alone, "distill", first=start)
    assert len(expected) == STEPS - start == 10
    torch.testing.assert_close(_losses(told[0], "distill"), expected, rtol=0, atol=TOLERANCE)
    assert newest.exists()


def test_a_process_that_dies_ends_the_run_with_one_message_and_a_checkpoint(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, "ddp")
    recipe["teacher"]["train"]["steps"] = 2
    recipe["distill"]["steps"] = 30
    told = run_together(2, recipe, tmp_path / "told", kill=11)
    assert told[1] == {}
    name, message = told[0]["error"]
    assert name == "PeerLostError"
    assert message.startswith("another process of this run has ended")
    assert message.endswith("the same command goes on from the last checkpoint")
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints" / "distill")] == ["step_000000011"]
    told = run_together(1, recipe, tmp_path / "again")
    assert told[0]["error"] is None
    assert [step for stage, step, _ in told[0]["steps"] if stage == "distill"] == list(range(12, 31))


def test_processes_stop_together_when_one_is_asked_to(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, "fsdp")
    recipe["teacher"]["train"]["steps"] = 2
    told = run_together(2, recipe, tmp_path / "told", stop=4)
    assert [one["error"][0] for one in told] == ["Interrupted", "ToldElsewhereError"]
    assert told[0]["error"][1] == "stopped at step 5 of distill; run the same command to go on"
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints" / "distill")] == ["step_000000005"]


def test_torchrun_runs_a_recipe(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_recipe(tmp_path))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "dmmd_core"]
    done = subprocess.run(
        [*command, str(recipe)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("distill: done") == 1
    assert "processes 2 (ddp)" in done.stderr
    assert "Warning" not in done.stderr
    assert done.stdout.count("report.html") == 1


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_shares_cover_everything_once(rank: int) -> None:
    for count in (7, 12, 100):
        for parts in (1, 2, 3):
            covered = [
                index
                for place in range(3)
                for part in range(parts)
                for index in Processes(place, 3).share(count, parts, part)
            ]
            assert covered == list(range(count))
            mine = Processes(rank, 3)
            assert sum(len(mine.share(count, parts, part)) for part in range(parts)) == len(mine.share(count))


def test_an_environment_without_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RunError, match=r"RANK.*not set; start with torchrun"):
        join_processes(torch.device("cpu"))


def test_a_batch_smaller_than_its_pieces_is_refused(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, "ddp")
    recipe["teacher"]["train"] |= {"batch_size": 3, "accumulate": 2}
    told = run_together(2, recipe, tmp_path / "told")
    assert "batch_size 3 is less than the 4 pieces" in told[0]["error"][1]


MODES: list[Callable[[], list[str]]] = [lambda: ["--plugins"], lambda: ["recipes/quickstart.yaml", "--check"]]


@pytest.mark.parametrize("words", MODES)
def test_other_modes_take_one_process(
    words: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dmmd_core.cli import run_command

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    assert run_command(words()) == 2
    assert "only runs and --smoke work with several processes" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert run_command(words()) == 2
    assert capsys.readouterr().err == ""
