"""Recipe `ddpm`: one stage, the denoiser, with its text encoder trained along."""

from __future__ import annotations

from dataclasses import field

from lineage.config import OptimConfig, RunConfig, TextConfig, TrainConfig, configuration
from lineage.diffusion.ddpm import DDPMConfig, build_ddpm
from lineage.diffusion.model import DiffusionModel
from lineage.diffusion.networks.unet import UNetConfig
from lineage.diffusion.process import ProcessConfig
from lineage.text.encoders import EncoderSpec
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Stage


@configuration
class Config(RunConfig):
    """A run of `ddpm`."""

    model: DDPMConfig = field(default_factory=DDPMConfig)


# On a small budget the prediction of x_0 learns far faster than that of the noise.
SMALL_BUDGET = ProcessConfig(num_timesteps=1000, schedule="cosine", prediction="x0")

PRESETS = {
    # Seconds, for tests: every part is there, at its smallest.
    "smoke": Config(
        size=16,
        encoder=TextConfig(width=16),
        optim=OptimConfig(lr=2e-3, warmup=10),
        train=TrainConfig(
            max_steps=20, batch_size=8, checkpoint_every=10, sample_every=20, log_every=5
        ),
        model=DDPMConfig(
            process=SMALL_BUDGET,
            sampling_steps=5,
            unet=UNetConfig(
                channels=8,
                channel_mult=(1, 2),
                num_res_blocks=1,
                attention_levels=(1,),
                num_heads=4,
                patch_size=2,
                dropout=0.0,
            ),
        ),
    ),
    # Minutes on two CPU cores.
    "tiny": Config(
        size=32,
        # A bag of words is ahead after five minutes (0.72 against 0.58 in the mean of the six
        # tasks), but cannot tell who stands where (0.94 after thirty).
        text="transformer",
        encoder=TextConfig(width=64),
        optim=OptimConfig(lr=2e-3, warmup=100, ema_decay=0.995),
        train=TrainConfig(minutes=5, batch_size=32, checkpoint_every=500, sample_every=1000),
        model=DDPMConfig(
            process=SMALL_BUDGET,
            sampling_steps=25,
            sampler="ddpm",  # its noise corrects earlier mistakes
            unet=UNetConfig(
                channels=16,  # narrow and fast: more steps teach more than more width
                channel_mult=(1, 2, 3),
                num_res_blocks=1,
                attention_levels=(1, 2),
                num_heads=4,
                patch_size=2,  # a quarter of the work
                dropout=0.0,  # the data is endless
            ),
        ),
    ),
    # One GPU of 8 GB, under an hour.
    "small": Config(
        size=64,
        text="transformer",  # word order
        encoder=TextConfig(width=256, num_layers=2),
        optim=OptimConfig(lr=1e-3, warmup=500, ema_decay=0.999),
        train=TrainConfig(minutes=55, batch_size=128, checkpoint_every=1000, sample_every=2000),
        model=DDPMConfig(
            process=SMALL_BUDGET,
            sampling_steps=50,
            unet=UNetConfig(
                channels=96,  # six times `tiny`, and one level more for twice the side
                channel_mult=(1, 2, 3, 3),
                num_res_blocks=1,
                attention_levels=(2, 3),
                num_heads=4,
                patch_size=2,
                dropout=0.0,
            ),
        ),
    ),
    # Ho et al. 2020, section 4 and appendix B, CIFAR10: 35.7 million parameters without the text.
    "paper": Config(
        size=32,
        text="transformer",  # the paper has no captions
        encoder=TextConfig(tokenizer="bpe", vocab_size=8192, width=256, num_layers=4),
        optim=OptimConfig(
            name="adam",
            lr=2e-4,
            beta2=0.999,
            weight_decay=0.0,
            warmup=5000,
            decay="none",
            ema_decay=0.9999,
        ),
        train=TrainConfig(
            max_steps=800_000, batch_size=128, checkpoint_every=5000, sample_every=10_000
        ),
        model=DDPMConfig(sampling_steps=1000, sampler="ddpm", unet=UNetConfig(norm_eps=1e-6)),
    ),
}


def denoiser(config: DDPMConfig, encoder: EncoderSpec, size: int) -> DiffusionModel:
    """The untrained system."""
    return build_ddpm(config, encoder.build(), size)


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`denoiser`."""
    encoder = EncoderSpec(config.text, config.encoder, tokenizer)
    arguments = {"config": config.model, "encoder": encoder, "size": config.size}
    return [Stage("denoiser", denoiser, arguments, optim=config.optim, train=config.train)]
