"""Captions that are encoded once: when the encoder is called, and with what result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import ZeroEncoder

from lineage.attngan.damsm import DAMSM, DAMSMConfig
from lineage.cgan.gan_int_cls import GANConfig, GanIntCls
from lineage.cgan.stackgan import StackGANConfig, StageOne
from lineage.config import OptimConfig, TextConfig, TrainConfig
from lineage.data.contract import CaptionedDataset, Example
from lineage.system import Trainable
from lineage.text.contract import TextEncoder, TextFeatures
from lineage.text.encoders import ENCODERS, make_encoder
from lineage.text.joined import JOINED
from lineage.text.tokenizer import WordTokenizer
from lineage.threads import use_threads
from lineage.training import caption_cache
from lineage.training.caption_cache import CaptionCache
from lineage.training.loop import Trainer
from lineage.training.store import load_state, save_state

WORDS = ["a red circle", "a ring", "two blue squares above a star", "", "a star", "one ring left"]
WIDTH = 8
NAMES = [*ENCODERS, f"{JOINED}bag+char_cnn_rnn+lstm"]


class Few(CaptionedDataset):
    """Blank pictures, two with each caption."""

    def __init__(self, captions: list[str] = WORDS) -> None:
        self.name, self.split, self.size, self.skipped = "few", "train", 16, []
        self.captions = captions

    def __len__(self) -> int:
        return 2 * len(self.captions)

    def __getitem__(self, index: int) -> Example:
        image = torch.zeros(3, 16, 16, dtype=torch.uint8)
        return Example(str(index), image, (self.captions[index % len(self.captions)],))


class Calls:
    """Records the captions that an encoder encodes, but for "no caption", which comes first."""

    def __init__(self, text: TextEncoder) -> None:
        self.captions: list[list[str]] = []
        original = text.encode

        def encode(captions: list[str]) -> TextFeatures:
            self.captions.append(list(captions))
            return original(captions)

        original_null = text.null

        def null(count: int) -> TextFeatures:
            before = len(self.captions)
            features = original_null(count)
            del self.captions[before:]
            return features

        text.encode = encode  # type: ignore[method-assign]
        text.null = null  # type: ignore[method-assign]

    def encoded(self) -> list[str]:
        """Captions of all chunks, without the repeats of each."""
        return [caption for chunk in self.captions for caption in dict.fromkeys(chunk)]


def encoder(tokenizer: WordTokenizer, name: str = "lstm", **config: Any) -> TextEncoder:
    torch.manual_seed(0)
    return make_encoder(
        name, TextConfig(width=WIDTH, num_heads=2, conv_channels=12, **config), tokenizer
    )


def frozen(tokenizer: WordTokenizer, name: str = "lstm", **config: Any) -> TextEncoder:
    return encoder(tokenizer, name, **config).requires_grad_(False)


def bits(features: TextFeatures) -> list[Tensor]:
    return [features.words, features.mask, features.sentence, features.ids]


def assert_equal(features: TextFeatures, expected: TextFeatures) -> None:
    """Bit for bit, padding among it."""
    for one, other in zip(bits(features), bits(expected), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


# --- calls of the encoder ----------------------------------------------------------------


def test_a_trained_encoder_is_called_each_time(tokenizer: WordTokenizer) -> None:
    """Its features change with every step, and carry a gradient."""
    text = encoder(tokenizer)
    cache, calls = CaptionCache(text), Calls(text)
    for _ in range(3):
        features = cache.encode(WORDS[:2])
        assert features.sentence.requires_grad and features.words.requires_grad
    assert calls.captions == [WORDS[:2]] * 3


def test_one_trained_parameter_is_enough(tokenizer: WordTokenizer) -> None:
    text = frozen(tokenizer)
    next(text.parameters()).requires_grad_()
    cache, calls = CaptionCache(text), Calls(text)
    cache.encode(WORDS[:2]), cache.encode(WORDS[:2])
    assert calls.captions == [WORDS[:2]] * 2


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_encoder_encodes_each_caption_once(name: str, tokenizer: WordTokenizer) -> None:
    """Padded ones too."""
    text = frozen(tokenizer, name)
    cache, calls = CaptionCache(text), Calls(text)
    for captions in (WORDS[:2], WORDS[1:4], WORDS[:4] * 2, WORDS):
        cache.encode(captions)
    assert sorted(calls.encoded()) == sorted(WORDS)


@pytest.mark.parametrize("name", NAMES)
def test_a_chunk_has_captions_of_one_length_and_a_fixed_size(
    name: str, tokenizer: WordTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a caption is computed by the same kernels whatever its neighbours are."""
    monkeypatch.setitem(caption_cache.CHUNK_WORDS, "cpu", 12)
    text = frozen(tokenizer, name, max_words=6)
    cache, calls = CaptionCache(text), Calls(text)
    cache.encode(WORDS[:3])
    cache.encode(WORDS)
    for chunk in [chunk for chunk in calls.captions if chunk != [""]]:
        (num_words,) = {text.num_words(caption) for caption in chunk}
        assert len(chunk) == max(1, 12 // sum(num_words))
        masks = text.encode(chunk).mask
        assert text.padded or name == "char_cnn_rnn" or JOINED in name or masks.all()


def test_encoding_has_one_thread_float32_and_no_gradient(tokenizer: WordTokenizer) -> None:
    """Whatever the step uses: its number of threads may change while a run measures."""
    text, seen = frozen(tokenizer, "transformer"), []
    original = text.encode

    def encode(captions: list[str]) -> TextFeatures:
        seen.append((torch.get_num_threads(), torch.is_grad_enabled()))
        features = original(captions)
        seen.append(features.words.dtype)
        return features

    text.encode = encode  # type: ignore[method-assign]
    with use_threads(2), torch.autocast("cpu", torch.bfloat16):
        features = CaptionCache(text).encode(WORDS)
    assert set(seen) == {(1, False), torch.float32}
    assert_equal(features, CaptionCache(frozen(tokenizer, "transformer")).encode(WORDS))


# --- features --------------------------------------------------------------------------


def assert_same(features: TextFeatures, expected: TextFeatures) -> None:
    """Words, mask, sentence and ids; padding does not count."""
    length = int(expected.mask.sum(1).max())
    assert features.mask[:, :length].equal(expected.mask[:, :length])
    assert features.ids[features.mask].equal(expected.ids[expected.mask])
    torch.testing.assert_close(features.words[features.mask], expected.words[expected.mask])
    torch.testing.assert_close(features.sentence, expected.sentence)
    assert features.mask.sum() == expected.mask.sum()
    shape = features.mask.shape
    assert (
        features.ids.shape == features.words.shape[:2] == shape
        and len(features.sentence) == shape[0]
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "captions",
    [WORDS, WORDS[::-1], ["a ring"], ["", "a star", "a star"], [WORDS[2], "a ring"]],
    ids=["all", "turned", "one", "twice", "two"],
)
def test_cached_features_are_those_of_the_encoder(
    name: str, captions: list[str], tokenizer: WordTokenizer
) -> None:
    """In any order, and no longer than the longest caption."""
    text = frozen(tokenizer, name)
    features, expected = CaptionCache(text).encode(captions), text.encode(captions)
    assert_same(features, expected)
    longest = expected.mask.shape[1] if text.padded else expected.mask.sum(1).max()
    assert features.mask.shape[1] == longest
    for part in (features.words, features.sentence):
        assert part.dtype == torch.float32 and not part.requires_grad


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [10**9, 3000, 1])
def test_features_do_not_depend_on_what_is_cached(
    name: str, size: int, tokenizer: WordTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: alone, after other captions, among other neighbours, without room."""
    captions = [*WORDS, "a red ring", "a blue ring left of a red star", "one", "two stars"]
    alone = {c: CaptionCache(frozen(tokenizer, name)).encode([c]) for c in captions}
    monkeypatch.setattr(caption_cache, "CACHE_BYTES", size)
    cache = CaptionCache(frozen(tokenizer, name))
    for step in range(12):
        order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(step))
        some = [captions[i] for i in order[: 1 + step % 5].tolist()]
        some += some[:1]
        assert_equal(cache.encode(some), TextFeatures.cat([alone[caption] for caption in some]))


def test_memory_is_bounded(tokenizer: WordTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions that find no room are encoded each time; those that found it are kept."""
    monkeypatch.setattr(caption_cache, "CACHE_BYTES", 500)
    text = frozen(tokenizer)
    cache, calls = CaptionCache(text), Calls(text)
    many = [f"a {word} star" for word in ("red", "blue", "green", "small", "large", "one", "two")]
    cache.encode(many)
    rows = 500 // (3 * (4 * WIDTH + 1 + 8) + 4 * WIDTH)
    calls.captions.clear()
    cache.encode(many)
    assert calls.encoded() == many[rows:] and 1 < rows < len(many)


def test_features_are_copies(tokenizer: WordTokenizer) -> None:
    """A step that writes into its features must not change the next one's."""
    text = frozen(tokenizer)
    cache = CaptionCache(text)
    for _ in range(2):
        features = cache.encode(WORDS)
        assert_same(features, text.encode(WORDS))
        features.words.zero_(), features.sentence.zero_(), features.mask.zero_()


def test_an_encoder_without_parameters_is_frozen() -> None:
    text = ZeroEncoder()
    cache, calls = CaptionCache(text), Calls(text)
    assert len(cache.encode(WORDS[:3])) == 3 and len(cache.encode(WORDS[:2])) == 2
    assert calls.encoded() == WORDS[:3]


def test_a_system_may_read_no_captions() -> None:
    assert CaptionCache(None).encode(WORDS) is None


# --- in the loop ------------------------------------------------------------------------------

Make = Callable[[TextEncoder], Trainable]


def stackgan(text: TextEncoder) -> Trainable:
    return StageOne(
        StackGANConfig(stage1_size=8, z_dim=4, cond_dim=4, gen_channels=4, disc_channels=2), text
    )


def gan_int_cls(text: TextEncoder) -> Trainable:
    return GanIntCls(GANConfig(z_dim=4, text_dim=4, gen_channels=4, disc_channels=4), text, 16)


def trainer(make: Make, text: TextEncoder, data: CaptionedDataset) -> Trainer:
    torch.manual_seed(1)
    optim = OptimConfig(lr=1e-2, warmup=0, decay="none")
    return Trainer(make(text), data, optim, TrainConfig(batch_size=4, precision="fp32", prefetch=0))


def advance(one: Trainer, until: int) -> Iterator[dict[str, Tensor]]:
    while one.step < until:
        yield one.advance(one.loader.at(one.step))


def test_the_loop_encodes_each_caption_once(tokenizer: WordTokenizer) -> None:
    text = encoder(tokenizer)
    one = trainer(stackgan, text, Few())
    calls = Calls(text)
    list(advance(one, 6))
    assert sorted(calls.encoded()) == sorted(WORDS)


def test_a_stage_that_trains_its_encoder_calls_it_each_time(tokenizer: WordTokenizer) -> None:
    text = encoder(tokenizer)
    config = DAMSMConfig(image_encoder="conv", image_channels=4, grid_size=4)
    one = trainer(lambda text: DAMSM(config, text, 16), text, Few())
    calls = Calls(text)
    list(advance(one, 5))
    assert [len(captions) for captions in calls.captions] == [4] * 5


@pytest.mark.parametrize("make", [stackgan, gan_int_cls])
def test_a_frozen_encoder_has_no_dropout(make: Make, tokenizer: WordTokenizer) -> None:
    """Dropout is for training: a frozen encoder gives the same features in every step, those with
    which the system will sample."""
    text = encoder(tokenizer, dropout=0.5)
    one = trainer(make, text, Few())
    steps = []
    losses = one.system.losses

    def recorded(batch: Any, text: TextFeatures, noise: Any) -> Any:
        steps.append(dict(zip(batch.caption, text.sentence, strict=True)))
        return losses(batch, text, noise)

    one.system.losses = recorded  # type: ignore[method-assign]
    list(advance(one, 6))
    text.eval()
    for step in steps:
        for caption, sentence in step.items():
            torch.testing.assert_close(sentence, text.encode([caption]).sentence[0])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("stop", [1, 3, 5])
@pytest.mark.parametrize("size", [10**9, 1000])
def test_a_resumed_run_is_one_that_was_never_stopped(
    size: int,
    stop: int,
    dropout: float,
    tokenizer: WordTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, with nothing cached, and with no room for all; batches have captions of several
    lengths."""
    monkeypatch.setattr(caption_cache, "CACHE_BYTES", size)

    def begin() -> Trainer:
        return trainer(stackgan, encoder(tokenizer, dropout=dropout), Few())

    whole, first, second = begin(), begin(), begin()
    terms = list(advance(whole, 7))
    list(advance(first, stop))
    save_state(tmp_path / "state.pt", first.state())
    second.load_state(load_state(tmp_path / "state.pt"))
    again = list(advance(second, 7))
    for expected, values in zip(terms[stop:], again, strict=True):
        assert {n: t.item() for n, t in values.items()} == {
            n: t.item() for n, t in expected.items()
        }
    for name, tensor in whole.system.state_dict().items():
        assert torch.equal(tensor, second.system.state_dict()[name]), name
