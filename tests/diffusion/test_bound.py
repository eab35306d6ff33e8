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
    Backward,
    approximate_cdf,
    backward,
    bits,
    bits_per_dim,
    bound_terms,
    hybrid_term,
    log_likelihood_of_bytes,
    normal_kl,
    prior_bits,
)
from lineage.diffusion.process import VARIANCES, Posterior, Process, ProcessConfig
from lineage.nn.noise import NoiseStreams

B, T = 4, 40
Chain = tuple[str, bool]  # schedule, and whether its last step is made noise alone
CHAINS: list[Chain] = [
    (name, zero) for name in ("linear", "scaled_linear", "cosine", "sigmoid") for zero in (0, 1)
]
chains = pytest.mark.parametrize("chain", CHAINS, ids=lambda c: c[0] + "_zero" * c[1])
STEPS = torch.tensor([0, 1, 20, T - 1])
BYTES = torch.arange(256, dtype=torch.float64) / 127.5 - 1  # as pictures have them


def process_of(chain: Chain = ("cosine", False), **settings: Any) -> Process:
    settings = {"steps": T, "prediction": "x0", **settings}
    return Process(ProcessConfig(schedule=chain[0], zero_snr=bool(chain[1]), **settings))


def random(seed: int, channels: int = 3) -> Tensor:
    return torch.randn(B, channels, 4, 4, generator=torch.Generator().manual_seed(seed))


def pictures(seed: int = 0) -> Tensor:
    """(B, 3, 4, 4) of bytes, the ends among them."""
    drawn = torch.randint(256, (B, 3, 4, 4), generator=torch.Generator().manual_seed(seed))
    drawn[:, 0, 0, :2] = torch.tensor([0, 255])
    return drawn / 127.5 - 1


def bayes(process: Process, x0: Tensor, noised: Tensor, t: int) -> tuple[Tensor, float]:
    """Mean and variance of x_(t-1) given x_t and x_0, for t > 0, in double precision.

    The product of two normal densities: precisions add, and means by their precisions.
    """
    beta, before = process.betas[t].item(), process.abar[t - 1].item()
    ahead, behind = 1 / (1 - before), (1 - beta) / beta
    variance = 1 / (ahead + behind)
    mean = ahead * math.sqrt(before) * x0.double() + math.sqrt(1 - beta) / beta * noised.double()
    return variance * mean, variance


def bytes_nll(x0: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """In bits, with the cdf by tanh, a byte's share of it at a time."""

    def cdf(x: Tensor) -> Tensor:
        return 0.5 + 0.5 * (math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)).tanh()

    x0, mean, deviation = x0.double(), mean.double(), deviation.double()
    low = cdf((x0 - mean - 1 / 255) / deviation).where(x0 > -0.999, 0)
    high = cdf((x0 - mean + 1 / 255) / deviation).where(x0 < 0.999, 1)
    return -(high - low).clamp(min=1e-12).log2()


# --- parts ----------------------------------------------------------------------------------------


def test_kl_is_that_of_torch() -> None:
    mean, other = torch.randn(2, 500, dtype=torch.float64)
    log_variance, other_log = 3 * torch.randn(2, 500, dtype=torch.float64)
    expected = kl_divergence(
        Normal(mean, (log_variance / 2).exp()), Normal(other, (other_log / 2).exp())
    )
    found = normal_kl(mean, log_variance, other, other_log)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert (found >= 0).all()
    zero = normal_kl(mean, log_variance, mean, log_variance)
    torch.testing.assert_close(zero, torch.zeros_like(zero), atol=1e-12, rtol=0)


def test_the_cdf_is_that_of_the_normal_distribution() -> None:
    """By tanh it is off by less than 2e-4, symmetric, and never falls."""
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    found = approximate_cdf(x)
    torch.testing.assert_close(found, Normal(0.0, 1.0).cdf(x), atol=2e-4, rtol=0)
    torch.testing.assert_close(found + found.flip(0), torch.ones_like(x), atol=1e-12, rtol=0)
    assert (found.diff() >= 0).all()


