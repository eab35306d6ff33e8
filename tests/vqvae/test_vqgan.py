"""VQGAN's codec: equation 7 by hand, turns that keep apart, and the two perceptual distances."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
from lineage.vqvae.vqgan import VQGAN, VQGANConfig, adaptive_weight

TINY = VQGANConfig(
    AutoencoderConfig(4, (1, 2), 1, (4,), 8, 6),
    QuantiserConfig(7, 5, codebook="loss", start="normal", restart=0.0),
    discriminator=4,
    layers=1,
)
SIZE = 8


def made(**changes: Any) -> VQGAN:
    torch.manual_seed(0)
    codec = VQGAN(replace(TINY, **changes))
    with torch.no_grad():  # at the weights of the start a picture hardly shows in a logit
        for parameter in codec.discriminator.parameters():
            parameter.mul_(8.0 if parameter.dim() > 1 else 1.0)
    return codec


def pictures(count: int = 4, side: int = SIZE) -> Batch:
    image = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return Batch(image, [""] * count, None, [str(k) for k in range(count)])


def turns(codec: VQGAN, batch: Batch) -> Iterator[Turn]:
    return codec.losses(batch, codec.text.encode(batch.caption), NoiseStreams(range(len(batch))))


def trainer_for(codec: VQGAN, data: CaptionedDataset, batch: int = 4, **optim: Any) -> Trainer:
    given = {"lr": 2e-3, "warmup": 0, "decay": "none", "weight_decay": 0.0, **optim}
    train = TrainConfig(batch=batch, precision="fp32", prefetch=0)
    return Trainer(codec, data, OptimConfig(**given), train, stage="codec")


def trained(codec: VQGAN, data: CaptionedDataset, steps: int, **optim: Any) -> Trainer:
    trainer = trainer_for(codec, data, **optim)
    for number in range(steps):
        trainer.advance(trainer.loader.at(number))
    return trainer


def reconstructed(codec: VQGAN, image: Tensor) -> Tensor:
    """Encoder, 1 x 1, nearest code, 1 x 1, decoder."""
    z = codec.quant_conv(codec.encoder(image))
    b, _, h, w = z.shape
    far = (z.permute(0, 2, 3, 1).reshape(-1, 1, z.shape[1]) - codec.quantiser.codes).norm(dim=2)
    code = codec.quantiser.codes[far.argmin(1)].view(b, h, w, -1).permute(0, 3, 1, 2)
    return codec.decoder(codec.post_quant_conv(z + (code - z).detach()))


# --- equation 7 -------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-3, 50.0])
def test_the_adaptive_weight_is_a_ratio_of_lengths(scale: float) -> None:
    """|d L_rec / d last| / (|d L_gan / d last| + 0.0001), without a gradient of its own; the same
    graph can be used again."""
    last, x = torch.randn(3, 4, 3, 3, requires_grad=True), torch.randn(2, 4, 6, 6)
    drawn = F.conv2d(x, last, padding=1)
    reconstruction, adversary = (drawn - 1).square().mean(), scale * drawn.tanh().mean()
    found = adaptive_weight(reconstruction, adversary, last)
    lengths = []
    for loss in (reconstruction, adversary):
        (grad,) = torch.autograd.grad(loss, last, retain_graph=True)
        lengths.append(float(grad.double().square().sum()) ** 0.5)
    expected = min(1e4, lengths[0] / (lengths[1] + 1e-4))
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert found.shape == () and not found.requires_grad and last.grad is None
    (reconstruction + found * adversary).backward()


def test_the_adaptive_weight_has_an_end() -> None:
    """At 10,000, where an adversary has no gradient to speak of; and at 0 there is none to
    balance."""
    last = torch.ones(2, requires_grad=True)
    none, much, some = 0 * last.sum(), 1e3 * last.sum(), last.sum()
    assert adaptive_weight(much, none, last).item() == 10_000
    assert adaptive_weight(0.5 * some, none, last).item() == pytest.approx(0.5 * 2**0.5 / 1e-4)
    assert adaptive_weight(none, some, last).item() == 0
    half = adaptive_weight(much, some.to(torch.bfloat16), last)
    assert half.item() == pytest.approx(1e3, rel=1e-3) and half.dtype == torch.float32


@pytest.mark.parametrize("perceptual", [1.0, 0.0, 0.3])
@pytest.mark.parametrize("adversary", [0.8, 0.1])
def test_the_step_uses_equation_7(adversary: float, perceptual: float) -> None:
    """Of reconstruction and perceptual distance together, for the decoder's last kernel, without
    the quantiser's terms; times the configured factor."""
    codec, batch = made(adversary=adversary, perceptual=perceptual).eval(), pictures()
    turn = turns(codec, batch)
    _, terms = next(turn)
    fake = reconstructed(codec, batch.image)
    fooled = -codec.discriminator(fake).mean()
    near = (fake - batch.image).abs().mean()
    if perceptual:
        pairs = zip(
            codec.discriminator.features(fake),
            codec.discriminator.features(batch.image),
            strict=True,
        )
        distance = sum((a - b.detach()).abs().mean() for a, b in pairs) / 2
        torch.testing.assert_close(terms["perceptual"], perceptual * distance)
        near = near + perceptual * distance
    last = codec.decoder.conv_out.weight
    one, other = (torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (near, fooled))
    weight = float(one.norm()) / (float(other.norm()) + 1e-4)
    assert 1e-3 < weight < 1e4
    assert codec.facts["adversary_weight"].item() == pytest.approx(weight, rel=1e-3)
    assert terms["adversary"].item() == pytest.approx(adversary * weight * fooled.item(), rel=1e-3)
    assert set(terms) == {"pixels", "adversary", "codebook", "commitment"} | (
        {"perceptual"} if perceptual else set()
    )


