"""Clauses for backbones."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from dmmd_core.assemble import seeded
from dmmd_core.draws import Draws
from dmmd_core.interfaces import Backbone, Condition, DataSpec
from dmmd_core.testing.report import Clause, Skip, clause, expect, expect_close
from dmmd_core.testing.subject import GENERAL, Case, needs
from dmmd_core.testing.worlds import no_gradient_at, spec_for, stir

_BATCH = 3


class BackboneCase(Case):
    """A backbone at the kit's sizes, its weights moved off their first values, in evaluation mode."""

    def prepare(self) -> None:
        """See `Case.prepare`: the process has a [MASK]."""
        self.spec: DataSpec = spec_for(needs(self.part, "data"))
        self.num_inputs = self.spec.vocab_size + 1
        self.offers = {**vars(self.spec), "num_inputs": self.num_inputs}
        self.stirred: Backbone | None = None

    @property
    def backbone(self) -> Backbone:
        """The backbone."""
        if self.stirred is None:
            self.stirred = self.component.eval()
            stir(self.stirred)
        return self.stirred

    def inputs(self, seed: int = 0) -> tuple[Tensor, Tensor, Condition]:
        """Noisy tokens, times and a condition of a batch of three, as training would give them."""
        draws = Draws.for_range(seed, 0, 0, _BATCH)
        z = draws.integers("z", self.num_inputs, (self.spec.length,))
        condition = Condition()
        if self.backbone.block_size is not None:
            condition = Condition(clean=draws.integers("x", self.spec.vocab_size, (self.spec.length,)))
        if "labels" in self.provides:
            condition = Condition(label=draws.integers("label", self.spec.num_classes or 1), clean=condition.clean)
        return z, draws.uniform("t").float(), condition

    def noise(self) -> Tensor | None:
        """Input noise, where the backbone takes it."""
        if "input_noise" not in self.provides:
            return None
        return Draws.for_range(0, 0, 0, _BATCH).normal("noise", (self.spec.length, self.backbone.embedding_width))

    @torch.no_grad()
    def features(self, z: Tensor, t: Tensor, condition: Condition, noise: Tensor | None = None) -> Tensor:
        """Features without gradients."""
        return self.backbone.features(z, t, condition, noise)


@clause("sizes", remedy="give features [batch, length, width], logits [rows, vocab] and an int embedding_width")
def sizes(case: BackboneCase) -> None:
    """Features are [batch, length, width], the head's logits [rows, vocab], both float32 and finite."""
    z, t, condition = case.inputs()
    features = case.features(z, t, condition)
    expect(
        features.ndim == 3 and features.shape[:2] == z.shape,
        f"features of tokens {list(z.shape)} have shape {list(features.shape)}",
    )
    logits = case.backbone.head(features.flatten(0, 1))
    wanted = [z.numel(), case.spec.vocab_size]
    expect(list(logits.shape) == wanted, f"head gives {list(logits.shape)}, expected {wanted}: clean tokens alone")
    for name, tensor in (("features", features), ("logits", logits)):
        expect(tensor.dtype == torch.float32, f"{name} are {tensor.dtype}, expected float32")
        expect(bool(tensor.isfinite().all()), f"{name} are not finite")
    width = getattr(case.backbone, "embedding_width", None)
    expect(isinstance(width, int) and width > 0, f"embedding_width is {width!r}")


@clause("rows", remedy="let the head work on each row by itself; what mixes positions belongs into features")
def rows(case: BackboneCase) -> None:
    """The head maps each row by itself, so that logits can be made for some rows only."""
    features = case.features(*case.inputs()).flatten(0, 1)
    chosen = torch.tensor([5, 1, 2])
    with torch.no_grad():
        whole, part = case.backbone.head(features), case.backbone.head(features[chosen])
    expect_close(part, whole[chosen], "head of some rows", tolerance=1e-4)


@clause("samples", remedy="normalise over positions or channels, never over the batch")
def samples(case: BackboneCase) -> None:
    """A sample's features do not depend on the other samples of its batch."""
    z, t, condition = case.inputs()
    alone = Condition(
        label=None if condition.label is None else condition.label[:1],
        clean=None if condition.clean is None else condition.clean[:1],
    )
    whole = case.features(z, t, condition)
    expect_close(case.features(z[:1], t[:1], alone), whole[:1], "features of a sample alone", tolerance=1e-4)


@clause("times", remedy="use per_position(t, z_t), which serves both forms, and let the features depend on it")
def times(case: BackboneCase) -> None:
    """Times [batch] and the same times [batch, length] give the same features; other times give others."""
    z, t, condition = case.inputs()
    first = case.features(z, t, condition)
    spread = case.features(z, t.unsqueeze(-1).expand_as(z).contiguous(), condition)
    expect_close(spread, first, "features with times per position", tolerance=1e-4)
    expect(not torch.allclose(case.features(z, 1 - t, condition), first), "the features do not depend on the time")


