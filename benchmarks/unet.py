"""The UNet's speed against diffusers' UNet2DConditionModel of the same sizes and weights.

    pip install diffusers transformers
    python benchmarks/unet.py

All in one run, in turn, the median of each; first that both give the same pictures.

    sampling   20 DDIM steps at batch 16: diffusers' UNet with its DDIMScheduler, and ours with ours
    training   a step at batch 32: noising, forward, mean square, backward, AdamW; in float32, and
               both under the autocast that the package trains in
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

from lineage.diffusion.networks.unet import UNet, UNetConfig
from lineage.diffusion.process import Process, ProcessConfig
from lineage.diffusion.samplers import ddim
from lineage.diffusion.samplers.k_diffusion import Estimate
from lineage.diffusion.schedules import Path as Levels
from lineage.diffusion.schedules import Point, leading_times
from lineage.evaluation.cost import machine
from lineage.nn.noise import NoiseStreams
from lineage.official.stable_diffusion import original_unet
from lineage.official.unets import gathered, unet_names
from lineage.text.contract import TextFeatures
from lineage.training.machine import autocast
from lineage.training.store import write_json

RESULTS = Path(__file__).parent.parent / "results"
WIDTH, MULTIPLIERS, TEXT, WORDS, SIDE, HEADS, STEPS = 32, (1, 2, 3), 64, 16, 32, 4, 20


def both() -> tuple[UNet, Any]:
    """Ours and theirs, with the same weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    theirs = UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=tuple(WIDTH * m for m in MULTIPLIERS),
        layers_per_block=1,
        cross_attention_dim=TEXT,
        attention_head_dim=HEADS,  # the number of heads, whatever it is called
    )
    config = UNetConfig(
        WIDTH,
        MULTIPLIERS,
        1,
        (1, 2),
        HEADS,
        conditioning="transformer",
        padding=True,
        groups=32,
        dropout=0.0,
    )
    ours = UNet(config, TEXT)
    ours.load_state_dict(gathered(unet_names(ours), original_unet(theirs.state_dict())))
    return ours, theirs


def told(words: Tensor) -> TextFeatures:
    mask = torch.ones(words.shape[:2], dtype=torch.bool)
    return TextFeatures(words, mask, words.mean(1), mask.long())


@torch.no_grad()
def sampled_ours(unet: UNet, x: Tensor, text: TextFeatures) -> Tensor:
    process = Process(ProcessConfig(1000, "linear", "noise"))
    points = [process.point(t) for t in leading_times(process.steps, STEPS)]

    def denoise(noised: Tensor, level: Point) -> Estimate:
        output = unet(noised, torch.full((len(noised),), level.time), text)
        return Estimate(process.to_x0(output, noised, level))

    return ddim(denoise, x, Levels((*points, Point(1.0, 0.0, 0.0)), process.at), NoiseStreams([]))


@torch.no_grad()
def sampled_theirs(unet: Any, x: Tensor, words: Tensor) -> Tensor:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t, encoder_hidden_states=words).sample, t, x).prev_sample
    return x


def step_of(
    network: torch.nn.Module, forward: Callable[[Tensor, Tensor], Tensor], precision: str
) -> Callable[[], None]:
    """One training step."""
    optimiser = torch.optim.AdamW(network.parameters(), 1e-4, fused=True)
    process = Process(ProcessConfig(1000, "linear", "noise"))
    image, noise = torch.randn(32, 3, SIDE, SIDE), torch.randn(32, 3, SIDE, SIDE)
    t = torch.randint(1000, (32,))

    def step() -> None:
        with autocast(torch.device("cpu"), precision):
            output = forward(process.noised(image, noise, t), t)
        F.mse_loss(output.float(), noise).backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def main() -> None:
    ours, theirs = both()
    x, words = torch.randn(16, 3, SIDE, SIDE), torch.randn(16, WORDS, TEXT)
    pictures = [sampled_ours(ours.eval(), x, told(words)), sampled_theirs(theirs.eval(), x, words)]
    differ = float((pictures[0] - pictures[1]).abs().max() / pictures[1].abs().max())
    document: dict[str, Any] = {
        "machine": machine(),
        "parameters": sum(p.numel() for p in ours.parameters()),
        "pictures_differ": differ,
    }
    times = medians(
        {
            "ours": lambda: sampled_ours(ours, x, told(words)),
            "diffusers": lambda: sampled_theirs(theirs, x, words),
        },
        5,
    )
    document["sampling"] = times | {"ratio": times["ours"] / times["diffusers"]}
    many = torch.randn(32, WORDS, TEXT)
    for precision in ("fp32", "bf16"):
        our_step = step_of(ours.train(), lambda x, t: ours(x, t, told(many)), precision)
        their_step = step_of(
            theirs.train(), lambda x, t: theirs(x, t, encoder_hidden_states=many).sample, precision
        )
        times = medians({"ours": our_step, "diffusers": their_step}, 9)
        times["ratio"] = times["ours"] / times["diffusers"]
        document[f"training_{precision}"] = times
    assert math.isfinite(differ)
    print(document)
    write_json(RESULTS / "ldm" / "speed.json", document)


if __name__ == "__main__":
    main()
