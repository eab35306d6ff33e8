"""Latent diffusion: the autoencoder's losses and turns, the scale of the latents, and a denoiser of
them."""

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
from lineage.data.cached import CachedDataset
from lineage.data.contract import Batch, CaptionedDataset, Example
from lineage.data.tools import export
from lineage.diffusion.ldm import (
    DiagonalGaussian,
    KLAutoencoder,
    KLConfig,
    LatentDiffusionModel,
    LatentSpace,
    LDMConfig,
    build_ldm,
    latent_scale,
)
from lineage.diffusion.networks.unet import UNetConfig
from lineage.diffusion.process import ProcessConfig
from lineage.errors import UserError
from lineage.nn.autoencoder import AutoencoderConfig
from lineage.nn.noise import NoiseStreams, stream_seed
from lineage.nn.perceptual import VGG16, load_lpips
from lineage.recipes import ldm as recipe
from lineage.system import Reconstructs, ScoresStages, Turn, Visualises
from lineage.text.contract import TextFeatures
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import WordTokenizer
from lineage.training.loop import Trainer
from lineage.training.store import load_tensors

SIZE = 16
NET = AutoencoderConfig(
    channels=4,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attn_resolutions=(),
    resolution=SIZE,
    z_channels=5,
)
TINY = KLConfig(
    net=NET,
    latent_channels=3,
    kl_weight=0.01,
    disc_channels=4,
    disc_layers=1,
    disc_start=0,
    perceptual_weight=0.5,
)
PLAIN = replace(TINY, disc_weight=0.0, perceptual_weight=0.0)


def make_autoencoder(config: KLConfig = TINY, **changes: Any) -> KLAutoencoder:
    """With weights at which a picture makes a difference to latents and logits."""
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
    """Pictures that depend on their names alone."""
    names = [str(first + k) for k in range(count)]
    images = [
        torch.rand(3, side, side, generator=torch.Generator().manual_seed(int(name))) * 2 - 1
        for name in names
    ]
    return Batch(torch.stack(images), [""] * count, None, names)


