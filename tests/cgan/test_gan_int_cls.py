"""`gan_int_cls`: losses against the paper's logarithms, pairs, penalty and widths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lineage.cgan import gan_int_cls
from lineage.cgan.gan_int_cls import (
    GANConfig,
    GanIntCls,
    Generator,
    discriminator_terms,
    generator_terms,
    widths,
)
from lineage.config import TextConfig
from lineage.data.contract import Batch, CaptionedDataset
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import WordTokenizer

B = 4
TINY = GANConfig(noise=8, text=8, generator=4, discriminator=4)


def logits(seed: int) -> Tensor:
    return 3 * torch.randn(B, generator=torch.Generator().manual_seed(seed))


def make(tokenizer: WordTokenizer, **changes: Any) -> GanIntCls:
    torch.manual_seed(0)
    config = GANConfig(**{**vars(TINY), **changes})
    return GanIntCls(config, make_encoder("bag", TextConfig(width=8), tokenizer), 16)


def batch_of(shapes: CaptionedDataset, captions: list[str] | None = None) -> Batch:
    batch = shapes.batch(range(B), [0] * B, 0)
    return Batch(batch.image, captions or batch.caption, None, batch.id)


def turns(system: GanIntCls, batch: Batch) -> dict[str, dict[str, Tensor]]:
    text = system.text.encode(batch.caption)
    return dict(system.losses(batch, text, NoiseStreams(range(len(batch)))))


# --- losses -----------------------------------------------------------------------------------


def test_the_discriminator_minimises_line_12() -> None:
    """- [log s_r + (log(1 - s_w) + log(1 - s_f)) / 2], on probabilities, row by row."""
    real, wrong, fake = logits(0), logits(1), logits(2)
    s_r, s_w, s_f = (x.sigmoid().tolist() for x in (real, wrong, fake))
    terms = discriminator_terms(real, wrong, fake, torch.ones(B))
    log = lambda p: torch.tensor(p, dtype=torch.float64).log().item()  # noqa: E731
    paper = sum(log(s_r[i]) + (log(1 - s_w[i]) + log(1 - s_f[i])) / 2 for i in range(B))
    assert sum(terms.values()).item() == pytest.approx(-paper / B, rel=1e-5)
    assert terms["real"].item() == pytest.approx(-sum(map(log, s_r)) / B, rel=1e-5)
    assert terms["wrong"].item() == pytest.approx(-sum(log(1 - p) for p in s_w) / B / 2, rel=1e-5)
    assert terms["fake"].item() == pytest.approx(-sum(log(1 - p) for p in s_f) / B / 2, rel=1e-5)


def test_the_generator_minimises_line_14() -> None:
    fake = logits(0)
    assert generator_terms(fake).item() == pytest.approx(
        -fake.sigmoid().log().mean().item(), rel=1e-5
    )


def test_a_sure_judge_gives_finite_losses() -> None:
    """log(sigmoid(-200)) is minus infinity; softplus(200) is 200."""
    sure = torch.full((B,), 200.0)
    assert generator_terms(-sure).item() == pytest.approx(200)
    terms = discriminator_terms(-sure, sure, sure, torch.ones(B))
    assert sum(terms.values()).item() == pytest.approx(400)


def test_a_wrong_caption_that_is_right_does_not_count() -> None:
    """Two pictures of a red circle: neither caption is wrong for the other."""
    real, wrong, fake = logits(0), logits(1), logits(2)
    mismatched = torch.tensor([1.0, 0.0, 0.0, 1.0])
    terms = discriminator_terms(real, wrong, fake, mismatched)
    rejected = -(1 - wrong.sigmoid()).log()
    assert terms["wrong"].item() == pytest.approx(
        (rejected[0] + rejected[3]).item() / 2 / 2, rel=1e-5
    )
    none = discriminator_terms(real, wrong, fake, torch.zeros(B))
    assert none["wrong"] == 0 and torch.isfinite(sum(none.values()))
    assert torch.equal(none["real"], terms["real"]) and torch.equal(none["fake"], terms["fake"])


def test_wrong_pairs_are_masked_in_training(
    shapes: CaptionedDataset, tokenizer: WordTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mask is of this row and the one whose caption it got."""
    given: list[Tensor] = []
    original = discriminator_terms

    def watched(real: Tensor, wrong: Tensor, fake: Tensor, mismatched: Tensor) -> Any:
        given.append(mismatched)
        return original(real, wrong, fake, mismatched)

    monkeypatch.setattr(gan_int_cls, "discriminator_terms", watched)
    red, blue = "a red circle", "a blue square"
    turns(make(tokenizer), batch_of(shapes, [red, red, blue, blue]))
    assert given[0].tolist() == [1.0, 0.0, 1.0, 0.0]
    turns(make(tokenizer), batch_of(shapes, [red] * B))
    assert given[1].tolist() == [0.0] * B


