"""DAMSM, the deep attentional multimodal similarity model (Xu et al. 2018, arXiv:1711.10485,
section 3.2).

It measures how well a picture fits a caption, word by word: each word attends to its regions, and
the similarities of words and regions are summed up. It is trained before AttnGAN, on real pairs.
Its loss then trains the generator, and R-precision uses it to test whether a picture retrieves its
own caption among others.

    text encoder    any of `lineage/text`; the paper's is `lstm`
    image encoder   `RegionEncoder`, small and trained along, or the paper's `InceptionRegions`
    eq. 7 to 9      `region_attention`, `region_contexts`
    eq. 10          `word_similarity`
    eq. 11 to 13    `matching_losses`, `damsm_terms`

With words e_i and regions v_j, the context c_i of a word, and picture Q and caption D:

    s_ij = e_i^T v_j                                                                 (eq. 7)
    s'_ij = exp(s_ij) / sum_k exp(s_kj)                        softmax over words    (eq. 8)
    c_i = sum_j alpha_j v_j,  alpha_j ~ exp(gamma_1 s'_ij)     softmax over regions  (eq. 9)
    R(Q, D) = log(sum_i exp(gamma_2 cos(c_i, e_i)))                                  (eq. 10)
    P(D_i | Q_i) = exp(gamma_3 R(Q_i, D_i)) / sum_j exp(gamma_3 R(Q_i, D_j))         (eq. 11)
    L_1 = -mean log P(D_i | Q_i),  L_2 = -mean log P(Q_i | D_i)                      (eq. 12, 13)

The DAMSM loss is L_1 + L_2 for words, plus the same for sentences, where R is the cosine of the
global image vector and the sentence.

Where the authors' code differs from the paper, this file follows the code. The outer power
1 / gamma_2 of equation 10 is left out. Cosines divide by at least 1e-8. gamma_3 multiplies both
similarities.

Departures: pairs with the same caption are no rivals, as well as (`same` = class) those of one
class; `RegionEncoder`.

Axes: B pictures or captions (I and J where they meet), L words, N regions, D width, S side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lineage.bounds import Dim, PositiveFloat
from lineage.config import configuration
from lineage.data.contract import Batch
from lineage.errors import UserError
from lineage.nn.blocks import conv3x3
from lineage.nn.fast import squared_lengths
from lineage.nn.inception import SIDE, InceptionV3, load_inception
from lineage.nn.noise import NoiseStreams
from lineage.system import Trainable, Turn
from lineage.text.contract import TextEncoder, TextFeatures


@configuration
class DAMSMConfig:
    """Smoothing factors under the paper's names, and the image encoder.

    Attributes:
        gamma1: Sharpness of a word's attention to regions.
        gamma2: Sharpness of the sum over words: the larger, the more the best word counts.
        gamma3: Factor on similarities before the softmax over pairs.
        image_encoder: `conv`, or `inception` as in the paper.
        image_channels: Number of channels of `conv` next to the picture.
        grid_size: Number of regions of `conv` per side.
        inception_weights: File with the published weights of `inception`; random weights if empty.
        same: Pairs that are no rivals beside those of one caption: of the same `class`, or none
            (`caption`), which is right where a class says less than a caption.
    """

    gamma1: PositiveFloat = 4.0
    gamma2: PositiveFloat = 5.0
    gamma3: PositiveFloat = 10.0
    image_encoder: Literal["conv", "inception"] = "inception"
    image_channels: Dim = 32
    grid_size: Dim = 8
    inception_weights: str = ""
    same: Literal["class", "caption"] = "class"


# --- image encoders -------------------------------------------------------------------------------


@dataclass
class ImageFeatures:
    """Counterpart of `TextFeatures` for pictures.

    Attributes:
        regions: (B, N, Dw) v, one vector a region, row by row.
        global_vector: (B, Ds) v-bar, one vector a picture.
    """

    regions: Tensor
    global_vector: Tensor


class RegionEncoder(nn.Module):
    """A small convolutional network that is trained with the text.

    It halves the side down to the grid of regions. From there it halves it to 4 x 4, and a linear
    layer on all of these gives the global vector, which therefore distinguishes left from right.

    Args:
        size: Side S of the pictures; pictures of other sizes are resized.
        word_dim, sentence_dim: Widths of region and global vectors.
        channels: Number of channels next to the picture.
        grid_size: Number of regions per side.
    """

    def __init__(
        self, size: int, word_dim: int, sentence_dim: int, channels: int, grid_size: int
    ) -> None:
        super().__init__()
        factor = size // grid_size
        if size % grid_size or factor & (factor - 1) or grid_size < 4 or size == grid_size:
            raise UserError(
                f"damsm.grid_size={grid_size} does not come from {size} pixels by halving; "
                f"try {size // 4}."
            )
        self.size = size

        def halve(in_channels: int, out_channels: int) -> list[nn.Module]:
            conv = nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(out_channels), nn.LeakyReLU(0.2)]

        layers, side = halve(3, channels), size // 2
        while side > grid_size:
            layers += halve(channels, 2 * channels)
            channels, side = 2 * channels, side // 2
        layers += [conv3x3(channels, channels), nn.BatchNorm2d(channels), nn.LeakyReLU(0.2)]
        self.to_grid = nn.Sequential(*layers)
        self.to_regions = nn.Conv2d(channels, word_dim, 1, bias=False)
        layers = []
        while side > 4:
            layers += halve(channels, 2 * channels)
            channels, side = 2 * channels, side // 2
        to_global = nn.Linear(channels * side**2, sentence_dim)
        self.to_global = nn.Sequential(*layers, nn.Flatten(), to_global)

    def forward(self, image: Tensor) -> ImageFeatures:
        """(B, 3, S, S) in [-1, 1] -> regions (B, grid_size^2, Dw), global vector (B, Ds)."""
        if image.shape[-1] != self.size:
            image = F.interpolate(image, (self.size, self.size), mode="bilinear", antialias=True)
        grid = self.to_grid(image)
        regions = rearrange(self.to_regions(grid), "b d h w -> b (h w) d")
        return ImageFeatures(regions, self.to_global(grid))


class RegionHeads(nn.Module):
    """Equation 6: linear layers on each place of Inception v3, and on its pooled output."""

    def __init__(self, word_dim: int, sentence_dim: int) -> None:
        super().__init__()
        self.emb_features = nn.Conv2d(768, word_dim, 1, bias=False)
        self.emb_cnn_code = nn.Linear(2048, sentence_dim)
        for layer in (self.emb_features, self.emb_cnn_code):
            nn.init.uniform_(layer.weight, -0.1, 0.1)

    def forward(self, grid: Tensor, pooled: Tensor) -> ImageFeatures:
        """(B, 768, H, W), (B, 2048) -> regions (B, H W, Dw), global vector (B, Ds)."""
        regions = rearrange(self.emb_features(grid), "b d h w -> b (h w) d")
        return ImageFeatures(regions, self.emb_cnn_code(pooled))


class InceptionRegions(nn.Module):
    """The paper's image encoder: `RegionHeads` on an Inception v3 that is not trained.

    Args:
        word_dim, sentence_dim: Widths of region and global vectors.
        weights: File with the published weights; random weights if empty.
    """

    def __init__(self, word_dim: int, sentence_dim: int, weights: str = "") -> None:
        super().__init__()
        path = Path(weights)
        self.inception = load_inception(path, "imagenet") if weights else InceptionV3("imagenet")
        self.inception.requires_grad_(False)
        self.inception.fc = cast(Any, nn.Identity())  # the classes are not used
        self.heads = RegionHeads(word_dim, sentence_dim)

    def train(self, mode: bool = True) -> InceptionRegions:
        """Inception stays in evaluation mode."""
        super().train(mode)
        self.inception.eval()
        return self

    def forward(self, image: Tensor) -> ImageFeatures:
        """(B, 3, S, S) in [-1, 1] -> regions (B, 289, Dw), global vector (B, Ds)."""
        image = F.interpolate(image, (SIDE, SIDE), mode="bilinear", align_corners=True)
        features = self.inception(image)
        return self.heads(features.regions, features.pooled)


# --- equations 7 to 10 ----------------------------------------------------------------------------


def region_attention(
    words: Tensor, mask: Tensor, regions: Tensor, gamma1: float
) -> tuple[Tensor, Tensor]:
    """Attention of each word of each caption to the regions of each picture.

    Args:
        words: (J, L, D) words e of J captions.
        mask: (J, L) True where there is a word.
        regions: (I, N, D) regions v of I pictures.

    Returns:
        Scores s and attention alpha, (I, J, L, N) each; alpha sums to 1 over N. On padding they
        are undefined.
    """
    scores = torch.einsum("jld,ind->ijln", words, regions)  # equation 7
    over_words = scores.masked_fill(~mask[None, :, :, None], -torch.inf).softmax(2)  # equation 8
    return scores, (gamma1 * over_words).softmax(3)  # equation 9


def region_contexts(
    words: Tensor, mask: Tensor, regions: Tensor, gamma1: float
) -> tuple[Tensor, Tensor]:
    """Contexts c of equation 9, (I, J, L, D), and the attention (I, J, L, N)."""
    _, attention = region_attention(words, mask, regions, gamma1)
    return torch.einsum("ijln,ind->ijld", attention, regions), attention


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of the angle between (..., D) and (..., D) -> (...)."""
    norms = x.norm(dim=-1) * y.norm(dim=-1)
    return (x * y).sum(-1) / norms.clamp(min=1e-8)


