"""`gan_int_cls`: the step against the paper's logarithms, pairs, penalty and sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lineage import runs
from lineage.cgan.gan_int_cls import GANConfig, GanIntCls, Generator, dcgan_channels
from lineage.config import TextConfig
from lineage.data.contract import Batch, CaptionedDataset
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.system import Turn
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import WordTokenizer

B = 4
TINY = GANConfig(z_dim=8, text_dim=8, gen_channels=4, disc_channels=4)


def make(tokenizer: WordTokenizer, **changes: Any) -> GanIntCls:
    torch.manual_seed(0)
    text = make_encoder("bag", TextConfig(width=8), tokenizer)
    return GanIntCls(replace(TINY, **changes), text, 16)


def batch_of(shapes: CaptionedDataset, captions: list[str] | None = None) -> Batch:
    batch = shapes.batch(range(B), [0] * B, 0)
    return Batch(batch.image, captions or batch.caption, None, batch.id)


def turns(system: GanIntCls, batch: Batch) -> Iterator[Turn]:
    text = system.text.encode(batch.caption)
    return system.losses(batch, text, NoiseStreams(range(len(batch))))


def terms_of(system: GanIntCls, batch: Batch) -> dict[str, Any]:
    """Loss terms of a step, by group."""
    return {turn.group: turn.terms for turn in turns(system, batch)}


# --- algorithm 1 ------------------------------------------------------------------------------


def probabilities(system: GanIntCls, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """s_r, s_w and s_f of algorithm 1, in evaluation mode, where rows do not meet."""
    x, h = batch.image, system.text.encode(batch.caption).sentence
    x_fake = system.generator(NoiseStreams(range(B)).randn(8), h)
    logits = (system.discriminator(*pair) for pair in ((x, h), (x, h[[3, 0, 1, 2]]), (x_fake, h)))
    s_r, s_w, s_f = (s.detach().double().sigmoid() for s in logits)
    return s_r, s_w, s_f


def test_the_discriminator_minimises_line_10(
    shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """- [log s_r + (log(1 - s_w) + log(1 - s_f)) / 2], on probabilities."""
    system = make(tokenizer).eval()
    batch = batch_of(shapes, ["a red circle", "a blue square", "a green star", "a ring"])
    s_r, s_w, s_f = probabilities(system, batch)
    terms = terms_of(system, batch)["discriminator"]
    paper = -(s_r.log() + ((1 - s_w).log() + (1 - s_f).log()) / 2).mean()
    assert sum(terms.values()).item() == pytest.approx(paper.item(), rel=1e-5)
    assert terms["real"].item() == pytest.approx(-s_r.log().mean().item(), rel=1e-5)
    assert terms["wrong"].item() == pytest.approx(-(1 - s_w).log().mean().item() / 2, rel=1e-5)
    assert terms["fake"].item() == pytest.approx(-(1 - s_f).log().mean().item() / 2, rel=1e-5)


def test_the_generator_minimises_line_12(
    shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    system, batch = make(tokenizer, interpolation_weight=0.0).eval(), batch_of(shapes)
    _, _, s_f = probabilities(system, batch)
    terms = terms_of(system, batch)["generator"]
    assert list(terms) == ["cond"]
    assert terms["cond"].item() == pytest.approx(-s_f.log().mean().item(), rel=1e-5)


def test_a_mismatched_caption_with_the_same_words_does_not_count(
    shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """Two pictures of a red circle: either caption fits both. Row 0 takes the last caption."""
    system, red, blue = make(tokenizer).eval(), "a red circle", "a blue square"
    batch = batch_of(shapes, [red, red, blue, blue])
    _, s_w, _ = probabilities(system, batch)
    loss = -(1 - s_w).log()
    terms = terms_of(system, batch)["discriminator"]
    assert terms["wrong"].item() == pytest.approx((loss[0] + loss[2]).item() / 2 / 2, rel=1e-5)
    terms = terms_of(system, batch_of(shapes, [red] * B))["discriminator"]
    assert terms["wrong"] == 0 and all(torch.isfinite(term) for term in terms.values())


@pytest.mark.parametrize(("bias", "expected"), [(1e3, 1e3), (-1e3, 1e3)])
def test_large_logits_give_finite_losses(
    bias: float, expected: float, shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """log(sigmoid(-1000)) is minus infinity; softplus(1000) is 1000."""
    system = make(tokenizer, interpolation_weight=0.0)
    torch.nn.init.constant_(system.discriminator.cond_head[-1].bias, bias)
    captions = ["a red circle", "a blue square", "a green star", "a ring"]
    terms = terms_of(system, batch_of(shapes, captions))
    assert sum(terms["discriminator"].values()).item() == pytest.approx(expected, rel=0.02)
    assert terms["generator"]["cond"].item() == pytest.approx(max(0, -bias), rel=0.02)


def test_the_three_pairs_are_those_of_the_paper(
    shapes: CaptionedDataset, tokenizer: WordTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real with its caption, real with another's, generated with its caption; then the generator's.
    Real pictures are encoded once for both captions."""
    system, calls = make(tokenizer, interpolation_weight=0.0), []
    batch = batch_of(shapes, ["a red circle", "a blue square", "a green star", "a ring"])
    original = system.discriminator.cond_logits

    def cond_logits(features: Tensor, h: Tensor) -> Tensor:
        calls.append((features, h))
        return original(features, h)

    monkeypatch.setattr(system.discriminator, "cond_logits", cond_logits)
    list(turns(system, batch))
    h = system.text.encode(batch.caption).sentence
    assert len(calls) == 4 and torch.equal(calls[0][0], calls[1][0])
    for (_, used), expected in zip(calls, (h, h[[3, 0, 1, 2]], h, h), strict=True):
        torch.testing.assert_close(used, expected)


