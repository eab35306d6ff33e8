"""The UNet of guided-diffusion (Dhariwal and Nichol 2021): its outputs, and its key map, which the
UNets of GLIDE and latent diffusion share.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from lineage.diffusion.networks.attention_blocks import JointAttentionBlock, SelfAttentionBlock
from lineage.diffusion.networks.unet import UNet, UNetConfig, make_unet
from lineage.official.dalle import count_indices
from lineage.official.verify import NotComputed, Verifier, output
from lineage.text.contract import TextFeatures

# --- key map --------------------------------------------------------------------------------------

OUTER = {"conv_in": "input_blocks.0.0", "norm_out": "out.0", "conv_out": "out.2"}
RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
TRANSFORMER = {
    "self_attn": "attn1",
    "cross_attn": "attn2",
    "to_out": "to_out.0",
    "ff.proj_in": "ff.net.0.proj",
    "ff.proj_out": "ff.net.2",
}
"""Layers of a spatial transformer; all others have the same name."""


MID = re.compile(r"mid\.(resnets|attentions)\.(\d)\.(.*)\.(weight|bias)")
LEVEL = re.compile(
    r"(down|up)\.(\d+)\.(resnets|attentions|resample)\.(?:(\d+)\.)?(.*)\.(weight|bias)"
)


def official_names(keys: Iterable[str]) -> dict[str, str]:
    """Official name of each tensor of our UNet, by our name.

    The official blocks of the way down, `input_blocks`, and of the way up, `output_blocks`, are
    numbered through all levels. Downsampling is a block of its own; upsampling is the last part of
    a level's last block.
    """
    keys = list(keys)
    per_level = count_indices(keys, r"down\.0\.resnets\.(\d+)\.") + 1
    attends = {match[1] for key in keys if (match := re.match(r"up\.(\d+)\.attentions\.", key))}

    def name(key: str) -> str:
        if match := MID.fullmatch(key):
            part, number, layer, kind = match.groups()
            block = f"middle_block.{1 if part == 'attentions' else 2 * int(number)}"
        elif match := LEVEL.fullmatch(key):
            way, level, part, number, layer, kind = match.groups()
            index = int(level) * per_level + (per_level - 1 if number is None else int(number))
            if way == "down":
                inner = int(part == "attentions")
                block = f"input_blocks.{index + 1}.{inner}"  # block 0 is the first convolution
                layer = "op" if layer == "conv" else layer
            else:
                upsample = 2 if level in attends else 1
                inner = {"resnets": 0, "attentions": 1, "resample": upsample}[part]
                block = f"output_blocks.{index}.{inner}"
        else:
            layer, _, kind = key.rpartition(".")
            return f"{OUTER.get(layer, layer)}.{kind}"
        attention = part == "attentions"
        layer = _layer_in_attention(layer) if attention else RESIDUAL.get(layer, layer)
        return f"{block}.{layer}.{kind}"

    return {key: name(key) for key in keys}


def _layer_in_attention(layer: str) -> str:
    for ours, theirs in TRANSFORMER.items():
        layer = layer.replace(ours, theirs)
    return layer


def split_heads(tensor: Tensor, parts: int, num_heads: int, heads_first: bool) -> list[Tensor]:
    """Queries, keys and values of one official layer, which orders its outputs by heads first, or
    by parts first.
    """
    tensor = tensor.squeeze(-1) if tensor.dim() == 3 else tensor  # a 1 x 1 convolution
    order = "h p d" if heads_first else "p h d"
    return list(rearrange(tensor, f"({order}) ... -> p (h d) ...", h=num_heads, p=parts))


def attention_state(
    config: UNetConfig, official: Mapping[str, Tensor], block: str, heads_first: bool = True
) -> dict[str, Tensor]:
    """Weights of an attention block of guided-diffusion or GLIDE, under the names in our block."""
    attn = "joint_attn" if f"{block}.encoder_kv.weight" in official else "self_attn"
    state: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        state[f"norm.{kind}"] = official[f"{block}.norm.{kind}"]
        out, qkv = official[f"{block}.proj_out.{kind}"], official[f"{block}.qkv.{kind}"]
        state[f"{attn}.to_out.{kind}"] = out.squeeze(-1) if out.dim() == 3 else out
        num_heads = config.heads_of(len(out))
        for name, part in zip("qkv", split_heads(qkv, 3, num_heads, heads_first), strict=True):
            state[f"{attn}.to_{name}.{kind}"] = part
        if attn == "joint_attn":
            pair = split_heads(official[f"{block}.encoder_kv.{kind}"], 2, num_heads, heads_first)
            for name, part in zip("kv", pair, strict=True):
                state[f"{attn}.add_{name}_proj.{kind}"] = part
    return state


def unet_state(
    unet: UNet, official: Mapping[str, Tensor], heads_first: bool = True
) -> dict[str, Tensor]:
    """Weights of an official UNet under our names, but for the layer of the sentence."""
    names = official_names(unet.state_dict())
    joined = SelfAttentionBlock | JointAttentionBlock  # queries, keys, values are one layer there
    blocks = [path for path, module in unet.named_modules() if isinstance(module, joined)]
    elsewhere = tuple(f"{path}." for path in (*blocks, "sentence_proj"))
    state = {key: official[name] for key, name in names.items() if not key.startswith(elsewhere)}
    for path in blocks:
        block = names[f"{path}.norm.weight"].removesuffix(".norm.weight")
        own = attention_state(unet.config, official, block, heads_first)
        state |= {f"{path}.{key}": tensor for key, tensor in own.items()}
    return state


def unet_config(official: Mapping[str, Any], conditioning: str) -> UNetConfig:
    """Our configuration for the official arguments, which name levels with attention by the factor
    of their side: 1, 2, 4, ...
    """
    head_dim, num_heads = official.get("num_head_channels", -1), official.get("num_heads", 1)
    if head_dim == -1 and official.get("num_heads_upsample", -1) not in (-1, num_heads):
        raise NotComputed("the way up has another number of heads")
    levels = range(len(official["channel_mult"]))
    return UNetConfig(
        channels=official["model_channels"],
        channel_mult=tuple(official["channel_mult"]),
        num_res_blocks=official["num_res_blocks"],
        attention_levels=tuple(i for i in levels if 2**i in official["attention_resolutions"]),
        num_heads=max(1, num_heads),
        head_dim=max(0, head_dim),
        conditioning=conditioning,  # type: ignore[arg-type]
        transformer_depth=official.get("transformer_depth", 1),
        attend_padding=True,
        scale_shift_norm=official.get("use_scale_shift_norm", False),
        resblock_updown=official.get("resblock_updown", False),
        norm_groups=32,
        dropout=0.0,
    )


def text_features(words: Tensor, sentence: Tensor | None = None) -> TextFeatures:
    """Text of words (B, L, Dw) without padding, and of a sentence (B, Ds) or the words' mean."""
    sentence = words.mean(1) if sentence is None else sentence
    mask = torch.ones(words.shape[:2], dtype=torch.bool)
    return TextFeatures(words, mask, sentence, mask.long())


