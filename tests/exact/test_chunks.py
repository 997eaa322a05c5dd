"""Losses in chunks: the gradients taken with them are those of the plain version, whatever head, loss and caller."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from worlds import make_process

from dmmd_backbones.mlp import MLP
from dmmd_core import (
    Backbone,
    Batch,
    Condition,
    Denoiser,
    Draws,
    Losses,
    NetworkDenoiser,
    NetworkPrediction,
    Prediction,
    Process,
    Rows,
    ShapedDenoiser,
    rows_with_loss,
    sum_over_rows,
)
from dmmd_generators.noise_conditioned import NoiseConditioned
from dmmd_objectives.denoising import Denoising
from dmmd_objectives.moment_matching import MomentMatching

VOCAB, LENGTH, BATCH, CHUNK = 11, 5, 6, 4
ELBO = {"loss": "posterior_kl", "weight": "elbo", "parametrization": "leave_one_out"}
PROCESSES = {"masked": ("masked", {}), "uniform": ("uniform", {}), "uniform_elbo": ("uniform", ELBO)}
TURNS = [("student",), ("auxiliary",), ("auxiliary", "student")]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


class Headed(MLP):
    """The small network with another head, and a count of the calls of it."""

    def __init__(self, process: Process, head: Callable[[Headed, Tensor], Tensor] | None = None, seed: int = 0) -> None:
        torch.manual_seed(seed)
        config = MLP.Config(width=16, depth=1, embedding_width=8)
        super().__init__(config, num_inputs=process.num_inputs, vocab_size=process.vocab_size, length=LENGTH)
        self.other_head = head
        self.calls: list[int] = []

    def head(self, features: Tensor) -> Tensor:
        self.calls.append(len(features))
        return super().head(features) if self.other_head is None else self.other_head(self, features)


def _game(
    name: str, dtype: torch.dtype, head: Callable[[Headed, Tensor], Tensor] | None = None, **params: object
) -> MomentMatching:
    kind, process_params = PROCESSES[name]
    process = make_process(kind, VOCAB, **process_params)
    student, teacher, auxiliary = (Headed(process, head, seed) for seed in range(3))
    generator = NoiseConditioned(
        NoiseConditioned.Config(width=2), backbone=student, process=process, length=LENGTH, grid=None
    )
    config = MomentMatching.Config(**params)  # type: ignore[arg-type]
    game = MomentMatching(
        config, process=process, network=generator, teacher=NetworkDenoiser(teacher, process),
        copy_teacher=lambda: NetworkDenoiser(auxiliary, process), num_steps=4,
    )  # fmt: skip
    for module in (game.student, game.teacher, game.auxiliary):
        module.to(dtype)
    game.teacher.requires_grad_(False)
    return game


def _inputs(step: int = 0) -> tuple[Batch, Draws]:
    draws = Draws.for_range(0, step, 0, BATCH)
    return Batch(draws.integers("tokens", VOCAB, (LENGTH,))), draws


def _parameters(game: MomentMatching) -> dict[str, Tensor]:
    players = {"student": game.student, "auxiliary": game.auxiliary}
    return {f"{name}.{key}": value for name, player in players.items() for key, value in player.named_parameters()}


def _gradients(game: MomentMatching, losses: Losses) -> dict[str, Tensor]:
    parameters = _parameters(game)
    # Unequal weights, so that one player's gradient in the place of another's would be seen.
    total = sum((place + 2) * losses.by_player[name] for place, name in enumerate(sorted(losses.by_player)))
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)  # type: ignore[arg-type]
    return {name: one for name, one in zip(parameters, found, strict=True) if one is not None}


def _assert_same(plain: dict[str, Tensor], chunked: dict[str, Tensor], tolerance: float) -> None:
    assert plain.keys() == chunked.keys()
    for name, expected in plain.items():
        scale = float(expected.abs().max())
        assert float((chunked[name] - expected).abs().max()) <= tolerance * scale, name


def _both(
    name: str,
    dtype: torch.dtype,
    turn: tuple[str, ...],
    head: Callable[[Headed, Tensor], Tensor] | None = None,
    **params: object,
) -> tuple[MomentMatching, MomentMatching]:
    """Compare a turn's values and gradients with all logits at once and in chunks."""
    games = [_game(name, dtype, head, chunk_rows=chunk, **params) for chunk in (0, CHUNK)]
    values, gradients = [], []
    for game in games:
        losses = game.loss(turn, *_inputs())
        values.append({player: loss.detach() for player, loss in losses.by_player.items()} | losses.metrics)
        gradients.append(_gradients(game, losses))
    tolerance = TOLERANCE[dtype]
    assert values[0].keys() == values[1].keys() >= {f"{player}_loss" for player in turn}
    for key, expected in values[0].items():
        assert float(values[1][key]) == pytest.approx(float(expected), rel=tolerance), key
    assert {key.split(".")[0] for key in gradients[0]} == set(turn)
    _assert_same(*gradients, tolerance)  # type: ignore[misc]
    assert max(float(gradient.abs().max()) for gradient in gradients[0].values()) > 1e-3
    plain, chunked = games
    return plain, chunked


