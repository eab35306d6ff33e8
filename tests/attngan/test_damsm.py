"""The DAMSM: losses against slow loops over captions, words and regions; rivals; the image
encoders."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lineage import runs
from lineage.attngan import damsm as module
from lineage.attngan.damsm import (
    DAMSM,
    DAMSMConfig,
    ImageFeatures,
    InceptionRegions,
    RegionEncoder,
    RegionHeads,
    cosine,
    damsm_terms,
    matching_losses,
    region_contexts,
    sentence_similarity,
    word_similarity,
)
from lineage.config import OptimConfig, TextConfig, TrainConfig
from lineage.data.contract import Batch, CaptionedDataset
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.system import System, Turn
from lineage.text.contract import TextFeatures
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import WordTokenizer
from lineage.training.loop import Trainer

D, N, LENGTHS = 5, 6, [3, 1, 4, 2]  # width, regions, words of the captions
CONFIGS = [DAMSMConfig(), DAMSMConfig(gamma1=0.5, gamma2=2.0, gamma3=3.0)]
OWN = torch.eye(len(LENGTHS), dtype=torch.bool)

Vector = list[float]


def features(lengths: list[int], padding: float = 0.0, more: int = 0) -> TextFeatures:
    """Captions of these lengths, with the number `padding` after their words."""
    random = torch.Generator().manual_seed(0)
    longest = max(lengths)
    words = torch.randn(len(lengths), longest, D, generator=random)
    sentence = torch.randn(len(lengths), D, generator=random)
    words = torch.cat([words, torch.zeros(len(lengths), more, D)], dim=1)
    mask = torch.arange(longest + more) < torch.tensor(lengths)[:, None]
    words = torch.where(mask[..., None], words, torch.full_like(words, padding))
    return TextFeatures(words, mask, sentence, mask.long())


def pictures(count: int) -> ImageFeatures:
    random = torch.Generator().manual_seed(1)
    regions = torch.randn(count, N, D, generator=random)
    return ImageFeatures(regions, torch.randn(count, D, generator=random))


# --- slow loops, from section 3.2 -------------------------------------------------------------


def dot(one: Vector, other: Vector) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def cos(one: Vector, other: Vector) -> float:
    return dot(one, other) / math.sqrt(dot(one, one) * dot(other, other))


def softmax(values: Vector) -> Vector:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def naive_attention(words: list[Vector], regions: list[Vector], gamma1: float) -> list[Vector]:
    """Equations 7 to 9: the attention of each word to each region."""
    over_words = [softmax([dot(word, region) for word in words]) for region in regions]
    rows = [[weights[w] for weights in over_words] for w in range(len(words))]
    return [softmax([gamma1 * weight for weight in row]) for row in rows]


def naive_contexts(words: list[Vector], regions: list[Vector], gamma1: float) -> list[Vector]:
    contexts = []
    for weights in naive_attention(words, regions, gamma1):
        pairs = list(zip(weights, regions, strict=True))
        contexts.append([sum(weight * region[d] for weight, region in pairs) for d in range(D)])
    return contexts


def naive_similarity(config: DAMSMConfig, words: list[Vector], regions: list[Vector]) -> float:
    """Equation 10 of one picture and one caption, without the outer power, as the authors'."""
    contexts = naive_contexts(words, regions, config.gamma1)
    pairs = zip(words, contexts, strict=True)
    return math.log(sum(math.exp(config.gamma2 * cos(word, context)) for word, context in pairs))


def naive_losses(gamma3: float, similarity: list[Vector], same: list[list[bool]]) -> Vector:
    """Equations 11 to 13: means of -log P(caption i | picture i) and -log P(picture i | caption
    i), where pairs that belong together are in their own sums alone."""
    count, losses = len(similarity), [0.0, 0.0]
    for i in range(count):
        rivals = [j for j in range(count) if j == i or not same[i][j]]
        true = math.exp(gamma3 * similarity[i][i])
        captions = sum(math.exp(gamma3 * similarity[i][j]) for j in rivals)
        images = sum(math.exp(gamma3 * similarity[j][i]) for j in rivals)
        losses[0] -= math.log(true / captions) / count
        losses[1] -= math.log(true / images) / count
    return losses


