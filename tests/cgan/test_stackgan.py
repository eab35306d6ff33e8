"""`stackgan`: the authors' sizes, losses by hand, two stages that keep apart, knobs and recipes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from lineage import runs
from lineage.cgan import stackgan
from lineage.cgan.stackgan import (
    ConditioningAugmentation,
    StackGANConfig,
    StackGANStage,
    StageOne,
    StageOneGenerator,
    StageTwo,
    StageTwoGenerator,
)
from lineage.config import OptimConfig, TextConfig, TrainConfig, to_dict
from lineage.data.contract import Batch, CaptionedDataset
from lineage.errors import UserError
from lineage.nn import matching as pairs
from lineage.nn.conditional_discriminator import discriminator_terms, discriminator_turn, kl_term
from lineage.nn.gan import diff_augment
from lineage.nn.noise import NoiseStreams
from lineage.recipes import stackgan as recipe
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import WordTokenizer
from lineage.training.loop import Trainer

B = 4
TINY = StackGANConfig(start=8, noise=6, condition=5, generator=8, discriminator=4, residual=1)
CAPTIONS = ["a red circle", "a blue square above a green triangle", ""]

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def make(tokenizer: WordTokenizer) -> Make:
    """(1 or 2) -> that stage at 8 or 16 pixels, of weights large enough to show a caption."""

    def make(number: int, **changes: Any) -> StackGANStage:
        torch.manual_seed(0)
        config = StackGANConfig(**{**vars(TINY), **changes})
        first = StageOne(config, make_encoder("bag", TextConfig(width=8), tokenizer))
        enlarge(first.generator, first.discriminator)
        if number == 1:
            return first
        second = StageTwo(config, first, 16)
        enlarge(second.generator, second.discriminator)
        return second

    return make


@torch.no_grad()
def enlarge(*networks: nn.Module) -> None:
    """At the weights of the start, hardly anything that is asked for shows in a picture."""
    for parameter in (p for network in networks for p in network.parameters() if p.dim() > 1):
        parameter.mul_(5.0)


def batch_of(shapes: CaptionedDataset, captions: list[str] | None = None) -> Batch:
    batch = shapes.batch(range(B), [0] * B, 0)
    return Batch(batch.image, captions or batch.caption, None, batch.id)


def steps(system: StackGANStage, batch: Batch) -> Iterator[tuple[str, dict[str, Tensor]]]:
    return system.losses(batch, system.text.encode(batch.caption), NoiseStreams(range(len(batch))))


def logits(count: int, seed: int) -> Tensor:
    return 3 * torch.randn(count, generator=torch.Generator().manual_seed(seed))


def trained(system: StackGANStage, shapes: CaptionedDataset, number: int = 3) -> Trainer:
    """A trainer after a few large steps."""
    optim = OptimConfig(lr=1e-2, warmup=0, decay="none", weight_decay=0.0)
    trainer = Trainer(system, shapes, optim, TrainConfig(batch=B, precision="fp32", prefetch=0))
    for k in range(number):
        trainer.advance(trainer.loader.at(k))
    return trainer


# --- networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generator", "discriminator", "residual", "counts"),
    [
        (192, 96, 2, (20_020_832, 12_407_425, 37_130_480, 159_889_538)),
        (128, 64, 4, (10_301_248, 5_715_713, 26_290_080, 71_269_122)),
    ],
    ids=["coco", "defaults"],
)
def test_the_networks_are_of_the_authors_sizes(
    generator: int, discriminator: int, residual: int, counts: tuple[int, ...]
) -> None:
    """Counted in hanzhanggit/StackGAN-Pytorch with these GF_DIM, DF_DIM and R_NUM, Z_DIM 100,
    CONDITION_DIM 128 and sentences of 1,024; stage II without its stage I."""
    config = StackGANConfig(generator=generator, discriminator=discriminator, residual=residual)
    with torch.device("meta"):
        networks = (
            StageOneGenerator(config, 1024),
            config.look(1024, 64, alone=False),
            StageTwoGenerator(config, 1024, 256),
            config.look(1024, 256, alone=True),
        )
    assert tuple(sum(p.numel() for p in n.parameters()) for n in networks) == counts


def test_the_defaults_are_the_papers() -> None:
    """Section 4.2 and the authors' code; no switch of later work is on."""
    config = StackGANConfig()
    assert (config.start, config.noise, config.condition, config.kl) == (64, 100, 128, 2.0)
    assert (config.generator, config.discriminator, config.residual) == (128, 64, 4)
    assert (config.loss, config.r1, config.norm, config.augment) == ("log", 0.0, "batch", False)
    assert config.reads == "mu"


