"""`clip`: the text tower of CLIP (Radford et al. 2021, arXiv:2103.00020, section 2.4).

A causal transformer reads `<start> words <end>`. Its state at the end token, behind a final norm
and a projection, is the sentence; its states are the words, to which later systems attend.

    tokens       start, words, end: the two have the largest ids             `CLIPTextEncoder._ids`
    states       embeddings, and the output of each block         `CLIPTextTower.hidden_states`
    sentence     LayerNorm(last state at the end token) W                    `CLIPTextTower.pool`
    words        `encoder.layer`, as systems use them:                     `CLIPTextTower.words`
                   last             Stable Diffusion 1
                   penultimate      Stable Diffusion 2 (the last block left out, final norm applied)
                   penultimate_raw  SDXL (no final norm)

`encoder.gelu` is `quick_gelu` in OpenAI's models and `gelu` in OpenCLIP's (arXiv:2212.07143). A
CLIP trains this tower (`lineage/clip`); `text=clip` trains it with a system, and `text=clip:RUN`
takes it from a run of CLIP and freezes it (`clip_run.py`).

Departure: published systems attend to all 77 positions, padding among them; here the mask is True
from the start token to the end token.

Axes: B captions, L tokens, D width, P width of the projection.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lineage.config import TextConfig
from lineage.errors import UserError
from lineage.nn.transformer import GELUKind, TransformerBlock
from lineage.text.contract import Overflow, TextEncoder, TextFeatures, caption_list
from lineage.text.token_encoder import UNITS
from lineage.text.tokenizer import PAD, Tokenizer


class CLIPTextTower(nn.Module):
    """The transformer.

    Args:
        vocab_size: Number of token ids.
        context_length: Largest number of tokens.
        width: D.
        num_layers: Number of blocks.
        num_heads: Number of attention heads.
        projection_dim: P.
        mlp_dim: Width inside the blocks' perceptrons; None is four times D.
        gelu: Activation of the blocks.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        context_length: int,
        width: int,
        num_layers: int,
        num_heads: int,
        projection_dim: int,
        mlp_dim: int | None = None,
        gelu: GELUKind = "quick_gelu",
    ) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(vocab_size, width)
        self.pos_emb = nn.Parameter(torch.empty(context_length, width))
        self.blocks = nn.ModuleList(
            TransformerBlock(width, num_heads, mlp_dim=mlp_dim, gelu=gelu)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.text_proj = nn.Parameter(torch.empty(width, projection_dim))
        nn.init.normal_(self.token_emb.weight, std=0.02)
        nn.init.normal_(self.pos_emb, std=0.01)
        nn.init.normal_(self.text_proj, std=width**-0.5)

    def hidden_states(self, ids: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Embeddings and the output of each block, (B, L, D) each.

        Args:
            ids: (B, L) token ids.
            mask: (B, L) True for keys that may be attended to, beside the causal mask; None for
                all, as CLIP was trained.
        """
        length = ids.shape[1]
        attend_to = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        if mask is not None:
            attend_to = attend_to & mask[:, None, None, :]  # (B, 1, L, L)
        states = [self.token_emb(ids) + self.pos_emb[:length]]
        for block in self.blocks:
            states.append(block(states[-1], attend_to))
        return states

    def words(self, states: list[Tensor], layer: str = "last") -> Tensor:
        """States of `layer`, (B, L, D)."""
        if layer == "penultimate_raw":
            return states[-2]
        words: Tensor = self.norm(states[-1 if layer == "last" else -2])
        return words

    def pool(self, states: list[Tensor], end: Tensor) -> Tensor:
        """Projected state at the end token, whose position is `end` (B,): (B, P)."""
        rows = torch.arange(len(end), device=end.device)
        return self.norm(states[-1][rows, end]) @ self.text_proj


class CLIPTextEncoder(TextEncoder):
    """The text tower as a text encoder.

    Args:
        config: Sizes: `width`, `num_layers`, `num_heads`, `max_words` (start and end among them),
            `projection_dim`, `gelu`, `layer`.
        tokenizer: Tokeniser of the run, without start and end.
    """

    causal = True

    def __init__(self, config: TextConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        if config.max_words < 3:
            raise UserError(
                f"The clip encoder needs room for a start, a word and an end, so "
                f"encoder.max_words={config.max_words} must be at least 3."
            )
        self.config, self.tokenizer = config, tokenizer
        self.start_id, self.end_id = len(tokenizer), len(tokenizer) + 1
        self.vocab_size = len(tokenizer) + 2
        self.word_dim = config.width
        self.sentence_dim = config.projection_dim or config.width
        self.tower = CLIPTextTower(
            vocab_size=self.vocab_size,
            context_length=config.max_words,
            width=config.width,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            projection_dim=self.sentence_dim,
            gelu=config.gelu,
        )

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) ids and mask -> words (B, L, D), sentence (B, P)."""
        states = self.tower.hidden_states(ids)  # padding follows the words: none attends to it
        words = self.tower.words(states, self.config.layer) * mask[..., None]
        return words, self.tower.pool(states, mask.sum(1) - 1)

    def encode(self, captions: list[str]) -> TextFeatures:
        rows = [self._ids(caption) for caption in caption_list(captions)]
        lengths = torch.tensor([len(row) for row in rows])
        longest = int(lengths.max())
        device = self.tower.pos_emb.device
        ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])  # (B, L)
        ids = ids.to(device, non_blocking=True)
        mask = (torch.arange(longest) < lengths[:, None]).to(device, non_blocking=True)
        words, sentence = self(ids, mask)
        return TextFeatures(words, mask, sentence, ids)

    def null(self, count: int) -> TextFeatures:
        """Features of the empty caption."""
        return self.encode([""] * count)

    def tokens(self, caption: str) -> list[str]:
        words = [self.tokenizer.decode([i]).strip() or "<null>" for i in self._ids(caption)[1:-1]]
        return ["<start>", *words, "<end>"]

    def unknown(self, captions: list[str], length: int | None = None) -> list[str]:
        words = (
            word
            for caption in caption_list(captions)
            for word in self.tokenizer.unknown(caption, self._room(length))
        )
        return list(dict.fromkeys(words))

    def overflow(self, caption: str, length: int | None = None) -> Overflow | None:
        text = self.tokenizer.rest(caption, self._room(length))
        return (
            Overflow(f"{self._room(length)} {UNITS[self.tokenizer.kind]}", text) if text else None
        )

    def _room(self, length: int | None = None) -> int:
        """Number of tokens between start and end that are read, if the first `length` vectors are
        used: the start is one of them, the end need not be.
        """
        room = self.config.max_words - 2
        return room if length is None else max(0, min(length - 1, room))

    def _ids(self, caption: str) -> list[int]:
        """A caption that is too long loses its last words, not its end token."""
        return [self.start_id, *self.tokenizer.encode(caption)[: self._room()], self.end_id]
