"""A data set in whose batches every second picture is one of another set, as DreamBooth trains on
pictures of a subject and of its class at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lineage.data.contract import Batch, CaptionedDataset, Example, to_unit
from lineage.errors import UserError


class WithPrior(CaptionedDataset):
    """`dataset` in rows 0, 2, 4, ... of each batch, and other pictures in rows 1, 3, 5, ...

    Args:
        dataset: Pictures of the subject, all of one shape.
        pictures: (N, 3, S, S) uint8, the other pictures.
        captions: Their N captions.

    Raises:
        UserError: the data set has pictures of several shapes.
    """

    def __init__(
        self, dataset: CaptionedDataset, pictures: Tensor, captions: Sequence[str]
    ) -> None:
        if len(dataset.parts) > 1:
            raise UserError(
                "Prior pictures are squares, and the data has other shapes: leave crop=buckets out."
            )
        self.dataset, self.pictures, self.captions = dataset, pictures, list(captions)
        self.name, self.split, self.size = dataset.name, dataset.split, dataset.size
        self.skipped, self.endless, self.varies = dataset.skipped, dataset.endless, dataset.varies

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        return self.dataset[index]

    def batch(self, indices: Sequence[int], epochs: Sequence[int], seed: int) -> Batch:
        own = self.dataset.batch(indices[::2], epochs[::2], seed)
        visits = zip(indices[1::2], epochs[1::2], strict=True)
        rows = [(epoch * len(self) + index) % len(self.pictures) for index, epoch in visits]
        order = [row for pair in zip(range(len(own)), range(len(own), 2 * len(own)), strict=True)
                 for row in pair][: len(indices)]  # fmt: skip
        images = torch.cat([own.image, to_unit(self.pictures[rows])])[order]
        captions = [*own.caption, *(self.captions[row] for row in rows)]
        ids = [*own.id, *(f"prior/{row}" for row in rows)]
        return Batch(images, [captions[i] for i in order], None, [ids[i] for i in order])
