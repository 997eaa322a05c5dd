"""Clauses for objectives: the rules of the game, and whether playing it teaches anything."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dmmd_core.assemble import seeded
from dmmd_core.draws import Draws
from dmmd_core.interfaces import Batch, DataSpec, Denoiser, Losses, NetworkDenoiser, Objective, Player, Process
from dmmd_core.testing.report import Clause, clause, expect, expect_close
from dmmd_core.testing.subject import GENERAL, Case, needs
from dmmd_core.testing.worlds import LETTERS, Enumerating, Letters, Mixer, Noisy, no_gradient_at, processes

_BATCH = 16
_SINGLE = DataSpec(vocab_size=3, length=1)
_LESSONS = 250


class Game:
    """An objective with its networks, data and process at some sizes.

    Args:
        case: What is judged.
        spec: Sizes.
        process: The noise process.
    """

    def __init__(self, case: ObjectiveCase, spec: DataSpec, process: Process) -> None:
        self.spec, self.process, self.data = spec, process, Letters(spec)
        self.distills = "distills" in case.provides
        with seeded(0):
            start = NetworkDenoiser(self._backbone(spec), process)
            student = Noisy(backbone=copy.deepcopy(start.backbone), process=process, length=spec.length)
        self.network: Denoiser = student if self.distills else start
        own = self.distills or "initializes" in case.provides
        self.teacher: Denoiser | None = Enumerating(process, self.data) if own else None
        self.objective: Objective = case.fresh(
            **vars(spec),
            process=process,
            network=self.network,
            teacher=self.teacher,
            copy_teacher=(lambda: copy.deepcopy(start)) if self.distills else None,
            num_steps=2 if self.distills else None,
            step_times=lambda left: left,
            training_steps=_LESSONS,
        )
        self.players: dict[str, Player] = dict(self.objective.players())

    def _backbone(self, spec: DataSpec) -> Mixer:
        return Mixer(num_inputs=self.process.num_inputs, vocab_size=spec.vocab_size, length=spec.length)

    def draws(self, step: int = 0, count: int = _BATCH, start: int = 0) -> Draws:
        """Randomness of a step."""
        return Draws.for_range(0, step, start, count).within("conformance")

    def losses(self, step: int = 0, draws: Draws | None = None) -> Losses:
        """Losses of a step's turn."""
        draws = draws or self.draws(step)
        with torch.enable_grad():
            return self.objective.loss(tuple(self.objective.turn(step)), self.batch(draws), draws)

    def batch(self, draws: Draws) -> Batch:
        """Examples of a step."""
        return self.data.training_batch(draws)

    def play(self, steps: int, rate: float = 0.02) -> None:
        """Train as the loop does: Adam for whoever's turn it is."""
        optimizers = {name: torch.optim.Adam(one.module.parameters(), lr=rate) for name, one in self.players.items()}
        for step in range(steps):
            for optimizer in optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            losses = self.losses(step, self.draws(step, 128))
            torch.stack([loss.float() for loss in losses.by_player.values()]).sum().backward()
            for name in self.objective.turn(step):
                optimizers[name].step()
            self.objective.after_update(step)

    @torch.no_grad()
    def distance(self) -> float:
        """Total variation between the mean prediction from pure noise and the truth, for one position."""
        draws = Draws.for_range(9, 0, 0, 2000)
        z = self.process.prior_sample(1, draws)
        probs = self.network(z, torch.ones(2000), None, self.network.draw_latent(draws)).log_probs().exp()
        return float((probs.double().mean(0) - self.data.probabilities()).abs().sum() / 2)


class ObjectiveCase(Case):
    """An objective among the kit's letters, with every process of the kit that it works with."""

    def prepare(self) -> None:
        """Choose the processes."""
        for role, capability in (("backbone", "labels"), ("teacher", "unlabelled")):
            if capability in needs(self.part, role):
                raise ValueError(f"it needs {capability} of the {role}, which the kit's has not; choose other params")
        self.processes = processes(needs(self.part, "process"), LETTERS.vocab_size)
        if not self.processes:
            raise ValueError("it needs a process that the kit does not have")
        self.shared: Game | None = None

    @property
    def component(self) -> Game:
        """The game that cheap clauses share."""
        if self.shared is None:
            self.shared = self.game()
        return self.shared

    def game(self, spec: DataSpec = LETTERS, number: int = 0) -> Game:
        """A new game."""
        return Game(self, spec, self.processes[number])