class RandomPictures(CaptionedDataset):
    """`count` pictures of bytes that depend on their index alone."""

    def __init__(self, count: int, endless: bool = False) -> None:
        self.name, self.split, self.size, self.skipped = "random", "train", SIZE, []
        self.count, self.endless = count, endless

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(256, (3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
        return Example(str(index), image, ("a picture",))


def turns(trainable: Any, batch: Batch, first: int = 0) -> Iterator[Turn]:
    text = None if trainable.text is None else trainable.text.encode(batch.caption)
    return trainable.losses(batch, text, NoiseStreams(range(first, first + len(batch))))


# --- the distribution -------------------------------------------------------------------------


def gaussian(*shape: int) -> tuple[DiagonalGaussian, Normal]:
    """Ours and torch's."""
    mean, log_variance = torch.randn(shape).double(), 3 * torch.randn(shape).double()
    return DiagonalGaussian(mean, log_variance), Normal(mean, log_variance.exp().sqrt())


@pytest.mark.parametrize("shape", [(3, 2, 4, 4), (1, 1, 1, 1), (2, 5, 1, 3)], ids=str)
def test_kl_and_standard_deviation_are_torchs(shape: tuple[int, ...]) -> None:
    """The KL divergence is a sum over each row, in nats."""
    ours, theirs = gaussian(*shape)
    expected = kl_divergence(theirs, Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(ours.kl(), expected)
    torch.testing.assert_close(ours.std, theirs.stddev)
    assert ours.kl().shape == shape[:1]


def test_a_sample_is_at_the_quantile_of_its_noise() -> None:
    """And it passes a gradient to the moments."""
    ours, theirs = gaussian(2, 3, 4, 4)
    ours.mean.requires_grad_(), ours.log_variance.requires_grad_()
    eps = torch.randn(2, 3, 4, 4).double()
    sample = ours.sample(eps)
    torch.testing.assert_close(theirs.cdf(sample.detach()), Normal(0.0, 1.0).cdf(eps))
    sample.sum().backward()
    assert ours.mean.grad is not None and (ours.mean.grad == 1).all()
    torch.testing.assert_close(ours.log_variance.grad, eps * theirs.stddev / 2)


def test_the_kl_of_a_standard_normal_is_zero() -> None:
    zero = torch.zeros(2, 3, 2, 2)
    assert not DiagonalGaussian(zero, zero).kl().any()


def test_moments_are_means_and_clipped_log_variances() -> None:
    """First half and second half of the channels; from -30 to 20, so that nothing overflows."""
    moments = torch.tensor([5.0, -40.0, -31.0, -30.0, 20.0, 900.0])[None, :, None, None]
    posterior = DiagonalGaussian.from_moments(moments)
    assert posterior.mean.flatten().tolist() == [5.0, -40.0, -31.0]
    assert posterior.log_variance.flatten().tolist() == [-30.0, 20.0, 20.0]
    wild = torch.cat([torch.zeros(1, 2, 3, 3), 1e30 * torch.randn(1, 2, 3, 3)], 1)
    posterior = DiagonalGaussian.from_moments(wild)
    assert posterior.kl().isfinite().all()
    assert posterior.sample(torch.randn(1, 2, 3, 3)).isfinite().all()


# --- the autoencoder --------------------------------------------------------------------------


def net(
    channels: int,
    channel_mult: tuple[int, ...],
    num_res_blocks: int,
    attn_resolutions: tuple[int, ...],
    z_channels: int,
    patch_size: int = 1,
) -> AutoencoderConfig:
    return AutoencoderConfig(
        channels=channels,
        channel_mult=channel_mult,
        num_res_blocks=num_res_blocks,
        attn_resolutions=attn_resolutions,
        resolution=24,
        z_channels=z_channels,
        patch_size=patch_size,
    )


@pytest.mark.parametrize("latent_channels", [1, 4])
@pytest.mark.parametrize(
    ("sizes", "factor"),
    [
        (net(4, (1,), 1, (), 3), 1),
        (net(4, (1, 2), 2, (24,), 5), 2),
        (net(8, (2, 1, 1), 1, (6,), 3), 4),
        (net(4, (1,), 1, (), 3, patch_size=3), 3),
        (net(4, (1, 2), 1, (6,), 6, patch_size=2), 4),
    ],
    ids=str,
)
@torch.no_grad()
def test_pictures_become_latents_and_pictures(
    sizes: AutoencoderConfig, factor: int, latent_channels: int
) -> None:
    """Of any side that is a multiple, also another than the configuration's; each by itself."""
    config = replace(PLAIN, net=sizes, latent_channels=latent_channels)
    autoencoder = make_autoencoder(config).eval()
    assert autoencoder.factor == sizes.factor == factor
    for side in (24, 12):
        image = torch.rand(3, 3, side, side) * 2 - 1
        posterior = autoencoder.encode(image)
        shape = (3, latent_channels, side // factor, side // factor)
        assert posterior.mean.shape == posterior.log_variance.shape == shape
        decoded = autoencoder.decode(posterior.mean)
        assert decoded.shape == image.shape
        alone = autoencoder.decode(autoencoder.encode(image[1:2]).mean)
        torch.testing.assert_close(alone, decoded[1:2], atol=1e-5, rtol=1e-4)


def test_under_autocast_moments_and_pictures_are_in_float32() -> None:
    """A KL term of bfloat16 would be noise."""
    autoencoder = make_autoencoder()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        posterior = autoencoder.encode(pictures().image)
        assert autoencoder.decode(posterior.mean).dtype == torch.float32
    assert posterior.mean.dtype == posterior.log_variance.dtype == torch.float32


def test_the_paper_preset_is_the_published_one(tokenizer: WordTokenizer) -> None:
    """Stable Diffusion v1: 859,520,964 parameters in the UNet, 83,653,863 in the autoencoder."""
    config = recipe.PRESETS["paper"]
    with torch.device("meta"):
        model: Any = runs.build(recipe.stages(config, tokenizer))
        autoencoder = KLAutoencoder(config.autoencoder)
    assert isinstance(model, LatentDiffusionModel) and model.space.shape == (4, 64, 64)
    assert sum(p.numel() for p in model.network.parameters()) == 859_520_964
    own = autoencoder.groups()["autoencoder"]
    assert sum(p.numel() for module in own for p in module.parameters()) == 83_653_863


@pytest.mark.parametrize("pixel_loss", ["l1", "l2"])
@pytest.mark.parametrize("weight", [0.0, 0.01, 3.0])
def test_the_terms_by_hand(pixel_loss: str, weight: float) -> None:
    """Pixels of the decoded sample, and the KL divergence beside a sum over the picture: both
    divided by the number of pixel values."""
    config = replace(PLAIN, pixel_loss=pixel_loss, kl_weight=weight)
    autoencoder, batch = make_autoencoder(config).eval(), pictures()
    (turn,) = turns(autoencoder, batch)
    posterior = autoencoder.encode(batch.image)
    theirs = Normal(posterior.mean, (posterior.log_variance / 2).exp())
    eps = torch.stack(
        [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(row)) for row in range(4)]
    )
    error = autoencoder.decode(theirs.mean + theirs.stddev * eps) - batch.image
    powers = error.abs() if pixel_loss == "l1" else error**2
    total = powers.sum() + weight * kl_divergence(theirs, Normal(0.0, 1.0)).sum()
    assert turn.group == "autoencoder" and set(turn.terms) == {"pixels", "kl"}
    torch.testing.assert_close(sum(turn.terms.values()), total / batch.image.numel())
    torch.testing.assert_close(turn.terms["pixels"], powers.mean())


def test_terms_are_means_over_rows() -> None:
    """A batch of another size has the same loss; each row has noise of its own."""
    autoencoder, batch = make_autoencoder(disc_weight=0.0).eval(), pictures(4)
    (whole,) = turns(autoencoder, batch)
    each = [next(turns(autoencoder, part, k)).terms for k, part in enumerate(batch.split(1))]
    assert set(whole.terms) == {"pixels", "kl", "perceptual"}
    for name, value in whole.terms.items():
        torch.testing.assert_close(value, torch.stack([terms[name] for terms in each]).mean())


def decoded_of(autoencoder: KLAutoencoder) -> list[Tensor]:
    """A list to which every output of the decoder is added."""
    outputs: list[Tensor] = []
    autoencoder.decoder.register_forward_hook(lambda _, __, output: outputs.append(output))
    return outputs


def test_metrics_by_hand() -> None:
    """PSNR of the picture as it is displayed, and the spread of the latents' means."""
    autoencoder, batch = make_autoencoder(PLAIN).eval(), pictures()
    decoded = decoded_of(autoencoder)
    (turn,) = turns(autoencoder, batch)
    metrics = turn.metrics()
    mse = (decoded[0].clamp(-1, 1) - batch.image).square().mean().item()
    assert metrics["psnr"].item() == pytest.approx(10 * math.log10(4 / mse), rel=1e-5)
    spread = autoencoder.encode(batch.image).mean.std().item()
    assert metrics["latent_std"].item() == pytest.approx(spread, rel=1e-5)
    assert not any(value.requires_grad for value in metrics.values())


# --- the adversarial loss ---------------------------------------------------------------------


def trainer_for(trainable: Any, data: CaptionedDataset, **optim: Any) -> Trainer:
    settings = {"lr": 2e-3, "warmup": 0, "decay": "none", "weight_decay": 0.0, **optim}
    train = TrainConfig(batch_size=4, precision="fp32", prefetch=0)
    return Trainer(trainable, data, OptimConfig(**settings), train, stage="autoencoder")


@pytest.mark.parametrize("disc_start", [0, 1, 3])
def test_the_adversarial_loss_starts_at_disc_start(
    disc_start: int, shapes: CaptionedDataset
) -> None:
    """Before, the discriminator does not change; a resumed run counts on."""
    autoencoder = make_autoencoder(disc_start=disc_start)
    trainer = trainer_for(autoencoder, shapes)
    for number in range(5):
        if number == 2:  # stopped and resumed
            other = make_autoencoder(disc_start=disc_start)
            other.load_state_dict(autoencoder.state_dict())
            autoencoder, trainer = other, trainer_for(other, shapes)
        before = {n: p.detach().clone() for n, p in autoencoder.named_parameters()}
        values = trainer.advance(trainer.loader.at(number))
        moved = {n for n, p in autoencoder.named_parameters() if not torch.equal(before[n], p)}
        disc = {n for n in before if n.startswith("discriminator.")}
        started = number >= disc_start
        assert moved == (set(before) if started else set(before) - disc), number
        assert ("autoencoder/generator" in values) == ("discriminator/real" in values) == started
        assert "autoencoder/perceptual" in values


def test_each_turn_has_its_own_parameters() -> None:
    """The autoencoder's are encoder, decoder and the layers between; the discriminator's turn
    gives the decoder no gradient."""
    autoencoder = make_autoencoder()
    groups = autoencoder.groups()
    assert list(groups) == ["autoencoder", "discriminator"]
    names = {id(p): n for n, p in autoencoder.named_parameters()}
    own = {t: {names[id(p)] for m in ms for p in m.parameters()} for t, ms in groups.items()}
    assert own["autoencoder"] | own["discriminator"] == set(names.values())
    assert not own["autoencoder"] & own["discriminator"]
    for turn in turns(autoencoder, pictures()):
        autoencoder.zero_grad()
        sum(turn.terms.values()).backward()  # type: ignore[union-attr]
        parameters = autoencoder.named_parameters()
        reached = {n for n, p in parameters if p.grad is not None and p.grad.any()}
        if turn.group == "discriminator":
            last_bias = names[id(last_layer(autoencoder).bias)]
            assert reached <= own[turn.group] and own[turn.group] - reached <= {last_bias}
        else:
            assert reached >= own[turn.group]


def last_layer(autoencoder: KLAutoencoder) -> Any:
    """The discriminator's last layer, on whose bias the two hinges may cancel."""
    assert autoencoder.discriminator is not None
    return autoencoder.discriminator.main[-1]


@pytest.mark.parametrize("perceptual_weight", [0.0, 0.5])
@pytest.mark.parametrize("disc_weight", [0.5, 0.1])
def test_the_weight_of_the_adversarial_loss_is_adaptive(
    disc_weight: float, perceptual_weight: float
) -> None:
    """Its gradient in the decoder's last kernel gets the length of that of pixels and perceptual
    term, without the KL term, times `disc_weight`. A discriminator with logits twice as large
    weighs half."""
    weights = []
    for factor in (1.0, 2.0):
        config = replace(TINY, disc_weight=disc_weight, perceptual_weight=perceptual_weight)
        autoencoder = make_autoencoder(config, kl_weight=50.0).eval()
        with torch.no_grad():
            for parameter in last_layer(autoencoder).parameters():
                parameter.mul_(factor)
        turn = next(turns(autoencoder, pictures()))
        kernel = autoencoder.decoder.conv_out.weight
        nll_loss = turn.terms["pixels"] + turn.terms.get("perceptual", 0)
        nll_norm, generator_norm = (
            torch.autograd.grad(loss, kernel, retain_graph=True)[0].norm().item()
            for loss in (nll_loss, turn.terms["generator"])
        )
        assert generator_norm == pytest.approx(disc_weight * nll_norm, rel=1e-3)
        weights.append(turn.metrics()["adaptive_disc_weight"].item())
        assert 1e-3 < weights[-1] < 1e3
    assert weights[1] == pytest.approx(weights[0] / 2, rel=2e-3)


def test_the_generator_term_is_the_negative_mean_logit() -> None:
    """Of the pictures decoded in this step."""
    autoencoder = make_autoencoder().eval()
    decoded = decoded_of(autoencoder)
    turn = next(turns(autoencoder, pictures()))
    assert autoencoder.discriminator is not None
    logits = autoencoder.discriminator(decoded[0])
    weight = turn.metrics()["adaptive_disc_weight"]
    torch.testing.assert_close(turn.terms["generator"], -0.5 * weight * logits.mean())


def test_without_adversarial_and_perceptual_loss_there_is_no_discriminator() -> None:
    autoencoder = make_autoencoder(PLAIN)
    assert autoencoder.discriminator is None
    assert not any("discriminator" in name for name in autoencoder.state_dict())
    assert list(autoencoder.groups()) == ["autoencoder"]


def test_a_perceptual_loss_without_an_adversarial_one(shapes: CaptionedDataset) -> None:
    """It compares features of a discriminator that never learns, and is in no group."""
    autoencoder = make_autoencoder(disc_weight=0.0)
    assert list(autoencoder.groups()) == ["autoencoder"]
    (turn,) = turns(autoencoder.eval(), pictures())
    assert turn.group == "autoencoder" and set(turn.terms) == {"pixels", "kl", "perceptual"}
    trainer = trainer_for(autoencoder, shapes)
    assert autoencoder.discriminator is not None
    before = [p.detach().clone() for p in autoencoder.discriminator.parameters()]
    trainer.advance(trainer.loader.at(0))
    assert all(map(torch.equal, before, autoencoder.discriminator.parameters()))


@pytest.mark.parametrize("changes", [{}, {"disc_weight": 0.0, "perceptual_weight": 0.0}], ids=str)
def test_an_autoencoder_learns_a_few_pictures(
    changes: dict[str, Any], shapes: CaptionedDataset
) -> None:
    autoencoder = KLAutoencoder(replace(TINY, kl_weight=1e-4, **changes))
    trainer = trainer_for(autoencoder, shapes, lr=5e-3)
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


@pytest.mark.parametrize("disc_weight", [0.5, 0.0])
def test_lpips_replaces_the_discriminators_features(
    disc_weight: float, files: tuple[str, ...]
) -> None:
    """With or without an adversarial loss; it is in no checkpoint and gets no gradient."""
    config = replace(TINY, lpips=files, disc_weight=disc_weight, perceptual_weight=0.3)
    autoencoder = make_autoencoder(config).eval()
    decoded, batch = decoded_of(autoencoder), pictures(2)
    terms = next(turns(autoencoder, batch)).terms
    expected = 0.3 * load_lpips(files)(batch.image, decoded[0]).mean()
    torch.testing.assert_close(terms["perceptual"], expected, rtol=1e-4, atol=1e-6)
    assert not any("lpips" in name or "vgg" in name for name in autoencoder.state_dict())
    terms["perceptual"].backward()
    assert autoencoder.decoder.conv_out.weight.grad is not None
    assert autoencoder.lpips is not None and not list(autoencoder.lpips.parameters())


@pytest.mark.parametrize("disc_weight", [0.5, 0.0])
def test_weights_of_a_run_with_lpips_load_without_it(
    disc_weight: float, files: tuple[str, ...]
) -> None:
    """Sampling from a run needs none of its files."""
    autoencoder = replace(TINY, lpips=files, disc_weight=disc_weight)
    config = replace(recipe.PRESETS["smoke"], autoencoder=autoencoder)
    bare = config.without_files()
    assert bare == replace(config, autoencoder=replace(TINY, disc_weight=disc_weight))
    one, two = KLAutoencoder(config.autoencoder), KLAutoencoder(bare.autoencoder)
    two.load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"pixel_loss": "l3"}, "pixel_loss"),
        ({"latent_channels": 0}, "latent_channels"),
        ({"disc_channels": 0}, "disc_channels"),
        ({"disc_layers": 0}, "disc_layers"),
        ({"kl_weight": -1.0}, "kl_weight"),
        ({"kl_weight": math.nan}, "kl_weight"),
        ({"disc_weight": -0.1}, "disc_weight"),
        ({"disc_start": -1}, "disc_start"),
        ({"perceptual_weight": -1.0}, "perceptual_weight"),
        ({"lpips": ("/none/vgg16.pth",)}, "/none/vgg16.pth"),
    ],
    ids=str,
)
def test_impossible_settings_are_named(change: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=name) as caught:
        KLAutoencoder(replace(TINY, **change))
    assert "\n" not in str(caught.value)


