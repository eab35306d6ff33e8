"""The joint embedding: margins by hand, rivals, and training until captions match pictures."""

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
from lineage.system import System, Turn
from lineage.text.contract import TextFeatures
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import WordTokenizer
from lineage.training.loop import Trainer

SIDE, WIDTH = 16, 12


def make(tokenizer: WordTokenizer, text: str = "bag", size: int = SIDE) -> JointEmbedding:
    torch.manual_seed(0)
    return JointEmbedding(make_encoder(text, TextConfig(width=WIDTH), tokenizer), size, channels=8)


def turn_of(system: JointEmbedding, batch: Batch, text: TextFeatures | None = None) -> Turn:
    text = text or system.text.encode(batch.caption)
    (turn,) = system.losses(batch, text, NoiseStreams(range(len(batch))))
    assert turn.group == "embedding"
    return turn


# --- losses -----------------------------------------------------------------------------------

FIT = torch.tensor([[2.0, 1.5, 0.0], [0.5, 1.0, 3.0], [1.0, -1.0, 0.25]])
"""Compatibility of picture i (row) with caption j; own captions are on the diagonal."""

ALL_RIVALS = ~torch.eye(3, dtype=torch.bool)


def terms(rivals: Tensor) -> dict[str, float]:
    return {n: t.item() for n, t in embedding_terms(torch.eye(3), FIT.T, rivals).items()}


def test_margins_by_hand() -> None:
    """The loss of a rival is its distance from a margin of one below the picture's own caption
    (equation 4: 0.5 and 0; 0.5 and 3; 1.75 and 0), and below the caption's own picture (equation 5:
    1.5, 0.75; 0, 3.75; 0, 0). Means over the six pairs."""
    values = terms(ALL_RIVALS)
    assert values["captions"] == pytest.approx((0.5 + 0.5 + 3 + 1.75) / 6)
    assert values["images"] == pytest.approx((1.5 + 0.75 + 3.75) / 6)


def test_only_rivals_count() -> None:
    """In the sum and in its divisor; without any the loss is zero, not NaN."""
    some = torch.zeros(3, 3, dtype=torch.bool)
    some[0, 1] = some[1, 2] = True
    values = terms(some)
    assert values["captions"] == pytest.approx((0.5 + 3) / 2)
    assert values["images"] == pytest.approx((1.5 + 3.75) / 2)
    assert terms(torch.zeros(3, 3, dtype=torch.bool)) == {"captions": 0.0, "images": 0.0}


def test_pairs_beyond_the_margin_have_no_loss() -> None:
    """The margin is one."""
    far = embedding_terms(torch.eye(3), torch.eye(3), ALL_RIVALS)
    assert [term.item() for term in far.values()] == [0.0, 0.0]
    near = embedding_terms(torch.eye(3), 0.75 * torch.eye(3), ALL_RIVALS)
    assert [term.item() for term in near.values()] == pytest.approx([0.25, 0.25])


def test_the_loss_does_not_grow_with_the_batch() -> None:
    """Each picture twice, and copies are no rivals."""
    twice = ALL_RIVALS.repeat(2, 2)
    doubled = embedding_terms(torch.eye(3).repeat(2, 1), FIT.T.repeat(2, 1), twice)
    assert {n: t.item() for n, t in doubled.items()} == pytest.approx(terms(ALL_RIVALS))


# --- rivals -----------------------------------------------------------------------------------


def rivals_of(
    batch: Batch, tokenizer: WordTokenizer, monkeypatch: pytest.MonkeyPatch, same: str = "class"
) -> list[list[bool]]:
    """The pairs that a step counts as rivals."""
    calls: list[Tensor] = []

    def record(images: Tensor, captions: Tensor, rivals: Tensor) -> dict[str, Tensor]:
        calls.append(rivals)
        return embedding_terms(images, captions, rivals)

    monkeypatch.setattr(joint_embedding, "embedding_terms", record)
    system = make(tokenizer)
    system.same = same
    turn_of(system, batch)
    rivals: list[list[bool]] = calls[0].tolist()
    return rivals


def batch_of(shapes: CaptionedDataset, captions: list[str], labels: list[int] | None) -> Batch:
    image = shapes.batch(range(len(captions)), [0] * len(captions), 0).image
    label = None if labels is None else torch.tensor(labels)
    return Batch(image, captions, label, list(range(len(captions))))


