"""`char_cnn_rnn`: captions letter by letter (Reed et al. 2016, arXiv:1605.05395, section 4).

The text encoder of GAN-INT-CLS and StackGAN. A temporal convolutional network reads the letters and
halves the line until a few places are left, a recurrent network reads those, and the sentence is
the mean of its states. It needs no vocabulary: a word that it never saw is a row of letters that it
did. What it learns from is `lineage/cgan/joint_embedding.py`.

    201 letters of 70, one-hot
    convolution over 4, ReLU, largest of 3        66 places, 384 channels
    convolution over 4, ReLU, largest of 3        21 places, 512 channels
    convolution over 4, ReLU, largest of 3 by 2    8 places
    recurrent network, mean of its states, linear

Departures: a GRU in place of the authors' own recurrent unit; the mean leaves out places that see
no letter; what is not in the alphabet is a column of zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.config import TextConfig
from lineage.errors import UserError
from lineage.text.contract import TextEncoder, TextFeatures
from lineage.text.tokenizer import Tokenizer

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789-,;.!?:'\"/\\|_@#$%^&*~`+-=<>()[]{} "
"""The letters of Zhang et al. 2015, and the blank: 70, the hyphen twice as in their list."""

_KERNEL, _POOLS = 4, ((3, 3), (3, 3), (3, 2))  # (width, stride) of each pooling
_STRIDE = 18  # letters from one place to the next


def places(letters: int) -> int:
    """How many places are left of a line of `letters`; 0 or less if it is too short."""
    for width, stride in _POOLS:
        letters = (letters - _KERNEL + 1 - width) // stride + 1
    return letters


class CharCNNRNN(TextEncoder):
    """The encoder. `words` are the places, each the state after some 18 more letters.

    Args:
        config: `letters` read of a caption, `channels` of the first convolution (a third more in
            the others), `width` of words and sentence.
        tokenizer: not used; letters are all it reads.
    """

    def __init__(self, config: TextConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        if places(config.letters) < 1:
            raise UserError(f"encoder.letters={config.letters} is too short a line; try 201.")
        self.config, self.width = config, config.width
        self.number = {letter: i for i, letter in enumerate(ALPHABET)}
        inner = config.channels * 4 // 3
        widths = (len(ALPHABET), config.channels, inner, inner)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(a, b, _KERNEL) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.recurrent = nn.GRU(inner, inner, batch_first=True)
        self.project = nn.Linear(inner, config.width)

    def encode(self, captions: list[str]) -> TextFeatures:
        limit = self.config.letters
        texts = [caption.lower().strip()[:limit] for caption in captions]
        rows = [[self.number.get(letter, -1) for letter in text] for text in texts]
        padded = torch.tensor([row + [-1] * (limit - len(row)) for row in rows])  # (B, letters)
        lengths = torch.tensor([len(row) for row in rows])
        device = self.project.weight.device
        return self(padded.to(device, non_blocking=True), lengths.to(device, non_blocking=True))

    def forward(self, letters: Tensor, lengths: Tensor) -> TextFeatures:
        """letters (B, T) numbers, -1 for none; lengths (B,) -> features with L places."""
        one_hot = F.one_hot(letters + 1, len(ALPHABET) + 1)[..., 1:].to(self.project.weight.dtype)
        x = one_hot.transpose(1, 2)  # (B, 70, T)
        for convolution, (width, stride) in zip(self.convolutions, _POOLS, strict=True):
            x = F.max_pool1d(F.relu(convolution(x)), width, stride)
        states, _ = self.recurrent(x.transpose(1, 2))  # (B, L, C)
        starts = torch.arange(states.shape[1], device=letters.device) * _STRIDE
        mask = (starts < lengths[:, None]) | (starts == 0)  # (B, L)
        words = self.project(states) * mask[..., None]
        return TextFeatures(
            words=words,
            mask=mask,
            sentence=words.sum(1) / mask.sum(1, keepdim=True),
            ids=(letters[:, starts] + 2) * mask,
        )

    def pieces(self, caption: str) -> list[str]:
        text = caption.lower().strip()[: self.config.letters]
        length = places(self.config.letters)
        starts = range(0, max(1, len(text)), _STRIDE)
        return [text[start : start + _STRIDE].strip() for start in starts][:length]

    def null(self, count: int) -> TextFeatures:
        return self.encode([""] * count)
