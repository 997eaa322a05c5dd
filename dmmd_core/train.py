"""One plain training loop for every stage: players, turns, moving average, checkpoints, resume."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dmmd_core.checkpoint import (
    clear_incomplete,
    flatten_optimizer,
    load_checkpoint,
    load_newest,
    load_weights,
    prune,
    restore_optimizer,
    save_checkpoint,
)
from dmmd_core.compilation import checkpoint_units, compile_units
from dmmd_core.distributed import Processes, others_are_there
from dmmd_core.draws import Draws
from dmmd_core.ema import MovingAverage
from dmmd_core.errors import Interrupted, PeerLostError, RunError
from dmmd_core.interfaces import Batch, Denoiser, Losses, Objective
from dmmd_core.optim import learning_rate, make_optimizer
from dmmd_core.precision import autocast
from dmmd_core.recipe import TrainSection
from dmmd_core.sharding import Game, let_go, local, replicated, shard, whole
from dmmd_core.soundness import check_batch
from dmmd_core.usage import StepTimes, peak_memory

if TYPE_CHECKING:
    from dmmd_core.pipeline import Run

_CUDA_STEPS = 8  # before a log line whose parts are timed: every turn of a game is among them, and events cost little


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

    def __init__(self, run: Run, stage: str, objective: Objective, section: TrainSection, directory: Path) -> None:
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
        pieces = run.processes.size * section.accumulate
        if section.batch_size < pieces:
            raise RunError(
                f"{stage}: batch_size {section.batch_size} is less than the {pieces} pieces it is to be cut into "
                f"({run.processes.size} processes, accumulate {section.accumulate}); use fewer, or a larger batch"
            )
        self._prepare_networks()
        self.optimizers = {name: make_optimizer(player, section.optimizer) for name, player in self.players.items()}
        self.step = 0
        self.seconds = 0.0
        self.skipped = 0
        self.metrics: dict[str, float] = {}  # of the last logged step
        self.alarms: set[str] = set()
        self._stopping = False
        self.times = StepTimes(run.device)
        self._data_s = 0.0  # waited for data since the last log line
        self._logged = (0, 0.0)  # step and clock of the last log line

    def _prepare_networks(self) -> None:
        """Compile, checkpoint and distribute the networks as the recipe says."""
        section = self.run.plan.recipe.run
        trained = [player.module for player in self.players.values()]
        networks = [*trained, *self.objective.frozen().values()]
        if section.activation_checkpointing:
            for module in trained:
                checkpoint_units(module)
        if section.compile:
            for module in networks:
                compile_units(module)
        if self.run.sharded:
            for module in (*networks, self.average.module):
                shard(module, self.run.device, self.run.precision)
        game = Game(self.objective)
        self.game: Game | nn.parallel.DistributedDataParallel = game
        if not (self.run.processes.alone or self.run.sharded):
            self.game = replicated(game)

    def train(self) -> Trained:
        """Run from the newest checkpoint, if any, to the last step.

        Raises:
            Interrupted: The run was asked to stop; a checkpoint has been written.
            RunError: Weights, metrics or too many steps were not finite, or the disk is full; the last checkpoint is
                kept.
        """
        self.restore()
        started = time.monotonic() - self.seconds
        self._data_s, self._logged = 0.0, (self.step, time.monotonic())
        devices = [self.run.device] if self.run.device.type == "cuda" else []
        parts = {name: player.module for name, player in self.players.items()} | self.objective.frozen()
        followed = self.times.following({f"{name}_forward": module for name, module in parts.items()})
        profiler, remaining = self.run.profiler, self.section.steps - self.step
        self.times.annotate = profiler is not None
        profiled = profiler.steps(self.stage, remaining) if profiler else nullcontext(lambda: None)
        with torch.random.fork_rng(devices=devices), followed, profiled as step_is_over:
            try:
                while self.step < self.section.steps:
                    if not self.times.cuda or self._steps_to_log() <= _CUDA_STEPS:
                        self.times.start()
                    found = self._one_step()
                    step_is_over()
                    self.step += 1
                    self.seconds = time.monotonic() - started
                    last = self.step == self.section.steps
                    if self.step % self.section.log_every == 0 or last:
                        self.metrics = self._log(found)
                    if self.step % self.section.checkpoint_every == 0 or last:
                        self.save()
                    elif self._stopping:
                        self.save()
                        raise self.run.processes.agreed(
                            Interrupted(f"stopped at step {self.step} of {self.stage}; run the same command to go on")
                        )
            except PeerLostError:
                self._save_alone()
                raise
        model = self.average.module
        assert isinstance(model, Denoiser)
        return Trained(model, self.seconds, self.metrics)

    def _steps_to_log(self) -> int:
        """Steps until the next log line is written, the one about to be made included."""
        every = self.section.log_every
        return min(every - self.step % every, self.section.steps - self.step)

    def _one_step(self) -> dict[str, Tensor]:
        """One turn; its metrics, none where the step was skipped."""
        step = self.step
        turn = self.objective.turn(step)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        with others_are_there():
            losses = self._together(self._backward(turn))
        with self.times.part("optimizer"):
            norms = {name: self._gradient_norm(name) for name in turn}
        bad = _not_finite(
            {f"loss of {name}": loss for name, loss in losses.by_player.items()}
            | {f"gradient of {name}": whole(norm) for name, norm in norms.items()}
        )
        if bad:
            self._skip(bad)
            return {}
        with self.times.part("optimizer"):
            self._update(turn, norms)
        self.objective.after_update(step)
        return losses.metrics

    def _update(self, turn: tuple[str, ...], norms: Mapping[str, Tensor]) -> None:
        """Move the players whose turn it is along their gradients, and the moving average after them."""
        section = self.section
        for module in self._changing():
            let_go(module)
        rate = learning_rate(section.optimizer, self.step, section.steps)
        for name in turn:
            player, optimizer = self.players[name], self.optimizers[name]
            if section.optimizer.clip_norm is not None:
                clip_grads_with_norm_(player.module.parameters(), section.optimizer.clip_norm, norms[name])
            for group in optimizer.param_groups:
                group["lr"] = rate * player.learning_rate_scale
            optimizer.step()
        if any(self.players[name].result for name in turn):
            self.average.update(self.result)

    def _backward(self, turn: tuple[str, ...]) -> Losses:
        """Losses of this process's part of the step's batch, its share of the gradients left in the parameters."""
        parts = self.section.accumulate
        found: list[tuple[float, Losses]] = []
        for part in range(parts):
            # Gradients travel between the processes with the last part.
            game, last = self.game, part + 1 == parts
            hold = nullcontext() if last or isinstance(game, Game) else game.no_sync()
            with hold:
                found.append(self._backward_part(turn, part))
        return found[0][1] if len(found) == 1 else _weighted_sum(found)

    def _backward_part(self, turn: tuple[str, ...], part: int) -> tuple[float, Losses]:
        """Losses of one part, and the share of it in what this process works on."""
        run, section, step = self.run, self.section, self.step
        indices = run.processes.share(section.batch_size, section.accumulate, part)
        place = run.processes.rank * section.accumulate + part
        # Dropout and the like draw from torch's generator, which therefore starts anew at every step.
        torch.manual_seed(hash((run.seed, step, place) if place else (run.seed, step)) & 0x7FFFFFFF)
        start = step * section.batch_size + indices.start
        draws = Draws.for_range(run.seed, step, start, len(indices), run.device).within(self.stage)
        waiting = time.monotonic()
        with self.times.part("data"):
            batch = run.assembly.data.training_batch(draws)
        self._data_s += time.monotonic() - waiting
        self._check(batch, len(indices))
        with self.times.part("loss"), autocast(run.device, run.precision):
            by_player, metrics = self.game(turn, batch, draws)
        total = torch.stack([loss.float() for loss in by_player.values()]).sum()
        # The engine takes the mean over processes, of parts whose sizes may differ by one.
        share = len(indices) / section.batch_size * run.processes.size
        with self.times.part("backward"):
            (total if share == 1 else total * share).backward()
        detached = {name: loss.detach() for name, loss in by_player.items()}
        return len(indices) / len(run.processes.share(section.batch_size)), Losses(detached, metrics)

    def _check(self, batch: Batch, count: int) -> None:
        """Refuse tokens that do not exist; an accelerator is waited for only where it is for the log as well."""
        run, assembly = self.run, self.run.assembly
        assert assembly.spec is not None
        values = batch.tokens.device.type == "cpu" or self.step % self.section.log_every == 0
        check_batch(batch, assembly.spec, count, f"data {run.plan.data.entry.name}", values=values)

    def _together(self, losses: Losses) -> Losses:
        """Losses and metrics of the whole batch, the same in every process; also whether any is asked to stop."""
        processes = self.run.processes
        if processes.alone:
            self._stopping = self.run.stop_requested
            return losses
        numbers = [*losses.by_player.values(), *losses.metrics.values()]
        weight = len(processes.share(self.section.batch_size)) / self.section.batch_size
        mine = torch.stack([number.double() for number in numbers]) * weight
        *means, stopping = processes.sum(torch.cat((mine.cpu(), torch.tensor([float(self.run.stop_requested)]))))
        self._stopping = bool(stopping)
        names = [*losses.by_player, *losses.metrics]
        count = len(losses.by_player)
        return Losses(
            dict(zip(names[:count], means[:count], strict=True)), dict(zip(names[count:], means[count:], strict=True))
        )

    def _gradient_norm(self, name: str) -> Tensor:
        parameters = self.players[name].module.parameters()
        return get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])

    def _skip(self, bad: str) -> None:
        """Leave a step out, and say so; give up where skipping cannot help or has been too frequent."""
        self.skipped += 1
        limit = min(self.section.skip_limit, self.section.steps // 10)
        what = f"{bad} not finite at step {self.step + 1} of {self.stage}"
        kept = f"the last checkpoint in {self.directory} is kept; lower the learning rate or look at the data"
        if broken := self._broken_weights():
            raise self.run.processes.agreed(RunError(f"{what}, and so are the {broken}; {kept}"))
        if self.skipped > limit:
            allowed = f"{limit} of {self.section.steps} steps may be skipped (skip_limit)"
            raise self.run.processes.agreed(RunError(f"{what}, and {allowed}; {kept}"))
        self.run.warn(self.step + 1, f"{what}; the step is skipped, {self.skipped} of at most {limit}")

    def _log(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        values = {name: float(value) for name, value in metrics.items()}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            message = (
                f"{', '.join(bad)} not finite at step {self.step} of {self.stage}; the last checkpoint in "
                f"{self.directory} is kept; lower the learning rate or look at the data"
            )
            raise self.run.processes.agreed(RunError(message))
        alarms = self.objective.alarms(values) if values else {}
        for name, message in alarms.items():
            if name not in self.alarms:
                self.run.warn(self.step, f"{message} (step {self.step})")
        self.alarms = set(alarms)
        if self.skipped:
            values["skipped_steps"] = float(self.skipped)
        values["learning_rate"] = learning_rate(self.section.optimizer, self.step - 1, self.section.steps)
        self.run.after_step(self.step, values | self._speed() | peak_memory(self.run.device))
        return values

    def _speed(self) -> dict[str, float]:
        """Throughput of all processes since the last log line, and the parts of a step in this one's time."""
        step, clock = self._logged
        now = time.monotonic()
        seconds, self._logged = max(now - clock, 1e-9), (self.step, now)
        samples = (self.step - step) * self.section.batch_size / seconds
        spec = self.run.assembly.spec
        assert spec is not None
        waited, self._data_s = self._data_s / seconds, 0.0
        shares = {f"{name}_time_share": share for name, share in self.times.shares().items()}
        speed = {"samples_per_second": samples, "tokens_per_second": samples * spec.length}
        return speed | shares | {"data_time_share": waited}

    def save(self) -> None:
        """Write a checkpoint of the whole training state.

        Raises:
            RunError: Weights are not finite, or the disk is full; the checkpoint before is kept.
        """
        if broken := self._broken_weights():
            message = (
                f"{broken} not finite after step {self.step} of {self.stage}; the last checkpoint in {self.directory} "
                "is kept; lower the learning rate or look at the data"
            )
            raise self.run.processes.agreed(RunError(message))
        self._write(self.run.processes)

    def _save_alone(self) -> None:
        """Where others are gone: write what is here, if that is everything and steps were done."""
        if self.run.processes.is_main and not self.run.sharded and self.step:
            self._write(Processes())

    def _broken_weights(self) -> str:
        """Names of players whose weights are not finite, joined; the same in every process."""
        names = [f"weights of {name}" for name in self.players]
        sums = torch.stack([_sum(player.module).cpu() for player in self.players.values()])
        sums = self.run.processes.sum(sums) if self.run.sharded else sums
        return _not_finite(dict(zip(names, sums, strict=True)))

    def _write(self, processes: Processes) -> None:
        tensors: dict[str, Tensor] = {}
        for name, player in self.players.items():
            tensors.update({f"player/{name}/{key}": v for key, v in player.module.state_dict().items()})
            tensors.update(flatten_optimizer(self.optimizers[name], f"optimizer/{name}"))
        tensors.update({f"average/{key}": value for key, value in self.average.module.state_dict().items()})
        for name, module in self.objective.checkpointed().items():
            tensors.update({f"frozen/{name}/{key}": value for key, value in module.state_dict().items()})
        state: dict[str, Any] = {
            "stage": self.stage,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "metrics": self.metrics,
            "average_updates": self.average.updates,
            "objective": dict(self.objective.state()),
        }
        path = save_checkpoint(self.directory, self.step, tensors, state, processes)
        if processes.is_main:
            prune(self.directory, self.run.plan.recipe.run.keep_checkpoints, path)
            self.run.after_checkpoint(self.step, path)
        processes.wait()

    def restore(self) -> None:
        """Continue from the newest checkpoint that is whole; say which ones were not."""
        self.run.processes.from_main(lambda: clear_incomplete(self.directory))
        damaged = False
        for path, problem in load_newest(self.directory):
            if problem is not None:
                self.run.say(f"{problem}; trying the checkpoint before it")
                damaged = True
                continue
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            tensors = load_checkpoint(path, self._like)
            for name, player in self.players.items():
                load_weights(player.module, _under(tensors, f"player/{name}/"), str(path))
                let_go(player.module)
                restore_optimizer(self.optimizers[name], tensors, f"optimizer/{name}")
            load_weights(self.average.module, _under(tensors, "average/"), str(path))
            for name, module in self.objective.checkpointed().items():
                load_weights(module, _under(tensors, f"frozen/{name}/"), str(path))
                let_go(module)
            self.average.updates = state["average_updates"]
            self.objective.load_state(state["objective"])
            self.step, self.seconds = state["step"], state["seconds"]
            self.skipped, self.metrics = state.get("skipped", 0), state.get("metrics", {})
            self.run.say(f"{self.stage}: going on from step {self.step}")
            return
        if damaged:
            self.run.say(f"no checkpoint in {self.directory} is whole; {self.stage} begins anew")

    def _changing(self) -> list[nn.Module]:
        """Modules whose weights change from step to step."""
        return [*(player.module for player in self.players.values()), *self.objective.checkpointed().values()]

    def _like(self, key: str) -> Tensor | None:
        """The tensor of this process whose shards a checkpoint's tensor of that name is cut into, or None."""
        kind, _, rest = key.partition("/")
        if kind == "average":
            return self.average.module.state_dict().get(rest)
        name, _, inner = rest.partition("/")
        if kind == "frozen":
            return self.objective.checkpointed()[name].state_dict().get(inner)
        if kind == "player":
            return self.players[name].module.state_dict().get(inner) if name in self.players else None
        index, _, moment = inner.partition("/")
        weights = self.optimizers[name].param_groups[0]["params"] if name in self.optimizers else []
        return weights[int(index)] if moment != "step" and int(index) < len(weights) else None


def _weighted_sum(parts: list[tuple[float, Losses]]) -> Losses:
    """Means over a batch of what its parts gave, each with its share."""

    def mean(pick: Callable[[Losses], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {
            name: torch.stack([share * pick(losses)[name] for share, losses in parts]).sum()
            for name in pick(parts[0][1])
        }

    return Losses(mean(lambda losses: losses.by_player), mean(lambda losses: losses.metrics))


def _sum(module: nn.Module) -> Tensor:
    """A number that is finite only if all weights are."""
    parts = [local(parameter.detach()) for parameter in module.parameters()]
    return torch.stack([part.float().abs().amax() for part in parts if part.numel()] or [torch.zeros(())]).sum()


def _not_finite(values: dict[str, Tensor]) -> str:
    """Names of what is not finite, joined; empty where all is."""
    numbers = torch.stack([value.detach().float() for value in values.values()]).tolist()
    return ", ".join(name for name, number in zip(values, numbers, strict=True) if not math.isfinite(number))


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