def _parameters(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter in module.parameters()}


@clause("duty", remedy="name what it is for in provides: trains_teacher, initializes or distills")
def duty(case: ObjectiveCase) -> None:
    """It says which stage it is for."""
    duties = {"trains_teacher", "initializes", "distills"}
    expect(duties & case.provides, f"provides gives {sorted(case.provides)} and none of {sorted(duties)}")


@clause("players", remedy="mark exactly one player as result, the network that was passed in; share no parameters")
def players(case: ObjectiveCase) -> None:
    """Players are modules without common parameters; exactly one, the given network, is the result."""
    game = case.component
    results = [name for name, player in game.players.items() if player.result]
    expect(len(results) == 1, f"the players marked as result are {results}")
    expect(game.players[results[0]].module is game.network, "the result is not the network that was passed in")
    taken: dict[int, str] = {}
    for name, player in game.players.items():
        own = _parameters(player.module)
        expect(own, f"player {name!r} has no parameters")
        shared = {taken[number] for number in own & taken.keys()}
        expect(not shared, f"player {name!r} shares parameters with {', '.join(sorted(shared))}")
        expect(player.learning_rate_scale > 0, f"player {name!r} has learning_rate_scale {player.learning_rate_scale}")
        taken.update(dict.fromkeys(own, name))


@clause("turns", remedy="let turn(step) depend on the step alone, and give every player its turn")
def turns(case: ObjectiveCase) -> None:
    """Every step is some player's turn, and every player has one."""
    game = case.component
    seen: set[str] = set()
    for step in range(100):
        turn = game.objective.turn(step)
        expect(len(turn) > 0, f"turn({step}) is nobody's")
        unknown = set(turn) - set(game.players)
        expect(not unknown, f"turn({step}) names {sorted(unknown)}; the players are {sorted(game.players)}")
        expect(game.objective.turn(step) == turn, f"turn({step}) changes when asked again")
        seen |= set(turn)
    idle = sorted(set(game.players) - seen)
    expect(not idle, f"in 100 steps there was no turn of {', '.join(idle)}")


@clause("frozen", remedy="list the teacher in frozen(), ask it under torch.no_grad(), and train nothing of it")
def frozen(case: ObjectiveCase) -> None:
    """What is only asked is listed as frozen, and is no player's."""
    game = case.component
    still = game.objective.frozen()
    own = {number for player in game.players.values() for number in _parameters(player.module)}
    for name, module in still.items():
        expect(isinstance(module, nn.Module), f"frozen() holds {name!r}: {module!r}")
        expect(not own & _parameters(module), f"{name!r} is frozen, and part of a player")
    astray = [name for name, module in game.objective.checkpointed().items() if still.get(name) is not module]
    expect(not astray, f"checkpointed() holds {', '.join(astray)}, which frozen() does not")
    if game.teacher is not None:
        held = any(game.teacher is part for module in still.values() for part in module.modules())
        expect(held, "the teacher is not among frozen(), so that the loop leaves it in training mode")


@clause("losses", remedy="return Losses({player: scalar with a graph}, {name: detached scalar})")
def losses(case: ObjectiveCase) -> None:
    """Each player in turn gets one finite scalar with a graph; metrics are detached scalars."""
    for number in range(len(case.processes)):
        game = case.game(number=number)
        for step in (0, 1):
            made = game.losses(step)
            turn = tuple(game.objective.turn(step))
            expect(set(made.by_player) == set(turn), f"it is the turn of {turn}, losses are of {tuple(made.by_player)}")
            for name, loss in made.by_player.items():
                expect(loss.ndim == 0 and bool(loss.isfinite()), f"the loss of {name!r} is {loss}")
                expect(loss.requires_grad, f"the loss of {name!r} has no graph")
            for name, value in made.metrics.items():
                expect(isinstance(value, Tensor) and value.numel() == 1, f"the metric {name!r} is {value!r}")
                expect(not value.requires_grad, f"the metric {name!r} is not detached")
                expect(math.isfinite(float(value)), f"the metric {name!r} is {float(value)}")


