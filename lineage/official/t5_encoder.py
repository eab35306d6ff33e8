"""T5's encoder (Raffel et al. 2020) of huggingface/transformers: key map and outputs.

    t5_encoder                a published state dict -> our encoder with its weights
    t5_config, t5_state       its sizes, and its weights under our names
    official_key              official name of a tensor of our encoder

A published file holds the encoder alone, or the whole T5. Its embedding is `shared.weight`, or
`encoder.embed_tokens.weight`, or both, which are the same tensor; `lm_head.weight` belongs to the
decoder, and is never taken for it. The tensors do not show which function the gate has (GELU in
version 1.1, mT5 and Flan-T5, but SiLU in UL2), nor the eps and the largest distance, which are the
same in all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lineage.config import TextConfig
from lineage.errors import UserError
from lineage.official.glide import tokenizer_of_size
from lineage.official.verify import NotComputed, Verifier, output
from lineage.text.t5 import (
    RMSNorm,
    T5Encoder,
    clamp_float16,
    default_sizes,
    relative_position_bucket,
)

# --- key map --------------------------------------------------------------------------------------

SHARED, EMBED_TOKENS = "shared.weight", "encoder.embed_tokens.weight"
POSITION_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
OUTER = {
    "token_emb.weight": SHARED,
    "stack.relative_attention_bias.weight": POSITION_BIAS,
    "stack.norm.weight": "encoder.final_layer_norm.weight",
}
BLOCK = {
    "norm1": "0.layer_norm",
    "attn.to_q": "0.SelfAttention.q",
    "attn.to_k": "0.SelfAttention.k",
    "attn.to_v": "0.SelfAttention.v",
    "attn.to_out": "0.SelfAttention.o",
    "norm2": "1.layer_norm",
    "ff.wi": "1.DenseReluDense.wi",
    "ff.wi_0": "1.DenseReluDense.wi_0",
    "ff.wi_1": "1.DenseReluDense.wi_1",
    "ff.wo": "1.DenseReluDense.wo",
}
NOT_OF_THE_ENCODER = re.compile(r"decoder\..*|lm_head\..*|.*layer_norm\.bias")
"""The rest of a whole T5, and a bias that old files hold and no T5 uses."""


def official_key(name: str) -> str:
    """Official name of a tensor of our `T5Encoder`."""
    match = re.fullmatch(r"stack\.blocks\.(\d+)\.(.+)\.weight", name)
    if match is None:
        return OUTER[name]
    number, layer = match.groups()
    return f"encoder.block.{number}.layer.{BLOCK[layer]}.weight"


def t5_config(official: Mapping[str, Tensor]) -> TextConfig:
    """Sizes of a published T5 encoder, from the shapes of its tensors.

    Raises:
        UserError: it is no T5 encoder.
    """
    numbers = {
        int(match[1]) for key in official if (match := re.match(r"encoder\.block\.(\d+)\.", key))
    }
    gated = official_key("stack.blocks.0.ff.wi_0.weight") in official
    wi = "stack.blocks.0.ff.wi_0.weight" if gated else "stack.blocks.0.ff.wi.weight"
    vocab_size, width = _shape_of(official, EMBED_TOKENS if SHARED not in official else SHARED)
    _, num_heads = _shape_of(official, POSITION_BIAS)
    inner_dim, _ = _shape_of(official, official_key("stack.blocks.0.attn.to_q.weight"))
    ff_dim, _ = _shape_of(official, official_key(wi))
    if inner_dim % num_heads:
        raise _refusal(f"{inner_dim} rows of queries cannot be shared by {num_heads} heads")
    return TextConfig(
        vocab_size=vocab_size,
        max_words=512,  # T5's own length; its positions have no limit
        width=width,
        num_layers=len(numbers),
        num_heads=num_heads,
        head_dim=inner_dim // num_heads,
        ff_dim=ff_dim,
        feed_forward="gated" if gated else "relu",
    )


def t5_state(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a published T5 encoder under the names of our `T5Encoder`.

    Raises:
        UserError: it is no T5 encoder, or its weights are quantised.
    """
    return _state_for(_untrained(official), official)


