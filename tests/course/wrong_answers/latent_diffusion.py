"""Wrong answers to the exercises of `10_latent_diffusion`: the exercise, its code, words of the
sentence.
"""

WRONG = [
    (
        "sample_posterior",
        """
def sample_posterior(mean, log_variance, eps):
    return mean + log_variance.exp() * eps
""",
        "needs the deviation",
    ),
    (
        "sample_posterior",
        """
def sample_posterior(mean, log_variance, eps):
    with torch.no_grad():
        std = (0.5 * log_variance).exp()
    return mean + std * eps
""",
        "no gradient from z to the log variance",
    ),
    (
        "sample_posterior",
        """
def sample_posterior(mean, log_variance, eps):
    return mean + (0.5 * log_variance).exp()
""",
        "differs",
    ),
    (
        "kl_to_standard_normal",
        """
def kl_to_standard_normal(mean, log_variance):
    return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean((1, 2, 3))
""",
        "should take their sum",
    ),
    (
        "kl_to_standard_normal",
        """
def kl_to_standard_normal(mean, log_variance):
    return -0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum((1, 2, 3))
""",
        "wrong sign",
    ),
    (
        "kl_to_standard_normal",
        """
def kl_to_standard_normal(mean, log_variance):
    return (mean**2 + log_variance.exp() - 1 - log_variance).sum((1, 2, 3))
""",
        "factor 1/2",
    ),
    (
        "kl_to_standard_normal",
        """
def kl_to_standard_normal(mean, log_variance):
    return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum()
""",
        "over the batch too",
    ),
    (
        "scale_of_latents",
        """
def scale_of_latents(z):
    return z.std()
""",
        "its inverse",
    ),
    (
        "scale_of_latents",
        """
def scale_of_latents(z):
    return 1 / z.std((0, 2, 3))
""",
        "for each channel",
    ),
    (
        "cross_attention",
        """
def cross_attention(cells, words, mask, to_q, to_k, to_v):
    q, k, v = to_q(cells), to_k(words), to_v(words)
    scores = q @ k.transpose(1, 2)
    return scores.masked_fill(~mask[:, None], -torch.inf).softmax(2) @ v
""",
        "does not divide the scores",
    ),
    (
        "cross_attention",
        """
def cross_attention(cells, words, mask, to_q, to_k, to_v):
    q, k, v = to_q(cells), to_k(words), to_v(words)
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    return scores.masked_fill(mask[:, None], -torch.inf).softmax(2) @ v
""",
        "inverts the mask",
    ),
    (
        "cross_attention",
        """
def cross_attention(cells, words, mask, to_q, to_k, to_v):
    q, k, v = to_q(cells), to_k(words), to_v(words)
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    return scores.softmax(2) @ v
""",
        "attends to the padding",
    ),
    (
        "cross_attention",
        """
def cross_attention(cells, words, mask, to_q, to_k, to_v):
    q, k, v = to_q(cells), to_k(words), to_v(words)
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask[:, None], 0.0).softmax(2) @ v
""",
        "exp(0) is 1",
    ),
    (
        "attention_saving",
        """
def attention_saving(size, factor):
    return factor**2
""",
        "all pairs",
    ),
    (
        "attention_saving",
        """
def attention_saving(size, factor):
    return (size // factor) ** 4 / size**4
""",
        "wrong way round",
    ),
]
