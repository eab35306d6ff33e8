"""`vqgan`'s codec: the step by hand, two turns that train different parts, LPIPS."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lineage import runs
from lineage.config import OptimConfig, TrainConfig, to_dict
from lineage.data.contract import Batch, CaptionedDataset
from lineage.errors import UserError
from lineage.nn import autoencoder
from lineage.nn.autoencoder import AutoencoderConfig
from lineage.nn.noise import NoiseStreams
from lineage.nn.perceptual import VGG16, load_lpips
from lineage.recipes import vqgan as recipe
from lineage.system import Turn
from lineage.text.tokenizer import WordTokenizer
from lineage.training.loop import Trainer
from lineage.vqvae.quantise import QuantiserConfig
from lineage.vqvae.vqgan import VQGAN, VQGANConfig

SIZE = 8
TINY = VQGANConfig(
    net=AutoencoderConfig(
        channels=4,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attn_resolutions=(4,),
        resolution=SIZE,
        z_channels=6,
    ),
    quantiser=QuantiserConfig(
        num_codes=7, code_dim=5, update="loss", init="normal", restart_threshold=0.0
    ),
    disc_channels=4,
    disc_layers=1,
)


def make_codec(**changes: Any) -> VQGAN:
    torch.manual_seed(0)
    codec = VQGAN(replace(TINY, **changes))
    with torch.no_grad():  # with initial weights the logits hardly depend on the picture
        for parameter in codec.discriminator.parameters():
            parameter.mul_(8.0 if parameter.dim() > 1 else 1.0)
    return codec


def make_batch(count: int = 4, side: int = SIZE) -> Batch:
    image = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return Batch(image, [""] * count, None, [str(k) for k in range(count)])


def turns_of(codec: VQGAN, batch: Batch) -> Iterator[Turn]:
    return codec.losses(batch, None, NoiseStreams(range(len(batch))))


def trainer_for(codec: VQGAN, data: CaptionedDataset, batch_size: int = 4, **optim: Any) -> Trainer:
    fields = {"lr": 2e-3, "warmup": 0, "decay": "none", "weight_decay": 0.0, **optim}
    train = TrainConfig(batch_size=batch_size, precision="fp32", prefetch=0)
    return Trainer(codec, data, OptimConfig(**fields), train, stage="codec")


def train(codec: VQGAN, data: CaptionedDataset, steps: int) -> Trainer:
    trainer = trainer_for(codec, data)
    for number in range(steps):
        trainer.advance(trainer.loader.at(number))
    return trainer


def reconstruct(codec: VQGAN, image: Tensor) -> Tensor:
    """Encoder, 1 x 1, nearest code, 1 x 1, decoder, with a straight-through gradient."""
    z_e = codec.quant_conv(codec.encoder(image))
    b, _, h, w = z_e.shape
    codes = codec.quantiser.codebook
    distances = (z_e.permute(0, 2, 3, 1).reshape(-1, 1, z_e.shape[1]) - codes).norm(dim=2)
    z_q = codes[distances.argmin(1)].view(b, h, w, -1).permute(0, 3, 1, 2)
    return codec.decoder(codec.post_quant_conv(z_e + (z_q - z_e).detach()))


# --- the codec's turn -------------------------------------------------------------------------


@pytest.mark.parametrize("perceptual_weight", [1.0, 0.0, 0.3])
@pytest.mark.parametrize("disc_weight", [0.8, 0.1])
def test_the_adversarial_term_by_hand(disc_weight: float, perceptual_weight: float) -> None:
    """Equation 7 balances it with pixels and perceptual distance, without the quantiser's terms;
    `disc_weight` is a further factor."""
    codec = make_codec(disc_weight=disc_weight, perceptual_weight=perceptual_weight).eval()
    batch = make_batch()
    turn = next(turns_of(codec, batch))
    decoded = reconstruct(codec, batch.image)
    generator_loss = -codec.discriminator(decoded).mean()
    nll_loss = (decoded - batch.image).abs().mean()
    if perceptual_weight:
        features = [codec.discriminator.features(x) for x in (decoded, batch.image)]
        pairs = zip(*features, strict=True)
        distance = sum((a - b.detach()).abs().mean() for a, b in pairs) / 2
        torch.testing.assert_close(turn.terms["perceptual"], perceptual_weight * distance)
        nll_loss = nll_loss + perceptual_weight * distance
    kernel = codec.decoder.conv_out.weight
    nll_norm, generator_norm = (
        torch.autograd.grad(loss, kernel, retain_graph=True)[0].norm()
        for loss in (nll_loss, generator_loss)
    )
    weight = float(nll_norm) / (float(generator_norm) + 1e-4)
    assert 1e-3 < weight < 1e4
    assert turn.metrics()["adaptive_disc_weight"].item() == pytest.approx(weight, rel=1e-3)
    expected = disc_weight * weight * generator_loss.item()
    assert turn.terms["generator"].item() == pytest.approx(expected, rel=1e-3)
    names = {"pixels", "generator", "codebook", "commitment"}
    assert set(turn.terms) == names | ({"perceptual"} if perceptual_weight else set())


def test_the_adversarial_gradient_is_as_long_as_that_of_the_reconstruction() -> None:
    """The purpose of the weight: in the last kernel, before `disc_weight`."""
    codec = make_codec(disc_weight=1.0).eval()
    terms = next(turns_of(codec, make_batch())).terms
    kernel = codec.decoder.conv_out.weight
    nll_norm, generator_norm = (
        torch.autograd.grad(loss, kernel, retain_graph=True)[0].norm().item()
        for loss in (terms["pixels"] + terms["perceptual"], terms["generator"])
    )
    assert generator_norm == pytest.approx(nll_norm, rel=1e-2)


@pytest.mark.parametrize("beta", [0.25, 1.0])
def test_the_other_terms_of_both_turns_by_hand(beta: float) -> None:
    """L1 of pixels; codebook and commitment loss, the latter with beta; half of each hinge."""
    codec = make_codec(quantiser=replace(TINY.quantiser, beta=beta)).eval()
    batch = make_batch()
    codec_turn, disc_turn = turns_of(codec, batch)
    decoded = reconstruct(codec, batch.image)
    z_e = codec.quant_conv(codec.encoder(batch.image)).permute(0, 2, 3, 1)
    z_q = codec.quantiser.codebook[codec.encode(batch.image)]
    gap = (z_e - z_q).square().mean().item()
    terms = {name: term.item() for name, term in codec_turn.terms.items()}
    assert terms["pixels"] == pytest.approx((decoded - batch.image).abs().mean().item(), rel=1e-5)
    assert terms["codebook"] == pytest.approx(gap, rel=1e-4)
    assert terms["commitment"] == pytest.approx(beta * gap, rel=1e-4)
    real, fake = (codec.discriminator(x).flatten().tolist() for x in (batch.image, decoded))
    expected = {
        "real": sum(max(0.0, 1 - x) for x in real) / len(real) / 2,
        "fake": sum(max(0.0, 1 + x) for x in fake) / len(fake) / 2,
    }
    terms = {name: term.item() for name, term in disc_turn.terms.items()}
    assert terms == pytest.approx(expected, rel=1e-4)
    metrics = disc_turn.metrics()
    assert metrics["accuracy_real"].item() == pytest.approx(sum(x > 0 for x in real) / len(real))
    assert metrics["accuracy_fake"].item() == pytest.approx(sum(x < 0 for x in fake) / len(fake))


def test_features_of_the_discriminator_are_those_of_its_forward_pass() -> None:
    """After each activation; the logits are not among them."""
    disc = make_codec(disc_layers=3, disc_channels=3).discriminator.eval()
    image = make_batch(2, 32).image
    expected: list[Tensor] = []
    hooks = [
        m.register_forward_hook(lambda _, __, output: expected.append(output))
        for m in disc.modules()
        if isinstance(m, nn.LeakyReLU)
    ]
    disc(image)
    for hook in hooks:
        hook.remove()
    features = disc.features(image)
    assert len(features) == len(expected) == 4
    for ours, theirs in zip(features, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert [x.shape[1] for x in features] == [3, 6, 12, 24]


def test_metrics_of_a_step() -> None:
    codec, batch = make_codec(), make_batch()
    metrics = [turn.metrics() for turn in turns_of(codec, batch)]
    usage = {"codebook_usage", "unused_codes", "perplexity"}
    assert set(metrics[0]) == {"psnr", "adaptive_disc_weight"} | usage
    assert set(metrics[1]) == {"accuracy_real", "accuracy_fake"}
    for values in metrics:
        assert all(value.shape == () and not value.requires_grad for value in values.values())
    mse = (reconstruct(codec, batch.image).clamp(-1, 1) - batch.image).square().mean()
    expected = 10 * (4 / mse.detach()).log10()
    torch.testing.assert_close(metrics[0]["psnr"], expected, rtol=1e-3, atol=1e-3)


# --- two turns --------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"disc_weight": 0.0}, {"disc_start": 5}], ids=str)
def test_the_codec_s_turn_leaves_no_gradient_in_the_discriminator(
    changes: dict[str, Any], shapes: CaptionedDataset
) -> None:
    """Neither from the adversarial term nor from the perceptual distance: the next turn would add
    to it."""
    codec = make_codec(**changes)
    trainer = trainer_for(codec, shapes)
    has_gradient: list[bool] = []
    original = trainer.groups["codec"].update

    def update(*arguments: Any) -> Tensor:
        norm = original(*arguments)
        has_gradient.append(any(p.grad is not None for p in codec.discriminator.parameters()))
        return norm

    trainer.groups["codec"].update = update  # type: ignore[method-assign]
    trainer.advance(trainer.loader.at(0))
    assert has_gradient == [False]


def test_the_discriminator_s_turn_has_a_gradient_in_the_discriminator_alone() -> None:
    codec, batch = make_codec(), make_batch()
    batch.image.requires_grad_()
    _, turn = turns_of(codec, batch)
    codec.zero_grad(set_to_none=True)
    torch.stack(list(turn.terms.values())).sum().backward()
    parts = {n.split(".")[0] for n, p in codec.named_parameters() if p.grad is not None}
    assert parts == {"discriminator"}
    assert all(p.grad is not None and p.grad.any() for p in codec.discriminator.parameters())


def test_the_perceptual_distance_has_a_gradient_in_encoder_and_decoder() -> None:
    """Straight through the codes, which have none."""
    codec = make_codec().eval()
    turn = next(turns_of(codec, make_batch()))
    codec.zero_grad(set_to_none=True)
    turn.terms["perceptual"].backward()
    for part in (codec.encoder, codec.quant_conv, codec.post_quant_conv, codec.decoder):
        assert any(p.grad is not None and p.grad.any() for p in part.parameters())
    assert codec.quantiser.embedding.grad is None or not codec.quantiser.embedding.grad.any()


def test_both_turns_use_the_same_reconstruction(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step decodes once, before the codec is updated."""
    codec, batch, decoded = make_codec(), make_batch(), []
    original = codec.decoder.forward
    monkeypatch.setattr(
        codec.decoder, "forward", lambda z: decoded.append(original(z)) or decoded[-1]
    )
    inputs: list[Tensor] = []
    hook = codec.discriminator.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    turns = turns_of(codec, batch)
    next(turns)
    with torch.no_grad():
        for parameter in codec.decoder.parameters():
            parameter.add_(1.0)
    next(turns)
    hook.remove()
    assert len(decoded) == 1 and torch.equal(inputs[-1], decoded[0])
    assert torch.equal(inputs[-2], batch.image)


