"""Image towers of CLIP (Radford et al. 2021, arXiv:2103.00020, section 2.4): pictures -> (B, P).

    VisionTransformer   Dosovitskiy et al. 2021 (arXiv:2010.11929) with one more norm before the
                        blocks; the class token, behind a norm and a projection, is the picture
    ModifiedResNet      ResNet-D (He et al. 2019, arXiv:1812.01187): a stem of three convolutions,
                        average pooling before each stride (anti-aliasing, Zhang 2019), and a
                        multi-head attention in place of the last mean, whose query is the mean

`places` gives a vector of each place instead, in the same space as captions, for maps of what is
where: attention of the last layer is left out, and each place keeps its own value (MaskCLIP, Zhou
et al. 2022, arXiv:2112.01071, section 3.2).

Axes: B pictures, S side, H W places, N = H W, D width, C channels, P width of the joint space.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from lineage.bounds import Depth, Dim, Ints
from lineage.config import configuration
from lineage.errors import UserError
from lineage.nn.attention import Attention
from lineage.nn.transformer import GELUKind, TransformerBlock

# --- vision transformer ---------------------------------------------------------------------------


@configuration
class ViTConfig:
    """Sizes of a vision transformer; the defaults are those of ViT-B/32.

    Attributes:
        patch_size: Side of a patch in pixels.
        conv_stem: If true, convolutions that each halve the side take the place of the one that
            cuts patches (Xiao et al. 2021, arXiv:2106.14881): small data sets need the locality.
        width: Width of a patch's vector.
        num_layers: Number of blocks.
        num_heads: Number of attention heads.
    """

    patch_size: Dim = 32
    conv_stem: bool = False
    width: Dim = 768
    num_layers: Depth = 12
    num_heads: Depth = 12


def conv_stem(patch_size: int, width: int) -> nn.Sequential:
    """Convolutions of stride 2, each with twice the channels of the one before: pictures
    (B, 3, S, S) -> (B, D, S / patch_size, S / patch_size).
    """
    halvings = patch_size.bit_length() - 1
    if halvings == 0 or patch_size != 2**halvings or width % 2**halvings:
        raise UserError(
            f"A stem of convolutions needs patches of 2, 4, 8, ... pixels and a width that can be "
            f"halved as often, not patches of {patch_size} and a width of {width}."
        )
    layers: list[nn.Module] = []
    in_channels = 3
    for number in reversed(range(halvings)):
        channels = width // 2**number
        layers += [
            nn.Conv2d(in_channels, channels, 3, stride=2, padding=1, bias=False),
            nn.GroupNorm(1, channels),
            nn.ReLU(),
        ]
        in_channels = channels
    return nn.Sequential(*layers, nn.Conv2d(width, width, 1, bias=False))


class VisionTransformer(nn.Module):
    """Pictures as sequences of patches.

    Args:
        config: Sizes.
        size: S; a multiple of the patches' side.
        projection_dim: P.
        gelu: Activation of the blocks.
    """

    def __init__(
        self, config: ViTConfig, size: int, projection_dim: int, gelu: GELUKind = "quick_gelu"
    ) -> None:
        super().__init__()
        patch, width = config.patch_size, config.width
        if size % patch:
            raise UserError(f"Pictures of {size} pixels cannot be cut into patches of {patch}.")
        self.side = size // patch  # H = W
        self.patch_emb: nn.Module = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        if config.conv_stem:
            self.patch_emb = conv_stem(patch, width)
        self.class_emb = nn.Parameter(torch.randn(width) * width**-0.5)
        self.pos_emb = nn.Parameter(torch.randn(self.side**2 + 1, width) * width**-0.5)
        self.norm_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, config.num_heads, gelu=gelu) for _ in range(config.num_layers)
        )
        self.norm_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, projection_dim) * width**-0.5)

    def embed(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 1 + N, D), the class token first."""
        patches = self.patch_emb(x).flatten(2).mT  # (B, N, D)
        tokens = torch.cat([self.class_emb.expand(len(x), 1, -1), patches], dim=1)
        embedded: Tensor = self.norm_pre(tokens + self.pos_emb)
        return embedded

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, P)."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.norm_post(x[:, 0]) @ self.proj

    def places(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, P, H, W)."""
        x = self.embed(x)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        assert isinstance(last, TransformerBlock)
        x = x + last.attn.to_out(last.attn.to_v(last.norm1(x)))
        x = x + last.mlp(last.norm2(x))
        vectors = self.norm_post(x[:, 1:]) @ self.proj  # (B, N, P)
        return vectors.mT.unflatten(2, (self.side, self.side))


# --- ResNet ---------------------------------------------------------------------------------------


@configuration
class ResNetConfig:
    """Sizes of a ResNet; the defaults are those of RN50.

    Attributes:
        width: Number of channels behind the stem; each group has twice as many as the one before.
        num_blocks: Number of blocks of each of four groups; all but the first halve the side.
        num_heads: Number of heads of the attention that pools.
    """

    width: Dim = 64
    num_blocks: Annotated[Ints, Field(min_length=4, max_length=4)] = (3, 4, 6, 3)
    num_heads: Depth = 32


class Bottleneck(nn.Module):
    """Convolutions of 1, 3 and 1 pixels beside a shortcut, (B, C, H, W) -> (B, 4 C', H/s, W/s).

    Args:
        in_channels: C.
        channels: C'.
        stride: s; average pooling takes the place of a convolution with stride.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = 4 * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride),
                nn.Conv2d(in_channels, out_channels, 1, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 4 C', H/s, W/s)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(self.pool(y)))
        out: Tensor = self.relu(y + self.shortcut(x))
        return out


class AttentionPool(nn.Module):
    """Attention of the mean over places to the mean and all places, (B, C, H, W) -> (B, P)."""

    def __init__(self, side: int, channels: int, num_heads: int, projection_dim: int) -> None:
        super().__init__()
        self.pos_emb = nn.Parameter(torch.randn(side**2 + 1, channels) * channels**-0.5)
        self.attn = Attention(channels, num_heads)
        self.attn.to_out = nn.Linear(channels, projection_dim)

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1 + N, C), the mean first."""
        places = x.flatten(2).mT
        return torch.cat([places.mean(1, keepdim=True), places], dim=1) + self.pos_emb

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, P)."""
        tokens = self.embed(x)
        pooled: Tensor = self.attn(tokens[:, :1], tokens)  # (B, 1, P)
        return pooled[:, 0]

    def places(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, P, H, W)."""
        values = self.attn.to_out(self.attn.to_v(self.embed(x)[:, 1:]))
        return values.mT.unflatten(2, x.shape[2:])


class ModifiedResNet(nn.Module):
    """A ResNet whose groups each halve the side, from S / 4 behind the stem to S / 32.

    Args:
        config: Sizes.
        size: S, a multiple of 32.
        projection_dim: P.
    """

    def __init__(self, config: ResNetConfig, size: int, projection_dim: int) -> None:
        super().__init__()
        if size % 32:
            raise UserError(
                f"The ResNet of CLIP divides the side by 32, and {size} is no multiple."
            )
        width = config.width
        if width % 2:
            raise UserError(f"The stem of CLIP's ResNet halves its width, and {width} is odd.")
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(),
            nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AvgPool2d(2),
        )
        groups, in_channels = [], width
        for number, count in enumerate(config.num_blocks):
            channels = width * 2**number
            blocks = []
            for block in range(count):
                stride = 2 if number > 0 and block == 0 else 1
                blocks.append(Bottleneck(in_channels, channels, stride))
                in_channels = 4 * channels
            groups.append(nn.Sequential(*blocks))
        self.groups = nn.Sequential(*groups)
        self.pool = AttentionPool(size // 32, in_channels, config.num_heads, projection_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, P)."""
        pooled: Tensor = self.pool(self.groups(self.stem(x)))
        return pooled

    def places(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, P, S / 32, S / 32)."""
        return self.pool.places(self.groups(self.stem(x)))
