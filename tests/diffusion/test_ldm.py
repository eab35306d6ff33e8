"""Latent diffusion: the autoencoder's losses and turns, the memory and scale of latents, and a
denoiser that works in them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import lineage
from lineage import runs
from lineage.config import OptimConfig, TextConfig, TrainConfig
from lineage.data import load_dataset
from lineage.data.contract import Batch, CaptionedDataset
from lineage.data.tools import export
from lineage.diffusion.ldm import (
    LDM,
    Gaussian,
    KLAutoencoder,
    KLConfig,
    Latents,
    LDMConfig,
)
from lineage.diffusion.networks.unet import UNetConfig
from lineage.diffusion.process import ProcessConfig
from lineage.errors import UserError
from lineage.nn.autoencoder import AutoencoderConfig
from lineage.nn.noise import NoiseStreams
from lineage.nn.perceptual import VGG16, load_lpips
from lineage.recipes import ldm as recipe
from lineage.system import Turn
from lineage.text.contract import TextFeatures
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import WordTokenizer
from lineage.training.loop import Trainer
from lineage.training.store import load_tensors

SIZE = 16
NET = AutoencoderConfig(4, (1, 2), 1, (), SIZE, 5)
TINY = KLConfig(NET, 3, kl=0.01, discriminator=4, layers=1, adversary_from=0, perceptual=0.5)
PLAIN = replace(TINY, adversary=0.0, perceptual=0.0)


def made(config: KLConfig = TINY, **changes: Any) -> KLAutoencoder:
    """With weights at which a picture shows in latents and logits."""
    torch.manual_seed(0)
    autoencoder = KLAutoencoder(replace(config, **changes))
    with torch.no_grad():
        for name, parameter in autoencoder.named_parameters():
            if name.startswith("discriminator"):
                parameter.mul_(8.0 if parameter.dim() > 1 else 1.0)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return autoencoder


def pictures(count: int = 4, side: int = SIZE, first: int = 0) -> Batch:
    """Each decided by its name."""
    names = [str(first + k) for k in range(count)]
    shades = [
        torch.rand(3, side, side, generator=torch.Generator().manual_seed(int(name))) * 2 - 1
        for name in names
    ]
    return Batch(torch.stack(shades), [""] * count, None, names)


def turns(system: Any, batch: Batch, first: int = 0) -> Iterator[Turn]:
    text = system.text.encode(batch.caption)
    return system.losses(batch, text, NoiseStreams(range(first, first + len(batch))))


# --- the distribution -------------------------------------------------------------------------


def gaussian(*shape: int) -> tuple[Gaussian, Normal]:
    """Ours and torch's."""
    mean, log_variance = torch.randn(shape).double(), 3 * torch.randn(shape).double()
    return Gaussian(mean, log_variance), Normal(mean, log_variance.exp().sqrt())


@pytest.mark.parametrize("shape", [(3, 2, 4, 4), (1, 1, 1, 1), (2, 5, 1, 3)], ids=str)
def test_kl_nll_and_deviation_are_torchs(shape: tuple[int, ...]) -> None:
    """Sums over each row in nats."""
    ours, theirs = gaussian(*shape)
    x, standard = torch.randn(shape).double(), Normal(0.0, 1.0)
    torch.testing.assert_close(ours.kl(), kl_divergence(theirs, standard).sum((1, 2, 3)))
    torch.testing.assert_close(ours.nll(x), -theirs.log_prob(x).sum((1, 2, 3)))
    torch.testing.assert_close(ours.deviation, theirs.stddev)
    assert ours.kl().shape == ours.nll(x).shape == shape[:1]


def test_a_sample_stands_where_its_noise_stood() -> None:
    """At the same share of its distribution as the noise had of N(0, 1); with a gradient."""
    ours, theirs = gaussian(2, 3, 4, 4)
    ours.mean.requires_grad_(), ours.log_variance.requires_grad_()
    noise = torch.randn(2, 3, 4, 4).double()
    sample = ours.sample(noise)
    torch.testing.assert_close(theirs.cdf(sample.detach()), Normal(0.0, 1.0).cdf(noise))
    sample.sum().backward()
    assert (ours.mean.grad == 1).all()
    torch.testing.assert_close(ours.log_variance.grad, noise * theirs.stddev / 2)


def test_nothing_is_lost_where_the_distribution_is_standard() -> None:
    zero = torch.zeros(2, 3, 2, 2)
    assert not Gaussian(zero, zero).kl().any()
    assert Gaussian(zero, zero).nll(zero)[0].item() == pytest.approx(6 * math.log(2 * math.pi))


def test_moments_are_means_and_log_variances_kept_in_range() -> None:
    """First half and second half of the channels; from -30 to 20, so that nothing overflows."""
    moments = torch.tensor([5.0, -40.0, -31.0, -30.0, 20.0, 900.0])[None, :, None, None]
    found = Gaussian.of(moments)
    assert found.mean.flatten().tolist() == [5.0, -40.0, -31.0]
    assert found.log_variance.flatten().tolist() == [-30.0, 20.0, 20.0]
    wild = Gaussian.of(torch.cat([torch.zeros(1, 2, 3, 3), 1e30 * torch.randn(1, 2, 3, 3)], 1))
    assert wild.kl().isfinite().all() and wild.nll(torch.ones(1, 2, 3, 3)).isfinite().all()
    assert wild.sample(torch.randn(1, 2, 3, 3)).isfinite().all()


