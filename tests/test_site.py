"""The documentation site: every page has its place, and pages made from the code are complete."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT, environment

import dmmd_core
from dmmd_core import hookspecs
from dmmd_core.testing import clauses_of, kits

sys.path.insert(0, str(ROOT))
import mkdocs_pages


class _Loader(yaml.SafeLoader):
    """Reads ``mkdocs.yml``, whose tags name functions of extensions."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda loader, suffix, node: suffix)
CONFIG: dict[str, Any] = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=_Loader)


def _leaves(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [leaf for item in nav for leaf in _leaves(list(item.values()) if isinstance(item, dict) else item)]


def test_every_page_is_in_the_navigation_and_exists() -> None:
    listed = _leaves(CONFIG["nav"])
    assert len(listed) == len(set(listed))
    written = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert set(listed) == written | set(mkdocs_pages.pages())


def test_the_reference_names_everything_public_and_the_kit_all_clauses() -> None:
    made = mkdocs_pages.pages()
    told = re.findall(r"^::: dmmd_core\.(\w+)$", made["reference.md"], flags=re.MULTILINE)
    assert sorted(told) == sorted(dmmd_core.__all__)
    for kind in kits():
        section = made["conformance.md"].split(f"## {kind}\n")[1].split("\n## ")[0]
        for clause in clauses_of(kind):
            assert f"| `{clause.name}` | {clause.title} |" in section
    for name, hook in vars(hookspecs).items():
        if name.startswith("dmmd_"):
            assert hook.__doc__


def test_links_to_files_outside_become_pages_or_names() -> None:
    assert mkdocs_pages.rewrite("[x](../recipes/README.md#a)", "index.md") == "[x](recipe_list.md#a)"
    assert mkdocs_pages.rewrite("[x](docs/maths.md)", "contributing.md") == "[x](maths.md)"
    assert mkdocs_pages.rewrite("[x](two_steps.py)", "examples.md") == "`examples/two_steps.py`"
    assert mkdocs_pages.rewrite("[x](#here) ![y](images/quickstart.png)", "index.md") == (
        "[x](#here) ![y](images/quickstart.png)"
    )


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="needs the extra docs; tox -e docs has it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    hooks = (tmp_path / "site" / "hooks" / "index.html").read_text(encoding="utf-8")
    for name in vars(hookspecs):
        assert not name.startswith("dmmd_") or name in hooks


def test_the_citation_names_this_version_and_the_paper() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    (paper,) = cited["references"]
    page = (ROOT / "docs" / "cite.md").read_text(encoding="utf-8")
    assert paper["title"].replace("MMD", "{MMD}") in page
    for author in paper["authors"]:
        assert f"{author['family-names']}, {author['given-names']}" in page


def test_templates_are_readable_and_kinds_exist() -> None:
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert form["name"]
        assert form["body"]
        for item in form["body"]:
            if item["type"] == "dropdown":
                assert set(item["attributes"]["options"]) - {"other"} <= set(dmmd_core.KINDS)


def test_every_package_is_marked_as_typed() -> None:
    for package in [ROOT / "dmmd_core", *(ROOT / "plugins").glob("dmmd_*")]:
        assert (package / "py.typed").exists(), package
