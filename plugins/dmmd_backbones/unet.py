"""U-Net over pixels or codes on a grid: residual blocks, attention at chosen levels, adaptive group norms.

After ADM (Dhariwal and Nichol, arXiv:2105.05233), with embedded categories where it has pixel values. A place of the
grid is one column of channels: the tokens of a pixel are embedded one by one, joined, and taken apart at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from dmmd_backbones.attention import choose_attention
from dmmd_backbones.embeddings import Conditioning
from dmmd_backbones.grids import ChannelEmbedding, GridPositions, image_axes
from dmmd_core import Backbone, Condition, FieldError, Requirement, option

_MAX_GROUPS, _MIN_GROUP_CHANNELS = 32, 4


def group_norm(channels: int, affine: bool = True) -> nn.GroupNorm:
    """Group norm of at most 32 groups of at least 4 channels: with one channel a map of one place would vanish."""
    most = max(1, min(_MAX_GROUPS, channels // _MIN_GROUP_CHANNELS))
    groups = next(count for count in range(most, 0, -1) if channels % count == 0)
    return nn.GroupNorm(groups, channels, affine=affine)


def zeroed(module: nn.Module) -> nn.Module:
    """Set a module's parameters to zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Modulation(nn.Module):
    """Scale and shift of a map by the conditioning."""

    def __init__(self, conditioning_width: int, channels: int) -> None:
        super().__init__()
        self.to_scale_shift = zeroed(nn.Linear(conditioning_width, 2 * channels))

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        """Modulate ``[batch, channels, height, width]``.

        Args:
            x: The map, normalised.
            conditioning: ``[batch, height, width, conditioning_width]``, or with 1 for height and width.
        """
        scale, shift = self.to_scale_shift(conditioning).permute(0, 3, 1, 2).chunk(2, dim=1)
        return x * (1 + scale) + shift


