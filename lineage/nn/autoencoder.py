"""The convolutional encoder, decoder and discriminator of VQGAN (Esser et al. 2021,
arXiv:2012.09841, table 7) and, after it, of latent diffusion.

    encoder    at each resolution: residual blocks, some with attention; then half the side
    middle     residual block, attention, residual block
    decoder    the mirror image, with one residual block more at each resolution

Much comes from DDPM's UNet: group norm with 32 groups before each convolution, Swish, and a
convolution of stride 2 that pads only on the right and below. Names of layers are the authors'.

Axes: B pictures, C channels, H W, S side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lineage.bounds import Depth, Dim, IntsFromZero, Multipliers
from lineage.config import configuration
from lineage.errors import UserError
from lineage.nn.attention import attend
from lineage.nn.fast import GroupNorm, channels_last_on_cpu, conv_of_upsampled

EPSILON = 1e-6
"""Epsilon of the group norms."""


@configuration
class AutoencoderConfig:
    """Sizes of encoder and decoder, under the authors' names in brackets.

    Attributes:
        channels: Number of channels at the full resolution [ch].
        channel_mult: Number of channels at each resolution, from the full one down, as multiples of
            `channels` [ch_mult]; the side halves in between.
        num_res_blocks: Number of residual blocks at each resolution of the encoder; the decoder has
            one more [num_res_blocks].
        attn_resolutions: Sides of the feature maps that have attention after each block
            [attn_resolutions].
        resolution: Side of the pictures for which `attn_resolutions` holds [resolution].
        z_channels: Number of channels between encoder and decoder [z_channels].
        patch_size: Side of the squares of pixels that are folded into channels before the first
            convolution. The authors have 1; 2 needs a quarter of the work.
    """

    channels: Dim = 128
    channel_mult: Multipliers = (1, 1, 2, 2, 4)
    num_res_blocks: Depth = 2
    attn_resolutions: IntsFromZero = (16,)
    resolution: Dim = 256
    z_channels: Dim = 256
    patch_size: Dim = 1

    def __post_init__(self) -> None:
        if self.resolution % self.factor:
            raise UserError(
                f"net.resolution={self.resolution} is not divisible by {self.factor}: choose "
                "another size, or fewer numbers in net.channel_mult."
            )

    @property
    def factor(self) -> int:
        """Number of pixels on a side of one grid cell."""
        return int(self.patch_size * 2 ** (len(self.channel_mult) - 1))

    def levels(self) -> list[tuple[int, bool]]:
        """(number of channels, whether there is attention) of each resolution, from the full one
        down.
        """
        full = self.resolution // self.patch_size
        return [
            (self.channels * mult, full // 2**level in self.attn_resolutions)
            for level, mult in enumerate(self.channel_mult)
        ]


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with 32 groups, or with the largest smaller power of 2 that divides `channels`."""
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0)
    return GroupNorm(groups, channels, eps=EPSILON)


class ResnetBlock(nn.Module):
    """shortcut(x) + conv(swish(norm(conv(swish(norm(x))))))."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = group_norm(in_channels), group_norm(out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttnBlock(nn.Module):
    """x + attention(norm(x)) over all grid cells, with one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        h = self.norm(x)
        q, k, v = (
            rearrange(layer(h), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v)
        )
        h = rearrange(attend(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(h)


class Level(nn.Module):
    """The blocks of one resolution, and the layer that leads to the next one.

    Args:
        channels: Number of channels before the first block and after each.
        has_attention: If true, an attention block follows each residual block.
        resample: Layer to the next resolution; None at the last.
    """

    def __init__(
        self, channels: Sequence[int], has_attention: bool, resample: nn.Module | None
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(a, b) for a, b in zip(channels, channels[1:], strict=False)
        )
        self.attn = nn.ModuleList(AttnBlock(c) for c in channels[1:]) if has_attention else None
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        for number, block in enumerate(self.block):
            x = block(x)
            if self.attn is not None:
                x = self.attn[number](x)
        return x if self.resample is None else self.resample(x)


class Downsample(nn.Module):
    """Half the side: a convolution of stride 2, padded on the right and below."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / 2, W / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the side: nearest neighbours, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2 H, 2 W)."""
        return conv_of_upsampled(x, self.conv)


class Middle(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Pictures to a grid of vectors.

    Args:
        config: Sizes.
        out_channels: Number of channels of the grid: `z_channels`, or twice that for means and
            variances.
        in_channels: Number of channels of the pictures.
    """

    def __init__(self, config: AutoencoderConfig, out_channels: int, in_channels: int = 3) -> None:
        super().__init__()
        width = config.channels
        self.patch_size = config.patch_size
        self.conv_in = nn.Conv2d(in_channels * config.patch_size**2, width, 3, padding=1)
        levels = []
        for number, (channels, has_attention) in enumerate(config.levels(), start=1):
            last = number == len(config.channel_mult)
            widths = [width, *[channels] * config.num_res_blocks]
            levels.append(Level(widths, has_attention, None if last else Downsample(channels)))
            width = channels
        self.down = nn.ModuleList(levels)
        self.mid = Middle(width)
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, out_channels, S / f, S / f)."""
        x = self.conv_in(channels_last_on_cpu(F.pixel_unshuffle(image, self.patch_size)))
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """A grid of vectors to pictures. `up` goes from the smallest resolution to the full one."""

    def __init__(self, config: AutoencoderConfig, out_channels: int = 3) -> None:
        super().__init__()
        resolutions = list(reversed(config.levels()))
        width = resolutions[0][0]
        self.conv_in = nn.Conv2d(config.z_channels, width, 3, padding=1)
        self.mid = Middle(width)
        levels = []
        for number, (channels, has_attention) in enumerate(resolutions, start=1):
            last = number == len(resolutions)
            widths = [width, *[channels] * (config.num_res_blocks + 1)]
            levels.append(Level(widths, has_attention, None if last else Upsample(channels)))
            width = channels
        self.up = nn.ModuleList(levels)
        self.norm_out = group_norm(width)
        self.patch_size = config.patch_size
        self.conv_out = nn.Conv2d(width, out_channels * config.patch_size**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, z_channels, S / f, S / f) -> (B, 3, S, S)."""
        x = self.mid(self.conv_in(channels_last_on_cpu(z)))
        for level in self.up:
            x = level(x)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.patch_size)


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017, arXiv:1611.07004) as in VQGAN: one logit for each patch.

    Args:
        channels: Number of channels after the first convolution [ndf].
        num_layers: Number of convolutions of stride 2 [n_layers].
        in_channels: Number of channels of the pictures [input_nc].
    """

    def __init__(self, channels: int = 64, num_layers: int = 3, in_channels: int = 3) -> None:
        super().__init__()
        widths = [channels * min(2**k, 8) for k in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for number, (a, b) in enumerate(zip(widths, widths[1:], strict=False), start=1):
            stride = 1 if number == num_layers else 2
            layers += [nn.Conv2d(a, b, 4, stride, 1, bias=False), nn.BatchNorm2d(b)]
            layers += [nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) -> logits (B, 1, s, s)."""
        return torch.as_tensor(self.main(image))

    def features(self, image: Tensor) -> list[Tensor]:
        """Feature maps after each activation, from the first on."""
        features, x = [], image
        for layer in list(self.main)[:-1]:
            x = layer(x)
            if isinstance(layer, nn.LeakyReLU):
                features.append(x)
        return features
