"""Transformer over patches with long skip connections, for images of more tokens than attention can bear.

After U-ViT (Bao et al., "All are Worth Words", arXiv:2209.12152): blocks of the first half hand their output to those
of the second half, and a 3 x 3 convolution precedes the head. What differs: tokens are embedded categories, time and
class act through adaptive norms that start at zero (DiT, arXiv:2212.09748), and features are given per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from einops import rearrange, reduce
from torch import Tensor, nn

from dmmd_backbones.adaptive_block import AdaptiveBlock
from dmmd_backbones.embeddings import Conditioning
from dmmd_backbones.grids import ChannelEmbedding, GridPositions, image_axes
from dmmd_core import Backbone, Condition, FieldError, Requirement, option


class SkipBlock(nn.Module):
    """A block of the second half, which first takes in its partner's output; its weight for that starts at zero."""

    def __init__(self, width: int, block: AdaptiveBlock) -> None:
        super().__init__()
        self.skip = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.skip.weight)
        self.block = block

    def forward(self, x: Tensor, conditioning: Tensor, skip: Tensor) -> Tensor:
        """Map ``[batch, patches, width]`` to the same.

        Args:
            x: The patches.
            conditioning: ``[batch, 1 or patches, width]``.
            skip: Output of the block's partner in the first half.
        """
        return self.block(x + self.skip(skip), conditioning)[0]


class UViT(Backbone):
    """Transformer over patches of the data's grid, of pixels (every channel a token) or of codes."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        width: int = option(256, help="width of the residual stream", minimum=8)
        depth: int = option(7, help="number of blocks; half of them hand a skip to the other half", minimum=1)
        heads: int = option(4, help="attention heads; must divide width", minimum=1)
        patch: int = option(2, help="side of a patch; must divide the grid's height and width", minimum=1)
        embedding_width: int = option(64, help="width of a token's embedding and of its features", minimum=1)
        expansion: int = option(4, help="feed-forward width as a multiple of width", minimum=1)
        attention: Literal["auto", "sdpa", "xformers"] = option("auto", help="attention kernel", same_weights=True)
        class_conditional: bool = option(False, help="condition on the data's class labels")
        dropout: float = option(0.0, help="dropout in the feed-forward layers", minimum=0, below=1, same_weights=True)
        attention_dropout: float = option(
            0.0, help="dropout of attention weights", minimum=0, below=1, same_weights=True
        )

        def __post_init__(self) -> None:
            """Check sizes against each other."""
            if self.width % self.heads:
                raise FieldError("heads", f"must divide width {self.width}, got {self.heads}")

    def __init__(
        self,
        config: UViT.Config,
        *,
        num_inputs: int,
        vocab_size: int,
        grid: tuple[int, ...] | None,
        num_classes: int | None,
    ) -> None:
        super().__init__()
        self.config = config
        height, columns, channels = image_axes(grid)
        side = config.patch
        if height % side or columns % side:
            raise FieldError("patch", f"must divide the grid's {height} x {columns}, got {side}")
        rows = height // side
        self._parts = {"rows": rows, "columns": columns // side, "h": side, "w": side, "channels": channels}
        self.embedding_width = config.embedding_width
        patch_width = side * side * channels * config.embedding_width
        self.tokens = ChannelEmbedding(num_inputs, channels, config.embedding_width)
        self.conditioning = Conditioning(config.width, num_classes if config.class_conditional else None)
        self.positions = GridPositions((rows, columns // side), config.width)
        self.enter = nn.Linear(patch_width, config.width)
        half = config.depth // 2
        self.first = nn.ModuleList(self._block() for _ in range(half))
        self.middle = nn.ModuleList(self._block() for _ in range(config.depth % 2))
        self.second = nn.ModuleList(SkipBlock(config.width, self._block()) for _ in range(half))
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.modulation = nn.Linear(config.width, 2 * config.width)
        self.leave = nn.Linear(config.width, patch_width)
        self.smooth = nn.Conv2d(channels * config.embedding_width, channels * config.embedding_width, 3, padding=1)
        self.logits = nn.Linear(config.embedding_width, vocab_size)
        for module in (self.modulation, self.smooth, self.logits):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"input_noise", "labels"} if config.class_conditional else {"input_noise"})

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        needs = [Requirement("data", "grid", "to cut a grid into patches")]
        if config.class_conditional:
            needs.append(Requirement("data", "labels", "to condition on classes", "class_conditional"))
        return needs

    @classmethod
    def smoke(cls, config: Any) -> Any:
        """See `Component.smoke`; runs without a GPU."""
        attention = "auto" if config.attention == "xformers" else config.attention
        smaller = {"width": 32, "heads": 2, "depth": min(config.depth, 3), "attention": attention}
        smaller["embedding_width"] = min(config.embedding_width, 16)
        return cls.Config(**{**vars(config), **smaller})

    def description(self) -> dict[str, str]:
        """See `Backbone.description`."""
        parts = self._parts
        kernel = next(iter([*self.first, *self.middle])).kernel
        return {"attention": kernel, "patches": str(parts["rows"] * parts["columns"])}

    def features(self, z_t: Tensor, t: Tensor, condition: Condition, input_noise: Tensor | None = None) -> Tensor:
        """See `Backbone.features`; a patch takes the mean of its tokens' time embeddings."""
        embedded = self.tokens(z_t)
        if input_noise is not None:
            embedded = embedded + input_noise
        flat = "batch (rows h columns w channels) width"
        x = self.enter(rearrange(embedded, f"{flat} -> batch (rows columns) (h w channels width)", **self._parts))
        x = x + self.positions().flatten(0, 1)
        conditioning = self.conditioning(t, condition.label)
        if t.ndim == 2:
            conditioning = reduce(conditioning, f"{flat} -> batch (rows columns) width", "mean", **self._parts)
        x = self._run(x, conditioning)
        shift, scale = self.modulation(conditioning).chunk(2, dim=-1)
        x = self.leave(self.norm(x) * (1 + scale) + shift)
        # What a patch says of its tokens, beside what each token is.
        tokens = embedded + rearrange(x, f"batch (rows columns) (h w channels width) -> {flat}", **self._parts)
        maps = rearrange(tokens, f"{flat} -> batch (channels width) (rows h) (columns w)", **self._parts)
        smoothed = self.smooth(nn.functional.silu(maps))
        return tokens + rearrange(smoothed, f"batch (channels width) (rows h) (columns w) -> {flat}", **self._parts)

    def head(self, features: Tensor) -> Tensor:
        """See `Backbone.head`."""
        return self.logits(features)

    def units(self) -> Sequence[nn.Module]:
        """See `Backbone.units`."""
        return [*self.first, *self.middle, *self.second]

    def _block(self) -> AdaptiveBlock:
        config = self.config
        return AdaptiveBlock(
            config.width,
            config.heads,
            attention=config.attention,
            expansion=config.expansion,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
        )

    def _run(self, x: Tensor, conditioning: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for block in self.first:
            x, _ = block(x, conditioning)
            skips.append(x)
        for block in self.middle:
            x, _ = block(x, conditioning)
        for block in self.second:
            x = block(x, conditioning, skips.pop())
        return x
