"""`dit`: the diffusion transformer (Peebles and Xie 2023, arXiv:2212.09748), told what to draw.

The problem: the UNet is a habit; is it needed? What is new: a plain transformer over patches of the
latents, steered by adaptive layer norms that start as the identity, does better the larger it is.

    section 3.2, patchify     `DiT.enter`, with a fixed table of sines for the places
    figure 3, adaLN-Zero      `Block`: scale, shift and gate of each half come from time and class
    decoder                   `DiT.leave`

Departure: where the paper adds the class to the time, here goes the sentence; and the words stand
before the patches as tokens of their own (section 3.2, in-context conditioning), unless `words` is
0. Then it is the paper's network, whose weights it can take.

Axes: B pictures, C H W latents, P patch, N = H W / P^2 patches, L words, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lineage.config import at_least, one_of
from lineage.diffusion.ldm import LatentDenoiser, Latents
from lineage.diffusion.model import DenoiserConfig
from lineage.diffusion.networks.unet import time_embedding, zeroed
from lineage.errors import UserError
from lineage.nn.attention import Attention
from lineage.text.contract import TextEncoder, TextFeatures

FREQUENCIES = 256  # width of the time embedding before its layers
EPSILON = 1e-6  # of the layer norms


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a diffusion transformer.

    Attributes:
        width: D.
        layers: blocks.
        heads: of each attention.
        patch: P, side of a patch of latents.
        words: places for words before the patches; longer captions are cut. 0 leaves them to the
            sentence.
        gelu: `tanh`, the authors', or `exact`.
    """

    width: int = 1152
    layers: int = 28
    heads: int = 16
    patch: int = 2
    words: int = 64
    gelu: str = "tanh"

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "patch"):
            at_least(f"net.{name}", getattr(self, name), 1)
        at_least("net.words", self.words, 0)
        one_of("net.gelu", self.gelu, ("tanh", "exact"))
        if self.width % self.heads or self.width % 4:
            raise UserError(
                f"net.width={self.width} must be a multiple of 4, for the table of places, and of "
                f"net.heads={self.heads}."
            )


SIZES = {
    "S": {"layers": 12, "width": 384, "heads": 6},
    "B": {"layers": 12, "width": 768, "heads": 12},
    "L": {"layers": 24, "width": 1024, "heads": 16},
    "XL": {"layers": 28, "width": 1152, "heads": 16},
}
"""Table 1 of the paper."""


def places_table(width: int, height: int, across: int) -> Tensor:
    """(H W, D): sines and cosines of the column in the first half, of the row in the second."""

    def along(places: Tensor) -> Tensor:
        exponents = torch.arange(width // 4, dtype=torch.float64) / (width // 4)
        angles = places.double()[:, None] * 10_000**-exponents
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(across), indexing="ij")
    return torch.cat([along(columns.flatten()), along(rows.flatten())], dim=1).float()


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D) moved by (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Figure 3, adaLN-Zero: attention and a perceptron, each modulated before and gated after."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1, self.norm2 = (
            nn.LayerNorm(width, elementwise_affine=False, eps=EPSILON) for _ in range(2)
        )
        self.attn = Attention(width, config.heads)
        gelu = nn.GELU("tanh" if config.gelu == "tanh" else "none")
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), gelu, nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, told: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, N, D), told (B, D) after its SiLU -> (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(told).chunk(6, dim=1)
        seen = self.attn(modulated(self.norm1(x), shift1, scale1), mask=mask)
        x = x + gate1[:, None] * seen
        return x + gate2[:, None] * self.mlp(modulated(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    """z_t, t and text -> a tensor of the shape of z_t.

    Args:
        text_width: D of the text encoder.
        shape: (C, H, W) of z_t.
        outputs: channels of the result.
    """

    def __init__(
        self, config: DiTConfig, text_width: int, shape: tuple[int, int, int], outputs: int
    ) -> None:
        super().__init__()
        channels, height, across = shape
        patch, width = config.patch, config.width
        if height % patch or across % patch:
            raise UserError(
                f"Latents of {height} x {across} do not divide into patches of net.patch={patch}."
            )
        self.config, self.grid = config, (height // patch, across // patch)
        self.enter = nn.Conv2d(channels, width, patch, stride=patch)
        self.register_buffer("places", places_table(width, *self.grid), persistent=False)
        self.places: Tensor
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.sentence = nn.Linear(text_width, width)
        self.words = nn.Linear(text_width, width) if config.words else None
        self.order = nn.Embedding(config.words, width) if config.words else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=EPSILON)
        self.modulation = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, patch**2 * outputs)
        self._start()

    def _start(self) -> None:
        """The authors' initial weights: every block the identity, the result zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.enter.weight.flatten(1))
        nn.init.zeros_(self.enter.bias)  # type: ignore[arg-type]
        for layer in (self.time[0], self.time[2], self.sentence):
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
        if self.order is not None:
            nn.init.normal_(self.order.weight, std=0.02)
        joined = math.sqrt(6 / (4 * self.config.width))  # queries, keys, values: one layer of 3 D
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.uniform_(block.attn.query.weight, -joined, joined)
            nn.init.uniform_(block.attn.key_value.weight, -joined, joined)
            zeroed(block.modulation)
        zeroed(self.modulation)
        zeroed(self.leave)

    def told(self, t: Tensor, text: TextFeatures) -> Tensor:
        """Time and sentence as one vector, (B, D)."""
        time = self.time(time_embedding(t, FREQUENCIES))
        return time + self.sentence(text.sentence)

    def tokens(self, noised: Tensor) -> Tensor:
        """Patches at their places, (B, N, D)."""
        return self.enter(noised).flatten(2).transpose(1, 2) + self.places

    def forward(self, noised: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        """noised (B, C, H, W), t (B,) -> (B, outputs, H, W)."""
        told = F.silu(self.told(t, text))  # (B, D)
        x, mask, first = self.tokens(noised), None, 0
        if self.words is not None and self.order is not None:
            text = text.shortened(self.config.words)
            first = text.words.shape[1]
            x = torch.cat([self.words(text.words) + self.order.weight[:first], x], dim=1)
            mask = F.pad(text.mask, (0, self.places.shape[0]), value=True)[:, None, None]
        for block in self.blocks:
            x = block(x, told, mask)  # (B, L + N, D)
        shift, scale = self.modulation(told).chunk(2, dim=1)
        x = self.leave(modulated(self.norm(x[:, first:]), shift, scale))  # (B, N, P P C)
        height, patch = self.grid[0], self.config.patch
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=patch, q=patch)


@dataclass(frozen=True)
class DiTSystemConfig(DenoiserConfig):
    """Latent diffusion by a transformer.

    Attributes:
        net: the network.
    """

    net: DiTConfig = field(default_factory=DiTConfig)


class DiTSystem(LatentDenoiser):
    """Latent diffusion by a transformer."""

    def __init__(
        self, config: DiTSystemConfig, latents: Latents, text: TextEncoder, size: int
    ) -> None:
        outputs = (2 if config.process.learned else 1) * latents.shape[0]
        network = DiT(config.net, text.width, latents.shape, outputs)
        super().__init__(config, latents, text, size, network)
