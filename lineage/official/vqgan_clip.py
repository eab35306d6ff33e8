"""Outputs of nerdyrodent/VQGAN-CLIP (generate.py), for `lineage verify`.

The official decoder is a stand-in of a few convolutions, the official perceptor a tiny CLIPModel of
huggingface/transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lineage.clip import cutouts
from lineage.clip.clip import CLIP, CLIPConfig
from lineage.clip.prompts import PromptFeatures, prompt_losses, spherical_distance
from lineage.clip.vqgan_clip import (
    VQGANCLIP,
    Cut,
    Step,
    VQGANCLIPConfig,
    gradient_picture,
    nearest_codes,
    vector_quantise,
)
from lineage.nn.transformer import TransformerBlock
from lineage.official.clip import clip_state, image_sizes, text_sizes, text_tower
from lineage.official.verify import NotComputed, Verifier, output
from lineage.text.clip_text import CLIPTextEncoder, CLIPTextTower
from lineage.text.tokenizer import WordTokenizer


class StandInCodec(nn.Module):
    """The decoder of the reference: three convolutions, with SiLU and a doubling between them."""

    factor = 4

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.state = state

    @property
    def codebook(self) -> Tensor:
        return self.state["quantize.embedding.weight"]

    def encode_latents(self, image: Tensor) -> Tensor:
        raise NotComputed("the reference has no encoder")

    def decode_latents(self, z_q: Tensor) -> Tensor:
        """(B, H, W, D) -> (B, 3, 4 H, 4 W)."""
        x = self._conv("conv_in", rearrange(z_q, "b h w d -> b d h w"))
        for name in ("conv_mid", "conv_out"):
            x = self._conv(name, F.interpolate(F.silu(x), scale_factor=2, mode="nearest"))
        return x

    def _conv(self, name: str, x: Tensor) -> Tensor:
        weight, bias = (self.state[f"decoder.{name}.{part}"] for part in ("weight", "bias"))
        return F.conv2d(x, weight, bias, padding="same")


def resized_size(width: int, height: int, out_size: Sequence[int]) -> tuple[int, int]:
    """Width and height of a picture that keeps its ratio, at an area no larger than before."""
    ratio, area = width / height, min(width * height, out_size[0] * out_size[1])
    return round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)


class VQGANCLIPOutputs(Verifier):
    """Outputs of generate.py: its pieces, and short optimisations."""

    name = "vqgan_clip"
    source = ("VQGAN-CLIP", "generate.py")

    # --- resampling and clamping --------------------------------------------------------------

    @output(r"(ramp|lanczos)_([\d.]+)_([\d.]+)")
    def kernel(self, kind: str, ratio: str, width: str) -> Tensor:
        ramp = cutouts.ramp(float(ratio), float(width))
        return ramp if kind == "ramp" else cutouts.lanczos(ramp, float(width))

    @output(r"resample/(\w+)")
    def resample(self, name: str) -> Tensor:
        height, width = self.config["rs_sizes"]["down" if name == "no_align" else name]
        return cutouts.resample(self.inputs["resample/x"], (height, width), name != "no_align")

    @output("clamp/y")
    def clamp(self) -> Tensor:
        return cutouts.clamp_with_grad(self.inputs["clamp/x"])

    @output("clamp/grad", grad=True)
    def clamp_grad(self) -> Tensor:
        x = self.inputs["clamp/x"].clone().requires_grad_()
        return _gradient(cutouts.clamp_with_grad(x), x, self.inputs["clamp/grad_out"])

    # --- quantisation -------------------------------------------------------------------------

    @output("vq/quantized")
    def quantised(self) -> Tensor:
        return vector_quantise(self.inputs["vq/x"], self.inputs["vq/codebook"])

    @output("vq/indices")
    def indices(self) -> Tensor:
        return nearest_codes(self.inputs["vq/x"], self.inputs["vq/codebook"])

    @output("vq/grad", grad=True)
    def quantised_grad(self) -> Tensor:
        x = self.inputs["vq/x"].clone().requires_grad_()
        return _gradient(
            vector_quantise(x, self.inputs["vq/codebook"]), x, self.inputs["vq/grad_out"]
        )

    # --- prompts ------------------------------------------------------------------------------

    @output(r"prompt/dists(\d+)")
    def distances(self, number: str) -> Tensor:
        weight = torch.tensor(float(self.config["prompts"][int(number)][0]))
        features, embed = self.inputs["prompt/features"], self.inputs[f"prompt/embed{number}"]
        return weight.sign() * spherical_distance(features[:, None], embed[None])

    @output(r"prompt/loss(\d+)")
    def prompt_loss(self, number: str) -> Tensor:
        return self._loss(number, self.inputs["prompt/features"])

    @output(r"prompt/grad(\d+)", grad=True)
    def prompt_grad(self, number: str) -> Tensor:
        features = self.inputs["prompt/features"].clone().requires_grad_()
        return _gradient(self._loss(number, features), features)

    def _loss(self, number: str, features: Tensor) -> Tensor:
        weight, stop = self.config["prompts"][int(number)]
        embed = self.inputs[f"prompt/embed{number}"]
        prompts = prompt_features([(embed, float(weight), float(stop))])
        return prompt_losses(features[None], prompts).sum()

    # --- cutouts ------------------------------------------------------------------------------

    @output("cut/original")
    def original(self) -> Tensor:
        image, side = self.inputs["cut/image"], self.config["cut_size"]
        draws = (self.inputs[f"cut/{name}"] for name in ("u", "offset_x", "offset_y"))
        return cutouts.original_cutouts(image, self._crops(image, *draws), side)[0]

    def _crops(self, image: Tensor, u: Tensor, left: Tensor, top: Tensor) -> cutouts.Crops:
        """The crops of one picture, from stored draws (N,)."""
        side, power = self.config["cut_size"], self.config["cut_pow"]
        sides = cutouts.crop_sides(u, image.shape[2], image.shape[3], side, power)
        return cutouts.Crops(sides[None], left[None], top[None])

    @output("cut/(latest|pooled_only)")
    def latest(self, kind: str) -> Tensor:
        pooled = cutouts.pooled(self.inputs["cut/image"], self.config["cut_size"])
        if kind == "pooled_only":
            return pooled
        return cutouts.add_noise(pooled, self.inputs["cut/noise_fac"], self.inputs["cut/noise"])

    @output(r"aug/(\w+)")
    def warped(self, name: str) -> Tensor:
        padding: Any = "border" if "border" in name else "zeros"
        return cutouts.warp(self.inputs["aug/images"], self.inputs[f"aug/{name}_matrix"], padding)

    # --- pictures -----------------------------------------------------------------------------

    @output("gradient/image")
    def gradient_image(self) -> Tensor:
        height, width, _ = self.outputs["gradient/image"].shape
        return torch.from_numpy(
            gradient_picture(self.inputs["gradient/draws"].numpy(), height, width)
        )

    @output("resize/size")
    def resize_size(self) -> Tensor:
        out_size = self.inputs["resize/out_size"].tolist()
        sizes = self.inputs["resize/in"].tolist()
        return torch.tensor([resized_size(width, height, out_size) for width, height in sizes])

    # --- optimisation -------------------------------------------------------------------------

    @cached_property
    def clip(self) -> CLIP:
        return clip_of(self.config["clip"], self.state["clip"])

    @output("traj/text_embeds")
    def text_embeds(self) -> Tensor:
        ids, tower = self.inputs["traj/prompt_ids"], self.clip.text.tower
        assert isinstance(tower, CLIPTextTower)
        is_end = ids == self.config["clip"]["text_config"]["eos_token_id"]
        return tower.pool(tower.hidden_states(ids), is_end.int().argmax(1))

    @cached_property
    def trajectories(self) -> dict[str, list[Step]]:
        return {}

    def trajectory(self, method: str) -> list[Step]:
        """The steps with one kind of cutouts."""
        if method not in self.trajectories:
            self.trajectories[method] = list(self._optimise(method))
        return self.trajectories[method]

    def _init_weight(self, method: str) -> float:
        """Weight of the pull towards 0, which only the trajectories that say so have."""
        sentence = str(self.reference.sentences.get(f"output/traj/{method}/z", ""))
        has_it = "init_weight" in sentence if sentence else method == "latest"
        return float(self.config["init_weight"]) if has_it else 0.0

    def _optimise(self, method: str) -> Iterator[Step]:
        optimiser = str(self.config["optimiser"]).lower()
        config = VQGANCLIPConfig(
            lr=self.config["lr"],
            optimiser=optimiser,  # type: ignore[arg-type]
            init_weight=self._init_weight(method),
        )
        codec = StandInCodec(self.state["vqgan"])
        width, height = self.config["toks"]
        ids = self.inputs["traj/init_indices"].view(1, height, width)
        system = VQGANCLIP(config, self.clip, codec, 4 * height)
        prompts = [
            (embed[None], float(weight), float(stop))
            for embed, (weight, stop) in zip(
                self.text_embeds(), self.config["traj_prompts"], strict=True
            )
        ]
        if "traj/noise_prompt" in self.inputs:
            noise = self.inputs["traj/noise_prompt"]
            prompts.append((noise, float(self.config["noise_weight"]), -torch.inf))
        draws = self.inputs["traj/cut_u" if method == "original" else "traj/noise_fac"]
        return system.optimise(
            F.embedding(ids, codec.codebook),
            prompt_features(prompts),
            self._stored_cut(method),
            steps=len(draws),
        )

    def _stored_cut(self, method: str) -> Cut:
        """Cutouts from the stored draws, those of the next step at each call."""
        side, steps = self.config["cut_size"], iter(range(10**9))

        def cut(image: Tensor) -> Tensor:
            step = next(steps)
            if method == "original":
                names = ("cut_u", "cut_offset_x", "cut_offset_y")
                draws = (self.inputs[f"traj/{name}"][step] for name in names)
                return cutouts.original_cutouts(image, self._crops(image, *draws), side)
            deviation, noise = (self.inputs[f"traj/{n}"][step] for n in ("noise_fac", "noise"))
            return cutouts.add_noise(cutouts.pooled(image, side), deviation, noise)[None]

        return cut

    @output("traj/(original|latest)/(z|grads|images|losses)")
    def traj(self, method: str, what: str) -> Tensor:
        steps = self.trajectory(method)
        if what == "images":
            return torch.cat([step.image for step in steps])
        if what == "losses":
            pulls = [step.init_loss for step in steps] if self._init_weight(method) else []
            terms = torch.stack([step.prompt_losses for step in steps])
            return torch.cat([torch.stack(pulls), terms], 1) if pulls else terms
        latents = [step.z if what == "z" else step.grad for step in steps]
        return rearrange(latents, "t b h w d -> t b d h w")


def prompt_features(prompts: Sequence[tuple[Tensor, float, float]]) -> PromptFeatures:
    """Prompts of one picture, from features (R, F), weight and stop of each; the R rows share the
    weight.
    """
    weights = [weight / len(rows) for rows, weight, _ in prompts for _ in rows]
    stops = [stop for rows, _, stop in prompts for _ in rows]
    return PromptFeatures(
        torch.cat([rows for rows, _, _ in prompts]),
        torch.tensor(weights),
        torch.tensor(stops),
        torch.zeros(len(weights), dtype=torch.int64),
    )


def _gradient(value: Tensor, x: Tensor, grad_out: Tensor | None = None) -> Tensor:
    (gradient,) = torch.autograd.grad(value, x, grad_out)
    return gradient


# --- the perceptor --------------------------------------------------------------------------------


def clip_of(config: Mapping[str, Any], official: Mapping[str, Tensor]) -> CLIP:
    """transformers' `CLIPModel`."""
    text, vision = config["text_config"], config["vision_config"]
    state = clip_state(official)
    heads, gelu = text["num_attention_heads"], text.get("hidden_act", "quick_gelu")
    encoder = CLIPTextEncoder(
        text_sizes(state, num_heads=heads, tokenizer="word"), WordTokenizer([])
    )
    encoder.tower = text_tower(official, heads, gelu)
    fields, size = image_sizes(state)
    vit = replace(fields["vit"], num_heads=vision["num_attention_heads"])
    clip = CLIP(CLIPConfig(**{**fields, "vit": vit}), encoder, size)
    for block in clip.image_tower.modules():
        if isinstance(block, TransformerBlock):  # a tiny model's perceptrons may be narrow
            width, inner = vision["hidden_size"], vision["intermediate_size"]
            block.mlp[0], block.mlp[2] = nn.Linear(width, inner), nn.Linear(inner, width)
    clip.load_state_dict(state)
    return clip.eval()