def word_similarity(config: DAMSMConfig, words: Tensor, mask: Tensor, regions: Tensor) -> Tensor:
    """Equation 10 of every picture i with every caption j: (I, J).

    The contexts c = sum_n alpha_n v_n are not computed: their product with a word e is
    sum_n alpha_n s_n, of the scores s_n = <v_n, e>, and their squared length alpha^T (v v^T) alpha.
    """
    words, regions = words.float(), regions.float()
    with torch.autocast(words.device.type, enabled=False):  # lengths of sums may cancel
        scores, attention = region_attention(words, mask, regions, config.gamma1)
        products = (attention * scores).sum(3)  # (I, J, L)
        gram = regions @ regions.mT  # (I, N, N)
        squares = squared_lengths(attention.flatten(1, 2), gram).view_as(products)
        lengths = squares.clamp(min=1e-16).sqrt() * words.norm(dim=2)
        cosines = (products / lengths.clamp(min=1e-8)).clamp(-1, 1)
        return ((config.gamma2 * cosines).exp() * mask).sum(2).log()


def sentence_similarity(sentence: Tensor, global_vector: Tensor) -> Tensor:
    """Cosine of every picture i with every caption j: (J, D), (I, D) -> (I, J)."""
    return cosine(global_vector[:, None], sentence[None])


