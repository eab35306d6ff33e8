"""Wrong answers to the exercises of `09_guidance_and_samplers`: the exercise, its code, words of
the sentence.
"""

WRONG = [
    (
        "drop_captions",
        """
def drop_captions(words, null, u, prob):
    keep = (u >= prob)[:, None, None]
    return torch.where(keep, null, words)
""",
        "mask is inverted",
    ),
    (
        "drop_captions",
        """
def drop_captions(words, null, u, prob):
    keep = (u >= prob)[:, None, None]
    return words * keep
""",
        "zeros",
    ),
    (
        "drop_captions",
        """
def drop_captions(words, null, u, prob):
    keep = u >= prob
    return torch.where(keep, words, null)
""",
        "raises RuntimeError",
    ),
    (
        "drop_captions",
        """
def drop_captions(words, null, u, prob):
    words[u < prob] = null
    return words
""",
        "in place",
    ),
    (
        "guided_prediction",
        """
def guided_prediction(network, x_t, t, text, null, scale, negative=None):
    away = null if negative is None else negative
    output = network(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([text, away]))
    cond, uncond = output.chunk(2)
    return cond + scale * (cond - uncond)
""",
        "starts from cond",
    ),
    (
        "guided_prediction",
        """
def guided_prediction(network, x_t, t, text, null, scale, negative=None):
    away = null if negative is None else negative
    output = network(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([away, text]))
    cond, uncond = output.chunk(2)
    return uncond + scale * (cond - uncond)
""",
        "exchanges the two halves",
    ),
    (
        "guided_prediction",
        """
def guided_prediction(network, x_t, t, text, null, scale, negative=None):
    away = null if negative is None else negative
    uncond = network(x_t, t, away)
    return uncond + scale * (network(x_t, t, text) - uncond)
""",
        "calls the network 2 times",
    ),
    (
        "guided_prediction",
        """
def guided_prediction(network, x_t, t, text, null, scale, negative=None):
    output = network(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([text, null]))
    cond, uncond = output.chunk(2)
    return uncond + scale * (cond - uncond)
""",
        "ignores the negative text",
    ),
    (
        "guided_prediction",
        """
def guided_prediction(network, x_t, t, text, null, scale, negative=None):
    output = network(torch.cat([x_t, x_t]), t, torch.cat([text, null]))
    cond, uncond = output.chunk(2)
    return uncond + scale * (cond - uncond)
""",
        "2 of t",
    ),
    (
        "ddim_step",
        """
def ddim_step(x, x0, level, next_level):
    eps = (x - x0) / level.sigma
    return next_level.alpha * x0 + next_level.sigma * eps
""",
        "x0 needs its factor alpha",
    ),
    (
        "ddim_step",
        """
def ddim_step(x, x0, level, next_level):
    eps = (x - level.alpha * x0) / level.sigma
    return next_level.alpha * x0 + level.sigma * eps
""",
        "of this level, not of the next",
    ),
    (
        "dpmpp_2m_step",
        """
def dpmpp_2m_step(x, x0, x0_before, sigma_before, sigma, sigma_next):
    h = torch.tensor(sigma / sigma_next).log()
    r = h / torch.tensor(sigma_before / sigma).log()
    d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_before
    return sigma_next / sigma * x + (1 - torch.exp(-h)) * d
""",
        "inverts r",
    ),
    (
        "dpmpp_2m_step",
        """
def dpmpp_2m_step(x, x0, x0_before, sigma_before, sigma, sigma_next):
    h = torch.tensor(sigma / sigma_next).log()
    return sigma_next / sigma * x + (1 - torch.exp(-h)) * x0
""",
        "order 1",
    ),
    (
        "dpmpp_2m_step",
        """
def dpmpp_2m_step(x, x0, x0_before, sigma_before, sigma, sigma_next):
    h = torch.tensor(sigma / sigma_next).log()
    r = torch.tensor(sigma_before / sigma).log() / h
    d = (1 - 1 / (2 * r)) * x0 + 1 / (2 * r) * x0_before
    return sigma_next / sigma * x + (1 - torch.exp(-h)) * d
""",
        "should extrapolate",
    ),
    (
        "convergence_order",
        """
def convergence_order(steps, errors):
    steps, errors = torch.tensor(steps).double(), torch.tensor(errors).double()
    return float((errors[0] / errors[-1]).log() / (steps[0] / steps[-1]).log())
""",
        "wrong sign",
    ),
    (
        "convergence_order",
        """
def convergence_order(steps, errors):
    return errors[0] / errors[-1]
""",
        "take logarithms",
    ),
]
