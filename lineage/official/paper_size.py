"""Verifier of the networks at the papers' sizes, whose weights and inputs come from a formula.

A reference file of this kind holds only some outputs. Every weight is a function of its official
name and its place in the tensor, so each network here is filled by official names, which are ours
turned back; the inputs are made likewise. Networks are built when one of their outputs is asked
for, one after the other.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lineage.attngan.attngan import Generator
from lineage.attngan.damsm import InceptionRegions
from lineage.cgan.stackgan import StackGANConfig, StageOneGenerator, StageTwoGenerator
from lineage.diffusion.ldm import KLAutoencoder
from lineage.diffusion.networks.dit import SIZES
from lineage.diffusion.networks.unet import UNet
from lineage.nn.autoencoder import AutoencoderConfig, Decoder, Encoder
from lineage.nn.conditional_discriminator import Discriminator
from lineage.official import Outcome, Outputs
from lineage.official.attngan import text_encoder
from lineage.official.latent import dit_names, dit_network, dit_rest
from lineage.official.unets import Names, told, unet_names
from lineage.official.verify import Reference
from lineage.official.vqvae import gpt2_state
from lineage.recipes import ldm
from lineage.recipes.attngan import PRESETS
from lineage.text.contract import TextFeatures
from lineage.vqvae.dalle import DVAEConfig, DVAEDecoder, DVAEEncoder, map_pixels
from lineage.vqvae.quantise import QuantiserConfig, VectorQuantiser
from lineage.vqvae.transformer import GPT, TransformerConfig

Made = Callable[["Formula"], Mapping[str, Tensor]]


class Formula:
    """Numbers from names.

    Args:
        salt: makes other numbers of the same names.
        gains: factor on the weights of each network.
        config: what else the file says, such as the time that a network is told.
    """

    def __init__(
        self, salt: int, gains: Mapping[str, float], config: Mapping[str, Any] | None = None
    ) -> None:
        self.salt, self.gains, self.config = salt, gains, config or {}

    def numbers(self, name: str, *shape: int) -> Tensor:
        """float64 in [-1, 1), a function of the name and the place alone."""
        start = (zlib.crc32(name.encode()) + self.salt) % 2**32
        x = (np.arange(math.prod(shape), dtype=np.uint64) * 2654435761 + start) % 2**32
        for _ in range(2):
            x = (x ^ (x >> np.uint64(16))) * 0x45D9F3B % 2**32
        x ^= x >> np.uint64(16)
        return torch.from_numpy(x.astype(np.float64) / 2**31 - 1).view(shape)

    def given(self, name: str, *shape: int) -> Tensor:
        """An input of unit variance, float32."""
        return (math.sqrt(3) * self.numbers(f"input/{name}", *shape)).float()

    def weight(self, key: str, shape: torch.Size, gain: float) -> Tensor:
        """The tensor of an official key."""
        u = self.numbers(key, *shape)
        if key.endswith("running_var"):
            return 1 + 0.5 * u
        if key.endswith("running_mean"):
            return 0.1 * u
        if len(shape) >= 2:
            return u * math.sqrt(3 / math.prod(shape[1:])) * gain
        return 1 + 0.2 * u if key.endswith("weight") else 0.1 * u

    @torch.no_grad()
    def fill(self, network: nn.Module, name: str, official: Callable[[str], str]) -> None:
        """Set the weights of a network, whose keys `official` turns back, to evaluation mode."""
        for key, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(self.weight(official(key), tensor.shape, self.gains[name]))
        network.eval()


# --- names, ours -> official -----------------------------------------------------


def of_stackgan(key: str) -> str:
    """A key of stage II's generator, or of stage I's."""
    return re.sub(r"upsample\.(\d)\.", lambda m: f"upsample{int(m[1]) + 1}.", key)


def of_generator(key: str) -> str:
    """A key of AttnGAN's generator."""
    key = re.sub(r"^first\.upsample\.(\d)\.", lambda m: f"h_net1.upsample{int(m[1]) + 1}.", key)
    key = key.replace("first.", "h_net1.")
    key = re.sub(r"^next\.(\d)\.", lambda m: f"h_net{int(m[1]) + 2}.", key)
    key = key.replace("attention.project", "att.conv_context")
    return re.sub(r"^pictures\.(\d)\.", lambda m: f"img_net{int(m[1]) + 1}.img.", key)


