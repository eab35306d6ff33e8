"""Recipe `lora`: a latent diffusion model, or any diffusion model with `--from base=RUN`, and an
adapter of it.
"""

from __future__ import annotations

from dataclasses import field, fields
from typing import Any

from lineage.bounds import Share
from lineage.config import OptimConfig, configuration
from lineage.data.cached import CachedDataset
from lineage.data.contract import CaptionedDataset
from lineage.diffusion.adapters.adapted import AdaptedModel
from lineage.diffusion.adapters.lora import ATTENTION, LoRAConfig, LoRAModel
from lineage.diffusion.ldm import LatentSpace
from lineage.diffusion.model import DiffusionModel
from lineage.errors import UserError
from lineage.recipes import ldm
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Stage


EVERYWHERE = (*ATTENTION, "proj_in", "proj_out", "conv_in", "conv_out", "conv1", "conv2", "conv")
"""The layers of an attention, and the convolutions."""


@configuration
class Config(ldm.Config):
    """A run of an adapter. The fields of `ldm.Config` are those of a base that is trained here.

    Attributes:
        base_share: Share of the budget that a base gets which is trained here.
        adapter: Sizes of the adapter.
        adapter_optim: Optimiser of the adapter.
    """

    base_share: Share = 0.8
    adapter: LoRAConfig = field(default_factory=LoRAConfig)
    adapter_optim: OptimConfig = field(default_factory=OptimConfig)


def with_base(base: ldm.Config, **changes: Any) -> Config:
    """A preset of `ldm`, and an adapter's fields."""
    return Config(**{one.name: getattr(base, one.name) for one in fields(base)}, **changes)


PRESETS = {
    # Seconds, for tests: every part is there, at its smallest.
    "smoke": with_base(
        ldm.PRESETS["smoke"],
        base_share=0.6,
        adapter=LoRAConfig(rank=2, alpha=2.0, target_modules=EVERYWHERE),
        adapter_optim=OptimConfig(lr=2e-3, warmup=5),
    ),
    # Minutes on two CPU cores. A style that changes every pixel is beyond the attention of so small a
    # network: hatching 0.95 with it alone, 0.60 with convolutions (results/lora/style.md).
    "tiny": with_base(
        ldm.PRESETS["tiny"],
        adapter=LoRAConfig(rank=4, alpha=4.0, target_modules=EVERYWHERE),
        adapter_optim=OptimConfig(lr=2e-3, warmup=50, weight_decay=0.0, ema_decay=0.99),
    ),
    # One GPU of 8 GB, under an hour.
    "small": with_base(
        ldm.PRESETS["small"],
        adapter=LoRAConfig(rank=8, alpha=8.0, target_modules=EVERYWHERE),
        adapter_optim=OptimConfig(lr=5e-4, warmup=100, weight_decay=0.0, ema_decay=0.999),
    ),
    # Rank, factor, layers and rate of diffusers' script: 797,184 parameters of Stable Diffusion v1.
    "paper": with_base(
        ldm.PRESETS["paper"],
        adapter=LoRAConfig(rank=4, alpha=4.0, target_modules=ATTENTION),
        adapter_optim=OptimConfig(
            lr=1e-4, beta2=0.999, warmup=0, decay="none", weight_decay=1e-2, ema_decay=0.0
        ),
    ),
}


def adapted(base: DiffusionModel, config: LoRAConfig, size: int) -> LoRAModel:
    """The base with an adapter that changes nothing yet.

    Raises:
        UserError: the base draws at another size, or its layers have other names.
    """
    if base.size != size:
        raise UserError(
            f"size={size} is not the size of the base, which draws {base.size} pixels: add --set "
            f"size={base.size}."
        )
    return LoRAModel(base, config)


def with_latents(dataset: CaptionedDataset, model: AdaptedModel, cache_size: int) -> Any:
    """The data set with the moments of each picture's latents, where the base has latents."""
    if not isinstance(model.space, LatentSpace):
        return dataset
    return CachedDataset(dataset, "latents", model.space.moments, cache_size)


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`autoencoder`, `base`, `adapter`; with `--from base=RUN`, the last alone."""
    autoencoder, base = ldm.stages(config, tokenizer)
    base.name = "base"
    for stage in (autoencoder, base):
        stage.share *= config.base_share
    adapter = Stage(
        "adapter",
        adapted,
        {"base": base, "config": config.adapter, "size": config.size},
        optim=config.adapter_optim,
        optim_setting="adapter_optim",
        train=config.train,
        share=1 - config.base_share,
        prepare=lambda dataset, system: with_latents(dataset, system, config.cache_size),
    )
    return [autoencoder, base, adapter]
