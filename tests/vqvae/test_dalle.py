"""DALL-E's discrete VAE: the paper's sizes, the Gumbel relaxation, the density of pixels."""

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
    gumbel_mixture,
    logit_laplace_loss,
    map_pixels,
    unmap_pixels,
)

SMALL = DVAEConfig(codes=11, width=4, start=6, blocks=1)


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# --- networks ---------------------------------------------------------------------------------


def test_the_papers_networks_have_as_many_parameters() -> None:
    """Of openai/DALL-E's encoder and decoder."""
    with torch.device("meta"):
        assert count(DVAEEncoder(DVAEConfig())) == 53_786_240
        assert count(DVAEDecoder(DVAEConfig())) == 43_829_766


@pytest.mark.parametrize("side", [8, 24, 32])
def test_a_code_stands_for_eight_pixels_a_side(side: int) -> None:
    logits = DVAEEncoder(SMALL)(torch.rand(2, 3, side, side))
    assert logits.shape == (2, 11, side // 8, side // 8)
    mu, log_b = DVAEDecoder(SMALL)(logits.softmax(1))
    assert mu.shape == log_b.shape == (2, 3, side, side)


@pytest.mark.parametrize(("side", "places"), [(9, 1), (15, 1), (20, 2), (31, 3)])
def test_of_other_sides_the_rest_is_cut(side: int, places: int) -> None:
    """As in the public code: whole eighths only, and the last pixels make no place of their own."""
    encoder = DVAEEncoder(SMALL)
    assert encoder(torch.rand(1, 3, side, side)).shape[2:] == (places, places)
    mu, _ = DVAEDecoder(SMALL)(torch.rand(1, 11, places, places))
    assert mu.shape[2:] == (8 * places, 8 * places)


def test_a_picture_need_not_be_square() -> None:
    assert DVAEEncoder(SMALL)(torch.rand(1, 3, 16, 40)).shape == (1, 11, 2, 5)


@pytest.mark.parametrize("kernels", [(3, 3, 3, 1), (1, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("outputs", [8, 12])
def test_a_block_by_hand(kernels: tuple[int, int, int, int], outputs: int) -> None:
    """ReLU before each of four convolutions; a quarter of the width inside; the gain outside."""
    block, x = DVAEBlock(8, outputs, kernels, gain=0.3), torch.randn(2, 8, 5, 5)
    inner = x
    for place, kernel in zip((1, 3, 5, 7), kernels, strict=True):
        layer = block.path[place]
        assert layer.kernel_size == (kernel, kernel)
        assert layer.out_channels == (outputs if place == 7 else outputs // 4)
        inner = F.conv2d(inner.clamp(min=0), layer.weight, layer.bias, padding=kernel // 2)
    beside = x
    if outputs != 8:
        beside = F.conv2d(x, block.identity.weight, block.identity.bias)
    torch.testing.assert_close(block(x), beside + 0.3 * inner)


@pytest.mark.parametrize("blocks", [1, 2])
def test_gains_kernels_and_widths(blocks: int) -> None:
    """One over the square of all blocks; the decoder's path has its 1 x 1 first."""
    config = DVAEConfig(11, 4, 6, blocks)
    for network, widths, kernels in (
        (DVAEEncoder(config), [4, 8, 16, 32], [3, 3, 3, 1]),
        (DVAEDecoder(config), [32, 16, 8, 4], [1, 3, 3, 3]),
    ):
        made = [m for m in network.modules() if isinstance(m, DVAEBlock)]
        assert [block.gain for block in made] == [1 / (4 * blocks) ** 2] * (4 * blocks)
        assert [b.path[7].out_channels for b in made] == [w for w in widths for _ in range(blocks)]
        for block in made:
            assert [block.path[k].kernel_size[0] for k in (1, 3, 5, 7)] == kernels


def test_initial_weights_keep_the_scale() -> None:
    """N(0, 1 / fan-in), zero bias."""
    encoder = DVAEEncoder(DVAEConfig(64, 32, 16, 1))
    for layer in encoder.modules():
        if isinstance(layer, nn.Conv2d):
            fan = layer.in_channels * layer.kernel_size[0] ** 2
            assert layer.weight.std().item() == pytest.approx(fan**-0.5, rel=0.15)
            assert layer.bias is not None and not layer.bias.any()


@pytest.mark.parametrize("name", ["codes", "start", "blocks", "width"])
def test_what_cannot_be_built_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"codec.{name}"):
        DVAEConfig(**{name: 3 if name == "width" else 0})


# --- the relaxation ---------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.1, 1.0, 8.0])
def test_a_mixture_sums_to_one(temperature: float) -> None:
    logits = 3 * torch.randn(2, 7, 3, 4)
    mixture = gumbel_mixture(logits, torch.rand_like(logits), temperature)
    torch.testing.assert_close(mixture.sum(1), torch.ones(2, 3, 4))
    assert (mixture >= 0).all() and mixture.shape == logits.shape


def test_a_mixture_by_hand() -> None:
    """softmax of (logit - ln(-ln u)) / tau over the codes."""
    logits, uniform = torch.randn(1, 3, 1, 1), torch.tensor([0.1, 0.5, 0.9]).view(1, 3, 1, 1)
    warm = [
        math.exp((x - math.log(-math.log(u))) / 0.7)
        for x, u in zip(logits.flatten().tolist(), (0.1, 0.5, 0.9), strict=True)
    ]
    found = gumbel_mixture(logits, uniform, 0.7).flatten().tolist()
    assert found == pytest.approx([w / sum(warm) for w in warm], rel=1e-4)


def test_a_cold_mixture_is_one_code_and_a_hot_one_is_all() -> None:
    """The argmax is the same at every temperature."""
    logits = torch.randn(4, 6, 5, 5)
    uniform = torch.rand_like(logits)
    means, chosen = [], []
    for temperature in (0.01, 0.1, 1.0, 10.0, 1000.0):
        mixture = gumbel_mixture(logits, uniform, temperature)
        means.append(mixture.max(1).values.mean().item())
        chosen.append(mixture.argmax(1))
    assert means == sorted(means, reverse=True)
    assert means[0] > 0.99 and means[-1] == pytest.approx(1 / 6, abs=1e-2)
    assert all(torch.equal(ids, chosen[0]) for ids in chosen)


def test_the_argmax_is_a_sample_of_the_softmax() -> None:
    """Frequencies over many draws, each within five standard deviations."""
    logits, draws = torch.tensor([1.5, 0.0, -1.0, 0.7, -3.0]), 40_000
    uniform = torch.rand(1, 5, 200, draws // 200)
    mixture = gumbel_mixture(logits.view(1, 5, 1, 1), uniform, 0.5)
    frequency = torch.bincount(mixture.argmax(1).flatten(), minlength=5) / draws
    for found, expected in zip(frequency.tolist(), logits.softmax(0).tolist(), strict=True):
        assert abs(found - expected) < 5 * (expected * (1 - expected) / draws) ** 0.5


@pytest.mark.parametrize("edge", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ends_of_the_uniform_numbers_are_finite(edge: float, dtype: torch.dtype) -> None:
    """A draw of exactly 0 or, where the type rounds, 1."""
    logits = torch.randn(1, 4, 1, 1, dtype=dtype, requires_grad=True)
    uniform = torch.tensor([edge, 0.5, 0.5, edge], dtype=dtype).view(1, 4, 1, 1)
    mixture = gumbel_mixture(logits, uniform, 0.1)
    mixture.square().sum().backward()
    assert mixture.isfinite().all() and logits.grad is not None and logits.grad.isfinite().all()
    places = mixture.flatten().argmax().item()
    assert (places in (0, 3)) == (edge == 1.0)


def test_the_gradient_reaches_every_logit() -> None:
    """No gradient is copied: it is that of the softmax."""
    logits = torch.randn(1, 4, 2, 1, dtype=torch.float64, requires_grad=True)
    uniform = torch.rand(1, 4, 2, 1).double()
    assert torch.autograd.gradcheck(lambda x: gumbel_mixture(x, uniform, 0.6), (logits,))


# --- pixels -----------------------------------------------------------------------------------


def test_mapping_pixels_is_undone() -> None:
    image = torch.linspace(0, 1, 101)
    mapped = map_pixels(image)
    assert mapped.min().item() == pytest.approx(0.1) and mapped.max().item() == pytest.approx(0.9)
    torch.testing.assert_close(unmap_pixels(mapped), image, rtol=0, atol=1e-6)
    assert unmap_pixels(torch.tensor([-1.0, 0.05, 0.5, 0.95, 2.0])).tolist() == pytest.approx(
        [0, 0, 0.5, 1, 1]
    )


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
    found = logit_laplace_loss(mu, log_b, mapped).item()
    assert found == pytest.approx(sum(naive) / len(naive), rel=1e-5)


@pytest.mark.parametrize(("mu", "log_b"), [(0.0, -1.0), (1.5, -0.5), (-2.0, -2.0), (0.3, -0.2)])
def test_the_density_integrates_to_one(mu: float, log_b: float) -> None:
    """exp(-loss) over the pixels between 0 and 1, a pixel at a time, by the middle rule in steps
    that are even in the logit."""
    logits = torch.linspace(-40, 40, 4001, dtype=torch.float64)
    edges, middle = logits.sigmoid(), ((logits[1:] + logits[:-1]) / 2).sigmoid()

    def density(x: Tensor) -> Tensor:
        here, b = torch.tensor(mu).double(), torch.tensor(log_b).double()
        return torch.stack([(-logit_laplace_loss(here, b, one)).exp() for one in x])

    inside = (middle > 1e-9) & (middle < 1 - 1e-9)
    total = (density(middle[inside]) * edges.diff()[inside]).sum()
    assert total.item() == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("target", [0.1, 0.4, 0.9])
def test_the_gradient_points_at_the_target(target: float) -> None:
    """Down the slope mu goes to the pixel's logit, and b to its distance from there."""
    mapped = torch.tensor(target)
    goal = math.log(target / (1 - target))
    for offset in (-1.0, 1.0):
        for log_b in (-1.0, 1.0):
            mu, scale = (torch.tensor(v, requires_grad=True) for v in (goal + offset, log_b))
            logit_laplace_loss(mu, scale, mapped).backward()
            assert mu.grad is not None and scale.grad is not None
            assert mu.grad.item() == pytest.approx(offset * math.exp(-log_b), rel=1e-3)
            assert scale.grad.item() == pytest.approx(1 - math.exp(-log_b), rel=1e-3)
