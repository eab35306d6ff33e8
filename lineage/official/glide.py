"""GLIDE (Nichol et al. 2021): outputs of its text transformer and of its UNet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from lineage.config import TextConfig
from lineage.diffusion.networks.unet import UNet, make_unet
from lineage.official.adm_unet import split_heads, unet_config, unet_state
from lineage.official.verify import Verifier, output
from lineage.text.contract import TextFeatures
from lineage.text.padded import GlideEncoder
from lineage.text.tokenizer import WordTokenizer

# --- key map --------------------------------------------------------------------------------------

TEXT_OUTER = {
    "token_emb.weight": "token_embedding.weight",
    "pos_emb": "positional_embedding",
    "pad_emb": "padding_embedding",
    "norm.weight": "final_ln.weight",
    "norm.bias": "final_ln.bias",
}
TEXT_BLOCK = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.to_out": "attn.c_proj",
    "mlp.0": "mlp.c_fc",
    "mlp.2": "mlp.c_proj",
}


def tokenizer_of_size(vocab_size: int) -> WordTokenizer:
    """A tokeniser with so many tokens."""
    special = len(WordTokenizer([]))
    return WordTokenizer([f"w{k}" for k in range(vocab_size - special)])


def text_state(encoder: GlideEncoder, official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of GLIDE's text transformer under our names."""
    state: dict[str, Tensor] = {}
    for key in encoder.state_dict():
        match = re.fullmatch(r"blocks\.(\d+)\.(.*)\.(weight|bias)", key)
        if match is None:
            state[key] = official[TEXT_OUTER[key]]
            continue
        number, layer, kind = match.groups()
        block = f"transformer.resblocks.{number}"
        if layer in TEXT_BLOCK:
            state[key] = official[f"{block}.{TEXT_BLOCK[layer]}.{kind}"]
        elif layer == "attn.to_q":  # one official layer of queries, keys and values
            qkv, num_heads = official[f"{block}.attn.c_qkv.{kind}"], encoder.config.num_heads
            for name, part in zip("qkv", split_heads(qkv, 3, num_heads, True), strict=True):
                state[f"blocks.{number}.attn.to_{name}.{kind}"] = part
    return state


# --- outputs --------------------------------------------------------------------------------------


class GlideOutputs(Verifier):
    """Outputs of GLIDE's `Text2ImUNet`."""

    name = "glide_text2im"
    source = ("openai/glide-text2im",)

    @cached_property
    def encoder(self) -> GlideEncoder:
        config = TextConfig(
            width=self.config["xf_width"],
            max_words=self.config["text_ctx"],
            num_layers=self.config["xf_layers"],
            num_heads=self.config["xf_heads"],
        )
        encoder = GlideEncoder(config, tokenizer_of_size(self.config["n_vocab"]))
        encoder.load_state_dict(text_state(encoder, self.state[""]))
        return encoder.eval()

    @cached_property
    def unet(self) -> UNet:
        width, state = self.config["xf_width"], self.state[""]
        channels = self.config["in_channels"], self.config["out_channels"]
        unet = make_unet(unet_config(self.config, "joint"), width, width, *channels)
        weights = unet_state(unet, state)
        for kind in ("weight", "bias"):
            weights[f"sentence_proj.{kind}"] = state[f"transformer_proj.{kind}"]
        unet.load_state_dict(weights)
        return unet.eval()

    def encode(self, mask: Tensor) -> TextFeatures:
        """Features of the file's tokens with a mask (B, L)."""
        words, sentence = self.encoder(self.inputs["tokens"], mask)
        return TextFeatures(words, mask, sentence, self.inputs["tokens"])

    @cached_property
    def text(self) -> TextFeatures:
        return self.encode(self.inputs["mask"])

    @output("out")
    def out(self) -> Tensor:
        return self.unet(self.inputs["x"], self.inputs["t"], self.text)

    @output("out_all_padding")
    def out_all_padding(self) -> Tensor:
        text = self.encode(torch.zeros_like(self.inputs["mask"]))
        return self.unet(self.inputs["x"], self.inputs["t"], text)

    @output("xf_out")
    def xf_out(self) -> Tensor:
        return self.text.words.mT

    @output("xf_proj")
    def xf_proj(self) -> Tensor:
        weight, bias = (self.state[""][f"transformer_proj.{kind}"] for kind in ("weight", "bias"))
        return self.text.sentence @ weight.T + bias
