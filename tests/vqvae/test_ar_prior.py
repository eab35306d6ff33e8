"""The prior: one sequence, who knows what, losses by loops, sampling, what a run keeps of it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import lineage
from lineage.config import OptimConfig, TextConfig, TrainConfig
from lineage.data.contract import Batch, CaptionedDataset, to_unit
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.system import Turn
from lineage.text.contract import TextFeatures
from lineage.text.encoders import ENCODERS, make_encoder
from lineage.text.tokenizer import WordTokenizer
from lineage.training.loop import Trainer
from lineage.training.store import load_state, load_tensors
from lineage.vqvae.ar_prior import Choice, Prior, PriorConfig
from lineage.vqvae.codec import Codec, Codes
from lineage.vqvae.transformer import TransformerConfig

K, SIDE, SIZE, PLACES, WIDTH = 5, 3, 12, 6, 12
LONG = "two small yellow stars to the left of a large purple ring"
CAPTIONS = ["a red circle", "", LONG, "a zorp ring", "small stars"]
ORDERED = [name for name, encoder in ENCODERS.items() if getattr(encoder, "in_order", False)]
OTHERS = [name for name in ENCODERS if name not in ORDERED]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Squares(Codec):
    """Squares of 4 x 4 pixels in K shades of grey: what it paints, it reads as the same codes."""

    def __init__(self, codes: int = K) -> None:
        super().__init__()
        self.codes, self.factor = codes, 4
        self.shades = nn.Parameter(torch.linspace(-0.9, 0.9, codes))
        self.norm = nn.BatchNorm2d(3)
        self.modes: list[bool] = []  # in which it was asked to encode
        self.half: list[bool] = []  # whether in half precision
        self.error.fill_(0.01)

    def groups(self) -> dict[str, list[nn.Module]]:
        return {"codec": [self]}

    def losses(self, batch: Batch, text: TextFeatures, draws: NoiseStreams) -> Iterator[Turn]:
        yield "codec", {"none": 0 * self.shades.sum()}

    def encode(self, image: Tensor) -> Tensor:
        self.modes.append(self.training)
        self.half.append(torch.is_autocast_enabled("cpu"))
        self.norm(image)  # only to notice a training mode: its statistics would move
        grey = image.mean(1).unflatten(2, (-1, 4)).unflatten(1, (-1, 4)).mean((2, 4))
        return (grey[..., None] - self.shades).abs().argmin(-1)

    def decode(self, ids: Tensor) -> Tensor:
        image = self.shades[ids].repeat_interleave(4, 1).repeat_interleave(4, 2)
        return image[:, None].expand(-1, 3, -1, -1)


TOKENIZER = WordTokenizer.train(["a red circle", LONG], 40)


def make(
    text: str = "bag", codes: int = K, kept: int = 0, size: int = SIZE, **settings: Any
) -> Prior:
    """An untrained prior whose weights are as large as learnt ones, so that all of it shows."""
    torch.manual_seed(0)
    given = {"places": PLACES, "drop_text": 0.0} | settings
    config = PriorConfig(TransformerConfig(WIDTH, 2, 3), **given)
    encoder = TextConfig(words=10, width=8, heads=2, channels=6)
    codec = Squares(codes)
    prior = Prior(config, Codes(codec, size, kept), make_encoder(text, encoder, TOKENIZER), size)
    with torch.no_grad():
        for name, parameter in prior.named_parameters():
            if not name.startswith("codec."):
                parameter += 0.3 * torch.randn_like(parameter)
        for name, parameter in prior.text.named_parameters():
            if name == "table.weight":
                parameter[0] = 0  # padding
    return prior.eval()


def grids(rows: int, codes: int = K, side: int = SIDE) -> Tensor:
    return torch.randint(codes, (rows, side, side))


def pictured(ids: Tensor, captions: list[str] | None = None, codes: int = K) -> Batch:
    """A batch of pictures whose codes are `ids`, with a little noise that changes none of them."""
    image = Squares(codes).decode(ids).detach()
    image = image + 0.05 * torch.rand_like(image)
    names = [str(number) for number in range(len(ids))]
    return Batch(image, captions or CAPTIONS[: len(ids)], None, names)


def differ(a: Tensor, b: Tensor) -> Tensor:
    """(...,) largest difference along the last axis."""
    return (a - b).abs().amax(-1)


def sequence(prior: Prior, caption: str, ids: list[int]) -> list[Tensor]:
    """The whole sequence of one row by hand, before the transformer: T + 1 + N vectors."""
    text = prior.text.encode([caption])
    words = [vector for vector, there in zip(text.words[0], text.mask[0], strict=True) if there]
    made = [prior.start.weight[0]]
    for place in range(prior.config.places):
        empty = prior.empty.weight[place]
        vector = prior.read(words[place]) if place < len(words) else empty
        made.append(vector + prior.place.weight[place])
    for place, number in enumerate(ids):
        row, column = divmod(place, prior.side)
        where = prior.row.weight[row] + prior.column.weight[column]
        made.append(prior.code.weight[number] + where)
    return made


def naive_logits(
    prior: Prior, caption: str, ids: list[int]
) -> tuple[list[Tensor] | None, list[Tensor]]:
    """Of each token from the sequence before it and nothing else, which is all there is to see."""
    whole, places = sequence(prior, caption, ids), prior.config.places
    last = [
        prior.transformer(torch.stack(whole[: end + 1])[None])[0, -1]
        for end in range(places + len(ids))
    ]
    words = [prior.text_head(x) for x in last[:places]] if prior.text_head is not None else None
    return words, [prior.code_head(x) for x in last[places:]]


# --- the sequence -----------------------------------------------------------------------------


@pytest.mark.parametrize("text", list(ENCODERS))
@torch.no_grad()
def test_logits_by_loops(text: str) -> None:
    """Of a short caption, of none, and of one longer than there are places for."""
    prior, ids = make(text), grids(len(CAPTIONS)).flatten(1)
    words, codes = prior.logits(prior.text.encode(CAPTIONS), ids)
    assert codes.shape == (5, SIDE**2, K)
    assert (words is None) == (text in OTHERS)
    for row, caption in enumerate(CAPTIONS):
        naive_words, naive_codes = naive_logits(prior, caption, ids[row].tolist())
        torch.testing.assert_close(codes[row], torch.stack(naive_codes), **CLOSE)
        if words is not None:
            assert words.shape == (5, PLACES, len(TOKENIZER))
            torch.testing.assert_close(words[row], torch.stack(naive_words), **CLOSE)


@pytest.mark.parametrize(("codes", "size", "places"), [(1, 12, 6), (4, 4, 6), (3, 8, 1)], ids=str)
@torch.no_grad()
def test_the_smallest_sizes_by_loops(codes: int, size: int, places: int) -> None:
    """One code to choose from, one place for a code, one place for a word."""
    prior = make(codes=codes, size=size, places=places)
    ids = grids(2, codes, size // 4).flatten(1)
    words, logits = prior.logits(prior.text.encode(CAPTIONS[:2]), ids)
    for row in range(2):
        naive_words, naive_codes = naive_logits(prior, CAPTIONS[row], ids[row].tolist())
        torch.testing.assert_close(logits[row], torch.stack(naive_codes), **CLOSE)
        torch.testing.assert_close(words[row], torch.stack(naive_words), **CLOSE)
    drawn = prior.generate(CAPTIONS[:2], guidance=2.0)
    assert drawn.shape == (2, 3, size, size) and drawn.isfinite().all()


@torch.no_grad()
def test_a_code_changes_only_what_comes_after_it() -> None:
    prior, ids = make(), grids(1).flatten(1)
    text = prior.text.encode(["a red circle"])
    words, codes = prior.logits(text, ids)
    for place in range(SIDE**2):
        other = ids.clone()
        other[0, place] = (ids[0, place] + 1) % K
        other_words, other_codes = prior.logits(text, other)
        assert torch.equal(other_words, words)
        changed = differ(other_codes, codes)[0]
        assert (changed[: place + 1] == 0).all() and (changed[place + 1 :] > 1e-4).all()


@pytest.mark.parametrize("text", ORDERED)
@torch.no_grad()
def test_a_word_changes_only_what_comes_after_it(text: str) -> None:
    """So a model that predicts it has not read it already; all codes come after all words."""
    prior, ids = make(text), grids(1).flatten(1)
    caption = LONG.split()
    words, codes = prior.logits(prior.text.encode([LONG]), ids)
    for place in range(PLACES):
        other = " ".join([*caption[:place], "circle", *caption[place + 1 :]])
        other_words, other_codes = prior.logits(prior.text.encode([other]), ids)
        changed = differ(other_words, words)[0]
        assert (changed[: place + 1] < 1e-6).all() and (changed[place + 1 :] > 1e-4).all()
        assert (differ(other_codes, codes) > 1e-4).all()


@pytest.mark.parametrize("text", ORDERED)
@torch.no_grad()
def test_words_behind_the_places_are_cut(text: str) -> None:
    prior, ids = make(text), grids(2).flatten(1)
    cut = " ".join(LONG.split()[:PLACES])
    words, codes = prior.logits(prior.text.encode([LONG, cut]), ids[:1].expand(2, -1))
    torch.testing.assert_close(words[0], words[1], **CLOSE)
    torch.testing.assert_close(codes[0], codes[1], **CLOSE)


@pytest.mark.parametrize("text", list(ENCODERS))
@torch.no_grad()
def test_padding_and_the_rest_of_the_batch_change_nothing(text: str) -> None:
    """Neither a longer caption beside it nor what stands in the vectors behind the words."""
    prior, ids = make(text), grids(len(CAPTIONS)).flatten(1)
    together = prior.logits(prior.text.encode(CAPTIONS), ids)
    for row, caption in enumerate(CAPTIONS):
        alone = prior.text.encode([caption])
        for features in (alone, alone.padded(17)):
            rubbish = torch.where(features.mask[..., None], features.words, torch.tensor(1e3))
            found = prior.logits(replace(features, words=rubbish), ids[row : row + 1])
            for whole, one in zip(together, found, strict=True):
                if one is not None:
                    torch.testing.assert_close(one[0], whole[row], **CLOSE)


@torch.no_grad()
def test_each_empty_place_has_a_vector_of_its_own() -> None:
    prior = make()
    text = prior.text.encode(CAPTIONS)
    before = prior.embed_text(text)
    assert before.shape == (5, 1 + PLACES, WIDTH)
    for place in range(PLACES):
        prior.empty.weight[place] += 1
        changed = differ(prior.embed_text(text), before)
        prior.empty.weight[place] -= 1
        expected = torch.zeros(5, 1 + PLACES)
        expected[:, 1 + place] = torch.tensor([place >= n for n in (3, 1, 12, 3, 2)]).float()
        torch.testing.assert_close(changed, expected)


# --- losses -----------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, number: int) -> float:
    scores = [math.exp(v) for v in logits.tolist()]
    return -math.log(scores[number] / sum(scores))


@pytest.mark.parametrize("text", list(ENCODERS))
@pytest.mark.parametrize("drop", [0.0, 0.5])
@torch.no_grad()
def test_losses_by_loops(text: str, drop: float) -> None:
    """Words that are there, of captions that are kept, are predicted, and all codes."""
    prior, ids = make(text, drop_text=drop, text_weight=0.3), grids(len(CAPTIONS))
    batch, seeds = pictured(ids), range(3, 8)
    keep = [u >= drop for u in NoiseStreams(seeds).rand().tolist()]
    assert drop == 0.0 or len(set(keep)) == 2
    picture, told, right = [], [], []
    for row, caption in enumerate(CAPTIONS):
        read = caption if keep[row] else ""
        words, codes = naive_logits(prior, read, ids[row].flatten().tolist())
        for logits, number in zip(codes, ids[row].flatten().tolist(), strict=True):
            picture.append(cross_entropy(logits, number))
            right.append(float(int(logits.argmax()) == number))
        if words is not None and keep[row]:
            numbers = TOKENIZER.encode(caption)[:PLACES]
            told += [cross_entropy(x, n) for x, n in zip(words, numbers, strict=False)]
    ((group, terms),) = prior.losses(batch, prior.text.encode(CAPTIONS), NoiseStreams(seeds))
    of_picture = sum(picture) / len(picture)
    expected = {"picture": of_picture}
    if text in ORDERED:
        expected = {"text": 0.3 * sum(told) / len(told), "picture": 0.7 * of_picture}
        assert prior.facts["text_nats"].item() == pytest.approx(sum(told) / len(told), rel=1e-4)
    assert group == "prior" and list(terms) == list(expected)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-4), name
    assert prior.facts["picture_nats"].item() == pytest.approx(of_picture, rel=1e-4)
    assert prior.facts["picture_accuracy"].item() == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("text", OTHERS)
def test_words_that_know_later_words_are_not_predicted(text: str) -> None:
    """Else the prior would learn to copy the word that it is asked for."""
    prior = make(text)
    assert prior.text_head is None and not prior.writes_text
    assert not any("text_head" in name for name in prior.state_dict())


@torch.no_grad()
def test_a_text_of_no_weight_is_not_predicted() -> None:
    prior, ids = make(text_weight=0.0), grids(2)
    assert prior.text_head is None
    ((_, terms),) = prior.losses(
        pictured(ids), prior.text.encode(CAPTIONS[:2]), NoiseStreams([0, 1])
    )
    assert list(terms) == ["picture"]
    assert terms["picture"] == prior.facts["picture_nats"]


def test_a_batch_whose_captions_are_all_dropped() -> None:
    """Nothing to predict is no loss, and no number that is none."""
    prior, ids = make(drop_text=0.999), grids(3)
    ((_, terms),) = prior.losses(
        pictured(ids), prior.text.encode(CAPTIONS[:3]), NoiseStreams([0, 1, 2])
    )
    assert terms["text"].item() == 0
    sum(terms.values()).backward()
    for name, parameter in prior.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name
    with torch.no_grad():
        text = prior.text.encode(["", "", ""])
        _, codes = prior.logits(text, ids.flatten(1))
    of_none = nn.functional.cross_entropy(codes.flatten(0, 1), ids.flatten())
    assert prior.facts["picture_nats"].item() == pytest.approx(of_none.item(), rel=1e-4)


@pytest.mark.parametrize("text", list(ENCODERS))
def test_losses_in_half_precision(text: str) -> None:
    prior, ids = make(text, drop_text=0.3), grids(len(CAPTIONS))
    found = []
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            features = prior.text.encode(CAPTIONS)
            ((_, terms),) = prior.losses(pictured(ids), features, NoiseStreams(range(5)))
        found.append(terms)
        assert all(term.dtype == torch.float32 and term.shape == () for term in terms.values())
    assert prior.codec.half == [False, False]  # codes are what they are elsewhere
    sum(found[1].values()).backward()
    for name, value in found[0].items():
        assert found[1][name].item() == pytest.approx(value.item(), rel=0.03), name


@torch.no_grad()
def test_codes_that_are_known_are_not_found_again() -> None:
    """By the pictures' names; a batch with a picture that is not known is encoded."""
    prior, ids = make(kept=4), grids(4)
    codes, batch = prior.known[0], pictured(ids)
    list(codes.losses(batch, codes.text.encode(batch.caption), NoiseStreams(range(4))))
    prior.codec.modes.clear()
    features = prior.text.encode(batch.caption)
    ((_, terms),) = prior.losses(batch, features, NoiseStreams(range(4)))
    black = replace(batch, image=torch.full_like(batch.image, -1.0))
    ((_, known),) = prior.losses(black, features, NoiseStreams(range(4)))
    assert not prior.codec.modes and torch.equal(known["picture"], terms["picture"])
    new = replace(black, id=["0", "1", "2", "new"])
    ((_, found),) = prior.losses(new, features, NoiseStreams(range(4)))
    assert prior.codec.modes == [False]
    assert not torch.equal(found["picture"], terms["picture"])


