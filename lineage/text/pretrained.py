"""`pretrained:NAME`: a frozen text model of Hugging Face. NAME is a folder, or an id of the hub.

Words are the model's last hidden states. The sentence is CLIP's pooled output, or the mean of the
words for other models; start and end count as words. (A model of sentences such as all-MiniLM
divides that mean by its norm, so that products are cosines. Here the mean stays as it is: a family
learns what it does with it.) The weights are loaded at the first use. They are no part of a run,
which needs the model again.

Every caption has `max_words` positions; behind the last word the mask is False. No word depends on
the padding: CLIP is causal, and other models have the mask. But a network may attend to the
positions behind the words, as Stable Diffusion's does, and expects as many for every caption; other
networks leave them out by the mask. They cost time: `encoder.max_words` should be no larger than
the longest caption needs.

Axes: B captions, L = `max_words` positions, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineage.characters import well_formed
from lineage.config import TextConfig
from lineage.errors import UserError
from lineage.text.contract import FrozenEncoder, Overflow, TextFeatures, caption_list, content_hash

PRETRAINED = "pretrained:"
CLIP = ("clip", "clip_text_model")  # types of a whole CLIP, and of its text model alone


class PretrainedEncoder(FrozenEncoder):
    """A frozen text model.

    Args:
        config: `width` must be the model's; captions are cut after `max_words` tokens.
        name: Folder, or id of the hub. In a folder of diffusers' layout the model is in
            `text_encoder` and its tokeniser in `tokenizer`.
    """

    padded = True

    def __init__(self, config: TextConfig, name: str) -> None:
        super().__init__()
        if not name:
            raise UserError("text=pretrained: lacks the model: name a folder or an id of the hub.")
        self.config, self.name = config, name
        self.word_dim = self.sentence_dim = config.width
        self.register_buffer("device_tag", torch.zeros(()), persistent=False)  # moves with `.to`
        self.device_tag: Tensor
        self._loaded: tuple[Any, Any] | None = None  # in a tuple, so that it is no submodule

    def check(self) -> None:
        self._load()

    @torch.no_grad()
    def encode(self, captions: list[str]) -> TextFeatures:
        device = self.device_tag.device
        tokenizer, model = self._load()
        model.to(device)
        inputs = tokenizer(
            caption_list(captions),
            padding="max_length",
            max_length=self.config.max_words,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(device)
        # a tokeniser without a start token has no token at all for an empty caption
        inputs["attention_mask"][:, 0] = 1
        mask = inputs["attention_mask"].bool()
        if model.config.model_type in CLIP:  # causal, and trained without a mask of the padding
            output = model(input_ids=inputs["input_ids"])
            words, sentence = output.last_hidden_state, output.pooler_output
        else:
            words = model(**inputs).last_hidden_state
            share = mask / mask.sum(1, keepdim=True)
            sentence = (words * share[..., None]).sum(1)
        return TextFeatures(words.float(), mask, sentence.float(), inputs["input_ids"])

    def num_words(self, caption: str) -> tuple[int, ...]:
        """All positions; and those of the caption if it fills them, since `transformers` leaves out
        the mask of a batch without padding, and then rounds differently.
        """
        length = self.config.max_words
        return (length, 0) if len(self.tokens(caption)) < length else (length, length)

    def fingerprint(self) -> str:
        tokenizer, model = self._load()
        backend = getattr(tokenizer, "backend_tokenizer", None)
        words = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
        sizes = {n: v for n, v in model.config.to_dict().items() if n != "_name_or_path"}
        settings = [
            type(self).__qualname__,
            self.config.max_words,
            words,
            repr(sorted(sizes.items())),
        ]
        return content_hash(settings, model.state_dict())

    def tokens(self, caption: str) -> list[str]:
        tokenizer, _ = self._load()
        length = self.config.max_words
        ids = tokenizer(well_formed(caption), max_length=length, truncation=True)["input_ids"]
        return [str(token) for token in tokenizer.convert_ids_to_tokens(ids)]

    def overflow(self, caption: str, length: int | None = None) -> Overflow | None:
        tokenizer, _ = self._load()
        length = min(length or self.config.max_words, self.config.max_words)
        ids = tokenizer(well_formed(caption), add_special_tokens=False, verbose=False)["input_ids"]
        room = max(0, length - tokenizer.num_special_tokens_to_add())
        if len(ids) <= room:
            return None
        return Overflow(f"{length} tokens", tokenizer.decode(ids[room:]).strip())

    def _load(self) -> tuple[Any, Any]:
        """(tokeniser, model), read at the first call.

        Raises:
            UserError: the model cannot be read, or its sizes are not those of `config`.
        """
        if self._loaded is None:
            tokenizer, model = load_text_model(self.name)
            self._check_sizes(model.config)
            self._loaded = (tokenizer, model.eval().requires_grad_(False))
        return self._loaded

    def _check_sizes(self, sizes: Any) -> None:
        width = getattr(sizes, "hidden_size", None) or sizes.d_model
        if width != self.word_dim:
            raise UserError(
                f"{self.name} has vectors of width {width}, not {self.word_dim}: set "
                f"encoder.width={width}, or write NAME@{width} in text=joined:."
            )
        longest = getattr(sizes, "max_position_embeddings", None)
        if longest is not None and "roberta" in sizes.model_type:
            longest -= 2  # its first two positions are not for words
        if longest is not None and self.config.max_words > longest:
            raise UserError(
                f"{self.name} reads at most {longest} tokens: set encoder.max_words={longest} (it "
                f"is {self.config.max_words})."
            )


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
        from transformers.utils import logging
    except ImportError as error:
        raise UserError(
            "text=pretrained: needs transformers: pip install 'lineage-t2i[hub]'."
        ) from error
    logging.disable_progress_bar()  # training has one of its own
    folder = Path(name)
    inner = folder / "text_encoder"
    tokenizer_path, model_path = (folder / "tokenizer", inner) if inner.is_dir() else (name, name)
    try:
        config = AutoConfig.from_pretrained(model_path)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, padding_side="right")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
        # of an encoder-decoder such as T5, the class that leaves the decoder out
        encoder_only = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
        cls: Any = AutoModelForTextEncoding if encoder_only else AutoModel
        cls = CLIPTextModel if config.model_type in CLIP else cls
        model = cls.from_pretrained(model_path)
        return tokenizer, model.get_encoder() if model.config.is_encoder_decoder else model
    except Exception as error:  # of many kinds: no folder, no file in it, no network, a broken file
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name} holds no text model that can be read ({line[:160]}). Name a folder with "
            "config.json, the weights and the tokeniser, or an id of the hub."
        ) from error
