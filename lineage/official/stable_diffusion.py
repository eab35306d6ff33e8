"""Stable Diffusion v1 in diffusers' layout: its names, and the original ones for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lineage.errors import UserError
from lineage.official.adm_unet import official_names
from lineage.official.dalle import count_indices
from lineage.official.importing import read_checkpoint

UNET = {
    "down_blocks.": "down.",
    "mid_block.": "mid.",
    "up_blocks.": "up.",
    ".downsamplers.0.": ".resample.",
    ".upsamplers.0.": ".resample.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "conv_norm_out.": "norm_out.",
    ".attn1.": ".self_attn.",
    ".attn2.": ".cross_attn.",
    ".to_out.0.": ".to_out.",
    ".ff.net.0.proj.": ".ff.proj_in.",
    ".ff.net.2.": ".ff.proj_out.",
}
"""Parts of names in `UNet2DConditionModel` that are others in our UNet."""

VAE = {
    ".downsamplers.0.": ".downsample.",
    ".upsamplers.0.": ".upsample.",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
    ".resnets.": ".block.",
}
"""Parts of names in `AutoencoderKL` that are others in the original one."""

VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",  # until 2023
}


def our_unet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' `UNet2DConditionModel` under the names of our UNet."""
    return {_replaced(key, UNET): value for key, value in state.items()}


def original_unet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' `UNet2DConditionModel` under latent diffusion's names."""
    ours = our_unet(state)
    names = official_names(ours)
    return {names[key]: value for key, value in ours.items()}


def original_autoencoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' `AutoencoderKL` under latent diffusion's names."""
    num_levels = count_indices(state, r"decoder\.up_blocks\.(\d+)\.")
    original: dict[str, Tensor] = {}
    for key, value in state.items():
        key = _replaced(key.replace("down_blocks.", "down."), VAE)
        key = re.sub(r"up_blocks\.(\d+)\.", lambda m: f"up.{num_levels - 1 - int(m[1])}.", key)
        if match := re.fullmatch(r"(\w+\.mid\.attn_1)\.(.+)\.(weight|bias)", key):
            key = f"{match[1]}.{VAE_ATTENTION[match[2]]}.{match[3]}"
            is_linear = value.dim() == 2  # a layer there, a 1 x 1 convolution here
            value = value[:, :, None, None] if is_linear else value
        original[key] = value
    return original


def _replaced(key: str, parts: Mapping[str, str]) -> str:
    for theirs, ours in parts.items():
        key = key.replace(theirs, ours)
    return key


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """UNet and autoencoder of a folder in diffusers' layout, under the original names."""
    unet, vae = (read_checkpoint(_weights_in(folder / part)) for part in ("unet", "vae"))
    return original_unet(unet), original_autoencoder(vae)


def _weights_in(folder: Path) -> Path:
    """The file of weights in a folder, a safe one if there is one."""
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"{folder} holds no diffusion_pytorch_model.safetensors or .bin, as diffusers' layout has."
    )


def diffusers_layer(name: str) -> str:
    """Name in `UNet2DConditionModel` of a layer of our UNet, such as `down.0.resnets.0.conv1`."""
    sampler = ".downsamplers.0." if name.startswith("down.") else ".upsamplers.0."
    name = f"{name}."
    for theirs, ours in UNET.items():
        if theirs in (".downsamplers.0.", ".upsamplers.0."):
            name = name.replace(ours, sampler)
        elif theirs.endswith("_blocks.") or theirs == "mid_block.":
            name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
        else:
            name = name.replace(ours, theirs)
    return name.removesuffix(".")