def _heads(game: MomentMatching) -> list[Headed]:
    teacher = game.teacher.inner if isinstance(game.teacher, ShapedDenoiser) else game.teacher
    return [player.backbone for player in (game.student, teacher, game.auxiliary)]  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("turn", TURNS, ids="-".join)
@pytest.mark.parametrize(
    ("name", "target"),
    [
        (name, target)
        for name, target in itertools.product(PROCESSES, ("hard", "soft", "posterior"))
        if name == "masked" or target != "soft"
    ],
)
def test_values_and_gradients_are_those_of_the_plain_version(
    name: str, target: str, turn: tuple[str, ...], dtype: torch.dtype
) -> None:
    _, chunked = _both(name, dtype, turn, auxiliary_target=target, temperature=0.8, top_p=0.7)
    for network in _heads(chunked):
        assert max(network.calls) <= CHUNK
    # No head is run twice for its loss; the student's is also run to draw x.
    rows = sum(_heads(chunked)[1].calls)
    assert rows > 2 * CHUNK
    assert len(_heads(chunked)[1].calls) == len(_heads(chunked)[2].calls) == math.ceil(rows / CHUNK)
    assert sum(_heads(chunked)[2].calls) == rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("target", ["data", "teacher"])
def test_denoising_in_chunks_is_the_plain_version(target: str, name: str, dtype: torch.dtype) -> None:
    kind, process_params = PROCESSES[name]
    process = make_process(kind, VOCAB, **process_params)
    values, gradients, calls = [], [], []
    for chunk in (0, CHUNK):
        network, teacher = (NetworkDenoiser(Headed(process, seed=seed), process).to(dtype) for seed in range(2))
        config = Denoising.Config(target=target, chunk_rows=chunk)  # type: ignore[arg-type]
        game = Denoising(config, process=process, network=network, teacher=teacher.requires_grad_(False))
        loss = game.loss(("network",), *_inputs()).by_player["network"]
        loss.backward()
        values.append(float(loss.detach()))
        gradients.append({key: one.grad for key, one in network.named_parameters() if one.grad is not None})
        calls.append(network.backbone.calls)  # type: ignore[union-attr]
    assert values[1] == pytest.approx(values[0], rel=TOLERANCE[dtype])
    _assert_same(*gradients, TOLERANCE[dtype])
    assert len(calls[1]) == math.ceil(sum(calls[0]) / CHUNK), "no head is run twice"


# ---- heads of all kinds ----------------------------------------------------------------------------------------------


def _tied(network: Headed, features: Tensor) -> Tensor:
    return nn.functional.linear(features, network.tokens.weight)[..., :VOCAB]


