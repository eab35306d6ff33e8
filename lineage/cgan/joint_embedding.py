"""Text that matches pictures: the structured joint embedding (Reed et al. 2016, arXiv:1605.05395).

How the text encoder of GAN-INT-CLS and StackGAN is trained, before any picture is drawn. A picture
and its caption shall be more compatible than the picture and another caption, and than the caption
and another picture, by a margin of one.

    equation 1         F(v, t) = <theta(v), phi(t)>: `JointEmbedding.losses`
    equations 3 to 5   `embedding_terms`: the margin losses over captions and over pictures

Departures: theta, which was a published network's features, is a small convolutional network that
is trained along; compatibility is of single captions, not of a class's mean; pairs of one class
(unless `same` is caption), or of the same words, are nobody's rivals.

Axes: B pictures, D width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.data.contract import Batch
from lineage.nn.noise import NoiseStreams
from lineage.system import Trainable, Turn
from lineage.text.contract import TextEncoder, TextFeatures


def embedding_terms(pictures: Tensor, captions: Tensor, rivals: Tensor) -> dict[str, Tensor]:
    """Margin losses, each a mean over pairs of rivals.

    Args:
        pictures, captions: (B, D), row i of the one belongs to row i of the other.
        rivals: (B, B) True where picture i and caption j do not belong together.
    """
    fit = pictures @ captions.T  # (B, B)
    own = fit.diagonal()
    pairs = rivals.sum().clamp(min=1)
    return {
        "captions": (F.relu(1 + fit - own[:, None]) * rivals).sum() / pairs,
        "pictures": (F.relu(1 + fit - own[None, :]) * rivals).sum() / pairs,
    }


class JointEmbedding(Trainable):
    """A text encoder and, to teach it, a picture encoder.

    Args:
        text: what is trained.
        size: side of the pictures.
        same: pairs that are no rivals beside those of one caption: of the same `class`, or none
            (`caption`), which is right where a class says less than a caption.
        channels: of the picture encoder next to the picture; they double as the side halves.
    """

    def __init__(
        self, text: TextEncoder, size: int, same: str = "class", channels: int = 32
    ) -> None:
        super().__init__()
        self.text, self.same = text, same
        layers: list[nn.Module] = []
        inputs = 3
        while size > 4:
            layers += [
                nn.Conv2d(inputs, channels, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.LeakyReLU(0.2),
            ]
            inputs, channels, size = channels, min(2 * channels, 256), size // 2
        self.image = nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * size**2, text.width))

    def groups(self) -> dict[str, list[nn.Module]]:
        return {"embedding": [self.text, self.image]}

    def losses(self, batch: Batch, text: TextFeatures, draws: NoiseStreams) -> Iterator[Turn]:
        """One turn. `facts` has the share of pictures whose nearest caption belongs to them."""
        pictures, captions = self.image(batch.image), text.sentence
        same = batch.alike(self.same)
        with torch.no_grad():
            nearest = (pictures @ captions.T).argmax(1)
            self.facts = {"matched": same.gather(1, nearest[:, None]).float().mean()}
        yield "embedding", embedding_terms(pictures, captions, ~same)
