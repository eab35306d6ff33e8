"""Captions that are encoded once: when the encoder is asked, and that the answer is its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import NoText

from lineage.attngan.damsm import DAMSM, DAMSMConfig
from lineage.cgan.gan_int_cls import GANConfig, GanIntCls
from lineage.cgan.stackgan import StackGANConfig, StageOne
from lineage.config import OptimConfig, TextConfig, TrainConfig
from lineage.data.contract import CaptionedDataset, Example
from lineage.system import Trainable
from lineage.text.contract import TextEncoder, TextFeatures
from lineage.text.encoders import ENCODERS, make_encoder
from lineage.text.tokenizer import WordTokenizer
from lineage.training import texts
from lineage.training.caption_cache import Reader
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


class Asked:
    """Counts what an encoder is asked."""

    def __init__(self, text: TextEncoder) -> None:
        self.captions: list[list[str]] = []
        original = text.encode

        def encode(captions: list[str]) -> TextFeatures:
            self.captions.append(list(captions))
            return original(captions)

        text.encode = encode  # type: ignore[method-assign]


def encoder(tokenizer: WordTokenizer, name: str = "lstm", **config: Any) -> TextEncoder:
    torch.manual_seed(0)
    return make_encoder(name, TextConfig(width=WIDTH, heads=2, channels=12, **config), tokenizer)


def frozen(tokenizer: WordTokenizer, name: str = "lstm", **config: Any) -> TextEncoder:
    return encoder(tokenizer, name, **config).requires_grad_(False)


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is there after twelve captions."""
    monkeypatch.setattr(texts, "KEPT", 12)


# --- when the encoder is asked ----------------------------------------------------------------


def test_an_encoder_that_is_trained_is_asked_each_time(tokenizer: WordTokenizer) -> None:
    """Its answer changes with every step, and carries a gradient."""
    text = encoder(tokenizer)
    reader, asked = Reader(text, Few()), Asked(text)
    for before in (0, 12, 400):
        found = reader.read(WORDS[:2], before)
        assert found.sentence.requires_grad and found.words.requires_grad
    assert asked.captions == [WORDS[:2]] * 3


def test_one_trained_parameter_is_enough(tokenizer: WordTokenizer) -> None:
    text = frozen(tokenizer)
    next(text.parameters()).requires_grad_()
    reader, asked = Reader(text, Few()), Asked(text)
    reader.read(WORDS[:2], 400), reader.read(WORDS[:2], 400)
    assert asked.captions == [WORDS[:2]] * 2


def test_a_frozen_encoder_is_asked_until_enough_captions_were_read(
    tokenizer: WordTokenizer,
) -> None:
    """Then once for all that there are, and never again."""
    text = frozen(tokenizer)
    reader, asked = Reader(text, Few()), Asked(text)
    for before in (0, 4, 8, 11):
        reader.read(WORDS[:2], before)
    assert asked.captions == [WORDS[:2]] * 4
    asked.captions.clear()
    for before in (12, 16, 20):
        assert not reader.read(WORDS[2:4], before).sentence.requires_grad
    assert asked.captions == [WORDS]


def test_a_table_is_made_wherever_a_run_begins(tokenizer: WordTokenizer) -> None:
    """What is looked up when is a function of data and step: a run that is resumed late has read
    nothing itself."""
    text = frozen(tokenizer)
    reader, asked = Reader(text, Few()), Asked(text)
    reader.read(WORDS[:2], 400), reader.read(WORDS[1:3], 404)
    assert asked.captions == [WORDS]