def rows_of(text: TextFeatures) -> list[list[Vector]]:
    """The words of each caption, without padding."""
    return [row[mask].double().tolist() for row, mask in zip(text.words, text.mask, strict=True)]


def pair(count: int, *pairs: tuple[int, int]) -> Tensor:
    same = torch.eye(count, dtype=torch.bool)
    for i, j in pairs:
        same[i, j] = same[j, i] = True
    return same


# --- equations 7 to 13 ------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=["paper", "other"])
def test_contexts_and_attention_are_those_of_a_loop(config: DAMSMConfig) -> None:
    """Of every caption on every picture."""
    text, regions = features(LENGTHS), pictures(3).regions
    contexts, attention = region_contexts(text.words, text.mask, regions, config.gamma1)
    assert contexts.shape == (3, 4, 4, D) and attention.shape == (3, 4, 4, N)
    for i in range(3):
        for j, words in enumerate(rows_of(text)):
            rows = regions[i].double().tolist()
            for ours, naive in ((attention, naive_attention), (contexts, naive_contexts)):
                expected = torch.tensor(naive(words, rows, config.gamma1))
                torch.testing.assert_close(ours[i, j, : len(words)], expected)


def test_attention_sums_to_one_over_regions() -> None:
    text, image = features(LENGTHS), pictures(3)
    _, attention = region_contexts(text.words, text.mask, 5 * image.regions, 4.0)
    sums = attention.sum(3)[:, text.mask]
    torch.testing.assert_close(sums, torch.ones_like(sums))
    assert attention.min() >= 0 and attention[:, text.mask].std() > 0.01


@pytest.mark.parametrize("config", CONFIGS, ids=["paper", "other"])
@pytest.mark.parametrize(
    "same", [OWN, pair(4, (0, 2)), pair(4, (0, 2), (1, 3), (0, 1))], ids=["own", "two", "three"]
)
def test_the_losses_are_those_of_a_loop(config: DAMSMConfig, same: Tensor) -> None:
    text, image = features(LENGTHS), pictures(4)
    captions, rows = rows_of(text), image.regions.double().tolist()
    words = [
        [naive_similarity(config, caption, regions) for caption in captions] for regions in rows
    ]
    vectors, sentences = image.global_vector.double().tolist(), text.sentence.double().tolist()
    sentence = [[cos(vector, other) for other in sentences] for vector in vectors]
    terms = damsm_terms(config, text, image, same)
    assert list(terms) == ["words", "sentence"]
    for term, similarity in zip(terms.values(), (words, sentence), strict=True):
        expected = sum(naive_losses(config.gamma3, similarity, same.tolist()))
        assert term.item() == pytest.approx(expected, rel=1e-5)
    # rows are pictures, columns are captions
    ours = word_similarity(config, text.words, text.mask, image.regions)
    torch.testing.assert_close(ours, torch.tensor(words))
    ours = sentence_similarity(text.sentence, image.global_vector)
    torch.testing.assert_close(ours, torch.tensor(sentence))


def test_the_loss_over_captions_comes_first() -> None:
    """By hand, where the two directions differ: a column in which all pictures are equal."""
    similarity = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    captions, images = matching_losses(similarity, torch.eye(2, dtype=torch.bool))
    rows = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))]
    assert captions.item() == pytest.approx(sum(rows) / 2)
    assert images.item() == pytest.approx(math.log(2))


def test_padding_has_no_effect() -> None:
    """Neither its content nor its length, for any caption of the batch."""
    image, config = pictures(4), DAMSMConfig()
    expected = damsm_terms(config, features(LENGTHS), image, OWN)
    for padding, more in ((50.0, 0), (0.0, 3), (-7.0, 5)):
        terms = damsm_terms(config, features(LENGTHS, padding, more), image, OWN)
        for name, term in terms.items():
            torch.testing.assert_close(term, expected[name])


def test_padding_has_no_gradient() -> None:
    text = features(LENGTHS, 2.0)
    text.words.requires_grad_()
    sum(damsm_terms(DAMSMConfig(), text, pictures(4), OWN).values()).backward()
    gradient = text.words.grad
    assert gradient is not None and torch.isfinite(gradient).all()
    assert not gradient[~text.mask].any() and (gradient[text.mask].abs().amax(1) > 0).all()