def test_the_three_pairs_are_those_of_the_paper(
    shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """Real with its caption, real with another's, fake with its caption; then the generator's."""
    system, seen = make(tokenizer, interpolation=0.0), []
    batch = batch_of(shapes, ["a red circle", "a blue square", "a green star", "a ring"])
    original = system.discriminator.score

    def score(features: Tensor, sentence: Tensor) -> Tensor:
        seen.append((features, sentence))
        return original(features, sentence)

    system.discriminator.score = score  # type: ignore[method-assign]
    text = system.text.encode(batch.caption)
    list(system.losses(batch, text, NoiseStreams(range(B))))
    right, wrong = text.sentence, text.sentence[[3, 0, 1, 2]]
    assert len(seen) == 4
    assert torch.equal(seen[0][0], seen[1][0])  # looked at once, judged twice
    for (_, sentence), expected in zip(seen, (right, wrong, right, right), strict=True):
        torch.testing.assert_close(sentence, expected)


# --- turns ------------------------------------------------------------------------------------


def count_generator(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The sentences of every forward pass of a generator."""
    calls: list[Tensor] = []
    original = Generator.forward

    def forward(self: Generator, noise: Tensor, sentence: Tensor) -> Tensor:
        calls.append(sentence)
        return original(self, noise, sentence)

    monkeypatch.setattr(Generator, "forward", forward)
    return calls


@pytest.mark.parametrize(("weight", "expected"), [(0.0, 1), (0.5, 2)])
def test_the_fake_is_computed_once(
    weight: float,
    expected: int,
    shapes: CaptionedDataset,
    tokenizer: WordTokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once for both turns, and once more for mixed captions where these count."""
    calls = count_generator(monkeypatch)
    terms = turns(make(tokenizer, interpolation=weight), batch_of(shapes))
    assert len(calls) == expected
    assert list(terms["generator"]) == ["right", "between"][:expected]


def test_mixed_captions_lie_half_way(
    shapes: CaptionedDataset, tokenizer: WordTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equation 5 with beta = 1/2; its weight scales the term and nothing else."""
    calls = count_generator(monkeypatch)
    batch = batch_of(shapes)
    terms = {w: turns(make(tokenizer, interpolation=w), batch)["generator"] for w in (1.0, 0.25)}
    right = calls[0]
    torch.testing.assert_close(calls[1], (right + right.roll(1, 0)) / 2)
    torch.testing.assert_close(terms[0.25]["between"], 0.25 * terms[1.0]["between"])
    torch.testing.assert_close(terms[0.25]["right"], terms[1.0]["right"])


def test_gradients_stay_in_their_turn(shapes: CaptionedDataset, tokenizer: WordTokenizer) -> None:
    """The discriminator's loss must not reach the generator, nor any loss the text, which was
    trained beforehand."""
    system = make(tokenizer)
    batch = batch_of(shapes)
    steps = system.losses(batch, system.text.encode(batch.caption), NoiseStreams(range(B)))
    name, terms = next(steps)
    assert name == "discriminator"
    sum(terms.values()).backward()
    assert all(p.grad is None for p in system.generator.parameters())
    assert all(p.grad is not None for p in system.discriminator.parameters())
    assert all(p.grad is None and not p.requires_grad for p in system.text.parameters())
    system.zero_grad(set_to_none=True)
    name, terms = next(steps)
    assert name == "generator"
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in system.generator.parameters())
    assert all(p.grad is None for p in system.text.parameters())


def test_the_generator_sees_the_updated_discriminator(
    shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """What the loop does to D between the two turns must show in the second."""
    batch, found = batch_of(shapes), []
    for change in (0.0, 0.5):
        system = make(tokenizer)
        steps = system.losses(batch, system.text.encode(batch.caption), NoiseStreams(range(B)))
        next(steps)
        with torch.no_grad():
            for parameter in system.discriminator.judge.parameters():
                parameter.add_(change)
        found.append(next(steps)[1]["right"].item())
    assert found[0] != found[1]


# --- the penalty ------------------------------------------------------------------------------


def test_r1_is_the_squared_gradient_on_real_pictures(
    shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """Mescheder et al., equation 9, against autograd one row at a time (in eval mode, where rows
    do not meet in the batch norm)."""
    system = make(tokenizer, r1=0.3, r1_every=2).eval()
    batch = batch_of(shapes)
    text = system.text.encode(batch.caption)
    squares = []
    for i in range(B):
        image = batch.image[i : i + 1].clone().requires_grad_()
        system.discriminator(image, text.sentence[i : i + 1]).sum().backward(inputs=[image])
        squares.append(image.grad.square().sum().item())
    (_, terms), _ = system.losses(batch, text, NoiseStreams(range(B)))
    assert terms["r1"].item() == pytest.approx(2 * 0.3 / 2 * sum(squares) / B, rel=1e-4)
    assert terms["r1"].requires_grad
    gradient = torch.autograd.grad(
        terms["r1"], list(system.discriminator.look.parameters()), allow_unused=True
    )
    assert any(g is not None and g.any() for g in gradient)


def test_r1_comes_every_so_many_steps_and_its_count_is_saved(
    shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """A resumed run would else take its penalties at other steps."""
    system, batch = make(tokenizer, r1=0.3, r1_every=3), batch_of(shapes)
    taken = ["r1" in turns(system, batch)["discriminator"] for _ in range(7)]
    assert taken == [True, False, False, True, False, False, True]
    again = make(tokenizer, r1=0.3, r1_every=3)
    again.load_state_dict(system.state_dict())
    taken = ["r1" in turns(again, batch)["discriminator"] for _ in range(3)]
    assert taken == [False, False, True]
    assert "r1" not in turns(make(tokenizer), batch)["discriminator"]


# --- sizes ------------------------------------------------------------------------------------


def test_widths_double_up_to_eight_times() -> None:
    assert widths(64, 64) == [64, 128, 256, 512]  # the DCGAN of the paper
    assert widths(4, 8) == [4]
    assert widths(4, 256) == [4, 8, 16, 32, 32, 32]


@pytest.mark.parametrize("size", [4, 2, 0, 12, 24, 63, 65])
def test_sides_that_cannot_be_are_told(size: int) -> None:
    with pytest.raises(UserError, match=f"size={size}"):
        widths(4, size)


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_every_side_that_can_be_works(size: int, tokenizer: WordTokenizer) -> None:
    text = make_encoder("bag", TextConfig(width=8), tokenizer)
    system = GanIntCls(TINY, text, size)
    pictures = system.generate(["a red circle", ""])
    assert pictures.shape == (2, 3, size, size)
    assert system.discriminator(pictures, text.null(2).sentence).shape == (2,)


@pytest.mark.parametrize(
    "change", [{"r1_every": 0, "r1": 1.0}, {"noise": -1}, {"generator": 0}], ids=str
)
def test_settings_that_cannot_be_are_told(
    change: dict[str, Any], shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """Each is reached by `--set model.NAME=...`."""
    with pytest.raises(UserError):
        turns(make(tokenizer, **change), batch_of(shapes))


def test_truncation_scales_the_noise(tokenizer: WordTokenizer) -> None:
    system = make(tokenizer)
    many = system.generate(["a red circle"] * 4, truncation=0.0)
    assert (many - many[:1]).abs().max() < 1e-6
    varied = system.generate(["a red circle"] * 4)
    assert (varied - varied[:1]).abs().max() > 1e-4


def test_weights_start_as_in_the_dcgan(tokenizer: WordTokenizer) -> None:
    """Kernels from N(0, 0.02), norm scales from N(1, 0.02): at torch's own, GANs often fail."""
    system = make(tokenizer, generator=32, discriminator=32)
    for part in (system.generator, system.discriminator):
        for layer in part.modules():
            if (
                isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d)
                and layer.weight.numel() > 4000
            ):
                assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
            if isinstance(layer, torch.nn.BatchNorm2d):
                assert layer.weight.mean().item() == pytest.approx(1, abs=0.02)
                assert not layer.bias.any()
