"""Optimiser and learning rate over time."""

from __future__ import annotations

import math

import torch

from dmmd_core.interfaces.objective import Player
from dmmd_core.recipe import OptimizerSection


def make_optimizer(player: Player, section: OptimizerSection) -> torch.optim.Optimizer:
    """Build AdamW for one player; its learning rate is set before every step."""
    parameters = [parameter for parameter in player.module.parameters() if parameter.requires_grad]
    on_cuda = all(parameter.is_cuda for parameter in parameters)
    return torch.optim.AdamW(
        parameters,
        lr=section.learning_rate * player.learning_rate_scale,
        betas=(section.beta1, section.beta2),
        eps=section.epsilon,
        weight_decay=section.weight_decay,
        fused=(on_cuda if section.fused is None else section.fused) or None,  # None leaves the choice to PyTorch
    )


def learning_rate(section: OptimizerSection, step: int, steps: int) -> float:
    """Learning rate of a step: linear warm-up, then constant, linear or cosine fall to zero.

    Args:
        section: Peak, warm-up and decay.
        step: Steps done before this one.
        steps: Steps of the stage.
    """
    if step < section.warmup_steps:
        return section.learning_rate * (step + 1) / section.warmup_steps
    progress = (step - section.warmup_steps) / max(1, steps - section.warmup_steps)
    factors = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return section.learning_rate * factors[section.decay]
