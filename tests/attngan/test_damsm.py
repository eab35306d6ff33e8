"""The DAMSM: losses against slow loops over captions, words and regions; who is nobody's rival; the
image encoders."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lineage.attngan import damsm as module
from lineage.attngan.damsm import (
    DAMSM,
    DAMSMConfig,
    InceptionRegions,
    RegionEncoder,
    RegionHeads,
    Regions,
    cosine,
    matching,
    matching_terms,
    region_contexts,
    sentence_similarity,
    word_similarity,
)
from lineage.config import OptimConfig, TextConfig, TrainConfig
from lineage.data.contract import Batch, CaptionedDataset
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.system import System
from lineage.text.contract import TextFeatures
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import WordTokenizer
from lineage.training.loop import Trainer

D, N, LENGTHS = 5, 6, [3, 1, 4, 2]  # width, regions, words of the captions
CONFIGS = [DAMSMConfig(), DAMSMConfig(gamma1=0.5, gamma2=2.0, gamma3=3.0)]
ALONE = torch.eye(len(LENGTHS), dtype=torch.bool)

Vector = list[float]


def features(lengths: list[int], padding: float = 0.0, more: int = 0) -> TextFeatures:
    """Captions of these lengths, with `padding` in all that is behind their words."""
    random = torch.Generator().manual_seed(0)
    longest = max(lengths)
    words = torch.randn(len(lengths), longest, D, generator=random)
    sentence = torch.randn(len(lengths), D, generator=random)
    words = torch.cat([words, torch.zeros(len(lengths), more, D)], dim=1)
    mask = torch.arange(longest + more) < torch.tensor(lengths)[:, None]
    words = torch.where(mask[..., None], words, torch.full_like(words, padding))
    return TextFeatures(words, mask, sentence, mask.long())


def pictures(count: int) -> Regions:
    random = torch.Generator().manual_seed(1)
    local = torch.randn(count, N, D, generator=random)
    return Regions(local, torch.randn(count, D, generator=random))


# --- slow loops, from section 3.2 -------------------------------------------------------------


def dot(one: Vector, other: Vector) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def cos(one: Vector, other: Vector) -> float:
    return dot(one, other) / math.sqrt(dot(one, one) * dot(other, other))


def softmax(values: Vector) -> Vector:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def naive_attention(words: list[Vector], regions: list[Vector], gamma1: float) -> list[Vector]:
    """Equations 7 to 9: how much each word looks at each region."""
    over_words = [softmax([dot(word, region) for word in words]) for region in regions]
    rows = [[shares[w] for shares in over_words] for w in range(len(words))]
    return [softmax([gamma1 * share for share in row]) for row in rows]


def naive_contexts(words: list[Vector], regions: list[Vector], gamma1: float) -> list[Vector]:
    contexts = []
    for shares in naive_attention(words, regions, gamma1):
        pairs = list(zip(shares, regions, strict=True))
        contexts.append([sum(share * region[d] for share, region in pairs) for d in range(D)])
    return contexts


def naive_match(config: DAMSMConfig, words: list[Vector], regions: list[Vector]) -> float:
    """Equation 10 of one picture and one caption, without the outer power, as the authors'."""
    contexts = naive_contexts(words, regions, config.gamma1)
    pairs = zip(words, contexts, strict=True)
    return math.log(sum(math.exp(config.gamma2 * cos(word, seen)) for word, seen in pairs))