# --- the autoencoder --------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize(
    ("net", "factor"),
    [
        (AutoencoderConfig(4, (1,), 1, (), 24, 3), 1),
        (AutoencoderConfig(4, (1, 2), 2, (24,), 24, 5), 2),
        (AutoencoderConfig(8, (2, 1, 1), 1, (6,), 24, 3), 4),
        (AutoencoderConfig(4, (1,), 1, (), 24, 3, patch=3), 3),
        (AutoencoderConfig(4, (1, 2), 1, (6,), 24, 6, patch=2), 4),
    ],
    ids=str,
)
@torch.no_grad()
def test_pictures_become_latents_and_pictures(
    net: AutoencoderConfig, factor: int, width: int
) -> None:
    """Of any side that is a multiple, also another than the configuration's; each by itself."""
    autoencoder = made(replace(PLAIN, net=net, width=width)).eval()
    assert autoencoder.factor == autoencoder.config.factor == factor
    for side in (24, 12):
        image = torch.rand(3, 3, side, side) * 2 - 1
        found = autoencoder.encode(image)
        assert found.mean.shape == found.log_variance.shape == (3, width, *[side // factor] * 2)
        drawn = autoencoder.decode(found.mean)
        assert drawn.shape == image.shape
        alone = autoencoder.decode(autoencoder.encode(image[1:2]).mean)
        torch.testing.assert_close(alone, drawn[1:2], atol=1e-5, rtol=1e-4)


def test_in_half_precision_moments_and_pictures_are_whole() -> None:
    """A KL term of bfloat16 would be noise."""
    autoencoder = made()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = autoencoder.encode(pictures().image)
        assert autoencoder.decode(found.mean).dtype == torch.float32
    assert found.mean.dtype == found.log_variance.dtype == torch.float32


def test_the_paper_preset_is_the_published_one(tokenizer: WordTokenizer) -> None:
    """Stable Diffusion v1: 859,520,964 parameters in the UNet, 83,653,863 in the autoencoder."""
    config = recipe.PRESETS["paper"]
    with torch.device("meta"):
        system: Any = runs.build(recipe.stages(config, tokenizer))
        autoencoder = KLAutoencoder(config.autoencoder)
    assert isinstance(system, LDM) and system.shape == (4, 64, 64)
    assert sum(p.numel() for p in system.network.parameters()) == 859_520_964
    own = autoencoder.groups()["autoencoder"]
    assert sum(p.numel() for module in own for p in module.parameters()) == 83_653_863


@pytest.mark.parametrize("error", ["absolute", "square"])
@pytest.mark.parametrize("weight", [0.0, 0.01, 3.0])
def test_the_terms_by_hand(error: str, weight: float) -> None:
    """Pixels of what was drawn from the distribution, and its KL beside a sum over the picture, as
    a mean: both divided by the number of pixel values."""
    autoencoder, batch = made(PLAIN, error=error, kl=weight).eval(), pictures()
    ((name, terms),) = turns(autoencoder, batch)
    found = autoencoder.encode(batch.image)
    theirs = Normal(found.mean, (found.log_variance / 2).exp())
    noise = torch.stack(
        [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(row)) for row in range(4)]
    )
    off = autoencoder.decode(theirs.mean + theirs.stddev * noise) - batch.image
    powers = off.abs() if error == "absolute" else off**2
    whole = powers.sum() + weight * kl_divergence(theirs, Normal(0.0, 1.0)).sum()
    assert name == "autoencoder" and set(terms) == {"pixels", "kl"}
    torch.testing.assert_close(sum(terms.values()), whole / batch.image.numel())
    torch.testing.assert_close(terms["pixels"], powers.mean())


def test_terms_are_means_over_rows() -> None:
    """A batch of another size has the same loss; its rows draw noise of their own."""
    autoencoder, batch = made(adversary=0.0).eval(), pictures(4)
    ((_, whole),) = turns(autoencoder, batch)
    each = [next(turns(autoencoder, part, k))[1] for k, part in enumerate(batch.split(1))]
    assert set(whole) == {"pixels", "kl", "perceptual"}
    for name, value in whole.items():
        torch.testing.assert_close(value, torch.stack([terms[name] for terms in each]).mean())


def test_facts_by_hand() -> None:
    """PSNR of the picture as it is shown, and how far the latents' means spread."""
    autoencoder, batch = made(PLAIN).eval(), pictures()
    captured: list[Tensor] = []
    autoencoder.decoder.register_forward_hook(lambda _, __, found: captured.append(found))
    list(turns(autoencoder, batch))
    square = (captured[0].clamp(-1, 1) - batch.image).square().mean().item()
    facts = autoencoder.facts
    assert facts["psnr"].item() == pytest.approx(10 * math.log10(4 / square), rel=1e-5)
    assert facts["deviation"].item() == pytest.approx(
        autoencoder.encode(batch.image).mean.std().item(), rel=1e-5
    )
    assert not any(value.requires_grad for value in facts.values())


# --- its adversary ----------------------------------------------------------------------------


def trainer_for(system: Any, data: CaptionedDataset, **optim: Any) -> Trainer:
    given = {"lr": 2e-3, "warmup": 0, "decay": "none", "weight_decay": 0.0, **optim}
    train = TrainConfig(batch=4, precision="fp32", prefetch=0)
    return Trainer(system, data, OptimConfig(**given), train, stage="autoencoder")


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_adversary_begins_when_it_is_told(steps: int, shapes: CaptionedDataset) -> None:
    """After so many steps without it, in which the discriminator stays as it is, and counting on
    after a stop."""
    autoencoder = made(adversary_from=steps)
    trainer = trainer_for(autoencoder, shapes)
    for number in range(5):
        if number == 2:  # stopped and resumed
            other = made(adversary_from=steps)
            other.load_state_dict(autoencoder.state_dict())
            autoencoder, trainer = other, trainer_for(other, shapes)
        before = {n: p.detach().clone() for n, p in autoencoder.named_parameters()}
        seen = trainer.advance(trainer.loader.at(number))
        moved = {n for n, p in autoencoder.named_parameters() if not torch.equal(before[n], p)}
        judges = {n for n in before if n.startswith("discriminator.")}
        began = number >= steps
        assert moved == (set(before) if began else set(before) - judges), number
        assert ("autoencoder/adversary" in seen) == ("discriminator/real" in seen) == began
        assert ("health/adversary_weight" in seen) == began
        assert ("health/accuracy_fake" in seen) == began
        assert "autoencoder/perceptual" in seen


def test_each_turn_feels_its_own_parameters(shapes: CaptionedDataset) -> None:
    """The autoencoder's are encoder, decoder and what lies between; the decoder has no say in the
    discriminator's turn."""
    autoencoder = made()
    groups = autoencoder.groups()
    assert list(groups) == ["autoencoder", "discriminator"]
    names = {id(p): n for n, p in autoencoder.named_parameters()}
    own = {t: {names[id(p)] for m in ms for p in m.parameters()} for t, ms in groups.items()}
    assert own["autoencoder"] | own["discriminator"] == set(names.values())
    assert not own["autoencoder"] & own["discriminator"]
    for name, terms in turns(autoencoder, pictures()):
        autoencoder.zero_grad()
        sum(terms.values()).backward()  # type: ignore[union-attr]
        felt = {n for n, p in autoencoder.named_parameters() if p.grad is not None and p.grad.any()}
        if name == "discriminator":
            assert felt <= own[name] and own[name] - felt <= {names[id(last(autoencoder).bias)]}
        else:
            assert felt >= own[name]


def last(autoencoder: KLAutoencoder) -> Any:
    """The discriminator's last layer, whose bias two hinges may pull at alike."""
    assert autoencoder.discriminator is not None
    return autoencoder.discriminator.main[-1]


@pytest.mark.parametrize("perceptual", [0.0, 0.5])
@pytest.mark.parametrize("adversary", [0.5, 0.1])
def test_the_adversarys_weight_is_adaptive(adversary: float, perceptual: float) -> None:
    """Its slope in the decoder's last kernel is made as long as that of pixels and looks together,
    without the KL term; times the configured factor. A discriminator that speaks twice as loud
    weighs half."""
    weights = []
    for loud in (1.0, 2.0):
        autoencoder = made(adversary=adversary, perceptual=perceptual, kl=50.0).eval()
        with torch.no_grad():
            for parameter in last(autoencoder).parameters():
                parameter.mul_(loud)
        _, terms = next(turns(autoencoder, pictures()))
        kernel = autoencoder.decoder.conv_out.weight
        near = terms["pixels"] + terms.get("perceptual", 0)
        one, other = (
            torch.autograd.grad(loss, kernel, retain_graph=True)[0].norm().item()
            for loss in (near, terms["adversary"])
        )
        assert other == pytest.approx(adversary * one, rel=1e-3)
        weights.append(autoencoder.facts["adversary_weight"].item())
        assert 1e-3 < weights[-1] < 1e3
    assert weights[1] == pytest.approx(weights[0] / 2, rel=2e-3)


def test_the_adversary_is_fooled_by_what_was_decoded() -> None:
    """Its term is the mean logit with its sign turned, of the pictures of this step."""
    autoencoder = made().eval()
    captured: list[Tensor] = []
    autoencoder.decoder.register_forward_hook(lambda _, __, found: captured.append(found))
    _, terms = next(turns(autoencoder, pictures()))
    assert autoencoder.discriminator is not None
    logits = autoencoder.discriminator(captured[0])
    weight = autoencoder.facts["adversary_weight"]
    torch.testing.assert_close(terms["adversary"], -0.5 * weight * logits.mean())


def test_without_adversary_and_looks_there_is_no_discriminator() -> None:
    autoencoder = made(PLAIN)
    assert autoencoder.discriminator is None
    assert not any("discriminator" in name for name in autoencoder.state_dict())
    assert list(autoencoder.groups()) == ["autoencoder"]


def test_looks_without_an_adversary(shapes: CaptionedDataset) -> None:
    """The features of a discriminator that never learns, and is no group."""
    autoencoder = made(adversary=0.0)
    assert list(autoencoder.groups()) == ["autoencoder"]
    ((name, terms),) = turns(autoencoder.eval(), pictures())
    assert name == "autoencoder" and set(terms) == {"pixels", "kl", "perceptual"}
    trainer = trainer_for(autoencoder, shapes)
    assert autoencoder.discriminator is not None
    before = [p.detach().clone() for p in autoencoder.discriminator.parameters()]
    trainer.advance(trainer.loader.at(0))
    assert all(map(torch.equal, before, autoencoder.discriminator.parameters()))


@pytest.mark.parametrize("changes", [{}, {"adversary": 0.0, "perceptual": 0.0}], ids=str)
def test_an_autoencoder_learns_a_few_pictures(
    changes: dict[str, Any], shapes: CaptionedDataset
) -> None:
    trainer = trainer_for(KLAutoencoder(replace(TINY, kl=1e-4, **changes)), shapes, lr=5e-3)
    batch = trainer.loader.at(0)
    pixels = [trainer.advance(batch)["autoencoder/pixels"].item() for _ in range(40)]
    assert sum(pixels[-5:]) < 0.5 * sum(pixels[:5])


# --- LPIPS ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A VGG16 of random weights, as torchvision names them."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("lpips") / "vgg16.pth"
    torch.save({name: 1.4 * tensor for name, tensor in VGG16().state_dict().items()}, path)
    return (str(path),)


@pytest.mark.parametrize("adversary", [0.5, 0.0])
def test_lpips_takes_the_place_of_the_features(adversary: float, files: tuple[str, ...]) -> None:
    """With an adversary or without one; it is no part of the weights, and no gradient stays in
    it."""
    autoencoder = made(lpips=files, adversary=adversary, perceptual=0.3).eval()
    captured: list[Tensor] = []
    autoencoder.decoder.register_forward_hook(lambda _, __, found: captured.append(found))
    batch = pictures(2)
    _, terms = next(turns(autoencoder, batch))
    expected = 0.3 * load_lpips(files)(batch.image, captured[0]).mean()
    torch.testing.assert_close(terms["perceptual"], expected, rtol=1e-4, atol=1e-6)
    assert not any("lpips" in name or "vgg" in name for name in autoencoder.state_dict())
    terms["perceptual"].backward()
    assert autoencoder.decoder.conv_out.weight.grad is not None
    assert all(p.grad is None for p in autoencoder.lpips[0].parameters())


@pytest.mark.parametrize("adversary", [0.5, 0.0])
def test_weights_of_a_run_with_lpips_load_without_it(
    adversary: float, files: tuple[str, ...]
) -> None:
    """Who has only the run needs no file to draw with it."""
    config = replace(
        recipe.PRESETS["smoke"], autoencoder=replace(TINY, lpips=files, adversary=adversary)
    )
    bare = config.without_files()
    assert bare == replace(config, autoencoder=replace(TINY, adversary=adversary))
    one, two = KLAutoencoder(config.autoencoder), KLAutoencoder(bare.autoencoder)
    two.load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"error": "cubic"}, "autoencoder.error"),
        ({"width": 0}, "autoencoder.width"),
        ({"discriminator": 0}, "autoencoder.discriminator"),
        ({"layers": 0}, "autoencoder.layers"),
        ({"kl": -1.0}, "autoencoder.kl"),
        ({"kl": math.nan}, "autoencoder.kl"),
        ({"adversary": -0.1}, "autoencoder.adversary"),
        ({"adversary_from": -1}, "autoencoder.adversary_from"),
        ({"perceptual": -1.0}, "autoencoder.perceptual"),
        ({"lpips": ("/none/vgg16.pth",)}, "/none/vgg16.pth"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_told(change: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=name) as caught:
        KLAutoencoder(replace(TINY, **change))
    assert "\n" not in str(caught.value)


# --- latents ----------------------------------------------------------------------------------


class Asked:
    """Counts how often an autoencoder encodes."""

    def __init__(self, autoencoder: KLAutoencoder) -> None:
        self.times = 0
        original = autoencoder.encode

        def encode(image: Tensor) -> Gaussian:
            self.times += 1
            return original(image)

        autoencoder.encode = encode  # type: ignore[method-assign]


def looked(latents: Latents, *batches: Batch) -> Latents:
    for number, batch in enumerate(batches):
        assert list(turns(latents.train(), batch, 10 * number)) == []  # nothing to minimise
    return latents


def latents_of(kept: int = 6, **changes: Any) -> Latents:
    return Latents(made(PLAIN, **changes).eval(), SIZE, kept)


@torch.no_grad()
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_the_scale_gives_all_latents_deviation_one(offset: float) -> None:
    """Of all samples of all batches together, however far their mean lies from zero."""
    latents = latents_of()
    latents.autoencoder.quant_conv.bias[:3] += offset
    assert latents.scale.item() == 1  # as long as nothing was seen
    batches = [pictures(3), pictures(5, first=3), pictures(1, first=8)]
    looked(latents, *batches)
    drawn = []
    for number, batch in enumerate(batches):
        found = latents.autoencoder.encode(batch.image)
        rows = range(10 * number, 10 * number + len(batch))
        noise = [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(k)) for k in rows]
        drawn.append(found.mean + (found.log_variance / 2).exp() * torch.stack(noise))
    scaled = latents.scale.double() * torch.cat(drawn).double()
    assert scaled.std(correction=0).item() == pytest.approx(1, rel=1e-5)
    assert latents.scale.dtype == torch.float32 and latents.scale.shape == ()
    assert latents.facts["scale"] == latents.scale


