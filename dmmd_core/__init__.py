"""dmmd: few-step discrete diffusion through plugins.

The public names below are what a plugin or a script imports. They load on first use, so that ``import dmmd_core``
imports no torch and has no side effects.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmmd_core.api import run
    from dmmd_core.blocks import times_per_position, times_per_sample, training_condition
    from dmmd_core.draws import Draws, categorical_from_uniform
    from dmmd_core.errors import (
        BadImageError,
        CheckpointError,
        DmmdError,
        FieldError,
        PluginError,
        Problem,
        RecipeError,
        RunError,
        UnsupportedError,
    )
    from dmmd_core.hookspecs import hookimpl
    from dmmd_core.hub import hub_problem
    from dmmd_core.interfaces import (
        INTERFACES,
        KINDS,
        Backbone,
        Batch,
        Codec,
        Component,
        Condition,
        Data,
        DataSpec,
        Denoiser,
        EnumerableData,
        Features,
        FiniteData,
        Generator,
        ImageCodec,
        Images,
        ImageSource,
        LanguageModel,
        Losses,
        Metric,
        NetworkDenoiser,
        NetworkPrediction,
        Objective,
        Observer,
        Picture,
        Player,
        Prediction,
        Process,
        Requirement,
        Sampler,
        Samples,
        Schedule,
        Slot,
        Subject,
        TablePrediction,
        Teacher,
        TextCodec,
        Value,
        network_times,
        option,
        per_position,
        slot,
    )
    from dmmd_core.loss import Rows, rows_with_loss, sum_over_rows
    from dmmd_core.pipeline import Run
    from dmmd_core.plugins import load_plugins
    from dmmd_core.precision import component_device
    from dmmd_core.progress import in_notebook, show_progress
    from dmmd_core.recipe import Recipe, load_recipe
    from dmmd_core.registry import PluginRegistrar, Registry
    from dmmd_core.saved import (
        SavedModel,
        load_model_weights,
        load_student,
        load_teacher,
        saved_capabilities,
        upload_model,
    )
    from dmmd_core.shaping import ShapedDenoiser, guide_log_probs, guided, shape_log_probs
    from dmmd_core.usage import is_circumstance

_HOMES = {
    "dmmd_core.api": "run",
    "dmmd_core.blocks": "times_per_position times_per_sample training_condition",
    "dmmd_core.draws": "Draws categorical_from_uniform",
    "dmmd_core.errors": "BadImageError CheckpointError DmmdError FieldError PluginError Problem RecipeError RunError "
    "UnsupportedError",
    "dmmd_core.hookspecs": "hookimpl",
    "dmmd_core.hub": "hub_problem",
    "dmmd_core.interfaces": "INTERFACES KINDS Backbone Batch Codec Component Condition Data DataSpec Denoiser "
    "EnumerableData Features FiniteData Generator ImageCodec ImageSource Images LanguageModel Losses Metric "
    "NetworkDenoiser NetworkPrediction Objective Observer Picture Player Prediction Process Requirement Sampler "
    "Samples Schedule Slot Subject TablePrediction Teacher TextCodec Value network_times option per_position slot",
    "dmmd_core.loss": "Rows rows_with_loss sum_over_rows",
    "dmmd_core.pipeline": "Run",
    "dmmd_core.plugins": "load_plugins",
    "dmmd_core.precision": "component_device",
    "dmmd_core.progress": "in_notebook show_progress",
    "dmmd_core.recipe": "Recipe load_recipe",
    "dmmd_core.registry": "PluginRegistrar Registry",
    "dmmd_core.saved": "SavedModel load_model_weights load_student load_teacher saved_capabilities upload_model",
    "dmmd_core.shaping": "ShapedDenoiser guide_log_probs guided shape_log_probs",
    "dmmd_core.usage": "is_circumstance",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "INTERFACES",
    "KINDS",
    "Backbone",
    "BadImageError",
    "Batch",
    "CheckpointError",
    "Codec",
    "Component",
    "Condition",
    "Data",
    "DataSpec",
    "Denoiser",
    "DmmdError",
    "Draws",
    "EnumerableData",
    "Features",
    "FieldError",
    "FiniteData",
    "Generator",
    "ImageCodec",
    "ImageSource",
    "Images",
    "LanguageModel",
    "Losses",
    "Metric",
    "NetworkDenoiser",
    "NetworkPrediction",
    "Objective",
    "Observer",
    "Picture",
    "Player",
    "PluginError",
    "PluginRegistrar",
    "Prediction",
    "Problem",
    "Process",
    "Recipe",
    "RecipeError",
    "Registry",
    "Requirement",
    "Rows",
    "Run",
    "RunError",
    "Sampler",
    "Samples",
    "SavedModel",
    "Schedule",
    "ShapedDenoiser",
    "Slot",
    "Subject",
    "TablePrediction",
    "Teacher",
    "TextCodec",
    "UnsupportedError",
    "Value",
    "categorical_from_uniform",
    "component_device",
    "guide_log_probs",
    "guided",
    "hookimpl",
    "hub_problem",
    "in_notebook",
    "is_circumstance",
    "load_model_weights",
    "load_plugins",
    "load_recipe",
    "load_student",
    "load_teacher",
    "network_times",
    "option",
    "per_position",
    "rows_with_loss",
    "run",
    "saved_capabilities",
    "shape_log_probs",
    "show_progress",
    "slot",
    "sum_over_rows",
    "times_per_position",
    "times_per_sample",
    "training_condition",
    "upload_model",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'dmmd_core' has no public name {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return list(__all__)
