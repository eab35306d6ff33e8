"""The prior: one sequence, its causality, losses by loops, sampling, completion, scores."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

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
from lineage.vqvae.ar_prior import Prior, PriorConfig, SamplingConfig
from lineage.vqvae.codec import Codec
from lineage.vqvae.transformer import TransformerConfig

K, SIDE, SIZE, TEXT_LEN, WIDTH = 5, 3, 12, 6, 12
LONG = "two small yellow stars to the left of a large purple ring"
CAPTIONS = ["a red circle", "", LONG, "a zorp ring", "small stars"]
BY_WORDS = [name for name in ENCODERS if name != "clip"]
"""Encoders whose tokens are those of the tokeniser, as the loops have them: `clip` adds a start and
an end token.
"""
CAUSAL = [name for name in BY_WORDS if getattr(ENCODERS[name], "causal", False)]
NOT_CAUSAL = [name for name in BY_WORDS if name not in CAUSAL]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TRANSFORMER = TransformerConfig(width=WIDTH, num_layers=2, num_heads=3)


class Squares(Codec):
    """Squares of 4 x 4 pixels in K shades of grey; encoding inverts decoding.

    Attributes:
        training_modes, half_precision: Of each call of `encode`.
    """

    def __init__(self, num_codes: int = K) -> None:
        super().__init__()
        self.num_codes, self.factor = num_codes, 4
        self.shades = nn.Parameter(torch.linspace(-0.9, 0.9, num_codes))
        self.norm = nn.BatchNorm2d(3)
        self.training_modes: list[bool] = []
        self.half_precision: list[bool] = []
        self.running_mse.fill_(0.01)

    def groups(self) -> dict[str, list[nn.Module]]:
        return {"codec": [self]}

    def losses(
        self, batch: Batch, text: TextFeatures | None, noise: NoiseStreams
    ) -> Iterator[Turn]:
        yield Turn("codec", {"zero": 0 * self.shades.sum()})

    def encode(self, image: Tensor) -> Tensor:
        self.training_modes.append(self.training)
        self.half_precision.append(torch.is_autocast_enabled("cpu"))
        self.norm(image)  # its statistics would show a wrong mode
        grey = image.mean(1).unflatten(2, (-1, 4)).unflatten(1, (-1, 4)).mean((2, 4))
        return (grey[..., None] - self.shades).abs().argmin(-1)

    def decode(self, ids: Tensor) -> Tensor:
        image = self.shades[ids].repeat_interleave(4, 1).repeat_interleave(4, 2)
        return image[:, None].expand(-1, 3, -1, -1)


TOKENIZER = WordTokenizer.train(["a red circle", LONG], 40)


def make_prior(text: str = "bag", num_codes: int = K, size: int = SIZE, **changes: Any) -> Prior:
    """An untrained prior with weights as large as trained ones, so that all of it shows."""
    torch.manual_seed(0)
    fields = {"text_len": TEXT_LEN, "cond_drop_prob": 0.0} | changes
    config = PriorConfig(transformer=TRANSFORMER, **fields)
    sizes = TextConfig(max_words=10, width=8, num_heads=2, conv_channels=6)
    prior = Prior(config, Squares(num_codes), make_encoder(text, sizes, TOKENIZER), size)
    with torch.no_grad():
        for name, parameter in prior.named_parameters():
            if not name.startswith("codec."):
                parameter += 0.3 * torch.randn_like(parameter)
        for module in prior.text.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
    return prior.eval()


def random_grids(rows: int, num_codes: int = K, side: int = SIDE) -> Tensor:
    return torch.randint(num_codes, (rows, side, side))


def batch_of(ids: Tensor, captions: list[str] | None = None) -> Batch:
    """Pictures with the codes `ids`, and noise too small to change them."""
    image = Squares().decode(ids).detach()
    image = image + 0.05 * torch.rand_like(image)
    names = [str(number) for number in range(len(ids))]
    return Batch(image, captions or CAPTIONS[: len(ids)], None, names)


def turn_of(prior: Prior, batch: Batch, seeds: range | None = None) -> Turn:
    noise = NoiseStreams(seeds or range(len(batch)))
    (turn,) = prior.losses(batch, prior.text.encode(batch.caption), noise)
    return turn


def difference(a: Tensor, b: Tensor) -> Tensor:
    """Largest difference along the last axis."""
    return (a - b).abs().amax(-1)


def naive_sequence(prior: Prior, caption: str, ids: list[int]) -> list[Tensor]:
    """Inputs of the transformer for one row: 1 + T + n vectors."""
    text = prior.text.encode([caption])
    words = [vector for vector, is_word in zip(text.words[0], text.mask[0], strict=True) if is_word]
    vectors = [prior.start_emb.weight[0]]
    for position in range(prior.config.text_len):
        pad = prior.pad_emb.weight[position]
        vector = prior.text_proj(words[position]) if position < len(words) else pad
        vectors.append(vector + prior.pos_emb.weight[position])
    for position, number in enumerate(ids):
        row, column = divmod(position, prior.grid_size)
        pos_emb = prior.row_emb.weight[row] + prior.column_emb.weight[column]
        vectors.append(prior.code_emb.weight[number] + pos_emb)
    return vectors


def naive_logits(
    prior: Prior, caption: str, ids: list[int]
) -> tuple[list[Tensor] | None, list[Tensor]]:
    """Logits of each token, from the sequence before it alone."""
    sequence, text_len = naive_sequence(prior, caption, ids), prior.config.text_len
    last = [
        prior.transformer(torch.stack(sequence[: end + 1])[None])[0, -1]
        for end in range(text_len + len(ids))
    ]
    head = prior.text_head
    text_logits = None if head is None else [head(x) for x in last[:text_len]]
    return text_logits, [prior.code_head(x) for x in last[text_len:]]


# --- the sequence -----------------------------------------------------------------------------


@pytest.mark.parametrize("text", BY_WORDS)
@torch.no_grad()
def test_logits_by_loops(text: str) -> None:
    """For a short caption, an empty one, and one longer than the positions for text."""
    prior, ids = make_prior(text), random_grids(len(CAPTIONS)).flatten(1)
    text_logits, code_logits = prior.logits(prior.text.encode(CAPTIONS), ids)
    assert code_logits.shape == (5, SIDE**2, K)
    assert (text_logits is None) == (text in NOT_CAUSAL)
    for row, caption in enumerate(CAPTIONS):
        naive_text, naive_codes = naive_logits(prior, caption, ids[row].tolist())
        torch.testing.assert_close(code_logits[row], torch.stack(naive_codes), **CLOSE)
        if text_logits is not None:
            assert text_logits.shape == (5, TEXT_LEN, len(TOKENIZER))
            torch.testing.assert_close(text_logits[row], torch.stack(naive_text), **CLOSE)


@pytest.mark.parametrize(
    ("num_codes", "size", "text_len"), [(1, 12, 6), (4, 4, 6), (3, 8, 1)], ids=str
)
@torch.no_grad()
def test_the_smallest_sizes_by_loops(num_codes: int, size: int, text_len: int) -> None:
    """One code to choose from, a grid of one cell, one position for text."""
    prior = make_prior(num_codes=num_codes, size=size, text_len=text_len)
    ids = random_grids(2, num_codes, size // 4).flatten(1)
    text_logits, code_logits = prior.logits(prior.text.encode(CAPTIONS[:2]), ids)
    for row in range(2):
        naive_text, naive_codes = naive_logits(prior, CAPTIONS[row], ids[row].tolist())
        torch.testing.assert_close(code_logits[row], torch.stack(naive_codes), **CLOSE)
        torch.testing.assert_close(text_logits[row], torch.stack(naive_text), **CLOSE)
    images = prior.generate(CAPTIONS[:2], guidance=2.0)
    assert images.shape == (2, 3, size, size) and images.isfinite().all()


@torch.no_grad()
def test_a_code_influences_later_tokens_alone() -> None:
    prior, ids = make_prior(), random_grids(1).flatten(1)
    text = prior.text.encode(["a red circle"])
    text_logits, code_logits = prior.logits(text, ids)
    for position in range(SIDE**2):
        other = ids.clone()
        other[0, position] = (ids[0, position] + 1) % K
        other_text, other_codes = prior.logits(text, other)
        assert torch.equal(other_text, text_logits)
        change = difference(other_codes, code_logits)[0]
        assert (change[: position + 1] == 0).all() and (change[position + 1 :] > 1e-4).all()


@pytest.mark.parametrize("text", CAUSAL)
@torch.no_grad()
def test_a_word_influences_later_tokens_alone(text: str) -> None:
    """Otherwise the prior could copy the word that it predicts. All codes come after all words."""
    prior, ids = make_prior(text), random_grids(1).flatten(1)
    words = LONG.split()
    text_logits, code_logits = prior.logits(prior.text.encode([LONG]), ids)
    for position in range(TEXT_LEN):
        other = " ".join([*words[:position], "circle", *words[position + 1 :]])
        other_text, other_codes = prior.logits(prior.text.encode([other]), ids)
        change = difference(other_text, text_logits)[0]
        assert (change[: position + 1] < 1e-6).all() and (change[position + 1 :] > 1e-4).all()
        assert (difference(other_codes, code_logits) > 1e-4).all()


@pytest.mark.parametrize("text", CAUSAL)
@torch.no_grad()
def test_words_beyond_the_positions_for_text_are_cut(text: str) -> None:
    prior, ids = make_prior(text), random_grids(1).flatten(1).expand(2, -1)
    cut = " ".join(LONG.split()[:TEXT_LEN])
    for logits in prior.logits(prior.text.encode([LONG, cut]), ids):
        torch.testing.assert_close(logits[0], logits[1], **CLOSE)


@pytest.mark.parametrize("text", BY_WORDS)
@torch.no_grad()
def test_padding_and_other_rows_change_nothing(text: str) -> None:
    """Neither a longer caption in the batch nor the vectors behind the last word."""
    prior, ids = make_prior(text), random_grids(len(CAPTIONS)).flatten(1)
    together = prior.logits(prior.text.encode(CAPTIONS), ids)
    for row, caption in enumerate(CAPTIONS):
        alone = prior.text.encode([caption])
        for features in (alone, alone.padded(17)):
            words = torch.where(features.mask[..., None], features.words, torch.tensor(1e3))
            logits = prior.logits(replace(features, words=words), ids[row : row + 1])
            for whole, one in zip(together, logits, strict=True):
                if one is not None:
                    torch.testing.assert_close(one[0], whole[row], **CLOSE)


@torch.no_grad()
def test_each_empty_position_has_an_embedding_of_its_own() -> None:
    prior = make_prior()
    text = prior.text.encode(CAPTIONS)
    before = prior.embed_text(text)
    assert before.shape == (5, 1 + TEXT_LEN, WIDTH)
    for position in range(TEXT_LEN):
        prior.pad_emb.weight[position] += 1
        change = difference(prior.embed_text(text), before)
        prior.pad_emb.weight[position] -= 1
        expected = torch.zeros(5, 1 + TEXT_LEN)
        is_empty = [position >= length for length in (3, 1, 12, 3, 2)]
        expected[:, 1 + position] = torch.tensor(is_empty).float()
        torch.testing.assert_close(change, expected)


# --- losses -----------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, number: int) -> float:
    weights = [math.exp(v) for v in logits.tolist()]
    return -math.log(weights[number] / sum(weights))


@pytest.mark.parametrize("text", BY_WORDS)
@pytest.mark.parametrize("drop", [0.0, 0.5])
@torch.no_grad()
def test_losses_by_loops(text: str, drop: float) -> None:
    """Of the words of captions that are not dropped, and of all codes."""
    prior = make_prior(text, cond_drop_prob=drop, text_weight=0.3)
    ids, seeds = random_grids(len(CAPTIONS)), range(3, 8)
    keep = [u >= drop for u in NoiseStreams(seeds).rand().tolist()]
    assert drop == 0.0 or len(set(keep)) == 2
    image_nats, text_nats, correct = [], [], []
    for row, caption in enumerate(CAPTIONS):
        numbers = ids[row].flatten().tolist()
        text_logits, code_logits = naive_logits(prior, caption if keep[row] else "", numbers)
        for logits, number in zip(code_logits, numbers, strict=True):
            image_nats.append(cross_entropy(logits, number))
            correct.append(float(int(logits.argmax()) == number))
        if text_logits is not None and keep[row]:
            tokens = TOKENIZER.encode(caption)[:TEXT_LEN]
            text_nats += [cross_entropy(x, n) for x, n in zip(text_logits, tokens, strict=False)]
    turn = turn_of(prior, batch_of(ids), seeds)
    metrics = turn.metrics()
    image_loss = sum(image_nats) / len(image_nats)
    expected = {"image": image_loss}
    if text in CAUSAL:
        text_loss = sum(text_nats) / len(text_nats)
        expected = {"text": 0.3 * text_loss, "image": 0.7 * image_loss}
        assert metrics["text_nats"].item() == pytest.approx(text_loss, rel=1e-4)
    assert turn.group == "prior" and list(turn.terms) == list(expected)
    for name, value in expected.items():
        assert turn.terms[name].item() == pytest.approx(value, rel=1e-4), name
    assert metrics["image_nats"].item() == pytest.approx(image_loss, rel=1e-4)
    assert metrics["image_accuracy"].item() == pytest.approx(sum(correct) / len(correct))


@pytest.mark.parametrize("text", NOT_CAUSAL)
def test_the_text_of_an_encoder_that_is_not_causal_is_not_predicted(text: str) -> None:
    prior = make_prior(text)
    assert prior.text_head is None
    assert not any("text_head" in name for name in prior.state_dict())


@torch.no_grad()
def test_a_text_of_weight_0_is_not_predicted() -> None:
    prior, ids = make_prior(text_weight=0.0), random_grids(2)
    assert prior.text_head is None
    turn = turn_of(prior, batch_of(ids))
    assert list(turn.terms) == ["image"]
    assert turn.terms["image"] == turn.metrics()["image_nats"]


def test_a_batch_whose_captions_are_all_dropped() -> None:
    """The text's loss is 0, not a division by 0."""
    prior, ids = make_prior(cond_drop_prob=0.999), random_grids(3)
    turn = turn_of(prior, batch_of(ids))
    assert turn.terms["text"].item() == 0
    sum(turn.terms.values()).backward()
    for name, parameter in prior.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name
    with torch.no_grad():
        _, logits = prior.logits(prior.text.encode(["", "", ""]), ids.flatten(1))
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    assert turn.metrics()["image_nats"].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("text", BY_WORDS)
def test_losses_in_half_precision(text: str) -> None:
    """Close to those in full precision, in which the codes are computed anyway."""
    prior, ids = make_prior(text, cond_drop_prob=0.3), random_grids(len(CAPTIONS))
    terms = []
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            terms.append(turn_of(prior, batch_of(ids)).terms)
        assert all(term.dtype == torch.float32 and term.shape == () for term in terms[-1].values())
    assert prior.codec.half_precision == [False, False]
    sum(terms[1].values()).backward()
    for name, value in terms[0].items():
        assert terms[1][name].item() == pytest.approx(value.item(), rel=0.03), name


