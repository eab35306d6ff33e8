"""Recipe `vqgan`: a VQGAN, the codes of the data, and the transformer that writes them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from lineage.config import OptimConfig, TextConfig, TrainConfig
from lineage.nn.autoencoder import AutoencoderConfig
from lineage.recipes.codes_prior import CodesConfig, checked_side, codec_stages
from lineage.text.tokenizer import Tokenizer
from lineage.train.stage import Stage
from lineage.vqvae.dalle import PriorConfig
from lineage.vqvae.quantise import QuantiserConfig
from lineage.vqvae.transformer import TransformerConfig
from lineage.vqvae.vqgan import VQGAN, VQGANConfig


@dataclass(frozen=True)
class Config(CodesConfig):
    """A run of `vqgan`."""

    codec: VQGANConfig = field(default_factory=VQGANConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_side(self.size, self.codec.factor)

    def without_files(self) -> Config:
        return replace(self, codec=replace(self.codec, lpips=()))


PRESETS = {
    # Seconds, for tests: every part is there, at its smallest.
    "smoke": Config(
        key="vqgan",
        preset="smoke",
        size=16,
        encoder=TextConfig(width=16),
        optim=OptimConfig(lr=2e-3, warmup=10),
        train=TrainConfig(steps=20, batch=8, checkpoint_every=10, sample_every=20, log_every=5),
        codec_optim=OptimConfig(lr=2e-3, warmup=10, average=0.9),
        codec_batch=8,
        kept=16,
        codec=VQGANConfig(
            AutoencoderConfig(8, (1, 2, 2), 1, (4,), 16, 8), QuantiserConfig(16, 8), 4, 2
        ),
        model=PriorConfig(TransformerConfig(16, 2, 2), places=8),
    ),
    # Minutes on two CPU cores.
    "tiny": Config(
        key="vqgan",
        preset="tiny",
        size=32,
        encoder=TextConfig(width=128),
        optim=OptimConfig(lr=2e-3, warmup=100, average=0.99),
        train=TrainConfig(minutes=5, batch=32, checkpoint_every=500, sample_every=1000),
        codec_share=0.3,
        codec_optim=OptimConfig(lr=2e-3, warmup=50, average=0.99, weight_decay=0.0),
        codec_batch=32,
        codec=VQGANConfig(
            AutoencoderConfig(16, (1, 2, 4), 1, (), 32, 32), QuantiserConfig(256, 16), 16, 2
        ),
        model=PriorConfig(TransformerConfig(128, 5, 4), places=16, temperature=0.8, guidance=2.0),
    ),
}


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`codec`, `codes`, `prior`."""
    return codec_stages(config, tokenizer, lambda: VQGAN(config.codec, config.size))
