"""VQGAN (Esser et al. 2021) of CompVis/taming-transformers: key maps, outputs of its codec and of
its transformer (minGPT), import.

The published files hold a codec and no prior over captions, so the imported run has an untrained
one. A prior for the codec is trained with `lineage train KEY --from codec=RUN`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lineage.errors import UserError
from lineage.nn.autoencoder import AutoencoderConfig, Decoder, Encoder, PatchDiscriminator
from lineage.official.dalle import NOTE, PRIOR, count_indices
from lineage.official.gpt2 import greedy
from lineage.official.importing import CheckpointFile, Imported
from lineage.official.reference import Reference
from lineage.official.verify import NotComputed, Verifier, output
from lineage.recipes import vqgan
from lineage.vqvae.quantise import Quantised, QuantiserConfig, VectorQuantiser
from lineage.vqvae.transformer import GPT, KVCache, TransformerConfig, causal_mask
from lineage.vqvae.vqgan import VQGANConfig

SIZE = 256
"""Side of the pictures that the published codecs were trained on."""


def sentence_number(reference: Reference, tensor: str, pattern: str) -> float | None:
    """A number in the file's sentence about a tensor; None if the sentence has none."""
    match = re.search(pattern, str(reference.sentences.get(tensor, "")))
    return None if match is None else float(match[1])


# --- key maps -------------------------------------------------------------------------------------


def autoencoder_config(ddconfig: Mapping[str, Any]) -> AutoencoderConfig:
    """Our configuration for a `ddconfig` of CompVis."""
    return AutoencoderConfig(
        channels=ddconfig["ch"],
        channel_mult=tuple(ddconfig["ch_mult"]),
        num_res_blocks=ddconfig["num_res_blocks"],
        attn_resolutions=tuple(ddconfig["attn_resolutions"]),
        resolution=ddconfig["resolution"],
        z_channels=ddconfig["z_channels"],
    )


def autoencoder_key(name: str, num_levels: int) -> str:
    """A name inside CompVis' encoder or decoder -> ours.

    Their decoder counts its levels from the full resolution down, ours in the order of its layers.
    """
    name = re.sub(r"^up\.(\d+)\.", lambda m: f"up.{num_levels - 1 - int(m[1])}.", name)
    return name.replace(".downsample.", ".resample.").replace(".upsample.", ".resample.")


def autoencoder_state(
    official: Mapping[str, Tensor], part: str, num_levels: int
) -> dict[str, Tensor]:
    """Weights of `part`, encoder or decoder, under our names."""
    return {
        autoencoder_key(key.removeprefix(f"{part}."), num_levels): value
        for key, value in official.items()
        if key.startswith(f"{part}.")
    }


