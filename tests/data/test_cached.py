"""The cache of per-image tensors against a dictionary, and the data set that adds them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from lineage.data.cached import CHUNK, CachedDataset, FeatureCache, encode_in_chunks
from lineage.data.contract import CaptionedDataset, Example
from lineage.training.loader import Loader


def value_of(name: str, shape: tuple[int, ...] = (2, 3)) -> Tensor:
    """A value that the name decides."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))


def values_of(names: list[str]) -> Tensor:
    return torch.stack([value_of(name) for name in names])


# --- the cache --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 6, 20])
def test_a_cache_is_a_dictionary_until_it_is_full(size: int) -> None:
    """The first value of each id stays, in batches of any size, with repeated ids among them."""
    batches = [["a", "b"], ["b", "c", "a", "c"], ["d"], ["e", "f", "a"], ["g", "d"]]
    cache, expected = FeatureCache(size), dict[str, Tensor]()
    for number, names in enumerate(batches):
        values = torch.stack([value_of(f"{name}{number}") for name in names])
        cache.put(names, values)
        for name, value in zip(names, values, strict=True):
            if len(expected) < size:
                expected.setdefault(name, value)
        assert len(cache) == len(expected)
        for name in "abcdefg":
            cached = cache.get(name)
            assert (cached is None) == (name not in expected), name
            if cached is not None:
                assert torch.equal(cached, expected[name])


def test_get_adds_nothing() -> None:
    cache = FeatureCache(4)
    cache.put(["a"], values_of(["a"]))
    assert all(cache.get(name) is None for name in ("x", "0", "")) and len(cache) == 1


def test_ids_of_all_kinds_are_distinct() -> None:
    """Empty, long, in other scripts, different by one blank; thousands of them do not collide."""
    odd = ["", " ", "0", "00", "a/b", "a", "b", "picture 1", "picture 11", "é", "绘", "x" * 5000]
    names = [*odd, *(f"shapes/{k}" for k in range(3000))]
    cache = FeatureCache(len(names))
    cache.put(names, torch.arange(len(names)))
    assert len(cache) == len(names)
    assert [int(cache.get(name)) for name in names] == list(range(len(names)))  # type: ignore[arg-type]


def test_a_cached_value_is_a_copy() -> None:
    values, cache = values_of(["a"]), FeatureCache(2)
    cache.put(["a"], values)
    values.zero_()
    cached = cache.get("a")
    assert cached is not None and torch.equal(cached, value_of("a"))
    assert cached.untyped_storage().nbytes() == cached.nbytes  # holds no other picture's value


def test_a_cache_takes_as_many_values_as_ids() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        FeatureCache(4).put(["a", "b", "c"], values_of(["a", "b"]))


# --- the data set -----------------------------------------------------------------------------


class Random(CaptionedDataset):
    """Random pictures, two captions each; index i of an endless one is a new picture."""

    def __init__(self, count: int = 40, endless: bool = False) -> None:
        self.count, self.endless = count, endless
        self.name, self.split, self.size, self.skipped = "random", "validation", 8, []
        self.vocabulary = ["zero", "one"]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        stream = torch.Generator().manual_seed(index)
        image = torch.randint(256, (3, 8, 8), generator=stream, dtype=torch.uint8)
        return Example(f"picture {index}", image, (f"zero {index}", f"one {index}"), index % 3)

    def all_captions(self, limit: int = 20_000) -> Iterator[str]:
        yield from self.vocabulary[:limit]

    def showcase(self, count: int) -> list[Example]:
        return [self[7]] * count


class Named(Random):
    def fingerprint(self) -> str:
        return "abc"


class Encoder:
    """A convolution, which counts its calls and the different pictures of each."""

    def __init__(self) -> None:
        self.layer, self.pictures = nn.Conv2d(3, 5, 3, stride=2), list[int]()

    def __call__(self, images: Tensor) -> Tensor:
        assert images.shape == (CHUNK, 3, 8, 8) and images.dtype == torch.float32
        assert images.device.type == "cpu" and not torch.is_grad_enabled()
        self.pictures.append(len(images.unique(dim=0)))
        return self.layer(images)


