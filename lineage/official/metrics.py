"""`verify` for the metrics: pytorch-fid, torchmetrics and the formulas of the papers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lineage.evaluation import metrics
from lineage.official.verify import Outcome, Reference


def verify_metrics(reference: Reference) -> Mapping[str, Outcome]:
    """Every metric on the file's features, by the name of its output."""
    given = reference.inputs
    real, fake = given["real"], given["fake"]
    mean, covariance = metrics.mean_and_covariance(real)
    outcomes: dict[str, Outcome] = {
        "mu_real": mean,
        "sigma_real": covariance,
        "fid": lambda: metrics.frechet_distance(real, fake),
        "fid_self": lambda: metrics.frechet_distance(real, real),
        "fid_first10": lambda: metrics.frechet_distance(real[:10], fake[:10]),
        "kid_unbiased": lambda: metrics.kernel_distance(real, fake),
        "kid_unbiased_first_180": lambda: metrics.kernel_distance(real[:180], fake[:180]),
    }
    for k in _neighbours(reference):
        precision, recall = metrics.precision_recall(real, fake, k)
        density, coverage = metrics.density_coverage(real, fake, k)
        outcomes |= {
            f"k{k}/precision": precision,
            f"k{k}/recall": recall,
            f"k{k}/density": density,
            f"k{k}/coverage": coverage,
        }
    if "is_probs" in given:
        splits = reference.outputs["inception_score_splits"].numel()
        outcomes["inception_score_mean_std"] = lambda: torch.tensor(
            metrics.inception_score(given["is_probs"], splits), dtype=torch.float64
        )
        outcomes["inception_score_splits"] = lambda: _split_scores(given["is_probs"], splits)
    if "clip_text" in given:
        text = given["clip_text"]
        pictures = real[: len(text)]
        cosine = torch.nn.functional.cosine_similarity(pictures.double(), text.double())
        outcomes["clip_score"] = metrics.clip_score(pictures, text)
        outcomes["clip_score_torchmetrics_order"] = float((100 * cosine).mean().clamp(min=0))
    if "rprec_image" in given:
        image, candidates = given["rprec_image"], given["rprec_candidates"]
        outcomes["r_precision"] = metrics.r_precision(image, candidates)
        outcomes["rprec_cosine"] = torch.nn.functional.cosine_similarity(
            image[:, None].double(), candidates.double(), dim=-1
        )
    return outcomes


def _neighbours(reference: Reference) -> list[int]:
    """The k of every `k<number>/...` among the outputs."""
    heads = {name.split("/")[0] for name in reference.outputs if "/" in name}
    return sorted(int(head[1:]) for head in heads if head[1:].isdigit())


def _split_scores(probabilities: Tensor, splits: int) -> Tensor:
    parts = torch.tensor_split(probabilities, splits)
    scores = [metrics.inception_score(part, 1)[0] for part in parts]
    return torch.tensor(scores, dtype=torch.float64)
