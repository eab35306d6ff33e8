"""Wrong answers to the exercises of `02_first_gans`: the exercise, its code, words of the
sentence.
"""

WRONG = [
    (
        "object_mask",
        """
def object_mask(picture, ground, threshold):
    return (picture - ground[:, None, None]).amax(0) > threshold
""",
        "forgets the absolute value",
    ),
    (
        "object_mask",
        """
def object_mask(picture, ground, threshold):
    return (picture - ground[:, None, None]).abs().mean(0) > threshold
""",
        "mean over the channels",
    ),
    (
        "object_mask",
        """
def object_mask(picture, ground, threshold):
    return (picture - ground[:, None, None]).abs() > threshold
""",
        "a mask for each channel",
    ),
    (
        "object_mask",
        """
def object_mask(picture, ground, threshold):
    return (picture - ground[:, None, None]).abs().amax(0) < threshold
""",
        "inverts the mask",
    ),
    (
        "object_mask",
        """
def object_mask(picture, ground, threshold):
    return (picture - ground).abs().amax(0) > threshold
""",
        "raises RuntimeError",
    ),
    (
        "object_mask",
        """
def object_mask(picture, ground, threshold):
    picture -= ground[:, None, None]
    return picture.abs().amax(0) > threshold
""",
        "in place",
    ),
    (
        "matching_aware_loss",
        """
def matching_aware_loss(s_r, s_w, s_f):
    return F.softplus(-s_r).mean() + F.softplus(s_w).mean() + F.softplus(s_f).mean()
""",
        "lacks the factor 1/2",
    ),
    (
        "matching_aware_loss",
        """
def matching_aware_loss(s_r, s_w, s_f):
    d_r, d_w, d_f = s_r.sigmoid(), s_w.sigmoid(), s_f.sigmoid()
    return -d_r.log().mean() - ((1 - d_w).log().mean() + (1 - d_f).log().mean()) / 2
""",
        "is infinite for logits of 200",
    ),
    (
        "matching_aware_loss",
        """
def matching_aware_loss(s_r, s_w, s_f):
    return F.softplus(-s_r).mean() + F.softplus(s_f).mean()
""",
        "leaves the wrong pairs out",
    ),
    (
        "matching_aware_loss",
        """
def matching_aware_loss(s_r, s_w, s_f):
    return F.softplus(-s_r).mean() + (F.softplus(-s_w).mean() + F.softplus(s_f).mean()) / 2
""",
        "accepts wrong pairs",
    ),
    (
        "matching_aware_loss",
        """
def matching_aware_loss(s_r, s_w, s_f):
    return F.softplus(-s_r) + (F.softplus(s_w) + F.softplus(s_f)) / 2
""",
        "take the mean over the batch",
    ),
    (
        "matching_aware_loss",
        """
def matching_aware_loss(s_r, s_w, s_f):
    eps = 1e-12
    d_r, d_w, d_f = s_r.sigmoid(), s_w.sigmoid(), s_f.sigmoid()
    return -(d_r + eps).log().mean() - ((1 - d_w + eps).log() + (1 - d_f + eps).log()).mean() / 2
""",
        "saturates for large logits",
    ),
    (
        "wrong_pair_loss",
        """
def wrong_pair_loss(s_w, captions):
    return F.softplus(s_w).mean()
""",
        "counts all rows",
    ),
    (
        "wrong_pair_loss",
        """
def wrong_pair_loss(s_w, captions):
    differs = torch.tensor([a != b for a, b in zip(captions, captions[1:] + captions[:1])])
    return (F.softplus(s_w) * differs).sum() / differs.sum().clamp(min=1)
""",
        "compares with the row after",
    ),
    (
        "wrong_pair_loss",
        """
def wrong_pair_loss(s_w, captions):
    differs = torch.tensor([captions[i] != captions[i - 1] for i in range(len(captions))])
    return F.softplus(s_w)[differs].mean()
""",
        "is NaN if all captions are equal",
    ),
    (
        "wrong_pair_loss",
        """
def wrong_pair_loss(s_w, captions):
    differs = torch.tensor([captions[i] != captions[i - 1] for i in range(len(captions))])
    return (F.softplus(s_w) * differs).mean()
""",
        "divides by B",
    ),
    (
        "wrong_pair_loss",
        """
def wrong_pair_loss(s_w, captions):
    differs = torch.tensor([captions[i] is not captions[i - 1] for i in range(len(captions))])
    return (F.softplus(s_w) * differs).sum() / differs.sum().clamp(min=1)
""",
        "equal captions may be two objects",
    ),
    (
        "mix_sentences",
        """
def mix_sentences(h, beta):
    return beta * h + (1 - beta) * h.roll(1, 1)
""",
        "rolls the axis of the features",
    ),
    (
        "mix_sentences",
        """
def mix_sentences(h, beta):
    return (1 - beta) * h + beta * h.roll(1, 0)
""",
        "exchanges beta and 1 - beta",
    ),
    (
        "mix_sentences",
        """
def mix_sentences(h, beta):
    return (h + h.roll(1, 0)) / 2
""",
        "one half whatever beta is",
    ),
    (
        "best_discriminator",
        """
def best_discriminator(p_r, p_w, p_f):
    return p_r / (p_r + p_w + p_f)
""",
        "lacks the factor 1/2",
    ),
    (
        "best_discriminator",
        """
def best_discriminator(p_r, p_w, p_f):
    return p_r / (p_r + p_f)
""",
        "leaves the wrong pairs out",
    ),
    (
        "best_discriminator",
        """
def best_discriminator(p_r, p_w, p_f):
    return p_r / ((p_w + p_f) / 2)
""",
        "add p_r below the line",
    ),
]