def of_discriminator(key: str, side: int) -> str:
    """A key of AttnGAN's discriminator of `side` pixels."""
    key = key.replace("alone.", "UNCOND_DNET.outlogits.0.")
    key = key.replace("joint.3.", "COND_DNET.outlogits.0.").replace(
        "joint.", "COND_DNET.jointConv."
    )

    def block(found: re.Match[str]) -> str:
        layer, more = int(found[1]), side.bit_length() - 7  # halvings after those to a sixteenth
        if layer < 11:
            return f"img_code_s16.{layer}."
        number, inner = divmod(layer - 11, 3)
        if number < more:
            return f"img_code_s{16 * 2 ** (number + 1)}.{inner}."
        return f"img_code_s{16 * 2**more}_{number - more + 1}.{inner}."

    return re.sub(r"^encode_img\.(\d+)\.", block, key)


def of_text(key: str) -> str:
    """A key of AttnGAN's text encoder."""
    return key.replace("table.", "encoder.").replace("lstm.", "rnn.")


def of_regions(key: str) -> str:
    """A key of AttnGAN's image encoder."""
    return key.removeprefix("inception.").removeprefix("heads.")


def of_dvae(key: str) -> str:
    """A key of DALL-E's encoder or decoder."""
    key = re.sub(
        r"^groups\.(\d)\.(\d)\.", lambda m: f"group_{int(m[1]) + 1}.block_{int(m[2]) + 1}.", key
    )
    key = re.sub(r"\.path\.(\d)\.", lambda m: f".res_path.conv_{(int(m[1]) + 1) // 2}.", key)
    key = key.replace(".identity.", ".id_path.").replace("output.", "output.conv.")
    return "blocks." + re.sub(r"\.weight$", ".w", re.sub(r"\.bias$", ".b", key))


def of_autoencoder(key: str, levels: int, part: str) -> str:
    """A key of CompVis' `part`, encoder or decoder."""
    key = re.sub(r"^(down\.\d+)\.resample\.", r"\1.downsample.", key).replace(
        ".resample.", ".upsample."
    )
    return f"{part}." + re.sub(r"^up\.(\d+)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", key)


# --- networks --------------------------------------------------------------------


def attngan_generator(formula: Formula) -> dict[str, Tensor]:
    paper = PRESETS["paper"]
    generator = Generator(paper.model, 256, paper.size)
    formula.fill(generator, "attngan_bird_G_NET", of_generator)
    words = formula.given("attngan/words", 1, 256, 12).mT
    mask = torch.ones(1, 12, dtype=torch.bool)
    text = TextFeatures(words, mask, formula.given("attngan/sent", 1, 256), mask.long())
    noise, eps = formula.given("attngan/z", 1, 100), formula.given("attngan/eps", 1, 100)
    drawn = generator(text, noise, eps)
    small, middle, large = drawn.images
    return {
        "img64": small[..., ::2, ::2],
        "img128": middle[..., ::4, ::4],
        "img256": large[..., ::8, ::8],
        "att2": drawn.attention[1][..., ::16, ::16],
        "mu": drawn.mu,
    }


def attngan_discriminator(formula: Formula) -> dict[str, Tensor]:
    look = Discriminator(64, 256, 256, alone=True)
    formula.fill(look, "attngan_bird_D_NET256", lambda key: of_discriminator(key, 256))
    seen = look.features(formula.given("attngan/image256", 1, 3, 256, 256))
    told = formula.given("attngan/sent", 1, 256)
    return {
        "feat": seen,
        "cond": look.score(seen, told).sigmoid(),
        "uncond": look.score_alone(seen).sigmoid(),
    }


def attngan_regions(formula: Formula) -> dict[str, Tensor]:
    encoder = InceptionRegions(256)
    formula.fill(encoder, "attngan_CNN_ENCODER", of_regions)
    regions = encoder(formula.given("cnn_encoder/image299", 1, 3, 299, 299))
    return {"regions": regions.local.mT.unflatten(2, (17, 17)), "code": regions.whole}


def attngan_text(formula: Formula) -> dict[str, Tensor]:
    encoder = text_encoder(5450, 300, 256, "lstm")
    formula.fill(encoder, "attngan_RNN_ENCODER", of_text)
    ids = (397 * torch.arange(12) + formula.salt)[None] % 5449 + 1
    words, sentence = encoder(ids, torch.ones_like(ids, dtype=torch.bool))
    return {"words": words.mT, "sent": sentence}


def stackgan_generator(formula: Formula) -> dict[str, Tensor]:
    config = replace(StackGANConfig(), generator=192, discriminator=96, residual=2)
    one, two = StageOneGenerator(config, 1024), StageTwoGenerator(config, 1024, 256)
    name = "stackgan_coco_STAGE2_G"
    formula.fill(one, name, lambda key: f"STAGE1_G.{of_stackgan(key)}")
    formula.fill(two, name, of_stackgan)
    text, zero = formula.given("stackgan/text", 1, 1024), torch.zeros(1, config.condition)
    small = one(text, formula.given("stackgan/z", 1, 100), zero)
    large = two(small.image, text, zero)
    return {
        "img64": small.image[..., ::2, ::2],
        "img256": large.image[..., ::8, ::8],
        "mu": large.mu,
    }


