"""Codecs: pictures to grids of codes and back, under one contract; and the codes of a data set.

    Codec   `encode`, `decode`, `codes`, `factor`: `vqvae.py`, `dvae.py` and `vqgan.py` are three
    Codes   the stage between codec and prior: each picture's codes are found once and kept, and the
            codebook is audited on the way

A codec is trained on pictures alone; it reads no captions.

Axes: B pictures, K codes, H W places, S side, N = H W.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lineage.data.contract import Batch
from lineage.nn.memory import Memory
from lineage.nn.noise import NoiseStreams
from lineage.nn.vqgan_losses import psnr
from lineage.system import Trainable, Turn
from lineage.text.contract import NoText, TextFeatures
from lineage.vqvae.quantise import code_usage, usage_remark

DECAY = 0.99  # of the moving average of the squared error
HALF = 1 / 255  # of a byte's width, where pixels go from -1 to 1


class Codec(Trainable):
    """Pictures to codes and back.

    Attributes:
        codes: K, how many different codes there are.
        factor: pixels of a side of a code's place.
    """

    codes: int
    factor: int

    def __init__(self) -> None:
        super().__init__()
        self.text = NoText()
        self.register_buffer("error", torch.ones(()))  # squared, of a pixel in [-1, 1]
        self.register_buffer("noted", torch.zeros(()))  # steps that it was followed over
        self.error: Tensor
        self.noted: Tensor

    @abstractmethod
    def encode(self, image: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) in [-1, 1] -> (B, S / factor, S / factor) int64 codes."""

    @abstractmethod
    def decode(self, ids: Tensor) -> Tensor:
        """Codes (B, H, W) -> pictures (B, 3, factor H, factor W) in [-1, 1]."""

    def nats(self, image: Tensor, ids: Tensor) -> Tensor:
        """-ln p(picture | codes) of pictures whose pixels are bytes, (B,).

        Each is a Gaussian about the decoded pixel, with the variance that training left, gathered
        over the width of a byte; what lies beyond black and white belongs to these.
        """
        mean, deviation = self.decode(ids), self.error.clamp(min=1e-6).sqrt()
        below = torch.where(image <= -1 + HALF, -torch.inf, image - HALF)
        above = torch.where(image >= 1 - HALF, torch.inf, image + HALF)
        return -interval(normal_cdf, (below - mean) / deviation, (above - mean) / deviation)

    @torch.no_grad()
    def note(self, image: Tensor, decoded: Tensor) -> dict[str, Tensor]:
        """Follow the squared error in training; returns the PSNR of this step in dB, for the
        log.
        """
        error = (decoded.float().clamp(-1, 1) - image).square().mean()
        self.noted += 1
        self.error.lerp_(error, (1 / self.noted).clamp(min=1 - DECAY))  # at first a plain mean
        return {"psnr": psnr(error)}

    def remark(self, means: dict[str, float]) -> str:
        return usage_remark(means)


def normal_cdf(x: Tensor) -> Tensor:
    """Of the standard normal distribution; exact far out on the left."""
    return 0.5 * torch.erfc(-x / math.sqrt(2))


def interval(cdf: Any, below: Tensor, above: Tensor) -> Tensor:
    """ln(cdf(above) - cdf(below)), summed over all but the first axis: (B, ...) -> (B,).

    Of symmetric distributions: both are turned to the left, where small shares are not lost beside
    1.
    """
    right = below + above > 0
    low, high = torch.where(right, -above, below), torch.where(right, -below, above)
    return (cdf(high) - cdf(low)).clamp(min=1e-30).log().flatten(1).sum(1)


class Codes(Trainable):
    """The codes of the first `kept` pictures that it is shown; others are encoded when asked for.

    Nothing is learnt. What is kept is found by the pictures' names, so that a prior that sees each
    picture many times pays for the encoder once. An endless data set never shows one twice: there
    this stage is no more than the codebook's audit.

    Args:
        codec: trained; left as it is.
        size: S of the pictures.
        kept: how many pictures' codes to keep.
    """

    def __init__(self, codec: Codec, size: int, kept: int) -> None:
        super().__init__()
        self.codec, self.text = codec.requires_grad_(False), NoText()
        self.side = size // codec.factor
        self.memory = Memory(kept, (self.side**2,), torch.int32)
        self.register_buffer("uses", torch.zeros(codec.codes))
        self.uses: Tensor

    def train(self, mode: bool = True) -> Codes:
        """The codec stays in evaluation mode."""
        super().train(mode)
        self.codec.eval()
        return self

    def groups(self) -> dict[str, list[nn.Module]]:
        return {}

    @torch.no_grad()
    def losses(self, batch: Batch, text: TextFeatures, draws: NoiseStreams) -> Iterator[Turn]:
        """Find and keep the batch's codes. There is nothing to minimise, so nothing is yielded."""
        ids = self._found(batch.image)
        self.memory.keep(batch.id, ids.flatten(1))
        self.uses += torch.bincount(ids.flatten(), minlength=len(self.uses))
        if self.watched:
            error = (self.codec.decode(ids).float().clamp(-1, 1) - batch.image).square().mean()
            self.facts = {"psnr": psnr(error), **code_usage(self.uses)}
        yield from ()

    def remark(self, means: dict[str, float]) -> str:
        return usage_remark(means)

    def _found(self, image: Tensor) -> Tensor:
        """In full precision, in which codes are decided wherever else they are asked for."""
        with torch.autocast(image.device.type, enabled=False):
            return self.codec.encode(image)

    @torch.no_grad()
    def of(self, batch: Batch) -> Tensor:
        """The codes (B, H, W) of a batch, from memory where they are known."""
        found = self.memory.recall(batch.id)
        if found is None:
            return self._found(batch.image)
        return found.long().unflatten(1, (self.side, self.side)).to(batch.image.device)
