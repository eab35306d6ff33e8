"""The memory of what was found out about pictures: against a dictionary."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lineage.nn.memory import Memory


def value_of(name: str, shape: tuple[int, ...] = (2, 3)) -> Tensor:
    """A value that the name decides."""
    stream = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape, generator=stream)


def values_of(names: list[str]) -> Tensor:
    return torch.stack([value_of(name) for name in names])


def filled(names: list[str], kept: int = 6) -> Memory:
    memory = Memory(kept, (2, 3))
    memory.keep(names, values_of(names))
    return memory


@pytest.mark.parametrize("kept", [1, 2, 3, 5, 6, 20])
def test_a_memory_is_a_dictionary_that_is_full_at_some_point(kept: int) -> None:
    """The first of each name stays, in batches of any size, with names seen again among them."""
    batches = [["a", "b"], ["b", "c", "a", "c"], ["d"], ["e", "f", "a"], ["g", "d"]]
    memory, known = Memory(kept, (2, 3)), dict[str, Tensor]()
    for number, names in enumerate(batches):
        given = torch.stack([value_of(f"{name}{number}") for name in names])
        memory.keep(names, given)
        for name, value in zip(names, given, strict=True):
            if len(known) < kept:
                known.setdefault(name, value)
        assert int(memory.count) == len(known)
        for name in "abcdefg":
            found = memory.recall([name])
            assert (found is None) == (name not in known), name
            if found is not None:
                assert torch.equal(found[0], known[name])


@pytest.mark.parametrize("names", [["a", "b", "c"], ["c", "a"], ["b"], ["b", "b", "a", "b"]])
def test_values_come_in_the_order_asked_for(names: list[str]) -> None:
    found = filled(["a", "b", "c"]).recall(names)
    assert found is not None and torch.equal(found, values_of(names))


@pytest.mark.parametrize("names", [["a", "x"], ["x", "a"], ["x"], ["a", "b", "c", "x", "a"]])
def test_one_that_is_not_known_is_enough_for_none(names: list[str]) -> None:
    """And asking keeps nothing."""
    memory = filled(["a", "b", "c"])
    assert memory.recall(names) is None and int(memory.count) == 3


def test_the_first_picture_kept_is_known_too() -> None:
    """Row 0 is a row, and what is empty is no picture, whatever its name."""
    memory = Memory(3, (2, 3))
    assert all(memory.recall([name]) is None for name in ("a", "0", ""))
    memory.keep(["a"], values_of(["a"]))
    assert memory.recall(["a"]) is not None and memory.recall(["0"]) is None


def test_names_of_all_kinds_are_told_apart() -> None:
    """Empty, long, of other letters, alike but for a blank; thousands of them do not meet."""
    odd = ["", " ", "0", "00", "a/b", "a", "b", "picture 1", "picture 11", "é", "绘", "x" * 5000]
    names = [*odd, *(f"shapes/{k}" for k in range(3000))]
    memory = Memory(len(names), ())
    memory.keep(names, torch.arange(len(names)).float())
    assert int(memory.count) == len(names) == len(memory.names.unique())
    assert (memory.names >= 0).all()
    found = memory.recall(names[::-1])
    assert found is not None and found.tolist() == list(range(len(names)))[::-1]


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(), (3,), (4, 2, 2)], ids=str)
def test_values_keep_their_kind(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Whole numbers from where codes come from, and pictures' latents."""
    memory, given = Memory(4, shape, dtype), (100 * torch.randn(3, *shape)).long().float()
    memory.keep(["a", "b", "c"], given)
    found = memory.recall(["c", "a"])
    assert found is not None and found.dtype == dtype and found.shape == (2, *shape)
    assert torch.equal(found.float(), given[[2, 0]])


def test_what_is_kept_is_a_copy() -> None:
    given = values_of(["a"])
    memory = Memory(2, (2, 3))
    memory.keep(["a"], given)
    given.zero_()
    assert torch.equal(memory.recall(["a"]), values_of(["a"]))  # type: ignore[arg-type]


def test_as_many_values_as_names_are_asked_for() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        Memory(4, (2, 3)).keep(["a", "b", "c"], values_of(["a", "b"]))


# --- the state --------------------------------------------------------------------------------


@pytest.mark.parametrize("within", [False, True], ids=["alone", "as a part"])
def test_another_process_finds_the_same(within: bool) -> None:
    """By what is saved; what was known before is forgotten."""
    one, two = filled(["a", "b", "c"]), filled(["x", "y", "z", "w"])
    if within:
        nn.ModuleDict({"m": two}).load_state_dict(nn.ModuleDict({"m": one}).state_dict())
    else:
        two.load_state_dict(one.state_dict())
    found = two.recall(["c", "a"])
    assert found is not None and torch.equal(found, values_of(["c", "a"]))
    assert all(two.recall([name]) is None for name in "xyzw")
    two.keep(["d", "a", "e"], values_of(["d", "a", "e"]))
    assert int(two.count) == 5
    assert torch.equal(two.recall(list("abcde")), values_of(list("abcde")))  # type: ignore[arg-type]


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_memory_that_is_loaded_goes_on_alike(stop: int) -> None:
    """To the bit, wherever it stopped."""
    batches = [["a", "b"], ["c", "a"], ["d", "e"], ["f", "g", "h"]]
    whole, first, second = (Memory(6, (2, 3)) for _ in range(3))
    for number, names in enumerate(batches):
        whole.keep(names, values_of(names))
        if number == stop:
            second.load_state_dict(first.state_dict())
        (first if number < stop else second).keep(names, values_of(names))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert set(whole.state_dict()) == {"names", "values", "count"}


def test_there_is_room_for_none_until_the_first_is_kept() -> None:
    """A run that only draws needs no memory; then for all of them at once."""
    memory = Memory(10**9, (4, 64, 64))
    assert sum(buffer.numel() for buffer in memory.buffers()) == 1
    assert memory.recall(["a"]) is None
    memory = Memory(5, (2, 3))
    memory.keep(["a"], values_of(["a"]))
    assert memory.values.shape == (5, 2, 3) and memory.names.shape == (5,)
    assert memory.kept == 5


def test_a_state_of_before_the_first_is_loaded_too() -> None:
    """Into a memory that holds something, which it forgets; and it can be filled again."""
    two = filled(["x", "y"])
    two.load_state_dict(Memory(6, (2, 3)).state_dict())
    assert int(two.count) == 0 and two.recall(["x"]) is None
    two.keep(list("abcdefgh"), values_of(list("abcdefgh")))
    assert int(two.count) == 6 and two.recall(["f"]) is not None and two.recall(["g"]) is None


@pytest.mark.parametrize("shape", [(3, 2), (2,), (2, 3, 1)], ids=str)
def test_a_state_of_other_values_is_refused(shape: tuple[int, ...]) -> None:
    """Latents of other sizes are of another autoencoder."""
    other = Memory(6, shape)
    other.keep(["a"], torch.zeros(1, *shape))
    with pytest.raises(RuntimeError, match="size mismatch"):
        filled(["x"]).load_state_dict(other.state_dict())


def test_a_copy_loads_into_itself() -> None:
    """Not into the one that it was copied from."""
    one = filled(["a", "b"])
    two = copy.deepcopy(one)
    two.load_state_dict(filled(["x", "y"]).state_dict())
    assert two.recall(["x"]) is not None and two.recall(["a"]) is None
    assert one.recall(["a"]) is not None and one.recall(["x"]) is None


def test_a_memory_has_nothing_to_learn() -> None:
    memory = filled(["a"])
    assert not list(memory.parameters()) and len(list(memory.buffers())) == 3
