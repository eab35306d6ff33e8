"""The discrete VAE of DALL-E (Ramesh et al. 2021, arXiv:2102.12092, section 2.1 and appendix A).

The problem: a codebook's choice has no gradient. What is new: the encoder gives a distribution over
the codes of each place, and the decoder gets a soft mixture of them, sharpened as training goes on
(the Gumbel relaxation), so that no gradient is copied and no codebook can be left behind by its
encoder; and pixels, which end at 0 and 1, are described by a distribution that does, too.

    appendix A.1   `DVAEEncoder`, `DVAEDecoder`: residual blocks without norms
    appendix A.2   `gumbel_mixture`: softmax((logits + g) / tau)
    appendix A.3   `logit_laplace_loss`, `map_pixels`, `unmap_pixels`

Axes: B pictures, V codes, H W places, S side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.config import at_least

EPSILON = 0.1  # pixels are kept this far from 0 and 1
GROUPS = 4  # of blocks; between them the side halves or doubles


@dataclass(frozen=True)
class DVAEConfig:
    """Sizes, under the authors' names in brackets.

    Attributes:
        codes: V [vocab_size].
        width: channels next to the picture [n_hid]; 2, 4 and 8 times as many deeper.
        start: channels after the decoder's first layer [n_init].
        blocks: of each group [n_blk_per_group].
    """

    codes: int = 8192
    width: int = 256
    start: int = 128
    blocks: int = 2

    def __post_init__(self) -> None:
        for name in ("codes", "start", "blocks"):
            at_least(f"dvae.{name}", getattr(self, name), 1)
        at_least("dvae.width", self.width, 4)


def conv(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    """Keeps the side. Weights from N(0, 1 / fan-in), zero bias."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=(kernel - 1) // 2)
    nn.init.normal_(layer.weight, std=(inputs * kernel**2) ** -0.5)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class DVAEBlock(nn.Module):
    """identity(x) + gain * path(x); the path has four convolutions, a quarter as wide.

    Args:
        kernels: of the four: 3 3 3 1 in the encoder, 1 3 3 3 in the decoder.
        gain: one over the square of the number of blocks, so that deep paths start small.
    """

    def __init__(
        self, inputs: int, outputs: int, kernels: tuple[int, int, int, int], gain: float
    ) -> None:
        super().__init__()
        self.gain = gain
        self.identity = conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        hidden = outputs // 4
        widths = (inputs, hidden, hidden, hidden, outputs)
        layers: list[nn.Module] = []
        for a, b, kernel in zip(widths, widths[1:], kernels, strict=False):
            layers += [nn.ReLU(), conv(a, b, kernel)]
        self.path = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.identity(x) + self.gain * self.path(x)


def _groups(
    first: int, widths: list[int], kernels: tuple[int, int, int, int], blocks: int
) -> list[nn.Sequential]:
    """`blocks` blocks of each width, one group after the other."""
    gain = 1 / (len(widths) * blocks) ** 2
    groups, inputs = [], first
    for width in widths:
        made = []
        for _ in range(blocks):
            made.append(DVAEBlock(inputs, width, kernels, gain))
            inputs = width
        groups.append(nn.Sequential(*made))
    return groups


class DVAEEncoder(nn.Module):
    """Pictures to logits of codes, at an eighth of the side."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        width = config.width
        self.input = conv(3, width, 7)
        widths = [width * 2**k for k in range(GROUPS)]
        self.groups = nn.ModuleList(_groups(width, widths, (3, 3, 3, 1), config.blocks))
        self.output = conv(widths[-1], config.codes, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) of `map_pixels` -> logits (B, V, S / 8, S / 8)."""
        x = self.input(pixels)
        for number, group in enumerate(self.groups):
            x = group(x) if number == 0 else group(F.max_pool2d(x, 2))
        return self.output(F.relu(x))


class DVAEDecoder(nn.Module):
    """Mixtures of codes to a distribution of each pixel."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.input = conv(config.codes, config.start, 1)
        widths = [config.width * 2**k for k in reversed(range(GROUPS))]
        self.groups = nn.ModuleList(_groups(config.start, widths, (1, 3, 3, 3), config.blocks))
        self.output = conv(widths[-1], 6, 1)

    def forward(self, mixture: Tensor) -> tuple[Tensor, Tensor]:
        """(B, V, H, W) shares that sum to 1 over V -> mu and ln b, (B, 3, 8 H, 8 W) each."""
        x = self.input(mixture)
        for number, group in enumerate(self.groups):
            x = group(x if number == 0 else F.interpolate(x, scale_factor=2, mode="nearest"))
        mu, log_b = self.output(F.relu(x)).chunk(2, dim=1)
        return mu, log_b


# --- appendix A.2 and A.3 --------------------------------------------------------------


def gumbel_mixture(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """softmax((logits + g) / tau) over V, with g = -ln(-ln u): a sample that has a gradient; the
    colder, the nearer to a single code.

    Args:
        logits, uniform: (B, V, H, W).
    """
    tiny = torch.finfo(uniform.dtype).tiny
    gumbel = -(-uniform.clamp(min=tiny).log()).clamp(min=tiny).log()
    return ((logits + gumbel) / temperature).softmax(1)


def map_pixels(image: Tensor) -> Tensor:
    """Pixels in [0, 1] -> [epsilon, 1 - epsilon], so that their logits are finite."""
    return (1 - 2 * EPSILON) * image + EPSILON


def unmap_pixels(mapped: Tensor) -> Tensor:
    """`map_pixels` undone, within [0, 1]."""
    return ((mapped - EPSILON) / (1 - 2 * EPSILON)).clamp(0, 1)


def logit_laplace_loss(mu: Tensor, log_b: Tensor, mapped: Tensor) -> Tensor:
    """-ln f(x) of pixels x (B, 3, S, S) in (0, 1) whose logits have the Laplace density of equation
    2: ln(2 b x (1 - x)) + |logit(x) - mu| / b, a mean over pixels and channels.
    """
    log_volume = (2 * mapped * (1 - mapped)).log()
    return (log_b + log_volume + (mapped.logit() - mu).abs() * (-log_b).exp()).mean()