def test_latents_without_spread_have_a_scale() -> None:
    """An autoencoder that says nothing yet makes no infinities."""
    latents = latents_of()
    with torch.no_grad():
        for parameter in latents.autoencoder.quant_conv.parameters():
            parameter.zero_()
        latents.autoencoder.quant_conv.bias[3:] = -100
    assert looked(latents, pictures(2)).scale.isfinite()


def test_on_the_meta_device_there_is_a_scale() -> None:
    with torch.device("meta"):
        assert latents_of().scale.shape == ()


@torch.no_grad()
@pytest.mark.parametrize("names", [["0", "1", "2"], ["2", "0"], ["1", "1"]], ids=str)
def test_latents_come_back_by_name(names: list[str]) -> None:
    """As the encoder gave them, without asking it again; what the picture shows does not count."""
    latents = looked(latents_of(), pictures(3))
    expected = latents.autoencoder.encode(pictures(3).image)
    asked = Asked(latents.autoencoder)
    blank = Batch(torch.zeros(len(names), 3, SIZE, SIZE), [""] * len(names), None, names)
    found, rows = latents.of(blank), [int(name) for name in names]
    assert asked.times == 0
    torch.testing.assert_close(found.mean, expected.mean[rows])
    torch.testing.assert_close(found.log_variance, expected.log_variance[rows])


