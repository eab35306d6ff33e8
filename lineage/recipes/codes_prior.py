"""The part that the recipes `vqvae`, `dalle` and `vqgan` share: a codec, then a prior over its
codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, replace
from typing import Any

from torch import Tensor

from lineage.bounds import PositiveInt, Share
from lineage.config import OptimConfig, RunConfig, TrainConfig, configuration
from lineage.data.cached import CachedDataset
from lineage.data.contract import CaptionedDataset
from lineage.text.encoders import EncoderSpec
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Stage
from lineage.vqvae.ar_prior import Prior, PriorConfig, SamplingConfig
from lineage.vqvae.codec import Codec
from lineage.vqvae.transformer import TransformerConfig

# One prior for the three at each preset, so that comparing them compares their codecs.
SMOKE_PRIOR = PriorConfig(
    transformer=TransformerConfig(width=16, num_layers=2, num_heads=2), text_len=8
)
TINY_PRIOR = PriorConfig(
    transformer=TransformerConfig(width=128, num_layers=5, num_heads=4, gelu="exact"),
    text_len=16,
    sampling=SamplingConfig(temperature=0.5, guidance=2.0),
)
SMALL_PRIOR = PriorConfig(
    transformer=TransformerConfig(width=384, num_layers=8, num_heads=6),
    text_len=32,
    sampling=SamplingConfig(temperature=0.9, guidance=2.0),
)


@configuration
class CodesConfig(RunConfig):
    """A run of a codec and its prior. Recipes add `codec`, the codec's configuration.

    Attributes:
        codec_share: Share of the budget that the codec gets.
        codec_optim: Optimiser of the codec.
        codec_batch_size: Number of pictures of a step of the codec.
        cache_size: Number of pictures whose codes are cached for the prior.
        model: The prior.
    """

    codec_share: Share = 0.3
    codec_optim: OptimConfig = field(default_factory=OptimConfig)
    codec_batch_size: PositiveInt = 32
    cache_size: PositiveInt = 8192
    model: PriorConfig = field(default_factory=PriorConfig)


def codec_and_prior(
    config: CodesConfig,
    build: Callable[..., Codec],
    arguments: dict[str, Any],
    tokenizer: Tokenizer,
) -> list[Stage]:
    """Stages `codec` and `prior`.

    Args:
        config: The run.
        build: Function or class that returns the untrained codec.
        arguments: Keywords of `build`.
        tokenizer: Tokeniser of the captions.
    """
    codec_train = replace(config.train, batch_size=config.codec_batch_size)
    first = codec_stage(
        build, arguments, optim=config.codec_optim, train=codec_train, share=config.codec_share
    )
    encoder = EncoderSpec(config.text, config.encoder, tokenizer)
    second = Stage(
        "prior",
        prior,
        {"codec": first, "config": config.model, "encoder": encoder, "size": config.size},
        optim=config.optim,
        train=config.train,
        share=1 - config.codec_share,
        prepare=lambda dataset, system: with_codes(dataset, system, config.cache_size),
    )
    return [first, second]


def codec_stage(
    build: Callable[..., Codec],
    arguments: dict[str, Any],
    *,
    optim: OptimConfig,
    train: TrainConfig,
    share: float,
) -> Stage:
    """Stage `codec`, for these recipes and those that draw with its codec."""
    return Stage(
        "codec",
        build,
        arguments,
        optim=optim,
        optim_setting="codec_optim",
        train=replace(train, sample_every=0),
        share=share,
    )


def prior(codec: Codec, config: PriorConfig, encoder: EncoderSpec, size: int) -> Prior:
    """The untrained prior of a codec."""
    return Prior(config, codec, encoder.build(), size)


def with_codes(dataset: CaptionedDataset, prior: Prior, cache_size: int) -> CachedDataset:
    """The data set with the codes of each picture, found once by the prior's codec."""

    def encode(image: Tensor) -> Tensor:
        return prior.encode(image.to(prior.device))

    return CachedDataset(dataset, "codes", encode, cache_size)
