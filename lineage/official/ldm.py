"""CompVis' latent diffusion (Rombach et al. 2022): key maps and outputs of its UNet, DDIM sampler,
autoencoder and text encoder; import of Stable Diffusion v1.

Stable Diffusion v1 comes in two layouts:
    original    one file, such as sd-v1-4.ckpt or v1-5-pruned-emaonly.safetensors, with UNet,
                autoencoder and text encoder. Averaged weights of the UNet are preferred.
    diffusers   a folder with `unet`, `vae`, `text_encoder` and `tokenizer`; its names are turned
                into the original ones in `stable_diffusion.py`
UNet and autoencoder become a run. The text encoder stays where it is, as `text=pretrained:`: CLIP
of the hub, or a folder beside the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.config import TextConfig
from lineage.diffusion.guidance import Guidance
from lineage.diffusion.ldm import DiagonalGaussian, KLAutoencoder, KLConfig
from lineage.diffusion.networks.layers import timestep_embedding
from lineage.diffusion.networks.unet import UNet, UNetConfig, make_unet
from lineage.diffusion.process import Process, ProcessConfig
from lineage.diffusion.samplers import ddim
from lineage.diffusion.samplers.base import Denoise, Estimate
from lineage.diffusion.samplers.ddpm import posterior_variance
from lineage.diffusion.schedules import NoiseLevel, SamplingSchedule
from lineage.errors import UserError
from lineage.nn.autoencoder import AutoencoderConfig
from lineage.official.adm_unet import official_names, text_features, unet_config, unet_state
from lineage.official.dalle import count_indices
from lineage.official.glide import tokenizer_of_size
from lineage.official.importing import CheckpointFile, Imported
from lineage.official.sampling import Recorder, trajectory
from lineage.official.stable_diffusion import read_folder
from lineage.official.verify import Verifier, output
from lineage.official.vqgan import autoencoder_config, autoencoder_state
from lineage.recipes import ldm
from lineage.text.padded import BertEncoder
from lineage.text.pretrained import PRETRAINED
from lineage.text.tokenizer import PAD

# --- key maps -------------------------------------------------------------------------------------


def kl_config(net: AutoencoderConfig, latent_channels: int) -> KLConfig:
    """An autoencoder without the losses that only its training needs."""
    return KLConfig(
        net=net, latent_channels=latent_channels, disc_weight=0.0, perceptual_weight=0.0
    )


def kl_state(official: Mapping[str, Tensor], num_levels: int) -> dict[str, Tensor]:
    """Weights of `AutoencoderKL` under our names."""
    state = {
        f"{part}.{key}": value
        for part in ("encoder", "decoder")
        for key, value in autoencoder_state(official, part, num_levels).items()
    }
    for part in ("quant_conv", "post_quant_conv"):
        state |= {f"{part}.{kind}": official[f"{part}.{kind}"] for kind in ("weight", "bias")}
    return state


BERT_OUTER = {"token_emb.weight": "token_emb.weight", "pos_emb": "pos_emb.emb.weight"}
BERT_BLOCK = {"mlp.0": "1.net.0.0", "mlp.2": "1.net.2"}


def bert_name(key: str) -> str:
    """Official name of a tensor of our text encoder; attention and MLP are layers there."""
    match = re.fullmatch(r"blocks\.(\d+)\.(norm1|norm2|attn|mlp)(.*)\.(weight|bias)", key)
    if match is None:
        return BERT_OUTER.get(key, key)
    block, part, rest, kind = int(match[1]), match[2], match[3], match[4]
    layer = 2 * block + (part in ("norm2", "mlp"))
    inner = {"attn": f"1{rest}", "mlp": BERT_BLOCK.get(f"mlp{rest}", "")}.get(part, "0")
    return f"attn_layers.layers.{layer}.{inner}.{kind}"


def bert_state(encoder: BertEncoder, official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of `TransformerWrapper` under our names."""
    return {key: official[bert_name(key)] for key in encoder.state_dict()}


# --- outputs --------------------------------------------------------------------------------------


