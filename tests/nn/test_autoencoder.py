"""VQGAN's encoder, decoder and discriminator: the paper's sizes, shapes, blocks by hand."""

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
    Downsample,
    Encoder,
    PatchDiscriminator,
    ResnetBlock,
    Upsample,
    group_norm,
)

SMALL = AutoencoderConfig(
    channels=8,
    channel_mult=(1, 2, 3),
    num_res_blocks=1,
    attn_resolutions=(4,),
    resolution=16,
    z_channels=5,
)
PAPER = AutoencoderConfig()  # taming-transformers, ImageNet, f = 16


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# --- sizes ------------------------------------------------------------------------------------


def test_parameters_of_vqgan() -> None:
    """Those of taming's `VQModel` at f = 16 with 1024 codes."""
    with torch.device("meta"):
        encoder, decoder = Encoder(PAPER, PAPER.z_channels), Decoder(PAPER)
        between = [nn.Conv2d(256, 256, 1), nn.Conv2d(256, 256, 1), nn.Embedding(1024, 256)]
    assert count(encoder) == 29_298_176
    assert count(decoder) == 42_449_795
    assert count(encoder) + count(decoder) + sum(map(count, between)) == 72_141_699


def test_parameters_of_latent_diffusion() -> None:
    """Stable Diffusion's autoencoder, f = 8: the encoder's output is means and variances, and only
    the middle has attention."""
    config = AutoencoderConfig(channel_mult=(1, 2, 4, 4), attn_resolutions=(), z_channels=4)
    with torch.device("meta"):
        encoder, decoder = Encoder(config, 2 * config.z_channels), Decoder(config)
        between = [nn.Conv2d(8, 8, 1), nn.Conv2d(4, 4, 1)]
    assert count(encoder) == 34_163_592
    assert count(decoder) == 49_490_179
    assert count(encoder) + count(decoder) + sum(map(count, between)) == 83_653_863


def test_parameters_of_the_discriminator() -> None:
    with torch.device("meta"):
        assert count(PatchDiscriminator()) == 2_765_633


@pytest.mark.parametrize(
    ("channel_mult", "attention", "resolution", "factor", "levels"),
    [
        ((1, 1, 2, 2, 4), (16,), 256, 16, [(8, 0), (8, 0), (16, 0), (16, 0), (32, 1)]),
        ((1, 2, 3), (16, 4), 16, 4, [(8, 1), (16, 0), (24, 1)]),
        ((2,), (), 7, 1, [(16, 0)]),
        ((1, 2), (5,), 16, 2, [(8, 0), (16, 0)]),  # no level has this side
    ],
    ids=str,
)
def test_factor_and_levels_by_hand(
    channel_mult: tuple[int, ...],
    attention: tuple[int, ...],
    resolution: int,
    factor: int,
    levels: list[tuple[int, int]],
) -> None:
    config = AutoencoderConfig(
        channels=8, channel_mult=channel_mult, attn_resolutions=attention, resolution=resolution
    )
    assert config.factor == factor
    assert config.levels() == [(channels, bool(has)) for channels, has in levels]


@pytest.mark.parametrize("attention", [(), (4,), (8, 16), (4, 8, 16)], ids=str)
@pytest.mark.parametrize("blocks", [1, 2])
def test_only_the_listed_resolutions_have_attention(
    blocks: int, attention: tuple[int, ...]
) -> None:
    """After each block, of which the decoder has one more; and in the middle."""
    config = replace(
        SMALL,
        channels=4,
        channel_mult=(1, 1, 2),
        num_res_blocks=blocks,
        attn_resolutions=attention,
        z_channels=3,
    )
    for network, x, blocks_per_level in (
        (Encoder(config, 3), torch.randn(1, 3, 16, 16), blocks),
        (Decoder(config), torch.randn(1, 3, 4, 4), blocks + 1),
    ):
        sides: list[int] = []
        for layer in network.modules():
            if isinstance(layer, AttnBlock):
                layer.register_forward_hook(lambda _, x, __, s=sides: s.append(x[0].shape[-1]))
        network(x)
        assert sorted(sides) == sorted([4, *attention * blocks_per_level])


@pytest.mark.parametrize(
    ("changes", "side"),
    [
        ({}, 16),
        ({}, 32),
        ({"channels": 4, "channel_mult": (2,), "num_res_blocks": 2, "resolution": 8}, 8),
        ({"patch_size": 2}, 32),
        ({"channels": 4, "channel_mult": (1, 2), "resolution": 12, "patch_size": 3}, 24),
    ],
    ids=str,
)
def test_shapes(changes: dict[str, Any], side: int) -> None:
    """Pictures of any side that is divisible by the factor."""
    config = replace(SMALL, **changes)
    cells = side // config.factor
    grid = Encoder(config, 7, in_channels=2)(torch.randn(2, 2, side, side))
    assert grid.shape == (2, 7, cells, cells)
    image = Decoder(config, out_channels=4)(torch.randn(2, config.z_channels, cells, cells))
    assert image.shape == (2, 4, side, side)


