"""Model cards: what a model folder holds, its figures, its recipe and the versions that made it, as a README.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

CARD = "README.md"
_PIPELINES = {"image": "unconditional-image-generation", "text": "text-generation"}


def card(config: Mapping[str, Any], results: Sequence[Mapping[str, Any]] = ()) -> str:
    """Write the card of a model folder.

    Args:
        config: Content of the folder's ``config.json``.
        results: Rows of ``metrics.json``; those of the model's role are shown.

    Returns:
        Markdown whose front matter is understood by the Hugging Face hub.
    """
    recipe, role = config["recipe"], config["role"]
    front: dict[str, Any] = {"library_name": "dmmd", "tags": ["dmmd", "discrete-diffusion", role]}
    if config.get("media") in _PIPELINES:
        front["pipeline_tag"] = _PIPELINES[config["media"]]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {recipe['name']}: {role}",
        _introduction(config),
        "```python\n"
        f"from dmmd_core import load_{role}\n\n"
        f'model = load_{role}("FOLDER OR OWNER/NAME")\n'
        f"tokens = model.sample(16{'' if role == 'student' else ', steps=64'}, seed=0)\n"
        "media = model.codec.decode(tokens)\n```",
    ]
    rows = [row for row in results if row["model"] == role]
    if rows:
        parts += ["## Figures", _figures(rows)]
    parts += ["## Versions", _versions(config), "## Recipe", f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False)}```"]
    return "\n\n".join(parts) + "\n"


def _introduction(config: Mapping[str, Any]) -> str:
    recipe, spec = config["recipe"], config["spec"]
    steps = config.get("trained_num_steps")
    what = f"A few-step student, trained for {steps} sampling steps" if steps else "A teacher"
    average = "with a moving average of the weights" if config.get("ema") else "without a moving average"
    return (
        f"{what}: process `{recipe['process']['name']}`, backbone `{recipe['backbone']['name']}`, data "
        f"`{recipe['data']['name']}` ({spec['length']} tokens of {spec['vocab_size']}), "
        f"{config.get('training_steps', 'an unknown number of')} training steps, {average}."
    )


def _figures(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| steps | metric | value | samples | reference | sampler |", "| ---: | --- | ---: | ---: | --- | --- |"]
    for row in rows:
        error = row.get("standard_error")
        value = f"{row['value']:.4g}" + (f" ± {error:.2g}" if error is not None else "")
        samples = row["num_samples"] or ""
        cells = (row["num_steps"], row["metric"], value, samples, row["reference"], row["sampler"])
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines)


def _versions(config: Mapping[str, Any]) -> str:
    packages = [f"- {name} {version}" for name, version in config.get("versions", {}).items()]
    providers = [f"- `{name}`: {provider}" for name, provider in sorted(config["providers"].items())]
    return "\n".join(packages + providers)
