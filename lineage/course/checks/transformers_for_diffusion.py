"""Checks of `11_transformers_for_diffusion`.

Axes: B pictures, C H W latents, P patch, N tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lineage.course.checking import exercise
from lineage.course.comparing import expect, expect_gradient, untouched

# --- 1 and 2: patches -----------------------------------------------------------------------------


@exercise(points=2)
def patchify(answer: Any) -> None:
    """(B, C, H, W) -> (B, N, P P C), in the order of the authors' unpatchify."""
    z = torch.randn(2, 3, 4, 8)

    def order(pattern: str) -> Tensor:
        return rearrange(z, f"b c (h p) (w q) -> {pattern}", p=2, q=2)

    expect(
        untouched(answer, z, 2),
        order("b (h w) (p q c)"),
        mistakes={
            "puts the channel first within a token: it should be the fastest": order(
                "b (h w) (c p q)"
            ),
            "reads a patch column by column: row before column": order("b (h w) (q p c)"),
            "reads the patches column by column: they stand row by row": order("b (w h) (p q c)"),
            "reshapes the numbers in the order of memory, so that a token is a piece of one row, "
            "not a square": z.reshape(2, 8, 12),
            "strides over the map, so that a token holds numbers that lie far apart": rearrange(
                z, "b c (p h) (q w) -> b (h w) (p q c)", p=2, q=2
            ),
            "reshapes channels last without cutting squares": z.permute(0, 2, 3, 1).reshape(
                2, 8, 12
            ),
        },
    )


@exercise()
def unpatchify(answer: Any) -> None:
    """(B, N, P P C) -> (B, C, H, W)."""
    tokens = torch.randn(2, 8, 12)

    def order(pattern: str) -> Tensor:
        return rearrange(tokens, f"{pattern} -> b c (h p) (w q)", h=2, p=2, q=2)

    expect(
        untouched(answer, tokens, 2, 2),
        order("b (h w) (p q c)"),
        mistakes={
            "expects the channel first within a token: it is the fastest": order("b (h w) (c p q)"),
            "expects a patch column by column": order("b (h w) (q p c)"),
            "places the patches column by column: they stand row by row": order("b (w h) (p q c)"),
            "reshapes the numbers in the order of memory": tokens.reshape(2, 3, 4, 8),
            "scatters each token over the whole map: a token is one square": rearrange(
                tokens, "b (h w) (p q c) -> b c (p h) (q w)", h=2, p=2, q=2
            ),
        },
    )


# --- 3 and 4: adaptive layer norm, zero -----------------------------------------------------------


@exercise()
def modulate_tokens(answer: Any) -> None:
    """x (1 + scale) + shift."""
    x, shift, scale = torch.randn(3, 3, 3), torch.randn(3, 3), torch.randn(3, 3)
    a, b = scale[:, None], shift[:, None]
    expect(
        untouched(answer, x, shift, scale),
        x * (1 + a) + b,
        mistakes={
            "lacks the 1 before the scale: scale 0 should change nothing": x * a + b,
            "exchanges shift and scale": x * (1 + b) + a,
            "broadcasts (B, D) over the batch, as if its rows were tokens: insert the axis of the "
            "tokens": x * (1 + scale) + shift,
            "inserts the axis of the tokens at the end, as if D were the tokens": x
            * (1 + scale[:, :, None])
            + shift[:, :, None],
            "scales the shift too: add it last": (x + b) * (1 + a),
            "leaves out the shift": x * (1 + a),
        },
    )
    scale.requires_grad_()
    expect_gradient(answer(x, shift, scale), scale, "the result to the scale")


@exercise(points=2)
def gated_branch(answer: Any) -> None:
    """x + gate f(norm(x) (1 + scale) + shift)."""
    width = 6
    x, c = torch.randn(2, 5, width), torch.randn(2, width)
    norm = nn.LayerNorm(width, elementwise_affine=False)
    f, modulation = nn.Linear(width, width), nn.Linear(width, 3 * width)
    value = untouched(answer, x, c, norm, f, modulation)

    def branch(shift: Tensor, scale: Tensor, gate: Tensor, normed: Tensor) -> Tensor:
        return gate * f(normed * (1 + scale) + shift)

    def parts(c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shift, scale, gate = modulation(c)[:, None].chunk(3, dim=2)
        return shift, scale, gate

    (shift, scale, gate), twice = parts(c), parts(F.silu(c))
    right = x + branch(shift, scale, gate, norm(x))
    expect(
        value,
        right,
        mistakes={
            "lacks the residual: x itself is missing": right - x,
            "adds f without its gate": x + f(norm(x) * (1 + scale) + shift),
            "opens the gate by 1 + gate: at zero the branch should be closed": right
            + f(norm(x) * (1 + scale) + shift),
            "gates the sum: the gate belongs to the branch alone": gate
            * (x + f(norm(x) * (1 + scale) + shift)),
            "forgets the norm": x + branch(shift, scale, gate, x),
            "takes scale first, then shift": x + branch(scale, shift, gate, norm(x)),
            "takes gate first": x + branch(scale, gate, shift, norm(x)),
            "adds the branch to norm(x), not to x": norm(x) + branch(shift, scale, gate, norm(x)),
            "lacks the 1 before the scale": x + gate * f(norm(x) * scale + shift),
            "modulates the result of f, not its input": x
            + gate * (f(norm(x)) * (1 + scale) + shift),
            "applies another SiLU to c: it has had its own": x + branch(*twice, norm(x)),
        },
    )
    nn.init.zeros_(modulation.weight)
    nn.init.zeros_(modulation.bias)
    zero = answer(x, c, norm, f, modulation)
    expect(zero, x, "with a modulation of zero is not the identity: it")
    expect_gradient(zero, modulation.weight, "the result to the modulation")


# --- 5: positions ---------------------------------------------------------------------------------


@exercise(points=2)
def position_table(answer: Any) -> None:
    """Sines, then cosines, of falling frequencies."""
    length, dim = 5, 8
    p, k = torch.arange(length).double()[:, None], torch.arange(dim // 2).double()

    def table(angles: Tensor) -> Tensor:
        return torch.cat([angles.sin(), angles.cos()], dim=1).float()

    angles = p * 10_000 ** (-k / (dim // 2))
    right = table(angles)
    expect(
        answer(length, dim),
        right,
        mistakes={
            "puts the cosines first": torch.cat([angles.cos(), angles.sin()], dim=1),
            "takes sines and cosines in turn: first all sines, then all cosines": torch.stack(
                [angles.sin(), angles.cos()], dim=2
            ).flatten(1),
            "divides k by D: it should be D / 2": table(p * 10_000 ** (-k / dim)),
            "has a positive exponent: the frequencies should fall": table(
                p * 10_000 ** (k / (dim // 2))
            ),
            "counts positions from 1: the first is 0": table((p + 1) * angles[1]),
            "divides k by D / 2 - 1": table(p * 10_000 ** (-k / (dim // 2 - 1))),
            "has sines alone": torch.cat([angles.sin(), angles.sin()], dim=1),
        },
    )
    expect(answer(3, 4)[0], torch.tensor([0.0, 0.0, 1.0, 1.0]), "at position 0")
