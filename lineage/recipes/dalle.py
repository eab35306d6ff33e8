"""Recipe `dalle`: a discrete VAE, the codes of the data, and the transformer that writes them."""

from __future__ import annotations

from dataclasses import dataclass, field

from lineage.config import OptimConfig, TextConfig, TrainConfig
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
from lineage.vqvae.dalle import DVAE, DVAEConfig
from lineage.vqvae.transformer import TransformerConfig


@dataclass(frozen=True)
class Config(CodesConfig):
    """A run of `dalle`."""

    codec: DVAEConfig = field(default_factory=DVAEConfig)


PRESETS = {
    # Seconds, for tests: every part is there, at its smallest.
    "smoke": Config(
        key="dalle",
        preset="smoke",
        size=16,
        encoder=TextConfig(width=16),
        optim=OptimConfig(lr=2e-3, warmup=10),
        train=TrainConfig(steps=20, batch=8, checkpoint_every=10, sample_every=20, log_every=5),
        codec_optim=OptimConfig(lr=2e-3, warmup=10, average=0.9),
        codec_batch=8,
        kept=16,
        codec=DVAEConfig(16, 8, 8, 1, 3, anneal=6),
        model=SMOKE_PRIOR,
    ),
    # Minutes on two CPU cores. The codec gets half of them: its codes part slowly while tau falls.
    "tiny": Config(
        key="dalle",
        preset="tiny",
        size=32,
        encoder=TextConfig(width=128),
        optim=OptimConfig("muon", lr=2e-3, warmup=100, average=0.99),
        train=TrainConfig(minutes=5, batch=32, checkpoint_every=500, sample_every=1000),
        codec_share=0.5,
        codec_optim=OptimConfig(lr=2e-3, warmup=50, average=0.99, weight_decay=0.0),
        codec_batch=16,
        codec=DVAEConfig(64, 32, 32, 1, 3, beta=0.1, anneal=3000, sharpest=-2.0),
        model=TINY_PRIOR,
    ),
    # One GPU of 8 GB, under an hour: 64 codes of 8 x 8 pixels.
    "small": Config(
        key="dalle",
        preset="small",
        size=64,
        encoder=TextConfig(tokenizer="bpe", vocabulary=2048, width=256),
        optim=OptimConfig(lr=6e-4, warmup=500, average=0.999),
        train=TrainConfig(minutes=55, batch=128, checkpoint_every=1000, sample_every=2000),
        codec_optim=OptimConfig(lr=6e-4, warmup=200, average=0.999, weight_decay=0.0),
        codec_batch=128,
        kept=65_536,
        codec=DVAEConfig(1024, 64, 64, 2, 4, beta=0.1, anneal=8000, sharpest=-2.0),
        model=SMALL_PRIOR,
    ),
    # Ramesh et al. 2021, appendices A and B: 32 x 32 codes of 8,192; 64 layers of 62 heads of 64,
    # 12 billion parameters; 256 places of text from 16,384 tokens; batches of 512 and 1,024, three
    # million steps and 430,000.
    "paper": Config(
        key="dalle",
        preset="paper",
        size=256,
        encoder=TextConfig(tokenizer="bpe", vocabulary=16_384, words=256, width=3968),
        optim=OptimConfig(
            lr=4.5e-4, beta1=0.9, beta2=0.96, weight_decay=4.5e-2, warmup=5000, clip=4.0
        ),
        train=TrainConfig(steps=3_430_000, batch=1024, checkpoint_every=2000, sample_every=10_000),
        codec_share=3_000_000 / 3_430_000,
        codec_optim=OptimConfig(
            lr=1e-4, beta2=0.999, weight_decay=1e-4, warmup=0, clip=0.0, average=0.999
        ),
        codec_batch=512,
        kept=200_000,
        codec=DVAEConfig(),
        model=PriorConfig(TransformerConfig(3968, 64, 62), places=256, drop_text=0.0),
    ),
}


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`codec`, `codes`, `prior`."""
    return codec_stages(config, tokenizer, lambda: DVAE(config.codec))