@pytest.mark.parametrize("mean", [-3.0, -1.0, -0.3, 0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("deviation", [1e-3, 0.02, 0.5, 3.0])
def test_the_chances_of_all_bytes_add_up_to_1(mean: float, deviation: float) -> None:
    """What is beyond the darkest and the brightest belongs to these."""
    at, log = torch.full((256,), mean).double(), torch.full((256,), math.log(deviation)).double()
    chances = log_likelihood_of_bytes(BYTES, at, log).exp()
    assert chances.sum().item() == pytest.approx(1, abs=1e-6)
    normal = Normal(mean, deviation)
    edges = torch.cat([torch.tensor([-math.inf]), BYTES[:-1] + 1 / 255, torch.tensor([math.inf])])
    exact = normal.cdf(edges.double()).diff()
    torch.testing.assert_close(chances, exact, atol=4e-4, rtol=0)


def test_the_chance_of_a_byte_is_finite_however_unlikely() -> None:
    """And its gradient too: one wild pixel must not make a batch NaN."""
    mean = torch.full((256,), 50.0, requires_grad=True)
    log = torch.full((256,), -8.0, requires_grad=True)
    found = log_likelihood_of_bytes(BYTES.float(), mean, log)
    assert torch.isfinite(found).all() and found.min().item() == pytest.approx(math.log(1e-12))
    found.sum().backward()
    assert torch.isfinite(mean.grad).all() and torch.isfinite(log.grad).all()


def test_bits_are_a_mean_over_each_picture() -> None:
    nats = random(0)
    expected = nats.double().numpy().mean(axis=(1, 2, 3)) / math.log(2)
    np.testing.assert_allclose(bits(nats), expected, rtol=1e-5)


# --- posterior ------------------------------------------------------------------------------------


@chains
def test_the_posterior_is_bayes_rule(chain: Chain) -> None:
    process = process_of(chain)
    posterior, x0, noised = Posterior(process), random(0), random(1)
    for t in range(1, T):
        mean, variance = bayes(process, x0, noised, t)
        assert posterior.variance[t].item() == pytest.approx(variance, rel=1e-8)
        assert posterior.log_variance[t].item() == pytest.approx(math.log(variance), abs=1e-8)
        found = posterior.mean(x0, noised, torch.full((B,), t))
        torch.testing.assert_close(found.double(), mean, atol=2e-6, rtol=0)


@chains
def test_before_the_first_step_there_is_the_picture(chain: Chain) -> None:
    """The variance is zero there, so the logarithm is that of the next (section 3.1, code)."""
    posterior, x0 = Posterior(process_of(chain)), random(0)
    found = posterior.mean(x0, random(1), torch.zeros(B, dtype=torch.long))
    torch.testing.assert_close(found, x0, atol=1e-6, rtol=0)
    assert posterior.variance[0] == 0
    for log in (posterior.log_variance, posterior.log_large):
        assert log[0].item() == pytest.approx(math.log(posterior.variance[1]), rel=1e-9)


def test_the_posterior_is_what_is_found_by_drawing() -> None:
    """Of many x_(t-1) and x_t drawn from x_0, those with x_t near a value."""
    process = process_of(("linear", False), steps=50)
    generator = torch.Generator().manual_seed(0)
    t, x0, count = 3, 0.4, 400_000
    first, second = torch.randn(2, count, generator=generator, dtype=torch.float64)
    before = process.point(t - 1)
    x = before.signal * x0 + before.noise * first
    beta = process.betas[t].item()
    after = math.sqrt(1 - beta) * x + math.sqrt(beta) * second
    value = after.mean().item() + 0.5 * after.std().item()  # not where the prior alone would do
    chosen = x[(after - value).abs() < 0.01]
    posterior = Posterior(process)
    whole = (torch.full((1, 1, 1, 1), v) for v in (x0, value))
    mean = posterior.mean(*whole, torch.tensor([t])).item()
    assert len(chosen) > 2000
    error = chosen.std().item() / math.sqrt(len(chosen))
    assert chosen.mean().item() == pytest.approx(mean, abs=4 * error)
    deviation = math.sqrt(posterior.variance[t])
    assert chosen.std().item() == pytest.approx(deviation, rel=0.05)


# --- backward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["x0", "v", "flow", "edm", "noise"])
@pytest.mark.parametrize("variance", VARIANCES)
def test_the_mean_backward_is_the_posterior_at_the_estimate(variance: str, prediction: str) -> None:
    """Whatever is predicted, and of a learned variance with the first half of the channels."""
    process = process_of(variance=variance, prediction=prediction)
    x0, noised = random(0), random(1)
    own = process.config.learned
    for clip in (False, True):
        output = random(2, 6 if own else 3)
        found = backward(process, output, noised, STEPS, clip)
        estimate = process.to_x0(output[:, :3], noised, STEPS)
        estimate = estimate.clamp(-1, 1) if clip else estimate
        torch.testing.assert_close(found.x0, estimate)
        assert found.mean.shape == found.log_variance.shape == x0.shape
        for row, t in enumerate(STEPS.tolist()):
            if t:
                mean, _ = bayes(process, estimate[row], noised[row], t)
            else:
                mean = estimate[row].double()
            error = 1e-5 * max(1.0, estimate[row].abs().max().item())
            torch.testing.assert_close(found.mean[row].double(), mean, atol=error, rtol=0)


@chains
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_fixed_variances_are_the_two_of_section_3_2(chain: Chain, variance: str) -> None:
    """beta~, by Bayes' rule, or beta; at t = 0 that of the next."""
    process = process_of(chain, variance=variance)
    for t in range(T):
        found = backward(process, random(2), random(1), torch.full((B,), t))
        _, small = bayes(process, random(0), random(1), max(t, 1))
        expected = small if variance == "fixed_small" or t == 0 else process.betas[t].item()
        wanted = torch.full_like(found.log_variance, math.log(expected))
        torch.testing.assert_close(found.log_variance, wanted, atol=1e-5, rtol=1e-6)


def test_a_learned_variance_is_what_the_network_says() -> None:
    output = random(2, 6)
    found = backward(process_of(variance="learned"), output, random(1), STEPS)
    assert torch.equal(found.log_variance, output[:, 3:])


@chains
def test_a_learned_range_goes_from_the_small_to_the_large(chain: Chain) -> None:
    """Equation 15: -1 is beta~, 1 is beta, and 0 their geometric mean."""
    process = process_of(chain, variance="learned_range")
    for t in range(T):
        _, small = bayes(process, random(0), random(1), max(t, 1))
        large = process.betas[t].item()
        for said, expected in (
            (-1.0, small),
            (1.0, large),
            (0.0, math.sqrt(small * large)),
            (0.5, small**0.25 * large**0.75),
        ):
            output = torch.cat([random(2), torch.full((B, 3, 4, 4), said)], dim=1)
            found = backward(process, output, random(1), torch.full((B,), t)).log_variance
            wanted = torch.full_like(found, math.log(expected))
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-6)


# --- terms of the bound ---------------------------------------------------------------------------


@chains
def test_terms_are_those_of_torch(chain: Chain) -> None:
    """KL of the posterior to a wrong guess, in bits; at t = 0 the chance of the bytes."""
    process = process_of(chain)
    x0, log_variance = pictures(), random(4) - 4
    for t in range(T):
        at = torch.full((B,), t)
        noised = process.noised(x0, random(1), at)
        wrong = Backward(x0 + 0.05 * random(3), log_variance, x0)
        found = bound_terms(process, wrong, x0, noised, at)
        deviation = (log_variance.double() / 2).exp()
        if t == 0:
            nats = bytes_nll(x0, wrong.mean, deviation) * math.log(2)
        else:
            mean, variance = bayes(process, x0, noised, t)
            true = Normal(mean, torch.full_like(mean, math.sqrt(variance)))
            nats = kl_divergence(true, Normal(wrong.mean.double(), deviation))
        expected = nats.mean(dim=(1, 2, 3)) / math.log(2)
        torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=1e-5)