def naive_losses(gamma3: float, match: list[Vector], same: list[list[bool]]) -> Vector:
    """Equations 11 and 12: means of -log P(caption i | picture i) and -log P(picture i | caption
    i), where pairs that belong together stand in no sum but their own."""
    count, found = len(match), [0.0, 0.0]
    for i in range(count):
        rivals = [j for j in range(count) if j == i or not same[i][j]]
        true = math.exp(gamma3 * match[i][i])
        captions = sum(math.exp(gamma3 * match[i][j]) for j in rivals)
        images = sum(math.exp(gamma3 * match[j][i]) for j in rivals)
        found[0] -= math.log(true / captions) / count
        found[1] -= math.log(true / images) / count
    return found


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
    """Of every caption on every picture, its own or not."""
    text, regions = features(LENGTHS), pictures(3).local
    contexts, attention = region_contexts(text.words, text.mask, regions, config.gamma1)
    assert contexts.shape == (3, 4, 4, D) and attention.shape == (3, 4, 4, N)
    for i in range(3):
        for j, words in enumerate(rows_of(text)):
            places = regions[i].double().tolist()
            for found, naive in ((attention, naive_attention), (contexts, naive_contexts)):
                expected = torch.tensor(naive(words, places, config.gamma1))
                torch.testing.assert_close(found[i, j, : len(words)], expected)


def test_what_a_word_looks_at_sums_to_one() -> None:
    text, regions = features(LENGTHS), pictures(3)
    _, attention = region_contexts(text.words, text.mask, 5 * regions.local, 4.0)
    shares = attention.sum(3)[:, text.mask]
    torch.testing.assert_close(shares, torch.ones_like(shares))
    assert attention.min() >= 0 and attention[:, text.mask].std() > 0.01


@pytest.mark.parametrize("config", CONFIGS, ids=["paper", "other"])
@pytest.mark.parametrize(
    "same", [ALONE, pair(4, (0, 2)), pair(4, (0, 2), (1, 3), (0, 1))], ids=["alone", "two", "three"]
)
def test_the_losses_are_those_of_a_loop(config: DAMSMConfig, same: Tensor) -> None:
    text, regions = features(LENGTHS), pictures(4)
    captions, places = rows_of(text), regions.local.double().tolist()
    words = [[naive_match(config, caption, place) for caption in captions] for place in places]
    whole, sentences = regions.whole.double().tolist(), text.sentence.double().tolist()
    sentence = [[cos(one, other) for other in sentences] for one in whole]
    found = matching(config, text, regions, same)
    assert list(found) == ["words", "sentence"]
    for term, match in zip(found.values(), (words, sentence), strict=True):
        expected = sum(naive_losses(config.gamma3, match, same.tolist()))
        assert term.item() == pytest.approx(expected, rel=1e-5)
    similarity = word_similarity(config, text.words, text.mask, regions.local)
    torch.testing.assert_close(similarity, torch.tensor(words))  # row: picture, column: caption
    torch.testing.assert_close(
        sentence_similarity(text.sentence, regions.whole), torch.tensor(sentence)
    )


def test_captions_of_a_picture_come_first() -> None:
    """By hand, where the two directions differ: a column in which all pictures are equal."""
    similarity = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    captions, images = matching_terms(similarity, torch.eye(2, dtype=torch.bool))
    rows = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))]
    assert captions.item() == pytest.approx(sum(rows) / 2)
    assert images.item() == pytest.approx(math.log(2))


def test_padding_words_never_matter() -> None:
    """Neither what stands in them nor how many there are, for any caption of the batch."""
    regions, config = pictures(4), DAMSMConfig()
    expected = matching(config, features(LENGTHS), regions, ALONE)
    for padding, more in ((50.0, 0), (0.0, 3), (-7.0, 5)):
        found = matching(config, features(LENGTHS, padding, more), regions, ALONE)
        for name, term in found.items():
            torch.testing.assert_close(term, expected[name])


def test_padding_words_get_no_gradient() -> None:
    text = features(LENGTHS, 2.0)
    text.words.requires_grad_()
    sum(matching(DAMSMConfig(), text, pictures(4), ALONE).values()).backward()
    gradient = text.words.grad
    assert gradient is not None and torch.isfinite(gradient).all()
    assert not gradient[~text.mask].any() and (gradient[text.mask].abs().amax(1) > 0).all()


def test_a_pair_does_not_depend_on_the_batch() -> None:
    text, regions, config = features(LENGTHS), pictures(4), DAMSMConfig()
    whole = word_similarity(config, text.words, text.mask, regions.local)
    for j, length in enumerate(LENGTHS):
        row = text[j : j + 1].shortened(length)
        alone = word_similarity(config, row.words, row.mask, regions.local[2:3])
        torch.testing.assert_close(alone[0, 0], whole[2, j])


