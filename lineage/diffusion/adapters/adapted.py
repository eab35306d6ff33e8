"""A trained diffusion model with an adapter: the model is frozen, and the adapter alone is trained
and saved.

An adapter is trained on the system of another run, its base (`--from base=RUN`). All that a
`DiffusionModel` has, options of sampling among them, stays as it is; a subclass says how the
adapter enters the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lineage.diffusion.model import DiffusionModel
from lineage.errors import UserError
from lineage.system import Turn

ADAPTER = "adapter"
"""Name of the adapter in an adapted model, and of its parameter group."""


class AdaptedModel(DiffusionModel):
    """A frozen base and an adapter.

    Its state, `state_dict`, holds the adapter's tensors alone: those of the base belong to the run
    that it came from.

    Args:
        base: Trained model; it is frozen, and none of its tensors changes.
        network: Network of the base with the adapter.
        adapter: What is trained.
    """

    base: DiffusionModel

    def __init__(self, base: DiffusionModel, network: nn.Module, adapter: nn.Module) -> None:
        if isinstance(base, AdaptedModel):
            raise UserError(
                "The base of an adapter is an adapter itself: name the run that it was trained on."
            )
        base.requires_grad_(False)
        super().__init__(network, base.process, base.text, base.space, base.config)
        self.base, self.adapter = base, adapter
        self.register_state_dict_post_hook(_drop_base)
        self.register_load_state_dict_post_hook(_ignore_base)

    def groups(self) -> dict[str, list[nn.Module]]:
        return {ADAPTER: [self.adapter]}

    def turn(self, rows: Mapping[str, Tensor]) -> Turn:
        """That of the base, for the adapter."""
        return replace(super().turn(rows), group=ADAPTER)

    def train(self, mode: bool = True) -> AdaptedModel:
        """The base stays in evaluation mode."""
        super().train(mode)
        self.base.eval()
        return self

    def check_shape(self, height: int, width: int) -> None:
        self.base.check_shape(height, width)


def _drop_base(
    module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    own = f"{prefix}{ADAPTER}."
    for name in [name for name in state if not name.startswith(own)]:
        if name.startswith(prefix):
            del state[name]


def _ignore_base(module: nn.Module, incompatible: Any) -> None:
    missing = incompatible.missing_keys
    missing[:] = [name for name in missing if name.startswith(f"{ADAPTER}.")]
