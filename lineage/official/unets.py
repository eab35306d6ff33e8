"""Verifiers and key maps of diffusion networks: guided-diffusion's and GLIDE's UNets, latent
diffusion's UNet, autoencoder and text encoder, and DiT.

Our UNet is that of all three. A map gives, for each of our tensors, the official ones that are laid
one behind the other to make it; it is written down once by walking through our network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from lineage.config import TextConfig
from lineage.diffusion import samplers
from lineage.diffusion.dit import DiT, DiTConfig
from lineage.diffusion.guidance import Guidance
from lineage.diffusion.ldm import KLAutoencoder, KLConfig
from lineage.diffusion.process import Process, ProcessConfig
from lineage.diffusion.samplers import Estimate
from lineage.diffusion.schedules import Path, Point
from lineage.diffusion.unet import Level, UNet, UNetConfig, time_embedding
from lineage.nn.autoencoder import AutoencoderConfig
from lineage.official import Outputs
from lineage.official.diffusion import Given, Seen
from lineage.official.verify import Reference
from lineage.official.vqvae import autoencoder_config, autoencoder_state
from lineage.text.contract import TextFeatures
from lineage.text.padded import BertEncoder, GlideEncoder, PaddedEncoder
from lineage.text.tokenizer import PAD, WordTokenizer

Names = dict[str, tuple[str, ...]]
"""Ours -> the official tensors that make it, one behind the other."""

# --- the UNet -------------------------------------------------------------------------------------

RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
WITHIN_TRANSFORMER = {
    "pixels.query": ("attn1.to_q",),
    "pixels.key_value": ("attn1.to_k", "attn1.to_v"),
    "pixels.out": ("attn1.to_out.0",),
    "words.query": ("attn2.to_q",),
    "words.key_value": ("attn2.to_k", "attn2.to_v"),
    "words.out": ("attn2.to_out.0",),
    "feed.enter": ("ff.net.0.proj",),
    "feed.leave": ("ff.net.2",),
}


def places(unet: UNet) -> Iterator[tuple[str, str]]:
    """(our module, the official one) of all blocks and lone layers of a UNet."""
    yield from (("time.0", "time_embed.0"), ("time.2", "time_embed.2"))
    yield from (("enter", "input_blocks.0.0"), ("norm", "out.0"), ("leave", "out.2"))
    for number, part in enumerate(unet.down):
        at = f"input_blocks.{number + 1}"
        if not isinstance(part, Level):
            yield f"down.{number}", f"{at}.0.op"
            continue
        yield f"down.{number}.residual", f"{at}.0"
        yield f"down.{number}.attention", f"{at}.1"
    yield from (("middle.0.residual", "middle_block.0"), ("middle.0.attention", "middle_block.1"))
    yield "middle.1.residual", "middle_block.2"
    block, within = -1, 0
    for number, part in enumerate(unet.up):
        if isinstance(part, Level) and not part.residual.resample:
            block, within = block + 1, 1 if part.attention is None else 2
            yield f"up.{number}.residual", f"output_blocks.{block}.0"
            yield f"up.{number}.attention", f"output_blocks.{block}.1"
        elif isinstance(part, Level):
            yield f"up.{number}.residual", f"output_blocks.{block}.{within}"
        else:
            yield f"up.{number}.conv", f"output_blocks.{block}.{within}.conv"


def unet_names(unet: UNet) -> Names:
    """The map of a UNet with spatial transformers."""
    modules = sorted(places(unet), key=lambda pair: -len(pair[0]))
    names: Names = {}
    for key in unet.state_dict():
        ours, theirs = next(pair for pair in modules if key.startswith(f"{pair[0]}."))
        inner, _, kind = key.removeprefix(f"{ours}.").rpartition(".")
        if ours.endswith(".residual"):
            names[key] = (f"{theirs}.{RESIDUAL[inner]}.{kind}",)
        elif ours.endswith(".attention"):
            names[key] = tuple(f"{theirs}.{part}.{kind}" for part in _transformer(inner))
        else:
            names[key] = (f"{theirs}.{kind}",)
    return names


def _transformer(inner: str) -> tuple[str, ...]:
    """A layer of a spatial transformer."""
    alone = {"norm": "norm", "enter": "proj_in", "leave": "proj_out"}
    if inner in alone:
        return (alone[inner],)
    _, number, layer = inner.split(".", 2)
    parts = WITHIN_TRANSFORMER.get(layer, (layer,))
    return tuple(f"transformer_blocks.{number}.{part}" for part in parts)


def gathered(names: Names, official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors of the official ones."""
    return {ours: torch.cat([official[name] for name in parts]) for ours, parts in names.items()}


