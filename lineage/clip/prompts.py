"""Prompts of a caption, and how far a picture is from them (Crowson et al. 2022, arXiv:2204.08583).

A caption may hold several prompts, `a castle:2 | in fog | people:-0.5`, each with a weight and, as
a third number, a stop.

    distance    2 arcsin(|u - v| / 2)^2 of unit vectors: half the squared angle
                between the features of a cutout and of a prompt         `spherical_distance`
    loss        |w| mean over cutouts of sign(w) distance                `prompt_losses`
    stop        a pair of cutout and prompt whose signed distance is below it passes no gradient

Departures. A colon ends a prompt's text only before a number, so that texts may contain colons, and
blanks around `|` and `:` do not count; the public code fails there, or reads another text.

Axes: B pictures, N cutouts, P prompts of all pictures, F width of CLIP's features.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Prompt(NamedTuple):
    """A part of a caption: its text, its weight, and the signed distance at which it stops."""

    text: str
    weight: float = 1.0
    stop: float = -torch.inf


_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_PROMPT = re.compile(
    rf"(?P<text>.*?)\s*(?::\s*(?P<weight>{_NUMBER})\s*(?::\s*(?P<stop>{_NUMBER}|-inf)\s*)?)?",
    re.DOTALL,
)


def split_prompt(text: str) -> Prompt:
    """`a fox: 2 : 0.5` -> its text, weight and stop; only numbers at the end are cut off."""
    match = _PROMPT.fullmatch(text.strip())
    assert match is not None  # every text fits: weight and stop may be missing
    weight, stop = match["weight"] or "1", match["stop"] or "-inf"
    return Prompt(match["text"], float(weight), float(stop))


def split_prompts(caption: str) -> list[Prompt]:
    """The prompts of a caption, separated by `|`; empty ones are left out if there are others."""
    parts = [part for part in caption.split("|") if part.strip()]
    return [split_prompt(part) for part in parts or [""]]


@dataclass(frozen=True)
class PromptFeatures:
    """Features of the prompts of all pictures.

    Attributes:
        features: (P, F) from CLIP, not normalised.
        weight, stop: (P,).
        row: (P,) int64, the picture that a prompt belongs to.
    """

    features: Tensor
    weight: Tensor
    stop: Tensor
    row: Tensor


def spherical_distance(u: Tensor, v: Tensor) -> Tensor:
    """Half the squared angle between vectors (..., F), broadcast -> (...)."""
    chord = (F.normalize(u, dim=-1) - F.normalize(v, dim=-1)).norm(dim=-1)
    return 2 * (chord / 2).clamp(max=1).arcsin().square()  # rounding must not leave arcsin's range


def prompt_losses(features: Tensor, prompts: PromptFeatures) -> Tensor:
    """|w| times the mean over cutouts of sign(w) times the distance, (P,).

    Pairs whose signed distance is below the stop count in full but pass no gradient.

    Args:
        features: (B, N, F) of the cutouts.
        prompts: Of all pictures.
    """
    own = features[prompts.row]  # (P, N, F)
    distance = spherical_distance(own, prompts.features[:, None])  # (P, N)
    signed = prompts.weight.sign()[:, None] * distance
    signed = torch.where(signed > prompts.stop[:, None], signed, signed.detach())
    return prompts.weight.abs() * signed.mean(1)


def noise_prompt(seed: int, embed_dim: int) -> Tensor:
    """(1, F) random features, the same for every picture."""
    return torch.randn(1, embed_dim, generator=torch.Generator().manual_seed(seed))
