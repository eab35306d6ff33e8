"""The joint embedding: margins by hand, who is nobody's rival, and that captions find pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lineage.cgan import joint_embedding
from lineage.cgan.joint_embedding import JointEmbedding, embedding_terms
from lineage.config import OptimConfig, TextConfig, TrainConfig
from lineage.data.contract import Batch, CaptionedDataset
from lineage.nn.noise import NoiseStreams
from lineage.system import System
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import WordTokenizer
from lineage.training.loop import Trainer

SIDE, WIDTH = 16, 12


def make(tokenizer: WordTokenizer, text: str = "bag", size: int = SIDE) -> JointEmbedding:
    torch.manual_seed(0)
    return JointEmbedding(make_encoder(text, TextConfig(width=WIDTH), tokenizer), size, channels=8)


def terms_of(system: JointEmbedding, batch: Batch) -> dict[str, Tensor]:
    text = system.text.encode(batch.caption)
    ((name, terms),) = system.losses(batch, text, NoiseStreams(range(len(batch))))
    assert name == "embedding"
    return terms


# --- losses -----------------------------------------------------------------------------------

FIT = torch.tensor([[2.0, 1.5, 0.0], [0.5, 1.0, 3.0], [1.0, -1.0, 0.25]])
"""Compatibility of picture i (row) with caption j: the diagonal holds those that belong."""

EVERYONE = ~torch.eye(3, dtype=torch.bool)


def terms(rivals: Tensor) -> dict[str, float]:
    return {n: t.item() for n, t in embedding_terms(torch.eye(3), FIT.T, rivals).items()}


def test_margins_by_hand() -> None:
    """A rival costs what it lacks of being worse by one: than the picture's own caption (equation
    4: 0.5 and 0; 0.5 and 3; 1.75 and 0), and than the caption's own picture (equation 5: 1.5, 0.75;
    0, 3.75; 0, 0). Means over the six pairs."""
    found = terms(EVERYONE)
    assert found["captions"] == pytest.approx((0.5 + 0.5 + 3 + 1.75) / 6)
    assert found["pictures"] == pytest.approx((1.5 + 0.75 + 3.75) / 6)


def test_only_rivals_count() -> None:
    """In the sum and in the number that it is divided by; without any, there is nothing to learn
    and nothing that is no number."""
    some = torch.zeros(3, 3, dtype=torch.bool)
    some[0, 1] = some[1, 2] = True
    found = terms(some)
    assert found["captions"] == pytest.approx((0.5 + 3) / 2)
    assert found["pictures"] == pytest.approx((1.5 + 3.75) / 2)
    assert terms(torch.zeros(3, 3, dtype=torch.bool)) == {"captions": 0.0, "pictures": 0.0}


def test_pairs_far_enough_apart_cost_nothing() -> None:
    """The margin is one, and reached is enough."""
    found = embedding_terms(torch.eye(3), torch.eye(3), EVERYONE)
    assert [term.item() for term in found.values()] == [0.0, 0.0]
    near = embedding_terms(torch.eye(3), 0.75 * torch.eye(3), EVERYONE)
    assert [term.item() for term in near.values()] == pytest.approx([0.25, 0.25])


def test_the_loss_does_not_grow_with_the_batch() -> None:
    """Twice the pictures, none of them new, and each pair of copies no rivals."""
    twice = EVERYONE.repeat(2, 2)
    found = embedding_terms(torch.eye(3).repeat(2, 1), FIT.T.repeat(2, 1), twice)
    assert {n: t.item() for n, t in found.items()} == pytest.approx(terms(EVERYONE))


# --- rivals -----------------------------------------------------------------------------------


def rivals_of(
    batch: Batch, tokenizer: WordTokenizer, monkeypatch: pytest.MonkeyPatch, same: str = "class"
) -> list[list[bool]]:
    """Which pairs a step counts as rivals."""
    seen: list[Tensor] = []

    def watched(pictures: Tensor, captions: Tensor, rivals: Tensor) -> dict[str, Tensor]:
        seen.append(rivals)
        return embedding_terms(pictures, captions, rivals)

    monkeypatch.setattr(joint_embedding, "embedding_terms", watched)
    system = make(tokenizer)
    system.same = same
    terms_of(system, batch)
    found: list[list[bool]] = seen[0].tolist()
    return found


def batch_of(shapes: CaptionedDataset, captions: list[str], labels: list[int] | None) -> Batch:
    image = shapes.batch(range(len(captions)), [0] * len(captions), 0).image
    label = None if labels is None else torch.tensor(labels)
    return Batch(image, captions, label, list(range(len(captions))))


@pytest.mark.parametrize(
    ("labels", "friends"),
    [
        (None, {(0, 2)}),  # the same words
        ([0, 1, 2, 1], {(0, 2), (1, 3)}),  # and the same class
        ([5, 6, 7, 8], {(0, 2)}),
        ([3, 3, 3, 3], {(i, j) for i in range(4) for j in range(i)}),
    ],
)
def test_words_and_classes_make_no_rivals(
    labels: list[int] | None,
    friends: set[tuple[int, int]],
    shapes: CaptionedDataset,
    tokenizer: WordTokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To push a caption away from a picture that it describes is to unlearn it."""
    captions = ["a red circle", "a blue star", "a red circle", "circle red a"]
    found = rivals_of(batch_of(shapes, captions, labels), tokenizer, monkeypatch)
    for i in range(4):
        for j in range(4):
            apart = i != j and (i, j) not in friends and (j, i) not in friends
            assert found[i][j] == apart, (i, j)
    alone = rivals_of(batch_of(shapes, captions, labels), tokenizer, monkeypatch, same="caption")
    unlike = [[i != j and {i, j} != {0, 2} for j in range(4)] for i in range(4)]
    assert alone == unlike  # whatever their classes


