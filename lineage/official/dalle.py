"""DALL-E's discrete VAE (Ramesh et al. 2021) of openai/DALL-E: key map, outputs, import.

The published files hold a codec and no prior, so the imported run has an untrained one. A prior for
the codec is trained with `lineage train KEY --from codec=RUN`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from lineage.errors import UserError
from lineage.official.importing import CheckpointFile, Imported
from lineage.official.verify import NotComputed, Verifier, output
from lineage.recipes import dalle
from lineage.vqvae.dalle import (
    DVAEConfig,
    DVAEDecoder,
    DVAEEncoder,
    map_pixels,
    unmap_pixels,
)

SIZE = 256
"""Side of the pictures that the codec was trained on."""
PRIOR = (
    *("transformer.", "text_proj.", "start_emb.", "pos_emb.", "pad_emb.", "code_emb."),
    *("row_emb.", "column_emb.", "code_head.", "text_head.", "text."),
)
"""Beginnings of the names of a prior's weights."""
NOTE = (
    "The file holds a codec and no prior: train one on it with lineage train {key} "
    "--from codec=RUN."
)


def dvae_key(name: str) -> str:
    """A name in the official encoder or decoder -> ours."""
    name = name.removeprefix("blocks.").replace("output.conv.", "output.")
    name = re.sub(
        r"^group_(\d+)\.block_(\d+)\.",
        lambda m: f"groups.{int(m[1]) - 1}.{int(m[2]) - 1}.",
        name,
    )
    name = re.sub(r"\.res_path\.conv_(\d)\.", lambda m: f".res_path.{2 * int(m[1]) - 1}.", name)
    return re.sub(r"\.w$", ".weight", re.sub(r"\.b$", ".bias", name))


def count_indices(names: Iterable[str], pattern: str) -> int:
    """Number of different values of the first group of `pattern` at the beginning of `names`."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})


class DalleDVAEOutputs(Verifier):
    """Outputs of openai/DALL-E's encoder and decoder."""

    name = "dalle_dvae"
    source = ("openai/DALL-E",)

    @property
    def sizes(self) -> DVAEConfig:
        return DVAEConfig(
            num_codes=self.config["vocab_size"],
            hidden_channels=self.config["n_hid"],
            init_channels=self.config["n_init"],
            blocks_per_group=self.config["n_blk_per_group"],
            num_groups=self.config.get("group_count", 4),
        )

    @cached_property
    def encoder(self) -> DVAEEncoder:
        encoder = DVAEEncoder(self.sizes)
        encoder.load_state_dict({dvae_key(k): v for k, v in self.state["Encoder"].items()})
        return encoder.eval()

    @cached_property
    def decoder(self) -> DVAEDecoder:
        decoder = DVAEDecoder(self.sizes)
        decoder.load_state_dict({dvae_key(k): v for k, v in self.state["Decoder"].items()})
        return decoder.eval()

    def stated(self, name: str, pattern: str) -> float:
        """A number in the file's sentence about an output."""
        match = re.search(pattern, str(self.reference.sentences.get(f"output/{name}", "")))
        if match is None:
            raise NotComputed(f"the file's sentence about it does not match {pattern}")
        return float(match[1])

    @output("map_pixels")
    def mapped(self) -> Tensor:
        return map_pixels(self.inputs["image01"])

    @output("unmap_pixels")
    def unmapped(self) -> Tensor:
        return unmap_pixels(self.inputs["unmap_in"])

    @output("logits")
    def logits(self) -> Tensor:
        return self.encoder(self.mapped())

    @output("tokens")
    def tokens(self) -> Tensor:
        return self.logits().argmax(1)

    def density(self) -> tuple[Tensor, Tensor]:
        """mu and ln b of the most likely codes."""
        one_hot = F.one_hot(self.tokens(), self.config["vocab_size"])
        return self.decoder(one_hot.float().movedim(-1, 1))

    @output("decoder_out")
    def decoder_out(self) -> Tensor:
        return torch.cat(self.density(), 1)

    @output("decoder_out_soft")
    def decoder_out_soft(self) -> Tensor:
        temperature = self.stated("decoder_out_soft", r"softmax\(logits ?/ ?(\d[\d.]*)\)")
        return torch.cat(self.decoder((self.logits() / temperature).softmax(1)), 1)

    @output("reconstruction")
    def reconstruction(self) -> Tensor:
        return unmap_pixels(self.density()[0].sigmoid())

    @output(r"enc_group(\d+)")
    def enc_group(self, number: str) -> Tensor:
        """Features after a group, whose pooling is the official group's last layer."""
        x = self.encoder.input(self.mapped())
        for index, group in enumerate(self.encoder.groups[: int(number)], start=1):
            x = group(x)
            if index < len(self.encoder.groups):
                x = F.max_pool2d(x, 2)
        stride = int(self.stated(f"enc_group{number}", r"::(\d+)"))
        return x[..., ::stride, ::stride]


def import_weights(files: Sequence[CheckpointFile]) -> Imported:
    """OpenAI's `encoder.pkl` and `decoder.pkl`, in either order.

    Raises:
        UserError: a file is missing, or holds something else.
    """
    parts: dict[str, CheckpointFile] = {}
    for file in files:
        first = file.tensors.get("blocks.input.w")
        if first is None:
            raise UserError(f"{file.path} is neither encoder.pkl nor decoder.pkl of DALL-E's dVAE.")
        parts["encoder" if first.shape[1] == 3 else "decoder"] = file
    if len(files) != 2 or len(parts) != 2:
        raise UserError("import-weights dalle needs two files: encoder.pkl and decoder.pkl.")
    encoder, decoder = parts["encoder"].tensors, parts["decoder"].tensors
    codec = DVAEConfig(
        num_codes=encoder["blocks.output.conv.w"].shape[0],
        hidden_channels=encoder["blocks.input.w"].shape[0],
        init_channels=decoder["blocks.input.w"].shape[0],
        blocks_per_group=count_indices(encoder, r"blocks\.group_1\.block_(\d+)\."),
        num_groups=count_indices(encoder, r"blocks\.group_(\d+)\."),
    )
    weights = {
        f"codec.{part}.{dvae_key(key)}": value.float()
        for part, file in parts.items()
        for key, value in file.tensors.items()
    }
    config = replace(dalle.PRESETS["small"], size=SIZE, codec=codec)
    statistics = ("running_mse", "num_batches_tracked", "step", "code_counts")
    absent = PRIOR + tuple(f"codec.{name}" for name in statistics)
    return Imported(config, weights, absent, NOTE.format(key="dalle"))