@torch.no_grad()
def test_codes_of_large_codebooks_are_kept_as_they_are() -> None:
    codes = 40_000
    known = Codes(Squares(codes), SIZE, 2)
    ids = torch.tensor([0, 32_767, 32_768, 39_999, 1, 2, 3, 4, 5]).view(1, SIDE, SIDE)
    batch = pictured(ids, codes=codes)
    batch.image = known.codec.decode(ids)
    list(known.losses(batch, known.text.encode(batch.caption), NoiseStreams([0])))
    assert torch.equal(known.codec.encode(batch.image), ids)
    assert torch.equal(known.of(batch), ids)


# --- what is trained --------------------------------------------------------------------------


@pytest.mark.parametrize("text", list(ENCODERS))
def test_the_group_holds_all_that_is_trained_once(text: str) -> None:
    prior = make(text)
    (modules,) = prior.groups().values()
    held = [id(p) for module in modules for p in module.parameters()]
    trained = {id(p): name for name, p in prior.named_parameters() if p.requires_grad}
    assert len(held) == len(set(held)) and set(held) == set(trained)
    assert not any(name.startswith("codec.") for name in trained.values())
    assert any(name.startswith("text.") for name in trained.values())
    assert not any(p.requires_grad for p in prior.codec.parameters())


class Drawn(CaptionedDataset):
    """Eight pictures of known codes."""

    name, split, size, skipped = "drawn", "train", SIZE, []

    def __init__(self) -> None:
        self.ids = grids(8)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError

    def batch(self, indices: Any, epochs: Any, seed: int) -> Batch:
        words = [f"{a} {b}" for a in ("red", "small") for b in ("ring", "circle", "stars", "left")]
        whole = pictured(self.ids, words)
        return Batch(
            whole.image[list(indices)],
            [words[i] for i in indices],
            None,
            [str(i) for i in indices],
        )