# --- turns ------------------------------------------------------------------------------------


def record_sentences(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The sentences of every forward pass of a generator."""
    calls: list[Tensor] = []
    original = Generator.forward

    def forward(self: Generator, z: Tensor, h: Tensor) -> Tensor:
        calls.append(h)
        return original(self, z, h)

    monkeypatch.setattr(Generator, "forward", forward)
    return calls


@pytest.mark.parametrize(("weight", "expected"), [(0.0, 1), (0.5, 2)])
def test_pictures_are_generated_once(
    weight: float,
    expected: int,
    shapes: CaptionedDataset,
    tokenizer: WordTokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once for both turns, and once more for mixed captions, if they have a weight."""
    calls = record_sentences(monkeypatch)
    terms = terms_of(make(tokenizer, interpolation_weight=weight), batch_of(shapes))
    assert len(calls) == expected
    assert list(terms["generator"]) == ["cond", "interpolated"][:expected]


def test_mixed_captions_are_half_way(
    shapes: CaptionedDataset, tokenizer: WordTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equation 5 with beta = 1/2; its weight scales its own term alone."""
    calls = record_sentences(monkeypatch)
    batch = batch_of(shapes)
    full, quarter = (
        terms_of(make(tokenizer, interpolation_weight=w), batch)["generator"] for w in (1.0, 0.25)
    )
    torch.testing.assert_close(calls[1], (calls[0] + calls[0].roll(1, 0)) / 2)
    torch.testing.assert_close(quarter["interpolated"], 0.25 * full["interpolated"])
    torch.testing.assert_close(quarter["cond"], full["cond"])


def test_gradients_stay_in_their_turn(shapes: CaptionedDataset, tokenizer: WordTokenizer) -> None:
    """The discriminator's loss must not reach the generator, and no loss the trained text."""
    system = make(tokenizer)
    steps = turns(system, batch_of(shapes))
    turn = next(steps)
    assert turn.group == "discriminator"
    sum(turn.terms.values()).backward()
    assert all(p.grad is None for p in system.generator.parameters())
    assert all(p.grad is not None for p in system.discriminator.parameters())
    assert all(p.grad is None and not p.requires_grad for p in system.text.parameters())
    system.zero_grad(set_to_none=True)
    turn = next(steps)
    assert turn.group == "generator"
    sum(turn.terms.values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in system.generator.parameters())
    assert all(p.grad is None for p in system.text.parameters())


def test_the_generator_takes_the_updated_discriminator(
    shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """A change of the discriminator between the two turns must show in the second."""
    batch, values = batch_of(shapes), []
    for change in (0.0, 0.5):
        system = make(tokenizer)
        steps = turns(system, batch)
        next(steps)
        with torch.no_grad():
            for parameter in system.discriminator.cond_head.parameters():
                parameter.add_(change)
        values.append(next(steps).terms["cond"].item())
    assert values[0] != values[1]


# --- the penalty ------------------------------------------------------------------------------


def test_r1_is_the_squared_gradient_on_real_pictures(
    shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """Mescheder et al., equation 9, against autograd one row at a time (in evaluation mode, where
    rows do not meet in the batch norm)."""
    system = make(tokenizer, r1_weight=0.3, r1_every=2).eval()
    batch = batch_of(shapes)
    h = system.text.encode(batch.caption).sentence
    squares = []
    for i in range(B):
        image = batch.image[i : i + 1].clone().requires_grad_()
        system.discriminator(image, h[i : i + 1]).sum().backward(inputs=[image])
        squares.append(image.grad.square().sum().item())
    r1 = terms_of(system, batch)["discriminator"]["r1"]
    assert r1.item() == pytest.approx(2 * 0.3 / 2 * sum(squares) / B, rel=1e-4)
    gradient = torch.autograd.grad(
        r1, list(system.discriminator.encode_img.parameters()), allow_unused=True
    )
    assert any(g is not None and g.any() for g in gradient)
    assert not batch.image.requires_grad


def test_r1_comes_every_few_steps_and_its_count_is_saved(
    shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """Otherwise a resumed run would take its penalties in other steps."""
    system, batch = make(tokenizer, r1_weight=0.3, r1_every=3), batch_of(shapes)
    penalised = ["r1" in terms_of(system, batch)["discriminator"] for _ in range(7)]
    assert penalised == [True, False, False, True, False, False, True]
    resumed = make(tokenizer, r1_weight=0.3, r1_every=3)
    resumed.load_state_dict(system.state_dict())
    penalised = ["r1" in terms_of(resumed, batch)["discriminator"] for _ in range(3)]
    assert penalised == [False, False, True]
    assert "r1" not in terms_of(make(tokenizer), batch)["discriminator"]


# --- sizes ------------------------------------------------------------------------------------


def test_channels_double_up_to_eight_times() -> None:
    assert dcgan_channels(64, 64) == [64, 128, 256, 512]  # the DCGAN of the paper
    assert dcgan_channels(4, 8) == [4]
    assert dcgan_channels(4, 256) == [4, 8, 16, 32, 32, 32]


@pytest.mark.parametrize("size", [4, 2, 0, 12, 24, 63, 65])
def test_impossible_sides_are_refused(size: int) -> None:
    with pytest.raises(UserError, match=f"size={size}"):
        dcgan_channels(4, size)


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_all_powers_of_two_work(size: int, tokenizer: WordTokenizer) -> None:
    text = make_encoder("bag", TextConfig(width=8), tokenizer)
    system = GanIntCls(TINY, text, size)
    pictures = system.generate(["a red circle", ""])
    assert pictures.shape == (2, 3, size, size)
    assert system.discriminator(pictures, text.null(2).sentence).shape == (2,)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r1_every", 0),
        ("r1_weight", -0.1),
        ("z_dim", -1),
        ("text_dim", 0),
        ("gen_channels", 0),
        ("interpolation_weight", -1.0),
    ],
)
def test_impossible_settings_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"model\.{name}="):
        runs.configure("gan_int_cls", preset_name="smoke", settings={f"model.{name}": value})


def test_truncation_scales_the_noise(tokenizer: WordTokenizer) -> None:
    system = make(tokenizer)
    same = system.generate(["a red circle"] * 4, truncation=0.0)
    assert (same - same[:1]).abs().max() < 1e-6
    varied = system.generate(["a red circle"] * 4)
    assert (varied - varied[:1]).abs().max() > 1e-4


def test_initial_weights_are_the_dcgans(tokenizer: WordTokenizer) -> None:
    """Kernels from N(0, 0.02), norm scales from N(1, 0.02): with torch's, GANs often fail."""
    system = make(tokenizer, gen_channels=32, disc_channels=32)
    for network in (system.generator, system.discriminator):
        for layer in network.modules():
            if (
                isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d)
                and layer.weight.numel() > 4000
            ):
                assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
            if isinstance(layer, torch.nn.BatchNorm2d):
                assert layer.weight.mean().item() == pytest.approx(1, abs=0.02)
                assert not layer.bias.any()
