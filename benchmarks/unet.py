"""Speed of the UNet against diffusers' UNet2DConditionModel of the same sizes and weights.

    pip install diffusers transformers
    python benchmarks/unet.py

All in one run, in turn, the median of each; first, both must give the same pictures.

    sampling   20 DDIM steps at batch 16: diffusers' UNet with its DDIMScheduler, ours with ours
    training   a step at batch 32: noise, forward, mean square, backward, AdamW; in float32, and
               both under the autocast that the package trains with
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from prior import medians
from torch import Tensor

from lineage.diffusion.networks.unet import UNet, UNetConfig, make_unet
from lineage.diffusion.process import Process, ProcessConfig
from lineage.diffusion.samplers import ddim
from lineage.diffusion.samplers.base import Estimate
from lineage.diffusion.schedules import (
    NO_NOISE,
    NoiseLevel,
    SamplingSchedule,
    leading_timesteps,
)
from lineage.evaluation.cost import machine
from lineage.nn.noise import NoiseStreams
from lineage.official.adm_unet import text_features
from lineage.official.stable_diffusion import our_unet
from lineage.text.contract import TextFeatures
from lineage.training.machine import autocast
from lineage.training.store import write_json

RESULTS = Path(__file__).parent.parent / "results"
CHANNELS, CHANNEL_MULT, WORD_DIM, WORDS, SIDE, NUM_HEADS = 32, (1, 2, 3), 64, 16, 32, 4
STEPS = 20
PROCESS = Process(ProcessConfig(schedule="linear", prediction="noise"))


def make_both() -> tuple[UNet, Any]:
    """Ours and theirs, with the same weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    theirs = UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=tuple(CHANNELS * m for m in CHANNEL_MULT),
        layers_per_block=1,
        cross_attention_dim=WORD_DIM,
        attention_head_dim=NUM_HEADS,  # the number of heads, despite its name
    )
    config = UNetConfig(
        channels=CHANNELS,
        channel_mult=CHANNEL_MULT,
        num_res_blocks=1,
        attention_levels=(1, 2),
        num_heads=NUM_HEADS,
        conditioning="transformer",
        attend_padding=True,
        norm_groups=32,
        dropout=0.0,
    )
    ours = make_unet(config, WORD_DIM, WORD_DIM)
    ours.load_state_dict(our_unet(theirs.state_dict()))
    return ours, theirs


@torch.no_grad()
def sample_ours(unet: UNet, x: Tensor, text: TextFeatures) -> Tensor:
    levels = [PROCESS.level(t) for t in leading_timesteps(PROCESS.num_timesteps, STEPS)]

    def denoise(x_t: Tensor, level: NoiseLevel) -> Estimate:
        output = unet(x_t, torch.full((len(x_t),), level.timestep), text)
        return Estimate(PROCESS.to_x0(output, x_t, level))

    schedule = SamplingSchedule((*levels, NO_NOISE), PROCESS.level_at)
    return ddim(denoise, x, schedule, NoiseStreams([]))


@torch.no_grad()
def sample_theirs(unet: Any, x: Tensor, words: Tensor) -> Tensor:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t, encoder_hidden_states=words).sample, t, x).prev_sample
    return x


def make_step(
    network: torch.nn.Module, forward: Callable[[Tensor, Tensor], Tensor], precision: str
) -> Callable[[], None]:
    """A function that does one training step."""
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, fused=True)
    image, eps = torch.randn(32, 3, SIDE, SIDE), torch.randn(32, 3, SIDE, SIDE)
    t = torch.randint(PROCESS.num_timesteps, (32,))

    def step() -> None:
        with autocast(torch.device("cpu"), precision):
            output = forward(PROCESS.add_noise(image, eps, t), t)
        F.mse_loss(output.float(), eps).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    ours, theirs = make_both()
    x, words = torch.randn(16, 3, SIDE, SIDE), torch.randn(16, WORDS, WORD_DIM)
    text = text_features(words)
    one, other = sample_ours(ours.eval(), x, text), sample_theirs(theirs.eval(), x, words)
    difference = float((one - other).abs().max() / other.abs().max())
    document: dict[str, Any] = {
        "machine": machine(),
        "parameters": sum(p.numel() for p in ours.parameters()),
        "pictures_differ": difference,
    }
    times = medians(
        {
            "ours": lambda: sample_ours(ours, x, text),
            "diffusers": lambda: sample_theirs(theirs, x, words),
        },
        5,
    )
    document["sampling"] = times | {"ratio": times["ours"] / times["diffusers"]}
    words = torch.randn(32, WORDS, WORD_DIM)
    text = text_features(words)
    for precision in ("fp32", "bf16"):
        our_step = make_step(ours.train(), lambda x, t: ours(x, t, text), precision)
        their_step = make_step(
            theirs.train(), lambda x, t: theirs(x, t, encoder_hidden_states=words).sample, precision
        )
        times = medians({"ours": our_step, "diffusers": their_step}, 9)
        times["ratio"] = times["ours"] / times["diffusers"]
        document[f"training_{precision}"] = times
    assert math.isfinite(difference)
    print(document)
    write_json(RESULTS / "ldm" / "speed.json", document)


if __name__ == "__main__":
    main()