@pytest.mark.parametrize("start", [0, 1, 3])
def test_the_discriminator_sets_in_at_its_step(start: int, shapes: CaptionedDataset) -> None:
    """Before, there is no adversarial term, no second turn, and no change of the discriminator."""
    codec = make_codec(disc_start=start)
    trainer = trainer_for(codec, shapes)
    before = {n: p.detach().clone() for n, p in codec.discriminator.named_parameters()}
    for number in range(5):
        values = trainer.advance(trainer.loader.at(number))
        on = number >= start
        assert ("codec/generator" in values) == on == ("discriminator/real" in values)
        assert ("metric/adaptive_disc_weight" in values) == on
        now = dict(codec.discriminator.named_parameters())
        assert all(torch.equal(p, now[n]) for n, p in before.items()) == (not on)
        assert "codec/perceptual" in values


def test_a_resumed_codec_continues_alike(shapes: CaptionedDataset) -> None:
    """Bit for bit, past the step at which the discriminator sets in: the step is saved."""
    changes = {"disc_start": 4, "quantiser": QuantiserConfig(num_codes=7, code_dim=5)}
    whole = train(make_codec(**changes), shapes, 6)
    first = train(make_codec(**changes), shapes, 3)
    second = trainer_for(make_codec(**changes), shapes)
    second.load_state(first.state())
    for number in (3, 4, 5):
        values = second.advance(second.loader.at(number))
        assert ("codec/generator" in values) == (number >= 4)
    for key, tensor in whole.system.state_dict().items():
        assert torch.equal(tensor, second.system.state_dict()[key]), key


