"""Networks at the papers' sizes, whose weights and inputs come from a formula.

A reference file of this kind holds a few outputs and no weights: every weight is a function of its
official name and its position in the tensor. Each network here is filled under official names, and
the inputs are computed likewise. One network is in memory at a time.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
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
from lineage.diffusion.networks.unet import make_unet
from lineage.nn.autoencoder import AutoencoderConfig, Decoder, Encoder
from lineage.nn.conditional_discriminator import ConditionalDiscriminator
from lineage.official import dit
from lineage.official.adm_unet import official_names, text_features
from lineage.official.attngan import text_encoder
from lineage.official.dit import dit_network
from lineage.official.gpt2 import gpt2_state
from lineage.official.verify import NotComputed, Verifier, output
from lineage.recipes import ldm
from lineage.recipes.attngan import PRESETS
from lineage.text.contract import TextFeatures
from lineage.vqvae.dalle import DVAEConfig, DVAEDecoder, DVAEEncoder, map_pixels
from lineage.vqvae.quantise import QuantiserConfig, VectorQuantiser
from lineage.vqvae.transformer import GPT, TransformerConfig

Network = Callable[["Formula"], Mapping[str, Tensor]]
"""Function that builds and fills a network and returns its outputs by name."""


class Formula:
    """Numbers from names.

    Args:
        salt: Number that gives other numbers for the same names.
        gains: Factor on the weights of each network.
        config: Further inputs of the networks, such as timesteps.
    """

    def __init__(
        self, salt: int, gains: Mapping[str, float], config: Mapping[str, Any] | None = None
    ) -> None:
        self.salt, self.gains, self.config = salt, gains, config or {}

    def numbers(self, name: str, *shape: int) -> Tensor:
        """float64 in [-1, 1), a function of name and position alone."""
        start = (zlib.crc32(name.encode()) + self.salt) % 2**32
        x = (np.arange(math.prod(shape), dtype=np.uint64) * 2654435761 + start) % 2**32
        for _ in range(2):
            x = (x ^ (x >> np.uint64(16))) * 0x45D9F3B % 2**32
        x ^= x >> np.uint64(16)
        return torch.from_numpy(x.astype(np.float64) / 2**31 - 1).view(shape)

    def input(self, name: str, *shape: int) -> Tensor:
        """An input of unit variance, float32."""
        return (math.sqrt(3) * self.numbers(f"input/{name}", *shape)).float()

    def weight(self, key: str, shape: torch.Size, gain: float) -> Tensor:
        """The weight with an official key."""
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
        """Fill a network under the names `official(our key)`, and set it to evaluation mode."""
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
    key = re.sub(
        r"^first_stage\.upsample\.(\d)\.", lambda m: f"h_net1.upsample{int(m[1]) + 1}.", key
    )
    key = key.replace("first_stage.", "h_net1.")
    key = re.sub(r"^next_stages\.(\d)\.", lambda m: f"h_net{int(m[1]) + 2}.", key)
    key = key.replace("attention.project_words", "att.conv_context")
    return re.sub(r"^image_heads\.(\d)\.", lambda m: f"img_net{int(m[1]) + 1}.img.", key)


def of_discriminator(key: str, side: int) -> str:
    """A key of AttnGAN's discriminator of `side` pixels."""
    key = key.replace("uncond_head.", "UNCOND_DNET.outlogits.0.")
    key = key.replace("cond_head.3.", "COND_DNET.outlogits.0.")
    key = key.replace("cond_head.", "COND_DNET.jointConv.")

    def block(match: re.Match[str]) -> str:
        layer, more = int(match[1]), side.bit_length() - 7  # halvings after those to a sixteenth
        if layer < 11:
            return f"img_code_s16.{layer}."
        number, inner = divmod(layer - 11, 3)
        if number < more:
            return f"img_code_s{16 * 2 ** (number + 1)}.{inner}."
        return f"img_code_s{16 * 2**more}_{number - more + 1}.{inner}."

    return re.sub(r"^encode_img\.(\d+)\.", block, key)


def of_text(key: str) -> str:
    """A key of AttnGAN's text encoder."""
    return key.replace("token_emb.", "encoder.")


def of_regions(key: str) -> str:
    """A key of AttnGAN's image encoder."""
    return key.removeprefix("inception.").removeprefix("heads.")


