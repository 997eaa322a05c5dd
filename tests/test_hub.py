"""What a recipe would fetch from the hub is looked for before a run writes anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from helpers import ROOT
from huggingface_hub import constants

from dmmd_core import FieldError, RecipeError, hub_problem, load_plugins, load_recipe
from dmmd_core.resolve import resolve
from dmmd_metrics.language_models import TransformersCausal


def _hub(monkeypatch: pytest.MonkeyPatch, answer: bool | Exception) -> None:
    def file_exists(self: Any, *args: Any, **kwargs: Any) -> bool:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "file_exists", file_exists)


def test_a_cached_model_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _hub(monkeypatch, AssertionError("the hub was asked"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: str(tmp_path / "config.json"))
    assert hub_problem("somebody/model", "config.json") is None


def test_what_the_hub_answers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    _hub(monkeypatch, True)
    assert hub_problem("somebody/model", "config.json") is None
    _hub(monkeypatch, False)
    assert "the hub has no model of this name with a file config.json" in str(
        hub_problem("somebody/model", "config.json")
    )
    _hub(monkeypatch, OSError("no route"))
    assert "the hub cannot be reached (OSError: no route)" in str(hub_problem("somebody/model", "config.json"))
    assert "no name on the hub" in str(hub_problem("not//a name", "config.json"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids" in str(hub_problem("somebody/model", "config.json"))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    config = TransformersCausal.Config(path=str(tmp_path))
    with pytest.raises(FieldError, match=r"has no config\.json"):
        TransformersCausal.check(config)
    (tmp_path / "config.json").write_text("{}")
    TransformersCausal.check(config)


def test_a_recipe_tells_all_that_is_out_of_reach_at_once() -> None:
    recipe = load_recipe(ROOT / "recipes" / "owt_masked.yaml")
    with pytest.raises(RecipeError) as caught:
        resolve(recipe, load_plugins())
    keys = {problem.key for problem in caught.value.problems}
    assert keys == {
        "data.params.dataset",
        "data.params.tokenizer.params.path",
        "evaluate.metrics[0].params.reference.params.path",
        "evaluate.metrics[1].params.reference.params.path",
    }
    assert all("there is no folder" in problem.message for problem in caught.value.problems)
