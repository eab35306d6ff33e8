"""Wrong answers to the exercises of `04_attngan`: exercise, code, words of the sentence."""

WRONG = [
    (
        "word_contexts",
        """
def word_contexts(hidden, projected, mask):
    scores = torch.einsum("blg,bghw->blhw", projected, hidden)
    return torch.einsum("blhw,blg->bghw", scores.softmax(1), projected)
""",
        "ignores the mask",
    ),
    (
        "word_contexts",
        """
def word_contexts(hidden, projected, mask):
    scores = torch.einsum("blg,bghw->blhw", projected, hidden)
    weights = scores.softmax(1) * mask[:, :, None, None]
    return torch.einsum("blhw,blg->bghw", weights, projected)
""",
        "after the softmax",
    ),
    (
        "word_contexts",
        """
def word_contexts(hidden, projected, mask):
    scores = torch.einsum("blg,bghw->blhw", projected, hidden)
    weights = scores.masked_fill(mask[:, :, None, None], -torch.inf).softmax(1)
    return torch.einsum("blhw,blg->bghw", weights, projected)
""",
        "NaN",
    ),
    (
        "word_contexts",
        """
def word_contexts(hidden, projected, mask):
    scores = torch.einsum("blg,bghw->blhw", projected, hidden) / hidden.shape[1] ** 0.5
    weights = scores.masked_fill(~mask[:, :, None, None], -torch.inf).softmax(1)
    return torch.einsum("blhw,blg->bghw", weights, projected)
""",
        "square root of G",
    ),
    (
        "word_contexts",
        """
def word_contexts(hidden, projected, mask):
    batch, _, height, width = hidden.shape
    scores = torch.einsum("blg,bghw->bhwl", projected, hidden).flatten(0, 2)
    mask = mask.repeat(height * width, 1)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(1)
    weights = weights.view(batch, height, width, -1)
    return torch.einsum("bhwl,blg->bghw", weights, projected)
""",
        "caption r % B",
    ),
    (
        "region_weights",
        """
def region_weights(words, regions, gamma1):
    return (gamma1 * words @ regions.T).softmax(1)
""",
        "leaves out the softmax over words",
    ),
    (
        "region_weights",
        """
def region_weights(words, regions, gamma1):
    return (gamma1 * (words @ regions.T).softmax(1)).softmax(1)
""",
        "where equation 8 is over words",
    ),
    (
        "region_weights",
        """
def region_weights(words, regions, gamma1):
    return (gamma1 * (words @ regions.T).softmax(1)).softmax(0)
""",
        "columns that sum to 1",
    ),
    (
        "region_weights",
        """
def region_weights(words, regions, gamma1):
    return gamma1 * (words @ regions.T).softmax(1)
""",
        "rows that sum to 4",
    ),
    (
        "region_weights",
        """
def region_weights(words, regions, gamma1):
    return (gamma1 * (regions @ words.T).softmax(1)).softmax(0)
""",
        "two axes are exchanged",
    ),
    (
        "caption_score",
        """
def caption_score(words, contexts, gamma2):
    return (gamma2 * (words * contexts).sum(1)).exp().sum().log()
""",
        "divide by both lengths",
    ),
    (
        "caption_score",
        """
def caption_score(words, contexts, gamma2):
    return F.cosine_similarity(words, contexts, dim=1).exp().sum().log()
""",
        "lacks gamma_2",
    ),
    (
        "caption_score",
        """
def caption_score(words, contexts, gamma2):
    return (gamma2 * F.cosine_similarity(words, contexts, dim=1)).exp().mean().log()
""",
        "the mean over words",
    ),
    (
        "caption_score",
        """
def caption_score(words, contexts, gamma2):
    return (gamma2 * F.cosine_similarity(words, contexts, dim=1)).exp().log().sum()
""",
        "before the sum",
    ),
    (
        "pair_loss",
        """
def pair_loss(similarity):
    return F.cross_entropy(similarity, torch.arange(len(similarity)))
""",
        "lacks L_2",
    ),
    (
        "pair_loss",
        """
def pair_loss(similarity):
    own = torch.arange(len(similarity))
    return F.cross_entropy(similarity, own) + F.cross_entropy(similarity, own)
""",
        "counts L_1 twice",
    ),
    (
        "pair_loss",
        """
def pair_loss(similarity):
    own = torch.arange(len(similarity))
    loss = F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)
    return torch.tensor(loss.item())
""",
        "no gradient",
    ),
    (
        "own_mask_share",
        """
def own_mask_share(batch, positions):
    return 1 / batch
""",
        "only where positions is a multiple",
    ),
    (
        "own_mask_share",
        """
def own_mask_share(batch, positions):
    rows = range(batch * positions)
    return sum(r // positions == r % batch for r in rows)
""",
        "returns a number of rows",
    ),
]
