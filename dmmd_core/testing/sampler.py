"""Clauses for samplers, held against an enumerating teacher and a small student with a latent."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dmmd_core.assemble import seeded
from dmmd_core.draws import Draws
from dmmd_core.errors import UnsupportedError
from dmmd_core.interfaces import Condition, DataSpec, Denoiser, Process, Samples
from dmmd_core.testing.report import Breach, Clause, Skip, clause, expect, expect_close, expect_frequencies
from dmmd_core.testing.subject import GENERAL, Case, needs
from dmmd_core.testing.worlds import Enumerating, Letters, Mixer, Noisy, processes

_BATCH = 40
_COUNT = 6000
_SINGLE = DataSpec(vocab_size=3, length=1)


class SamplerCase(Case):
    """A sampler over the kit's letters, of the first process that it works with."""

    def prepare(self) -> None:
        """Choose process and sizes."""
        self.world = Letters()
        self.size = 2 if "blocks" in self.part.provides() else None
        if "guides" in self.part.provides():
            raise ValueError("a sampler set to guide is for teachers with labels; give it guidance that is off")
        fitting = processes(needs(self.part, "process"), self.world.spec.vocab_size)
        if not fitting:
            raise ValueError("it needs a process that the kit does not have")
        self.process: Process = fitting[0]
        self.offers = {**vars(self.world.spec), "process": self.process}

    def teacher(self) -> Enumerating:
        """A teacher that notes how it is called."""
        return Enumerating(self.process, self.world, self.size)

    def student(self) -> Noisy:
        """A student with a latent, of whole sequences."""
        spec = self.world.spec
        with seeded(0):
            backbone = Mixer(num_inputs=self.process.num_inputs, vocab_size=spec.vocab_size, length=spec.length)
            return Noisy(backbone=backbone, process=self.process, length=spec.length).eval()

    def sample(
        self,
        denoiser: Denoiser | None = None,
        draws: Draws | None = None,
        *,
        num_steps: int = 2,
        condition: Condition | None = None,
        last_step: bool = False,
    ) -> Samples:
        """Draw a batch."""
        made: Samples = self.component.sample(
            denoiser or self.teacher(),
            draws or Draws.for_range(0, 0, 0, _BATCH),
            num_steps=num_steps,
            condition=condition,
            last_step=last_step,
        )
        return made


@clause("tokens", remedy="return Samples(tokens) of clean tokens, int64 [batch, length]")
def tokens(case: SamplerCase) -> None:
    """Samples are clean tokens, int64 [batch, length], in 1, 2 and 5 steps, without gradient."""
    size, length = case.world.spec.vocab_size, case.world.spec.length
    for num_steps in (1, 2, 5):
        made = case.sample(num_steps=num_steps)
        expect(isinstance(made, Samples), f"sample gives {type(made).__name__}")
        got = made.tokens
        expect(got.dtype == torch.int64, f"tokens are {got.dtype}, expected int64")
        expect(list(got.shape) == [_BATCH, length], f"tokens have shape {list(got.shape)}")
        low, high = int(got.min()), int(got.max())
        expect(low >= 0 and high < size, f"after {num_steps} steps tokens are {low}..{high}, expected 0..{size - 1}")


