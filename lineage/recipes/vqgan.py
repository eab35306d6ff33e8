"""Recipe `vqgan`: a VQGAN, then a transformer over its codes."""

from __future__ import annotations

from dataclasses import field, replace

from lineage.config import OptimConfig, TextConfig, TrainConfig, configuration
from lineage.errors import UserError
from lineage.nn.autoencoder import AutoencoderConfig
from lineage.recipes.authors_codec import AUTHORS_OPTIM
from lineage.recipes.codes_prior import (
    SMALL_PRIOR,
    SMOKE_PRIOR,
    TINY_PRIOR,
    CodesConfig,
    codec_and_prior,
)
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Stage
from lineage.vqvae.ar_prior import PriorConfig
from lineage.vqvae.quantise import QuantiserConfig
from lineage.vqvae.transformer import TransformerConfig
from lineage.vqvae.vqgan import VQGAN, VQGANConfig


@configuration
class Config(CodesConfig):
    """A run of `vqgan`."""

    codec: VQGANConfig = field(default_factory=VQGANConfig)

    def without_files(self) -> Config:
        return replace(super().without_files(), codec=replace(self.codec, lpips=()))


PRESETS = {
    # Seconds, for tests: every part is there, at its smallest.
    "smoke": Config(
        size=16,
        encoder=TextConfig(width=16),
        optim=OptimConfig(lr=2e-3, warmup=10),
        train=TrainConfig(
            max_steps=20, batch_size=8, checkpoint_every=10, sample_every=20, log_every=5
        ),
        codec_optim=OptimConfig(lr=2e-3, warmup=10, ema_decay=0.9),
        codec_batch_size=8,
        cache_size=16,
        codec=VQGANConfig(
            net=AutoencoderConfig(
                channels=8,
                channel_mult=(1, 2, 2),
                num_res_blocks=1,
                attn_resolutions=(4,),
                resolution=16,
                z_channels=8,
            ),
            quantiser=QuantiserConfig(num_codes=16, code_dim=8),
            disc_channels=4,
            disc_layers=2,
        ),
        model=SMOKE_PRIOR,
    ),
    # Minutes on two CPU cores. The codec gets half of them: it has five times the arithmetic of
    # `vqvae`'s, and its loss asks for more than pixels.
    "tiny": Config(
        size=32,
        encoder=TextConfig(width=128),
        optim=OptimConfig(name="muon", lr=2e-3, warmup=100, ema_decay=0.99),
        train=TrainConfig(minutes=5, batch_size=32, checkpoint_every=500, sample_every=1000),
        codec_share=0.5,
        codec_optim=OptimConfig(lr=2e-3, warmup=50, ema_decay=0.99, weight_decay=0.0),
        codec_batch_size=16,
        codec=VQGANConfig(
            net=AutoencoderConfig(
                channels=16,
                channel_mult=(1, 2, 2),
                num_res_blocks=1,
                attn_resolutions=(),
                resolution=32,
                z_channels=32,
            ),
            quantiser=QuantiserConfig(num_codes=64, code_dim=16),
            disc_channels=16,
            disc_layers=2,
        ),
        model=TINY_PRIOR,
    ),
    # One GPU of 8 GB, under an hour: 64 codes of 8 x 8 pixels.
    "small": Config(
        size=64,
        encoder=TextConfig(width=256),
        optim=OptimConfig(lr=6e-4, warmup=500, ema_decay=0.999),
        train=TrainConfig(minutes=55, batch_size=128, checkpoint_every=1000, sample_every=2000),
        codec_share=0.4,
        codec_optim=OptimConfig(lr=6e-4, beta1=0.5, warmup=200, ema_decay=0.999, weight_decay=0.0),
        codec_batch_size=64,
        cache_size=65_536,
        codec=VQGANConfig(
            net=AutoencoderConfig(
                channels=64,
                channel_mult=(1, 1, 2, 4),
                num_res_blocks=1,
                attn_resolutions=(8,),
                resolution=64,
                z_channels=128,
            ),
            quantiser=QuantiserConfig(num_codes=1024, code_dim=32),
            disc_channels=32,
            disc_layers=2,
        ),
        model=SMALL_PRIOR,
    ),
    # The authors' configuration for ImageNet: 16 x 16 codes of 1,024, and their largest transformer
    # (24 layers, 1,024 wide). Their rate is 4.5e-6 for each picture of a batch, and the
    # discriminator sets in after 250,000 steps; a prior over captions is not theirs.
    "paper": Config(
        size=256,
        encoder=TextConfig(tokenizer="bpe", vocab_size=16_384, max_words=64, width=1024),
        optim=OptimConfig(lr=4.5e-6 * 32, beta2=0.95, ema_decay=0.0, warmup=0, decay="none"),
        train=TrainConfig(
            max_steps=1_000_000, batch_size=32, checkpoint_every=5000, sample_every=10_000
        ),
        codec_share=0.5,
        codec_optim=AUTHORS_OPTIM,
        codec_batch_size=12,
        cache_size=200_000,
        codec=VQGANConfig(
            quantiser=QuantiserConfig(
                num_codes=1024, code_dim=256, update="loss", init="normal", restart_threshold=0.0
            ),
            disc_start=250_001,
        ),
        model=PriorConfig(
            transformer=TransformerConfig(width=1024, num_layers=24, num_heads=16, gelu="exact"),
            text_len=64,
        ),
    ),
}


def codec(config: VQGANConfig, size: int) -> VQGAN:
    """The untrained codec.

    Raises:
        UserError: the pictures are smaller than a patch of the discriminator.
    """
    layers = config.disc_layers
    smallest = 3 * 2**layers  # the strided convolutions leave 3 x 3 for two more of 4 x 4
    if size < smallest:
        raise UserError(
            f"size={size} is too small for codec.disc_layers={layers}, which needs {smallest} "
            "pixels: choose fewer layers."
        )
    return VQGAN(config)


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`codec`, `prior`."""
    arguments = {"config": config.codec, "size": config.size}
    return codec_and_prior(config, codec, arguments, tokenizer)