# --- the latent space -------------------------------------------------------------------------


class EncodeCalls:
    """Counts how often an autoencoder encodes."""

    def __init__(self, autoencoder: KLAutoencoder) -> None:
        self.count = 0
        original = autoencoder.encode

        def encode(image: Tensor) -> DiagonalGaussian:
            self.count += 1
            return original(image)

        autoencoder.encode = encode  # type: ignore[method-assign]


def make_space(**changes: Any) -> LatentSpace:
    return LatentSpace(make_autoencoder(PLAIN, **changes), SIZE).train()


def cached(space: LatentSpace, dataset: CaptionedDataset, cache_size: int = 64) -> CachedDataset:
    """The data set with latents, and the scale of the space measured on it."""
    wrapped = CachedDataset(dataset, "latents", space.moments, cache_size)
    space.scale.copy_(latent_scale(space, wrapped))
    return wrapped


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 9, 40])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_the_scale_gives_latents_a_standard_deviation_of_one(offset: float, count: int) -> None:
    """Of samples of the data set's pictures, however far their mean is from zero."""
    space, data = make_space(), RandomPictures(count)
    space.autoencoder.quant_conv.bias[:3] += offset
    assert space.scale.item() == 1  # until it is measured
    scale = latent_scale(space, data)
    assert scale.dtype == torch.float32 and scale.shape == ()
    posterior = space.autoencoder.encode(data.batch(range(count), [0] * count, 0).image)
    noise = NoiseStreams(stream_seed("latent scale", row) for row in range(count))
    z = scale.double() * posterior.sample(noise.randn(3, 8, 8)).double()
    assert z.std(correction=0).item() == pytest.approx(1, rel=1e-5)
    assert torch.equal(latent_scale(space, data), scale)  # no state of the random numbers counts
    with_cache = latent_scale(space, CachedDataset(data, "latents", space.moments, 64))
    torch.testing.assert_close(with_cache, scale, rtol=1e-5, atol=0)


