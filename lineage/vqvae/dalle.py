"""The discrete VAE of DALL-E, its codec (Ramesh et al. 2021, arXiv:2102.12092, section 2.1 and
appendix A). Its transformer is `ar_prior.py`.

The problem: the choice of a code has no gradient. What is new: the encoder gives a distribution
over the codes of each grid cell, and the decoder gets a soft mixture of them, which is sharpened as
training goes on (the Gumbel-softmax relaxation). No gradient is copied, and no code is left behind
by its encoder. And pixels, which end at 0 and 1, get a density that does so too.

    appendix A.1   residual blocks without norms                        `DVAEEncoder`, `DVAEDecoder`
    appendix A.2   softmax((logits + g) / tau), g = -ln(-ln u)                      `gumbel_softmax`
                   -ln f(x) + beta KL(q || uniform), tau from 1 to 1/16,
                   beta from 0 to 6.6                                                  `DVAE.losses`
    appendix A.3   f(x | mu, b) = exp(-|logit(x) - mu| / b) / (2 b x (1 - x))
                   (logit-Laplace)                `logit_laplace_loss`, `map_pixels`, `unmap_pixels`

The KL term is divided by the number of pixels and channels, as the density of the pixels is, so
that beta = 1 is the bound on -ln p(x).

Departures: both schedules end after `anneal_steps` (the paper: 150,000 steps for tau, 5,000 for
beta; here beta rises in a thirtieth of tau's steps); small pictures may have fewer groups; ln b may
have a lower bound, because the density of pixels that repeat exactly, as in drawings, has none.

Axes: B pictures, K codes, H W grid of codes, S side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lineage.bounds import (
    Depth,
    Dim,
    Float,
    Halvings,
    Int,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
)
from lineage.config import configuration
from lineage.data.contract import Batch
from lineage.nn.fast import channels_last_on_cpu
from lineage.nn.noise import NoiseStreams
from lineage.nn.vqgan_losses import psnr
from lineage.system import Turn
from lineage.text.contract import TextFeatures
from lineage.vqvae.codec import HALF_STEP, Codec, log_interval_probability
from lineage.vqvae.quantise import codebook_usage

LOGIT_LAPLACE_EPS = 0.1
"""Distance that pixels keep from 0 and 1."""
KL_SPEED = 30
"""Number of times that beta's schedule is faster than tau's."""
COUNTS_DECAY = 0.99
"""Decay of the moving average of how often each code is used."""


@configuration
class DVAEConfig:
    """Sizes and schedules, under the authors' names in brackets.

    Attributes:
        num_codes: K, number of codes [vocab_size].
        hidden_channels: Number of channels of the first group; the others have 2, 4 and 8 times as
            many [n_hid].
        init_channels: Number of channels after the decoder's first layer [n_init].
        blocks_per_group: Number of residual blocks of a group [n_blk_per_group].
        num_groups: Number of groups; the side halves or doubles between two [group_count].
        final_temperature: Temperature tau at the end of its cosine schedule, which starts at 1.
        kl_weight: Weight beta of the KL term at the end of its cosine schedule, which starts at 0.
        anneal_steps: Number of steps of tau's schedule.
        min_log_b: Lower bound of ln b, reached smoothly.
    """

    num_codes: PositiveInt = 8192
    hidden_channels: Annotated[Int, Field(ge=4, le=2**16)] = 256
    init_channels: Dim = 128
    blocks_per_group: Depth = 2
    num_groups: Halvings = 4
    final_temperature: PositiveFloat = 1 / 16
    kl_weight: NonNegativeFloat = 6.6
    anneal_steps: PositiveInt = 150_000
    min_log_b: Float = -20.0

    @property
    def factor(self) -> int:
        """Number of pixels on a side of one grid cell."""
        return int(2 ** (self.num_groups - 1))

    @property
    def group_channels(self) -> list[int]:
        """Number of channels of each group of the encoder."""
        return [self.hidden_channels * 2**group for group in range(self.num_groups)]


# --- appendix A.1: networks -----------------------------------------------------------------------

Kernels = tuple[int, int, int, int]
ENCODER_KERNELS: Kernels = (3, 3, 3, 1)
DECODER_KERNELS: Kernels = (1, 3, 3, 3)


def same_conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv2d:
    """A convolution that keeps the side, with weights from N(0, 1 / fan-in) and zero bias."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=(kernel_size - 1) // 2)
    nn.init.normal_(conv.weight, std=(in_channels * kernel_size**2) ** -0.5)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


