"""`import-weights ldm`: Stable Diffusion v1, in its original layout or in diffusers'.

    original    one file, as sd-v1-4.ckpt or v1-5-pruned-emaonly.safetensors: UNet, autoencoder and
                text encoder together. If it holds the average of the UNet's weights, that is taken.
    diffusers   a folder with `unet`, `vae`, `text_encoder` and `tokenizer`

UNet and autoencoder become a run; the text encoder stays where it is, as `text=pretrained:`. With
the original layout that is CLIP of the hub, or a folder that is given beside the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lineage.config import TextConfig
from lineage.diffusion.ldm import KLConfig
from lineage.diffusion.networks.unet import UNet, UNetConfig
from lineage.errors import UserError
from lineage.nn.autoencoder import AutoencoderConfig
from lineage.official.codecs import count
from lineage.official.importing import Given, Imported, read_checkpoint
from lineage.official.latent import kl_state
from lineage.official.unets import gathered, unet_names
from lineage.recipes import ldm
from lineage.text.pretrained import PRETRAINED

SCALE = 0.18215  # of the latents, by which they were trained
WIDTH = 768  # of CLIP ViT-L/14's text
UNET, FIRST, AVERAGE = "model.diffusion_model.", "first_stage_model.", "model_ema."


def import_ldm(files: Sequence[Given]) -> Imported:
    """Stable Diffusion v1's file, or its folder in diffusers' layout; a folder of CLIP beside it.

    Raises:
        UserError: what is given is something else.
    """
    folders = [file.path for file in files if file.path.is_dir()]
    whole = [path for path in folders if (path / "unet").is_dir()]
    single = [file for file in files if not file.path.is_dir()]
    if len(whole) + len(single) != 1 or len(files) > 2:
        raise UserError(
            "import-weights ldm needs one file of Stable Diffusion v1, or one folder in diffusers' "
            "layout; a folder of CLIP's text model may stand beside it."
        )
    unet, vae = of_folder(whole[0]) if whole else of_file(single[0])
    clip = next((path for path in folders if path not in whole), None)
    if clip is None and whole and (whole[0] / "text_encoder").is_dir():
        clip = whole[0]
    paper = ldm.PRESETS["paper"]
    text = paper.text if clip is None else f"{PRETRAINED}{clip.resolve()}"
    network, autoencoder = unet_sizes(unet), autoencoder_sizes(vae)
    width = unet["input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"].shape[1]
    with torch.device("meta"):
        names = unet_names(UNet(network, width, unet["input_blocks.0.0.weight"].shape[1]))
    weights = {f"network.{key}": value.float() for key, value in gathered(names, unet).items()}
    inner = kl_state(vae, len(autoencoder.net.multipliers))
    weights |= {f"autoencoder.{key}": value.float() for key, value in inner.items()}
    weights["scale"] = torch.tensor(SCALE)
    config = replace(
        paper,
        text=text,
        encoder=TextConfig(width=width, words=paper.encoder.words),
        autoencoder=autoencoder,
        model=replace(paper.model, unet=network),
    )
    note = f"The captions will be read by {text.removeprefix(PRETRAINED)}."
    return Imported(config, weights, ("autoencoder.steps",), note)


def of_file(file: Given) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(UNet, autoencoder) of the original layout, under the names that they have there."""
    state = file.tensors
    unet = {k.removeprefix(UNET): v for k, v in state.items() if k.startswith(UNET)}
    vae = {k.removeprefix(FIRST): v for k, v in state.items() if k.startswith(FIRST)}
    if not unet or not vae:
        missing = UNET if not unet else FIRST
        raise UserError(
            f"{file.path} is no Stable Diffusion v1: it has no tensor {missing}…; give the whole "
            "checkpoint, or a folder in diffusers' layout."
        )
    for key in unet:
        average = AVERAGE + f"diffusion_model.{key}".replace(".", "")
        unet[key] = state.get(average, unet[key])
    return unet, {k: v for k, v in vae.items() if not k.startswith("loss.")}


def of_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(UNet, autoencoder) of diffusers' layout, under the original names."""
    unet = original_unet(read_checkpoint(weights_in(folder / "unet")))
    return unet, original_autoencoder(read_checkpoint(weights_in(folder / "vae")))


def weights_in(folder: Path) -> Path:
    """The file of weights in a folder, a safe one if there is one."""
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"{folder} holds no diffusion_pytorch_model.safetensors or .bin, as diffusers' layout has."
    )


# --- diffusers' names -> the original ones --------------------------------------------------------

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ALONE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}