def test_each_row_has_the_term_of_its_step() -> None:
    process = process_of()
    x0, noised = pictures(), random(1)
    found = backward(process, random(2), noised, STEPS)
    together = bound_terms(process, found, x0, noised, STEPS)
    assert together.shape == (B,)
    for row in range(B):
        one = slice(row, row + 1)
        part = Backward(found.mean[one], found.log_variance[one], found.x0[one])
        alone = bound_terms(process, part, x0[one], noised[one], STEPS[one])
        torch.testing.assert_close(alone, together[one])


@pytest.mark.parametrize("prediction", ["noise", "v", "x0"])
def test_a_perfect_output_leaves_nothing_but_the_bytes(prediction: str) -> None:
    """L_t = 0 for t > 0; L_0 is what a normal distribution of variance beta~_1 leaves open."""
    process = process_of(prediction=prediction)
    x0, eps = pictures(), random(1)
    for t in range(T):
        at = torch.full((B,), t)
        noised = process.noised(x0, eps, at)
        found = backward(process, process.target(x0, eps, at), noised, at)
        term = bound_terms(process, found, x0, noised, at)
        if t > 0:
            torch.testing.assert_close(term, torch.zeros(B), atol=2e-5, rtol=0)
        else:
            _, variance = bayes(process, x0, noised, 1)
            deviation = torch.full_like(x0, math.sqrt(variance))
            expected = bytes_nll(x0, x0, deviation).mean(dim=(1, 2, 3))
            torch.testing.assert_close(term.double(), expected, rtol=1e-3, atol=0)


