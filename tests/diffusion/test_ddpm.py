"""`ddpm`: its training step, the knobs of drawing, and that it learns eight pictures by heart."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lineage.config import OptimConfig, TextConfig, TrainConfig
from lineage.data.contract import Batch, CaptionedDataset
from lineage.diffusion.ddpm import DDPM, DDPMConfig
from lineage.diffusion.model import DenoiserConfig
from lineage.diffusion.networks.unet import UNetConfig
from lineage.diffusion.process import PREDICTIONS, ProcessConfig
from lineage.diffusion.samplers import SAMPLERS, ddim
from lineage.diffusion.samplers.k_diffusion import Denoise, Estimate
from lineage.diffusion.schedules import SPACINGS, Point
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.text.contract import TextFeatures
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import WordTokenizer
from lineage.training.loop import Trainer

UNET = UNetConfig(16, (1, 2), blocks=1, attention=(1,), heads=2, patch=2, dropout=0.0)
FAST = UNetConfig(32, (1,), blocks=1, attention=(0,), heads=2, patch=4, dropout=0.0)
PROCESS = ProcessConfig(100, "cosine", "x0")
LINE = ProcessConfig(100, "flow", "flow")
CAPTIONS = ["a red circle", "a blue square above a green triangle"]


def system(
    tokenizer: WordTokenizer, process: ProcessConfig = PROCESS, moved: float = 0.0, **changes: Any
) -> DDPM:
    """A small system; `moved` takes its network away from the zero it starts at."""
    torch.manual_seed(0)
    config = DDPMConfig(**{"unet": UNET, "process": process, "steps": 10, **changes})
    one = DDPM(config, make_encoder("bag", TextConfig(width=16), tokenizer), 16).eval()
    with torch.no_grad():
        for parameter in one.network.parameters():
            parameter.add_(moved * torch.randn_like(parameter))
    return one


@pytest.fixture
def one(tokenizer: WordTokenizer) -> DDPM:
    """A system whose network says something."""
    return system(tokenizer, moved=0.05)


class Recorder(torch.nn.Module):
    """Stands in for the UNet and keeps what it was given."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(outputs))
        self.seen: list[tuple[Tensor, Tensor, TextFeatures]] = []

    def forward(self, noised: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        self.seen.append((noised, t, text))
        return torch.cat([scale * noised for scale in self.scale], dim=1)


class Asked:
    """Counts of rows, and times, that the network was asked at."""

    def __init__(self, one: DDPM) -> None:
        self.rows: list[int] = []
        self.times: list[float] = []
        one.network.register_forward_hook(self._note)

    def _note(self, module: Any, given: Any, out: Any) -> None:
        self.rows.append(len(given[0]))
        self.times.append(given[1][0].item())


def learn(one: DDPM, batch: Batch, steps: int = 40) -> list[dict[str, Tensor]]:
    """Terms of each step; the noise is the same at each, so that only learning can lower them."""
    one.train()
    optimizer = torch.optim.Adam(one.parameters(), lr=4e-3)
    seen = []
    for _ in range(steps):
        terms = step_of(one, batch)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        seen.append({name: value.detach() for name, value in terms.items()})
    return seen


def eight(shapes: CaptionedDataset) -> Batch:
    return shapes.batch(range(8), [0] * 8, 0)


def step_of(one: DDPM, batch: Batch, seed: int = 0) -> dict[str, Tensor]:
    """The terms of the one turn."""
    draws = NoiseStreams(range(seed, seed + len(batch)))
    ((name, terms),) = one.losses(batch, one.text.encode(batch.caption), draws)
    assert name == "denoiser"
    return terms


# --- training -------------------------------------------------------------------------------------


def test_captions_are_dropped_as_often_as_is_set(
    shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """Guidance compares with "no caption": never dropped, it compares with noise."""
    batch = shapes.batch(range(400), [0] * 400, 0)
    for share in (0.0, 0.25, 0.95):
        one = system(tokenizer, drop_text=share)
        recorder = one.network = Recorder()
        terms = step_of(one, batch)
        _, t, text = recorder.seen[0]
        null = one.text.null(1)
        dropped = text.mask.sum(1) == 1
        assert dropped.float().mean().item() == pytest.approx(share, abs=0.07 * (share > 0))
        expected = null.sentence.expand(int(dropped.sum()), -1)
        torch.testing.assert_close(text.sentence[dropped], expected)
        kept = one.text.encode(batch.caption).sentence[~dropped]
        torch.testing.assert_close(text.sentence[~dropped], kept)
        assert t.min() == 0 and t.max() == 99 and len(t.unique()) > 90
        assert list(terms) == ["mse_x0"]
        assert terms["mse_x0"].item() == pytest.approx(batch.image.square().mean().item(), rel=1e-5)


def test_pictures_are_noised_as_much_as_their_time_says(
    shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps, with eps that is normal and each row's own."""
    batch, one = shapes.batch(range(64), [0] * 64, 0), system(tokenizer)
    recorder = one.network = Recorder()
    step_of(one, batch)
    noised, t, _ = recorder.seen[0]
    share = (t.double() + 1) / 100
    abar = ((share + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    abar = (abar / math.cos(0.008 / 1.008 * math.pi / 2) ** 2)[:, None, None, None]
    eps = (noised - abar.sqrt() * batch.image) / (1 - abar).sqrt()
    inner = t < 99  # the last beta is clipped
    assert eps[inner].mean().item() == pytest.approx(0, abs=0.02)
    assert eps[inner].std().item() == pytest.approx(1, abs=0.02)
    assert eps.flatten(1).corrcoef().triu(1).abs().max() < 0.2


@pytest.mark.parametrize("prediction", ["noise", "x0", "v", "flow"])
def test_min_snr_weighs_by_the_ratio_of_signal_and_noise(
    prediction: str, shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """Hang et al., section 3.4: min(snr, 5) |x_0 - estimate|^2, whatever is predicted."""
    batch = eight(shapes)
    process = ProcessConfig(100, "cosine", prediction, "min_snr")
    one = system(tokenizer, process, drop_text=0.0)
    recorder = one.network = Recorder()
    with torch.no_grad():
        recorder.scale.fill_(0.3)
    found = step_of(one, batch)[f"mse_{prediction}"].item()
    noised, t, _ = recorder.seen[0]
    wanted = 0.0
    for row, level in zip(range(8), t.tolist(), strict=True):
        a, b = one.process.point(level).signal, one.process.point(level).noise
        estimate = {
            "noise": (1 - 0.3 * b) / a,
            "x0": 0.3,
            "v": a - 0.3 * b,
            "flow": (1 - 0.3 * b) / (a + b),
        }[prediction] * noised[row]
        error = (estimate - batch.image[row]).square().mean().item()
        wanted += min((a / b) ** 2, 5.0) * error / 8
    assert found == pytest.approx(wanted, rel=1e-3)


def test_a_row_of_the_loss_knows_nothing_of_the_others(shapes: CaptionedDataset, one: DDPM) -> None:
    """Time, dropped caption and noise are of its own stream, so the mean is that of single rows."""
    batch = eight(shapes)
    together = step_of(one, batch)["mse_x0"].item()
    alone = [step_of(one, row, seed)["mse_x0"].item() for seed, row in enumerate(batch.split(1))]
    assert together == pytest.approx(sum(alone) / 8, rel=1e-4)
    assert len({round(value, 6) for value in alone}) == 8


@pytest.mark.parametrize("text", ["bag", "transformer"])
def test_the_turn_moves_the_network_and_the_text(
    text: str, shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    encoder = make_encoder(text, TextConfig(width=16), tokenizer)
    one = DDPM(DDPMConfig(unet=UNET, process=PROCESS), encoder, 16)
    assert one.groups() == {"denoiser": [one.network, one.text]}
    optim = OptimConfig(warmup=0, weight_decay=0.0)
    trainer = Trainer(one, shapes, optim, TrainConfig(batch=8, precision="fp32", prefetch=0))
    before = {name: value.clone() for name, value in one.named_parameters()}
    for _ in range(4):  # what starts at zero passes gradients on once it has moved
        trainer.advance(eight(shapes))
    still = {name for name, value in one.named_parameters() if torch.equal(before[name], value)}
    assert still <= {"text.position"}  # nobody reads so far
    assert {name.split(".")[0] for name in before} == {"network", "text"}


LEARNT = [*((prediction, "cosine") for prediction in PREDICTIONS), ("v", "flow"), ("flow", "flow")]


@pytest.mark.parametrize(("prediction", "schedule"), LEARNT)
def test_each_prediction_learns_two_pictures_by_heart(
    prediction: str, schedule: str, shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    process = ProcessConfig(100, schedule, prediction)
    one = system(tokenizer, process, unet=FAST, drop_text=0.0)
    seen = learn(one, eight(shapes).split(2)[0])
    assert all(list(terms) == [f"mse_{prediction}"] for terms in seen)
    first, last = (terms[f"mse_{prediction}"].item() for terms in (seen[0], seen[-1]))
    assert last < 0.1 * first, (first, last)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_a_learnt_variance_has_a_term_of_its_own(
    variance: str, shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """The mean is held fixed in it, so it moves what the network says of variances, and no more."""
    one = system(tokenizer, replace(PROCESS, variance=variance), moved=0.02)
    assert one.network.leave.out_channels == 6 * UNET.patch**2
    terms = step_of(one, eight(shapes))
    assert list(terms) == ["mse_x0", "bound"]
    one.network = Recorder(2)
    for name, moves in (("mse_x0", [True, False]), ("bound", [False, True])):
        (gradient,) = torch.autograd.grad(step_of(one, eight(shapes))[name], one.network.scale)
        assert (gradient != 0).tolist() == moves, name


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_a_learnt_variance_is_learnt_and_drawn_with(
    variance: str, shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    process = replace(PROCESS, variance=variance)
    one = system(tokenizer, process, unet=FAST, drop_text=0.0, sampler="ddpm", steps=4)
    seen = learn(one, eight(shapes).split(2)[0])
    first, last = (terms["mse_x0"].item() for terms in (seen[0], seen[-1]))
    assert last < 0.1 * first, (first, last)
    assert min(terms["bound"] for terms in seen[-5:]) < seen[0]["bound"]
    for name in SAMPLERS:
        if name != "flow_euler":
            drawn = one.generate(CAPTIONS, sampler=name)
            assert drawn.shape == (2, 3, 16, 16) and torch.isfinite(drawn).all(), name
    drawn = one.generate(CAPTIONS)
    with torch.no_grad():  # the second half of the channels, and no more
        one.network.leave.bias[48:] += 1.0
    assert not torch.equal(one.generate(CAPTIONS), drawn)
    plain = one.generate(CAPTIONS, sampler="ddim")
    with torch.no_grad():
        one.network.leave.bias[48:] += 1.0
    assert torch.equal(one.generate(CAPTIONS, sampler="ddim"), plain)


class Caption(torch.nn.Module):
    """Says 0, with the large variance where there is a caption and with the small one elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(()))

    def forward(self, noised: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        share = 2.0 * (text.mask.sum(1) > 1)[:, None, None, None] - 1
        return torch.cat([0 * noised, share.expand_as(noised)], dim=1)


def test_a_guided_variance_is_that_of_the_caption(
    tokenizer: WordTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guidance is of the prediction."""
    process = replace(PROCESS, variance="learned_range")
    for variance in ("learned_range", "learned"):
        one = system(tokenizer, replace(process, variance=variance))
        one.network = Caption()
        (found, *_) = watched(one, monkeypatch, guidance=3.0)
        if variance == "learned_range":
            assert found.log_variance is None and (found.share == 1).all()
        else:
            assert found.share is None and (found.log_variance == 1).all()


def test_eight_pictures_are_learnt_by_heart(
    shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """Whatever is wired wrongly, this fails: loss, gradient, schedule, text or optimiser."""
    batch = eight(shapes)
    one = system(tokenizer)
    optim = OptimConfig(lr=4e-3, warmup=20, decay="none", average=0.9)
    trainer = Trainer(one, shapes, optim, TrainConfig(batch=8, precision="fp32"))
    losses: list[float] = []
    for _ in range(250):
        same = Batch(batch.image.clone(), batch.caption, batch.label, batch.id)
        losses.append(trainer.advance(same)["denoiser/mse_x0"].item())
    start, end = sum(losses[:10]) / 10, sum(losses[-30:]) / 30
    assert end < 0.35 * start, (start, end)
    with trainer.averaged() as averaged:
        assert isinstance(averaged, DDPM)
        for sampler in ("ddim", "ddpm", "dpmpp_2m"):
            drawn = averaged.generate(batch.caption, seed=0, guidance=1.0, sampler=sampler)
            distances = (drawn[:, None] - batch.image[None]).square().mean(dim=(2, 3, 4))  # (B, B)
            found = (distances.argmin(1) == torch.arange(8)).float().mean()  # by its caption
            assert found >= 0.5, sampler


# --- drawing: guidance ----------------------------------------------------------------------------


def small(one: DDPM) -> DDPM:
    """Outputs so small that nothing is clipped."""
    with torch.no_grad():
        one.network.leave.weight.mul_(0.05)
        one.network.leave.bias.mul_(0.05)
    return one


def test_guidance_moves_away_from_the_picture_without_a_caption(one: DDPM) -> None:
    """x_0 = null + guidance (text - null), seen in a single step of sampling."""
    small(one)
    text, null = (
        one.generate(captions, steps=1, guidance=1.0) for captions in (CAPTIONS, ["", ""])
    )
    assert text.abs().max() < 0.9 and (text - null).abs().max() > 1e-4
    for scale in (0.0, 1.0, 2.5):
        found = one.generate(CAPTIONS, steps=1, guidance=scale)
        torch.testing.assert_close(found, null + scale * (text - null), atol=1e-5, rtol=0)
    negative = one.generate(["a green ring"] * 2, steps=1, guidance=1.0)
    found = one.generate(CAPTIONS, steps=1, guidance=2.5, negative="a green ring")
    torch.testing.assert_close(found, negative + 2.5 * (text - negative), atol=1e-5, rtol=0)


def test_guidance_1_is_the_conditional_output(one: DDPM) -> None:
    """And the network is asked once for a picture, not twice."""
    asked = Asked(one)
    plain = one.generate(CAPTIONS, guidance=1.0, steps=3)
    assert asked.rows == [2, 2, 2]
    nearly = one.generate(CAPTIONS, guidance=1.0 + 1e-6, steps=3)
    assert asked.rows[3:] == [4, 4, 4]
    torch.testing.assert_close(nearly, plain, atol=1e-4, rtol=0)


def test_a_negative_prompt_changes_the_picture(one: DDPM) -> None:
    plain = one.generate(CAPTIONS, guidance=3.0)
    away = one.generate(CAPTIONS, guidance=3.0, negative="a green ring")
    assert (plain - away).abs().max() > 1e-3
    assert torch.equal(one.generate(CAPTIONS, guidance=3.0, negative=""), plain)
    once = one.generate(CAPTIONS, guidance=1.0)
    assert torch.equal(one.generate(CAPTIONS, guidance=1.0, negative="a green ring"), once)


def test_rescaling_brings_the_deviation_back(one: DDPM) -> None:
    """Lin et al., equations 15 and 16: all of it at 1, half of it at 0.5."""
    small(one)

    def deviations(**knobs: Any) -> Tensor:
        return one.generate(CAPTIONS, steps=1, threshold="none", **knobs).flatten(1).std(1)

    caption, guided = deviations(guidance=1.0), deviations(guidance=9.0)
    assert (guided / caption - 1).abs().min() > 0.01
    torch.testing.assert_close(deviations(guidance=9.0, rescale=1.0), caption)
    half = deviations(guidance=9.0, rescale=0.5)
    torch.testing.assert_close(half, (guided + caption) / 2)


def test_guidance_within_an_interval_of_sigmas(one: DDPM) -> None:
    """Outside it, the network is asked for the caption alone."""
    asked = Asked(one)
    sigmas = [point.sigma for point in one.process.path(10).points[:-1]]
    one.generate(CAPTIONS, guidance=3.0, interval=(0.3, 3.0))
    assert asked.rows == [4 if 0.3 <= sigma <= 3 else 2 for sigma in sigmas]
    assert {2, 4} == set(asked.rows)
    plain, always = (one.generate(CAPTIONS, guidance=g) for g in (1.0, 3.0))
    nowhere = one.generate(CAPTIONS, guidance=3.0, interval=(1e6, 1e7))
    assert torch.equal(nowhere, plain)
    assert torch.equal(one.generate(CAPTIONS, guidance=3.0, interval=(0.0, 1e9)), always)
    assert torch.equal(one.generate(CAPTIONS, guidance=3.0, interval=()), always)
    text = one.generate(CAPTIONS, guidance=3.0, interval="0.3,3")
    assert not torch.equal(text, plain) and not torch.equal(text, always)


# --- drawing: levels and samplers -----------------------------------------------------------------


def watched(one: DDPM, monkeypatch: pytest.MonkeyPatch, **knobs: Any) -> list[Estimate]:
    """What is said of x_0 on the way."""
    seen: list[Estimate] = []

    def sampler(denoise: Denoise, *rest: Any) -> Tensor:
        def check(x: Tensor, level: Point) -> Estimate:
            seen.append(denoise(x, level))
            return seen[-1]

        return ddim(check, *rest)

    monkeypatch.setitem(SAMPLERS, "ddim", sampler)
    one.generate(CAPTIONS, **knobs)
    return seen


@pytest.mark.parametrize("threshold", ["clip", "dynamic"])
def test_every_estimate_is_kept_in_the_range_of_pictures(
    threshold: str, one: DDPM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """High guidance leaves the range, and what leaves it grows from step to step."""
    seen = watched(one, monkeypatch, guidance=50.0, threshold=threshold)
    assert len(seen) == 10
    assert max(found.x0.abs().max().item() for found in seen) == 1.0


def test_without_a_threshold_estimates_go_where_they_go(
    one: DDPM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched(one, monkeypatch, guidance=50.0, threshold="none")
    assert max(found.x0.abs().max().item() for found in seen) > 2.0
    assert one.generate(CAPTIONS, guidance=50.0, threshold="none").abs().max() <= 1


def test_clipping_is_the_threshold_unless_told_otherwise(one: DDPM) -> None:
    kinds = [one.generate(CAPTIONS, guidance=9.0, threshold=k) for k in ("clip", "dynamic")]
    assert torch.equal(one.generate(CAPTIONS, guidance=9.0), kinds[0])
    assert (kinds[0] - kinds[1]).abs().max() > 1e-3


def test_knobs_of_drawing(one: DDPM) -> None:
    asked = Asked(one)
    one.generate("a red circle", steps=4)
    assert asked.times == [99, 66, 33, 0]
    asked.times.clear()
    one.generate("a red circle")
    assert len(asked.times) == one.config.steps
    ddim, ddpm = (one.generate(CAPTIONS, sampler=name) for name in ("ddim", "ddpm"))
    assert (ddim - ddpm).abs().max() > 1e-3
    with pytest.raises(UserError, match="did you mean 'ddim'"):
        one.generate("a red circle", sampler="dimm")


@pytest.mark.parametrize("spacing", SPACINGS)
def test_spacing_decides_what_the_network_is_asked_for(spacing: str, one: DDPM) -> None:
    asked = Asked(one)
    one.generate("a red circle", steps=5, spacing=spacing)
    fixed = {
        "even": [99, 74, 50, 25, 0],  # 74.25, 49.5 to even, 24.75
        "leading": [81, 61, 41, 21, 1],
        "trailing": [99, 79, 59, 39, 19],
    }
    if spacing in fixed:
        assert asked.times == fixed[spacing]
    else:  # both ends of the chain, the first where it is as good as noise alone
        ends = one.process.point(0).sigma, 80.0
        shares = [k / 4 for k in range(5)]
        sigmas = {
            "karras": [
                (ends[1] ** (1 / 7) * (1 - s) + ends[0] ** (1 / 7) * s) ** 7 for s in shares
            ],
            "exponential": [ends[1] ** (1 - s) * ends[0] ** s for s in shares],
        }[spacing]
        found = [one.process.sigma(time) for time in asked.times]
        assert found == pytest.approx(sigmas, rel=1e-3)


def test_left_alone_spacing_fits_the_sampler(one: DDPM) -> None:
    """Even steps in the process's own coordinates; where a solver goes by sigma, Karras'."""
    for sampler in SAMPLERS:
        if sampler != "flow_euler":
            plain = one.generate("a red circle", sampler=sampler, steps=5)
            spacing = "even" if sampler in ("ddpm", "ddim") else "karras"
            told = one.generate("a red circle", sampler=sampler, steps=5, spacing=spacing)
            assert torch.equal(plain, told), sampler


def test_eta_is_how_much_noise_is_added(one: DDPM) -> None:
    """From `ddim` to `ddpm`; and two names for each of them."""
    how: dict[str, Any] = {"spacing": "karras", "steps": 6}
    ddim, ddpm = (one.generate(CAPTIONS, sampler=name, **how) for name in ("ddim", "ddpm"))
    torch.testing.assert_close(one.generate(CAPTIONS, eta=1.0, **how), ddpm, atol=1e-4, rtol=0)
    torch.testing.assert_close(one.generate(CAPTIONS, eta=0.0, **how), ddim, atol=1e-4, rtol=0)
    ancestral = one.generate(CAPTIONS, sampler="euler_ancestral", **how)
    torch.testing.assert_close(ancestral, ddpm, atol=1e-3, rtol=0)
    for eta, wanted in ((0.0, ddim), (1.0, ddpm)):
        found = one.generate(CAPTIONS, sampler="euler_ancestral", eta=eta, **how)
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)
    between = one.generate(CAPTIONS, eta=0.5, **how)
    assert min((between - other).abs().max() for other in (ddim, ddpm)) > 1e-3


def test_the_variance_is_the_process_s(tokenizer: WordTokenizer) -> None:
    """Small and large differ where a sampler draws from the posterior, and nowhere else."""
    kinds = [
        system(tokenizer, replace(PROCESS, variance=f"fixed_{size}"), moved=0.05)
        for size in ("small", "large")
    ]
    for sampler, same in (("ddpm", False), ("ddim", True), ("euler_ancestral", True)):
        found = [one.generate(CAPTIONS, sampler=sampler, steps=5) for one in kinds]
        assert torch.equal(*found) == same, sampler


def test_what_is_not_told_is_the_configuration_s(tokenizer: WordTokenizer) -> None:
    own: dict[str, Any] = {
        "steps": 4,
        "guidance": 3.0,
        "sampler": "euler_ancestral",
        "spacing": "trailing",
        "threshold": "dynamic",
    }
    given = system(tokenizer, moved=0.05).generate(CAPTIONS, **own)
    assert torch.equal(system(tokenizer, moved=0.05, **own).generate(CAPTIONS), given)
    for name, other in (
        ("steps", 5),
        ("guidance", 1.0),
        ("sampler", "ddim"),
        ("spacing", "even"),
        ("threshold", "none"),
    ):
        changed = system(tokenizer, moved=0.05, **{**own, name: other}).generate(CAPTIONS)
        assert not torch.equal(changed, given), name


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_picture_knows_nothing_of_its_batch(sampler: str, tokenizer: WordTokenizer) -> None:
    """Picture i follows from the seed, i and caption i, whatever stands beside it."""
    one = system(tokenizer, LINE, moved=0.05, sampler=sampler, steps=4)
    captions = [*CAPTIONS, "two small yellow stars"]
    together = one.generate(captions, seed=5)
    torch.rand(3)
    alone = one.generate(captions[:1], seed=5)
    torch.testing.assert_close(alone[0], together[0], atol=1e-3, rtol=0)
    one.at_once = 1
    torch.testing.assert_close(one.generate(captions, seed=5), together, atol=1e-3, rtol=0)
    one.at_once = 2
    others = one.generate(["", captions[1], "a zorp"], seed=5)
    torch.testing.assert_close(others[1], together[1], atol=1e-3, rtol=0)
    same = one.generate(["a red circle"] * 2, seed=5)
    assert (same[0] - same[1]).abs().max() > 0.01
    assert (one.generate(captions, seed=6) - together).abs().max() > 0.01


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "flow_euler"])
def test_every_sampler_draws_at_any_number_of_steps(sampler: str, tokenizer: WordTokenizer) -> None:
    """From one to all, whether or not the last of them is noise alone."""
    for zero_snr in (False, True):
        process = ProcessConfig(20, "cosine", "v", zero_snr=zero_snr)
        one = system(tokenizer, process, unet=FAST, moved=0.05, sampler=sampler)
        for steps, spacing in ((1, "even"), (2, "trailing"), (20, "even"), (19, "leading")):
            drawn = one.generate("a red circle", steps=steps, spacing=spacing)
            assert torch.isfinite(drawn).all() and drawn.std() > 0.01, (zero_snr, steps, spacing)


# --- what cannot be -------------------------------------------------------------------------------


def one_sentence(told: str) -> bool:
    return "\n" not in told and ". " not in told


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"sampler": "dimm"}, "sampler='dimm'.*did you mean 'ddim'"),
    ({"sampler": "flow_euler"}, "flow_euler needs"),
    ({"spacing": "oven"}, "spacing='oven'"),
    ({"threshold": "clap"}, "threshold='clap'.*did you mean 'clip'"),
    ({"eta": 0.5, "sampler": "heun"}, "heun takes no eta"),
    ({"eta": 0.5, "sampler": "ddpm"}, "ddpm takes no eta"),
    ({"eta": "much"}, "eta='much'"),
    ({"interval": (1.0,)}, r"interval=\(1.0,\) must be two sigmas"),
    ({"interval": (1.0, 2.0, 3.0)}, "must be two sigmas"),
    ({"interval": (3.0, 0.3)}, "the smaller one first"),
    ({"interval": (-1.0, 0.3)}, "two sigmas"),
    ({"interval": "low"}, "interval"),
    ({"rescale": 1.5}, "rescale=1.5"),
    ({"rescale": -0.1}, "rescale=-0.1"),
    ({"guidance": "strong"}, "guidance='strong'"),
    ({"guidance": math.nan}, "guidance=nan"),
    ({"negative": 3}, "negative=3"),
    ({"flavour": 1}, "has no knob 'flavour'"),
]


@pytest.mark.parametrize(("knobs", "match"), WRONG, ids=str)
def test_a_knob_that_cannot_be_is_told(knobs: dict[str, Any], match: str, one: DDPM) -> None:
    with pytest.raises(UserError, match=match) as told:
        one.generate("a red circle", **knobs)
    assert one_sentence(str(told.value)), told.value


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_noise_cannot_be_taken_away(sampler: str, one: DDPM) -> None:
    """At eta = -1 a step divides by zero."""
    with pytest.raises(UserError, match="eta=-1"):
        one.generate("a red circle", sampler=sampler, eta=-1.0)


@pytest.mark.parametrize("steps", [0, -3, 101, 2.5, "many"])
def test_a_number_of_steps_that_cannot_be_is_told(steps: Any, one: DDPM) -> None:
    """Nought is not "as usual", and `--set steps=many` is not a traceback."""
    with pytest.raises(UserError, match="steps"):
        one.generate("a red circle", steps=steps)


@pytest.mark.parametrize(
    "change",
    [
        {"sampler": "ddin"},
        {"spacing": "oven"},
        {"threshold": "clap"},
        {"steps": 0},
        {"drop_text": 1.0},
        {"drop_text": -0.1},
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_told(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(UserError, match=rf"model\.{name}=") as told:
        DenoiserConfig(**change)
    assert one_sentence(str(told.value)), told.value


def test_knobs_from_a_command_line_are_read(one: DDPM) -> None:
    """As text, they mean what they mean as numbers."""
    given = one.generate(CAPTIONS, steps=4, guidance=3.0, eta=0.5, interval=(0.3, 3.0))
    text = one.generate(CAPTIONS, steps="4", guidance="3", eta="0.5", interval="0.3,3")
    assert torch.equal(given, text)


def test_no_caption_is_no_picture(one: DDPM) -> None:
    with pytest.raises(UserError, match="at least one caption"):
        one.generate([])


# --- inside ---------------------------------------------------------------------------------------


def rows_of(one: DDPM, **how: Any) -> Iterator[tuple[list[str], list[Tensor]]]:
    for row in one.inside("a red circle", **how):
        yield [name for name, _ in row], [picture for _, picture in row]


def test_inside_shows_the_way_from_noise_to_picture(one: DDPM) -> None:
    """x_t above, the estimate of x_0 below, at eight moments under the same names."""
    (names, noised), (again, estimates) = rows_of(one, seed=3)
    assert names == again and len(names) == len(set(names)) == 8
    sigmas = [point.sigma for point in one.process.path(10).points[:-1]]
    assert names[0] == f"sigma {sigmas[0]:.2g}" and names[-1] == f"sigma {sigmas[-1]:.2g}"
    for picture in noised + estimates:
        assert picture.shape == (3, 16, 16) and picture.abs().max() <= 1
    start = NoiseStreams.for_pictures(3, 1, "cpu").randn(3, 16, 16)[0]
    torch.testing.assert_close(noised[0], start.clamp(-1, 1))
    torch.testing.assert_close(estimates[-1], one.generate("a red circle", seed=3)[0])


@pytest.mark.parametrize("steps", [1, 3, 50])
def test_inside_shows_no_moment_twice(steps: int, tokenizer: WordTokenizer) -> None:
    one = system(tokenizer, moved=0.05, steps=steps)
    (names, _), (again, _) = rows_of(one)
    assert names == again and len(names) == min(steps, 8)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_inside_works_with_every_sampler(sampler: str, tokenizer: WordTokenizer) -> None:
    """And says "noise" where sigma has no end."""
    one = system(tokenizer, LINE, moved=0.05, sampler=sampler, spacing="even")
    (names, noised), (_, estimates) = rows_of(one, seed=1)
    assert names[0] == "noise" and len(names) == 8
    start = NoiseStreams.for_pictures(1, 1, "cpu").randn(3, 16, 16)[0]
    torch.testing.assert_close(noised[0], start.clamp(-1, 1))
    if sampler != "lms":  # which goes on along earlier slopes
        drawn = one.generate("a red circle", seed=1)[0]
        torch.testing.assert_close(estimates[-1], drawn, atol=1e-4, rtol=0)
