"""Clauses for generators."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from dmmd_core.assemble import seeded
from dmmd_core.draws import Draws
from dmmd_core.interfaces import Backbone, Condition, DataSpec, Generator, Prediction, Process
from dmmd_core.testing.report import Breach, Clause, Skip, clause, expect, expect_close
from dmmd_core.testing.subject import GENERAL, Case, needs
from dmmd_core.testing.worlds import Absorbing, Mixer, no_gradient_at, spec_for, stir

_BATCH = 6


class GeneratorCase(Case):
    """A generator around a small backbone of the kit, its weights moved off their first values."""

    def prepare(self) -> None:
        """See `Case.prepare`."""
        self.spec: DataSpec = spec_for(needs(self.part, "data"))
        self.process: Process = Absorbing(self.spec.vocab_size)
        with seeded(3):
            self.backbone: Backbone = Mixer(
                num_inputs=self.process.num_inputs, vocab_size=self.spec.vocab_size, length=self.spec.length, width=8
            )
        self.weights = copy.deepcopy(self.backbone.state_dict())
        self.offers = {**vars(self.spec), "process": self.process, "backbone": self.backbone}

    @property
    def generator(self) -> Generator:
        """The generator, in evaluation mode."""
        if 1 not in self.made:
            made: Generator = copy.deepcopy(self.component).eval()
            stir(made)
            self.made[1] = made
        component: Generator = self.made[1]
        return component

    def inputs(self, number: int = 0) -> tuple[Tensor, Tensor]:
        """Noisy tokens and times."""
        draws = Draws.for_range(number, 0, 0, _BATCH)
        t = draws.uniform("t")
        return self.process.corrupt(draws.integers("x", self.spec.vocab_size, (self.spec.length,)), t, draws), t

    def latent(self, seed: int = 0) -> Tensor | None:
        """The latent of a batch."""
        return self.generator.draw_latent(Draws.for_range(seed, 0, 0, _BATCH))

    @torch.no_grad()
    def log_probs(self, seed: int = 0) -> Tensor:
        """Log-probabilities of all rows with the latent of `seed`."""
        prediction: Prediction = self.generator(*self.inputs(), None, self.latent(seed))
        return prediction.log_probs()


@clause("weights_kept", remedy="keep the backbone that you are given as self.backbone, and do not initialise it anew")
def weights_kept(case: GeneratorCase) -> None:
    """It uses the backbone that it is given, weights untouched: a student starts from its teacher's."""
    expect(case.component.backbone is case.backbone, "backbone is not the one that was passed in")
    weights = case.backbone.state_dict()
    changed = [name for name, tensor in weights.items() if not torch.equal(tensor, case.weights[name])]
    expect(not changed, f"the constructor changed the backbone's {', '.join(changed[:6])}")
    expect(case.component.block_size == case.backbone.block_size, "block_size is not the backbone's")


@clause("prediction", remedy="return a Prediction of batch * length rows over the clean tokens, as the base class does")
def prediction(case: GeneratorCase) -> None:
    """A call gives a Prediction: normalised, of all rows or of some, known tokens carried over."""
    z, t = case.inputs()
    t = torch.stack([torch.zeros_like(t), *[t] * (z.shape[1] - 1)], dim=-1)
    z = torch.where(t == 0, z.clamp(max=case.spec.vocab_size - 1), z)
    made = case.generator(z, t, None, case.latent())
    expect(isinstance(made, Prediction), f"a call gives {type(made).__name__}")
    expect(made.num_rows == z.numel(), f"num_rows is {made.num_rows}, expected {z.numel()}")
    expect(made.vocab_size == case.spec.vocab_size, f"vocab_size is {made.vocab_size}")
    log_probs = made.log_probs().detach()
    expect(list(log_probs.shape) == [z.numel(), case.spec.vocab_size], f"log_probs has shape {list(log_probs.shape)}")
    expect_close(log_probs.exp().sum(-1), torch.ones(z.numel()), "the sum of a row's probabilities", tolerance=1e-5)
    chosen = torch.tensor([4, 0])
    expect_close(made.log_probs(chosen).exp(), log_probs[chosen].exp(), "log_probs of some rows", tolerance=1e-5)
    sure = log_probs.view(*z.shape, -1)[:, 0].exp().gather(-1, z[:, :1])
    expect_close(sure, torch.ones_like(sure), "the probability of a token at t = 0", tolerance=0)


@clause("latent", remedy="draw_latent gives [batch, ...] from the Draws where takes_latent is true, and None elsewhere")
def latent(case: GeneratorCase) -> None:
    """`draw_latent` and `takes_latent` agree; the Draws alone decide, sample by sample."""
    drawn = case.latent()
    takes = case.generator.takes_latent
    expect(takes == (drawn is not None), f"takes_latent is {takes}, draw_latent gives {type(drawn).__name__}")
    if drawn is None:
        return
    expect(len(drawn) == _BATCH, f"the latent of {_BATCH} samples has shape {list(drawn.shape)}")
    expect(bool(drawn.isfinite().all()), "the latent is not finite")
    again, other = case.latent(), case.latent(1)
    assert again is not None
    assert other is not None
    expect(torch.equal(drawn, again), "the same Draws give another latent")
    expect(not torch.equal(drawn, other), "another seed gives the same latent")
    part = case.generator.draw_latent(Draws.for_range(0, 0, 0, _BATCH).select(slice(2, None)))
    same = part is not None and torch.equal(part, drawn[2:])
    expect(same, "the latent of a part of the batch differs from the whole batch's")
    expect(not torch.equal(drawn[0], drawn[1]), "two samples have one latent")