@torch.no_grad()
def test_codes_of_the_data_set_replace_the_encoder() -> None:
    """`extra["codes"]`, if the batch has it; the pictures are not read then."""
    prior, ids = make_prior(), random_grids(4)
    batch = batch_of(ids)
    expected = turn_of(prior, batch).terms["image"]
    prior.codec.training_modes.clear()
    black = torch.full_like(batch.image, -1.0)
    with_codes = replace(batch, image=black, extra={"codes": ids})
    assert torch.equal(turn_of(prior, with_codes).terms["image"], expected)
    assert not prior.codec.training_modes
    assert not torch.equal(turn_of(prior, replace(batch, image=black)).terms["image"], expected)
    assert prior.codec.training_modes == [False]


# --- what is trained --------------------------------------------------------------------------


@pytest.mark.parametrize("text", BY_WORDS)
def test_the_group_holds_everything_but_the_codec(text: str) -> None:
    prior = make_prior(text)
    (modules,) = prior.groups().values()
    grouped = [id(p) for module in modules for p in module.parameters()]
    trained = {id(p): name for name, p in prior.named_parameters() if p.requires_grad}
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(trained)
    assert not any(name.startswith("codec.") for name in trained.values())
    assert any(name.startswith("text.") for name in trained.values())
    assert not any(p.requires_grad for p in prior.codec.parameters())


