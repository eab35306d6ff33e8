"""The UNet of DDPM (Ho et al. 2020, appendix B), told about text.

    residual block    norm, SiLU, conv, + time, norm, SiLU, conv, + input
    attention block   norm, self-attention over the pixels, + input; then, if the text comes by
                      cross-attention (Rombach et al. 2022, section 3.3), norm, attention to the
                      words, + input
    UNet              down the levels, a middle, and up again; each step up sees what the step down
                      kept

Where the time goes in, the sentence is added, so that `sentence` conditioning is the same network
without attention to words.

Departures from the paper, each a setting: `patch` folds squares of pixels into channels before the
first convolution and unfolds them after the last (a quarter of the work at patch 2); dropout is off
at the small presets; and two heads or more where the paper has one.

Axes: B pictures, C channels, H W pixels of a level, N = H W, L words, D width of the text, E width
    of the time vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lineage.config import at_least
from lineage.errors import UserError, nearest
from lineage.nn.attention import Attention
from lineage.text.contract import TextFeatures

CONDITIONING = ("cross", "sentence", "none")


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet.

    Attributes:
        width: channels of the first level.
        multipliers: channels of each level, as multiples of `width`; each level has half the pixels
            a side.
        blocks: residual blocks a level.
        attention: levels (0 is the finest) with attention blocks; the middle always has one.
        heads: of every attention.
        patch: side of the square of pixels that is folded into channels.
        conditioning: how text comes in: `cross` (attention to words, and the sentence), `sentence`,
            `none`.
        dropout: in the residual blocks.
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 2
    attention: tuple[int, ...] = (1,)
    heads: int = 1
    patch: int = 1
    conditioning: str = "cross"
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.conditioning not in CONDITIONING:
            hint = nearest(self.conditioning, CONDITIONING)
            raise UserError(f"There is no conditioning {self.conditioning!r}: {hint}")
        for name in ("width", "blocks", "heads", "patch"):
            at_least(f"unet.{name}", getattr(self, name), 1)
        if not self.multipliers or min(self.multipliers) < 1:
            raise UserError(
                f"unet.multipliers={self.multipliers} must name a width for each level."
            )


def time_embedding(t: Tensor, width: int) -> Tensor:
    """t (B,) -> (B, width).

    Sines and cosines of falling frequency (Vaswani et al. 2017, section 3.5).
    """
    half = width // 2
    frequencies = torch.exp(
        -math.log(10_000) / (half - 1) * torch.arange(half, device=t.device, dtype=torch.float32)
    )
    angles = t.float()[:, None] * frequencies  # (B, half)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def norm(channels: int) -> nn.GroupNorm:
    """Group norm over 32 groups, or over as many as leave at least 4 channels to a group."""
    return nn.GroupNorm(math.gcd(min(32, max(1, channels // 4)), channels), channels, eps=1e-6)


def zeroed(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """`layer` with weight and bias at zero, so that its block starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """Two convolutions with the time vector added between them."""

    def __init__(self, inputs: int, outputs: int, time_width: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time_width, outputs)
        self.norm2 = norm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, C, H, W), time (B, E) -> (B, C', H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(time)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.skip(x) + h


class AttentionBlock(nn.Module):
    """Pixels look at each other, then at the words."""

    def __init__(self, width: int, heads: int, text_width: int | None) -> None:
        super().__init__()
        self.norm = norm(width)
        self.pixels = Attention(width, heads)
        zeroed(self.pixels.out)
        self.words = None
        if text_width is not None:
            self.words_norm = nn.LayerNorm(width)
            self.words = Attention(width, heads, context_width=text_width)
            zeroed(self.words.out)

    def forward(self, x: Tensor, text: TextFeatures) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)."""
        height = x.shape[2]
        flat = rearrange(x, "b c h w -> b (h w) c")
        flat = flat + self.pixels(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        if self.words is not None:
            mask = text.mask[:, None, None]  # (B, 1, 1, L): the same words for every head and pixel
            flat = flat + self.words(self.words_norm(flat), text.words, mask)
        return rearrange(flat, "b (h w) c -> b c h w", h=height)


class Level(nn.Module):
    """A residual block, and an attention block behind it where the level has attention."""

    def __init__(self, residual: ResidualBlock, attention: AttentionBlock | None) -> None:
        super().__init__()
        self.residual, self.attention = residual, attention

    def forward(self, x: Tensor, time: Tensor, text: TextFeatures) -> Tensor:
        x = self.residual(x, time)
        return x if self.attention is None else self.attention(x, text)


class UNet(nn.Module):
    """x_t, t and text -> a tensor of the shape of x_t.

    Args:
        config: sizes.
        text_width: D of the text encoder; not used without conditioning.
        channels: of the picture.
    """

    def __init__(self, config: UNetConfig, text_width: int, channels: int = 3) -> None:
        super().__init__()
        self.config = config
        widths = [config.width * m for m in config.multipliers]
        time_width = 4 * config.width
        words_width = text_width if config.conditioning == "cross" else None
        folded = channels * config.patch**2

        def level(inputs: int, outputs: int, attends: bool) -> Level:
            residual = ResidualBlock(inputs, outputs, time_width, config.dropout)
            attention = AttentionBlock(outputs, config.heads, words_width) if attends else None
            return Level(residual, attention)

        self.time = nn.Sequential(
            nn.Linear(config.width, time_width), nn.SiLU(), nn.Linear(time_width, time_width)
        )
        self.sentence = nn.Linear(text_width, time_width) if config.conditioning != "none" else None
        self.enter = nn.Conv2d(folded, config.width, 3, padding=1)

        self.down = nn.ModuleList()
        kept, current = [config.width], config.width
        for number, width in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(level(current, width, number in config.attention))
                current = width
                kept.append(current)
            if number + 1 < len(widths):
                self.down.append(nn.Conv2d(current, current, 3, stride=2, padding=1))
                kept.append(current)

        self.middle = nn.ModuleList([level(current, current, True), level(current, current, False)])

        self.up = nn.ModuleList()
        for number, width in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                self.up.append(level(current + kept.pop(), width, number in config.attention))
                current = width
            if number > 0:
                self.up.append(nn.Conv2d(current, current, 3, padding=1))

        self.norm = norm(current)
        self.leave = nn.Conv2d(current, folded, 3, padding=1)
        zeroed(self.leave)

    def forward(self, noised: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        """noised (B, 3, S, S), t (B,) -> (B, 3, S, S)."""
        time = self.time(time_embedding(t, self.config.width))  # (B, E)
        if self.sentence is not None:
            time = time + self.sentence(text.sentence)
        time = F.silu(time)
        x = self.enter(F.pixel_unshuffle(noised, self.config.patch))  # (B, C, H, W)
        kept = [x]
        for part in self.down:
            x = part(x, time, text) if isinstance(part, Level) else part(x)
            kept.append(x)
        for part in self.middle:
            x = part(x, time, text)
        for part in self.up:
            if isinstance(part, Level):
                x = part(torch.cat([x, kept.pop()], dim=1), time, text)
            else:
                x = part(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        x = self.leave(F.silu(self.norm(x)))
        return F.pixel_shuffle(x, self.config.patch)
