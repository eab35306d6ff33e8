"""What `ldm` and `dit` share: an autoencoder, the latents of the data, and a denoiser of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

from lineage.config import OptimConfig, RunConfig, at_least, to_dict
from lineage.diffusion.ldm import KLAutoencoder, KLConfig, Latents
from lineage.errors import UserError
from lineage.nn.autoencoder import AutoencoderConfig
from lineage.system import Trainable
from lineage.text.contract import TextEncoder
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Stage, content

AUTOENCODER, LATENTS, DENOISER = "autoencoder", "latents", "denoiser"

# One autoencoder for both at each preset, so that comparing them compares their denoisers. At the
# small ones no adversary: its gain, sharp textures, is of no use to the flat pictures of `shapes`.
SMOKE_AUTOENCODER = KLConfig(
    AutoencoderConfig(8, (1, 2), 1, (), 16, 4),
    kl=1e-4,
    error="square",
    adversary=0.0,
    perceptual=0.0,
)
TINY_AUTOENCODER = KLConfig(
    AutoencoderConfig(32, (1, 2), 1, (), 32, 8, patch=2),
    width=8,
    kl=1e-3,
    error="square",
    adversary=0.0,
    perceptual=0.0,
)
SMALL_AUTOENCODER = KLConfig(
    AutoencoderConfig(64, (1, 2, 2), 2, (), 64, 8, patch=2),
    width=8,
    kl=1e-3,
    error="square",
    adversary=0.0,
    perceptual=0.0,
)


@dataclass(frozen=True)
class LatentConfig(RunConfig):
    """A run of an autoencoder and a denoiser of its latents.

    Attributes:
        autoencoder: its sizes and losses.
        autoencoder_share: of the budget, for it.
        autoencoder_optim, autoencoder_batch: how it is trained.
        kept: pictures whose latents are kept between the two.
    """

    autoencoder: KLConfig = field(default_factory=KLConfig)
    autoencoder_share: float = 0.1
    autoencoder_optim: OptimConfig = field(default_factory=OptimConfig)
    autoencoder_batch: int = 32
    kept: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.autoencoder_share < 1:
            raise UserError(f"autoencoder_share={self.autoencoder_share} must be between 0 and 1.")
        for name in ("autoencoder_batch", "kept"):
            at_least(name, getattr(self, name), 1)

    def without_files(self) -> LatentConfig:
        return replace(self, autoencoder=replace(self.autoencoder, lpips=()))


def latent_stages(
    config: LatentConfig,
    tokenizer: Tokenizer,
    build: Callable[[Latents, TextEncoder], Trainable],
) -> list[Stage]:
    """`autoencoder`, `latents`, `denoiser`.

    The latents are found in one look at `kept` pictures.
    """
    factor = config.autoencoder.factor
    if config.size % factor:  # here, so that size and autoencoder may be set in any order
        raise UserError(
            f"size={config.size} does not divide into places of {factor} pixels: choose a "
            "multiple of it."
        )
    own = config.autoencoder
    looked_at = own.adversary > 0 or (own.perceptual > 0 and not own.lpips)
    if looked_at and config.size < 3 * 2**own.layers:  # two convolutions of 4 x 4 follow
        raise UserError(
            f"size={config.size} is too small for autoencoder.layers={own.layers}, which needs "
            f"{3 * 2**own.layers} pixels: choose fewer layers."
        )
    settings: dict[str, Any] = to_dict(config)
    train = replace(config.train, batch=config.autoencoder_batch, sample_every=0)
    look = replace(train, minutes=None, steps=None, pictures=config.kept, batch=64)
    return [
        Stage(
            name=AUTOENCODER,
            build=lambda made: KLAutoencoder(config.autoencoder),
            optim=config.autoencoder_optim,
            train=train,
            settings={"autoencoder": settings["autoencoder"]},
            share=config.autoencoder_share,
        ),
        Stage(
            name=LATENTS,
            build=lambda made: Latents(
                cast(KLAutoencoder, made[AUTOENCODER]), config.size, config.kept
            ),
            optim=replace(config.autoencoder_optim, average=0.0),
            train=look,
            settings={"kept": config.kept},
            needs=(AUTOENCODER,),
            share=0.0,
        ),
        Stage(
            name=DENOISER,
            build=lambda made: build(
                cast(Latents, made[LATENTS]),
                make_encoder(config.text, config.encoder, tokenizer),
            ),
            optim=config.optim,
            train=config.train,
            settings=content(config),
            needs=(LATENTS,),
            share=1 - config.autoencoder_share,
        ),
    ]
