"""Backbones: shapes, conditioning, positions, places on a grid, attention kernels."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import dmmd_backbones.attention
from dmmd_backbones.attention import choose_attention, sdpa_attention, xformers_attention, xformers_problem
from dmmd_backbones.mlp import MLP
from dmmd_backbones.rotary import rotary_angles, rotate
from dmmd_backbones.transformer import Transformer
from dmmd_backbones.unet import UNet
from dmmd_backbones.uvit import UViT
from dmmd_core import Backbone, Condition, FieldError, NetworkDenoiser, RunError
from dmmd_processes.masked import Masked
from dmmd_processes.schedules import Linear

INPUTS, VOCAB, GRID = 7, 6, (2, 3)


def _moved(model: Any) -> Any:
    with torch.no_grad():  # zero-initialised gates and heads would hide everything
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _transformer(**params: Any) -> Transformer:
    torch.manual_seed(0)
    config = Transformer.Config(**{"width": 16, "heads": 2, "depth": 2, **params})
    return _moved(Transformer(config, num_inputs=INPUTS, vocab_size=VOCAB, length=6, grid=GRID, num_classes=3))


def _unet(grid: tuple[int, ...] | None = GRID, **params: Any) -> UNet:
    torch.manual_seed(0)
    settings = {"width": 8, "multipliers": [1, 2], "blocks": 1, "attention_levels": [1], "head_width": 8}
    config = UNet.Config(**{**settings, **params})
    return UNet(config, num_inputs=INPUTS, vocab_size=VOCAB, grid=grid, num_classes=3)


def _uvit(grid: tuple[int, ...] | None = GRID, **params: Any) -> UViT:
    torch.manual_seed(0)
    config = UViT.Config(**{"width": 16, "heads": 2, "depth": 3, "patch": 1, "embedding_width": 8, **params})
    return UViT(config, num_inputs=INPUTS, vocab_size=VOCAB, grid=grid, num_classes=3)


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
    "unet": lambda: _moved(_unet()),
    "unet_pixels": lambda: _moved(_unet((2, 1, 3), multipliers=[1], attention_levels=[0])),
    "unet_classes": lambda: _moved(_unet(class_conditional=True)),
    "uvit": lambda: _moved(_uvit()),
    "uvit_pixels": lambda: _moved(_uvit((1, 2, 3), depth=2)),
    "uvit_classes": lambda: _moved(_uvit(class_conditional=True, depth=1)),
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


@pytest.mark.parametrize("name", ["learned", "learned_grid", "mlp", "unet", "unet_pixels", "uvit", "uvit_pixels"])
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


@pytest.mark.parametrize("name", ["classes", "unet_classes", "uvit_classes"])
def test_classes_change_the_prediction_and_none_is_a_class_of_its_own(name: str) -> None:
    model = BACKBONES[name]()
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
    for build in (_transformer, _unet, _uvit):
        assert build(attention="sdpa").description()["attention"] == "sdpa"


def test_auto_gives_to_sdpa_what_xformers_refuses_and_by_name_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    broken = {16: None, 32: "xformers has no kernel that works on this device"}
    monkeypatch.setattr(dmmd_backbones.attention, "_kernel_problem", broken.__getitem__)
    if xformers_problem(16) is not None:
        pytest.skip("xformers does not import here")
    assert choose_attention("xformers", head_width=16) == ("xformers", xformers_attention)
    name, attend = choose_attention("auto", head_width=16)
    assert name == "xformers on CUDA"
    tensors = torch.randn(3, 1, 4, 2, 16)
    assert torch.equal(attend(*tensors), sdpa_attention(*tensors)), "a model on a CPU needs no other setting"
    for words, what in {
        "multiple of 8": {"head_width": 12},
        "no kernel": {"head_width": 32},
        "no mask": {"head_width": 16, "masked": True},
    }.items():
        assert choose_attention("auto", **what) == ("sdpa", sdpa_attention)  # type: ignore[arg-type]
        with pytest.raises(FieldError, match=words):
            choose_attention("xformers", **what)  # type: ignore[arg-type]
    with pytest.raises(FieldError, match="multiple of 8"):
        _transformer(attention="xformers", width=24, heads=2)
    with pytest.raises(RunError, match="no mask"):
        xformers_attention(*torch.randn(3, 1, 4, 2, 8), torch.ones(4, 4, dtype=torch.bool))


def test_a_smoke_run_needs_no_kernel_of_a_gpu() -> None:
    for cls in (Transformer, UNet, UViT):
        assert cls.smoke(cls.Config(attention="xformers")).attention == "auto"
        assert cls.smoke(cls.Config(attention="sdpa")).attention == "sdpa"


def test_masks_and_dropout_of_attention() -> None:
    source = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4, 2, 8, generator=source) for _ in range(3))
    mask = torch.tensor([True, True, False, False]).expand(4, 4)
    seen = sdpa_attention(query, key[:, :2], value[:, :2])
    assert torch.allclose(sdpa_attention(query, key, value, mask), seen, atol=1e-6)
    ones = torch.ones(1, 400, 2, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = sdpa_attention(ones, ones, ones, dropout=0.5)[..., 0].flatten()
    assert float(dropped.std()) > 0
    # Each of 800 sums has 400 weights that are 2 / 400 or 0: mean 1, variance 1 / 400.
    assert abs(float(dropped.mean()) - 1) < 6 / math.sqrt(400 * 800)


@pytest.mark.parametrize("build", [_unet, _uvit], ids=["unet", "uvit"])
def test_attention_dropout_acts_in_training_alone(build: Any) -> None:
    model = _moved(build(attention_dropout=0.5))
    z, t = torch.randint(0, INPUTS, (2, 6)), torch.rand(2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(_logits(model, z, t), _logits(model, z, t))
    model.eval()
    assert torch.equal(_logits(model, z, t), _logits(model, z, t))


@pytest.mark.parametrize("name", ["unet", "unet_pixels", "uvit", "uvit_pixels"])
def test_input_noise_is_added_to_the_embeddings(name: str) -> None:
    model = BACKBONES[name]()
    z, other, t = torch.randint(0, INPUTS, (3, 6)), torch.randint(0, INPUTS, (3, 6)), torch.rand(3)
    noise = model.tokens(other) - model.tokens(z)
    assert torch.allclose(model.features(z, t, Condition(), noise), model.features(other, t, Condition()), atol=1e-5)


def _changed_places(model: Any, grid: tuple[int, int, int], place: int) -> set[tuple[int, int, int]]:
    """Places of the grid whose features change with the token at one place."""
    z = torch.zeros(1, math.prod(grid), dtype=torch.int64)
    other = z.clone()
    other[0, place] = 1
    t = torch.full((1,), 0.5)
    with torch.no_grad():
        change = (model.features(z, t, Condition()) - model.features(other, t, Condition())).abs().sum(-1)[0]
    places = list(itertools.product(*map(range, grid)))
    return {places[row] for row in (change > 1e-6).nonzero().flatten().tolist()}


@pytest.mark.parametrize("place", [0, 13, 34, 59])
def test_a_unet_of_one_level_looks_at_neighbours_of_all_channels(place: int) -> None:
    """At the start of training, and without the last norm, which is over the whole map."""
    grid = (5, 4, 3)
    model = _unet(grid, multipliers=[1], attention_levels=[])
    model.norm = torch.nn.Identity()
    row, column = place // 12, place // 3 % 4
    near = {(r, c, k) for r, c, k in itertools.product(*map(range, grid)) if abs(r - row) < 2 and abs(c - column) < 2}
    assert _changed_places(model, grid, place) == near
    assert len(_changed_places(_moved(_unet(grid)), grid, place)) == 60, "in training, everything"


@pytest.mark.parametrize("place", [0, 16, 40, 71])
def test_a_patch_is_a_square_of_all_channels(place: int) -> None:
    """At the start of training every block is the identity and the last convolution adds nothing."""
    grid = (4, 6, 3)
    row, column = place // 18, place // 3 % 6
    patch = (row // 2, column // 2)
    same = {(r, c, k) for r, c, k in itertools.product(*map(range, grid)) if (r // 2, c // 2) == patch}
    assert _changed_places(_uvit(grid, patch=2), grid, place) == same
    assert len(_changed_places(_moved(_uvit(grid, patch=2)), grid, place)) == 72


@pytest.mark.parametrize("build", [_unet, _uvit], ids=["unet", "uvit"])
def test_channels_have_tables_of_their_own(build: Any) -> None:
    model = build((2, 2, 3))
    z = torch.ones(1, 12, dtype=torch.int64)
    rows = model.tokens(z)[0]
    assert torch.equal(rows[:3].repeat(4, 1), rows)
    assert len(rows[:3].unique(dim=0)) == 3


@pytest.mark.parametrize("build", [_unet, _uvit], ids=["unet", "uvit"])
def test_outputs_and_branches_start_at_zero(build: Any) -> None:
    model = build()
    z, t = torch.randint(0, INPUTS, (2, 6)), torch.rand(2)
    assert float(_logits(model, z, t).detach().abs().max()) == 0
    branches = model.middle if build is _unet else [*model.first, *model.middle, *model.second]
    width = 16
    for branch in branches:
        x = torch.randn((2, width, 2, 3) if build is _unet else (2, 6, width))
        conditioning = torch.randn((2, 1, 1, 32) if build is _unet else (2, 1, width))
        extra = [torch.randn_like(x)] if getattr(branch, "skip", None) is not None else []
        output = branch(x, conditioning, *extra)
        assert torch.equal(output[0] if isinstance(output, tuple) else output, x)  # beside it, keys and values


def test_skips_lead_from_the_first_block_to_the_last() -> None:
    model = _uvit(depth=5)
    given: list[torch.Tensor] = []
    taken: list[torch.Tensor] = []
    for block in model.first:
        block.register_forward_hook(lambda module, inputs, output: given.append(output[0]))
    for block in model.second:
        block.register_forward_hook(lambda module, inputs, output: taken.append(inputs[2]))
    model.features(torch.zeros(1, 6, dtype=torch.int64), torch.rand(1), Condition())
    assert len(given) == 2
    assert all(one is other for one, other in zip(given, reversed(taken), strict=True))


@pytest.mark.parametrize("grid", [(4, 4), (7, 5), (5, 9, 3), (6, 11)])
def test_a_unet_takes_any_height_and_width(grid: tuple[int, ...]) -> None:
    model = _moved(_unet(grid, multipliers=[1, 2, 2], attention_levels=[2]))
    length = math.prod(grid)
    z, t = torch.randint(0, INPUTS, (2, length)), torch.rand(2)
    features = model.features(z, t, Condition())
    assert features.shape == (2, length, 8)
    wide = model.features(z, t.unsqueeze(1).expand(2, length), Condition())
    assert torch.allclose(features, wide, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: _unet((3, 8), multipliers=[1, 1, 1], attention_levels=[]), "multipliers: has 3 levels"),
        (lambda: _unet((8, 8), attention_levels=[2]), "attention_levels: must be below 2"),
        (lambda: _unet((8, 8), head_width=3), "head_width: must divide the 16 channels"),
        (lambda: _unet((8, 8), multipliers=[], attention_levels=[]), "multipliers: needs at least one"),
        (lambda: _unet((8,)), "height, width"),
        (lambda: _uvit((2, 2, 2, 2)), "height, width"),
        (lambda: _uvit((6, 4), patch=4), "patch: must divide the grid's 6 x 4"),
        (lambda: _uvit(heads=3), "heads: must divide"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(build: Any, words: str) -> None:
    with pytest.raises(FieldError, match=words):
        build()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_width", "keys"), [(8, 256), (32, 77), (64, 256), (128, 300)])
def test_kernels_agree_in_values_and_gradients(dtype: torch.dtype, head_width: int, keys: int) -> None:
    problem = xformers_problem(head_width) if torch.cuda.is_available() else "no CUDA device"
    if problem:
        pytest.skip(problem)
    results = []
    for attend in (sdpa_attention, xformers_attention):
        torch.manual_seed(0)
        lengths = (256, keys, keys)
        tensors = [
            torch.randn(2, length, 4, head_width, device="cuda", dtype=dtype, requires_grad=True) for length in lengths
        ]
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
