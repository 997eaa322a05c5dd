"""The errors that a user may see; each is one readable sentence and has an exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class DmmdError(Exception):
    """Base of every error that the command line shows without a traceback."""

    exit_code = 1


class PluginError(DmmdError):
    """A plugin cannot be loaded, collides with another or breaks the contract of the door."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe.

    Attributes:
        key: Dotted key path in the recipe, for example ``process.params.schedule``; empty for the whole file.
        message: What is wrong, what was got and what to do, one lower-case sentence.
        where: File and line, or the command line override that set the key.
    """

    key: str
    message: str
    where: str = ""

    def __str__(self) -> str:
        """Return ``where: key: message`` without the parts that are empty."""
        return ": ".join(part for part in (self.where, self.key, self.message) if part)


class RecipeError(DmmdError):
    """A recipe is invalid; carries every problem found, not only the first."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class FieldError(ValueError):
    """Raised by a component (its Config or constructor) when one of its fields cannot be used.

    The recipe loader turns it into a `Problem` with file, line and key path.

    Args:
        field: Name of the field within the component's Config; empty for the component as a whole.
        message: What is wrong, what was got and what to do.
    """

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        self.message = message
        super().__init__(f"{field}: {message}" if field else message)


class RunError(DmmdError):
    """A run cannot go on: its directory, its data or its numbers forbid it."""

    exit_code = 2


class BadImageError(RunError):
    """One image cannot be used: it is damaged, or not what it should be; the message names it."""


class CheckpointError(DmmdError):
    """A checkpoint or a saved model is damaged or does not fit what is to be loaded."""

    exit_code = 2


class Interrupted(DmmdError):  # noqa: N818 - an event, not a failure
    """The run was asked to stop (SIGINT or SIGTERM) and has written a checkpoint."""

    exit_code = 130


class PeerLostError(RunError):
    """Another process of the run has ended or cannot be reached.

    Args:
        reason: What PyTorch said.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"another process of this run has ended or cannot be reached ({reason}); what was finished is safe, and "
            "the same command goes on from the last checkpoint"
        )


class ToldElsewhereError(DmmdError):
    """Ends a process whose error the first process of the run tells.

    Args:
        message: The error.
        exit_code: Its exit code.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class UnsupportedError(DmmdError):
    """A component was asked for something that it does not offer; `what` says which."""