def attention_state(
    unet: UNet, official: Mapping[str, Tensor], heads_first: bool = True
) -> dict[str, Tensor]:
    """The attention blocks of guided-diffusion and GLIDE, whose queries, keys and values are one
    layer, ordered by heads first, or not.
    """
    state: dict[str, Tensor] = {}

    def split(tensor: Tensor, heads: int, parts: int) -> list[Tensor]:
        tensor = tensor.squeeze(-1) if tensor.dim() == 3 else tensor  # of a 1 x 1 convolution
        pattern = "(h p d) ... -> p (h d) ..." if heads_first else "(p h d) ... -> p (h d) ..."
        return list(rearrange(tensor, pattern, h=heads, p=parts))

    for ours, theirs in places(unet):
        if not ours.endswith(".attention") or f"{theirs}.qkv.weight" not in official:
            continue
        heads = unet.get_submodule(ours).pixels.heads  # type: ignore[union-attr]
        for kind in ("weight", "bias"):
            query, key, value = split(official[f"{theirs}.qkv.{kind}"], int(heads), 3)  # type: ignore[arg-type]
            state[f"{ours}.norm.{kind}"] = official[f"{theirs}.norm.{kind}"]
            state[f"{ours}.pixels.query.{kind}"] = query
            state[f"{ours}.pixels.key_value.{kind}"] = torch.cat([key, value])
            out = official[f"{theirs}.proj_out.{kind}"]
            state[f"{ours}.pixels.out.{kind}"] = out.squeeze(-1) if out.dim() == 3 else out
            if f"{theirs}.encoder_kv.{kind}" in official:
                told = split(official[f"{theirs}.encoder_kv.{kind}"], int(heads), 2)  # type: ignore[arg-type]
                state[f"{ours}.words_joint.{kind}"] = torch.cat(told)
    return state


