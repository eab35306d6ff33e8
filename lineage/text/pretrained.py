"""`pretrained:NAME`: a text model of Hugging Face's, frozen. NAME is a folder, or an id of the hub.

A CLIP text model gives the words that Stable Diffusion attends to; of any other model the last
hidden states serve. All `encoder.words` places are given, what stands behind the last word with
mask False. The model is read when it is first asked, and is no part of a run's weights: a run on it
needs it again.

Axes: B captions, L words, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineage.config import TextConfig
from lineage.errors import UserError
from lineage.text.contract import TextEncoder, TextFeatures

PRETRAINED = "pretrained:"
CLIP = ("clip", "clip_text_model")  # in whose files the pictures' side may stand too


class PretrainedEncoder(TextEncoder):
    """A frozen text model.

    Args:
        config: `width` must be the model's; captions are cut after `words` tokens.
        name: a folder, or an id of the hub. In a folder of diffusers' layout the model lies in
            `text_encoder` and its tokeniser in `tokenizer`.
    """

    padded = True

    def __init__(self, config: TextConfig, name: str) -> None:
        super().__init__()
        if not name:
            raise UserError("text=pretrained: lacks the model: name a folder or an id of the hub.")
        self.config, self.name, self.width = config, name, config.width
        self.register_buffer("here", torch.zeros(()), persistent=False)  # knows the device
        self.here: Tensor
        self._loaded: tuple[Any, Any] | None = None  # out of the way of `parameters`

    def check(self) -> None:
        self._read()

    def _parts(self) -> tuple[Any, Any]:
        """(tokeniser, model), read at the first call."""
        tokenizer, model = self._read()
        return tokenizer, model.to(self.here.device)

    def _read(self) -> tuple[Any, Any]:
        if self._loaded is None:
            tokenizer, model = load_text_model(self.name)
            width = getattr(model.config, "hidden_size", None) or model.config.d_model
            if width != self.width:
                raise UserError(
                    f"{self.name} gives vectors of {width}: set encoder.width={width} (it is "
                    f"{self.width})."
                )
            most = getattr(model.config, "max_position_embeddings", None)
            if most is not None and "roberta" in model.config.model_type:
                most -= 2  # the first two places are not for words
            if most is not None and self.config.words > most:
                raise UserError(
                    f"{self.name} reads at most {most} tokens: set encoder.words={most} (it is "
                    f"{self.config.words})."
                )
            self._loaded = (tokenizer, model.eval().requires_grad_(False))
        return self._loaded

    @torch.no_grad()
    def encode(self, captions: list[str]) -> TextFeatures:
        tokenizer, model = self._parts()
        found = tokenizer(
            captions,
            padding="max_length",
            max_length=self.config.words,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.here.device)
        found["attention_mask"][:, 0] = 1  # an empty caption without a start has a place to look at
        mask = found["attention_mask"].bool()
        if model.config.model_type in CLIP:  # causal, and read with its padding, as it was trained
            given = model(input_ids=found["input_ids"])
            words, sentence = given.last_hidden_state, given.pooler_output
        else:
            words = model(**found).last_hidden_state
            share = mask / mask.sum(1, keepdim=True)
            sentence = (words * share[..., None]).sum(1)
        return TextFeatures(words.float(), mask, sentence.float(), found["input_ids"])

    def null(self, count: int) -> TextFeatures:
        """The features of the empty caption."""
        return self.encode([""])[torch.zeros(count, dtype=torch.int64, device=self.here.device)]

    def pieces(self, caption: str) -> list[str]:
        tokenizer, _ = self._parts()
        ids = tokenizer(caption, max_length=self.config.words, truncation=True)["input_ids"]
        return [str(piece) for piece in tokenizer.convert_ids_to_tokens(ids)]


def load_text_model(name: str) -> tuple[Any, Any]:
    """(tokeniser, text model) of a folder or of the hub.

    Raises:
        UserError: `transformers` is not installed, or there is no such model.
    """
    try:
        from transformers import (
            MODEL_FOR_TEXT_ENCODING_MAPPING,
            AutoConfig,
            AutoModel,
            AutoModelForTextEncoding,
            AutoTokenizer,
            CLIPTextModel,
        )
    except ImportError as error:
        raise UserError(
            "text=pretrained: needs transformers: pip install 'lineage-t2i[hub]'."
        ) from error
    folder = Path(name)
    within = folder / "text_encoder"
    places = (folder / "tokenizer", within) if within.is_dir() else (name, name)
    try:
        config = AutoConfig.from_pretrained(places[1])
        tokenizer = AutoTokenizer.from_pretrained(places[0], padding_side="right")
        spare = tokenizer.eos_token or tokenizer.unk_token
        tokenizer.pad_token = tokenizer.pad_token or spare
        encodes = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING  # as T5, without its decoder
        kind: Any = AutoModelForTextEncoding if encodes else AutoModel
        kind = CLIPTextModel if config.model_type in CLIP else kind
        model = kind.from_pretrained(places[1])
        return tokenizer, model.get_encoder() if model.config.is_encoder_decoder else model
    except Exception as error:  # of many kinds: no folder, no file in it, no network, a broken file
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name} holds no text model that can be read ({line[:160]}). Name a folder with "
            "config.json, the weights and the tokeniser, or an id of the hub."
        ) from error