def gpt2_small(formula: Formula) -> dict[str, Tensor]:
    """The matrices are filled as the official ones lie, (in, out), and then turned."""
    config = TransformerConfig(768, 12, 12)
    with torch.device("meta"):
        model = GPT(config, 50257, 1024)
    shapes = {
        "transformer.wte.weight": (50257, 768),
        "transformer.wpe.weight": (1024, 768),
        "transformer.ln_f.weight": (768,),
        "transformer.ln_f.bias": (768,),
    }
    parts = {"attn.c_attn": (768, 2304), "attn.c_proj": (768, 768), "mlp.c_fc": (768, 3072)}
    parts |= {"mlp.c_proj": (3072, 768)}
    for layer in range(config.layers):
        for part, shape in parts.items():
            shapes[f"transformer.h.{layer}.{part}.weight"] = shape
            shapes[f"transformer.h.{layer}.{part}.bias"] = shape[1:]
        for part in ("ln_1", "ln_2"):
            shapes[f"transformer.h.{layer}.{part}.weight"] = (768,)
            shapes[f"transformer.h.{layer}.{part}.bias"] = (768,)
    gain = formula.gains["gpt2_small"]
    official = {k: formula.weight(k, torch.Size(v), gain).float() for k, v in shapes.items()}
    official["lm_head.weight"] = official["transformer.wte.weight"]
    model.load_state_dict(gpt2_state(official), assign=True)
    logits = model.eval()(((3001 * torch.arange(16) + formula.salt) % 50257)[None])
    return {"logits_stride64": logits[:, :, ::64], "argmax": logits.argmax(-1)}


def dalle_dvae(formula: Formula) -> dict[str, Tensor]:
    encoder, decoder = DVAEEncoder(DVAEConfig()), DVAEDecoder(DVAEConfig())
    for network in (encoder, decoder):
        formula.fill(network, "dalle_dvae", of_dvae)
    logits = encoder(map_pixels(0.5 + 0.28 * formula.given("dalle/image", 1, 3, 64, 64)))
    ids = (131 * torch.arange(64) + formula.salt) % 8192
    mixture = F.one_hot(ids.view(1, 8, 8), 8192).float().movedim(-1, 1)
    return {
        "logits_stride16": logits[:, ::16],
        "tokens": logits.argmax(1),
        "decode": torch.cat(decoder(mixture), 1)[..., ::2, ::2],
    }


def taming_vqgan(formula: Formula) -> dict[str, Tensor]:
    config, name = AutoencoderConfig(), "taming_vqgan_f16_1024"
    levels = len(config.multipliers)
    encoder, decoder = Encoder(config, config.latent), Decoder(config)
    before, after = nn.Conv2d(256, 256, 1), nn.Conv2d(256, 256, 1)
    for prefix, network in (("encoder", encoder), ("decoder", decoder)):
        formula.fill(network, name, partial(of_autoencoder, levels=levels, part=prefix))
    formula.fill(before, name, lambda key: f"quant_conv.{key}")
    formula.fill(after, name, lambda key: f"post_quant_conv.{key}")
    settings = QuantiserConfig(1024, 256, codebook="loss", start="normal", restart=0.0)
    quantiser = VectorQuantiser(settings).eval()
    weights = formula.weight(
        "quantize.embedding.weight", quantiser.codes.shape, formula.gains[name]
    )
    with torch.no_grad():
        quantiser.codes.copy_(weights)
    z = before(encoder(formula.given("vqgan/image", 1, 3, 64, 64)))
    found = quantiser(rearrange(z, "b d h w -> b h w d"))
    image = decoder(after(rearrange(found.values, "b h w d -> b d h w")))
    return {
        "z_e": z,
        "indices": found.ids.flatten(),
        "loss": torch.stack(list(found.terms.values())).sum(),
        "decode_z_q": image[..., ::2, ::2],
    }


@torch.no_grad()
def gathered_by(formula: Formula, name: str, network: nn.Module, names: Names) -> None:
    """Set the weights of a network by a map of official tensors, laid one behind the other."""
    for key, tensor in network.state_dict().items():
        parts = names.get(key, ())
        for part, rows in zip(parts, tensor.chunk(max(1, len(parts))), strict=False):
            rows.copy_(formula.weight(part, rows.shape, formula.gains[name]))


