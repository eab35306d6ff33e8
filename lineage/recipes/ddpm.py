"""Recipe `ddpm`: one stage, the denoiser, with its text encoder trained along."""

from __future__ import annotations

from dataclasses import dataclass, field

from lineage.config import OptimConfig, RunConfig, TextConfig, TrainConfig
from lineage.diffusion.ddpm import DDPM, DDPMConfig
from lineage.diffusion.networks.unet import UNetConfig
from lineage.diffusion.process import ProcessConfig
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Stage, content


@dataclass(frozen=True)
class Config(RunConfig):
    """A run of `ddpm`."""

    model: DDPMConfig = field(default_factory=DDPMConfig)


def _unet(
    width: int, multipliers: tuple[int, ...], attention: tuple[int, ...], patch: int
) -> UNetConfig:
    return UNetConfig(width, multipliers, 1, attention, 4, patch=patch, dropout=0.0)


_LEAN = ProcessConfig(1000, "cosine", "x0")  # on a small budget x0 learns far faster than noise

PRESETS = {
    # Seconds, for tests: every part is there, at its smallest.
    "smoke": Config(
        key="ddpm",
        preset="smoke",
        size=16,
        encoder=TextConfig(width=16),
        optim=OptimConfig(lr=2e-3, warmup=10),
        train=TrainConfig(steps=20, batch=8, checkpoint_every=10, sample_every=20, log_every=5),
        model=DDPMConfig(process=_LEAN, steps=5, unet=_unet(8, (1, 2), (1,), 2)),
    ),
    # Minutes on two CPU cores: narrow and fast, since more steps teach more than more width. Words
    # in order: a bag of them is ahead after five minutes (0.72 against 0.58 in the mean of the six
    # tasks), but does not tell who stands where (after thirty, 0.94). Ancestral sampling adds noise
    # that mends what came before.
    "tiny": Config(
        key="ddpm",
        preset="tiny",
        size=32,
        text="transformer",
        encoder=TextConfig(width=64),
        optim=OptimConfig(lr=2e-3, warmup=100, average=0.995),
        train=TrainConfig(minutes=5, batch=32, checkpoint_every=500, sample_every=1000),
        model=DDPMConfig(
            process=_LEAN, steps=25, sampler="ddpm", unet=_unet(16, (1, 2, 3), (1, 2), 2)
        ),
    ),
    # One GPU of 8 GB, under an hour: words in order, 16 times the width.
    "small": Config(
        key="ddpm",
        preset="small",
        size=64,
        text="transformer",
        encoder=TextConfig(width=256, layers=2),
        optim=OptimConfig(lr=1e-3, warmup=500, average=0.999),
        train=TrainConfig(minutes=55, batch=128, checkpoint_every=1000, sample_every=2000),
        model=DDPMConfig(process=_LEAN, steps=50, unet=_unet(96, (1, 2, 3, 3), (2, 3), 2)),
    ),
    # Ho et al. 2020, section 4 and appendix B, CIFAR10: 35.7 million parameters without the text.
    "paper": Config(
        key="ddpm",
        preset="paper",
        size=32,
        text="transformer",
        encoder=TextConfig(tokenizer="bpe", vocabulary=8192, width=256, layers=4),
        optim=OptimConfig(
            "adam",
            lr=2e-4,
            beta2=0.999,
            weight_decay=0.0,
            warmup=5000,
            decay="none",
            average=0.9999,
        ),
        train=TrainConfig(steps=800_000, batch=128, checkpoint_every=5000, sample_every=10_000),
        model=DDPMConfig(
            process=ProcessConfig(), steps=1000, sampler="ddpm", unet=UNetConfig(epsilon=1e-6)
        ),
    ),
}


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`denoiser`."""
    return [
        Stage(
            name="denoiser",
            build=lambda made: DDPM(
                config.model, make_encoder(config.text, config.encoder, tokenizer), config.size
            ),
            optim=config.optim,
            train=config.train,
            settings=content(config),
        )
    ]
