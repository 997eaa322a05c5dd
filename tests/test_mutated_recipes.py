"""Recipes that somebody got wrong in any way: never a traceback, and what is accepted works.

``DMMD_MUTATIONS=1000 pytest tests/test_mutated_recipes.py`` looks at a thousand of them, and completes twenty of those
accepted with ``--smoke``; by default there are fewer.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import RECIPES
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dmmd_core import load_plugins
from dmmd_core.cli import run_command

EXAMPLES = int(os.environ.get("DMMD_MUTATIONS", "120"))
SMOKES = max(2, EXAMPLES // 50)
# Alike on every machine; a failure is shown as it was found, for most of the time would go into making it smaller.
HYPOTHESIS = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
    "phases": (Phase.explicit, Phase.generate),
}

REGISTRY = load_plugins()
NAMES = sorted({entry.name for entry in REGISTRY})
BASES = {path.name: path.read_text(encoding="utf-8") for path in sorted(RECIPES.glob("*.yaml"))}
QUICK = ["exact_coins.yaml", "exact_markov_masked.yaml", "exact_markov_uniform.yaml"]
JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 10**6, 10**12, 10**30, -(10**30), 0.5, 1e-30, 1e308, -0.0, float("nan"),
    float("inf"), "", " ", "text", "1e-3", "0x10", "null", "\u00fc\u4e16", "a\u0000b", "${run.seed}", "${x", "???",
    "../..", "/", [], {}, [[]], [1, [2]], {"a": {"b": []}}, {"name": "masked"}, {"name": []}, {1: 2}, {None: None},
    [None], ["x"] * 50,
    {"name": "transformer", "params": {"width": 8}}, "2024-01-01", "!!python/name:os.system",
]  # fmt: skip
TEXTS = [
    "=", "a", "a.b=[", "..=1", "a..b=1", "[0]=1", "run.seed=", "run.seed=1 2", "run.seed=[1", "evaluate.metrics[0]=1",
    "evaluate.metrics[-1].name=copies", "evaluate.metrics[99].name=copies", "evaluate.metrics[x]=1",
    "evaluate.metrics=[]", "schema=2", "schema=one", "name=", "name={a: b}",
    "run.directory=", "run.directory=[a]", "process={name: masked",
    "process={name: uniform, params: {schedule: {name: cosine}}}", "distill.optimizer={}", "run.seed=${run.seed}",
    "distill.steps=1e400", "objective.params.top_p=.nan", "\u00fc=1", "run.seed=\x00", "run={seed: 1}", "--",
    "distill.steps='3'",
]  # fmt: skip


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything in a tree but the tree itself."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in children:
        yield (*path, key)
        yield from _places(value, (*path, key))


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _change(draw: st.DrawFn, tree: Any) -> None:
    """Do one thing to a recipe, in place."""
    places = list(_places(tree))
    if not places:
        return
    path = draw(st.sampled_from(places))
    parent, key = _at(tree, path[:-1]), path[-1]
    kinds = ["junk", "junk", "number", "number", "name", "drop", "rename", "move", "wrap", "add", "parameters"]
    what = draw(st.sampled_from(kinds))
    if what == "junk":
        parent[key] = copy.deepcopy(draw(st.sampled_from(JUNK)))
    elif what == "number":
        parent[key] = draw(st.one_of(st.integers(-5, 5000), st.floats(-2, 2000)))
    elif what == "name":
        parent[key] = draw(st.sampled_from(NAMES))
    elif what == "drop":
        del parent[key]
    elif what == "rename" and isinstance(parent, dict):
        names = [f"{key}s", f"{key}"[:-1], f"{key}"[::-1], f"{key}".upper(), "", 1]
        parent[draw(st.sampled_from(names))] = parent.pop(key)
    elif what == "move":
        parent[key] = copy.deepcopy(_at(tree, draw(st.sampled_from(places))))
    elif what == "wrap":
        parent[key] = draw(st.sampled_from([[parent[key]], {"name": parent[key]}, {"params": parent[key]}]))
    elif what == "add" and isinstance(parent, dict):
        names = [*NAMES, "steps", "params", "seed", "width"]
        parent[draw(st.sampled_from(names))] = copy.deepcopy(draw(st.sampled_from(JUNK)))
    elif what == "parameters" and isinstance(parent[key], dict):
        parent[key]["params"] = {draw(st.sampled_from(PARAMETERS)): copy.deepcopy(draw(st.sampled_from(JUNK)))}


PARAMETERS = sorted(
    {
        found.group(1)
        for text in BASES.values()
        for found in re.finditer(r"(\w+):", text)
        if found.group(1) not in ("name", "params")
    }
)


def _spoil(draw: st.DrawFn, text: str) -> str:
    """Do one thing to the text of a recipe."""
    place = draw(st.integers(0, max(0, len(text) - 1)))
    line = draw(st.sampled_from(text.splitlines() or [""]))
    return draw(
        st.sampled_from(
            [
                text[:place],
                text[:place] + draw(st.sampled_from("{}[]:,&*!|>'\"%@`\t\n#-?\u00e9\u2028\x07")) + text[place:],
                text[:place] + text[place + 1 :],
                f"{text}\n{line}",
                text.replace("{", "&a {", 1) + "\nextra: *a\n",
                text.replace("{", "{<<: {name: x}, ", 1),
                text.replace("  ", "\t"),
                f"---\n{text}\n---\n{text}",
                text.replace(line, f"{line} *b"),
            ]
        )
    )


@st.composite
def mutants(draw: st.DrawFn, names: list[str], *, texts: bool = True) -> tuple[str, list[str]]:
    """The text of a recipe, and overrides."""
    text = BASES[draw(st.sampled_from(names))]
    tree = yaml.safe_load(text)
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        _change(draw, tree)
    overrides = []
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        place = ".".join(map(str, draw(st.sampled_from(list(_places(tree)) or [("a",)]))))
        value = draw(st.sampled_from([*(str(junk) for junk in JUNK if not isinstance(junk, dict)), *NAMES]))
        overrides.append(draw(st.one_of(st.sampled_from(TEXTS), st.just(f"{place}={value}"))))
    written = yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)
    return (_spoil(draw, written) if texts and draw(st.booleans()) and draw(st.booleans()) else written), overrides


def _command(arguments: list[str]) -> tuple[int, str]:
    """What the command line ends with, and says on standard error."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            code = run_command(arguments)
        except SystemExit as ended:  # argparse's own
            code = int(ended.code or 0)
    return code, errors.getvalue()


