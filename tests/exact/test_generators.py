"""Input noise of the students."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from worlds import make_process

from dmmd_backbones.mlp import MLP
from dmmd_core import Draws
from dmmd_generators.deterministic import Deterministic
from dmmd_generators.noise_conditioned import NoiseConditioned

GRIDS = [(4, 4), (5, 3), (4, 4, 3)]


def _student(latent: str, grid: tuple[int, ...], **params: Any) -> NoiseConditioned:
    length = torch.Size(grid).numel()
    process = make_process("masked", 3)
    backbone = MLP(MLP.Config(width=8, depth=1, embedding_width=6), num_inputs=4, vocab_size=3, length=length)
    config = NoiseConditioned.Config(latent=latent, **{"width": 5, **params})  # type: ignore[arg-type]
    return NoiseConditioned(config, backbone=backbone, process=process, length=length, grid=grid)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("latent", ["sequence", "position", "pyramid"])
def test_latents_have_unit_variance_and_reach_every_position(latent: str, grid: tuple[int, ...]) -> None:
    student = _student(latent, grid)
    length = torch.Size(grid).numel()
    drawn = student.draw_latent(Draws.for_range(0, 0, 0, 4000))
    assert drawn.shape == (4000, 1 if latent == "sequence" else length, 5)
    # At least 4,000 x 5 independent Gaussians, were all positions one: standard error at most 1 / sqrt(20000).
    assert abs(float(drawn.double().mean())) < 6 / 20_000**0.5
    # Per element: 4,000 squares of Gaussians, standard error sqrt(2 / 4000); six of them.
    assert float((drawn.double().square().mean(0) - 1).abs().max()) < 6 * (2 / 4000) ** 0.5
    assert student.input_noise(drawn[:7]).shape == (7, length, 6)


def test_a_pyramid_ties_near_positions_and_no_other_latent_does() -> None:
    covariances = {}
    for latent in ("position", "pyramid"):
        drawn = _student(latent, (4, 4)).draw_latent(Draws.for_range(0, 0, 0, 4000)).double()[..., 0]
        covariances[latent] = drawn.T.corrcoef()
    # 4x4 cells: resolutions of 1, 2 and 4 cells; neighbours in one 2x2 cell share two of three, others one.
    noise = 6 / 4000**0.5
    assert abs(float(covariances["pyramid"][0, 1]) - 2 / 3) < noise
    assert abs(float(covariances["pyramid"][0, 2]) - 1 / 3) < noise
    assert abs(float(covariances["pyramid"][1, 2]) - 1 / 3) < noise
    assert abs(float(covariances["pyramid"][0, 5]) - 2 / 3) < noise
    assert abs(float(covariances["position"][0, 1])) < noise


def test_a_pyramid_goes_by_the_longer_side_of_the_grid() -> None:
    drawn = _student("pyramid", (5, 3)).draw_latent(Draws.for_range(0, 0, 0, 4000)).double()[..., 0]
    correlations = drawn.T.corrcoef()
    noise = 6 / 4000**0.5  # six standard errors of a correlation
    # Cells of 1, 2 and 4: (0, 0) and (2, 1) meet in the largest, (0, 0) and (4, 0) nowhere.
    assert abs(float(correlations[0, 2 * 3 + 1]) - 1 / 3) < noise
    assert abs(float(correlations[0, 4 * 3])) < noise
    assert abs(float(correlations[0, 1]) - 2 / 3) < noise
    assert abs(float(correlations[1, 2]) - 1 / 3) < noise


def test_a_pyramid_on_channels_keeps_them_apart() -> None:
    drawn = _student("pyramid", (4, 4, 3)).draw_latent(Draws.for_range(0, 0, 0, 4000)).double()[..., 0]
    correlations = drawn.unflatten(1, (4, 4, 3))[:, 0].flatten(1).T.corrcoef()
    noise = 6 / 4000**0.5  # six standard errors of a correlation
    assert abs(float(correlations[0, 1])) < noise
    assert abs(float(correlations[0, 3]) - 2 / 3) < noise


def test_a_latent_changes_the_prediction_and_every_sample_its_own_alone() -> None:
    student = _student("sequence", (3, 2))
    z, t = torch.zeros(4, 6, dtype=torch.int64) + 3, torch.full((4,), 0.5)
    latent = student.draw_latent(Draws.for_range(0, 0, 0, 4))
    first = student(z, t, latent=latent).log_probs().unflatten(0, (4, 6)).detach()
    assert float((first[0] - first[1]).abs().max()) > 1e-4
    latent[2] += 1
    second = student(z, t, latent=latent).log_probs().unflatten(0, (4, 6)).detach()
    changed = (first - second).abs().amax((1, 2))
    assert changed[2] > 1e-4
    assert changed[[0, 1, 3]].tolist() == [0, 0, 0]


@pytest.mark.parametrize("latent", ["sequence", "position", "pyramid"])
def test_latents_do_not_depend_on_the_batch(latent: str) -> None:
    student = _student(latent, (4, 4))
    whole = student.draw_latent(Draws.for_range(0, 3, 0, 6))
    assert torch.equal(whole[4:], student.draw_latent(Draws.for_range(0, 3, 4, 2)))
    assert torch.equal(whole[[5, 0]], student.draw_latent(Draws(0, 3, torch.tensor([5, 0]))))
    assert not torch.equal(whole, student.draw_latent(Draws.for_range(0, 4, 0, 6)))


def test_the_projected_noise_starts_at_the_scale_that_was_asked_for() -> None:
    student = _student("position", (4, 4), width=4000, initial_scale=3.0)
    assert float(student.project.bias.detach().abs().max()) == 0
    noise = student.input_noise(student.draw_latent(Draws.for_range(0, 0, 0, 200))).detach()
    # Per output channel the variance given the weights is their squared sum: 4,000 squares, standard error
    # 9 sqrt(2 / 4000); and 3,200 draws of it, standard error 9 sqrt(2 / 3200). Six of their sum.
    assert float((noise.double().square().mean((0, 1)) - 9).abs().max()) < 6 * 9 * (2 / 4000 + 2 / 3200) ** 0.5


def test_a_latent_must_be_given_where_it_is_taken_and_only_there() -> None:
    student = _student("position", (4, 4))
    z, t = torch.zeros(2, 16, dtype=torch.int64), torch.rand(2)
    with pytest.raises(ValueError, match="needs a latent"):
        student(z, t)
    plain = Deterministic(Deterministic.Config(), backbone=student.backbone, process=student.process)
    assert plain.draw_latent(Draws.for_range(0, 0, 0, 2)) is None
    assert not plain.takes_latent
    with pytest.raises(ValueError, match="takes no latent"):
        plain(z, t, latent=torch.zeros(2, 16, 5))