def test_it_works_without_labels(shapes: CaptionedDataset, tokenizer: WordTokenizer) -> None:
    """Most data has none; labels that all differ say no more than none at all."""
    captions = ["a red circle", "a blue star", "a green ring"]
    none, distinct = (
        terms_of(make(tokenizer), batch_of(shapes, captions, labels))
        for labels in (None, [4, 5, 6])
    )
    for name, term in none.items():
        assert torch.isfinite(term) and term > 0
        torch.testing.assert_close(term, distinct[name])


# --- training ---------------------------------------------------------------------------------


def test_matched_is_the_share_that_find_a_caption_of_theirs(
    shapes: CaptionedDataset, tokenizer: WordTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caption in other hands counts where its words are the same."""
    system = make(tokenizer)
    batch = batch_of(shapes, ["a red circle", "a blue star", "a red circle", "a ring"], None)
    text = system.text.encode(batch.caption)
    text.sentence = torch.eye(4, WIDTH)
    nearest = [2, 1, 1, 3]  # of the four pictures; the third finds another's
    pictures = 5 * torch.eye(4, WIDTH)[nearest]
    monkeypatch.setattr(system.image, "forward", lambda image: pictures.requires_grad_())
    list(system.losses(batch, text, NoiseStreams(range(4))))
    assert system.facts["matched"].item() == pytest.approx(3 / 4)


@pytest.mark.parametrize("text", ["char_cnn_rnn", "bag"])
def test_training_makes_the_right_captions_nearest(
    text: str, shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """On eight pictures, also in evaluation mode, and for captions as for pictures."""
    torch.manual_seed(0)
    config = TextConfig(width=32, letters=100, channels=24)
    system = JointEmbedding(make_encoder(text, config, tokenizer), SIDE, channels=8)
    numbers = [0]
    while len(numbers) < 8:  # eight captions that differ
        taken = {shapes[n].captions[0] for n in numbers}
        numbers.append(next(n for n in range(99) if shapes[n].captions[0] not in taken))
    batch = Batch(shapes.batch(numbers, [0] * 8, 0).image, [], None, numbers)
    batch.caption = [shapes[n].captions[0] for n in numbers]
    optim = OptimConfig(lr=3e-3, warmup=0, decay="none")
    trainer = Trainer(system, shapes, optim, TrainConfig(batch=8, precision="fp32", prefetch=0))
    first = trainer.advance(batch)
    for _ in range(120):
        last = trainer.advance(batch)
    assert first["health/matched"] < 0.6
    for name in ("captions", "pictures"):
        assert last[f"embedding/{name}"] < 0.2 * first[f"embedding/{name}"]
    system.eval()
    fit = system.image(batch.image) @ system.text.encode(batch.caption).sentence.T
    assert fit.argmax(1).tolist() == fit.argmax(0).tolist() == list(range(8))


def test_it_is_no_system_and_trains_both_encoders(tokenizer: WordTokenizer) -> None:
    """It draws nothing, so the loop must not ask it for sheets."""
    system: Any = make(tokenizer)
    assert not isinstance(system, System)
    trained = {id(p) for part in system.groups()["embedding"] for p in part.parameters()}
    assert trained == {id(p) for p in system.parameters()}


@pytest.mark.parametrize("size", [4, 5, 8, 17, 24, 33, 64])
def test_pictures_of_every_side_are_read(size: int, tokenizer: WordTokenizer) -> None:
    """Also where the system behind it would refuse the side: that is for it to say."""
    assert make(tokenizer, size=size).image(torch.zeros(2, 3, size, size)).shape == (2, WIDTH)