@torch.no_grad()
@pytest.mark.parametrize("kept", [1, 2, 3, 5, 20])
def test_only_so_many_are_kept(kept: int) -> None:
    """The first; the others, and batches with one of them, are encoded when they are asked for.
    An endless data set, all of whose pictures are new, still finds its scale."""
    latents = looked(latents_of(kept), pictures(2), pictures(3, first=2))
    assert int(latents.memory.count) == min(kept, 5)
    assert latents.sums[0].item() == 5 * 3 * 8 * 8
    asked = Asked(latents.autoencoder)
    for name in range(5):
        latents.of(pictures(1, first=name))
    assert asked.times == max(0, 5 - kept)
    batch = pictures(3, first=4)
    torch.testing.assert_close(latents.of(batch).mean, latents.autoencoder.encode(batch.image).mean)
    assert int(latents.memory.count) == min(kept, 5)  # asking does not keep


@pytest.mark.parametrize("stop", [1, 2])
def test_latents_that_are_resumed_are_those_of_an_unbroken_run(stop: int) -> None:
    """Memory, sums and scale, to the bit."""
    batches = [pictures(2), pictures(3, first=1), pictures(4, first=3)]
    whole = looked(latents_of(), *batches)
    first, second = looked(latents_of(), *batches[:stop]), latents_of()
    second.load_state_dict(first.state_dict())
    for number in range(stop, 3):
        list(turns(second.train(), batches[number], 10 * number))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert torch.equal(whole.scale, second.scale)
    assert torch.equal(whole.of(pictures(5)).mean, second.of(pictures(5)).mean)


