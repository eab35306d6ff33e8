"""Verifiers and key maps of diffusion networks: guided-diffusion's and GLIDE's UNets, latent
diffusion's UNet, autoencoder and text encoder, and DiT.

Our UNet is that of all three. A map gives, for each of our tensors, the official ones that are laid
one behind the other to make it; it is written down once by walking through our network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from lineage.config import TextConfig
from lineage.diffusion.networks.unet import Level, UNet, UNetConfig
from lineage.official import Outputs
from lineage.official.verify import Reference
from lineage.text.contract import TextFeatures
from lineage.text.padded import GlideEncoder, PaddedEncoder
from lineage.text.tokenizer import WordTokenizer

Names = dict[str, tuple[str, ...]]
"""Ours -> the official tensors that make it, one behind the other."""

# --- the UNet -------------------------------------------------------------------------------------

RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
WITHIN_TRANSFORMER = {
    "pixels.query": ("attn1.to_q",),
    "pixels.key_value": ("attn1.to_k", "attn1.to_v"),
    "pixels.out": ("attn1.to_out.0",),
    "words.query": ("attn2.to_q",),
    "words.key_value": ("attn2.to_k", "attn2.to_v"),
    "words.out": ("attn2.to_out.0",),
    "feed.enter": ("ff.net.0.proj",),
    "feed.leave": ("ff.net.2",),
}


def places(unet: UNet) -> Iterator[tuple[str, str]]:
    """(our module, the official one) of all blocks and lone layers of a UNet."""
    yield from (("time.0", "time_embed.0"), ("time.2", "time_embed.2"))
    yield from (("enter", "input_blocks.0.0"), ("norm", "out.0"), ("leave", "out.2"))
    for number, part in enumerate(unet.down):
        at = f"input_blocks.{number + 1}"
        if not isinstance(part, Level):
            yield f"down.{number}", f"{at}.0.op"
            continue
        yield f"down.{number}.residual", f"{at}.0"
        yield f"down.{number}.attention", f"{at}.1"
    yield from (("middle.0.residual", "middle_block.0"), ("middle.0.attention", "middle_block.1"))
    yield "middle.1.residual", "middle_block.2"
    block, within = -1, 0
    for number, part in enumerate(unet.up):
        if isinstance(part, Level) and not part.residual.resample:
            block, within = block + 1, 1 if part.attention is None else 2
            yield f"up.{number}.residual", f"output_blocks.{block}.0"
            yield f"up.{number}.attention", f"output_blocks.{block}.1"
        elif isinstance(part, Level):
            yield f"up.{number}.residual", f"output_blocks.{block}.{within}"
        else:
            yield f"up.{number}.conv", f"output_blocks.{block}.{within}.conv"


def unet_names(unet: UNet) -> Names:
    """The map of a UNet with spatial transformers."""
    names = unet_names_without_attention(unet)
    for ours, theirs in places(unet):
        level, _, last = ours.rpartition(".")
        attention = unet.get_submodule(level).attention if last == "attention" else None
        for key in attention.state_dict() if isinstance(attention, nn.Module) else ():
            inner, _, kind = key.rpartition(".")
            parts = tuple(f"{theirs}.{part}.{kind}" for part in _transformer(inner))
            names[f"{ours}.{key}"] = parts
    return names


def _transformer(inner: str) -> tuple[str, ...]:
    """A layer of a spatial transformer."""
    alone = {"norm": "norm", "enter": "proj_in", "leave": "proj_out"}
    if inner in alone:
        return (alone[inner],)
    _, number, layer = inner.split(".", 2)
    parts = WITHIN_TRANSFORMER.get(layer, (layer,))
    return tuple(f"transformer_blocks.{number}.{part}" for part in parts)


def gathered(names: Names, official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors of the official ones."""
    return {ours: torch.cat([official[name] for name in parts]) for ours, parts in names.items()}


