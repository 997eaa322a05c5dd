"""The conformance kit: every component of the tree passes it, and for every clause a broken one is caught by it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmmd_backbones.mlp import MLP
from dmmd_backbones.transformer import Transformer
from dmmd_codecs.integers import Integers
from dmmd_core import (
    KINDS,
    Batch,
    Condition,
    DataSpec,
    Draws,
    FieldError,
    Losses,
    Player,
    Samples,
    TablePrediction,
    Value,
    load_plugins,
    option,
)
from dmmd_core.cli import run_command
from dmmd_core.testing import (
    ConformanceError,
    check_backbone,
    check_component,
    check_process,
    check_schedule,
    clauses_of,
    judge,
    kits,
)
from dmmd_data.enumerable import MarkovChain
from dmmd_generators.noise_conditioned import NoiseConditioned
from dmmd_metrics.entropy import TokenEntropy
from dmmd_objectives.denoising import Denoising
from dmmd_objectives.moment_matching import MomentMatching
from dmmd_observers.tensorboard import TensorBoard
from dmmd_processes.masked import Masked
from dmmd_processes.schedules import Linear, Polynomial
from dmmd_processes.uniform import Uniform
from dmmd_samplers.ancestral import Ancestral

REGISTRY = load_plugins()
SHAPES = {"name": "shapes", "params": {"height": 16, "width": 16, "train": 60, "test": 30}}
VQ = {
    "codes": 16, "factor": 4, "height": 16, "width": 16, "channels": 3, "base_channels": 8, "code_width": 4,
    "steps": 4, "batch_size": 8,
}  # fmt: skip
SMALL_BACKBONES: dict[str, dict[str, Any]] = {
    "transformer": {"width": 16, "depth": 2, "heads": 2},
    "unet": {"width": 8, "multipliers": [1, 2], "blocks": 1, "head_width": 8},
    "uvit": {"width": 16, "depth": 3, "heads": 2, "embedding_width": 8},
    "mlp": {"width": 16, "depth": 1, "embedding_width": 8},
}
# What cannot be judged with the parameters of --smoke.
PARAMS: dict[tuple[str, str], dict[str, Any]] = {
    **{("backbone", name): params for name, params in SMALL_BACKBONES.items()},
    ("data", "vq_tokens"): {"source": SHAPES, "tokenizer": {"name": "vq_autoencoder", "params": VQ}},
}
ALL = [entry for entry in REGISTRY if entry.kind in kits()]


@pytest.mark.parametrize("entry", ALL, ids=lambda entry: f"{entry.kind}:{entry.name}")
def test_every_component_of_the_tree_passes(entry: Any) -> None:
    if entry.name == "mauve":
        pytest.skip("needs a model of the hub; its own tests give it a small one")
    check_component(entry.name, PARAMS.get((entry.kind, entry.name)), kind=entry.kind, registry=REGISTRY)


VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    ("backbone", "transformer", {**SMALL_BACKBONES["transformer"], "class_conditional": True, "dropout": 0.1}),
    ("backbone", "transformer", {**SMALL_BACKBONES["transformer"], "block_size": 2}),
    ("backbone", "transformer", {**SMALL_BACKBONES["transformer"], "positions": "learned", "convolutions": 1}),
    ("backbone", "unet", {**SMALL_BACKBONES["unet"], "class_conditional": True, "dropout": 0.1}),
    ("backbone", "uvit", {**SMALL_BACKBONES["uvit"], "class_conditional": True}),
    ("generator", "noise_conditioned", {"latent": "sequence", "width": 4}),
    ("generator", "noise_conditioned", {"latent": "pyramid", "width": 4}),
    ("objective", "denoising", {"target": "teacher"}),
    ("objective", "denoising", {"chunk_rows": 5}),
    ("objective", "moment_matching", {"turns": "alternate", "auxiliary_target": "posterior"}),
    ("objective", "moment_matching", {"auxiliary_target": "soft", "times": "grid"}),
    ("generator", "partly_random", {"masked_share": 0.2, "width": 4}),
    ("objective", "dimo", {"turns": "joint", "jeffreys_coefficient": 1.0}),
    ("objective", "sdtt", {"divergence": "forward_kl", "round_average": 0.9, "times": "grid"}),
    ("process", "masked", {"weight": "elbo", "schedule": {"name": "cosine"}}),
    ("process", "uniform", {"loss": "posterior_kl", "weight": "elbo", "parametrization": "leave_one_out"}),
    ("process", "uniform", {"parametrization": "leave_one_out", "schedule": {"name": "polynomial"}}),
    ("sampler", "ancestral", {"chunk_rows": 3}),
]


@pytest.mark.parametrize(("kind", "name", "params"), VARIANTS, ids=lambda value: str(value)[:40])
def test_components_pass_in_their_other_settings(kind: str, name: str, params: dict[str, Any]) -> None:
    check_component(name, params, kind=kind, registry=REGISTRY)


def test_other_kinds_are_held_against_the_general_clauses() -> None:
    others = [entry for entry in REGISTRY if entry.kind not in kits()]
    assert {entry.kind for entry in others} == set(KINDS) - set(kits())
    for entry in others:
        if all(field.default is not dataclasses.MISSING for field in dataclasses.fields(entry.cls.Config)):
            report = judge(entry.name, {}, kind=entry.kind, registry=REGISTRY)
            broken = [outcome for outcome in report.failures if "raised RecipeError" not in outcome.message]
            assert not broken, report  # a file or a hub that is not there is no fault of the class


# ---- broken components: the clause meant for each catches it, and says what is wrong -----------------------------


def variant(base: type, **members: Any) -> type:
    """A subclass with some members replaced."""
    return type("Broken", (base,), {"__doc__": "Broken.", "__module__": __name__, **members})


def _with_init(base: type, more: Callable[[Any], None], **members: Any) -> type:
    """A subclass whose constructor does something more, with the base's own signature."""

    def init(self: Any, config: Any, **arguments: Any) -> None:
        base.__init__(self, config, **arguments)  # type: ignore[misc]
        more(self)

    import inspect

    init.__signature__ = inspect.signature(base.__init__)  # type: ignore[attr-defined,misc]
    return variant(base, __init__=init, **members)


