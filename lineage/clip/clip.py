"""`clip`: contrastive language-image pre-training (Radford et al. 2021, arXiv:2103.00020).

The problem: a classifier knows the classes that it was trained on, and no others. CLIP learns from
captions instead. An image tower and a text tower map pictures and captions into one space; in a
batch of B pairs each picture is to be nearest to its own caption, and each caption to its own
picture. A class is then a caption ("a photo of a dog"), and any set of captions is a classifier. In
this history CLIP is the text tower of Stable Diffusion, the scorer of half of the metrics, and,
with VQGAN+CLIP and CLIPDraw, the judge whose gradient draws pictures.

    section 2.3, figure 3   cosines times a learnt scale, cross-entropy along rows and columns:
                            InfoNCE (van den Oord et al. 2018)                `contrastive_loss`
    section 2.4             image towers                                      `image_towers.py`
                            text tower                        any text encoder; `text/clip_text.py`
    section 2.5             scale exp(s), s learnt from ln(1 / 0.07), at most ln 100    `CLIP.scale`
    section 3.1.2           a classifier from captions                        `CLIP.classifier`
    section 3.1.4           prompt ensembles: the mean of unit vectors        `CLIP.classifier`

Departures from the paper, each with the setting that takes it back:
    Pairs with the same caption, or of the same picture, are no negatives of each other: if ten
    pictures of a batch have the caption "a red circle", it is true of all ten.
    Each picture has one more negative, its caption with words of place exchanged (`opposites.py`;
    model.spatial_negatives=false).
    Pictures are blurred and made noisy at random, so that the pictures of a weak generator are
    compared fairly (model.degrade=false); the paper crops them at random, which would make "on the
    left" false.
    A text encoder whose sentence is not as wide as the joint space gets a linear layer.
    Several processes each contrast their own part of a batch.

Axes: B pairs, S side, L words, P width of the joint space, H W places, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.bounds import Dim, NonNegativeFloat, PositiveFloat
from lineage.clip.image_towers import ModifiedResNet, ResNetConfig, VisionTransformer, ViTConfig
from lineage.config import configuration
from lineage.data.contract import Batch
from lineage.nn.noise import NoiseStreams
from lineage.system import Trainable, Turn
from lineage.text.contract import TextEncoder, TextFeatures
from lineage.text.opposites import opposite

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the paper's pictures in [0, 1], by channel."""


@configuration
class CLIPConfig:
    """A CLIP; the defaults are those of ViT-B/32.

    Attributes:
        projection_dim: Width of the joint space.
        image: Kind of image tower: `vit` or `resnet`.
        vit: Sizes of the vision transformer.
        resnet: Sizes of the ResNet.
        temperature: Initial temperature, the inverse of the scale.
        max_scale: Largest scale of the cosines.
        spatial_negatives: If true, captions with opposite words of place are negatives too.
        degrade: Largest standard deviation of the noise on pictures in [-1, 1], which are also
            blurred at random; 0 leaves pictures as they are.
    """

    projection_dim: Dim = 512
    image: Literal["vit", "resnet"] = "vit"
    vit: ViTConfig = field(default_factory=ViTConfig)
    resnet: ResNetConfig = field(default_factory=ResNetConfig)
    temperature: PositiveFloat = 0.07
    max_scale: PositiveFloat = 100.0
    spatial_negatives: bool = True
    degrade: NonNegativeFloat = 0.15