# --- outputs --------------------------------------------------------------------------------------


class AdmUNetOutputs(Verifier):
    """Outputs of guided-diffusion's `UNetModel`; its classes are our sentence, as one-hot rows."""

    name = "adm_unet"
    source = ("openai/guided-diffusion", "unet.py")

    @cached_property
    def model(self) -> UNet:
        classes, state = self.config.get("num_classes"), self.state[""]
        config = unet_config(self.config, "sentence" if classes else "none")
        channels = self.config["in_channels"], self.config["out_channels"]
        unet = make_unet(config, 1, classes or 1, *channels)
        weights = unet_state(unet, state, not self.config.get("use_new_attention_order", False))
        if classes:
            table = state["label_emb.weight"]
            weights["sentence_proj.weight"] = table.T
            weights["sentence_proj.bias"] = table.new_zeros(table.shape[1])
        unet.load_state_dict(weights)
        return unet.eval()

    @output("out")
    def out(self) -> Tensor:
        x, classes = self.inputs["x"], self.config.get("num_classes")
        sentence = x.new_zeros(len(x), 1)
        if classes:
            sentence = F.one_hot(self.inputs["y"], classes).float()
        return self.model(x, self.inputs["t"], text_features(x.new_zeros(len(x), 1, 1), sentence))