def of_dvae(key: str) -> str:
    """A key of DALL-E's encoder or decoder."""
    key = re.sub(
        r"^groups\.(\d)\.(\d)\.", lambda m: f"group_{int(m[1]) + 1}.block_{int(m[2]) + 1}.", key
    )
    key = re.sub(r"\.res_path\.(\d)\.", lambda m: f".res_path.conv_{(int(m[1]) + 1) // 2}.", key)
    key = key.replace("output.", "output.conv.")
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
    generator = Generator(paper.model, 256, 256, paper.size)
    formula.fill(generator, "attngan_bird_G_NET", of_generator)
    words = formula.input("attngan/words", 1, 256, 12).mT
    mask = torch.ones(1, 12, dtype=torch.bool)
    text = TextFeatures(words, mask, formula.input("attngan/sent", 1, 256), mask.long())
    z, eps = formula.input("attngan/z", 1, 100), formula.input("attngan/eps", 1, 100)
    out = generator(text, z, eps)
    small, middle, large = out.images
    return {
        "img64": small[..., ::2, ::2],
        "img128": middle[..., ::4, ::4],
        "img256": large[..., ::8, ::8],
        "att2": out.attention[1][..., ::16, ::16],
        "mu": out.mu,
    }


def attngan_discriminator(formula: Formula) -> dict[str, Tensor]:
    disc = ConditionalDiscriminator(64, 256, 256, unconditional=True)
    formula.fill(disc, "attngan_bird_D_NET256", lambda key: of_discriminator(key, 256))
    features = disc.features(formula.input("attngan/image256", 1, 3, 256, 256))
    sentence = formula.input("attngan/sent", 1, 256)
    return {
        "feat": features,
        "cond": disc.cond_logits(features, sentence).sigmoid(),
        "uncond": disc.uncond_logits(features).sigmoid(),
    }


def attngan_regions(formula: Formula) -> dict[str, Tensor]:
    encoder = InceptionRegions(256, 256)
    formula.fill(encoder, "attngan_CNN_ENCODER", of_regions)
    features = encoder(formula.input("cnn_encoder/image299", 1, 3, 299, 299))
    regions = features.regions.mT.unflatten(2, (17, 17))
    return {"regions": regions, "code": features.global_vector}


def attngan_text(formula: Formula) -> dict[str, Tensor]:
    encoder = text_encoder(5450, 300, 256, "lstm")
    formula.fill(encoder, "attngan_RNN_ENCODER", of_text)
    ids = (397 * torch.arange(12) + formula.salt)[None] % 5449 + 1
    words, sentence = encoder(ids, torch.ones_like(ids, dtype=torch.bool))
    return {"words": words.mT, "sent": sentence}


def stackgan_generator(formula: Formula) -> dict[str, Tensor]:
    config = StackGANConfig(gen_channels=192, disc_channels=96, num_res_blocks=2)
    one, two = StageOneGenerator(config, 1024), StageTwoGenerator(config, 1024, 256)
    name = "stackgan_coco_STAGE2_G"
    formula.fill(one, name, lambda key: f"STAGE1_G.{of_stackgan(key)}")
    formula.fill(two, name, of_stackgan)
    text, zero = formula.input("stackgan/text", 1, 1024), torch.zeros(1, config.cond_dim)
    small = one(text, formula.input("stackgan/z", 1, 100), zero)
    large = two(small.image, text, zero)
    return {
        "img64": small.image[..., ::2, ::2],
        "img256": large.image[..., ::8, ::8],
        "mu": large.mu,
    }


def gpt2_small(formula: Formula) -> dict[str, Tensor]:
    """The official matrices are (in, out): they are filled so, and then transposed."""
    config = TransformerConfig(width=768, num_layers=12, num_heads=12)
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
    for layer in range(config.num_layers):
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
    logits = encoder(map_pixels(0.5 + 0.28 * formula.input("dalle/image", 1, 3, 64, 64)))
    ids = (131 * torch.arange(64) + formula.salt) % 8192
    mixture = F.one_hot(ids.view(1, 8, 8), 8192).float().movedim(-1, 1)
    return {
        "logits_stride16": logits[:, ::16],
        "tokens": logits.argmax(1),
        "decode": torch.cat(decoder(mixture), 1)[..., ::2, ::2],
    }