@clause("positions", remedy="mix positions, and embed where a token stands")
def positions(case: BackboneCase) -> None:
    """A position's features follow the other positions' tokens, and tell positions apart."""
    z, t, condition = case.inputs()
    place = 1 if (case.backbone.block_size or 2) > 1 else 0
    changed = z.clone()
    changed[:, place] = (z[:, place] + 1) % case.num_inputs
    gap = (case.features(changed, t, condition) - case.features(z, t, condition)).abs().amax((0, 2))
    expect(float(gap[place]) > 0, "features do not depend on the position's own token")
    if case.backbone.block_size != 1:
        expect(float(gap[0]) > 0, "features of position 0 do not depend on the token at position 1")
    alike, clean = torch.zeros_like(z), None if condition.clean is None else torch.zeros_like(condition.clean)
    alike[:, place] = 1  # next to the first position, and further from the last
    same = case.features(alike, torch.full_like(t, 0.5), Condition(clean=clean))
    expect(not torch.allclose(same[:, 0], same[:, -1]), "it cannot tell the first position from the last")


@clause("evaluation", remedy="draw nothing in evaluation mode: dropout only where self.training is true")
def evaluation(case: BackboneCase) -> None:
    """In evaluation mode the same input gives the same features."""
    first, again = case.features(*case.inputs()), case.features(*case.inputs())
    expect(torch.equal(first, again), "two calls in evaluation mode differ")


@clause("input_noise", remedy="add input_noise [batch, length, embedding_width] to the embeddings, with its gradient")
def input_noise(case: BackboneCase) -> None:
    """Input noise changes the features, and a gradient reaches it."""
    noise = case.noise()
    if noise is None:
        raise Skip("it does not provide input_noise")
    z, t, condition = case.inputs()
    noise.requires_grad_(True)
    with torch.enable_grad():
        with_noise = case.backbone.features(z, t, condition, noise)
        (gradient,) = torch.autograd.grad(with_noise.square().sum(), noise, allow_unused=True)
    expect(gradient is not None, "the features do not depend on input_noise")
    silent = (gradient.abs().amax((0, 2)) == 0).nonzero().flatten().tolist()
    expect(not silent, f"input_noise has no effect at the positions {silent}")


@clause("labels", remedy="embed the label; None and num_classes both mean no label")
def labels(case: BackboneCase) -> None:
    """Labels change the features; None means the same as the label `num_classes`."""
    if "labels" not in case.provides:
        raise Skip("it does not provide labels")
    z, t, condition = case.inputs()
    count = case.spec.num_classes or 0

    def told(label: Tensor | None) -> Tensor:
        return case.features(z, t, Condition(label=label, clean=condition.clean))

    first, second, none = (told(torch.full((_BATCH,), label)) for label in (0, 1, count))
    expect(not torch.allclose(first, second), "labels 0 and 1 give the same features")
    expect(not torch.allclose(first, none), f"label 0 and no label ({count}) give the same features")
    expect_close(told(None), none, "features without a label", tolerance=1e-5)


@clause("gradients", remedy="use every parameter, or do not make it")
def gradients(case: BackboneCase) -> None:
    """A gradient of the logits reaches every parameter."""
    backbone = copy.deepcopy(case.backbone).train().requires_grad_(True)
    for number in range(4):
        z, t, condition = case.inputs(number)
        with torch.enable_grad(), seeded(number):  # dropout draws from torch's generator
            logits = backbone.head(backbone.features(z, t, condition, case.noise()).flatten(0, 1))
            weights = Draws.for_range(number, 0, 0, len(logits)).normal("weights", (logits.shape[1],))
            (logits * weights).sum().backward()
    missed = no_gradient_at(backbone)
    expect(not missed, f"no gradient reaches {', '.join(missed[:6])}")


@clause("seed", remedy="draw first weights from torch's generator alone, in the constructor")
def seed(case: BackboneCase) -> None:
    """The seed decides the first weights: the same gives the same, another gives others."""
    first, again, other = (case.fresh(number).state_dict() for number in (7, 7, 8))
    differing = [name for name in first if not torch.equal(first[name], again[name])]
    expect(not differing, f"one seed gives different weights: {', '.join(differing[:6])}")
    expect(any(not torch.equal(first[name], other[name]) for name in first), "two seeds give the same weights")