def trainer_of(prior: Prior, data: CaptionedDataset, **optim: Any) -> Trainer:
    given = {"lr": 1e-2, "warmup": 0, "decay": "none", "average": 0.0, "weight_decay": 0.0} | optim
    train = TrainConfig(batch=8, precision="fp32", prefetch=0)
    return Trainer(prior, data, OptimConfig(**given), train)


@pytest.mark.parametrize("text", ["bag", "lstm"])
def test_training_leaves_the_codec_as_it_is(text: str) -> None:
    """Weights, statistics and mode, with captions dropped or not; all else moves."""
    prior, data = make(text, drop_text=0.3), Drawn()
    before = {name: tensor.clone() for name, tensor in prior.state_dict().items()}
    trainer = trainer_of(prior, data)
    for step in range(3):
        trainer.advance(trainer.loader.at(step))
    assert prior.training and prior.text.training and not prior.codec.training
    assert prior.codec.modes == [False] * 3
    for name, tensor in prior.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("codec."), name
    assert all(p.grad is None for p in prior.codec.parameters())


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_eight_grids_are_learnt_by_heart(optim: str) -> None:
    """From its caption alone each is written again, at a temperature of 0."""
    prior, data = make(drop_text=0.1), Drawn()
    trainer = trainer_of(prior, data, name=optim)
    for step in range(80):
        trainer.advance(trainer.loader.at(step))
    assert prior.facts["picture_accuracy"] > 0.85  # without its caption it cannot tell which
    batch = data.batch(range(8), [0] * 8, 0)
    prior.eval()
    drawn = prior.generate(batch.caption, temperature=0.0)
    assert torch.equal(prior.codec.encode(drawn), data.ids)
    again = prior.complete(batch.caption, batch.image, keep=0.4, temperature=0.0)
    assert torch.equal(prior.codec.encode(again), data.ids)
    scores = prior.stage_scores(batch)
    assert scores["accuracy"].min() == 1 and scores["nats_per_code"].max() < 0.3