# --- the hybrid loss ------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("prediction", ["noise", "v", "x0"])
def test_the_hybrid_term_moves_the_variances_alone(variance: str, prediction: str) -> None:
    """Section 3.1: the mean is held fixed. At every step, t = 0 among them."""
    process = process_of(variance=variance, prediction=prediction)
    x0, noised = pictures(), random(1)
    predicted, learned = random(2).requires_grad_(), (0.3 * random(3)).requires_grad_()
    for t in (0, 1, 20, T - 1):
        predicted.grad = learned.grad = None
        at = torch.full((B,), t)
        term = hybrid_term(process, torch.cat([predicted, learned], dim=1), x0, noised, at)
        assert term.shape == (B,)
        term.sum().backward()
        assert predicted.grad is None or not predicted.grad.any()
        assert (
            torch.isfinite(learned.grad).all() and (learned.grad.abs().flatten(1) > 0).any(1).all()
        )


def test_a_step_down_the_hybrid_term_finds_the_true_variance() -> None:
    """With the true mean, the best share is that of beta~, -1; of another log variance, its own."""
    x0, eps, at = pictures(), random(1), torch.full((B,), 7)
    for variance, best in (("learned_range", -1.0), ("learned", None)):
        process = process_of(variance=variance)
        noised = process.noised(x0, eps, at)
        _, small = bayes(process, x0, noised, 7)
        best = math.log(small) if best is None else best
        slopes = []
        for side in (-0.3, 0.0, 0.3):
            learned = torch.full((B, 3, 4, 4), best + side, requires_grad=True)
            hybrid_term(process, torch.cat([x0, learned], 1), x0, noised, at).sum().backward()
            slopes.append(learned.grad.sum().item())
        assert slopes[0] < 0 < slopes[2]
        assert abs(slopes[1]) < 1e-3 * slopes[2]


def test_the_hybrid_term_is_a_thousandth_of_the_bound() -> None:
    """Equation 16: drawn over all t evenly, T L_t has the whole bound as its mean."""
    process = process_of(variance="learned_range", prediction="noise")
    x0, eps, output = pictures(), random(1), random(2, 6)
    hybrid, terms = [], []
    for t in range(T):
        at = torch.full((B,), t)
        noised = process.noised(x0, eps, at)
        hybrid.append(hybrid_term(process, output, x0, noised, at))
        terms.append(bound_terms(process, backward(process, output, noised, at), x0, noised, at))
    expected = 0.001 * torch.stack(terms).sum(0)
    torch.testing.assert_close(torch.stack(hybrid).mean(0), expected, rtol=1e-5, atol=0)


def test_the_hybrid_term_is_taken_in_single_precision() -> None:
    process = process_of(variance="learned_range")
    output, noised = random(2, 6).bfloat16(), random(1)
    found = hybrid_term(process, output, pictures(), noised, STEPS)
    assert found.dtype == torch.float32
    same = hybrid_term(process, output.float(), pictures(), noised, STEPS)
    torch.testing.assert_close(found, same)


# --- the whole bound ------------------------------------------------------------------------------


@chains
def test_the_prior_is_that_of_torch(chain: Chain) -> None:
    """KL(q(x_T | x_0) | N(0, 1)): the trace of the picture at the last step."""
    process, x0 = process_of(chain), pictures()
    last = process.point(T - 1)
    nats = kl_divergence(Normal(last.signal * x0.double(), last.noise), Normal(0.0, 1.0))
    expected = nats.mean(dim=(1, 2, 3)) / math.log(2)
    torch.testing.assert_close(prior_bits(process, x0).double(), expected, atol=1e-6, rtol=1e-4)
    if chain[1]:
        assert (prior_bits(process, x0) == 0).all()


def toy(x: Tensor, time: Tensor) -> Tensor:
    """An imperfect network of a learned range, near the picture where there is little noise: in
    single precision, bytes that are all but impossible have no chance that could be compared.
    """
    assert time.shape == (len(x),)
    told = 0.1 * (time / 10).sin()[:, None, None, None]
    return torch.cat([0.98 * x + told, 0.5 * x.cos()], dim=1)