def _product(network: Headed, features: Tensor) -> Tensor:
    return features @ network.logits.weight.T


def _deep(network: Headed, features: Tensor) -> Tensor:
    inner = nn.functional.linear(features, weight=network.logits.weight, bias=network.logits.bias)
    return nn.functional.linear(nn.functional.gelu(inner) @ network.logits.weight, network.logits.weight)


def _normalized(network: Headed, features: Tensor) -> Tensor:
    return nn.functional.linear(features, nn.functional.normalize(network.logits.weight), network.logits.bias)


def _frozen_bias(network: Headed, features: Tensor) -> Tensor:
    return nn.functional.linear(features, network.logits.weight, network.logits.bias.detach())


def _whole(network: Headed, features: Tensor) -> Tensor:
    return torch.matmul(network.logits.weight, features.T).T


def _three_dimensional(network: Headed, features: Tensor) -> Tensor:
    return network.logits(features.unsqueeze(0)).squeeze(0)


@pytest.mark.parametrize("head", [_tied, _product, _deep, _normalized, _frozen_bias, _three_dimensional])
@pytest.mark.parametrize("turn", TURNS, ids="-".join)
def test_any_head_gets_its_gradient_without_running_twice(
    head: Callable[[Headed, Tensor], Tensor], turn: tuple[str, ...]
) -> None:
    _, chunked = _both("uniform", torch.float64, turn, head)
    rows = BATCH * LENGTH
    assert [sum(network.calls) for network in _heads(chunked)] == [2 * rows, rows, rows]


def test_a_head_that_reaches_back_into_the_network_is_run_twice_and_right() -> None:
    """Its weight comes out of the embedding, by a product made before the chunk: a graph that all chunks share."""

    class Mixing(Headed):
        def features(self, z_t: Tensor, t: Tensor, condition: Condition, input_noise: Tensor | None = None) -> Tensor:
            self.mixed = self.tokens.weight[:VOCAB] @ self.logits.weight.T @ self.logits.weight
            return super().features(z_t, t, condition, input_noise)

    process = make_process("uniform", VOCAB)
    gradients = []
    for chunk in (0, CHUNK):
        backbone = Mixing(process, lambda network, features: features @ network.mixed.T).double()  # type: ignore[arg-type]
        network = NetworkDenoiser(backbone, process)
        game = Denoising(Denoising.Config(chunk_rows=chunk), process=process, network=network, teacher=None)
        game.loss(("network",), *_inputs()).by_player["network"].backward()
        gradients.append({key: one.grad for key, one in backbone.named_parameters() if one.grad is not None})
    _assert_same(*gradients, 1e-12)
    assert sum(backbone.calls) == 2 * BATCH * LENGTH + CHUNK, "the first chunk found out"


@pytest.mark.parametrize("head", [None, _product])
def test_a_hook_on_the_heads_weight_sees_the_whole_gradient_once(
    head: Callable[[Headed, Tensor], Tensor] | None,
) -> None:
    process = make_process("uniform", VOCAB)
    seen, final = [], []
    for chunk in (0, CHUNK):
        backbone = Headed(process, head).double()
        found: list[Tensor] = []
        backbone.logits.weight.register_hook(lambda one, found=found: found.append(one) or 3 * one)  # type: ignore[misc]
        network = NetworkDenoiser(backbone, process)
        game = Denoising(Denoising.Config(chunk_rows=chunk), process=process, network=network, teacher=None)
        game.loss(("network",), *_inputs()).by_player["network"].backward()
        (gradient,) = found
        seen.append({"weight": gradient})
        final.append({key: one.grad for key, one in backbone.named_parameters() if one.grad is not None})
    _assert_same(*seen, 1e-12)
    _assert_same(*final, 1e-12)
    assert torch.allclose(final[1]["logits.weight"], 3 * seen[1]["weight"])