def test_a_pair_does_not_depend_on_the_batch() -> None:
    text, image, config = features(LENGTHS), pictures(4), DAMSMConfig()
    together = word_similarity(config, text.words, text.mask, image.regions)
    for j, length in enumerate(LENGTHS):
        row = text[j : j + 1].truncated(length)
        single = word_similarity(config, row.words, row.mask, image.regions[2:3])
        torch.testing.assert_close(single[0, 0], together[2, j])


def test_a_cosine_of_zeros_is_zero() -> None:
    """The product of the norms is at least 1e-8, as in the authors' code."""
    one = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-5, 0.0]])
    other = torch.tensor([[4.0, 3.0], [1.0, 0.0], [1e-5, 0.0]])
    assert cosine(one, other).tolist() == pytest.approx([24 / 25, 0.0, 1e-10 / 1e-8])


@pytest.mark.parametrize("scale", [1e-6, 1e3])
def test_features_of_any_length_have_finite_losses(scale: float) -> None:
    text, image = features(LENGTHS), pictures(4)
    text.words, image.regions = scale * text.words, scale * image.regions
    text.words.requires_grad_()
    loss = sum(damsm_terms(DAMSMConfig(), text, image, OWN).values())
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(text.words.grad).all()


@pytest.mark.parametrize("kind", ["plain", "cancel", "centred", "none"])
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_a_cosine_is_never_more_than_one(half: bool, kind: str) -> None:
    """Also where words are short, so that each attends everywhere, and regions cancel out, so that
    contexts are almost zero: rounding errors must not look similar."""
    random = torch.Generator().manual_seed(0)
    plain = torch.randn(4, 32, 16, generator=random)
    regions = {
        "plain": plain,
        "cancel": torch.cat([plain, -plain], dim=1),
        "centred": plain - plain.mean(1, keepdim=True),
        "none": 0 * plain,
    }[kind].requires_grad_()
    words, mask = 1e-3 * torch.randn(4, 6, 16, generator=random), torch.ones(4, 6, dtype=torch.bool)
    config = DAMSMConfig()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        similarity = word_similarity(config, words, mask, regions)
    assert similarity.max() <= 1.05 * config.gamma2 + math.log(6)
    assert similarity.min() >= -1.05 * config.gamma2 + math.log(6)
    (gradient,) = torch.autograd.grad(similarity.sum(), regions)
    assert torch.isfinite(gradient).all()


# --- rivals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("same", ["class", "caption"])
@pytest.mark.parametrize(
    ("labels", "classmates"),
    [(None, set()), ([0, 1, 2, 1], {(1, 3)}), ([5, 6, 7, 8], set()), ([3, 3, 4, 4], {(0, 1)})],
)
def test_pairs_of_one_caption_or_class_belong_together(
    labels: list[int] | None, classmates: set[tuple[int, int]], same: str
) -> None:
    """A class counts only if `same` is class; the same words always."""
    captions = ["a red circle", "a blue star", "a red circle", "circle red a"]
    label = None if labels is None else torch.tensor(labels)
    batch = Batch(torch.zeros(4, 3, 8, 8), captions, label, list("abcd"))
    pairs = {(0, 2)} | (classmates if same == "class" else set())
    pairs |= {(2, 3)} if labels == [3, 3, 4, 4] and same == "class" else set()
    assert torch.equal(batch.same_pairs(same), pair(4, *pairs))
    assert label is None or label.tolist() == labels  # the batch is unchanged


def test_pairs_that_belong_together_are_no_rivals() -> None:
    """Their similarity has no effect, in both directions."""
    similarity = torch.tensor([[2.0, 9.0, 0.5], [-3.0, 1.0, 0.0], [0.1, 0.2, 0.3]])
    same = pair(3, (0, 1))
    changed = similarity.clone()
    changed[0, 1], changed[1, 0] = -4.0, 70.0
    for a, b in zip(matching_losses(similarity, same), matching_losses(changed, same), strict=True):
        torch.testing.assert_close(a, b)
    own = torch.eye(3, dtype=torch.bool)
    assert matching_losses(similarity, same)[0] < matching_losses(similarity, own)[0]


