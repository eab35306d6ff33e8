"""VQGAN's encoder, decoder and discriminator: sizes of the paper, shapes, blocks by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.errors import UserError
from lineage.nn.autoencoder import (
    AttnBlock,
    AutoencoderConfig,
    Decoder,
    Double,
    Encoder,
    Halve,
    PatchDiscriminator,
    ResnetBlock,
    norm,
)

SMALL = AutoencoderConfig(8, (1, 2, 3), 1, (4,), 16, 5)
PAPER = AutoencoderConfig()  # taming-transformers, ImageNet, f = 16


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# --- sizes ------------------------------------------------------------------------------------


def test_the_papers_network_has_as_many_parameters() -> None:
    """Of taming's `VQModel` at f = 16 with 1024 codes; with its 1 x 1 convolutions and its codes,
    the whole."""
    with torch.device("meta"):
        encoder, decoder = Encoder(PAPER, PAPER.latent), Decoder(PAPER)
        between = [nn.Conv2d(256, 256, 1), nn.Conv2d(256, 256, 1), nn.Embedding(1024, 256)]
    assert count(encoder) == 29_298_176
    assert count(decoder) == 42_449_795
    assert count(encoder) + count(decoder) + sum(map(count, between)) == 72_141_699


def test_the_network_of_latent_diffusion_has_as_many_parameters() -> None:
    """Stable Diffusion's, f = 8: means and variances out of the encoder, no attention but in the
    middle."""
    config = AutoencoderConfig(128, (1, 2, 4, 4), 2, (), 256, 4)
    with torch.device("meta"):
        encoder, decoder = Encoder(config, 2 * config.latent), Decoder(config)
        between = [nn.Conv2d(8, 8, 1), nn.Conv2d(4, 4, 1)]
    assert count(encoder) == 34_163_592
    assert count(decoder) == 49_490_179
    assert count(encoder) + count(decoder) + sum(map(count, between)) == 83_653_863


def test_the_papers_discriminator_has_as_many_parameters() -> None:
    with torch.device("meta"):
        assert count(PatchDiscriminator()) == 2_765_633


@pytest.mark.parametrize(
    ("multipliers", "attention", "size", "factor", "levels"),
    [
        ((1, 1, 2, 2, 4), (16,), 256, 16, [(8, 0), (8, 0), (16, 0), (16, 0), (32, 1)]),
        ((1, 2, 3), (16, 4), 16, 4, [(8, 1), (16, 0), (24, 1)]),
        ((2,), (), 7, 1, [(16, 0)]),
        ((1, 2), (5,), 16, 2, [(8, 0), (16, 0)]),  # no such side
    ],
    ids=str,
)
def test_factor_and_levels_by_hand(
    multipliers: tuple[int, ...],
    attention: tuple[int, ...],
    size: int,
    factor: int,
    levels: list[tuple[int, int]],
) -> None:
    config = AutoencoderConfig(8, multipliers, 1, attention, size)
    assert config.factor == factor
    assert config.levels() == [(channels, bool(there)) for channels, there in levels]


@pytest.mark.parametrize("attention", [(), (4,), (8, 16), (4, 8, 16)], ids=str)
@pytest.mark.parametrize("blocks", [1, 2])
def test_attention_stands_only_at_the_sides_named(blocks: int, attention: tuple[int, ...]) -> None:
    """After each block, and one block more in the decoder; told by the sides that arrive there."""
    config = AutoencoderConfig(4, (1, 1, 2), blocks, attention, 16, 3)
    for network, given, each in (
        (Encoder(config, 3), torch.randn(1, 3, 16, 16), blocks),
        (Decoder(config), torch.randn(1, 3, 4, 4), blocks + 1),
    ):
        sides: list[int] = []
        for layer in network.modules():
            if isinstance(layer, AttnBlock):
                layer.register_forward_hook(lambda _, x, __, s=sides: s.append(x[0].shape[-1]))
        network(given)
        assert sorted(sides) == sorted([4, *(s for s in attention for _ in range(each))])


@pytest.mark.parametrize(
    ("config", "side"),
    [
        (SMALL, 16),
        (SMALL, 32),
        (AutoencoderConfig(4, (2,), 2, (), 8, 6), 8),
        (replace(SMALL, patch=2), 32),
        (AutoencoderConfig(4, (1, 2), 1, (), 12, 6, patch=3), 24),
    ],
    ids=str,
)
def test_shapes(config: AutoencoderConfig, side: int) -> None:
    """Any picture that can be halved, also of another size than the configuration's."""
    place = side // config.factor
    grid = Encoder(config, 7, inputs=2)(torch.randn(2, 2, side, side))
    assert grid.shape == (2, 7, place, place)
    image = Decoder(config, outputs=4)(torch.randn(2, config.latent, place, place))
    assert image.shape == (2, 4, side, side)


