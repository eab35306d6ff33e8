"""Text encoders, shared by all families: `bag`, `lstm`, `transformer`, and all others by name.

    bag          Embeddings of words; the sentence is their mean. It ignores order: "a red circle
                 above a blue square" and "a blue square above a red circle" are the same.
    lstm         Bidirectional LSTM (Hochreiter and Schmidhuber 1997) as in AttnGAN (Xu et al. 2018,
                 section 3.2): a word is its two hidden states, the sentence the last state of each
                 direction. `encoder.cell=gru` takes a GRU.
    transformer  Pre-norm causal transformer over words alone; the sentence is the state at the last
                 word, since causal attention lets it attend to all others.

    clip                      text tower of CLIP, with start and end tokens (`clip_text.py`)
    clip:RUN                  the frozen text tower of a run of CLIP
    char_cnn_rnn              Reed's encoder of characters (`char_cnn_rnn.py`)
    bert, glide               encoders of diffusion models that attend to the padding (`padded.py`)
    t5                        encoder of T5, of Imagen and its successors (`t5.py`)
    pretrained:NAME           a frozen model of Hugging Face (`pretrained.py`)
    joined:NAME+NAME          several of these together, as in SDXL and SD3 (`joined.py`)

Axes: B captions, L words, D width of words and sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lineage.config import TextConfig, from_dict, to_dict
from lineage.errors import UserError, nearest
from lineage.nn.transformer import TransformerBlock
from lineage.text.char_cnn_rnn import CharCNNRNN
from lineage.text.clip_text import CLIPTextEncoder
from lineage.text.contract import TextEncoder
from lineage.text.joined import JOINED, JoinedEncoder, split_names
from lineage.text.padded import BertEncoder, GlideEncoder
from lineage.text.pretrained import PRETRAINED, PretrainedEncoder
from lineage.text.t5 import T5Encoder
from lineage.text.token_encoder import TokenEncoder
from lineage.text.tokenizer import Tokenizer, WordTokenizer, tokenizer_from_json
from lineage.weights import read_tensors


class BagEncoder(TokenEncoder):
    """Embeddings of words, and their mean: the baseline without word order."""

    causal = True

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        words = self.token_emb(ids)  # (B, L, D), zero on padding
        return words, words.sum(1) / mask.sum(1, keepdim=True)


class LSTMEncoder(TokenEncoder):
    """Bidirectional LSTM or GRU; each direction has half of the width."""

    def __init__(self, config: TextConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer, config.embed_dim)
        if config.width % 2:
            raise UserError(
                f"The lstm encoder needs an even width, not encoder.width={config.width}."
            )
        cell = nn.LSTM if config.cell == "lstm" else nn.GRU
        self.dropout = nn.Dropout(config.dropout)
        self.rnn = cell(
            self.token_emb.embedding_dim,
            config.width // 2,
            config.num_layers,
            batch_first=True,
            bidirectional=True,
        )

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.dropout(self.token_emb(ids)),
            mask.sum(1).cpu(),
            batch_first=True,
            enforce_sorted=False,
        )
        # not every CPU has an LSTM in half precision
        precision = torch.autocast("cpu", enabled=False) if not ids.is_cuda else nullcontext()
        with precision:
            states, last = self.rnn(packed)
        last = last[0] if isinstance(last, tuple) else last  # (2 num_layers, B, D / 2)
        words, _ = nn.utils.rnn.pad_packed_sequence(
            states, batch_first=True, total_length=ids.shape[1]
        )
        return words, torch.cat([last[-2], last[-1]], dim=1)


class TransformerEncoder(TokenEncoder):
    """Causal transformer. Padding follows the words, so that no word attends to it."""

    causal = True

    def __init__(self, config: TextConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.pos_emb = nn.Parameter(torch.randn(config.max_words, config.width) * 0.01)
        self.blocks = nn.ModuleList(
            TransformerBlock(config.width, config.num_heads) for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        length = ids.shape[1]
        causal_mask = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        x = self.token_emb(ids) + self.pos_emb[:length]  # (B, L, D)
        for block in self.blocks:
            x = block(x, causal_mask)
        words = self.norm(x)
        last = mask.sum(1) - 1  # (B,) position of the last word
        return words * mask[..., None], words[torch.arange(len(ids), device=ids.device), last]


ENCODERS: dict[str, Callable[[TextConfig, Tokenizer], TextEncoder]] = {
    "char_cnn_rnn": CharCNNRNN,
    "bag": BagEncoder,
    "lstm": LSTMEncoder,
    "transformer": TransformerEncoder,
    "clip": CLIPTextEncoder,
    "bert": BertEncoder,
    "glide": GlideEncoder,
    "t5": T5Encoder,
}
"""Encoders that need nothing but sizes and a tokeniser, by name."""


CLIP_RUN = "clip:"


def text_tower_of_run(run: str, config: TextConfig) -> TextEncoder:
    """`clip:RUN`: the frozen text tower of a run of CLIP, with that run's sizes and tokeniser.

    Args:
        run: Name of the run.
        config: `runs` describes it; `layer` chooses the words.

    Raises:
        UserError: the run's weights are gone, or its text tower has no such layer.
    """
    if run not in config.runs:
        raise UserError(f"text={CLIP_RUN}{run} names no run of clip that is known here.")
    source = config.runs[run]
    sizes = replace(from_dict(TextConfig, source["encoder"]), layer=config.layer)
    encoder = make_encoder(source["text"], sizes, tokenizer_from_json(source["tokenizer"]))
    if config.layer != "last" and not isinstance(encoder, CLIPTextEncoder):
        raise UserError(
            f"encoder.layer={config.layer} needs a CLIP with CLIP's own text tower, and that of "
            f"{run} is {source['text']}."
        )
    on_meta = any(tensor.is_meta for tensor in encoder.parameters())
    if "weights" in source and not on_meta:  # a trained run's weights hold them already
        tensors = read_tensors(Path(source["weights"]))
        own = {n.removeprefix("text."): t for n, t in tensors.items() if n.startswith("text.")}
        encoder.load_state_dict(own)
    return encoder.requires_grad_(False)


def make_encoder(name: str, config: TextConfig, tokenizer: Tokenizer) -> TextEncoder:
    """The untrained encoder called `name`; see the header for names.

    Raises:
        UserError: there is no encoder of that name.
    """
    if name.startswith(JOINED):
        parts = split_names(name, config.width)
        encoders = [
            make_encoder(part, replace(config, width=width), tokenizer) for part, width in parts
        ]
        return JoinedEncoder(encoders, config)
    if name.startswith(CLIP_RUN):
        return text_tower_of_run(name.removeprefix(CLIP_RUN), config)
    if name.startswith(PRETRAINED):
        return PretrainedEncoder(config, name.removeprefix(PRETRAINED))
    if name not in ENCODERS:
        names = [*ENCODERS, f"{JOINED}NAME+NAME", f"{PRETRAINED}NAME", f"{CLIP_RUN}RUN"]
        raise UserError(f"There is no text encoder {name!r}: {nearest(name, names)}")
    return ENCODERS[name](config, tokenizer)


def check_encoder(name: str, config: TextConfig) -> None:
    """Raise `UserError` if there is no encoder called `name`, or its sizes do not fit it."""
    with torch.device("meta"):
        make_encoder(name, config, WordTokenizer([]))


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder to be built: the argument of a stage, and part of its cache key.

    Attributes:
        name: Name of the encoder.
        config: Sizes of the encoder.
        tokenizer: Tokeniser of the run.
    """

    name: str
    config: TextConfig
    tokenizer: Tokenizer

    def build(self) -> TextEncoder:
        """The untrained encoder."""
        return make_encoder(self.name, self.config, self.tokenizer)

    def without_files(self) -> EncoderSpec:
        """The same encoder, whose weights come from a checkpoint and not from files of runs."""
        return replace(self, config=self.config.without_files())

    def to_json(self) -> dict[str, Any]:
        """Name, sizes and tokeniser as plain JSON values; runs by the hash of their weights."""
        name, config = _by_hash(self.name, to_dict(self.config.without_files()))
        return {"name": name, "config": config, "tokenizer": self.tokenizer.to_json()}


def _by_hash(name: str, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and sizes of an encoder, with hashes in place of the names of runs: a run that is moved
    stays the same.
    """
    runs = {}
    for run, source in config["runs"].items():
        text, encoder = _by_hash(source["text"], source["encoder"])
        runs[source["hash"]] = {**source, "text": text, "encoder": encoder}
        whole = rf"(?<![^:+]){re.escape(CLIP_RUN + run)}(?![^+@])"
        name = re.sub(whole, f"{CLIP_RUN}{source['hash']}", name)
    return name, {**config, "runs": runs}