class DVAEBlock(nn.Module):
    """id_path(x) + post_gain * res_path(x), with four convolutions in the residual path.

    Args:
        in_channels, out_channels: Number of channels; the residual path has a quarter inside.
        kernels: Sizes of the four kernels.
        post_gain: Factor on the residual path: one over the squared number of blocks.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernels: Kernels, post_gain: float
    ) -> None:
        super().__init__()
        self.post_gain = post_gain
        same = in_channels == out_channels
        self.id_path = nn.Identity() if same else same_conv(in_channels, out_channels, 1)
        hidden = out_channels // 4
        channels = (in_channels, hidden, hidden, hidden, out_channels)
        layers: list[nn.Module] = []
        for a, b, kernel_size in zip(channels, channels[1:], kernels, strict=False):
            layers += [nn.ReLU(), same_conv(a, b, kernel_size)]
        self.res_path = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        return self.id_path(x) + self.post_gain * self.res_path(x)


def block_groups(
    in_channels: int, group_channels: list[int], kernels: Kernels, blocks_per_group: int
) -> nn.ModuleList:
    """Groups of `blocks_per_group` blocks, each group with its own number of channels."""
    post_gain = 1 / (len(group_channels) * blocks_per_group) ** 2
    groups = nn.ModuleList()
    for channels in group_channels:
        group = nn.Sequential()
        for _ in range(blocks_per_group):
            group.append(DVAEBlock(in_channels, channels, kernels, post_gain))
            in_channels = channels
        groups.append(group)
    return groups


class DVAEEncoder(nn.Module):
    """Pictures to logits of codes; the factor f is 8 with four groups."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        channels = config.group_channels
        self.input = same_conv(3, channels[0], 7)
        self.groups = block_groups(channels[0], channels, ENCODER_KERNELS, config.blocks_per_group)
        self.output = same_conv(channels[-1], config.num_codes, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) of `map_pixels` -> logits (B, K, S / f, S / f)."""
        x = self.input(channels_last_on_cpu(pixels, norms=False))
        for number, group in enumerate(self.groups):
            x = group(x) if number == 0 else group(F.max_pool2d(x, 2))
        return self.output(F.relu(x))


class DVAEDecoder(nn.Module):
    """Mixtures of codes to a distribution of each pixel."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        channels = config.group_channels[::-1]
        self.input = same_conv(config.num_codes, config.init_channels, 1)
        self.groups = block_groups(
            config.init_channels, channels, DECODER_KERNELS, config.blocks_per_group
        )
        self.output = same_conv(channels[-1], 6, 1)

    def forward(self, mixture: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (B, K, H, W) -> mu and ln b, (B, 3, f H, f W) each."""
        x = self.input(channels_last_on_cpu(mixture, norms=False))
        for number, group in enumerate(self.groups):
            x = group(x if number == 0 else F.interpolate(x, scale_factor=2, mode="nearest"))
        mu, log_b = self.output(F.relu(x)).chunk(2, dim=1)
        return mu, log_b


# --- appendices A.2 and A.3: relaxation, density --------------------------------------------------


def gumbel_softmax(logits: Tensor, u: Tensor, temperature: float) -> Tensor:
    """softmax((logits + g) / tau) over the codes, with g = -ln(-ln u).

    A sample of the codes that has a gradient; the lower the temperature, the closer to one code.

    Args:
        logits: Logits of the codes (B, K, H, W).
        u: Uniform random numbers (B, K, H, W).
        temperature: Temperature tau.
    """
    tiny = torch.finfo(u.dtype).tiny
    gumbel = -(-u.clamp(min=tiny).log()).clamp(min=tiny).log()
    return ((logits + gumbel) / temperature).softmax(1)


def map_pixels(image: Tensor) -> Tensor:
    """Pixels in [0, 1] -> [eps, 1 - eps], so that their logits are finite."""
    return (1 - 2 * LOGIT_LAPLACE_EPS) * image + LOGIT_LAPLACE_EPS


def unmap_pixels(mapped: Tensor) -> Tensor:
    """Inverse of `map_pixels`, clamped to [0, 1]."""
    return ((mapped - LOGIT_LAPLACE_EPS) / (1 - 2 * LOGIT_LAPLACE_EPS)).clamp(0, 1)


def logit_laplace_loss(mu: Tensor, log_b: Tensor, mapped: Tensor) -> Tensor:
    """Equation 2: -ln f(x | mu, b) = ln(2 b x (1 - x)) + |logit(x) - mu| / b.

    A mean over pixels and channels; `mapped` holds the pixels x (B, 3, S, S) in (0, 1).
    """
    log_volume = (2 * mapped * (1 - mapped)).log()
    return (log_b + log_volume + (mapped.logit() - mu).abs() * (-log_b).exp()).mean()


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL(q || uniform) of the codes' distributions (B, K, H, W), a sum over cells, a mean over
    pictures.
    """
    log_q = logits.log_softmax(1)
    kl = (log_q.exp() * (log_q + math.log(logits.shape[1]))).sum(1)  # (B, H, W)
    return kl.sum(dim=(1, 2)).mean()


def cosine_schedule(start: float, end: float, progress: float) -> float:
    """From `start` to `end` along half a cosine as `progress` goes from 0 to 1; then `end`."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class DVAE(Codec):
    """Encoder, Gumbel-softmax mixture, decoder.

    Attributes:
        code_counts: (K,) moving average of how often each code is used in a step.
    """

    step: Tensor
    code_counts: Tensor

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.config, self.factor, self.num_codes = config, config.factor, config.num_codes
        self.encoder, self.decoder = DVAEEncoder(config), DVAEDecoder(config)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("code_counts", torch.zeros(config.num_codes))

    def groups(self) -> dict[str, list[nn.Module]]:
        return {"codec": [self.encoder, self.decoder]}

    def losses(
        self, batch: Batch, text: TextFeatures | None, noise: NoiseStreams
    ) -> Iterator[Turn]:
        """The bound on -ln p(x) per pixel and channel, with weight beta on the KL term."""
        config, progress = self.config, int(self.step) / self.config.anneal_steps
        self.step += 1
        tau = cosine_schedule(1.0, config.final_temperature, progress)
        beta = cosine_schedule(0.0, config.kl_weight, progress * KL_SPEED)

        pixels = map_pixels((batch.image + 1) / 2)
        logits = self.encoder(pixels).float()
        u = noise.rand(*logits.shape[1:])
        mu, log_b = self._density(gumbel_softmax(logits, u, tau))

        ids = logits.detach().argmax(1).flatten()
        counts = torch.bincount(ids, minlength=self.num_codes).float()
        self.code_counts.lerp_(counts, 1 - COUNTS_DECAY)
        mse = self.track_mse(batch.image, self._picture(mu.detach()))
        kl = kl_to_uniform(logits) / batch.image[0].numel()
        yield Turn(
            "codec",
            {"pixels": logit_laplace_loss(mu, log_b, pixels), "kl": beta * kl},
            metrics=lambda: {
                "psnr": psnr(mse),
                "temperature": mu.new_tensor(tau),
                **codebook_usage(self.code_counts),
            },
        )

    def encode(self, image: Tensor) -> Tensor:
        return self.encoder(map_pixels((image + 1) / 2)).argmax(1)

    def decode(self, ids: Tensor) -> Tensor:
        return self._picture(self._density(self._one_hot(ids))[0])

    def _one_hot(self, ids: Tensor) -> Tensor:
        """Codes (B, H, W) -> probabilities (B, K, H, W)."""
        return F.one_hot(ids, self.num_codes).movedim(3, 1).to(self.decoder.input.weight.dtype)

    def _density(self, mixture: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (B, K, H, W) -> mu and ln b, (B, 3, S, S) each."""
        mu, log_b = self.decoder(mixture)
        floor = self.config.min_log_b
        return mu.float(), floor + F.softplus(log_b.float() - floor)

    def _picture(self, mu: Tensor) -> Tensor:
        """mu -> pictures in [-1, 1]."""
        return 2 * unmap_pixels(mu.sigmoid()) - 1

    def nll(self, image: Tensor, ids: Tensor) -> Tensor:
        """-ln p(image | ids): the Laplace density of the logits over the width of a byte."""
        mu, log_b = self._density(self._one_hot(ids))
        edges = ((edge + 1) / 2 for edge in (image - HALF_STEP, image + HALF_STEP))
        low, high = ((map_pixels(e.clamp(0, 1)).logit() - mu) / log_b.exp() for e in edges)
        low = torch.where(image <= -1 + HALF_STEP, -torch.inf, low)
        high = torch.where(image >= 1 - HALF_STEP, torch.inf, high)
        return -log_interval_probability(laplace_cdf, low, high)


def laplace_cdf(x: Tensor) -> Tensor:
    """Cumulative distribution of the Laplace distribution with scale 1."""
    tail = 0.5 * (-x.abs()).exp()
    return torch.where(x < 0, tail, 1 - tail)
