"""Recipe `vqvae`: a VQ-VAE, the codes of the data, and the transformer that writes them."""

from __future__ import annotations

from dataclasses import dataclass, field

from lineage.config import OptimConfig, TextConfig, TrainConfig
from lineage.recipes.codes_prior import CodesConfig, checked_side, codec_stages
from lineage.text.tokenizer import Tokenizer
from lineage.train.stage import Stage
from lineage.vqvae.dalle import PriorConfig
from lineage.vqvae.quantise import QuantiserConfig
from lineage.vqvae.transformer import TransformerConfig
from lineage.vqvae.vqvae import VQVAE, VQVAEConfig


@dataclass(frozen=True)
class Config(CodesConfig):
    """A run of `vqvae`."""

    codec: VQVAEConfig = field(default_factory=VQVAEConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_side(self.size, self.codec.factor)


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
        model=PriorConfig(TransformerConfig(16, 2, 2), places=8),
    ),
    # Minutes on two CPU cores.
    "tiny": Config(
        key="vqvae",
        preset="tiny",
        size=32,
        encoder=TextConfig(width=128),
        optim=OptimConfig(lr=2e-3, warmup=100, average=0.99),
        train=TrainConfig(minutes=5, batch=32, checkpoint_every=500, sample_every=1000),
        codec_share=0.15,
        codec_optim=OptimConfig(lr=4e-3, warmup=50, average=0.99, weight_decay=0.0),
        codec_batch=32,
        codec=VQVAEConfig(QuantiserConfig(256, 16), 64, 32, 2),
        model=PriorConfig(TransformerConfig(128, 5, 4), places=16, temperature=0.8, guidance=2.0),
    ),
}


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`codec`, `codes`, `prior`."""
    return codec_stages(config, tokenizer, lambda: VQVAE(config.codec))
