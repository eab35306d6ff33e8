"""`stackgan`: the authors' sizes, losses by hand, two stages, options and recipes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
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
    GeneratorOutput,
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
from lineage.nn.conditional_discriminator import ConditionalDiscriminator
from lineage.nn.gan import diff_augment
from lineage.nn.noise import NoiseStreams
from lineage.recipes import preset
from lineage.recipes import stackgan as recipe
from lineage.system import Turn
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import WordTokenizer
from lineage.training.loop import Trainer

B = 4
TINY = StackGANConfig(
    stage1_size=8, z_dim=6, cond_dim=5, gen_channels=8, disc_channels=4, num_res_blocks=1
)
CAPTIONS = ["a red circle", "a blue square above a green triangle", ""]

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def make(tokenizer: WordTokenizer) -> Make:
    """(1 or 2) -> that stage at 8 or 16 pixels, with weights so large that a caption shows."""

    def make(number: int, **changes: Any) -> StackGANStage:
        torch.manual_seed(0)
        config = replace(TINY, **changes)
        stage1 = StageOne(config, make_encoder("bag", TextConfig(width=8), tokenizer))
        enlarge(stage1.generator, stage1.discriminator)
        if number == 1:
            return stage1
        stage2 = StageTwo(config, stage1, 16)
        enlarge(stage2.generator, stage2.discriminator)
        return stage2

    return make


@torch.no_grad()
def enlarge(*networks: nn.Module) -> None:
    """With initial weights, captions and options hardly change a picture."""
    for parameter in (p for network in networks for p in network.parameters() if p.dim() > 1):
        parameter.mul_(5.0)


def batch_of(shapes: CaptionedDataset, captions: list[str] | None = None) -> Batch:
    batch = shapes.batch(range(B), [0] * B, 0)
    return Batch(batch.image, captions or batch.caption, None, batch.id)


def turns(system: StackGANStage, batch: Batch) -> Iterator[Turn]:
    text = system.text.encode(batch.caption)
    return system.losses(batch, text, NoiseStreams(range(len(batch))))


def terms_of(system: StackGANStage, batch: Batch) -> dict[str, Any]:
    """Loss terms of a step, by group."""
    return {turn.group: turn.terms for turn in turns(system, batch)}


def generated_by(system: StackGANStage, batch: Batch) -> GeneratorOutput:
    """The pictures of the same step."""
    sentence = system.text.encode(batch.caption).sentence
    return system.generator_output(sentence, NoiseStreams(range(len(batch))))


def random(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(system: StackGANStage, shapes: CaptionedDataset, steps: int = 3) -> Trainer:
    """A trainer after a few large steps."""
    optim = OptimConfig(lr=1e-2, warmup=0, decay="none", weight_decay=0.0)
    train = TrainConfig(batch_size=B, precision="fp32", prefetch=0)
    trainer = Trainer(system, shapes, optim, train)
    for k in range(steps):
        trainer.advance(trainer.loader.at(k))
    return trainer


# --- networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gen_channels", "disc_channels", "num_res_blocks", "counts"),
    [
        (192, 96, 2, (20_020_832, 12_407_425, 37_130_480, 159_889_538)),
        (128, 64, 4, (10_301_248, 5_715_713, 26_290_080, 71_269_122)),
    ],
    ids=["coco", "defaults"],
)
def test_the_networks_have_the_authors_sizes(
    gen_channels: int, disc_channels: int, num_res_blocks: int, counts: tuple[int, ...]
) -> None:
    """Counted in hanzhanggit/StackGAN-Pytorch with these GF_DIM, DF_DIM and R_NUM, Z_DIM 100,
    CONDITION_DIM 128 and sentences of 1,024; stage II without its stage I."""
    config = StackGANConfig(gen_channels=gen_channels, num_res_blocks=num_res_blocks)
    with torch.device("meta"):
        networks = (
            StageOneGenerator(config, 1024),
            ConditionalDiscriminator(disc_channels, 128, 64, unconditional=False),
            StageTwoGenerator(config, 1024, 256),
            ConditionalDiscriminator(disc_channels, 128, 256, unconditional=True),
        )
    assert tuple(sum(p.numel() for p in n.parameters()) for n in networks) == counts


def test_the_defaults_are_the_papers() -> None:
    """Section 4.2 and the authors' code; no switch of later work is on."""
    config = StackGANConfig()
    assert (config.stage1_size, config.z_dim, config.cond_dim) == (64, 100, 128)
    assert (config.gen_channels, config.disc_channels, config.num_res_blocks) == (128, 64, 4)
    assert (config.kl_weight, config.loss, config.r1_weight) == (2.0, "log", 0.0)
    assert (config.norm, config.augment, config.disc_condition) == ("batch", False, "mu")


