"""Pages of the documentation site that stand elsewhere in the repository, or are generated; used by ``mkdocs.yml``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

ELSEWHERE = {
    "recipe_list.md": "recipes/README.md",
    "examples.md": "examples/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
_LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")


def pages() -> dict[str, str]:
    """Markdown by name of the page."""
    made = {page: (ROOT / source).read_text(encoding="utf-8") for page, source in ELSEWHERE.items()}
    return {**made, "hooks.md": _hooks(), "reference.md": _reference(), "conformance.md": _conformance()}


def _hooks() -> str:
    return (
        "# Hooks\n\nA plugin implements any of these functions, marked with `dmmd_core.hookimpl`; each may take fewer "
        "arguments than are listed.\n\n::: dmmd_core.hookspecs\n"
        '    options: {filters: ["^dmmd_"], show_root_heading: false, show_root_toc_entry: false, heading_level: 2}\n'
    )


def _reference() -> str:
    """Every public name of the core, by the module that it lives in."""
    from dmmd_core import _HOMES

    parts = ["# Reference", "All names are imported from `dmmd_core`; plugins and scripts need no other module."]
    for module, names in _HOMES.items():
        parts.append(f"## {module.rpartition('.')[2]}")
        parts += [f"::: dmmd_core.{name}" for name in names.split()]
    return "\n\n".join(parts) + "\n"


def _conformance() -> str:
    """The conformance kit, with all clauses of every kind."""
    from dmmd_core.testing import clauses_of, kits

    parts = [
        "# Conformance kit",
        "`dmmd_core.testing` holds a component against the contract of its kind "
        "([how to use it](write_a_plugin.md#does-it-keep-the-contract)).",
    ]
    for kind in kits():
        head = ["| clause | what must hold | where it does not |", "| --- | --- | --- |"]
        clauses = [(one.name, _names_as_code(one.title), _names_as_code(one.remedy)) for one in clauses_of(kind)]
        rows = [f"| `{name}` | {title} | {remedy} |" for name, title, remedy in clauses]
        parts += [f"## {kind}", "\n".join(head + rows)]
    parts += ["## Functions", *(f"::: dmmd_core.testing.judge.{name}" for name in ("judge", "check_component"))]
    return "\n\n".join(parts) + "\n"


def _names_as_code(text: str) -> str:
    """Keep ``__names__`` from being read as emphasis."""
    return re.sub(r"(?<!`)(__\w+__)", r"`\1`", text)


def rewrite(markdown: str, page: str) -> str:
    """Point links at the pages of the site; what is no page becomes the name of a file."""
    place = Path(ELSEWHERE.get(page, f"docs/{page}")).parent
    by_source = {source: name for name, source in ELSEWHERE.items()}

    def link(match: re.Match[str]) -> str:
        text, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if "://" in target or not path:
            return match.group(0)
        full = (ROOT / place / path).resolve().relative_to(ROOT).as_posix()
        if full in by_source or full.startswith("docs/"):
            return f"[{text}]({by_source.get(full) or full.removeprefix('docs/')}{hash_}{anchor})"
        return f"`{full}`"

    return _LINK.sub(link, markdown)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages; called by mkdocs."""
    from mkdocs.structure.files import File

    for name, content in pages().items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links of a page; called by mkdocs."""
    return rewrite(markdown, page.file.src_uri)
