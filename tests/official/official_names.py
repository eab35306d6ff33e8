"""Weights of our classes under the names of the official code: the key maps the other way round,
written out on their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

State = dict[str, Tensor]


def gpt2_official(ours: Mapping[str, Tensor]) -> State:
    """Our `GPT` -> transformers' `GPT2LMHeadModel`, whose matrices are transposed."""
    state = {}
    for name, tensor in ours.items():
        name = re.sub(r"^(tok|pos)_emb", lambda m: f"transformer.w{m[1][0]}e", name)
        name = name.replace("head.", "lm_head.").replace(".blocks.", ".h.")
        name = re.sub(r"\.ln([12])\.", r".ln_\1.", name)
        name = name.replace(".qkv.", ".c_attn.").replace(".attn.proj.", ".attn.c_proj.")
        name = name.replace(".mlp.0.", ".mlp.c_fc.").replace(".mlp.2.", ".mlp.c_proj.")
        is_transposed = ".c_" in name and tensor.dim() == 2
        state[name] = tensor.mT if is_transposed else tensor
    return state


def mingpt_official(ours: Mapping[str, Tensor]) -> State:
    """Our `GPT` -> taming-transformers' `GPT`, without the masks in its state."""
    state = {}
    for name, tensor in ours.items():
        name = name.removeprefix("transformer.")
        if ".qkv." in name:
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                state[name.replace("qkv", part)] = third
        elif name == "pos_emb.weight":
            state["pos_emb"] = tensor[None]
        else:
            state[name] = tensor
    return state


def dvae_name(name: str) -> str:
    """A name in our `DVAEEncoder` or `DVAEDecoder` -> openai/DALL-E's."""
    name = re.sub(
        r"groups\.(\d)\.(\d)", lambda m: f"group_{int(m[1]) + 1}.block_{int(m[2]) + 1}", name
    )
    name = re.sub(r"res_path\.(\d)", lambda m: f"res_path.conv_{(int(m[1]) + 1) // 2}", name)
    name = name.replace("output.", "output.conv.")
    return "blocks." + re.sub(r"(weight|bias)$", lambda m: m[1][0], name)


def dvae_official(ours: Mapping[str, Tensor]) -> State:
    """Our `DVAEEncoder` or `DVAEDecoder` -> openai/DALL-E's."""
    return {dvae_name(name): tensor for name, tensor in ours.items()}


def autoencoder_name(name: str, part: str, num_levels: int) -> str:
    """A name in our `Encoder` or `Decoder` -> CompVis'."""
    layer = "downsample" if part == "encoder" else "upsample"
    name = re.sub(r"^up\.(\d+)", lambda m: f"up.{num_levels - int(m[1]) - 1}", name)
    return f"{part}.{name.replace('resample', layer)}"


def vqgan_official(ours: Mapping[str, Tensor], num_levels: int) -> State:
    """Our `VQGAN` -> taming-transformers' `VQModel` with its discriminator."""
    state = {}
    for name, tensor in ours.items():
        part, _, rest = name.partition(".")
        if part in ("encoder", "decoder"):
            state[autoencoder_name(rest, part, num_levels)] = tensor
        elif part in ("quant_conv", "post_quant_conv"):
            state[name] = tensor
        elif part == "discriminator":
            state[f"loss.{name}"] = tensor
        elif name == "quantiser.embedding":
            state["quantize.embedding.weight"] = tensor
    return state