def test_without_rivals_the_loss_is_zero() -> None:
    text, image = features(LENGTHS), pictures(4)
    text.words.requires_grad_()
    terms = damsm_terms(DAMSMConfig(), text, image, torch.ones(4, 4, dtype=torch.bool))
    assert [term.item() for term in terms.values()] == [0.0, 0.0]
    sum(terms.values()).backward()
    assert text.words.grad is not None and not text.words.grad.any()


# --- training ---------------------------------------------------------------------------------

TINY = DAMSMConfig(image_encoder="conv", image_channels=4, grid_size=4, same="caption")


def make(tokenizer: WordTokenizer, config: DAMSMConfig = TINY, **text: Any) -> DAMSM:
    torch.manual_seed(0)
    return DAMSM(config, make_encoder("lstm", TextConfig(width=8, **text), tokenizer), 16)


def trainer(system: DAMSM, shapes: CaptionedDataset) -> Trainer:
    optim = OptimConfig(lr=5e-3, warmup=0, decay="none", weight_decay=0.0)
    train = TrainConfig(batch_size=8, precision="fp32", prefetch=0)
    return Trainer(system, shapes, optim, train)


def turn_of(system: DAMSM, batch: Batch, text: TextFeatures | None = None) -> Turn:
    text = text or system.text.encode(batch.caption)
    (turn,) = system.losses(batch, text, NoiseStreams(range(len(batch))))
    assert turn.group == "damsm"
    return turn


def test_a_step_moves_both_encoders(tokenizer: WordTokenizer, shapes: CaptionedDataset) -> None:
    """It draws no pictures, so the loop must not draw sheets with it."""
    system: Any = make(tokenizer, dropout=0.5)
    assert not isinstance(system, System) and list(system.groups()) == ["damsm"]
    one = trainer(system, shapes)
    before = {name: p.detach().clone() for name, p in system.named_parameters()}
    values = one.advance(one.loader.at(0))
    unmoved = {n for n, p in system.named_parameters() if torch.equal(p, before[n])}
    assert not unmoved and {n.split(".")[0] for n in before} == {"text", "image_encoder"}
    assert set(values) == {"damsm/words", "damsm/sentence", "gradient/damsm", "metric/matched"}


def test_matched_is_the_share_of_pictures_whose_nearest_caption_fits(
    tokenizer: WordTokenizer, shapes: CaptionedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another picture's caption counts if its words are the same."""
    system = make(tokenizer)
    captions = ["a red circle", "a blue star", "a red circle", "a ring"]
    batch = Batch(shapes.batch(range(4), [0] * 4, 0).image, captions, None, list("abcd"))
    text = system.text.encode(captions)
    text.sentence = torch.eye(4, 8)
    nearest = [2, 1, 1, 3]  # of the four pictures; the third's is another one
    image = ImageFeatures(torch.randn(4, 16, 8), 5 * torch.eye(4, 8)[nearest])
    monkeypatch.setattr(system.image_encoder, "forward", lambda _: image)
    assert turn_of(system, batch, text).metrics()["matched"].item() == pytest.approx(3 / 4)


@pytest.mark.parametrize("same", ["class", "caption"])
def test_a_step_takes_the_pairs_of_its_setting(
    same: Any,
    tokenizer: WordTokenizer,
    shapes: CaptionedDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Tensor] = []

    def record(config: DAMSMConfig, text: Any, image: Any, same: Tensor) -> dict[str, Tensor]:
        calls.append(same)
        return damsm_terms(config, text, image, same)

    monkeypatch.setattr(module, "damsm_terms", record)
    system = make(tokenizer, replace(TINY, same=same))
    image, label = shapes.batch(range(3), [0] * 3, 0).image, torch.tensor([7, 8, 7])
    batch = Batch(image, ["a ring", "a star", "a circle"], label, list("abc"))
    turn_of(system, batch)
    assert torch.equal(calls[0], pair(3, (0, 2)) if same == "class" else pair(3))


def test_training_makes_the_right_captions_most_similar(
    tokenizer: WordTokenizer, shapes: CaptionedDataset
) -> None:
    """On eight pictures, also in evaluation mode, and in both directions."""
    system = make(tokenizer, replace(TINY, image_channels=8))
    by_caption = {shapes[n].captions[0]: n for n in reversed(range(99))}
    captions = sorted(by_caption, key=by_caption.__getitem__)[:8]  # that differ
    rows = [by_caption[caption] for caption in captions]
    batch = Batch(shapes.batch(rows, [0] * 8, 0).image, captions, None, list("abcdefgh"))
    one = trainer(system, shapes)
    first = one.advance(batch)
    for _ in range(60):
        last = one.advance(batch)
    for name in ("words", "sentence"):
        assert last[f"damsm/{name}"] < 0.2 * first[f"damsm/{name}"]
    system.eval()
    text, image = system.text.encode(captions), system.image_encoder(batch.image)
    for similarity in (
        word_similarity(system.config, text.words, text.mask, image.regions),
        sentence_similarity(text.sentence, image.global_vector),
    ):
        assert similarity.argmax(1).tolist() == similarity.argmax(0).tolist() == list(range(8))


# --- image encoders ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "grid_size"), [(8, 4), (16, 4), (16, 8), (32, 8), (64, 8), (64, 16), (24, 12)]
)
def test_the_grid_has_grid_size_rows_and_columns(size: int, grid_size: int) -> None:
    """Words and sentence may have different widths."""
    encoder = RegionEncoder(size, 7, 9, 4, grid_size).eval()
    image = encoder(torch.randn(2, 3, size, size))
    assert image.regions.shape == (2, grid_size**2, 7) and image.global_vector.shape == (2, 9)
    one = encoder(torch.randn(1, 3, 2 * size, 2 * size))  # other sizes are resized
    assert one.regions.shape == (1, grid_size**2, 7)