@torch.no_grad()
def test_latents_are_found_in_full_precision() -> None:
    """In whatever precision the loop trains."""
    latents, batch = latents_of(), pictures(3)
    exact = latents.autoencoder.encode(batch.image).mean
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(latents.autoencoder.encode(batch.image).mean, exact)
        before = latents.of(batch).mean
        looked(latents, batch)
        after = latents.of(batch).mean
    assert torch.equal(before, exact) and torch.equal(after, exact)


def test_nothing_is_learnt() -> None:
    """The autoencoder is frozen, in evaluation mode, and stays as it is."""
    latents = latents_of().train()
    assert latents.groups() == {} and latents.training
    assert not any(module.training for module in latents.autoencoder.modules())
    assert not any(parameter.requires_grad for parameter in latents.parameters())
    before = {name: t.clone() for name, t in latents.autoencoder.state_dict().items()}
    looked(latents, pictures(4))
    for name, tensor in latents.autoencoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert latents.facts["psnr"].isfinite() and not latents.facts["psnr"].requires_grad


PROCESS_OF_TWO = """
import json, sys, torch
import torch.distributed as dist
from lineage.data.contract import Batch
from lineage.diffusion.ldm import KLAutoencoder, KLConfig, Latents
from lineage.nn.autoencoder import AutoencoderConfig
from lineage.nn.noise import NoiseStreams

meet, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
net = AutoencoderConfig(4, (1, 2), 1, (), 8, 5)
torch.manual_seed(0)
latents = Latents(KLAutoencoder(KLConfig(net, 3, adversary=0, perceptual=0)), 8, 4)
for step in range(2):
    torch.manual_seed(10 * step + rank)
    image = (1 + rank) * torch.rand(2, 3, 8, 8) - 1
    batch = Batch(image, [""] * 2, None, [f"{step}/{rank}/0", f"{step}/{rank}/1"])
    list(latents.losses(batch, latents.text.encode([""] * 2), NoiseStreams([rank, 2 + rank])))
both = [torch.zeros(()) for _ in range(2)]
dist.all_gather(both, latents.scale)
print(json.dumps([float(scale) for scale in both]))
dist.destroy_process_group()
"""