class EightPictures(CaptionedDataset):
    """Eight pictures of known codes, each with a caption of its own."""

    name, split, size, skipped = "eight", "train", SIZE, []

    def __init__(self) -> None:
        words = [f"{a} {b}" for a in ("red", "small") for b in ("ring", "circle", "stars", "left")]
        self.ids = random_grids(8)
        self.whole = batch_of(self.ids, words)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError

    def batch(self, indices: Any, epochs: Any, seed: int) -> Batch:
        captions = [self.whole.caption[i] for i in indices]
        return Batch(self.whole.image[list(indices)], captions, None, [str(i) for i in indices])


def trainer_for(prior: Prior, data: CaptionedDataset, **changes: Any) -> Trainer:
    fields = {"lr": 1e-2, "warmup": 0, "decay": "none", "ema_decay": 0.0, "weight_decay": 0.0}
    train = TrainConfig(batch_size=8, precision="fp32", prefetch=0)
    return Trainer(prior, data, OptimConfig(**(fields | changes)), train)


@pytest.mark.parametrize("text", ["bag", "lstm"])
def test_training_leaves_the_codec_as_it_is(text: str) -> None:
    """Weights, statistics and mode; everything else is updated."""
    prior, data = make_prior(text, cond_drop_prob=0.3), EightPictures()
    before = {name: tensor.clone() for name, tensor in prior.state_dict().items()}
    trainer = trainer_for(prior, data)
    for step in range(3):
        trainer.advance(trainer.loader.at(step))
    assert prior.training and prior.text.training and not prior.codec.training
    assert prior.codec.training_modes == [False] * 3
    for name, tensor in prior.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("codec."), name
    assert all(p.grad is None for p in prior.codec.parameters())


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_eight_grids_are_learnt_by_heart(optim: str) -> None:
    """Each is written from its caption alone, at temperature 0."""
    prior, data = make_prior(cond_drop_prob=0.1), EightPictures()
    trainer = trainer_for(prior, data, name=optim)
    for step in range(200):
        values = trainer.advance(trainer.loader.at(step))
    assert values["metric/image_accuracy"] > 0.85  # dropped captions leave the grid open
    batch = data.batch(range(8), [0] * 8, 0)
    prior.eval()
    images = prior.generate(batch.caption, temperature=0.0)
    assert torch.equal(prior.codec.encode(images), data.ids)
    images = prior.generate(batch.caption, image=batch.image, keep=0.4, temperature=0.0)
    assert torch.equal(prior.codec.encode(images), data.ids)
    scores = prior.stage_scores(batch)
    assert scores["accuracy"].min() == 1 and scores["nats_per_code"].max() < 0.3