@pytest.mark.parametrize(("stage1_size", "size"), [(8, 16), (8, 32), (16, 32), (32, 64)])
def test_all_sides_that_double_work(stage1_size: int, size: int, tokenizer: WordTokenizer) -> None:
    config = replace(TINY, stage1_size=stage1_size, gen_channels=16)
    stage1 = StageOne(config, make_encoder("bag", TextConfig(width=8), tokenizer))
    stage2 = StageTwo(config, stage1, size)
    assert (stage1.size, stage2.size) == (stage1_size, size)
    assert stage1.generate(CAPTIONS).shape == (3, 3, stage1_size, stage1_size)
    pictures = stage2.generate(CAPTIONS)
    assert pictures.shape == (3, 3, size, size) and pictures.abs().max() <= 1
    features = stage2.discriminator.features(pictures)
    assert features.shape[2:] == (4, 4)
    assert stage2.discriminator.cond_logits(features, torch.zeros(3, 5)).shape == (3,)
    assert stage2.discriminator.uncond_logits(features).shape == (3,)


@pytest.mark.parametrize(
    "sizes",
    [
        {"size": 24},
        {"size": 8},
        {"size": 4},
        {"model.stage1_size": 16},
        {"model.stage1_size": 32},
        {"model.stage1_size": 12},
        {"model.stage1_size": 4},
        {"model.stage1_size": 12, "size": 24},
    ],
    ids=str,
)
def test_sides_that_do_not_double_are_refused(
    sizes: dict[str, int], tokenizer: WordTokenizer
) -> None:
    """The preset draws 8, then 16 pixels. One sentence, before anything is trained."""

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
    ("name", "value"),
    [
        ("stage1_size", 0),
        ("loss", "hing"),
        ("norm", "layer"),
        ("z_dim", 0),
        ("cond_dim", 0),
        ("r1_weight", -1.0),
        ("r1_every", 0),
        ("kl_weight", -0.1),
        ("num_res_blocks", -1),
        ("disc_condition", "sentences"),
    ],
)
def test_impossible_settings_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"model\.{name}="):
        runs.configure("stackgan", preset_name="smoke", settings={f"model.{name}": value})


# --- section 3.2 ------------------------------------------------------------------------------


def test_the_condition_is_sampled_from_its_gaussian() -> None:
    """c = mu + sigma eps; mu and log sigma^2 pass a ReLU, so that neither is negative."""
    network = ConditioningAugmentation(12, 7)
    nn.init.normal_(network.fc.weight)
    eps = random(64, 7, seed=1)
    c, mu, logvar = network(random(64, 12), eps)
    assert mu.min() == 0 and logvar.min() == 0
    assert mu.max() > 1 and logvar.max() > 1
    torch.testing.assert_close(c, mu + logvar.exp().sqrt() * eps)
    torch.testing.assert_close(
        network(torch.zeros(1, 12), eps[:1])[1], F.relu(network.fc.bias[None, :7])
    )


@pytest.mark.parametrize("stage", [1, 2])
def test_the_kl_term_is_that_of_two_gaussians(
    stage: int, make: Make, shapes: CaptionedDataset
) -> None:
    """Equation 2 of the stage's own Gaussian, against torch's, as a mean over rows and dimensions;
    a weight of zero leaves it out."""
    batch = batch_of(shapes)
    generated = generated_by(make(stage), batch)
    condition = Normal(generated.mu, (generated.logvar / 2).exp())
    expected = kl_divergence(condition, Normal(torch.zeros(B, 5), torch.ones(B, 5))).mean()
    terms = [terms_of(make(stage, kl_weight=w), batch)["generator"] for w in (2.0, 0.5, 0.0)]
    assert expected > 0
    torch.testing.assert_close(terms[0]["kl"], 2 * expected)
    torch.testing.assert_close(terms[1]["kl"], expected / 2)
    assert "kl" not in terms[2]
    torch.testing.assert_close(terms[0]["cond"], terms[2]["cond"])


