"""Wrong answers to the exercises of `20_comparing`: exercise, code, words of the sentence."""

WRONG = [
    (
        "strict_scene",
        """
def strict_scene(found, wanted):
    return set(found) == set(wanted)
""",
        "two circles where one is wanted",
    ),
    (
        "strict_scene",
        """
def strict_scene(found, wanted):
    return all(found.count(one) >= wanted.count(one) for one in wanted)
""",
        "an object too many",
    ),
    (
        "strict_scene",
        """
def strict_scene(found, wanted):
    return found == wanted
""",
        "in another order",
    ),
    (
        "strict_scene",
        """
def strict_scene(found, wanted):
    colours = sorted(c for c, _ in found) == sorted(c for c, _ in wanted)
    shapes = sorted(s for _, s in found) == sorted(s for _, s in wanted)
    return colours and shapes
""",
        "exchanged their colours",
    ),
    (
        "strict_scene",
        """
def strict_scene(found, wanted):
    found.sort()
    wanted.sort()
    return found == wanted
""",
        "changes one of its lists",
    ),
    (
        "strict_scene",
        """
def strict_scene(found, wanted):
    return len(found) == len(wanted) and set(found) == set(wanted)
""",
        "in wrong numbers",
    ),
    (
        "frechet_diagonal",
        """
def frechet_diagonal(mean_a, var_a, mean_b, var_b):
    return ((mean_a - mean_b) ** 2).sum() + ((var_a - var_b) ** 2).sum()
""",
        "take the square root of each first",
    ),
    (
        "frechet_diagonal",
        """
def frechet_diagonal(mean_a, var_a, mean_b, var_b):
    means = ((mean_a - mean_b) ** 2).sum()
    return means + (var_a + var_b - (var_a * var_b).sqrt()).sum()
""",
        "lacks the factor 2",
    ),
    (
        "frechet_diagonal",
        """
def frechet_diagonal(mean_a, var_a, mean_b, var_b):
    return ((mean_a - mean_b) ** 2).mean() + ((var_a.sqrt() - var_b.sqrt()) ** 2).mean()
""",
        "not the sum",
    ),
    (
        "frechet_diagonal",
        """
def frechet_diagonal(mean_a, var_a, mean_b, var_b):
    return (mean_a - mean_b) ** 2 + (var_a.sqrt() - var_b.sqrt()) ** 2
""",
        "has shape (5,), not ()",
    ),
    (
        "unbiased_kid",
        """
def unbiased_kid(x, y):
    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3
    return kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean()
""",
        "leave the diagonal out",
    ),
    (
        "unbiased_kid",
        """
def unbiased_kid(x, y):
    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3
    def within(a):
        k = kernel(a, a)
        return (k.sum() - k.trace()) / len(a) ** 2
    return within(x) + within(y) - 2 * kernel(x, y).mean()
""",
        "divides by n^2",
    ),
    (
        "unbiased_kid",
        """
def unbiased_kid(x, y):
    def kernel(a, b):
        return (a @ b.T + 1) ** 3
    def within(a):
        k = kernel(a, a)
        return (k.sum() - k.trace()) / (len(a) * (len(a) - 1))
    return within(x) + within(y) - 2 * kernel(x, y).mean()
""",
        "does not divide by D",
    ),
    (
        "unbiased_kid",
        """
def unbiased_kid(x, y):
    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3
    def within(a):
        k = kernel(a, a)
        return (k.sum() - k.trace()) / (len(a) * (len(a) - 1))
    return within(x) + within(y) - kernel(x, y).mean()
""",
        "lacks the factor 2",
    ),
    (
        "fool_precision",
        """
def fool_precision(real, count):
    return real[:count]
""",
        "has precision 1, but recall",
    ),
    (
        "fool_precision",
        """
def fool_precision(real, count):
    return 100 + torch.zeros(count, real.shape[1])
""",
        "has precision 0.00",
    ),
    (
        "fool_precision",
        """
def fool_precision(real, count):
    return real[:1]
""",
        "returns shape (1, 4)",
    ),
    (
        "bootstrap_interval",
        """
def bootstrap_interval(values, indices):
    means = values[indices].mean(1)
    return torch.quantile(means, torch.tensor([0.05, 0.95]))
""",
        "an interval of 90 %",
    ),
    (
        "bootstrap_interval",
        """
def bootstrap_interval(values, indices):
    return torch.quantile(values[indices].flatten(), torch.tensor([0.025, 0.975]))
""",
        "take the mean of each set first",
    ),
    (
        "bootstrap_interval",
        """
def bootstrap_interval(values, indices):
    means = values[indices].mean(0)
    return torch.quantile(means, torch.tensor([0.025, 0.975]))
""",
        "another axis",
    ),
    (
        "bootstrap_interval",
        """
def bootstrap_interval(values, indices):
    means = values[indices].mean(1)
    half = 1.96 * means.std()
    return torch.stack([means.mean() - half, means.mean() + half])
""",
        "percentiles of the means are asked for",
    ),
]
