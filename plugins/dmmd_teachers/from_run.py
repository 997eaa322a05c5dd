"""The teacher of another run, or one saved in a model folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dmmd_core import (
    Backbone,
    Codec,
    Denoiser,
    FieldError,
    NetworkDenoiser,
    Process,
    RunError,
    Teacher,
    hub_problem,
    load_model_weights,
    option,
    saved_capabilities,
)


class FromRun(Teacher):
    """Weights of a teacher trained before, loaded strictly into this recipe's backbone.

    Backbone, sizes and codec fingerprint must be those that the teacher was trained with.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        path: str = option(help="a run directory, a teacher folder, or a repository of the hub, owner/name")
        unlabelled: bool = option(False, help="it was trained with label dropout, so that it can be guided")

    def __init__(self, config: FromRun.Config, *, process: Process, backbone: Backbone, codec: Codec) -> None:
        self.config = config
        self.process = process
        self.backbone = backbone
        self.codec = codec

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"weights", "unlabelled"} if config.unlabelled else {"weights"})

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse a path that is not there, or a teacher without the label dropout that is claimed for it."""
        from pathlib import Path

        problem = None if Path(config.path).is_dir() else hub_problem(config.path, "config.json")
        if problem:
            raise FieldError(
                "path",
                f"there is no directory {config.path!r}, and on the hub: {problem}; give a run directory, a teacher "
                "folder or owner/name on the hub",
            )
        cls._check_claim(config)

    @classmethod
    def _check_claim(cls, config: Any) -> None:
        saved = saved_capabilities(config.path, "teacher")
        if config.unlabelled and saved is not None and "unlabelled" not in saved:
            message = f"the teacher of {config.path!r} was trained without label dropout and cannot be guided"
            raise FieldError("unlabelled", message)

    def denoiser(self) -> Denoiser:
        """See `Teacher.denoiser`."""
        denoiser = NetworkDenoiser(self.backbone, self.process)
        load_model_weights(self.config.path, "teacher", denoiser, self.codec)
        try:
            self._check_claim(self.config)  # one from the hub is not known before it is downloaded
        except FieldError as error:
            raise RunError(error.message) from error
        return denoiser