class Stubborn(Polynomial):
    """Its Config changes what it is given."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        power: float = option(2.0, help="exponent")

        def __post_init__(self) -> None:
            object.__setattr__(self, "power", self.power * 2)


class Silent(Polynomial):
    """Its Config tells nothing."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        power: float = 2.0


class Loud(Linear):
    """Changes the default dtype."""

    def alpha(self, t: Tensor) -> Tensor:
        torch.set_default_dtype(torch.float64)
        return super().alpha(t)


def _refuse(self: Any) -> None:
    raise FieldError("", "no luck today")


def _random_alpha(self: Any, t: Tensor) -> Tensor:
    return (1 - t).clamp(0, 1) + 0 * torch.rand(())


def _stuck(self: Any, t: Tensor) -> Tensor:
    return torch.where(t < 0.5, 1 - t, 0.5) * (t < 1)


GENERAL: list[tuple[str, str, type, dict[str, Any], str]] = [
    ("schedule", "builds", _with_init(Linear, _refuse), {}, "no luck today"),
    ("schedule", "builds", variant(Linear, Config=int), {}, "Config must be a dataclass"),
    ("schedule", "documented", variant(Linear, __doc__=None), {}, "has no docstring"),
    ("schedule", "documented", Silent, {}, "tells nothing of power"),
    ("schedule", "config", Stubborn, {}, "it comes back as"),
    ("schedule", "declarations", variant(Linear, provides=classmethod(lambda c, config: ["x"])), {}, "gives ['x']"),
    ("schedule", "declarations", variant(Linear, smoke=classmethod(lambda c, config: 3)), {}, "gives a int"),
    ("schedule", "global_state", Loud, {}, "torch's default dtype went from torch.float32 to torch.float64"),
    ("schedule", "global_state", variant(Linear, alpha=_random_alpha), {}, "torch's random state changed (while"),
    ("schedule", "ends", variant(Linear, alpha=lambda self, t: 0.001 + 0.998 * (1 - t)), {}, "at t = 0"),
    ("schedule", "falls", variant(Linear, alpha=_stuck), {}, "alpha does not fall after t = 0.5"),
    ("schedule", "slope", variant(Linear, alpha_prime=lambda self, t: -2 * torch.ones_like(t)), {}, "alpha_prime"),
    ("schedule", "form", variant(Linear, alpha=lambda self, t: (1 - t).double()), {}, "gives torch.float64"),
]


# ---- processes


def _own_random(shape: Any) -> Tensor:
    _own_random.count += 1  # type: ignore[attr-defined]
    return torch.rand(shape, generator=torch.Generator().manual_seed(_own_random.count), dtype=torch.float64)  # type: ignore[attr-defined]


_own_random.count = 0  # type: ignore[attr-defined]


class ForgetsPositions(Uniform):
    """One time for all positions."""

    def corrupt(self, x: Tensor, t: Tensor, draws: Draws) -> Tensor:
        return super().corrupt(x, t if t.ndim == 1 else t.amax(-1), draws)


class OwnNoise(Uniform):
    """Noise of its own."""

    def corrupt(self, x: Tensor, t: Tensor, draws: Draws) -> Tensor:
        return torch.where(_own_random(x.shape) < 0.5, x, 0)


class TooNoisy(Uniform):
    """Keeps too few tokens."""

    def corrupt(self, x: Tensor, t: Tensor, draws: Draws) -> Tensor:
        return super().corrupt(x, 1 - (1 - t) ** 2, draws)