def test_the_adversary_s_gradient_is_as_long_as_that_of_the_reconstruction() -> None:
    """Which is what the weight is for: in the last kernel, before the factor."""
    codec = made(adversary=1.0).eval()
    _, terms = next(turns(codec, pictures()))
    last = codec.decoder.conv_out.weight
    near = terms["pixels"] + terms["perceptual"]
    lengths = [
        torch.autograd.grad(loss, last, retain_graph=True)[0].norm().item()
        for loss in (near, terms["adversary"])
    ]
    assert lengths[1] == pytest.approx(lengths[0], rel=1e-2)


# --- terms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.25, 1.0])
def test_terms_of_both_turns_by_hand(beta: float) -> None:
    """L1 of pixels; the quantiser's two with beta on the encoder's; half a hinge for each side."""
    codec = made(quantiser=replace(TINY.quantiser, beta=beta)).eval()
    batch = pictures()
    found = dict(turns(codec, batch))
    fake = reconstructed(codec, batch.image)
    z = codec.quant_conv(codec.encoder(batch.image)).permute(0, 2, 3, 1)
    gap = (z - codec.quantiser.codes[codec.encode(batch.image)]).square().mean().item()
    spoken = {name: term.item() for name, term in found["codec"].items()}
    assert spoken["pixels"] == pytest.approx((fake - batch.image).abs().mean().item(), rel=1e-5)
    assert spoken["codebook"] == pytest.approx(gap, rel=1e-4)
    assert spoken["commitment"] == pytest.approx(beta * gap, rel=1e-4)
    logits = [codec.discriminator(image).flatten().tolist() for image in (batch.image, fake)]
    real, wrong = (
        sum(max(0.0, 1 + sign * value) for value in side) / len(side) / 2
        for sign, side in zip((-1, 1), logits, strict=True)
    )
    judged = {name: term.item() for name, term in found["discriminator"].items()}
    assert judged == pytest.approx({"real": real, "fake": wrong}, rel=1e-4)
    right = [sum(v > 0 for v in logits[0]), sum(v < 0 for v in logits[1])]
    assert codec.facts["accuracy_real"].item() == pytest.approx(right[0] / len(logits[0]))
    assert codec.facts["accuracy_fake"].item() == pytest.approx(right[1] / len(logits[1]))