def test_a_cosine_of_nothing_is_zero() -> None:
    """The product of the norms is at least 1e-8, as in the authors' code."""
    one = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-5, 0.0]])
    other = torch.tensor([[4.0, 3.0], [1.0, 0.0], [1e-5, 0.0]])
    assert cosine(one, other).tolist() == pytest.approx([24 / 25, 0.0, 1e-10 / 1e-8])


@pytest.mark.parametrize("scale", [1e-6, 1e3])
def test_features_of_any_length_give_numbers(scale: float) -> None:
    text, regions = features(LENGTHS), pictures(4)
    text.words, regions.local = scale * text.words, scale * regions.local
    text.words.requires_grad_()
    loss = sum(matching(DAMSMConfig(), text, regions, ALONE).values())
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(text.words.grad).all()


@pytest.mark.parametrize("kind", ["plain", "cancel", "centred", "none"])
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_a_cosine_is_never_more_than_one(half: bool, kind: str) -> None:
    """Also where words are short, so that each looks everywhere, and regions cancel out, so that
    hardly anything is left to look at: rounding must not pass for a match."""
    random = torch.Generator().manual_seed(0)
    local = torch.randn(4, 32, 16, generator=random)
    regions = {
        "plain": local,
        "cancel": torch.cat([local, -local], dim=1),
        "centred": local - local.mean(1, keepdim=True),
        "none": 0 * local,
    }[kind].requires_grad_()
    words, mask = 1e-3 * torch.randn(4, 6, 16, generator=random), torch.ones(4, 6, dtype=torch.bool)
    config = DAMSMConfig()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        found = word_similarity(config, words, mask, regions)
    assert found.max() <= 1.05 * config.gamma2 + math.log(6)
    assert found.min() >= -1.05 * config.gamma2 + math.log(6)
    (gradient,) = torch.autograd.grad(found.sum(), regions)
    assert torch.isfinite(gradient).all()


# --- rivals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("same", ["class", "caption"])
@pytest.mark.parametrize(
    ("labels", "classmates"),
    [(None, set()), ([0, 1, 2, 1], {(1, 3)}), ([5, 6, 7, 8], set()), ([3, 3, 4, 4], {(0, 1)})],
)
def test_words_and_classes_make_no_rivals(
    labels: list[int] | None, classmates: set[tuple[int, int]], same: str
) -> None:
    """A class counts only where the setting says so; the same words always."""
    captions = ["a red circle", "a blue star", "a red circle", "circle red a"]
    label = None if labels is None else torch.tensor(labels)
    batch = Batch(torch.zeros(4, 3, 8, 8), captions, label, list("abcd"))
    friends = {(0, 2)} | (classmates if same == "class" else set())
    friends |= {(2, 3)} if labels == [3, 3, 4, 4] and same == "class" else set()
    found = batch.alike(same)
    assert torch.equal(found, pair(4, *friends))
    assert label is None or label.tolist() == labels  # the batch is left as it is


def test_what_belongs_together_is_no_rival() -> None:
    """However well or badly the two match, and in both directions."""
    similarity = torch.tensor([[2.0, 9.0, 0.5], [-3.0, 1.0, 0.0], [0.1, 0.2, 0.3]])
    same = pair(3, (0, 1))
    changed = similarity.clone()
    changed[0, 1], changed[1, 0] = -4.0, 70.0
    for a, b in zip(matching_terms(similarity, same), matching_terms(changed, same), strict=True):
        torch.testing.assert_close(a, b)
    alone = torch.eye(3, dtype=torch.bool)
    assert matching_terms(similarity, same)[0] < matching_terms(similarity, alone)[0]


def test_where_all_are_alike_there_is_nothing_to_learn() -> None:
    """And nothing that is no number."""
    text, regions = features(LENGTHS), pictures(4)
    text.words.requires_grad_()
    found = matching(DAMSMConfig(), text, regions, torch.ones(4, 4, dtype=torch.bool))
    assert [term.item() for term in found.values()] == [0.0, 0.0]
    sum(found.values()).backward()
    assert text.words.grad is not None and not text.words.grad.any()