class LateTimes(Uniform):
    """Posterior of another time."""

    def posterior_probs(self, x_probs: Tensor, z_t: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return super().posterior_probs(x_probs, z_t, 0.9 * s, t)


class BestGuess(Uniform):
    """Takes the likeliest token for the whole distribution."""

    def posterior_probs(self, x_probs: Tensor, z_t: Tensor, s: Tensor, t: Tensor) -> Tensor:
        sharp = torch.nn.functional.one_hot(x_probs.argmax(-1), self.vocab_size)
        return super().posterior_probs(sharp.double(), z_t, s, t)


class Lazy(Uniform):
    """Stays where it is."""

    def posterior_sample(self, x: Tensor, z_t: Tensor, s: Tensor, t: Tensor, draws: Draws) -> Tensor:
        return z_t


class Restless(Uniform):
    """Moves although no time has passed."""

    def posterior_sample(self, x: Tensor, z_t: Tensor, s: Tensor, t: Tensor, draws: Draws) -> Tensor:
        moved = super().posterior_sample(x, z_t, s, t, draws)
        return (moved + 1) % self.vocab_size if torch.equal(s, t) else moved


class HugeLogits(Masked):
    """Carries tokens over by large logits."""

    def clean_log_probs(self, logits: Tensor, z: Tensor, t: Tensor) -> Tensor:
        known = self.known(z.unsqueeze(-1), t)
        carried = torch.nn.functional.one_hot(z.clamp(max=self.vocab_size - 1), self.vocab_size).to(logits) - 1
        return torch.where(known, 1e6 * carried, logits).log_softmax(-1)


class DoublesSoft(Uniform):
    """Soft targets count twice."""

    def row_losses(self, target: Tensor, log_probs: Tensor, z: Tensor, s: Tensor) -> Tensor:
        losses = super().row_losses(target, log_probs, z, s)
        return losses if target.dtype == torch.int64 else 2 * losses


def _zeros(self: Any, z: Tensor, *rest: Any) -> Tensor:
    return torch.zeros_like(z, dtype=torch.bool)


PROCESSES: list[tuple[str, str, type, dict[str, Any], str]] = [
    (
        "process",
        "prior",
        variant(Uniform, prior=lambda self: torch.full((3,), 0.4).double()),
        {},
        "prior() sums to 1.2",
    ),
    ("process", "signal_level", variant(Uniform, alpha=lambda self, t: self.schedule.alpha(t)), {}, "torch.float32"),
    ("process", "corrupt", TooNoisy, {}, "corrupt of x = 0 at t = 0.13"),
    (
        "process",
        "prior_sample",
        variant(Uniform, prior_sample=lambda s, n, d: torch.zeros(d.batch, n).long()),
        {},
        "position 0: token 0",
    ),
    ("process", "times_per_position", ForgetsPositions, {}, "corrupt changed a token whose time is 0"),
    ("process", "bayes", LateTimes, {}, "posterior_probs at x = 0, z_t = 0"),
    ("process", "averages", BestGuess, {}, "posterior_probs [z_t, z_s]"),
    ("process", "posterior_sample", Lazy, {}, "posterior_sample at x = "),
    ("process", "equal_times", Restless, {}, "posterior_sample with s = t = 0.0 changes"),
    ("process", "rows_to_draw", variant(Uniform, rows_to_draw=_zeros), {}, "positions not to be drawn follow x"),
    ("process", "known", variant(Masked, known=_zeros), {}, "known is wrong at z_t = [0, 1, 2]"),
    (
        "process",
        "clean_mean",
        variant(Masked, clean_log_probs=lambda self, logits, z, t: logits.log_softmax(-1)),
        {},
        "exp(clean_log_probs)",
    ),
    ("process", "clean_mean", HugeLogits, {}, "by large logits"),
    (
        "process",
        "evidence",
        variant(Uniform, evidence=lambda self, z, t: torch.zeros(z.shape).double()),
        {},
        "evidence at t = ",
    ),
    (
        "process",
        "news",
        variant(Uniform, clean_posterior=lambda self, log_probs, *rest: log_probs),
        {},
        "clean_posterior",
    ),
    ("process", "loss_rows", variant(Uniform, rows_with_loss=_zeros), {}, "are unknown and carry no loss"),
    ("process", "loss_is_linear", DoublesSoft, {}, "row_losses of a soft target"),
    (
        "process",
        "loss_is_proper",
        variant(Uniform, candidate_losses=lambda self, p, z, s: (1 - p.exp()).square()),
        {},
        "the gradient in the logits",
    ),
    ("process", "loss_weight", variant(Uniform, loss_weight=lambda self, s: 1 / s), {}, "loss_weight at s = 0 is inf"),
    ("process", "repeatable", OwnNoise, {}, "corrupt differs when called again"),
    (
        "process",
        "dtypes",
        variant(Uniform, clean_log_probs=lambda self, logits, z, t: logits.float()),
        {},
        "of torch.float64 logits is torch.float32",
    ),
    ("process", "devices", variant(Uniform, corrupt=lambda self, x, t, draws: x.cpu()), {}, ""),
]


# ---- backbones


class Features:
    """Makes a backbone of a function of its own features."""

    def __init__(self, change: Callable[..., Tensor]) -> None:
        self.change = change

    def of(self, base: type) -> type:
        change = self.change

        def features(
            self: Any, z_t: Tensor, t: Tensor, condition: Condition, input_noise: Tensor | None = None
        ) -> Tensor:
            inner = lambda *arguments: base.features(self, *arguments)  # type: ignore[attr-defined]  # noqa: E731
            return change(self, inner, z_t, t, condition, input_noise)

        return variant(base, features=features)


def _add_parameter(self: Any) -> None:
    self.spare = nn.Parameter(torch.ones(3))


def _add_on_cpu(self: Any) -> None:
    self.spare = nn.Parameter(torch.ones(3, device="cpu"))


def _constant(self: Any) -> None:
    for parameter in self.parameters():
        nn.init.constant_(parameter, 0.1)


def _random_scale(self: Any) -> None:
    self.scale = float(torch.rand(())) if torch.get_default_device().type != "meta" else 1.0


def _scaled(self: Any, inner: Any, z: Tensor, t: Tensor, condition: Condition, noise: Tensor | None) -> Tensor:
    return self.scale * inner(z, t, condition, noise)


MLP_PARAMS = SMALL_BACKBONES["mlp"]
CLASSES = {**SMALL_BACKBONES["transformer"], "class_conditional": True}
BLOCKS = {**SMALL_BACKBONES["transformer"], "block_size": 2}
BACKBONES: list[tuple[str, str, type, dict[str, Any], str]] = [
    (
        "backbone",
        "sizes",
        variant(MLP, head=lambda self, f: self.logits(f).repeat(1, 2)),
        MLP_PARAMS,
        "expected [12, 3]",
    ),
    (
        "backbone",
        "rows",
        variant(MLP, head=lambda self, f: self.logits(f - f.mean(0))),
        MLP_PARAMS,
        "head of some rows",
    ),
    (
        "backbone",
        "samples",
        Features(lambda s, f, *a: f(*a) - f(*a).mean(0)).of(MLP),
        MLP_PARAMS,
        "features of a sample alone",
    ),
    (
        "backbone",
        "times",
        Features(lambda s, f, z, t, *a: f(z, 0 * t, *a)).of(MLP),
        MLP_PARAMS,
        "do not depend on the time",
    ),
    (
        "backbone",
        "positions",
        Features(lambda s, f, z, *a: s.tokens(z)).of(MLP),
        MLP_PARAMS,
        "features of position 0 do not depend",
    ),
    (
        "backbone",
        "positions",
        Features(lambda s, f, *a: f(*a).mean(1, keepdim=True).expand(-1, 4, -1)).of(MLP),
        MLP_PARAMS,
        "cannot tell the first",
    ),
    (
        "backbone",
        "evaluation",
        Features(lambda s, f, *a: f(*a) + _own_random((3, 4, 8)).float()).of(MLP),
        MLP_PARAMS,
        "two calls in evaluation mode",
    ),
    (
        "backbone",
        "input_noise",
        Features(lambda s, f, z, t, c, n: f(z, t, c)).of(MLP),
        MLP_PARAMS,
        "do not depend on input_noise",
    ),
    (
        "backbone",
        "labels",
        Features(lambda s, f, z, t, c, n: f(z, t, Condition(), n)).of(Transformer),
        CLASSES,
        "labels 0 and 1 give the same",
    ),
    ("backbone", "gradients", _with_init(MLP, _add_parameter), MLP_PARAMS, "no gradient reaches spare"),
    ("backbone", "seed", _with_init(MLP, _constant), MLP_PARAMS, "two seeds give the same weights"),
    (
        "backbone",
        "state",
        Features(_scaled).of(_with_init(MLP, _random_scale)),
        MLP_PARAMS,
        "features of a new backbone",
    ),
    ("backbone", "meta", _with_init(MLP, _add_on_cpu), MLP_PARAMS, "spare lie on the CPU"),
    (
        "backbone",
        "precision",
        Features(lambda s, f, *a: f(*a).float()).of(MLP),
        MLP_PARAMS,
        "the features are torch.float32",
    ),
    (
        "backbone",
        "blocks",
        Features(
            lambda s, f, z, t, c, n: f(
                z, t, Condition(clean=None if c.clean is None else c.clean.flip(1), context=c.context), n
            )
        ).of(Transformer),
        BLOCKS,
        "changed clean tokens",
    ),
    ("backbone", "devices", Features(lambda s, f, *a: f(*a).cpu()).of(MLP), MLP_PARAMS, ""),
]


# ---- generators


class Unnormalised(NoiseConditioned):
    """Probabilities that sum to 2."""

    def forward(self, *arguments: Any, **more: Any) -> Any:
        made = super().forward(*arguments, **more)
        return TablePrediction((made.log_probs() + math.log(2)).unflatten(0, (-1, 4)))


class Forgiving(NoiseConditioned):
    """Makes do without a latent."""

    def forward(self, z_t: Tensor, t: Tensor, condition: Any = None, latent: Any = None) -> Any:
        return super().forward(z_t, t, condition, torch.zeros(len(z_t), 4, 4) if latent is None else latent)


class Deaf(NoiseConditioned):
    """Keeps the condition to itself."""

    def forward(self, z_t: Tensor, t: Tensor, condition: Any = None, latent: Any = None) -> Any:
        return super().forward(z_t, t, None, latent)


class ScaledNoise(_with_init(NoiseConditioned, _random_scale)):  # type: ignore[misc]
    """Something random that no state holds."""

    def input_noise(self, latent: Tensor) -> Tensor:
        return self.scale * super().input_noise(latent)


NOISE = {"width": 4}
GENERATORS: list[tuple[str, str, type, dict[str, Any], str]] = [
    (
        "generator",
        "weights_kept",
        _with_init(NoiseConditioned, lambda self: _constant(self.backbone)),
        NOISE,
        "the constructor changed the backbone's",
    ),
    ("generator", "prediction", Unnormalised, NOISE, "the sum of a row's probabilities is 2"),
    (
        "generator",
        "latent",
        variant(NoiseConditioned, draw_latent=lambda s, d, n=None: _own_random((d.batch, 4, 4)).float()),
        NOISE,
        "the same Draws give another latent",
    ),
    (
        "generator",
        "latent",
        variant(NoiseConditioned, draw_latent=lambda s, d, n=None: None),
        NOISE,
        "takes_latent is True",
    ),
    (
        "generator",
        "latent_matters",
        variant(NoiseConditioned, input_noise=lambda s, latent: torch.zeros(len(latent), 4, 8)),
        NOISE,
        "does not depend on the latent",
    ),
    ("generator", "latent_asked_for", Forgiving, NOISE, "a call without a latent is answered"),
    (
        "generator",
        "gradients",
        variant(NoiseConditioned, input_noise=lambda s, latent: s.project(latent).detach()),
        NOISE,
        "no gradient reaches project.weight",
    ),
    ("generator", "state", ScaledNoise, NOISE, "probabilities of a new generator"),
    ("generator", "condition", Deaf, NOISE, "does not reach the backbone"),
    ("generator", "meta", _with_init(NoiseConditioned, _add_on_cpu), NOISE, "spare lie on the CPU"),
    (
        "generator",
        "devices",
        variant(NoiseConditioned, draw_latent=lambda s, d, n=None: torch.zeros(d.batch, 4, 4)),
        NOISE,
        "",
    ),
]


# ---- objectives


class ChangedLoss:
    """Makes an objective that changes what another one computes."""

    def __init__(self, change: Callable[[Any, Losses, Batch], None]) -> None:
        self.change = change

    def of(self, base: type) -> type:
        change = self.change

        def loss(self: Any, turn: tuple[str, ...], batch: Batch, draws: Draws) -> Losses:
            made: Losses = base.loss(self, turn, batch, draws)  # type: ignore[attr-defined]
            change(self, made, batch)
            return made

        return variant(base, loss=loss)


def _reach_over(self: Any, losses: Losses, batch: Batch) -> None:
    losses.by_player["student"] = losses.by_player["student"] + 1e-3 * sum(p.sum() for p in self.auxiliary.parameters())


def _attached(self: Any, losses: Losses, batch: Batch) -> None:
    losses.metrics["loss"] = losses.by_player["network"]


def _random_loss(self: Any, losses: Losses, batch: Batch) -> None:
    losses.by_player["network"] = losses.by_player["network"] + float(_own_random(()))


def _sum(self: Any, losses: Losses, batch: Batch) -> None:
    losses.by_player["network"] = losses.by_player["network"] * len(batch)


def _ascend(self: Any, losses: Losses, batch: Batch) -> None:
    losses.by_player["network"] = -losses.by_player["network"]


def _wake(self: Any, losses: Losses, batch: Batch) -> None:
    self.teacher.train()


OBJECTIVES: list[tuple[str, str, type, dict[str, Any], str]] = [
    (
        "objective",
        "duty",
        variant(Denoising, provides=classmethod(lambda c, config: frozenset({"blocks"}))),
        {},
        "none of",
    ),
    (
        "objective",
        "players",
        variant(Denoising, players=lambda self: {"network": Player(self.network)}),
        {},
        "the players marked as result are []",
    ),
    ("objective", "turns", variant(Denoising, turn=lambda self, step: ()), {}, "turn(0) is nobody's"),
    ("objective", "turns", variant(MomentMatching, turn=lambda self, step: ("student",)), {}, "no turn of auxiliary"),
    ("objective", "frozen", variant(MomentMatching, frozen=lambda self: {}), {}, "the teacher is not among frozen()"),
    (
        "objective",
        "frozen",
        variant(MomentMatching, checkpointed=lambda self: {"former": self.teacher}),
        {},
        "checkpointed() holds former, which frozen() does not",
    ),
    ("objective", "losses", ChangedLoss(_attached).of(Denoising), {}, "the metric 'loss' is not detached"),
    (
        "objective",
        "gradients",
        ChangedLoss(_reach_over).of(MomentMatching),
        {},
        "the loss of 'student' sends a gradient to auxiliary",
    ),
    ("objective", "repeatable", ChangedLoss(_random_loss).of(Denoising), {}, "differs for the same Draws"),
    ("objective", "batch_mean", ChangedLoss(_sum).of(Denoising), {}, "the mean of the halves' losses of 'network'"),
    ("objective", "state", variant(Denoising, state=lambda self: {"round": 1}), {}, "has no state to load"),
    ("objective", "teacher_kept", ChangedLoss(_wake).of(MomentMatching), {}, "put into training mode"),
    ("objective", "teaches", ChangedLoss(_ascend).of(Denoising), {}, "total variation from the truth was"),
]


# ---- data


class Grows(MarkovChain):
    """Learns its size late."""

    def prepare(self) -> None:
        self.spec = DataSpec(5, 4)


class Counts(MarkovChain):
    """Goes on from where it was."""

    calls = 0

    def training_batch(self, draws: Draws) -> Batch:
        Counts.calls += 1
        return super().training_batch(Draws(draws.seed + Counts.calls, draws.step, draws.sample_indices))


class Shares(MarkovChain):
    """Hands out what it keeps."""

    def training_batch(self, draws: Draws) -> Batch:
        if not hasattr(self, "kept"):
            self.kept = super().training_batch(draws)
        return self.kept


class OneSplit(MarkovChain):
    """Any name will do."""

    def split(self, name: str) -> Batch:
        return Batch(self.sequences())


class Few(Integers):
    """Shows one sample, whatever there is."""

    def decode(self, tokens: Tensor) -> Tensor:
        return tokens[:1]


class Anonymous(Integers):
    """A fingerprint of this object alone."""

    def fingerprint(self) -> str:
        return str(id(self))


def _codec(cls: type) -> Callable[[Any], None]:
    def change(self: Any) -> None:
        self.codec = cls(cls.Config())

    return change


CHAIN = {"letters": 3, "length": 3}
DATA: list[tuple[str, str, type, dict[str, Any], str]] = [
    ("data", "spec", Grows, CHAIN, "prepare() changed spec"),
    (
        "data",
        "batch",
        variant(MarkovChain, training_batch=lambda s, d: Batch(torch.zeros(d.batch, 3).int())),
        CHAIN,
        "tokens are torch.int32",
    ),
    ("data", "repeatable", Counts, CHAIN, "the same Draws give another batch"),
    ("data", "untouched", Shares, CHAIN, "came back so"),
    ("data", "splits", OneSplit, CHAIN, "split of a split that does not exist raises no KeyError"),
    ("data", "facts", variant(MarkovChain, facts=lambda self: {"error": math.nan}), CHAIN, "'error': nan"),
    (
        "data",
        "probabilities",
        variant(MarkovChain, probabilities=lambda self: 2 * self._compute()),
        CHAIN,
        "they sum to",
    ),
    ("data", "codec", _with_init(MarkovChain, _codec(Few)), CHAIN, "decode of 4 samples gives 1"),
    ("data", "codec_state", _with_init(MarkovChain, _codec(Anonymous)), CHAIN, "the fingerprint was"),
    (
        "data",
        "devices",
        variant(MarkovChain, training_batch=lambda s, d: Batch(torch.zeros(d.batch, 3).long())),
        CHAIN,
        "",
    ),
]


# ---- samplers


class Changed:
    """Makes a sampler that changes what another one is asked for, or gives."""

    def __init__(self, change: Callable[..., Any]) -> None:
        self.change = change

    @property
    def sampler(self) -> type:
        change = self.change

        def sample(self: Any, denoiser: Any, draws: Draws, **more: Any) -> Any:
            return change(lambda *a, **m: Ancestral.sample(self, *a, **m), denoiser, draws, **more)

        return variant(Ancestral, sample=sample)


def _one_latent(inner: Any, denoiser: Any, draws: Draws, **more: Any) -> Any:
    draw = denoiser.draw_latent
    denoiser.draw_latent = lambda now, length=None: draw(now.at_step(0), length)
    return inner(denoiser, draws, **more)


def _without(*names: str) -> Callable[..., Any]:
    def change(inner: Any, denoiser: Any, draws: Draws, **more: Any) -> Any:
        condition = more.pop("condition") or Condition()
        return inner(denoiser, draws, condition=dataclasses.replace(condition, **dict.fromkeys(names)), **more)

    return change


def _labels_turned_round(inner: Any, denoiser: Any, draws: Draws, **more: Any) -> Any:
    condition = more.pop("condition") or Condition()
    turned = None if condition.label is None else condition.label.flip(0)
    return inner(denoiser, draws, condition=dataclasses.replace(condition, label=turned), **more)


def _flat_last(inner: Any, denoiser: Any, draws: Draws, **more: Any) -> Any:
    tokens = inner(denoiser, draws, **more).tokens
    return Samples(tokens, torch.full((*tokens.shape, 3), 1 / 3).log())


SAMPLERS: list[tuple[str, str, type, dict[str, Any], str]] = [
    ("sampler", "tokens", Changed(lambda f, m, d, **k: Samples(f(m, d, **k).tokens + 1)).sampler, {}, "expected 0..2"),
    (
        "sampler",
        "calls",
        Changed(lambda f, m, d, **k: f(m, d, **{**k, "num_steps": 2 * k["num_steps"]})).sampler,
        {},
        "1 steps made 2 calls",
    ),
    (
        "sampler",
        "repeatable",
        Changed(lambda f, m, d, **k: f(m, Draws(int(1e6 * _own_random(())), 0, d.sample_indices), **k)).sampler,
        {},
        "the same Draws give other samples",
    ),
    ("sampler", "fixed", Changed(_without("fixed", "values")).sampler, {}, "given tokens were changed"),
    ("sampler", "condition", Changed(_without("label")).sampler, {}, "without the labels"),
    ("sampler", "condition", Changed(_labels_turned_round).sampler, {}, "labels of other samples"),
    ("sampler", "latent", Changed(_one_latent).sampler, {}, "two calls were given one latent"),
    ("sampler", "step_times", variant(Ancestral, step_times=lambda s, left: left.float()), {}, "torch.float32"),
    ("sampler", "step_times", variant(Ancestral, step_times=lambda s, left: left / 2), {}, "lead from 0.5 to 0.0"),
    (
        "sampler",
        "step_times",
        variant(Ancestral, step_times=lambda s, left: (2 * left).clamp(max=1)),
        {},
        "turn back or stand still",
    ),
    ("sampler", "one_position", Ancestral, {"temperature": 0.7}, "was drawn with frequency"),
    ("sampler", "last_step", Changed(_flat_last).sampler, {}, "more or less often than the last probabilities say"),
    (
        "sampler",
        "distribution",
        variant(Ancestral, distribution=lambda s, d, **k: Ancestral.distribution(s, d, **k) / 2),
        {},
        "it sums to 0.5",
    ),
    (
        "sampler",
        "no_steps",
        Changed(lambda f, m, d, **k: f(m, d, **{**k, "num_steps": max(1, k["num_steps"])})).sampler,
        {},
        "num_steps=0 raises no ValueError",
    ),
    (
        "sampler",
        "no_gradient",
        variant(Ancestral, sample=Ancestral.sample.__wrapped__, step=Ancestral.step.__wrapped__),  # type: ignore[attr-defined]
        {},
        "with gradients on",
    ),
    ("sampler", "devices", Changed(lambda f, m, d, **k: Samples(f(m, d, **k).tokens.cpu())).sampler, {}, ""),
]


# ---- metrics


def figure(compute: Callable[[Any], Any], name: str = "figure", **more: Any) -> type:
    """A metric of one figure."""
    return variant(TokenEntropy, evaluate=lambda self, subject: [Value(name, compute(subject), num_samples=9)], **more)


def _mean(subject: Any) -> float:
    return float(subject.tokens.double().mean())


METRICS: list[tuple[str, str, type, dict[str, Any], str]] = [
    ("metric", "facts", figure(_mean, prepare=lambda self: {"loss": math.inf}), {}, "'loss': inf"),
    ("metric", "values", figure(_mean, "my figure"), {}, "the figure is called 'my figure'"),
    (
        "metric",
        "values",
        figure(lambda subject: subject.tokens.double().mean()),
        {},
        "figure is Tensor, expected float",
    ),
    ("metric", "repeatable", figure(lambda subject: float(_own_random(()))), {}, "when asked again"),
    (
        "metric",
        "yardsticks",
        figure(lambda subject: float(len(subject.sampler.process.prior()))),
        {},
        "raised AttributeError",
    ),
    (
        "metric",
        "few_samples",
        figure(lambda subject: _mean(subject) if len(subject.tokens) > 1 else math.nan),
        {},
        "figure of one sample is nan",
    ),
    (
        "metric",
        "untouched",
        figure(lambda subject: float(subject.tokens.zero_().sum())),
        {},
        "evaluate changed the subject's tokens",
    ),
    ("metric", "looks", figure(lambda subject: 1.0), {}, "get the same figures as real data"),
]


# ---- observers


def watching(**members: Any) -> type:
    """TensorBoard's observer with some methods replaced."""
    return variant(TensorBoard, **members)


def _write_at_once(self: Any) -> None:
    (self.directory.parent / "early").touch()


def _stray(self: Any) -> None:
    Path("stray").touch()


def _forget(self: Any) -> None:
    (self.directory.parent / "life").mkdir()


def _only_begun(self: Any, error: BaseException | None) -> None:
    if not self._writers:
        raise RuntimeError("nothing is open")


def _blacken(self: Any, model: str, num_steps: int, samples: Any) -> None:
    if isinstance(samples, Tensor):
        samples.zero_()


def _finite_alone(self: Any, model: str, num_steps: int, figures: Any) -> None:
    for figure in figures:
        json.dumps(figure.value, allow_nan=False)


OBSERVERS: list[tuple[str, str, type, dict[str, Any], str]] = [
    ("observer", "constructor", _with_init(TensorBoard, _write_at_once), {}, "the run directory holds early before"),
    ("observer", "life", watching(on_samples=_blacken), {}, "the pictures that were handed over have been changed"),
    ("observer", "life", watching(on_figures=_finite_alone), {}, "Out of range float values"),
    ("observer", "place", watching(begin=_stray), {}, "it left stray in the working directory"),
    ("observer", "end", watching(end=_only_begun), {}, "nothing is open"),
    ("observer", "resume", watching(begin=_forget), {}, "FileExistsError"),
]

BROKEN = [*GENERAL, *PROCESSES, *BACKBONES, *GENERATORS, *OBJECTIVES, *DATA, *SAMPLERS, *METRICS, *OBSERVERS]


@pytest.mark.parametrize(
    ("kind", "clause", "cls", "params", "words"), BROKEN, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_broken_component_is_caught_by_the_clause_meant_for_it(
    kind: str, clause: str, cls: type, params: dict[str, Any], words: str
) -> None:
    if clause == "devices" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with pytest.raises(ConformanceError) as caught:
        check_component(cls, params, kind=kind, only=[clause], registry=REGISTRY)
    (failure,) = caught.value.report.failures
    assert failure.clause == clause
    assert words in failure.message, failure.message
    assert failure.remedy
    assert words in str(caught.value)


def test_an_observer_that_fails_on_the_way_is_ended_as_a_run_would() -> None:
    ended = []

    def _end(self: TensorBoard, error: BaseException | None) -> None:
        ended.append(error)
        TensorBoard.end(self, error)

    failing = variant(TensorBoard, on_figures=_finite_alone, end=_end)
    with pytest.raises(ConformanceError, match="Out of range float values"):
        check_component(failing, {}, kind="observer", only=["life"], registry=REGISTRY)
    (error,) = ended
    assert isinstance(error, ValueError)


def test_every_clause_has_a_broken_component() -> None:
    covered = {(kind, clause) for kind, clause, *_ in BROKEN}
    general = {clause.name for clause in clauses_of("codec")}
    for kind in kits():
        for clause in clauses_of(kind):
            assert clause.name in general or (kind, clause.name) in covered, f"{kind}: {clause.name}"
    assert {("schedule", name) for name in (*general, "builds", "global_state")} <= covered


def test_what_was_changed_is_put_back() -> None:
    judge(Loud, {}, registry=REGISTRY)
    assert torch.get_default_dtype() == torch.float32


def test_one_line_is_enough_and_clauses_may_be_left_out() -> None:
    report = check_process(Masked)
    assert report.holds
    assert "0 failed" not in str(report)
    assert str(report).splitlines()[0] == "process Masked of dmmd_processes.masked"
    assert check_backbone(MLP, MLP_PARAMS, skip=["precision"]).holds
    with pytest.raises(ValueError, match="there is no clause sloppe; the clauses are builds"):
        check_schedule(Linear, only=["sloppe"])


def test_the_command_prints_a_line_a_clause_and_fails_with_a_broken_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--conformance", "process:masked", "weight=elbo"]) == 0
    out = capsys.readouterr().out
    assert "process masked (plugin 'processes' of package dmmd" in out
    assert all(f"  {clause.name} " in out for clause in clauses_of("process"))
    assert run_command(["--conformance", "sampler:ancestral", "temperature=0.7"]) == 2
    told = capsys.readouterr()
    assert "FAILED       one_position" in told.out
    assert "what to do" in told.out
    assert told.err.startswith("dmmd: sampler ancestral (plugin 'samplers'")
    assert "breaks 1 of 18 clauses: one_position" in told.err.splitlines()[0]
    assert run_command(["--conformance", "masked"]) == 2
    assert "KIND:NAME" in capsys.readouterr().err
    assert run_command(["--conformance", "process:maskd"]) == 2
    assert "did you mean 'masked'" in capsys.readouterr().err


def test_a_report_is_json(tmp_path: Path) -> None:
    plain = json.loads(json.dumps(judge("linear", kind="schedule", registry=REGISTRY).plain()))
    assert plain["holds"] is True
    assert {clause["verdict"] for clause in plain["clauses"]} == {"ok"}
