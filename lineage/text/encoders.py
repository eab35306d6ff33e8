"""Text encoders, shared by all families: `bag`, `lstm` and `transformer` under the contract of
`text/contract.py`.

    bag          a table of word vectors; the sentence is their mean. Knows no order: "a red circle
                 above a blue square" and "a blue square above a red circle" are one to it.
    lstm         bidirectional LSTM (Hochreiter and Schmidhuber 1997) as in AttnGAN (Xu et al. 2018,
                 section 3.2): a word is its two hidden states, the sentence the last state of each
                 direction. A GRU fits too.
    transformer  pre-norm causal transformer as the text side of CLIP (Radford et al. 2021, section
                 2.4); the sentence is the state at the last word. Departure: CLIP appends an end
                 token and reads that; here the mask means words alone, so the last word takes its
                 place (causal attention lets it see all others).

`char_cnn_rnn`, `bert` and `glide` have files of their own, as has `pretrained:NAME`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lineage.config import TextConfig
from lineage.errors import UserError, nearest
from lineage.nn.attention import Attention
from lineage.text.char_cnn_rnn import CharCNNRNN
from lineage.text.contract import TextEncoder
from lineage.text.padded import BertEncoder, GlideEncoder
from lineage.text.pretrained import PRETRAINED, PretrainedEncoder
from lineage.text.tokenizer import Tokenizer
from lineage.text.tokens import TokenEncoder


class BagEncoder(TokenEncoder):
    """Word vectors and their mean. The baseline without word order."""

    in_order = True

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) ids and mask -> words (B, L, D), sentence (B, D)."""
        words = self.table(ids)  # (B, L, D), zero on padding
        return words, words.sum(1) / mask.sum(1, keepdim=True)


class LSTMEncoder(TokenEncoder):
    """Bidirectional LSTM, or GRU; each direction has half of the width."""

    def __init__(self, config: TextConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer, config.inputs)
        if config.width % 2:
            raise UserError(
                f"The lstm encoder needs an even width, not encoder.width={config.width}."
            )
        kind = nn.LSTM if config.cell == "lstm" else nn.GRU
        self.dropout = nn.Dropout(config.dropout)
        self.lstm = kind(
            self.table.embedding_dim,
            config.width // 2,
            config.layers,
            batch_first=True,
            bidirectional=True,
        )

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) ids and mask -> words (B, L, D), sentence (B, D)."""
        packed = nn.utils.rnn.pack_padded_sequence(
            self.dropout(self.table(ids)),
            mask.sum(1).cpu(),
            batch_first=True,
            enforce_sorted=False,
        )
        states, last = self.lstm(packed)
        last = last[0] if isinstance(last, tuple) else last  # (layers * 2, B, D / 2)
        words, _ = nn.utils.rnn.pad_packed_sequence(
            states, batch_first=True, total_length=ids.shape[1]
        )
        return words, torch.cat([last[-2], last[-1]], dim=1)


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.mlp(self.norm2(x))


class TransformerEncoder(TokenEncoder):
    """Causal transformer. Padding stands behind the words, so causal attention never reaches it."""

    in_order = True

    def __init__(self, config: TextConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.position = nn.Parameter(torch.randn(config.words, config.width) * 0.01)
        self.blocks = nn.ModuleList(
            TransformerBlock(config.width, config.heads) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) ids and mask -> words (B, L, D), sentence (B, D)."""
        length = ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()  # (L, L)
        x = self.table(ids) + self.position[:length]  # (B, L, D)
        for block in self.blocks:
            x = block(x, causal)
        words = self.norm(x)
        last = mask.sum(1) - 1  # (B,) place of the last word
        return words * mask[..., None], words[torch.arange(len(ids), device=ids.device), last]


ENCODERS: dict[str, Callable[[TextConfig, Tokenizer], TextEncoder]] = {
    "char_cnn_rnn": CharCNNRNN,
    "bag": BagEncoder,
    "lstm": LSTMEncoder,
    "transformer": TransformerEncoder,
    "bert": BertEncoder,
    "glide": GlideEncoder,
}


def make_encoder(name: str, config: TextConfig, tokenizer: Tokenizer) -> TextEncoder:
    """The encoder called `name`, untrained, or `pretrained:` and a folder or name of the hub.

    Raises `UserError` for a name there is not.
    """
    if name.startswith(PRETRAINED):
        return PretrainedEncoder(config, name.removeprefix(PRETRAINED))
    if name not in ENCODERS:
        raise UserError(f"There is no text encoder {name!r}: {nearest(name, ENCODERS)}")
    return ENCODERS[name](config, tokenizer)
