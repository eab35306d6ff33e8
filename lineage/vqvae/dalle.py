"""The discrete VAE of DALL-E (Ramesh et al. 2021, arXiv:2102.12092, section 2.1 and appendix A).

The problem: a codebook's choice has no gradient. What is new: the encoder gives a distribution over
the codes of each place, and the decoder gets a soft mixture of them, sharpened as training goes on
(the Gumbel relaxation), so that no gradient is copied and no codebook can be left behind by its
encoder; and pixels, which end at 0 and 1, are described by a distribution that does, too.

    appendix A.1   `DVAEEncoder`, `DVAEDecoder`: residual blocks without norms
    appendix A.2   `gumbel_mixture`: softmax((logits + g) / tau), tau from 1 down to 1/16;
                   `DVAE.losses`: the pixels' density, and beta KL(q || uniform), beta from 0 up
    appendix A.3   `logit_laplace_loss`, `map_pixels`, `unmap_pixels`

The KL term is per pixel and channel, as the pixels' density is, so that beta = 1 is the bound on
ln p(x); the paper's beta is 6.6.

Departures: both schedules end after `anneal` steps (the paper: 150,000 for tau, 5,000 for beta;
here beta rises over a thirtieth of tau's); small pictures may have fewer groups; b may have a
floor: in drawn pictures pixels repeat exactly, and such a density has no bound.

Axes: B pictures, V codes, H W places, S side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.config import at_least
from lineage.data.contract import Batch
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.system import Turn
from lineage.text.contract import TextFeatures
from lineage.vqvae.codec import HALF, Codec, interval
from lineage.vqvae.quantise import code_usage

EPSILON = 0.1  # pixels are kept this far from 0 and 1
SOONER = 30  # times as fast as tau falls, beta rises
FOLLOWED = 0.99  # decay of the average by which the codes' use is watched


@dataclass(frozen=True)
class DVAEConfig:
    """Sizes, under the authors' names in brackets.

    Attributes:
        codes: V [vocab_size].
        width: channels next to the picture [n_hid]; 2, 4 and 8 times as many deeper.
        start: channels after the decoder's first layer [n_init].
        blocks: of each group [n_blk_per_group].
        groups: of blocks [group_count]; between them the side halves or doubles.
        temperature: that tau falls to from 1, along a cosine.
        beta: that the KL term's weight rises to from 0, along a cosine.
        anneal: steps until tau has fallen.
        sharpest: floor of ln b, which is reached smoothly.
    """

    codes: int = 8192
    width: int = 256
    start: int = 128
    blocks: int = 2
    groups: int = 4
    temperature: float = 1 / 16
    beta: float = 6.6
    anneal: int = 150_000
    sharpest: float = -20.0

    def __post_init__(self) -> None:
        for name in ("codes", "start", "blocks", "groups", "anneal"):
            at_least(f"codec.{name}", getattr(self, name), 1)
        at_least("codec.width", self.width, 4)
        at_least("codec.beta", self.beta, 0)
        if not self.temperature > 0:
            raise UserError(f"codec.temperature={self.temperature} must be above 0.")

    @property
    def factor(self) -> int:
        """Pixels of a side of a place."""
        return int(2 ** (self.groups - 1))


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
    """Pictures to logits of codes; f is 8, with four groups."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        width = config.width
        self.input = conv(3, width, 7)
        widths = [width * 2**k for k in range(config.groups)]
        self.groups = nn.ModuleList(_groups(width, widths, (3, 3, 3, 1), config.blocks))
        self.output = conv(widths[-1], config.codes, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) of `map_pixels` -> logits (B, V, S / f, S / f)."""
        x = self.input(pixels)
        for number, group in enumerate(self.groups):
            x = group(x) if number == 0 else group(F.max_pool2d(x, 2))
        return self.output(F.relu(x))


class DVAEDecoder(nn.Module):
    """Mixtures of codes to a distribution of each pixel."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.input = conv(config.codes, config.start, 1)
        widths = [config.width * 2**k for k in reversed(range(config.groups))]
        self.groups = nn.ModuleList(_groups(config.start, widths, (1, 3, 3, 3), config.blocks))
        self.output = conv(widths[-1], 6, 1)

    def forward(self, mixture: Tensor) -> tuple[Tensor, Tensor]:
        """(B, V, H, W) shares that sum to 1 over V -> mu and ln b, (B, 3, f H, f W) each."""
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


