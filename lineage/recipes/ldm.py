"""Recipe `ldm`: an autoencoder, the latents of the data, and the UNet that denoises them."""

from __future__ import annotations

from dataclasses import dataclass, field

from lineage.config import OptimConfig, TextConfig, TrainConfig
from lineage.diffusion.ldm import LDM, KLConfig, LDMConfig
from lineage.diffusion.networks.unet import UNetConfig
from lineage.diffusion.process import ProcessConfig
from lineage.recipes.authors_codec import AUTHORS_OPTIM
from lineage.recipes.latents import (
    SMALL_AUTOENCODER,
    SMOKE_AUTOENCODER,
    TINY_AUTOENCODER,
    LatentConfig,
    latent_stages,
)
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Stage


@dataclass(frozen=True)
class Config(LatentConfig):
    """A run of `ldm`."""

    model: LDMConfig = field(default_factory=LDMConfig)


_LEAN = ProcessConfig(1000, "cosine", "x0")  # as `ddpm`: on a small budget x0 learns far faster

PRESETS = {
    # Seconds, for tests: every part is there, at its smallest.
    "smoke": Config(
        key="ldm",
        preset="smoke",
        size=16,
        encoder=TextConfig(width=16),
        optim=OptimConfig(lr=2e-3, warmup=10),
        train=TrainConfig(steps=20, batch=8, checkpoint_every=10, sample_every=20, log_every=5),
        autoencoder=SMOKE_AUTOENCODER,
        autoencoder_optim=OptimConfig(lr=2e-3, warmup=10, average=0.9),
        autoencoder_batch=8,
        kept=16,
        model=LDMConfig(
            process=_LEAN,
            steps=5,
            threshold="none",
            unet=UNetConfig(16, (1, 2), 1, (1,), 2, conditioning="transformer", dropout=0.0),
        ),
    ),
    # Minutes on two CPU cores: 8 x 8 latents. The words come in order, as the UNet attends to them
    # without places of its own (results/ldm/trials.md has a bag of words beside it).
    "tiny": Config(
        key="ldm",
        preset="tiny",
        size=32,
        text="transformer",
        encoder=TextConfig(width=64),
        optim=OptimConfig(lr=2e-3, warmup=100, average=0.995),
        train=TrainConfig(minutes=5, batch=32, checkpoint_every=500, sample_every=1000),
        autoencoder=TINY_AUTOENCODER,
        autoencoder_optim=OptimConfig(lr=2e-3, warmup=50, average=0.99, weight_decay=0.0),
        model=LDMConfig(
            process=_LEAN,
            steps=25,
            sampler="ddpm",
            threshold="none",
            unet=UNetConfig(32, (1, 2), 1, (1,), 4, conditioning="transformer", dropout=0.0),
        ),
    ),
    # One GPU of 8 GB, under an hour: 8 x 8 latents of 64 pixels.
    "small": Config(
        key="ldm",
        preset="small",
        size=64,
        text="transformer",
        encoder=TextConfig(width=256, layers=2),
        optim=OptimConfig(lr=5e-4, warmup=500, average=0.999),
        train=TrainConfig(minutes=55, batch=128, checkpoint_every=1000, sample_every=2000),
        autoencoder=SMALL_AUTOENCODER,
        autoencoder_optim=OptimConfig(lr=1e-3, warmup=200, average=0.999, weight_decay=0.0),
        autoencoder_batch=64,
        kept=65_536,
        model=LDMConfig(
            process=_LEAN,
            steps=30,
            threshold="none",
            unet=UNetConfig(128, (1, 2), 2, (0, 1), 8, conditioning="transformer", dropout=0.0),
        ),
    ),
    # Stable Diffusion v1, whose weights `lineage import-weights ldm` reads: 859,520,964 parameters
    # in the UNet, 83,653,863 in the autoencoder. Its text encoder is CLIP's, taken as it is.
    "paper": Config(
        key="ldm",
        preset="paper",
        size=512,
        text="pretrained:openai/clip-vit-large-patch14",
        encoder=TextConfig(width=768, words=77),
        optim=OptimConfig(
            lr=1e-4, beta2=0.999, warmup=10_000, decay="none", clip=0.0, average=0.9999
        ),
        train=TrainConfig(steps=500_000, batch=32, checkpoint_every=5000, sample_every=10_000),
        autoencoder=KLConfig(),
        autoencoder_share=0.3,
        autoencoder_optim=AUTHORS_OPTIM,
        autoencoder_batch=12,
        model=LDMConfig(
            process=ProcessConfig(1000, "scaled_linear", "noise"),
            drop_text=0.1,
            steps=50,
            guidance=7.5,
            sampler="ddim",
            spacing="leading",
            threshold="none",
            unet=UNetConfig(
                320,
                (1, 2, 4, 4),
                2,
                (0, 1, 2),
                8,
                conditioning="transformer",
                padding=True,
                groups=32,
                dropout=0.0,
            ),
        ),
    ),
}


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`autoencoder`, `latents`, `denoiser`."""
    return latent_stages(
        config,
        tokenizer,
        lambda latents, text: LDM(config.model, latents, text, config.size),
    )
