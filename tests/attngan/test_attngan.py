"""`attngan`: the authors' sizes, attention and masks against loops, terms by hand, separate turns,
and the visualised attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from lineage import runs
from lineage.attngan.attngan import (
    AttnGAN,
    AttnGANConfig,
    ConditioningAugmentation,
    GatedResidualBlock,
    Generator,
    GeneratorOutput,
    NextStage,
    WordAttention,
)
from lineage.attngan.damsm import DAMSM, DAMSMConfig, RegionHeads, damsm_terms
from lineage.config import OptimConfig, TextConfig, TrainConfig
from lineage.data.contract import Batch, CaptionedDataset
from lineage.errors import UserError
from lineage.nn.blocks import upsample_block
from lineage.nn.conditional_discriminator import ConditionalDiscriminator
from lineage.nn.noise import NoiseStreams
from lineage.recipes import attngan as recipe
from lineage.system import Turn
from lineage.text.contract import TextFeatures
from lineage.text.encoders import LSTMEncoder, make_encoder
from lineage.text.tokenizer import SPECIAL, WordTokenizer
from lineage.training.loop import Trainer

B, WIDTH, SIZE, SIDES = 4, 8, 16, (8, 16)
TINY = AttnGANConfig(
    num_scales=2,
    z_dim=6,
    cond_dim=5,
    gen_channels=4,
    disc_channels=4,
    num_res_blocks=1,
    damsm_weight=1.0,
)
CAPTIONS = ["a red circle", "a blue square above a green triangle", "", "a ring"]

Make = Callable[..., AttnGAN]


@pytest.fixture(scope="module")
def make(tokenizer: WordTokenizer) -> Make:
    """A system of 8 and 16 pixels, with weights so large that a caption shows."""

    def make(
        text: str = "lstm", size: int = SIZE, same: str = "caption", **changes: Any
    ) -> AttnGAN:
        torch.manual_seed(0)
        encoder = make_encoder(text, TextConfig(width=WIDTH, num_heads=2), tokenizer)
        config = DAMSMConfig(
            image_encoder="conv",
            image_channels=4,
            grid_size=size // 4,
            same=same,  # type: ignore[arg-type]
        )
        system = AttnGAN(replace(TINY, **changes), DAMSM(config, encoder, size), size)
        enlarge(system.generator, system.discriminators)
        return system

    return make


@torch.no_grad()
def enlarge(*networks: nn.Module) -> None:
    """With initial weights, captions and options hardly change a picture."""
    for parameter in (p for network in networks for p in network.parameters() if p.dim() > 1):
        parameter.mul_(2.0)


def batch_of(shapes: CaptionedDataset, captions: list[str] | None = None) -> Batch:
    batch = shapes.batch(range(B), [0] * B, 0)
    return Batch(batch.image, captions or batch.caption, batch.label, batch.id)


def turns(system: AttnGAN, batch: Batch) -> Iterator[Turn]:
    text = system.text.encode(batch.caption)
    return system.losses(batch, text, NoiseStreams(range(len(batch))))


def terms_of(system: AttnGAN, batch: Batch) -> dict[str, Any]:
    """Loss terms of a step, by group."""
    return {turn.group: turn.terms for turn in turns(system, batch)}


def generated_by(system: AttnGAN, batch: Batch) -> GeneratorOutput:
    """The pictures of the same step."""
    return system.generator_output(batch.caption, NoiseStreams(range(len(batch))))


def trained(system: AttnGAN, shapes: CaptionedDataset, steps: int = 3) -> Trainer:
    """A trainer after a few large steps."""
    optim = OptimConfig(lr=1e-2, warmup=0, decay="none", weight_decay=0.0)
    train = TrainConfig(batch_size=B, precision="fp32", prefetch=0)
    trainer = Trainer(system, shapes, optim, train)
    for k in range(steps):
        trainer.advance(trainer.loader.at(k))
    return trainer


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def size_of(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


# --- networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "vocab_size", "generator", "discriminators", "text"),
    [
        (AttnGANConfig(), 5450, 7_084_592, (6_313_730, 19_424_002, 71_858_946), 2_075_320),
        (
            AttnGANConfig(gen_channels=48, disc_channels=96, num_res_blocks=3),
            27_297,
            13_811_456,
            (13_304_450, 42_800_258, 160_774_274),
            8_629_420,
        ),
    ],
    ids=["bird", "coco"],
)
def test_the_networks_have_the_authors_sizes(
    config: AttnGANConfig,
    vocab_size: int,
    generator: int,
    discriminators: tuple[int, ...],
    text: int,
) -> None:
    """Counted in taoxugit/AttnGAN with the configurations for birds and for COCO, words and
    sentences of 256: G_NET, D_NET64, 128 and 256, RNN_ENCODER, and the heads of CNN_ENCODER."""
    words = WordTokenizer([str(n) for n in range(vocab_size - len(SPECIAL))])
    with torch.device("meta"):
        assert size_of(Generator(config, 256, 256, 256)) == generator
        discs = [
            ConditionalDiscriminator(config.disc_channels, 256, side, unconditional=True)
            for side in (64, 128, 256)
        ]
        assert tuple(map(size_of, discs)) == discriminators
        assert size_of(LSTMEncoder(TextConfig(width=256, embed_dim=300), words)) == text
        assert size_of(RegionHeads(256, 256)) == 721_152


def test_the_preset_paper_has_the_authors_sizes_for_birds() -> None:
    """All of it, counted as above: G_NET, three D_NETs, RNN_ENCODER and CNN_ENCODER."""
    words = WordTokenizer([str(n) for n in range(5450 - len(SPECIAL))])
    with torch.device("meta"):
        system = runs.build(recipe.stages(recipe.PRESETS["paper"], words))
    expected = 7_084_592 + 6_313_730 + 19_424_002 + 71_858_946 + 2_075_320 + 22_506_720
    assert size_of(system) == expected


def test_the_defaults_are_the_papers() -> None:
    """Section 4 and the authors' configuration for birds; no switch of later work is on."""
    config = AttnGANConfig()
    assert (config.num_scales, config.z_dim, config.cond_dim) == (3, 100, 100)
    assert (config.gen_channels, config.disc_channels, config.num_res_blocks) == (32, 64, 2)
    assert (config.damsm_weight, config.kl_weight) == (5.0, 1.0)
    assert (config.loss, config.r1_weight, config.norm) == ("log", 0.0, "batch")
    assert not config.official_mask