class _Released(torch.autograd.Function):
    """The identity; as compiled graphs do, it wants its memory back after one backward pass."""

    @staticmethod
    def forward(ctx: object, logits: Tensor) -> Tensor:
        return logits.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        assert not torch._C._autograd._get_current_graph_task_keep_graph()
        return gradient


def test_players_that_share_no_graph_do_not_keep_each_others() -> None:
    def head(network: Headed, features: Tensor) -> Tensor:
        return _Released.apply(network.logits(features))  # type: ignore[no-any-return]

    _both("masked", torch.float64, ("student", "auxiliary"), head)


class _Plain(Prediction):
    """A stranger's prediction, which implements what it must and no more."""

    def __init__(self, inner: Prediction) -> None:
        self._inner = inner
        self.num_rows, self.vocab_size = inner.num_rows, inner.vocab_size

    def log_probs(self, rows: Tensor | None = None) -> Tensor:
        return (2 * self._inner.log_probs(rows)).log_softmax(-1)


class _Derived(NetworkPrediction):
    """A class derived from the core's, with a tensor of its own for all rows."""

    def log_probs(self, rows: Tensor | None = None) -> Tensor:
        scale = 1 + torch.arange(self.num_rows).unsqueeze(-1) / 7
        return (super().log_probs(rows) * (scale if rows is None else scale[rows])).log_softmax(-1)


class _Strange(Denoiser):
    def __init__(self, inner: NetworkDenoiser, derived: bool) -> None:
        super().__init__()
        self.inner = inner
        self.derived = derived

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        if not self.derived:
            return _Plain(self.inner(z_t, t, condition))
        features = self.inner.backbone.features(z_t, t, condition or Condition())
        return _Derived(self.inner.backbone, self.inner.process, features, z_t, t)


@pytest.mark.parametrize("derived", [False, True])
def test_predictions_that_name_no_sources_are_right_too(derived: bool) -> None:
    process = make_process("masked", VOCAB)
    gradients = []
    for chunk in (0, CHUNK):
        network = _Strange(NetworkDenoiser(Headed(process), process).double(), derived)
        game = Denoising(Denoising.Config(chunk_rows=chunk), process=process, network=network, teacher=None)
        game.loss(("network",), *_inputs()).by_player["network"].backward()
        gradients.append({key: one.grad for key, one in network.named_parameters() if one.grad is not None})
        backbone = network.inner.backbone
    assert isinstance(backbone, Headed)
    assert max(backbone.calls) == CHUNK
    _assert_same(*gradients, 1e-12)
    assert float(gradients[0]["inner.backbone.tokens.weight"].abs().max()) > 1e-3


# ---- losses and callers of all kinds ---------------------------------------------------------------------------------


def _several(chunk: int, stacked: bool) -> tuple[Tensor, list[Tensor], list[int]]:
    """Three losses of one network: two that share its graph, one without gradient."""
    process = make_process("uniform", VOCAB)
    backbone = Headed(process).double()
    z = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    s = torch.linspace(0.1, 0.9, BATCH, dtype=torch.float64)
    prediction = NetworkDenoiser(backbone, process)(z, s)

    def row_loss(rows: Rows, part: Prediction) -> Tensor | list[Tensor]:
        log_probs = part.log_probs()
        losses = [log_probs[:, 0], log_probs.square().sum(-1), log_probs.detach().sum(-1)]
        return torch.stack(losses) if stacked else losses

    total = sum_over_rows(rows_with_loss(process, z, s), row_loss, chunk, [prediction])
    return total, list(backbone.parameters()), backbone.calls


