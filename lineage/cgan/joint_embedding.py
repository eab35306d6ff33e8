"""The structured joint embedding of text and pictures (Reed et al. 2016, arXiv:1605.05395).

It trains the text encoder of GAN-INT-CLS and StackGAN, before the GANs. The compatibility of a
picture and its caption is to exceed that of the picture and other captions, and that of the caption
and other pictures, by a margin of one. With picture v_i and caption t_i of pair i:

    F(v, t) = <theta(v), phi(t)>                                              (equation 1)
    max(0, 1 + F(v_i, t_j) - F(v_i, t_i)), a mean over j that are rivals      (equation 4)
    max(0, 1 + F(v_i, t_j) - F(v_j, t_j)), a mean over i that are rivals      (equation 5)

`embedding_terms` computes these, `JointEmbedding.losses` is the training step.

Departures: theta, the features of a published network in the paper, is a small convolutional
network that is trained with the text encoder; compatibility is of single captions, not of the mean
of a class; pairs of one class (unless `same` is caption), or with the same words, are no rivals.

Axes: B pictures, D width of the sentence.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from lineage.data.contract import Batch
from lineage.nn.noise import NoiseStreams
from lineage.system import Trainable, Turn
from lineage.text.contract import TextEncoder, TextFeatures


def embedding_terms(images: Tensor, captions: Tensor, rivals: Tensor) -> dict[str, Tensor]:
    """Equations 4 and 5, each a mean over pairs of rivals.

    Args:
        images, captions: (B, D) embeddings; row i of one belongs to row i of the other.
        rivals: (B, B) True where picture i and caption j do not belong together.
    """
    scores = images @ captions.T  # (B, B), equation 1
    own = scores.diagonal()
    num_rivals = rivals.sum().clamp(min=1)
    return {
        "captions": (F.relu(1 + scores - own[:, None]) * rivals).sum() / num_rivals,
        "images": (F.relu(1 + scores - own[None, :]) * rivals).sum() / num_rivals,
    }


class JointEmbedding(Trainable):
    """A text encoder and an image encoder that is trained with it.

    Args:
        text: Text encoder that is trained.
        size: Side of the pictures.
        same: Pairs that are no rivals beside those of one caption: of the same `class`, or none
            (`caption`), which is right where a class says less than a caption.
        channels: Number of channels of the image encoder next to the picture; they double as the
            side halves.
    """

    text: TextEncoder

    def __init__(
        self, text: TextEncoder, size: int, same: str = "class", channels: int = 32
    ) -> None:
        super().__init__()
        self.text, self.same = text, same
        layers: list[nn.Module] = []
        in_channels = 3
        while size > 4:
            layers += [
                nn.Conv2d(in_channels, channels, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.LeakyReLU(0.2),
            ]
            in_channels, channels, size = channels, min(2 * channels, 256), size // 2
        to_sentence = nn.Linear(in_channels * size**2, text.sentence_dim)
        self.image_encoder = nn.Sequential(*layers, nn.Flatten(), to_sentence)

    def groups(self) -> dict[str, list[nn.Module]]:
        return {"embedding": [self.text, self.image_encoder]}

    def losses(self, batch: Batch, text: TextFeatures, noise: NoiseStreams) -> Iterator[Turn]:
        """One turn. Its metric is the share of pictures whose nearest caption belongs to them."""
        images, captions = self.image_encoder(batch.image), text.sentence
        same = batch.same_pairs(self.same)

        def metrics() -> dict[str, Tensor]:
            nearest = (images @ captions.T).argmax(1)
            return {"matched": same.gather(1, nearest[:, None]).float().mean()}

        yield Turn("embedding", embedding_terms(images, captions, ~same), metrics)
