"""Best of N: several pictures of each caption are drawn, and a scorer selects the best one (Ramesh
et al. 2021, section 2.6: CLIP ranks 512 pictures of DALL-E).
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
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """For each caption, the picture with the highest cosine to it.

    Args:
        captions: C captions.
        candidates: N, number of pictures of each; the first is what `generate` draws alone.
        **options: Options of the system.

    Returns:
        Pictures (C, 3, S, S) uint8 on the CPU, and the cosines (C, N) of all candidates.
    """
    if candidates < 1:
        raise UserError(f"{candidates} candidates are too few: 1 or more.")
    repeated = [caption for _ in range(candidates) for caption in captions]
    images = to_bytes(system.generate(repeated, seed=seed, **options)).cpu()
    cosines = (scorer.image(images) * scorer.text(repeated)).sum(1)
    shape = (candidates, len(captions))
    images, cosines = images.unflatten(0, shape).transpose(0, 1), cosines.view(shape).T
    return images[torch.arange(len(captions)), cosines.argmax(1)], cosines


def scorer_of_run(name: str, run: Path, device: torch.device) -> Scorer:
    """The scorer called `name`, as in `lineage evaluate`, for the data of a run.

    Raises:
        UserError: the name is unknown, or `none`.
    """
    config = read_config(run)
    train = load_dataset(config.data, "train", config.size, config.seed)
    unseen = unseen_split(config.data, config.size, config.seed)
    scorer = find_scorer(name, config.data, train, unseen, device)
    if scorer is None:
        raise UserError("--best-of needs a scorer: --scorer auto, hub:MODEL or damsm:RUN.")
    return scorer
