"""What was found out about pictures, kept by their names, so that it is found out once.

Axes: K pictures kept, B asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lineage.nn.noise import stream_seed


class Memory(nn.Module):
    """A table of the first `kept` pictures that it is told of.

    Args:
        kept: K.
        shape: of what is kept of each.
        dtype: of it.
    """

    def __init__(self, kept: int, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.kept = kept
        # there is room for none until the first is kept: a run that only draws needs no memory
        self.register_buffer("names", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("values", torch.zeros(0, *shape, dtype=dtype))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.names: Tensor
        self.values: Tensor
        self.count: Tensor
        self._rows: dict[int, int] = {}
        self.register_load_state_dict_pre_hook(_make_room)
        self.register_load_state_dict_post_hook(lambda module, _: module._index())

    def _index(self) -> None:
        names = self.names[: int(self.count)].tolist()
        self._rows = {name: row for row, name in enumerate(names)}

    def keep(self, names: Sequence[str], values: Tensor) -> None:
        """Keep the values (B, ...) of pictures that are new, as long as there is room."""
        if not len(self.names):
            self.names = self.names.new_zeros(self.kept)
            self.values = self.values.new_zeros(self.kept, *self.values.shape[1:])
        for name, value in zip(map(_number, names), values, strict=True):
            at = int(self.count)
            if name not in self._rows and at < len(self.names):
                self.names[at], self.values[at] = name, value.to(self.values.dtype)
                self._rows[name] = at
                self.count += 1

    def recall(self, names: Sequence[str]) -> Tensor | None:
        """The values (B, ...) of pictures, or None if one of them is not known."""
        rows = [self._rows.get(_number(name), -1) for name in names]
        if min(rows) < 0:
            return None
        return self.values[torch.tensor(rows).to(self.values.device)]


def _make_room(module: Memory, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Before weights are loaded: as many rows as they have."""
    for name in ("names", "values"):
        saved = state.get(prefix + name)
        own = getattr(module, name)
        if saved is not None and saved.shape[1:] == own.shape[1:]:
            setattr(module, name, own.new_zeros(saved.shape))


def _number(name: str) -> int:
    """A picture's name as 63 bits."""
    return stream_seed("kept", name)