# --- the choice of a code ---------------------------------------------------------------------


def naive_shares(logits: list[float], choice: Choice) -> list[float]:
    """Temperature, then the k likeliest, then the fewest likeliest whose shares reach p."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if choice.temperature == 0:
        return [float(i == order[0]) for i in range(len(logits))]
    kept = order[: choice.top_k] if choice.top_k else order
    high = max(logits)
    weights = {i: math.exp((logits[i] - high) / choice.temperature) for i in kept}
    total = sum(weights.values())
    shares = {i: weight / total for i, weight in weights.items()}
    nucleus, heap = [], 0.0
    for i in kept:
        nucleus.append(i)
        heap += shares[i]
        if heap >= choice.top_p:
            break
    if choice.top_p == 1:
        nucleus = kept
    rest = sum(shares[i] for i in nucleus)
    return [shares[i] / rest if i in nucleus else 0.0 for i in range(len(logits))]


CHOICES = [
    Choice(),
    Choice(temperature=0.0),
    Choice(temperature=0.5),
    Choice(temperature=3.0),
    Choice(top_k=1),
    Choice(top_k=3),
    Choice(top_k=8),
    Choice(top_k=100),
    Choice(top_p=0.9),
    Choice(top_p=0.5),
    Choice(top_p=1e-6),
    Choice(temperature=0.7, top_k=5, top_p=0.8),
    Choice(temperature=2.0, top_k=2, top_p=0.3),
    Choice(temperature=0.0, top_k=3, top_p=0.5),
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_shares_by_loops(choice: Choice) -> None:
    """Up to a factor, which the choice does not see; rows do not know each other."""
    logits = 2 * torch.randn(40, 8)
    before = logits.clone()
    found = choice.probabilities(logits)
    assert torch.equal(logits, before) and found.shape == (40, 8)
    for row, shares in zip(logits, found / found.sum(1, keepdim=True), strict=True):
        expected = naive_shares(row.tolist(), choice)
        torch.testing.assert_close(shares, torch.tensor(expected), rtol=1e-4, atol=1e-6)
        assert [share == 0 for share in shares.tolist()] == [share == 0 for share in expected]


def test_one_code_leaves_no_choice() -> None:
    for choice in CHOICES:
        assert choice.take(torch.randn(3, 1), torch.tensor([0.0, 0.5, 0.99])).tolist() == [0, 0, 0]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_codes_are_taken_as_often_as_their_shares(choice: Choice) -> None:
    """Evenly spaced numbers, each code takes as many of as its share, to within one."""
    logits, count = torch.randn(1, 8), 4000
    uniform = (torch.arange(count) + 0.5) / count
    taken = choice.take(logits.expand(count, -1), uniform)
    assert taken.dtype == torch.int64 and taken.shape == (count,)
    often = torch.bincount(taken, minlength=8).double()
    expected = count * torch.tensor(naive_shares(logits[0].tolist(), choice))
    assert (often - expected).abs().max() <= 1.5
    assert taken.tolist() == sorted(taken.tolist())  # more of the number, later codes


@pytest.mark.parametrize("uniform", [0.0, 1e-7, 0.5, 0.99999994], ids=str)
@pytest.mark.parametrize("codes", [1, 2, 7, 1000, 8192])
def test_no_number_takes_a_code_that_is_out_of_the_question(uniform: float, codes: int) -> None:
    """Not at the ends of its range either, nor where codes have no share on either side."""
    u = torch.full((16,), uniform)
    logits = 3 * torch.randn(16, codes)
    for choice in CHOICES:
        taken = choice.take(logits, u)
        assert taken.min() >= 0 and taken.max() < codes
        shares = choice.probabilities(logits)
        assert (shares.gather(1, taken[:, None]) > 0).all(), choice
    only = torch.full((16, codes), -torch.inf)
    at = torch.arange(16) % codes
    only[torch.arange(16), at] = 0.0
    assert torch.equal(Choice().take(only, u), at)
    if codes > 2:
        flat = torch.zeros(16, codes)
        flat[:, 0] = flat[:, -1] = -1e4  # neither the first nor the last
        expected = min(codes - 2, 1 + int(uniform * (codes - 2)))
        assert (Choice().take(flat, u) - expected).abs().max() <= 1


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-37, 1e-39, 1e-44])
def test_a_temperature_near_zero_takes_the_likeliest(temperature: float) -> None:
    """Where logits by temperature are more than a number can hold."""
    logits = 30 * torch.randn(50, 8)
    taken = Choice(temperature).take(logits, torch.rand(50))
    assert torch.equal(taken, logits.argmax(1))


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"guidance": -1.0}, "guidance=-1.0"),
        ({"guidance": math.nan}, "guidance=nan"),
        ({"guidance": math.inf}, "guidance=inf"),
    ],
    ids=str,
)
def test_choices_that_cannot_be_are_refused(knobs: dict[str, float], told: str) -> None:
    for build in (Choice, PriorConfig):
        with pytest.raises(UserError, match=told):
            build(**knobs)


@pytest.mark.parametrize(
    "settings",
    [{"places": 0}, {"text_weight": 1.0}, {"drop_text": 1.0}, {"drop_text": -0.1}],
    ids=str,
)
def test_priors_that_cannot_be_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"model.{next(iter(settings))}="):
        PriorConfig(**settings)


# --- sampling ---------------------------------------------------------------------------------

SETTINGS = [
    Choice(),
    Choice(guidance=3.0),
    Choice(guidance=0.0),
    Choice(0.7, 3, 0.8),
    Choice(1.5, 0, 0.6, 2.0),
    Choice(0.0),
    Choice(0.0, guidance=2.5),
]


@pytest.mark.parametrize("given", [0, 1, 4, 9])
@pytest.mark.parametrize("choice", SETTINGS, ids=str)
@torch.no_grad()
def test_sampling_by_loops(choice: Choice, given: int) -> None:
    """Row by row and code by code from the logits of all before, with cache and without; what is
    given stays."""
    prior, rows = make("transformer"), len(CAPTIONS)
    begun = grids(rows).flatten(1)[:, :given]
    uniform = NoiseStreams(range(rows)).rand(SIDE**2)
    expected = []
    for row, caption in enumerate(CAPTIONS):
        ids = begun[row].tolist()
        for place in range(given, SIDE**2):
            filled = torch.tensor([[*ids, *[0] * (SIDE**2 - place)]])
            towards = prior.logits(prior.text.encode([caption]), filled)[1][0, place]
            without = prior.logits(prior.text.encode([""]), filled)[1][0, place]
            logits = without + choice.guidance * (towards - without)
            shares, heap = naive_shares(logits.tolist(), choice), 0.0
            for number, share in enumerate(shares):  # noqa: B007
                heap += share
                if heap > float(uniform[row, place]):
                    break
            ids.append(number)
        expected.append(ids)
    text = prior.text.encode(CAPTIONS)
    for cached in (True, False):
        found = prior.sample(
            text, NoiseStreams(range(rows)), choice, begun if given else None, cached
        )
        assert found.shape == (rows, SIDE, SIDE) and found.dtype == torch.int64
        assert found.flatten(1).tolist() == expected, cached


@pytest.mark.parametrize("text", list(ENCODERS))
@torch.no_grad()
def test_cached_codes_are_those_without(text: str) -> None:
    prior = make(text, codes=50, size=24)
    features = prior.text.encode(CAPTIONS)
    for choice in SETTINGS:
        found = [
            prior.sample(features, NoiseStreams(range(5)), choice, None, c) for c in (True, False)
        ]
        assert torch.equal(*found), choice


def test_a_picture_does_not_hang_on_those_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = make("lstm", codes=50, size=24, guidance=2.0, top_p=0.9)
    together = prior.generate(CAPTIONS, seed=3)
    assert torch.equal(prior.generate(CAPTIONS[:1], seed=3), together[:1])
    beside = [CAPTIONS[0], LONG, CAPTIONS[2], "", ""]
    again = prior.generate(beside, seed=3)
    assert torch.equal(again[[0, 2]], together[[0, 2]]) and not torch.equal(again, together)
    for at_once in (1, 2, 3):
        monkeypatch.setattr(prior, "at_once", at_once)
        assert torch.equal(prior.generate(CAPTIONS, seed=3), together)
    assert not torch.equal(prior.generate(CAPTIONS, seed=4), together)
    assert len(torch.unique(prior.generate(["a ring"] * 5), dim=0)) == 5


def test_guidance_of_one_is_none_and_of_zero_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = make("transformer", codes=50, size=24)
    plain = prior.generate(CAPTIONS)
    assert torch.equal(prior.generate(CAPTIONS, guidance=1.0), plain)
    assert torch.equal(prior.generate(CAPTIONS, guidance="1"), plain)
    near = prior.generate(CAPTIONS, guidance=1 + 1e-6)  # by way of both
    assert (near != plain).float().mean() < 0.05
    unread = prior.generate([""] * 5)
    assert torch.equal(prior.generate(CAPTIONS, guidance=0.0), unread)
    assert not torch.equal(plain, unread)
    assert not torch.equal(prior.generate(CAPTIONS, guidance=3.0), plain)


class NoDouble(TorchFunctionMode):
    """A device without float64, such as `mps`, which refuses to make any."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return result


