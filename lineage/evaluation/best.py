"""The best of several: pictures of a caption are drawn, and one that sees both keeps the best
(Ramesh et al. 2021, section 2.6: CLIP ranks 512 pictures of DALL-E).
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
from lineage.evaluation.real import unseen_split
from lineage.evaluation.scorer import Scorer
from lineage.runs import read_config
from lineage.system import System


def best_of(
    system: System,
    captions: Sequence[str],
    scorer: Scorer,
    candidates: int,
    *,
    seed: int = 0,
    **knobs: Any,
) -> tuple[Tensor, Tensor]:
    """For each caption, the picture that the scorer finds most fitting.

    Args:
        captions: C captions.
        candidates: N, pictures drawn of each; the first of them is what `generate` gives alone.

    Returns:
        Pictures (C, 3, S, S) uint8 on the CPU, and the cosines (C, N) of all candidates.
    """
    if candidates < 1:
        raise UserError(f"{candidates} candidates are too few: 1 or more.")
    every = [caption for _ in range(candidates) for caption in captions]
    drawn = [to_bytes(part).cpu() for part in system.generate_in_parts(every, seed=seed, **knobs)]
    images = torch.cat(drawn)
    fit = (scorer.image(images) * scorer.text(every)).sum(1)
    shape = (candidates, len(captions))
    images, fit = images.unflatten(0, shape).transpose(0, 1), fit.view(shape).T
    return images[torch.arange(len(captions)), fit.argmax(1)], fit


def scorer_of_run(name: str, run: Path, device: torch.device) -> Scorer:
    """The scorer called `name`, as `lineage evaluate` knows it, for the data of a run.

    Raises:
        UserError: there is none of that name.
    """
    config = read_config(run)
    train = load_dataset(config.data, "train", config.size, config.seed)
    unseen = unseen_split(config.data, config.size, config.seed)
    scorer = find_scorer(name, config.data, train, unseen, device)
    if scorer is None:
        raise UserError("--best-of needs one who chooses: --scorer auto, hub:MODEL or damsm:RUN.")
    return scorer