# --- training ---------------------------------------------------------------------------------

TINY = DAMSMConfig(regions="conv", channels=4, grid=4, same="caption")


def make(tokenizer: WordTokenizer, config: DAMSMConfig = TINY, **text: Any) -> DAMSM:
    torch.manual_seed(0)
    return DAMSM(config, make_encoder("lstm", TextConfig(width=8, **text), tokenizer), 16)


def trainer(system: DAMSM, shapes: CaptionedDataset, batch: int = 8) -> Trainer:
    optim = OptimConfig(lr=5e-3, warmup=0, decay="none", weight_decay=0.0)
    return Trainer(system, shapes, optim, TrainConfig(batch=batch, precision="fp32", prefetch=0))


def test_a_step_moves_both_encoders(tokenizer: WordTokenizer, shapes: CaptionedDataset) -> None:
    """Every parameter of both, words that the batch lacks aside; it draws nothing, so the loop must
    not ask it for sheets."""
    system: Any = make(tokenizer, dropout=0.5)
    assert not isinstance(system, System) and list(system.groups()) == ["damsm"]
    one = trainer(system, shapes)
    before = {name: p.detach().clone() for name, p in system.named_parameters()}
    seen = one.advance(one.loader.at(0))
    still = {n for n, p in system.named_parameters() if torch.equal(p, before[n])}
    assert not still and {n.split(".")[0] for n in before} == {"text", "image"}
    assert set(seen) == {"damsm/words", "damsm/sentence", "gradient/damsm", "health/matched"}


