"""Recipe `lora`: a diffusion model, and a low-rank adapter of it."""

from __future__ import annotations

from dataclasses import field

from lineage.config import OptimConfig, configuration
from lineage.diffusion.adapters.lora import ATTENTION, LoRAConfig, LoRAModel
from lineage.diffusion.model import DiffusionModel
from lineage.recipes import ldm
from lineage.recipes.adapters import AdapterRun, adapter_stages, check_size, preset_of
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Stage

EVERYWHERE = (*ATTENTION, "proj_in", "proj_out", "conv_in", "conv_out", "conv1", "conv2", "conv")
"""The layers of an attention, and the convolutions."""


@configuration
class Config(AdapterRun):
    """A run of LoRA.

    Attributes:
        adapter: Sizes of the adapter.
    """

    adapter: LoRAConfig = field(default_factory=LoRAConfig)


PRESETS = {
    # Seconds, for tests: every part is there, at its smallest.
    "smoke": preset_of(
        Config,
        ldm.PRESETS["smoke"],
        base_share=0.6,
        adapter=LoRAConfig(rank=2, alpha=2.0, target_modules=EVERYWHERE),
        adapter_optim=OptimConfig(lr=2e-3, warmup=5),
    ),
    # Minutes on two CPU cores. A texture is beyond the attention of so small a network, and beyond
    # rank 1 (results/lora/style.md).
    "tiny": preset_of(
        Config,
        ldm.PRESETS["tiny"],
        adapter=LoRAConfig(rank=4, alpha=4.0, target_modules=EVERYWHERE),
        adapter_optim=OptimConfig(lr=2e-3, warmup=50, weight_decay=0.0, ema_decay=0.99),
    ),
    # One GPU of 8 GB, under an hour.
    "small": preset_of(
        Config,
        ldm.PRESETS["small"],
        adapter=LoRAConfig(rank=8, alpha=8.0, target_modules=EVERYWHERE),
        adapter_optim=OptimConfig(lr=5e-4, warmup=100, weight_decay=0.0, ema_decay=0.999),
    ),
    # Rank, factor, layers and rate of diffusers' script: 797,184 parameters of Stable Diffusion v1.
    "paper": preset_of(
        Config,
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
    check_size(base, size)
    return LoRAModel(base, config)


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`autoencoder`, `base`, `adapter`."""
    arguments = {"config": config.adapter, "size": config.size}
    return adapter_stages(config, tokenizer, adapted, arguments)