# --- equations 3 to 6 -------------------------------------------------------------------------


def bce(logits: Tensor, target: float) -> float:
    """Cross-entropy on probabilities, as the authors' code computes it."""
    probability = logits.detach().double().sigmoid()
    return float(F.binary_cross_entropy(probability, torch.full_like(probability, target)))


def hinge(logits: Tensor, target: float) -> float:
    """max(0, 1 - s) for real pairs, max(0, 1 + s) for others."""
    sign = 1 if target else -1
    return sum(max(0.0, 1 - sign * s) for s in logits.tolist()) / len(logits)


def pair_logits(system: StackGANStage, batch: Batch) -> dict[str, Tensor]:
    """Logits of all pairs in evaluation mode, where rows do not meet; mismatched captions are those
    of the next row, where it differs."""
    disc, generated = system.discriminator, generated_by(system, batch)
    side = system.size
    real = disc.features(F.interpolate(batch.image, (side, side), mode="area"))
    fake = disc.features(generated.image)
    mu, names = generated.mu, batch.caption
    rows = [i for i in range(B - 1) if names[i] != names[i + 1]]
    logits = {
        "real": disc.cond_logits(real, mu),
        "wrong": disc.cond_logits(real[rows], mu[[i + 1 for i in rows]]),
        "fake": disc.cond_logits(fake, mu),
    }
    if disc.uncond_head is not None:
        logits |= {"real_uncond": disc.uncond_logits(real)}
        logits |= {"fake_uncond": disc.uncond_logits(fake)}
    return logits


WEIGHTS = {
    1: {"real": 1.0, "wrong": 1 / 2, "fake": 1 / 2},
    2: {
        "real": 1 / 2,
        "real_uncond": 1 / 2,
        "wrong": 1 / 3,
        "fake": 1 / 3,
        "fake_uncond": 1 / 3,
    },
}
"""Of equations 3 and 5, as in the authors' code."""


@pytest.mark.parametrize(("loss", "by_hand"), [("log", bce), ("hinge", hinge)])
@pytest.mark.parametrize("stage", [1, 2])
def test_terms_by_hand(
    stage: int,
    loss: str,
    by_hand: Callable[[Tensor, float], float],
    make: Make,
    shapes: CaptionedDataset,
) -> None:
    """With the weights of the equation. A next row with the same caption does not count, neither in
    the sum nor in the mean; the generator's hinge loss has no margin."""
    system = make(stage, loss=loss).eval()
    batch = batch_of(shapes, ["a ring", "a ring", "a blue square", "a star"])
    logits, terms = pair_logits(system, batch), terms_of(system, batch)
    assert len(logits["wrong"]) == 2 and list(terms) == ["discriminator", "generator"]
    expected = {
        name: weight * by_hand(logits[name], float(name.startswith("real")))
        for name, weight in WEIGHTS[stage].items()
    }
    assert list(terms["discriminator"]) == list(expected)
    values = {name: term.item() for name, term in terms["discriminator"].items()}
    assert values == pytest.approx(expected, rel=1e-4)
    for name, fake in (("cond", "fake"), ("uncond", "fake_uncond")):
        if fake in logits:
            value = bce(logits[fake], 1) if loss == "log" else -logits[fake].mean().item()
            assert terms["generator"][name].item() == pytest.approx(value, rel=1e-4)
    assert ("uncond" in terms["generator"]) == (stage == 2)


@pytest.mark.parametrize("loss", ["log", "hinge"])
def test_without_mismatched_captions_their_term_is_zero(
    loss: str, make: Make, shapes: CaptionedDataset
) -> None:
    terms = terms_of(make(2, loss=loss), batch_of(shapes, ["a ring"] * B))["discriminator"]
    assert terms["wrong"] == 0 and all(torch.isfinite(term) for term in terms.values())


