"""Key maps and verifiers of the discrete family: quantisers and transformers.

The transformer of `lineage/vqvae/transformer.py` has GPT-2's block. GPT-2 keeps its matrices
turned, and minGPT keeps query, key and value apart; that is all in which their weights differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lineage.nn.autoencoder import AutoencoderConfig, Decoder, Encoder, PatchDiscriminator
from lineage.official import Outcome, Outputs
from lineage.official.verify import Reference
from lineage.vqvae.dalle import DVAEConfig, DVAEDecoder, DVAEEncoder, map_pixels, unmap_pixels
from lineage.vqvae.quantise import QuantiserConfig, VectorQuantiser
from lineage.vqvae.transformer import GPT, Cache, TransformerConfig, next_token_loss

# --- transformers ----------------------------------------------------------------


def gpt2_state(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of transformers' `GPT2LMHeadModel` by our names."""
    names = {
        "transformer.wte.weight": "tok_emb.weight",
        "transformer.wpe.weight": "pos_emb.weight",
        "lm_head.weight": "head.weight",
    }
    inner = {"attn.c_attn": "attn.qkv", "attn.c_proj": "attn.proj", "ln_1": "ln1", "ln_2": "ln2"}
    inner |= {"mlp.c_fc": "mlp.0", "mlp.c_proj": "mlp.2"}
    state = {}
    for key, value in official.items():
        if found := re.fullmatch(r"transformer\.h\.(\d+)\.(.+)\.(weight|bias)", key):
            number, part, kind = found.groups()
            turned = value.T if ".c_" in f".{part}" and kind == "weight" else value
            state[f"transformer.blocks.{number}.{inner[part]}.{kind}"] = turned
        elif key.startswith("transformer.ln_f"):
            state[key] = value
        else:
            state[names[key]] = value
    state.setdefault("head.weight", state["tok_emb.weight"])  # tied, and not always written twice
    return state