def test_the_discriminator_sees_the_picture_behind_each_activation() -> None:
    """Its features are what its own forward pass goes through; the logit is none of them."""
    look = made(layers=3, discriminator=3).discriminator.eval()
    image = pictures(2, 32).image
    kept: list[Tensor] = []
    hooks = [
        m.register_forward_hook(lambda *given: kept.append(given[2]))
        for m in look.modules()
        if isinstance(m, nn.LeakyReLU)
    ]
    look(image)
    for hook in hooks:
        hook.remove()
    found = look.features(image)
    assert len(found) == len(kept) == 4
    for ours, theirs in zip(found, kept, strict=True):
        assert torch.equal(ours, theirs)
    assert [f.shape[1] for f in found] == [3, 6, 12, 24]


def test_facts_are_scalars_without_gradient() -> None:
    codec, batch = made(), pictures()
    for _ in turns(codec, batch):
        pass
    names = {"psnr", "usage", "dead", "perplexity", "adversary_weight"}
    assert set(codec.facts) == names | {"accuracy_real", "accuracy_fake"}
    assert all(f.shape == () and not f.requires_grad for f in codec.facts.values())
    error = (reconstructed(codec, batch.image).clamp(-1, 1) - batch.image).square().mean()
    expected = 10 * (4 / error).log10()
    torch.testing.assert_close(codec.facts["psnr"], expected.detach(), rtol=1e-3, atol=1e-3)


# --- turns ------------------------------------------------------------------------------------


def parts_that_move(
    codec: VQGAN, data: CaptionedDataset, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, set[str]]]:
    """(turn, parts whose parameters it moved) of one step of the loop."""
    trainer = trainer_for(codec, data)
    moved: list[tuple[str, set[str]]] = []
    for name, group in trainer.groups.items():
        original = group.update

        def update(*arguments: Any, call: Any = original, name: str = name) -> Tensor:
            before = {n: p.detach().clone() for n, p in codec.named_parameters()}
            norm = call(*arguments)
            now = dict(codec.named_parameters())
            parts = {n.split(".")[0] for n, p in before.items() if not torch.equal(p, now[n])}
            moved.append((name, parts))
            return norm

        monkeypatch.setattr(group, "update", update)
    trainer.advance(trainer.loader.at(0))
    return moved


CODEC = {"encoder", "quant_conv", "quantiser", "post_quant_conv", "decoder"}


