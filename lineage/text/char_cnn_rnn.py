"""`char_cnn_rnn`: captions character by character (Reed et al. 2016, arXiv:1605.05395, section 4).

The text encoder of GAN-INT-CLS and StackGAN. A temporal convolutional network shortens the
characters to a few positions, a recurrent network follows, and the sentence is the mean of its
states. It needs no vocabulary: a new or misspelt word is a sequence of known characters.
`lineage/cgan/joint_embedding.py` trains it.

    201 characters of 70, one-hot
    convolution of 4, ReLU, max pooling of 3         66 positions, 384 channels
    convolution of 4, ReLU, max pooling of 3         21 positions, 512 channels
    convolution of 4, ReLU, max pooling of 3 by 2     8 positions
    recurrent network, mean of its states, linear

Departures: a GRU in place of the authors' own recurrent unit; the mean leaves out positions that
cover no character of the caption; a character outside the alphabet is a column of zeros.

Axes: B captions, T characters, L positions, C channels, D width of words and sentence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.config import TextConfig
from lineage.errors import UserError
from lineage.text.contract import Overflow, TextEncoder, TextFeatures, caption_list
from lineage.text.tokenizer import Tokenizer, split_words

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789-,;.!?:'\"/\\|_@#$%^&*~`+-=<>()[]{} "
"""The alphabet of Zhang et al. 2015, and the blank: 70, with the hyphen twice as in their list."""

_KERNEL, _POOLS = 4, ((3, 3), (3, 3), (3, 2))  # (width, stride) of each pooling
_STRIDE = 18  # characters from one position to the next


def num_positions(num_chars: int) -> int:
    """L for a sequence of `num_chars`; 0 or less if it is too short."""
    for width, stride in _POOLS:
        num_chars = (num_chars - _KERNEL + 1 - width) // stride + 1
    return num_chars


class CharCNNRNN(TextEncoder):
    """The encoder. A "word" is a position: the recurrent state after about 18 more characters.

    Args:
        config: `max_chars` of a caption, `conv_channels` of the first convolution (the others have
            a third more), `width` of words and sentence.
        tokenizer: Not used; every encoder takes one.
    """

    def __init__(self, config: TextConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        if num_positions(config.max_chars) < 1:
            raise UserError(f"encoder.max_chars={config.max_chars} is too short; try 201.")
        self.config = config
        self.word_dim = self.sentence_dim = config.width
        self.char_ids = {char: i for i, char in enumerate(ALPHABET)}
        channels = config.conv_channels * 4 // 3
        widths = (len(ALPHABET), config.conv_channels, channels, channels)
        self.convs = nn.ModuleList(
            nn.Conv1d(a, b, _KERNEL) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.rnn = nn.GRU(channels, channels, batch_first=True)
        self.proj = nn.Linear(channels, config.width)

    def encode(self, captions: list[str]) -> TextFeatures:
        max_chars = self.config.max_chars
        rows = [
            [self.char_ids.get(char, -1) for char in self._cut(c)] for c in caption_list(captions)
        ]
        chars = torch.tensor([row + [-1] * (max_chars - len(row)) for row in rows])  # (B, T)
        lengths = torch.tensor([len(row) for row in rows])
        device = self.proj.weight.device
        return self(chars.to(device, non_blocking=True), lengths.to(device, non_blocking=True))

    def forward(self, chars: Tensor, lengths: Tensor) -> TextFeatures:
        """chars (B, T) numbers, -1 for none, and lengths (B,) -> features of L positions."""
        one_hot = F.one_hot(chars + 1, len(ALPHABET) + 1)[..., 1:].to(self.proj.weight.dtype)
        x = one_hot.transpose(1, 2)  # (B, 70, T)
        for conv, (width, stride) in zip(self.convs, _POOLS, strict=True):
            x = F.max_pool1d(F.relu(conv(x)), width, stride)
        states, _ = self.rnn(x.transpose(1, 2))  # (B, L, C)
        starts = torch.arange(states.shape[1], device=chars.device) * _STRIDE
        mask = (starts < lengths[:, None]) | (starts == 0)  # (B, L)
        words = self.proj(states) * mask[..., None]
        return TextFeatures(
            words=words,
            mask=mask,
            sentence=words.sum(1) / mask.sum(1, keepdim=True),
            ids=(chars[:, starts] + 2) * mask,  # 1 for a character outside the alphabet
        )

    def tokens(self, caption: str) -> list[str]:
        text = self._cut(caption)
        starts = range(0, max(1, len(text)), _STRIDE)
        parts = [text[start : start + _STRIDE].strip() for start in starts]
        return parts[: num_positions(self.config.max_chars)]

    def num_words(self, caption: str) -> tuple[int, ...]:
        return (num_positions(self.config.max_chars),)  # of every caption, most of them masked

    def null(self, count: int) -> TextFeatures:
        return self.encode([""] * count)

    def unknown(self, captions: list[str], length: int | None = None) -> list[str]:
        """Words with a character outside the alphabet."""
        words = (word for caption in captions for word in split_words(self._cut(caption)))
        return list(dict.fromkeys(word for word in words if not self.char_ids.keys() >= set(word)))

    def overflow(self, caption: str, length: int | None = None) -> Overflow | None:
        text = caption.lower().strip()[self.config.max_chars :].strip()
        return Overflow(f"{self.config.max_chars} characters", text) if text else None

    def _cut(self, caption: str) -> str:
        return caption.lower().strip()[: self.config.max_chars]