@pytest.mark.parametrize("what", ["generate", "stage_scores"])
@torch.no_grad()
def test_devices_without_float64_will_do(what: str) -> None:
    """`--device mps` is offered for every system."""
    prior, batch = make(guidance=2.0), pictured(grids(2))
    with NoDouble():
        if what == "generate":
            prior.generate(CAPTIONS)
        else:
            prior.stage_scores(batch)


def test_knobs_of_the_configuration_are_what_is_not_asked_for() -> None:
    own = {"temperature": 0.6, "top_k": 7, "top_p": 0.8, "guidance": 2.0}
    tuned, plain = make(codes=50, size=24, **own), make(codes=50, size=24)
    expected = plain.generate(CAPTIONS, **own)
    assert torch.equal(tuned.generate(CAPTIONS), expected)
    assert torch.equal(tuned.generate(CAPTIONS, top_k=7, temperature=None), expected)
    changed = tuned.generate(CAPTIONS, temperature=1.5, top_k=0, top_p="1", guidance=1.0)
    assert torch.equal(changed, plain.generate(CAPTIONS, temperature=1.5))
    assert list(tuned.knobs()) == list(own)
    with pytest.raises(UserError, match=r"temperature=-1"):
        tuned.generate(CAPTIONS, temperature=-1)
    with pytest.raises(UserError, match="top_k"):
        tuned.generate(CAPTIONS, top_k=2.5)


