"""The deep attentional multimodal similarity model (Xu et al. 2018, arXiv:1711.10485, section 3.2).

How well a picture fits a caption, word by word: each word looks for its regions, and the match of
word and regions is summed up. AttnGAN's generator is told by it which word it drew badly; it is
trained before, on real pairs, and R-precision asks it afterwards whether a picture finds its own
caption among others.

    text encoder      any of `lineage/text`; the paper's is `lstm`
    image encoder     `RegionEncoder`, small and trained along; `InceptionRegions`, the paper's
    equations 7 to 9  `region_attention`, `region_contexts`: s = e^T v, a softmax over words, then
                      one over regions
    equation 10       `word_similarity`: R(Q, D) = log(sum_i exp(gamma_2 R(c_i, e_i)))^(1 / gamma_2)
    equations 11, 12  `matching_terms`: cross-entropy of the true pair, along rows and columns
    equation 13       `matching`: words and sentence together

Where the authors' code differs from the paper, it is followed: the outer power 1 / gamma_2 of
equation 10 is left out; cosines divide by at least 1e-8; gamma_3 multiplies both similarities.

Departures: pairs with the same caption are nobody's rivals, as well as (`same` = class) those of
one class; `RegionEncoder`.

Axes: B pictures or captions (i, j where they meet), L words, N regions, D width, S side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lineage.config import at_least, one_of
from lineage.data.contract import Batch
from lineage.errors import UserError
from lineage.nn.blocks import conv3x3
from lineage.nn.inception import SIDE, InceptionV3, load_inception
from lineage.nn.noise import NoiseStreams
from lineage.system import Trainable, Turn
from lineage.text.contract import TextEncoder, TextFeatures


@dataclass(frozen=True)
class DAMSMConfig:
    """Smoothing factors under the paper's names, and the image encoder.

    Attributes:
        gamma1: sharpness of a word's attention to regions.
        gamma2: how much the best word counts.
        gamma3: factor of similarities before the softmax over pairs.
        regions: `conv`, or `inception` as in the paper.
        channels: of `conv` next to the picture.
        grid: `conv` has as many rows of regions.
        weights: file with the published weights of `inception`; without one it starts at random.
        same: pairs that are no rivals beside those of one caption: of the same `class`, or none
            (`caption`), which is right where a class says less than a caption.
    """

    gamma1: float = 4.0
    gamma2: float = 5.0
    gamma3: float = 10.0
    regions: str = "inception"
    channels: int = 32
    grid: int = 8
    weights: str = ""
    same: str = "class"

    def __post_init__(self) -> None:
        for name in ("gamma1", "gamma2", "gamma3"):
            if not getattr(self, name) > 0:
                raise UserError(f"damsm.{name}={getattr(self, name)} must be above 0.")
        for name in ("channels", "grid"):
            at_least(f"damsm.{name}", getattr(self, name), 1)
        one_of("damsm.regions", self.regions, ("conv", "inception"))
        one_of("damsm.same", self.same, ("class", "caption"))


# --- image encoders ---------------------------------------------------------


@dataclass
class Regions:
    """Pictures as a text encoder's counterpart: `local` (B, N, D), row by row, and `whole` (B,
    D).
    """

    local: Tensor
    whole: Tensor


class RegionEncoder(nn.Module):
    """A small convolutional network that is trained with the text.

    Halves the side down to the grid, whose places are the regions, and then to 4 x 4, all of whose
    places together are the whole, so that it knows left from right.

    Args:
        size: S of the pictures; other sizes are resized.
        width: D.
    """

    def __init__(self, size: int, width: int, channels: int, grid: int) -> None:
        super().__init__()
        if size % grid or size // grid & (size // grid - 1) or grid < 4 or size == grid:
            raise UserError(
                f"damsm.grid={grid} does not come from {size} pixels by halving; try {size // 4}."
            )
        self.size = size

        def halve(inputs: int, outputs: int) -> list[nn.Module]:
            layer = nn.Conv2d(inputs, outputs, 4, stride=2, padding=1, bias=False)
            return [layer, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)]

        layers, inputs, side = halve(3, channels), channels, size // 2
        while side > grid:
            layers += halve(inputs, 2 * inputs)
            inputs, side = 2 * inputs, side // 2
        layers += [conv3x3(inputs, inputs), nn.BatchNorm2d(inputs), nn.LeakyReLU(0.2)]
        self.to_grid = nn.Sequential(*layers)
        self.local = nn.Conv2d(inputs, width, 1, bias=False)
        layers = []
        while side > 4:
            layers += halve(inputs, 2 * inputs)
            inputs, side = 2 * inputs, side // 2
        self.whole = nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * side**2, width))

    def forward(self, image: Tensor) -> Regions:
        """(B, 3, S, S) in [-1, 1] -> regions (B, grid^2, D) and (B, D)."""
        if image.shape[-1] != self.size:
            image = F.interpolate(image, (self.size, self.size), mode="bilinear", antialias=True)
        seen = self.to_grid(image)
        return Regions(rearrange(self.local(seen), "b d h w -> b (h w) d"), self.whole(seen))


class RegionHeads(nn.Module):
    """A linear layer on each place of Inception v3, and one on its pooled end."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.emb_features = nn.Conv2d(768, width, 1, bias=False)
        self.emb_cnn_code = nn.Linear(2048, width)
        for layer in (self.emb_features, self.emb_cnn_code):
            nn.init.uniform_(layer.weight, -0.1, 0.1)

    def forward(self, places: Tensor, pooled: Tensor) -> Regions:
        """(B, 768, H, W), (B, 2048) -> regions (B, H W, D) and (B, D)."""
        local = rearrange(self.emb_features(places), "b d h w -> b (h w) d")
        return Regions(local, self.emb_cnn_code(pooled))