# --- the choice of a code ---------------------------------------------------------------------


def naive_probs(logits: list[float], sampling: SamplingConfig) -> list[float]:
    """Temperature, then the k likeliest, then the fewest likeliest that reach p together."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if sampling.temperature == 0:
        return [float(i == order[0]) for i in range(len(logits))]
    top_k = order[: sampling.top_k] if sampling.top_k else order
    largest = max(logits)
    weights = {i: math.exp((logits[i] - largest) / sampling.temperature) for i in top_k}
    probs = {i: weight / sum(weights.values()) for i, weight in weights.items()}
    nucleus, total = [], 0.0
    for i in top_k:
        nucleus.append(i)
        total += probs[i]
        if total >= sampling.top_p:
            break
    if sampling.top_p == 1:
        nucleus = top_k
    total = sum(probs[i] for i in nucleus)
    return [probs[i] / total if i in nucleus else 0.0 for i in range(len(logits))]


SAMPLINGS = [
    SamplingConfig(),
    SamplingConfig(temperature=0.0),
    SamplingConfig(temperature=0.5),
    SamplingConfig(temperature=3.0),
    SamplingConfig(top_k=1),
    SamplingConfig(top_k=3),
    SamplingConfig(top_k=8),
    SamplingConfig(top_k=100),
    SamplingConfig(top_p=0.9),
    SamplingConfig(top_p=0.5),
    SamplingConfig(top_p=1e-6),
    SamplingConfig(temperature=0.7, top_k=5, top_p=0.8),
    SamplingConfig(temperature=2.0, top_k=2, top_p=0.3),
    SamplingConfig(temperature=0.0, top_k=3, top_p=0.5),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_probs_by_loops(sampling: SamplingConfig) -> None:
    """Up to a factor, which has no effect on the sample."""
    logits = 2 * torch.randn(40, 8)
    before = logits.clone()
    probs = sampling.probs(logits)
    assert torch.equal(logits, before) and probs.shape == (40, 8)
    for row, normalised in zip(logits, probs / probs.sum(1, keepdim=True), strict=True):
        expected = naive_probs(row.tolist(), sampling)
        torch.testing.assert_close(normalised, torch.tensor(expected), rtol=1e-4, atol=1e-6)
        assert [p == 0 for p in normalised.tolist()] == [p == 0 for p in expected]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_single_code_is_always_sampled(sampling: SamplingConfig) -> None:
    ids = sampling.sample(torch.randn(3, 1), torch.tensor([0.0, 0.5, 0.99]))
    assert ids.tolist() == [0, 0, 0]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_frequencies_of_samples_are_the_probabilities(sampling: SamplingConfig) -> None:
    """Of evenly spaced u, to within one sample; a larger u gives a later code."""
    logits, count = torch.randn(1, 8), 4000
    ids = sampling.sample(logits.expand(count, -1), (torch.arange(count) + 0.5) / count)
    assert ids.dtype == torch.int64 and ids.shape == (count,)
    frequencies = torch.bincount(ids, minlength=8).double()
    expected = count * torch.tensor(naive_probs(logits[0].tolist(), sampling))
    assert (frequencies - expected).abs().max() <= 1.5
    assert ids.tolist() == sorted(ids.tolist())


@pytest.mark.parametrize("u", [0.0, 1e-7, 0.5, 0.99999994], ids=str)
@pytest.mark.parametrize("num_codes", [1, 2, 7, 1000, 8192])
def test_no_u_gives_a_code_of_probability_0(u: float, num_codes: int) -> None:
    """Neither at the ends of its range nor where the first and last codes are impossible."""
    uniform = torch.full((16,), u)
    logits = 3 * torch.randn(16, num_codes)
    for sampling in SAMPLINGS:
        ids = sampling.sample(logits, uniform)
        assert ids.min() >= 0 and ids.max() < num_codes
        assert (sampling.probs(logits).gather(1, ids[:, None]) > 0).all(), sampling
    certain, expected = torch.full((16, num_codes), -torch.inf), torch.arange(16) % num_codes
    certain[torch.arange(16), expected] = 0.0
    assert torch.equal(SamplingConfig().sample(certain, uniform), expected)
    if num_codes > 2:
        logits = torch.zeros(16, num_codes)
        logits[:, 0] = logits[:, -1] = -1e4
        likely = min(num_codes - 2, 1 + int(u * (num_codes - 2)))
        assert (SamplingConfig().sample(logits, uniform) - likely).abs().max() <= 1


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-37, 1e-39, 1e-44])
def test_a_temperature_near_zero_gives_the_likeliest_code(temperature: float) -> None:
    """Where logits over temperature overflow."""
    logits = 30 * torch.randn(50, 8)
    ids = SamplingConfig(temperature=temperature).sample(logits, torch.rand(50))
    assert torch.equal(ids, logits.argmax(1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("guidance", -1.0),
        ("guidance", math.nan),
        ("guidance", math.inf),
    ],
)
def test_impossible_sampling_is_refused(name: str, value: float) -> None:
    """In a configuration, and as an option of `generate`."""
    with pytest.raises(UserError, match=f"{name}={value}"):
        SamplingConfig(**{name: value})
    with pytest.raises(UserError, match=f"{name}={value}"):
        make_prior().generate(CAPTIONS, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("text_len", 0), ("text_weight", 1.0), ("cond_drop_prob", 1.0), ("cond_drop_prob", -0.1)],
)
def test_impossible_priors_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name}={value}"):
        PriorConfig(**{name: value})


# --- sampling ---------------------------------------------------------------------------------

GUIDED = [
    SamplingConfig(),
    SamplingConfig(guidance=3.0),
    SamplingConfig(guidance=0.0),
    SamplingConfig(temperature=0.7, top_k=3, top_p=0.8),
    SamplingConfig(temperature=1.5, top_p=0.6, guidance=2.0),
    SamplingConfig(temperature=0.0),
    SamplingConfig(temperature=0.0, guidance=2.5),
]


@pytest.mark.parametrize("prompt_length", [0, 1, 4, 9])
@pytest.mark.parametrize("sampling", GUIDED, ids=str)
@torch.no_grad()
def test_sampling_by_loops(sampling: SamplingConfig, prompt_length: int) -> None:
    """Row by row and code by code, from the logits of the whole sequence so far; the prompt is
    kept; with and without a cache."""
    prior, rows = make_prior("transformer"), len(CAPTIONS)
    prompt = random_grids(rows).flatten(1)[:, :prompt_length]
    u = NoiseStreams(range(rows)).rand(SIDE**2)
    expected = []
    for row, caption in enumerate(CAPTIONS):
        ids = prompt[row].tolist()
        for position in range(prompt_length, SIDE**2):
            filled = torch.tensor([[*ids, *[0] * (SIDE**2 - position)]])
            cond = prior.logits(prior.text.encode([caption]), filled)[1][0, position]
            uncond = prior.logits(prior.text.encode([""]), filled)[1][0, position]
            logits = uncond + sampling.guidance * (cond - uncond)
            cdf = 0.0
            for number, p in enumerate(naive_probs(logits.tolist(), sampling)):  # noqa: B007
                cdf += p
                if cdf > float(u[row, position]):
                    break
            ids.append(number)
        expected.append(ids)
    text = prior.text.encode(CAPTIONS)
    for cached in (True, False):
        noise = NoiseStreams(range(rows))
        ids = prior.sample_codes(text, noise, sampling, prompt if prompt_length else None, cached)
        assert ids.shape == (rows, SIDE, SIDE) and ids.dtype == torch.int64
        assert ids.flatten(1).tolist() == expected, cached


@pytest.mark.parametrize("text", BY_WORDS)
@torch.no_grad()
def test_cached_codes_are_those_without(text: str) -> None:
    prior = make_prior(text, num_codes=50, size=24)
    features = prior.text.encode(CAPTIONS)
    for sampling in GUIDED:
        cached, uncached = (
            prior.sample_codes(features, NoiseStreams(range(5)), sampling, cached=cached)
            for cached in (True, False)
        )
        assert torch.equal(cached, uncached), sampling


def test_guidance_of_1_is_none_and_of_0_ignores_the_caption() -> None:
    prior = make_prior("transformer", num_codes=50, size=24)
    plain = prior.generate(CAPTIONS)
    assert torch.equal(prior.generate(CAPTIONS, guidance=1.0), plain)
    assert torch.equal(prior.generate(CAPTIONS, guidance="1"), plain)
    near = prior.generate(CAPTIONS, guidance=1 + 1e-6)  # computes both predictions
    assert (near != plain).float().mean() < 0.05
    unconditional = prior.generate([""] * 5)
    assert torch.equal(prior.generate(CAPTIONS, guidance=0.0), unconditional)
    assert not torch.equal(plain, unconditional)
    assert not torch.equal(prior.generate(CAPTIONS, guidance=3.0), plain)


class NoFloat64(TorchFunctionMode):
    """A device without float64, such as `mps`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return result


