"""The variational bound against torch.distributions, Bayes' rule and sums over all bytes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from lineage.diffusion.bound import (
    MeanVariance,
    approx_standard_normal_cdf,
    bits_per_dim,
    discretized_gaussian_log_likelihood,
    normal_kl,
    p_mean_variance,
    vlb_loss,
    vlb_terms,
)
from lineage.diffusion.process import PREDICTIONS, VARIANCES, Posterior, Process, ProcessConfig

B, T = 4, 40
Chain = tuple[str, bool]  # schedule, zero_snr
CHAINS: list[Chain] = [
    (name, zero)
    for name in ("linear", "scaled_linear", "cosine", "sigmoid")
    for zero in (False, True)
]
chains = pytest.mark.parametrize("chain", CHAINS, ids=lambda c: c[0] + "_zero" * c[1])
STEPS = torch.tensor([0, 1, 20, T - 1])
BYTES = torch.arange(256, dtype=torch.float64) / 127.5 - 1  # as pictures hold them


def make_process(chain: Chain = ("cosine", False), **settings: Any) -> Process:
    settings = {"num_timesteps": T, "prediction": "x0", **settings}
    return Process(ProcessConfig(schedule=chain[0], zero_snr=chain[1], **settings))


def random(seed: int, channels: int = 3) -> Tensor:
    return torch.randn(B, channels, 4, 4, generator=torch.Generator().manual_seed(seed))


def pictures(seed: int = 0) -> Tensor:
    """(B, 3, 4, 4) of bytes, both ends included."""
    values = torch.randint(256, (B, 3, 4, 4), generator=torch.Generator().manual_seed(seed))
    values[:, 0, 0, :2] = torch.tensor([0, 255])
    return values / 127.5 - 1


def bayes(process: Process, x0: Tensor, x: Tensor, t: int) -> tuple[Tensor, float]:
    """Mean and variance of x_(t-1) given x_t and x_0, for t > 0, in double precision.

    The product of two normal densities: precisions add, and means by their precisions.
    """
    beta, previous = process.betas[t].item(), process.alphas_cumprod[t - 1].item()
    prior, likelihood = 1 / (1 - previous), (1 - beta) / beta
    variance = 1 / (prior + likelihood)
    mean = prior * math.sqrt(previous) * x0.double() + math.sqrt(1 - beta) / beta * x.double()
    return variance * mean, variance


def bytes_nll(x0: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Negative log likelihood of bytes in bits, with the tanh approximation."""

    def cdf(x: Tensor) -> Tensor:
        return 0.5 + 0.5 * (math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)).tanh()

    x0, mean, deviation = x0.double(), mean.double(), deviation.double()
    low = cdf((x0 - mean - 1 / 255) / deviation).where(x0 > -0.999, 0)
    high = cdf((x0 - mean + 1 / 255) / deviation).where(x0 < 0.999, 1)
    return -(high - low).clamp(min=1e-12).log2()


# --- parts ----------------------------------------------------------------------------------------


def test_kl_is_that_of_torch() -> None:
    mean1, mean2 = torch.randn(2, 500, dtype=torch.float64)
    log1, log2 = 3 * torch.randn(2, 500, dtype=torch.float64)
    expected = kl_divergence(Normal(mean1, (log1 / 2).exp()), Normal(mean2, (log2 / 2).exp()))
    kl = normal_kl(mean1, log1, mean2, log2)
    torch.testing.assert_close(kl, expected, rtol=1e-9, atol=1e-12)
    assert (kl >= 0).all()
    zero = normal_kl(mean1, log1, mean1, log1)
    torch.testing.assert_close(zero, torch.zeros_like(zero), atol=1e-12, rtol=0)


def test_the_cdf_is_that_of_the_normal_distribution() -> None:
    """The tanh approximation is off by less than 2e-4, symmetric and monotonic."""
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    cdf = approx_standard_normal_cdf(x)
    torch.testing.assert_close(cdf, Normal(0.0, 1.0).cdf(x), atol=2e-4, rtol=0)
    torch.testing.assert_close(cdf + cdf.flip(0), torch.ones_like(x), atol=1e-12, rtol=0)
    assert (cdf.diff() >= 0).all()


