"""Long runs: numbers that are not finite, full disks, alarms, and checkpoints that survive all of it."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import dmmd_run, make_trainer, tiny_recipe, write_recipe

from dmmd_core import RunError, hookimpl
from dmmd_core.checkpoint import checkpoints, prune, save_checkpoint, save_tensors, verify_directory, write_text
from dmmd_core.cli import run_command
from dmmd_core.interfaces import Losses
from dmmd_core.pipeline import Run
from dmmd_core.train import Trainer


def _poison(trainer: Trainer, steps: set[int], change: Callable[[Losses], None]) -> None:
    """Let a plugin's loss go wrong at some steps."""
    loss = trainer.objective.loss

    def poisoned(turn: tuple[str, ...], batch: Any, draws: Any) -> Losses:
        losses = loss(turn, batch, draws)
        if draws.step in steps:
            change(losses)
        return losses

    trainer.objective.loss = poisoned  # type: ignore[method-assign]


def _nan_loss(losses: Losses) -> None:
    losses.by_player["student"] = losses.by_player["student"] * torch.nan


def _nan_gradient(losses: Losses) -> None:
    class BadGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * torch.inf

    losses.by_player["student"] = BadGradient.apply(losses.by_player["student"])


def _weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for player in trainer.players.values() for p in player.module.parameters()]


@pytest.mark.parametrize("change", [_nan_loss, _nan_gradient])
def test_a_step_that_is_not_finite_is_skipped_counted_and_told(change: Any, tmp_path: Path) -> None:
    run, trainer = make_trainer(tmp_path, steps=30, log_every=30)
    said: list[str] = []
    run.say = said.append
    _poison(trainer, {4, 17}, change)
    seen = {}
    one_step = trainer._one_step

    def watched() -> Any:
        before, updates, step = _weights(trainer), trainer.average.updates, trainer.step
        found = one_step()
        moved = any(not torch.equal(a, b) for a, b in zip(before, _weights(trainer), strict=True))
        seen[step] = (moved, trainer.average.updates > updates)
        return found

    trainer._one_step = watched  # type: ignore[method-assign]
    trained = trainer.train()
    assert {step for step, what in seen.items() if what == (False, False)} == {4, 17}
    assert {step for step, what in seen.items() if what == (True, True)} == set(range(30)) - {4, 17}
    assert trained.metrics["skipped_steps"] == 2
    assert [line for line in said if "step is skipped" in line][1].endswith("2 of at most 3")
    assert "not finite at step 5 of distill" in said[0]


def test_too_many_skipped_steps_stop_the_run_with_the_last_checkpoint_kept(tmp_path: Path) -> None:
    _, trainer = make_trainer(tmp_path, steps=40, checkpoint_every=5, skip_limit=2)
    _poison(trainer, set(range(11, 40)), _nan_loss)
    with pytest.raises(RunError, match=r"not finite at step 14 of distill, and 2 of 40 steps may be skipped") as error:
        trainer.train()
    assert str(trainer.directory) in str(error.value)
    newest = checkpoints(trainer.directory)[0]
    assert newest.name == "step_000000010"
    verify_directory(newest)


def test_the_count_of_skipped_steps_survives_a_resume(tmp_path: Path) -> None:
    _, trainer = make_trainer(tmp_path, steps=40, checkpoint_every=5, skip_limit=2)
    _poison(trainer, {3, 4}, _nan_loss)
    trainer.run.stop_requested = True
    with pytest.raises(Exception, match="stopped at step 1"):
        trainer.train()
    trainer.run.stop_requested = False
    _poison(trainer, {6}, _nan_loss)
    with pytest.raises(RunError, match="not finite at step 7"):
        trainer.train()
    _, again = make_trainer(tmp_path, steps=40, checkpoint_every=5, skip_limit=2)
    again.restore()
    assert (again.step, again.skipped) == (5, 2)


def test_weights_that_are_not_finite_are_never_kept(tmp_path: Path) -> None:
    _, trainer = make_trainer(tmp_path, steps=40)
    trainer.step = 3
    with torch.no_grad():
        next(trainer.result.parameters()).view(-1)[0] = torch.inf
    with pytest.raises(RunError, match="weights of student not finite after step 3 of distill"):
        trainer.save()
    assert checkpoints(trainer.directory) == []


