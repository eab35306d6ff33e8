"""`attngan`: the authors' sizes, attention and masks against loops, terms by hand, turns that keep
apart, and what it shows of its inside."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage import runs
from lineage.attngan.attngan import (
    AttnGAN,
    AttnGANConfig,
    ConditioningAugmentation,
    Drawn,
    GatedResidual,
    Generator,
    WordAttention,
    glu_up,
)
from lineage.attngan.damsm import DAMSM, DAMSMConfig, RegionHeads, matching
from lineage.config import OptimConfig, TextConfig, TrainConfig
from lineage.data.contract import Batch, CaptionedDataset
from lineage.errors import UserError
from lineage.nn import matching as pairs
from lineage.nn.conditional_discriminator import Discriminator, kl_term
from lineage.nn.noise import NoiseStreams
from lineage.recipes import attngan as recipe
from lineage.text.contract import TextFeatures
from lineage.text.encoders import LSTMEncoder, make_encoder
from lineage.text.tokenizer import SPECIAL, WordTokenizer
from lineage.training.loop import Trainer
from lineage.training.stage import content_key

B, WIDTH, SIZE, SIDES = 4, 8, 16, (8, 16)
TINY = AttnGANConfig(
    scales=2, noise=6, condition=5, generator=4, discriminator=4, residual=1, damsm=1.0
)
CAPTIONS = ["a red circle", "a blue square above a green triangle", "", "a ring"]

Make = Callable[..., AttnGAN]


@pytest.fixture(scope="module")
def make(tokenizer: WordTokenizer) -> Make:
    """A system of 8 and 16 pixels, of weights large enough to show a caption."""

    def make(
        text: str = "lstm", size: int = SIZE, same: str = "caption", **changes: Any
    ) -> AttnGAN:
        torch.manual_seed(0)
        encoder = make_encoder(text, TextConfig(width=WIDTH, heads=2), tokenizer)
        config = DAMSMConfig(regions="conv", channels=4, grid=size // 4, same=same)
        system = AttnGAN(replace(TINY, **changes), DAMSM(config, encoder, size), size)
        enlarge(system.generator, system.discriminators)
        return system

    return make


@torch.no_grad()
def enlarge(*networks: nn.Module) -> None:
    """At the weights of the start, hardly anything that is asked for shows in a picture."""
    for parameter in (p for network in networks for p in network.parameters() if p.dim() > 1):
        parameter.mul_(2.0)


def batch_of(shapes: CaptionedDataset, captions: list[str] | None = None) -> Batch:
    batch = shapes.batch(range(B), [0] * B, 0)
    return Batch(batch.image, captions or batch.caption, batch.label, batch.id)


def steps(system: AttnGAN, batch: Batch) -> Iterator[tuple[str, dict[str, Tensor]]]:
    return system.losses(batch, system.text.encode(batch.caption), NoiseStreams(range(len(batch))))


def drawn_by(system: AttnGAN, batch: Batch) -> Drawn:
    """What the step of `steps` draws."""
    draws = NoiseStreams(range(len(batch)))
    noise, eps = draws.randn(TINY.noise), draws.randn(TINY.condition)
    return system.generator(system.text.encode(batch.caption), noise, eps)


def trainer_for(system: AttnGAN, shapes: CaptionedDataset, **optim: Any) -> Trainer:
    given = {"lr": 1e-2, "warmup": 0, "decay": "none", "weight_decay": 0.0, **optim}
    train = TrainConfig(batch=B, precision="fp32", prefetch=0)
    return Trainer(system, shapes, OptimConfig(**given), train)


def trained(system: AttnGAN, shapes: CaptionedDataset, number: int = 3) -> Trainer:
    """A trainer after a few large steps."""
    trainer = trainer_for(system, shapes)
    for k in range(number):
        trainer.advance(trainer.loader.at(k))
    return trainer


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def size_of(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


# --- networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "vocabulary", "generator", "discriminators", "text"),
    [
        (AttnGANConfig(), 5450, 7_084_592, (6_313_730, 19_424_002, 71_858_946), 2_075_320),
        (
            AttnGANConfig(generator=48, discriminator=96, residual=3),
            27_297,
            13_811_456,
            (13_304_450, 42_800_258, 160_774_274),
            8_629_420,
        ),
    ],
    ids=["bird", "coco"],
)
def test_the_networks_are_of_the_authors_sizes(
    config: AttnGANConfig,
    vocabulary: int,
    generator: int,
    discriminators: tuple[int, ...],
    text: int,
) -> None:
    """Counted in taoxugit/AttnGAN with the configurations for birds and for COCO, words and
    sentences of 256: G_NET, D_NET64, 128 and 256, RNN_ENCODER, and the heads of CNN_ENCODER."""
    words = WordTokenizer([str(n) for n in range(vocabulary - len(SPECIAL))])
    with torch.device("meta"):
        assert size_of(Generator(config, 256, 256)) == generator
        looks = [Discriminator(config.discriminator, 256, side, True) for side in (64, 128, 256)]
        assert tuple(map(size_of, looks)) == discriminators
        assert size_of(LSTMEncoder(TextConfig(width=256, inputs=300), words)) == text
        assert size_of(RegionHeads(256)) == 721_152


def test_the_preset_paper_is_the_authors_for_birds() -> None:
    """All of it, counted as above: G_NET, three D_NETs, RNN_ENCODER and CNN_ENCODER."""
    config = recipe.PRESETS["paper"]
    words = WordTokenizer([str(n) for n in range(5450 - len(SPECIAL))])
    with torch.device("meta"):
        system = runs.build(recipe.stages(config, words))
    expected = 7_084_592 + 6_313_730 + 19_424_002 + 71_858_946 + 2_075_320 + 22_506_720
    assert size_of(system) == expected


def test_the_defaults_are_the_papers() -> None:
    """Section 4 and the authors' configuration for birds; no switch of later work is on."""
    config = AttnGANConfig()
    assert (config.scales, config.noise, config.condition) == (3, 100, 100)
    assert (config.generator, config.discriminator, config.residual) == (32, 64, 2)
    assert (config.damsm, config.kl, config.loss, config.r1) == (5.0, 1.0, "log", 0.0)
    assert (config.norm, config.official_mask) == ("batch", False)