@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
def test_processes_that_train_together_have_one_scale(tmp_path: Path) -> None:
    """Each sees pictures of its own; latents must mean the same to all."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS_OF_TWO, str(tmp_path / "meet"), str(rank)],
            cwd=Path(lineage.__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    out = [process.communicate(timeout=60) for process in started]
    assert all(process.returncode == 0 for process in started), out[0][1][-2000:]
    one, other = json.loads(out[0][0])
    assert one == pytest.approx(other, rel=1e-6) and one != 1


# --- diffusion in them ------------------------------------------------------------------------


class Folded(KLAutoencoder):
    """An autoencoder that loses nothing: squares of 2 x 2 pixels as twelve channels, three times as
    large; sure of what it says."""

    def encode(self, image: Tensor) -> Gaussian:
        mean = 3 * F.pixel_unshuffle(image, 2) + 0.5
        return Gaussian(mean, torch.full_like(mean, -30))

    def decode(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle((latents - 0.5) / 3, 2)


UNET = UNetConfig(8, (1, 2), 1, (1,), 2, conditioning="transformer", dropout=0.0)
PROCESS = ProcessConfig(1000, "cosine", "x0")


def system(autoencoder: KLAutoencoder | None = None, seen: int = 8, **changes: Any) -> LDM:
    """A latent denoiser whose network says something, on latents that were looked at."""
    folded = Folded(replace(PLAIN, width=12)) if autoencoder is None else autoencoder
    latents = Latents(folded.eval(), SIZE, 4)
    if seen:
        looked(latents, pictures(seen))
    config = LDMConfig(process=PROCESS, steps=4, threshold="none", unet=UNET)
    torch.manual_seed(1)
    words = WordTokenizer(["a", "red", "blue", "circle", "square"])
    text = make_encoder("lstm", TextConfig(width=8), words)
    built = LDM(replace(config, **changes), latents, text, SIZE)
    with torch.no_grad():
        for parameter in built.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built.eval()


CAPTIONS = ["a red circle", "a blue square", "", "a circle"]


def test_the_autoencoder_is_frozen_and_stays_in_evaluation_mode() -> None:
    """Whatever is trained around it; it is no group."""
    built = system(made(PLAIN)).train()
    assert built.training and built.network.training
    assert not any(module.training for module in built.autoencoder.modules())
    assert not any(p.requires_grad for p in built.autoencoder.parameters())
    assert all(p.requires_grad for p in built.network.parameters())
    (modules,) = built.groups().values()
    own = {id(p) for module in modules for p in module.parameters()}
    assert own == {id(p) for p in built.parameters() if p.requires_grad}


def test_training_leaves_the_autoencoder_and_the_scale_as_they_are(
    shapes: CaptionedDataset,
) -> None:
    """Bit for bit, with a discriminator inside whose statistics would move."""
    built = system(made(TINY))
    before = {n: t.clone() for n, t in built.state_dict().items()}
    trainer = trainer_for(built, shapes, average=0.9)
    for number in range(3):
        trainer.advance(trainer.loader.at(number))
    for name, tensor in built.state_dict().items():
        same = torch.equal(tensor, before[name])
        assert same == (name.startswith("autoencoder.") or name == "scale"), name


@torch.no_grad()
def test_latents_are_pictures_at_deviation_one() -> None:
    """Pictures to the denoiser's space and back: nothing is lost but what the autoencoder loses."""
    built, image = system(), pictures(4).image
    x = built.from_pictures(image)
    assert x.shape == (4, *built.shape) == (4, 12, 8, 8)
    seen = torch.cat([pictures(8).image])
    assert (built.from_pictures(seen)).std(correction=0).item() == pytest.approx(1, rel=1e-3)
    torch.testing.assert_close(built.to_pictures(x), image, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x, (3 * F.pixel_unshuffle(image, 2) + 0.5) * built.scale)
    other = system(made(PLAIN))
    assert other.scale.item() != 1
    found = other.autoencoder.encode(image).mean
    torch.testing.assert_close(other.from_pictures(image), other.scale * found)
    torch.testing.assert_close(
        other.to_pictures(other.scale * found),
        other.autoencoder.decode(found),
        atol=1e-5,
        rtol=1e-4,
    )


@torch.no_grad()
def test_reconstructions_and_their_scores_by_hand() -> None:
    """What the autoencoder makes of pictures, without noise and in range; of each row, whatever
    stands beside it."""
    built, batch = system(made(PLAIN)), pictures(3)
    expected = built.autoencoder.decode(built.autoencoder.encode(batch.image).mean).clamp(-1, 1)
    found = built.reconstruct(batch.image)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert found.min() >= -1 and found.max() <= 1
    (scores,) = built.stage_scores(batch).values()
    assert list(built.stage_scores(batch)) == ["psnr"] and scores.shape == (3,)
    for row in range(3):
        error = (expected[row] - batch.image[row]).double().square().mean().item()
        assert scores[row].item() == pytest.approx(10 * math.log10(4 / error), rel=1e-4)
    perfect = system().stage_scores(batch)["psnr"]
    assert perfect.isfinite().all() and (perfect > 90).all()