def attention_state(
    unet: UNet, official: Mapping[str, Tensor], heads_first: bool = True
) -> dict[str, Tensor]:
    """The attention blocks of guided-diffusion and GLIDE, whose queries, keys and values are one
    layer, ordered by heads first, or not.
    """
    state: dict[str, Tensor] = {}

    def split(tensor: Tensor, heads: int, parts: int) -> list[Tensor]:
        tensor = tensor.squeeze(-1) if tensor.dim() == 3 else tensor  # of a 1 x 1 convolution
        pattern = "(h p d) ... -> p (h d) ..." if heads_first else "(p h d) ... -> p (h d) ..."
        return list(rearrange(tensor, pattern, h=heads, p=parts))

    for ours, theirs in places(unet):
        if not ours.endswith(".attention") or f"{theirs}.qkv.weight" not in official:
            continue
        heads = unet.get_submodule(ours).pixels.heads  # type: ignore[union-attr]
        for kind in ("weight", "bias"):
            query, key, value = split(official[f"{theirs}.qkv.{kind}"], int(heads), 3)  # type: ignore[arg-type]
            state[f"{ours}.norm.{kind}"] = official[f"{theirs}.norm.{kind}"]
            state[f"{ours}.pixels.query.{kind}"] = query
            state[f"{ours}.pixels.key_value.{kind}"] = torch.cat([key, value])
            out = official[f"{theirs}.proj_out.{kind}"]
            state[f"{ours}.pixels.out.{kind}"] = out.squeeze(-1) if out.dim() == 3 else out
            if f"{theirs}.encoder_kv.{kind}" in official:
                told = split(official[f"{theirs}.encoder_kv.{kind}"], int(heads), 2)  # type: ignore[arg-type]
                state[f"{ours}.words_joint.{kind}"] = torch.cat(told)
    return state


