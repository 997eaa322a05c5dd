"""What assembly offers to the constructors of each kind, by keyword argument.

A constructor names the ones it wants. ``vocab_size``, ``length``, ``grid``, ``num_classes`` and ``codec`` come from
the data; the others are components built before.
"""

from __future__ import annotations

_SPEC = frozenset({"vocab_size", "length", "grid", "num_classes"})

OFFERS: dict[str, frozenset[str]] = {
    "schedule": frozenset(),
    "data": frozenset({"cache_directory"}),
    "codec": frozenset(),
    "image_source": frozenset(),
    "process": _SPEC,
    "backbone": _SPEC | {"num_inputs"},
    "generator": _SPEC | {"backbone", "process"},
    "objective": _SPEC | {"process", "network", "teacher", "copy_teacher", "num_steps", "step_times", "training_steps"},
    "teacher": _SPEC | {"process", "data", "codec", "backbone"},
    "sampler": _SPEC | {"process"},
    "features": _SPEC | {"data", "codec", "seed", "cache_directory"},
    "language_model": _SPEC | {"data", "codec", "seed", "cache_directory"},
    "observer": frozenset({"directory", "name", "recipe"}),
    "metric": _SPEC | {"data", "codec", "process", "seed", "cache_directory"},
}
