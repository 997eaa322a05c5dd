"""Is a repository of the Hugging Face hub at hand? Asked before a run writes anything."""

from __future__ import annotations

from typing import Literal


def hub_problem(
    repository: str, file: str, *, kind: Literal["model", "dataset"] = "model", revision: str | None = None
) -> str | None:
    """Say why a repository cannot be had, or return None where it is in the local cache or the hub has it.

    Nothing is downloaded.

    Args:
        repository: Its name, for example ``amused/amused-256``.
        file: A file that it must have, such as a model's configuration.
        kind: What it holds.
        revision: Branch, tag or commit; None for the main branch.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(repository, file, revision=revision, repo_type=kind), str):
            return None
    except HFValidationError:
        return f"there is no folder {repository!r}, and it is no name on the hub either"
    here = f"there is no folder {repository!r}, it is not in the hub's cache {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        return f"{here}, and HF_HUB_OFFLINE forbids to ask the hub"
    try:
        if HfApi().file_exists(repository, file, revision=revision, repo_type=kind):
            return None
    except Exception as error:  # the library raises whatever its network layers raise
        reason = (str(error).splitlines() or [""])[0]
        return f"{here}, and the hub cannot be reached ({type(error).__name__}: {reason})"
    return f"{here}, and the hub has no {kind} of this name with a file {file}"

