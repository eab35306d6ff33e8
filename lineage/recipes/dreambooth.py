"""Recipe `dreambooth`: a diffusion model, and its fine-tuning on a few pictures of a subject."""

from __future__ import annotations

from dataclasses import field, replace
from itertools import cycle, islice
from typing import Any

from tqdm import tqdm

from lineage.config import OptimConfig, configuration
from lineage.data import load_dataset
from lineage.data.contract import CaptionedDataset, to_bytes
from lineage.data.prior import WithPrior
from lineage.diffusion.adapters.dreambooth import DreamBoothConfig, DreamBoothModel
from lineage.diffusion.adapters.lora import LoRAConfig
from lineage.diffusion.model import DiffusionModel
from lineage.errors import UserError
from lineage.recipes import ldm, lora
from lineage.recipes.adapters import AdapterRun, adapter_stages, check_size, preset_of
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Stage


@configuration
class Config(AdapterRun):
    """A run of DreamBooth.

    Attributes:
        adapter: Prior preservation.
        lora: Sizes of the low-rank adapter, for `adapter.use_lora`.
    """

    adapter: DreamBoothConfig = field(default_factory=DreamBoothConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)


PRESETS = {
    # Seconds, for tests: every part is there, at its smallest.
    "smoke": preset_of(
        Config,
        ldm.PRESETS["smoke"],
        base_share=0.6,
        adapter=DreamBoothConfig(num_prior=8),
        adapter_optim=OptimConfig(lr=1e-3, warmup=5),
        lora=lora.PRESETS["smoke"].adapter,
    ),
    # Minutes on two CPU cores.
    "tiny": preset_of(
        Config,
        ldm.PRESETS["tiny"],
        adapter=DreamBoothConfig(),
        adapter_optim=OptimConfig(lr=5e-4, warmup=50, ema_decay=0.99),
        lora=lora.PRESETS["tiny"].adapter,
    ),
    # One GPU of 8 GB, under an hour.
    "small": preset_of(
        Config,
        ldm.PRESETS["small"],
        adapter=DreamBoothConfig(num_prior=1000),
        adapter_optim=OptimConfig(lr=1e-4, warmup=100, ema_decay=0.999),
        lora=lora.PRESETS["small"].adapter,
    ),
    # Section 4 gives 1e-5 for Imagen; 5e-6, batches of one pair and 800 steps are those of
    # diffusers' script for Stable Diffusion v1, whose class pictures are 200 of "a photo of dog".
    "paper": preset_of(
        Config,
        replace(
            ldm.PRESETS["paper"],
            train=replace(ldm.PRESETS["paper"].train, batch_size=2, max_steps=800),
        ),
        adapter=DreamBoothConfig(num_prior=200, prior_captions=("a photo of dog",)),
        adapter_optim=OptimConfig(
            lr=5e-6, beta2=0.999, warmup=0, decay="none", weight_decay=1e-2, ema_decay=0.0
        ),
        lora=lora.PRESETS["paper"].adapter,
    ),
}


def fine_tuned(
    base: DiffusionModel, config: DreamBoothConfig, lora: LoRAConfig | None, size: int
) -> DreamBoothModel:
    """The base, and a network that is still the same.

    Raises:
        UserError: the base draws at another size.
    """
    check_size(base, size)
    return DreamBoothModel(base, config, lora or LoRAConfig())


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`autoencoder`, `base`, `adapter`.

    Raises:
        UserError: the batch size is odd.
    """
    adapter, size, seed = config.adapter, config.size, config.seed
    if adapter.prior_weight > 0 and config.train.batch_size % 2:
        raise UserError(
            f"train.batch_size={config.train.batch_size} must be even, since every second picture "
            "is of the class; or set adapter.prior_weight=0."
        )

    def with_prior(dataset: CaptionedDataset, model: Any) -> CaptionedDataset:
        """Every second picture of a batch is one that the base has drawn."""
        if adapter.prior_weight == 0:
            return dataset
        texts = adapter.prior_captions or load_dataset(
            adapter.prior_data, "train", size, seed
        ).all_captions(adapter.num_prior)
        captions = list(islice(cycle(texts), adapter.num_prior))
        with tqdm(
            total=len(captions), desc="drawing the class", unit=" pictures", disable=None
        ) as bar:
            pictures = model.base.generate(captions, seed=seed, progress=bar.update)
        return WithPrior(dataset, to_bytes(pictures).cpu(), captions)

    arguments = {
        "config": adapter,
        "lora": config.lora if adapter.use_lora else None,
        "size": size,
    }
    return adapter_stages(config, tokenizer, fine_tuned, arguments, with_prior)