@clause("gradients", remedy="detach what belongs to the other player, and use every parameter of one's own")
def gradients(case: ObjectiveCase) -> None:
    """A player's loss reaches all of its own parameters and no other player's."""
    game = case.game()
    reached: dict[str, set[str]] = {name: set() for name in game.players}
    missed: dict[str, list[str]] = {}
    for step in (0, 1, 2, 3):
        for name in game.objective.turn(step):
            for player in game.players.values():
                player.module.zero_grad(set_to_none=True)
            game.losses(step, game.draws(step, 64)).by_player[name].backward()
            for other, player in game.players.items():
                if other != name and len(no_gradient_at(player.module)) < len(_parameters(player.module)):
                    reached[name].add(other)
            missed[name] = no_gradient_at(game.players[name].module)
    for name, others in reached.items():
        expect(not others, f"the loss of {name!r} sends a gradient to {', '.join(sorted(others))}")
    for name, silent in missed.items():
        expect(not silent, f"the loss of {name!r} sends no gradient to its own {', '.join(silent[:6])}")


@clause("repeatable", remedy="take every random number from the Draws")
def repeatable(case: ObjectiveCase) -> None:
    """Draws alone decide: the same give the same losses, others other ones."""
    game = case.component
    first, again, other = (game.losses(0, game.draws(step)) for step in (0, 0, 1))
    for name, loss in first.by_player.items():
        expect(torch.equal(loss, again.by_player[name]), f"the loss of {name!r} differs for the same Draws")
    same = [name for name, loss in first.by_player.items() if torch.equal(loss, other.by_player[name])]
    expect(not same, f"the loss of {', '.join(same)} does not depend on the Draws")


@clause("batch_mean", remedy="sum over positions and divide by batch * length, never by the number of noisy positions")
def batch_mean(case: ObjectiveCase) -> None:
    """A batch's loss is the mean of its parts' losses, so that it can be split over devices."""
    game = case.component
    draws = game.draws(0, 32)
    whole = game.losses(0, draws)
    parts = [game.losses(0, draws.select(part)) for part in (slice(0, 16), slice(16, 32))]
    for name, loss in whole.by_player.items():
        mean = (parts[0].by_player[name] + parts[1].by_player[name]) / 2
        expect_close(mean, loss, f"the mean of the halves' losses of {name!r}", tolerance=1e-4)


@clause("state", remedy="return JSON from state(), and take it back in load_state")
def state(case: ObjectiveCase) -> None:
    """The state beyond weights survives JSON and a new instance."""
    game = case.game()
    game.play(3)
    kept: Mapping[str, object] = json.loads(json.dumps(dict(game.objective.state())))
    other = case.game()
    other.objective.load_state(kept)
    again = json.loads(json.dumps(dict(other.objective.state())))
    expect(again == kept, f"the state was {kept} and is {again} in a new instance")


@clause("teacher_kept", remedy="never train the teacher, and never put it into training mode")
def teacher_kept(case: ObjectiveCase) -> None:
    """A network as teacher keeps its weights and its mode, and gets no gradient."""
    game = case.game()
    changing = game.objective.checkpointed()
    modules = [module for name, module in game.objective.frozen().items() if name not in changing]
    for module in modules:
        module.eval().requires_grad_(False)
    before = [copy.deepcopy(module.state_dict()) for module in modules]
    game.play(4)
    for module, weights in zip(modules, before, strict=True):
        expect(not module.training, "the teacher was put into training mode")
        same = all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())
        expect(same, "the teacher's weights have changed")


@clause("teaches", remedy="check signs, targets and detached tensors; try it on a world of one position by hand")
def teaches(case: ObjectiveCase) -> None:
    """On one position of three letters, 250 steps bring the model much nearer to the truth."""
    for number in range(len(case.processes)):
        game = case.game(_SINGLE, number)
        before = game.distance()
        game.play(_LESSONS)
        after = game.distance()
        what = type(game.process).__name__.lower()
        expect(
            after < max(0.04, before / 4),
            f"total variation from the truth was {before:.3f} and is {after:.3f} after {_LESSONS} steps ({what} noise)",
        )


CLAUSES: tuple[Clause, ...] = (
    *GENERAL, duty, players, turns, frozen, losses, gradients, repeatable, batch_mean, state, teacher_kept, teaches,
)  # fmt: skip
