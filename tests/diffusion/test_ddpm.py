"""`ddpm`: the UNet's promises, guidance, and that it can learn eight pictures by heart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lineage.config import OptimConfig, TextConfig, TrainConfig
from lineage.data.contract import Batch, CaptionedDataset
from lineage.diffusion.ddpm import DDPM, DDPMConfig
from lineage.diffusion.process import ProcessConfig
from lineage.diffusion.unet import CONDITIONING, UNet, UNetConfig, time_embedding
from lineage.errors import UserError
from lineage.nn.draws import Draws
from lineage.text.contract import TextFeatures
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import WordTokenizer
from lineage.train.loop import Trainer

D = 6  # width of the text
SMALL = UNetConfig(width=8, multipliers=(1, 2), blocks=1, attention=(1,), heads=2, dropout=0.0)


def features(lengths: list[int], seed: int = 0) -> TextFeatures:
    """Random text of so many words a caption, with nonsense behind the words."""
    generator = torch.Generator().manual_seed(seed)
    count, length = len(lengths), max(lengths)
    mask = torch.arange(length)[None] < torch.tensor(lengths)[:, None]
    return TextFeatures(
        torch.randn(count, length, D, generator=generator),
        mask,
        torch.randn(count, D, generator=generator),
        mask.long(),
    )


def network(**changes: Any) -> UNet:
    """A UNet whose layers that start at zero have been moved."""
    torch.manual_seed(0)
    unet = UNet(replace(SMALL, **changes), D).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return unet


def system(shapes: CaptionedDataset, tokenizer: WordTokenizer, **changes: Any) -> DDPM:
    torch.manual_seed(0)
    config = DDPMConfig(
        unet=replace(SMALL, width=16, patch=2),
        process=ProcessConfig(100, "cosine", "x0"),
        steps=10,
        **changes,
    )
    return DDPM(config, make_encoder("bag", TextConfig(width=16), tokenizer), 16)


# --- the network ------------------------------------------------------------------------------


def test_a_new_network_says_nothing() -> None:
    """Its last layer starts at zero, so the first loss is that of the mean, not of a random net."""
    unet = UNet(SMALL, D)
    out = unet(torch.randn(2, 3, 8, 8), torch.tensor([0, 50]), features([2, 3]))
    assert torch.equal(out, torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("conditioning", CONDITIONING)
@pytest.mark.parametrize("patch", [1, 2])
def test_the_output_has_the_shape_of_the_input(conditioning: str, patch: int) -> None:
    unet = network(conditioning=conditioning, patch=patch)
    x = torch.randn(3, 3, 8, 8)
    out = unet(x, torch.tensor([0, 5, 99]), features([2, 1, 4]))
    assert out.shape == x.shape and torch.isfinite(out).all()


@pytest.mark.parametrize("conditioning", CONDITIONING)
def test_text_comes_in_by_the_way_that_is_named(conditioning: str) -> None:
    unet, x, t = network(conditioning=conditioning), torch.randn(2, 3, 8, 8), torch.tensor([5, 50])
    text = features([3, 3])
    plain = unet(x, t, text)
    words = unet(x, t, replace(text, words=features([3, 3], 1).words))
    sentence = unet(x, t, replace(text, sentence=features([3, 3], 1).sentence))
    assert ((plain - words).abs().max() > 1e-3) == (conditioning == "cross")
    assert ((plain - sentence).abs().max() > 1e-3) == (conditioning != "none")


def test_padding_does_not_matter() -> None:
    """Words behind the mask must not be looked at, whatever they hold and however many."""
    unet, x, t = network(), torch.randn(2, 3, 8, 8), torch.tensor([5, 50])
    text = features([2, 4])
    plain = unet(x, t, text)
    longer = text.padded(9)
    longer.words[~longer.mask] = 1e4
    torch.testing.assert_close(unet(x, t, longer), plain, atol=1e-5, rtol=1e-5)
    alone = unet(x[:1], t[:1], TextFeatures.cat([text[:1]]))
    torch.testing.assert_close(alone[0], plain[0], atol=1e-5, rtol=1e-5)
    shorter = TextFeatures(
        text.words[:1, :2], text.mask[:1, :2], text.sentence[:1], text.ids[:1, :2]
    )
    torch.testing.assert_close(unet(x[:1], t[:1], shorter)[0], plain[0], atol=1e-5, rtol=1e-5)


def test_time_matters_and_is_told_apart() -> None:
    unet, x, text = network(), torch.randn(1, 3, 8, 8), features([2])
    outs = [unet(x, torch.tensor([t]), text) for t in (0, 1, 500, 501, 999)]
    for i, one in enumerate(outs):
        for other in outs[i + 1 :]:
            assert (one - other).abs().max() > 1e-5
    vectors = time_embedding(torch.arange(1000), 32)
    assert vectors.shape == (1000, 32)
    assert vectors[0].tolist() == [0.0] * 16 + [1.0] * 16
    assert torch.pdist(vectors).min() > 1e-2


def test_each_row_has_its_own_time_and_text() -> None:
    unet, x, t = network(), torch.randn(3, 3, 8, 8), torch.tensor([5, 50, 500])
    text = features([2, 4, 1])
    plain = unet(x, t, text)
    turned = unet(x.flip(0), t.flip(0), text[torch.tensor([2, 1, 0])])
    torch.testing.assert_close(turned.flip(0), plain, atol=1e-5, rtol=1e-5)


def test_wrong_settings_are_told(shapes: CaptionedDataset, tokenizer: WordTokenizer) -> None:
    with pytest.raises(UserError, match=r"'croos'.*'cross'"):
        UNetConfig(conditioning="croos")
    with pytest.raises(UserError, match="did you mean 'ddim'"):
        DDPMConfig(sampler="ddin")
    text = make_encoder("bag", TextConfig(width=16), tokenizer)
    config = DDPMConfig(unet=replace(SMALL, patch=2))
    for size in (15, 18, 2, 33):
        with pytest.raises(UserError, match=f"multiple of 4, not size={size}"):
            DDPM(config, text, size)
    assert DDPM(config, text, 20).size == 20


@pytest.mark.parametrize("change", [{"heads": 3}, {"heads": 0}, {"multipliers": ()}], ids=str)
def test_sizes_that_cannot_be_are_told(change: dict[str, Any], tokenizer: WordTokenizer) -> None:
    """Each is reached by `--set model.unet.NAME=...`, so each deserves a sentence."""
    text = make_encoder("bag", TextConfig(width=16), tokenizer)
    with pytest.raises(UserError):
        DDPM(DDPMConfig(unet=replace(SMALL, **change)), text, 16)


# --- training ---------------------------------------------------------------------------------


class Recorder(torch.nn.Module):
    """Stands in for the UNet and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[Tensor, Tensor, TextFeatures]] = []

    def forward(self, noised: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        self.seen.append((noised, t, text))
        return self.scale * noised


def test_captions_are_dropped_as_often_as_is_set(
    shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """Guidance compares with "no caption": never dropped, it compares with noise."""
    batch = shapes.batch(range(400), [0] * 400, 0)
    for share in (0.0, 0.25, 1.0):
        one = system(shapes, tokenizer, drop_text=share)
        recorder = one.unet = Recorder()
        ((_, terms),) = one.losses(batch, one.text.encode(batch.caption), Draws(range(400)))
        _, t, text = recorder.seen[0]
        null = one.text.null(1)
        dropped = text.mask.sum(1) == 1
        assert dropped.float().mean().item() == pytest.approx(share, abs=0.07 * (0 < share < 1))
        expected = null.sentence.expand(int(dropped.sum()), -1)
        torch.testing.assert_close(text.sentence[dropped], expected)
        assert t.min() == 0 and t.max() == 99 and len(t.unique()) > 90
        assert list(terms) == ["mse_x0"]
        assert terms["mse_x0"].item() == pytest.approx(batch.image.square().mean().item(), rel=1e-5)


def test_eight_pictures_are_learnt_by_heart(
    shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """Whatever is wired wrongly, this fails: loss, gradient, schedule, text or optimiser."""
    batch = shapes.batch(range(8), [0] * 8, 0)
    one = system(shapes, tokenizer)
    optim = OptimConfig(lr=4e-3, warmup=20, decay="none", average=0.9)
    trainer = Trainer(one, shapes, optim, TrainConfig(batch=8, precision="fp32"))
    losses: list[float] = []
    for _ in range(250):
        same = Batch(batch.image.clone(), batch.caption, batch.label, batch.id)
        losses.append(trainer.advance(same)["denoiser/mse_x0"].item())
    start, end = sum(losses[:10]) / 10, sum(losses[-30:]) / 30
    assert end < 0.35 * start, (start, end)
    with trainer.averaged() as averaged:
        drawn = averaged.generate(batch.caption, seed=0, guidance=1.0)
    distances = (drawn[:, None] - batch.image[None]).square().mean(dim=(2, 3, 4))  # (B, B)
    assert (distances.argmin(1) == torch.arange(8)).float().mean() >= 0.5  # by its caption


# --- drawing ----------------------------------------------------------------------------------


def moved(shapes: CaptionedDataset, tokenizer: WordTokenizer) -> DDPM:
    one = system(shapes, tokenizer).eval()
    with torch.no_grad():
        for parameter in one.unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return one


CAPTIONS = ["a red circle", "a blue square above a green triangle"]


def test_guidance_moves_away_from_the_picture_without_a_caption(
    shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """x_0 = null + guidance (text - null), seen in a single step of sampling."""
    one = moved(shapes, tokenizer)
    with torch.no_grad():
        one.unet.leave.weight.mul_(0.05)  # small enough that nothing is clipped
        one.unet.leave.bias.mul_(0.05)
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


def test_guidance_1_is_the_conditional_output(
    shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """And the network is asked once for a picture, not twice."""
    one = moved(shapes, tokenizer)
    calls: list[int] = []
    one.unet.register_forward_hook(lambda module, given, out: calls.append(len(given[0])))
    plain = one.generate(CAPTIONS, guidance=1.0, steps=3)
    assert calls == [2, 2, 2]
    nearly = one.generate(CAPTIONS, guidance=1.0 + 1e-6, steps=3)
    assert calls[3:] == [4, 4, 4]
    torch.testing.assert_close(nearly, plain, atol=1e-4, rtol=0)


def test_every_estimate_is_clipped_to_the_range_of_pictures(
    shapes: CaptionedDataset, tokenizer: WordTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """High guidance leaves the range, and what leaves it grows from step to step."""
    from lineage.diffusion import ddpm

    one, seen = moved(shapes, tokenizer), []
    original = ddpm.SAMPLERS["ddim"]

    def watched(denoise: Any, *rest: Any) -> Tensor:
        def check(x: Tensor, t: Tensor) -> Tensor:
            seen.append(denoise(x, t))
            return seen[-1]

        return original(check, *rest)

    monkeypatch.setitem(ddpm.SAMPLERS, "ddim", watched)
    one.generate(CAPTIONS, guidance=50.0)
    assert len(seen) == 10
    assert max(x.abs().max().item() for x in seen) == 1.0


def test_knobs_of_drawing(shapes: CaptionedDataset, tokenizer: WordTokenizer) -> None:
    one = moved(shapes, tokenizer)
    calls: list[int] = []
    one.unet.register_forward_hook(lambda module, given, out: calls.append(int(given[1][0])))
    one.generate("a red circle", steps=4)
    assert len(calls) == 4 and calls[0] == 99 and calls[-1] == 0
    calls.clear()
    one.generate("a red circle")
    assert len(calls) == one.config.steps
    ddim, ddpm = (one.generate(CAPTIONS, sampler=name) for name in ("ddim", "ddpm"))
    assert (ddim - ddpm).abs().max() > 1e-3
    with pytest.raises(UserError, match="did you mean 'ddim'"):
        one.generate("a red circle", sampler="dimm")


@pytest.mark.parametrize("steps", [0, -3, 101, 2.5, "many"])
def test_a_number_of_steps_that_cannot_be_is_told(
    steps: Any, shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """Nought is not "as usual", and `--set steps=many` is not a traceback."""
    with pytest.raises(UserError, match="steps"):
        moved(shapes, tokenizer).generate("a red circle", steps=steps)
