"""One plain training loop for every stage: players, turns, moving average, checkpoints, resume."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmmd_core.checkpoint import (
    flatten_optimizer,
    load_newest,
    load_tensors,
    load_weights,
    prune,
    restore_optimizer,
    save_checkpoint,
)
from dmmd_core.draws import Draws
from dmmd_core.ema import MovingAverage
from dmmd_core.errors import Interrupted, RunError
from dmmd_core.interfaces import Denoiser, Objective
from dmmd_core.optim import learning_rate, make_optimizer
from dmmd_core.precision import autocast
from dmmd_core.recipe import TrainSection

if TYPE_CHECKING:
    from dmmd_core.pipeline import Run


@dataclass(frozen=True)
class Trained:
    """What a stage produced.

    Attributes:
        model: The result player with averaged weights, in evaluation mode.
        seconds: Time spent in the loop, over all resumes.
        metrics: Scalars of the last logged step.
    """

    model: Denoiser
    seconds: float
    metrics: dict[str, float]


class Trainer:
    """State of one stage's training, and its checkpoints.

    Args:
        run: Gives device, precision, seed, hooks and the wish to stop.
        stage: Name of the stage.
        objective: The game.
        section: Steps, batch size, optimiser.
        directory: Where this stage's checkpoints are kept.
    """

    def __init__(
        self, run: Run, stage: str, objective: Objective, section: TrainSection, directory: Path
    ) -> None:
        self.run = run
        self.stage = stage
        self.objective = objective
        self.section = section
        self.directory = directory
        self.players = objective.players()
        results = [name for name, player in self.players.items() if player.result]
        if len(results) != 1:
            raise RunError(f"{type(objective).__name__} must mark exactly one player as result, got {results}")
        for player in self.players.values():
            player.module.to(run.device).train().requires_grad_(True)
        for module in objective.frozen().values():
            module.to(run.device).eval().requires_grad_(False)
        self.result = self.players[results[0]].module
        self.average = MovingAverage(self.result, section.ema)
        self.optimizers = {
            name: make_optimizer(player, section.optimizer) for name, player in self.players.items()
        }
        self.step = 0
        self.seconds = 0.0

    def train(self) -> Trained:
        """Run from the newest checkpoint, if any, to the last step.

        Raises:
            Interrupted: The run was asked to stop; a checkpoint has been written.
            RunError: A loss is not finite; the last checkpoint is kept.
        """
        self.restore()
        metrics: dict[str, float] = {}
        started = time.monotonic() - self.seconds
        devices = [self.run.device] if self.run.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            while self.step < self.section.steps:
                losses = self._one_step()
                self.step += 1
                self.seconds = time.monotonic() - started
                last = self.step == self.section.steps
                if self.step % self.section.log_every == 0 or last:
                    metrics = self._log(losses)
                if self.step % self.section.checkpoint_every == 0 or last:
                    self.save()
                elif self.run.stop_requested:
                    self.save()
                    raise Interrupted(f"stopped at step {self.step} of {self.stage}; run the same command to go on")
        model = self.average.module
        assert isinstance(model, Denoiser)
        return Trained(model, self.seconds, metrics)

    def _one_step(self) -> dict[str, Tensor]:
        section, step = self.section, self.step
        # Dropout and the like draw from torch's generator, which therefore starts anew at every step.
        torch.manual_seed(hash((self.run.seed, step)) & 0x7FFFFFFF)
        draws = Draws.for_range(
            self.run.seed, step, step * section.batch_size, section.batch_size, self.run.device
        ).within(self.stage)
        batch = self.run.assembly.data.training_batch(draws)
        turn = self.objective.turn(step)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        with autocast(self.run.device, self.run.precision):
            losses = self.objective.loss(turn, batch, draws)
        torch.stack([loss.float() for loss in losses.by_player.values()]).sum().backward()
        rate = learning_rate(section.optimizer, step, section.steps)
        for name in turn:
            player, optimizer = self.players[name], self.optimizers[name]
            if section.optimizer.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(player.module.parameters(), section.optimizer.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = rate * player.learning_rate_scale
            optimizer.step()
        if any(self.players[name].result for name in turn):
            self.average.update(self.result)
        self.objective.after_update(step)
        return losses.metrics

    def _log(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        values = {name: float(value) for name, value in metrics.items()}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise RunError(
                f"{', '.join(bad)} not finite at step {self.step} of {self.stage}; the last checkpoint in "
                f"{self.directory} is kept; lower the learning rate or look at the data"
            )
        values["learning_rate"] = learning_rate(self.section.optimizer, self.step - 1, self.section.steps)
        self.run.after_step(self.step, values)
        return values

    def save(self) -> None:
        """Write a checkpoint of the whole training state."""
        tensors: dict[str, Tensor] = {}
        for name, player in self.players.items():
            tensors.update({f"player/{name}/{key}": v for key, v in player.module.state_dict().items()})
            tensors.update(flatten_optimizer(self.optimizers[name], f"optimizer/{name}"))
        tensors.update({f"average/{key}": value for key, value in self.average.module.state_dict().items()})
        state: dict[str, Any] = {
            "stage": self.stage,
            "seconds": self.seconds,
            "average_updates": self.average.updates,
            "objective": dict(self.objective.state()),
        }
        path = save_checkpoint(self.directory, self.step, tensors, state)
        prune(self.directory, self.run.plan.recipe.run.keep_checkpoints)
        self.run.after_checkpoint(self.step, path)

    def restore(self) -> None:
        """Continue from the newest checkpoint that is whole; say which ones were not."""
        for path, problem in load_newest(self.directory):
            if problem is not None:
                self.run.say(f"{problem}; trying the checkpoint before it")
                continue
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            tensors = load_tensors(path / "state.safetensors")
            for name, player in self.players.items():
                load_weights(player.module, _under(tensors, f"player/{name}/"), str(path))
                restore_optimizer(self.optimizers[name], tensors, f"optimizer/{name}")
            load_weights(self.average.module, _under(tensors, "average/"), str(path))
            self.average.updates = state["average_updates"]
            self.objective.load_state(state["objective"])
            self.step, self.seconds = state["step"], state["seconds"]
            self.run.say(f"{self.stage}: going on from step {self.step}")
            return


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