def test_regions_are_in_rows() -> None:
    """A change in the upper right corner changes the last region of the first row, and no distant
    regions; the global vector distinguishes left from right."""
    encoder = RegionEncoder(64, 7, 7, 4, 16).eval()
    plain = torch.zeros(1, 3, 64, 64)
    image = plain.clone()
    image[..., :4, -4:] = 1.0
    change = (encoder(image).regions - encoder(plain).regions)[0].abs().sum(1).view(16, 16)
    assert change[0, 15] > 0 and not change[4:].any() and not change[:, :12].any()
    one, other = encoder(image).global_vector, encoder(image.flip(3)).global_vector
    assert (one - other).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("size", "grid_size"),
    [(16, 16), (16, 2), (16, 3), (16, 1), (16, 32), (24, 4), (32, 5), (64, 24), (48, 16)],
)
def test_grids_that_do_not_come_from_halving_are_refused(size: int, grid_size: int) -> None:
    """And the suggested one works."""
    with pytest.raises(UserError, match=rf"damsm\.grid_size={grid_size} .*{size} pixels") as caught:
        RegionEncoder(size, 7, 7, 4, grid_size)
    message = str(caught.value)
    assert "\n" not in message
    suggested = re.search(r"try (\d+)", message)
    assert suggested is not None
    encoder = RegionEncoder(size, 7, 7, 4, int(suggested[1])).eval()
    image = encoder(torch.zeros(1, 3, size, size))
    assert image.regions.shape[1] == int(suggested[1]) ** 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gamma1", 0.0),
        ("gamma2", -1.0),
        ("gamma3", math.nan),
        ("image_channels", 0),
        ("grid_size", 0),
        ("image_encoder", "convs"),
        ("same", "clas"),
    ],
)
def test_impossible_settings_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"damsm\.{name}=") as caught:
        runs.configure("attngan", preset_name="smoke", settings={f"damsm.{name}": value})
    assert "\n" not in str(caught.value)


def test_the_defaults_are_the_papers() -> None:
    """Section 4.1 and the authors' configuration for birds."""
    config = DAMSMConfig()
    assert (config.gamma1, config.gamma2, config.gamma3) == (4.0, 5.0, 10.0)
    assert (config.image_encoder, config.same) == ("inception", "class")