@pytest.mark.parametrize("method", ["generate", "stage_scores"])
@torch.no_grad()
def test_no_float64_is_needed(method: str) -> None:
    prior, batch = make_prior(sampling=SamplingConfig(guidance=2.0)), batch_of(random_grids(2))
    with NoFloat64():
        if method == "generate":
            prior.generate(CAPTIONS)
        else:
            prior.stage_scores(batch)


def test_defaults_of_the_options_are_the_configuration_s() -> None:
    own = {"temperature": 0.6, "top_k": 7, "top_p": 0.8, "guidance": 2.0}
    tuned = make_prior(num_codes=50, size=24, sampling=SamplingConfig(**own))
    plain = make_prior(num_codes=50, size=24)
    expected = plain.generate(CAPTIONS, **own)
    assert torch.equal(tuned.generate(CAPTIONS), expected)
    assert torch.equal(tuned.generate(CAPTIONS, top_k=7, temperature=None), expected)
    changed = tuned.generate(CAPTIONS, temperature=1.5, top_k=0, top_p="1", guidance=1.0)
    assert torch.equal(changed, plain.generate(CAPTIONS, temperature=1.5))
    assert list(tuned.options()) == [*own, "image", "keep"]


# --- completion -------------------------------------------------------------------------------


def record_decoded(prior: Prior, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Codes that the codec decodes from now on."""
    decoded: list[Tensor] = []
    original = prior.codec.decode

    def decode(ids: Tensor) -> Tensor:
        decoded.append(ids.clone())
        return original(ids)

    monkeypatch.setattr(prior.codec, "decode", decode)
    return decoded


@pytest.mark.parametrize(("keep", "rows"), [(0.0, 0), (0.3, 2), (0.5, 3), (0.84, 5), (1.0, 6)])
@pytest.mark.parametrize("sample_batch_size", [2, 64])
def test_the_upper_part_of_an_image_is_kept(
    keep: float, rows: int, sample_batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lower part has no influence."""
    prior = make_prior(num_codes=50, size=24, sampling=SamplingConfig(guidance=2.0))
    ids = random_grids(5, 50, 6)
    image = Squares(50).decode(ids).detach()
    monkeypatch.setattr(prior, "sample_batch_size", sample_batch_size)
    decoded = record_decoded(prior, monkeypatch)
    options = {"keep": keep, "seed": 3, "top_p": 0.9}
    completed = prior.generate(CAPTIONS, image=image, **options)
    codes = torch.cat(decoded)
    assert torch.equal(codes[:, :rows], ids[:, :rows])
    assert completed.shape == image.shape and completed.dtype == torch.float32
    assert torch.equal(completed[:, :, : 4 * rows], image[:, :, : 4 * rows])
    if rows < 6:
        assert (codes[:, rows:] != ids[:, rows:]).float().mean() > 0.5
        other = torch.cat([ids[:, :rows], random_grids(5, 50, 6)[:, rows:]], dim=1)
        other_image = Squares(50).decode(other).detach()
        assert torch.equal(prior.generate(CAPTIONS, image=other_image, **options), completed)
    if rows == 0:
        assert torch.equal(prior.generate(CAPTIONS, seed=3, top_p=0.9), completed)
    alone = prior.generate(CAPTIONS[:1], image=image[:1], **options)
    assert torch.equal(alone[0], completed[0])


def test_the_lower_part_depends_on_the_upper() -> None:
    """Half of the image is kept by default; the codec encodes it in evaluation mode."""
    prior = make_prior(num_codes=50, size=24).train()
    images = Squares(50).decode(random_grids(2, 50, 6)).detach().split(1)
    completed = [prior.generate(["a ring"], image=image) for image in images]
    assert prior.training
    assert torch.equal(completed[0][..., :12, :], images[0][..., :12, :])
    assert not torch.equal(completed[0][..., 12:, :], completed[1][..., 12:, :])
    assert not any(prior.codec.training_modes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": -0.1}, "keep=-0.1 must be at least 0"),
        ({"keep": 1.1}, "keep=1.1 must be at most 1"),
        ({"keep": math.nan}, "keep=nan"),
        ({"image": None, "keep": 0.5}, "keep has no effect without image"),
        ({"image": torch.zeros(3, 3, SIZE, SIZE)}, "image must be"),
        ({"image": torch.zeros(1, 3, 8, 8), "keep": 1.0}, "image must be"),
        ({"top_p": "2"}, "top_p=2"),
    ],
    ids=str,
)
def test_impossible_completions_are_refused(options: dict[str, Any], message: str) -> None:
    """An image of another size would have its codes in rows of another length."""
    image = {"image": torch.zeros(2, 3, SIZE, SIZE)}
    with pytest.raises(UserError, match=message):
        make_prior().generate(CAPTIONS[:2], **(image | options))