class LdmUNetOutputs(Verifier):
    """Outputs of latent diffusion's `UNetModel` and of its `DDIMSampler`."""

    name = "ldm_unet"
    source = ("CompVis/latent-diffusion", "openaimodel.py")

    @cached_property
    def unet(self) -> UNet:
        width = self.config["context_dim"]
        channels = self.config["in_channels"], self.config["out_channels"]
        unet = make_unet(unet_config(self.config, "transformer"), width, width, *channels)
        unet.load_state_dict(unet_state(unet, self.state[""]))
        return unet.eval()

    def module(self, of_output: str, default: str) -> nn.Module:
        """Our module for the official one that the file's sentence about an output names."""
        sentence = str(self.reference.sentences.get(f"output/{of_output}", ""))
        stated = re.search(r"(in|out)put_blocks\.\d+\.\d+|middle_block\.\d+", sentence)
        official = f"{stated[0] if stated else default}."
        names = official_names(self.unet.state_dict())
        key = next(ours for ours, theirs in names.items() if theirs.startswith(official))
        path = re.match(r"mid\.\w+\.\d+|\w+\.\d+\.(resample|\w+\.\d+)", key)
        assert path is not None
        return self.unet.get_submodule(path[0])

    # --- the network ---

    @output("eps")
    def eps(self) -> Tensor:
        return self.unet(self.inputs["x"], self.inputs["t"], text_features(self.inputs["context"]))

    @output("eps_fractional_t")
    def eps_at_fractional_t(self) -> Tensor:
        sentence = str(self.reference.sentences.get("output/eps_fractional_t", ""))
        stated = re.search(r"t = (\d+(?:\.\d+)?)", sentence)
        t = torch.full((len(self.inputs["x"]),), float(stated[1]) if stated else 12.5)
        return self.unet(self.inputs["x"], t, text_features(self.inputs["context"]))

    @output("time_embedding")
    def time_embedding(self) -> Tensor:
        return timestep_embedding(self.inputs["t"], self.config["model_channels"])

    @property
    def residual_block(self) -> nn.Module:
        first_of_second_level = f"input_blocks.{self.config['num_res_blocks'] + 2}.0"
        return self.module("resblock_out", first_of_second_level)

    @property
    def spatial_transformer(self) -> nn.Module:
        return self.module("spatial_transformer_out", "input_blocks.1.1")

    @output("resblock_out")
    def resblock_out(self) -> Tensor:
        return self.residual_block(self.inputs["resblock_in"], F.silu(self.inputs["resblock_emb"]))

    @output("small_resblock")
    def small_resblock(self) -> Tensor:
        return self.residual_block(self.inputs["small"], F.silu(self.inputs["resblock_emb"]))

    @output("spatial_transformer_out")
    def spatial_transformer_out(self) -> Tensor:
        x = self.inputs["spatial_transformer_in"]
        return self.spatial_transformer(x, self.inputs["context"], None)

    @output("small_spatial_transformer")
    def small_spatial_transformer(self) -> Tensor:
        small = self.inputs["small"]
        return self.spatial_transformer(small, self.inputs["context"], None) - small

    # --- DDIM: every T // n-th timestep and one more, down to the noise of timestep 0 ---

    @cached_property
    def process(self) -> Process:
        """Betas with a linear root between the ends that the file names."""
        start, end = (math.sqrt(self.config[f"linear_{end}"]) for end in ("start", "end"))
        num_timesteps = self.config.get("timesteps", 1000)
        betas = torch.linspace(start, end, num_timesteps, dtype=torch.float64) ** 2
        return Process(ProcessConfig(schedule="scaled_linear"), betas)

    @cached_property
    def timesteps(self) -> list[int]:
        total = self.process.num_timesteps
        return [t + 1 for t in range(0, total, total // self.config["ddim_steps"])]

    @cached_property
    def schedule(self) -> SamplingSchedule:
        levels = [self.process.level(t) for t in (0, *self.timesteps)]
        return SamplingSchedule(tuple(reversed(levels)), self.process.level_at)

    def denoiser(self, scale: float) -> Denoise:
        """The UNet, guided by the file's contexts."""
        contexts = ("context",) if scale == 1 else ("context", "uncond_context")
        text = text_features(torch.cat([self.inputs[name] for name in contexts]))

        def denoise(x: Tensor, level: NoiseLevel) -> Estimate:
            t = torch.full((len(text),), level.timestep)
            outputs = self.unet(torch.cat([x] * len(contexts)), t, text).chunk(len(contexts))
            prediction = outputs[0] if scale == 1 else Guidance(scale).combine(*outputs)
            return Estimate(self.process.to_x0(prediction, x, level))

        return denoise

    @cached_property
    def guided(self) -> tuple[Tensor, Tensor]:
        """x of every step and the end, and the estimates of x_0, without noise."""
        recorder = Recorder(self.denoiser(self.config["guidance"]))
        xs = trajectory(ddim, recorder, self.inputs["x_T"], self.schedule)
        return xs, torch.stack(recorder.x0)

    @output("ddim_x_inter")
    def ddim_x(self) -> Tensor:
        return self.guided[0]

    @output("ddim_pred_x0")
    def ddim_x0(self) -> Tensor:
        return self.guided[1]

    @output(r"ddim_eta([\d.]+)_x_inter")
    def ddim_with_noise(self, eta: str) -> Tensor:
        noise, x = self.inputs["ddim_noise"], self.inputs["x_T"]
        return trajectory(ddim, self.denoiser(1.0), x, self.schedule, noise, eta=float(eta))

    @output(r"ddim_sigmas_eta([\d.]+)")
    def ddim_sigmas(self, eta: str) -> Tensor:
        variances = [posterior_variance(*step) for step in reversed(self.schedule.steps())]
        return torch.tensor([float(eta) * math.sqrt(variance) for variance in variances])

    @output("ddim_timesteps")
    def ddim_timesteps(self) -> Tensor:
        return torch.tensor(self.timesteps)

    @output("ddim_alphas")
    def ddim_alphas(self) -> Tensor:
        return self.process.alphas_cumprod[self.timesteps].float()

    @output("ddim_alphas_prev")
    def ddim_alphas_prev(self) -> Tensor:
        return self.process.alphas_cumprod[[0, *self.timesteps[:-1]]].float()

    @output("betas")
    def betas(self) -> Tensor:
        return self.process.betas

    @output("alphas_cumprod")
    def alphas_cumprod(self) -> Tensor:
        return self.process.alphas_cumprod.float()


class LdmVAEOutputs(Verifier):
    """Outputs of latent diffusion's `AutoencoderKL`."""

    name = "ldm_vae"
    source = ("CompVis/latent-diffusion", "autoencoder.py")

    @cached_property
    def model(self) -> KLAutoencoder:
        net = autoencoder_config(self.config["ddconfig"])
        model = KLAutoencoder(kl_config(net, self.config["embed_dim"]))
        weights = kl_state(self.state[""], len(net.channel_mult))
        model.load_state_dict({**weights, "step": torch.tensor(0)})
        return model.eval()

    @cached_property
    def posterior(self) -> DiagonalGaussian:
        return self.model.encode(self.inputs["image"])

    @output("encoder_h")
    def encoder_h(self) -> Tensor:
        return self.model.encoder(self.inputs["image"])

    @output("moments")
    def moments(self) -> Tensor:
        return self.model.quant_conv(self.encoder_h())

    @output("mean")
    def mean(self) -> Tensor:
        return self.posterior.mean

    @output("logvar")
    def log_variance(self) -> Tensor:
        return self.posterior.log_variance

    @output("std")
    def std(self) -> Tensor:
        return self.posterior.std

    @output("kl")
    def kl(self) -> Tensor:
        return self.posterior.kl()

    @output("sample")
    def sample(self) -> Tensor:
        return self.posterior.sample(self.inputs["eps"])

    @output("nll_of_sample")
    def nll_of_sample(self) -> Tensor:
        normal = torch.distributions.Normal(self.posterior.mean, self.posterior.std)
        return -normal.log_prob(self.sample()).flatten(1).sum(1)

    @output("rec_mode")
    def reconstruction(self) -> Tensor:
        return self.model.decode(self.posterior.mean)

    @output("rec_sample")
    def reconstruction_of_sample(self) -> Tensor:
        return self.model.decode(self.sample())

    @output(r"small_mid_(block_1|attn_1|block_2)")
    def small(self, name: str) -> Tensor:
        small, module = self.inputs["small"], self.model.encoder.mid.get_submodule(name)
        return module(small) - small


class LdmBertOutputs(Verifier):
    """Outputs of latent diffusion's `BERTEmbedder`."""

    name = "ldm_bert"
    source = ("CompVis/latent-diffusion", "x_transformer.py")

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return {key.removeprefix("transformer."): value for key, value in self.state[""].items()}

    @cached_property
    def encoder(self) -> BertEncoder:
        config = TextConfig(
            width=self.config["n_embed"],
            max_words=self.config["max_seq_len"],
            num_layers=self.config["n_layer"],
        )
        encoder = BertEncoder(config, tokenizer_of_size(self.config["vocab_size"]))
        encoder.load_state_dict(bert_state(encoder, self.weights))
        return encoder.eval()

    @output("z")
    def z(self) -> Tensor:
        words, _ = self.encoder(self.inputs["tokens"], self.inputs["tokens"] != PAD)
        return words

    @output("logits")
    def logits(self) -> Tensor:
        return self.z() @ self.weights["to_logits.weight"].T + self.weights["to_logits.bias"]


# --- import ---------------------------------------------------------------------------------------

ACCEPTS_FOLDERS = True
LATENT_SCALE = 0.18215
"""Scale of the latents in Stable Diffusion v1."""
UNET, FIRST_STAGE, EMA = "model.diffusion_model.", "first_stage_model.", "model_ema."


def import_weights(files: Sequence[CheckpointFile]) -> Imported:
    """Stable Diffusion v1's file, or its folder in diffusers' layout; a folder of CLIP beside it.

    Raises:
        UserError: the files hold something else.
    """
    folders = [file.path for file in files if file.path.is_dir()]
    whole = [path for path in folders if (path / "unet").is_dir()]
    single = [file for file in files if not file.path.is_dir()]
    if len(whole) + len(single) != 1 or len(files) > 2:
        raise UserError(
            "import-weights ldm needs one file of Stable Diffusion v1, or one folder in diffusers' "
            "layout; a folder of CLIP's text model may stand beside it."
        )
    unet, vae = read_folder(whole[0]) if whole else read_original(single[0])
    clip = next((path for path in folders if path not in whole), None)
    if clip is None and whole and (whole[0] / "text_encoder").is_dir():
        clip = whole[0]
    paper = ldm.PRESETS["paper"]
    text = paper.text if clip is None else f"{PRETRAINED}{clip.resolve()}"
    word_dim = unet["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1]
    network, autoencoder = read_unet_config(unet), read_kl_config(vae)
    with torch.device("meta"):
        channels = unet["input_blocks.0.0.weight"].shape[1]
        keys = make_unet(network, word_dim, word_dim, channels, channels).state_dict()
    names = official_names(keys)
    weights = {f"network.{key}": unet[name].float() for key, name in names.items()}
    inner = kl_state(vae, len(autoencoder.net.channel_mult))
    weights |= {f"space.autoencoder.{key}": value.float() for key, value in inner.items()}
    weights["space.scale"] = torch.tensor(LATENT_SCALE)
    config = replace(
        paper,
        text=text,
        encoder=TextConfig(width=word_dim, max_words=paper.encoder.max_words),
        autoencoder=autoencoder,
        model=replace(paper.model, unet=network),
    )
    note = f"The text encoder of this run is {text.removeprefix(PRETRAINED)}."
    return Imported(config, weights, ("space.autoencoder.step",), note)


def read_original(file: CheckpointFile) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """UNet and autoencoder of a file in the original layout, under the names in it."""
    state = file.tensors
    unet = {k.removeprefix(UNET): v for k, v in state.items() if k.startswith(UNET)}
    vae = {k.removeprefix(FIRST_STAGE): v for k, v in state.items() if k.startswith(FIRST_STAGE)}
    if not unet or not vae:
        missing = UNET if not unet else FIRST_STAGE
        raise UserError(
            f"{file.path} is no Stable Diffusion v1: it has no tensor {missing}…; give the whole "
            "checkpoint, or a folder in diffusers' layout."
        )
    for key in unet:
        averaged = EMA + f"diffusion_model.{key}".replace(".", "")
        unet[key] = state.get(averaged, unet[key])
    return unet, vae


def read_unet_config(state: Mapping[str, Tensor]) -> UNetConfig:
    """Sizes of a UNet, read off its tensors. The number of heads is v1's, as no tensor shows it."""
    if state["middle_block.1.proj_in.weight"].dim() != 4 or "label_emb.0.0.weight" in state:
        raise UserError("This is a UNet of Stable Diffusion v2 or XL; only v1 can be read.")
    num_blocks = count_indices(state, r"input_blocks\.(\d+)\.")
    down = [n for n in range(num_blocks) if f"input_blocks.{n}.0.op.weight" in state]
    per_level = down[0] if down else num_blocks
    firsts = range(1, num_blocks, per_level)  # the first block of each level
    channels = state["input_blocks.0.0.weight"].shape[0]
    widths = [state[f"input_blocks.{n}.0.in_layers.2.weight"].shape[0] for n in firsts]
    attends = [f"input_blocks.{n}.1.norm.weight" in state for n in firsts]
    return replace(
        ldm.PRESETS["paper"].model.unet,
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        num_res_blocks=per_level - 1,
        attention_levels=tuple(level for level, attend in enumerate(attends) if attend),
        transformer_depth=count_indices(state, r"middle_block\.1\.transformer_blocks\.(\d+)\."),
    )


def read_kl_config(state: Mapping[str, Tensor]) -> KLConfig:
    """Sizes of an autoencoder, read off its tensors."""
    levels = range(count_indices(state, r"encoder\.down\.(\d+)\."))
    channels = state["encoder.conv_in.weight"].shape[0]
    widths = [state[f"encoder.down.{k}.block.0.conv2.weight"].shape[0] for k in levels]
    net = AutoencoderConfig(
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        num_res_blocks=count_indices(state, r"encoder\.down\.0\.block\.(\d+)\."),
        attn_resolutions=(),
        z_channels=state["decoder.conv_in.weight"].shape[1],
    )
    return kl_config(net, state["post_quant_conv.weight"].shape[1])