class Heard(nn.Module):
    """A network that notes what it is asked and says zero."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Tensor, Tensor, TextFeatures]] = []
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, noised: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        self.asked.append((noised, t, text))
        return self.weight * noised


@pytest.mark.parametrize("prediction", ["x0", "noise", "v"])
@pytest.mark.parametrize("known", [True, False])
def test_the_network_learns_from_noised_latents(prediction: str, known: bool) -> None:
    """Scaled, at signal and noise of their step, kept ones and others alike."""
    built = system(process=replace(PROCESS, prediction=prediction), drop_text=0.0)
    built.network = heard = Heard()
    batch = pictures(4, first=0 if known else 4)  # four are kept
    asked = Asked(built.autoencoder)
    text = built.text.encode(CAPTIONS)
    ((name, terms),) = built.losses(batch, text, NoiseStreams(range(4)))
    assert name == "denoiser" and asked.times == (not known)
    ((noised, t, told),) = heard.asked
    assert t.shape == (4,) and len(t.unique()) > 1
    x0 = (3 * F.pixel_unshuffle(batch.image, 2) + 0.5) * built.scale
    rate = torch.cos((torch.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2).double() ** 2
    abar = ((rate[1:] / rate[:-1]).clamp(min=1e-3).cumprod(0))[t].float()[:, None, None, None]
    noise = (noised - abar.sqrt() * x0) / (1 - abar).sqrt()
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert abs((noise[0] * noise[1]).mean()) < 0.1
    wanted = {"x0": x0, "noise": noise, "v": abar.sqrt() * noise - (1 - abar).sqrt() * x0}
    (value,) = terms.values()
    torch.testing.assert_close(value, wanted[prediction].square().mean(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(told.words, text.words)


def test_each_visit_draws_its_latents_anew() -> None:
    """From their distribution, kept or not; so that a picture is never twice the same."""
    built = system(made(PLAIN))
    one, other = (built.clean(pictures(2), NoiseStreams([k, 7])) for k in (1, 2))
    assert (one[0] - other[0]).abs().max() > 1e-3
    torch.testing.assert_close(one[1], other[1])
    found = built.autoencoder.encode(pictures(2).image)
    noise = torch.randn(built.shape, generator=torch.Generator().manual_seed(7))
    row = found.mean[1] + (found.log_variance[1] / 2).exp() * noise
    torch.testing.assert_close(one[1], row * built.scale, atol=1e-5, rtol=1e-4)


def test_a_learnt_variance_has_channels_and_a_bound() -> None:
    built = system(process=replace(PROCESS, prediction="noise", variance="learned_range"))
    x, t = torch.randn(2, *built.shape), torch.tensor([3, 700])
    assert built.network(x, t, built.text.encode(CAPTIONS[:2])).shape == (2, 24, 8, 8)
    ((_, terms),) = turns(built, pictures(4))
    assert set(terms) == {"mse_noise", "bound"}
    assert all(value.isfinite() and value.requires_grad for value in terms.values())
    assert built.generate(CAPTIONS, seed=1, sampler="ddpm").shape == (4, 3, SIZE, SIZE)


def test_a_denoiser_learns_a_few_pictures(shapes: CaptionedDataset) -> None:
    """In latents that it finds once and keeps."""
    built = system(seen=0)
    batch = shapes.batch(range(4), [0] * 4, 0)
    looked(built.known[0], batch)
    built.scale.copy_(built.known[0].scale)
    asked, trainer = Asked(built.autoencoder), trainer_for(built, shapes, lr=5e-3)
    errors = [trainer.advance(batch)["denoiser/mse_x0"].item() for _ in range(60)]
    assert sum(errors[-10:]) < 0.5 * sum(errors[:10]) and asked.times == 0


# --- pictures ---------------------------------------------------------------------------------


def test_a_picture_is_decided_by_seed_place_and_caption() -> None:
    """Whatever stands beside it, and however many are made at once."""
    built = system()
    together = built.generate(CAPTIONS, seed=5)
    assert together.shape == (4, 3, SIZE, SIZE)
    for place, caption in enumerate(CAPTIONS):
        others = [*CAPTIONS[1:], "a"]
        others[place] = caption
        alone = built.generate(others, seed=5)[place]
        torch.testing.assert_close(alone, together[place], atol=1e-4, rtol=0)
    built.at_once = 3
    torch.testing.assert_close(built.generate(CAPTIONS, seed=5), together, atol=1e-4, rtol=0)
    assert (built.generate(CAPTIONS, seed=6) - together).abs().flatten(1).amax(1).min() > 1e-2
    twice = built.generate(["a red circle"] * 2, seed=5)
    assert (twice[0] - twice[1]).abs().max() > 1e-2
    changed = built.generate(["a blue square", *CAPTIONS[1:]], seed=5)
    assert (changed[0] - together[0]).abs().max() > 1e-4
    torch.testing.assert_close(changed[1:], together[1:], atol=1e-4, rtol=0)


def hole(*boxes: tuple[int, int, int, int]) -> Tensor:
    """(B, 1, S, S): True from row a to b and column c to d."""
    mask = torch.zeros(len(boxes), 1, SIZE, SIZE, dtype=torch.bool)
    for row, (a, b, c, d) in enumerate(boxes):
        mask[row, :, a:b, c:d] = True
    return mask


BOXES = [(4, 9, 3, 12), (0, 16, 8, 16), (7, 8, 7, 8), (0, 0, 0, 0)]


@pytest.mark.parametrize("lossy", [True, False])
@pytest.mark.parametrize("strength", [None, 0.5])
def test_pixels_outside_the_mask_stay_to_the_bit(lossy: bool, strength: float | None) -> None:
    """Though the autoencoder would not give them back; and inside something is drawn."""
    built = system(made(PLAIN)) if lossy else system()
    images, mask = pictures(4, first=50).image, hole(*BOXES)
    assert not torch.equal(built.reconstruct(images), images)
    edited = built.edit(CAPTIONS, images, mask=mask, strength=strength, seed=2)
    away = ~mask.expand(-1, 3, -1, -1)
    assert torch.equal(edited[away], images[away])
    inside = (edited - images).abs().flatten(1).amax(1)
    assert inside[:3].min() > 1e-3 and inside[3] == 0
    assert edited.min() >= -1 and edited.max() <= 1


@pytest.mark.parametrize("strength", [None, 0.5])
def test_latents_outside_the_mask_are_the_pictures_own(
    strength: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit at the end: every place of which no pixel is to be painted. A place with a single
    one is free as a whole. Those of a picture that is painted from noise alone are found with the
    hole already there, since the encoder looks around."""
    built = system(made(PLAIN))
    images, mask = pictures(4, first=50).image, hole(*BOXES)
    ends: list[Tensor] = []
    original = built.to_pictures
    monkeypatch.setattr(built, "to_pictures", lambda x: ends.append(x) or original(x))
    built.edit(CAPTIONS, images, mask=mask, strength=strength, seed=2)
    (x,) = ends
    known = built.from_pictures(images if strength else torch.where(mask, 0.0, images))
    free = torch.zeros(4, 8, 8, dtype=torch.bool)
    for row, _, column, line in mask.nonzero().tolist():
        free[row, column // 2, line // 2] = True
    assert free.flatten(1).sum(1).tolist() == [3 * 5, 32, 1, 0]
    moved = (x - known).abs().amax(1)
    assert not moved[~free].any() and (moved[free] > 0).all()


def test_what_is_painted_over_leaves_no_trace() -> None:
    """Another picture in the hole makes no difference, unless one comes back to it part of the
    way."""
    built = system(made(PLAIN))
    images, mask = pictures(4, first=50).image, hole(*BOXES)
    others = torch.where(mask, pictures(4, first=70).image, images)
    one, other = (built.edit(CAPTIONS, i, mask=mask, seed=2) for i in (images, others))
    assert torch.equal(one, other) and not torch.equal(images, others)
    one, other = (
        built.edit(CAPTIONS, i, mask=mask, strength=0.5, seed=2) for i in (images, others)
    )
    assert (one - other).abs().flatten(1).amax(1)[:3].min() > 1e-3


def test_an_edit_is_decided_by_seed_place_and_caption() -> None:
    built = system()
    images, mask = pictures(4, first=50).image, hole(*BOXES)
    for given in (None, mask):
        together = built.edit(CAPTIONS, images, mask=given, seed=3)
        turned = images.flip(0).clone()
        turned[1] = images[1]
        masks = None if given is None else torch.stack([*[~given[0]], given[1], *~given[2:]])
        others = ["a", CAPTIONS[1], "a", "a red"]
        alone = built.edit(others, turned, mask=masks, seed=3)
        torch.testing.assert_close(alone[1], together[1], atol=1e-4, rtol=0)
        built.at_once = 3
        parts = built.edit(CAPTIONS, images, mask=given, seed=3)
        torch.testing.assert_close(parts, together, atol=1e-4, rtol=0)
        built.at_once = 64


# --- runs -------------------------------------------------------------------------------------


def test_a_run_holds_autoencoder_and_scale(smoke_run: Callable[[str], Any]) -> None:
    """In one file, with which the same pictures are drawn and given back; the memory is not in
    it."""
    folder, trained = smoke_run("ldm")
    saved = load_tensors(folder / "model.safetensors")
    assert {name.split(".")[0] for name in saved} == {"autoencoder", "network", "scale", "text"}
    assert saved["scale"].item() not in (0.0, 1.0)
    loaded: Any = lineage.load(folder)
    assert torch.equal(loaded.scale, saved["scale"]) and torch.equal(loaded.scale, trained.scale)
    for name, tensor in trained.autoencoder.state_dict().items():
        assert torch.equal(tensor, saved[f"autoencoder.{name}"]), name
    assert torch.equal(loaded.generate(CAPTIONS, seed=4), trained.generate(CAPTIONS, seed=4))
    images = pictures(4).image
    assert torch.equal(loaded.reconstruct(images), trained.reconstruct(images))
    edits = [s.edit(CAPTIONS, images, mask=hole(*BOXES), seed=1) for s in (loaded, trained)]
    assert torch.equal(*edits)


def test_a_run_with_lpips_is_loaded_without_it(
    files: tuple[str, ...], train_run: Callable[..., Any], tmp_path: Path
) -> None:
    """Whether there was an adversary beside it or not."""
    settings = {
        "autoencoder.lpips": ",".join(files),
        "autoencoder.perceptual": 1.0,
        "autoencoder.adversary": 0.0,
        "autoencoder.layers": 1,
        "train.precision": "fp32",
    }
    export(load_dataset("shapes", "train", 16), tmp_path / "data", 12)
    data = f"imagefolder:{tmp_path / 'data'}"
    run = train_run(tmp_path / "run", "ldm", settings, steps=4, data=data)
    loaded = lineage.load(run.folder)
    assert torch.equal(loaded.generate(CAPTIONS, seed=4), run.system.generate(CAPTIONS, seed=4))


@pytest.mark.parametrize(
    ("net", "told"),
    [
        ((1, 2, 4, 4, 4), "side of the latents=8"),
        ((1, 2, 2, 2, 2, 2), "side of the latents=8"),
    ],
    ids=str,
)
def test_a_unet_that_cannot_halve_the_latents_is_told(net: tuple[int, ...], told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        system(unet=replace(UNET, multipliers=net))
    assert "\n" not in str(caught.value)
