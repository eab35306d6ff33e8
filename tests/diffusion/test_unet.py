"""The UNet: shapes, the ways in which text and time enter, and that every part of it learns."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lineage.config import TextConfig
from lineage.diffusion.ddpm import DDPMConfig, build_ddpm
from lineage.diffusion.networks.layers import timestep_embedding
from lineage.diffusion.networks.unet import UNet, UNetConfig, make_unet
from lineage.errors import UserError
from lineage.text.contract import TextFeatures
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import WordTokenizer

D = 6  # width of words and sentence
SMALL = UNetConfig(
    channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_levels=(1,),
    num_heads=2,
    dropout=0.0,
)

CONDITIONING = ("cross", "transformer", "joint", "sentence", "none")
READS_WORDS = ("cross", "transformer", "joint")
READS_SENTENCE = ("cross", "joint", "sentence")
GLIDE = {"conditioning": "joint", "scale_shift_norm": True, "resblock_updown": True}

VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"conditioning": name} for name in CONDITIONING},
    "scale_shift_norm": {"scale_shift_norm": True},
    "resblock_updown": {"resblock_updown": True},
    "patch_size": {"patch_size": 2},
    "head_dim": {"head_dim": 4},
    "transformer_depth": {"conditioning": "transformer", "transformer_depth": 3},
    "attend_padding": {"attend_padding": True},
    "norm_groups": {"norm_groups": 2},
    "three levels": {"channel_mult": (1, 2, 3), "attention_levels": (0, 2), "num_res_blocks": 2},
    "one level": {"channel_mult": (2,), "attention_levels": (0,)},
    "no attention but the middle's": {"attention_levels": ()},
    "GLIDE": {**GLIDE, "attend_padding": True},
    "latent diffusion": {"conditioning": "transformer", "head_dim": 4, "attend_padding": True},
}


def features(lengths: list[int], seed: int = 0) -> TextFeatures:
    """Random text with so many words per caption, and random vectors on the padding."""
    generator = torch.Generator().manual_seed(seed)
    count, length = len(lengths), max(lengths)
    mask = torch.arange(length)[None] < torch.tensor(lengths)[:, None]
    return TextFeatures(
        torch.randn(count, length, D, generator=generator),
        mask,
        torch.randn(count, D, generator=generator),
        mask.long(),
    )


def new_unet(in_channels: int = 3, out_channels: int = 3, **changes: Any) -> UNet:
    """A UNet with its initial weights."""
    return make_unet(replace(SMALL, **changes), D, D, in_channels, out_channels)


def moved_unet(in_channels: int = 3, out_channels: int = 3, **changes: Any) -> UNet:
    """A UNet whose layers have moved away from the zeros at which they start."""
    torch.manual_seed(0)
    unet = new_unet(in_channels, out_channels, **changes).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return unet


def largest_difference(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_new_network_predicts_zero(changes: dict[str, Any]) -> None:
    """Its last layer starts at zero, so the first loss is that of the mean, not of a random net."""
    out = new_unet(**changes)(torch.randn(2, 3, 8, 8), torch.tensor([0, 50]), features([2, 3]))
    assert torch.equal(out, torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_block_of_a_new_network_is_the_identity(changes: dict[str, Any]) -> None:
    """Whatever the text and the time, until the layers at the end of each block have moved."""
    torch.manual_seed(0)
    unet = new_unet(**changes)
    torch.nn.init.normal_(unet.conv_out.weight)
    x = torch.randn(2, 3, 8, 8)
    one = unet(x, torch.tensor([0, 50]), features([2, 3]))
    other = unet(x, torch.tensor([70, 9]), features([4, 1], 1))
    assert one.abs().max() > 0.1
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_the_output_has_the_shape_of_the_input(changes: dict[str, Any]) -> None:
    unet = moved_unet(**changes)
    for side in (8, 16):
        x = torch.randn(3, 3, side, side)
        out = unet(x, torch.tensor([0, 5, 99]), features([2, 1, 4]))
        assert out.shape == x.shape and torch.isfinite(out).all()


@pytest.mark.parametrize("conditioning", CONDITIONING)
@pytest.mark.parametrize("patch_size", [1, 2])
def test_other_channels_in_and_out(conditioning: str, patch_size: int) -> None:
    unet = moved_unet(4, 8, conditioning=conditioning, patch_size=patch_size)
    out = unet(torch.randn(2, 4, 8, 8), torch.tensor([0, 5]), features([2, 1]))
    assert out.shape == (2, 8, 8, 8) and out.abs().min(1).values.max() > 0


def test_a_patch_is_folded_and_unfolded_in_one_order() -> None:
    """A network that passes the folded channels on gives the picture back."""
    unet = new_unet(channels=12, patch_size=2)
    with torch.no_grad():
        for layer in (unet.conv_in, unet.conv_out):
            layer.weight.zero_()
            layer.bias.zero_()
    torch.nn.init.dirac_(unet.conv_out.weight)
    inputs: list[Tensor] = []
    unet.conv_in.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    unet.norm_out = torch.nn.Identity()  # type: ignore[assignment]
    unet.conv_out.register_forward_pre_hook(lambda module, args: (inputs[0],))
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(unet(x, torch.tensor([3]), features([2])), x)
    assert inputs[0].shape == (1, 12, 4, 4)


@pytest.mark.parametrize(
    ("change", "num_heads"),
    [({"num_heads": 2}, 2), ({"num_heads": 4}, 4), ({"head_dim": 4}, 4), ({"head_dim": 16}, 1)],
    ids=str,
)
@pytest.mark.parametrize("conditioning", ["cross", "transformer"])
def test_the_number_of_heads(change: dict[str, Any], num_heads: int, conditioning: str) -> None:
    """Of a level of 16 channels; no head is wider than the level."""
    unet = new_unet(conditioning=conditioning, **change)
    numbers = {module.num_heads for module in unet.modules() if hasattr(module, "num_heads")}
    assert numbers == {num_heads}


def test_attention_levels_have_attention() -> None:
    """The finest level is 0; the middle always has attention."""
    unet = new_unet(channel_mult=(1, 2, 4), attention_levels=(0, 2))

    def widths(level: Any) -> list[int]:
        return [block.self_attn.to_q.in_features for block in level.attentions]

    assert [widths(level) for level in unet.down] == [[8], [], [32]]
    assert [widths(level) for level in unet.up] == [[32, 32], [], [8, 8]]
    assert widths(unet.mid) == [32] and len(unet.mid.resnets) == 2


def test_transformer_depth_is_the_number_of_blocks() -> None:
    for depth in (1, 3):
        unet = new_unet(conditioning="transformer", transformer_depth=depth)
        assert len(unet.mid.attentions[0].transformer_blocks) == depth  # type: ignore[arg-type]


def test_a_unet_takes_any_attention_block() -> None:
    """The factory is called with the channels of each level that has attention."""

    class Double(torch.nn.Module):
        def forward(self, x: Tensor, words: Tensor, mask: Tensor | None) -> Tensor:
            return 2 * x

    channels: list[int] = []

    def attention(width: int) -> torch.nn.Module:
        channels.append(width)
        return Double()

    unet = UNet(SMALL, attention)
    assert channels == [16, 16, 16, 16]  # down, middle, and two on the way up
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([5, 50])
    torch.nn.init.normal_(unet.conv_out.weight)
    one, other = (unet(x, t, features([2, 3], seed)) for seed in (0, 1))
    assert torch.equal(one, other) and one.abs().max() > 0.1


# --- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", CONDITIONING)
def test_text_enters_as_conditioning_says(conditioning: str) -> None:
    unet, x = moved_unet(conditioning=conditioning), torch.randn(2, 3, 8, 8)
    t, text = torch.tensor([5, 50]), features([3, 3])
    plain = unet(x, t, text)
    words = unet(x, t, replace(text, words=features([3, 3], 1).words))
    sentence = unet(x, t, replace(text, sentence=features([3, 3], 1).sentence))
    assert (largest_difference(plain, words) > 1e-3) == (conditioning in READS_WORDS)
    assert (largest_difference(plain, sentence) > 1e-3) == (conditioning in READS_SENTENCE)
    if conditioning not in READS_WORDS:
        assert torch.equal(plain, words)
    if conditioning not in READS_SENTENCE:
        assert torch.equal(plain, sentence)


@pytest.mark.parametrize("conditioning", CONDITIONING)
@pytest.mark.parametrize(
    "changes", [{}, {"scale_shift_norm": True, "resblock_updown": True}], ids=str
)
def test_padding_does_not_matter(conditioning: str, changes: dict[str, Any]) -> None:
    """Masked words are not attended to, whatever they hold and however many there are."""
    unet = moved_unet(conditioning=conditioning, **changes)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([5, 50])
    text = features([2, 4])
    plain = unet(x, t, text)
    longer = text.padded(9)
    longer.words[~longer.mask] = 1e4
    torch.testing.assert_close(unet(x, t, longer), plain, atol=1e-5, rtol=1e-5)
    alone = unet(x[:1], t[:1], TextFeatures.cat([text[:1]]))
    torch.testing.assert_close(alone[0], plain[0], atol=1e-5, rtol=1e-5)
    shorter = text[:1].truncated(2)
    torch.testing.assert_close(unet(x[:1], t[:1], shorter)[0], plain[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("conditioning", CONDITIONING)
def test_padding_matters_where_it_is_attended_to(conditioning: str) -> None:
    """As in GLIDE and latent diffusion, whose encoders encode the padding too."""
    unet = moved_unet(conditioning=conditioning, attend_padding=True)
    x, t, text = torch.randn(2, 3, 8, 8), torch.tensor([5, 50]), features([2, 4])
    plain = unet(x, t, text)
    other = replace(text, words=text.words.clone())
    other.words[~text.mask] += 1
    moved = (unet(x, t, other) - plain).abs().amax((1, 2, 3))
    assert (moved[0] > 1e-3) == (conditioning in READS_WORDS)  # two words, two of padding
    assert moved[1] < 1e-5  # no padding
    everywhere = replace(text, mask=torch.ones_like(text.mask))
    assert torch.equal(unet(x, t, everywhere), plain)


@pytest.mark.parametrize("conditioning", READS_WORDS)
def test_every_word_of_a_caption_is_attended_to(conditioning: str) -> None:
    unet = moved_unet(conditioning=conditioning)
    x, t, text = torch.randn(1, 3, 8, 8), torch.tensor([5]), features([4])
    plain = unet(x, t, text)
    for word in range(4):
        other = replace(text, words=text.words.clone())
        other.words[:, word] += 1
        assert largest_difference(unet(x, t, other), plain) > 1e-4, word


# --- time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_timestep_has_its_own_output(changes: dict[str, Any]) -> None:
    unet, x, text = moved_unet(**changes), torch.randn(1, 3, 8, 8), features([2])
    outs = [unet(x, torch.tensor([t]), text) for t in (0, 1, 500, 501, 999)]
    for i, one in enumerate(outs):
        for other in outs[i + 1 :]:
            assert largest_difference(one, other) > 1e-5
    between = unet(x, torch.tensor([500.5]), text)  # the samplers in sigma need such timesteps
    assert min(largest_difference(between, outs[i]) for i in (2, 3)) > 1e-6


def test_the_timestep_embedding_is_cosines_then_sines_of_falling_frequency() -> None:
    """Term by term, with a frequency of 10,000^(-k / half)."""
    width, half = 32, 16
    vectors = timestep_embedding(torch.arange(1000), width)
    assert vectors.shape == (1000, width)
    assert vectors[0].tolist() == [1.0] * half + [0.0] * half
    for t in (1, 17, 400):
        angles = [t / 10_000 ** (k / half) for k in range(half)]
        naive = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        assert vectors[t].tolist() == pytest.approx(naive, abs=1e-4)
    assert torch.pdist(vectors).min() > 1e-2
    middle = timestep_embedding(torch.tensor([0.5]), width)[0]
    assert middle[0].item() == pytest.approx(math.cos(0.5))


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_each_row_has_its_own_time_and_text(changes: dict[str, Any]) -> None:
    unet, x, t = moved_unet(**changes), torch.randn(3, 3, 8, 8), torch.tensor([5, 50, 500])
    text = features([2, 4, 1])
    plain = unet(x, t, text)
    reversed_rows = unet(x.flip(0), t.flip(0), text[torch.tensor([2, 1, 0])])
    torch.testing.assert_close(reversed_rows.flip(0), plain, atol=1e-5, rtol=1e-5)
    for row in range(3):
        alone = unet(x[row : row + 1], t[row : row + 1], text[row : row + 1])
        torch.testing.assert_close(alone[0], plain[row], atol=1e-5, rtol=1e-5)
    changed = x.clone()
    changed[1] += 1
    others = unet(changed, t, text)
    torch.testing.assert_close(others[[0, 2]], plain[[0, 2]], atol=1e-5, rtol=1e-5)
    assert largest_difference(others[1], plain[1]) > 1e-3


# --- learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_gradients_reach_every_parameter_and_the_text(changes: dict[str, Any]) -> None:
    """A parameter without gradient is either not wired in or has no business here."""
    unet, text = moved_unet(**changes), features([2, 4])
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
    unet = moved_unet(dropout=0.5)
    x, t, text = torch.randn(1, 3, 8, 8), torch.tensor([5]), features([2])
    assert torch.equal(unet(x, t, text), unet(x, t, text))
    unet.train()
    assert largest_difference(unet(x, t, text), unet(x, t, text)) > 1e-4


# --- impossible sizes -----------------------------------------------------------------------------


def test_unknown_names_and_wrong_sides_are_named(tokenizer: WordTokenizer) -> None:
    with pytest.raises(UserError, match=r"'croos'.*'cross'"):
        UNetConfig(conditioning="croos")  # type: ignore[arg-type]
    text = make_encoder("bag", TextConfig(width=16), tokenizer)
    config = DDPMConfig(unet=replace(SMALL, patch_size=2))
    for size in (15, 18, 2, 33):
        with pytest.raises(UserError, match=f"multiple of 4, not size={size}"):
            build_ddpm(config, text, size)
    assert build_ddpm(config, text, 20).size == 20


IMPOSSIBLE: list[dict[str, Any]] = [
    {"num_heads": 3},
    {"num_heads": 0},
    {"channel_mult": ()},
    {"channel_mult": (0, 1)},
    {"channels": 0},
    {"channels": 9, "num_heads": 1},  # time has pairs of a cosine and a sine
    {"channels": 1, "num_heads": 1},
    {"num_res_blocks": 0},
    {"patch_size": 0},
    {"transformer_depth": 0},
    {"norm_groups": -1},
    {"head_dim": -1},
    {"channels": 10, "head_dim": 6},  # 20 channels of the second level for 3 heads
    {"attention_levels": (2,)},  # there are levels 0 and 1
    {"attention_levels": (-1,)},
    {"dropout": 1.5},
    {"dropout": -0.1},
    {"norm_eps": -1.0},
]


@pytest.mark.parametrize("change", IMPOSSIBLE, ids=str)
def test_impossible_sizes_are_named(change: dict[str, Any], tokenizer: WordTokenizer) -> None:
    """Each is reached by `--set model.unet.NAME=...`, so each deserves a sentence."""
    text = make_encoder("bag", TextConfig(width=16), tokenizer)
    with pytest.raises(UserError) as caught:
        build_ddpm(DDPMConfig(unet=replace(SMALL, **change)), text, 16)
    assert "\n" not in str(caught.value) and str(caught.value)[-1] in ".?"


@pytest.mark.parametrize("channels", [2, 6, 10, 12])
def test_any_even_number_of_channels_is_possible(channels: int) -> None:
    """The groups of the norms divide whatever there is."""
    unet = moved_unet(channels=channels, num_heads=1)
    out = unet(torch.randn(1, 3, 8, 8), torch.tensor([5]), features([2]))
    assert torch.isfinite(out).all()
