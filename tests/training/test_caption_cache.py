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
from lineage.text.tokenizer import WordTokenizer
from lineage.training import caption_cache
from lineage.training.caption_cache import CaptionCache
from lineage.training.loop import Trainer
from lineage.training.store import load_state, save_state

WORDS = ["a red circle", "a ring", "two blue squares above a star", "", "a star", "one ring left"]
WIDTH = 8


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
    """Records the captions that an encoder encodes."""

    def __init__(self, text: TextEncoder) -> None:
        self.captions: list[list[str]] = []
        original = text.encode

        def encode(captions: list[str]) -> TextFeatures:
            self.captions.append(list(captions))
            return original(captions)

        text.encode = encode  # type: ignore[method-assign]


def encoder(tokenizer: WordTokenizer, name: str = "lstm", **config: Any) -> TextEncoder:
    torch.manual_seed(0)
    return make_encoder(
        name, TextConfig(width=WIDTH, num_heads=2, conv_channels=12, **config), tokenizer
    )


def frozen(tokenizer: WordTokenizer, name: str = "lstm", **config: Any) -> TextEncoder:
    return encoder(tokenizer, name, **config).requires_grad_(False)


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is built after twelve captions."""
    monkeypatch.setattr(caption_cache, "CACHE_SIZE", 12)


# --- calls of the encoder ----------------------------------------------------------------


def test_a_trained_encoder_is_called_each_time(tokenizer: WordTokenizer) -> None:
    """Its features change with every step, and carry a gradient."""
    text = encoder(tokenizer)
    cache, calls = CaptionCache(text, Few()), Calls(text)
    for before in (0, 12, 400):
        features = cache.encode(WORDS[:2], before)
        assert features.sentence.requires_grad and features.words.requires_grad
    assert calls.captions == [WORDS[:2]] * 3


def test_one_trained_parameter_is_enough(tokenizer: WordTokenizer) -> None:
    text = frozen(tokenizer)
    next(text.parameters()).requires_grad_()
    cache, calls = CaptionCache(text, Few()), Calls(text)
    cache.encode(WORDS[:2], 400), cache.encode(WORDS[:2], 400)
    assert calls.captions == [WORDS[:2]] * 2


def test_a_frozen_encoder_is_called_until_enough_captions_were_encoded(
    tokenizer: WordTokenizer,
) -> None:
    """Then once for all captions, and never again."""
    text = frozen(tokenizer)
    cache, calls = CaptionCache(text, Few()), Calls(text)
    for before in (0, 4, 8, 11):
        cache.encode(WORDS[:2], before)
    assert calls.captions == [WORDS[:2]] * 4
    calls.captions.clear()
    for before in (12, 16, 20):
        assert not cache.encode(WORDS[2:4], before).sentence.requires_grad
    assert calls.captions == [WORDS]


def test_the_table_is_built_wherever_a_run_begins(tokenizer: WordTokenizer) -> None:
    """Which caption is looked up is a function of data and step: a run that is resumed late has
    encoded nothing itself."""
    text = frozen(tokenizer)
    cache, calls = CaptionCache(text, Few()), Calls(text)
    cache.encode(WORDS[:2], 400), cache.encode(WORDS[1:3], 404)
    assert calls.captions == [WORDS]


def test_many_captions_are_encoded_in_parts(
    tokenizer: WordTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each keeps its row, short ones behind long ones."""
    monkeypatch.setattr(caption_cache, "CHUNK", 4)
    text = frozen(tokenizer)
    cache, calls = CaptionCache(text, Few()), Calls(text)
    features = cache.encode(WORDS, 12)
    assert calls.captions == [WORDS[:4], WORDS[4:]]
    assert_same(features, text.encode(WORDS))


def test_the_table_is_bounded(tokenizer: WordTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of the data, so that a large data set costs no more memory than a small one."""
    monkeypatch.setattr(caption_cache, "CACHE_SIZE", 3)
    text = frozen(tokenizer)
    cache, calls = CaptionCache(text, Few()), Calls(text)
    cache.encode(["a ring"], 3)
    assert calls.captions == [WORDS[:3]]
    cache.encode(["a star"], 3)
    assert calls.captions[1:] == [["a star"]]


def test_captions_outside_the_table_are_encoded(tokenizer: WordTokenizer) -> None:
    """The whole batch is encoded; the table is built afterwards."""
    text = frozen(tokenizer)
    cache, calls = CaptionCache(text, Few()), Calls(text)
    mixed = ["a ring", "three yellow stars", "a star"]
    for expected in ([mixed], [mixed, WORDS], [mixed, WORDS, mixed]):
        captions = mixed if expected[-1] is mixed else WORDS[:2]
        assert_same(cache.encode(captions, 12), frozen(tokenizer).encode(captions))
        assert calls.captions == expected


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


@pytest.mark.parametrize("name", list(ENCODERS))
@pytest.mark.parametrize(
    "captions",
    [WORDS, WORDS[::-1], ["a ring"], ["", "a star", "a star"], [WORDS[2], "a ring"]],
    ids=["all", "turned", "one", "twice", "two"],
)
def test_the_table_equals_the_encoder(
    name: str, captions: list[str], tokenizer: WordTokenizer
) -> None:
    """In any order, and no longer than the longest caption."""
    text = frozen(tokenizer, name)
    features, expected = CaptionCache(text, Few()).encode(captions, 12), text.encode(captions)
    assert_same(features, expected)
    longest = expected.mask.shape[1] if text.padded else expected.mask.sum(1).max()
    assert features.mask.shape[1] == longest
    for part in (features.words, features.sentence):
        assert part.dtype == torch.float32 and not part.requires_grad


def test_features_are_copies(tokenizer: WordTokenizer) -> None:
    """A step that writes into its features must not change the next one's."""
    text = frozen(tokenizer)
    cache = CaptionCache(text, Few())
    features = cache.encode(WORDS, 12)
    features.words.zero_(), features.sentence.zero_(), features.mask.zero_()
    assert_same(cache.encode(WORDS, 16), text.encode(WORDS))


def test_an_encoder_without_parameters_is_frozen() -> None:
    text = ZeroEncoder()
    cache, calls = CaptionCache(text, Few()), Calls(text)
    assert len(cache.encode(WORDS[:3], 12)) == 3 and len(cache.encode(WORDS[:2], 16)) == 2
    assert calls.captions == [WORDS]


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


def test_the_loop_counts_captions(tokenizer: WordTokenizer) -> None:
    """Three steps of four captions are encoded, the fourth builds the table."""
    text = encoder(tokenizer)
    one = trainer(stackgan, text, Few())
    calls = Calls(text)
    list(advance(one, 6))
    assert [len(captions) for captions in calls.captions] == [4, 4, 4, len(WORDS)]
    assert calls.captions[-1] == WORDS


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
@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_resumed_run_is_one_that_was_never_stopped(
    stop: int, dropout: float, tokenizer: WordTokenizer, tmp_path: Path
) -> None:
    """Bit for bit: stopped before the table is built, as it is built, and after it was used."""

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
