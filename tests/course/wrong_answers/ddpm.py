"""Wrong answers to the exercises of `08_ddpm`: the exercise, its code, words of the sentence."""

WRONG = [
    (
        "q_sample",
        """
def q_sample(x0, t, eps, alphas_cumprod):
    abar = alphas_cumprod[t].view(-1, 1, 1, 1)
    return abar * x0 + (1 - abar).sqrt() * eps
""",
        "its square root is missing",
    ),
    (
        "q_sample",
        """
def q_sample(x0, t, eps, alphas_cumprod):
    abar = alphas_cumprod[t].view(-1, 1, 1, 1)
    return abar.sqrt() * x0 - (1 - abar).sqrt() * eps
""",
        "subtracts the noise",
    ),
    (
        "q_sample",
        """
def q_sample(x0, t, eps, alphas_cumprod):
    abar = alphas_cumprod[t - 1].view(-1, 1, 1, 1)
    return abar.sqrt() * x0 + (1 - abar).sqrt() * eps
""",
        "one step too early",
    ),
    (
        "q_sample",
        """
def q_sample(x0, t, eps, alphas_cumprod):
    abar = alphas_cumprod[t].view(-1, 1, 1, 1)
    return (abar.sqrt() * x0 + (1 - abar).sqrt() * eps).detach()
""",
        "no gradient",
    ),
    (
        "q_sample",
        """
def q_sample(x0, t, eps, alphas_cumprod):
    abar = alphas_cumprod[t]
    return abar.sqrt() * x0 + (1 - abar).sqrt() * eps
""",
        "raises RuntimeError",
    ),
    (
        "q_sample",
        """
def q_sample(x0, t, eps, alphas_cumprod):
    abar = alphas_cumprod[t].view(-1, 1, 1, 1)
    x0 *= abar.sqrt()
    return x0 + (1 - abar).sqrt() * eps
""",
        "in place",
    ),
    (
        "x0_from_noise",
        """
def x0_from_noise(x_t, t, eps, alphas_cumprod):
    abar = alphas_cumprod[t].view(-1, 1, 1, 1)
    return (x_t + (1 - abar).sqrt() * eps) / abar.sqrt()
""",
        "should be subtracted",
    ),
    (
        "x0_from_noise",
        """
def x0_from_noise(x_t, t, eps, alphas_cumprod):
    abar = alphas_cumprod[t].view(-1, 1, 1, 1)
    return (x_t - (1 - abar).sqrt() * eps) / abar
""",
        "square root is missing",
    ),
    (
        "posterior_mean",
        """
def posterior_mean(x0, x_t, t, betas):
    abar = torch.cumprod(1 - betas, 0)
    beta, abar = (v[t].view(-1, 1, 1, 1) for v in (betas, abar))
    of_x0 = abar.sqrt() * beta / (1 - abar)
    of_xt = (1 - beta).sqrt() * (1 - abar) / (1 - abar)
    return of_x0 * x0 + of_xt * x_t
""",
        "where equation 7 has t - 1",
    ),
    (
        "posterior_mean",
        """
def posterior_mean(x0, x_t, t, betas):
    abar = torch.cumprod(1 - betas, 0)
    before = abar[t - 1].view(-1, 1, 1, 1)
    beta, abar = (v[t].view(-1, 1, 1, 1) for v in (betas, abar))
    of_x0 = before.sqrt() * beta / (1 - abar)
    of_xt = (1 - beta).sqrt() * (1 - before) / (1 - abar)
    return of_x0 * x0 + of_xt * x_t
""",
        "at t = 0",
    ),
    (
        "ideal_weights",
        """
def ideal_weights(x_t, alpha, sigma, pictures):
    distance = (x_t[:, None] - alpha * pictures[None]).flatten(2).square().sum(2)
    return (distance / (2 * sigma**2)).softmax(1)
""",
        "the exponent is negative",
    ),
    (
        "ideal_weights",
        """
def ideal_weights(x_t, alpha, sigma, pictures):
    distance = (x_t[:, None] - alpha * pictures[None]).flatten(2).square().sum(2)
    return (-distance / (2 * sigma**2)).softmax(0)
""",
        "sum to 1",
    ),
    (
        "half_noise_step",
        """
def half_noise_step(alphas_cumprod):
    return int((1 - alphas_cumprod > alphas_cumprod).nonzero()[0]) - 1
""",
        "one step too early",
    ),
]
