"""Learning curves: how often a picture is right, at shares of the budget.

Each run saved its averaged weights on the way (`train.snapshots`). They are scored afterwards, so
that training's clock does not stand still, on the prompts and seeds of the whole evaluation: by the
share of the six tasks where the judge reads the data, else by R-precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lineage.data.contract import to_bytes
from lineage.evaluation import sections
from lineage.evaluation.intervals import seeds_score
from lineage.evaluation.prompt_files import kind_seed
from lineage.evaluation.real import PromptSet, RealPictures
from lineage.evaluation.run import EvalConfig
from lineage.evaluation.scored import scored_once, scoring_inputs
from lineage.evaluation.scoring import ScoredRun
from lineage.evaluation.seeds import runs_score, tasks_of
from lineage.plan import read_config
from lineage.runs import load_system
from lineage.training.cost import read_cost
from lineage.training.machine import pick_device
from lineage.training.run_stages import SNAPSHOTS

SHARES = (0.125, 0.25, 0.5)
"""Shares of the budget at which a run is scored before its end."""

Point = dict[str, Any]
"""{"share", "seconds", "cpu_seconds", "pictures", "flops": of all stages so far; "score"}."""


def curves(
    runs: Mapping[str, Sequence[Path]],
    finals: Mapping[str, Sequence[dict[str, Any]]],
    real: RealPictures,
    prompts: PromptSet | None,
    scoring: EvalConfig,
) -> dict[str, list[Point]]:
    """Points of each system, its runs together; those with fewer snapshots give fewer points.

    Args:
        runs: Run folders of each system, by seed.
        finals: Scores of the finished runs.
    """
    result: dict[str, list[Point]] = {}
    for name, folders in runs.items():
        of_share: dict[float, list[tuple[Path, dict[str, Any]]]] = {}
        for folder, final in zip(folders, finals[name], strict=True):
            for snapshot in (folder / SNAPSHOTS).glob("*/config.json"):
                place = snapshot.parent
                section = _scored(place, real, prompts, scoring)
                of_share.setdefault(float(place.name), []).append((place, section))
            of_share.setdefault(1.0, []).append((folder, final))
        points = [_point(share, of_share[share]) for share in sorted(of_share)]
        result[name] = [point for point in points if point["score"] is not None]
    return result


def _scored(
    snapshot: Path, real: RealPictures, prompts: PromptSet | None, scoring: EvalConfig
) -> dict[str, Any]:
    """The section `composition` of a snapshot, or `text_fit`."""

    def compute() -> ScoredRun:
        system = load_system(snapshot, scoring.device)
        if prompts:
            captions = [prompt.prompt for prompt in prompts.prompts]
            pictures = to_bytes(system.generate(captions, seed=scoring.seed)).cpu()
            verdicts = prompts.verdicts(prompts.judge.detect(pictures))
            section = {"composition": sections.composition(prompts.prompts, verdicts)}
        elif real.scorer:
            seed = kind_seed(scoring.seed, "caption")
            pictures = to_bytes(system.generate(real.captions, seed=seed)).cpu()
            image, text = real.scorer.image(pictures), real.scorer.text(real.captions)
            section = {"text_fit": real.text_fit(image, text, real.captions)}
        else:
            section = {}
        return ScoredRun(section, [], [])

    device = pick_device(scoring.device).type
    inputs = scoring_inputs(read_config(snapshot), real, prompts, scoring.seed, device)
    return scored_once(snapshot, {"snapshot": inputs}, compute).scores


def _point(share: float, runs: Sequence[tuple[Path, dict[str, Any]]]) -> Point:
    """One point from the runs that were scored there."""
    costs = [list(read_cost(folder).values()) for folder, _ in runs]
    means = {
        name: math.fsum(stage.get(name, math.nan) for stages in costs for stage in stages)
        / len(runs)
        for name in ("seconds", "cpu_seconds", "pictures", "flops")
    }
    known = {name: value for name, value in means.items() if math.isfinite(value)}
    return {"share": share, **known, "score": score_of([scores for _, scores in runs])}


def score_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The score that a curve shows, of runs together; None where nothing was measured."""
    if all("composition" in run for run in runs):
        return seeds_score([tasks_of(run["composition"]["test"]["verdicts"]) for run in runs])
    precisions = [run.get("text_fit", {}).get("r_precision") for run in runs]
    scores = [one for one in precisions if one is not None]
    if len(scores) < len(runs):
        return None
    if len(scores) == 1:
        return dict(scores[0])
    return runs_score([one["value"] for one in scores], scores[0]["n"])


def score_name(judged: bool) -> str:
    """What the curve shows, in words."""
    return "share right, six tasks" if judged else "R-precision"