class CLIP(Trainable):
    """Two towers and a scale.

    Args:
        config: Sizes of the image tower, and how it is trained.
        text: The text tower: any text encoder.
        size: S, side of the image tower's input in pixels.

    Attributes:
        embed_dim: P.
    """

    text: TextEncoder

    def __init__(self, config: CLIPConfig, text: TextEncoder, size: int) -> None:
        super().__init__()
        self.config, self.size, self.embed_dim = config, size, config.projection_dim
        self.text = text
        self.image_tower: VisionTransformer | ModifiedResNet
        if config.image == "vit":
            self.image_tower = VisionTransformer(config.vit, size, self.embed_dim)
        else:
            self.image_tower = ModifiedResNet(config.resnet, size, self.embed_dim)
        fits = text.sentence_dim == self.embed_dim
        self.sentence_proj: nn.Module = nn.Identity()
        if not fits:
            self.sentence_proj = nn.Linear(text.sentence_dim, self.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    # --- embeddings ---------------------------------------------------------------------------

    def normalise(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, any, any) in [-1, 1] -> (B, 3, S, S), as the image tower takes them."""
        if images.shape[-2:] != (self.size, self.size):
            side = (self.size, self.size)
            images = F.interpolate(images, side, mode="bilinear", antialias=True)
        return ((images + 1) / 2 - self.mean) / self.std

    def encode_image(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, any, any) in [-1, 1] -> (B, P), not normalised."""
        embedded: Tensor = self.image_tower(self.normalise(images))
        return embedded

    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """B captions -> (B, P), not normalised."""
        return self.project(self.text.encode(list(captions)))

    def project(self, text: TextFeatures) -> Tensor:
        """Features of B captions -> (B, P)."""
        projected: Tensor = self.sentence_proj(text.sentence)
        return projected

    def scale(self) -> Tensor:
        """Factor of the cosines, a scalar."""
        return self.logit_scale.clamp(max=math.log(self.config.max_scale)).exp()

    # --- training -----------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        return {"clip": [self]}

    def losses(self, batch: Batch, text: TextFeatures, noise: NoiseStreams) -> Iterator[Turn]:
        with torch.no_grad():  # a bound in the graph alone would end its gradient for good
            self.logit_scale.clamp_(max=math.log(self.config.max_scale))
        pictures = self.degraded(batch.image, noise) if self.config.degrade else batch.image
        image = F.normalize(self.encode_image(pictures), dim=-1)  # (B, P)
        words = F.normalize(self.project(text), dim=-1)  # (B, P)
        captions, ids = np.array(batch.caption), np.array(batch.id)
        same = (captions[:, None] == captions) | (ids[:, None] == ids)
        others = torch.from_numpy(same & ~np.eye(len(ids), dtype=bool)).to(image.device)
        scale = self.scale()
        logits = scale * image @ words.T  # (B, B)
        per_image = self._with_opposites(logits, image, batch.caption, scale)
        yield Turn(
            "clip",
            {"contrastive": contrastive_loss(logits, others, per_image)},
            metrics=lambda: {
                "accuracy": accuracy(logits, others),
                "scale": scale,
            },
        )

    def _with_opposites(
        self, logits: Tensor, image: Tensor, captions: list[str], scale: Tensor
    ) -> Tensor:
        """`logits` (B, B) with one more column: each picture's own caption, made false."""
        false = [opposite(c) if self.config.spatial_negatives else None for c in captions]
        rows = [row for row, caption in enumerate(false) if caption is not None]
        if not rows:
            return logits
        words = F.normalize(self.encode_text([c for c in false if c is not None]), dim=-1)
        column = logits.new_full((len(logits),), -torch.inf)
        cosines = (image[rows] * words).sum(1)
        column = column.index_put(
            (torch.tensor(rows, device=logits.device),), (scale * cosines).to(logits.dtype)
        )
        return torch.cat([logits, column[:, None]], dim=1)

    def degraded(self, images: Tensor, noise: NoiseStreams) -> Tensor:
        """(B, 3, S, S) in [-1, 1], as a weak generator might draw them: half of the pictures
        blurred, by way of a half or three quarters of the pixels, all with noise.
        """
        side = images.shape[-1]
        pick, sigma = noise.rand(1, 1, 1), self.config.degrade * noise.rand(1, 1, 1)
        for share, below in ((0.75, 0.5), (0.5, 0.25)):
            small = F.interpolate(
                images, (max(1, round(share * side)),) * 2, mode="bilinear", antialias=True
            )
            blurred = F.interpolate(small, (side, side), mode="bilinear", antialias=True)
            images = torch.where(pick < below, blurred, images)
        return images + sigma * noise.randn(*images.shape[1:])

    # --- what it is for -----------------------------------------------------------------------

    @torch.no_grad()
    def similarity(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosines of B pictures (B, 3, any, any) in [-1, 1] and K captions, (B, K)."""
        image, text = self.encode_image(images), self.encode_text(captions)
        return F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T

    @torch.no_grad()
    def classifier(
        self, names: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)
    ) -> Tensor:
        """A zero-shot classifier, (K, P) unit vectors of K classes.

        Args:
            names: Names of the classes.
            templates: Captions with a `{}` for the name; the vectors of all are averaged.
        """
        parts = [self.encode_text([t.format(name) for name in names]) for t in templates]
        mean = torch.stack([F.normalize(part, dim=-1) for part in parts]).mean(0)
        return F.normalize(mean, dim=-1)

    @torch.no_grad()
    def similarity_map(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosines of each place of B pictures with the caption of the same row, (B, H, W)."""
        places = F.normalize(self.image_tower.places(self.normalise(images)), dim=1)
        text = F.normalize(self.encode_text(captions), dim=-1)
        return torch.einsum("bphw,bp->bhw", places, text)


def accuracy(logits: Tensor, same: Tensor) -> Tensor:
    """Share of pictures whose own caption fits best, a scalar; arguments as in `contrastive_loss`.

    Other pairs with the same caption do not count.
    """
    best = logits.masked_fill(same, -torch.inf).argmax(1)
    return (best == torch.arange(len(best), device=best.device)).float().mean()


def contrastive_loss(logits: Tensor, same: Tensor, per_image: Tensor | None = None) -> Tensor:
    """The symmetric cross-entropy of Radford et al. 2021, figure 3, a scalar.

    Args:
        logits: (B, B) scaled cosines, pictures along rows.
        same: (B, B) True for pairs off the diagonal that are no negatives of each other.
        per_image: (B, B + M) logits of each picture with M more captions; `logits` if None.
    """
    target = torch.arange(len(logits), device=logits.device)
    per_image = logits if per_image is None else per_image
    more = per_image.shape[1] - logits.shape[1]
    rows = per_image.masked_fill(F.pad(same, (0, more)), -torch.inf)
    columns = logits.masked_fill(same, -torch.inf).T
    return (F.cross_entropy(rows, target) + F.cross_entropy(columns, target)) / 2