@pytest.mark.parametrize(
    ("num_scales", "size", "expected"),
    [(2, 16, [8, 16]), (3, 32, [8, 16, 32]), (3, 256, [64, 128, 256]), (2, 256, [128, 256])],
)
def test_sides_double(num_scales: int, size: int, expected: list[int]) -> None:
    assert AttnGANConfig(num_scales=num_scales).sides(size) == expected


@pytest.mark.parametrize(
    ("num_scales", "size"), [(2, 8), (3, 16), (2, 17), (3, 34), (7, 64), (10, 8)]
)
def test_impossible_sides_are_refused(num_scales: int, size: int) -> None:
    with pytest.raises(UserError, match=rf"size={size} .*num_scales={num_scales}") as caught:
        AttnGANConfig(num_scales=num_scales).sides(size)
    assert "\n" not in str(caught.value) and "size" in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 8},
        {"size": 24},
        {"size": 48, "damsm.grid_size": 12},
        {"size": 24, "damsm.grid_size": 6},
        {"model.num_scales": 3},
        {"model.num_scales": 1},
        {"damsm.grid_size": 16},
        {"damsm_share": 0.0},
        {"damsm_share": 1.0},
        {"text": "lstm", "encoder.width": 15},
        {"model.gen_channels": 0},
    ],
    ids=str,
)
def test_impossible_runs_are_refused(settings: dict[str, Any], tokenizer: WordTokenizer) -> None:
    """In one sentence, before anything is trained; the preset has 8 and 16 pixels."""

    def build() -> None:
        config: Any = runs.configure("attngan", preset_name="smoke", settings=settings)
        with torch.device("meta"):
            runs.build(recipe.stages(config, tokenizer))

    with pytest.raises(UserError) as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_scales", 1),
        ("z_dim", 0),
        ("cond_dim", 0),
        ("disc_channels", 0),
        ("num_res_blocks", -1),
        ("damsm_weight", -0.1),
        ("kl_weight", -0.1),
        ("r1_weight", math.nan),
        ("r1_every", 0),
        ("loss", "hing"),
        ("norm", "layer"),
    ],
)
def test_impossible_settings_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"model\.{name}="):
        runs.configure("attngan", preset_name="smoke", settings={f"model.{name}": value})


