"""Wrong answers to the exercises of `01_data_and_text`: the exercise, its code, words of the
sentence.
"""

WRONG = [
    (
        "token_ids",
        """
def token_ids(captions, id_of):
    rows = [[id_of[w] for w in caption.split() if w in id_of] for caption in captions]
    length = max(map(len, rows))
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])
""",
        "leaves unknown words out",
    ),
    (
        "token_ids",
        """
def token_ids(captions, id_of):
    rows = [[id_of.get(w, 0) for w in caption.split()] for caption in captions]
    length = max(map(len, rows))
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])
""",
        "which is padding",
    ),
    (
        "token_ids",
        """
def token_ids(captions, id_of):
    rows = [[id_of.get(w, 1) for w in caption.split()] for caption in captions]
    length = max(map(len, rows))
    return torch.tensor([[0] * (length - len(row)) + row for row in rows])
""",
        "pads on the left",
    ),
    (
        "token_ids",
        """
def token_ids(captions, id_of):
    rows = [[id_of.get(w, 1) for w in caption] for caption in captions]
    length = max(map(len, rows))
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])
""",
        "not at letters",
    ),
    (
        "token_ids",
        """
def token_ids(captions, id_of):
    return torch.tensor([[id_of.get(w, 1) for w in caption.split()] for caption in captions])
""",
        "raises ValueError",
    ),
    (
        "token_ids",
        """
def token_ids(captions, id_of):
    rows = [[id_of.get(w, 1) for w in caption.split()] for caption in captions]
    length = max(map(len, rows))
    return torch.tensor([row + [0] * (length - len(row)) for row in rows], dtype=torch.int32)
""",
        "int64",
    ),
    (
        "mean_of_words",
        """
def mean_of_words(words, mask):
    return words.mean(1)
""",
        "averages over padding",
    ),
    (
        "mean_of_words",
        """
def mean_of_words(words, mask):
    return (words * mask[..., None]).mean(1)
""",
        "divides by L",
    ),
    (
        "mean_of_words",
        """
def mean_of_words(words, mask):
    words[~mask] = 0
    return words.sum(1) / mask.sum(1, keepdim=True)
""",
        "in place",
    ),
    (
        "mean_of_words",
        """
def mean_of_words(words, mask):
    return (words * mask).sum(1) / mask.sum(1, keepdim=True)
""",
        "raises RuntimeError",
    ),
    (
        "mean_of_words",
        """
def mean_of_words(words, mask):
    return (words * ~mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
""",
        "inverts the mask in the sum",
    ),
    (
        "state_at_last_word",
        """
def state_at_last_word(words, mask):
    return words[:, -1]
""",
        "padding in shorter captions",
    ),
    (
        "state_at_last_word",
        """
def state_at_last_word(words, mask):
    last = mask.sum(1).clamp(max=mask.shape[1] - 1)
    return words[torch.arange(len(words)), last]
""",
        "one position too far",
    ),
    (
        "state_at_last_word",
        """
def state_at_last_word(words, mask):
    return words[:, mask.sum(1) - 1]
""",
        "axes too many",
    ),
    (
        "same_bag",
        """
def same_bag(first, second, id_of):
    return [id_of.get(w, 1) for w in first.split()] == [id_of.get(w, 1) for w in second.split()]
""",
        "a bag has no order",
    ),
    (
        "same_bag",
        """
def same_bag(first, second, id_of):
    return {id_of.get(w, 1) for w in first.split()} == {id_of.get(w, 1) for w in second.split()}
""",
        "a set forgets how often",
    ),
    (
        "same_bag",
        """
def same_bag(first, second, id_of):
    return sorted(first.split()) == sorted(second.split())
""",
        "both are unknown",
    ),
    (
        "same_bag",
        """
def same_bag(first, second, id_of):
    one, other = (sorted(id_of[w] for w in t.split() if w in id_of) for t in (first, second))
    return one == other
""",
        "an unknown word is missing",
    ),
    (
        "unseen_pairs",
        """
def unseen_pairs(train_scenes, other_scenes):
    known = {pair for scene in train_scenes for pair in scene}
    return {pair for scene in other_scenes for pair in scene} - known
""",
        "both must be known",
    ),
    (
        "unseen_pairs",
        """
def unseen_pairs(train_scenes, other_scenes):
    others = {pair for scene in other_scenes for pair in scene}
    return {pair for scene in train_scenes for pair in scene} - others
""",
        "exchanges its arguments",
    ),
    (
        "unseen_pairs",
        """
def unseen_pairs(train_scenes, other_scenes):
    known = {pair for scene in train_scenes for pair in scene}
    shapes, colours = {shape for shape, _ in known}, {colour for _, colour in known}
    return {(s, c) for s in shapes for c in colours} - known
""",
        "in no other scene",
    ),
]
