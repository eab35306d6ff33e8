"""Sheets of rows of different lengths: every picture is in its place, and the rest is white."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lineage.sheets import rows_sheet

MARGIN, LINE = 10, 17


def flat(colour: int, side: int = 8) -> Tensor:
    return torch.full((3, side, side), colour, dtype=torch.uint8)


@pytest.mark.parametrize("side", [40, 64])
def test_rows_lie_below_each_other(side: int) -> None:
    """The longest row defines the width of the sheet; the others end in white."""
    rows = [
        [("one", flat(10)), ("two", flat(60))],
        [("", flat(110)), ("a", flat(160)), ("b", flat(200))],
        [("last", flat(220))],
    ]
    sheet = np.asarray(rows_sheet(rows, side))
    step, top = side + MARGIN, MARGIN
    assert sheet.shape == (MARGIN + 3 * (side + LINE + 2 * MARGIN), 3 * step + MARGIN, 3)
    for row in rows:
        for column in range(3):
            left = MARGIN + column * step
            cell = sheet[top : top + side, left : left + side]
            colour = int(row[column][1][0, 0, 0]) if column < len(row) else 255
            assert (cell == colour).all(), (top, column)
            label = column < len(row) and row[column][0]
            below = sheet[top + side : top + side + LINE, left : left + side]
            assert (below < 128).any() == bool(label)
        top += side + LINE + 2 * MARGIN


def test_a_single_picture_is_a_sheet() -> None:
    sheet = np.asarray(rows_sheet([[("only", flat(0, 32))]], 32))
    assert (sheet[10:42, 10:42] == 0).all() and sheet.shape[1] == 32 + 2 * MARGIN