def test_matched_is_the_share_that_find_a_caption_of_theirs(
    tokenizer: WordTokenizer, shapes: CaptionedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caption in other hands counts where its words are the same."""
    system = make(tokenizer)
    captions = ["a red circle", "a blue star", "a red circle", "a ring"]
    batch = Batch(shapes.batch(range(4), [0] * 4, 0).image, captions, None, list("abcd"))
    text = system.text.encode(captions)
    text.sentence = torch.eye(4, 8)
    nearest = [2, 1, 1, 3]  # of the four pictures; the third finds another's
    found = Regions(torch.randn(4, 16, 8), 5 * torch.eye(4, 8)[nearest])
    monkeypatch.setattr(system.image, "forward", lambda image: found)
    ((name, _),) = system.losses(batch, text, NoiseStreams(range(4)))
    assert name == "damsm" and system.facts["matched"].item() == pytest.approx(3 / 4)


@pytest.mark.parametrize("same", ["class", "caption"])
def test_a_step_knows_who_is_no_rival(
    same: str,
    tokenizer: WordTokenizer,
    shapes: CaptionedDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Tensor] = []

    def watched(config: DAMSMConfig, text: Any, regions: Any, same: Tensor) -> dict[str, Tensor]:
        seen.append(same)
        return matching(config, text, regions, same)

    monkeypatch.setattr(module, "matching", watched)
    system = make(tokenizer, DAMSMConfig(regions="conv", channels=4, grid=4, same=same))
    image, label = shapes.batch(range(3), [0] * 3, 0).image, torch.tensor([7, 8, 7])
    batch = Batch(image, ["a ring", "a star", "a circle"], label, list("abc"))
    list(system.losses(batch, system.text.encode(batch.caption), NoiseStreams(range(3))))
    assert torch.equal(seen[0], pair(3, (0, 2)) if same == "class" else pair(3))


def test_training_makes_words_and_sentences_find_their_pictures(
    tokenizer: WordTokenizer, shapes: CaptionedDataset
) -> None:
    """On eight pictures, also in evaluation mode, and in both directions."""
    system = make(tokenizer, DAMSMConfig(regions="conv", channels=8, grid=4, same="caption"))
    numbers = [0]
    while len(numbers) < 8:  # eight captions that differ
        taken = {shapes[n].captions[0] for n in numbers}
        numbers.append(next(n for n in range(99) if shapes[n].captions[0] not in taken))
    captions = [shapes[n].captions[0] for n in numbers]
    batch = Batch(shapes.batch(numbers, [0] * 8, 0).image, captions, None, list("abcdefgh"))
    one = trainer(system, shapes)
    first = one.advance(batch)
    for _ in range(60):
        last = one.advance(batch)
    for name in ("words", "sentence"):
        assert last[f"damsm/{name}"] < 0.2 * first[f"damsm/{name}"]
    system.eval()
    text, regions = system.text.encode(captions), system.image(batch.image)
    for fit in (
        word_similarity(system.config, text.words, text.mask, regions.local),
        sentence_similarity(text.sentence, regions.whole),
    ):
        assert fit.argmax(1).tolist() == fit.argmax(0).tolist() == list(range(8))


# --- image encoders ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "grid"), [(8, 4), (16, 4), (16, 8), (32, 8), (64, 8), (64, 16), (24, 12)]
)
def test_regions_are_as_many_as_the_grid_has_places(size: int, grid: int) -> None:
    encoder = RegionEncoder(size, 7, 4, grid).eval()
    found = encoder(torch.randn(2, 3, size, size))
    assert found.local.shape == (2, grid**2, 7) and found.whole.shape == (2, 7)
    one = encoder(torch.randn(1, 3, 2 * size, 2 * size))  # other sizes are resized
    assert one.local.shape == (1, grid**2, 7)


def test_regions_lie_row_by_row() -> None:
    """A change at the right end of the top changes the last region of the first row, and regions
    far off not at all; the whole knows left from right."""
    encoder = RegionEncoder(64, 7, 4, 16).eval()
    plain = torch.zeros(1, 3, 64, 64)
    image = plain.clone()
    image[..., :4, -4:] = 1.0
    moved = (encoder(image).local - encoder(plain).local)[0].abs().sum(1).view(16, 16)
    assert moved[0, 15] > 0 and not moved[4:].any() and not moved[:, :12].any()
    one, other = encoder(image).whole, encoder(image.flip(3)).whole
    assert (one - other).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("size", "grid"),
    [(16, 16), (16, 2), (16, 3), (16, 1), (16, 32), (24, 4), (32, 5), (64, 24), (48, 16)],
)
def test_grids_that_do_not_come_from_halving_are_told(size: int, grid: int) -> None:
    """And what is suggested in its place works, where halving works at all."""
    with pytest.raises(UserError, match=rf"damsm\.grid={grid} .*{size} pixels") as caught:
        RegionEncoder(size, 7, 4, grid)
    message = str(caught.value)
    assert "\n" not in message
    suggested = re.search(r"try (\d+)", message)
    assert suggested is not None
    found = RegionEncoder(size, 7, 4, int(suggested[1])).eval()(torch.zeros(1, 3, size, size))
    assert found.local.shape[1] == int(suggested[1]) ** 2


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"gamma1": 0.0}, "damsm.gamma1"),
        ({"gamma2": -1.0}, "damsm.gamma2"),
        ({"gamma3": math.nan}, "damsm.gamma3"),
        ({"channels": 0}, "damsm.channels"),
        ({"grid": 0}, "damsm.grid"),
        ({"regions": "convs"}, "damsm.regions"),
        ({"same": "clas"}, "damsm.same"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_told(change: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=re.escape(name)) as caught:
        DAMSMConfig(**change)
    assert "\n" not in str(caught.value)


def test_the_defaults_are_the_papers() -> None:
    """Section 4.1 and the authors' configuration for birds."""
    config = DAMSMConfig()
    assert (config.gamma1, config.gamma2, config.gamma3) == (4.0, 5.0, 10.0)
    assert (config.regions, config.same) == ("inception", "class")


def test_heads_are_linear_on_each_place() -> None:
    """No bias on a region, one on the whole; both start within a tenth."""
    heads = RegionHeads(6)
    places, pooled = torch.randn(2, 768, 2, 3), torch.randn(2, 2048)
    found = heads(places, pooled)
    matrix = heads.emb_features.weight[:, :, 0, 0]
    assert found.local.shape == (2, 6, 6)
    torch.testing.assert_close(found.local[1, 4], matrix @ places[1, :, 1, 1])  # 4 = 1 * 3 + 1
    torch.testing.assert_close(
        found.whole[0], heads.emb_cnn_code.weight @ pooled[0] + heads.emb_cnn_code.bias
    )
    for layer in (heads.emb_features, heads.emb_cnn_code):
        assert 0.09 < layer.weight.abs().max() <= 0.1
    assert heads.emb_features.bias is None


@pytest.fixture(scope="module")
def inception() -> InceptionRegions:
    torch.manual_seed(0)
    return InceptionRegions(8)


def test_of_inception_only_the_heads_are_trained(inception: InceptionRegions) -> None:
    """Inception stays in evaluation mode, batch statistics included, whatever is trained."""
    trained = {name for name, p in inception.named_parameters() if p.requires_grad}
    assert trained == {"heads." + name for name, _ in inception.heads.named_parameters()}
    inception.train()
    assert inception.training and inception.heads.training
    assert not any(part.training for part in inception.inception.modules())
    before = {name: t.clone() for name, t in inception.inception.state_dict().items()}
    assert any("running_var" in name for name in before)
    found = inception(torch.randn(1, 3, 16, 16))
    assert found.local.shape == (1, 17 * 17, 8) and found.whole.shape == (1, 8)
    for name, tensor in inception.inception.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not isinstance(inception.inception.fc, nn.Linear)


def test_pictures_are_enlarged_from_corner_to_corner(
    inception: InceptionRegions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by the torch of the authors' day: the outermost pixels stay outermost, so a picture that
    rises evenly rises evenly; its values stay in [-1, 1]."""
    seen: list[Tensor] = []
    original = inception.inception.forward

    def watched(image: Tensor) -> Any:
        seen.append(image)
        return original(image)

    monkeypatch.setattr(inception.inception, "forward", watched)
    rising = torch.linspace(-1, 1, 16).expand(1, 3, 16, 16)
    inception(rising)
    expected = torch.linspace(-1, 1, 299).expand(1, 3, 299, 299)
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=0)


def test_the_papers_encoder_has_the_authors_parameters() -> None:
    """Counted in taoxugit/AttnGAN: CNN_ENCODER at a width of 256, and its two heads."""
    with torch.device("meta"):
        encoder = InceptionRegions(256)
    counts = [(p.numel(), p.requires_grad) for p in encoder.parameters()]
    assert sum(count for count, _ in counts) == 22_506_720
    assert sum(count for count, trained in counts if trained) == 721_152


def test_weights_that_are_not_there_are_told(tokenizer: WordTokenizer) -> None:
    with pytest.raises(UserError, match=r"nowhere\.pth") as caught:
        make(tokenizer, DAMSMConfig(weights="nowhere.pth"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["conv", "inception"])
def test_gradient_reaches_a_picture_through_a_frozen_matcher(
    kind: str, inception: InceptionRegions
) -> None:
    """The generator learns through it; nothing of it collects a gradient."""
    encoder = inception if kind == "inception" else RegionEncoder(16, 8, 4, 4)
    wanted = [p.requires_grad for p in encoder.parameters()]
    encoder.requires_grad_(False).eval()
    image = torch.randn(2, 3, 16, 16, requires_grad=True)
    text = TextFeatures(
        torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool), torch.randn(2, 8), torch.ones(2)
    )
    terms = matching(DAMSMConfig(), text, encoder(image), torch.eye(2, dtype=torch.bool))
    for name, term in terms.items():
        (gradient,) = torch.autograd.grad(term, image, retain_graph=True)
        assert torch.isfinite(gradient).all(), name
        assert (gradient.abs().amax((1, 2, 3)) > 0).all(), name
    assert all(p.grad is None for p in encoder.parameters())
    for p, asked in zip(encoder.parameters(), wanted, strict=True):
        p.requires_grad_(asked)
