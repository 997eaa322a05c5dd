"""Backbones: shapes, conditioning, positions, attention kernels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dmmd_backbones.attention import choose_attention, sdpa_attention, xformers_attention, xformers_problem
from dmmd_backbones.mlp import MLP
from dmmd_backbones.transformer import Transformer, rotary_angles, rotate
from dmmd_core import Backbone, Condition, NetworkDenoiser, RunError
from dmmd_processes.masked import Masked
from dmmd_processes.schedules import Linear

INPUTS, VOCAB, GRID = 7, 6, (2, 3)


def _transformer(**params: Any) -> Transformer:
    torch.manual_seed(0)
    config = Transformer.Config(**{"width": 16, "heads": 2, "depth": 2, **params})
    model = Transformer(config, num_inputs=INPUTS, vocab_size=VOCAB, length=6, grid=GRID, num_classes=3)
    with torch.no_grad():  # zero-initialised gates and heads would hide everything
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _mlp() -> MLP:
    torch.manual_seed(0)
    return MLP(MLP.Config(width=16, depth=2, embedding_width=8), num_inputs=INPUTS, vocab_size=VOCAB, length=6)


BACKBONES = {
    "mlp": _mlp,
    "rotary": _transformer,
    "rotary_grid": lambda: _transformer(layout="grid", width=32),
    "learned": lambda: _transformer(positions="learned"),
    "learned_grid": lambda: _transformer(positions="learned", layout="grid"),
    "convolutions": lambda: _transformer(convolutions=2),
    "convolutions_grid": lambda: _transformer(convolutions=1, positions="learned", layout="grid"),
    "classes": lambda: _transformer(class_conditional=True),
}


def _logits(model: Backbone, z: torch.Tensor, t: torch.Tensor, **condition: Any) -> torch.Tensor:
    return model.head(model.features(z, t, Condition(**condition)).flatten(0, 1)).unflatten(0, z.shape)


@pytest.mark.parametrize("name", BACKBONES)
def test_shapes_gradients_and_rows(name: str) -> None:
    model = BACKBONES[name]()
    z, t = torch.randint(0, INPUTS, (5, 6)), torch.rand(5)
    noise = torch.zeros(5, 6, model.embedding_width, requires_grad=True)
    features = model.features(z, t, Condition(label=torch.zeros(5, dtype=torch.int64)), noise)
    assert features.shape[:2] == (5, 6)
    logits = model.head(features.flatten(0, 1))
    assert logits.shape == (30, VOCAB)
    rows = torch.tensor([3, 17])
    assert torch.allclose(model.head(features.flatten(0, 1)[rows]), logits[rows], atol=1e-6)
    logits.square().sum().backward()
    missing = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []
    assert noise.grad is not None
    assert float(noise.grad.abs().sum()) > 0


@pytest.mark.parametrize("name", BACKBONES)
def test_one_time_for_all_positions_is_the_same_time_at_each(name: str) -> None:
    model = BACKBONES[name]()
    z, t = torch.randint(0, INPUTS, (5, 6)), torch.rand(5)
    wide = t.unsqueeze(1).expand(5, 6)
    assert torch.allclose(_logits(model, z, t), _logits(model, z, wide), atol=1e-5)
    assert not torch.allclose(_logits(model, z, t), _logits(model, z, 1 - t), atol=1e-3)


@pytest.mark.parametrize("name", ["learned", "learned_grid", "mlp"])
def test_positions_are_told_apart_even_where_all_tokens_are_equal(name: str) -> None:
    """Rotary positions cannot do this: a fully masked grid would look the same everywhere."""
    model = BACKBONES[name]()
    logits = _logits(model, torch.full((1, 6), INPUTS - 1), torch.ones(1))[0]
    assert float((logits[0] - logits[5]).detach().abs().max()) > 1e-3


def test_rotary_scores_depend_on_distance_alone() -> None:
    source = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 1, 8, generator=source, dtype=torch.float64) for _ in range(2))
    angles = rotary_angles((10,), 8).double()
    turned = [rotate(x.expand(1, 10, 1, 8), angles.cos(), angles.sin())[0, :, 0] for x in (query, key)]
    scores = turned[0] @ turned[1].T
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-6)
    assert float(scores.std()) > 0.01


def test_rotary_grid_gives_every_axis_its_share() -> None:
    angles = rotary_angles((2, 3), 16)
    assert angles.shape == (6, 8)
    assert torch.equal(angles[0], torch.zeros(8))
    assert angles[1].count_nonzero() == angles[3].count_nonzero() == 4  # one step along one axis turns its half


def test_classes_change_the_prediction_and_none_is_a_class_of_its_own() -> None:
    model = BACKBONES["classes"]()
    z, t = torch.randint(0, INPUTS, (2, 6)), torch.rand(2)
    outcomes = [_logits(model, z, t, label=torch.full((2,), label)) for label in range(4)]
    for first in range(4):
        for second in range(first):
            assert not torch.allclose(outcomes[first], outcomes[second], atol=1e-4)
    assert torch.equal(outcomes[3], _logits(model, z, t)), "without a label the last row of the table is used"


def test_sdpa_is_softmax_attention() -> None:
    source = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 5, 3, 4, generator=source, dtype=torch.float64) for _ in range(3))
    scores = torch.einsum("bqhw,bkhw->bhqk", query, key) / math.sqrt(4)
    expected = torch.einsum("bhqk,bkhw->bqhw", scores.softmax(-1), value)
    assert torch.allclose(sdpa_attention(query, key, value), expected, atol=1e-12)


def test_choice_of_kernel_is_told_and_xformers_on_a_cpu_is_one_clear_error() -> None:
    assert choose_attention("sdpa")[0] == "sdpa"
    if not torch.cuda.is_available():
        assert choose_attention("auto")[0] == "sdpa"
        with pytest.raises(RunError, match="no CPU kernel"):
            xformers_attention(*torch.randn(3, 1, 4, 2, 8))
    assert _transformer(attention="sdpa").description() == {"attention": "sdpa"}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_agree_in_values_and_gradients(dtype: torch.dtype) -> None:
    problem = xformers_problem()
    if problem or not torch.cuda.is_available():
        pytest.skip(problem or "no CUDA device")
    results = []
    for attend in (sdpa_attention, xformers_attention):
        torch.manual_seed(0)
        tensors = [torch.randn(2, 256, 4, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]
        out = attend(*tensors)
        out.float().square().sum().backward()
        results.append([out, *(tensor.grad for tensor in tensors)])
    # bfloat16 keeps 8 bits: relative steps of 1/256, a few of them after a sum of 256 terms.
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for first, second in zip(*results, strict=True):
        assert torch.allclose(first.float(), second.float(), rtol=tolerance, atol=tolerance)


def test_convolutions_mix_neighbours_and_start_as_the_identity() -> None:
    torch.manual_seed(0)
    for layout, neighbours in (("line", {0, 1, 2}), ("grid", {0, 1, 2, 3, 4, 5})):
        model = _transformer(convolutions=1, layout=layout, positions="learned")
        layer = model.convolutions[0]
        x = torch.randn(1, 6, 16)
        moved = x.clone()
        moved[0, 1] += 1
        changed = (layer(x) - layer(moved)).abs().sum(-1)[0] > 1e-6
        assert set(changed.nonzero().flatten().tolist()) == neighbours
    torch.manual_seed(0)
    config = Transformer.Config(width=16, heads=2, depth=1, convolutions=1)
    fresh = Transformer(config, num_inputs=INPUTS, vocab_size=VOCAB, length=6, grid=None, num_classes=None)
    assert torch.equal(fresh.convolutions[0](x), x)


def test_a_fixed_position_shows_the_network_the_time_of_the_others() -> None:
    process = Masked(Masked.Config(), vocab_size=VOCAB, schedule=Linear(Linear.Config()))
    model = _transformer()
    denoiser = NetworkDenoiser(model, process)
    z = torch.tensor([[1, 6, 6, 2, 6, 6]])
    fixed = torch.tensor([[True, False, False, True, False, False]])
    times = torch.where(fixed, 0.0, torch.tensor(0.7))
    given = denoiser(z, times, Condition(fixed=fixed, values=z)).log_probs()
    trained = denoiser(z, torch.tensor([0.7])).log_probs()
    assert torch.allclose(given, trained, atol=1e-6)
