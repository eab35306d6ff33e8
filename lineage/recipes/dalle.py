"""Recipe `dalle`: a discrete VAE, then a transformer over its codes."""

from __future__ import annotations

from dataclasses import field

from lineage.config import OptimConfig, TextConfig, TrainConfig, configuration
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
from lineage.vqvae.dalle import DVAE, DVAEConfig
from lineage.vqvae.transformer import TransformerConfig


@configuration
class Config(CodesConfig):
    """A run of `dalle`."""

    codec: DVAEConfig = field(default_factory=DVAEConfig)


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
        codec=DVAEConfig(
            num_codes=16,
            hidden_channels=8,
            init_channels=8,
            blocks_per_group=1,
            num_groups=3,
            anneal_steps=6,
        ),
        model=SMOKE_PRIOR,
    ),
    # Minutes on two CPU cores. The codec gets half of them: its codes part slowly while tau falls.
    # With a smaller weight of the KL term than the paper's it collapses to one code.
    "tiny": Config(
        size=32,
        encoder=TextConfig(width=128),
        optim=OptimConfig(name="muon", lr=2e-3, warmup=100, ema_decay=0.99),
        train=TrainConfig(minutes=5, batch_size=32, checkpoint_every=500, sample_every=1000),
        codec_share=0.5,
        codec_optim=OptimConfig(lr=2e-3, warmup=50, ema_decay=0.99, weight_decay=0.0),
        codec_batch_size=16,
        codec=DVAEConfig(
            num_codes=64,
            hidden_channels=32,
            init_channels=32,
            blocks_per_group=1,
            num_groups=3,
            anneal_steps=3000,
            min_log_b=-2.0,
        ),
        model=TINY_PRIOR,
    ),
    # One GPU of 8 GB, under an hour: 64 codes of 8 x 8 pixels.
    "small": Config(
        size=64,
        encoder=TextConfig(tokenizer="bpe", vocab_size=2048, width=256),
        optim=OptimConfig(lr=6e-4, warmup=500, ema_decay=0.999),
        train=TrainConfig(minutes=55, batch_size=128, checkpoint_every=1000, sample_every=2000),
        codec_optim=OptimConfig(lr=6e-4, warmup=200, ema_decay=0.999, weight_decay=0.0),
        codec_batch_size=128,
        cache_size=65_536,
        codec=DVAEConfig(
            num_codes=1024,
            hidden_channels=64,
            init_channels=64,
            blocks_per_group=2,
            num_groups=4,
            anneal_steps=8000,
            min_log_b=-2.0,
        ),
        model=SMALL_PRIOR,
    ),
    # Ramesh et al. 2021, appendices A and B: 32 x 32 codes of 8,192; 64 layers of 62 heads of 64,
    # 12 billion parameters; 256 positions of text from 16,384 tokens; batches of 512 and 1,024,
    # three million steps and 430,000.
    "paper": Config(
        size=256,
        encoder=TextConfig(tokenizer="bpe", vocab_size=16_384, max_words=256, width=3968),
        optim=OptimConfig(
            lr=4.5e-4, beta1=0.9, beta2=0.96, weight_decay=4.5e-2, warmup=5000, grad_clip=4.0
        ),
        train=TrainConfig(
            max_steps=3_430_000, batch_size=1024, checkpoint_every=2000, sample_every=10_000
        ),
        codec_share=3_000_000 / 3_430_000,
        codec_optim=OptimConfig(
            lr=1e-4, beta2=0.999, weight_decay=1e-4, warmup=0, grad_clip=0.0, ema_decay=0.999
        ),
        codec_batch_size=512,
        cache_size=200_000,
        codec=DVAEConfig(),
        model=PriorConfig(
            transformer=TransformerConfig(width=3968, num_layers=64, num_heads=62),
            text_len=256,
            cond_drop_prob=0.0,
        ),
    ),
}


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`codec`, `prior`."""
    return codec_and_prior(config, DVAE, {"config": config.codec}, tokenizer)