def test_the_decoder_mirrors_the_encoder() -> None:
    """Number of channels of the blocks, from the smallest resolution to the largest."""
    ups = [[b.conv1.in_channels for b in level.block] for level in Decoder(SMALL).up]
    downs = [[b.conv1.in_channels for b in level.block] for level in Encoder(SMALL, 5).down]
    assert downs == [[8], [8], [16]]
    assert ups == [[24, 24], [24, 16], [16, 8]]


# --- pixels folded into channels --------------------------------------------------------------


@pytest.mark.parametrize("patch", [2, 3])
@pytest.mark.parametrize("channel_mult", [(1,), (1, 2), (2, 1, 1)], ids=str)
def test_a_patch_multiplies_the_factor(patch: int, channel_mult: tuple[int, ...]) -> None:
    """`attn_resolutions` are sides of the folded picture."""
    plain = replace(
        SMALL, channels=4, channel_mult=channel_mult, attn_resolutions=(8,), resolution=24
    )
    folded = replace(plain, patch_size=patch, resolution=24 * patch)
    assert folded.factor == patch * plain.factor
    assert folded.levels() == plain.levels()
    extra = 9 * 3 * (patch**2 - 1) * 4  # of the encoder's first convolution
    assert count(Encoder(folded, 5)) == count(Encoder(plain, 5)) + extra
    extra = (9 * plain.channels * channel_mult[0] + 1) * 3 * (patch**2 - 1)
    assert count(Decoder(folded)) == count(Decoder(plain)) + extra


