"""Recipe `ldm`: an autoencoder, then the UNet that denoises its latents."""

from __future__ import annotations

from dataclasses import field

from lineage.config import OptimConfig, TextConfig, TrainConfig, configuration
from lineage.diffusion.ldm import (
    KLAutoencoder,
    KLConfig,
    LatentDiffusionModel,
    LDMConfig,
    build_ldm,
)
from lineage.diffusion.networks.unet import UNetConfig
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
    """A run of `ldm`."""

    model: LDMConfig = field(default_factory=LDMConfig)


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
        model=LDMConfig(
            process=SMALL_BUDGET,
            sampling_steps=5,
            threshold="none",
            unet=UNetConfig(
                channels=16,
                channel_mult=(1, 2),
                num_res_blocks=1,
                attention_levels=(1,),
                num_heads=2,
                conditioning="transformer",
                dropout=0.0,
            ),
        ),
    ),
    # Minutes on two CPU cores: 8 x 8 latents.
    "tiny": Config(
        size=32,
        # The UNet attends to the words without positions of its own, so their order must come from
        # the encoder (results/ldm/trials.md compares a bag of words).
        text="transformer",
        encoder=TextConfig(width=64),
        optim=OptimConfig(lr=2e-3, warmup=100, ema_decay=0.995),
        train=TrainConfig(minutes=5, batch_size=32, checkpoint_every=500, sample_every=1000),
        autoencoder=TINY_AUTOENCODER,
        autoencoder_optim=OptimConfig(lr=2e-3, warmup=50, ema_decay=0.99, weight_decay=0.0),
        model=LDMConfig(
            process=SMALL_BUDGET,
            sampling_steps=25,
            sampler="ddpm",  # its noise corrects earlier mistakes
            threshold="none",
            unet=UNetConfig(
                channels=32,  # twice `ddpm`, since there are a quarter of its positions
                channel_mult=(1, 2),
                num_res_blocks=1,
                attention_levels=(1,),
                num_heads=4,
                conditioning="transformer",
                dropout=0.0,  # the data is endless
            ),
        ),
    ),
    # One GPU of 8 GB, under an hour: 8 x 8 latents of 64 pixels.
    "small": Config(
        size=64,
        text="transformer",  # word order
        encoder=TextConfig(width=256, num_layers=2),
        optim=OptimConfig(lr=5e-4, warmup=500, ema_decay=0.999),
        train=TrainConfig(minutes=55, batch_size=128, checkpoint_every=1000, sample_every=2000),
        autoencoder=SMALL_AUTOENCODER,
        autoencoder_optim=OptimConfig(lr=1e-3, warmup=200, ema_decay=0.999, weight_decay=0.0),
        autoencoder_batch_size=64,
        cache_size=65_536,
        model=LDMConfig(
            process=SMALL_BUDGET,
            sampling_steps=30,
            threshold="none",
            unet=UNetConfig(
                channels=128,
                channel_mult=(1, 2),
                num_res_blocks=2,
                attention_levels=(0, 1),
                num_heads=8,
                conditioning="transformer",
                dropout=0.0,
            ),
        ),
    ),
    # Stable Diffusion v1, whose weights `lineage import-weights ldm` reads: 859,520,964 parameters
    # in the UNet, 83,653,863 in the autoencoder. Its text encoder is CLIP's, frozen.
    "paper": Config(
        size=512,
        text="pretrained:openai/clip-vit-large-patch14",
        encoder=TextConfig(width=768, max_words=77),
        optim=OptimConfig(
            lr=1e-4, beta2=0.999, warmup=10_000, decay="none", grad_clip=0.0, ema_decay=0.9999
        ),
        train=TrainConfig(
            max_steps=500_000, batch_size=32, checkpoint_every=5000, sample_every=10_000
        ),
        autoencoder=KLConfig(),
        autoencoder_share=0.3,
        autoencoder_optim=AUTHORS_OPTIM,
        autoencoder_batch_size=12,
        model=LDMConfig(
            process=ProcessConfig(schedule="scaled_linear", prediction="noise"),
            sampling_steps=50,
            guidance=7.5,
            sampler="ddim",
            spacing="leading",
            threshold="none",
            unet=UNetConfig(
                channels=320,
                channel_mult=(1, 2, 4, 4),
                num_res_blocks=2,
                attention_levels=(0, 1, 2),
                num_heads=8,
                conditioning="transformer",
                attend_padding=True,  # CLIP's captions have 77 tokens, whatever their length
                norm_groups=32,
                dropout=0.0,
            ),
        ),
    ),
}


def denoiser(
    autoencoder: KLAutoencoder, encoder: EncoderSpec, config: LDMConfig, size: int
) -> LatentDiffusionModel:
    """The untrained system."""
    return build_ldm(config, autoencoder, encoder.build(), size)


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`autoencoder`, `denoiser`."""
    return autoencoder_and_denoiser(config, denoiser, tokenizer)