def t5_encoder(
    official: Mapping[str, Tensor], *, max_distance: int = 128, eps: float = 1e-6
) -> T5Encoder:
    """Our encoder with the weights of a published one, in their precision; they are not copied.

    It takes token ids. The published tokeniser is none of ours.

    Args:
        official: Published state dict.
        max_distance: Distance from which on all are in the last bucket
            [relative_attention_max_distance].
        eps: Number that is added to the mean square in the norms [layer_norm_epsilon].

    Raises:
        UserError: it is no T5 encoder, or its weights are quantised.
    """
    encoder = _untrained(official, max_distance, eps)
    encoder.load_state_dict(_state_for(encoder, official), assign=True)
    return encoder.eval()


def _untrained(
    official: Mapping[str, Tensor], max_distance: int = 128, eps: float = 1e-6
) -> T5Encoder:
    """Our encoder in the sizes of a published one, on the meta device."""
    config = t5_config(official)
    sizes = replace(
        default_sizes(config),
        num_buckets=len(official[POSITION_BIAS]),
        max_distance=max_distance,
        eps=eps,
    )
    with torch.device("meta"):
        return T5Encoder(config, tokenizer_of_size(config.vocab_size), sizes)


def _state_for(encoder: T5Encoder, official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for `encoder`, after a check of every tensor."""
    embeddings = [official[key] for key in (SHARED, EMBED_TOKENS) if key in official]
    if not (embeddings[0] is embeddings[-1] or torch.equal(embeddings[0], embeddings[-1])):
        raise _refusal(f"{SHARED} and {EMBED_TOKENS} are not the same")
    weights = {k: v for k, v in official.items() if not NOT_OF_THE_ENCODER.fullmatch(k)}
    weights.pop(EMBED_TOKENS, None)
    weights[SHARED] = embeddings[0]
    expected = {official_key(name): name for name in encoder.state_dict()}
    if missing := expected.keys() - weights.keys():
        raise _refusal(f"it lacks {min(missing)}")
    if unknown := weights.keys() - expected.keys():
        raise _refusal(f"{min(unknown)} is no tensor of T5")
    for key, name in expected.items():
        tensor, shape = weights[key], tuple(encoder.state_dict()[name].shape)
        if tuple(tensor.shape) != shape:
            raise _refusal(f"{key} has the shape {tuple(tensor.shape)}, not {shape}")
        if not tensor.is_floating_point():
            raise UserError(f"{key} is quantised ({tensor.dtype}): take the unquantised weights.")
    return {name: weights[key] for key, name in expected.items()}


def _shape_of(official: Mapping[str, Tensor], key: str) -> tuple[int, int]:
    """Shape of a matrix of the file."""
    if key not in official:
        raise _refusal(f"it lacks {SHARED if key == EMBED_TOKENS else key}")
    shape = tuple(official[key].shape)
    if len(shape) != 2 or 0 in shape:
        raise _refusal(f"{key} has the shape {shape} and should be a matrix")
    return shape


def _refusal(reason: str) -> UserError:
    return UserError(f"These weights are no T5 encoder: {reason}.")


# --- outputs --------------------------------------------------------------------------------------

NETWORK = r"(?:(\w+)/)?"  # a file of one network may leave out its name
FEED_FORWARD = ("relu", "gated-gelu")


class T5Outputs(Verifier):
    """Outputs of transformers' `T5EncoderModel`, for each network of the file."""

    name = "t5_encoder"
    source = ("huggingface/transformers", "T5EncoderModel")

    def encoder(self, network: str | None) -> T5Encoder:
        """Our encoder with the weights of a network."""
        network = network or ""
        if network not in self._encoders:
            config = self.config.get(network, self.config)
            if config.get("feed_forward_proj", "relu") not in FEED_FORWARD:
                raise NotComputed(f"feed_forward_proj is none of {', '.join(FEED_FORWARD)}")
            self._encoders[network] = t5_encoder(
                self.state[network],
                max_distance=config.get("relative_attention_max_distance", 128),
                eps=config.get("layer_norm_epsilon", 1e-6),
            )
        return self._encoders[network]

    @cached_property
    def _encoders(self) -> dict[str, T5Encoder]:
        return {}

    @property
    def ids(self) -> Tensor:
        return self.inputs["input_ids"]

    @property
    def mask(self) -> Tensor:
        return self.inputs["attention_mask"] == 1

    def encode(self, network: str | None, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Vectors of all positions, padding among them; `T5Encoder` itself sets those to zero."""
        encoder = self.encoder(network)
        return encoder.stack(encoder.token_emb(ids), mask)

    def streams(self, network: str | None) -> list[Tensor]:
        """The residual stream before the first block and after each."""
        stack = self.encoder(network).stack
        bias, streams = stack.position_bias(self.ids.shape[1]), [self.embeddings(network)]
        for block in stack.blocks:
            streams.append(block(streams[-1], bias, self.mask))
        return streams

    @output(NETWORK + "embeddings")
    def embeddings(self, network: str | None) -> Tensor:
        return self.encoder(network).token_emb(self.ids)

    @output(NETWORK + "position_bias")
    def position_bias(self, network: str | None) -> Tensor:
        return self.encoder(network).stack.position_bias(self.ids.shape[1])

    @output(NETWORK + r"block(\d+)_after_attention")
    def after_attention(self, network: str | None, number: str) -> Tensor:
        block: Any = self.encoder(network).stack.blocks[int(number)]
        stream = self.streams(network)[int(number)]
        half: Tensor = block.attention_half(stream, self.position_bias(network), self.mask)
        return half

    @output(NETWORK + "hidden_states")
    def hidden_states(self, network: str | None) -> Tensor:
        return torch.stack(self.streams(network)[1:])

    @output(NETWORK + "attention_probs")
    def attention_probs(self, network: str | None) -> Tensor:
        blocks: Any = self.encoder(network).stack.blocks
        bias = self.position_bias(network)
        return torch.stack(
            [
                block.attn.attention_probs(block.norm1(stream), bias, self.mask)
                for block, stream in zip(blocks, self.streams(network), strict=False)
            ]
        )

    @output(NETWORK + "last_hidden_state")
    def last_hidden_state(self, network: str | None) -> Tensor:
        return self.encode(network, self.ids, self.mask)

    @output(NETWORK + "last_hidden_state_no_mask")
    def no_mask(self, network: str | None) -> Tensor:
        return self.encode(network, self.ids, None)

    @output(NETWORK + "last_hidden_state_short")
    def short(self, network: str | None) -> Tensor:
        return self.encode(network, self.inputs["input_ids_short"], None)

    @output(NETWORK + r"last_hidden_state_row(\d+)_all_masked")
    def row_all_masked(self, network: str | None, row: str) -> Tensor:
        mask = self.mask.clone()
        mask[int(row)] = False
        return self.encode(network, self.ids, mask)

    @output(r"buckets/(bidirectional|causal)_(\d+)_(\d+)")
    def buckets(self, rule: str, num_buckets: str, max_distance: str) -> Tensor:
        """Of the relative positions -n, ..., n."""
        length = len(self.outputs[f"buckets/{rule}_{num_buckets}_{max_distance}"])
        return relative_position_bucket(
            torch.arange(length) - length // 2,
            bidirectional=rule == "bidirectional",
            num_buckets=int(num_buckets),
            max_distance=int(max_distance),
        )

    @output("small_rms")
    def small_rms(self) -> Tensor:
        """The norm alone; the sentence about the output states its eps."""
        sentence = self.reference.sentences.get("output/small_rms", "")
        stated = re.search(r"\beps (\d[\d.]*(?:e-?\d+)?)", sentence)
        norm = RMSNorm(self.state["rms"]["weight"].numel(), float(stated[1]) if stated else 1e-6)
        norm.load_state_dict(self.state["rms"])
        return norm(self.inputs["small_rms"])

    @output(r"fp16/clamped(\w*)")
    def clamped(self, which: str) -> Tensor:
        return clamp_float16(self.inputs[f"fp16/stream{which}"].half()).float()