class InceptionRegions(nn.Module):
    """The paper's: `RegionHeads` on an Inception v3 that is not trained."""

    def __init__(self, width: int, weights: str = "") -> None:
        super().__init__()
        path = Path(weights)
        self.inception = load_inception(path, "imagenet") if weights else InceptionV3("imagenet")
        self.inception.requires_grad_(False)
        self.inception.fc = cast(Any, nn.Identity())  # its classes are not asked for
        self.heads = RegionHeads(width)

    def train(self, mode: bool = True) -> InceptionRegions:
        """Inception stays in evaluation mode."""
        super().train(mode)
        self.inception.eval()
        return self

    def forward(self, image: Tensor) -> Regions:
        """(B, 3, S, S) in [-1, 1] -> regions (B, 289, D) and (B, D)."""
        image = F.interpolate(image, (SIDE, SIDE), mode="bilinear", align_corners=True)
        seen = self.inception(image)
        return self.heads(seen.regions, seen.pooled)


# --- equations 7 to 10 -------------------------------------------------------


def region_attention(
    words: Tensor, mask: Tensor, regions: Tensor, gamma1: float
) -> tuple[Tensor, Tensor]:
    """What each word of each caption looks at in each picture.

    Args:
        words: (J, L, D) of J captions.
        mask: (J, L) True where there is a word.
        regions: (I, N, D) of I pictures.

    Returns:
        scores and attention, (I, J, L, N) each; attention sums to 1 over N. On padding they mean
        nothing.
    """
    scores = torch.einsum("jld,ind->ijln", words, regions)  # equation 7
    shares = scores.masked_fill(~mask[None, :, :, None], -torch.inf).softmax(2)  # equation 8
    return scores, (gamma1 * shares).softmax(3)  # equation 9