class ResidualBlock(nn.Module):
    """Two convolutions around an adaptive norm; adds nothing at the start of training."""

    def __init__(self, channels: int, out_channels: int, conditioning_width: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = group_norm(channels), group_norm(out_channels, affine=False)
        self.convolve1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.modulation = Modulation(conditioning_width, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.convolve2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        """Map ``[batch, channels, height, width]`` to ``[batch, out_channels, height, width]``."""
        mixed = self.convolve1(nn.functional.silu(self.norm1(x)))
        mixed = nn.functional.silu(self.modulation(self.norm2(mixed), conditioning))
        return self.skip(x) + self.convolve2(self.dropout(mixed))


class AttentionBlock(nn.Module):
    """Attention between all places of a map; adds nothing at the start of training."""

    def __init__(self, channels: int, config: UNet.Config) -> None:
        super().__init__()
        self.heads = channels // config.head_width
        self.dropout = config.attention_dropout
        self.kernel, self.attend = choose_attention(config.attention, head_width=config.head_width)
        self.norm = group_norm(channels)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, channels, height, width]`` to the same."""
        places = rearrange(self.norm(x), "batch channels height width -> batch (height width) channels")
        query, key, value = rearrange(
            self.to_qkv(places),
            "batch length (three heads width) -> three batch length heads width",
            three=3,
            heads=self.heads,
        )
        mixed = self.attend(query, key, value, dropout=self.dropout if self.training else 0.0)
        mixed = self.to_out(rearrange(mixed, "batch length heads width -> batch length (heads width)"))
        return x + rearrange(mixed, "batch (height width) channels -> batch channels height width", height=x.shape[2])


class Stage(nn.Module):
    """A residual block and, on levels that attend, attention."""

    def __init__(self, channels: int, out_channels: int, config: UNet.Config, attends: bool) -> None:
        super().__init__()
        self.block = ResidualBlock(channels, out_channels, config.conditioning_width, config.dropout)
        self.attention = AttentionBlock(out_channels, config) if attends else None

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        """Map ``[batch, channels, height, width]`` to ``[batch, out_channels, height, width]``."""
        x = self.block(x, conditioning)
        return x if self.attention is None else self.attention(x)


class UNet(Backbone):
    """U-Net over the data's grid, of pixels (every channel a token) or of codes; any height and width."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        width: int = option(64, help="channels at full resolution, and width of a token's embedding", minimum=4)
        multipliers: list[int] = option(
            [1, 2, 2], help="channels of every level, as multiples of width; a level halves height and width", minimum=1
        )
        blocks: int = option(2, help="residual blocks per level", minimum=1)
        attention_levels: list[int] = option(
            [], help="levels whose blocks attend, 0 for full resolution; the middle always does", minimum=0
        )
        head_width: int = option(32, help="width of an attention head", minimum=1)
        attention: Literal["auto", "sdpa", "xformers"] = option("auto", help="attention kernel", same_weights=True)
        class_conditional: bool = option(False, help="condition on the data's class labels")
        dropout: float = option(0.0, help="dropout in the residual blocks", minimum=0, below=1, same_weights=True)
        attention_dropout: float = option(
            0.0, help="dropout of attention weights", minimum=0, below=1, same_weights=True
        )

        def __post_init__(self) -> None:
            """Check sizes against each other."""
            if not self.multipliers:
                raise FieldError("multipliers", "needs at least one level, got none")
            levels = len(self.multipliers)
            wrong = [level for level in self.attention_levels if level >= levels]
            if wrong:
                raise FieldError("attention_levels", f"must be below {levels}, the number of levels, got {wrong[0]}")
            for level in {*self.attention_levels, levels - 1}:
                channels = self.width * self.multipliers[level]
                if channels % self.head_width:
                    raise FieldError(
                        "head_width", f"must divide the {channels} channels of level {level}, got {self.head_width}"
                    )

        @property
        def conditioning_width(self) -> int:
            """Width of the time and class embedding."""
            return 4 * self.width

    def __init__(
        self,
        config: UNet.Config,
        *,
        num_inputs: int,
        vocab_size: int,
        grid: tuple[int, ...] | None,
        num_classes: int | None,
    ) -> None:
        super().__init__()
        self.config = config
        self.height, self.columns, self.channels = image_axes(grid)
        halvings = len(config.multipliers) - 1
        if min(self.height, self.columns) < 2**halvings:
            raise FieldError(
                "multipliers",
                f"has {halvings + 1} levels, too many for a grid of {self.height} x {self.columns}, which all levels "
                "but the first halve",
            )
        width = self.embedding_width = config.width
        self.tokens = ChannelEmbedding(num_inputs, self.channels, width)
        self.conditioning = Conditioning(config.conditioning_width, num_classes if config.class_conditional else None)
        self.positions = GridPositions((self.height, self.columns), width)
        self.enter = nn.Conv2d(self.channels * width, width, 3, padding=1)
        self.down, self.shrink, carried = self._build_down()
        deepest = width * config.multipliers[-1]
        self.middle = nn.ModuleList([Stage(deepest, deepest, config, True), Stage(deepest, deepest, config, False)])
        self.up, self.grow = self._build_up(deepest, carried)
        last = width * config.multipliers[0]
        self.norm = group_norm(last)
        self.modulation = Modulation(config.conditioning_width, last)
        self.leave = nn.Conv2d(last, self.channels * width, 1)
        self.logits = zeroed(nn.Linear(width, vocab_size))

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"input_noise", "labels"} if config.class_conditional else {"input_noise"})

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        needs = [Requirement("data", "grid", "to convolve over a grid")]
        if config.class_conditional:
            needs.append(Requirement("data", "labels", "to condition on classes", "class_conditional"))
        return needs

    @classmethod
    def smoke(cls, config: Any) -> Any:
        """See `Component.smoke`; runs without a GPU, and on grids as small as 2 x 2."""
        levels = min(len(config.multipliers), 2)
        smaller = {
            "width": 16,
            "multipliers": [1, 2][:levels],
            "blocks": 1,
            "attention_levels": [level for level in config.attention_levels if level < levels],
            "head_width": 16,
            "attention": "auto" if config.attention == "xformers" else config.attention,
        }
        return cls.Config(**{**vars(config), **smaller})

    def description(self) -> dict[str, str]:
        """See `Backbone.description`."""
        return {"attention": self.middle[0].attention.kernel}

    def features(self, z_t: Tensor, t: Tensor, condition: Condition, input_noise: Tensor | None = None) -> Tensor:
        """See `Backbone.features`; a place takes the mean of the time embeddings of its tokens, or of its parts."""
        embedded = self.tokens(z_t)
        if input_noise is not None:
            embedded = embedded + input_noise
        sizes = {"height": self.height, "columns": self.columns, "channels": self.channels}
        maps = rearrange(
            embedded, "batch (height columns channels) width -> batch (channels width) height columns", **sizes
        )
        conditioning = self._conditioning_by_level(t, condition)
        x = self.enter(maps) + self.positions().permute(2, 0, 1)
        x = self._run(x, conditioning)
        x = nn.functional.silu(self.modulation(self.norm(x), conditioning[0]))
        return rearrange(
            self.leave(x), "batch (channels width) height columns -> batch (height columns channels) width",
            channels=self.channels,
        )  # fmt: skip

    def head(self, features: Tensor) -> Tensor:
        """See `Backbone.head`."""
        return self.logits(features)

    def units(self) -> Sequence[nn.Module]:
        """See `Backbone.units`."""
        levels = (stage for level in (*self.down, *self.up) for stage in level)
        return [*levels, *self.middle]

    def _build_down(self) -> tuple[nn.ModuleList, nn.ModuleList, list[int]]:
        """Stages and halvings of all levels, and the channels of the maps they leave for the way up."""
        config = self.config
        down, shrink = nn.ModuleList(), nn.ModuleList()
        channels, carried = config.width, [config.width]
        for level, multiplier in enumerate(config.multipliers):
            if level > 0:
                shrink.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
                carried.append(channels)
            stages = nn.ModuleList()
            for _ in range(config.blocks):
                stages.append(Stage(channels, config.width * multiplier, config, level in config.attention_levels))
                channels = config.width * multiplier
                carried.append(channels)
            down.append(stages)
        return down, shrink, carried

    def _build_up(self, channels: int, carried: list[int]) -> tuple[nn.ModuleList, nn.ModuleList]:
        """Stages and doublings of all levels, in the order of the levels."""
        config = self.config
        carried = list(carried)
        up: list[nn.Module] = []
        grow: list[nn.Module] = []
        for level, multiplier in reversed(list(enumerate(config.multipliers))):
            stages = nn.ModuleList()
            for _ in range(config.blocks + 1):
                out = config.width * multiplier
                stages.append(Stage(channels + carried.pop(), out, config, level in config.attention_levels))
                channels = out
            up.append(stages)
            if level > 0:
                grow.append(nn.Conv2d(channels, channels, 3, padding=1))
        return nn.ModuleList(reversed(up)), nn.ModuleList(reversed(grow))

    def _run(self, x: Tensor, conditioning: list[Tensor]) -> Tensor:
        """Down, across and up again; ``[batch, width, height, columns]`` to the channels of level 0."""
        kept = [x]
        for level, stages in enumerate(self.down):
            if level > 0:
                x = self.shrink[level - 1](x)
                kept.append(x)
            for stage in stages:
                x = stage(x, conditioning[level])
                kept.append(x)
        for stage in self.middle:
            x = stage(x, conditioning[-1])
        for level in reversed(range(len(self.up))):
            for stage in self.up[level]:
                x = stage(torch.cat((x, kept.pop()), dim=1), conditioning[level])
            if level > 0:
                # To the size that the map had before, which an odd extent makes one less than twice this one's.
                larger = nn.functional.interpolate(x, size=kept[-1].shape[-2:], mode="nearest")
                x = self.grow[level - 1](larger)
        return x

    def _conditioning_by_level(self, t: Tensor, condition: Condition) -> list[Tensor]:
        """Conditioning of every level, ``[batch, height, width, conditioning_width]`` or with 1 for both."""
        embedded = self.conditioning(t, condition.label)
        if t.ndim == 1:
            return [embedded.unsqueeze(1)] * len(self.down)
        first = rearrange(
            embedded, "batch (height columns channels) width -> batch height columns channels width",
            height=self.height, columns=self.columns,
        ).mean(3)  # fmt: skip
        return list(_halvings(first, len(self.down)))


def _halvings(conditioning: Tensor, count: int) -> Iterator[Tensor]:
    """Yield a map ``[batch, height, width, channels]`` and its means over 2 x 2 places, again and again."""
    for _ in range(count):
        yield conditioning
        channels_first = conditioning.permute(0, 3, 1, 2)
        pooled = nn.functional.avg_pool2d(channels_first, 2, ceil_mode=True, count_include_pad=False)
        conditioning = pooled.permute(0, 2, 3, 1)
