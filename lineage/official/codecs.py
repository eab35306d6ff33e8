"""Published codecs as runs: taming-transformers' VQGAN and OpenAI's discrete VAE.

Neither file holds a prior over captions, so the run that is written has an untrained one; a prior
for it is trained with `--set codec_from=RUN`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lineage.errors import UserError
from lineage.nn.autoencoder import AutoencoderConfig
from lineage.official.importing import Given, Imported
from lineage.official.vqvae import autoencoder_state, dvae_key
from lineage.recipes import dalle, vqgan
from lineage.vqvae.dalle import DVAEConfig
from lineage.vqvae.quantise import QuantiserConfig
from lineage.vqvae.vqgan import VQGANConfig

SIZE = 256  # side of the pictures that both were trained on
PRIOR: tuple[str, ...] = (
    *("transformer.", "read.", "start.", "place.", "empty.", "code.", "row.", "column."),
    *("code_head.", "text_head.", "text."),
)
NOTE = (
    "The file holds a codec and no prior: train one on it with lineage train {key} "
    "--set codec_from=RUN."
)


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers stand for the group of `pattern` in the names of `state`."""
    return len({found[1] for key in state if (found := re.match(pattern, key))})


def vqgan_config(state: Mapping[str, Tensor]) -> VQGANConfig:
    """The sizes of taming's `VQModel`, read off its tensors."""
    levels = count(state, r"encoder\.down\.(\d+)\.")
    channels = state["encoder.conv_in.weight"].shape[0]
    widths = [
        state[f"encoder.down.{k}.block.0.conv2.weight"].shape[0] // channels for k in range(levels)
    ]
    attention = {k for k in range(levels) if f"encoder.down.{k}.attn.0.q.weight" in state}
    codes, width = state["quantize.embedding.weight"].shape
    judge = "loss.discriminator.main.0.weight"
    convolutions = sum(
        key.startswith("loss.discriminator.main.") and value.dim() == 4
        for key, value in state.items()
    )
    return VQGANConfig(
        net=AutoencoderConfig(
            channels=channels,
            multipliers=tuple(widths),
            blocks=count(state, r"encoder\.down\.0\.block\.(\d+)\."),
            attention=tuple(SIZE // 2**k for k in sorted(attention)),
            size=SIZE,
            latent=state["quant_conv.weight"].shape[1],
        ),
        quantiser=QuantiserConfig(codes, width, codebook="loss", start="normal", restart=0.0),
        discriminator=state[judge].shape[0] if judge in state else 64,
        layers=convolutions - 2 if judge in state else 3,
    )


def import_vqgan(files: Sequence[Given]) -> Imported:
    """taming-transformers' `last.ckpt` of a VQGAN, with its discriminator if that is inside.

    Raises:
        UserError: the file holds something else.
    """
    if len(files) > 1:
        raise UserError(f"import-weights vqgan needs one file; {files[1].path} is one too many.")
    state, path = files[0].tensors, files[0].path
    if "quantize.embedding.weight" not in state or "encoder.conv_in.weight" not in state:
        raise UserError(
            f"{path} is no VQGAN of taming-transformers, which has quantize.embedding.weight: give "
            "the last.ckpt of a VQModel."
        )
    codec = vqgan_config(state)
    levels = len(codec.net.multipliers)
    weights = {"codec.quantiser.codes": state["quantize.embedding.weight"]}
    weights["codec.quantiser.begun"] = torch.tensor(True)
    for part in ("encoder", "decoder"):
        inner = autoencoder_state(state, part, levels)
        weights |= {f"codec.{part}.{key}": value for key, value in inner.items()}
    for part in ("quant_conv", "post_quant_conv"):
        weights |= {f"codec.{part}.{n}": state[f"{part}.{n}"] for n in ("weight", "bias")}
    judge = "loss.discriminator."
    weights |= {
        f"codec.discriminator.{key.removeprefix(judge)}": value
        for key, value in state.items()
        if key.startswith(judge)
    }
    config = replace(vqgan.PRESETS["small"], preset="paper", size=SIZE, codec=codec)
    absent = (
        "codec.discriminator.",
        "codec.error",
        "codec.noted",
        "codec.steps",
        "codec.quantiser.",
    )
    return Imported(config, weights, PRIOR + absent, NOTE.format(key="vqgan"))


def import_dalle(files: Sequence[Given]) -> Imported:
    """OpenAI's `encoder.pkl` and `decoder.pkl`, in either order.

    Raises:
        UserError: a file is missing, or holds something else.
    """
    parts: dict[str, Given] = {}
    for file in files:
        first = file.tensors.get("blocks.input.w")
        if first is None:
            raise UserError(f"{file.path} is neither encoder.pkl nor decoder.pkl of DALL-E's dVAE.")
        parts["encoder" if first.shape[1] == 3 else "decoder"] = file
    if len(files) != 2 or len(parts) != 2:
        raise UserError("import-weights dalle needs two files: encoder.pkl and decoder.pkl.")
    encoder, decoder = parts["encoder"].tensors, parts["decoder"].tensors
    codec = DVAEConfig(
        codes=encoder["blocks.output.conv.w"].shape[0],
        width=encoder["blocks.input.w"].shape[0],
        start=decoder["blocks.input.w"].shape[0],
        blocks=count(encoder, r"blocks\.group_1\.block_(\d+)\."),
        groups=count(encoder, r"blocks\.group_(\d+)\."),
    )
    weights = {
        f"codec.{part}.{dvae_key(key)}": value.float()
        for part, file in parts.items()
        for key, value in file.tensors.items()
    }
    config = replace(dalle.PRESETS["small"], preset="paper", size=SIZE, codec=codec)
    absent = ("codec.error", "codec.noted", "codec.steps", "codec.counts")
    return Imported(config, weights, PRIOR + absent, NOTE.format(key="dalle"))