def sd_unet(formula: Formula) -> dict[str, Tensor]:
    """Stable Diffusion's UNet, as the `paper` preset of `ldm` has it."""
    name, config = "sd_v1_unet", ldm.PRESETS["paper"].model.unet
    unet = UNet(config, 768, 4)
    gathered_by(formula, name, unet, unet_names(unet))
    x, context = formula.given("unet/x", 1, 4, 32, 32), formula.given("unet/context", 1, 77, 768)
    return {"eps": unet.eval()(x, torch.full((1,), formula.config["sd_v1_unet_t"]), told(context))}


def sd_autoencoder(formula: Formula) -> dict[str, Tensor]:
    """Its autoencoder."""
    name, config = "sd_v1_vae", ldm.PRESETS["paper"].autoencoder
    autoencoder = KLAutoencoder(replace(config, adversary=0.0, perceptual=0.0)).eval()
    levels = len(config.net.multipliers)
    for prefix in ("encoder", "decoder"):
        part = autoencoder.get_submodule(prefix)
        formula.fill(part, name, partial(of_autoencoder, levels=levels, part=prefix))
    for prefix in ("quant_conv", "post_quant_conv"):
        part = autoencoder.get_submodule(prefix)
        formula.fill(part, name, lambda key, p=prefix: f"{p}.{key}")  # type: ignore[misc]
    image = formula.given("vae/image", 1, 3, 64, 64)
    found = autoencoder.encode(image)
    moments = autoencoder.quant_conv(autoencoder.encoder(image))
    return {"moments": moments, "decode_mean": autoencoder.decode(found.mean)}


def dit_xl(formula: Formula) -> dict[str, Tensor]:
    """The largest DiT, told a class."""
    name, size = "DiT-XL/2", dit_xl_sizes()
    net = dit_network(size)
    count, width = size["num_classes"] + 1, size["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {"y_embedder.embedding_table.weight": (count, width)}
    for number in range(size["depth"]):
        shapes[f"blocks.{number}.attn.qkv.weight"] = (3 * width, width)
        shapes[f"blocks.{number}.attn.qkv.bias"] = (3 * width,)
    gathered_by(formula, name, net, dit_names(net))
    gain = formula.gains[name]
    made = {k: formula.weight(k, torch.Size(v), gain).float() for k, v in shapes.items()}
    net.load_state_dict(dit_rest(net, made), strict=False)
    one_hot = F.one_hot(torch.tensor([formula.config["dit_y"]]), count).float()
    time = torch.full((1,), formula.config["dit_t"])
    x = formula.given("dit/x", 1, 4, 32, 32)
    return {"out": net(x, time, told(one_hot[:, None], one_hot))}


def dit_xl_sizes() -> dict[str, int]:
    """DiT-XL/2's arguments, for 1,000 classes."""
    own = SIZES["XL"]
    return {
        "hidden_size": own["width"],
        "depth": own["layers"],
        "num_heads": own["heads"],
        "patch_size": 2,
        "in_channels": 4,
        "input_size": 32,
        "learn_sigma": True,
        "num_classes": 1000,
    }


NETWORKS: dict[str, Made] = {
    "attngan_bird_G_NET": attngan_generator,
    "attngan_bird_D_NET256": attngan_discriminator,
    "attngan_CNN_ENCODER": attngan_regions,
    "attngan_RNN_ENCODER": attngan_text,
    "stackgan_coco_STAGE2_G": stackgan_generator,
    "gpt2_small": gpt2_small,
    "dalle_dvae": dalle_dvae,
    "taming_vqgan_f16_1024": taming_vqgan,
    "sd_v1_unet": sd_unet,
    "sd_v1_vae": sd_autoencoder,
    "DiT-XL/2": dit_xl,
}
"""Those that we have, by the name before the last `/` of their outputs."""


def paper_size(reference: Reference) -> Outputs:
    """Every output of a network that we have; of the others, why not."""
    config = reference.config
    formula = Formula(config["salt"], config["gains"], config)
    made: dict[str, Mapping[str, Tensor]] = {}

    def output(network: str, name: str) -> Tensor:
        if network not in made:
            made.clear()  # one network at a time in memory
            with torch.no_grad():
                made[network] = NETWORKS[network](formula)
        return made[network][name]

    outcomes: dict[str, Outcome] = {}
    for full in reference.outputs:
        network, _, name = full.rpartition("/")
        if network in NETWORKS:
            outcomes[full] = partial(output, network, name)
        else:
            outcomes[full] = f"{network} is not here yet"
    return outcomes