@pytest.mark.parametrize(("start", "size"), [(8, 16), (8, 32), (16, 32), (32, 64)])
def test_every_side_that_can_be_works(start: int, size: int, tokenizer: WordTokenizer) -> None:
    config = StackGANConfig(**{**vars(TINY), "start": start, "generator": 16})
    first = StageOne(config, make_encoder("bag", TextConfig(width=8), tokenizer))
    second = StageTwo(config, first, size)
    assert first.generate(CAPTIONS).shape == (3, 3, start, start)
    drawn = second.generate(CAPTIONS)
    assert drawn.shape == (3, 3, size, size) and drawn.abs().max() <= 1
    features = second.discriminator.features(drawn)
    assert features.shape[2:] == (4, 4)
    assert second.discriminator.score(features, torch.zeros(3, 5)).shape == (3,)
    assert second.discriminator.score_alone(features).shape == (3,)


@pytest.mark.parametrize(
    "sizes",
    [
        {"size": 24},
        {"size": 8},
        {"size": 4},
        {"model.start": 16},
        {"model.start": 32},
        {"model.start": 12},
        {"model.start": 4},
        {"model.start": 0},
        {"model.start": 12, "size": 24},
    ],
    ids=str,
)
def test_sides_that_do_not_double_are_told(sizes: dict[str, int], tokenizer: WordTokenizer) -> None:
    """Where the preset draws 8, then 16 pixels: in one sentence, before anything is trained."""

    def build() -> None:
        config: Any = runs.configure("stackgan", preset_name="smoke", settings=sizes)
        with torch.device("meta"):
            runs.build(recipe.stages(config, tokenizer))

    with pytest.raises(UserError) as caught:
        build()
    message = str(caught.value)
    assert "\n" not in message and "doubling" in message and "size" in message
    assert any(str(side) in message for side in sizes.values())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"loss": "hing"}, "model.loss"),
        ({"norm": "layer"}, "model.norm"),
        ({"noise": 0}, "model.noise"),
        ({"condition": 0}, "model.condition"),
        ({"r1": -1.0}, "model.r1"),
        ({"r1_every": 0}, "model.r1_every"),
        ({"kl": -0.1}, "model.kl"),
        ({"residual": -1}, "model.residual"),
        ({"reads": "sentences"}, "model.reads"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_told(change: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=name):
        StackGANConfig(**change)


# --- section 3.2 ------------------------------------------------------------------------------


def test_the_condition_is_drawn_from_its_gaussian() -> None:
    """c = mu + sigma eps; mu and log sigma^2 pass a ReLU, so neither is ever negative."""
    network = ConditioningAugmentation(12, 7)
    nn.init.normal_(network.fc.weight)
    eps = logits(64 * 7, 1).view(64, 7)
    code, mu, log_variance = network(logits(64 * 12, 0).view(64, 12), eps)
    assert mu.min() == 0 and log_variance.min() == 0  # reached, and not passed
    assert mu.max() > 1 and log_variance.max() > 1
    sigma = log_variance.exp().sqrt()
    torch.testing.assert_close(code, mu + sigma * eps)
    torch.testing.assert_close(
        network(torch.zeros(1, 12), eps[:1])[1], F.relu(network.fc.bias[None, :7])
    )


def test_the_kl_term_is_that_of_two_gaussians() -> None:
    """Equation 2 in closed form, against torch's; a mean, so that neither the batch nor the width
    of the condition changes its weight."""
    mu, log_variance = logits(20, 0).view(4, 5), logits(20, 1).view(4, 5)
    drawn = Normal(mu, (log_variance / 2).exp())
    expected = kl_divergence(drawn, Normal(torch.zeros(4, 5), torch.ones(4, 5))).mean()
    torch.testing.assert_close(kl_term(mu, log_variance), expected)
    torch.testing.assert_close(
        kl_term(mu.repeat(3, 2), log_variance.repeat(3, 2)), kl_term(mu, log_variance)
    )
    assert kl_term(torch.zeros(2, 3), torch.zeros(2, 3)) == 0


@pytest.mark.parametrize("stage", [1, 2])
def test_the_kl_term_has_its_weight(stage: int, make: Make, shapes: CaptionedDataset) -> None:
    """The stage's own Gaussian, twice; a weight of nothing leaves the term out of the log too."""
    terms = [
        dict(steps(make(stage, kl=kl), batch_of(shapes)))["generator"] for kl in (2.0, 0.5, 0.0)
    ]
    system, batch = make(stage), batch_of(shapes)
    drawn = system.fake(system.text.encode(batch.caption).sentence, NoiseStreams(range(B)))
    torch.testing.assert_close(terms[0]["kl"], 2 * kl_term(drawn.mu, drawn.log_variance))
    torch.testing.assert_close(terms[1]["kl"], 0.5 * kl_term(drawn.mu, drawn.log_variance))
    assert "kl" not in terms[2]
    torch.testing.assert_close(terms[0]["right"], terms[2]["right"])


# --- losses -----------------------------------------------------------------------------------


def given(alone: bool) -> dict[str, Tensor]:
    """Logits of every kind of pair."""
    found = {"real": logits(B, 0), "wrong": logits(B - 1, 1), "fake": logits(B, 2)}
    if alone:
        found |= {"real_alone": logits(B, 3), "fake_alone": logits(B, 4)}
    return found


@pytest.mark.parametrize(
    ("alone", "weights"),
    [
        (False, {"real": 1.0, "wrong": 0.5, "fake": 0.5}),
        (
            True,
            {
                "real": 1 / 2,
                "real_alone": 1 / 2,
                "wrong": 1 / 3,
                "fake": 1 / 3,
                "fake_alone": 1 / 3,
            },
        ),
    ],
    ids=["equation 3", "equation 5"],
)
def test_the_discriminator_minimises_the_papers_loss(
    alone: bool, weights: dict[str, float]
) -> None:
    """Cross entropy on probabilities, as the authors have it, with the weights of the equation."""
    found = given(alone)
    terms = discriminator_terms(found)
    assert list(terms) == list(weights)
    for name, weight in weights.items():
        target = float(name.startswith("real"))
        probability = found[name].double().sigmoid().tolist()
        entropy = F.binary_cross_entropy(
            torch.tensor(probability), torch.full((len(probability),), target)
        )
        assert terms[name].item() == pytest.approx(weight * entropy.item(), rel=1e-5), name


@pytest.mark.parametrize("alone", [False, True])
def test_hinge_stops_at_its_margin(alone: bool) -> None:
    """max(0, 1 - s) for real pairs, max(0, 1 + s) for others, with the same weights."""
    found = given(alone)
    terms, plain = discriminator_terms(found, loss="hinge"), discriminator_terms(found)
    assert terms.keys() == plain.keys()
    for name, values in found.items():
        sign = -1 if name.startswith("real") else 1
        weight = plain[name].item() / F.softplus(sign * values).mean().item()
        by_hand = sum(max(0.0, 1 + sign * value) for value in values.tolist()) / len(values)
        assert terms[name].item() == pytest.approx(weight * by_hand, rel=1e-5), name
    sure = {n: torch.full_like(v, 1.0 if n.startswith("real") else -1.0) for n, v in found.items()}
    assert all(term == 0 for term in discriminator_terms(sure, loss="hinge").values())


@pytest.mark.parametrize("loss", ["log", "hinge"])
def test_a_wrong_caption_that_is_right_does_not_count(loss: str) -> None:
    """The mean is over the pairs that are wrong indeed; where none is, there is nothing to learn
    and nothing that is no number."""
    found = given(alone=True)
    terms = discriminator_terms(found, torch.tensor([1.0, 0.0, 1.0]), loss)
    kept = {**found, "wrong": found["wrong"][[0, 2]]}
    for name, expected in discriminator_terms(kept, None, loss).items():
        torch.testing.assert_close(terms[name], expected)
    assert discriminator_terms(found, torch.zeros(3), loss)["wrong"] == 0


@pytest.mark.parametrize("stage", [1, 2])
def test_pairs_are_those_of_the_authors(
    stage: int, make: Make, shapes: CaptionedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real, then real with the caption of the next row, then fake; the discriminator is told mu,
    from which no gradient flows back; pairs of one caption are left out."""
    system = make(stage)
    batch = batch_of(shapes, ["a ring", "a ring", "a blue square", "a star"])
    seen, masks = [], []
    score, terms_of = system.discriminator.score, pairs.discriminator_terms

    def watched_score(features: Tensor, condition: Tensor) -> Tensor:
        seen.append((features, condition))
        return score(features, condition)

    def watched_terms(found: Any, mismatched: Tensor, loss: str) -> Any:
        masks.append(mismatched.tolist())
        return terms_of(found, mismatched, loss)

    monkeypatch.setattr(system.discriminator, "score", watched_score)
    monkeypatch.setattr(pairs, "discriminator_terms", watched_terms)
    drawn = system.fake(system.text.encode(batch.caption).sentence, NoiseStreams(range(B)))
    names = [name for name, _ in steps(system, batch)]
    assert names == ["discriminator", "generator"] and masks == [[0.0, 1.0, 1.0]]
    mu = drawn.mu
    for (_, condition), expected in zip(seen, (mu, mu[1:], mu, mu), strict=True):
        torch.testing.assert_close(condition, expected)
        assert not condition.requires_grad
    (real, _), (wrong, _), (fake, _), (again, _) = seen
    assert torch.equal(wrong, real[:-1])  # looked at once, judged twice
    torch.testing.assert_close(fake, again)  # the same pictures, now with gradient
    torch.testing.assert_close(real, system.discriminator.features(system.real(batch)))


@pytest.mark.parametrize("stage", [1, 2])
def test_the_discriminator_may_be_told_the_sentence(
    stage: int, make: Make, shapes: CaptionedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, in both turns, in place of mu; the generator's Gaussian stays as it is."""
    system, batch, seen = make(stage, reads="sentence"), batch_of(shapes), []
    score = system.discriminator.score

    def watched(features: Tensor, condition: Tensor) -> Tensor:
        seen.append(condition)
        return score(features, condition)

    monkeypatch.setattr(system.discriminator, "score", watched)
    terms = dict(steps(system, batch))
    sentence = system.text.encode(batch.caption).sentence
    for condition, expected in zip(seen, (sentence, sentence[1:], sentence, sentence), strict=True):
        assert torch.equal(condition, expected) and not condition.requires_grad
    told = {reads: make(stage, reads=reads).discriminator.joint[0] for reads in ("mu", "sentence")}
    assert told["sentence"].in_channels - told["mu"].in_channels == 8 - TINY.condition
    drawn = system.fake(sentence, NoiseStreams(range(B)))
    torch.testing.assert_close(terms["generator"]["kl"], 2 * kl_term(drawn.mu, drawn.log_variance))


def test_stage_one_sees_small_pictures(make: Make, shapes: CaptionedDataset) -> None:
    """Each pixel the mean of the four it stands for."""
    batch = batch_of(shapes)
    small = make(1).real(batch)
    assert small.shape == (B, 3, 8, 8) and torch.equal(make(2).real(batch), batch.image)
    torch.testing.assert_close(small[2, 1, 3, 5], batch.image[2, 1, 6:8, 10:12].mean())


# --- turns ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "expected"), [(1, (1, 0)), (2, (1, 1))])
def test_the_fake_is_drawn_once_a_step(
    stage: int,
    expected: tuple[int, int],
    make: Make,
    shapes: CaptionedDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both turns judge the same pictures; drawing them twice would cost a third of the step."""
    calls = [0, 0]
    for number, kind in enumerate((StageOneGenerator, StageTwoGenerator)):
        original = kind.forward

        def forward(self: Any, *inputs: Tensor, call: Any = original, number: int = number) -> Any:
            calls[number] += 1
            return call(self, *inputs)

        monkeypatch.setattr(kind, "forward", forward)
    list(steps(make(stage), batch_of(shapes)))
    assert tuple(calls) == expected


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("switches", [{}, {"norm": "spectral", "augment": True, "r1": 1.0}])
def test_gradients_stay_in_their_turn(
    stage: int, switches: dict[str, Any], make: Make, shapes: CaptionedDataset
) -> None:
    """The discriminator's loss must not reach the generator, nor any loss the text or stage I."""
    system = make(stage, **switches)
    turns = steps(system, batch_of(shapes))
    for own, other in (("discriminator", "generator"), ("generator", None)):
        name, terms = next(turns)
        assert name == own
        system.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        reached = {n for n, p in system.named_parameters() if p.grad is not None and p.grad.any()}
        expected = {n for n, _ in system.named_parameters() if n.startswith(f"{own}.")}
        assert reached >= expected, expected - reached
        assert other is None or not any(n.startswith(f"{other}.") for n in reached)
        assert not any(n.startswith(("text.", "first.")) for n in reached)


@pytest.mark.parametrize("stage", [1, 2])
def test_each_turn_moves_its_own_group(
    stage: int, make: Make, shapes: CaptionedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = make(stage)
    trainer = trained(system, shapes, 0)
    moved: dict[str, set[str]] = {}
    for name, group in trainer.groups.items():
        original = group.update

        def update(*arguments: Any, call: Any = original, name: str = name) -> Tensor:
            before = {n: p.detach().clone() for n, p in system.named_parameters()}
            norm = call(*arguments)
            now = dict(system.named_parameters())
            moved[name] = {n.split(".")[0] for n, p in before.items() if not torch.equal(p, now[n])}
            return norm

        monkeypatch.setattr(group, "update", update)
    trainer.advance(trainer.loader.at(0))
    assert moved == {"discriminator": {"discriminator"}, "generator": {"generator"}}


def test_the_generator_sees_the_updated_discriminator(make: Make, shapes: CaptionedDataset) -> None:
    """What the loop does to the discriminator between the two turns must show in the second."""
    found = []
    for change in (0.0, 0.5):
        system = make(2)
        turns = steps(system, batch_of(shapes))
        next(turns)
        with torch.no_grad():
            for parameter in system.discriminator.joint.parameters():
                parameter.add_(change)
        found.append(next(turns)[1])
    assert found[0]["right"] != found[1]["right"]
    assert found[0]["alone"] == found[1]["alone"]  # another head


def test_stage_one_stays_bit_for_bit(make: Make, shapes: CaptionedDataset) -> None:
    """Weights and batch statistics, in training and in drawing; so does the text. What stage II
    learns to mend is then what it will be given."""
    second = make(2)
    kept = {
        name: {n: t.clone() for n, t in part.state_dict().items()}
        for name, part in (("first", second.first), ("text", second.text))
    }
    assert any("running_var" in name for name in kept["first"])
    drawn = second.generate(CAPTIONS, seed=1, stage=1)
    trained(second, shapes)
    assert second.training and second.generator.training and not second.first.training
    second.generate(CAPTIONS)
    assert second.training and not second.first.training
    for part, tensors in kept.items():
        for name, tensor in getattr(second, part).state_dict().items():
            assert torch.equal(tensor, tensors[name]), (part, name)
    assert torch.equal(second.generate(CAPTIONS, seed=1, stage=1), drawn)
    assert not any(p.requires_grad for p in [*second.first.parameters(), *second.text.parameters()])


def test_stage_one_leaves_the_text_as_it_is(make: Make, shapes: CaptionedDataset) -> None:
    first = make(1)
    before = first.text.encode(CAPTIONS).sentence
    trained(first, shapes)
    assert torch.equal(first.text.encode(CAPTIONS).sentence, before)


# --- the switches of later work ---------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "spectral"])
@pytest.mark.parametrize("stage", [1, 2])
def test_r1_is_the_squared_gradient_on_real_pictures(
    norm: str, stage: int, make: Make, shapes: CaptionedDataset
) -> None:
    """One row at a time, in evaluation mode, where rows do not meet in the batch norm; each penalty
    counts for all steps that have none."""
    system = make(stage, norm=norm, r1=0.3, r1_every=2).eval()
    look, batch = system.discriminator, batch_of(shapes)
    mu = system.fake(system.text.encode(batch.caption).sentence, NoiseStreams(range(B))).mu.detach()
    squares = []
    for i in range(B):
        image = system.real(batch)[i : i + 1].clone().requires_grad_()
        look.score(look.features(image), mu[i : i + 1]).sum().backward(inputs=[image])
        assert image.grad is not None
        squares.append(image.grad.square().sum().item())
    (_, terms), _ = steps(system, batch)
    assert terms["r1"].item() == pytest.approx(2 * 0.3 / 2 * sum(squares) / B, rel=1e-4)
    gradient = torch.autograd.grad(terms["r1"], list(look.encode_img.parameters()))
    assert all(torch.isfinite(g).all() for g in gradient) and any(g.any() for g in gradient)


@pytest.mark.parametrize("switches", [{}, {"norm": "spectral"}, {"augment": True}], ids=str)
def test_r1_comes_every_so_many_steps_and_its_count_is_saved(
    switches: dict[str, Any], make: Make, shapes: CaptionedDataset
) -> None:
    """A resumed run would else take its penalties at other steps."""
    changes, batch = {"r1": 0.3, "r1_every": 3, **switches}, batch_of(shapes)
    system, again = make(2, **changes), make(2, **changes)

    def penalised(one: StackGANStage) -> bool:
        terms = dict(steps(one, batch))["discriminator"]
        assert all(torch.isfinite(term) for term in terms.values())
        return "r1" in terms

    assert [penalised(system) for _ in range(7)] == [True, False, False, True, False, False, True]
    again.load_state_dict(system.state_dict())
    assert [penalised(again) for _ in range(3)] == [False, False, True]
    assert not penalised(make(2, **switches))


@pytest.mark.parametrize(
    "switches",
    [
        {"loss": "hinge"},
        {"norm": "spectral"},
        {"augment": True},
        {"reads": "sentence"},
        {"loss": "hinge", "norm": "spectral", "augment": True, "r1": 1.0, "r1_every": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("stage", [1, 2])
def test_switches_train(
    stage: int, switches: dict[str, Any], make: Make, shapes: CaptionedDataset
) -> None:
    """Each is one `--set model.NAME=...` away."""
    system = make(stage, **switches)
    trainer = trained(system, shapes, 2)
    seen = trainer.advance(trainer.loader.at(2))
    assert all(torch.isfinite(value).all() for value in seen.values()), seen
    assert torch.isfinite(system.generate(CAPTIONS)).all()
    batch_norms = [m for m in system.discriminator.modules() if isinstance(m, nn.BatchNorm2d)]
    assert bool(batch_norms) == (switches.get("norm") != "spectral")


def test_what_is_judged_is_augmented_and_what_is_drawn_is_not(
    make: Make, shapes: CaptionedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real and fake pictures alike, or the discriminator would know the holes."""
    given: list[Tensor] = []
    judged: list[Tensor] = []
    monkeypatch.setattr(stackgan, "diff_augment", lambda image: given.append(image) or image * 0)
    system, batch = make(2, augment=True), batch_of(shapes)
    features = system.discriminator.features
    monkeypatch.setattr(
        system.discriminator, "features", lambda image: judged.append(image) or features(image)
    )
    list(steps(system, batch))
    assert len(given) == 2 and any(torch.equal(image, batch.image) for image in given)
    assert len(judged) == 3 and not any(image.any() for image in judged)
    given.clear()
    list(steps(make(2), batch))
    system.generate(CAPTIONS)
    assert given == []


def test_the_penalty_is_taken_at_real_pictures_through_their_augmentation(
    make: Make, shapes: CaptionedDataset
) -> None:
    """The gradient in the picture as it is, of the logit of the picture as it is shown; neither the
    batch nor the generator's pictures take part in it."""
    look = make(2, norm="spectral").discriminator.eval()
    image = batch_of(shapes).image
    told = torch.randn(B, look.joint[0].in_channels - look.alone.in_channels)
    fake = torch.rand_like(image).requires_grad_()
    torch.manual_seed(5)
    terms, _ = discriminator_turn(
        look, image, fake, told, torch.ones(B - 1), r1=0.7, shown=diff_augment
    )
    torch.manual_seed(5)
    own = image.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(look.score(look.features(diff_augment(own)), told).sum(), own)
    expected = 0.7 * gradient.square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(terms["r1"], expected)
    sum(terms.values()).backward()  # type: ignore[union-attr]
    assert expected > 0 and not image.requires_grad and fake.grad is None


# --- drawing ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def second(make: Make) -> StageTwo:
    return make(2)  # type: ignore[no-any-return]


def differ(one: Tensor, other: Tensor) -> Tensor:
    """(B,) by how much pictures differ at most."""
    return (one - other).abs().flatten(1).amax(1)


def test_truncation_of_nothing_gives_one_picture(second: StageTwo) -> None:
    """For a caption, whatever the seed and the place; without it there are many."""
    captions = ["a red circle"] * 3
    pictures = [second.generate(captions, seed=seed, truncation=0.0) for seed in (0, 1)]
    assert differ(pictures[0], pictures[1]).max() < 1e-5
    assert differ(pictures[0], pictures[0][:1]).max() < 1e-5
    assert differ(pictures[0], second.generate(["a blue star"], truncation=0.0)).max() > 1e-3
    free, near = (second.generate(captions, truncation=share) for share in (1.0, 0.1))
    assert differ(free[1:], free[:1]).min() > 1e-3
    assert differ(near[1:], near[:1]).mean() < differ(free[1:], free[:1]).mean()


def test_towards_another_caption_has_both_as_ends(second: StageTwo) -> None:
    """From the same noise, so that only the caption changes on the way."""
    one, other = ["a red circle"] * 2, ["a blue square above a green triangle"] * 2
    ends = [second.generate(c, seed=3) for c in (one, other)]
    way = [second.generate(one, seed=3, towards=other[0], share=share) for share in (0.0, 0.5, 1.0)]
    assert differ(way[0], ends[0]).max() < 1e-6 and differ(way[2], ends[1]).max() < 1e-6
    assert differ(way[1], ends[0]).min() > 1e-3 and differ(way[1], ends[1]).min() > 1e-3


def test_noise_goes_from_one_picture_to_another(second: StageTwo) -> None:
    default = second.generate(CAPTIONS, seed=3)
    assert torch.equal(second.generate(CAPTIONS, seed=3, noise_share=0.0), default)
    near, far = (second.generate(CAPTIONS, seed=3, noise_share=share) for share in (0.05, 1.0))
    assert differ(far, default).min() > 1e-3
    assert differ(near, default).mean() < differ(far, default).mean()


def test_stage_one_can_be_looked_at(make: Make) -> None:
    """`stage=1` shows the very sketch that the picture was made from, every pixel as a square."""
    first, second = make(1), make(2)  # seeded alike, so stage I is the same
    small = first.generate(CAPTIONS, seed=3)
    shown = second.generate(CAPTIONS, seed=3, stage=1)
    expected = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(shown, expected, atol=1e-6, rtol=0)
    assert differ(shown, second.generate(CAPTIONS, seed=3)).min() > 1e-3


# --- recipes ----------------------------------------------------------------------------------

PAPER = {
    "optim.name": "adam",
    "optim.lr": 2e-4,
    "optim.beta1": 0.5,
    "optim.beta2": 0.999,
    "optim.weight_decay": 0.0,
    "optim.warmup": 0,
    "optim.decay": "linear",
    "optim.clip": 0.0,
    "optim.average": 0.0,
    "model.kl": 2.0,
    "model.loss": "log",
    "model.r1": 0.0,
    "model.norm": "batch",
    "model.augment": False,
    "model.reads": "mu",
}
"""Section 4.2 and the authors' code."""

MODERN = {
    **{f"optim.{name}": value for name, value in vars(recipe._MODERN).items() if name != "rates"},
    **{f"model.{name}": value for name, value in recipe._SWITCHES.items()},
}
"""What was found to work; its numbers are measured, so they are not typed here."""

RECIPES = {"paper": PAPER, "modern": MODERN}


def flat(config: Any) -> dict[str, Any]:
    """Settings by dotted name."""
    saved = to_dict(config)
    return {f"{g}.{n}": v for g in ("optim", "model") for n, v in saved[g].items()}


@pytest.mark.parametrize("preset", list(recipe.PRESETS))
@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipe_sets_all_switches_and_rates(name: str, preset: str) -> None:
    """And no size: two recipes are compared on the same networks and the same budget."""
    before = recipe.PRESETS[preset]
    config = runs.configure("stackgan", preset_name=preset, settings={"recipe": name})
    assert config.recipe == name  # type: ignore[attr-defined]
    if name == before.recipe:
        assert config == before  # the preset's own rates stand
        return
    found, set_by_it = flat(config), RECIPES[name]
    assert {field: found[field] for field in set_by_it} == set_by_it
    for field, value in flat(before).items():
        assert field in set_by_it or found[field] == value, field
    assert config.train == before.train and config.encoder == before.encoder


def test_a_recipe_undoes_the_other() -> None:
    """Each says something of every switch that the other sets."""
    assert PAPER.keys() == MODERN.keys()
    config = recipe.PRESETS["tiny"]
    assert config.with_recipe("paper").with_recipe("modern") == config.with_recipe("modern")


@pytest.mark.parametrize("name", list(RECIPES))
@pytest.mark.parametrize("last", [True, False])
def test_single_switches_beside_a_recipe_win(name: str, last: bool) -> None:
    """In whatever order they are typed: so each change can be tried alone."""
    single = {"model.r1": "0.7", "model.loss": "hinge", "optim.lr": "3e-4", "model.augment": "true"}
    settings = {"recipe": name, **single} if last else {**single, "recipe": name}
    found = flat(runs.configure("stackgan", preset_name="tiny", settings=settings))
    expected = {"model.r1": 0.7, "model.loss": "hinge", "optim.lr": 3e-4, "model.augment": True}
    for field, value in {**RECIPES[name], **expected}.items():
        assert found[field] == value, field


def test_a_recipe_that_there_is_not_is_told() -> None:
    with pytest.raises(UserError, match=r"recipe='modren'.*'modern'"):
        runs.configure("stackgan", preset_name="tiny", settings={"recipe": "modren"})


def test_presets_say_which_recipe_they_are() -> None:
    """The preset `paper` is the paper's in every switch and rate."""
    named = {name: config.recipe for name, config in recipe.PRESETS.items()}
    assert named == {"smoke": "modern", "tiny": "modern", "small": "modern", "paper": "paper"}
    paper = recipe.PRESETS["paper"]
    assert paper.with_recipe("paper") == paper
    tiny = recipe.PRESETS["tiny"]
    assert tiny.with_recipe("modern") == tiny