def test_the_decoder_mirrors_the_encoder() -> None:
    """Widths of the blocks, from the smallest side to the largest."""
    ups = [[b.conv1.in_channels for b in level.block] for level in Decoder(SMALL).up]
    downs = [[b.conv1.in_channels for b in level.block] for level in Encoder(SMALL, 5).down]
    assert downs == [[8], [8], [16]]
    assert ups == [[24, 24], [24, 16], [16, 8]]


# --- pixels folded into channels --------------------------------------------------------------


@pytest.mark.parametrize("patch", [2, 3])
@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (2, 1, 1)], ids=str)
def test_a_patch_makes_places_larger(patch: int, multipliers: tuple[int, ...]) -> None:
    """As much as it is wide; attention stands where the folded picture has its side."""
    plain = AutoencoderConfig(4, multipliers, 1, (8,), 24, 5)
    folded = replace(plain, patch=patch, size=24 * patch)
    assert folded.factor == patch * plain.factor
    assert folded.levels() == plain.levels()
    extra = 9 * 3 * (patch**2 - 1) * 4  # of the convolution next to the picture
    assert count(Encoder(folded, 5)) == count(Encoder(plain, 5)) + extra
    last = plain.channels * multipliers[0]
    extra = (9 * last + 1) * 3 * (patch**2 - 1)
    assert count(Decoder(folded)) == count(Decoder(plain)) + extra