def test_many_captions_are_encoded_in_parts(
    tokenizer: WordTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And found again in their places, short ones behind long ones."""
    monkeypatch.setattr(texts, "AT_ONCE", 4)
    text = frozen(tokenizer)
    reader, asked = Reader(text, Few()), Asked(text)
    found = reader.read(WORDS, 12)
    assert asked.captions == [WORDS[:4], WORDS[4:]]
    assert_same(found, text.encode(WORDS))


def test_only_so_many_captions_are_kept(
    tokenizer: WordTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of the data, so that a large data set costs no more memory than a small one."""
    monkeypatch.setattr(texts, "KEPT", 3)
    text = frozen(tokenizer)
    reader, asked = Reader(text, Few()), Asked(text)
    reader.read(["a ring"], 3)
    assert asked.captions == [WORDS[:3]]
    reader.read(["a star"], 3)
    assert asked.captions[1:] == [["a star"]]


def test_captions_outside_the_table_are_encoded(tokenizer: WordTokenizer) -> None:
    """The whole batch is, so that it is one that the encoder gave; the table is there after it."""
    text = frozen(tokenizer)
    reader, asked = Reader(text, Few()), Asked(text)
    mixed = ["a ring", "three yellow stars", "a star"]
    for expected in ([mixed], [mixed, WORDS], [mixed, WORDS, mixed]):
        captions = mixed if expected[-1] is mixed else WORDS[:2]
        assert_same(reader.read(captions, 12), frozen(tokenizer).encode(captions))
        assert asked.captions == expected


# --- what it answers --------------------------------------------------------------------------


def assert_same(found: TextFeatures, expected: TextFeatures) -> None:
    """Words, mask, sentence and numbers; what stands behind the words does not count."""
    length = int(expected.mask.sum(1).max())
    assert found.mask[:, :length].equal(expected.mask[:, :length])
    assert found.ids[found.mask].equal(expected.ids[expected.mask])
    torch.testing.assert_close(found.words[found.mask], expected.words[expected.mask])
    torch.testing.assert_close(found.sentence, expected.sentence)
    assert found.mask.sum() == expected.mask.sum()
    shape = found.mask.shape
    assert found.ids.shape == found.words.shape[:2] == shape and len(found.sentence) == shape[0]


@pytest.mark.parametrize("name", list(ENCODERS))
@pytest.mark.parametrize(
    "captions",
    [WORDS, WORDS[::-1], ["a ring"], ["", "a star", "a star"], [WORDS[2], "a ring"]],
    ids=["all", "turned", "one", "twice", "two"],
)
def test_the_table_answers_like_the_encoder(
    name: str, captions: list[str], tokenizer: WordTokenizer
) -> None:
    """In whatever order, and no longer than the longest caption asked for."""
    text = frozen(tokenizer, name)
    found, expected = Reader(text, Few()).read(captions, 12), text.encode(captions)
    assert_same(found, expected)
    longest = expected.mask.shape[1] if text.padded else expected.mask.sum(1).max()
    assert found.mask.shape[1] == longest
    for part in (found.words, found.sentence):
        assert part.dtype == torch.float32 and not part.requires_grad


def test_answers_are_copies(tokenizer: WordTokenizer) -> None:
    """A step that writes into its features must not change the next one's."""
    text = frozen(tokenizer)
    reader = Reader(text, Few())
    found = reader.read(WORDS, 12)
    found.words.zero_(), found.sentence.zero_(), found.mask.zero_()
    assert_same(reader.read(WORDS, 16), text.encode(WORDS))


def test_an_encoder_without_parameters_is_frozen() -> None:
    text = NoText()
    reader, asked = Reader(text, Few()), Asked(text)
    assert len(reader.read(WORDS[:3], 12)) == 3 and len(reader.read(WORDS[:2], 16)) == 2
    assert asked.captions == [WORDS]


# --- in the loop ------------------------------------------------------------------------------

Make = Callable[[TextEncoder], Trainable]


def stackgan(text: TextEncoder) -> Trainable:
    return StageOne(
        StackGANConfig(start=8, noise=4, condition=4, generator=4, discriminator=2), text
    )


def gan_int_cls(text: TextEncoder) -> Trainable:
    return GanIntCls(GANConfig(noise=4, text=4, generator=4, discriminator=4), text, 16)


def trainer(make: Make, text: TextEncoder, data: CaptionedDataset) -> Trainer:
    torch.manual_seed(1)
    optim = OptimConfig(lr=1e-2, warmup=0, decay="none")
    return Trainer(make(text), data, optim, TrainConfig(batch=4, precision="fp32", prefetch=0))


def advance(one: Trainer, until: int) -> Iterator[dict[str, Tensor]]:
    while one.step < until:
        yield one.advance(one.loader.at(one.step))


def test_the_loop_counts_what_was_read(tokenizer: WordTokenizer) -> None:
    """Three steps of four captions are asked for, the fourth begins the table."""
    text = encoder(tokenizer)
    one = trainer(stackgan, text, Few())
    asked = Asked(text)
    list(advance(one, 6))
    assert [len(captions) for captions in asked.captions] == [4, 4, 4, len(WORDS)]
    assert asked.captions[-1] == WORDS


def test_a_stage_that_trains_its_text_asks_each_time(tokenizer: WordTokenizer) -> None:
    text = encoder(tokenizer)
    config = DAMSMConfig(regions="conv", channels=4, grid=4)
    one = trainer(lambda text: DAMSM(config, text, 16), text, Few())
    asked = Asked(text)
    list(advance(one, 5))
    assert [len(captions) for captions in asked.captions] == [4] * 5


@pytest.mark.parametrize("make", [stackgan, gan_int_cls])
def test_a_frozen_encoder_drops_nothing(make: Make, tokenizer: WordTokenizer) -> None:
    """Dropout is for learning: what is left as it is answers alike in every step, and the table
    holds what drawing will read."""
    text = encoder(tokenizer, dropout=0.5)
    one = trainer(make, text, Few())
    found = []
    losses = one.system.losses

    def watched(batch: Any, text: TextFeatures, draws: Any) -> Any:
        found.append(dict(zip(batch.caption, text.sentence, strict=True)))
        return losses(batch, text, draws)

    one.system.losses = watched  # type: ignore[method-assign]
    list(advance(one, 6))
    text.eval()
    for step in found:
        for caption, sentence in step.items():
            torch.testing.assert_close(sentence, text.encode([caption]).sentence[0])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_resumed_run_is_one_that_was_never_stopped(
    stop: int, dropout: float, tokenizer: WordTokenizer, tmp_path: Path
) -> None:
    """Bit for bit: stopped before the table is there, as it is made, and when it has been used."""

    def begin() -> Trainer:
        return trainer(stackgan, encoder(tokenizer, dropout=dropout), Few())

    whole, first, second = begin(), begin(), begin()
    terms = list(advance(whole, 7))
    list(advance(first, stop))
    save_state(tmp_path / "state.pt", first.state())
    second.load_state(load_state(tmp_path / "state.pt"))
    again = list(advance(second, 7))
    for expected, found in zip(terms[stop:], again, strict=True):
        assert {n: t.item() for n, t in found.items()} == {n: t.item() for n, t in expected.items()}
    for name, tensor in whole.system.state_dict().items():
        assert torch.equal(tensor, second.system.state_dict()[name]), name
