"""Recipe `vqvae`: a VQ-VAE, the codes of the data, and the transformer that writes them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from lineage.config import OptimConfig, TextConfig, TrainConfig
from lineage.errors import UserError
from lineage.recipes.codes_prior import (
    SMALL_PRIOR,
    SMOKE_PRIOR,
    TINY_PRIOR,
    CodesConfig,
    codec_stages,
)
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Stage
from lineage.vqvae.ar_prior import PriorConfig
from lineage.vqvae.quantise import QuantiserConfig
from lineage.vqvae.transformer import TransformerConfig
from lineage.vqvae.vqvae import VQVAE, VQVAEConfig


@dataclass(frozen=True)
class Config(CodesConfig):
    """A run of `vqvae`."""

    codec: VQVAEConfig = field(default_factory=VQVAEConfig)

    def with_recipe(self, name: str) -> Config:
        """`collapse`: what becomes of a codebook without its helpers: eight times as many codes
        that start from random numbers, are moved by their loss alone, and are never restarted.
        """
        if name != "collapse":
            raise UserError(f"vqvae has no recipe {name!r}: collapse.")
        quantiser = self.codec.quantiser
        lost = replace(
            quantiser, codes=8 * quantiser.codes, codebook="loss", start="normal", restart=0.0
        )
        return replace(self, codec=replace(self.codec, quantiser=lost))


PRESETS = {
    # Seconds, for tests: every part is there, at its smallest.
    "smoke": Config(
        key="vqvae",
        preset="smoke",
        size=16,
        encoder=TextConfig(width=16),
        optim=OptimConfig(lr=2e-3, warmup=10),
        train=TrainConfig(steps=20, batch=8, checkpoint_every=10, sample_every=20, log_every=5),
        codec_optim=OptimConfig(lr=2e-3, warmup=10, average=0.9),
        codec_batch=8,
        kept=16,
        codec=VQVAEConfig(QuantiserConfig(16, 8), 8, 8, 1),
        model=SMOKE_PRIOR,
    ),
    # Minutes on two CPU cores. Few codes: each is seen more often, and with 32 of them a green edge
    # is drawn with the same codes in every shape (results/vqvae: trials.md, knobs.json).
    "tiny": Config(
        key="vqvae",
        preset="tiny",
        size=32,
        encoder=TextConfig(width=128),
        optim=OptimConfig("muon", lr=2e-3, warmup=100, average=0.99),
        train=TrainConfig(minutes=5, batch=32, checkpoint_every=500, sample_every=1000),
        codec_share=0.15,
        codec_optim=OptimConfig(lr=4e-3, warmup=50, average=0.99, weight_decay=0.0),
        codec_batch=32,
        codec=VQVAEConfig(QuantiserConfig(32, 16), 64, 32, 2),
        model=TINY_PRIOR,
    ),
    # One GPU of 8 GB, under an hour: 64 codes of 8 x 8 pixels.
    "small": Config(
        key="vqvae",
        preset="small",
        size=64,
        encoder=TextConfig(width=256),
        optim=OptimConfig(lr=6e-4, warmup=500, average=0.999),
        train=TrainConfig(minutes=55, batch=128, checkpoint_every=1000, sample_every=2000),
        codec_share=0.2,
        codec_optim=OptimConfig(lr=1e-3, warmup=200, average=0.999, weight_decay=0.0),
        codec_batch=128,
        kept=65_536,
        codec=VQVAEConfig(QuantiserConfig(1024, 32), 128, 64, 2, 3),
        model=SMALL_PRIOR,
    ),
    # Section 4.1 and 4.2: 128 pixels, 32 x 32 codes of 512, 256 channels, Adam at 0.0002, batches
    # of 128, 250,000 steps; the codebook moved by its loss. The authors' prior is a PixelCNN.
    "paper": Config(
        key="vqvae",
        preset="paper",
        size=128,
        encoder=TextConfig(tokenizer="bpe", vocabulary=8192, words=64, width=512),
        optim=OptimConfig(lr=3e-4, warmup=2000, average=0.999),
        train=TrainConfig(steps=500_000, batch=128, checkpoint_every=2000, sample_every=10_000),
        codec_share=0.5,
        codec_optim=OptimConfig(
            "adam",
            lr=2e-4,
            beta2=0.999,
            weight_decay=0.0,
            warmup=0,
            decay="none",
            clip=0.0,
            average=0.0,
        ),
        codec_batch=128,
        kept=200_000,
        codec=VQVAEConfig(
            QuantiserConfig(512, 64, codebook="loss", start="normal", restart=0.0), 256, 256, 2, 2
        ),
        model=PriorConfig(TransformerConfig(512, 12, 8), places=64),
    ),
}


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`codec`, `codes`, `prior`."""
    return codec_stages(config, tokenizer, lambda: VQVAE(config.codec))
