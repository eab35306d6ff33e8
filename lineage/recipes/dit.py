"""Recipe `dit`: an autoencoder, then the transformer that denoises its latents."""

from __future__ import annotations

from dataclasses import field

from lineage.config import OptimConfig, TextConfig, TrainConfig, configuration
from lineage.diffusion.dit import LatentDiTConfig, build_dit
from lineage.diffusion.ldm import KLAutoencoder, KLConfig, LatentDiffusionModel
from lineage.diffusion.networks.dit import DiTConfig
from lineage.diffusion.process import ProcessConfig
from lineage.recipes.authors_codec import AUTHORS_OPTIM
from lineage.recipes.latent_diffusion import (
    SMALL_AUTOENCODER,
    SMALL_BUDGET,
    SMOKE_AUTOENCODER,
    TINY_AUTOENCODER,
    LatentConfig,
    autoencoder_and_denoiser,
)
from lineage.text.encoders import EncoderSpec
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Stage


@configuration
class Config(LatentConfig):
    """A run of `dit`."""

    model: LatentDiTConfig = field(default_factory=LatentDiTConfig)


# No preset has a threshold: latents have standard deviation 1 and no bounds.
PRESETS = {
    # Seconds, for tests: every part is there, at its smallest.
    "smoke": Config(
        size=16,
        encoder=TextConfig(width=16),
        optim=OptimConfig(lr=2e-3, warmup=10),
        train=TrainConfig(
            max_steps=20, batch_size=8, checkpoint_every=10, sample_every=20, log_every=5
        ),
        autoencoder=SMOKE_AUTOENCODER,
        autoencoder_optim=OptimConfig(lr=2e-3, warmup=10, ema_decay=0.9),
        autoencoder_batch_size=8,
        cache_size=16,
        model=LatentDiTConfig(
            process=SMALL_BUDGET,
            sampling_steps=5,
            threshold="none",
            net=DiTConfig(width=16, depth=2, num_heads=2, patch_size=2, max_words=8),
        ),
    ),
    # Minutes on two CPU cores: 16 patches of the 8 x 8 latents. Optimiser and sizes are those of
    # `vqvae`'s prior.
    "tiny": Config(
        size=32,
        text="transformer",  # as `ldm`
        encoder=TextConfig(width=128),
        optim=OptimConfig(name="muon", lr=2e-3, warmup=100, ema_decay=0.99),
        train=TrainConfig(minutes=5, batch_size=32, checkpoint_every=500, sample_every=1000),
        autoencoder=TINY_AUTOENCODER,
        autoencoder_optim=OptimConfig(lr=2e-3, warmup=50, ema_decay=0.99, weight_decay=0.0),
        model=LatentDiTConfig(
            process=SMALL_BUDGET,
            sampling_steps=25,
            sampler="ddpm",  # its noise corrects earlier mistakes
            threshold="none",
            net=DiTConfig(
                width=128, depth=5, num_heads=4, patch_size=2, max_words=16, gelu="exact"
            ),
        ),
    ),
    # One GPU of 8 GB, under an hour: 64 patches of 8 x 8 latents. The paper's smallest, DiT-S,
    # would be trained on a twentieth as many pictures in this hour.
    "small": Config(
        size=64,
        text="transformer",
        encoder=TextConfig(width=256, num_layers=2),
        optim=OptimConfig(name="muon", lr=1e-3, warmup=500, ema_decay=0.999),
        train=TrainConfig(minutes=55, batch_size=128, checkpoint_every=1000, sample_every=2000),
        autoencoder=SMALL_AUTOENCODER,
        autoencoder_optim=OptimConfig(lr=1e-3, warmup=200, ema_decay=0.999, weight_decay=0.0),
        autoencoder_batch_size=64,
        cache_size=65_536,
        model=LatentDiTConfig(
            process=SMALL_BUDGET,
            sampling_steps=30,
            threshold="none",
            net=DiTConfig(width=256, depth=8, num_heads=8, patch_size=1, max_words=24),
        ),
    ),
    # DiT-XL/2 on the latents of Stable Diffusion's autoencoder, with 250 steps of ancestral
    # sampling and learned variances; captions are ours.
    "paper": Config(
        size=256,
        text="transformer",
        encoder=TextConfig(
            tokenizer="bpe", vocab_size=16_384, max_words=64, width=768, num_layers=6
        ),
        optim=OptimConfig(
            lr=1e-4,
            beta2=0.999,
            weight_decay=0.0,
            warmup=0,
            decay="none",
            grad_clip=0.0,
            ema_decay=0.9999,
        ),
        train=TrainConfig(
            max_steps=7_000_000, batch_size=256, checkpoint_every=5000, sample_every=10_000
        ),
        autoencoder=KLConfig(),
        autoencoder_share=0.1,
        autoencoder_optim=AUTHORS_OPTIM,
        autoencoder_batch_size=12,
        model=LatentDiTConfig(
            process=ProcessConfig(variance="learned_range"),
            sampling_steps=250,
            guidance=4.0,
            sampler="ddpm",
            threshold="none",
            net=DiTConfig(),
        ),
    ),
}


def denoiser(
    autoencoder: KLAutoencoder, encoder: EncoderSpec, config: LatentDiTConfig, size: int
) -> LatentDiffusionModel:
    """The untrained system."""
    return build_dit(config, autoencoder, encoder.build(), size)


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`autoencoder`, `denoiser`."""
    return autoencoder_and_denoiser(config, denoiser, tokenizer)
