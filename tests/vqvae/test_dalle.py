"""DALL-E's discrete VAE: the paper's networks, the Gumbel-softmax, the density of pixels."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.errors import UserError
from lineage.vqvae.dalle import (
    DVAEBlock,
    DVAEConfig,
    DVAEDecoder,
    DVAEEncoder,
    gumbel_softmax,
    logit_laplace_loss,
    map_pixels,
    unmap_pixels,
)

SMALL = DVAEConfig(num_codes=11, hidden_channels=4, init_channels=6, blocks_per_group=1)


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# --- networks ---------------------------------------------------------------------------------


def test_parameters_of_the_papers_networks() -> None:
    """Those of openai/DALL-E's encoder and decoder."""
    with torch.device("meta"):
        assert count(DVAEEncoder(DVAEConfig())) == 53_786_240
        assert count(DVAEDecoder(DVAEConfig())) == 43_829_766


@pytest.mark.parametrize("side", [8, 24, 32])
def test_a_code_covers_eight_pixels_a_side(side: int) -> None:
    logits = DVAEEncoder(SMALL)(torch.rand(2, 3, side, side))
    assert logits.shape == (2, 11, side // 8, side // 8)
    mu, log_b = DVAEDecoder(SMALL)(logits.softmax(1))
    assert mu.shape == log_b.shape == (2, 3, side, side)


@pytest.mark.parametrize(("side", "cells"), [(9, 1), (15, 1), (20, 2), (31, 3)])
def test_pixels_beyond_the_last_whole_cell_are_cut(side: int, cells: int) -> None:
    """As in the public code."""
    encoder = DVAEEncoder(SMALL)
    assert encoder(torch.rand(1, 3, side, side)).shape[2:] == (cells, cells)
    mu, _ = DVAEDecoder(SMALL)(torch.rand(1, 11, cells, cells))
    assert mu.shape[2:] == (8 * cells, 8 * cells)


def test_a_picture_need_not_be_square() -> None:
    assert DVAEEncoder(SMALL)(torch.rand(1, 3, 16, 40)).shape == (1, 11, 2, 5)


@pytest.mark.parametrize("kernels", [(3, 3, 3, 1), (1, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("out_channels", [8, 12])
def test_a_block_by_hand(kernels: tuple[int, int, int, int], out_channels: int) -> None:
    """ReLU before each of four convolutions, a quarter of the channels inside, then the gain."""
    block, x = DVAEBlock(8, out_channels, kernels, post_gain=0.3), torch.randn(2, 8, 5, 5)
    h = x
    for index, kernel_size in zip((1, 3, 5, 7), kernels, strict=True):
        layer = block.res_path[index]
        assert layer.kernel_size == (kernel_size, kernel_size)
        assert layer.out_channels == (out_channels if index == 7 else out_channels // 4)
        h = F.conv2d(h.clamp(min=0), layer.weight, layer.bias, padding=kernel_size // 2)
    shortcut = x
    if out_channels != 8:
        shortcut = F.conv2d(x, block.id_path.weight, block.id_path.bias)
    torch.testing.assert_close(block(x), shortcut + 0.3 * h)


@pytest.mark.parametrize("blocks", [1, 2])
def test_gains_kernels_and_channels(blocks: int) -> None:
    """The gain is one over the squared number of blocks; the decoder has its 1 x 1 first."""
    config = DVAEConfig(num_codes=11, hidden_channels=4, init_channels=6, blocks_per_group=blocks)
    for network, channels, kernels in (
        (DVAEEncoder(config), [4, 8, 16, 32], [3, 3, 3, 1]),
        (DVAEDecoder(config), [32, 16, 8, 4], [1, 3, 3, 3]),
    ):
        all_blocks = [m for m in network.modules() if isinstance(m, DVAEBlock)]
        gains = [block.post_gain for block in all_blocks]
        assert gains == [1 / (4 * blocks) ** 2] * (4 * blocks)
        outputs = [block.res_path[7].out_channels for block in all_blocks]
        assert outputs == [c for c in channels for _ in range(blocks)]
        for block in all_blocks:
            assert [block.res_path[k].kernel_size[0] for k in (1, 3, 5, 7)] == kernels


def test_initial_weights_keep_the_scale() -> None:
    """N(0, 1 / fan-in), zero bias."""
    config = DVAEConfig(num_codes=64, hidden_channels=32, init_channels=16, blocks_per_group=1)
    for layer in DVAEEncoder(config).modules():
        if isinstance(layer, nn.Conv2d):
            fan_in = layer.in_channels * layer.kernel_size[0] ** 2
            assert layer.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.15)
            assert layer.bias is not None and not layer.bias.any()


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_codes", 0), ("init_channels", 0), ("blocks_per_group", 0), ("hidden_channels", 3)],
)
def test_impossible_sizes_are_refused(name: str, value: int) -> None:
    with pytest.raises(UserError, match=f"{name}={value} must be at least"):
        DVAEConfig(**{name: value})


# --- Gumbel-softmax ---------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.1, 1.0, 8.0])
def test_a_mixture_sums_to_one(temperature: float) -> None:
    logits = 3 * torch.randn(2, 7, 3, 4)
    mixture = gumbel_softmax(logits, torch.rand_like(logits), temperature)
    torch.testing.assert_close(mixture.sum(1), torch.ones(2, 3, 4))
    assert (mixture >= 0).all() and mixture.shape == logits.shape


def test_a_mixture_by_hand() -> None:
    """softmax of (logit - ln(-ln u)) / tau over the codes."""
    logits, u = torch.randn(1, 3, 1, 1), (0.1, 0.5, 0.9)
    weights = [
        math.exp((x - math.log(-math.log(v))) / 0.7)
        for x, v in zip(logits.flatten().tolist(), u, strict=True)
    ]
    mixture = gumbel_softmax(logits, torch.tensor(u).view(1, 3, 1, 1), 0.7).flatten().tolist()
    assert mixture == pytest.approx([w / sum(weights) for w in weights], rel=1e-4)


def test_a_low_temperature_gives_one_code_and_a_high_one_all() -> None:
    """The most likely code is the same at every temperature."""
    logits = torch.randn(4, 6, 5, 5)
    u = torch.rand_like(logits)
    largest, ids = [], []
    for temperature in (0.01, 0.1, 1.0, 10.0, 1000.0):
        mixture = gumbel_softmax(logits, u, temperature)
        largest.append(mixture.max(1).values.mean().item())
        ids.append(mixture.argmax(1))
    assert largest == sorted(largest, reverse=True)
    assert largest[0] > 0.99 and largest[-1] == pytest.approx(1 / 6, abs=1e-2)
    assert all(torch.equal(one, ids[0]) for one in ids)


def test_the_argmax_is_a_sample_of_the_softmax() -> None:
    """Frequencies of many samples, each within five standard deviations."""
    logits, samples = torch.tensor([1.5, 0.0, -1.0, 0.7, -3.0]), 40_000
    u = torch.rand(1, 5, 200, samples // 200)
    mixture = gumbel_softmax(logits.view(1, 5, 1, 1), u, 0.5)
    frequencies = torch.bincount(mixture.argmax(1).flatten(), minlength=5) / samples
    for frequency, p in zip(frequencies.tolist(), logits.softmax(0).tolist(), strict=True):
        assert abs(frequency - p) < 5 * (p * (1 - p) / samples) ** 0.5


@pytest.mark.parametrize("end", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_u_of_exactly_0_or_1_is_finite(end: float, dtype: torch.dtype) -> None:
    """1 occurs where the type rounds."""
    logits = torch.randn(1, 4, 1, 1, dtype=dtype, requires_grad=True)
    u = torch.tensor([end, 0.5, 0.5, end], dtype=dtype).view(1, 4, 1, 1)
    mixture = gumbel_softmax(logits, u, 0.1)
    mixture.square().sum().backward()
    assert mixture.isfinite().all() and logits.grad is not None and logits.grad.isfinite().all()
    assert (mixture.flatten().argmax().item() in (0, 3)) == (end == 1.0)


def test_the_gradient_is_that_of_the_softmax() -> None:
    logits = torch.randn(1, 4, 2, 1, dtype=torch.float64, requires_grad=True)
    u = torch.rand(1, 4, 2, 1).double()
    assert torch.autograd.gradcheck(lambda x: gumbel_softmax(x, u, 0.6), (logits,))


# --- pixels -----------------------------------------------------------------------------------


def test_unmap_pixels_inverts_map_pixels() -> None:
    image = torch.linspace(0, 1, 101)
    mapped = map_pixels(image)
    assert mapped.min().item() == pytest.approx(0.1) and mapped.max().item() == pytest.approx(0.9)
    torch.testing.assert_close(unmap_pixels(mapped), image, rtol=0, atol=1e-6)
    values = unmap_pixels(torch.tensor([-1.0, 0.05, 0.5, 0.95, 2.0])).tolist()
    assert values == pytest.approx([0, 0, 0.5, 1, 1])


def naive_loss(mu: float, log_b: float, x: float) -> float:
    """-ln of equation 2."""
    b = math.exp(log_b)
    density = math.exp(-abs(math.log(x / (1 - x)) - mu) / b) / (2 * b * x * (1 - x))
    return -math.log(density)


def test_the_loss_is_a_mean_of_naive_ones() -> None:
    mu, log_b, x = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2), torch.rand(2, 3, 2, 2)
    mapped = map_pixels(x)
    each = zip(*(t.flatten().tolist() for t in (mu, log_b, mapped)), strict=True)
    naive = [naive_loss(*one) for one in each]
    loss = logit_laplace_loss(mu, log_b, mapped).item()
    assert loss == pytest.approx(sum(naive) / len(naive), rel=1e-5)


@pytest.mark.parametrize(("mu", "log_b"), [(0.0, -1.0), (1.5, -0.5), (-2.0, -2.0), (0.3, -0.2)])
def test_the_density_integrates_to_one(mu: float, log_b: float) -> None:
    """By the midpoint rule, in steps that are even in the logit."""
    logits = torch.linspace(-40, 40, 4001, dtype=torch.float64)
    edges, middle = logits.sigmoid(), ((logits[1:] + logits[:-1]) / 2).sigmoid()

    def density(x: Tensor) -> Tensor:
        m, b = torch.tensor(mu).double(), torch.tensor(log_b).double()
        return torch.stack([(-logit_laplace_loss(m, b, one)).exp() for one in x])

    inside = (middle > 1e-9) & (middle < 1 - 1e-9)
    total = (density(middle[inside]) * edges.diff()[inside]).sum()
    assert total.item() == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("target", [0.1, 0.4, 0.9])
def test_gradients_of_mu_and_b(target: float) -> None:
    """Descent moves mu to the pixel's logit, and b to the distance of the two."""
    mapped = torch.tensor(target)
    logit = math.log(target / (1 - target))
    for offset in (-1.0, 1.0):
        for value in (-1.0, 1.0):
            mu, log_b = (torch.tensor(v, requires_grad=True) for v in (logit + offset, value))
            logit_laplace_loss(mu, log_b, mapped).backward()
            assert mu.grad is not None and log_b.grad is not None
            assert mu.grad.item() == pytest.approx(offset * math.exp(-value), rel=1e-3)
            assert log_b.grad.item() == pytest.approx(1 - math.exp(-value), rel=1e-3)