@pytest.mark.parametrize(
    ("labels", "matching"),
    [
        (None, {(0, 2)}),  # the same words
        ([0, 1, 2, 1], {(0, 2), (1, 3)}),  # and the same class
        ([5, 6, 7, 8], {(0, 2)}),
        ([3, 3, 3, 3], {(i, j) for i in range(4) for j in range(i)}),
    ],
)
def test_pairs_of_one_caption_or_class_are_no_rivals(
    labels: list[int] | None,
    matching: set[tuple[int, int]],
    shapes: CaptionedDataset,
    tokenizer: WordTokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loss must not push a caption away from a picture that it describes."""
    captions = ["a red circle", "a blue star", "a red circle", "circle red a"]
    rivals = rivals_of(batch_of(shapes, captions, labels), tokenizer, monkeypatch)
    for i in range(4):
        for j in range(4):
            expected = i != j and (i, j) not in matching and (j, i) not in matching
            assert rivals[i][j] == expected, (i, j)
    rivals = rivals_of(batch_of(shapes, captions, labels), tokenizer, monkeypatch, same="caption")
    differing = [[i != j and {i, j} != {0, 2} for j in range(4)] for i in range(4)]
    assert rivals == differing  # classes have no effect


def test_it_works_without_labels(shapes: CaptionedDataset, tokenizer: WordTokenizer) -> None:
    """Most data has none; labels that all differ have the same effect."""
    captions = ["a red circle", "a blue star", "a green ring"]
    none, distinct = (
        turn_of(make(tokenizer), batch_of(shapes, captions, labels)).terms
        for labels in (None, [4, 5, 6])
    )
    for name, term in none.items():
        assert torch.isfinite(term) and term > 0
        torch.testing.assert_close(term, distinct[name])


# --- training ---------------------------------------------------------------------------------


def test_matched_is_the_share_of_pictures_whose_nearest_caption_fits(
    shapes: CaptionedDataset, tokenizer: WordTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another picture's caption counts if its words are the same."""
    system = make(tokenizer)
    batch = batch_of(shapes, ["a red circle", "a blue star", "a red circle", "a ring"], None)
    text = system.text.encode(batch.caption)
    text.sentence = torch.eye(4, WIDTH)
    nearest = [2, 1, 1, 3]  # of the four pictures; the third's is another one
    images = 5 * torch.eye(4, WIDTH)[nearest]
    monkeypatch.setattr(system.image_encoder, "forward", lambda image: images.requires_grad_())
    assert turn_of(system, batch, text).metrics()["matched"].item() == pytest.approx(3 / 4)


@pytest.mark.parametrize("text", ["char_cnn_rnn", "bag"])
def test_training_makes_the_right_captions_nearest(
    text: str, shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """On eight pictures, also in evaluation mode, and for captions as for pictures."""
    torch.manual_seed(0)
    config = TextConfig(width=32, max_chars=100, conv_channels=24)
    system = JointEmbedding(make_encoder(text, config, tokenizer), SIDE, channels=8)
    by_caption = {shapes[n].captions[0]: n for n in reversed(range(99))}
    captions = sorted(by_caption, key=by_caption.__getitem__)[:8]  # that differ
    rows = [by_caption[caption] for caption in captions]
    batch = Batch(shapes.batch(rows, [0] * 8, 0).image, captions, None, list("abcdefgh"))
    optim = OptimConfig(lr=3e-3, warmup=0, decay="none")
    trainer = Trainer(
        system, shapes, optim, TrainConfig(batch_size=8, precision="fp32", prefetch=0)
    )
    first = trainer.advance(batch)
    for _ in range(120):
        last = trainer.advance(batch)
    assert first["metric/matched"] < 0.6
    for name in ("captions", "images"):
        assert last[f"embedding/{name}"] < 0.2 * first[f"embedding/{name}"]
    system.eval()
    scores = system.image_encoder(batch.image) @ system.text.encode(batch.caption).sentence.T
    assert scores.argmax(1).tolist() == scores.argmax(0).tolist() == list(range(8))


def test_it_is_no_system_and_trains_both_encoders(tokenizer: WordTokenizer) -> None:
    """It draws no pictures, so the loop must not draw sheets with it."""
    system: Any = make(tokenizer)
    assert not isinstance(system, System)
    trained = {id(p) for part in system.groups()["embedding"] for p in part.parameters()}
    assert trained == {id(p) for p in system.parameters()}


@pytest.mark.parametrize("size", [4, 5, 8, 17, 24, 33, 64])
def test_pictures_of_every_side_are_encoded(size: int, tokenizer: WordTokenizer) -> None:
    """Also where the GAN after it would refuse the side."""
    assert make(tokenizer, size=size).image_encoder(torch.zeros(2, 3, size, size)).shape == (
        2,
        WIDTH,
    )
