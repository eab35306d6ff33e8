"""Scored runs in the cache.

A cached result is found by all that it depends on: the weights, the settings of sampling, the real
pictures, prompts and networks of the scores, and the source of this package, which a student may
have changed. So a comparison that goes on scores no run twice.

    $LINEAGE_CACHE/evaluate/KEY.safetensors    pictures, and the scores as JSON among them
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineage.config import RunConfig, to_dict
from lineage.data.contract import fingerprint_of
from lineage.evaluation.features import cached_tensors
from lineage.evaluation.real import PromptSet, RealPictures
from lineage.evaluation.scoring import Failure, ScoredRun

PACKAGE = Path(__file__).parent.parent


def scored_once(run: Path, settings: dict[str, Any], compute: Callable[[], ScoredRun]) -> ScoredRun:
    """Result of `compute` for a run, from the cache if it was scored so before.

    Args:
        run: Run folder.
        settings: All that the scores depend on beside the run and this package, as JSON values.
    """
    inputs = {
        "scored": settings,
        "weights": _hash_of(run / "model.safetensors"),
        "tokenizer": _hash_of(run / "tokenizer.json"),
        "source": source_hash(),
        "torch": torch.__version__,
    }
    return from_tensors(cached_tensors(inputs, lambda: to_tensors(compute())))


def scoring_inputs(
    config: RunConfig, real: RealPictures, prompts: PromptSet | None, seed: int, device: str
) -> dict[str, Any]:
    """What the scores of a run depend on, beside its weights and this package.

    Args:
        config: Configuration of the run.
        real: Real pictures, with the networks of the scores.
        prompts: Prompts, if the judge reads the data.
        seed: Seed of the evaluation.
        device: Type of the device that draws.
    """
    return {
        "run": {name: value for name, value in to_dict(config).items() if name != "train"},
        "features": real.network.name,
        "scorer": real.scorer and [real.scorer.name, real.scorer.protocol],
        "captions": real.captions,
        "prompts": prompts and prompts.protocol(),
        "data": [fingerprint_of(split) for split in (real.data, real.train)],
        "seed": seed,
        "device": device,
    }


def to_tensors(scored: ScoredRun) -> dict[str, Tensor]:
    """A scored run as tensors, in the order in which `from_tensors` takes them apart."""
    document = {"scores": scored.scores, "failures": [one[:3] for one in scored.failures]}
    text = json.dumps(document).encode()
    blank = torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
    pairs = [torch.stack(pair) for pair in scored.nearest]
    return {
        "document": torch.frombuffer(bytearray(text), dtype=torch.uint8),
        "failures": torch.stack([f.picture for f in scored.failures]) if scored.failures else blank,
        "nearest": torch.stack(pairs) if pairs else blank,
    }


def from_tensors(tensors: dict[str, Tensor]) -> ScoredRun:
    """The inverse of `to_tensors`."""
    document = json.loads(tensors["document"].numpy().tobytes())
    failures = [
        Failure(tag, prompt, detected, picture)
        for (tag, prompt, detected), picture in zip(
            document["failures"], tensors["failures"], strict=True
        )
    ]
    return ScoredRun(document["scores"], failures, [(a, b) for a, b in tensors["nearest"]])


def _hash_of(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest() if path.exists() else ""


@functools.cache
def source_hash() -> str:
    """Hash of the Python files of this package."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
