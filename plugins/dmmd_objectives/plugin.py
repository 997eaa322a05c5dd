"""Registers the objectives; checks what their Configs alone cannot."""

from __future__ import annotations

from dmmd_core import PluginRegistrar, Problem, Recipe, hookimpl


@hookimpl
def dmmd_register(registry: PluginRegistrar) -> None:
    """Register the components of this package."""
    from dmmd_objectives.dcd import ConsistencyDistillation
    from dmmd_objectives.denoising import Denoising
    from dmmd_objectives.di4c import MixtureDistillation
    from dmmd_objectives.dimo import DiMO
    from dmmd_objectives.idlm import InverseDistillation
    from dmmd_objectives.moment_matching import MomentMatching
    from dmmd_objectives.sdtt import SelfDistillation

    registry.add("objective", "denoising", Denoising)
    registry.add("objective", "moment_matching", MomentMatching)
    registry.add("objective", "sdtt", SelfDistillation)
    registry.add("objective", "dimo", DiMO)
    registry.add("objective", "idlm", InverseDistillation)
    registry.add("objective", "di4c", MixtureDistillation)
    registry.add("objective", "dcd", ConsistencyDistillation)


@hookimpl
def dmmd_check_recipe(recipe: Recipe) -> list[Problem]:
    """Refuse several steps for a method that is about one."""
    steps = recipe.distill.num_steps
    if recipe.objective.name != "dimo" or steps == 1:
        return []
    message = f"must be 1 for objective 'dimo', which distils into a single step, got {steps}"
    return [Problem("distill.num_steps", message)]
