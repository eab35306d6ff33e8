"""Wrong answers to the exercises of `06_dalle`: the exercise, its code, words of the sentence."""

WRONG = [
    (
        "causal_attention",
        """
def causal_attention(query, key, value):
    return (query @ key.T / query.shape[1] ** 0.5).softmax(1) @ value
""",
        "has no mask",
    ),
    (
        "causal_attention",
        """
def causal_attention(query, key, value):
    scores = query @ key.T / query.shape[1] ** 0.5
    mask = torch.ones_like(scores, dtype=torch.bool).tril()
    return scores.masked_fill(mask, -torch.inf).softmax(1).nan_to_num() @ value
""",
        "inverted mask",
    ),
    (
        "causal_attention",
        """
def causal_attention(query, key, value):
    scores = query @ key.T
    mask = torch.ones_like(scores, dtype=torch.bool).tril()
    return scores.masked_fill(~mask, -torch.inf).softmax(1) @ value
""",
        "square root of the width",
    ),
    (
        "causal_attention",
        """
def causal_attention(query, key, value):
    scores = query @ key.T / query.shape[1] ** 0.5
    return scores.tril().softmax(1) @ value
""",
        "sets hidden scores to 0",
    ),
    (
        "causal_attention",
        """
def causal_attention(query, key, value):
    scores = query @ key.T / query.shape[1] ** 0.5
    return scores.softmax(1).tril() @ value
""",
        "do not sum to 1",
    ),
    (
        "cached_step",
        """
def cached_step(query, key, value, keys, values):
    weights = (keys @ query / len(query) ** 0.5).softmax(0)
    attended = weights @ values
    return attended, torch.cat([keys, key[None]]), torch.cat([values, value[None]])
""",
        "at position 0",
    ),
    (
        "cached_step",
        """
def cached_step(query, key, value, keys, values):
    if not len(keys):
        return value, key[None], value[None]
    attended = (keys @ query / len(query) ** 0.5).softmax(0) @ values
    return attended, torch.cat([keys, key[None]]), torch.cat([values, value[None]])
""",
        "leaves out the new position",
    ),
    (
        "cached_step",
        """
def cached_step(query, key, value, keys, values):
    keys, values = torch.cat([key[None], keys]), torch.cat([value[None], values])
    return (keys @ query / len(query) ** 0.5).softmax(0) @ values, keys, values
""",
        "it comes last",
    ),
    (
        "cached_step",
        """
def cached_step(query, key, value, keys, values):
    every, all_values = torch.cat([keys, key[None]]), torch.cat([values, value[None]])
    return (every @ query / len(query) ** 0.5).softmax(0) @ all_values, keys, values
""",
        "shape (0, 4), not (1, 4)",
    ),
    (
        "cached_step",
        """
def cached_step(query, key, value, keys, values):
    keys, values = torch.cat([keys, key[None]]), torch.cat([values, value[None]])
    return (keys @ query / len(query) ** 0.5).softmax(0) @ values
""",
        "should return three things",
    ),
    (
        "top_k_probs",
        """
def top_k_probs(logits, temperature, top_k):
    smallest = logits.topk(top_k).values[:, -1:]
    return (logits.masked_fill(logits < smallest, -torch.inf) * temperature).softmax(1)
""",
        "multiplies by the temperature",
    ),
    (
        "top_k_probs",
        """
def top_k_probs(logits, temperature, top_k):
    probs = (logits / temperature).softmax(1)
    smallest = probs.topk(top_k).values[:, -1:]
    return probs * (probs >= smallest)
""",
        "each row should sum to 1",
    ),
    (
        "top_k_probs",
        """
def top_k_probs(logits, temperature, top_k):
    smallest = logits.topk(top_k).values[:, -1:]
    return (logits.masked_fill(logits <= smallest, -torch.inf) / temperature).softmax(1)
""",
        "one code too few",
    ),
    (
        "top_k_probs",
        """
def top_k_probs(logits, temperature, top_k):
    return (logits.topk(top_k).values / temperature).softmax(1)
""",
        "the kept codes alone",
    ),
    (
        "sequence_loss",
        """
def sequence_loss(text_nats, has_word, code_nats, text_weight):
    return (1 - text_weight) * text_nats[has_word].mean() + text_weight * code_nats.mean()
""",
        "exchanges the weights",
    ),
    (
        "sequence_loss",
        """
def sequence_loss(text_nats, has_word, code_nats, text_weight):
    text_loss = (text_nats * has_word).mean()
    return text_weight * text_loss + (1 - text_weight) * code_nats.mean()
""",
        "divides by all positions",
    ),
    (
        "sequence_loss",
        """
def sequence_loss(text_nats, has_word, code_nats, text_weight):
    return text_weight * text_nats.mean() + (1 - text_weight) * code_nats.mean()
""",
        "counts padding too",
    ),
    (
        "sequence_loss",
        """
def sequence_loss(text_nats, has_word, code_nats, text_weight):
    text_loss = text_nats[has_word].mean()
    return text_weight * text_loss + (1 - text_weight) * code_nats.mean().item()
""",
        "no gradient",
    ),
    (
        "gumbel_mixture",
        """
def gumbel_mixture(logits, u, tau):
    return (logits / tau - (-u.log()).log()).softmax(1)
""",
        "and not the noise",
    ),
    (
        "gumbel_mixture",
        """
def gumbel_mixture(logits, u, tau):
    return ((logits + (-u.log()).log()) / tau).softmax(1)
""",
        "subtracts the noise",
    ),
    (
        "gumbel_mixture",
        """
def gumbel_mixture(logits, u, tau):
    return ((logits - (-u.log()).log()) / tau).softmax(-1)
""",
        "over the last axis",
    ),
]