@torch.no_grad()
@pytest.mark.parametrize("patch", [1, 2, 3])
def test_a_patch_is_a_square_of_neighbours(patch: int) -> None:
    """What goes into the first convolution and comes out of the last, pixel by pixel."""
    config = AutoencoderConfig(4, (1,), 1, (), 6, 5, patch=patch)
    seen: list[Tensor] = []
    encoder, decoder = Encoder(config, 5), Decoder(config)
    encoder.conv_in.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    decoder.conv_out.register_forward_hook(lambda _, __, found: seen.append(found))
    image = torch.randn(2, 3, 6, 6)
    encoder(image)
    drawn = decoder(torch.randn(2, 5, 6 // patch, 6 // patch))
    folded, last = seen
    assert folded.shape == last.shape == (2, 3 * patch**2, 6 // patch, 6 // patch)
    for row in range(6):
        for column in range(6):
            at = (slice(None), slice(None), row // patch, column // patch)
            within = row % patch * patch + column % patch
            for pixels, channels in ((image, folded[at]), (drawn, last[at])):
                inner = channels[:, within :: patch**2]
                assert torch.equal(pixels[:, :, row, column], inner)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"multipliers": ()}, "net.multipliers"),
        ({"multipliers": (1, 0)}, "net.multipliers"),
        ({"channels": 0}, "net.channels=0"),
        ({"blocks": 0}, "net.blocks=0"),
        ({"latent": -1}, "net.latent=-1"),
        ({"patch": 0}, "net.patch=0"),
        ({"size": 100}, "100 pixels do not divide into places of 16"),
        ({"patch": 2, "size": 272}, "272 pixels do not divide into places of 32"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        AutoencoderConfig(**changes)


# --- blocks by hand ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(32, 32), (64, 32), (48, 16), (16, 16), (40, 8), (24, 8), (12, 4), (6, 2), (7, 1), (1, 1)],
)
def test_groups_divide_the_channels(channels: int, groups: int) -> None:
    layer = norm(channels)
    assert (layer.num_groups, layer.num_channels, layer.eps) == (groups, channels, 1e-6)


def normed(x: Tensor, layer: nn.GroupNorm) -> Tensor:
    """Group norm, a picture and a group at a time."""
    found = torch.empty_like(x)
    size = x.shape[1] // layer.num_groups
    for row in range(len(x)):
        for first in range(0, x.shape[1], size):
            part = x[row, first : first + size]
            scaled = (part - part.mean()) / (part.var(correction=0) + 1e-6).sqrt()
            weight, bias = (t[first : first + size, None, None] for t in (layer.weight, layer.bias))
            found[row, first : first + size] = scaled * weight + bias
    return found


def shaken(network: nn.Module) -> nn.Module:
    """No weight at a value that hides a mistake."""
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return network


@torch.no_grad()
def test_attention_by_loops() -> None:
    """Each place reads all places of its own picture, which need not be square."""
    block, x = shaken(AttnBlock(6)), torch.randn(2, 6, 2, 3)
    seen = normed(x, block.norm)
    expected = x.clone()

    def at(layer: nn.Conv2d, row: int, place: int) -> Tensor:
        return layer.weight[:, :, 0, 0] @ seen[row, :, place // 3, place % 3] + layer.bias

    for row in range(2):
        for place in range(6):
            query = at(block.q, row, place)
            scores = [float(query @ at(block.k, row, other)) / 6**0.5 for other in range(6)]
            total = sum(map(math.exp, scores))
            read = sum(
                math.exp(s) / total * at(block.v, row, other) for other, s in enumerate(scores)
            )
            out = block.proj_out.weight[:, :, 0, 0] @ read + block.proj_out.bias
            expected[row, :, place // 3, place % 3] += out
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("outputs", [4, 6])
def test_the_residual_block_by_hand(outputs: int) -> None:
    """Norm, swish, convolution, twice; a 1 x 1 convolution beside it where the width changes."""
    block, x = shaken(ResnetBlock(4, outputs)), torch.randn(2, 4, 3, 5)
    inner = normed(x, block.norm1)
    inner = F.conv2d(inner * inner.sigmoid(), block.conv1.weight, block.conv1.bias, padding=1)
    inner = normed(inner, block.norm2)
    inner = F.conv2d(inner * inner.sigmoid(), block.conv2.weight, block.conv2.bias, padding=1)
    beside = x
    if outputs != 4:
        side = block.nin_shortcut
        beside = torch.einsum("oi,bihw->bohw", side.weight[:, :, 0, 0], x)
        beside = beside + side.bias[:, None, None]
    torch.testing.assert_close(block(x), inner + beside, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_halving_pads_right_and_below_alone() -> None:
    """With a kernel that picks one corner, each place is the pixel that stands there."""
    x = torch.arange(1.0, 17).view(1, 1, 4, 4)
    layer = Halve(1)
    layer.conv.bias.zero_()
    for corner, expected in (((0, 0), [1, 3, 9, 11]), ((2, 2), [11, 0, 0, 0])):
        layer.conv.weight.zero_()[0, 0, corner[0], corner[1]] = 1
        assert layer(x).flatten().tolist() == expected


@torch.no_grad()
def test_doubling_repeats_pixels() -> None:
    layer = Double(1)
    layer.conv.bias.zero_()
    layer.conv.weight.zero_()[0, 0, 1, 1] = 1
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    assert layer(x)[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 3, 1, 1), (2, 3, 3, 1), (1, 3, 5, 5)], ids=str)
def test_doubling_is_the_convolution_of_a_picture_of_twice_the_side(
    shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    """However it is computed: at the edges, on sides of one pixel, backwards, in either layout."""
    layer, x = Double(3).double(), torch.randn(shape).double().contiguous(memory_format=layout)
    plain = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = F.conv2d(plain, layer.conv.weight, layer.conv.bias, padding=1)
    torch.testing.assert_close(layer(x), expected)
    with torch.enable_grad():
        found = []
        for drawn in (
            lambda: layer(x),
            lambda: F.conv2d(plain, layer.conv.weight, layer.conv.bias, padding=1),
        ):
            layer.zero_grad()
            drawn().square().sum().backward()
            found.append([p.grad.clone() for p in layer.parameters()])
    torch.testing.assert_close(*found)


# --- discriminator ----------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_its_patch(layers: int, field: int) -> None:
    """The gradient of one logit in the middle reaches `field` pixels a side, 70 in the paper."""
    network = PatchDiscriminator(2, layers).eval()
    image = torch.randn(1, 3, 160, 160, requires_grad=True)
    logits = network(image)
    middle = logits.shape[-1] // 2
    (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], image)
    reached = gradient.abs().sum((0, 1)) > 0
    assert int(reached.any(0).sum()) == int(reached.any(1).sum()) == field


@pytest.mark.parametrize(
    ("layers", "side", "patches"), [(3, 256, 30), (3, 64, 6), (2, 32, 6), (1, 16, 6)]
)
def test_patches(layers: int, side: int, patches: int) -> None:
    """Halved `layers` times, then twice one place less."""
    found = PatchDiscriminator(2, layers, inputs=4)(torch.randn(2, 4, side, side))
    assert found.shape == (2, 1, patches, patches)


def test_the_widths_of_the_discriminator_double_up_to_eightfold() -> None:
    """A bias only where no norm follows."""
    layers = [m for m in PatchDiscriminator(4, 5).main if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in layers] == [4, 8, 16, 32, 32, 32, 1]
    assert [m.stride[0] for m in layers] == [2, 2, 2, 2, 2, 1, 1]
    assert [m.bias is not None for m in layers] == [True] + [False] * 5 + [True]