@pytest.mark.parametrize("disc_condition", ["mu", "sentence"])
@pytest.mark.parametrize("stage", [1, 2])
def test_the_condition_of_the_discriminator(
    stage: int,
    disc_condition: str,
    make: Make,
    shapes: CaptionedDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """mu or the sentence, in both turns and without gradient; real pictures are encoded once for
    both captions, and the generated ones again for the generator."""
    system, batch = make(stage, disc_condition=disc_condition), batch_of(shapes)
    calls, original = [], system.discriminator.cond_logits

    def cond_logits(features: Tensor, cond: Tensor) -> Tensor:
        calls.append((features, cond))
        return original(features, cond)

    monkeypatch.setattr(system.discriminator, "cond_logits", cond_logits)
    generated, sentence = generated_by(system, batch), system.text.encode(batch.caption).sentence
    list(turns(system, batch))
    cond = generated.mu if disc_condition == "mu" else sentence
    for (_, used), expected in zip(calls, (cond, cond[1:], cond, cond), strict=True):
        torch.testing.assert_close(used, expected)
        assert not used.requires_grad
    (real, _), (wrong, _), (fake, _), (again, _) = calls
    assert torch.equal(wrong, real[:-1])
    torch.testing.assert_close(fake, again)
    assert system.discriminator.cond_head[0].in_channels == real.shape[1] + cond.shape[1]


def test_one_picture_has_no_mismatched_caption(make: Make, shapes: CaptionedDataset) -> None:
    batch = shapes.batch([0], [0], 0)
    with pytest.raises(UserError, match=r"train\.batch_size=2"):
        list(turns(make(1), batch))


# --- turns ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "expected"), [(1, (1, 0)), (2, (1, 1))])
def test_pictures_are_generated_once_a_step(
    stage: int,
    expected: tuple[int, int],
    make: Make,
    shapes: CaptionedDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both turns take the same pictures; a second pass would cost a third of the step."""
    calls = [0, 0]
    for number, kind in enumerate((StageOneGenerator, StageTwoGenerator)):
        original = kind.forward

        def forward(self: Any, *inputs: Tensor, call: Any = original, number: int = number) -> Any:
            calls[number] += 1
            return call(self, *inputs)

        monkeypatch.setattr(kind, "forward", forward)
    list(turns(make(stage), batch_of(shapes)))
    assert tuple(calls) == expected


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("switches", [{}, {"norm": "spectral", "augment": True, "r1_weight": 1.0}])
def test_gradients_stay_in_their_turn(
    stage: int, switches: dict[str, Any], make: Make, shapes: CaptionedDataset
) -> None:
    """The discriminator's loss must not reach the generator, and no loss the text or stage I."""
    system = make(stage, **switches)
    steps = turns(system, batch_of(shapes))
    for own, other in (("discriminator", "generator"), ("generator", None)):
        turn = next(steps)
        assert turn.group == own
        system.zero_grad(set_to_none=True)
        torch.stack(list(turn.terms.values())).sum().backward()
        reached = {n for n, p in system.named_parameters() if p.grad is not None and p.grad.any()}
        expected = {n for n, _ in system.named_parameters() if n.startswith(f"{own}.")}
        assert reached >= expected, expected - reached
        assert other is None or not any(n.startswith(f"{other}.") for n in reached)
        assert not any(n.startswith(("text.", "stage1.")) for n in reached)


def test_the_generator_takes_the_updated_discriminator(
    make: Make, shapes: CaptionedDataset
) -> None:
    """A change of the discriminator between the two turns must show in the second."""
    terms = []
    for change in (0.0, 0.5):
        system = make(2)
        steps = turns(system, batch_of(shapes))
        next(steps)
        with torch.no_grad():
            for parameter in system.discriminator.cond_head.parameters():
                parameter.add_(change)
        terms.append(next(steps).terms)
    assert terms[0]["cond"] != terms[1]["cond"]
    assert terms[0]["uncond"] == terms[1]["uncond"]  # another head


def test_stage_one_stays_in_evaluation_mode(make: Make) -> None:
    """Also after pictures are drawn in the middle of training."""
    stage2 = make(2).train()
    assert stage2.generator.training and not stage2.stage1.training
    stage2.generate(CAPTIONS)
    assert stage2.training and not stage2.stage1.training
    frozen = [*stage2.stage1.parameters(), *stage2.text.parameters()]
    assert not any(p.requires_grad for p in frozen)


# --- the switches of later work ---------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "spectral"])
@pytest.mark.parametrize("stage", [1, 2])
def test_r1_is_the_squared_gradient_on_real_pictures(
    norm: str, stage: int, make: Make, shapes: CaptionedDataset
) -> None:
    """One row at a time, in evaluation mode, where rows do not meet in the batch norm; each penalty
    counts for all steps that have none."""
    system = make(stage, norm=norm, r1_weight=0.3, r1_every=2).eval()
    disc, batch = system.discriminator, batch_of(shapes)
    mu, squares = generated_by(system, batch).mu.detach(), []
    for i in range(B):
        side = system.size
        image = F.interpolate(batch.image[i : i + 1], (side, side), mode="area").requires_grad_()
        disc.cond_logits(disc.features(image), mu[i : i + 1]).sum().backward(inputs=[image])
        assert image.grad is not None
        squares.append(image.grad.square().sum().item())
    r1 = terms_of(system, batch)["discriminator"]["r1"]
    assert r1.item() == pytest.approx(2 * 0.3 / 2 * sum(squares) / B, rel=1e-4)
    gradient = torch.autograd.grad(r1, list(disc.encode_img.parameters()))
    assert all(torch.isfinite(g).all() for g in gradient) and any(g.any() for g in gradient)
    assert not batch.image.requires_grad


@pytest.mark.parametrize("switches", [{}, {"norm": "spectral"}, {"augment": True}], ids=str)
def test_r1_comes_every_few_steps_and_its_count_is_saved(
    switches: dict[str, Any], make: Make, shapes: CaptionedDataset
) -> None:
    """Otherwise a resumed run would take its penalties in other steps."""
    changes, batch = {"r1_weight": 0.3, "r1_every": 3, **switches}, batch_of(shapes)
    system, resumed = make(2, **changes), make(2, **changes)

    def penalised(one: StackGANStage) -> bool:
        terms = terms_of(one, batch)["discriminator"]
        assert all(torch.isfinite(term) for term in terms.values())
        return "r1" in terms

    assert [penalised(system) for _ in range(7)] == [True, False, False, True, False, False, True]
    resumed.load_state_dict(system.state_dict())
    assert [penalised(resumed) for _ in range(3)] == [False, False, True]
    assert not penalised(make(2, **switches))


@pytest.mark.parametrize(
    "switches",
    [
        {"loss": "hinge"},
        {"norm": "spectral"},
        {"augment": True},
        {"disc_condition": "sentence"},
        {"loss": "hinge", "norm": "spectral", "augment": True, "r1_weight": 1.0, "r1_every": 2},
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
    values = trainer.advance(trainer.loader.at(2))
    assert all(torch.isfinite(value).all() for value in values.values()), values
    assert torch.isfinite(system.generate(CAPTIONS)).all()
    batch_norms = [m for m in system.discriminator.modules() if isinstance(m, nn.BatchNorm2d)]
    assert bool(batch_norms) == (switches.get("norm") != "spectral")


def test_the_discriminators_pictures_are_augmented_and_samples_are_not(
    make: Make, shapes: CaptionedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real and generated pictures alike, or the holes would tell them apart."""
    augmented: list[Tensor] = []
    encoded: list[Tensor] = []
    monkeypatch.setattr(
        stackgan, "diff_augment", lambda image: augmented.append(image) or image * 0
    )
    system, batch = make(2, augment=True), batch_of(shapes)
    features = system.discriminator.features
    monkeypatch.setattr(
        system.discriminator, "features", lambda image: encoded.append(image) or features(image)
    )
    list(turns(system, batch))
    assert len(augmented) == 2 and any(torch.equal(image, batch.image) for image in augmented)
    assert len(encoded) == 3 and not any(image.any() for image in encoded)
    augmented.clear()
    list(turns(make(2), batch))
    system.generate(CAPTIONS)
    assert augmented == []


def test_the_penalty_is_taken_at_real_pictures_through_their_augmentation(
    make: Make, shapes: CaptionedDataset
) -> None:
    """The gradient with respect to the picture as it is, of the logit of the augmented picture."""
    system = make(2, norm="spectral", augment=True, r1_weight=0.7, r1_every=1).eval()
    disc, batch = system.discriminator, batch_of(shapes)
    generated = generated_by(system, batch)
    torch.manual_seed(5)
    turn = next(turns(system, batch))
    torch.manual_seed(5)
    diff_augment(generated.image)  # comes first in the step too
    image = batch.image.clone().requires_grad_()
    logits = disc.cond_logits(disc.features(diff_augment(image)), generated.mu.detach())
    (gradient,) = torch.autograd.grad(logits.sum(), image)
    expected = 0.7 / 2 * gradient.square().sum((1, 2, 3)).mean()
    assert expected > 0
    torch.testing.assert_close(turn.terms["r1"], expected)


# --- sampling ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage2(make: Make) -> StageTwo:
    return make(2)  # type: ignore[no-any-return]


def differ(one: Tensor, other: Tensor) -> Tensor:
    """(B,) largest difference of two pictures."""
    return (one - other).abs().flatten(1).amax(1)


def test_without_noise_a_caption_has_one_picture(stage2: StageTwo) -> None:
    """For every seed and row; with noise there are many."""
    captions = ["a red circle"] * 3
    pictures = [stage2.generate(captions, seed=seed, truncation=0.0) for seed in (0, 1)]
    assert differ(pictures[0], pictures[1]).max() < 1e-5
    assert differ(pictures[0], pictures[0][:1]).max() < 1e-5
    assert differ(pictures[0], stage2.generate(["a blue star"], truncation=0.0)).max() > 1e-3
    full, little = (stage2.generate(captions, truncation=factor) for factor in (1.0, 0.1))
    assert differ(full[1:], full[:1]).min() > 1e-3
    assert differ(little[1:], little[:1]).mean() < differ(full[1:], full[:1]).mean()


def test_interpolation_ends_at_both_captions(stage2: StageTwo) -> None:
    """From the same noise, so that only the caption changes on the way."""
    one, other = ["a red circle"] * 2, ["a blue square above a green triangle"] * 2
    ends = [stage2.generate(captions, seed=3) for captions in (one, other)]
    way = [
        stage2.generate(one, seed=3, interpolate_to=other[0], interpolate_share=share)
        for share in (0.0, 0.5, 1.0)
    ]
    assert differ(way[0], ends[0]).max() < 1e-6 and differ(way[2], ends[1]).max() < 1e-6
    assert differ(way[1], ends[0]).min() > 1e-3 and differ(way[1], ends[1]).min() > 1e-3


def test_noise_moves_from_one_picture_to_another(stage2: StageTwo) -> None:
    default = stage2.generate(CAPTIONS, seed=3)
    assert torch.equal(stage2.generate(CAPTIONS, seed=3, noise_share=0.0), default)
    near, far = (stage2.generate(CAPTIONS, seed=3, noise_share=share) for share in (0.05, 1.0))
    assert differ(far, default).min() > 1e-3
    assert differ(near, default).mean() < differ(far, default).mean()


def test_interpolated_noise_keeps_its_variance() -> None:
    """On a quarter circle: the end is other noise, the middle an equal mixture of both."""
    noise = [stackgan.interpolated_noise(NoiseStreams(range(200)), (7, 5), s) for s in (0, 0.5, 1)]
    start, middle, end = (torch.cat(parts, dim=1) for parts in noise)
    streams = NoiseStreams(range(200))
    first, second = (torch.cat([streams.randn(7), streams.randn(5)], dim=1) for _ in range(2))
    assert torch.equal(start, first)
    torch.testing.assert_close(end, second)
    torch.testing.assert_close(middle, (first + second) / 2**0.5)
    assert middle.std().item() == pytest.approx(1, abs=0.05)


def test_stage_one_can_be_drawn(make: Make) -> None:
    """`stage=1` gives the picture that stage II started from, every pixel as a square."""
    stage1, stage2 = make(1), make(2)  # the same seed, so stage I is the same
    small = stage1.generate(CAPTIONS, seed=3)
    pictures = stage2.generate(CAPTIONS, seed=3, stage=1)
    expected = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(pictures, expected, atol=1e-6, rtol=0)
    assert differ(pictures, stage2.generate(CAPTIONS, seed=3)).min() > 1e-3
    with pytest.raises(UserError, match="stage=3 must be 1 or 2"):
        stage2.generate(CAPTIONS, stage=3)


def test_options_are_documented(stage2: StageTwo) -> None:
    options = stage2.options()
    assert list(options) == [
        "truncation",
        "interpolate_to",
        "interpolate_share",
        "noise_share",
        "stage",
    ]
    assert all(option.sentence for option in options.values())


# --- recipes ----------------------------------------------------------------------------------

PAPER = {
    "optim.name": "adam",
    "optim.lr": 2e-4,
    "optim.beta1": 0.5,
    "optim.beta2": 0.999,
    "optim.weight_decay": 0.0,
    "optim.warmup": 0,
    "optim.decay": "linear",
    "optim.grad_clip": 0.0,
    "optim.ema_decay": 0.0,
    "model.kl_weight": 2.0,
    "model.loss": "log",
    "model.r1_weight": 0.0,
    "model.norm": "batch",
    "model.augment": False,
    "model.disc_condition": "mu",
}
"""Section 4.2 and the authors' code."""

MODERN = {
    **{
        f"optim.{name}": value
        for name, value in to_dict(recipe._MODERN).items()
        if name != "lr_multipliers"
    },
    **{f"model.{name}": value for name, value in recipe._SWITCHES.items()},
}
"""The recipe that was measured to work; its numbers are read, not typed."""

RECIPES = {"paper": PAPER, "modern": MODERN}


def flat(config: Any) -> dict[str, Any]:
    """Settings by dotted name."""
    saved = to_dict(config)
    return {f"{g}.{n}": v for g in ("optim", "model") for n, v in saved[g].items()}


@pytest.mark.parametrize("preset_name", list(recipe.PRESETS))
@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipe_sets_all_switches_and_rates(name: str, preset_name: str) -> None:
    """And no size: two recipes are compared on the same networks and the same budget."""
    before: Any = preset("stackgan", preset_name)
    config: Any = runs.configure("stackgan", preset_name=preset_name, settings={"recipe": name})
    assert config.recipe == name
    if name == before.recipe:
        assert config == before  # the preset's own rates stand
        return
    settings, recipe_settings = flat(config), RECIPES[name]
    assert {field: settings[field] for field in recipe_settings} == recipe_settings
    for field, value in flat(before).items():
        assert field in recipe_settings or settings[field] == value, field
    assert config.train == before.train and config.encoder == before.encoder


def test_a_recipe_undoes_the_other() -> None:
    """Each sets every switch that the other sets."""
    assert PAPER.keys() == MODERN.keys()
    config = recipe.PRESETS["tiny"]
    assert config.with_recipe("paper").with_recipe("modern") == config.with_recipe("modern")


@pytest.mark.parametrize("name", list(RECIPES))
@pytest.mark.parametrize("last", [True, False])
def test_single_switches_beside_a_recipe_win(name: str, last: bool) -> None:
    """In every order, so that each change can be tried alone."""
    single = {
        "model.r1_weight": "0.7",
        "model.loss": "hinge",
        "optim.lr": "3e-4",
        "model.augment": "true",
    }
    settings = {"recipe": name, **single} if last else {**single, "recipe": name}
    values = flat(runs.configure("stackgan", preset_name="tiny", settings=settings))
    expected = {
        "model.r1_weight": 0.7,
        "model.loss": "hinge",
        "optim.lr": 3e-4,
        "model.augment": True,
    }
    for field, value in {**RECIPES[name], **expected}.items():
        assert values[field] == value, field


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(UserError, match=r"recipe='modren'.*'modern'"):
        runs.configure("stackgan", preset_name="tiny", settings={"recipe": "modren"})


@pytest.mark.parametrize("shares", ["0.5,0.5", "0.5,0.6,-0.1", "0.2,0.2,0.2"])
def test_shares_that_do_not_sum_to_one_are_refused(shares: str) -> None:
    with pytest.raises(UserError, match="three shares above 0 that sum to 1"):
        runs.configure("stackgan", preset_name="smoke", settings={"shares": shares})


def test_presets_state_their_recipe() -> None:
    """The preset `paper` is the paper's in every switch and rate."""
    named = {name: config.recipe for name, config in recipe.PRESETS.items()}
    assert named == {"smoke": "modern", "tiny": "modern", "small": "modern", "paper": "paper"}
    paper = recipe.PRESETS["paper"]
    assert paper.with_recipe("paper") == paper
    tiny = recipe.PRESETS["tiny"]
    assert tiny.with_recipe("modern") == tiny
