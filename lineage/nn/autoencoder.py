"""The convolutional encoder and decoder of VQGAN (Esser et al. 2021, arXiv:2012.09841, table 7)
and, after it, of latent diffusion.

    halve the side k times: residual blocks at each, attention at some
    residual block, attention, residual block in the middle
    and the mirror image of it

Where it came from DDPM's UNet it keeps that network's habits: group norm of 32 groups before each
convolution, Swish, a convolution of stride 2 that pads only right and below.

Axes: B pictures, C channels, H W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lineage.errors import UserError
from lineage.nn.attention import attend
from lineage.nn.blocks import conv_of_doubled, laid_for_convolutions

EPSILON = 1e-6  # of the group norms


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes, under the authors' names in brackets.

    Attributes:
        channels: next to the picture [ch].
        multipliers: of them at each side, from the largest down [ch_mult]; the side halves between.
        blocks: residual blocks at each side in the encoder, one more in the decoder
            [num_res_blocks].
        attention: sides at which there is attention after each block [attn_resolutions].
        size: side of the pictures, by which `attention` is found [resolution].
        latent: channels between the two [z_channels].
        patch: side of the square of pixels that is folded into channels first, as the authors do
            not: a quarter of the work at 2.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    attention: tuple[int, ...] = (16,)
    size: int = 256
    latent: int = 256
    patch: int = 1

    def __post_init__(self) -> None:
        if not self.multipliers or min(self.multipliers) < 1:
            raise UserError(f"net.multipliers={self.multipliers} must be one or more, from 1 up.")
        for name in ("channels", "blocks", "latent", "patch"):
            if getattr(self, name) < 1:
                raise UserError(f"net.{name}={getattr(self, name)} must be at least 1.")
        if self.size % self.factor:
            raise UserError(
                f"{self.size} pixels do not divide into places of {self.factor}: choose another "
                "size, or fewer multipliers."
            )

    @property
    def factor(self) -> int:
        """How many pixels a side of a place has."""
        return int(self.patch * 2 ** (len(self.multipliers) - 1))

    def levels(self) -> list[tuple[int, bool]]:
        """(channels, whether there is attention) at each side, from the largest down."""
        sides = [self.size // self.patch // 2**k for k in range(len(self.multipliers))]
        return [
            (self.channels * m, side in self.attention)
            for m, side in zip(self.multipliers, sides, strict=True)
        ]


def norm(channels: int) -> nn.GroupNorm:
    """32 groups, or as many as there are channels or divide them."""
    groups = 32 if channels % 32 == 0 else next(g for g in (16, 8, 4, 2, 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=EPSILON)


class ResnetBlock(nn.Module):
    """shortcut(x) + conv(swish(norm(conv(swish(norm(x))))))."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(inputs), norm(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class AttnBlock(nn.Module):
    """x + attention of all places to all, with one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm(x)
        query, key, value = (
            rearrange(layer(seen), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v)
        )
        height = x.shape[2]
        found = rearrange(attend(query, key, value), "b 1 (h w) c -> b c h w", h=height)
        return x + self.proj_out(found)


class Level(nn.Module):
    """The blocks of one side, each followed by attention or not, and the way to the next side."""

    def __init__(self, widths: Sequence[int], attention: bool, resample: nn.Module | None) -> None:
        super().__init__()
        pairs = list(zip(widths, widths[1:], strict=False))
        self.block = nn.ModuleList(ResnetBlock(a, b) for a, b in pairs)
        self.attn = nn.ModuleList(AttnBlock(b) for _, b in pairs) if attention else None
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.block):
            x = block(x)
            if self.attn is not None:
                x = self.attn[number](x)
        return x if self.resample is None else self.resample(x)


class Halve(nn.Module):
    """Half the side: a convolution of stride 2, padded right and below."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Double(nn.Module):
    """Twice the side: nearest neighbours, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return conv_of_doubled(x, self.conv)


class Middle(nn.Module):
    """Block, attention, block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Pictures to a grid of vectors.

    Args:
        outputs: channels of the grid: `latent`, or twice that for means and variances.
        inputs: of the pictures.
    """

    def __init__(self, config: AutoencoderConfig, outputs: int, inputs: int = 3) -> None:
        super().__init__()
        width = config.channels
        self.patch = config.patch
        self.conv_in = nn.Conv2d(inputs * config.patch**2, width, 3, padding=1)
        levels = []
        for number, (channels, attention) in enumerate(config.levels(), start=1):
            last = number == len(config.multipliers)
            widths = [width, *[channels] * config.blocks]
            levels.append(Level(widths, attention, None if last else Halve(channels)))
            width = channels
        self.down = nn.ModuleList(levels)
        self.mid = Middle(width)
        self.norm_out = norm(width)
        self.conv_out = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, outputs, S / f, S / f)."""
        x = self.conv_in(laid_for_convolutions(F.pixel_unshuffle(image, self.patch)))
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """A grid of vectors to pictures. `up` goes from the smallest side to the largest."""

    def __init__(self, config: AutoencoderConfig, outputs: int = 3) -> None:
        super().__init__()
        sides = list(reversed(config.levels()))
        width = sides[0][0]
        self.conv_in = nn.Conv2d(config.latent, width, 3, padding=1)
        self.mid = Middle(width)
        levels = []
        for number, (channels, attention) in enumerate(sides, start=1):
            last = number == len(sides)
            widths = [width, *[channels] * (config.blocks + 1)]
            levels.append(Level(widths, attention, None if last else Double(channels)))
            width = channels
        self.up = nn.ModuleList(levels)
        self.norm_out = norm(width)
        self.patch = config.patch
        self.conv_out = nn.Conv2d(width, outputs * config.patch**2, 3, padding=1)

    def forward(self, grid: Tensor) -> Tensor:
        """(B, latent, S / f, S / f) -> (B, 3, S, S)."""
        x = self.mid(self.conv_in(laid_for_convolutions(grid)))
        for level in self.up:
            x = level(x)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.patch)


class PatchDiscriminator(nn.Module):
    """A logit for each patch of a picture (Isola et al. 2017, as VQGAN's): convolutions of 4 x 4.

    Args:
        channels: next to the picture [ndf].
        layers: of stride 2 [n_layers].
    """

    def __init__(self, channels: int = 64, layers: int = 3, inputs: int = 3) -> None:
        super().__init__()
        widths = [channels * min(2**k, 8) for k in range(layers + 1)]
        made: list[nn.Module] = [nn.Conv2d(inputs, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for number, (a, b) in enumerate(zip(widths, widths[1:], strict=False), start=1):
            stride = 1 if number == layers else 2
            made += [nn.Conv2d(a, b, 4, stride, 1, bias=False), nn.BatchNorm2d(b)]
            made += [nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*made, nn.Conv2d(widths[-1], 1, 4, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) -> logits (B, 1, s, s)."""
        return torch.as_tensor(self.main(image))

    def features(self, image: Tensor) -> list[Tensor]:
        """What stands behind each activation, from the picture on."""
        seen = []
        for layer in list(self.main)[:-1]:
            image = layer(image)
            if isinstance(layer, nn.LeakyReLU):
                seen.append(image)
        return seen