def test_heads_are_linear_on_each_place() -> None:
    """Regions without bias, the global vector with one; initial weights are below 0.1."""
    heads = RegionHeads(6, 5)
    grid, pooled = torch.randn(2, 768, 2, 3), torch.randn(2, 2048)
    image = heads(grid, pooled)
    matrix = heads.emb_features.weight[:, :, 0, 0]
    assert image.regions.shape == (2, 6, 6)
    torch.testing.assert_close(image.regions[1, 4], matrix @ grid[1, :, 1, 1])  # 4 = 1 * 3 + 1
    torch.testing.assert_close(
        image.global_vector[0], heads.emb_cnn_code.weight @ pooled[0] + heads.emb_cnn_code.bias
    )
    for layer in (heads.emb_features, heads.emb_cnn_code):
        assert 0.09 < layer.weight.abs().max() <= 0.1
    assert heads.emb_features.bias is None


@pytest.fixture(scope="module")
def inception() -> InceptionRegions:
    torch.manual_seed(0)
    return InceptionRegions(8, 8)


def test_of_inception_only_the_heads_are_trained(inception: InceptionRegions) -> None:
    """Inception stays in evaluation mode, with its batch statistics, in training too."""
    trained = {name for name, p in inception.named_parameters() if p.requires_grad}
    assert trained == {"heads." + name for name, _ in inception.heads.named_parameters()}
    inception.train()
    assert inception.training and inception.heads.training
    assert not any(part.training for part in inception.inception.modules())
    before = {name: t.clone() for name, t in inception.inception.state_dict().items()}
    assert any("running_var" in name for name in before)
    image = inception(torch.randn(1, 3, 16, 16))
    assert image.regions.shape == (1, 17 * 17, 8) and image.global_vector.shape == (1, 8)
    for name, tensor in inception.inception.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not isinstance(inception.inception.fc, nn.Linear)


def test_pictures_are_enlarged_from_corner_to_corner(
    inception: InceptionRegions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by the torch of the authors' time: corners stay corners, so that a linear ramp stays one;
    values stay in [-1, 1]."""
    calls: list[Tensor] = []
    original = inception.inception.forward

    def record(image: Tensor) -> Any:
        calls.append(image)
        return original(image)

    monkeypatch.setattr(inception.inception, "forward", record)
    inception(torch.linspace(-1, 1, 16).expand(1, 3, 16, 16))
    expected = torch.linspace(-1, 1, 299).expand(1, 3, 299, 299)
    torch.testing.assert_close(calls[0], expected, atol=1e-5, rtol=0)


def test_the_papers_encoder_has_the_authors_parameters() -> None:
    """Counted in taoxugit/AttnGAN: CNN_ENCODER at a width of 256, and its two heads."""
    with torch.device("meta"):
        encoder = InceptionRegions(256, 256)
    counts = [(p.numel(), p.requires_grad) for p in encoder.parameters()]
    assert sum(count for count, _ in counts) == 22_506_720
    assert sum(count for count, trained in counts if trained) == 721_152


def test_a_missing_file_of_weights_is_an_error(tokenizer: WordTokenizer) -> None:
    with pytest.raises(UserError, match=r"nowhere\.pth") as caught:
        make(tokenizer, DAMSMConfig(inception_weights="nowhere.pth"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["conv", "inception"])
def test_gradient_reaches_a_picture_through_a_frozen_image_encoder(
    kind: str, inception: InceptionRegions
) -> None:
    """The generator learns through it; its own parameters get no gradient."""
    encoder = inception if kind == "inception" else RegionEncoder(16, 8, 8, 4, 4)
    before = [p.requires_grad for p in encoder.parameters()]
    encoder.requires_grad_(False).eval()
    image = torch.randn(2, 3, 16, 16, requires_grad=True)
    text = TextFeatures(
        torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool), torch.randn(2, 8), torch.ones(2)
    )
    terms = damsm_terms(DAMSMConfig(), text, encoder(image), torch.eye(2, dtype=torch.bool))
    for name, term in terms.items():
        (gradient,) = torch.autograd.grad(term, image, retain_graph=True)
        assert torch.isfinite(gradient).all(), name
        assert (gradient.abs().amax((1, 2, 3)) > 0).all(), name
    assert all(p.grad is None for p in encoder.parameters())
    for p, requires_grad in zip(encoder.parameters(), before, strict=True):
        p.requires_grad_(requires_grad)