def test_without_adversarial_loss_there_is_one_turn_and_one_group() -> None:
    """A second group would wait for its optimiser's first step forever."""
    codec = make_codec(disc_weight=0.0)
    assert list(codec.groups()) == ["codec"]
    (turn,) = turns_of(codec, make_batch())
    assert turn.group == "codec" and "adaptive_disc_weight" not in turn.metrics()


# --- encode and decode ------------------------------------------------------------------------


@pytest.mark.parametrize("side", [8, 16, 24])
@torch.no_grad()
def test_encode_and_decode_do_what_training_does(side: int) -> None:
    """At any size; decoded pictures are clamped floats."""
    codec, image = make_codec().eval(), make_batch(3, side).image
    codec.decoder.conv_out.weight.mul_(5)
    ids = codec.encode(image)
    assert ids.shape == (3, side // 2, side // 2) and codec.factor == 2 and codec.num_codes == 7
    assert ids.dtype == torch.int64 and len(ids.unique()) > 1
    decoded, expected = codec.decode(ids), reconstruct(codec, image)
    torch.testing.assert_close(decoded, expected.clamp(-1, 1), rtol=1e-3, atol=1e-4)
    assert decoded.abs().max() == 1 and not torch.equal(decoded, expected)


@torch.no_grad()
def test_a_row_does_not_depend_on_the_others() -> None:
    codec, image = make_codec().eval(), make_batch(5).image
    ids = codec.encode(image)
    for k in range(5):
        assert torch.equal(codec.encode(image[k : k + 1]), ids[k : k + 1])
        torch.testing.assert_close(codec.decode(ids[k : k + 1]), codec.decode(ids)[k : k + 1])


def test_losses_in_half_precision() -> None:
    """Terms and the adaptive weight are float32 and finite."""
    codec, batch = make_codec(), make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        turns = list(turns_of(codec, batch))
    for turn in turns:
        assert all(t.dtype == torch.float32 and t.isfinite() for t in turn.terms.values())
    assert turns[0].metrics()["adaptive_disc_weight"].dtype == torch.float32
    torch.stack(list(turns[0].terms.values())).sum().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for n, p in codec.named_parameters()
        if not n.startswith("discriminator")
    )