def region_contexts(
    words: Tensor, mask: Tensor, regions: Tensor, gamma1: float
) -> tuple[Tensor, Tensor]:
    """The contexts c of equation 9, (I, J, L, D), and the attention (I, J, L, N)."""
    _, attention = region_attention(words, mask, regions, gamma1)
    return torch.einsum("ijln,ind->ijld", attention, regions), attention


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """(..., D), (..., D) -> (...)"""
    norms = one.norm(dim=-1) * other.norm(dim=-1)
    return (one * other).sum(-1) / norms.clamp(min=1e-8)


def word_similarity(config: DAMSMConfig, words: Tensor, mask: Tensor, regions: Tensor) -> Tensor:
    """Equation 10 of every picture i with every caption j: (I, J).

    The contexts c = sum_n a_n v_n are not written out: their product with a word e is
    sum_n a_n s_n, of the scores s_n = <v_n, e>, and their squared length a^T (v v^T) a.
    """
    words, regions = words.float(), regions.float()
    with torch.autocast(words.device.type, enabled=False):  # lengths of sums may cancel
        scores, attention = region_attention(words, mask, regions, config.gamma1)
        products = (attention * scores).sum(3)  # (I, J, L)
        gram = regions @ regions.mT  # (I, N, N)
        squares = (torch.einsum("ijln,inm->ijlm", attention, gram) * attention).sum(3)
        lengths = squares.clamp(min=1e-16).sqrt() * words.norm(dim=2)
        cosines = (products / lengths.clamp(min=1e-8)).clamp(-1, 1)
        return ((config.gamma2 * cosines).exp() * mask).sum(2).log()


def sentence_similarity(sentence: Tensor, whole: Tensor) -> Tensor:
    """Cosine of every picture i with every caption j: (J, D), (I, D) -> (I, J)."""
    return cosine(whole[:, None], sentence[None])


# --- equations 11 to 13 --------------------------------------------------------


def matching_terms(similarity: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the true caption of each picture, and of the true picture of each caption.

    Args:
        similarity: (B, B), picture i and caption j, times gamma_3.
        same: (B, B) True where picture i and caption j belong together, or are no rivals.
    """
    own = torch.eye(len(same), dtype=torch.bool, device=same.device)
    logits = similarity.masked_fill(same & ~own, -torch.inf)
    true = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, true), F.cross_entropy(logits.T, true)


def matching(
    config: DAMSMConfig, text: TextFeatures, regions: Regions, same: Tensor
) -> dict[str, Tensor]:
    """Equation 13: `words` and `sentence`, each the sum of its two cross-entropies."""
    words = word_similarity(config, text.words, text.mask, regions.local)
    sentence = sentence_similarity(text.sentence, regions.whole)
    return {
        name: torch.stack(matching_terms(config.gamma3 * similarity, same)).sum()
        for name, similarity in (("words", words), ("sentence", sentence))
    }


# --- training -------------------------------------------------------------------


class DAMSM(Trainable):
    """Both encoders, trained together on real pairs.

    Args:
        text: the text encoder.
        size: S of the pictures.
    """

    def __init__(self, config: DAMSMConfig, text: TextEncoder, size: int) -> None:
        super().__init__()
        self.config, self.text = config, text
        self.image: RegionEncoder | InceptionRegions = (
            RegionEncoder(size, text.width, config.channels, config.grid)
            if config.regions == "conv"
            else InceptionRegions(text.width, config.weights)
        )

    def groups(self) -> dict[str, list[nn.Module]]:
        return {"damsm": [self.text, self.image]}

    def losses(self, batch: Batch, text: TextFeatures, draws: NoiseStreams) -> Iterator[Turn]:
        """One turn. `facts` has the share of pictures whose nearest caption belongs to them."""
        regions, same = self.image(batch.image), batch.alike(self.config.same)
        with torch.no_grad():
            nearest = sentence_similarity(text.sentence, regions.whole).argmax(1)
            self.facts = {"matched": same.gather(1, nearest[:, None]).float().mean()}
        yield "damsm", matching(self.config, text, regions, same)