@pytest.mark.parametrize("mean", [-3.0, -1.0, -0.3, 0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("deviation", [1e-3, 0.02, 0.5, 3.0])
def test_probabilities_of_all_bytes_sum_to_1(mean: float, deviation: float) -> None:
    """The darkest and the brightest byte get the tails."""
    means, logs = (
        torch.full((256,), mean).double(),
        torch.full((256,), math.log(deviation)).double(),
    )
    probabilities = discretized_gaussian_log_likelihood(BYTES, means, logs).exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-6)
    edges = torch.cat([torch.tensor([-math.inf]), BYTES[:-1] + 1 / 255, torch.tensor([math.inf])])
    exact = Normal(mean, deviation).cdf(edges.double()).diff()
    torch.testing.assert_close(probabilities, exact, atol=4e-4, rtol=0)


def test_the_log_likelihood_is_finite_however_unlikely_the_byte() -> None:
    """So is its gradient: one extreme pixel must not make a batch NaN."""
    mean = torch.full((256,), 50.0, requires_grad=True)
    log_std = torch.full((256,), -8.0, requires_grad=True)
    log_likelihood = discretized_gaussian_log_likelihood(BYTES.float(), mean, log_std)
    assert torch.isfinite(log_likelihood).all()
    assert log_likelihood.min().item() == pytest.approx(math.log(1e-12))
    log_likelihood.sum().backward()
    assert torch.isfinite(mean.grad).all() and torch.isfinite(log_std.grad).all()


def test_bits_are_a_mean_over_each_picture() -> None:
    nats = random(0)
    expected = nats.double().numpy().mean(axis=(1, 2, 3)) / math.log(2)
    np.testing.assert_allclose(bits_per_dim(nats), expected, rtol=1e-5)


# --- posterior ------------------------------------------------------------------------------------


@chains
def test_the_posterior_is_bayes_rule(chain: Chain) -> None:
    process = make_process(chain)
    posterior, x0, x = Posterior(process), random(0), random(1)
    for t in range(1, T):
        mean, variance = bayes(process, x0, x, t)
        assert posterior.variance[t].item() == pytest.approx(variance, rel=1e-8)
        assert posterior.log_variance[t].item() == pytest.approx(math.log(variance), abs=1e-8)
        ours = posterior.mean(x0, x, torch.full((B,), t))
        torch.testing.assert_close(ours.double(), mean, atol=2e-6, rtol=0)


@chains
def test_the_posterior_of_the_first_step_is_the_picture(chain: Chain) -> None:
    """Its variance is 0, so its logarithm is that of t = 1 (section 3.1, code)."""
    posterior, x0 = Posterior(make_process(chain)), random(0)
    mean = posterior.mean(x0, random(1), torch.zeros(B, dtype=torch.long))
    torch.testing.assert_close(mean, x0, atol=1e-6, rtol=0)
    assert posterior.variance[0] == 0
    for log in (posterior.log_variance, posterior.log_large):
        assert log[0].item() == pytest.approx(math.log(posterior.variance[1]), rel=1e-9)


def test_the_posterior_is_that_of_simulated_chains() -> None:
    """Of many x_(t-1) and x_t drawn from x_0, those with x_t near a value."""
    process = make_process(("linear", False), num_timesteps=50)
    generator = torch.Generator().manual_seed(0)
    t, x0, count = 3, 0.4, 400_000
    first, second = torch.randn(2, count, generator=generator, dtype=torch.float64)
    level, beta = process.level(t - 1), process.betas[t].item()
    previous = level.alpha * x0 + level.sigma * first
    x = math.sqrt(1 - beta) * previous + math.sqrt(beta) * second
    value = x.mean().item() + 0.5 * x.std().item()  # where the prior alone would be wrong
    near = previous[(x - value).abs() < 0.01]
    posterior = Posterior(process)
    whole = (torch.full((1, 1, 1, 1), v) for v in (x0, value))
    mean = posterior.mean(*whole, torch.tensor([t])).item()
    assert len(near) > 2000
    error = near.std().item() / math.sqrt(len(near))
    assert near.mean().item() == pytest.approx(mean, abs=4 * error)
    assert near.std().item() == pytest.approx(math.sqrt(posterior.variance[t]), rel=0.05)


# --- p(x_(t-1) | x_t) -----------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", list(PREDICTIONS))
@pytest.mark.parametrize("variance", VARIANCES)
def test_the_mean_is_that_of_the_posterior_at_the_estimate(variance: str, prediction: str) -> None:
    """For each prediction; with a learned variance, of the first half of the channels."""
    process = make_process(variance=variance, prediction=prediction)
    x0, x = random(0), random(1)
    for clip in (False, True):
        output = random(2, 6 if process.config.learns_variance else 3)
        p = p_mean_variance(process, output, x, STEPS, clip)
        estimate = process.to_x0(output[:, :3], x, STEPS)
        estimate = estimate.clamp(-1, 1) if clip else estimate
        torch.testing.assert_close(p.x0, estimate)
        assert p.mean.shape == p.log_variance.shape == x0.shape
        for row, t in enumerate(STEPS.tolist()):
            mean = bayes(process, estimate[row], x[row], t)[0] if t else estimate[row].double()
            error = 1e-5 * max(1.0, estimate[row].abs().max().item())
            torch.testing.assert_close(p.mean[row].double(), mean, atol=error, rtol=0)


@chains
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_fixed_variances_are_the_two_of_section_3_2(chain: Chain, variance: str) -> None:
    """beta~, by Bayes' rule, or beta; at t = 0 that of t = 1."""
    process = make_process(chain, variance=variance)
    for t in range(T):
        p = p_mean_variance(process, random(2), random(1), torch.full((B,), t))
        _, small = bayes(process, random(0), random(1), max(t, 1))
        variance_t = small if variance == "fixed_small" or t == 0 else process.betas[t].item()
        expected = torch.full_like(p.log_variance, math.log(variance_t))
        torch.testing.assert_close(p.log_variance, expected, atol=1e-5, rtol=1e-6)


def test_a_learned_variance_is_the_second_half_of_the_output() -> None:
    output = random(2, 6)
    p = p_mean_variance(make_process(variance="learned"), output, random(1), STEPS)
    assert torch.equal(p.log_variance, output[:, 3:])


@chains
def test_a_learned_range_goes_from_small_to_large(chain: Chain) -> None:
    """Equation 15: -1 is beta~, 1 is beta, and 0 their geometric mean."""
    process = make_process(chain, variance="learned_range")
    for t in range(T):
        _, small = bayes(process, random(0), random(1), max(t, 1))
        large = process.betas[t].item()
        for learned, variance in (
            (-1.0, small),
            (1.0, large),
            (0.0, math.sqrt(small * large)),
            (0.5, small**0.25 * large**0.75),
        ):
            output = torch.cat([random(2), torch.full((B, 3, 4, 4), learned)], dim=1)
            p = p_mean_variance(process, output, random(1), torch.full((B,), t))
            expected = torch.full_like(p.log_variance, math.log(variance))
            torch.testing.assert_close(p.log_variance, expected, atol=1e-5, rtol=1e-6)


# --- terms of the bound ---------------------------------------------------------------------------


@chains
def test_terms_are_those_of_torch(chain: Chain) -> None:
    """KL of the posterior to a wrong guess, in bits; at t = 0 the likelihood of the bytes."""
    process = make_process(chain)
    x0, log_variance = pictures(), random(4) - 4
    for step in range(T):
        t = torch.full((B,), step)
        x = process.add_noise(x0, random(1), t)
        guess = MeanVariance(x0 + 0.05 * random(3), log_variance, x0)
        terms = vlb_terms(process, guess, x0, x, t)
        deviation = (log_variance.double() / 2).exp()
        if step == 0:
            nats = bytes_nll(x0, guess.mean, deviation) * math.log(2)
        else:
            mean, variance = bayes(process, x0, x, step)
            q = Normal(mean, torch.full_like(mean, math.sqrt(variance)))
            nats = kl_divergence(q, Normal(guess.mean.double(), deviation))
        expected = nats.mean(dim=(1, 2, 3)) / math.log(2)
        torch.testing.assert_close(terms.double(), expected, rtol=2e-4, atol=1e-5)


def test_each_row_has_the_term_of_its_step() -> None:
    process = make_process()
    x0, x = pictures(), random(1)
    p = p_mean_variance(process, random(2), x, STEPS)
    together = vlb_terms(process, p, x0, x, STEPS)
    assert together.shape == (B,)
    for row in range(B):
        one = slice(row, row + 1)
        part = MeanVariance(p.mean[one], p.log_variance[one], p.x0[one])
        alone = vlb_terms(process, part, x0[one], x[one], STEPS[one])
        torch.testing.assert_close(alone, together[one])


@pytest.mark.parametrize("prediction", ["noise", "v", "x0"])
def test_a_perfect_output_leaves_only_the_bytes(prediction: str) -> None:
    """L_(t-1) = 0 for t > 0; L_0 is the rounding to bytes at variance beta~_1."""
    process = make_process(prediction=prediction)
    x0, eps = pictures(), random(1)
    for step in range(T):
        t = torch.full((B,), step)
        x = process.add_noise(x0, eps, t)
        p = p_mean_variance(process, process.target(x0, eps, t), x, t)
        term = vlb_terms(process, p, x0, x, t)
        if step > 0:
            torch.testing.assert_close(term, torch.zeros(B), atol=2e-5, rtol=0)
        else:
            _, variance = bayes(process, x0, x, 1)
            deviation = torch.full_like(x0, math.sqrt(variance))
            expected = bytes_nll(x0, x0, deviation).mean(dim=(1, 2, 3))
            torch.testing.assert_close(term.double(), expected, rtol=1e-3, atol=0)


# --- the hybrid loss ------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("prediction", ["noise", "v", "x0"])
def test_the_vlb_loss_trains_the_variances_alone(variance: str, prediction: str) -> None:
    """Section 3.1: the mean is detached, at t = 0 too."""
    process = make_process(variance=variance, prediction=prediction)
    x0, x = pictures(), random(1)
    predicted, learned = random(2).requires_grad_(), (0.3 * random(3)).requires_grad_()
    for t in (0, 1, 20, T - 1):
        predicted.grad = learned.grad = None
        output = torch.cat([predicted, learned], dim=1)
        loss = vlb_loss(process, output, x0, x, torch.full((B,), t))
        assert loss.shape == (B,)
        loss.sum().backward()
        assert predicted.grad is None or not predicted.grad.any()
        assert torch.isfinite(learned.grad).all()
        assert (learned.grad.abs().flatten(1) > 0).any(1).all()


def test_the_vlb_loss_has_its_minimum_at_the_true_variance() -> None:
    """At the true mean, the best output is -1 (beta~), or the log variance itself."""
    x0, eps, t = pictures(), random(1), torch.full((B,), 7)
    for variance, minimum in (("learned_range", -1.0), ("learned", None)):
        process = make_process(variance=variance)
        x = process.add_noise(x0, eps, t)
        _, small = bayes(process, x0, x, 7)
        minimum = math.log(small) if minimum is None else minimum
        slopes = []
        for side in (-0.3, 0.0, 0.3):
            learned = torch.full((B, 3, 4, 4), minimum + side, requires_grad=True)
            vlb_loss(process, torch.cat([x0, learned], 1), x0, x, t).sum().backward()
            slopes.append(learned.grad.sum().item())
        assert slopes[0] < 0 < slopes[2]
        assert abs(slopes[1]) < 1e-3 * slopes[2]


def test_the_vlb_loss_is_a_thousandth_of_the_bound() -> None:
    """Equation 16: at uniform t, T L_(t-1) has the whole bound as its mean."""
    process = make_process(variance="learned_range", prediction="noise")
    x0, eps, output = pictures(), random(1), random(2, 6)
    losses, terms = [], []
    for step in range(T):
        t = torch.full((B,), step)
        x = process.add_noise(x0, eps, t)
        losses.append(vlb_loss(process, output, x0, x, t))
        terms.append(vlb_terms(process, p_mean_variance(process, output, x, t), x0, x, t))
    expected = 0.001 * torch.stack(terms).sum(0)
    torch.testing.assert_close(torch.stack(losses).mean(0), expected, rtol=1e-5, atol=0)


def test_the_vlb_loss_is_computed_in_single_precision() -> None:
    process = make_process(variance="learned_range")
    output, x = random(2, 6).bfloat16(), random(1)
    loss = vlb_loss(process, output, pictures(), x, STEPS)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, vlb_loss(process, output.float(), pictures(), x, STEPS))
