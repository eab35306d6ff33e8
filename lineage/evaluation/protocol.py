"""What a reader of scores must know: how each section was made, and warnings."""

from __future__ import annotations

from typing import Any

from lineage.evaluation import sections
from lineage.evaluation.cost import machine
from lineage.evaluation.real import SPREAD_SAMPLES, RealPictures


def protocol_of(real: RealPictures | None, seed: int, seeds: tuple[int, int]) -> dict[str, Any]:
    """How the scores of each section were made.

    Args:
        real: Real pictures; None if there are only scores of prompts.
        seed: Seed of the evaluation.
        seeds: Seeds of the pictures of real captions, and of several samples of one caption.
    """
    protocol: dict[str, Any] = {
        "intervals": "95 %, bootstrap over pictures; Wilson's if all have one verdict",
        "cost": {"machine": machine(), "captions": "of real pictures"},
    }
    if real is None:
        return protocol
    features = {"features": real.network.name, "width": real.network.width}
    sample = {
        **features,
        "real": len(real.images),
        "generated": len(real.images),
        "real_split": real.data.split,
        "captions": "the first of each real picture",
        "size": real.data.size,
        "seed": seeds[0],
    }
    protocol |= {
        "quality": {
            **sample,
            "neighbours_of_precision_and_recall": sections.PRECISION_NEIGHBOURS,
            "neighbours_of_density_and_coverage": sections.DENSITY_NEIGHBOURS,
            "kid": "unbiased, polynomial kernel of degree 3, all pictures",
            "real_row": "training pictures against the unseen ones",
        },
        "diversity": {
            "features": real.network.name,
            "captions": len(real.shared_captions()[0]),
            "samples_of_each": SPREAD_SAMPLES,
            "distance": "mean Euclidean distance of two samples",
            "seed": seeds[1],
        },
        "memorisation": {**sample, "training_pictures": len(real.train_features)},
        "stages": {
            "pictures": len(real.images),
            "real_split": real.data.split,
            "nats_per_code": "of the true codes, each given the caption and all codes before it",
            "bits_per_dim": "of bytes: the prior's, and the decoder's density given the codes",
            "reconstruction": "real pictures of the prompts, encoded, decoded and judged",
        },
    }
    if real.scorer:
        protocol["text_fit"] = {
            "scorer": real.scorer.name,
            "kind": real.scorer.kind,
            "scorer_protocol": real.scorer.protocol,
            "used_in_training": False,
            "wrong_captions": sections.WRONG_CAPTIONS,
            "wrong_captions_from": "other pictures, all with other words",
            "pictures": len(real.images),
            "seed": seed,
        }
    return protocol


def warnings_of(real: RealPictures, document: dict[str, Any]) -> list[str]:
    """What a reader of the scores must know."""
    warnings = []
    if real.data.split == "train":
        warnings.append(
            f"{real.data.name} has no validation or test split: real pictures are training "
            "pictures, so memorisation says nothing."
        )
    for row in (document["real"], *document["runs"]):
        quality = row.get("quality", {})
        warnings += [quality[key] for key in ("warning", "reason") if key in quality]
    ceiling = document["real"].get("text_fit", {}).get("r_precision", {}).get("value", 1.0)
    if ceiling < 0.5:
        warnings.append(
            f"The scorer finds the true caption of only {ceiling:.0%} of unseen real pictures: "
            "R-precision and CLIP score say little here; --scorer hub:MODEL names a better one."
        )
    if real.scorer is None:
        warnings.append("Text fit was not measured, because no scorer was named.")
    return list(dict.fromkeys(warnings))
