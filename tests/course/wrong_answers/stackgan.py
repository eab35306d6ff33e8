"""Wrong answers to the exercises of `03_stackgan`: exercise, code, words of the sentence."""

WRONG = [
    (
        "augment_condition",
        """
def augment_condition(mu, logvar, eps):
    return mu + logvar.exp() * eps
""",
        "exp(logvar) is the variance",
    ),
    (
        "augment_condition",
        """
def augment_condition(mu, logvar, eps):
    return mu + logvar * eps
""",
        "multiplies eps by logvar itself",
    ),
    (
        "augment_condition",
        """
def augment_condition(mu, logvar, eps):
    return mu + (logvar.detach() / 2).exp() * eps
""",
        "no gradient from c to logvar",
    ),
    (
        "augment_condition",
        """
def augment_condition(mu, logvar, eps):
    eps *= (logvar / 2).exp()
    return mu + eps
""",
        "in place",
    ),
    (
        "condition_kl",
        """
def condition_kl(mu, logvar):
    return -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum()
""",
        "one number for the whole batch",
    ),
    (
        "condition_kl",
        """
def condition_kl(mu, logvar):
    return -0.5 * (1 + logvar - mu**2 - logvar.exp()).mean(1)
""",
        "the mean over C",
    ),
    (
        "condition_kl",
        """
def condition_kl(mu, logvar):
    return 0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(1)
""",
        "never negative",
    ),
    (
        "condition_kl",
        """
def condition_kl(mu, logvar):
    return -0.5 * (1 + logvar - mu**2 - (logvar / 2).exp()).sum(1)
""",
        "which is sigma",
    ),
    (
        "condition_kl",
        """
def condition_kl(mu, logvar):
    return -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(0)
""",
        "not over captions",
    ),
    (
        "stage1_disc_loss",
        """
def stage1_disc_loss(real_logits, wrong_logits, fake_logits, mismatched):
    wrong = (F.softplus(wrong_logits) * mismatched).sum() / mismatched.sum().clamp(min=1)
    return F.softplus(-real_logits).mean() + wrong + F.softplus(fake_logits).mean()
""",
        "each weighs 1/2",
    ),
    (
        "stage1_disc_loss",
        """
def stage1_disc_loss(real_logits, wrong_logits, fake_logits, mismatched):
    wrong = F.softplus(wrong_logits).mean()
    return F.softplus(-real_logits).mean() + (wrong + F.softplus(fake_logits).mean()) / 2
""",
        "counts the pairs whose captions are the same",
    ),
    (
        "stage1_disc_loss",
        """
def stage1_disc_loss(real_logits, wrong_logits, fake_logits, mismatched):
    wrong = (F.softplus(wrong_logits) * mismatched).mean()
    return F.softplus(-real_logits).mean() + (wrong + F.softplus(fake_logits).mean()) / 2
""",
        "divides the wrong pairs by their number",
    ),
    (
        "stage1_disc_loss",
        """
def stage1_disc_loss(real_logits, wrong_logits, fake_logits, mismatched):
    wrong = (F.softplus(wrong_logits) * mismatched).sum() / mismatched.sum()
    return F.softplus(-real_logits).mean() + (wrong + F.softplus(fake_logits).mean()) / 2
""",
        "NaN",
    ),
    (
        "stage1_disc_loss",
        """
def stage1_disc_loss(real_logits, wrong_logits, fake_logits, mismatched):
    wrong = -torch.log(1 - torch.sigmoid(wrong_logits))
    wrong = (wrong * mismatched).sum() / mismatched.sum().clamp(min=1)
    return F.softplus(-real_logits).mean() + (wrong + F.softplus(fake_logits).mean()) / 2
""",
        "NaN or infinity",
    ),
    (
        "stage1_disc_loss",
        """
def stage1_disc_loss(real_logits, wrong_logits, fake_logits, mismatched):
    def loss(logits, target):
        probabilities = torch.sigmoid(logits)
        return F.binary_cross_entropy(
            probabilities, torch.full_like(logits, target), reduction="none"
        )
    wrong = (loss(wrong_logits, 0.0) * mismatched).sum() / mismatched.sum().clamp(min=1)
    return loss(real_logits, 1.0).mean() + (wrong + loss(fake_logits, 0.0).mean()) / 2
""",
        "stops growing at large logits",
    ),
    (
        "stage2_sides",
        """
def stage2_sides(stage1_size, size):
    sides = [stage1_size]
    while sides[-1] < size:
        sides.append(2 * sides[-1])
    return sides
""",
        "the encoder halves the side twice",
    ),
    (
        "stage2_sides",
        """
def stage2_sides(stage1_size, size):
    sides = [stage1_size, stage1_size // 2, stage1_size // 4]
    while sides[-1] <= size:
        sides.append(2 * sides[-1])
    return sides
""",
        "one block too late",
    ),
    (
        "blend_noise",
        """
def blend_noise(start, end, share):
    return (1 - share) * start + share * end
""",
        "weights that sum to 1",
    ),
    (
        "blend_noise",
        """
def blend_noise(start, end, share):
    return share**0.5 * start + (1 - share) ** 0.5 * end
""",
        "the weights are exchanged",
    ),
    (
        "blend_noise",
        """
def blend_noise(start, end, share):
    return math.cos(share * math.pi) * start + math.sin(share * math.pi) * end
""",
        "share 1",
    ),
]
