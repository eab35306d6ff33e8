"""The verifier of the metrics, on a file of other sizes whose numbers are computed by loops."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lineage.official.verify import OutputCheck, as_text, verify

N, M, WIDTH, K, SPLITS, FIRST = 23, 19, 5, 2, 3, 15
SOURCE = "pytorch-fid (calculate_frechet_distance), torchmetrics 1.9.0 (KID poly_mmd), formulas"
rng = np.random.default_rng(0)
REAL, FAKE = rng.normal(size=(N, WIDTH)), rng.normal(0.5, 1.3, size=(M, WIDTH))
PROBABILITIES = rng.dirichlet(np.ones(4), 17)


def fid(x: np.ndarray, y: np.ndarray) -> float:
    s, t = np.cov(x.T), np.cov(y.T)
    root = np.sqrt(np.clip(np.linalg.eigvals(s @ t).real, 0, None)).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * root)


def kid(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / WIDTH + 1) ** 3

    def within(a: np.ndarray) -> float:
        square = kernel(a, a)
        return float((square.sum() - np.trace(square)) / (len(a) * (len(a) - 1)))

    return within(x) + within(y) - 2 * float(kernel(x, y).mean())


def balls(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N, M) True if y_j lies in the ball of x_i, whose radius is its K-th neighbour's distance."""
    radii = [sorted(np.linalg.norm(x - row, axis=1))[K] for row in x]  # number 0 is the row itself
    return np.array([[np.linalg.norm(a - b) < r for b in y] for a, r in zip(x, radii, strict=True)])


def inception_scores() -> list[float]:
    scores = []
    for part in np.array_split(PROBABILITIES, SPLITS):
        divergence = (part * np.log(part / part.mean(0))).sum(1)
        scores.append(float(np.exp(divergence.mean())))
    return scores


def tensors() -> dict[str, Tensor]:
    inside, scores = balls(REAL, FAKE), inception_scores()
    outputs = {
        "fid": fid(REAL, FAKE),
        f"fid_first{FIRST}": fid(REAL[:FIRST], FAKE[:FIRST]),
        "kid_unbiased": kid(REAL, FAKE),
        f"kid_unbiased_first_{FIRST}": kid(REAL[:FIRST], FAKE[:FIRST]),
        f"k{K}/precision": inside.any(0).mean(),
        f"k{K}/recall": balls(FAKE, REAL).any(0).mean(),
        f"k{K}/density": inside.sum() / (K * M),
        f"k{K}/coverage": inside.any(1).mean(),
        "mu_fake": FAKE.mean(0),
        "sigma_fake": np.cov(FAKE.T),
        "inception_score_splits": scores,
        "inception_score_mean_std": [np.mean(scores), np.std(scores)],
    }
    inputs = {"real": REAL, "fake": FAKE, "is_probs": PROBABILITIES}
    return {
        **{f"input/{name}": torch.tensor(value) for name, value in inputs.items()},
        **{f"output/{n}": torch.as_tensor(v, dtype=torch.float64) for n, v in outputs.items()},
    }


def check(
    folder: Path, content: dict[str, Tensor], **metadata: str
) -> tuple[dict[str, OutputCheck], str]:
    """Each output of a file with such content, and the report."""
    path = folder / "numbers.safetensors"
    save_file(content, path, {"source": SOURCE, "config": "{}", **metadata})
    (result,) = verify([path])
    assert result.system == "metrics"
    return {output.name: output for output in result.outputs}, as_text(result)


def test_every_number_is_read_from_the_file(tmp_path: Path) -> None:
    """Numbers of rows, neighbours and splits, and the width."""
    outputs, report = check(tmp_path, tensors())
    assert len(outputs) == 12 and all(output.passed for output in outputs.values()), report


@pytest.mark.parametrize(
    "metadata",
    [
        {"config": json.dumps({"splits": SPLITS})},
        {"tensors": json.dumps({"output/inception_score_splits": f"{SPLITS} consecutive splits"})},
    ],
)
def test_the_number_of_splits_of_a_mean_alone(metadata: dict[str, str], tmp_path: Path) -> None:
    """From the configuration or the sentence about the parts, if the file lacks the parts."""
    content = tensors()
    del content["output/inception_score_splits"]
    outputs, report = check(tmp_path, content, **metadata)
    assert outputs["inception_score_mean_std"].passed, report


def test_a_mean_of_an_unknown_number_of_splits_is_not_computed(tmp_path: Path) -> None:
    content = tensors()
    del content["output/inception_score_splits"]
    outputs, _ = check(tmp_path, content)
    assert "number of splits" in outputs.pop("inception_score_mean_std").reason
    assert all(output.passed for output in outputs.values())