# --- equations 11 to 13 ---------------------------------------------------------------------------


def matching_losses(similarity: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """L_1 and L_2: cross-entropy of each picture's own caption, and of each caption's own picture.

    Args:
        similarity: (B, B) gamma_3 R of picture i and caption j.
        same: (B, B) True where picture i and caption j belong together, or are no rivals.
    """
    own = torch.eye(len(same), dtype=torch.bool, device=same.device)
    logits = similarity.masked_fill(same & ~own, -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, target), F.cross_entropy(logits.T, target)


def damsm_terms(
    config: DAMSMConfig, text: TextFeatures, image: ImageFeatures, same: Tensor
) -> dict[str, Tensor]:
    """The DAMSM loss: L_1 + L_2 for `words` and for `sentence`.

    Args:
        same: As of `matching_losses`.
    """
    words = word_similarity(config, text.words, text.mask, image.regions)
    sentence = sentence_similarity(text.sentence, image.global_vector)
    terms = {}
    for name, similarity in (("words", words), ("sentence", sentence)):
        loss_1, loss_2 = matching_losses(config.gamma3 * similarity, same)
        terms[name] = loss_1 + loss_2
    return terms


# --- the training step ----------------------------------------------------------------------------


class DAMSM(Trainable):
    """Both encoders, trained together on real pairs.

    Args:
        text: Text encoder that is trained.
        size: Side S of the pictures.
    """

    text: TextEncoder

    def __init__(self, config: DAMSMConfig, text: TextEncoder, size: int) -> None:
        super().__init__()
        self.config, self.text = config, text
        dims = text.word_dim, text.sentence_dim
        self.image_encoder: RegionEncoder | InceptionRegions = (
            RegionEncoder(size, *dims, config.image_channels, config.grid_size)
            if config.image_encoder == "conv"
            else InceptionRegions(*dims, config.inception_weights)
        )

    def groups(self) -> dict[str, list[nn.Module]]:
        return {"damsm": [self.text, self.image_encoder]}

    def losses(self, batch: Batch, text: TextFeatures, noise: NoiseStreams) -> Iterator[Turn]:
        """One turn. Its metric is the share of pictures whose nearest caption belongs to them."""
        image, same = self.image_encoder(batch.image), batch.same_pairs(self.config.same)

        def metrics() -> dict[str, Tensor]:
            nearest = sentence_similarity(text.sentence, image.global_vector).argmax(1)
            return {"matched": same.gather(1, nearest[:, None]).float().mean()}

        yield Turn("damsm", damsm_terms(self.config, text, image, same), metrics)
