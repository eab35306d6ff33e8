"""What `vqvae`, `dalle` and `vqgan` share: a codec, the codes of the data, and their prior."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

from lineage.config import OptimConfig, RunConfig, at_least, to_dict
from lineage.errors import UserError
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import Tokenizer
from lineage.train.stage import Stage, content
from lineage.vqvae.codec import Codec, Codes
from lineage.vqvae.dalle import Prior, PriorConfig

CODEC, CODES, PRIOR = "codec", "codes", "prior"


@dataclass(frozen=True)
class CodesConfig(RunConfig):
    """A run of a codec and its prior. Recipes add `codec`, the codec's configuration.

    Attributes:
        codec_share: of the budget, for the codec.
        codec_optim, codec_batch: how it is trained.
        kept: pictures whose codes are kept between the two.
        model: the prior.
    """

    codec_share: float = 0.3
    codec_optim: OptimConfig = field(default_factory=OptimConfig)
    codec_batch: int = 32
    kept: int = 8192
    model: PriorConfig = field(default_factory=PriorConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.codec_share < 1:
            raise UserError(f"codec_share={self.codec_share} must be between 0 and 1.")
        for name in ("codec_batch", "kept"):
            at_least(name, getattr(self, name), 1)


def checked_side(size: int, factor: int) -> None:
    """Raises `UserError` if pictures of `size` do not divide into places of `factor` pixels."""
    if size % factor:
        raise UserError(
            f"size={size} does not divide into places of {factor} pixels: choose a multiple of it."
        )


def codec_stages(
    config: CodesConfig, tokenizer: Tokenizer, build: Callable[[], Codec]
) -> list[Stage]:
    """`codec`, `codes`, `prior`. The codes are found in one look at `kept` pictures."""
    settings: dict[str, Any] = to_dict(config)
    train = replace(config.train, batch=config.codec_batch, sample_every=0)
    look = replace(train, minutes=None, steps=None, pictures=config.kept, batch=64)
    return [
        Stage(
            name=CODEC,
            build=lambda made: build(),
            optim=config.codec_optim,
            train=train,
            settings={"codec": settings["codec"]},
            share=config.codec_share,
        ),
        Stage(
            name=CODES,
            build=lambda made: Codes(cast(Codec, made[CODEC]), config.size, config.kept),
            optim=replace(config.codec_optim, average=0.0),
            train=look,
            settings={"kept": config.kept},
            needs=(CODEC,),
        ),
        Stage(
            name=PRIOR,
            build=lambda made: Prior(
                config.model,
                cast(Codes, made[CODES]),
                make_encoder(config.text, config.encoder, tokenizer),
                config.size,
            ),
            optim=config.optim,
            train=config.train,
            settings=content(config),
            needs=(CODES,),
            share=1 - config.codec_share,
        ),
    ]
