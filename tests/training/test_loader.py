"""The loader: every picture once an epoch, and batch n the same however it is read."""

from __future__ import annotations

import threading
import time
from itertools import islice

import pytest
import torch

from lineage.data.contract import Batch, CaptionedDataset, Example, to_unit
from lineage.errors import UserError
from lineage.training.loader import Loader


class Numbers(CaptionedDataset):
    """Picture i is filled with the value i and has three captions."""

    name, split, size = "numbers", "train", 2

    def __init__(self, count: int, endless: bool = False, broken: int | None = None) -> None:
        self.count, self.endless, self.broken = count, endless, broken
        self.skipped = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if index == self.broken:
            raise UserError(f"picture {index} cannot be read")
        captions = tuple(f"{index} {word}" for word in ("one", "two", "three"))
        return Example(str(index), torch.full((3, 2, 2), index, dtype=torch.uint8), captions)


def ids_of(batches: list[Batch]) -> list[int]:
    return [int(i) for batch in batches for i in batch.id]


def same(one: Batch, other: Batch) -> bool:
    return (
        torch.equal(one.image, other.image) and one.caption == other.caption and one.id == other.id
    )


def test_each_epoch_has_every_picture_once() -> None:
    """10 pictures in batches of 4: every third batch reaches from one epoch into the next."""
    loader = Loader(Numbers(10), 4, seed=0)
    order = ids_of([loader.at(n) for n in range(15)])
    epochs = [order[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert epochs[0] != list(range(10))


def test_a_batch_may_be_larger_than_the_data() -> None:
    batch = Loader(Numbers(3), 8, seed=0).at(0)
    assert len(batch) == 8
    assert sorted(batch.id[:3]) == sorted(batch.id[3:6]) == ["0", "1", "2"]


def test_image_caption_and_id_stay_together() -> None:
    batch = Loader(Numbers(10), 4, seed=0).at(1)
    for row in range(4):
        i = int(batch.id[row])
        assert batch.caption[row].startswith(f"{i} ")
        assert torch.equal(batch.image[row], to_unit(torch.full((3, 2, 2), i)))


def test_a_batch_is_a_function_of_seed_and_number() -> None:
    """In any order, by any loader: a resumed run depends on it."""
    first, second = Loader(Numbers(10), 4, seed=0), Loader(Numbers(10), 4, seed=0)
    ahead = [first.at(n) for n in (7, 2, 5)]
    assert all(same(a, second.at(n)) for a, n in zip(ahead, (7, 2, 5), strict=True))
    other = Loader(Numbers(10), 4, seed=1)
    assert ids_of([other.at(n) for n in range(5)]) != ids_of([first.at(n) for n in range(5)])


def test_captions_change_from_epoch_to_epoch() -> None:
    """All captions of a picture are read in time, not always the first."""
    loader = Loader(Numbers(4), 4, seed=0)
    read = [dict(zip(b.id, b.caption, strict=True)) for b in (loader.at(n) for n in range(20))]
    for i in range(4):
        assert {visit[str(i)] for visit in read} == set(Numbers(4)[i].captions)


@pytest.mark.parametrize("endless", [False, True])
@pytest.mark.parametrize(("batch", "world"), [(6, 2), (6, 3), (8, 4)])
def test_processes_share_out_the_whole_batch(endless: bool, batch: int, world: int) -> None:
    """Each row goes to exactly one process, in order."""
    whole = Loader(Numbers(10, endless), batch, seed=3)
    for number in range(5):
        parts = [
            Loader(Numbers(10, endless), batch, 3, rank, world).at(number) for rank in range(world)
        ]
        expected = whole.at(number)
        assert torch.equal(torch.cat([p.image for p in parts]), expected.image)
        assert [c for p in parts for c in p.caption] == expected.caption


def test_an_endless_world_is_read_from_the_start_without_repeats() -> None:
    loader = Loader(Numbers(5, endless=True), 4, seed=0)
    assert ids_of([loader.at(n) for n in range(6)]) == list(range(24))


@pytest.mark.parametrize("first", [0, 3])
def test_prefetching_changes_nothing(first: int) -> None:
    plain = list(islice(Loader(Numbers(10), 4, 0).batches(first), 9))
    ahead = Loader(Numbers(10), 4, 0, prefetch=3).batches(first)
    assert all(same(a, b) for a, b in zip(plain, islice(ahead, 9), strict=True))
    assert same(plain[0], Loader(Numbers(10), 4, 0).at(first))
    ahead.close()


def threads() -> int:
    return sum(t.is_alive() for t in threading.enumerate())


def test_prefetching_ends_when_training_does() -> None:
    """A thread that goes on reading would hold the data open and burn a core."""
    before = threads()
    batches = Loader(Numbers(10), 4, 0, prefetch=2).batches()
    next(batches)
    assert threads() == before + 1
    time.sleep(0.05)  # the worker now waits for room
    batches.close()
    assert threads() == before


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_of_the_data_comes_with_its_batch(prefetch: int) -> None:
    """Batches before it still come; then it is raised, not swallowed by the thread."""
    loader = Loader(Numbers(40, endless=True, broken=9), 4, 0, prefetch=prefetch)
    batches = loader.batches()
    assert ids_of([next(batches), next(batches)]) == list(range(8))
    with pytest.raises(UserError, match="picture 9 cannot be read"):
        next(batches)