@clause("state", remedy="keep all that decides the features in parameters and buffers")
def state(case: BackboneCase) -> None:
    """A new backbone with these weights, and a deep copy, give the same features."""
    other = case.fresh(1).eval()
    other.load_state_dict({name: tensor.clone() for name, tensor in case.backbone.state_dict().items()}, strict=True)
    wanted = case.features(*case.inputs())
    for name, module in (("a new backbone with the state", other), ("a deep copy", copy.deepcopy(case.backbone))):
        with torch.no_grad():
            got = module.features(*case.inputs())
        expect_close(got, wanted, f"features of {name}", tolerance=1e-5)


@clause("meta", remedy="make tensors without naming a device, and read no values of parameters in the constructor")
def meta(case: BackboneCase) -> None:
    """It can be built on the meta device, where `--check` counts its parameters."""
    with torch.device("meta"):
        built = case.fresh()
    wrong = [name for name, parameter in built.named_parameters() if parameter.device.type != "meta"]
    expect(not wrong, f"on the meta device, {', '.join(wrong[:6])} lie on the CPU")
    counts = [sum(parameter.numel() for parameter in module.parameters()) for module in (built, case.component)]
    expect(counts[0] == counts[1], f"it has {counts[0]} parameters on the meta device and {counts[1]} on the CPU")


@clause("precision", remedy="make new tensors in the dtype of the weights, and leave casting to autocast")
def precision(case: BackboneCase) -> None:
    """It runs in float64, and in bfloat16 under autocast, with nearly the same logits."""
    z, t, condition = case.inputs()
    features = case.features(z, t, condition)
    with torch.no_grad():
        wanted = case.backbone.head(features.flatten(0, 1))
        double = copy.deepcopy(case.backbone).double()
        wide = double.features(z, t.double(), condition)
        expect(wide.dtype == torch.float64, f"with float64 weights the features are {wide.dtype}")
        got = double.head(wide.flatten(0, 1))
        scale = float(wanted.abs().max()) + 1
        expect_close(got / scale, wanted.double() / scale, "logits in float64, relative,", tolerance=1e-3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = case.backbone.head(case.backbone.features(z, t, condition).flatten(0, 1))
    expect(bool(low.isfinite().all()), "logits under bfloat16 autocast are not finite")
    expect_close(low.float() / scale, wanted / scale, "logits under bfloat16 autocast, relative,", tolerance=0.2)


@clause("blocks", remedy="let each see the clean tokens before it and nothing behind, encoded or not")
def blocks(case: BackboneCase) -> None:
    """With blocks: no block looks at later clean tokens, and encoded blocks serve as well as clean ones."""
    size = case.backbone.block_size
    if "blocks" not in case.provides:
        expect(size is None, f"block_size is {size}, but blocks is not among its capabilities")
        raise Skip("it does not provide blocks")
    expect(isinstance(size, int), f"it provides blocks and has block_size {size!r}")
    assert size is not None
    z, t, condition = case.inputs()
    clean = condition.clean
    assert clean is not None
    first = case.features(z, t, condition)
    other = clean.clone()
    other[:, size:] = (clean[:, size:] + 1) % case.spec.vocab_size
    leaked = case.features(z, t, Condition(label=condition.label, clean=other))
    expect_close(leaked[:, : 2 * size], first[:, : 2 * size], "features before changed clean tokens", tolerance=1e-4)
    expect(
        2 * size >= case.spec.length or not torch.allclose(leaked[:, 2 * size :], first[:, 2 * size :]),
        "features do not depend on the clean blocks before",
    )
    with torch.no_grad():
        context = case.backbone.encode(clean[:, :size], Condition(label=condition.label))
    here = slice(size, 2 * size)
    alone = case.features(z[:, here], t, Condition(label=condition.label, context=context))
    expect_close(alone, first[:, here], "features of the second part given an encoded first", tolerance=1e-3)


@clause("devices", remedy="make tensors on the device of the tokens")
def devices(case: BackboneCase) -> None:
    """On a CUDA device it gives the same features as on the CPU."""
    if not torch.cuda.is_available():
        raise Skip("there is no CUDA device here")
    wanted = case.features(*case.inputs())
    moved = copy.deepcopy(case.backbone).cuda()
    z, t, condition = case.inputs()
    there: dict[str, Any] = {name: value.cuda() for name, value in vars(condition).items() if isinstance(value, Tensor)}
    with torch.no_grad():
        got = moved.features(z.cuda(), t.cuda(), Condition(**there))
    expect(got.device.type == "cuda", f"features lie on {got.device}")
    expect_close(got, wanted, "features on CUDA", tolerance=1e-2)


CLAUSES: tuple[Clause, ...] = (
    *GENERAL, sizes, rows, samples, times, positions, evaluation, input_noise, labels, gradients, seed, state, meta,
    precision, blocks, devices,
)  # fmt: skip