def uniform_kl(logits: Tensor) -> Tensor:
    """KL of the codes' distributions (B, V, H, W) from the uniform one, summed over places, a mean
    over pictures.
    """
    log_q = logits.log_softmax(1)
    each = (log_q.exp() * (log_q + math.log(logits.shape[1]))).sum(1)  # (B, H, W)
    return each.sum(dim=(1, 2)).mean()


def cosine_way(start: float, end: float, share: float) -> float:
    """From `start` to `end` along half a cosine, `share` of the way; `end` after that."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


class DVAE(Codec):
    """DALL-E's codec: encoder, mixture, decoder."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.config, self.codes, self.factor = config, config.codes, config.factor
        self.encoder, self.decoder = DVAEEncoder(config), DVAEDecoder(config)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(config.codes))  # moving average, a step's
        self.steps: Tensor
        self.counts: Tensor

    def groups(self) -> dict[str, list[nn.Module]]:
        return {"codec": [self.encoder, self.decoder]}

    def losses(self, batch: Batch, text: TextFeatures, draws: NoiseStreams) -> Iterator[Turn]:
        """The bound on -ln p(x) with beta before its second term, for each pixel and channel."""
        config, share = self.config, int(self.steps) / self.config.anneal
        self.steps += 1
        temperature = cosine_way(1.0, config.temperature, share)
        beta = cosine_way(0.0, config.beta, share * SOONER)
        mapped = map_pixels((batch.image + 1) / 2)
        logits = self.encoder(mapped).float()
        uniform = draws.rand(*logits.shape[1:])
        mu, log_b = self._density(gumbel_mixture(logits, uniform, temperature))
        ids = logits.detach().argmax(1).flatten()
        self.counts.lerp_(torch.bincount(ids, minlength=self.codes).float(), 1 - FOLLOWED)
        watched = self.note(batch.image, 2 * unmap_pixels(mu.detach().sigmoid()) - 1)
        self.facts = {**watched, **code_usage(self.counts), "tau": mu.new_tensor(temperature)}
        density = logit_laplace_loss(mu, log_b, mapped)
        yield "codec", {"pixels": density, "kl": beta * uniform_kl(logits) / batch.image[0].numel()}

    def encode(self, image: Tensor) -> Tensor:
        return self.encoder(map_pixels((image + 1) / 2)).argmax(1)

    def _density(self, mixture: Tensor) -> tuple[Tensor, Tensor]:
        """mu and ln b, (B, 3, S, S) each, of shares (B, V, H, W)."""
        mu, log_b = self.decoder(mixture)
        floor = self.config.sharpest
        return mu.float(), floor + F.softplus(log_b.float() - floor)

    def _mixture(self, ids: Tensor) -> Tensor:
        """Codes (B, H, W) as shares of all or nothing."""
        return F.one_hot(ids, self.codes).movedim(3, 1).to(self.decoder.input.weight.dtype)

    def decode(self, ids: Tensor) -> Tensor:
        return 2 * unmap_pixels(self._density(self._mixture(ids))[0].sigmoid()) - 1

    def nats(self, image: Tensor, ids: Tensor) -> Tensor:
        """With the Laplace density of the pixels' logits gathered over the width of a byte."""
        mu, log_b = self._density(self._mixture(ids))
        edges = ((edge + 1) / 2 for edge in (image - HALF, image + HALF))
        below, above = ((map_pixels(e.clamp(0, 1)).logit() - mu) / log_b.exp() for e in edges)
        below = torch.where(image <= -1 + HALF, -torch.inf, below)
        above = torch.where(image >= 1 - HALF, torch.inf, above)
        return -interval(laplace_cdf, below, above)


def laplace_cdf(x: Tensor) -> Tensor:
    """Of the Laplace distribution with scale 1."""
    half = 0.5 * (-x.abs()).exp()
    return torch.where(x < 0, half, 1 - half)