def guided_state(
    unet: UNet, official: Mapping[str, Tensor], heads_first: bool, sentence: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights of guided-diffusion's or GLIDE's UNet by our names."""
    attention = attention_state(unet, official, heads_first)
    told = {f"sentence.{kind}": value for kind, value in sentence.items()}
    return {**gathered(unet_names_without_attention(unet), official), **attention, **told}


def unet_names_without_attention(unet: UNet) -> Names:
    """The map of what is neither attention nor sentence."""
    names: Names = {}
    for ours, theirs in places(unet):
        if ours.endswith(".attention"):
            continue
        for inner in unet.get_submodule(ours).state_dict():
            layer, _, kind = inner.rpartition(".")
            at = f"{theirs}.{RESIDUAL[layer]}" if ours.endswith(".residual") else theirs
            names[f"{ours}.{inner}"] = (f"{at}.{kind}",)
    return names


def unet_config(official: Mapping[str, Any], conditioning: str) -> UNetConfig:
    """Our configuration for the authors' arguments. Attention is named by how often the side was
    halved, 1, 2, 4, ...
    """
    width = official.get("num_head_channels", -1)
    return UNetConfig(
        width=official["model_channels"],
        multipliers=tuple(official["channel_mult"]),
        blocks=official["num_res_blocks"],
        attention=tuple(int(math.log2(k)) for k in official["attention_resolutions"]),
        heads=max(1, official.get("num_heads", 1)),
        head_width=width if width > 0 else 0,
        conditioning=conditioning,
        depth=official.get("transformer_depth", 1),
        padding=True,
        shift=official.get("use_scale_shift_norm", False),
        block_resampling=official.get("resblock_updown", False),
        groups=32,
        dropout=0.0,
    )


def told(words: Tensor, sentence: Tensor | None = None) -> TextFeatures:
    """Text of words (B, L, D), and of a sentence (B, D)."""
    sentence = words.mean(1) if sentence is None else sentence
    mask = torch.ones(words.shape[:2], dtype=torch.bool)
    return TextFeatures(words, mask, sentence, mask.long())


@torch.no_grad()
def adm_unet(reference: Reference) -> Outputs:
    """Every output of guided-diffusion's UNet that a reference file may hold."""
    official, given, state = reference.config, reference.inputs, reference.state[""]
    classes = official.get("num_classes")
    config = unet_config(official, "sentence" if classes else "none")
    unet = UNet(config, classes or 1, official["in_channels"], official["out_channels"]).eval()
    sentence = {}
    if classes:
        table = state["label_emb.weight"]
        sentence = {"weight": table.T, "bias": table.new_zeros(table.shape[1])}
    first = not official.get("use_new_attention_order", False)
    unet.load_state_dict(guided_state(unet, state, first, sentence))
    one_hot = (
        torch.nn.functional.one_hot(given["y"], classes).float()
        if classes
        else torch.zeros(len(given["x"]), 1)
    )
    return {"out": unet(given["x"], given["t"], told(one_hot[:, None], one_hot))}


# --- GLIDE ----------------------------------------------------------------------------------------


def tokens_only(count: int) -> WordTokenizer:
    """A tokeniser of so many tokens, whose words nobody asks for."""
    special = len(WordTokenizer([]))
    return WordTokenizer([f"w{k}" for k in range(count - special)])


def padded_state(encoder: PaddedEncoder, official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """GLIDE's text transformer, or latent diffusion's, by our names."""
    glide = isinstance(encoder, GlideEncoder)
    state: dict[str, Tensor] = {}
    for number, block in enumerate(encoder.blocks):
        ours = f"blocks.{number}"
        if glide:
            theirs = f"transformer.resblocks.{number}"
            layers = {"norm1": "ln_1", "norm2": "ln_2", "mlp.0": "mlp.c_fc", "mlp.2": "mlp.c_proj"}
            layers |= {"attention.out": "attn.c_proj"}
            heads = block.attention.heads  # type: ignore[union-attr]
            for kind in ("weight", "bias"):
                whole = official[f"{theirs}.attn.c_qkv.{kind}"]
                query, *pairs = rearrange(whole, "(h p d) ... -> p (h d) ...", h=heads, p=3)
                state[f"{ours}.attention.query.{kind}"] = query
                state[f"{ours}.attention.key_value.{kind}"] = torch.cat(pairs)
        else:
            theirs = "attn_layers.layers"
            attention, feed = f"{2 * number}", f"{2 * number + 1}"
            layers = {"norm1": f"{attention}.0", "norm2": f"{feed}.0"}
            layers |= {"mlp.0": f"{feed}.1.net.0.0", "mlp.2": f"{feed}.1.net.2"}
            layers |= {"attention.out": f"{attention}.1.to_out"}
            parts = [official[f"{theirs}.{attention}.1.to_{x}.weight"] for x in "qkv"]
            state[f"{ours}.attention.query.weight"] = parts[0]
            state[f"{ours}.attention.key_value.weight"] = torch.cat(parts[1:])
        for mine, layer in layers.items():
            for kind in ("weight", "bias"):
                state[f"{ours}.{mine}.{kind}"] = official[f"{theirs}.{layer}.{kind}"]
    rest = {
        "table.weight": "token_embedding.weight" if glide else "token_emb.weight",
        "position": "positional_embedding" if glide else "pos_emb.emb.weight",
    }
    rest |= {"padding": "padding_embedding"} if glide else {}
    last = "final_ln" if glide else "norm"
    for kind in ("weight", "bias"):
        rest[f"norm.{kind}"] = f"{last}.{kind}"
    return state | {mine: official[name] for mine, name in rest.items()}


@torch.no_grad()
def glide_text2im(reference: Reference) -> Outputs:
    """Every output of GLIDE's network that a reference file may hold."""
    official, given, state = reference.config, reference.inputs, reference.state[""]
    sizes = TextConfig(
        width=official["xf_width"],
        words=official["text_ctx"],
        layers=official["xf_layers"],
        heads=official["xf_heads"],
    )
    encoder = GlideEncoder(sizes, tokens_only(official["n_vocab"])).eval()
    encoder.load_state_dict(padded_state(encoder, state))
    config = unet_config(official, "joint")
    unet = UNet(config, sizes.width, official["in_channels"], official["out_channels"]).eval()
    sentence = {kind: state[f"transformer_proj.{kind}"] for kind in ("weight", "bias")}
    unet.load_state_dict(guided_state(unet, state, True, sentence))

    def read(mask: Tensor) -> TextFeatures:
        words, last = encoder(given["tokens"], mask)
        return TextFeatures(words, mask, last, given["tokens"])

    text, mask = read(given["mask"]), given["mask"]
    nothing = read(torch.zeros_like(mask))
    return {
        "out": unet(given["x"], given["t"], text),
        "out_all_padding": unet(given["x"], given["t"], nothing),
        "xf_out": text.words.mT,
        "xf_proj": unet.sentence(text.sentence) if unet.sentence is not None else "no sentence",
    }


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
    embedded = torch.nn.functional.silu(given["resblock_emb"])
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
    state = gathered(dit_names(net), official)
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
        one_hot = torch.nn.functional.one_hot(classes, count).float()
        return told(one_hot[:, None], one_hot)

    read, tokens = text(given["y"]), net.tokens(given["x"])
    vector = torch.nn.functional.silu(net.told(given["t"], read))
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
