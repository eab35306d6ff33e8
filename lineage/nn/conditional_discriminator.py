"""The matching-aware discriminator of StackGAN (Zhang et al. 2017, arXiv:1612.03242) and of its
successors.

It scores pairs of picture and caption: high only for a real picture with its own caption. The
condition joins the features of the picture as late as at 4 x 4, so that one picture is encoded once
for all its captions.

Axes: B pictures, C width of the condition, G channels of the features, S side.
"""

from __future__ import annotations

import torch
from einops import repeat
from torch import Tensor, nn

from lineage.nn.blocks import conv3x3, num_doublings
from lineage.nn.gan import apply_spectral_norm


class ConditionalDiscriminator(nn.Module):
    """Picture and condition -> logit; a real picture with its own caption is high.

    Args:
        channels: Number of channels next to the picture. They double as the side halves; the 4 x 4
            features have eight times as many (G).
        cond_dim: Width C of the condition.
        side: Side S of the pictures.
        unconditional: If true, there is a second head that scores pictures without captions.
        norm: `batch`, or `spectral` in its place.
    """

    def __init__(
        self, channels: int, cond_dim: int, side: int, unconditional: bool, norm: str = "batch"
    ) -> None:
        super().__init__()
        feature_channels = 8 * channels

        def normed(conv: nn.Conv2d) -> list[nn.Module]:
            norms = [nn.BatchNorm2d(conv.out_channels)] if norm == "batch" else []
            return [conv, *norms, nn.LeakyReLU(0.2)]

        layers: list[nn.Module] = [
            nn.Conv2d(3, channels, 4, stride=2, padding=1, bias=False),
            nn.LeakyReLU(0.2),
        ]
        for _ in range(num_doublings(4, side) - 1):
            layers += normed(nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1, bias=False))
            channels *= 2
        while channels > feature_channels:
            layers += normed(conv3x3(channels, channels // 2))
            channels //= 2
        self.encode_img = nn.Sequential(*layers)
        self.cond_head = nn.Sequential(
            *normed(conv3x3(channels + cond_dim, channels)), nn.Conv2d(channels, 1, 4, stride=4)
        )
        self.uncond_head = nn.Conv2d(channels, 1, 4, stride=4) if unconditional else None
        if norm == "spectral":
            apply_spectral_norm(self)

    def features(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, G, 4, 4)."""
        return self.encode_img(image)

    def cond_logits(self, features: Tensor, cond: Tensor) -> Tensor:
        """(B, G, 4, 4), (B, C) -> logits (B,) of pictures with their captions."""
        cond = repeat(cond, "b c -> b c 4 4")
        return self.cond_head(torch.cat([features, cond], dim=1)).flatten()

    def uncond_logits(self, features: Tensor) -> Tensor:
        """(B, G, 4, 4) -> logits (B,) of pictures alone."""
        assert self.uncond_head is not None
        return self.uncond_head(features).flatten()