def original_unet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' UNet2DConditionModel by latent diffusion's names."""
    blocks = count(state, r"down_blocks\.0\.resnets\.(\d+)\.")

    def renamed(key: str) -> str:
        for theirs, ours in ALONE.items():
            if key.startswith(f"{theirs}."):
                return _resnet(f"{ours}.{key.removeprefix(f'{theirs}.')}")
        found = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key)
        if found is None:
            raise UserError(f"A UNet in diffusers' layout has no tensor {key}.")
        way, level, part, number, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        if way == "down":
            if part == "downsamplers":
                return f"input_blocks.{(level + 1) * (blocks + 1)}.0.{rest.replace('conv', 'op')}"
            inner = 1 if part == "attentions" else 0
            place = 1 + level * (blocks + 1) + number
            return _resnet(f"input_blocks.{place}.{inner}.{rest}")
        place = level * (blocks + 1) + (blocks if part == "upsamplers" else number)
        attends = f"up_blocks.{level}.attentions.0.norm.weight" in state
        inner = {"resnets": 0, "attentions": 1, "upsamplers": 2 if attends else 1}[part]
        return _resnet(f"output_blocks.{place}.{inner}.{rest}")

    return {renamed(key): value for key, value in state.items()}


def _resnet(key: str) -> str:
    """The layers of a residual block; other names stay."""
    found = re.fullmatch(
        r"((?:input_blocks|output_blocks)\.\d+\.\d|middle_block\.\d)\.(\w+)\.(\w+)", key
    )
    if found is None or found[2] not in RESNET:
        return key
    return f"{found[1]}.{RESNET[found[2]]}.{found[3]}"


def original_autoencoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' AutoencoderKL by latent diffusion's names."""
    levels = count(state, r"decoder\.up_blocks\.(\d+)\.")
    attention = {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }
    attention |= {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}  # until 2023

    def renamed(key: str) -> str:
        key = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets", r"encoder.down.\1.block", key)
        key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
        key = re.sub(r"up_blocks\.(\d+)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", key)
        key = re.sub(r"(up\.\d+)\.resnets", r"\1.block", key)
        key = key.replace(".upsamplers.0.", ".upsample.").replace("conv_shortcut", "nin_shortcut")
        key = key.replace("mid_block.resnets.0.", "mid.block_1.")
        key = key.replace("mid_block.resnets.1.", "mid.block_2.").replace(
            "conv_norm_out", "norm_out"
        )
        if found := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", key):
            return f"{found[1]}.mid.attn_1.{attention[found[2]]}.{found[3]}"
        return key

    made = {renamed(key): value for key, value in state.items()}
    for key, value in made.items():
        if ".attn_1." in key and key.endswith(".weight") and value.dim() == 2:
            made[key] = value[:, :, None, None]  # a layer there, a 1 x 1 convolution here
    return made


# --- sizes, read off the tensors ------------------------------------------------------------------


def unet_sizes(state: Mapping[str, Tensor]) -> UNetConfig:
    """Of latent diffusion's UNet. The number of heads cannot be seen; v1 has 8."""
    first = state["input_blocks.1.1.proj_in.weight"]
    if first.dim() != 4 or "label_emb.0.0.weight" in state:
        raise UserError("This is a UNet of Stable Diffusion v2 or XL; only v1 can be read.")
    width = state["input_blocks.0.0.weight"].shape[0]
    multipliers, attention, blocks, number = [0], set(), 0, 1
    while f"input_blocks.{number}.0.op.weight" in state or (
        f"input_blocks.{number}.0.in_layers.2.weight" in state
    ):
        if f"input_blocks.{number}.0.op.weight" in state:
            multipliers.append(0)
        else:
            made = state[f"input_blocks.{number}.0.in_layers.2.weight"].shape[0]
            multipliers[-1] = made // width
            blocks += len(multipliers) == 1
            if f"input_blocks.{number}.1.norm.weight" in state:
                attention.add(len(multipliers) - 1)
        number += 1
    depth = count(state, r"input_blocks\.1\.1\.transformer_blocks\.(\d+)\.")
    paper = ldm.PRESETS["paper"].model.unet
    return replace(
        paper,
        width=width,
        multipliers=tuple(multipliers),
        blocks=blocks,
        attention=tuple(sorted(attention)),
        depth=depth,
    )


def autoencoder_sizes(state: Mapping[str, Tensor]) -> KLConfig:
    """Of latent diffusion's autoencoder, without what only its training needs."""
    levels = count(state, r"encoder\.down\.(\d+)\.")
    channels = state["encoder.conv_in.weight"].shape[0]
    widths = [
        state[f"encoder.down.{k}.block.0.conv2.weight"].shape[0] // channels for k in range(levels)
    ]
    net = AutoencoderConfig(
        channels=channels,
        multipliers=tuple(widths),
        blocks=count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        attention=(),
        size=256,
        latent=state["decoder.conv_in.weight"].shape[1],
    )
    width = state["post_quant_conv.weight"].shape[1]
    return KLConfig(net, width, adversary=0.0, perceptual=0.0)
