"""`ddpm`: its training step, the options of sampling, and that it memorises eight pictures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lineage.config import OptimConfig, TextConfig, TrainConfig
from lineage.data.contract import Batch, CaptionedDataset
from lineage.diffusion.ddpm import DDPMConfig, build_ddpm
from lineage.diffusion.model import DiffusionConfig, DiffusionModel
from lineage.diffusion.networks.unet import UNetConfig
from lineage.diffusion.process import PREDICTIONS, ProcessConfig
from lineage.diffusion.samplers import SAMPLERS, ddim
from lineage.diffusion.samplers.base import Denoise, Estimate
from lineage.diffusion.schedules import SPACINGS, NoiseLevel
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.system import Reconstructs, ScoresStages, Visualises
from lineage.text.contract import TextFeatures
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import WordTokenizer
from lineage.training.loop import Trainer

UNET = UNetConfig(
    channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_levels=(1,),
    num_heads=2,
    patch_size=2,
    dropout=0.0,
)
FAST = UNetConfig(
    channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_levels=(0,),
    num_heads=2,
    patch_size=4,
    dropout=0.0,
)
PROCESS = ProcessConfig(num_timesteps=100, schedule="cosine", prediction="x0")
FLOW = ProcessConfig(num_timesteps=100, schedule="flow", prediction="flow")
CAPTIONS = ["a red circle", "a blue square above a green triangle"]


def make_ddpm(
    tokenizer: WordTokenizer, process: ProcessConfig = PROCESS, moved: float = 0.0, **changes: Any
) -> DiffusionModel:
    """A small system; `moved` moves its network away from the zeros at which it starts."""
    torch.manual_seed(0)
    config = DDPMConfig(**{"unet": UNET, "process": process, "sampling_steps": 10, **changes})
    model = build_ddpm(config, make_encoder("bag", TextConfig(width=16), tokenizer), 16).eval()
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(moved * torch.randn_like(parameter))
    return model


@pytest.fixture
def model(tokenizer: WordTokenizer) -> DiffusionModel:
    """A system whose network does not predict zeros."""
    return make_ddpm(tokenizer, moved=0.05)


class Recorder(torch.nn.Module):
    """Stands in for the UNet: records its inputs and returns multiples of x_t."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(outputs))
        self.inputs: list[tuple[Tensor, Tensor, TextFeatures]] = []

    def forward(self, x_t: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        self.inputs.append((x_t, t, text))
        return torch.cat([scale * x_t for scale in self.scale], dim=1)


class Calls:
    """Numbers of rows, and timesteps, with which the network is called."""

    def __init__(self, model: DiffusionModel) -> None:
        self.rows: list[int] = []
        self.timesteps: list[float] = []
        model.network.register_forward_hook(self._record)

    def _record(self, module: Any, inputs: Any, output: Any) -> None:
        self.rows.append(len(inputs[0]))
        self.timesteps.append(inputs[1][0].item())


def learn(model: DiffusionModel, batch: Batch, steps: int = 40) -> list[dict[str, Tensor]]:
    """Terms of each step; the noise is the same at each, so that only learning can lower them."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    history = []
    for _ in range(steps):
        terms = loss_terms(model, batch)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        history.append({name: value.detach() for name, value in terms.items()})
    return history


def eight(shapes: CaptionedDataset) -> Batch:
    return shapes.batch(range(8), [0] * 8, 0)


def loss_terms(model: DiffusionModel, batch: Batch, seed: int = 0) -> dict[str, Tensor]:
    """The terms of the one turn."""
    noise = NoiseStreams(range(seed, seed + len(batch)))
    (turn,) = model.losses(batch, model.text.encode(batch.caption), noise)
    assert turn.group == "denoiser"
    return dict(turn.terms)


# --- training -------------------------------------------------------------------------------------


def test_captions_are_dropped_as_often_as_is_set(
    shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """Guidance needs a trained prediction for "no caption"."""
    batch = shapes.batch(range(400), [0] * 400, 0)
    for share in (0.0, 0.25, 0.95):
        model = make_ddpm(tokenizer, cond_drop_prob=share)
        recorder = model.network = Recorder()
        terms = loss_terms(model, batch)
        _, t, text = recorder.inputs[0]
        null = model.text.null(1)
        dropped = text.mask.sum(1) == 1
        assert dropped.float().mean().item() == pytest.approx(share, abs=0.07 * (share > 0))
        expected = null.sentence.expand(int(dropped.sum()), -1)
        torch.testing.assert_close(text.sentence[dropped], expected)
        others = model.text.encode(batch.caption).sentence[~dropped]
        torch.testing.assert_close(text.sentence[~dropped], others)
        assert t.min() == 0 and t.max() == 99 and len(t.unique()) > 90
        assert list(terms) == ["mse_x0"]
        assert terms["mse_x0"].item() == pytest.approx(batch.image.square().mean().item(), rel=1e-5)


def test_pictures_are_noised_according_to_their_timestep(
    shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """x_t = alpha_t x_0 + sigma_t eps, with eps that is normal and each row's own."""
    batch, model = shapes.batch(range(64), [0] * 64, 0), make_ddpm(tokenizer)
    recorder = model.network = Recorder()
    loss_terms(model, batch)
    x_t, t, _ = recorder.inputs[0]
    share = (t.double() + 1) / 100
    alpha_bar = ((share + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    alpha_bar = (alpha_bar / math.cos(0.008 / 1.008 * math.pi / 2) ** 2)[:, None, None, None]
    eps = (x_t - alpha_bar.sqrt() * batch.image) / (1 - alpha_bar).sqrt()
    inner = t < 99  # the last beta is clipped
    assert eps[inner].mean().item() == pytest.approx(0, abs=0.02)
    assert eps[inner].std().item() == pytest.approx(1, abs=0.02)
    assert eps.flatten(1).corrcoef().triu(1).abs().max() < 0.2


@pytest.mark.parametrize("prediction", ["noise", "x0", "v", "flow"])
def test_min_snr_weighs_by_the_signal_to_noise_ratio(
    prediction: Any, shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """Hang et al., section 3.4: min(snr, 5) |x_0 - estimate|^2, whatever is predicted."""
    batch = eight(shapes)
    process = replace(PROCESS, prediction=prediction, weighting="min_snr")
    model = make_ddpm(tokenizer, process, cond_drop_prob=0.0)
    recorder = model.network = Recorder()
    with torch.no_grad():
        recorder.scale.fill_(0.3)
    loss = loss_terms(model, batch)[f"mse_{prediction}"].item()
    x_t, t, _ = recorder.inputs[0]
    expected = 0.0
    for row, timestep in zip(range(8), t.tolist(), strict=True):
        level = model.process.level(timestep)
        a, b = level.alpha, level.sigma
        estimate = {
            "noise": (1 - 0.3 * b) / a,
            "x0": 0.3,
            "v": a - 0.3 * b,
            "flow": (1 - 0.3 * b) / (a + b),
        }[prediction] * x_t[row]
        error = (estimate - batch.image[row]).square().mean().item()
        expected += min((a / b) ** 2, 5.0) * error / 8
    assert loss == pytest.approx(expected, rel=1e-3)


def test_a_row_of_the_loss_depends_on_no_other(
    shapes: CaptionedDataset, model: DiffusionModel
) -> None:
    """Timestep, dropped caption and noise come from its own stream, so the mean is that of single
    rows."""
    batch = eight(shapes)
    together = loss_terms(model, batch)["mse_x0"].item()
    alone = [
        loss_terms(model, row, seed)["mse_x0"].item() for seed, row in enumerate(batch.split(1))
    ]
    assert together == pytest.approx(sum(alone) / 8, rel=1e-4)
    assert len({round(value, 6) for value in alone}) == 8


@pytest.mark.parametrize("text", ["bag", "transformer"])
def test_the_turn_moves_the_network_and_the_text(
    text: str, shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    encoder = make_encoder(text, TextConfig(width=16), tokenizer)
    model = build_ddpm(DDPMConfig(unet=UNET, process=PROCESS), encoder, 16)
    assert model.groups() == {"denoiser": [model.network, model.text]}
    optim = OptimConfig(warmup=0, weight_decay=0.0)
    trainer = Trainer(model, shapes, optim, TrainConfig(batch_size=8, precision="fp32", prefetch=0))
    before = {name: value.clone() for name, value in model.named_parameters()}
    for _ in range(4):  # layers that start at zero pass gradients on once they have moved
        trainer.advance(eight(shapes))
    still = {name for name, value in model.named_parameters() if torch.equal(before[name], value)}
    # neither positions behind the longest caption nor a bias of all keys alike has a gradient
    assert all("pos" in name or name.endswith("to_k.bias") for name in still), still
    assert {name.split(".")[0] for name in before} == {"network", "text"}


LEARNED = [*((prediction, "cosine") for prediction in PREDICTIONS), ("v", "flow"), ("flow", "flow")]


@pytest.mark.parametrize(("prediction", "schedule"), LEARNED)
def test_each_prediction_memorises_two_pictures(
    prediction: Any, schedule: Any, shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    process = ProcessConfig(num_timesteps=100, schedule=schedule, prediction=prediction)
    model = make_ddpm(tokenizer, process, unet=FAST, cond_drop_prob=0.0)
    history = learn(model, eight(shapes).split(2)[0])
    assert all(list(terms) == [f"mse_{prediction}"] for terms in history)
    first, last = (terms[f"mse_{prediction}"].item() for terms in (history[0], history[-1]))
    assert last < 0.1 * first, (first, last)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_a_learned_variance_has_a_term_of_its_own(
    variance: Any, shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """The mean is detached in it, so it trains the variance alone."""
    model = make_ddpm(tokenizer, replace(PROCESS, variance=variance), moved=0.02)
    assert model.network.conv_out.out_channels == 6 * UNET.patch_size**2
    terms = loss_terms(model, eight(shapes))
    assert list(terms) == ["mse_x0", "vlb"]
    model.network = Recorder(2)
    for name, moves in (("mse_x0", [True, False]), ("vlb", [False, True])):
        loss = loss_terms(model, eight(shapes))[name]
        (gradient,) = torch.autograd.grad(loss, model.network.scale)
        assert (gradient != 0).tolist() == moves, name


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_a_learned_variance_is_learned_and_sampled_with(
    variance: Any, shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    process = replace(PROCESS, variance=variance)
    model = make_ddpm(
        tokenizer, process, unet=FAST, cond_drop_prob=0.0, sampler="ddpm", sampling_steps=4
    )
    history = learn(model, eight(shapes).split(2)[0])
    first, last = (terms["mse_x0"].item() for terms in (history[0], history[-1]))
    assert last < 0.1 * first, (first, last)
    assert min(terms["vlb"] for terms in history[-5:]) < history[0]["vlb"]
    for name in SAMPLERS:
        if name != "flow_euler":
            images = model.generate(CAPTIONS, sampler=name)
            assert images.shape == (2, 3, 16, 16) and torch.isfinite(images).all(), name
    images = model.generate(CAPTIONS)
    with torch.no_grad():  # only the second half of the channels
        model.network.conv_out.bias[48:] += 1.0
    assert not torch.equal(model.generate(CAPTIONS), images)
    plain = model.generate(CAPTIONS, sampler="ddim")
    with torch.no_grad():
        model.network.conv_out.bias[48:] += 1.0
    assert torch.equal(model.generate(CAPTIONS, sampler="ddim"), plain)


class LargeVarianceForCaptions(torch.nn.Module):
    """Predicts 0, with the large variance where there is a caption and the small one elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x_t: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        variance = 2.0 * (text.mask.sum(1) > 1)[:, None, None, None] - 1
        return torch.cat([0 * x_t, variance.expand_as(x_t)], dim=1)


def test_a_guided_variance_is_that_of_the_caption(
    tokenizer: WordTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guidance acts on the prediction alone."""
    for variance in ("learned_range", "learned"):
        model = make_ddpm(tokenizer, replace(PROCESS, variance=variance))
        model.network = LargeVarianceForCaptions()
        (estimate, *_) = estimates(model, monkeypatch, guidance=3.0)
        if variance == "learned_range":
            assert estimate.log_variance is None and estimate.variance_fraction is not None
            assert (estimate.variance_fraction == 1).all()
        else:
            assert estimate.variance_fraction is None and estimate.log_variance is not None
            assert (estimate.log_variance == 1).all()


def test_eight_pictures_are_memorised(shapes: CaptionedDataset, tokenizer: WordTokenizer) -> None:
    """Whatever is wired wrongly, this fails: loss, gradient, schedule, text or optimiser."""
    batch = eight(shapes)
    model = make_ddpm(tokenizer)
    optim = OptimConfig(lr=4e-3, warmup=20, decay="none", ema_decay=0.9)
    trainer = Trainer(model, shapes, optim, TrainConfig(batch_size=8, precision="fp32"))
    losses: list[float] = []
    for _ in range(250):
        same = Batch(batch.image.clone(), batch.caption, batch.label, batch.id)
        losses.append(trainer.advance(same)["denoiser/mse_x0"].item())
    start, end = sum(losses[:10]) / 10, sum(losses[-30:]) / 30
    assert end < 0.35 * start, (start, end)
    with trainer.averaged() as averaged:
        assert isinstance(averaged, DiffusionModel)
        for sampler in ("ddim", "ddpm", "dpmpp_2m"):
            images = averaged.generate(batch.caption, seed=0, guidance=1.0, sampler=sampler)
            distances = (images[:, None] - batch.image[None]).square().mean(dim=(2, 3, 4))  # (B, B)
            accuracy = (distances.argmin(1) == torch.arange(8)).float().mean()  # by its caption
            assert accuracy >= 0.5, sampler


# --- sampling: guidance ---------------------------------------------------------------------------


def shrink_output(model: DiffusionModel) -> DiffusionModel:
    """Predictions so small that nothing is clipped."""
    with torch.no_grad():
        model.network.conv_out.weight.mul_(0.05)
        model.network.conv_out.bias.mul_(0.05)
    return model


def test_guidance_extrapolates_from_no_caption_to_the_caption(model: DiffusionModel) -> None:
    """x_0 = uncond + guidance (cond - uncond), visible in a single step of sampling."""
    shrink_output(model)
    cond, uncond = (
        model.generate(captions, sampling_steps=1, guidance=1.0)
        for captions in (CAPTIONS, ["", ""])
    )
    assert cond.abs().max() < 0.9 and (cond - uncond).abs().max() > 1e-4
    for scale in (0.0, 1.0, 2.5):
        images = model.generate(CAPTIONS, sampling_steps=1, guidance=scale)
        torch.testing.assert_close(images, uncond + scale * (cond - uncond), atol=1e-5, rtol=0)
    negative = model.generate(["a green ring"] * 2, sampling_steps=1, guidance=1.0)
    images = model.generate(CAPTIONS, sampling_steps=1, guidance=2.5, negative="a green ring")
    torch.testing.assert_close(images, negative + 2.5 * (cond - negative), atol=1e-5, rtol=0)


def test_guidance_1_is_the_conditional_prediction(model: DiffusionModel) -> None:
    """And the network is evaluated once for a picture, not twice."""
    calls = Calls(model)
    plain = model.generate(CAPTIONS, guidance=1.0, sampling_steps=3)
    assert calls.rows == [2, 2, 2]
    nearly = model.generate(CAPTIONS, guidance=1.0 + 1e-6, sampling_steps=3)
    assert calls.rows[3:] == [4, 4, 4]
    torch.testing.assert_close(nearly, plain, atol=1e-4, rtol=0)


def test_a_negative_prompt_changes_the_picture(model: DiffusionModel) -> None:
    plain = model.generate(CAPTIONS, guidance=3.0)
    negative = model.generate(CAPTIONS, guidance=3.0, negative="a green ring")
    assert (plain - negative).abs().max() > 1e-3
    assert torch.equal(model.generate(CAPTIONS, guidance=3.0, negative=""), plain)
    once = model.generate(CAPTIONS, guidance=1.0)
    assert torch.equal(model.generate(CAPTIONS, guidance=1.0, negative="a green ring"), once)


def test_rescaling_restores_the_standard_deviation(model: DiffusionModel) -> None:
    """Lin et al., equations 15 and 16: all of it at 1, half of it at 0.5."""
    shrink_output(model)

    def std(**options: Any) -> Tensor:
        images = model.generate(CAPTIONS, sampling_steps=1, threshold="none", **options)
        return images.flatten(1).std(1)

    cond, guided = std(guidance=1.0), std(guidance=9.0)
    assert (guided / cond - 1).abs().min() > 0.01
    torch.testing.assert_close(std(guidance=9.0, rescale=1.0), cond)
    half = std(guidance=9.0, rescale=0.5)
    torch.testing.assert_close(half, (guided + cond) / 2)


def test_guidance_within_an_interval_of_sigmas(model: DiffusionModel) -> None:
    """Outside it, the network is evaluated for the caption alone."""
    calls = Calls(model)
    sigmas = [level.karras_sigma for level in model.process.sampling_schedule(10).levels[:-1]]
    model.generate(CAPTIONS, guidance=3.0, interval=(0.3, 3.0))
    assert calls.rows == [4 if 0.3 <= sigma <= 3 else 2 for sigma in sigmas]
    assert {2, 4} == set(calls.rows)
    plain, always = (model.generate(CAPTIONS, guidance=g) for g in (1.0, 3.0))
    nowhere = model.generate(CAPTIONS, guidance=3.0, interval=(1e6, 1e7))
    assert torch.equal(nowhere, plain)
    assert torch.equal(model.generate(CAPTIONS, guidance=3.0, interval=(0.0, 1e9)), always)
    assert torch.equal(model.generate(CAPTIONS, guidance=3.0, interval=()), always)
    text = model.generate(CAPTIONS, guidance=3.0, interval="0.3,3")
    assert not torch.equal(text, plain) and not torch.equal(text, always)


# --- sampling: levels and samplers ----------------------------------------------------------------


def estimates(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> list[Estimate]:
    """The estimates of x_0 during sampling."""
    history: list[Estimate] = []

    def sampler(denoise: Denoise, *rest: Any) -> Tensor:
        def record(x: Tensor, level: NoiseLevel) -> Estimate:
            history.append(denoise(x, level))
            return history[-1]

        return ddim(record, *rest)

    monkeypatch.setitem(SAMPLERS, "ddim", sampler)
    model.generate(CAPTIONS, **options)
    return history


@pytest.mark.parametrize("threshold", ["clip", "dynamic"])
def test_every_estimate_is_limited_to_the_range_of_pictures(
    threshold: str, model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """High guidance leaves the range, and the error grows from step to step."""
    history = estimates(model, monkeypatch, guidance=50.0, threshold=threshold)
    assert len(history) == 10
    assert max(estimate.x0.abs().max().item() for estimate in history) == 1.0


def test_without_a_threshold_estimates_are_not_limited(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = estimates(model, monkeypatch, guidance=50.0, threshold="none")
    assert max(estimate.x0.abs().max().item() for estimate in history) > 2.0
    assert model.generate(CAPTIONS, guidance=50.0, threshold="none").abs().max() <= 1


def test_the_default_threshold_is_clip(model: DiffusionModel) -> None:
    clip, dynamic = (
        model.generate(CAPTIONS, guidance=9.0, threshold=kind) for kind in ("clip", "dynamic")
    )
    assert torch.equal(model.generate(CAPTIONS, guidance=9.0), clip)
    assert (clip - dynamic).abs().max() > 1e-3


def test_steps_and_sampler_are_options(model: DiffusionModel) -> None:
    calls = Calls(model)
    model.generate("a red circle", sampling_steps=4)
    assert calls.timesteps == [99, 66, 33, 0]
    calls.timesteps.clear()
    model.generate("a red circle")
    assert len(calls.timesteps) == model.config.sampling_steps
    by_ddim, by_ddpm = (model.generate(CAPTIONS, sampler=name) for name in ("ddim", "ddpm"))
    assert (by_ddim - by_ddpm).abs().max() > 1e-3


@pytest.mark.parametrize("spacing", SPACINGS)
def test_spacing_decides_the_timesteps(spacing: str, model: DiffusionModel) -> None:
    calls = Calls(model)
    model.generate("a red circle", sampling_steps=5, spacing=spacing)
    fixed = {
        "even": [99, 74, 50, 25, 0],  # 74.25, 49.5 to even, 24.75
        "leading": [81, 61, 41, 21, 1],
        "trailing": [99, 79, 59, 39, 19],
    }
    if spacing in fixed:
        assert calls.timesteps == fixed[spacing]
        return
    ends = model.process.level(0).karras_sigma, 80.0  # 80 counts as pure noise
    shares = [k / 4 for k in range(5)]
    sigmas = {
        "karras": [(ends[1] ** (1 / 7) * (1 - s) + ends[0] ** (1 / 7) * s) ** 7 for s in shares],
        "exponential": [ends[1] ** (1 - s) * ends[0] ** s for s in shares],
    }[spacing]
    expected = [model.process.level_at(sigma).timestep for sigma in sigmas]
    assert calls.timesteps == pytest.approx(expected, abs=1e-3)


def test_the_default_spacing_fits_the_sampler(model: DiffusionModel) -> None:
    """Even steps in the process's own coordinates; Karras' where a solver works with sigmas."""
    for sampler in SAMPLERS:
        if sampler != "flow_euler":
            default = model.generate("a red circle", sampler=sampler, sampling_steps=5)
            spacing = "even" if sampler in ("ddpm", "ddim") else "karras"
            options = {"sampler": sampler, "sampling_steps": 5, "spacing": spacing}
            assert torch.equal(default, model.generate("a red circle", **options)), sampler


def test_eta_is_the_share_of_new_noise(model: DiffusionModel) -> None:
    """From `ddim` to `ddpm`; and two names for each of them."""
    options: dict[str, Any] = {"spacing": "karras", "sampling_steps": 6}

    def images(**more: Any) -> Tensor:
        return model.generate(CAPTIONS, **options, **more)

    by_ddim, by_ddpm = images(sampler="ddim"), images(sampler="ddpm")
    torch.testing.assert_close(images(eta=1.0), by_ddpm, atol=1e-4, rtol=0)
    torch.testing.assert_close(images(eta=0.0), by_ddim, atol=1e-4, rtol=0)
    torch.testing.assert_close(images(sampler="euler_ancestral"), by_ddpm, atol=1e-3, rtol=0)
    for eta, expected in ((0.0, by_ddim), (1.0, by_ddpm)):
        ancestral = images(sampler="euler_ancestral", eta=eta)
        torch.testing.assert_close(ancestral, expected, atol=1e-3, rtol=0)
    between = images(eta=0.5)
    assert min((between - other).abs().max() for other in (by_ddim, by_ddpm)) > 1e-3


def test_the_variance_is_that_of_the_process(tokenizer: WordTokenizer) -> None:
    """Small and large differ where a sampler draws from the posterior, and nowhere else."""
    models = [
        make_ddpm(tokenizer, replace(PROCESS, variance=f"fixed_{size}"), moved=0.05)
        for size in ("small", "large")
    ]
    for sampler, same in (("ddpm", False), ("ddim", True), ("euler_ancestral", True)):
        images = [m.generate(CAPTIONS, sampler=sampler, sampling_steps=5) for m in models]
        assert torch.equal(*images) == same, sampler


def test_options_that_are_left_out_are_those_of_the_configuration(
    tokenizer: WordTokenizer,
) -> None:
    options: dict[str, Any] = {
        "sampling_steps": 4,
        "guidance": 3.0,
        "sampler": "euler_ancestral",
        "spacing": "trailing",
        "threshold": "dynamic",
    }
    images = make_ddpm(tokenizer, moved=0.05).generate(CAPTIONS, **options)
    assert torch.equal(make_ddpm(tokenizer, moved=0.05, **options).generate(CAPTIONS), images)
    for name, other in (
        ("sampling_steps", 5),
        ("guidance", 1.0),
        ("sampler", "ddim"),
        ("spacing", "even"),
        ("threshold", "none"),
    ):
        changed = make_ddpm(tokenizer, moved=0.05, **{**options, name: other}).generate(CAPTIONS)
        assert not torch.equal(changed, images), name


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_picture_does_not_depend_on_its_batch(sampler: str, tokenizer: WordTokenizer) -> None:
    """Picture i depends on the seed, i and caption i, whatever stands beside it."""
    model = make_ddpm(tokenizer, FLOW, moved=0.05, sampler=sampler, sampling_steps=4)
    captions = [*CAPTIONS, "two small yellow stars"]
    together = model.generate(captions, seed=5)
    torch.rand(3)
    alone = model.generate(captions[:1], seed=5)
    torch.testing.assert_close(alone[0], together[0], atol=1e-3, rtol=0)
    model.sample_batch_size = 1
    torch.testing.assert_close(model.generate(captions, seed=5), together, atol=1e-3, rtol=0)
    model.sample_batch_size = 2
    others = model.generate(["", captions[1], "a zorp"], seed=5)
    torch.testing.assert_close(others[1], together[1], atol=1e-3, rtol=0)
    same = model.generate(["a red circle"] * 2, seed=5)
    assert (same[0] - same[1]).abs().max() > 0.01
    assert (model.generate(captions, seed=6) - together).abs().max() > 0.01


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "flow_euler"])
def test_every_sampler_takes_any_number_of_steps(sampler: str, tokenizer: WordTokenizer) -> None:
    """From one to all, whether or not the last timestep is pure noise."""
    for zero_snr in (False, True):
        process = ProcessConfig(
            num_timesteps=20, schedule="cosine", prediction="v", zero_snr=zero_snr
        )
        model = make_ddpm(tokenizer, process, unet=FAST, moved=0.05, sampler=sampler)
        for steps, spacing in ((1, "even"), (2, "trailing"), (20, "even"), (19, "leading")):
            image = model.generate("a red circle", sampling_steps=steps, spacing=spacing)
            assert torch.isfinite(image).all() and image.std() > 0.01, (zero_snr, steps, spacing)


# --- impossible options ---------------------------------------------------------------------------


def is_one_sentence(text: str) -> bool:
    return "\n" not in text and ". " not in text


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
    ({"interval": (3.0, 0.3)}, "the smaller first"),
    ({"interval": (-1.0, 0.3)}, "two sigmas"),
    ({"interval": "low"}, "interval"),
    ({"rescale": 1.5}, "rescale=1.5"),
    ({"rescale": -0.1}, "rescale=-0.1"),
    ({"guidance": "strong"}, "guidance='strong'"),
    ({"guidance": math.nan}, "guidance=nan"),
    ({"negative": 3}, "negative=3"),
    ({"flavour": 1}, "has no option 'flavour'"),
]


@pytest.mark.parametrize(("options", "match"), WRONG, ids=str)
def test_an_impossible_option_is_named(
    options: dict[str, Any], match: str, model: DiffusionModel
) -> None:
    with pytest.raises(UserError, match=match) as caught:
        model.generate("a red circle", **options)
    assert is_one_sentence(str(caught.value)), caught.value


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_eta_cannot_be_negative(sampler: str, model: DiffusionModel) -> None:
    """At eta = -1 a step divides by zero."""
    with pytest.raises(UserError, match="eta=-1"):
        model.generate("a red circle", sampler=sampler, eta=-1.0)


@pytest.mark.parametrize("steps", [0, -3, 101, 2.5, "many"])
def test_an_impossible_number_of_steps_is_named(steps: Any, model: DiffusionModel) -> None:
    """0 is not the default, and `--set sampling_steps=many` is not a traceback."""
    with pytest.raises(UserError, match="sampling_steps"):
        model.generate("a red circle", sampling_steps=steps)


@pytest.mark.parametrize(
    "change",
    [
        {"sampler": "ddin"},
        {"spacing": "oven"},
        {"threshold": "clap"},
        {"sampling_steps": 0},
        {"cond_drop_prob": 1.0},
        {"cond_drop_prob": -0.1},
        {"guidance": math.inf},
    ],
    ids=str,
)
def test_impossible_settings_are_named(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(UserError, match=f"{name}=") as caught:
        DiffusionConfig(**change)
    assert is_one_sentence(str(caught.value)), caught.value


def test_options_of_a_command_line_are_read(model: DiffusionModel) -> None:
    """As text, they mean what they mean as numbers."""
    numbers = model.generate(CAPTIONS, sampling_steps=4, guidance=3.0, eta=0.5, interval=(0.3, 3.0))
    text = model.generate(CAPTIONS, sampling_steps="4", guidance="3", eta="0.5", interval="0.3,3")
    assert torch.equal(numbers, text)


def test_every_option_has_a_sentence(model: DiffusionModel) -> None:
    options = model.options()
    assert {"guidance", "image", "mask", "negative", "sampler", "strength"} <= set(options)
    assert all(option.sentence for option in options.values())


def test_no_caption_is_no_picture(model: DiffusionModel) -> None:
    with pytest.raises(UserError, match="at least one caption"):
        model.generate([])


# --- visualise ------------------------------------------------------------------------------------


def test_a_model_in_pixels_has_no_autoencoder_to_show(model: DiffusionModel) -> None:
    assert isinstance(model, Visualises)
    assert not isinstance(model, Reconstructs) and not isinstance(model, ScoresStages)


def rows_of(model: DiffusionModel, **options: Any) -> Iterator[tuple[list[str], list[Tensor]]]:
    for row in model.visualise("a red circle", **options):
        yield [label for label, _ in row], [image for _, image in row]


def test_visualise_shows_the_way_from_noise_to_picture(model: DiffusionModel) -> None:
    """x_t above, the estimate of x_0 below, at eight moments under the same labels."""
    (labels, noisy), (labels_below, clean) = rows_of(model, seed=3)
    assert labels == labels_below and len(labels) == len(set(labels)) == 8
    sigmas = [level.karras_sigma for level in model.process.sampling_schedule(10).levels[:-1]]
    assert labels[0] == f"sigma {sigmas[0]:.2g}" and labels[-1] == f"sigma {sigmas[-1]:.2g}"
    for image in noisy + clean:
        assert image.shape == (3, 16, 16) and image.abs().max() <= 1
    start = NoiseStreams.for_pictures(3, 1, "cpu").randn(3, 16, 16)[0]
    torch.testing.assert_close(noisy[0], start.clamp(-1, 1))
    torch.testing.assert_close(clean[-1], model.generate("a red circle", seed=3)[0])


@pytest.mark.parametrize("steps", [1, 3, 50])
def test_visualise_shows_no_moment_twice(steps: int, tokenizer: WordTokenizer) -> None:
    model = make_ddpm(tokenizer, moved=0.05, sampling_steps=steps)
    (labels, _), (labels_below, _) = rows_of(model)
    assert labels == labels_below and len(labels) == min(steps, 8)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_visualise_works_with_every_sampler(sampler: str, tokenizer: WordTokenizer) -> None:
    """And its label is "noise" where sigma is infinite."""
    model = make_ddpm(tokenizer, FLOW, moved=0.05, sampler=sampler, spacing="even")
    (labels, noisy), (_, clean) = rows_of(model, seed=1)
    assert labels[0] == "noise" and len(labels) == 8
    start = NoiseStreams.for_pictures(1, 1, "cpu").randn(3, 16, 16)[0]
    torch.testing.assert_close(noisy[0], start.clamp(-1, 1))
    if sampler != "lms":  # whose last step follows earlier slopes
        image = model.generate("a red circle", seed=1)[0]
        torch.testing.assert_close(clean[-1], image, atol=1e-4, rtol=0)


# --- every step of a sampling ---------------------------------------------------------------------


def test_a_trajectory_ends_in_the_picture_that_is_drawn(model: DiffusionModel) -> None:
    captions = ["a red circle", "two blue squares"]
    options = {"sampling_steps": 5, "guidance": 3.0, "negative": "a green cross"}
    steps = model.trajectory(captions, seed=4, **options)
    assert len(steps) == 5
    sigmas = [step.level.karras_sigma for step in steps]
    assert sigmas == sorted(sigmas, reverse=True)
    start = NoiseStreams.for_pictures(4, 2, "cpu").randn(3, 16, 16)
    torch.testing.assert_close(steps[0].x_t, start)
    drawn = model.generate(captions, seed=4, **options)
    torch.testing.assert_close(steps[-1].x0.clamp(-1, 1), drawn)


def test_each_step_of_a_trajectory_is_ddims(model: DiffusionModel) -> None:
    """Equation 12 of Song et al. 2020 with sigma = 0 leads from one x_t to the next."""
    steps = model.trajectory("a red circle", sampling_steps=4, sampler="ddim")
    for step, after in itertools.pairwise(steps):
        eps = (step.x_t - step.level.alpha * step.x0) / step.level.sigma
        x_t = after.level.alpha * step.x0 + after.level.sigma * eps
        torch.testing.assert_close(after.x_t, x_t, atol=1e-5, rtol=1e-4)


def test_a_trajectory_refuses_what_it_does_not_take(model: DiffusionModel) -> None:
    with pytest.raises(UserError, match="trajectory has no option rescale"):
        model.trajectory("a red circle", rescale=0.5)
    with pytest.raises(UserError, match="no option 'stepps'"):
        model.trajectory("a red circle", stepps=3)
