"""Wrong answers to the exercises of `07_clip`: the exercise, its code, words of the sentence."""

WRONG = [
    (
        "clip_loss",
        """
def clip_loss(image, text, scale):
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    return F.cross_entropy(logits, torch.arange(len(logits)))
""",
        "reads rows only",
    ),
    (
        "clip_loss",
        """
def clip_loss(image, text, scale):
    logits = scale * image @ text.T
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
""",
        "make them unit vectors first",
    ),
    (
        "clip_loss",
        """
def clip_loss(image, text, scale):
    logits = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T / scale
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
""",
        "divides by the scale",
    ),
    (
        "clip_loss",
        """
def clip_loss(image, text, scale):
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    target = torch.arange(len(logits))
    return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
""",
        "should be their mean",
    ),
    (
        "clip_loss",
        """
def clip_loss(image, text, scale):
    logits = scale * F.normalize(image, dim=0) @ F.normalize(text, dim=0).T
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
""",
        "normalises over the batch",
    ),
    (
        "clip_loss",
        """
def clip_loss(image, text, scale):
    return 1 - F.cosine_similarity(image, text).mean()
""",
        "lacks the negatives",
    ),
    (
        "clip_loss",
        """
def clip_loss(image, text, scale):
    image, text = F.normalize(image.detach(), dim=1), F.normalize(text, dim=1)
    logits = scale * image @ text.T
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
""",
        "no gradient from the loss",
    ),
    (
        "smallest_loss",
        """
def smallest_loss(num_pairs, scale):
    return math.log(1 + num_pairs * math.exp(-2 * scale))
""",
        "one fewer than all",
    ),
    (
        "smallest_loss",
        """
def smallest_loss(num_pairs, scale):
    return math.log(1 + (num_pairs - 1) * math.exp(-scale))
""",
        "a cosine of 0",
    ),
    (
        "smallest_loss",
        """
def smallest_loss(num_pairs, scale):
    return math.log(1 + (num_pairs - 1) * math.exp(-2))
""",
        "does not use the scale",
    ),
    (
        "smallest_loss",
        """
def smallest_loss(num_pairs, scale):
    return math.log(1 + (num_pairs - 1) * math.exp(-2 / scale))
""",
        "divides by the scale",
    ),
    (
        "smallest_loss",
        """
def smallest_loss(num_pairs, scale):
    return math.exp(scale) / (math.exp(scale) + (num_pairs - 1) * math.exp(-scale))
""",
        "take minus its logarithm",
    ),
    (
        "mask_same",
        """
def mask_same(logits, captions):
    same = torch.tensor([[a == b for b in captions] for a in captions])
    return logits.masked_fill(same, -torch.inf)
""",
        "hides the diagonal",
    ),
    (
        "mask_same",
        """
def mask_same(logits, captions):
    same = torch.tensor([[a == b for b in captions] for a in captions])
    return logits.masked_fill(same.fill_diagonal_(False), 0.0)
""",
        "no small logit",
    ),
    (
        "mask_same",
        """
def mask_same(logits, captions):
    same = torch.tensor([[a == b for b in captions] for a in captions])
    return logits.masked_fill_(same.fill_diagonal_(False), -torch.inf)
""",
        "in place",
    ),
    (
        "mask_same",
        """
def mask_same(logits, captions):
    same = torch.tensor([[a == b for b in captions] for a in captions])
    return logits.masked_fill(~same, -torch.inf)
""",
        "whose captions differ",
    ),
    (
        "mask_same",
        """
def mask_same(logits, captions):
    logits = logits.clone()
    for i in range(len(captions)):
        for j in range(i):
            if captions[i] == captions[j]:
                logits[i, j] = -torch.inf
    return logits
""",
        "one half of the table",
    ),
    (
        "mask_same",
        """
def mask_same(logits, captions):
    same = torch.tensor([[float(a == b) for b in captions] for a in captions])
    return logits + same.fill_diagonal_(0) * -torch.inf
""",
        "0 times infinity",
    ),
    (
        "ensemble",
        """
def ensemble(features):
    return F.normalize(features.mean(0), dim=-1)
""",
        "lets long vectors weigh more",
    ),
    (
        "ensemble",
        """
def ensemble(features):
    return F.normalize(features, dim=-1).mean(0)
""",
        "normalise them again",
    ),
    (
        "ensemble",
        """
def ensemble(features):
    return F.normalize(F.normalize(features).mean(0))
""",
        "over the classes",
    ),
    (
        "ensemble",
        """
def ensemble(features):
    return F.normalize(F.normalize(features, dim=-1).mean(1), dim=-1)
""",
        "a vector for each template",
    ),
    (
        "stroke_coverage",
        """
def stroke_coverage(points, radius, centres, t):
    s = 1 - t
    curve = torch.stack([s**3, 3 * s**2 * t, 3 * s * t**2, t**3], dim=1) @ points
    return (radius - torch.cdist(centres, curve).amin(1)).clamp(0, 1)
""",
        "lacks the 1/2",
    ),
    (
        "stroke_coverage",
        """
def stroke_coverage(points, radius, centres, t):
    s = 1 - t
    curve = torch.stack([s**3, s**2 * t, s * t**2, t**3], dim=1) @ points
    return (radius - torch.cdist(centres, curve).amin(1) + 0.5).clamp(0, 1)
""",
        "factors 3",
    ),
    (
        "stroke_coverage",
        """
def stroke_coverage(points, radius, centres, t):
    s = 1 - t
    curve = torch.stack([s**3, 3 * s**2 * t, 3 * s * t**2, t**3], dim=1) @ points
    return (torch.cdist(centres, curve).amin(1) < radius).float()
""",
        "only 0 or 1",
    ),
    (
        "stroke_coverage",
        """
def stroke_coverage(points, radius, centres, t):
    return (radius - torch.cdist(centres, points).amin(1) + 0.5).clamp(0, 1)
""",
        "to the control points, not to the curve",
    ),
    (
        "stroke_coverage",
        """
def stroke_coverage(points, radius, centres, t):
    s = 1 - t
    curve = torch.stack([s**3, 3 * s**2 * t, 3 * s * t**2, t**3], dim=1) @ points
    return radius - torch.cdist(centres, curve).amin(1) + 0.5
""",
        "does not clamp",
    ),
    (
        "stroke_coverage",
        """
def stroke_coverage(points, radius, centres, t):
    s = 1 - t
    curve = torch.stack([s**3, 3 * s**2 * t, 3 * s * t**2, t**3], dim=1) @ points.detach()
    return (radius - torch.cdist(centres, curve).amin(1) + 0.5).clamp(0, 1)
""",
        "no gradient from the coverage",
    ),
]
