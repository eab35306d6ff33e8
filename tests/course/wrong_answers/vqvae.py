"""Wrong answers to the exercises of `05_vqvae`: the exercise, its code, words of the sentence."""

WRONG = [
    (
        "nearest_code",
        """
def nearest_code(z_e, codebook):
    return (z_e @ codebook.T).argmax(1)
""",
        "prefers long codes",
    ),
    (
        "nearest_code",
        """
def nearest_code(z_e, codebook):
    return (z_e[:, None] - codebook).square().sum(2).argmin(0)
""",
        "has shape (5,), not (12,)",
    ),
    (
        "nearest_code",
        """
def nearest_code(z_e, codebook):
    distances = (z_e[:, None] - codebook).square().sum(2)
    return codebook[distances.argmin(1)]
""",
        "axes too many",
    ),
    (
        "nearest_code",
        """
def nearest_code(z_e, codebook):
    return (z_e[:, None] - codebook).sum(2).argmin(1)
""",
        "cancel",
    ),
    (
        "straight_through",
        """
def straight_through(z_e, z_q):
    return z_q
""",
        "passes no gradient to z_e",
    ),
    (
        "straight_through",
        """
def straight_through(z_e, z_q):
    return z_e + (z_q - z_e)
""",
        "passes no gradient to z_e",
    ),
    (
        "straight_through",
        """
def straight_through(z_e, z_q):
    return z_e + z_q - z_e.detach()
""",
        "passes a gradient to z_q",
    ),
    (
        "straight_through",
        """
def straight_through(z_e, z_q):
    return z_q + (z_e - z_q).detach()
""",
        "has the value of z_e",
    ),
    (
        "codebook_loss",
        """
def codebook_loss(z_e, z_q, beta):
    return F.mse_loss(z_e, z_q) + beta * F.mse_loss(z_q, z_e)
""",
        "move both tensors",
    ),
    (
        "codebook_loss",
        """
def codebook_loss(z_e, z_q, beta):
    return beta * F.mse_loss(z_q, z_e.detach()) + F.mse_loss(z_e, z_q.detach())
""",
        "beta on the wrong term",
    ),
    (
        "codebook_loss",
        """
def codebook_loss(z_e, z_q, beta):
    codebook = (z_q - z_e.detach()).square().sum()
    return codebook + beta * (z_e - z_q.detach()).square().sum()
""",
        "it should be a mean",
    ),
    (
        "codebook_loss",
        """
def codebook_loss(z_e, z_q, beta):
    return (1 + beta) * F.mse_loss(z_q.detach(), z_e)
""",
        "passes no gradient to z_q",
    ),
    (
        "ema_codes",
        """
def ema_codes(z_e, ids, size, total, decay):
    one_hot = F.one_hot(ids, len(size)).float()
    size = (1 - decay) * size + decay * one_hot.sum(0)
    total = (1 - decay) * total + decay * one_hot.T @ z_e
    return total / size[:, None]
""",
        "exchanges decay",
    ),
    (
        "ema_codes",
        """
def ema_codes(z_e, ids, size, total, decay):
    one_hot = F.one_hot(ids, len(size)).float()
    total = decay * total + (1 - decay) * one_hot.T @ z_e
    return total / size[:, None]
""",
        "divides by the old N",
    ),
    (
        "ema_codes",
        """
def ema_codes(z_e, ids, size, total, decay):
    one_hot = F.one_hot(ids, len(size)).float()
    size.mul_(decay).add_((1 - decay) * one_hot.sum(0))
    total = decay * total + (1 - decay) * one_hot.T @ z_e
    return total / size[:, None]
""",
        "in place",
    ),
    (
        "ema_codes",
        """
def ema_codes(z_e, ids, size, total, decay):
    one_hot = F.one_hot(ids, len(size)).float()
    size = decay * size + (1 - decay) * one_hot.sum(0)
    total = decay * total + (1 - decay) * one_hot.T @ z_e
    return total / size
""",
        "raises RuntimeError",
    ),
    (
        "code_perplexity",
        """
def code_perplexity(ids, num_codes):
    shares = ids.bincount(minlength=num_codes) / len(ids)
    return (-(shares * shares.log()).sum()).exp()
""",
        "0 ln 0",
    ),
    (
        "code_perplexity",
        """
def code_perplexity(ids, num_codes):
    shares = ids.bincount(minlength=num_codes) / len(ids)
    return torch.special.entr(shares).sum()
""",
        "returns the entropy",
    ),
]