def test_the_scale_is_measured_on_the_first_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most `SCALE_PICTURES` of them, even of an endless data set."""
    monkeypatch.setattr("lineage.diffusion.ldm.SCALE_PICTURES", 5)
    space = make_space()
    expected = latent_scale(space, RandomPictures(5))
    assert torch.equal(latent_scale(space, RandomPictures(50)), expected)
    assert torch.equal(latent_scale(space, RandomPictures(50, endless=True)), expected)
    assert not torch.equal(latent_scale(space, RandomPictures(4)), expected)


def test_latents_without_spread_have_a_scale() -> None:
    """An untrained autoencoder makes no infinities."""
    space = make_space()
    with torch.no_grad():
        for parameter in space.autoencoder.quant_conv.parameters():
            parameter.zero_()
        space.autoencoder.quant_conv.bias[3:] = -100
    assert latent_scale(space, RandomPictures(2)).isfinite()


def test_a_size_that_does_not_divide_into_latents_is_refused() -> None:
    with pytest.raises(UserError, match="size=17 must be a multiple of 2"):
        LatentSpace(make_autoencoder(PLAIN), 17)


@torch.no_grad()
def test_cached_latents_are_used(shapes: CaptionedDataset) -> None:
    """The encoder is not called for a batch that has them; the picture does not count then."""
    space = make_space()
    data = cached(space, RandomPictures(6))
    batch = data.batch([3, 1, 5], [0] * 3, 0)
    calls = EncodeCalls(space.autoencoder)
    blank = Batch(torch.zeros_like(batch.image), batch.caption, None, batch.id, batch.extra)
    posterior = space.posterior(blank)
    assert calls.count == 0
    expected = space.autoencoder.encode(batch.image)
    torch.testing.assert_close(posterior.mean, expected.mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(posterior.log_variance, expected.log_variance, atol=1e-5, rtol=1e-4)
    assert space.posterior(pictures(2)).mean.shape == (2, 3, 8, 8) and calls.count == 2


@torch.no_grad()
def test_latents_are_computed_in_float32() -> None:
    """In whatever precision the loop trains."""
    space, batch = make_space(), pictures(3)
    exact = space.autoencoder.encode(batch.image).mean
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(space.autoencoder.encode(batch.image).mean, exact)
        assert torch.equal(space.posterior(batch).mean, exact)


def test_the_autoencoder_of_a_space_is_frozen() -> None:
    """In evaluation mode whatever is trained around it, and without gradients."""
    space = make_space()
    assert space.training and not any(m.training for m in space.autoencoder.modules())
    assert not any(parameter.requires_grad for parameter in space.parameters())
    before = {name: t.clone() for name, t in space.autoencoder.state_dict().items()}
    cached(space, RandomPictures(4))
    for name, tensor in space.autoencoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name


PROCESS_OF_TWO = """
import json, sys, torch
import torch.distributed as dist
from lineage.data import load_dataset
from lineage.diffusion.ldm import KLAutoencoder, KLConfig, LatentSpace, latent_scale
from lineage.nn.autoencoder import AutoencoderConfig