@pytest.mark.parametrize(
    "changes", [{}, {"disc_weight": 0.0}, {"disc_weight": 0.0, "perceptual_weight": 0.0}], ids=str
)
def test_a_few_pictures_are_learnt(changes: dict[str, Any], shapes: CaptionedDataset) -> None:
    quantiser = replace(TINY.quantiser, num_codes=16, init="kmeans")
    codec = make_codec(quantiser=quantiser, **changes)
    trainer = trainer_for(codec, shapes, lr=5e-3, beta1=0.5)
    batch = trainer.loader.at(0)
    pixels = [trainer.advance(batch)["codec/pixels"].item() for _ in range(80)]
    assert sum(pixels[-5:]) < 0.5 * sum(pixels[:5])


# --- LPIPS ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Files of VGG16 and LPIPS with random weights under their authors' names."""
    folder = tmp_path_factory.mktemp("lpips")
    torch.manual_seed(3)
    state = {name: 1.4 * tensor for name, tensor in VGG16().state_dict().items()}
    torch.save({**state, "classifier.0.weight": torch.zeros(1)}, folder / "vgg16.pth")
    widths = (64, 128, 256, 512, 512)
    weights = {f"lin{k}.model.1.weight": torch.rand(1, w, 1, 1) for k, w in enumerate(widths)}
    torch.save(weights, folder / "vgg.pth")
    return str(folder / "vgg16.pth"), str(folder / "vgg.pth")


def test_lpips_replaces_the_discriminator_s_features(lpips_files: tuple[str, str]) -> None:
    """A mean over rows, times its weight, with a gradient in the decoder. LPIPS has no parameters
    and no place in the codec's weights."""
    codec = make_codec(lpips=lpips_files, perceptual_weight=0.3, disc_weight=0.0)
    batch = make_batch(2, 16)
    assert not any("lpips" in key for key in codec.state_dict())
    assert not any("lpips" in name for name, _ in codec.named_parameters())
    turn = next(turns_of(codec.eval(), batch))
    lpips = load_lpips(lpips_files)
    expected = 0.3 * lpips(batch.image, reconstruct(codec, batch.image)).mean()
    torch.testing.assert_close(turn.terms["perceptual"], expected, rtol=1e-4, atol=1e-6)
    turn.terms["perceptual"].backward()
    gradient = codec.decoder.conv_out.weight.grad
    assert gradient is not None and gradient.any() and gradient.isfinite().all()