def mingpt_state(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of taming-transformers' `GPT` under our names: its query, key and value matrices are
    joined.
    """
    state = {
        "pos_emb.weight": official["pos_emb"][0],
        "tok_emb.weight": official["tok_emb.weight"],
        "head.weight": official["head.weight"],
    }
    for key, value in official.items():
        if key.startswith("ln_f."):
            state[f"transformer.{key}"] = value
        elif match := re.fullmatch(r"(blocks\.\d+\.attn)\.query\.(weight|bias)", key):
            attn, kind = match.groups()
            parts = [official[f"{attn}.{name}.{kind}"] for name in ("query", "key", "value")]
            state[f"transformer.{attn}.qkv.{kind}"] = torch.cat(parts)
        elif re.match(r"blocks\.\d+\.(ln|mlp|attn\.proj)", key):
            state[f"transformer.{key}"] = value
    return state


# --- outputs --------------------------------------------------------------------------------------


class TamingMinGPTOutputs(Verifier):
    """Outputs of taming-transformers' minGPT."""

    name = "taming_mingpt"
    source = ("CompVis/taming-transformers", "mingpt.py")

    @cached_property
    def model(self) -> GPT:
        config = TransformerConfig(
            width=self.config["n_embd"],
            num_layers=self.config["n_layer"],
            num_heads=self.config["n_head"],
            gelu="exact",
        )
        model = GPT(config, self.config["vocab_size"], self.config["block_size"], tied=False)
        model.load_state_dict(mingpt_state(self.state[""]))
        return model.eval()

    @property
    def ids(self) -> Tensor:
        return self.inputs["idx"]

    @output("logits")
    def logits(self) -> Tensor:
        return self.model(self.ids)

    @output("loss")
    def loss(self) -> Tensor:
        return F.cross_entropy(self.logits().flatten(0, 1), self.inputs["targets"].flatten())

    @output(r"logits_n_unmasked(\d+)")
    def logits_n_unmasked(self, count: str) -> Tensor:
        mask = causal_mask(self.ids.shape[1], num_prefix=int(count))
        return self.model(self.ids, mask=mask)

    @output("logits_with_embeddings")
    def logits_with_embeddings(self) -> Tensor:
        """Vectors in place of the first tokens."""
        embeddings, length = (
            self.inputs["embeddings"],
            self.outputs["logits_with_embeddings"].shape[1],
        )
        tokens = self.model.tok_emb(self.ids[:, : length - embeddings.shape[1]])
        x = torch.cat([embeddings, tokens], 1) + self.model.pos_emb.weight[:length]
        return self.model.head(self.model.transformer(x))

    @property
    def prompt_length(self) -> int:
        """Number of tokens from which the greedy ones continue."""
        stated = sentence_number(self.reference, "output/greedy_tokens", r"idx\[:, ?:(\d+)\]")
        if stated is not None:
            return int(stated)
        if "greedy_tokens" in self.outputs and "cached_step_logits" in self.outputs:
            steps = self.outputs["cached_step_logits"].shape[1]
            return self.outputs["greedy_tokens"].shape[1] - steps
        raise NotComputed("the file does not say how long the prompt is")

    @output("greedy_tokens")
    def greedy_tokens(self) -> Tensor:
        length = self.outputs["greedy_tokens"].shape[1]
        return greedy(self.model, self.ids[:, : self.prompt_length], length, cached=False)

    @output("cached_step_logits")
    def cached_step_logits(self) -> Tensor:
        """Logits of each greedy token, computed with a cache."""
        steps, prompt = self.outputs["cached_step_logits"].shape[1], self.prompt_length
        ids = greedy(self.model, self.ids[:, :prompt], prompt + steps, cached=False)
        config = self.model.transformer.config
        cache = KVCache(config, len(ids), prompt + steps, like=self.model.head.weight)
        logits = [self.model(ids[:, :prompt], cache)[:, -1]]
        for position in range(prompt, prompt + steps - 1):
            logits.append(self.model(ids[:, position : position + 1], cache)[:, -1])
        return torch.stack(logits, 1)


class TamingVQGANOutputs(Verifier):
    """Outputs of taming-transformers' `VQModel`, discriminator and `EMAVectorQuantizer`."""

    name = "taming_vqgan"
    source = ("CompVis/taming-transformers", "vqgan.py")

    @cached_property
    def net(self) -> AutoencoderConfig:
        return autoencoder_config(self.config["ddconfig"])

    def _load(self, network: nn.Module, part: str) -> nn.Module:
        levels = len(self.net.channel_mult)
        network.load_state_dict(autoencoder_state(self.state["VQModel"], part, levels))
        return network.eval()

    @cached_property
    def encoder(self) -> nn.Module:
        ddconfig, channels = self.config["ddconfig"], self.net.z_channels
        outputs = 2 * channels if ddconfig.get("double_z") else channels
        return self._load(Encoder(self.net, outputs, ddconfig.get("in_channels", 3)), "encoder")

    @cached_property
    def decoder(self) -> nn.Module:
        return self._load(Decoder(self.net, self.config["ddconfig"].get("out_ch", 3)), "decoder")

    def _conv1x1(self, name: str, x: Tensor) -> Tensor:
        state = self.state["VQModel"]
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"])

    @cached_property
    def discriminator(self) -> PatchDiscriminator:
        sizes = self.config["discriminator"]
        disc = PatchDiscriminator(sizes["ndf"], sizes["n_layers"], sizes["input_nc"])
        disc.load_state_dict(self.state["NLayerDiscriminator"])
        return disc.eval()

    def quantiser(self, legacy: bool) -> VectorQuantiser:
        """`VectorQuantizer2`; `legacy` misplaces beta."""
        config = QuantiserConfig(
            num_codes=self.config["n_embed"],
            code_dim=self.config["embed_dim"],
            beta=self.config["beta"],
            update="loss",
            init="normal",
            restart_threshold=0.0,
            misplaced_beta=legacy,
        )
        quantiser = VectorQuantiser(config).eval()
        with torch.no_grad():
            quantiser.embedding.copy_(self.state["VQModel"]["quantize.embedding.weight"])
        return quantiser

    @output("z_e")
    def z_e(self) -> Tensor:
        return self._conv1x1("quant_conv", self.encoder(self.inputs["image"]))

    def quantised(self, legacy: bool = True) -> Quantised:
        return self.quantiser(legacy)(rearrange(self.z_e(), "b d h w -> b h w d"))

    @output("indices")
    def indices(self) -> Tensor:
        return self.quantised().ids.flatten()

    @output("z_q")
    def z_q(self) -> Tensor:
        return rearrange(self.quantised().z_q, "b h w d -> b d h w")

    @output("codebook_loss(_legacy_false)?")
    def codebook_loss(self, corrected: str | None) -> Tensor:
        terms = self.quantised(legacy=corrected is None).terms
        return torch.stack(list(terms.values())).sum()

    @output("grad_(z|codebook)_(legacy|fixed)", grad=True)
    def gradient(self, tensor: str, version: str) -> Tensor:
        """Gradient of mean(z_q^2) plus the loss of the codebook."""
        quantiser = self.quantiser(legacy=version == "legacy")
        z_e = self.z_e().detach().requires_grad_()
        quantised = quantiser(rearrange(z_e, "b d h w -> b h w d"))
        loss = quantised.z_q.square().mean() + torch.stack(list(quantised.terms.values())).sum()
        (gradient,) = torch.autograd.grad(loss, z_e if tensor == "z" else quantiser.embedding)
        return gradient

    @output("distance_margin_min")
    def distance_margin_min(self) -> Tensor:
        """Smallest gap between the best and second-best squared distance.

        It is a small difference of two distances, in which the encoder's rounding of 1e-6 would be
        4e-5; so it is computed from the official vectors. The encoder's own are compared as `z_e`.
        """
        z_e = self.outputs.get("z_e")
        vectors = rearrange(self.z_e() if z_e is None else z_e, "b d h w -> (b h w) 1 d")
        distances = (vectors - self.quantiser(legacy=False).embedding).square().sum(2)
        best = distances.topk(2, largest=False).values
        return (best[:, 1] - best[:, 0]).min()

    @output("reconstruction")
    def reconstruction(self) -> Tensor:
        return self.decoder(self._conv1x1("post_quant_conv", self.z_q()))

    @output("disc_(real|fake)")
    def disc(self, kind: str) -> Tensor:
        """Logits of the enlarged image or reconstruction."""
        scale = sentence_number(self.reference, f"output/disc_{kind}", r"enlarged (\d+)x")
        scale = scale or sentence_number(self.reference, "output/disc_fake", r"enlarged (\d+)x")
        image = self.inputs["image"] if kind == "real" else self.reconstruction()
        return self.discriminator(F.interpolate(image, scale_factor=scale or 2, mode="nearest"))

    @output("hinge_d_loss")
    def hinge_d_loss(self) -> Tensor:
        real, fake = self.disc("real"), self.disc("fake")
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())

    @output("vanilla_d_loss")
    def vanilla_d_loss(self) -> Tensor:
        real, fake = self.disc("real"), self.disc("fake")
        return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())

    @output("small_mid_(block_1|block_2|attn_1)")
    def small_mid(self, layer: str) -> Tensor:
        """A layer of the encoder's middle without its residual connection."""
        small = self.inputs["small"]
        return getattr(self.encoder.mid, layer)(small) - small

    @cached_property
    def ema_step(self) -> tuple[VectorQuantiser, Quantised]:
        """`EMAVectorQuantizer` after one training step on z_e, and what that step returned."""
        decay = self.config.get("decay") or sentence_number(
            self.reference, "output/ema_after/embedding.weight", r"decay (\d[\d.]*\d)"
        )
        if decay is None:
            raise NotComputed("the file does not state the decay")
        config = QuantiserConfig(
            num_codes=self.config["n_embed"],
            code_dim=self.config["embed_dim"],
            beta=self.config["beta"],
            ema_decay=decay,
            init="normal",
            restart_threshold=0.0,
        )
        quantiser, official = VectorQuantiser(config).train(), self.state["EMAVectorQuantizer"]
        state = {ours: official[f"embedding.{name}"] for name, ours in EMA_NAMES.items()}
        quantiser.load_state_dict({**state, "initialised": torch.tensor(True)})
        return quantiser, quantiser(rearrange(self.z_e(), "b d h w -> b h w d"))

    @output("ema_indices")
    def ema_indices(self) -> Tensor:
        return self.ema_step[1].ids.flatten()

    @output("ema_loss")
    def ema_loss(self) -> Tensor:
        return self.ema_step[1].terms["commitment"]

    @output("ema_perplexity")
    def ema_perplexity(self) -> Tensor:
        counts = torch.bincount(self.ema_indices(), minlength=self.config["n_embed"])
        return torch.special.entr(counts / counts.sum()).sum().exp()

    @output(r"ema_after/embedding\.(weight|cluster_size|embed_avg)")
    def ema_after(self, name: str) -> Tensor:
        return getattr(self.ema_step[0], EMA_NAMES[name])


