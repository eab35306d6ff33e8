"""The UNet's promises: shapes, the way in of text and time, and that all of it learns."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lineage.config import TextConfig
from lineage.data.contract import CaptionedDataset
from lineage.diffusion.ddpm import DDPM, DDPMConfig
from lineage.diffusion.networks.unet import CONDITIONING, UNet, UNetConfig, time_embedding
from lineage.errors import UserError
from lineage.text.contract import TextFeatures
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import WordTokenizer

D = 6  # width of the text
SMALL = UNetConfig(width=8, multipliers=(1, 2), blocks=1, attention=(1,), heads=2, dropout=0.0)

READS_WORDS = ("cross", "transformer", "joint")
READS_SENTENCE = ("cross", "joint", "sentence")

VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"conditioning": name} for name in CONDITIONING},
    "shift": {"shift": True},
    "block_resampling": {"block_resampling": True},
    "patch": {"patch": 2},
    "head_width": {"head_width": 4},
    "depth": {"conditioning": "transformer", "depth": 3},
    "padding": {"padding": True},
    "groups": {"groups": 2},
    "three levels": {"multipliers": (1, 2, 3), "attention": (0, 2), "blocks": 2},
    "one level": {"multipliers": (2,), "attention": (0,)},
    "no attention but the middle's": {"attention": ()},
    "GLIDE": {"conditioning": "joint", "shift": True, "block_resampling": True, "padding": True},
    "latent diffusion": {"conditioning": "transformer", "head_width": 4, "padding": True},
}


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


def network(channels: int = 3, outputs: int | None = None, **changes: Any) -> UNet:
    """A UNet whose layers that start at zero have been moved."""
    torch.manual_seed(0)
    unet = UNet(replace(SMALL, **changes), D, channels, outputs).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return unet


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference."""
    return (one - other).abs().max().item()


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_new_network_says_nothing(changes: dict[str, Any]) -> None:
    """Its last layer starts at zero, so the first loss is that of the mean, not of a random net."""
    unet = UNet(replace(SMALL, **changes), D)
    out = unet(torch.randn(2, 3, 8, 8), torch.tensor([0, 50]), features([2, 3]))
    assert torch.equal(out, torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_block_of_a_new_network_is_the_identity(changes: dict[str, Any]) -> None:
    """Whatever the text and the time, until the layers at the end of each block have moved."""
    torch.manual_seed(0)
    unet = UNet(replace(SMALL, **changes), D)
    torch.nn.init.normal_(unet.leave.weight)
    x = torch.randn(2, 3, 8, 8)
    one = unet(x, torch.tensor([0, 50]), features([2, 3]))
    other = unet(x, torch.tensor([70, 9]), features([4, 1], 1))
    assert one.abs().max() > 0.1
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_the_output_has_the_shape_of_the_input(changes: dict[str, Any]) -> None:
    unet = network(**changes)
    for side in (8, 16):
        x = torch.randn(3, 3, side, side)
        out = unet(x, torch.tensor([0, 5, 99]), features([2, 1, 4]))
        assert out.shape == x.shape and torch.isfinite(out).all()


@pytest.mark.parametrize("conditioning", CONDITIONING)
@pytest.mark.parametrize("patch", [1, 2])
def test_other_channels_in_and_out(conditioning: str, patch: int) -> None:
    unet = network(4, 8, conditioning=conditioning, patch=patch)
    out = unet(torch.randn(2, 4, 8, 8), torch.tensor([0, 5]), features([2, 1]))
    assert out.shape == (2, 8, 8, 8) and out.abs().min(1).values.max() > 0


def test_a_patch_is_folded_and_unfolded_in_one_order() -> None:
    """A network that passes the folded channels on gives the picture back."""
    unet = UNet(replace(SMALL, width=12, heads=2, patch=2), D)
    with torch.no_grad():
        for layer in (unet.enter, unet.leave):
            layer.weight.zero_()
            layer.bias.zero_()
    torch.nn.init.dirac_(unet.leave.weight)
    seen: list[Tensor] = []
    unet.enter.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    unet.norm = torch.nn.Identity()  # what the last layer gets is SiLU of what the first saw
    unet.leave.register_forward_pre_hook(lambda module, given: (seen[0],))
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(unet(x, torch.tensor([3]), features([2])), x)
    assert seen[0].shape == (1, 12, 4, 4)


@pytest.mark.parametrize(
    ("change", "heads"),
    [({"heads": 2}, 2), ({"heads": 4}, 4), ({"head_width": 4}, 4), ({"head_width": 16}, 1)],
    ids=str,
)
@pytest.mark.parametrize("conditioning", ["cross", "transformer"])
def test_heads_are_as_many_as_is_said(
    change: dict[str, Any], heads: int, conditioning: str
) -> None:
    """Of a level of 16 channels; no width of a head exceeds the level's."""
    unet = UNet(replace(SMALL, conditioning=conditioning, **change), D)
    found = {module.heads for module in unet.modules() if hasattr(module, "heads")}
    assert found == {heads}


def test_attention_stands_where_it_is_asked_for() -> None:
    """By levels, the finest first; the middle has it always."""
    config = replace(SMALL, multipliers=(1, 2, 4), attention=(0, 2))
    unet = UNet(config, D)
    widths = [part.attention.pixels.query.in_features for part in unet.down if attends(part)]
    assert widths == [8, 32]
    widths = [part.attention.pixels.query.in_features for part in unet.up if attends(part)]
    assert widths == [32, 32, 8, 8]
    assert [attends(part) for part in unet.middle] == [True, False]


def attends(part: Any) -> bool:
    return getattr(part, "attention", None) is not None


def test_depth_is_the_number_of_blocks_of_a_transformer() -> None:
    for depth in (1, 3):
        unet = UNet(replace(SMALL, conditioning="transformer", depth=depth), D)
        assert len(unet.middle[0].attention.blocks) == depth


# --- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", CONDITIONING)
def test_text_comes_in_by_the_way_that_is_named(conditioning: str) -> None:
    unet, x, t = network(conditioning=conditioning), torch.randn(2, 3, 8, 8), torch.tensor([5, 50])
    text = features([3, 3])
    plain = unet(x, t, text)
    words = unet(x, t, replace(text, words=features([3, 3], 1).words))
    sentence = unet(x, t, replace(text, sentence=features([3, 3], 1).sentence))
    assert (apart(plain, words) > 1e-3) == (conditioning in READS_WORDS)
    assert (apart(plain, sentence) > 1e-3) == (conditioning in READS_SENTENCE)
    if conditioning not in READS_WORDS:
        assert torch.equal(plain, words)
    if conditioning not in READS_SENTENCE:
        assert torch.equal(plain, sentence)


@pytest.mark.parametrize("conditioning", CONDITIONING)
@pytest.mark.parametrize("changes", [{}, {"shift": True, "block_resampling": True}], ids=str)
def test_padding_does_not_matter(conditioning: str, changes: dict[str, Any]) -> None:
    """Words behind the mask must not be looked at, whatever they hold and however many."""
    unet = network(conditioning=conditioning, **changes)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([5, 50])
    text = features([2, 4])
    plain = unet(x, t, text)
    longer = text.padded(9)
    longer.words[~longer.mask] = 1e4
    torch.testing.assert_close(unet(x, t, longer), plain, atol=1e-5, rtol=1e-5)
    alone = unet(x[:1], t[:1], TextFeatures.cat([text[:1]]))
    torch.testing.assert_close(alone[0], plain[0], atol=1e-5, rtol=1e-5)
    shorter = text[:1].shortened(2)
    torch.testing.assert_close(unet(x[:1], t[:1], shorter)[0], plain[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("conditioning", CONDITIONING)
def test_padding_matters_where_it_is_attended_to(conditioning: str) -> None:
    """As in GLIDE and latent diffusion, whose encoders say something of each place."""
    unet = network(conditioning=conditioning, padding=True)
    x, t, text = torch.randn(2, 3, 8, 8), torch.tensor([5, 50]), features([2, 4])
    plain = unet(x, t, text)
    other = replace(text, words=text.words.clone())
    other.words[~text.mask] += 1
    moved = (unet(x, t, other) - plain).abs().amax((1, 2, 3))
    assert (moved[0] > 1e-3) == (conditioning in READS_WORDS)  # two words, two places behind
    assert moved[1] < 1e-5  # no place behind
    everywhere = replace(text, mask=torch.ones_like(text.mask))
    assert torch.equal(unet(x, t, everywhere), plain)


@pytest.mark.parametrize("conditioning", READS_WORDS)
def test_every_word_of_a_caption_is_looked_at(conditioning: str) -> None:
    unet = network(conditioning=conditioning)
    x, t, text = torch.randn(1, 3, 8, 8), torch.tensor([5]), features([4])
    plain = unet(x, t, text)
    for place in range(4):
        other = replace(text, words=text.words.clone())
        other.words[:, place] += 1
        assert apart(unet(x, t, other), plain) > 1e-4, place


# --- time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_time_matters_and_is_told_apart(changes: dict[str, Any]) -> None:
    unet, x, text = network(**changes), torch.randn(1, 3, 8, 8), features([2])
    outs = [unet(x, torch.tensor([t]), text) for t in (0, 1, 500, 501, 999)]
    for i, one in enumerate(outs):
        for other in outs[i + 1 :]:
            assert apart(one, other) > 1e-5
    between = unet(x, torch.tensor([500.5]), text)  # as the samplers that go by sigma ask for
    assert apart(between, outs[2]) > 1e-6 and apart(between, outs[3]) > 1e-6


def test_time_is_cosines_then_sines_of_falling_frequency() -> None:
    """Term by term, with a frequency of 10,000^(-k / half)."""
    width, half = 32, 16
    vectors = time_embedding(torch.arange(1000), width)
    assert vectors.shape == (1000, width)
    assert vectors[0].tolist() == [1.0] * half + [0.0] * half
    for t in (1, 17, 400):
        angles = [t / 10_000 ** (k / half) for k in range(half)]
        naive = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        assert vectors[t].tolist() == pytest.approx(naive, abs=1e-4)
    assert torch.pdist(vectors).min() > 1e-2
    middle = time_embedding(torch.tensor([0.5]), width)[0]
    assert middle[0].item() == pytest.approx(math.cos(0.5))


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_each_row_has_its_own_time_and_text(changes: dict[str, Any]) -> None:
    unet, x, t = network(**changes), torch.randn(3, 3, 8, 8), torch.tensor([5, 50, 500])
    text = features([2, 4, 1])
    plain = unet(x, t, text)
    turned = unet(x.flip(0), t.flip(0), text[torch.tensor([2, 1, 0])])
    torch.testing.assert_close(turned.flip(0), plain, atol=1e-5, rtol=1e-5)
    for row in range(3):
        alone = unet(x[row : row + 1], t[row : row + 1], text[row : row + 1])
        torch.testing.assert_close(alone[0], plain[row], atol=1e-5, rtol=1e-5)
    changed = x.clone()
    changed[1] += 1
    others = unet(changed, t, text)
    torch.testing.assert_close(others[[0, 2]], plain[[0, 2]], atol=1e-5, rtol=1e-5)
    assert apart(others[1], plain[1]) > 1e-3


# --- learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_gradients_reach_every_parameter_and_the_text(changes: dict[str, Any]) -> None:
    """What no gradient reaches is either not wired in or has no business here."""
    unet, text = network(**changes), features([2, 4])
    text.words.requires_grad_()
    text.sentence.requires_grad_()
    x = torch.randn(2, 3, 8, 8)
    unet(x, torch.tensor([5, 50]), text).square().sum().backward()
    for name, parameter in unet.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
        if parameter.dim() > 1:  # each unit of a layer; a bias of all keys alike changes nothing
            assert parameter.grad.flatten(1).any(1).all(), name
    conditioning = changes.get("conditioning", "cross")
    assert (text.words.grad is not None) == (conditioning in READS_WORDS)
    assert (text.sentence.grad is not None) == (conditioning in READS_SENTENCE)


def test_dropout_acts_in_training_alone() -> None:
    unet = network(dropout=0.5)
    x, t, text = torch.randn(1, 3, 8, 8), torch.tensor([5]), features([2])
    assert torch.equal(unet(x, t, text), unet(x, t, text))
    unet.train()
    assert apart(unet(x, t, text), unet(x, t, text)) > 1e-4


# --- sizes that cannot be -------------------------------------------------------------------------


def test_wrong_names_and_sides_are_told(tokenizer: WordTokenizer, shapes: CaptionedDataset) -> None:
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


IMPOSSIBLE: list[dict[str, Any]] = [
    {"heads": 3},
    {"heads": 0},
    {"multipliers": ()},
    {"multipliers": (0, 1)},
    {"width": 0},
    {"width": 9, "heads": 1},  # time has pairs of a cosine and a sine
    {"width": 1, "heads": 1},
    {"blocks": 0},
    {"patch": 0},
    {"depth": 0},
    {"groups": -1},
    {"head_width": -1},
    {"width": 10, "head_width": 6},  # 20 channels of the second level for 3 heads
    {"attention": (2,)},  # there are levels 0 and 1
    {"attention": (-1,)},
    {"dropout": 1.5},
    {"dropout": -0.1},
    {"epsilon": -1.0},
]


@pytest.mark.parametrize("change", IMPOSSIBLE, ids=str)
def test_sizes_that_cannot_be_are_told(change: dict[str, Any], tokenizer: WordTokenizer) -> None:
    """Each is reached by `--set model.unet.NAME=...`, so each deserves a sentence; one that says
    nothing fails, or does nothing, where it is no longer understood."""
    text = make_encoder("bag", TextConfig(width=16), tokenizer)
    with pytest.raises(UserError) as told:
        DDPM(DDPMConfig(unet=replace(SMALL, **change)), text, 16)
    assert "\n" not in str(told.value) and str(told.value)[-1] in ".?"


@pytest.mark.parametrize("width", [2, 6, 10, 12])
def test_any_even_width_goes(width: int) -> None:
    """Groups of the norms divide whatever there is."""
    unet = network(width=width, heads=1)
    out = unet(torch.randn(1, 3, 8, 8), torch.tensor([5]), features([2]))
    assert torch.isfinite(out).all()
