"""Recipe `dit`: an autoencoder, the latents of the data, and the transformer that denoises them."""

from __future__ import annotations

from dataclasses import dataclass, field

from lineage.config import OptimConfig, TextConfig, TrainConfig
from lineage.diffusion.ldm import KLConfig
from lineage.diffusion.networks.dit import DiTConfig, DiTSystem, DiTSystemConfig
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
    """A run of `dit`."""

    model: DiTSystemConfig = field(default_factory=DiTSystemConfig)


_LEAN = ProcessConfig(1000, "cosine", "x0")  # as `ddpm`: on a small budget x0 learns far faster

PRESETS = {
    # Seconds, for tests: every part is there, at its smallest.
    "smoke": Config(
        key="dit",
        preset="smoke",
        size=16,
        encoder=TextConfig(width=16),
        optim=OptimConfig(lr=2e-3, warmup=10),
        train=TrainConfig(steps=20, batch=8, checkpoint_every=10, sample_every=20, log_every=5),
        autoencoder=SMOKE_AUTOENCODER,
        autoencoder_optim=OptimConfig(lr=2e-3, warmup=10, average=0.9),
        autoencoder_batch=8,
        kept=16,
        model=DiTSystemConfig(
            process=_LEAN, steps=5, threshold="none", net=DiTConfig(16, 2, 2, 2, words=8)
        ),
    ),
    # Minutes on two CPU cores: 16 patches of the 8 x 8 latents; the optimiser and the sizes are
    # those of `vqvae`'s prior.
    "tiny": Config(
        key="dit",
        preset="tiny",
        size=32,
        text="transformer",
        encoder=TextConfig(width=128),
        optim=OptimConfig("muon", lr=2e-3, warmup=100, average=0.99),
        train=TrainConfig(minutes=5, batch=32, checkpoint_every=500, sample_every=1000),
        autoencoder=TINY_AUTOENCODER,
        autoencoder_optim=OptimConfig(lr=2e-3, warmup=50, average=0.99, weight_decay=0.0),
        model=DiTSystemConfig(
            process=_LEAN,
            steps=25,
            sampler="ddpm",
            threshold="none",
            net=DiTConfig(128, 5, 4, 2, words=16, gelu="exact"),
        ),
    ),
    # One GPU of 8 GB, under an hour: 64 patches of 8 x 8 latents. The paper's smallest, DiT-S,
    # would see a twentieth as many pictures in this hour.
    "small": Config(
        key="dit",
        preset="small",
        size=64,
        text="transformer",
        encoder=TextConfig(width=256, layers=2),
        optim=OptimConfig("muon", lr=1e-3, warmup=500, average=0.999),
        train=TrainConfig(minutes=55, batch=128, checkpoint_every=1000, sample_every=2000),
        autoencoder=SMALL_AUTOENCODER,
        autoencoder_optim=OptimConfig(lr=1e-3, warmup=200, average=0.999, weight_decay=0.0),
        autoencoder_batch=64,
        kept=65_536,
        model=DiTSystemConfig(
            process=_LEAN,
            steps=30,
            threshold="none",
            net=DiTConfig(256, 8, 8, 1, words=24),
        ),
    ),
    # DiT-XL/2 on the latents of Stable Diffusion's autoencoder, with 250 steps of ancestral
    # sampling and learnt variances; captions are ours.
    "paper": Config(
        key="dit",
        preset="paper",
        size=256,
        text="transformer",
        encoder=TextConfig(tokenizer="bpe", vocabulary=16_384, words=64, width=768, layers=6),
        optim=OptimConfig(
            lr=1e-4,
            beta2=0.999,
            weight_decay=0.0,
            warmup=0,
            decay="none",
            clip=0.0,
            average=0.9999,
        ),
        train=TrainConfig(steps=7_000_000, batch=256, checkpoint_every=5000, sample_every=10_000),
        autoencoder=KLConfig(),
        autoencoder_share=0.1,
        autoencoder_optim=AUTHORS_OPTIM,
        autoencoder_batch=12,
        model=DiTSystemConfig(
            process=ProcessConfig(1000, "linear", "noise", variance="learned_range"),
            drop_text=0.1,
            steps=250,
            guidance=4.0,
            sampler="ddpm",
            threshold="none",
            net=DiTConfig(),
        ),
    ),
}


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`autoencoder`, `latents`, `denoiser`."""
    return latent_stages(
        config,
        tokenizer,
        lambda latents, text: DiTSystem(config.model, latents, text, config.size),
    )