@pytest.mark.parametrize("stacked", [False, True])
def test_several_losses_of_one_network_are_weighted_when_the_backward_pass_says_how(stacked: bool) -> None:
    (plain, plain_parameters, _), (chunked, parameters, calls) = (_several(chunk, stacked) for chunk in (0, CHUNK))
    assert chunked.shape == (3,)
    assert torch.allclose(plain, chunked, rtol=1e-12, atol=0)
    weights = [(2.0, -3.0, 1.0), (1.0, 0.0, 0.0), (0.0, 0.5, 0.0)]
    for weight in weights:  # the same graph, three times
        found = []
        for total, inputs in ((plain, plain_parameters), (chunked, parameters)):
            combined = (total * torch.tensor(weight)).sum()
            gradients = torch.autograd.grad(combined, inputs, retain_graph=True)
            found.append({str(number): gradient for number, gradient in enumerate(gradients)})
        _assert_same(*found, 1e-12)
    assert sum(calls) == BATCH * LENGTH


def test_gradients_are_handed_on_once_unless_the_graph_is_retained() -> None:
    total, parameters, _ = _several(CHUNK, False)
    first = torch.autograd.grad(total[1], parameters, retain_graph=True)
    second = torch.autograd.grad(total[1], parameters)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    total, parameters, _ = _several(CHUNK, False)
    (2 * total[1]).backward()
    assert all(torch.allclose(one.grad, 2 * known) for one, known in zip(parameters, first, strict=True))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="handed on already; compute the loss again, or say retain_graph=True"):
        total[0].backward()


def test_a_second_derivative_is_refused() -> None:
    total, parameters, _ = _several(CHUNK, False)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice; set chunk_rows to 0"):
        torch.autograd.grad(total[1], parameters, create_graph=True)


def test_losses_accumulate_over_batches_as_plain_ones_do() -> None:
    gradients = []
    for chunk in (0, CHUNK):
        game = _game("masked", torch.float64, chunk_rows=chunk, auxiliary_target="soft")
        for step in range(3):
            losses = game.loss(("student", "auxiliary"), *_inputs(step)).by_player
            (losses["student"] + losses["auxiliary"]).backward()
        gradients.append({key: one.grad for key, one in _parameters(game).items() if one.grad is not None})
    _assert_same(*gradients, 1e-12)


def test_without_gradients_there_is_no_graph_and_the_same_value() -> None:
    values = []
    for chunk in (0, CHUNK):
        game = _game("uniform", torch.float64, chunk_rows=chunk)
        with torch.no_grad():
            losses = game.loss(("student", "auxiliary"), *_inputs()).by_player
        assert not any(loss.requires_grad for loss in losses.values())
        values.append([float(loss) for loss in losses.values()])
    assert values[1] == pytest.approx(values[0], rel=1e-12)


def test_a_network_that_is_not_trained_gets_no_gradient_and_asks_for_none() -> None:
    game = _game("uniform", torch.float64, chunk_rows=CHUNK)
    game.student.requires_grad_(False)
    game.student.backbone.logits.bias.requires_grad_(True)  # type: ignore[union-attr]
    game.auxiliary.backbone.tokens.requires_grad_(True)  # type: ignore[union-attr]
    losses = game.loss(("student", "auxiliary"), *_inputs()).by_player
    (losses["student"] + losses["auxiliary"]).backward()
    given = {key for key, one in game.student.named_parameters() if one.grad is not None}
    assert given == {"backbone.logits.bias"}
    plain = _game("uniform", torch.float64)
    losses = plain.loss(("student", "auxiliary"), *_inputs()).by_player
    (losses["student"] + losses["auxiliary"]).backward()
    for mine, theirs in ((game.student, plain.student), (game.auxiliary, plain.auxiliary)):
        expected = {key: one.grad for key, one in theirs.named_parameters()}
        found = {key: one.grad for key, one in mine.named_parameters() if one.grad is not None}
        _assert_same({key: expected[key] for key in found}, found, 1e-12)  # type: ignore[misc]