def mingpt_state(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of taming-transformers' `GPT` by our names."""
    state = {
        "pos_emb.weight": official["pos_emb"][0],
        "tok_emb.weight": official["tok_emb.weight"],
        "head.weight": official["head.weight"],
    }
    for key, value in official.items():
        if key.startswith("ln_f."):
            state[f"transformer.{key}"] = value
        elif found := re.fullmatch(r"blocks\.(\d+)\.attn\.query\.(weight|bias)", key):
            number, kind = found.groups()
            parts = [
                official[f"blocks.{number}.attn.{n}.{kind}"] for n in ("query", "key", "value")
            ]
            state[f"transformer.blocks.{number}.attn.qkv.{kind}"] = torch.cat(parts)
        elif re.match(r"blocks\.\d+\.(ln|mlp|attn\.proj)", key):
            state[f"transformer.{key}"] = value
    return state


@torch.no_grad()
def gpt2(reference: Reference) -> Outputs:
    """Every output of transformers' GPT-2 that a reference file may hold."""
    official, given = reference.config, reference.inputs
    gelu = "exact" if official.get("activation") == "gelu" else "tanh"
    config = TransformerConfig(official["n_embd"], official["n_layer"], official["n_head"], gelu)
    model = GPT(config, official["vocab_size"], official["n_positions"])
    model.load_state_dict(gpt2_state(reference.state[""]))
    model.eval()
    ids = given["input_ids"]
    logits = model(ids)
    outputs: dict[str, Outcome] = {
        "logits": logits,
        "loss": next_token_loss(logits, ids),
        "hidden_states": torch.stack(model.transformer.states(model.embed(ids))),
    }
    if "attention_mask_left" in given:
        mask, place = given["attention_mask_left"] == 1, given["position_ids_left"]
        outputs["logits_left_padded"] = model(ids, mask=mask, place=place)
    for name, cached in (("greedy_cache", True), ("greedy_nocache", False)):
        if name in reference.outputs:
            length = reference.outputs[name].shape[1]
            outputs[name] = model.greedy(ids, length, cached)
    cache = Cache(config, len(ids), ids.shape[1], logits)
    model(ids[:, :-1], cache)
    outputs["cached_last_logits"] = model(ids[:, -1:], cache)[:, -1]
    return outputs


@torch.no_grad()
def mingpt(reference: Reference) -> Outputs:
    """Every output of taming-transformers' minGPT that a reference file may hold."""
    official, given = reference.config, reference.inputs
    sizes = (official["n_embd"], official["n_layer"], official["n_head"])
    config = TransformerConfig(*sizes, gelu="exact")
    model = GPT(config, official["vocab_size"], official["block_size"], tied=False)
    model.load_state_dict(mingpt_state(reference.state[""]))
    model.eval()
    ids = given["idx"]
    logits = model(ids)
    outputs: dict[str, Outcome] = {
        "logits": logits,
        "loss": F.cross_entropy(logits.flatten(0, 1), given["targets"].flatten()),
    }
    for name in reference.outputs:
        if found := re.fullmatch(r"logits_n_unmasked(\d+)", name):
            outputs[name] = model(ids, open_places=int(found[1]))
    if "logits_with_embeddings" in reference.outputs:
        put = given["embeddings"]
        length = reference.outputs["logits_with_embeddings"].shape[1]
        tokens = model.tok_emb(ids[:, : length - put.shape[1]])
        x = torch.cat([put, tokens], 1) + model.pos_emb.weight[:length]
        outputs["logits_with_embeddings"] = model.head(model.transformer(x))
    if "greedy_tokens" in reference.outputs:
        greedy = reference.outputs["greedy_tokens"]
        steps = reference.outputs["cached_step_logits"].shape[1]
        start, length = greedy.shape[1] - steps, greedy.shape[1]
        outputs["greedy_tokens"] = model.greedy(ids[:, :start], length, cached=False)
        cache = Cache(config, len(ids), length, logits)
        found_logits = [model(greedy[:, :start], cache)[:, -1]]
        for place in range(start, length - 1):
            found_logits.append(model(greedy[:, place : place + 1], cache)[:, -1])
        outputs["cached_step_logits"] = torch.stack(found_logits, 1)
    return outputs


# --- quantisers ---------------------------------------------------------------------


@torch.no_grad()
def vq_ema(reference: Reference) -> Outputs:
    """Every output of lucidrains/vector-quantize-pytorch that a reference file may hold."""
    official, state = reference.config, reference.state[""]
    config = QuantiserConfig(
        codes=official["codebook_size"],
        width=official["dim"],
        beta=official["commitment_weight"],
        decay=official["decay"],
        start="normal",
        restart=0.0,
    )
    ours = {"embed": "codes", "cluster_size": "counts", "embed_avg": "sums"}
    quantiser = VectorQuantiser(config)
    loaded = {ours[n]: state[f"_codebook.{n}"][0] for n in ours}
    quantiser.load_state_dict({**loaded, "begun": torch.tensor(True)})
    x = reference.inputs["x"]

    def codebook(prefix: str) -> dict[str, Tensor]:
        now = {f"{prefix}/_codebook.{n}": getattr(quantiser, ours[n])[None].clone() for n in ours}
        return {**now, f"{prefix}/_codebook.initted": quantiser.begun.clone()}

    found = quantiser.eval()(x)
    outputs: dict[str, Any] = {
        "eval_indices": found.ids,
        "eval_quantized": found.values,
        "eval_loss": torch.zeros(()),  # not asked for outside training
    }
    found = quantiser.train()(x)
    outputs |= {
        "train_indices": found.ids,
        "train_quantized": found.values,
        "train_commit_loss": found.terms["commitment"],
        **codebook("after"),
    }
    quantiser(x)
    return {**outputs, **codebook("after2")}


def taming_quantiser(reference: Reference, misplaced_beta: bool) -> VectorQuantiser:
    """taming's `VectorQuantizer2` with the codes of the file."""
    official = reference.config
    config = QuantiserConfig(
        codes=official["n_embed"],
        width=official["embed_dim"],
        beta=official["beta"],
        codebook="loss",
        start="normal",
        restart=0.0,
        misplaced_beta=misplaced_beta,
    )
    quantiser = VectorQuantiser(config)
    with torch.no_grad():
        quantiser.codes.copy_(reference.state["VQModel"]["quantize.embedding.weight"])
    return quantiser.eval()


def autoencoder_config(official: Mapping[str, Any]) -> AutoencoderConfig:
    """Our configuration for a `ddconfig`."""
    return AutoencoderConfig(
        channels=official["ch"],
        multipliers=tuple(official["ch_mult"]),
        blocks=official["num_res_blocks"],
        attention=tuple(official["attn_resolutions"]),
        size=official["resolution"],
        latent=official["z_channels"],
    )


def autoencoder_key(name: str, levels: int) -> str:
    """A name in CompVis' encoder or decoder, without that word, -> ours.

    Their decoder counts its sides from the largest, ours goes in the order of its layers.
    """
    name = re.sub(r"^up\.(\d+)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", name)
    return name.replace(".downsample.", ".resample.").replace(".upsample.", ".resample.")


def autoencoder_state(official: Mapping[str, Tensor], part: str, levels: int) -> dict[str, Tensor]:
    """The weights of `part`, encoder or decoder, by our names."""
    return {
        autoencoder_key(key.removeprefix(f"{part}."), levels): value
        for key, value in official.items()
        if key.startswith(f"{part}.")
    }


def taming_vqgan(reference: Reference) -> Outputs:
    """Every output of taming-transformers' VQGAN that a reference file may hold."""
    official, given, state = reference.config, reference.inputs, reference.state["VQModel"]
    config = autoencoder_config(official["ddconfig"])
    levels = len(config.multipliers)
    encoder, decoder = Encoder(config, config.latent), Decoder(config)
    encoder.load_state_dict(autoencoder_state(state, "encoder", levels))
    decoder.load_state_dict(autoencoder_state(state, "decoder", levels))
    before = nn.Conv2d(config.latent, official["embed_dim"], 1)
    after = nn.Conv2d(official["embed_dim"], config.latent, 1)
    for layer, name in ((before, "quant_conv"), (after, "post_quant_conv")):
        layer.load_state_dict({n: state[f"{name}.{n}"] for n in ("weight", "bias")})
    settings = official["discriminator"]
    look = PatchDiscriminator(settings["ndf"], settings["n_layers"], settings["input_nc"]).eval()
    look.load_state_dict(reference.state["NLayerDiscriminator"])

    with torch.no_grad():
        z = before(encoder(given["image"]))
    outputs: dict[str, Any] = {"z_e": z}
    for suffix, misplaced in (("legacy", True), ("fixed", False)):
        quantiser, leaf = taming_quantiser(reference, misplaced), z.clone().requires_grad_()
        found = quantiser(rearrange(leaf, "b d h w -> b h w d"))
        code = rearrange(found.values, "b h w d -> b d h w")
        loss = torch.stack(list(found.terms.values())).sum()
        gradients = torch.autograd.grad(code.square().mean() + loss, [leaf, quantiser.codes])
        outputs[f"grad_z_{suffix}"], outputs[f"grad_codebook_{suffix}"] = gradients
        outputs["codebook_loss" if misplaced else "codebook_loss_legacy_false"] = loss.detach()
    with torch.no_grad():
        # A small difference of two distances: an encoder's rounding of 1e-6 would be 4e-5 of it.
        # So it is taken of the official vectors; the encoder's own are compared as z_e.
        vectors = rearrange(reference.outputs.get("z_e", z), "b d h w -> (b h w) 1 d")
        two = (vectors - quantiser.codes).square().sum(2).topk(2, largest=False).values
        image = decoder(after(code))
        real, fake = (
            look(F.interpolate(x, scale_factor=2, mode="nearest")) for x in (given["image"], image)
        )
        small, mid = given["small"], encoder.mid
        hinge = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        vanilla = F.softplus(-real).mean() + F.softplus(fake).mean()
        outputs |= {
            "indices": found.ids.flatten(),
            "z_q": code.detach(),
            "distance_margin_min": (two[:, 1] - two[:, 0]).min(),
            "reconstruction": image,
            "disc_real": real,
            "disc_fake": fake,
            "hinge_d_loss": 0.5 * hinge,
            "vanilla_d_loss": 0.5 * vanilla,
            "small_mid_block_1": mid.block_1(small) - small,
            "small_mid_attn_1": mid.attn_1(small) - small,
        }
    return outputs | _taming_average(reference, z)


@torch.no_grad()
def _taming_average(reference: Reference, z: Tensor) -> dict[str, Any]:
    """taming's codebook of moving averages, before and after a step on z (B, D, H, W)."""
    official, state = reference.config, reference.state["EMAVectorQuantizer"]
    config = QuantiserConfig(
        official["n_embed"],
        official["embed_dim"],
        beta=official["beta"],
        decay=0.9,  # stated in the file's sentences
        start="normal",
        restart=0.0,
    )
    ours = {"weight": "codes", "cluster_size": "counts", "embed_avg": "sums"}
    quantiser = VectorQuantiser(config).train()
    loaded = {ours[name]: state[f"embedding.{name}"] for name in ours}
    quantiser.load_state_dict({**loaded, "begun": torch.tensor(True)})
    found = quantiser(rearrange(z, "b d h w -> b h w d"))
    share = torch.bincount(found.ids.flatten(), minlength=official["n_embed"]) / found.ids.numel()
    return {
        "ema_indices": found.ids.flatten(),
        "ema_loss": found.terms["commitment"],
        "ema_perplexity": torch.special.entr(share).sum().exp(),
        **{f"ema_after/embedding.{name}": getattr(quantiser, ours[name]) for name in ours},
    }


# --- DALL-E's dVAE -------------------------------------------------------------------


def dvae_key(name: str) -> str:
    """A name in DALL-E's encoder or decoder -> ours."""
    name = name.removeprefix("blocks.").replace("output.conv.", "output.")
    name = re.sub(
        r"^group_(\d+)\.block_(\d+)\.",
        lambda m: f"groups.{int(m[1]) - 1}.{int(m[2]) - 1}.",
        name,
    )
    name = name.replace(".id_path.", ".identity.")
    name = re.sub(r"\.res_path\.conv_(\d)\.", lambda m: f".path.{2 * int(m[1]) - 1}.", name)
    return re.sub(r"\.w$", ".weight", re.sub(r"\.b$", ".bias", name))


@torch.no_grad()
def dalle_dvae(reference: Reference) -> Outputs:
    """Every output of openai/DALL-E that a reference file may hold."""
    official, given = reference.config, reference.inputs
    config = DVAEConfig(
        official["vocab_size"],
        official["n_hid"],
        official["n_init"],
        official["n_blk_per_group"],
    )
    encoder, decoder = DVAEEncoder(config), DVAEDecoder(config)
    for network, name in ((encoder, "Encoder"), (decoder, "Decoder")):
        state = reference.state[name]
        network.load_state_dict({dvae_key(key): value for key, value in state.items()})
    mapped = map_pixels(given["image01"])
    logits = encoder(mapped)
    ids = logits.argmax(1)
    mixture = F.one_hot(ids, config.codes).float().movedim(-1, 1)
    mu, log_b = decoder(mixture)
    first = F.max_pool2d(encoder.groups[0](encoder.input(mapped)), 2)
    return {
        "map_pixels": mapped,
        "unmap_pixels": unmap_pixels(given["unmap_in"]),
        "logits": logits,
        "tokens": ids,
        "decoder_out": torch.cat([mu, log_b], 1),
        "decoder_out_soft": torch.cat(decoder((logits / 0.7).softmax(1)), 1),
        "reconstruction": unmap_pixels(mu.sigmoid()),
        "enc_group1": first[..., ::2, ::2],
    }