meet, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
net = AutoencoderConfig(
    channels=4, channel_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), resolution=16,
    z_channels=5
)
torch.manual_seed(rank)  # as if the processes rounded differently
config = KLConfig(net=net, latent_channels=3, disc_weight=0, perceptual_weight=0)
space = LatentSpace(KLAutoencoder(config), 16)
scale = latent_scale(space, load_dataset("shapes", "train", 16))
scales = [torch.zeros(()) for _ in range(2)]
dist.all_gather(scales, scale)
print(json.dumps([float(scale) for scale in scales]))
dist.destroy_process_group()
"""


@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
def test_processes_that_train_together_have_one_scale(tmp_path: Path) -> None:
    """Latents must mean the same to all, to the bit."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS_OF_TWO, str(tmp_path / "meet"), str(rank)],
            cwd=Path(lineage.__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    out = [process.communicate(timeout=60) for process in processes]
    assert all(process.returncode == 0 for process in processes), out[0][1][-2000:]
    one, other = json.loads(out[0][0])
    assert one == other and one != 1


# --- diffusion in the latents -----------------------------------------------------------------


class Folded(KLAutoencoder):
    """A lossless autoencoder: squares of 2 x 2 pixels as twelve channels, three times as large,
    with hardly any variance."""

    def encode(self, image: Tensor) -> DiagonalGaussian:
        mean = 3 * F.pixel_unshuffle(image, 2) + 0.5
        return DiagonalGaussian(mean, torch.full_like(mean, -30))

    def decode(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle((latents - 0.5) / 3, 2)


UNET = UNetConfig(
    channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_levels=(1,),
    num_heads=2,
    conditioning="transformer",
    dropout=0.0,
)
PROCESS = ProcessConfig(schedule="cosine", prediction="x0")


def make_ldm(
    autoencoder: KLAutoencoder | None = None, scale: float = 0.4, **changes: Any
) -> LatentDiffusionModel:
    """A small system whose network does not predict zeros."""
    folded = Folded(replace(PLAIN, latent_channels=12)) if autoencoder is None else autoencoder
    config = LDMConfig(process=PROCESS, sampling_steps=4, threshold="none", unet=UNET)
    torch.manual_seed(1)
    words = WordTokenizer(["a", "red", "blue", "circle", "square"])
    text = make_encoder("lstm", TextConfig(width=8), words)
    model = build_ldm(replace(config, **changes), folded, text, SIZE)
    model.space.scale.fill_(scale)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


CAPTIONS = ["a red circle", "a blue square", "", "a circle"]


def test_the_autoencoder_is_in_no_group() -> None:
    model = make_ldm(make_autoencoder(PLAIN)).train()
    assert model.training and model.network.training
    assert not any(module.training for module in model.space.autoencoder.modules())
    assert all(p.requires_grad for p in model.network.parameters())
    (modules,) = model.groups().values()
    own = {id(p) for module in modules for p in module.parameters()}
    assert own == {id(p) for p in model.parameters() if p.requires_grad}


def test_training_does_not_change_the_autoencoder_or_the_scale(shapes: CaptionedDataset) -> None:
    """Bit for bit, with a discriminator inside whose statistics would move."""
    model = make_ldm(make_autoencoder(TINY))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    trainer = trainer_for(model, shapes, ema_decay=0.9)
    for number in range(3):
        trainer.advance(trainer.loader.at(number))
    for name, tensor in model.state_dict().items():
        if not name.endswith("to_k.bias"):  # which has no gradient
            same = torch.equal(tensor, before[name])
            assert same == name.startswith("space."), name


@torch.no_grad()
def test_pictures_become_scaled_latents_and_pictures() -> None:
    """Only the autoencoder loses anything."""
    model, image = make_ldm(), pictures(4).image
    space = model.space
    x0 = space.encode_image(image)
    assert x0.shape == (4, *space.shape) == (4, 12, 8, 8)
    torch.testing.assert_close(space.decode(x0), image, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x0, (3 * F.pixel_unshuffle(image, 2) + 0.5) * 0.4)
    other = make_ldm(make_autoencoder(PLAIN), scale=2.5).space
    mean = other.autoencoder.encode(image).mean
    torch.testing.assert_close(other.encode_image(image), 2.5 * mean)
    decoded = other.autoencoder.decode(mean)
    torch.testing.assert_close(other.decode(2.5 * mean), decoded, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_reconstructions_and_their_scores_by_hand() -> None:
    """The decoded means, in range; the score of each row, whatever stands beside it."""
    model, batch = make_ldm(make_autoencoder(PLAIN)), pictures(3)
    assert isinstance(model, Reconstructs) and isinstance(model, ScoresStages)
    assert isinstance(model, Visualises)
    autoencoder = model.space.autoencoder
    expected = autoencoder.decode(autoencoder.encode(batch.image).mean).clamp(-1, 1)
    images = model.reconstruct(batch.image)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-4)
    assert images.min() >= -1 and images.max() <= 1
    (scores,) = model.stage_scores(batch).values()
    assert list(model.stage_scores(batch)) == ["psnr"] and scores.shape == (3,)
    for row in range(3):
        mse = (expected[row] - batch.image[row]).double().square().mean().item()
        assert scores[row].item() == pytest.approx(10 * math.log10(4 / mse), rel=1e-4)
    perfect = make_ldm().stage_scores(batch)["psnr"]
    assert perfect.isfinite().all() and (perfect > 90).all()


class Recorder(nn.Module):
    """A network that records its inputs and predicts zero."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[tuple[Tensor, Tensor, TextFeatures]] = []
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x_t: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        self.inputs.append((x_t, t, text))
        return self.weight * x_t


@pytest.mark.parametrize("prediction", ["x0", "noise", "v"])
@pytest.mark.parametrize("from_cache", [True, False])
def test_the_network_learns_from_noisy_latents(prediction: str, from_cache: bool) -> None:
    """Scaled, with alpha and sigma of their timestep; cached latents and others alike."""
    model = make_ldm(process=replace(PROCESS, prediction=prediction), cond_drop_prob=0.0)
    model.network = recorder = Recorder()
    batch = pictures(4)
    if from_cache:
        batch.extra["latents"] = model.space.moments(batch.image)
    calls = EncodeCalls(model.space.autoencoder)
    text = model.text.encode(CAPTIONS)
    (turn,) = model.losses(batch, text, NoiseStreams(range(4)))
    assert turn.group == "denoiser" and calls.count == (not from_cache)
    ((x_t, t, used_text),) = recorder.inputs
    assert t.shape == (4,) and len(t.unique()) > 1
    x0 = (3 * F.pixel_unshuffle(batch.image, 2) + 0.5) * 0.4
    rate = torch.cos((torch.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2).double() ** 2
    alphas_cumprod = (rate[1:] / rate[:-1]).clamp(min=1e-3).cumprod(0)
    alpha = alphas_cumprod.sqrt()[t].float()[:, None, None, None]
    sigma = (1 - alphas_cumprod).sqrt()[t].float()[:, None, None, None]
    eps = (x_t - alpha * x0) / sigma
    assert abs(eps.mean()) < 0.05 and abs(eps.std() - 1) < 0.05
    assert abs((eps[0] * eps[1]).mean()) < 0.1
    target = {"x0": x0, "noise": eps, "v": alpha * eps - sigma * x0}[prediction]
    (value,) = turn.terms.values()
    torch.testing.assert_close(value, target.square().mean(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(used_text.words, text.words)


def test_each_visit_samples_new_latents() -> None:
    """From their distribution, cached or not; each row with its own noise."""
    model = make_ldm(make_autoencoder(PLAIN))
    space, batch = model.space, pictures(2)
    one, other = (space.encode(batch, NoiseStreams([k, 7])) for k in (1, 2))
    assert (one[0] - other[0]).abs().max() > 1e-3
    torch.testing.assert_close(one[1], other[1])
    posterior = space.autoencoder.encode(batch.image)
    eps = torch.randn(space.shape, generator=torch.Generator().manual_seed(7))
    row = posterior.mean[1] + (posterior.log_variance[1] / 2).exp() * eps
    torch.testing.assert_close(one[1], row * space.scale, atol=1e-5, rtol=1e-4)
    batch.extra["latents"] = space.moments(batch.image)
    torch.testing.assert_close(space.encode(batch, NoiseStreams([1, 7])), one)


def test_a_learned_variance_has_channels_and_a_term() -> None:
    process = replace(PROCESS, prediction="noise", variance="learned_range")
    model = make_ldm(process=process)
    x, t = torch.randn(2, *model.space.shape), torch.tensor([3, 700])
    assert model.network(x, t, model.text.encode(CAPTIONS[:2])).shape == (2, 24, 8, 8)
    (turn,) = turns(model, pictures(4))
    assert set(turn.terms) == {"mse_noise", "vlb"}
    assert all(value.isfinite() and value.requires_grad for value in turn.terms.values())
    assert model.generate(CAPTIONS, seed=1, sampler="ddpm").shape == (4, 3, SIZE, SIZE)


def test_a_denoiser_learns_a_few_pictures(shapes: CaptionedDataset) -> None:
    """In cached latents."""
    model = make_ldm()
    batch = shapes.batch(range(4), [0] * 4, 0)
    batch.extra["latents"] = model.space.moments(batch.image)
    model.space.scale.copy_(1 / batch.extra["latents"][:, :12].std())
    calls, trainer = EncodeCalls(model.space.autoencoder), trainer_for(model, shapes, lr=5e-3)
    errors = [trainer.advance(batch)["denoiser/mse_x0"].item() for _ in range(60)]
    assert sum(errors[-10:]) < 0.5 * sum(errors[:10]) and calls.count == 0


# --- pictures ---------------------------------------------------------------------------------


def test_a_picture_depends_on_seed_position_and_caption_alone() -> None:
    """Whatever stands beside it, and however many are sampled at once."""
    model = make_ldm()
    together = model.generate(CAPTIONS, seed=5)
    assert together.shape == (4, 3, SIZE, SIZE)
    for position, caption in enumerate(CAPTIONS):
        others = [*CAPTIONS[1:], "a"]
        others[position] = caption
        alone = model.generate(others, seed=5)[position]
        torch.testing.assert_close(alone, together[position], atol=1e-4, rtol=0)
    model.sample_batch_size = 3
    torch.testing.assert_close(model.generate(CAPTIONS, seed=5), together, atol=1e-4, rtol=0)
    assert (model.generate(CAPTIONS, seed=6) - together).abs().flatten(1).amax(1).min() > 1e-2
    twice = model.generate(["a red circle"] * 2, seed=5)
    assert (twice[0] - twice[1]).abs().max() > 1e-2
    changed = model.generate(["a blue square", *CAPTIONS[1:]], seed=5)
    assert (changed[0] - together[0]).abs().max() > 1e-4
    torch.testing.assert_close(changed[1:], together[1:], atol=1e-4, rtol=0)


def boxes_mask(*boxes: tuple[int, int, int, int]) -> Tensor:
    """(B, 1, S, S): True from row a to b and column c to d."""
    mask = torch.zeros(len(boxes), 1, SIZE, SIZE, dtype=torch.bool)
    for row, (a, b, c, d) in enumerate(boxes):
        mask[row, :, a:b, c:d] = True
    return mask


BOXES = [(4, 9, 3, 12), (0, 16, 8, 16), (7, 8, 7, 8), (0, 0, 0, 0)]


@pytest.mark.parametrize("lossy", [True, False])
@pytest.mark.parametrize("strength", [None, 0.5])
def test_pixels_outside_the_mask_stay_to_the_bit(lossy: bool, strength: float | None) -> None:
    """Though the autoencoder would change them; inside, something is painted."""
    model = make_ldm(make_autoencoder(PLAIN)) if lossy else make_ldm()
    images, mask = pictures(4, first=50).image, boxes_mask(*BOXES)
    assert not torch.equal(model.reconstruct(images), images)
    edited = model.generate(CAPTIONS, image=images, mask=mask, strength=strength, seed=2)
    outside = ~mask.expand(-1, 3, -1, -1)
    assert torch.equal(edited[outside], images[outside])
    inside = (edited - images).abs().flatten(1).amax(1)
    assert inside[:3].min() > 1e-3 and inside[3] == 0
    assert edited.min() >= -1 and edited.max() <= 1


@pytest.mark.parametrize("strength", [None, 0.5])
def test_latents_outside_the_mask_are_those_of_the_picture(
    strength: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit at the end: every latent without a masked pixel. A latent with a single one is
    repainted as a whole. At full strength they are encoded without the masked pixels, since the
    encoder looks at neighbours."""
    model = make_ldm(make_autoencoder(PLAIN))
    space, images, mask = model.space, pictures(4, first=50).image, boxes_mask(*BOXES)
    ends: list[Tensor] = []
    original = space.decode
    monkeypatch.setattr(space, "decode", lambda x: ends.append(x) or original(x))
    model.generate(CAPTIONS, image=images, mask=mask, strength=strength, seed=2)
    (x0,) = ends
    visible = images if strength else torch.where(mask, 0.0, images)
    with torch.no_grad():
        moved = (x0 - space.encode_image(visible)).abs().amax(1)
    latent_mask = torch.zeros(4, 8, 8, dtype=torch.bool)
    for row, _, y, x in mask.nonzero().tolist():
        latent_mask[row, y // 2, x // 2] = True
    assert latent_mask.flatten(1).sum(1).tolist() == [3 * 5, 32, 1, 0]
    assert not moved[~latent_mask].any() and (moved[latent_mask] > 0).all()


def test_masked_pixels_leave_no_trace_at_full_strength() -> None:
    """At half strength they do."""
    model = make_ldm(make_autoencoder(PLAIN))
    images, mask = pictures(4, first=50).image, boxes_mask(*BOXES)
    others = torch.where(mask, pictures(4, first=70).image, images)
    one, other = (model.generate(CAPTIONS, image=i, mask=mask, seed=2) for i in (images, others))
    assert torch.equal(one, other) and not torch.equal(images, others)
    one, other = (
        model.generate(CAPTIONS, image=i, mask=mask, strength=0.5, seed=2) for i in (images, others)
    )
    assert (one - other).abs().flatten(1).amax(1)[:3].min() > 1e-3


def test_an_edit_depends_on_its_own_row_alone() -> None:
    model = make_ldm()
    images, mask = pictures(4, first=50).image, boxes_mask(*BOXES)
    for used in (None, mask):
        together = model.generate(CAPTIONS, image=images, mask=used, seed=3)
        others = images.flip(0).clone()
        others[1] = images[1]
        masks = None if used is None else torch.stack([*[~used[0]], used[1], *~used[2:]])
        captions = ["a", CAPTIONS[1], "a", "a red"]
        alone = model.generate(captions, image=others, mask=masks, seed=3)
        torch.testing.assert_close(alone[1], together[1], atol=1e-4, rtol=0)
        model.sample_batch_size = 3
        parts = model.generate(CAPTIONS, image=images, mask=used, seed=3)
        torch.testing.assert_close(parts, together, atol=1e-4, rtol=0)
        model.sample_batch_size = 64


# --- runs -------------------------------------------------------------------------------------


def test_a_run_holds_autoencoder_and_scale(smoke_run: Callable[[str], Any]) -> None:
    """In one file, with which the same pictures are sampled and reconstructed."""
    folder, trained = smoke_run("ldm")
    saved = load_tensors(folder / "model.safetensors")
    assert {name.split(".")[0] for name in saved} == {"network", "space", "text"}
    assert saved["space.scale"].item() not in (0.0, 1.0)
    loaded: Any = lineage.load(folder)
    assert torch.equal(loaded.space.scale, saved["space.scale"])
    assert torch.equal(loaded.space.scale, trained.space.scale)
    for name, tensor in trained.space.autoencoder.state_dict().items():
        assert torch.equal(tensor, saved[f"space.autoencoder.{name}"]), name
    assert torch.equal(loaded.generate(CAPTIONS, seed=4), trained.generate(CAPTIONS, seed=4))
    images = pictures(4).image
    assert torch.equal(loaded.reconstruct(images), trained.reconstruct(images))
    options = {"image": images, "mask": boxes_mask(*BOXES), "seed": 1}
    assert torch.equal(*(model.generate(CAPTIONS, **options) for model in (loaded, trained)))


def test_a_run_with_lpips_is_loaded_without_it(
    files: tuple[str, ...], train_run: Callable[..., Any], tmp_path: Path
) -> None:
    settings = {
        "autoencoder.lpips": ",".join(files),
        "autoencoder.perceptual_weight": 1.0,
        "autoencoder.disc_weight": 0.0,
        "autoencoder.disc_layers": 1,
        "train.precision": "fp32",
    }
    export(load_dataset("shapes", "train", 16), tmp_path / "data", 12)
    data = f"imagefolder:{tmp_path / 'data'}"
    run = train_run(tmp_path / "run", "ldm", settings, steps=4, data=data)
    loaded = lineage.load(run.folder)
    assert torch.equal(loaded.generate(CAPTIONS, seed=4), run.system.generate(CAPTIONS, seed=4))


@pytest.mark.parametrize("channel_mult", [(1, 2, 4, 4, 4), (1, 2, 2, 2, 2, 2)], ids=str)
def test_a_unet_that_cannot_halve_the_latents_is_refused(channel_mult: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="side of the latents=8") as caught:
        make_ldm(unet=replace(UNET, channel_mult=channel_mult))
    assert "\n" not in str(caught.value)
