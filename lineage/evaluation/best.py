"""The best of several pictures: a scorer ranks the candidates of each caption and keeps the best
(Ramesh et al. 2021, section 2.6: CLIP ranks 512 pictures of DALL-E).

Axes: B captions, N candidates of each, S side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineage.data import load_dataset
from lineage.data.contract import to_bytes
from lineage.errors import UserError
from lineage.evaluation.features import find_scorer
from lineage.evaluation.scorer import Scorer
from lineage.runs import read_config
from lineage.system import System
from lineage.text.contract import caption_list


def best_of(
    system: System,
    captions: Sequence[str],
    scorer: Scorer,
    candidates: int,
    *,
    seed: int = 0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """For each caption, the candidate with the highest cosine to it.

    Args:
        system: System that draws.
        captions: B captions; one string is one caption.
        scorer: Scorer that ranks the candidates.
        candidates: N; the first B pictures are those that `generate` draws of `captions`.
        seed: Seed of the noise.
        **options: Options of the system's `sample`; a picture option serves all captions.

    Returns:
        Pictures (B, 3, S, S) uint8 on the CPU, and the cosines (B, N) of all candidates.
    """
    captions = caption_list(captions)
    if candidates < 1:
        raise UserError(f"{candidates} candidates are too few: 1 or more.")
    repeated = [caption for _ in range(candidates) for caption in captions]
    images = to_bytes(system.generate(repeated, seed=seed, **options)).cpu()
    cosines = (scorer.image(images) * scorer.text(repeated)).sum(1)
    shape = (candidates, len(captions))
    images, cosines = images.unflatten(0, shape).transpose(0, 1), cosines.view(shape).T
    return images[torch.arange(len(captions)), cosines.argmax(1)], cosines


def scorer_of_run(name: str, run: Path, device: torch.device) -> Scorer:
    """The scorer `name` of `lineage evaluate`, for the data of a run.

    Raises:
        UserError: there is no scorer of that name.
    """
    config = read_config(run)
    train = load_dataset(config.data, "train", config.size, config.seed)
    scorer = find_scorer(name, config.data, train, device)
    if scorer is None:
        raise UserError(
            "--best-of needs a scorer: --scorer auto, clip:RUN, hub:MODEL or damsm:RUN."
        )
    return scorer