@pytest.mark.parametrize(("num_scales", "size"), [(2, 16), (3, 32), (2, 32), (4, 64)])
def test_all_sides_that_double_work(num_scales: int, size: int, make: Make) -> None:
    """Pictures double; attention has the side of the picture before."""
    system = make(size=size, num_scales=num_scales)
    generated = system.generator_output(CAPTIONS, NoiseStreams(range(4)))
    sides = [size // 2 ** (num_scales - 1 - i) for i in range(num_scales)]
    assert [image.shape for image in generated.images] == [(4, 3, side, side) for side in sides]
    assert [w.shape for w in generated.attention] == [(4, 7, side, side) for side in sides[:-1]]
    assert all(image.abs().max() <= 1 for image in generated.images)
    assert system.sides == sides and system.size == size
    for disc, image in zip(system.discs(), generated.images, strict=True):
        assert disc.features(image).shape[2:] == (4, 4)


@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_initial_weights_are_orthogonal(norm: str, tokenizer: WordTokenizer) -> None:
    """Kernels and matrices have rows (or columns) of unit length at right angles, biases of
    matrices are zero, norm scales about one: as the authors', with either norm."""
    encoder = make_encoder("bag", TextConfig(width=WIDTH), tokenizer)
    config = DAMSMConfig(image_encoder="conv", image_channels=4, grid_size=4)
    system = AttnGAN(replace(TINY, norm=norm), DAMSM(config, encoder, SIZE), SIZE)
    count = 0
    for part in (*system.generator.modules(), *system.discriminators.modules()):
        if isinstance(part, nn.Conv2d | nn.Linear):
            matrix = part.weight.detach().flatten(1)
            matrix = matrix if len(matrix) <= matrix.shape[1] else matrix.mT
            torch.testing.assert_close(
                matrix @ matrix.mT, torch.eye(len(matrix)), atol=1e-4, rtol=0
            )
            count += 1
            if isinstance(part, nn.Linear) and part.bias is not None:
                assert not part.bias.any()
        elif isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            assert (part.weight - 1).abs().max() < 0.15 and part.weight.std() > 1e-3
            assert not part.bias.any()
    assert count > 15


def test_another_next_stage_takes_the_place_of_ours(make: Make) -> None:
    """As DM-GAN's and MirrorGAN's: built from the widths of words and sentence, it takes text and
    condition."""

    class Doubled(NextStage):
        def __init__(self, config: AttnGANConfig, word_dim: int, sentence_dim: int) -> None:
            super().__init__(config, word_dim, sentence_dim)
            self.from_sentence = nn.Linear(sentence_dim + config.cond_dim, config.gen_channels)

        def forward(self, hidden: Tensor, text: TextFeatures, c: Tensor) -> tuple[Tensor, Tensor]:
            more = self.from_sentence(torch.cat([text.sentence, c], dim=1))
            return super().forward(hidden + more[..., None, None], text, c)

    generator = Generator(TINY, 7, 9, SIZE, next_stage=Doubled)
    mask = torch.ones(2, 3, dtype=torch.bool)
    text = TextFeatures(random(2, 3, 7), mask, random(2, 9), mask.long())
    generated = generator(text, random(2, 6), random(2, 5))
    assert [image.shape[-1] for image in generated.images] == list(SIDES)
    generated.images[1].sum().backward()
    assert all(p.grad is not None for n, p in generator.named_parameters() if "sentence" in n)


# --- blocks -----------------------------------------------------------------------------------


def glu(x: Tensor) -> Tensor:
    """The first half of the channels times the sigmoid of the second."""
    half = x.shape[1] // 2
    return x[:, :half] / (1 + (-x[:, half:]).exp())


def test_gates_and_sums_are_those_of_the_authors(make: Make) -> None:
    """Twice the side, then convolution, norm, gate; no activation after a residual sum."""
    x = random(2, 4, 6, 6)
    up = upsample_block(4, 6, nn.GLU(1)).eval()
    _, conv, norm, _ = up
    twice = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(up(x), glu(norm(F.conv2d(twice, conv.weight, padding=1))))
    assert isinstance(make().generator.next_stages[0].upsample[3], nn.GLU)
    block = GatedResidualBlock(4).eval()
    inner = glu(block.block[1](block.block[0](x)))
    torch.testing.assert_close(block(x), x + block.block[4](block.block[3](inner)))
    assert (block(x) < 0).any()


def test_the_condition_may_have_any_mean_and_spread() -> None:
    """c = mu + sigma eps; a gate before the two are split, so both may be negative."""
    network = ConditioningAugmentation(12, 7)
    nn.init.normal_(network.fc.weight)
    sentence, eps = random(64, 12), random(64, 7, seed=1)
    c, mu, logvar = network(sentence, eps)
    torch.testing.assert_close(torch.cat([mu, logvar], dim=1), glu(network.fc(sentence)))
    assert mu.min() < -1 and mu.max() > 1 and logvar.min() < -1 and logvar.max() > 1
    torch.testing.assert_close(c, mu + logvar.exp().sqrt() * eps)


def test_the_first_stage_takes_the_condition_before_the_noise(make: Make) -> None:
    """The authors' order, on which published weights depend."""
    first = make().generator.first_stage.eval()
    z, c = random(3, TINY.z_dim), random(3, TINY.cond_dim, seed=1)
    x = glu(first.fc[1](torch.cat([c, z], dim=1) @ first.fc[0].weight.mT))
    torch.testing.assert_close(first(z, c), first.upsample(x.view(3, 8, 4, 4)))


# --- attention --------------------------------------------------------------------------------

LENGTHS = [[3, 1, 5], [2, 4], [5, 5, 5]]


def attention_inputs(lengths: list[int], height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (B, 4, H, W), words (B, L, 6), mask (B, L)."""
    hidden, words = random(len(lengths), 4, height, width), random(len(lengths), max(lengths), 6)
    return hidden, words, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_attention_is_that_of_a_loop(lengths: list[int]) -> None:
    """Equation 2: a softmax, without a scale, of the products of place and projected words; the
    context is of projected words. Padding has no weight."""
    network = WordAttention(6, 4)
    hidden, words, mask = attention_inputs(lengths, 2, 3)
    context, attention = network(hidden, words, mask)
    assert context.shape == hidden.shape and attention.shape == (*mask.shape, 2, 3)
    matrix = network.project_words.weight.detach().double()
    for b, length in enumerate(lengths):
        projected = [matrix @ words[b, w].double() for w in range(length)]
        for y in range(2):
            for x in range(3):
                scores = [float(hidden[b, :, y, x].double() @ word) for word in projected]
                total = sum(math.exp(score) for score in scores)
                weights = [math.exp(score) / total for score in scores]
                assert attention[b, :length, y, x].tolist() == pytest.approx(weights, rel=1e-5)
                expected = sum(w * word for w, word in zip(weights, projected, strict=True))
                torch.testing.assert_close(
                    context[b, :, y, x].double(), expected, atol=1e-5, rtol=1e-5
                )
        assert not attention[b, length:].any()
    torch.testing.assert_close(attention.sum(1), torch.ones_like(attention[:, 0]))


def public_attention(
    network: WordAttention, hidden: Tensor, words: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """GlobalAttentionGeneral of the public code, with its `mask.repeat(queryL, 1)`."""
    batch, _, height, width = hidden.shape
    places = hidden.flatten(2).transpose(1, 2)
    source = torch.stack([network.project_words.weight @ row.mT for row in words])  # (B, G, L)
    scores = torch.bmm(places, source).view(batch * height * width, -1)
    padding = (~mask).repeat(height * width, 1)
    weights = scores.masked_fill(padding, -torch.inf).softmax(1)
    weights = weights.view(batch, height * width, -1).transpose(1, 2)
    context = torch.bmm(source, weights).view_as(hidden)
    return context, weights.reshape(*mask.shape, height, width)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 4), (2, 3)])
def test_the_official_mask_is_that_of_the_public_code(
    lengths: list[int], height: int, width: int
) -> None:
    """Row r has the mask of caption r modulo B, but is of picture r divided by H W. For captions of
    equal length the two agree."""
    network = WordAttention(6, 4, official_mask=True)
    inputs = attention_inputs(lengths, height, width)
    plain = WordAttention(6, 4)
    plain.load_state_dict(network.state_dict())
    results = network(*inputs)
    for ours, theirs in zip(results, public_attention(network, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs)
    difference = (results[1] - plain(*inputs)[1]).abs().max()
    assert difference == 0 if len(set(lengths)) == 1 else difference > 1e-2


def test_padding_has_no_effect(make: Make) -> None:
    """Neither its length nor its content."""
    system = make().eval()
    text, z, eps = system.text.encode(CAPTIONS), random(4, 6), random(4, 5, seed=1)
    longer = text.padded(11)
    longer.words = torch.where(longer.mask[..., None], longer.words, torch.tensor(9.0))
    one, other = (system.generator(features, z, eps) for features in (text, longer))
    for a, b in zip(one.images, other.images, strict=True):
        torch.testing.assert_close(a, b)
    assert not other.attention[0][:, 7:].any()


@pytest.mark.parametrize("official", [False, True])
def test_a_picture_depends_on_its_own_mask_alone(official: bool, make: Make) -> None:
    """Beside a long caption as beside a short one; not so in the public code."""
    system = make(official_mask=official)
    beside = [system.generate([CAPTIONS[0], other], seed=3)[0] for other in ("a ring", CAPTIONS[1])]
    difference = (beside[0] - beside[1]).abs().max()
    assert difference > 1e-3 if official else difference < 1e-5


# --- the step ---------------------------------------------------------------------------------


def test_turns_terms_and_metrics_have_names(make: Make, shapes: CaptionedDataset) -> None:
    """A turn for each discriminator, the smallest pictures first, then the generator's."""
    system = make(r1_weight=1.0)
    steps = list(turns(system, batch_of(shapes)))
    names = [turn.group for turn in steps]
    assert names == ["discriminator8", "discriminator16", "generator"] == list(system.groups())
    for turn in steps[:-1]:
        assert list(turn.terms) == ["real", "real_uncond", "wrong", "fake", "fake_uncond", "r1"]
    adversarial = ["cond8", "uncond8", "cond16", "uncond16"]
    assert list(steps[-1].terms) == [*adversarial, "damsm_words", "damsm_sentence", "kl"]
    metrics = {"accuracy_real", "accuracy_wrong", "accuracy_fake", "spread"}
    assert set(steps[-1].metrics()) == metrics


def bce(logits: Tensor, target: float) -> float:
    """Cross-entropy on probabilities, as the authors' code computes it."""
    probability = logits.detach().double().sigmoid()
    return float(F.binary_cross_entropy(probability, torch.full_like(probability, target)))


def hinge(logits: Tensor, target: float) -> float:
    """max(0, 1 - s) for real pairs, max(0, 1 + s) for others."""
    sign = 1 if target else -1
    return sum(max(0.0, 1 - sign * s) for s in logits.tolist()) / len(logits)


@pytest.mark.parametrize(("loss", "by_hand"), [("log", bce), ("hinge", hinge)])
@pytest.mark.parametrize("scale", [0, 1])
def test_terms_by_hand(
    scale: int,
    loss: str,
    by_hand: Callable[[Tensor, float], float],
    make: Make,
    shapes: CaptionedDataset,
) -> None:
    """Of one scale, in evaluation mode, where rows do not meet, with the weights of equation 5.
    Mismatched captions are those of the next row; equal ones do not count. The generator's hinge
    loss has no margin."""
    system = make(loss=loss).eval()
    batch = batch_of(shapes, ["a ring", "a ring", "a blue square", "a star"])
    disc, side = system.discs()[scale], SIDES[scale]
    sentence = system.text.encode(batch.caption).sentence
    pixels = SIZE // side
    real = batch.image.view(B, 3, side, pixels, side, pixels).mean((3, 5))
    features = disc.features(real)
    fake_features = disc.features(generated_by(system, batch).images[scale])
    wrong = [disc.cond_logits(features[i : i + 1], sentence[i + 1 : i + 2])[0] for i in (1, 2)]
    cond, uncond = disc.cond_logits(fake_features, sentence), disc.uncond_logits(fake_features)
    expected = {
        "real": by_hand(disc.cond_logits(features, sentence), 1) / 2,
        "real_uncond": by_hand(disc.uncond_logits(features), 1) / 2,
        "wrong": by_hand(torch.stack(wrong), 0) / 3,
        "fake": by_hand(cond, 0) / 3,
        "fake_uncond": by_hand(uncond, 0) / 3,
    }
    terms = terms_of(system, batch)
    values = {name: term.item() for name, term in terms[f"discriminator{side}"].items()}
    assert values == pytest.approx(expected, rel=1e-4)
    for name, logits in ((f"cond{side}", cond), (f"uncond{side}", uncond)):
        value = bce(logits, 1) if loss == "log" else -logits.mean().item()
        assert terms["generator"][name].item() == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("same", ["caption", "class"])
def test_the_damsm_loss_is_of_the_largest_picture(
    same: str, make: Make, shapes: CaptionedDataset
) -> None:
    """With the captions and classes of the batch, in evaluation mode while the rest is trained."""
    system = make(same=same, damsm_weight=3.0)
    batch = batch_of(shapes, ["a ring", "a ring", "a blue square", "a star"])
    batch.label = torch.tensor([1, 2, 3, 3])
    generated, text = generated_by(system, batch), system.text.encode(batch.caption)
    pairs = batch.same_pairs(same)
    assert bool(pairs[2, 3]) == (same == "class")
    image = system.image_encoder.eval()(generated.images[-1])
    expected = damsm_terms(system.damsm_config, text, image, pairs)
    terms = terms_of(system.train(), batch)["generator"]
    for name, term in expected.items():
        torch.testing.assert_close(terms[f"damsm_{name}"], 3.0 * term)


def test_terms_have_their_weights(make: Make, shapes: CaptionedDataset) -> None:
    """The KL term is that of the condition's Gaussian, a mean over rows and dimensions. A weight of
    zero leaves a term out."""
    batch = batch_of(shapes)
    once, twice, none = (
        terms_of(make(damsm_weight=damsm, kl_weight=kl), batch)["generator"]
        for damsm, kl in ((1.0, 0.5), (2.0, 1.5), (0.0, 0.0))
    )
    generated = generated_by(make(), batch)
    condition = Normal(generated.mu, (generated.logvar / 2).exp())
    kl = kl_divergence(condition, Normal(torch.zeros(B, 5), torch.ones(B, 5))).mean()
    torch.testing.assert_close(once["kl"], 0.5 * kl)
    torch.testing.assert_close(twice["kl"], 1.5 * kl)
    for name in ("damsm_words", "damsm_sentence", "kl"):
        assert name not in none
        if name != "kl":
            torch.testing.assert_close(twice[name], 2 * once[name])
    torch.testing.assert_close(none["cond16"], once["cond16"])


def test_conditions_are_sentences_without_gradient(
    make: Make, shapes: CaptionedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each real picture is encoded once for both captions, and each generated one again for the
    generator."""
    system, batch, calls = make(), batch_of(shapes), []
    original = ConditionalDiscriminator.cond_logits

    def cond_logits(self: ConditionalDiscriminator, features: Tensor, cond: Tensor) -> Tensor:
        calls.append((self, features, cond))
        return original(self, features, cond)

    monkeypatch.setattr(ConditionalDiscriminator, "cond_logits", cond_logits)
    list(turns(system, batch))
    sentence = system.text.encode(batch.caption).sentence
    for k, disc in enumerate(system.discs()):
        real, wrong, fake = calls[3 * k : 3 * k + 3]
        again = calls[6 + k]
        assert all(call[0] is disc for call in (real, wrong, fake, again))
        assert torch.equal(wrong[1], real[1][:-1])
        torch.testing.assert_close(fake[1], again[1])
        for call, expected in (
            (real, sentence),
            (wrong, sentence[1:]),
            (fake, sentence),
            (again, sentence),
        ):
            assert torch.equal(call[2], expected) and not call[2].requires_grad


def test_one_picture_has_no_mismatched_caption(make: Make, shapes: CaptionedDataset) -> None:
    batch = shapes.batch([0], [0], 0)
    with pytest.raises(UserError, match=r"train\.batch_size=2"):
        list(turns(make(), batch))


# --- turns ------------------------------------------------------------------------------------


def test_pictures_are_generated_once_a_step(
    make: Make, shapes: CaptionedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All turns take the same pictures; a second pass would cost a third of the step."""
    calls, original = [], Generator.forward
    monkeypatch.setattr(Generator, "forward", lambda *inputs: calls.append(1) or original(*inputs))
    list(turns(make(), batch_of(shapes)))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "switches", [{}, {"norm": "spectral", "r1_weight": 1.0, "r1_every": 1}], ids=str
)
def test_gradients_stay_in_their_turn(
    switches: dict[str, Any], make: Make, shapes: CaptionedDataset
) -> None:
    """A discriminator's loss must reach neither the generator nor the other discriminator, and no
    loss the text or the image encoder."""
    system, batch = make(**switches), batch_of(shapes)
    text = system.text.encode(batch.caption)
    text.words.requires_grad_(), text.sentence.requires_grad_()
    for turn in system.losses(batch, text, NoiseStreams(range(B))):
        system.zero_grad(set_to_none=True)
        torch.stack(list(turn.terms.values())).sum().backward()
        reached = {n for n, p in system.named_parameters() if p.grad is not None and p.grad.any()}
        (network,) = system.groups()[turn.group]
        own = {id(p) for p in network.parameters()}
        expected = {n for n, p in system.named_parameters() if id(p) in own}
        assert reached >= expected, expected - reached
        others = {n.split(".")[0] for n in reached - expected}
        assert others == ({"discriminators"} if turn.group == "generator" else set())
    assert text.words.grad is None and text.sentence.grad is None


def test_the_generator_takes_the_updated_discriminators(
    make: Make, shapes: CaptionedDataset
) -> None:
    """A change of a discriminator before the last turn must show in it."""
    terms = []
    for change in (0.0, 0.5):
        system = make()
        steps = turns(system, batch_of(shapes))
        next(steps), next(steps)
        with torch.no_grad():
            for parameter in system.discs()[1].cond_head.parameters():
                parameter.add_(change)
        terms.append(next(steps).terms)
    assert terms[0]["cond16"] != terms[1]["cond16"]
    assert terms[0]["uncond16"] == terms[1]["uncond16"]  # another head
    assert terms[0]["cond8"] == terms[1]["cond8"]  # another scale


def test_the_image_encoder_stays_in_evaluation_mode(make: Make) -> None:
    """Also after pictures are drawn in the middle of training."""
    system = make().train()
    assert system.generator.training and not system.image_encoder.training
    system.generate(CAPTIONS), system.attention(CAPTIONS)
    assert system.training and system.generator.training and not system.image_encoder.training
    frozen = [*system.image_encoder.parameters(), *system.text.parameters()]
    assert not any(p.requires_grad for p in frozen)


# --- the penalty ------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_r1_is_the_squared_gradient_on_real_pictures(
    norm: str, make: Make, shapes: CaptionedDataset
) -> None:
    """Of every scale, one row at a time, in evaluation mode, where rows do not meet in the batch
    norm; each penalty counts for all steps that have none. Its own gradient is finite."""
    system, batch = make(norm=norm, r1_weight=0.3, r1_every=2).eval(), batch_of(shapes)
    sentence, terms = system.text.encode(batch.caption).sentence, terms_of(system, batch)
    for side, disc in zip(SIDES, system.discs(), strict=True):
        squares = []
        for i in range(B):
            image = F.avg_pool2d(batch.image[i : i + 1], SIZE // side).requires_grad_()
            logits = disc.cond_logits(disc.features(image), sentence[i : i + 1])
            logits.sum().backward(inputs=[image])
            assert image.grad is not None
            squares.append(image.grad.square().sum().item())
        r1 = terms[f"discriminator{side}"]["r1"]
        assert r1.item() == pytest.approx(2 * 0.3 / 2 * sum(squares) / B, rel=1e-4)
        gradient = torch.autograd.grad(r1, list(disc.encode_img.parameters()))
        assert all(torch.isfinite(g).all() for g in gradient) and any(g.any() for g in gradient)
    assert "r1" not in terms["generator"] and not batch.image.requires_grad


@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_r1_comes_every_few_steps_and_its_count_is_saved(
    norm: str, make: Make, shapes: CaptionedDataset
) -> None:
    """At all scales in the same step; otherwise a resumed run would take its penalties in other
    steps."""
    changes, batch = {"r1_weight": 0.3, "r1_every": 3, "norm": norm}, batch_of(shapes)
    system, resumed = make(**changes), make(**changes)

    def penalised(one: AttnGAN) -> bool:
        steps = list(turns(one, batch))
        assert all(torch.isfinite(term) for turn in steps for term in turn.terms.values())
        small, large = ("r1" in turn.terms for turn in steps[:-1])
        assert small == large
        return small

    assert [penalised(system) for _ in range(7)] == [True, False, False, True, False, False, True]
    resumed.load_state_dict(system.state_dict())
    assert [penalised(resumed) for _ in range(3)] == [False, False, True]
    assert not penalised(make(norm=norm))


@pytest.mark.parametrize(
    ("text", "switches"),
    [
        ("lstm", {"norm": "spectral", "r1_weight": 1.0, "r1_every": 1}),
        ("transformer", {"r1_weight": 1.0, "r1_every": 1}),
        ("transformer", {"norm": "spectral", "r1_weight": 1.0, "r1_every": 2}),
        ("char_cnn_rnn", {"r1_weight": 1.0, "r1_every": 1}),
        ("bag", {"loss": "hinge", "official_mask": True}),
    ],
    ids=str,
)
def test_switches_train(
    text: str, switches: dict[str, Any], make: Make, shapes: CaptionedDataset
) -> None:
    """Each is one `--set model.NAME=...` away, with every text encoder."""
    system = make(text, **switches)
    trainer = trained(system, shapes, 2)
    values = trainer.advance(trainer.loader.at(2))
    assert all(torch.isfinite(value).all() for value in values.values()), values
    assert ("discriminator16/r1" in values) == ("r1_weight" in switches)
    assert torch.isfinite(system.generate(CAPTIONS)).all()
    batch_norms = [m for m in system.discriminators.modules() if isinstance(m, nn.BatchNorm2d)]
    assert bool(batch_norms) == (switches.get("norm") != "spectral")


# --- pictures ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def system(make: Make) -> AttnGAN:
    return make(size=32, num_scales=3).eval()


def differ(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).abs().flatten(1).mean(1)


def test_attention_comes_with_the_pictures_of_generate(system: AttnGAN) -> None:
    """For each scale but the first, the weight of each word at each place."""
    images, attention = system.attention(CAPTIONS, seed=3)
    assert torch.equal(images, system.generate(CAPTIONS, seed=3))
    assert [w.shape for w in attention] == [(4, 7, 8, 8), (4, 7, 16, 16)]
    for weights in attention:
        assert weights.dtype == torch.float32 and not weights.requires_grad
        torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))
        for row, caption in zip(weights, CAPTIONS, strict=True):
            count = len(system.text.tokens(caption))
            assert not row[count:].any() and (row[:count].amax((1, 2)) > 0).all()
    one, maps = system.attention("a red circle", seed=3)
    assert one.shape == (1, 3, 32, 32) and maps[0].shape == (1, 3, 8, 8)
    images, _ = system.attention(CAPTIONS, seed=3, truncation=0.5)
    assert torch.equal(images, system.generate(CAPTIONS, seed=3, truncation=0.5))
    with pytest.raises(UserError, match="at least one caption"):
        system.attention([])