def test_codec_and_discriminator_move_apart(
    shapes: CaptionedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = parts_that_move(made(), shapes, monkeypatch)
    assert moved == [("codec", CODEC), ("discriminator", {"discriminator"})]


@pytest.mark.parametrize("changes", [{}, {"adversary": 0.0}, {"adversary_from": 5}], ids=str)
def test_the_codec_s_turn_leaves_no_gradient_in_the_discriminator(
    changes: dict[str, Any], shapes: CaptionedDataset
) -> None:
    """Neither the adversary nor the perceptual distance: else the next turn would begin with it."""
    codec = made(**changes)
    trainer = trainer_for(codec, shapes)
    seen: list[bool] = []
    original = trainer.groups["codec"].update

    def update(*arguments: Any) -> Tensor:
        norm = original(*arguments)
        seen.append(any(p.grad is not None for p in codec.discriminator.parameters()))
        return norm

    trainer.groups["codec"].update = update  # type: ignore[method-assign]
    trainer.advance(trainer.loader.at(0))
    assert seen == [False]


def test_the_discriminator_s_turn_reaches_the_discriminator_alone() -> None:
    """The picture that it judges is cut off from the codec, and the real one needs no gradient."""
    codec, batch = made(), pictures()
    batch.image.requires_grad_()
    turn = turns(codec, batch)
    next(turn)
    _, terms = next(turn)
    codec.zero_grad(set_to_none=True)
    torch.stack(list(terms.values())).sum().backward()
    reached = {n.split(".")[0] for n, p in codec.named_parameters() if p.grad is not None}
    assert reached == {"discriminator"}
    own = dict(codec.discriminator.named_parameters())
    assert all(p.grad is not None and p.grad.any() for n, p in own.items())


def test_the_perceptual_distance_reaches_all_of_the_decoder() -> None:
    """And, straight through the codes, the encoder."""
    codec = made().eval()
    _, terms = next(turns(codec, pictures()))
    codec.zero_grad(set_to_none=True)
    terms["perceptual"].backward()
    for part in (codec.encoder, codec.quant_conv, codec.post_quant_conv, codec.decoder):
        assert any(p.grad is not None and p.grad.any() for p in part.parameters())
    assert codec.quantiser.codes.grad is None or not codec.quantiser.codes.grad.any()


def test_the_discriminator_judges_the_picture_that_was_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the codec's turn moved anything: a step draws once."""
    codec, batch, drawn = made(), pictures(), []
    original = codec.decoder.forward
    monkeypatch.setattr(
        codec.decoder, "forward", lambda grid: drawn.append(original(grid)) or drawn[-1]
    )
    judged: list[Tensor] = []
    hook = codec.discriminator.register_forward_pre_hook(lambda _, given: judged.append(given[0]))
    turn = turns(codec, batch)
    next(turn)
    with torch.no_grad():
        for parameter in codec.decoder.parameters():
            parameter.add_(1.0)
    next(turn)
    hook.remove()
    assert len(drawn) == 1 and torch.equal(judged[-1], drawn[0])
    assert torch.equal(judged[-2], batch.image)


@pytest.mark.parametrize("start", [0, 1, 3])
def test_the_adversary_counts_from_its_step_on(start: int, shapes: CaptionedDataset) -> None:
    """Until then neither side's terms are there, and the discriminator stays as it was."""
    codec = made(adversary_from=start)
    trainer = trainer_for(codec, shapes)
    before = {n: p.detach().clone() for n, p in codec.discriminator.named_parameters()}
    for number in range(5):
        seen = trainer.advance(trainer.loader.at(number))
        on = number >= start
        assert ("codec/adversary" in seen) == on == ("discriminator/real" in seen)
        assert ("health/adversary_weight" in seen) == on
        now = dict(codec.discriminator.named_parameters())
        assert all(torch.equal(p, now[n]) for n, p in before.items()) == (not on)
        assert "codec/perceptual" in seen


def test_the_count_of_steps_is_kept(shapes: CaptionedDataset) -> None:
    """A run that is resumed goes on alike, bit for bit, into the adversary's first step."""
    changes = {"adversary_from": 4, "quantiser": QuantiserConfig(7, 5)}
    whole = trained(made(**changes), shapes, 6)
    first = trained(made(**changes), shapes, 3)
    second = trainer_for(made(**changes), shapes)
    second.load_state(first.state())
    for number in (3, 4, 5):
        seen = second.advance(second.loader.at(number))
        assert ("codec/adversary" in seen) == (number >= 4)
    for key, tensor in whole.system.state_dict().items():
        assert torch.equal(tensor, second.system.state_dict()[key]), key


def test_without_an_adversary_there_is_one_turn(
    shapes: CaptionedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no second group, which would wait for ever for its optimiser's first step."""
    codec = made(adversary=0.0)
    assert list(codec.groups()) == ["codec"]
    assert parts_that_move(codec, shapes, monkeypatch) == [("codec", CODEC)]
    assert [name for name, _ in turns(codec, pictures())] == ["codec"]
    assert "adversary_weight" not in codec.facts


def test_every_parameter_has_one_group() -> None:
    codec = made()
    ids = [id(p) for ms in codec.groups().values() for m in ms for p in m.parameters()]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in codec.parameters()}


# --- there and back ---------------------------------------------------------------------------


@pytest.mark.parametrize("side", [8, 16, 24])
@torch.no_grad()
def test_a_vqgan_s_codes_are_those_of_training(side: int) -> None:
    """Of any side, not that of the configuration alone; decoded pictures are clamped floats."""
    codec, image = made().eval(), pictures(3, side).image
    codec.decoder.conv_out.weight.mul_(5)
    ids = codec.encode(image)
    assert ids.shape == (3, side // 2, side // 2) and codec.factor == 2 and codec.codes == 7
    assert ids.dtype == torch.int64 and len(ids.unique()) > 1
    decoded, whole = codec.decode(ids), reconstructed(codec, image)
    torch.testing.assert_close(decoded, whole.clamp(-1, 1), rtol=1e-3, atol=1e-4)
    assert decoded.abs().max() == 1 and not torch.equal(decoded, whole)


@torch.no_grad()
def test_rows_of_a_vqgan_do_not_depend_on_their_neighbours() -> None:
    """Attention is among a picture's own places, norms are of its own channels."""
    codec, image = made().eval(), pictures(5).image
    ids = codec.encode(image)
    for k in range(5):
        assert torch.equal(codec.encode(image[k : k + 1]), ids[k : k + 1])
        torch.testing.assert_close(codec.decode(ids[k : k + 1]), codec.decode(ids)[k : k + 1])


def test_half_precision_around_both_turns() -> None:
    """Terms and the adaptive weight are single precision and finite."""
    codec, batch = made(), pictures()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        both = dict(turns(codec, batch))
    for terms in both.values():
        assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
    assert codec.facts["adversary_weight"].dtype == torch.float32
    torch.stack(list(both["codec"].values())).sum().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for n, p in codec.named_parameters()
        if not n.startswith("discriminator")
    )


@pytest.mark.parametrize("changes", [{}, {"adversary": 0.0}, {"adversary": 0.0, "perceptual": 0.0}])
def test_a_vqgan_learns_a_few_pictures(changes: dict[str, Any], shapes: CaptionedDataset) -> None:
    quantiser = QuantiserConfig(16, 5, codebook="loss", start="kmeans", restart=0.0)
    codec = made(quantiser=quantiser, **changes)
    trainer = trainer_for(codec, shapes, lr=5e-3, beta1=0.5)
    batch = trainer.loader.at(0)
    pixels = [trainer.advance(batch)["codec/pixels"].item() for _ in range(80)]
    assert sum(pixels[-5:]) < 0.5 * sum(pixels[:5])


# --- LPIPS ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """VGG16 of random weights and random weights of its channels, as their authors name them."""
    folder = tmp_path_factory.mktemp("lpips")
    torch.manual_seed(3)
    state = {name: 1.4 * tensor for name, tensor in VGG16().state_dict().items()}
    torch.save({**state, "classifier.0.weight": torch.zeros(1)}, folder / "vgg16.pth")
    widths = (64, 128, 256, 512, 512)
    channels = {f"lin{k}.model.1.weight": torch.rand(1, w, 1, 1) for k, w in enumerate(widths)}
    torch.save(channels, folder / "vgg.pth")
    return str(folder / "vgg16.pth"), str(folder / "vgg.pth")


def test_lpips_takes_the_place_of_the_features(files: tuple[str, str]) -> None:
    """A mean over rows, times its weight; the gradient reaches the decoder and not VGG16, which is
    no part of the codec's weights or groups."""
    codec, batch = made(lpips=files, perceptual=0.3, adversary=0.0), pictures(2, 16)
    assert not any("lpips" in key or "vgg" in key for key in codec.state_dict())
    assert {id(p) for p in codec.lpips[0].parameters()}.isdisjoint(map(id, codec.parameters()))
    _, terms = next(turns(codec.eval(), batch))
    judge = load_lpips(files)
    expected = 0.3 * judge(batch.image, reconstructed(codec, batch.image)).mean()
    torch.testing.assert_close(terms["perceptual"], expected, rtol=1e-4, atol=1e-6)
    terms["perceptual"].backward()
    last = codec.decoder.conv_out.weight.grad
    assert last is not None and last.any() and last.isfinite().all()
    assert all(p.grad is None for p in codec.lpips[0].parameters())


def test_weights_of_a_run_with_lpips_load_without_it(files: tuple[str, str]) -> None:
    """Who has only the run needs no file to draw with it."""
    one, two = made(lpips=files), made()
    two.load_state_dict(one.state_dict())
    config = replace(recipe.PRESETS["smoke"], codec=replace(TINY, lpips=files))
    assert config.without_files() == replace(config, codec=TINY)


def test_files_that_are_not_there_are_told(tmp_path: Path) -> None:
    """Before anything is trained."""
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
        ("discriminator", 0),
        ("layers", 0),
        ("adversary", -0.1),
        ("adversary_from", -1),
        ("perceptual", float("nan")),
    ],
)
def test_a_vqgan_that_cannot_be_built_is_told(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"codec.{name}") as caught:
        VQGANConfig(**{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("size", "layers"), [(16, 3), (16, 4), (8, 2), (32, 4)])
def test_a_discriminator_larger_than_the_picture_is_told(
    size: int, layers: int, tokenizer: WordTokenizer
) -> None:
    """In one sentence, before anything is trained: after its halvings there must be three places a
    side, for two more convolutions of 4 x 4 that take one each."""

    def build() -> None:
        config: Any = runs.configure(
            "vqgan", preset_name="smoke", settings={"size": size, "codec.layers": layers}
        )
        with torch.device("meta"):
            runs.build(recipe.stages(config, tokenizer))

    with pytest.raises(UserError) as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", recipe.PRESETS)
def test_presets_of_vqgan_build_and_fit(
    name: str, tokenizer: WordTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, where pictures of the preset's size become codes and pictures again, and
    the discriminator has more than one patch to judge."""
    monkeypatch.setattr(autoencoder, "attend", lambda query, key, value: value)  # of any device
    config = recipe.PRESETS[name]
    with torch.device("meta"):
        made: dict[str, Any] = {}
        for stage in recipe.stages(config, tokenizer):
            made[stage.name] = stage.build(made)
        codec = made["codec"]
        image = torch.empty(2, 3, config.size, config.size)
        grid = codec.quant_conv(codec.encoder(image))
        side = config.size // codec.factor
        assert grid.shape == (2, config.codec.quantiser.width, side, side)
        assert codec.decoder(codec.post_quant_conv(grid)).shape == image.shape
        assert codec.discriminator(image).shape[2] >= 2
    assert made["prior"].side == made["codes"].side == side
    assert config.codec.net.size == config.size


def test_the_preset_paper_of_vqgan_is_the_authors() -> None:
    """Their configuration for ImageNet at f = 16: the codebook is moved by its loss alone, with
    no restarts, which came later; Adam at 4.5e-6 a picture; the adversary after 250,000 steps."""
    config = recipe.PRESETS["paper"]
    codec, optim = config.codec, config.codec_optim
    assert (config.size, codec.factor) == (256, 16)
    assert (codec.quantiser.codes, codec.quantiser.width, codec.quantiser.beta) == (1024, 256, 0.25)
    assert (codec.adversary, codec.adversary_from, codec.perceptual) == (0.8, 250_001, 1.0)
    assert (codec.discriminator, codec.layers) == (64, 3)
    assert (optim.name, optim.beta1, optim.beta2) == ("adam", 0.5, 0.9)
    assert optim.lr == pytest.approx(4.5e-6 * config.codec_batch)
    assert codec.quantiser.codebook == "loss" and codec.quantiser.start == "normal"
    assert codec.quantiser.restart == 0.0
    assert to_dict(config)["codec"]["lpips"] == []
