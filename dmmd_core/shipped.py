"""The recipes that come with the package: where they lie, and ``--copy-recipes``."""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from dmmd_core.errors import RunError

SHARED = "share/dmmd/recipes"


def shipped_recipes() -> list[Path]:
    """Files of the recipes, sorted: those of the source tree, or those that were installed (`SHARED`).

    Raises:
        RunError: There are none.
    """
    tree = Path(__file__).resolve().parent.parent / "recipes"
    found = sorted(tree.glob("*.yaml")) if (tree.parent / "pyproject.toml").is_file() else []
    return found or _installed()


def _installed() -> list[Path]:
    try:
        files = distribution("dmmd").files or []
    except PackageNotFoundError:
        files = []
    found = sorted(Path(str(file.locate())).resolve() for file in files if SHARED in file.as_posix())
    found = [path for path in found if path.suffix == ".yaml" and path.is_file()]
    if not found:
        raise RunError(f"the recipes are not there: neither in the source tree nor in {SHARED} of the installation")
    return found


def copy_recipes(folder: Path) -> list[Path]:
    """Copy the recipes into a folder; what is there already stays if it is the same.

    Returns:
        The files in the folder.

    Raises:
        RunError: A file of that name is there and differs, or the folder cannot be written.
    """
    sources = shipped_recipes()
    targets = [folder / source.name for source in sources]
    pairs = list(zip(sources, targets, strict=True))
    try:
        other = [str(target) for source, target in pairs if target.exists() and not _same(source, target)]
        if other:
            raise RunError(f"--copy-recipes: {', '.join(other)} would be overwritten; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        for source, target in pairs:
            shutil.copyfile(source, target)
    except OSError as error:
        raise RunError(f"--copy-recipes: {folder} cannot be written: {error.strerror}") from error
    return targets


def _same(first: Path, second: Path) -> bool:
    return first.read_bytes() == second.read_bytes()
