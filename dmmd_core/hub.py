"""Is a repository of the Hugging Face hub at hand? Asked before a run writes anything."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def hub_problem(
    repository: str,
    file: str | None = None,
    *,
    kind: Literal["model", "dataset"] = "model",
    revision: str | None = None,
) -> str | None:
    """Say why a repository cannot be had, or return None where it is a folder, in the local cache, or on the hub.

    Nothing is downloaded.

    Args:
        repository: A folder, or a name on the hub, for example ``amused/amused-256``.
        file: A file that it must have, such as a model's configuration; None where any will do.
        kind: What it holds.
        revision: Branch, tag or commit; None for the main branch.
    """
    if Path(repository).is_dir():
        found = file is None or (Path(repository) / file).is_file()
        return None if found else f"the folder {repository!r} has no {file}"
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError:
        return f"there is no folder {repository!r}, and it is no name on the hub either"
    if _in_cache(repository, file, kind, revision):
        return None
    here = f"there is no folder {repository!r}, it is not in the hub's cache {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        return f"{here}, and HF_HUB_OFFLINE forbids to ask the hub"
    try:
        if file is None:
            found = HfApi().repo_exists(repository, repo_type=kind)
        else:
            found = HfApi().file_exists(repository, file, revision=revision, repo_type=kind)
    except Exception as error:  # the library raises whatever its network layers raise
        reason = (str(error).splitlines() or [""])[0]
        return f"{here}, and the hub cannot be reached ({type(error).__name__}: {reason})"
    part = "" if file is None else f" with a file {file}"
    return None if found else f"{here}, and the hub has no {kind} of this name{part}"


def _in_cache(repository: str, file: str | None, kind: str, revision: str | None) -> bool:
    from huggingface_hub import constants, try_to_load_from_cache

    if file is not None:
        return isinstance(try_to_load_from_cache(repository, file, revision=revision, repo_type=kind), str)
    folder = f"{kind}s--{repository.replace('/', '--')}"
    return (Path(constants.HF_HUB_CACHE) / folder / "snapshots").is_dir()