def guided_state(
    unet: UNet, official: Mapping[str, Tensor], heads_first: bool, sentence: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights of guided-diffusion's or GLIDE's UNet by our names."""
    attention = attention_state(unet, official, heads_first)
    told = {f"sentence.{kind}": value for kind, value in sentence.items()}
    return {**gathered(unet_names_without_attention(unet), official), **attention, **told}


def unet_names_without_attention(unet: UNet) -> Names:
    """The map of what is neither attention nor sentence."""
    names: Names = {}
    for ours, theirs in places(unet):
        if ours.endswith(".attention"):
            continue
        for inner in unet.get_submodule(ours).state_dict():
            layer, _, kind = inner.rpartition(".")
            at = f"{theirs}.{RESIDUAL[layer]}" if ours.endswith(".residual") else theirs
            names[f"{ours}.{inner}"] = (f"{at}.{kind}",)
    return names


def unet_config(official: Mapping[str, Any], conditioning: str) -> UNetConfig:
    """Our configuration for the authors' arguments. Attention is named by how often the side was
    halved, 1, 2, 4, ...
    """
    width = official.get("num_head_channels", -1)
    return UNetConfig(
        width=official["model_channels"],
        multipliers=tuple(official["channel_mult"]),
        blocks=official["num_res_blocks"],
        attention=tuple(int(math.log2(k)) for k in official["attention_resolutions"]),
        heads=max(1, official.get("num_heads", 1)),
        head_width=width if width > 0 else 0,
        conditioning=conditioning,
        depth=official.get("transformer_depth", 1),
        padding=True,
        shift=official.get("use_scale_shift_norm", False),
        block_resampling=official.get("resblock_updown", False),
        groups=32,
        dropout=0.0,
    )


def told(words: Tensor, sentence: Tensor | None = None) -> TextFeatures:
    """Text of words (B, L, D), and of a sentence (B, D)."""
    sentence = words.mean(1) if sentence is None else sentence
    mask = torch.ones(words.shape[:2], dtype=torch.bool)
    return TextFeatures(words, mask, sentence, mask.long())


@torch.no_grad()
def adm_unet(reference: Reference) -> Outputs:
    """Every output of guided-diffusion's UNet that a reference file may hold."""
    official, given, state = reference.config, reference.inputs, reference.state[""]
    classes = official.get("num_classes")
    config = unet_config(official, "sentence" if classes else "none")
    unet = UNet(config, classes or 1, official["in_channels"], official["out_channels"]).eval()
    sentence = {}
    if classes:
        table = state["label_emb.weight"]
        sentence = {"weight": table.T, "bias": table.new_zeros(table.shape[1])}
    first = not official.get("use_new_attention_order", False)
    unet.load_state_dict(guided_state(unet, state, first, sentence))
    one_hot = (
        torch.nn.functional.one_hot(given["y"], classes).float()
        if classes
        else torch.zeros(len(given["x"]), 1)
    )
    return {"out": unet(given["x"], given["t"], told(one_hot[:, None], one_hot))}


# --- GLIDE ----------------------------------------------------------------------------------------


def tokens_only(count: int) -> WordTokenizer:
    """A tokeniser of so many tokens, whose words nobody asks for."""
    special = len(WordTokenizer([]))
    return WordTokenizer([f"w{k}" for k in range(count - special)])


def padded_state(encoder: PaddedEncoder, official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """GLIDE's text transformer, or latent diffusion's, by our names."""
    glide = isinstance(encoder, GlideEncoder)
    state: dict[str, Tensor] = {}
    for number, block in enumerate(encoder.blocks):
        ours = f"blocks.{number}"
        if glide:
            theirs = f"transformer.resblocks.{number}"
            layers = {"norm1": "ln_1", "norm2": "ln_2", "mlp.0": "mlp.c_fc", "mlp.2": "mlp.c_proj"}
            layers |= {"attention.out": "attn.c_proj"}
            heads = block.attention.heads  # type: ignore[union-attr]
            for kind in ("weight", "bias"):
                whole = official[f"{theirs}.attn.c_qkv.{kind}"]
                query, *pairs = rearrange(whole, "(h p d) ... -> p (h d) ...", h=heads, p=3)
                state[f"{ours}.attention.query.{kind}"] = query
                state[f"{ours}.attention.key_value.{kind}"] = torch.cat(pairs)
        else:
            theirs = "attn_layers.layers"
            attention, feed = f"{2 * number}", f"{2 * number + 1}"
            layers = {"norm1": f"{attention}.0", "norm2": f"{feed}.0"}
            layers |= {"mlp.0": f"{feed}.1.net.0.0", "mlp.2": f"{feed}.1.net.2"}
            layers |= {"attention.out": f"{attention}.1.to_out"}
            parts = [official[f"{theirs}.{attention}.1.to_{x}.weight"] for x in "qkv"]
            state[f"{ours}.attention.query.weight"] = parts[0]
            state[f"{ours}.attention.key_value.weight"] = torch.cat(parts[1:])
        for mine, layer in layers.items():
            for kind in ("weight", "bias"):
                state[f"{ours}.{mine}.{kind}"] = official[f"{theirs}.{layer}.{kind}"]
    rest = {
        "table.weight": "token_embedding.weight" if glide else "token_emb.weight",
        "position": "positional_embedding" if glide else "pos_emb.emb.weight",
    }
    rest |= {"padding": "padding_embedding"} if glide else {}
    last = "final_ln" if glide else "norm"
    for kind in ("weight", "bias"):
        rest[f"norm.{kind}"] = f"{last}.{kind}"
    return state | {mine: official[name] for mine, name in rest.items()}


@torch.no_grad()
def glide_text2im(reference: Reference) -> Outputs:
    """Every output of GLIDE's network that a reference file may hold."""
    official, given, state = reference.config, reference.inputs, reference.state[""]
    sizes = TextConfig(
        width=official["xf_width"],
        words=official["text_ctx"],
        layers=official["xf_layers"],
        heads=official["xf_heads"],
    )
    encoder = GlideEncoder(sizes, tokens_only(official["n_vocab"])).eval()
    encoder.load_state_dict(padded_state(encoder, state))
    config = unet_config(official, "joint")
    unet = UNet(config, sizes.width, official["in_channels"], official["out_channels"]).eval()
    sentence = {kind: state[f"transformer_proj.{kind}"] for kind in ("weight", "bias")}
    unet.load_state_dict(guided_state(unet, state, True, sentence))

    def read(mask: Tensor) -> TextFeatures:
        words, last = encoder(given["tokens"], mask)
        return TextFeatures(words, mask, last, given["tokens"])

    text, mask = read(given["mask"]), given["mask"]
    nothing = read(torch.zeros_like(mask))
    return {
        "out": unet(given["x"], given["t"], text),
        "out_all_padding": unet(given["x"], given["t"], nothing),
        "xf_out": text.words.mT,
        "xf_proj": unet.sentence(text.sentence) if unet.sentence is not None else "no sentence",
    }
