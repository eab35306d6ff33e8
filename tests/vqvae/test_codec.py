"""The contract of codecs: densities of bytes against sums over all of them, the running error."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lineage.data.contract import Batch, to_unit
from lineage.nn.noise import NoiseStreams
from lineage.nn.vqgan_losses import psnr
from lineage.system import Turn
from lineage.text.contract import TextFeatures
from lineage.vqvae.codec import Codec, log_interval_probability, normal_cdf

BYTES = to_unit(torch.arange(256, dtype=torch.uint8))


class Grey(Codec):
    """K levels of grey from black to white: a cell's code is the level closest to its mean."""

    def __init__(self, num_codes: int = 5, factor: int = 2) -> None:
        super().__init__()
        self.num_codes, self.factor = num_codes, factor
        self.scale = nn.Parameter(torch.ones(()))

    def groups(self) -> dict[str, list[nn.Module]]:
        return {"codec": [self]}

    def losses(
        self, batch: Batch, text: TextFeatures | None, noise: NoiseStreams
    ) -> Iterator[Turn]:
        yield Turn("codec", {"zero": 0 * self.scale})

    def encode(self, image: Tensor) -> Tensor:
        side = self.factor
        means = image.mean(1).unfold(1, side, side).unfold(2, side, side).mean((-1, -2))
        top = self.num_codes - 1
        return ((means + 1) / 2 * top).round().clamp(0, top).long()

    def decode(self, ids: Tensor) -> Tensor:
        grey = self.scale * (ids / max(1, self.num_codes - 1) * 2 - 1)
        grey = grey.repeat_interleave(self.factor, 1).repeat_interleave(self.factor, 2)
        return grey[:, None].expand(-1, 3, -1, -1)


