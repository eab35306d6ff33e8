"""Verifiers and key maps of latent diffusion (UNet, DDIM, autoencoder, text encoder) and of DiT."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.config import TextConfig
from lineage.diffusion import samplers
from lineage.diffusion.guidance import Guidance
from lineage.diffusion.ldm import KLAutoencoder, KLConfig
from lineage.diffusion.networks.dit import DiT, DiTConfig
from lineage.diffusion.networks.unet import UNet, time_embedding
from lineage.diffusion.process import Process, ProcessConfig
from lineage.diffusion.samplers.k_diffusion import Estimate
from lineage.diffusion.schedules import Path, Point
from lineage.nn.autoencoder import AutoencoderConfig
from lineage.official import Outputs
from lineage.official.diffusion import Given, Seen
from lineage.official.unets import (
    Names,
    gathered,
    padded_state,
    places,
    tokens_only,
    told,
    unet_config,
    unet_names,
)
from lineage.official.verify import Reference
from lineage.official.vqvae import autoencoder_config, autoencoder_state
from lineage.text.contract import TextFeatures
from lineage.text.padded import BertEncoder
from lineage.text.tokenizer import PAD

# --- latent diffusion -----------------------------------------------------------------------------


@torch.no_grad()
def ldm_unet(reference: Reference) -> Outputs:
    """Every output of latent diffusion's UNet and its DDIM that a reference file may hold."""
    official, given, state = reference.config, reference.inputs, reference.state[""]
    config = unet_config(official, "transformer")
    unet = UNet(
        config, official["context_dim"], official["in_channels"], official["out_channels"]
    ).eval()
    unet.load_state_dict(gathered(unet_names(unet), state))
    ours = {theirs: mine for mine, theirs in places(unet)}

    def module(name: str) -> nn.Module:
        return unet.get_submodule(ours[name])

    context = given["context"]
    second = config.blocks + 2  # after the first level and its halving
    residual = _module_named(reference, "resblock_out", f"input_blocks.{second}.0")
    spatial = _module_named(reference, "spatial_transformer_out", "input_blocks.1.1")
    embedded = F.silu(given["resblock_emb"])
    small = given["small"]
    outputs: dict[str, Any] = {
        "eps": unet(given["x"], given["t"], told(context)),
        "time_embedding": time_embedding(given["t"], config.width),
        "resblock_out": module(residual)(given["resblock_in"], embedded),
        "small_resblock": module(residual)(small, embedded),
        "spatial_transformer_out": module(spatial)(given["spatial_transformer_in"], context, None),
        "small_spatial_transformer": module(spatial)(small, context, None) - small,
    }
    if "eps_fractional_t" in reference.outputs:
        middle = torch.full((len(given["x"]),), 12.5)
        outputs["eps_fractional_t"] = unet(given["x"], middle, told(context))
    return outputs | _ldm_ddim(reference, unet)


def _module_named(reference: Reference, output: str, default: str) -> str:
    """The official module that the file's sentence about an output names."""
    sentence = str(reference.sentences.get(f"output/{output}", ""))
    named = [word.strip(".,()") for word in sentence.split() if "_blocks." in word]
    return named[0] if named else default