def test_the_bound_is_the_sum_of_its_terms() -> None:
    process, x0 = process_of(variance="learned_range"), pictures()
    found = bits_per_dim(process, toy, x0, NoiseStreams(range(B)))
    assert found.terms.shape == found.x0_errors.shape == found.noise_errors.shape == (B, T)
    assert found.total.shape == found.prior.shape == (B,)
    torch.testing.assert_close(found.total, found.terms.sum(1) + found.prior)
    torch.testing.assert_close(found.prior, prior_bits(process, x0))
    assert (found.terms > 0).all()


@pytest.mark.parametrize("clip", [False, True])
def test_the_bound_step_by_step(clip: bool) -> None:
    """From the last step down, in double precision, with the draws in that order."""
    process, x0, draws = process_of(variance="learned_range"), pictures(), NoiseStreams(range(B))
    found = bits_per_dim(process, toy, x0, NoiseStreams(range(B)), clip)
    for column, t in enumerate(reversed(range(T))):
        eps = draws.randn(3, 4, 4).double()
        point = process.point(t)
        noised = point.signal * x0.double() + point.noise * eps
        estimate, learned = toy(noised, torch.full((B,), t)).chunk(2, dim=1)
        estimate = estimate.clamp(-1, 1) if clip else estimate
        _, small = bayes(process, x0, noised, max(t, 1))
        share = (learned + 1) / 2
        log = share * math.log(process.betas[t]) + (1 - share) * math.log(small)
        if t:
            true, _ = bayes(process, x0, noised, t)
            mean, _ = bayes(process, estimate, noised, t)
            own = Normal(true, torch.full_like(true, math.sqrt(small)))
            term = kl_divergence(own, Normal(mean, (log / 2).exp())) / math.log(2)
        else:
            term = bytes_nll(x0, estimate, (log / 2).exp())
        said = (noised - point.signal * estimate) / point.noise
        for name, expected in (
            ("terms", term),
            ("x0_errors", (estimate - x0).square()),
            ("noise_errors", (said - eps).square()),
        ):
            wanted = expected.mean(dim=(1, 2, 3))
            given = getattr(found, name)[:, column].double()
            torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-5)


def test_a_perfect_network_gives_a_tiny_bound() -> None:
    """Told the picture, and sure of it at the last moment: nothing is left to say."""
    process, x0 = process_of(("cosine", True), variance="learned"), pictures()

    def knows(noised: Tensor, time: Tensor) -> Tensor:
        t = int(time[0])
        log = math.log(bayes(process, x0, noised, t)[1]) if t else -14.0
        return torch.cat([x0, torch.full_like(x0, log)], dim=1)

    found = bits_per_dim(process, knows, x0, NoiseStreams(range(B)))
    assert found.total.abs().max() < 1e-4
    assert found.x0_errors.abs().max() == 0 and found.noise_errors.max() < 1e-6

    def worse(noised: Tensor, time: Tensor) -> Tensor:
        return knows(noised, time) * 0.9

    assert (bits_per_dim(process, worse, x0, NoiseStreams(range(B))).total > 1).all()


def test_the_bound_is_never_below_what_the_data_hold() -> None:
    """Pictures of even bytes hold 8 bits a value; no network that does not know them does better.

    Not even the best, which estimates x_0 by its mean over all bytes, in closed form.
    """
    process = process_of(steps=60)

    def best(noised: Tensor, time: Tensor) -> Tensor:
        point = process.point(int(time[0]))
        values = BYTES.float()
        distance = (noised[..., None] - point.signal * values) / point.noise
        return (torch.softmax(-0.5 * distance.square(), dim=-1) * values).sum(-1)

    drawn = torch.randint(256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    found = bits_per_dim(process, best, drawn / 127.5 - 1, NoiseStreams(range(2)))
    assert (found.total > 8 - 0.1).all() and (found.total < 9.5).all()


def test_the_bound_leaves_no_gradient() -> None:
    network = torch.nn.Conv2d(3, 3, 1)
    found = bits_per_dim(
        process_of(), lambda x, time: network(x), pictures(), NoiseStreams(range(B))
    )
    assert not found.total.requires_grad


def test_the_bound_tells_the_network_the_steps_that_it_knows() -> None:
    """Of a respaced process, those of the whole one, from the last down."""
    process, told = process_of().respaced([0, 9, 20, T - 1]), []

    def network(x: Tensor, time: Tensor) -> Tensor:
        told.append(time.tolist())
        return 0.3 * x

    found = bits_per_dim(process, network, pictures(), NoiseStreams(range(B)))
    assert told == [[t] * B for t in (T - 1, 20, 9, 0)]
    assert found.terms.shape == (B, 4)