@pytest.mark.parametrize(
    ("scales", "size", "expected"),
    [(2, 16, [8, 16]), (3, 32, [8, 16, 32]), (3, 256, [64, 128, 256]), (2, 256, [128, 256])],
)
def test_sides_double(scales: int, size: int, expected: list[int]) -> None:
    assert AttnGANConfig(scales=scales).sides(size) == expected


@pytest.mark.parametrize(("scales", "size"), [(2, 8), (3, 16), (2, 17), (3, 34), (7, 64), (30, 8)])
def test_sides_that_cannot_be_are_told(scales: int, size: int) -> None:
    with pytest.raises(UserError, match=rf"{scales} scales up to {size} pixels") as caught:
        AttnGANConfig(scales=scales).sides(size)
    assert "\n" not in str(caught.value) and "size" in str(caught.value)


@pytest.mark.parametrize(
    "sizes",
    [
        {"size": 8},
        {"size": 24},
        {"size": 48, "damsm.grid": 12},
        {"size": 24, "damsm.grid": 6},
        {"model.scales": 3},
        {"model.scales": 1},
        {"damsm.grid": 16},
        {"damsm_share": 0.0},
        {"damsm_share": 1.0},
        {"text": "lstm", "encoder.width": 15},
        {"model.generator": 0},
    ],
    ids=str,
)
def test_what_cannot_be_built_is_told(sizes: dict[str, Any], tokenizer: WordTokenizer) -> None:
    """In one sentence, before anything is trained; 8 and 16 pixels are the preset's."""

    def build() -> None:
        config: Any = runs.configure("attngan", preset_name="smoke", settings=sizes)
        with torch.device("meta"):
            runs.build(recipe.stages(config, tokenizer))

    with pytest.raises(UserError) as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"scales": 1}, "model.scales"),
        ({"noise": 0}, "model.noise"),
        ({"condition": 0}, "model.condition"),
        ({"discriminator": 0}, "model.discriminator"),
        ({"residual": -1}, "model.residual"),
        ({"damsm": -0.1}, "model.damsm"),
        ({"kl": -0.1}, "model.kl"),
        ({"r1": math.nan}, "model.r1"),
        ({"r1_every": 0}, "model.r1_every"),
        ({"loss": "hing"}, "model.loss"),
        ({"norm": "layer"}, "model.norm"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_told(change: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=name):
        AttnGANConfig(**change)


@pytest.mark.parametrize(("scales", "size"), [(2, 16), (3, 32), (2, 32), (4, 64)])
def test_every_side_that_can_be_works(scales: int, size: int, make: Make) -> None:
    """Pictures double; attention has the side of the picture before."""
    system = make(size=size, scales=scales)
    drawn = system.drawn(CAPTIONS, NoiseStreams(range(4)))
    sides = [size // 2 ** (scales - 1 - i) for i in range(scales)]
    assert [image.shape for image in drawn.images] == [(4, 3, side, side) for side in sides]
    assert [w.shape for w in drawn.attention] == [(4, 7, side, side) for side in sides[:-1]]
    assert all(image.abs().max() <= 1 for image in drawn.images)
    assert [side for side, _ in system.looks()] == sides
    for (_, look), image in zip(system.looks(), drawn.images, strict=True):
        assert look.features(image).shape[2:] == (4, 4)


@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_networks_start_orthogonal(norm: str, tokenizer: WordTokenizer) -> None:
    """Kernels and matrices as rows (or columns) of unit length at right angles, biases of matrices
    at zero, norm scales about one: as the authors', whatever norm the discriminators have."""
    encoder = make_encoder("bag", TextConfig(width=WIDTH), tokenizer)
    matcher = DAMSM(DAMSMConfig(regions="conv", channels=4, grid=4), encoder, SIZE)
    system = AttnGAN(replace(TINY, norm=norm), matcher, SIZE)
    seen = 0
    for part in (*system.generator.modules(), *system.discriminators.modules()):
        if isinstance(part, nn.Conv2d | nn.Linear):
            matrix = part.weight.detach().flatten(1)
            matrix = matrix if len(matrix) <= matrix.shape[1] else matrix.mT
            torch.testing.assert_close(
                matrix @ matrix.mT, torch.eye(len(matrix)), atol=1e-4, rtol=0
            )
            seen += 1
            if isinstance(part, nn.Linear) and part.bias is not None:
                assert not part.bias.any()
        elif isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            assert (part.weight - 1).abs().max() < 0.15 and part.weight.std() > 1e-3
            assert not part.bias.any()
    assert seen > 15


# --- blocks -----------------------------------------------------------------------------------


def gate(x: Tensor) -> Tensor:
    """The first half of the channels, as far as the second half lets it through."""
    half = x.shape[1] // 2
    return x[:, :half] / (1 + (-x[:, half:]).exp())


def test_gates_and_sums_are_those_of_the_authors() -> None:
    """Twice the side, then convolution, norm, gate; residual blocks with nothing after the sum."""
    x = numbers(2, 4, 6, 6)
    up = glu_up(4, 3).eval()
    _, conv, norm, _ = up
    twice = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(up(x), gate(norm(F.conv2d(twice, conv.weight, padding=1))))
    block = GatedResidual(4).eval()
    inner = gate(block.block[1](block.block[0](x)))
    torch.testing.assert_close(block(x), x + block.block[4](block.block[3](inner)))
    assert (block(x) < 0).any()


def test_the_condition_may_have_any_mean_and_spread() -> None:
    """c = mu + sigma eps; a gate before the two are taken apart, so both may be negative."""
    network = ConditioningAugmentation(12, 7)
    nn.init.normal_(network.fc.weight)
    sentence, eps = numbers(64, 12), numbers(64, 7, seed=1)
    code, mu, log_variance = network(sentence, eps)
    both = gate(network.fc(sentence))
    torch.testing.assert_close(torch.cat([mu, log_variance], dim=1), both)
    assert mu.min() < -1 and mu.max() > 1 and log_variance.min() < -1 and log_variance.max() > 1
    torch.testing.assert_close(code, mu + log_variance.exp().sqrt() * eps)


def test_the_first_stage_reads_the_condition_before_the_noise(make: Make) -> None:
    """The authors' order, which published weights depend on."""
    first = make().generator.first.eval()
    noise, code = numbers(3, TINY.noise), numbers(3, TINY.condition, seed=1)
    x = gate(first.fc[1](torch.cat([code, noise], dim=1) @ first.fc[0].weight.mT))
    x = first.upsample(x.view(3, 8, 4, 4))
    torch.testing.assert_close(first(noise, code), x)


# --- attention --------------------------------------------------------------------------------

LENGTHS = [[3, 1, 5], [2, 4], [5, 5, 5]]


def asked(lengths: list[int], height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (B, 4, H, W), words (B, L, 6), mask (B, L)."""
    hidden, words = numbers(len(lengths), 4, height, width), numbers(len(lengths), max(lengths), 6)
    return hidden, words, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_place_reads_the_words_it_fits(lengths: list[int]) -> None:
    """Equation 2 in loops: a softmax, without a scale, of what the projected words have in common
    with the place; what is read are the projected words. On padding, nothing."""
    network = WordAttention(6, 4)
    hidden, words, mask = asked(lengths, 2, 3)
    read, weights = network(hidden, words, mask)
    assert read.shape == hidden.shape and weights.shape == (*mask.shape, 2, 3)
    matrix = network.project.weight.detach().double()
    for b, length in enumerate(lengths):
        keys = [matrix @ words[b, w].double() for w in range(length)]
        for y in range(2):
            for x in range(3):
                scores = [float(hidden[b, :, y, x].double() @ key) for key in keys]
                total = sum(math.exp(score) for score in scores)
                shares = [math.exp(score) / total for score in scores]
                assert weights[b, :length, y, x].tolist() == pytest.approx(shares, rel=1e-5)
                seen = sum(share * key for share, key in zip(shares, keys, strict=True))
                torch.testing.assert_close(read[b, :, y, x].double(), seen, atol=1e-5, rtol=1e-5)
        assert not weights[b, length:].any()
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))


def public_attention(
    network: WordAttention, hidden: Tensor, words: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """GlobalAttentionGeneral of the public code, with its `mask.repeat(queryL, 1)`."""
    batch, _, height, width = hidden.shape
    places = hidden.flatten(2).transpose(1, 2)
    source = torch.stack([network.project.weight @ row.mT for row in words])  # (B, G, L)
    scores = torch.bmm(places, source).view(batch * height * width, -1)
    padding = (~mask).repeat(height * width, 1)
    shares = scores.masked_fill(padding, -torch.inf).softmax(1)
    shares = shares.view(batch, height * width, -1).transpose(1, 2)
    read = torch.bmm(source, shares).view_as(hidden)
    return read, shares.reshape(*mask.shape, height, width)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 4), (2, 3)])
def test_the_official_mask_is_that_of_the_public_code(
    lengths: list[int], height: int, width: int
) -> None:
    """Its mask of row r is that of caption r modulo B, where row r is of picture r divided by H W.
    Where all captions are equally long, there is nothing to mix up."""
    network, given = WordAttention(6, 4, official_mask=True), asked(lengths, height, width)
    right = WordAttention(6, 4)
    right.load_state_dict(network.state_dict())
    found = network(*given)
    for ours, theirs in zip(found, public_attention(network, *given), strict=True):
        torch.testing.assert_close(ours, theirs)
    differs = (found[1] - right(*given)[1]).abs().max()
    assert differs == 0 if len(set(lengths)) == 1 else differs > 1e-2


def test_padding_words_never_matter(make: Make) -> None:
    """Pictures are the same with more padding, and whatever stands in it."""
    system = make().eval()
    text, noise, eps = system.text.encode(CAPTIONS), numbers(4, 6), numbers(4, 5, seed=1)
    longer = text.padded(11)
    longer.words = torch.where(longer.mask[..., None], longer.words, torch.tensor(9.0))
    one, other = (system.generator(t, noise, eps) for t in (text, longer))
    for a, b in zip(one.images, other.images, strict=True):
        torch.testing.assert_close(a, b)
    assert not other.attention[0][:, 7:].any()


@pytest.mark.parametrize("official", [False, True])
def test_a_picture_depends_on_its_own_mask_alone(official: bool, make: Make) -> None:
    """Beside a long caption as beside a short one; not so in the public code."""
    system = make(official_mask=official)
    beside = [system.generate([CAPTIONS[0], other], seed=3)[0] for other in ("a ring", CAPTIONS[1])]
    apart = (beside[0] - beside[1]).abs().max()
    assert apart > 1e-3 if official else apart < 1e-5


# --- the step ---------------------------------------------------------------------------------


def test_turns_and_their_terms_have_names(make: Make, shapes: CaptionedDataset) -> None:
    """A turn for each discriminator, the smallest pictures first, then the generator's."""
    system = make(r1=1.0)
    turns = list(steps(system, batch_of(shapes)))
    names = [name for name, _ in turns]
    assert names == ["discriminator8", "discriminator16", "generator"] == list(system.groups())
    for _, terms in turns[:-1]:
        assert list(terms) == ["real", "real_alone", "wrong", "fake", "fake_alone", "r1"]
    spoken = ["right8", "alone8", "right16", "alone16"]
    assert list(turns[-1][1]) == [*spoken, "damsm_words", "damsm_sentence", "kl"]
    assert set(system.facts) == {"accuracy_real", "accuracy_wrong", "accuracy_fake", "spread"}


def bce(logits: Tensor, target: float) -> float:
    probability = logits.detach().double().sigmoid()
    return float(F.binary_cross_entropy(probability, torch.full_like(probability, target)))


@pytest.mark.parametrize("scale", [0, 1])
def test_terms_by_hand(scale: int, make: Make, shapes: CaptionedDataset) -> None:
    """Of one scale, in evaluation mode, where rows do not meet: cross-entropy on probabilities with
    the weights of equation 5; wrong pairs are pictures with the next row's caption, and those whose
    captions say the same are left out."""
    system = make().eval()
    batch = batch_of(shapes, ["a ring", "a ring", "a blue square", "a star"])
    look, side = system.looks()[scale][1], SIDES[scale]
    sentence = system.text.encode(batch.caption).sentence
    fake = drawn_by(system, batch).images[scale]
    pixels = SIZE // side
    real = batch.image.view(B, 3, side, pixels, side, pixels).mean((3, 5))
    seen, drawn = look.features(real), look.features(fake)
    wrong = torch.stack([look.score(seen[i : i + 1], sentence[i + 1 : i + 2])[0] for i in (1, 2)])
    expected = {
        "real": bce(look.score(seen, sentence), 1) / 2,
        "real_alone": bce(look.score_alone(seen), 1) / 2,
        "wrong": bce(wrong, 0) / 3,
        "fake": bce(look.score(drawn, sentence), 0) / 3,
        "fake_alone": bce(look.score_alone(drawn), 0) / 3,
    }
    turns = dict(steps(system, batch))
    found = {name: term.item() for name, term in turns[f"discriminator{side}"].items()}
    assert found == pytest.approx(expected, rel=1e-4)
    spoken = turns["generator"]
    assert spoken[f"right{side}"].item() == pytest.approx(
        bce(look.score(drawn, sentence), 1), rel=1e-4
    )
    assert spoken[f"alone{side}"].item() == pytest.approx(bce(look.score_alone(drawn), 1), rel=1e-4)


@pytest.mark.parametrize("same", ["caption", "class"])
def test_the_damsm_judges_the_largest_picture(
    same: str, make: Make, shapes: CaptionedDataset
) -> None:
    """With the captions and classes of the batch, in evaluation mode whatever is trained."""
    system = make(same=same, damsm=3.0)
    batch = batch_of(shapes, ["a ring", "a ring", "a blue square", "a star"])
    batch.label = torch.tensor([1, 2, 3, 3])
    drawn, text = drawn_by(system, batch), system.text.encode(batch.caption)
    rivals = batch.alike(system.matching.same)
    assert bool(rivals[2, 3]) == (same == "class")
    expected = matching(system.matching, text, system.matcher.eval()(drawn.images[-1]), rivals)
    found = dict(steps(system.train(), batch))["generator"]
    for name, term in expected.items():
        torch.testing.assert_close(found[f"damsm_{name}"], 3.0 * term)


def test_terms_have_their_weights(make: Make, shapes: CaptionedDataset) -> None:
    """A weight of nothing leaves a term out of the log too; the mean of the Gaussians' own KL."""
    batch = batch_of(shapes)
    once, twice, none = (
        dict(steps(make(damsm=damsm, kl=kl), batch))["generator"]
        for damsm, kl in ((1.0, 0.5), (2.0, 1.5), (0.0, 0.0))
    )
    drawn = drawn_by(make(), batch)
    torch.testing.assert_close(once["kl"], 0.5 * kl_term(drawn.mu, drawn.log_variance))
    for name, factor in (("kl", 3.0), ("damsm_words", 2.0), ("damsm_sentence", 2.0)):
        torch.testing.assert_close(twice[name], factor * once[name])
        assert name not in none
    torch.testing.assert_close(none["right16"], once["right16"])


def test_hinge_is_a_switch(make: Make, shapes: CaptionedDataset) -> None:
    """max(0, 1 - s) and max(0, 1 + s) with the same weights; the generator's has no margin."""
    system, batch = make(loss="hinge").eval(), batch_of(shapes)
    look, sentence = system.looks()[1][1], system.text.encode(batch.caption).sentence
    drawn = look.features(drawn_by(system, batch).images[1])
    logits = look.score(drawn, sentence)
    turns = dict(steps(system, batch))
    by_hand = sum(max(0.0, 1 + value) for value in logits.tolist()) / B
    assert turns["discriminator16"]["fake"].item() == pytest.approx(by_hand / 3, rel=1e-4)
    torch.testing.assert_close(turns["generator"]["right16"], -logits.mean())


def test_pairs_are_pictures_of_every_scale(
    make: Make, shapes: CaptionedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real ones made small by means, fakes through which no gradient flows back, and sentences."""
    system, batch, seen = make(), batch_of(shapes), []
    original = pairs.pair_logits

    def watched(look: Any, real: Tensor, fake: Tensor, told: Tensor) -> Any:
        seen.append((look, real, fake, told))
        return original(look, real, fake, told)

    monkeypatch.setattr(pairs, "pair_logits", watched)
    list(steps(system, batch))
    text, images = system.text.encode(batch.caption), drawn_by(system, batch).images
    for k, (look, real, fake, told) in enumerate(seen):
        assert look is system.looks()[k][1]
        torch.testing.assert_close(fake, images[k])
        assert torch.equal(told, text.sentence)
        assert not any(t.requires_grad for t in (real, fake, told))
    small = seen[0][1]
    assert small.shape == (B, 3, 8, 8) and torch.equal(seen[1][1], batch.image)
    torch.testing.assert_close(small[2, 1, 3, 5], batch.image[2, 1, 6:8, 10:12].mean())


def test_one_picture_has_no_wrong_caption(make: Make, shapes: CaptionedDataset) -> None:
    batch = shapes.batch([0], [0], 0)
    with pytest.raises(UserError, match=r"train\.batch=2"):
        list(steps(make(), batch))


# --- turns ------------------------------------------------------------------------------------


def test_the_fake_is_drawn_once_a_step(
    make: Make, shapes: CaptionedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All turns judge the same pictures; drawing them anew would cost a third of the step."""
    calls, original = [], Generator.forward
    monkeypatch.setattr(Generator, "forward", lambda *given: calls.append(1) or original(*given))
    list(steps(make(), batch_of(shapes)))
    assert len(calls) == 1


@pytest.mark.parametrize("switches", [{}, {"norm": "spectral", "r1": 1.0, "r1_every": 1}], ids=str)
def test_gradients_stay_in_their_turn(
    switches: dict[str, Any], make: Make, shapes: CaptionedDataset
) -> None:
    """A discriminator's loss must reach neither the generator nor its neighbour, and no loss the
    text or the matcher."""
    system, batch = make(**switches), batch_of(shapes)
    text = system.text.encode(batch.caption)
    text.words.requires_grad_(), text.sentence.requires_grad_()
    for name, terms in system.losses(batch, text, NoiseStreams(range(B))):
        system.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        reached = {n for n, p in system.named_parameters() if p.grad is not None and p.grad.any()}
        (network,) = system.groups()[name]
        own = {id(p) for p in network.parameters()}
        expected = {n for n, p in system.named_parameters() if id(p) in own}
        assert reached >= expected, expected - reached
        others = {n.split(".")[0] for n in reached - expected}
        assert others == ({"discriminators"} if name == "generator" else set())
    assert text.words.grad is None and text.sentence.grad is None


@pytest.mark.parametrize("text", ["lstm", "transformer"])
def test_each_turn_moves_its_own_group(
    text: str, make: Make, shapes: CaptionedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = make(text)
    trainer = trainer_for(system, shapes)
    moved: list[tuple[str, set[str]]] = []
    for name, group in trainer.groups.items():
        original = group.update

        def update(*arguments: Any, call: Any = original, name: str = name) -> Tensor:
            before = {n: p.detach().clone() for n, p in system.named_parameters()}
            norm = call(*arguments)
            now = dict(system.named_parameters())
            parts = {n for n, p in before.items() if not torch.equal(p, now[n])}
            moved.append((name, {".".join(n.split(".")[:2]) for n in parts}))
            return norm

        monkeypatch.setattr(group, "update", update)
    trainer.advance(trainer.loader.at(0))
    generator = {f"generator.{name}" for name, _ in system.generator.named_children()}
    assert moved == [
        ("discriminator8", {"discriminators.0"}),
        ("discriminator16", {"discriminators.1"}),
        ("generator", generator),
    ]


def test_the_generator_sees_the_updated_discriminators(
    make: Make, shapes: CaptionedDataset
) -> None:
    """What the loop does to them before the last turn must show in it."""
    found = []
    for change in (0.0, 0.5):
        system = make()
        turns = steps(system, batch_of(shapes))
        next(turns), next(turns)
        with torch.no_grad():
            for parameter in system.looks()[1][1].joint.parameters():
                parameter.add_(change)
        found.append(next(turns)[1])
    assert found[0]["right16"] != found[1]["right16"]
    assert found[0]["alone16"] == found[1]["alone16"]  # another head
    assert found[0]["right8"] == found[1]["right8"]  # another scale


@pytest.mark.parametrize("text", ["lstm", "transformer"])
def test_the_damsm_stays_bit_for_bit(text: str, make: Make, shapes: CaptionedDataset) -> None:
    """Weights and batch statistics of the matcher, and the text, in training and in drawing."""
    system = make(text)
    kept = {
        part: {n: t.clone() for n, t in system.get_submodule(part).state_dict().items()}
        for part in ("matcher", "text")
    }
    assert any("running_var" in name for name in kept["matcher"])
    trained(system, shapes)
    assert system.training and system.generator.training
    assert not system.matcher.training and not system.text.training
    system.generate(CAPTIONS)
    assert system.training and not system.matcher.training
    for part, tensors in kept.items():
        for name, tensor in system.get_submodule(part).state_dict().items():
            assert torch.equal(tensor, tensors[name]), (part, name)
    frozen = [*system.matcher.parameters(), *system.text.parameters()]
    assert not any(p.requires_grad for p in frozen)


# --- the penalty ------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_r1_is_the_squared_gradient_on_real_pictures(
    norm: str, make: Make, shapes: CaptionedDataset
) -> None:
    """Of every scale, one row at a time, in evaluation mode, where rows do not meet in the batch
    norm; each penalty counts for all steps that have none. Its own gradient is finite."""
    system, batch = make(norm=norm, r1=0.3, r1_every=2).eval(), batch_of(shapes)
    sentence, turns = system.text.encode(batch.caption).sentence, dict(steps(system, batch))
    for side, look in system.looks():
        squares = []
        for i in range(B):
            image = F.avg_pool2d(batch.image[i : i + 1], SIZE // side).requires_grad_()
            look.score(look.features(image), sentence[i : i + 1]).sum().backward(inputs=[image])
            assert image.grad is not None
            squares.append(image.grad.square().sum().item())
        term = turns[f"discriminator{side}"]["r1"]
        assert term.item() == pytest.approx(2 * 0.3 / 2 * sum(squares) / B, rel=1e-4)
        gradient = torch.autograd.grad(term, list(look.encode_img.parameters()))
        assert all(torch.isfinite(g).all() for g in gradient) and any(g.any() for g in gradient)
    assert "r1" not in turns["generator"]


@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_r1_comes_every_so_many_steps_and_its_count_is_saved(
    norm: str, make: Make, shapes: CaptionedDataset
) -> None:
    """At all scales in the same step; a resumed run would else take its penalties at others."""
    changes, batch = {"r1": 0.3, "r1_every": 3, "norm": norm}, batch_of(shapes)
    system, again = make(**changes), make(**changes)

    def penalised(one: AttnGAN) -> bool:
        turns = list(steps(one, batch))
        assert all(torch.isfinite(term) for _, terms in turns for term in terms.values())
        small, large = ("r1" in terms for _, terms in turns[:-1])
        assert small == large
        return small

    assert [penalised(system) for _ in range(7)] == [True, False, False, True, False, False, True]
    again.load_state_dict(system.state_dict())
    assert [penalised(again) for _ in range(3)] == [False, False, True]
    assert not penalised(make(norm=norm))


@pytest.mark.parametrize(
    ("text", "switches"),
    [
        ("lstm", {"norm": "spectral", "r1": 1.0, "r1_every": 1}),
        ("transformer", {"r1": 1.0, "r1_every": 1}),
        ("transformer", {"norm": "spectral", "r1": 1.0, "r1_every": 2}),
        ("char_cnn_rnn", {"r1": 1.0, "r1_every": 1}),
        ("bag", {"loss": "hinge", "official_mask": True}),
    ],
    ids=str,
)
def test_switches_train(
    text: str, switches: dict[str, Any], make: Make, shapes: CaptionedDataset
) -> None:
    """Each is one `--set model.NAME=...` away, behind any text encoder."""
    system = make(text, **switches)
    trainer = trained(system, shapes, 2)
    seen = trainer.advance(trainer.loader.at(2))
    assert all(torch.isfinite(value).all() for value in seen.values()), seen
    assert ("discriminator16/r1" in seen) == ("r1" in switches)
    assert torch.isfinite(system.generate(CAPTIONS)).all()
    batch_norms = [m for m in system.discriminators.modules() if isinstance(m, nn.BatchNorm2d)]
    assert bool(batch_norms) == (switches.get("norm") != "spectral")


# --- pictures ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def system(make: Make) -> AttnGAN:
    return make(size=32, scales=3).eval()


def differ(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).abs().flatten(1).mean(1)


def test_attention_comes_with_the_pictures(system: AttnGAN) -> None:
    """The very pictures that come without it; for each scale but the first, of which word how much
    was read at each place."""
    plain = system.generate(CAPTIONS, seed=3)
    images, attention = system.generate(CAPTIONS, seed=3, return_attention=True)
    assert torch.equal(images, plain)
    assert [w.shape for w in attention] == [(4, 7, 8, 8), (4, 7, 16, 16)]
    for weights in attention:
        assert weights.dtype == torch.float32 and not weights.requires_grad
        torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))
        for row, caption in zip(weights, CAPTIONS, strict=True):
            count = len(system.text.pieces(caption))
            assert not row[count:].any() and (row[:count].amax((1, 2)) > 0).all()
    one, maps = system.generate("a red circle", seed=3, return_attention=True)
    assert one.shape == (1, 3, 32, 32) and maps[0].shape == (1, 3, 8, 8)


def test_attention_does_not_depend_on_the_batch(
    system: AttnGAN, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of a long list are padded to the longest caption of all, wherever it stands."""
    images, attention = system.generate(CAPTIONS, seed=3, return_attention=True)
    for at_once in (1, 2, 3):
        monkeypatch.setattr(system, "at_once", at_once)
        parts, maps = system.generate(CAPTIONS, seed=3, return_attention=True)
        torch.testing.assert_close(parts, images, atol=1e-5, rtol=0)
        for a, b in zip(maps, attention, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    _, maps = system.generate(CAPTIONS[:1], seed=3, return_attention=True)
    torch.testing.assert_close(maps[1][0], attention[1][0, :3], atol=1e-5, rtol=0)


def test_knobs_beside_attention(system: AttnGAN) -> None:
    plain = system.generate(CAPTIONS, seed=3, truncation=0.5)
    images, _ = system.generate(CAPTIONS, seed=3, truncation="0.5", return_attention=True)
    assert torch.equal(images, plain)
    with pytest.raises(UserError, match="scale="):
        system.generate(CAPTIONS, return_attention=True, scale=1)
    with pytest.raises(UserError, match="'truncation'"):
        system.generate(CAPTIONS, return_attention=True, truncaton=1)
    with pytest.raises(UserError, match="at least one caption"):
        system.generate([], return_attention=True)


def test_every_scale_can_be_looked_at(system: AttnGAN) -> None:
    """The very pictures on the way, every pixel as a square; 0 and the last are the same."""
    drawn = system.drawn(CAPTIONS, NoiseStreams.for_pictures(3, 4, "cpu"))
    for scale, factor in ((1, 4), (2, 2), (3, 1), (0, 1)):
        expected = drawn.images[scale - 1].repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        shown = system.generate(CAPTIONS, seed=3, scale=scale)
        torch.testing.assert_close(shown, expected.detach(), atol=1e-6, rtol=0)
    assert torch.equal(
        system.generate(CAPTIONS, seed=3), system.generate(CAPTIONS, seed=3, scale=3)
    )
    assert system.variants() == {
        "at 8": {"scale": 1},
        "at 16": {"scale": 2},
        "at 32": {"scale": 3},
    }


@pytest.mark.parametrize("scale", [-1, 4])
def test_scales_that_there_are_not_are_told(scale: int, system: AttnGAN) -> None:
    with pytest.raises(UserError, match=f"scale={scale} must be from 0 to 3") as caught:
        system.generate(CAPTIONS, scale=scale)
    assert "\n" not in str(caught.value)


def test_without_noise_seeds_agree(system: AttnGAN) -> None:
    """At a truncation of 0 a picture is a function of its caption alone."""
    still = [system.generate(CAPTIONS, seed=seed, truncation=0.0) for seed in (1, 2)]
    assert torch.equal(*still) and differ(still[0][:1], still[0][1:]).min() > 1e-4
    free = [system.generate(CAPTIONS, seed=seed) for seed in (1, 2)]
    near = [system.generate(CAPTIONS, seed=seed, truncation=0.1) for seed in (1, 2)]
    assert differ(*free).min() > differ(*near).max() > 0


def test_drawing_is_in_evaluation_mode_and_ends_as_it_began(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it fails in the middle of training."""
    system = make().train()
    modes = []

    def fail(captions: list[str], draws: NoiseStreams) -> Any:
        modes.append((system.training, system.generator.training, torch.is_grad_enabled()))
        raise KeyError("in the middle")

    with pytest.raises(KeyError):
        list(system.in_parts(CAPTIONS, 0, fail))
    assert modes == [(False, False, False)]
    assert system.training and system.generator.training and torch.is_grad_enabled()


def test_parts_go_on_counting(system: AttnGAN, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part has captions and streams of its own, as many as are drawn at once at most."""
    monkeypatch.setattr(system, "at_once", 3)
    parts = list(system.in_parts(CAPTIONS, 5, lambda c, d: (c, d.randn(2))))
    assert [captions for captions, _ in parts] == [CAPTIONS[:3], CAPTIONS[3:]]
    noise = torch.cat([part for _, part in parts])
    assert torch.equal(noise, NoiseStreams.for_pictures(5, 4, "cpu").randn(2))
    assert list(system.in_parts("a ring", 0, lambda c, d: (c, len(d)))) == [(["a ring"], 1)]


# --- inside -----------------------------------------------------------------------------------


def test_inside_is_scales_and_then_words(system: AttnGAN) -> None:
    """The picture at every scale; then, for each scale but the first, once a word, lit where it was
    read: nowhere brighter than the picture, and at one place as bright."""
    rows = system.inside("a red zorp", seed=3)
    assert [[name for name, _ in row] for row in rows] == [
        ["at 8", "at 16", "at 32"],
        ["a (16)", "red (16)", "<unk> (16)"],
        ["a (32)", "red (32)", "<unk> (32)"],
    ]
    images, attention = system.generate("a red zorp", seed=3, return_attention=True)
    assert torch.equal(rows[0][2][1], images[0])
    for k, (row, weights) in enumerate(zip(rows[1:], attention, strict=True)):
        picture, factor = rows[0][k + 1][1], 32 // weights.shape[-1]
        for word, (_, lit) in enumerate(row):
            assert lit.shape == (3, 32, 32) and lit.min() >= -1 and lit.max() <= 1
            light = weights[0, word].repeat_interleave(factor, 0).repeat_interleave(factor, 1)
            expected = (picture + 1) * light / light.max() - 1
            torch.testing.assert_close(lit, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("text", ["bag", "lstm", "transformer", "char_cnn_rnn"])
@pytest.mark.parametrize("caption", ["", "a red circle", CAPTIONS[1] + " left of a ring" * 12])
def test_inside_works_for_any_caption_and_encoder(text: str, caption: str, make: Make) -> None:
    """Words behind the place where the encoder cuts have no picture."""
    one = make(text)
    rows = one.inside(caption)
    count = int(one.text.encode([caption]).mask.sum())
    assert [len(row) for row in rows] == [2, count]
    assert all(torch.isfinite(image).all() for row in rows for _, image in row)


def test_a_word_that_is_never_read_is_dark(make: Make) -> None:
    """Where attention is sharp, a word's share may be zero at all places: here words lie on a line,
    and a place reads one at either end."""
    one = make()
    with torch.no_grad():
        project = one.generator.next[0].attention.project.weight
        project.copy_(1e8 * project[:1].expand_as(project))
    _, (weights,) = one.generate(CAPTIONS[1], return_attention=True)
    unread = weights[0].amax((1, 2)) == 0
    assert unread.any()
    for word, (_, lit) in enumerate(one.inside(CAPTIONS[1])[1]):
        assert torch.isfinite(lit).all(), word
        assert not unread[word] or (lit == -1).all()


# --- recipe -----------------------------------------------------------------------------------


def test_the_preset_paper_is_the_papers() -> None:
    """Section 4 and the authors' configuration for birds."""
    config = recipe.PRESETS["paper"]
    assert (config.size, config.text, config.train.batch) == (256, "lstm", 20)
    text = config.encoder
    assert (text.words, text.width, text.inputs, text.dropout, text.cell) == (
        18,
        256,
        300,
        0.5,
        "lstm",
    )
    assert config.model == AttnGANConfig() and config.damsm == DAMSMConfig()
    for optim, lr in ((config.optim, 2e-4), (config.matching, 2e-3)):
        assert (optim.name, optim.lr, optim.beta1, optim.beta2) == ("adam", lr, 0.5, 0.999)
        assert (optim.weight_decay, optim.warmup) == (0.0, 0)
    assert (config.optim.clip, config.optim.average, config.optim.decay) == (0.0, 0.999, "none")
    assert config.matching.clip == 0.25


@pytest.mark.parametrize("preset", list(recipe.PRESETS))
def test_the_matching_model_comes_first_and_is_shared(
    preset: str, tokenizer: WordTokenizer
) -> None:
    """A run of another generator takes the DAMSM that an earlier one trained; one of another
    matching model, or optimiser of it, does not."""
    config = recipe.PRESETS[preset]

    def key(changed: recipe.Config) -> str:
        first, last = recipe.stages(changed, tokenizer)
        assert (first.name, last.name, last.needs) == ("damsm", "gan", ("damsm",))
        assert first.train.sample_every == 0 and first.share + last.share == 1
        return content_key(first, {"size": changed.size}, {})

    assert key(config) == key(replace(config, model=replace(config.model, noise=7)))
    assert key(config) == key(replace(config, optim=replace(config.optim, lr=7.0)))
    for change in (
        {"damsm": replace(config.damsm, gamma1=7.0)},
        {"matching": replace(config.matching, lr=7.0)},
        {"encoder": replace(config.encoder, width=6)},
        {"text": "bag"},
        {"damsm_share": 0.5},
    ):
        assert key(config) != key(replace(config, **change)), change


def test_texts_are_features_of_any_origin(make: Make) -> None:
    """What the generator reads is the contract's: words, mask and sentence."""
    one = make().eval()
    text = TextFeatures(
        numbers(2, 3, WIDTH),
        torch.ones(2, 3, dtype=torch.bool),
        numbers(2, WIDTH),
        torch.ones(2, 3),
    )
    drawn = one.generator(text, numbers(2, 6), numbers(2, 5))
    changed = replace(text, words=text.words.flip(1))
    again = one.generator(changed, numbers(2, 6), numbers(2, 5))
    torch.testing.assert_close(drawn.images[1], again.images[1])  # attention knows no order
    torch.testing.assert_close(drawn.attention[0], again.attention[0].flip(1))
    other = one.generator(replace(text, words=2 * text.words), numbers(2, 6), numbers(2, 5))
    assert torch.equal(drawn.images[0], other.images[0])  # the first scale reads the sentence alone
    assert differ(drawn.images[1], other.images[1]).min() > 1e-4
