"""The Hugging Face hub: is a repository at hand (asked before a run writes anything); model folders up and down."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from dmmd_core.errors import RunError


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


def may_be_repository(name: str | Path) -> bool:
    """Whether a name that is no folder here can only be meant for the hub: ``owner/name``, and no folder ``owner``."""
    text = str(name)
    return re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None and text[0] != "." and not Path(text).parent.is_dir()


def download_folder(repository: str, revision: str | None = None, *, cached: bool = False) -> Path:
    """Download a repository of the hub, or find it in the local cache; returns the folder.

    Args:
        repository: ``owner/name``.
        revision: Branch, tag or commit; None for the main branch.
        cached: Look into the local cache only.

    Raises:
        RunError: It is not there, or out of reach.
    """
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, local_files_only=cached))
    except Exception as error:  # the library raises whatever its network layers raise
        raise RunError(f"{repository!r} cannot be had from the hub ({_reason(error)})") from error


def upload_folder(folder: Path, repository: str, *, private: bool, revision: str | None, message: str) -> str:
    """Upload a folder as the content of a model repository, which is made where it is missing; returns its address.

    Raises:
        RunError: The hub is out of reach, or refuses.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        address = str(api.create_repo(repository, private=private, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder, revision=revision, commit_message=message)
    except Exception as error:  # as above
        raise RunError(
            f"{folder} cannot be uploaded to {repository!r} ({_reason(error)}); see that the hub is within reach and "
            "that you are logged in (hf auth login)"
        ) from error
    return address


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