def test_attention_does_not_depend_on_the_batch(
    system: AttnGAN, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of a long list are padded to its longest caption."""
    images, attention = system.attention(CAPTIONS, seed=3)
    for batch_size in (1, 2, 3):
        monkeypatch.setattr(system, "sample_batch_size", batch_size)
        parts, maps = system.attention(CAPTIONS, seed=3)
        torch.testing.assert_close(parts, images, atol=1e-5, rtol=0)
        for a, b in zip(maps, attention, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    _, maps = system.attention(CAPTIONS[:1], seed=3)
    torch.testing.assert_close(maps[1][0], attention[1][0, :3], atol=1e-5, rtol=0)


def test_every_scale_can_be_drawn(system: AttnGAN) -> None:
    """Every pixel as a square; 0 and the last scale are the same."""
    noise = NoiseStreams.for_pictures(3, 4, "cpu")
    images = system.generator_output(CAPTIONS, noise).images
    for scale, factor in ((1, 4), (2, 2), (3, 1), (0, 1)):
        expected = images[scale - 1].repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        pictures = system.generate(CAPTIONS, seed=3, scale=scale)
        torch.testing.assert_close(pictures, expected.detach(), atol=1e-6, rtol=0)
    assert torch.equal(
        system.generate(CAPTIONS, seed=3), system.generate(CAPTIONS, seed=3, scale=3)
    )
    assert system.variants() == {
        "at 8": {"scale": 1},
        "at 16": {"scale": 2},
        "at 32": {"scale": 3},
    }


@pytest.mark.parametrize("scale", [-1, 4])
def test_unknown_scales_are_refused(scale: int, system: AttnGAN) -> None:
    with pytest.raises(UserError, match=f"scale={scale} must be from 0 to 3") as caught:
        system.generate(CAPTIONS, scale=scale)
    assert "\n" not in str(caught.value)


def test_without_noise_a_caption_has_one_picture(system: AttnGAN) -> None:
    still = [system.generate(CAPTIONS, seed=seed, truncation=0.0) for seed in (1, 2)]
    assert torch.equal(*still) and differ(still[0][:1], still[0][1:]).min() > 1e-4
    full = [system.generate(CAPTIONS, seed=seed) for seed in (1, 2)]
    little = [system.generate(CAPTIONS, seed=seed, truncation=0.1) for seed in (1, 2)]
    assert differ(*full).min() > differ(*little).max() > 0


def test_image_embeddings_are_the_global_vectors(make: Make, shapes: CaptionedDataset) -> None:
    system, image = make().eval(), batch_of(shapes).image
    embedding = system.image_embedding(image)
    assert embedding.shape == (B, system.text.sentence_dim)
    assert torch.equal(embedding, system.image_encoder(image).global_vector)


# --- visualise --------------------------------------------------------------------------------


def test_visualise_shows_scales_and_then_words(system: AttnGAN) -> None:
    """The picture at every scale; then, for each scale but the first, once a word, lit by its
    attention: nowhere brighter than the picture, and at one place as bright."""
    rows = system.visualise("a red zorp", seed=3)
    assert [[name for name, _ in row] for row in rows] == [
        ["at 8", "at 16", "at 32"],
        ["a (16)", "red (16)", "<unk> (16)"],
        ["a (32)", "red (32)", "<unk> (32)"],
    ]
    images, attention = system.attention("a red zorp", seed=3)
    assert torch.equal(rows[0][2].image, images[0])
    for k, (row, weights) in enumerate(zip(rows[1:], attention, strict=True)):
        picture, factor = rows[0][k + 1].image, 32 // weights.shape[-1]
        for word, (_, lit) in enumerate(row):
            assert lit.shape == (3, 32, 32) and lit.min() >= -1 and lit.max() <= 1
            light = weights[0, word].repeat_interleave(factor, 0).repeat_interleave(factor, 1)
            expected = (picture + 1) * light / light.max() - 1
            torch.testing.assert_close(lit, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("text", ["bag", "lstm", "transformer", "char_cnn_rnn"])
@pytest.mark.parametrize("caption", ["", "a red circle", CAPTIONS[1] + " left of a ring" * 12])
def test_visualise_works_for_any_caption_and_encoder(text: str, caption: str, make: Make) -> None:
    """Words after the place where the encoder cuts have no picture."""
    one = make(text)
    rows = one.visualise(caption)
    count = int(one.text.encode([caption]).mask.sum())
    assert [len(row) for row in rows] == [2, count]
    assert all(torch.isfinite(image).all() for row in rows for _, image in row)


def test_a_word_without_attention_is_dark(make: Make) -> None:
    """With sharp attention a word's weight may be zero at all places: here words lie on a line, and
    a place attends to either end."""
    one = make()
    with torch.no_grad():
        weight = one.generator.next_stages[0].attention.project_words.weight
        weight.copy_(1e8 * weight[:1].expand_as(weight))
    _, (attention,) = one.attention(CAPTIONS[1])
    unattended = attention[0].amax((1, 2)) == 0
    assert unattended.any()
    for word, (_, lit) in enumerate(one.visualise(CAPTIONS[1])[1]):
        assert torch.isfinite(lit).all(), word
        assert not unattended[word] or (lit == -1).all()


# --- recipe -----------------------------------------------------------------------------------


def test_the_preset_paper_is_the_papers() -> None:
    """Section 4 and the authors' configuration for birds."""
    config = recipe.PRESETS["paper"]
    assert (config.size, config.text, config.train.batch_size) == (256, "lstm", 20)
    text = config.encoder
    assert (text.max_words, text.width, text.embed_dim) == (18, 256, 300)
    assert (text.dropout, text.cell) == (0.5, "lstm")
    assert config.model == AttnGANConfig() and config.damsm == DAMSMConfig()
    for optim, lr in ((config.optim, 2e-4), (config.damsm_optim, 2e-3)):
        assert (optim.name, optim.lr, optim.beta1, optim.beta2) == ("adam", lr, 0.5, 0.999)
        assert (optim.weight_decay, optim.warmup) == (0.0, 0)
    optim = config.optim
    assert (optim.grad_clip, optim.ema_decay, optim.decay) == (0.0, 0.999, "none")
    assert config.damsm_optim.grad_clip == 0.25


@pytest.mark.parametrize("preset_name", list(recipe.PRESETS))
def test_the_damsm_comes_first_and_is_shared(preset_name: str, tokenizer: WordTokenizer) -> None:
    """A run with another generator takes the DAMSM of an earlier run; one with another DAMSM, or
    another optimiser of it, does not."""
    config = recipe.PRESETS[preset_name]

    def key(changed: recipe.Config) -> str:
        first, last = recipe.stages(changed, tokenizer)
        assert (first.name, last.name, last.earlier()) == ("damsm", "gan", [first])
        assert first.train.sample_every == 0 and first.share + last.share == 1
        return first.key({"size": changed.size})

    assert key(config) == key(replace(config, model=replace(config.model, z_dim=7)))
    assert key(config) == key(replace(config, optim=replace(config.optim, lr=7.0)))
    for change in (
        {"damsm": replace(config.damsm, gamma1=7.0)},
        {"damsm_optim": replace(config.damsm_optim, lr=7.0)},
        {"encoder": replace(config.encoder, width=6)},
        {"text": "bag"},
        {"damsm_share": 0.5},
    ):
        assert key(config) != key(replace(config, **change)), change


def test_a_loaded_run_needs_no_file_of_inception() -> None:
    """Its weights are the run's."""
    config = recipe.PRESETS["paper"]
    damsm = replace(config.damsm, inception_weights="inception.pth")
    assert replace(config, damsm=damsm).without_files() == config


def test_any_text_features_will_do(make: Make) -> None:
    """The generator takes the contract's: words, mask and sentence."""
    generator = make().eval().generator
    mask = torch.ones(2, 3, dtype=torch.bool)
    text = TextFeatures(random(2, 3, WIDTH), mask, random(2, WIDTH), mask.long())
    z, eps = random(2, 6), random(2, 5)
    generated = generator(text, z, eps)
    flipped = generator(replace(text, words=text.words.flip(1)), z, eps)
    torch.testing.assert_close(generated.images[1], flipped.images[1])  # attention has no order
    torch.testing.assert_close(generated.attention[0], flipped.attention[0].flip(1))
    other = generator(replace(text, words=2 * text.words), z, eps)
    assert torch.equal(generated.images[0], other.images[0])  # of the sentence alone
    assert differ(generated.images[1], other.images[1]).min() > 1e-4
