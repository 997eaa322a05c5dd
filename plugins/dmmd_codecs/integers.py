"""No codec: tokens are shown as the integers that they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmmd_core import Codec


class Integers(Codec):
    """Identity."""

    def __init__(self, config: Integers.Config) -> None:
        self.config = config

    def decode(self, tokens: Tensor) -> Tensor:
        """See `Codec.decode`."""
        return tokens

    def encode(self, media: Any) -> Tensor:
        """See `Codec.encode`."""
        return torch.as_tensor(media, dtype=torch.int64)

    def fingerprint(self) -> str:
        """See `Codec.fingerprint`."""
        return "integers"
