"""The UNet of DDPM (Ho et al. 2020, appendix B) and of the papers after it, conditioned on text.

    residual block     norm, SiLU, conv, + time, norm, SiLU, conv, + input
    attention block    self-attention over the pixels, and the words in one of several ways
    UNet               down the levels, a middle, and up again; each residual block of the way up
                       also takes the output that the way down left at its level (`skips`)

What changed from paper to paper is a setting:
                          DDPM      ADM            GLIDE         latent diffusion
    conditioning          none      sentence       joint         transformer
    scale_shift_norm      no        yes            yes           no
    resblock_updown       no        yes            yes           no
ADM: Dhariwal and Nichol 2021, arXiv:2105.05233, section 3 (its class is our sentence). GLIDE:
Nichol et al. 2021, arXiv:2112.10741, section 4. The sentence is added to the time vector.

Departures from DDPM's paper, each a setting: `patch_size` folds squares of pixels into channels
before the first convolution and unfolds them after the last (a quarter of the work at 2); dropout
is off at the small presets; and there are two heads or more where the paper has one. `cross` is our
own: DDPM's block, then attention to the words, without the transformer's feed-forward.

Axes: B pictures, C channels, H W pixels of a level, N = H W, L words, Dw and Ds widths of a word
    and of the sentence, E width of the time vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.bounds import (
    Depth,
    Dim,
    DimFromZero,
    Fraction,
    IntsFromZero,
    Multipliers,
    NonNegativeFloat,
)
from lineage.config import configuration
from lineage.diffusion.networks.attention_blocks import (
    CrossAttentionBlock,
    JointAttentionBlock,
    SelfAttentionBlock,
)
from lineage.diffusion.networks.layers import timestep_embedding, zero_module
from lineage.diffusion.networks.spatial_transformer import SpatialTransformer
from lineage.errors import UserError
from lineage.nn.fast import GroupNorm, channels_last_on_cpu, conv_of_upsampled
from lineage.text.contract import TextFeatures

AttentionFactory = Callable[[int], nn.Module]
"""Number of channels -> an attention block (x, words, mask) -> x."""


@configuration
class UNetConfig:
    """Sizes of a UNet.

    Attributes:
        channels: Number of channels of the first level; even, for the sinusoids of the time.
        channel_mult: Number of channels of each level, as multiples of `channels`; each level has
            half the side of the one before.
        num_res_blocks: Number of residual blocks of a level on the way down.
        attention_levels: Levels (0 is the finest) with attention blocks; the middle always has one.
        num_heads: Number of heads of every attention.
        head_dim: Width of a head; a level has as many heads as fit. 0 leaves it to `num_heads`.
        patch_size: Side of the squares of pixels that are folded into channels.
        conditioning: Way in which the text enters: `cross` (attention to the words, and the
            sentence), `transformer` (spatial transformers over the words), `joint` (one attention
            over words and pixels, and the sentence), `sentence`, or `none`.
        transformer_depth: Number of blocks of each spatial transformer.
        attend_padding: If true, the padding behind the last word is attended to.
        scale_shift_norm: If true, the time scales and shifts the second norm of a residual block;
            else it is added before it.
        resblock_updown: If true, residual blocks halve and double the side; else convolutions.
        norm_groups: Number of groups of the group norms; 0 for 32, or as many as leave 4 channels
            to a group.
        norm_eps: Epsilon of the group norms.
        dropout: Share of activations that residual blocks drop in training.
    """

    channels: Dim = 128
    channel_mult: Multipliers = (1, 2, 2, 2)
    num_res_blocks: Depth = 2
    attention_levels: IntsFromZero = (1,)
    num_heads: Depth = 1
    head_dim: DimFromZero = 0
    patch_size: Dim = 1
    conditioning: Literal["none", "sentence", "cross", "joint", "transformer"] = "cross"
    transformer_depth: Depth = 1
    attend_padding: bool = False
    scale_shift_norm: bool = False
    resblock_updown: bool = False
    norm_groups: DimFromZero = 0
    norm_eps: NonNegativeFloat = 1e-5
    dropout: Fraction = 0.1

    def __post_init__(self) -> None:
        if self.channels % 2:
            raise UserError(
                f"unet.channels={self.channels} must be even, for the sinusoids of the time."
            )
        if not self.channel_mult:
            raise UserError("unet.channel_mult must hold a number for each level.")
        if not set(self.attention_levels) <= set(range(len(self.channel_mult))):
            raise UserError(
                f"unet.attention_levels={self.attention_levels} must be levels from 0 to "
                f"{len(self.channel_mult) - 1}."
            )

    @property
    def level_channels(self) -> list[int]:
        """Number of channels of each level."""
        return [self.channels * multiple for multiple in self.channel_mult]

    @property
    def time_dim(self) -> int:
        """E, width of the time vector."""
        return 4 * self.channels

    def check_side(self, side: int, name: str) -> None:
        """Raise `UserError` if a `side`, called `name`, cannot be halved at each level."""
        factor = self.patch_size * 2 ** (len(self.channel_mult) - 1)
        if side % factor:
            raise UserError(
                f"A UNet of {len(self.channel_mult)} levels at patch_size={self.patch_size} needs "
                f"a side that is a multiple of {factor}, not {name}={side}."
            )

    def heads_of(self, channels: int) -> int:
        """Number of heads of a level's attention."""
        return max(1, channels // self.head_dim) if self.head_dim else self.num_heads

    def groups_of(self, channels: int) -> int:
        """Number of groups of a level's norms."""
        return math.gcd(self.norm_groups or min(32, max(1, channels // 4)), channels)

    def norm(self, channels: int) -> nn.GroupNorm:
        """Norm of a level."""
        return GroupNorm(self.groups_of(channels), channels, eps=self.norm_eps)


# --- parts ----------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Two convolutions, with the time vector between them.

    Args:
        resample: `down` or `up` halves or doubles the side on the way, without weights of its own.
    """

    def __init__(
        self, config: UNetConfig, in_channels: int, channels: int, resample: str = ""
    ) -> None:
        super().__init__()
        self.scale_shift_norm, self.resample = config.scale_shift_norm, resample
        self.norm1 = config.norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        emb_channels = 2 * channels if config.scale_shift_norm else channels
        self.time_emb_proj = nn.Linear(config.time_dim, emb_channels)
        self.norm2 = config.norm(channels)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = zero_module(nn.Conv2d(channels, channels, 3, padding=1))
        same = in_channels == channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, C, H, W), emb (B, E) after its SiLU -> (B, C', H', W')."""
        h = F.silu(self.norm1(x))
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.resample == "up":
            h, x = (F.interpolate(y, scale_factor=2.0, mode="nearest") for y in (h, x))
        h = self.conv1(h)
        emb = self.time_emb_proj(emb)[:, :, None, None]
        if self.scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + emb)
        return self.conv_shortcut(x) + self.conv2(self.dropout(F.silu(h)))


class Downsample(nn.Module):
    """Half the side: a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Twice the side: nearest neighbours, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return conv_of_upsampled(x, self.conv)


class Level(nn.Module):
    """Residual blocks at one side, and an attention block after each if the level has attention.

    Args:
        resample: Way to the next side; None at the last one.
    """

    def __init__(
        self,
        resnets: list[ResidualBlock],
        attentions: list[nn.Module],
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)
        self.resample = resample

    def block(
        self, number: int, x: Tensor, emb: Tensor, words: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Residual block `number`, then its attention block if there is one."""
        x = self.resnets[number](x, emb)
        if number < len(self.attentions):
            x = self.attentions[number](x, words, mask)
        return x


class DownLevel(Level):
    """A level of the way down."""

    def forward(self, x: Tensor, emb: Tensor, words: Tensor, mask: Tensor | None) -> list[Tensor]:
        """The output of every block and of the way to the next side."""
        outputs = []
        for number in range(len(self.resnets)):
            x = self.block(number, x, emb, words, mask)
            outputs.append(x)
        return outputs if self.resample is None else [*outputs, self.resample(x, emb)]


class MidLevel(Level):
    """Residual block, attention, residual block."""

    def forward(self, x: Tensor, emb: Tensor, words: Tensor, mask: Tensor | None) -> Tensor:
        return self.block(1, self.block(0, x, emb, words, mask), emb, words, mask)


class UpLevel(Level):
    """A level of the way up."""

    def forward(
        self, x: Tensor, skips: list[Tensor], emb: Tensor, words: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Each block takes the last of `skips` off the list."""
        for number in range(len(self.resnets)):
            x = self.block(number, torch.cat([x, skips.pop()], dim=1), emb, words, mask)
        return x if self.resample is None else self.resample(x, emb)


# --- the network ----------------------------------------------------------------------------------


class UNet(nn.Module):
    """x_t, t and text -> a tensor of the shape of x_t.

    Args:
        config: Sizes.
        attention: Function that builds an attention block from its number of channels.
        sentence_proj: Layer from the sentence (B, Ds) to the time vector (B, E), to which it is
            added; None leaves the sentence out.
        in_channels: Number of channels of x_t.
        out_channels: Number of channels of the result.
    """

    def __init__(
        self,
        config: UNetConfig,
        attention: AttentionFactory,
        sentence_proj: nn.Module | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
    ) -> None:
        super().__init__()
        self.config, self.sentence_proj = config, sentence_proj
        first, time_dim, folded = config.channels, config.time_dim, config.patch_size**2
        self.time_embed = nn.Sequential(
            nn.Linear(first, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)
        )
        self.conv_in = nn.Conv2d(in_channels * folded, first, 3, padding=1)

        def blocks(number: int, inputs: list[int]) -> tuple[list[ResidualBlock], list[nn.Module]]:
            """A residual block for each number of input channels, and their attention blocks."""
            own = config.level_channels[number]
            attends = number in config.attention_levels
            attentions = [attention(own) for _ in inputs] if attends else []
            return [ResidualBlock(config, one, own) for one in inputs], attentions

        levels = list(enumerate(config.level_channels))
        self.down = nn.ModuleList()
        skips, current = [first], first  # channels of the outputs that the way up takes
        for number, own in levels:
            inputs = [current, *[own] * (config.num_res_blocks - 1)]
            last, current = number == len(levels) - 1, own
            resample = None if last else _resample(config, own, "down")
            self.down.append(DownLevel(*blocks(number, inputs), resample))
            skips += [own] * (len(inputs) + (not last))

        resnets = [ResidualBlock(config, current, current) for _ in range(2)]
        self.mid = MidLevel(resnets, [attention(current)])

        self.up = nn.ModuleList()
        for number, own in reversed(levels):
            inputs = [one + skips.pop() for one in (current, *[own] * config.num_res_blocks)]
            resample, current = _resample(config, own, "up") if number else None, own
            self.up.append(UpLevel(*blocks(number, inputs), resample))

        self.norm_out = config.norm(current)
        self.conv_out = zero_module(nn.Conv2d(current, out_channels * folded, 3, padding=1))

    def check_shape(self, height: int, width: int) -> None:
        """Raise `UserError` if a height or a width of x_t cannot be halved at each level."""
        self.config.check_side(height, "height")
        self.config.check_side(width, "width")

    def forward(self, x_t: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        """x_t (B, C, H, W), t (B,) -> (B, C', H, W)."""
        emb = self.time_embed(timestep_embedding(t, self.config.channels))  # (B, E)
        if self.sentence_proj is not None:
            emb = emb + self.sentence_proj(text.sentence)
        emb, words = F.silu(emb), text.words
        mask = None if self.config.attend_padding else text.mask[:, None, None]  # (B, 1, 1, L)

        folded = F.pixel_unshuffle(x_t, self.config.patch_size)
        skips = [self.conv_in(channels_last_on_cpu(folded))]
        for level in self.down:
            skips += level(skips[-1], emb, words, mask)
        x = self.mid(skips[-1], emb, words, mask)
        for level in self.up:
            x = level(x, skips, emb, words, mask)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return F.pixel_shuffle(x, self.config.patch_size)


def _resample(config: UNetConfig, channels: int, way: str) -> nn.Module:
    """From one side to the next, `down` or `up`."""
    if config.resblock_updown:
        return ResidualBlock(config, channels, channels, way)
    return Downsample(channels) if way == "down" else Upsample(channels)


def make_unet(
    config: UNetConfig,
    word_dim: int,
    sentence_dim: int,
    in_channels: int = 3,
    out_channels: int = 3,
) -> UNet:
    """The UNet whose text enters as `config.conditioning` says."""

    def attention(channels: int) -> nn.Module:
        num_heads, norm = config.heads_of(channels), config.norm(channels)
        if config.conditioning == "cross":
            return CrossAttentionBlock(channels, num_heads, norm, word_dim)
        if config.conditioning == "joint":
            return JointAttentionBlock(channels, num_heads, norm, word_dim)
        if config.conditioning == "transformer":
            depth, norm_groups = config.transformer_depth, config.groups_of(channels)
            return SpatialTransformer(channels, num_heads, word_dim, depth, norm_groups)
        return SelfAttentionBlock(channels, num_heads, norm)

    reads_sentence = config.conditioning in ("sentence", "cross", "joint")
    sentence_proj = nn.Linear(sentence_dim, config.time_dim) if reads_sentence else None
    return UNet(config, attention, sentence_proj, in_channels, out_channels)