@clause("calls", remedy="ask the denoiser once a step")
def calls(case: SamplerCase) -> None:
    """It asks the denoiser once a step (and block) for a batch, at times that fall from 1."""
    for num_steps in (1, 4):
        teacher = case.teacher()
        case.sample(teacher, num_steps=num_steps)
        wanted = num_steps * (case.world.spec.length // case.size if case.size else 1)
        expect(len(teacher.calls) == wanted, f"{num_steps} steps made {len(teacher.calls)} calls, expected {wanted}")
        times = [float(t.max()) for _, t, _ in teacher.calls[:num_steps]]
        expect(times[0] == 1, f"the first call is at t = {times[0]}")
        expect(all(late > early for late, early in itertools.pairwise(times)), f"the times are {times}")


@clause("repeatable", remedy="take every random number from the Draws, at a step of your own")
def repeatable(case: SamplerCase) -> None:
    """Draws alone decide: whatever their step, and in a part of a batch as in the whole."""
    draws = Draws.for_range(4, 0, 10, _BATCH)
    whole = case.sample(draws=draws).tokens
    expect(torch.equal(whole, case.sample(draws=draws).tokens), "the same Draws give other samples")
    expect(torch.equal(whole, case.sample(draws=draws.at_step(9)).tokens), "the step of the Draws changes the samples")
    part = case.sample(draws=draws.select(slice(15, None))).tokens
    expect(torch.equal(whole[15:], part), "a part of a batch differs from the whole batch's")
    other = case.sample(draws=Draws.for_range(5, 0, 10, _BATCH)).tokens
    expect(not torch.equal(whole, other), "another seed gives the same samples")


@clause("fixed", remedy="put the given tokens in before every call, at t = 0, and leave them")
def fixed(case: SamplerCase) -> None:
    """Given tokens stay as they are, and the denoiser is told that their time is 0."""
    shape = (_BATCH, case.world.spec.length)
    given = torch.zeros(shape, dtype=torch.bool)
    given[:, 1] = True
    values = torch.full(shape, 2)
    teacher = case.teacher()
    made = case.sample(teacher, num_steps=3, condition=Condition(fixed=given, values=values)).tokens
    expect(bool((made[given] == 2).all()), f"{int((made[given] != 2).sum())} of {_BATCH} given tokens were changed")
    z, t, _ = teacher.calls[0]
    expect(bool((z[:, 1] == 2).all()), "the denoiser does not see the given tokens")
    expect(t.ndim == 2 and bool((t[:, 1] == 0).all()), "the denoiser is not told t = 0 at the given tokens")


@clause("condition", remedy="hand the condition's label on with every call, those of the samples that it shows")
def condition(case: SamplerCase) -> None:
    """Labels reach the denoiser in every call, each beside its own sample."""
    teacher = case.teacher()
    label = torch.arange(_BATCH) % 2
    # Every sample, or block of it, begins with its label.
    given = torch.zeros(_BATCH, case.world.spec.length, dtype=torch.bool)
    given[:, :: case.size or case.world.spec.length] = True
    values = label.unsqueeze(-1).expand_as(given)
    case.sample(teacher, condition=Condition(label=label, fixed=given, values=values))
    for z, _, call in teacher.calls:
        if call.label is None:
            raise Breach("a call was made without the labels")
        expect(torch.equal(call.label, z[:, 0]), "a call was made with labels of other samples")


@clause("latent", remedy="draw_latent anew for every call, from the Draws at that step")
def latent(case: SamplerCase) -> None:
    """A student is given a latent of its own in every call."""
    if case.size is not None:
        raise Skip("it draws blocks; the kit's student draws whole sequences")
    student = case.student()
    case.sample(student, num_steps=3)
    drawn = [one for one in student.latents if one is not None]
    expect(len(drawn) == 3, f"{len(drawn)} of 3 calls were given a latent")
    first, second = (one.flatten(1) for one in drawn[:2])
    alike = (first.unsqueeze(1) == second).all(-1)  # a call may leave samples out
    expect(not bool(alike.any()), "two calls were given one latent")


@clause("step_times", remedy="map [0, 1] onto itself, 0 to 0 and 1 to 1, without turning back; keep shape and dtype")
def step_times(case: SamplerCase) -> None:
    """`step_times` grows from exactly 0 to exactly 1 and keeps shape and dtype."""
    left = torch.linspace(0, 1, 33, dtype=torch.float64)
    times = case.component.step_times(left)
    expect(
        times.shape == left.shape and times.dtype == left.dtype, f"step_times give {times.dtype} {list(times.shape)}"
    )
    expect((float(times[0]), float(times[-1])) == (0.0, 1.0), f"step_times lead from {times[-1]} to {times[0]}")
    expect(bool((times.diff() > 0).all()), "step_times turn back or stand still")


@clause("one_position", remedy="draw x from the prediction and z_s from the posterior, tails included")
def one_position(case: SamplerCase) -> None:
    """With one position nothing is lost: any number of steps draws from the truth."""
    if case.size is not None:
        raise Skip("it draws blocks; its inner sampler is judged by itself")
    world = Letters(_SINGLE)
    sampler = case.fresh(**{**vars(_SINGLE), "process": case.process})
    for num_steps in (1, 3):
        draws = Draws.for_range(1, 0, 0, 20_000)
        made = sampler.sample(Enumerating(case.process, world), draws, num_steps=num_steps)
        expect_frequencies(made.tokens, world.probabilities(), f"{num_steps} steps")


@clause("last_step", remedy="return the log-probabilities from which the last tokens were drawn, the others certain")
def last_step(case: SamplerCase) -> None:
    """The last step's probabilities are those that the tokens were drawn from."""
    if "last_step" not in case.provides:
        raise Skip("it does not provide last_step")
    made = case.sample(draws=Draws.for_range(2, 0, 0, _COUNT), last_step=True)
    last = made.last_log_probs
    expect(last is not None, "last_step=True gives no last_log_probs")
    assert last is not None
    wanted = [*made.tokens.shape, case.world.spec.vocab_size]
    expect(list(last.shape) == wanted, f"last_log_probs have shape {list(last.shape)}, expected {wanted}")
    probs = last.double().exp()
    expect_close(probs.sum(-1), torch.ones(wanted[:2]), "the sum of a position's probabilities", tolerance=1e-5)
    chosen = probs.gather(-1, made.tokens.unsqueeze(-1))
    expect(bool((chosen > 0).all()), "a token was drawn whose last probability is 0")
    one_hot = torch.nn.functional.one_hot(made.tokens, case.world.spec.vocab_size).double()
    # A mean of independent terms in [-1, 1] with mean 0: six standard deviations, each at most 1 / sqrt(count).
    gap = float((one_hot - probs).mean(0).abs().max())
    expect(gap < 6 / _COUNT**0.5, f"tokens are drawn {gap:.3f} more or less often than the last probabilities say")


@clause("distribution", remedy="multiply the transition matrices of all steps; raise UnsupportedError where you cannot")
def distribution(case: SamplerCase) -> None:
    """`distribution` sums to 1 and is what samples follow; without the capability it raises UnsupportedError."""
    if "distribution" not in case.provides:
        try:
            case.component.distribution(case.teacher(), num_steps=2)
        except UnsupportedError:
            raise Skip("it does not provide distribution, and says so") from None
        if case.size is None:
            raise Breach("distribution answers, but is not among its capabilities")
        raise Skip("its inner sampler can enumerate")
    probs: Tensor = case.component.distribution(case.teacher(), num_steps=2)
    size = case.world.spec.vocab_size**case.world.spec.length
    expect(list(probs.shape) == [size] and probs.dtype == torch.float64, f"it is {probs.dtype} {list(probs.shape)}")
    expect(abs(float(probs.sum()) - 1) < 1e-6, f"it sums to {float(probs.sum())}")
    made = case.sample(draws=Draws.for_range(3, 0, 0, _COUNT)).tokens
    weights = case.world.spec.vocab_size ** torch.arange(case.world.spec.length - 1, -1, -1)
    expect_frequencies((made * weights).sum(-1), probs, "samples, by the number of the sequence")


@clause("no_steps", remedy="raise a ValueError for num_steps below 1")
def no_steps(case: SamplerCase) -> None:
    """A number of steps below 1 is a ValueError."""
    try:
        case.sample(num_steps=0)
    except ValueError:
        return
    raise Breach("num_steps=0 raises no ValueError")


@clause("no_gradient", remedy="decorate sample with torch.no_grad()")
def no_gradient(case: SamplerCase) -> None:
    """Nothing is remembered for a backward pass, and the denoiser stays in its mode."""
    if case.size is not None:
        raise Skip("it draws blocks; its inner sampler is judged by itself")
    student = case.student()
    modes: list[bool] = []
    student.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    with torch.enable_grad():
        case.sample(student)
    expect(modes and not any(modes), "the denoiser is called with gradients on")
    expect(not student.training, "the denoiser was put into training mode")


@clause("devices", remedy="make tensors on draws.device")
def devices(case: SamplerCase) -> None:
    """On a CUDA device it draws the same tokens as on the CPU."""
    if not torch.cuda.is_available():
        raise Skip("there is no CUDA device here")
    made = case.sample(case.teacher().cuda(), Draws.for_range(0, 0, 0, _BATCH, "cuda")).tokens
    expect(made.device.type == "cuda", f"samples lie on {made.device}")
    expect(torch.equal(made.cpu(), case.sample().tokens), "CPU and CUDA draw different tokens")


CLAUSES: tuple[Clause, ...] = (
    *GENERAL, tokens, calls, repeatable, fixed, condition, latent, step_times, one_position, last_step, distribution,
    no_steps, no_gradient, devices,
)  # fmt: skip