def cached(
    cache_size: int = 1000, count: int = 40, endless: bool = False
) -> tuple[CachedDataset, Encoder]:
    encoder = Encoder()
    return CachedDataset(Random(count, endless), "latents", encoder, cache_size), encoder


def test_everything_but_the_extra_is_the_wrapped_data_set_s_own() -> None:
    inner, outer = Random(), cached()[0]
    indices, epochs = [3, 1, 3, 39], [0, 1, 2, 3]
    one, two = inner.batch(indices, epochs, 5), outer.batch(indices, epochs, 5)
    assert torch.equal(one.image, two.image)
    assert torch.equal(one.label, two.label)  # type: ignore[arg-type]
    assert (one.caption, one.id) == (two.caption, two.id)
    assert not one.extra and set(two.extra) == {"latents"}
    assert two.extra["latents"].shape == (4, 5, 3, 3) and not two.extra["latents"].requires_grad
    assert (outer.name, outer.split, outer.size) == ("random", "validation", 8)
    assert outer.skipped == [] and len(outer) == 40 and not outer.endless
    assert cached(endless=True)[0].endless
    assert outer[2].captions == inner[2].captions and len(list(outer)) == 40
    assert list(outer.all_captions(1)) == ["zero"]
    assert [e.id for e in outer.showcase(2)] == ["picture 7"] * 2
    assert outer.vocabulary == ["zero", "one"]


def test_a_fingerprint_passes_through_where_there_is_one() -> None:
    encode = torch.Tensor.clone
    assert CachedDataset(Named(), "a", encode, 1).fingerprint() == "abc"
    assert not hasattr(CachedDataset(Random(), "a", encode, 1), "fingerprint")


