"""Feature networks of FID and similar metrics, scorers by name, and a cache of what they compute
for real pictures.

    judge            the judge's 64 features, for `shapes`; comes with the package
    scorer           the picture embedding of the text-fit model, for any other data
    inception:FILE   the Inception v3 of published FIDs, from a file of its weights

A number from one network says nothing about one from another, so each states its network's name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

import lineage
from lineage.cache import cache_folder, cached
from lineage.data.contract import CaptionedDataset, fingerprint_of, to_unit
from lineage.errors import UserError
from lineage.evaluation.judge import Judge, resized
from lineage.evaluation.scorer import Scorer, clip_scorer, hub_scorer, in_chunks, scorer_for
from lineage.files import expanded
from lineage.nn.inception import fid_features, load_inception
from lineage.pretrained import run_folder
from lineage.runs import load_system
from lineage.system import EmbedsImages, System
from lineage.text.contract import caption_list
from lineage.threads import tuned
from lineage.training.store import fingerprint, load_tensors, read_json, save_tensors, write_json

INCEPTION_BATCH = 50  # pictures

T = TypeVar("T")


class FeatureNetwork(NamedTuple):
    """A network whose features the metrics compare.

    Attributes:
        name: Name that is stated with every number.
        width: D, number of features.
        extract: Function (B, 3, S, S) uint8 -> (B, D) float32; no row depends on the others.
    """

    name: str
    width: int
    extract: Callable[[Tensor], Tensor]


def find_features(name: str, scorer: Scorer | None, device: torch.device) -> FeatureNetwork:
    """The network called `judge`, `scorer` or `inception:FILE`.

    Raises:
        UserError: the name is unknown, or the weights cannot be read.
    """
    if name == "judge":
        judge = Judge.load()
        return FeatureNetwork(f"judge ({judge.fingerprint()})", judge.width, judge.features)
    if name == "scorer":
        if scorer is None:
            raise UserError("--features scorer needs a scorer: leave out --scorer none.")
        return FeatureNetwork(scorer.name, scorer.width, scorer.image)
    if name.startswith("inception:"):
        path = expanded(name.removeprefix("inception:"))
        network = load_inception(path, "fid").to(device)
        name = f"Inception v3 ({path.name}, {fingerprint(path.read_bytes())})"

        def extract(images: Tensor) -> Tensor:
            parts = []
            for part in images.split(INCEPTION_BATCH):
                with tuned("inception", size=len(part)):
                    parts.append(fid_features(network, part).cpu())
            return torch.cat(parts)

        return FeatureNetwork(name, 2048, extract)
    raise UserError(f"There is no feature network {name!r}: judge, scorer or inception:FILE.")


class MatchingScorer:
    """The matching model that a run's system was trained with: AttnGAN's DAMSM, on whole pictures
    and sentences (Xu et al. 2018, section 4).
    """

    kind: str = "damsm"

    def __init__(self, system: System, run: Path) -> None:
        assert isinstance(system, EmbedsImages)
        self.system, self.embed = system, system.image_embedding
        weights = fingerprint((run / "model.safetensors").read_bytes())
        self.name, self.width = f"DAMSM of {run.name} ({weights})", system.text.sentence_dim
        self.protocol: dict[str, Any] = {
            "model": f"DAMSM of run {run.name}",
            "weights": weights,
            "note": "a system that was trained with it scores higher than it deserves",
        }

    @torch.no_grad()
    def image(self, images: Tensor) -> Tensor:
        def encode(part: Tensor) -> Tensor:
            unit = to_unit(resized(part, self.system.size)).to(self.system.device)
            return self.embed(unit)

        return in_chunks(images, encode)

    @torch.no_grad()
    def text(self, captions: list[str]) -> Tensor:
        captions = caption_list(captions)

        def encode(rows: Tensor) -> Tensor:
            return self.system.text.encode([captions[row] for row in rows.tolist()]).sentence

        return in_chunks(torch.arange(len(captions)), encode)


def matching_scorer(run: Path, device: torch.device) -> MatchingScorer:
    """The matching model of a run. Raises `UserError` if it has none."""
    system = load_system(run, str(device))
    if "imported" in read_json(run / "config.json").get("made_with", {}):
        raise UserError(f"{run} was imported without its image encoder; name a trained attngan.")
    if not isinstance(system, EmbedsImages):
        raise UserError(f"{run} was trained without a DAMSM; name a run of attngan.")
    return MatchingScorer(system, run)


def find_scorer(
    name: str,
    spec: str,
    train: CaptionedDataset,
    device: torch.device,
) -> Scorer | None:
    """The text-fit model called `auto` (the one of this data), `clip:RUN`, `hub:MODEL`,
    `damsm:RUN` or `none`.

    Raises:
        UserError: the name is unknown, or a model cannot be trained on the data.
    """
    if name == "none":
        return None
    if name.startswith("hub:"):
        return hub_scorer(str(expanded(name.removeprefix("hub:"), "hub:MODEL")), device)
    if name.startswith("damsm:"):
        return matching_scorer(run_folder(name.removeprefix("damsm:"), "damsm:RUN"), device)
    if name.startswith("clip:"):
        return clip_scorer(name.removeprefix("clip:"), device)
    if name != "auto":
        raise UserError(
            f"There is no scorer {name!r}: auto, none, clip:RUN, hub:MODEL or damsm:RUN."
        )
    return scorer_for(spec, train, fingerprint_of(train), device=device)


# --- cache ------------------------------------------------------------------------------------


def cached_tensors(
    inputs: dict[str, Any], compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Result of `compute`, which is called once for each `inputs`: all that the result depends on.

    A file that a crash has cut short is replaced.
    """
    return _cached(inputs, ".safetensors", compute, load_tensors, save_tensors)


def cached_json(inputs: dict[str, Any], compute: Callable[[], Any]) -> Any:
    """The same for a JSON value."""
    return _cached(inputs, ".json", compute, read_json, write_json)


def _cached(
    inputs: dict[str, Any],
    ending: str,
    compute: Callable[[], T],
    read: Callable[[Path], T],
    write: Callable[[Path, T], None],
) -> T:
    text = json.dumps({**inputs, "lineage": lineage.__version__}, sort_keys=True)
    path = cache_folder("evaluate") / (fingerprint(text.encode()) + ending)
    return cached(path, read, compute, write)