def taming_vqgan(formula: Formula) -> dict[str, Tensor]:
    config, name = AutoencoderConfig(), "taming_vqgan_f16_1024"
    levels = len(config.channel_mult)
    encoder, decoder = Encoder(config, config.z_channels), Decoder(config)
    before, after = nn.Conv2d(256, 256, 1), nn.Conv2d(256, 256, 1)
    for prefix, network in (("encoder", encoder), ("decoder", decoder)):
        formula.fill(network, name, partial(of_autoencoder, levels=levels, part=prefix))
    formula.fill(before, name, lambda key: f"quant_conv.{key}")
    formula.fill(after, name, lambda key: f"post_quant_conv.{key}")
    settings = QuantiserConfig(
        num_codes=1024, code_dim=256, update="loss", init="normal", restart_threshold=0.0
    )
    quantiser = VectorQuantiser(settings).eval()
    embedding = quantiser.embedding
    weight = formula.weight("quantize.embedding.weight", embedding.shape, formula.gains[name])
    with torch.no_grad():
        embedding.copy_(weight)
    z = before(encoder(formula.input("vqgan/image", 1, 3, 64, 64)))
    codes = quantiser(rearrange(z, "b d h w -> b h w d"))
    image = decoder(after(rearrange(codes.z_q, "b h w d -> b d h w")))
    return {
        "z_e": z,
        "indices": codes.ids.flatten(),
        "loss": torch.stack(list(codes.terms.values())).sum(),
        "decode_z_q": image[..., ::2, ::2],
    }


def sd_unet(formula: Formula) -> dict[str, Tensor]:
    """Stable Diffusion's UNet, from the `paper` preset of `ldm`."""
    unet = make_unet(ldm.PRESETS["paper"].model.unet, 768, 768, 4, 4)
    names = official_names(unet.state_dict())
    formula.fill(unet, "sd_v1_unet", names.__getitem__)
    x, context = formula.input("unet/x", 1, 4, 32, 32), formula.input("unet/context", 1, 77, 768)
    t = torch.full((1,), formula.config["sd_v1_unet_t"])
    return {"eps": unet(x, t, text_features(context))}


def sd_autoencoder(formula: Formula) -> dict[str, Tensor]:
    """Stable Diffusion's autoencoder."""
    name, config = "sd_v1_vae", ldm.PRESETS["paper"].autoencoder
    autoencoder = KLAutoencoder(replace(config, disc_weight=0.0, perceptual_weight=0.0)).eval()
    levels = len(config.net.channel_mult)
    for prefix in ("encoder", "decoder"):
        part = autoencoder.get_submodule(prefix)
        formula.fill(part, name, partial(of_autoencoder, levels=levels, part=prefix))
    for prefix in ("quant_conv", "post_quant_conv"):
        part = autoencoder.get_submodule(prefix)
        formula.fill(part, name, lambda key, p=prefix: f"{p}.{key}")  # type: ignore[misc]
    image = formula.input("vae/image", 1, 3, 64, 64)
    moments = autoencoder.quant_conv(autoencoder.encoder(image))
    mean = autoencoder.encode(image).mean
    return {"moments": moments, "decode_mean": autoencoder.decode(mean)}


def dit_xl(formula: Formula) -> dict[str, Tensor]:
    """DiT-XL/2 for 1,000 classes and none, as sentences of one-hot vectors."""
    sizes, num_classes, gain = SIZES["XL"], 1001, formula.gains["DiT-XL/2"]
    official_config = {
        "hidden_size": sizes["width"],
        "depth": sizes["depth"],
        "num_heads": sizes["num_heads"],
        "patch_size": 2,
        "in_channels": 4,
        "input_size": 32,
        "learn_sigma": True,
    }
    net = dit_network(official_config, num_classes)
    shapes = {dit.TABLE: torch.Size([num_classes, sizes["width"]])}
    for key, tensor in net.state_dict().items():
        if not key.startswith("sentence_proj."):
            rows = len(tensor) * (3 if re.search(r"\.to_[qkv]\.", key) else 1)
            shapes[dit.official_name(key)] = torch.Size([rows, *tensor.shape[1:]])
    official = {key: formula.weight(key, shape, gain).float() for key, shape in shapes.items()}
    net.load_state_dict(dit.dit_state(net, official))
    one_hot = F.one_hot(torch.tensor([formula.config["dit_y"]]), num_classes).float()
    x, t = formula.input("dit/x", 1, 4, 32, 32), torch.full((1,), formula.config["dit_t"])
    return {"out": net.eval()(x, t, text_features(one_hot[:, None, :1], one_hot))}


NETWORKS: dict[str, Network] = {
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
"""Networks by the name before the last `/` of their outputs."""


class PaperSizeOutputs(Verifier):
    """Outputs of the networks that we have."""

    name = "paper_size"
    source = ("official repositories",)

    @cached_property
    def formula(self) -> Formula:
        return Formula(self.config["salt"], self.config["gains"], self.config)

    @cached_property
    def results(self) -> dict[str, Mapping[str, Tensor]]:
        """Outputs of the last network, by its name."""
        return {}

    @output("(.+)/([^/]+)")
    def part(self, network: str, part: str) -> Tensor:
        if network not in NETWORKS:
            raise NotComputed(f"{network} is not here yet")
        if network not in self.results:
            self.results.clear()
            self.results[network] = NETWORKS[network](self.formula)
        return self.results[network][part]
