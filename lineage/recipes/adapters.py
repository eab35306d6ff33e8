"""What the recipes of adapters share: a base, which is a latent diffusion model unless `--from
base=RUN` names another diffusion model, and a stage that trains the adapter on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field, fields
from typing import Any, TypeVar

from lineage.bounds import Share
from lineage.config import OptimConfig, configuration
from lineage.data.cached import CachedDataset
from lineage.data.contract import CaptionedDataset
from lineage.diffusion.adapters.adapted import ADAPTER, AdaptedModel
from lineage.diffusion.ldm import LatentSpace
from lineage.diffusion.model import DiffusionModel
from lineage.errors import UserError
from lineage.plan import BASE
from lineage.recipes import ldm
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Prepare, Stage

C = TypeVar("C", bound="AdapterRun")


@configuration
class AdapterRun(ldm.Config):
    """A run of an adapter. The fields of `ldm.Config` are those of a base that is trained here.

    Attributes:
        base_share: Share of the budget that a base gets which is trained here.
        adapter_optim: Optimiser of the adapter.
    """

    base_share: Share = 0.8
    adapter_optim: OptimConfig = field(default_factory=OptimConfig)


def preset_of(kind: type[C], base: ldm.Config, **changes: Any) -> C:
    """A preset of `ldm`, and an adapter's fields."""
    return kind(**{one.name: getattr(base, one.name) for one in fields(base)}, **changes)


def adapter_stages(
    config: AdapterRun,
    tokenizer: Tokenizer,
    build: Callable[..., AdaptedModel],
    arguments: Mapping[str, Any],
    prepare: Prepare | None = None,
) -> list[Stage]:
    """Stages `autoencoder`, `base`, `adapter`; with `--from base=RUN`, the last alone.

    Args:
        build: Function that returns the base with its adapter, from `base` and `arguments`.
        prepare: Function that wraps the data set, before its latents are cached.
    """

    def prepared(dataset: CaptionedDataset, model: AdaptedModel) -> CaptionedDataset:
        dataset = dataset if prepare is None else prepare(dataset, model)
        return with_latents(dataset, model, config.cache_size)

    autoencoder, base = ldm.stages(config, tokenizer)
    base.name = BASE
    for stage in (autoencoder, base):
        stage.share *= config.base_share
    adapter = Stage(
        ADAPTER,
        build,
        {BASE: base, **arguments},
        optim=config.adapter_optim,
        optim_setting="adapter_optim",
        train=config.train,
        share=1 - config.base_share,
        prepare=prepared,
    )
    return [autoencoder, base, adapter]


def check_size(base: DiffusionModel, size: int) -> None:
    """Raise `UserError` if the base draws at another size than the run's."""
    if base.size != size:
        raise UserError(
            f"size={size} is not the size of the base, which draws {base.size} pixels: add --set "
            f"size={base.size}."
        )


def with_latents(
    dataset: CaptionedDataset, model: AdaptedModel, cache_size: int
) -> CaptionedDataset:
    """The data set with the moments of each picture's latents, where the base has latents; their
    scale stays the base's.
    """
    if not isinstance(model.space, LatentSpace):
        return dataset
    return CachedDataset(dataset, "latents", model.space.moments, cache_size)