def test_lpips_moves_with_the_codec(lpips_files: tuple[str, str]) -> None:
    codec = make_codec(lpips=lpips_files).to("meta")
    assert codec.lpips is not None and all(buffer.is_meta for buffer in codec.lpips.buffers())


def test_weights_of_a_run_with_lpips_load_without_its_files(lpips_files: tuple[str, str]) -> None:
    with_lpips, without = make_codec(lpips=lpips_files), make_codec()
    without.load_state_dict(with_lpips.state_dict())
    config = replace(recipe.PRESETS["smoke"], codec=replace(TINY, lpips=lpips_files))
    assert config.without_files() == replace(config, codec=TINY)


def test_missing_files_are_named_before_training(tmp_path: Path) -> None:
    missing = str(tmp_path / "no.pth")
    with pytest.raises(UserError, match=r"no\.pth"):
        VQGAN(replace(TINY, lpips=(missing,)))
    config: Any = runs.configure(
        "vqgan", preset_name="smoke", settings={"codec.lpips": f"{missing},b.pth"}
    )
    assert config.codec.lpips == (missing, "b.pth")


# --- configuration ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("disc_channels", 0),
        ("disc_layers", 0),
        ("disc_weight", -0.1),
        ("disc_start", -1),
        ("perceptual_weight", float("nan")),
    ],
)
def test_impossible_settings_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=name) as caught:
        VQGANConfig(**{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("size", "layers"), [(16, 3), (16, 4), (8, 2), (32, 4)])
def test_a_discriminator_larger_than_the_picture_is_refused(
    size: int, layers: int, tokenizer: WordTokenizer
) -> None:
    """Three cells a side must be left for two more convolutions of 4 x 4."""
    settings = {"size": size, "codec.disc_layers": layers}
    config: Any = runs.configure("vqgan", preset_name="smoke", settings=settings)
    with pytest.raises(UserError, match=f"size={size} is too small") as caught:
        runs.build(recipe.stages(config, tokenizer))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", recipe.PRESETS)
def test_presets_encode_and_decode_pictures_of_their_size(
    name: str, tokenizer: WordTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device; the discriminator returns more than one logit."""
    monkeypatch.setattr(autoencoder, "attend", lambda query, key, value: value)  # for any device
    config = recipe.PRESETS[name]
    with torch.device("meta"):
        codec, prior = (stage.construct() for stage in recipe.stages(config, tokenizer))
        image = torch.empty(2, 3, config.size, config.size)
        grid = codec.quant_conv(codec.encoder(image))
        side = config.size // codec.factor
        assert grid.shape == (2, config.codec.quantiser.code_dim, side, side)
        assert codec.decoder(codec.post_quant_conv(grid)).shape == image.shape
        assert codec.discriminator(image).shape[2] >= 2
    assert prior.grid_size == side
    assert config.codec.net.resolution == config.size


def test_preset_paper_is_the_authors() -> None:
    """Their configuration for ImageNet at f = 16: a codebook that its loss moves, without restarts;
    Adam at 4.5e-6 a picture; the discriminator after 250,000 steps."""
    config = recipe.PRESETS["paper"]
    codec, quantiser, optim = config.codec, config.codec.quantiser, config.codec_optim
    assert (config.size, codec.net.factor) == (256, 16)
    assert (quantiser.num_codes, quantiser.code_dim, quantiser.beta) == (1024, 256, 0.25)
    assert (quantiser.update, quantiser.init) == ("loss", "normal")
    assert quantiser.restart_threshold == 0.0
    assert (codec.disc_weight, codec.disc_start, codec.perceptual_weight) == (0.8, 250_001, 1.0)
    assert (codec.disc_channels, codec.disc_layers) == (64, 3)
    assert (optim.name, optim.beta1, optim.beta2) == ("adam", 0.5, 0.9)
    assert optim.lr == pytest.approx(4.5e-6 * config.codec_batch_size)
    assert to_dict(config)["codec"]["lpips"] == []