def _checked(text: str, overrides: list[str], folder: Path) -> bool:
    """Whether ``--check`` accepts a recipe; one that it refuses must be told why, and where."""
    path = folder / "mutant.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    code, errors = _command([str(path), "--check", *overrides])
    assert list(folder.iterdir()) == [path], "a check writes nothing"
    assert "Traceback" not in errors
    if code == 0:
        return True
    assert code == 2, errors
    assert path.name in errors or "override" in errors or "key=value" in errors, errors
    return False


ACCEPTED: list[bool] = []


@settings(max_examples=EXAMPLES, **HYPOTHESIS)  # type: ignore[arg-type]
@given(mutants(list(BASES)))
def test_a_mutated_recipe_is_accepted_or_refused_and_never_a_traceback(mutant: tuple[str, list[str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ACCEPTED.append(_checked(*mutant, Path(folder)))


def test_mutants_are_neither_all_refused_nor_all_accepted() -> None:
    if not ACCEPTED:
        pytest.skip("counts what the test before has seen")
    assert 0.02 < sum(ACCEPTED) / len(ACCEPTED) < 0.8


@settings(max_examples=SMOKES, **HYPOTHESIS)  # type: ignore[arg-type]
@given(st.data())
def test_what_the_check_accepts_completes_a_smoke_run(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(200):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            text, overrides = data.draw(mutants(QUICK, texts=False))
            if _checked(text, overrides, folder):
                break
        else:
            pytest.fail("two hundred recipes in a row were refused")
        arguments = [str(folder / "mutant.yaml"), "--smoke", "--quiet", *overrides, f"run.directory={folder / 'run'}"]
        code, errors = _command(arguments)
        assert code == 0, errors
