"""Recipe `vqgan`: a VQGAN, the codes of the data, and the transformer that writes them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from lineage.config import OptimConfig, TextConfig, TrainConfig
from lineage.errors import UserError
from lineage.nn.autoencoder import AutoencoderConfig
from lineage.recipes.authors_codec import AUTHORS_OPTIM
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
from lineage.vqvae.vqgan import VQGAN, VQGANConfig


@dataclass(frozen=True)
class Config(CodesConfig):
    """A run of `vqgan`."""

    codec: VQGANConfig = field(default_factory=VQGANConfig)

    def with_codec_from(self, folder: str) -> Config:
        changed = super().with_codec_from(folder)
        return replace(changed, codec=replace(changed.codec, lpips=()))

    def without_files(self) -> Config:
        return replace(super().without_files(), codec=replace(self.codec, lpips=()))


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
        model=SMOKE_PRIOR,
    ),
    # Minutes on two CPU cores. The codec gets half of them: it has five times the arithmetic of
    # `vqvae`'s, and its loss asks for more than pixels.
    "tiny": Config(
        key="vqgan",
        preset="tiny",
        size=32,
        encoder=TextConfig(width=128),
        optim=OptimConfig("muon", lr=2e-3, warmup=100, average=0.99),
        train=TrainConfig(minutes=5, batch=32, checkpoint_every=500, sample_every=1000),
        codec_share=0.5,
        codec_optim=OptimConfig(lr=2e-3, warmup=50, average=0.99, weight_decay=0.0),
        codec_batch=16,
        codec=VQGANConfig(
            AutoencoderConfig(16, (1, 2, 2), 1, (), 32, 32), QuantiserConfig(64, 16), 16, 2
        ),
        model=TINY_PRIOR,
    ),
    # One GPU of 8 GB, under an hour: 64 codes of 8 x 8 pixels.
    "small": Config(
        key="vqgan",
        preset="small",
        size=64,
        encoder=TextConfig(width=256),
        optim=OptimConfig(lr=6e-4, warmup=500, average=0.999),
        train=TrainConfig(minutes=55, batch=128, checkpoint_every=1000, sample_every=2000),
        codec_share=0.4,
        codec_optim=OptimConfig(lr=6e-4, beta1=0.5, warmup=200, average=0.999, weight_decay=0.0),
        codec_batch=64,
        kept=65_536,
        codec=VQGANConfig(
            AutoencoderConfig(64, (1, 1, 2, 4), 1, (8,), 64, 128), QuantiserConfig(1024, 32), 32, 2
        ),
        model=SMALL_PRIOR,
    ),
    # The authors' configuration for ImageNet: 16 x 16 codes of 1,024, and their largest transformer
    # (24 layers, 1,024 wide). Their rate is 4.5e-6 for each picture of a batch, and the
    # discriminator counts after 250,000 steps; a prior over captions is not theirs.
    "paper": Config(
        key="vqgan",
        preset="paper",
        size=256,
        encoder=TextConfig(tokenizer="bpe", vocabulary=16_384, words=64, width=1024),
        optim=OptimConfig(lr=4.5e-6 * 32, beta2=0.95, average=0.0, warmup=0, decay="none"),
        train=TrainConfig(steps=1_000_000, batch=32, checkpoint_every=5000, sample_every=10_000),
        codec_share=0.5,
        codec_optim=AUTHORS_OPTIM,
        codec_batch=12,
        kept=200_000,
        codec=VQGANConfig(
            quantiser=QuantiserConfig(1024, 256, codebook="loss", start="normal", restart=0.0),
            adversary_from=250_001,
        ),
        model=PriorConfig(TransformerConfig(1024, 24, 16, "exact"), places=64, drop_text=0.1),
    ),
}


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`codec`, `codes`, `prior`.

    Raises:
        UserError: the pictures are smaller than a patch of the discriminator.
    """
    if config.size < 3 * 2**config.codec.layers:  # two convolutions of 4 x 4 follow
        raise UserError(
            f"size={config.size} is too small for codec.layers={config.codec.layers}, which needs "
            f"{3 * 2**config.codec.layers} pixels: choose fewer layers."
        )
    return codec_stages(config, tokenizer, lambda: VQGAN(config.codec))