@pytest.mark.parametrize("head", [None, _whole])
@pytest.mark.parametrize("chunk", [0, CHUNK])
@pytest.mark.parametrize("turn", TURNS, ids="-".join)
def test_bfloat16_autocast_keeps_float32_gradients_near_those_of_float32(
    chunk: int, turn: tuple[str, ...], head: Callable[[Headed, Tensor], Tensor] | None
) -> None:
    exact = _game("masked", torch.float32, head, auxiliary_target="soft")
    # No drawn token may differ, or the losses would be others.
    exact.draw_times = lambda draws, shape=(): (torch.full((BATCH,), 0.9, dtype=torch.float64),) * 2  # type: ignore[method-assign]
    game = _game("masked", torch.float32, head, auxiliary_target="soft", chunk_rows=chunk)
    game.draw_times = exact.draw_times  # type: ignore[method-assign]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = game.loss(turn, *_inputs())
        assert losses.by_player[turn[0]].dtype == torch.float32
    found, expected = _gradients(game, losses), _gradients(exact, exact.loss(turn, *_inputs()))
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    if "auxiliary" in turn:  # weights that autocast has cast once are no reason to run a head twice
        assert sum(_heads(game)[2].calls) == sum(_heads(exact)[2].calls)
    # bfloat16 rounds to 2^-9; the largest error of a few layers is some ten times that.
    _assert_same(expected, found, 10 * 2**-8)


def test_a_head_that_leaves_autocast_has_its_gradient_outside_too() -> None:
    def head(network: Headed, features: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return network.logits(features.float()) @ torch.eye(VOCAB)

    gradients = []
    for chunk in (0, CHUNK):
        game = _game("uniform", torch.float32, head, chunk_rows=chunk)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = game.loss(("student",), *_inputs())
        found = _gradients(game, losses)
        gradients.append({name: found[f"student.backbone.logits.{name}"] for name in ("weight", "bias")})
    _assert_same(*gradients, 1e-5)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_distributed_engines_see_ordinary_gradients(engine: str, process_group: None) -> None:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.nn.parallel import DistributedDataParallel

    class Replicated(DistributedDataParallel):
        draw_latent = property(lambda self: self.module.draw_latent)
        block_size = property(lambda self: self.module.block_size)

    gradients = []
    for chunk in (0, CHUNK):
        game = _game("uniform", torch.float64, chunk_rows=chunk)
        players = {"student": game.student, "auxiliary": game.auxiliary}
        for name, player in players.items():
            if chunk and engine == "ddp":
                setattr(game, name, Replicated(player))
            elif chunk:
                fully_shard(player.backbone.logits)  # type: ignore[arg-type, union-attr]
                fully_shard(player)
                register_fsdp_forward_method(player.backbone, "head")  # type: ignore[arg-type]
        for step in range(2):
            losses = game.loss(("student", "auxiliary"), *_inputs(step)).by_player
            (losses["student"] + losses["auxiliary"]).backward()
        gradients.append({})
        for name, player in players.items():
            for key, one in player.named_parameters():
                assert one.grad is not None
                whole = one.grad.full_tensor() if engine == "fsdp2" and chunk else one.grad
                gradients[-1][f"{name}.{key}"] = whole
    _assert_same(*gradients, 1e-12)


@pytest.mark.parametrize("count", [0, 1, CHUNK, CHUNK + 1])
def test_any_number_of_rows_carries_a_loss(count: int) -> None:
    process = make_process("masked", VOCAB)
    gradients = []
    for chunk in (0, CHUNK):
        backbone: Backbone = Headed(process).double()
        z = torch.zeros(1, LENGTH, dtype=torch.int64)
        z[0, :count] = VOCAB
        s = torch.full((1,), 0.5, dtype=torch.float64)
        prediction = NetworkDenoiser(backbone, process)(z, s)

        def row_loss(rows: Rows, part: Prediction) -> Tensor:
            return part.log_probs()[:, 0]

        total = sum_over_rows(rows_with_loss(process, z, s), row_loss, chunk, [prediction])
        assert total.shape == ()
        total.backward()
        gradients.append({key: one.grad for key, one in backbone.named_parameters() if one.grad is not None})
    _assert_same(*gradients, 1e-12)