@torch.no_grad()
@pytest.mark.parametrize("patch", [1, 2, 3])
def test_a_patch_is_a_square_of_neighbours(patch: int) -> None:
    """Inputs of the first convolution and outputs of the last, pixel by pixel."""
    config = replace(SMALL, channel_mult=(1,), resolution=6, patch_size=patch)
    captured: list[Tensor] = []
    encoder, decoder = Encoder(config, 5), Decoder(config)
    encoder.conv_in.register_forward_hook(lambda _, args, __: captured.append(args[0]))
    decoder.conv_out.register_forward_hook(lambda _, __, output: captured.append(output))
    image = torch.randn(2, 3, 6, 6)
    encoder(image)
    decoded = decoder(torch.randn(2, 5, 6 // patch, 6 // patch))
    folded, last = captured
    assert folded.shape == last.shape == (2, 3 * patch**2, 6 // patch, 6 // patch)
    for row in range(6):
        for column in range(6):
            cell = (slice(None), slice(None), row // patch, column // patch)
            within = row % patch * patch + column % patch
            for pixels, channels in ((image, folded[cell]), (decoded, last[cell])):
                assert torch.equal(pixels[:, :, row, column], channels[:, within :: patch**2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_mult": ()}, r"channel_mult=\(\) must have 1 or more entries"),
        ({"channel_mult": (1, 0)}, "channel_mult.1=0 must be at least 1"),
        ({"channels": 0}, "channels=0 must be at least 1"),
        ({"num_res_blocks": 0}, "num_res_blocks=0 must be at least 1"),
        ({"z_channels": -1}, "z_channels=-1 must be at least 1"),
        ({"patch_size": 0}, "patch_size=0 must be at least 1"),
        ({"resolution": 100}, "net.resolution=100 is not divisible by 16"),
        ({"patch_size": 2, "resolution": 272}, "net.resolution=272 is not divisible by 32"),
    ],
    ids=str,
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AutoencoderConfig(**changes)


# --- blocks by hand ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(32, 32), (64, 32), (48, 16), (16, 16), (40, 8), (24, 8), (12, 4), (6, 2), (7, 1), (1, 1)],
)
def test_groups_divide_the_channels(channels: int, groups: int) -> None:
    layer = group_norm(channels)
    assert (layer.num_groups, layer.num_channels, layer.eps) == (groups, channels, 1e-6)


def normed(x: Tensor, layer: nn.GroupNorm) -> Tensor:
    """Group norm, one picture and one group at a time."""
    y = torch.empty_like(x)
    size = x.shape[1] // layer.num_groups
    for row in range(len(x)):
        for first in range(0, x.shape[1], size):
            part = x[row, first : first + size]
            scaled = (part - part.mean()) / (part.var(correction=0) + 1e-6).sqrt()
            weight, bias = (t[first : first + size, None, None] for t in (layer.weight, layer.bias))
            y[row, first : first + size] = scaled * weight + bias
    return y


def perturbed(network: nn.Module) -> nn.Module:
    """Move all weights from values, such as 0 and 1, that hide mistakes."""
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return network


@torch.no_grad()
def test_attention_by_loops() -> None:
    """Each cell attends to all cells of its own grid, which need not be square."""
    block, x = perturbed(AttnBlock(6)), torch.randn(2, 6, 2, 3)
    h = normed(x, block.norm)
    expected = x.clone()

    def project(layer: nn.Conv2d, row: int, cell: int) -> Tensor:
        return layer.weight[:, :, 0, 0] @ h[row, :, cell // 3, cell % 3] + layer.bias

    for row in range(2):
        for cell in range(6):
            query = project(block.q, row, cell)
            scores = [float(query @ project(block.k, row, other)) / 6**0.5 for other in range(6)]
            total = sum(map(math.exp, scores))
            attended = sum(
                math.exp(s) / total * project(block.v, row, other) for other, s in enumerate(scores)
            )
            out = block.proj_out.weight[:, :, 0, 0] @ attended + block.proj_out.bias
            expected[row, :, cell // 3, cell % 3] += out
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("out_channels", [4, 6])
def test_residual_block_by_hand(out_channels: int) -> None:
    """Norm, swish, convolution, twice; a 1 x 1 convolution as shortcut to another width."""
    block, x = perturbed(ResnetBlock(4, out_channels)), torch.randn(2, 4, 3, 5)
    h = normed(x, block.norm1)
    h = F.conv2d(h * h.sigmoid(), block.conv1.weight, block.conv1.bias, padding=1)
    h = normed(h, block.norm2)
    h = F.conv2d(h * h.sigmoid(), block.conv2.weight, block.conv2.bias, padding=1)
    shortcut = x
    if out_channels != 4:
        layer = block.nin_shortcut
        shortcut = torch.einsum("oi,bihw->bohw", layer.weight[:, :, 0, 0], x)
        shortcut = shortcut + layer.bias[:, None, None]
    torch.testing.assert_close(block(x), h + shortcut, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_downsample_pads_on_the_right_and_below() -> None:
    """A kernel that picks one corner shows which pixel each output depends on."""
    x = torch.arange(1.0, 17).view(1, 1, 4, 4)
    layer = Downsample(1)
    layer.conv.bias.zero_()
    for corner, expected in (((0, 0), [1, 3, 9, 11]), ((2, 2), [11, 0, 0, 0])):
        layer.conv.weight.zero_()[0, 0, corner[0], corner[1]] = 1
        assert layer(x).flatten().tolist() == expected


@torch.no_grad()
def test_upsample_repeats_pixels() -> None:
    layer = Upsample(1)
    layer.conv.bias.zero_()
    layer.conv.weight.zero_()[0, 0, 1, 1] = 1
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    assert layer(x)[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 3, 1, 1), (2, 3, 3, 1)], ids=str)
def test_upsample_is_a_convolution_of_the_larger_picture(
    shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    """Also on sides of one pixel, in either layout."""
    layer, x = Upsample(3).double(), torch.randn(shape).double().contiguous(memory_format=layout)
    larger = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(layer(x), layer.conv(larger))


# --- discriminator ----------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_receptive_field_of_a_logit(layers: int, field: int) -> None:
    """The gradient of a logit in the middle reaches `field` pixels a side, 70 in the paper."""
    network = PatchDiscriminator(2, layers).eval()
    image = torch.randn(1, 3, 160, 160, requires_grad=True)
    logits = network(image)
    middle = logits.shape[-1] // 2
    (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], image)
    nonzero = gradient.abs().sum((0, 1)) > 0
    assert int(nonzero.any(0).sum()) == int(nonzero.any(1).sum()) == field


@pytest.mark.parametrize(
    ("layers", "side", "patches"), [(3, 256, 30), (3, 64, 6), (2, 32, 6), (1, 16, 6)]
)
def test_number_of_logits(layers: int, side: int, patches: int) -> None:
    """The side is halved `layers` times and then loses one, twice."""
    logits = PatchDiscriminator(2, layers, in_channels=4)(torch.randn(2, 4, side, side))
    assert logits.shape == (2, 1, patches, patches)


def test_channels_of_the_discriminator_double_up_to_eightfold() -> None:
    """Convolutions before a norm have no bias."""
    layers = [m for m in PatchDiscriminator(4, 5).main if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in layers] == [4, 8, 16, 32, 32, 32, 1]
    assert [m.stride[0] for m in layers] == [2, 2, 2, 2, 2, 1, 1]
    assert [m.bias is not None for m in layers] == [True] + [False] * 5 + [True]