# --- completion -------------------------------------------------------------------------------


def watched(prior: Prior, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the codec is asked to decode from now on."""
    seen: list[Tensor] = []
    original = prior.codec.decode

    def decode(ids: Tensor) -> Tensor:
        seen.append(ids.clone())
        return original(ids)

    monkeypatch.setattr(prior.codec, "decode", decode)
    return seen


@pytest.mark.parametrize(("keep", "rows"), [(0.0, 0), (0.3, 2), (0.5, 3), (0.84, 5), (1.0, 6)])
@pytest.mark.parametrize("at_once", [2, 64])
def test_completion_keeps_what_is_given(
    keep: float, rows: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior, ids = make(codes=50, size=24, guidance=2.0), grids(5, 50, 6)
    image = Squares(50).decode(ids).detach()
    monkeypatch.setattr(prior, "at_once", at_once)
    seen = watched(prior, monkeypatch)
    made = prior.complete(CAPTIONS, image, keep=keep, seed=3, top_p=0.9)
    found = torch.cat(seen)
    assert torch.equal(found[:, :rows], ids[:, :rows])
    assert made.shape == image.shape and made.dtype == torch.float32 and not made.requires_grad
    assert torch.equal(made[:, :, : 4 * rows], image[:, :, : 4 * rows])
    if rows < 6:
        assert (found[:, rows:] != ids[:, rows:]).float().mean() > 0.5
        other = torch.cat([ids[:, :rows], grids(5, 50, 6)[:, rows:]], dim=1)
        below = prior.complete(
            CAPTIONS, Squares(50).decode(other).detach(), keep=keep, seed=3, top_p=0.9
        )
        assert torch.equal(below, made)  # what is not given is not looked at
    if rows == 0:
        assert torch.equal(made, prior.generate(CAPTIONS, seed=3, top_p=0.9))
    alone = prior.complete(CAPTIONS[:1], image[:1], keep=keep, seed=3, top_p=0.9)
    assert torch.equal(alone[0], made[0])


def test_completion_goes_on_from_what_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default from a half; other upper halves, other lower ones; in evaluation mode."""
    prior = make(codes=50, size=24).train()
    first, second = grids(2, 50, 6).split(1)
    made = [prior.complete(["a ring"], Squares(50).decode(x).detach()) for x in (first, second)]
    assert prior.training
    assert torch.equal(made[0][..., :12, :], Squares(50).decode(first).detach()[..., :12, :])
    assert not torch.equal(made[0][..., 12:, :], made[1][..., 12:, :])
    assert not any(prior.codec.modes)


def test_completions_that_cannot_be_are_told() -> None:
    prior, image = make(), torch.zeros(2, 3, SIZE, SIZE)
    for keep in (-0.1, 1.1, math.nan):
        with pytest.raises(UserError, match=f"keep={keep} must be from 0 to 1"):
            prior.complete(CAPTIONS[:2], image, keep=keep)
    with pytest.raises(UserError, match="3 captions need as many pictures"):
        prior.complete(CAPTIONS[:3], image)
    with pytest.raises(UserError, match="at least one caption"):
        prior.complete([], image[:0])
    with pytest.raises(UserError, match="'gidance'"):
        prior.complete(CAPTIONS[:2], image, gidance=3)
    with pytest.raises(UserError, match="top_p=2"):
        prior.complete(CAPTIONS[:2], image, top_p="2")


@pytest.mark.parametrize("size", [4, 8, 16, 24])
def test_pictures_of_another_size_are_no_beginning(size: int) -> None:
    """Their codes stand in rows of another length, and would be read as something else."""
    prior = make()
    for keep in (0.5, 1.0):
        with pytest.raises(UserError, match=f"{size}"):
            prior.complete(["a red circle"], torch.zeros(1, 3, size, size), keep=keep)


# --- inside -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 8, 12, 24])
def test_inside_is_the_picture_as_it_is_written(size: int) -> None:
    prior = make(codes=7, size=size, guidance=2.0, temperature=0.8)
    side, total = size // 4, (size // 4) ** 2
    picture = prior.generate(CAPTIONS[0], seed=3)[0]
    (row,) = prior.inside(CAPTIONS[0], seed=3)
    assert len(row) == 8
    for eighth, (name, image) in enumerate(row, start=1):
        written = math.ceil(total * eighth / 8)
        assert name == f"{written} of {total} codes"
        expected = torch.zeros_like(picture)  # grey
        for place in range(written):
            y, x = 4 * (place // side), 4 * (place % side)
            expected[:, y : y + 4, x : x + 4] = picture[:, y : y + 4, x : x + 4]
        assert torch.equal(image, expected), name
    assert torch.equal(row[-1][1], picture)


# --- stages apart -----------------------------------------------------------------------------


@torch.no_grad()
def test_stage_scores_by_loops() -> None:
    """PSNR of 8-bit pictures, nats of true codes, and bits of a pixel's colour for both stages."""
    prior, ids = make("transformer"), grids(len(CAPTIONS))
    clean = Squares().decode(ids).detach()
    noise = 0.1 * torch.randn_like(clean)
    pixels = ((clean + noise + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    pixels[0, :, :2], pixels[1, :, :2] = 0, 255  # the ends of the range
    batch = Batch(to_unit(pixels), CAPTIONS, None, [str(i) for i in range(5)])
    ids = prior.codec.encode(batch.image)
    shown = prior.codec.decode(ids)
    prior.codec.error.fill_(0.2)
    scores = prior.stage_scores(batch)
    assert list(scores) == ["psnr", "nats_per_code", "accuracy", "bits_per_dim"]
    for row, caption in enumerate(CAPTIONS):
        _, logits = naive_logits(prior, caption, ids[row].flatten().tolist())
        numbers = ids[row].flatten().tolist()
        nats = [cross_entropy(x, n) for x, n in zip(logits, numbers, strict=True)]
        right = [int(x.argmax()) == n for x, n in zip(logits, numbers, strict=True)]
        error = float((shown[row] - batch.image[row]).double().square().mean())
        of_pixels = sum(
            -math.log(max(byte_share(value, mean, math.sqrt(0.2)), 1e-30))
            for value, mean in zip(
                pixels[row].flatten().tolist(), shown[row].flatten().tolist(), strict=True
            )
        )
        expected = {
            "psnr": 10 * math.log10(4 / error),
            "nats_per_code": sum(nats) / len(nats),
            "accuracy": sum(right) / len(right),
            "bits_per_dim": (sum(nats) + of_pixels) / math.log(2) / (3 * SIZE * SIZE),
        }
        for name, value in expected.items():
            assert scores[name].shape == (5,)
            assert scores[name][row].item() == pytest.approx(value, rel=1e-3), name


def byte_share(value: int, mean: float, deviation: float) -> float:
    """Of a byte under a Gaussian about `mean`; what lies beyond the ends belongs to them."""
    if value / 127.5 - 1 > mean:  # to the left, where no small number is lost beside 1
        return byte_share(255 - value, -mean, deviation)

    def below(edge: float) -> float:
        return 0.5 * math.erfc((mean - edge) / deviation / math.sqrt(2))

    low = below((value - 0.5) / 127.5 - 1) if value > 0 else 0.0
    high = below((value + 0.5) / 127.5 - 1) if value < 255 else 1.0
    return high - low


@torch.no_grad()
def test_the_shares_of_all_bytes_are_one() -> None:
    """Bits are of a code that could be sent, whatever the codec paints."""
    prior = make()
    every = to_unit(torch.arange(256, dtype=torch.uint8)).view(256, 1, 1, 1)
    for deviation in (0.05, 0.3, 1.0):
        prior.codec.error.fill_(deviation**2)
        for shade in range(K):
            ids = torch.full((256, 1, 1), shade)
            one = SimpleNamespace(decode=lambda x: prior.codec.shades[x][:, None])
            one.error = prior.codec.error
            nats = Codec.nats(one, every, ids)  # type: ignore[arg-type]
            assert (-nats).double().exp().sum().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("far", [4.0, 6.0, 8.0, 9.0, 10.0, 11.0])
@torch.no_grad()
def test_bits_of_a_pixel_that_is_far_off(far: float) -> None:
    """So many deviations: an edge that the codec blurs is told as unlikely as it is."""
    one = SimpleNamespace(error=torch.tensor(0.05**2))
    value = round((0.05 * far + 1) * 127.5)
    for sign, number in ((1, value), (-1, 255 - value)):
        mean = 0.01 * sign
        one.decode = lambda ids, mean=mean: torch.full((1, 3, 1, 1), mean)
        image = to_unit(torch.tensor(number)).expand(1, 3, 1, 1)
        nats = Codec.nats(one, image, torch.zeros(1, 1, 1))  # type: ignore[arg-type]
        expected = -3 * math.log(byte_share(number, mean, 0.05))
        assert nats.item() == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_scores_do_not_hang_on_the_batch_or_on_what_is_known() -> None:
    """Pictures of another data set may have the names of those whose codes are kept."""
    prior, ids = make(kept=5), grids(5)
    batch, codes = pictured(ids), prior.known[0]
    other = replace(pictured(grids(5)), id=batch.id)
    expected = prior.stage_scores(other)
    list(codes.losses(batch, codes.text.encode(batch.caption), NoiseStreams(range(5))))
    again = prior.stage_scores(other)
    alone = [prior.stage_scores(part) for part in other.split(2)]
    for name, values in expected.items():
        assert torch.equal(again[name], values)
        torch.testing.assert_close(torch.cat([part[name] for part in alone]), values, **CLOSE)
    torch.testing.assert_close(
        prior.reconstruct(other.image), prior.codec.decode(prior.codec.encode(other.image))
    )


# --- what is kept -----------------------------------------------------------------------------


def test_known_codes_are_no_weights_of_the_prior() -> None:
    """A run folder would otherwise hold the codes of all training pictures."""
    small, large = make(kept=2), make(kept=500)
    assert [n for n in small.state_dict() if n.split(".")[0] in ("known", "names", "ids")] == []
    assert {n: t.shape for n, t in small.state_dict().items()} == {
        n: t.shape for n, t in large.state_dict().items()
    }
    assert not any(isinstance(module, Codes) for module in large.modules())
    with torch.no_grad():
        small.start.weight.add_(1)
        small.codec.shades.add_(0.01)
    large.load_state_dict(small.state_dict(), strict=True)
    assert torch.equal(small.generate(CAPTIONS), large.generate(CAPTIONS))


@pytest.mark.parametrize("key", ["vqvae", "dalle", "vqgan"])
def test_a_run_is_loaded_as_it_was_trained(key: str, smoke_run: Callable[[str], Any]) -> None:
    """Every tensor, its pictures, and what it says of both stages."""
    folder, system = smoke_run(key)
    loaded = lineage.load(folder)
    assert isinstance(loaded, Prior) and not loaded.training
    for name, tensor in system.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert not [n for n in load_tensors(folder / "model.safetensors") if n.startswith("known")]
    captions = ["a red circle", "", "a zorp"]
    knobs = {"guidance": 2.0, "top_k": 5}
    drawn = loaded.generate(captions, seed=3, **knobs)
    assert torch.equal(drawn, system.generate(captions, seed=3, **knobs))
    begun = loaded.complete(captions, drawn, seed=4)
    assert torch.equal(begun, system.complete(captions, drawn, seed=4))
    assert torch.equal(loaded.reconstruct(drawn), system.reconstruct(drawn))
    batch = Batch(drawn, captions, None, list("abc"))
    for name, value in loaded.stage_scores(batch).items():
        assert torch.equal(value, system.stage_scores(batch)[name]), name


class Killed(BaseException):
    """What happens to a process that is killed: nothing more is written."""


KILLED = {
    "train.batch": 4,
    "train.checkpoint_every": 3,
    "train.sample_every": 0,
    "train.precision": "fp32",
    "kept": 256,
}


@pytest.mark.parametrize(
    ("settings", "stops"),
    [
        ({}, [("codec", 4), ("codes", 4), ("prior", 7)]),
        ({"optim.name": "muon", "text": "lstm"}, [("prior", 8)]),
    ],
    ids=["in all stages", "with muon"],
)
def test_a_killed_run_ends_bit_for_bit_like_one_that_was_not(
    settings: dict[str, Any],
    stops: list[tuple[str, int]],
    train_run: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed in each stage in turn; the cache, where finished stages are kept, is lost with it."""
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))
    options: dict[str, Any] = {"settings": KILLED | settings, "steps": 14}
    whole = train_run(tmp_path / "whole", "vqvae", **options).folder
    original, folder = Trainer.advance, tmp_path / "killed"
    for stage, step in stops:
        shutil.rmtree(tmp_path / "cache")

        def advance(trainer: Trainer, batch: Batch, at: Any = (stage, step - 1)) -> Any:
            if (trainer.stage, trainer.step) == at:
                raise Killed
            return original(trainer, batch)

        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "advance", advance)
            with pytest.raises(Killed):
                train_run(folder, "vqvae", **options)
        place = folder if stage == "prior" else folder / "stages" / stage
        assert load_state(place / "state.pt")["step"] == (step - 1) // 3 * 3
        options = {"settings": {}, "resume": True}
        (tmp_path / "cache").mkdir(exist_ok=True)
    shutil.rmtree(tmp_path / "cache")
    train_run(folder, "vqvae", **options)
    one, other = (load_tensors(run / "model.safetensors") for run in (whole, folder))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
