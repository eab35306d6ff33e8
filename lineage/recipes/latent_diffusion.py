"""Stages that the recipes `ldm` and `dit` share: an autoencoder, then a denoiser of its latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, replace

from lineage.bounds import PositiveInt, Share
from lineage.config import OptimConfig, RunConfig, configuration
from lineage.data.cached import CachedDataset
from lineage.data.contract import CaptionedDataset
from lineage.diffusion.ldm import (
    KLAutoencoder,
    KLConfig,
    LatentDiffusionModel,
    latent_scale,
)
from lineage.diffusion.model import DiffusionConfig
from lineage.diffusion.process import ProcessConfig
from lineage.errors import UserError
from lineage.nn.autoencoder import AutoencoderConfig
from lineage.text.encoders import EncoderSpec
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Stage

# As in `ddpm`: on a small budget the prediction of x_0 learns far faster than that of the noise.
SMALL_BUDGET = ProcessConfig(num_timesteps=1000, schedule="cosine", prediction="x0")

# One autoencoder for both systems at each preset, so that comparing them compares their denoisers.
# The small ones have no adversary: its gain, sharp textures, is of no use to the flat pictures of
# `shapes`.
SMOKE_AUTOENCODER = KLConfig(
    net=AutoencoderConfig(
        channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attn_resolutions=(),
        resolution=16,
        z_channels=4,
    ),
    kl_weight=1e-4,
    pixel_loss="l2",
    disc_weight=0.0,
    perceptual_weight=0.0,
)
TINY_AUTOENCODER = KLConfig(
    net=AutoencoderConfig(
        channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attn_resolutions=(),
        resolution=32,
        z_channels=8,
        patch_size=2,
    ),
    latent_channels=8,
    kl_weight=1e-3,
    pixel_loss="l2",
    disc_weight=0.0,
    perceptual_weight=0.0,
)
SMALL_AUTOENCODER = KLConfig(
    net=AutoencoderConfig(
        channels=64,
        channel_mult=(1, 2, 2),
        num_res_blocks=2,
        attn_resolutions=(),
        resolution=64,
        z_channels=8,
        patch_size=2,
    ),
    latent_channels=8,
    kl_weight=1e-3,
    pixel_loss="l2",
    disc_weight=0.0,
    perceptual_weight=0.0,
)


@configuration
class LatentConfig(RunConfig):
    """A run of an autoencoder and a denoiser of its latents. Recipes extend `model`.

    Attributes:
        autoencoder: Sizes and losses of the autoencoder.
        autoencoder_share: Share of the budget that the autoencoder gets.
        autoencoder_optim: Optimiser of the autoencoder.
        autoencoder_batch_size: Number of pictures of a step of the autoencoder.
        cache_size: Number of pictures whose latents are cached for the denoiser.
        model: The denoiser.
    """

    autoencoder: KLConfig = field(default_factory=KLConfig)
    autoencoder_share: Share = 0.1
    autoencoder_optim: OptimConfig = field(default_factory=OptimConfig)
    autoencoder_batch_size: PositiveInt = 32
    cache_size: PositiveInt = 8192
    model: DiffusionConfig = field(default_factory=DiffusionConfig)

    def without_files(self) -> LatentConfig:
        return replace(super().without_files(), autoencoder=replace(self.autoencoder, lpips=()))


def autoencoder_and_denoiser(
    config: LatentConfig, build: Callable[..., LatentDiffusionModel], tokenizer: Tokenizer
) -> list[Stage]:
    """Stages `autoencoder` and `denoiser`.

    Args:
        config: The run.
        build: Function that returns the untrained denoiser from `autoencoder`, `encoder`, `config`
            and `size`.
        tokenizer: Tokeniser of the captions.
    """
    first = Stage(
        "autoencoder",
        autoencoder,
        {"config": config.autoencoder, "size": config.size},
        optim=config.autoencoder_optim,
        optim_setting="autoencoder_optim",
        train=replace(config.train, batch_size=config.autoencoder_batch_size, sample_every=0),
        share=config.autoencoder_share,
    )
    encoder = EncoderSpec(config.text, config.encoder, tokenizer)
    second = Stage(
        "denoiser",
        build,
        {"autoencoder": first, "encoder": encoder, "config": config.model, "size": config.size},
        optim=config.optim,
        train=config.train,
        share=1 - config.autoencoder_share,
        prepare=lambda dataset, system: with_latents(dataset, system, config.cache_size),
    )
    return [first, second]


def autoencoder(config: KLConfig, size: int) -> KLAutoencoder:
    """The untrained autoencoder of pictures of one size.

    Raises:
        UserError: the side of the pictures does not divide into latents, or the pictures are
            smaller than a patch of the discriminator.
    """
    factor, layers = config.net.factor, config.disc_layers
    if size % factor:
        raise UserError(
            f"size={size} must be a multiple of {factor}, the side of a latent in pixels."
        )
    smallest = 3 * 2**layers  # the strided convolutions leave 3 x 3 for two more of 4 x 4
    discriminates = config.disc_weight > 0 or (config.perceptual_weight > 0 and not config.lpips)
    if discriminates and size < smallest:
        raise UserError(
            f"size={size} is too small for autoencoder.disc_layers={layers}, which needs "
            f"{smallest} pixels: choose fewer layers."
        )
    return KLAutoencoder(config)


def with_latents(
    dataset: CaptionedDataset, model: LatentDiffusionModel, cache_size: int
) -> CachedDataset:
    """The data set with the moments of each picture's latents; also measures the latents' scale."""
    cached = CachedDataset(dataset, "latents", model.space.moments, cache_size)
    model.space.scale.copy_(latent_scale(model.space, cached))
    return cached