def _full(*arguments: Any, **keywords: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_message_and_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = save_checkpoint(tmp_path, 5, {"x": torch.arange(100.0)}, {})
    write_text(tmp_path / "file.json", "old")
    monkeypatch.setattr("os.fsync", _full)
    with pytest.raises(RunError, match=r"step_000000006 cannot be written \(No space left on device\).*same command"):
        save_checkpoint(tmp_path, 6, {"x": torch.arange(100.0)}, {})
    with pytest.raises(RunError, match=r"file\.json cannot be written"):
        write_text(tmp_path / "file.json", "new")
    monkeypatch.undo()
    assert (tmp_path / "file.json").read_text() == "old"
    verify_directory(old)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.json", "step_000000005"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_disk_that_fills_while_tensors_are_written_is_told_with_the_file(tmp_path: Path) -> None:
    from dmmd_core.checkpoint import write_directory

    def fill(folder: Path) -> None:
        (folder / "state.safetensors").symlink_to("/dev/full")
        (folder / "state.safetensors").write_bytes(b"x" * 100)

    with pytest.raises(RunError, match="model cannot be written"):
        write_directory(tmp_path / "model", fill)
    save_tensors(tmp_path / "still_works", {"x": torch.zeros(1)})
    assert [path.name for path in tmp_path.iterdir()] == ["still_works"]


def test_a_damaged_newer_checkpoint_never_pushes_out_a_whole_one(tmp_path: Path) -> None:
    for step in (5, 6, 9):
        newest = save_checkpoint(tmp_path, step, {"x": torch.zeros(1)}, {})
        if step == 6:
            kept = newest
    prune(tmp_path, 1, kept)
    assert checkpoints(tmp_path) == [kept]


def test_a_run_whose_checkpoints_are_all_damaged_says_that_it_begins_anew(tmp_path: Path) -> None:
    run, trainer = make_trainer(tmp_path, steps=4)
    trainer.train()
    for path in checkpoints(trainer.directory):
        (path / "state.json").write_text("{}")
    (trainer.directory / ".incomplete-step_000000003").mkdir()
    run, again = make_trainer(tmp_path, steps=4)
    said: list[str] = []
    run.say = said.append
    again.restore()
    assert again.step == 0
    assert "begins anew" in said[-1]
    assert all("state.json" in line for line in said[:-1])
    assert not list(trainer.directory.glob(".incomplete*"))


def test_a_damaged_model_of_a_finished_stage_is_made_again_from_its_checkpoints(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_recipe(tmp_path))
    assert run_command([str(recipe)]) == 0
    model = tmp_path / "run" / "student" / "model.safetensors"
    whole = model.read_bytes()
    model.write_bytes(whole[:-10] + b"0123456789")
    shutil.rmtree(tmp_path / "run" / "samples")
    done = dmmd_run(recipe)
    assert done.returncode == 0, done.stderr
    assert f"{model} is damaged" in done.stderr
    assert "made again" in done.stderr
    assert model.read_bytes() == whole


class _Watcher:
    """An observer that keeps warnings."""

    def __init__(self) -> None:
        self.warnings: list[tuple[int, str]] = []

    @hookimpl
    def dmmd_on_warning(self, run: Run, step: int, message: str) -> None:
        self.warnings.append((step, message))


def test_alarms_are_raised_once_and_reach_observers(tmp_path: Path) -> None:
    run, trainer = make_trainer(tmp_path, steps=30, log_every=1)
    said: list[str] = []
    run.say = said.append
    values = iter([{"gap": 0.1}] * 5 + [{"gap": 0.9}] * 10 + [{"gap": 0.1}] * 5 + [{"gap": 0.9}] * 10)

    def alarms(metrics: Mapping[str, float]) -> dict[str, str]:
        return {"gap": "too far"} if next(values)["gap"] > 0.5 else {}

    trainer.objective.alarms = alarms  # type: ignore[method-assign]
    trainer.train()
    assert [line for line in said if "too far" in line] == [
        "distill: too far (step 6)", "distill: too far (step 21)"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("entropy", "gap", "names"),
    [
        (0.3, 0.1, set()),  # a healthy quickstart
        (1e-5, 0.001, set()),  # one step from noise to a sample: no entropy, and the teacher is met
        (1e-5, 0.1, {"entropy"}),
        (0.3, 0.4, {"gap"}),
        (1e-5, 0.4, {"entropy", "gap"}),
    ],
)
def test_collapse_is_told_from_a_student_that_is_sure(
    entropy: float, gap: float, names: set[str], tmp_path: Path
) -> None:
    _, trainer = make_trainer(tmp_path, steps=4)
    found = trainer.objective.alarms({"student_entropy": entropy, "teacher_auxiliary_gap": gap})
    assert found.keys() == names
    assert all("alarm_" in message for message in found.values())


def test_warnings_are_in_the_log_and_on_the_terminal(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    recipe["objective"]["params"] = {"alarm_gap": 1e-6}
    done = dmmd_run(write_recipe(tmp_path, recipe))
    assert done.returncode == 0, done.stderr
    assert "the auxiliary is far from the teacher" in done.stderr
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    (warning,) = [event for event in events if event["event"] == "warning"]
    assert warning["stage"] == "distill"
    assert "alarm_gap" in warning["message"]