@pytest.mark.parametrize("endless", [False, True])
@pytest.mark.parametrize("cache_size", [1, 10, 1000])
def test_values_are_the_encoder_s(cache_size: int, endless: bool) -> None:
    """For new pictures, for cached ones and for a mixture, each time."""
    data, encoder = cached(cache_size, endless=endless)
    for indices in ([0, 1, 2], [2, 2, 9, 0], list(range(35, 0, -1)), [39]):
        batch = data.batch(indices, [0] * len(indices), 0)
        with torch.no_grad():
            expected = encoder.layer(batch.image)
        torch.testing.assert_close(batch.extra["latents"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("indices", [[5], [5, 6], [9, 5, 5], [*range(CHUNK), 5, 5], [*range(39)]])
def test_a_value_does_not_depend_on_its_batch(indices: list[int]) -> None:
    """To the bit: whichever pictures stand beside it, whether it is computed or cached."""
    encoder = Encoder()
    alone = CachedDataset(Random(), "x", encoder, 0).batch([5], [0], 0).extra["x"][0]
    data = CachedDataset(Random(), "x", encoder, 100)
    for _ in range(2):
        values = data.batch(indices, [0] * len(indices), 0).extra["x"]
        rows = [row for row, index in enumerate(indices) if index == 5]
        assert rows and all(torch.equal(values[row], alone) for row in rows)


def test_each_picture_of_a_finite_data_set_is_encoded_once() -> None:
    data, encoder = cached()
    for indices in ([0, 1, 2], [1, 1, 2], [2, 3, 4, 3], [0, 4], [*range(40)], [*range(40)]):
        data.batch(indices, [0] * len(indices), 0)
    assert encoder.pictures == [3, 2, CHUNK, 3]  # 3 + 2 + 35 = 40
    assert len(data.cache) == 40


def test_the_first_pictures_are_cached_and_no_more() -> None:
    data, encoder = cached(cache_size=3)
    for indices in ([7, 8], [1, 8, 2, 3], [7, 8, 1], [2, 3]):
        data.batch(indices, [0] * len(indices), 0)
    assert encoder.pictures == [2, 3, 2] and len(data.cache) == 3


def test_pictures_of_an_endless_data_set_are_not_cached() -> None:
    data, encoder = cached(endless=True)
    for _ in range(2):
        data.batch([100, 200], [0, 0], 0)
    assert encoder.pictures == [2, 2] and len(data.cache) == 0


def test_wrappers_may_be_nested() -> None:
    inner = CachedDataset(Random(), "mean", lambda images: images.mean((1, 2, 3)), 10)
    outer = CachedDataset(inner, "max", lambda images: images.amax((1, 2, 3)), 10)
    batch = outer.batch([4, 2], [0, 0], 0)
    torch.testing.assert_close(batch.extra["mean"], batch.image.mean((1, 2, 3)))
    assert torch.equal(batch.extra["max"], batch.image.amax((1, 2, 3)))
    assert set(batch.extra) == {"mean", "max"} and outer.extra_name == "max"


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(), (3,), (4, 2, 2)], ids=str)
def test_values_keep_dtype_and_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Integers for codes, numbers for latents; computed and cached."""

    def encode(images: Tensor) -> Tensor:
        mean = 100 * images.mean((1, 2, 3)).view(-1, *[1] * len(shape))
        return mean.expand(-1, *shape).to(dtype)

    data = CachedDataset(Random(), "x", encode, 10)
    for _ in range(2):
        batch = data.batch([3, 0, 3], [0, 0, 0], 0)
        assert batch.extra["x"].dtype == dtype and batch.extra["x"].shape == (3, *shape)
        assert torch.equal(batch.extra["x"], encode(batch.image))


def test_a_changed_batch_changes_no_cached_value() -> None:
    data, _ = cached()
    first = data.batch([1, 2], [0, 0], 0).extra["latents"]
    before = first.clone()
    first.zero_()
    assert torch.equal(data.batch([1, 2], [0, 0], 0).extra["latents"], before)


@pytest.mark.parametrize("endless", [False, True])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_loader_reads_it_in_a_thread_or_without(prefetch: int, endless: bool) -> None:
    """The same batches, with the extra of their rows, over more than one epoch."""
    data, encoder = cached(cache_size=10, count=20, endless=endless)
    batches = Loader(data, 6, seed=1, prefetch=prefetch).batches()
    for number, batch in zip(range(9), batches, strict=False):
        expected = Loader(Random(20, endless), 6, seed=1).at(number)
        assert batch.id == expected.id and torch.equal(batch.image, expected.image)
        with torch.no_grad():
            values = encoder.layer(batch.image)
        torch.testing.assert_close(batch.extra["latents"], values, rtol=1e-5, atol=1e-6)
    batches.close()  # type: ignore[attr-defined]


def test_threads_share_one_cache() -> None:
    """Each gets the right values, and the cache never holds more than its size."""
    data, _ = cached(cache_size=25)
    alone = CachedDataset(Random(), "latents", data.encode, 0)
    expected = alone.batch(range(40), [0] * 40, 0).extra["latents"]

    def read(number: int) -> bool:
        rows = torch.randperm(40, generator=torch.Generator().manual_seed(number))[:9].tolist()
        values = data.batch(rows, [0] * 9, 0).extra["latents"]
        return torch.equal(values, expected[rows])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(64)))
    assert len(data.cache) == 25


def test_an_error_of_the_encoder_is_raised_and_nothing_is_cached() -> None:
    def encode(images: Tensor) -> Tensor:
        raise RuntimeError("no memory")

    data = CachedDataset(Random(), "x", encode, 10)
    with pytest.raises(RuntimeError, match="no memory"):
        data.batch([0], [0], 0)
    assert len(data.cache) == 0


def test_a_copy_is_a_data_set_too() -> None:
    data, _ = cached()
    assert torch.equal(
        copy.copy(data).batch([3], [0], 0).extra["latents"],
        data.batch([3], [0], 0).extra["latents"],
    )
    with pytest.raises(AttributeError, match="dataset"):
        CachedDataset.__new__(CachedDataset).size  # noqa: B018
    with pytest.raises(AttributeError, match="colour"):
        data.colour  # noqa: B018


@pytest.mark.parametrize("count", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_chunks_have_one_size_and_their_rows_keep_their_order(count: int) -> None:
    images, sizes = torch.arange(count).float().view(count, 1, 1, 1).repeat(1, 3, 2, 2), []

    def encode(chunk: Tensor) -> Tensor:
        sizes.append(len(chunk))
        return chunk.sum((1, 2, 3)) / 12

    assert encode_in_chunks(images, encode).tolist() == list(range(count))
    assert sizes == [CHUNK] * -(-count // CHUNK)