@clause("latent_matters", remedy="project the latent and add it to the input embeddings (Generator.input_noise)")
def latent_matters(case: GeneratorCase) -> None:
    """Two latents give two predictions; without a latent the prediction is always the same."""
    first, again = case.log_probs(), case.log_probs()
    expect(torch.equal(first, again), "the same input and latent give another prediction")
    if not case.generator.takes_latent:
        return
    other = case.log_probs(1)
    expect(not torch.allclose(first, other), "the prediction does not depend on the latent")


@clause("latent_asked_for", remedy="raise a ValueError, as Generator.forward does, before anything is computed")
def latent_asked_for(case: GeneratorCase) -> None:
    """A missing latent, or one that nobody asked for, is refused."""
    wrong = None if case.generator.takes_latent else torch.zeros(_BATCH, case.spec.length, 4)
    try:
        case.generator(*case.inputs(), None, wrong)
    except ValueError:
        return
    raise Breach("a call without a latent is answered" if wrong is None else "a latent is taken and ignored")


@clause("gradients", remedy="use every parameter, and let the prediction's graph reach it")
def gradients(case: GeneratorCase) -> None:
    """A gradient of the probabilities reaches every parameter, those of the noise among them."""
    generator = copy.deepcopy(case.generator).train().requires_grad_(True)
    with torch.enable_grad():
        for number in range(3):
            z, t = case.inputs(number)
            log_probs = generator(z, t, None, case.latent(number)).log_probs()
            weights = Draws.for_range(number, 0, 0, len(log_probs)).normal("weights", (log_probs.shape[1],))
            (log_probs.exp() * weights).sum().backward()
    missed = no_gradient_at(generator)
    expect(not missed, f"no gradient reaches {', '.join(missed[:6])}")


@clause("state", remedy="keep all that decides the prediction in parameters and buffers")
def state(case: GeneratorCase) -> None:
    """A new generator with these weights, and a deep copy, predict the same."""
    wanted = case.log_probs()
    other = case.fresh(1, backbone=copy.deepcopy(case.backbone)).eval()
    other.load_state_dict({name: tensor.clone() for name, tensor in case.generator.state_dict().items()}, strict=True)
    for name, module in (("a new generator with the state", other), ("a deep copy", copy.deepcopy(case.generator))):
        with torch.no_grad():
            got = module(*case.inputs(), None, case.latent()).log_probs()
        expect_close(got.exp(), wanted.exp(), f"probabilities of {name}", tolerance=1e-6)


@clause("condition", remedy="hand the condition on to the backbone")
def condition(case: GeneratorCase) -> None:
    """The condition reaches the backbone."""
    told: list[Condition] = []
    generator = copy.deepcopy(case.generator)
    inner = generator.backbone.features

    def watched(z: Tensor, t: Tensor, condition: Condition, input_noise: Tensor | None = None) -> Tensor:
        told.append(condition)
        return inner(z, t, condition, input_noise)

    generator.backbone.features = watched  # type: ignore[method-assign,assignment]
    label = torch.zeros(_BATCH, dtype=torch.int64)
    with torch.no_grad():
        generator(*case.inputs(), Condition(label=label), case.latent())
    expect(told and told[0].label is label, "the label that was given does not reach the backbone")


@clause("meta", remedy="make tensors without naming a device, and read no values of parameters in the constructor")
def meta(case: GeneratorCase) -> None:
    """It can be built on the meta device, where `--check` counts its parameters."""
    with torch.device("meta"):
        built = case.fresh(backbone=copy.deepcopy(case.backbone).to("meta"))
    wrong = [name for name, parameter in built.named_parameters() if parameter.device.type != "meta"]
    expect(not wrong, f"on the meta device, {', '.join(wrong[:6])} lie on the CPU")


@clause("devices", remedy="make tensors on the device of the tokens")
def devices(case: GeneratorCase) -> None:
    """On a CUDA device it predicts the same as on the CPU."""
    if not torch.cuda.is_available():
        raise Skip("there is no CUDA device here")
    wanted = case.log_probs()
    moved = copy.deepcopy(case.generator).cuda()
    z, t = (tensor.cuda() for tensor in case.inputs())
    drawn = moved.draw_latent(Draws.for_range(0, 0, 0, _BATCH, "cuda"))
    with torch.no_grad():
        got = moved(z, t, None, drawn).log_probs()
    expect_close(got.exp(), wanted.exp(), "probabilities on CUDA", tolerance=1e-3)


CLAUSES: tuple[Clause, ...] = (
    *GENERAL, weights_kept, prediction, latent, latent_matters, latent_asked_for, gradients, state, condition, meta,
    devices,
)  # fmt: skip