def _ldm_ddim(reference: Reference, unet: UNet) -> dict[str, Any]:
    """Latent diffusion's DDIM: every T // n-th step and one more, up to the noise of step 0."""
    official, given = reference.config, reference.inputs
    process = Process(ProcessConfig(1000, "scaled_linear"), _ldm_betas(official))
    times = [t + 1 for t in range(0, process.steps, process.steps // official["ddim_steps"])]
    levels = [process.point(t) for t in times]
    path = Path((*reversed(levels), process.point(0)), process.at)
    before = [process.point(0), *levels[:-1]]
    both = torch.cat([given["context"], given["uncond_context"]])
    guidance = Guidance(official["guidance"])

    def guided(x: Tensor, level: Point) -> Estimate:
        time = torch.full((2 * len(x),), level.time)
        found = unet(torch.cat([x, x]), time, told(both)).chunk(2)
        return Estimate(process.to_x0(guidance.join(*found), x, level))

    def plain(x: Tensor, level: Point) -> Estimate:
        output = unet(x, torch.full((len(x),), level.time), told(given["context"]))
        return Estimate(process.to_x0(output, x, level))

    seen = Seen(guided)
    last = samplers.ddim(seen, given["x_T"], path, Given())
    noisy = Seen(plain)
    drawn = given.get("ddim_noise")
    outputs: dict[str, Any] = {
        "betas": process.betas,
        "alphas_cumprod": process.abar.float(),
        "ddim_timesteps": torch.tensor(times),
        "ddim_alphas": torch.tensor([p.signal**2 for p in levels]),
        "ddim_alphas_prev": torch.tensor([p.signal**2 for p in before]),
        "ddim_x_inter": torch.stack([*seen.asked, last]),
        "ddim_pred_x0": torch.stack(seen.answers),
    }
    etas = [name for name in reference.outputs if name.startswith("ddim_eta")]
    for name in etas:
        eta = float(name.removeprefix("ddim_eta").partition("_")[0])
        end = samplers.ddim(noisy, given["x_T"], path, Given(drawn), eta=eta)
        outputs[name] = torch.stack([*noisy.asked, end])
    for name in (n for n in reference.outputs if n.startswith("ddim_sigmas_eta")):
        eta = float(name.removeprefix("ddim_sigmas_eta"))
        pairs = zip(levels, before, strict=True)
        variances = [samplers.posterior_variance(now, then) for now, then in pairs]
        outputs[name] = torch.tensor([eta * math.sqrt(v) for v in variances])
    return outputs


def _ldm_betas(official: Mapping[str, Any]) -> Tensor:
    """Betas whose roots are even between the ends that the file names."""
    start, end = (math.sqrt(official[f"linear_{end}"]) for end in ("start", "end"))
    return torch.linspace(start, end, 1000, dtype=torch.float64) ** 2


def kl_config(official: Mapping[str, Any], width: int) -> KLConfig:
    """Our configuration for a `ddconfig` and an `embed_dim`."""
    net: AutoencoderConfig = autoencoder_config(official)
    return KLConfig(net, width, adversary=0.0, perceptual=0.0)


def kl_state(official: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Latent diffusion's autoencoder by our names."""
    state = {
        f"{part}.{key}": value
        for part in ("encoder", "decoder")
        for key, value in autoencoder_state(official, part, levels).items()
    }
    for part in ("quant_conv", "post_quant_conv"):
        state |= {f"{part}.{kind}": official[f"{part}.{kind}"] for kind in ("weight", "bias")}
    return state


@torch.no_grad()
def ldm_vae(reference: Reference) -> Outputs:
    """Every output of latent diffusion's autoencoder that a reference file may hold."""
    official, given = reference.config, reference.inputs
    config = kl_config(official["ddconfig"], official["embed_dim"])
    autoencoder = KLAutoencoder(config).eval()
    weights = kl_state(reference.state[""], len(config.net.multipliers))
    autoencoder.load_state_dict({**weights, "steps": torch.tensor(0)})
    hidden = autoencoder.encoder(given["image"])
    found = autoencoder.encode(given["image"])
    sample, small, middle = found.sample(given["eps"]), given["small"], autoencoder.encoder.mid
    return {
        "encoder_h": hidden,
        "moments": autoencoder.quant_conv(hidden),
        "mean": found.mean,
        "logvar": found.log_variance,
        "std": found.deviation,
        "sample": sample,
        "kl": found.kl(),
        "nll_of_sample": found.nll(sample),
        "rec_mode": autoencoder.decode(found.mean),
        "rec_sample": autoencoder.decode(sample),
        "small_mid_block_1": middle.block_1(small) - small,
        "small_mid_attn_1": middle.attn_1(small) - small,
    }


@torch.no_grad()
def ldm_bert(reference: Reference) -> Outputs:
    """Every output of latent diffusion's text encoder that a reference file may hold."""
    official, given = reference.config, reference.inputs
    state = {k.removeprefix("transformer."): v for k, v in reference.state[""].items()}
    sizes = TextConfig(
        width=official["n_embed"], words=official["max_seq_len"], layers=official["n_layer"]
    )
    encoder = BertEncoder(sizes, tokens_only(official["vocab_size"])).eval()
    encoder.load_state_dict(padded_state(encoder, state))
    words, _ = encoder(given["tokens"], given["tokens"] != PAD)
    logits = words @ state["to_logits.weight"].T + state["to_logits.bias"]
    return {"z": words, "logits": logits}


# --- DiT ------------------------------------------------------------------------------------------


def dit_names(net: DiT) -> Names:
    """The map of a DiT, without its classes."""
    alone = {
        "enter": ("x_embedder.proj",),
        "time.0": ("t_embedder.mlp.0",),
        "time.2": ("t_embedder.mlp.2",),
        "modulation": ("final_layer.adaLN_modulation.1",),
        "leave": ("final_layer.linear",),
    }
    within = {
        "attn.out": "attn.proj",
        "mlp.0": "mlp.fc1",
        "mlp.2": "mlp.fc2",
        "modulation": "adaLN_modulation.1",
    }
    names: Names = {}
    for key in net.state_dict():
        layer, _, kind = key.rpartition(".")
        if layer in alone:
            names[key] = (f"{alone[layer][0]}.{kind}",)
        elif layer.startswith("blocks.") and not layer.endswith((".query", ".key_value")):
            _, number, inner = layer.split(".", 2)
            names[key] = (f"blocks.{number}.{within[inner]}.{kind}",)
    return names


def dit_state(net: DiT, official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DiT's weights by our names; its table of classes becomes a layer over one-hot sentences."""
    return gathered(dit_names(net), official) | dit_rest(net, official)


def dit_rest(net: DiT, official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values, which are one layer there, and the classes."""
    state: dict[str, Tensor] = {}
    for number in range(len(net.blocks)):
        for kind in ("weight", "bias"):
            whole = official[f"blocks.{number}.attn.qkv.{kind}"]
            query, key, value = whole.chunk(3)
            state[f"blocks.{number}.attn.query.{kind}"] = query
            state[f"blocks.{number}.attn.key_value.{kind}"] = torch.cat([key, value])
    table = official["y_embedder.embedding_table.weight"]
    zero = table.new_zeros(table.shape[1])
    return state | {"sentence.weight": table.T.contiguous(), "sentence.bias": zero}


def dit_network(official: Mapping[str, Any]) -> DiT:
    """Our network for the authors' arguments, told one-hot classes, of which one is none."""
    config = DiTConfig(
        width=official["hidden_size"],
        layers=official["depth"],
        heads=official["num_heads"],
        patch=official["patch_size"],
        words=0,
    )
    channels, side = official["in_channels"], official["input_size"]
    outputs = channels * (2 if official["learn_sigma"] else 1)
    return DiT(config, official["num_classes"] + 1, (channels, side, side), outputs).eval()


@torch.no_grad()
def dit(reference: Reference) -> Outputs:
    """Every output of DiT that a reference file may hold."""
    official, given = reference.config, reference.inputs
    net = dit_network(official)
    net.load_state_dict(dit_state(net, reference.state[""]))

    def text(classes: Tensor) -> TextFeatures:
        count = official["num_classes"] + 1
        one_hot = F.one_hot(classes, count).float()
        return told(one_hot[:, None], one_hot)

    read, tokens = text(given["y"]), net.tokens(given["x"])
    vector = F.silu(net.told(given["t"], read))
    half, small = len(given["cfg_x"]), given["small_tokens"]
    twice = torch.cat([given["cfg_x"]] * 2)
    both = net(twice, given["cfg_t"], text(given["cfg_y"]))
    towards, without = both[:half], both[half:]
    guided = Guidance(official["cfg_scale"]).join(towards[:, :3], without[:, :3])
    joined = torch.cat([torch.cat([guided, guided]), both[:, 3:]], dim=1)  # the authors guide three
    first = net.blocks[0]
    return {
        "out": net(given["x"], given["t"], read),
        "tokens0": tokens,
        "t_emb": net.time(time_embedding(given["t"], net.time[0].in_features)),  # type: ignore[arg-type]
        "y_emb": net.sentence(read.sentence),
        "block0": first(tokens, vector),
        "small_block0": first(small, vector) - small,
        "cfg_out": joined,
    }