def cdf(x: float) -> float:
    """Cumulative distribution of the standard normal, accurate far out too."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


def byte_probability(byte: int, mean: float, std: float) -> float:
    """Probability of one of 256 bytes under a Gaussian; the first and the last get the tails."""
    low = -math.inf if byte == 0 else ((2 * byte - 1) / 255 - 1 - mean) / std
    high = math.inf if byte == 255 else ((2 * byte + 1) / 255 - 1 - mean) / std
    if low + high > 0:
        low, high = -high, -low
    return cdf(high) - cdf(low)


def grey_codec(mse: float, factor: int = 2) -> Grey:
    """A codec whose training left the squared error `mse`."""
    codec = Grey(factor=factor)
    codec.running_mse.fill_(mse)
    return codec


# --- density of bytes -------------------------------------------------------------------------


@pytest.mark.parametrize("mse", [4.0, 0.3, 0.01, 1e-4, 0.0])
@pytest.mark.parametrize("code", [0, 1, 3, 4])
def test_probabilities_of_all_bytes_sum_to_one(code: int, mse: float) -> None:
    """For any decoded pixel: black and white get the tails."""
    image = BYTES.view(256, 1, 1, 1).expand(-1, 3, 1, 1)
    nll = grey_codec(mse, factor=1).nll(image, torch.full((256, 1, 1), code))
    assert nll.shape == (256,) and nll.dtype == torch.float32
    probs = (-nll.double() / 3).exp()  # of one of three equal channels
    assert probs.sum().item() == pytest.approx(1, abs=1e-4)
    likeliest = BYTES[probs.argmax()].item()
    assert mse > 0.1 or abs(likeliest - (code / 2 - 1)) <= 1.01 / 255


@pytest.mark.parametrize("mse", [1.0, 0.02, 1e-3])
def test_nll_is_that_of_a_gaussian_by_loops(mse: float) -> None:
    """Summed over pixels and channels of each row; close to the decoded pixel and at the ends of
    the scale."""
    codec, std = grey_codec(mse), mse**0.5
    ids = torch.tensor([[[0, 1], [2, 4]], [[3, 3], [4, 0]]])
    decoded = codec.decode(ids)
    noisy = decoded + torch.randn(2, 3, 4, 4) * std
    pixels = ((noisy + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    pixels[0, :, 0, 0] = torch.tensor([0, 1, 255])
    nll = codec.nll(to_unit(pixels), ids)
    for row in range(2):
        pairs = zip(pixels[row].flatten().tolist(), decoded[row].flatten().tolist(), strict=True)
        naive = -sum(math.log(max(1e-30, byte_probability(*pair, std))) for pair in pairs)
        assert nll[row].item() == pytest.approx(naive, rel=1e-3)


@pytest.mark.parametrize("deviations", [3, 6, 7, 8, 9, 10, 11])
@pytest.mark.parametrize("code", [0, 4])
def test_nll_of_pixels_far_from_the_decoded_one(code: int, deviations: int) -> None:
    """Small probabilities are accurate on both sides of the mean: a pixel nine deviations off costs
    43 nats."""
    byte = 200 if code == 0 else 55
    std = abs(BYTES[byte].item() - (code / 2 - 1)) / deviations
    image = BYTES[byte].expand(1, 3, 1, 1)
    nll = grey_codec(std**2, factor=1).nll(image, torch.tensor([[[code]]])).item() / 3
    expected = -math.log(byte_probability(byte, code / 2 - 1, std))
    assert nll == pytest.approx(expected, rel=1e-3)


def test_nll_of_a_row_does_not_depend_on_the_others() -> None:
    codec, image = grey_codec(0.05), to_unit(torch.randint(0, 256, (5, 3, 6, 6)).byte())
    ids = codec.encode(image)
    alone = torch.cat([codec.nll(image[k : k + 1], ids[k : k + 1]) for k in range(5)])
    torch.testing.assert_close(codec.nll(image, ids), alone)


def test_nll_is_smallest_for_the_true_variance() -> None:
    image = to_unit(torch.randint(90, 166, (8, 3, 8, 8)).byte())
    ids = torch.full((8, 4, 4), 2)
    mse = (Grey().decode(ids) - image).square().mean().item()
    nll = [grey_codec(mse * factor).nll(image, ids).sum().item() for factor in (0.5, 1, 2)]
    assert nll[1] == min(nll)


def test_interval_probabilities_by_hand() -> None:
    """ln(cdf(b) - cdf(a)), summed over all but the rows; open ends are infinite."""
    low = torch.tensor([[-1.0, -math.inf, 0.5], [2.0, -0.1, -math.inf]])
    high = torch.tensor([[0.3, -2.0, math.inf], [2.5, 0.1, math.inf]])
    sums = log_interval_probability(normal_cdf, low, high)
    for row in range(2):
        pairs = zip(low[row].tolist(), high[row].tolist(), strict=True)
        naive = sum(math.log(cdf(b) - cdf(a)) for a, b in pairs)
        assert sums[row].item() == pytest.approx(naive, rel=1e-5)
    arranged = log_interval_probability(normal_cdf, low.view(2, 3, 1, 1), high.view(2, 3, 1, 1))
    assert torch.equal(arranged, sums) and sums.shape == (2,)


def test_interval_probabilities_are_symmetric() -> None:
    low = torch.linspace(-9, 9, 37)[:, None]
    high = low + 0.25
    mirrored = log_interval_probability(normal_cdf, -high, -low)
    torch.testing.assert_close(log_interval_probability(normal_cdf, low, high), mirrored)


def test_the_logarithm_of_an_empty_interval_is_finite() -> None:
    """As is that of one far outside: no picture is impossible."""
    edges = torch.tensor([[500.0], [-500.0], [0.2]])
    widths = torch.tensor([[1.0], [1.0], [0.0]])
    values = log_interval_probability(normal_cdf, edges, edges + widths)
    assert values.isfinite().all() and (values < -60).all()


# --- the running error ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mse", "expected"), [(4.0, 0.0), (0.04, 20.0), (4e-6, 60.0), (1.0, 6.0206)]
)
def test_psnr_by_hand(mse: float, expected: float) -> None:
    """10 log10(2^2 / mse), for pixels from -1 to 1."""
    assert psnr(torch.tensor(mse)).item() == pytest.approx(expected, abs=1e-3)


def test_psnr_is_that_of_bytes() -> None:
    """10 log10(255^2 / mse) of each row."""
    image, other = (torch.randint(0, 256, (3, 3, 4, 4)).byte() for _ in range(2))
    byte_mse = (image.float() - other.float()).square().flatten(1).mean(1)
    values = psnr((to_unit(image) - to_unit(other)).square().flatten(1).mean(1))
    torch.testing.assert_close(values, 10 * (255**2 / byte_mse).log10())
    assert psnr(torch.tensor([0.0, 1.0])).isfinite().all()


def test_the_error_of_a_step_is_that_of_the_clamped_picture() -> None:
    """Without gradient, and in float32 in half precision too."""
    codec, image = Grey(), torch.rand(2, 3, 4, 4) * 2 - 1
    decoded = (image + torch.randn_like(image)).requires_grad_()
    expected = (decoded.detach().clamp(-1, 1) - image).square().mean()
    before = codec.running_mse.clone()
    mse = codec.track_mse(image, decoded)
    torch.testing.assert_close(mse, expected)
    assert not mse.requires_grad and not codec.running_mse.requires_grad
    assert min(before, mse) <= codec.running_mse <= max(before, mse)
    half = Grey().track_mse(image, decoded.to(torch.bfloat16))
    assert half.dtype == torch.float32 and half.item() == pytest.approx(mse.item(), rel=0.03)


def test_the_running_error_follows_training_and_is_saved() -> None:
    codec, image = Grey(), torch.zeros(1, 3, 2, 2)
    for error in (0.1, 0.2):
        for _ in range(1500):
            codec.track_mse(image, image + error)
        assert codec.running_mse.item() == pytest.approx(error**2, rel=1e-3)
    other = Grey()
    other.load_state_dict(codec.state_dict())
    assert torch.equal(other.running_mse, codec.running_mse)


@pytest.mark.parametrize("steps", [1, 10, 300])
def test_the_initial_value_has_no_weight_in_the_running_error(steps: int) -> None:
    """Else, after the 300 steps of a short run, it would outweigh an error of 20 dB fivefold."""
    codec, image = Grey(), torch.zeros(1, 3, 2, 2)
    for _ in range(steps):
        codec.track_mse(image, image + 0.1)
    assert codec.running_mse.item() == pytest.approx(0.01, rel=0.1)


def test_diagnosis_of_a_codec_names_a_collapse() -> None:
    codec = Grey()
    diagnosis = codec.diagnose({"codebook_usage": 0.2})
    assert diagnosis == "codebook collapse: only 20% of the codes are in use"
    assert codec.diagnose({"codebook_usage": 0.7}) == codec.diagnose({}) == ""