EMA_NAMES = {"weight": "embedding", "cluster_size": "cluster_size", "embed_avg": "cluster_sum"}


# --- import ---------------------------------------------------------------------------------------


def vqgan_config(state: Mapping[str, Tensor]) -> VQGANConfig:
    """Sizes of taming's `VQModel`, read off its tensors."""
    levels = range(count_indices(state, r"encoder\.down\.(\d+)\."))
    channels = state["encoder.conv_in.weight"].shape[0]
    widths = [state[f"encoder.down.{k}.block.0.conv2.weight"].shape[0] for k in levels]
    attention = [k for k in levels if f"encoder.down.{k}.attn.0.q.weight" in state]
    num_codes, code_dim = state["quantize.embedding.weight"].shape
    disc = {k: v for k, v in state.items() if k.startswith("loss.discriminator.main.")}
    num_convs = sum(value.dim() == 4 for value in disc.values())
    sizes: dict[str, Any] = {}
    if "loss.discriminator.main.0.weight" in disc:
        sizes["disc_channels"] = disc["loss.discriminator.main.0.weight"].shape[0]
        sizes["disc_layers"] = num_convs - 2
    return VQGANConfig(
        net=AutoencoderConfig(
            channels=channels,
            channel_mult=tuple(width // channels for width in widths),
            num_res_blocks=count_indices(state, r"encoder\.down\.0\.block\.(\d+)\."),
            attn_resolutions=tuple(SIZE // 2**k for k in attention),
            resolution=SIZE,
            z_channels=state["quant_conv.weight"].shape[1],
        ),
        quantiser=QuantiserConfig(
            num_codes=num_codes,
            code_dim=code_dim,
            update="loss",
            init="normal",
            restart_threshold=0.0,
        ),
        **sizes,
    )


def import_weights(files: Sequence[CheckpointFile]) -> Imported:
    """taming-transformers' `last.ckpt` of a VQGAN, with its discriminator if the file has it.

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
    levels = len(codec.net.channel_mult)
    weights = {"quantiser.embedding": state["quantize.embedding.weight"]}
    weights["quantiser.initialised"] = torch.tensor(True)
    for part in ("encoder", "decoder"):
        inner = autoencoder_state(state, part, levels)
        weights |= {f"{part}.{key}": value for key, value in inner.items()}
    for part in ("quant_conv", "post_quant_conv"):
        weights |= {f"{part}.{n}": state[f"{part}.{n}"] for n in ("weight", "bias")}
    disc = "loss.discriminator."
    weights |= {k.removeprefix("loss."): v for k, v in state.items() if k.startswith(disc)}
    config = replace(vqgan.PRESETS["small"], size=SIZE, codec=codec)
    statistics = ("running_mse", "num_batches_tracked", "step", "quantiser.", "discriminator.")
    return Imported(
        config,
        {f"codec.{name}": value for name, value in weights.items()},
        PRIOR + tuple(f"codec.{name}" for name in statistics),
        NOTE.format(key="vqgan"),
    )
