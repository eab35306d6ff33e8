"""Wrong answers to the exercises of `11_transformers_for_diffusion`: the exercise, its code, words
of the sentence.
"""

WRONG = [
    (
        "patchify",
        """
def patchify(z, patch):
    from einops import rearrange

    return rearrange(z, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)
""",
        "channel first",
    ),
    (
        "patchify",
        """
def patchify(z, patch):
    return z.reshape(z.shape[0], -1, patch * patch * z.shape[1])
""",
        "order of memory",
    ),
    (
        "patchify",
        """
def patchify(z, patch):
    from einops import rearrange

    return rearrange(z, "b c (h p) (w q) -> b (w h) (p q c)", p=patch, q=patch)
""",
        "patches column by column",
    ),
    (
        "unpatchify",
        """
def unpatchify(tokens, patch, height):
    from einops import rearrange

    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=patch, q=patch)
""",
        "channel first",
    ),
    (
        "unpatchify",
        """
def unpatchify(tokens, patch, height):
    from einops import rearrange

    return rearrange(tokens, "b (w h) (p q c) -> b c (h p) (w q)", h=height, p=patch, q=patch)
""",
        "column by column",
    ),
    (
        "unpatchify",
        """
def unpatchify(tokens, patch, height):
    from einops import rearrange

    return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", w=height, p=patch, q=patch)
""",
        "shape",
    ),
    (
        "modulate_tokens",
        """
def modulate_tokens(x, shift, scale):
    return x * scale[:, None] + shift[:, None]
""",
        "lacks the 1",
    ),
    (
        "modulate_tokens",
        """
def modulate_tokens(x, shift, scale):
    return x * (1 + scale) + shift
""",
        "insert the axis of the tokens",
    ),
    (
        "modulate_tokens",
        """
def modulate_tokens(x, shift, scale):
    return x.mul_(1 + scale[:, None]) + shift[:, None]
""",
        "in place",
    ),
    (
        "gated_branch",
        """
def gated_branch(x, c, norm, f, modulation):
    shift, scale, gate = modulation(c)[:, None].chunk(3, dim=2)
    return gate * f(norm(x) * (1 + scale) + shift)
""",
        "lacks the residual",
    ),
    (
        "gated_branch",
        """
def gated_branch(x, c, norm, f, modulation):
    shift, scale, gate = modulation(c)[:, None].chunk(3, dim=2)
    return x + f(norm(x) * (1 + scale) + shift)
""",
        "without its gate",
    ),
    (
        "gated_branch",
        """
def gated_branch(x, c, norm, f, modulation):
    scale, shift, gate = modulation(c)[:, None].chunk(3, dim=2)
    return x + gate * f(norm(x) * (1 + scale) + shift)
""",
        "scale first",
    ),
    (
        "gated_branch",
        """
def gated_branch(x, c, norm, f, modulation):
    shift, scale, gate = modulation(c)[:, None].chunk(3, dim=2)
    return x + (1 + gate) * f(norm(x) * (1 + scale) + shift)
""",
        "1 + gate",
    ),
    (
        "position_table",
        """
def position_table(length, dim):
    omega = 10_000 ** (-torch.arange(dim // 2) / dim)
    angles = torch.arange(length)[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)
""",
        "D / 2",
    ),
    (
        "position_table",
        """
def position_table(length, dim):
    omega = 10_000 ** (-torch.arange(dim // 2) / (dim // 2))
    angles = torch.arange(length)[:, None] * omega
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)
""",
        "in turn",
    ),
]
