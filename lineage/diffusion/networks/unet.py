"""The UNet of DDPM (Ho et al. 2020, appendix B) and of those who came after, told about text.

    residual block    norm, SiLU, conv, + time, norm, SiLU, conv, + input
    attention block   norm, self-attention over the pixels, + input, and the words in one of several
                      ways
    UNet              down the levels, a middle, and up again; each step up sees what the step down
                      kept

What changed from paper to paper is a setting:
                          DDPM      ADM            GLIDE         latent diffusion
    conditioning          none      sentence       joint         transformer
    shift (of the norm)   no        yes            yes           no
    halving by blocks     no        yes            yes           no
ADM: Dhariwal and Nichol 2021, arXiv:2105.05233, section 3 (its `sentence` is the class). GLIDE:
Nichol et al. 2021, arXiv:2112.10741, section 4. Where the time goes in, the sentence is added.

Departures from DDPM's paper, each a setting: `patch` folds squares of pixels into channels before
the first convolution and unfolds them after the last (a quarter of the work at patch 2); dropout is
off at the small presets; and two heads or more where the paper has one. `cross` is our own: DDPM's
block, then attention to the words, without the transformer's feed-forward.

Axes: B pictures, C channels, H W pixels of a level, N = H W, L words, D width of the text, E width
    of the time vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.config import at_least, one_of
from lineage.diffusion.networks.spatial_transformer import SpatialTransformer
from lineage.errors import UserError
from lineage.nn.attention import Attention
from lineage.nn.autoencoder import Double
from lineage.nn.blocks import laid_for_convolutions
from lineage.text.contract import TextFeatures

CONDITIONING = ("cross", "transformer", "joint", "sentence", "none")


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
        head_width: if not 0, channels of a head, of which there are as many as fit.
        patch: side of the square of pixels that is folded into channels.
        conditioning: how text comes in: `cross` (attention to words, and the sentence),
            `transformer` (a spatial transformer over the words), `joint` (one attention over words
            and pixels, and the sentence), `sentence`, `none`.
        depth: blocks of each spatial transformer.
        padding: whether places behind the last word are attended to.
        shift: whether time scales and shifts the second norm of a block, and is not added.
        block_resampling: whether residual blocks halve and double the side, and not convolutions.
        groups: of the group norms; 0 for 32, or as many as leave 4 channels to a group.
        epsilon: of the group norms.
        dropout: in the residual blocks.
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 2
    attention: tuple[int, ...] = (1,)
    heads: int = 1
    head_width: int = 0
    patch: int = 1
    conditioning: str = "cross"
    depth: int = 1
    padding: bool = False
    shift: bool = False
    block_resampling: bool = False
    groups: int = 0
    epsilon: float = 1e-5
    dropout: float = 0.1

    def __post_init__(self) -> None:
        one_of("unet.conditioning", self.conditioning, CONDITIONING)
        for name in ("width", "blocks", "heads", "patch", "depth"):
            at_least(f"unet.{name}", getattr(self, name), 1)
        for name in ("groups", "head_width"):
            at_least(f"unet.{name}", getattr(self, name), 0)
        at_least("unet.epsilon", self.epsilon, 0)
        if self.width % 2:
            raise UserError(f"unet.width={self.width} must be even, for the sines of the time.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"unet.dropout={self.dropout} must be from 0 to below 1.")
        if not self.multipliers or min(self.multipliers) < 1:
            raise UserError(
                f"unet.multipliers={self.multipliers} must name a width for each level."
            )
        if not set(self.attention) <= set(range(len(self.multipliers))):
            raise UserError(
                f"unet.attention={self.attention} must name levels from 0 to "
                f"{len(self.multipliers) - 1}."
            )

    @property
    def smallest(self) -> int:
        """Side of the smallest picture; larger ones have multiples of it."""
        return int(self.patch * 2 ** (len(self.multipliers) - 1))

    def heads_of(self, channels: int) -> int:
        """How many heads the attention of a level has."""
        return max(1, channels // self.head_width) if self.head_width else self.heads

    def groups_of(self, channels: int) -> int:
        """How many groups a norm has."""
        few = max(1, channels // 4)
        return math.gcd(self.groups or min(32, few), channels)

    def norm(self, channels: int) -> nn.GroupNorm:
        """The norm of a level."""
        return nn.GroupNorm(self.groups_of(channels), channels, eps=self.epsilon)


def time_embedding(t: Tensor, width: int) -> Tensor:
    """t (B,) -> (B, width): cosines and sines of falling frequency (Vaswani et al. 2017, section
    3.5).
    """
    half = width // 2
    exponents = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * exponents)  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zeroed(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """`layer` with weight and bias at zero, so that its block starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def doubled(x: Tensor) -> Tensor:
    """Twice the side, by nearest neighbours."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class ResidualBlock(nn.Module):
    """Two convolutions with the time vector between them.

    Args:
        resample: `down` or `up` halves or doubles the side on the way, with no weights of its own.
    """

    def __init__(self, config: UNetConfig, inputs: int, outputs: int, resample: str = "") -> None:
        super().__init__()
        self.shift, self.resample = config.shift, resample
        self.norm1 = config.norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(4 * config.width, 2 * outputs if config.shift else outputs)
        self.norm2 = config.norm(outputs)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, C, H, W), time (B, E) after its SiLU -> (B, C', H', W')."""
        h = F.silu(self.norm1(x))
        if self.resample:
            h, x = ((F.avg_pool2d(y, 2) if self.resample == "down" else doubled(y)) for y in (h, x))
        h = self.conv1(h)
        told = self.time(time)[:, :, None, None]
        if self.shift:
            scale, shift = told.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + told)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class AttentionBlock(nn.Module):
    """Pixels look at each other, then at the words (`cross`); or at both at once (`joint`)."""

    def __init__(self, config: UNetConfig, width: int, text_width: int) -> None:
        super().__init__()
        heads = config.heads_of(width)
        self.norm = config.norm(width)
        self.pixels = Attention(width, heads)
        zeroed(self.pixels.out)
        self.words, self.words_joint = None, None
        if config.conditioning == "cross":
            self.words_norm = nn.LayerNorm(width)
            self.words = Attention(width, heads, context_width=text_width)
            zeroed(self.words.out)
        elif config.conditioning == "joint":
            self.words_joint = nn.Linear(text_width, 2 * width)

    def forward(self, x: Tensor, words: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, C, H, W), words (B, L, D), mask over (B, heads, N, L) -> (B, C, H, W)."""
        flat = x.flatten(2).transpose(1, 2)  # (B, N, C)
        seen = self.norm(x).flatten(2).transpose(1, 2)
        if self.words_joint is not None:
            flat = flat + self._joint(seen, self.words_joint(words), mask)
        else:
            flat = flat + self.pixels(seen)
        if self.words is not None:
            flat = flat + self.words(self.words_norm(flat), words, mask)
        return flat.transpose(1, 2).unflatten(2, x.shape[2:])

    def _joint(self, seen: Tensor, told: Tensor, mask: Tensor | None) -> Tensor:
        """One softmax over words and pixels: seen (B, N, C), told (B, L, 2 C) -> (B, N, C)."""
        pairs = torch.cat([told, self.pixels.key_value(seen)], dim=1)  # (B, L + N, 2 C)
        if mask is not None:
            mask = F.pad(mask, (0, seen.shape[1]), value=True)
        return self.pixels.among(self.pixels.query(seen), pairs, mask)


class Level(nn.Module):
    """A residual block, and attention behind it where the level has attention."""

    def __init__(
        self, residual: ResidualBlock, attention: AttentionBlock | SpatialTransformer | None
    ) -> None:
        super().__init__()
        self.residual, self.attention = residual, attention

    def forward(self, x: Tensor, time: Tensor, words: Tensor, mask: Tensor | None) -> Tensor:
        x = self.residual(x, time)
        return x if self.attention is None else self.attention(x, words, mask)


class UNet(nn.Module):
    """x_t, t and text -> a tensor of the shape of x_t.

    Args:
        config: sizes.
        text_width: D of the text encoder; not used without conditioning.
        channels: of x_t.
        outputs: channels of the result, where they are others.
    """

    def __init__(
        self, config: UNetConfig, text_width: int, channels: int = 3, outputs: int | None = None
    ) -> None:
        super().__init__()
        self.config = config
        widths = [config.width * m for m in config.multipliers]
        time_width, fold = 4 * config.width, config.patch**2

        def attention(width: int) -> AttentionBlock | SpatialTransformer:
            if config.conditioning != "transformer":
                return AttentionBlock(config, width, text_width)
            heads, groups = config.heads_of(width), config.groups_of(width)
            return SpatialTransformer(width, heads, config.depth, text_width, groups)

        def level(inputs: int, width: int, attends: bool, resample: str = "") -> Level:
            residual = ResidualBlock(config, inputs, width, resample)
            return Level(residual, attention(width) if attends else None)

        def resampling(width: int, way: str) -> nn.Module:
            if config.block_resampling:
                return level(width, width, False, way)
            down = way == "down"
            return nn.Conv2d(width, width, 3, stride=2, padding=1) if down else Double(width)

        self.time = nn.Sequential(
            nn.Linear(config.width, time_width), nn.SiLU(), nn.Linear(time_width, time_width)
        )
        told = config.conditioning in ("cross", "joint", "sentence")
        self.sentence = nn.Linear(text_width, time_width) if told else None
        self.enter = nn.Conv2d(channels * fold, config.width, 3, padding=1)

        self.down = nn.ModuleList()
        kept, current = [config.width], config.width
        for number, width in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(level(current, width, number in config.attention))
                current = width
                kept.append(current)
            if number + 1 < len(widths):
                self.down.append(resampling(current, "down"))
                kept.append(current)

        self.middle = nn.ModuleList([level(current, current, True), level(current, current, False)])

        self.up = nn.ModuleList()
        for number, width in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                self.up.append(level(current + kept.pop(), width, number in config.attention))
                current = width
            if number > 0:
                self.up.append(resampling(current, "up"))

        self.norm = config.norm(current)
        self.leave = nn.Conv2d(current, (outputs or channels) * fold, 3, padding=1)
        zeroed(self.leave)

    def forward(self, noised: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        """noised (B, C, S, S), t (B,) -> (B, C, S, S)."""
        time = self.time(time_embedding(t, self.config.width))  # (B, E)
        if self.sentence is not None:
            time = time + self.sentence(text.sentence)
        time, words = F.silu(time), text.words
        # the same words for every head and pixel
        mask = None if self.config.padding else text.mask[:, None, None]
        folded = laid_for_convolutions(F.pixel_unshuffle(noised, self.config.patch))
        x = self.enter(folded)  # (B, C, H, W)
        kept = [x]
        for part in self.down:
            x = part(x, time, words, mask) if isinstance(part, Level) else part(x)
            kept.append(x)
        for part in self.middle:
            x = part(x, time, words, mask)
        for part in self.up:
            if isinstance(part, Level) and not part.residual.resample:
                x = part(torch.cat([x, kept.pop()], dim=1), time, words, mask)
            else:
                x = part(x, time, words, mask) if isinstance(part, Level) else part(x)
        x = self.leave(F.silu(self.norm(x)))
        return F.pixel_shuffle(x, self.config.patch)
