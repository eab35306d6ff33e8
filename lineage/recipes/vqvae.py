"""Recipe `vqvae`: a VQ-VAE, then a transformer over its codes."""

from __future__ import annotations

from dataclasses import field, replace

from lineage.config import OptimConfig, TextConfig, TrainConfig, configuration
from lineage.errors import UserError
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
from lineage.vqvae.vqvae import VQVAE, VQVAEConfig


@configuration
class Config(CodesConfig):
    """A run of `vqvae`."""

    codec: VQVAEConfig = field(default_factory=VQVAEConfig)

    def with_recipe(self, name: str) -> Config:
        """The run changed by the recipe `name`.

        `collapse` shows a codebook without remedies: eight times as many codes, which start from
        random numbers, are moved by their loss and are never restarted.

        Raises:
            UserError: for another name.
        """
        if name != "collapse":
            raise UserError(f"vqvae has no recipe {name!r}: collapse.")
        quantiser = self.codec.quantiser
        collapsing = replace(
            quantiser,
            num_codes=8 * quantiser.num_codes,
            update="loss",
            init="normal",
            restart_threshold=0.0,
        )
        return replace(self, codec=replace(self.codec, quantiser=collapsing))


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
        codec=VQVAEConfig(
            quantiser=QuantiserConfig(num_codes=16, code_dim=8),
            channels=8,
            res_channels=8,
            num_res_blocks=1,
        ),
        model=SMOKE_PRIOR,
    ),
    # Minutes on two CPU cores. Few codes: each is trained on more often, and with 32 a green edge
    # is drawn with the same codes in every shape (results/vqvae/trials.md).
    "tiny": Config(
        size=32,
        encoder=TextConfig(width=128),
        optim=OptimConfig(name="muon", lr=2e-3, warmup=100, ema_decay=0.99),
        train=TrainConfig(minutes=5, batch_size=32, checkpoint_every=500, sample_every=1000),
        codec_share=0.15,
        codec_optim=OptimConfig(lr=4e-3, warmup=50, ema_decay=0.99, weight_decay=0.0),
        codec_batch_size=32,
        codec=VQVAEConfig(
            quantiser=QuantiserConfig(num_codes=32, code_dim=16),
            channels=64,
            res_channels=32,
            num_res_blocks=2,
        ),
        model=TINY_PRIOR,
    ),
    # One GPU of 8 GB, under an hour: 64 codes of 8 x 8 pixels.
    "small": Config(
        size=64,
        encoder=TextConfig(width=256),
        optim=OptimConfig(lr=6e-4, warmup=500, ema_decay=0.999),
        train=TrainConfig(minutes=55, batch_size=128, checkpoint_every=1000, sample_every=2000),
        codec_share=0.2,
        codec_optim=OptimConfig(lr=1e-3, warmup=200, ema_decay=0.999, weight_decay=0.0),
        codec_batch_size=128,
        cache_size=65_536,
        codec=VQVAEConfig(
            quantiser=QuantiserConfig(num_codes=1024, code_dim=32),
            channels=128,
            res_channels=64,
            num_res_blocks=2,
            num_downsamples=3,
        ),
        model=SMALL_PRIOR,
    ),
    # Section 4.1 and 4.2: 128 pixels, 32 x 32 codes of 512, 256 channels, Adam at 0.0002, batches
    # of 128, 250,000 steps; the codebook moved by its loss. The authors' prior is a PixelCNN.
    "paper": Config(
        size=128,
        encoder=TextConfig(tokenizer="bpe", vocab_size=8192, max_words=64, width=512),
        optim=OptimConfig(lr=3e-4, warmup=2000, ema_decay=0.999),
        train=TrainConfig(
            max_steps=500_000, batch_size=128, checkpoint_every=2000, sample_every=10_000
        ),
        codec_share=0.5,
        codec_optim=OptimConfig(
            name="adam",
            lr=2e-4,
            beta2=0.999,
            weight_decay=0.0,
            warmup=0,
            decay="none",
            grad_clip=0.0,
            ema_decay=0.0,
        ),
        codec_batch_size=128,
        cache_size=200_000,
        codec=VQVAEConfig(
            quantiser=QuantiserConfig(
                num_codes=512, code_dim=64, update="loss", init="normal", restart_threshold=0.0
            ),
            channels=256,
            res_channels=256,
            num_res_blocks=2,
            num_downsamples=2,
        ),
        model=PriorConfig(
            transformer=TransformerConfig(width=512, num_layers=12, num_heads=8), text_len=64
        ),
    ),
}


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`codec`, `prior`."""
    return codec_and_prior(config, VQVAE, {"config": config.codec}, tokenizer)
