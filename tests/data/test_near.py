"""Near-duplicates against a loop over all pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lineage.data import near
from lineage.data.near import near_duplicates, thumbnail


def by_loop(
    rows: Tensor, splits: list[str], radius: float, within: bool, across: bool
) -> list[tuple[int, int]]:
    originals: list[int] = []
    copies = []
    for i in range(len(rows)):
        hits = [((rows[i] - rows[j]).norm().item(), j) for j in originals]
        hits = [hit for hit in hits if hit[0] <= radius]
        same = [hit for hit in hits if splits[hit[1]] == splits[i]]
        others = [hit for hit in hits if splits[hit[1]] != splits[i]]
        if found := (others if across else []) or (same if within else []):
            copies.append((i, min(found)[1]))
        elif not any(distance == 0 for distance, _ in same):
            originals.append(i)
    return copies


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("across", [False, True])
def test_same_as_a_loop(within: bool, across: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "BLOCK", 16)
    monkeypatch.setattr(near, "TARGETS", 7)
    base = torch.rand(30, 192) * 18
    rows = torch.cat([base + torch.randn_like(base) * 0.07 * k for k in range(6)])
    rows = torch.cat([rows, base])[torch.randperm(210)]
    splits = ["test" if i < 60 else "train" for i in range(210)]
    copies = near_duplicates(rows, splits, 4.0, within, across)
    pairs = [(copy.number, copy.original) for copy in copies]
    assert pairs == by_loop(rows, splits, 4.0, within, across)
    assert (len(pairs) > 20) == (within or across)


def test_a_row_of_small_changes_is_not_one_set_of_copies() -> None:
    rows = torch.zeros(5, 192)
    rows[:, 0] = torch.arange(5) * 3.0
    copies = list(near_duplicates(rows, ["train"] * 5, 4.0, True, False))
    assert [(copy.number, copy.original, copy.distance) for copy in copies] == [
        (1, 0, 3.0),
        (3, 2, 3.0),
    ]
    assert not list(near_duplicates(rows[:0], [], 4.0, True, False))


def test_a_near_picture_of_the_same_split_still_guards_its_own_copies() -> None:
    """The first two stay, and the third is near the second alone."""
    rows = torch.zeros(3, 192)
    rows[:, 0] = torch.tensor([0.0, 3.0, 6.0])
    (copy,) = near_duplicates(rows, ["test", "test", "train"], 4.0, False, True)
    assert copy == (2, 1, 3.0)


def test_distance_is_the_root_mean_square_in_levels() -> None:
    black = torch.zeros(3, 32, 32, dtype=torch.uint8)
    grey = black + 10
    half = black.clone()
    half[:, :16] = 10
    assert (thumbnail(grey) - thumbnail(black)).norm().item() == pytest.approx(10)
    assert (thumbnail(half) - thumbnail(black)).norm().item() == pytest.approx(50**0.5)