def test_a_size_that_the_factor_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="size=13 is not divisible by 4"):
        make_prior(size=13)


# --- visualise --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 8, 12, 24])
def test_visualise_shows_the_picture_as_it_is_written(size: int) -> None:
    sampling = SamplingConfig(guidance=2.0, temperature=0.8)
    prior = make_prior(num_codes=7, size=size, sampling=sampling)
    side, total = size // 4, (size // 4) ** 2
    picture = prior.generate(CAPTIONS[0], seed=3)[0]
    (row,) = prior.visualise(CAPTIONS[0], seed=3)
    assert len(row) == 8
    for eighth, (label, image) in enumerate(row, start=1):
        count = math.ceil(total * eighth / 8)
        assert label == f"{count} of {total} codes"
        expected = torch.zeros_like(picture)  # grey
        for position in range(count):
            y, x = 4 * (position // side), 4 * (position % side)
            expected[:, y : y + 4, x : x + 4] = picture[:, y : y + 4, x : x + 4]
        assert torch.equal(image, expected), label
    assert torch.equal(row[-1].image, picture)


# --- scores of the stages ---------------------------------------------------------------------


@torch.no_grad()
def test_stage_scores_by_loops() -> None:
    """PSNR, nats of the true codes, and bits per dimension of both stages together."""
    prior = make_prior("transformer")
    noisy = Squares().decode(random_grids(len(CAPTIONS))).detach()
    noisy = noisy + 0.1 * torch.randn_like(noisy)
    pixels = ((noisy + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    batch = Batch(to_unit(pixels), CAPTIONS, None, [str(i) for i in range(5)])
    ids = prior.codec.encode(batch.image)
    decoded = prior.codec.decode(ids)
    prior.codec.running_mse.fill_(0.2)
    codec_nats = prior.codec.nll(batch.image, ids)
    scores = prior.stage_scores(batch)
    assert list(scores) == ["psnr", "nats_per_code", "accuracy", "bits_per_dim"]
    assert all(values.shape == (5,) for values in scores.values())
    for row, caption in enumerate(CAPTIONS):
        numbers = ids[row].flatten().tolist()
        _, logits = naive_logits(prior, caption, numbers)
        nats = [cross_entropy(x, n) for x, n in zip(logits, numbers, strict=True)]
        correct = [int(x.argmax()) == n for x, n in zip(logits, numbers, strict=True)]
        mse = float((decoded[row] - batch.image[row]).double().square().mean())
        total = sum(nats) + codec_nats[row].item()
        expected = {
            "psnr": 10 * math.log10(4 / mse),
            "nats_per_code": sum(nats) / len(nats),
            "accuracy": sum(correct) / len(correct),
            "bits_per_dim": total / math.log(2) / (3 * SIZE * SIZE),
        }
        for name, value in expected.items():
            assert scores[name][row].item() == pytest.approx(value, rel=1e-3), name


@torch.no_grad()
def test_scores_and_reconstructions_read_the_pictures_alone() -> None:
    """Neither other rows nor codes that a data set added, which may be of other pictures."""
    prior, batch = make_prior(), batch_of(random_grids(5))
    expected = prior.stage_scores(batch)
    alone = [prior.stage_scores(part) for part in batch.split(2)]
    other = prior.stage_scores(replace(batch, extra={"codes": random_grids(5)}))
    for name, values in expected.items():
        torch.testing.assert_close(torch.cat([part[name] for part in alone]), values, **CLOSE)
        assert torch.equal(other[name], values)
    decoded = prior.codec.decode(prior.codec.encode(batch.image))
    assert torch.equal(prior.reconstruct(batch.image), decoded)


# --- a killed run -----------------------------------------------------------------------------


class Killed(BaseException):
    """In place of SIGKILL: nothing more is written."""


SETTINGS = {
    "train.batch_size": 4,
    "train.checkpoint_every": 3,
    "train.sample_every": 0,
    "train.precision": "fp32",
    "cache_size": 256,
}


@pytest.mark.parametrize(
    ("settings", "stops"),
    [
        ({}, [("codec", 4), ("prior", 7)]),
        ({"optim.name": "muon", "text": "lstm"}, [("prior", 8)]),
    ],
    ids=["in both stages", "with muon"],
)
def test_a_killed_run_ends_bit_for_bit_like_an_unbroken_one(
    settings: dict[str, Any],
    stops: list[tuple[str, int]],
    train_run: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed in each stage in turn; the cache of finished stages is lost each time."""
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))
    options: dict[str, Any] = {"settings": SETTINGS | settings, "steps": 14}
    whole = train_run(tmp_path / "whole", "vqvae", **options).folder
    original, folder = Trainer.advance, tmp_path / "killed"
    for stage, step in stops:
        shutil.rmtree(tmp_path / "cache")

        def advance(trainer: Trainer, *arguments: Any, at: Any = (stage, step - 1)) -> Any:
            if (trainer.stage, trainer.step) == at:
                raise Killed
            return original(trainer, *arguments)

        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "advance", advance)
            with pytest.raises(Killed):
                train_run(folder, "vqvae", **options)
        state_folder = folder if stage == "prior" else folder / "stages" / stage
        assert load_state(state_folder / "state.pt")["step"] == (step - 1) // 3 * 3
        options = {"settings": {}, "resume": True}
        (tmp_path / "cache").mkdir(exist_ok=True)
    shutil.rmtree(tmp_path / "cache")
    train_run(folder, "vqvae", **options)
    one, other = (load_tensors(run / "model.safetensors") for run in (whole, folder))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
