"""DiT (Peebles and Xie 2023): key map and outputs. Its sentences are classes, as one-hot rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.diffusion.guidance import Guidance
from lineage.diffusion.networks.dit import TIMESTEP_DIM, DiT, DiTConfig
from lineage.diffusion.networks.layers import timestep_embedding
from lineage.official.adm_unet import text_features
from lineage.official.verify import Verifier, output
from lineage.text.contract import TextFeatures

# --- key map --------------------------------------------------------------------------------------

TABLE = "y_embedder.embedding_table.weight"
OUTER = {
    "patch_embed": "x_embedder.proj",
    "time_embed.0": "t_embedder.mlp.0",
    "time_embed.2": "t_embedder.mlp.2",
    "modulation": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
BLOCK = {
    "attn.to_q": "attn.qkv",
    "attn.to_k": "attn.qkv",
    "attn.to_v": "attn.qkv",
    "attn.to_out": "attn.proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
    "modulation": "adaLN_modulation.1",
}


def official_name(key: str) -> str:
    """Official name of one of our tensors; queries, keys and values are one layer there."""
    if match := re.fullmatch(r"(blocks\.\d+)\.(.*)\.(weight|bias)", key):
        return f"{match[1]}.{BLOCK[match[2]]}.{match[3]}"
    layer, _, kind = key.rpartition(".")
    return f"{OUTER[layer]}.{kind}"


def dit_state(net: DiT, official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of DiT under our names; its table of classes becomes a layer without bias."""
    table = official[TABLE]
    state = {
        "sentence_proj.weight": table.T.contiguous(),
        "sentence_proj.bias": table.new_zeros(table.shape[1]),
    }
    for key in net.state_dict():
        if key not in state:
            tensor = official[official_name(key)]
            part = re.search(r"\.to_([qkv])\.", key)
            state[key] = tensor if part is None else tensor.chunk(3)["qkv".index(part[1])]
    return state


def dit_network(official: Mapping[str, Any], num_classes: int) -> DiT:
    """Our network for the official arguments.

    Args:
        official: Arguments of the official class.
        num_classes: Number of rows of its table, one of which may be "no class".
    """
    config = DiTConfig(
        width=official["hidden_size"],
        depth=official["depth"],
        num_heads=official["num_heads"],
        patch_size=official["patch_size"],
        mlp_ratio=official.get("mlp_ratio", 4.0),
        max_words=0,
    )
    channels, side = official["in_channels"], official["input_size"]
    out_channels = channels * (2 if official["learn_sigma"] else 1)
    return DiT(config, 1, num_classes, (channels, side, side), out_channels)


# --- outputs --------------------------------------------------------------------------------------


class DiTOutputs(Verifier):
    """Outputs of DiT."""

    name = "dit"
    source = ("facebookresearch/DiT",)

    @cached_property
    def net(self) -> DiT:
        net = dit_network(self.config, len(self.state[""][TABLE]))
        net.load_state_dict(dit_state(net, self.state[""]))
        return net.eval()

    @property
    def first_block(self) -> nn.Module:
        return self.net.blocks[0]

    def text(self, classes: Tensor) -> TextFeatures:
        """Classes (B,) as text."""
        one_hot = F.one_hot(classes, len(self.state[""][TABLE])).float()
        return text_features(one_hot[:, None, :1], one_hot)

    @property
    def condition(self) -> Tensor:
        """c of the file's timesteps and classes, after its SiLU."""
        return F.silu(self.net.condition(self.inputs["t"], self.text(self.inputs["y"])))

    @output("out")
    def out(self) -> Tensor:
        return self.net(self.inputs["x"], self.inputs["t"], self.text(self.inputs["y"]))

    @output("tokens0")
    def tokens(self) -> Tensor:
        return self.net.tokens(self.inputs["x"])

    @output("t_emb")
    def time_embedding(self) -> Tensor:
        return self.net.time_embed(timestep_embedding(self.inputs["t"], TIMESTEP_DIM))

    @output("y_emb")
    def class_embedding(self) -> Tensor:
        return self.net.sentence_proj(self.text(self.inputs["y"]).sentence)

    @output("block0")
    def block(self) -> Tensor:
        return self.first_block(self.tokens(), self.condition)

    @output("small_block0")
    def small_block(self) -> Tensor:
        small = self.inputs["small_tokens"]
        return self.first_block(small, self.condition) - small

    @output("cfg_out")
    def guided(self) -> Tensor:
        """`forward_with_cfg`: the first half of the batch serves both halves, and guidance acts on
        three channels.
        """
        x = torch.cat([self.inputs["cfg_x"]] * 2)
        output = self.net(x, self.inputs["cfg_t"], self.text(self.inputs["cfg_y"]))
        cond, uncond = output[:, :3].chunk(2)
        guided = Guidance(self.config["cfg_scale"]).combine(cond, uncond)
        return torch.cat([torch.cat([guided, guided]), output[:, 3:]], dim=1)
