"""Networks whose features FID and its kin are computed from, and what is kept of real pictures.

    judge            the judge's, 64 features, for `shapes`; comes with the package
    scorer           the text-fit model's picture embedding, for any other data
    inception:FILE   the Inception v3 of published FIDs, where the user has its weights

A number from one network says nothing about one from another, so each carries its network's name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import lineage
from lineage.data.contract import CaptionedDataset, to_unit
from lineage.errors import UserError
from lineage.evaluation.judge import Judge, resized
from lineage.evaluation.scorer import Scorer, hub_scorer, in_chunks, scorer_for
from lineage.nn.inception import fid_features, load_inception
from lineage.runs import fingerprint_of, load, read_config
from lineage.system import System
from lineage.training.store import (
    cache_folder,
    fingerprint,
    load_tensors,
    read_json,
    save_tensors,
    write_json,
)

ROWS = 1024  # pictures handed to a network at once


@dataclass(frozen=True)
class Features:
    """A feature network.

    Attributes:
        name: what stands beside every number made with it.
        width: D.
        of: (B, 3, S, S) uint8 -> (B, D) float32; a row never depends on the others.
    """

    name: str
    width: int
    of: Callable[[Tensor], Tensor]

    def __call__(self, images: Tensor) -> Tensor:
        return torch.cat([self.of(part) for part in images.split(ROWS)])


def find_features(name: str, scorer: Scorer | None, device: torch.device) -> Features:
    """The network called `judge`, `scorer` or `inception:FILE`.

    Raises:
        UserError: there is none of that name, or its weights cannot be read.
    """
    if name == "judge":
        judge = Judge.load()
        return Features(f"judge ({judge.fingerprint()})", judge.width, judge.features)
    if name == "scorer":
        if scorer is None:
            raise UserError("--features scorer needs a scorer: leave out --scorer none.")
        return Features(scorer.name, scorer.width, scorer.image)
    if name.startswith("inception:"):
        path = Path(name.removeprefix("inception:"))
        network = load_inception(path, "fid").to(device)
        name = f"Inception v3 ({path.name}, {fingerprint(path.read_bytes())})"
        return Features(name, 2048, lambda images: fid_features(network, images).cpu())
    raise UserError(f"There is no feature network {name!r}: judge, scorer or inception:FILE.")


class MatchingScorer:
    """The matching model that a run's system was trained with: AttnGAN's DAMSM, by whole pictures
    and sentences, as Xu et al. 2018, section 4.
    """

    kind: str = "damsm"

    def __init__(self, system: System, run: Path, size: int) -> None:
        self.system, self.size = system, size
        kept = fingerprint((run / "model.safetensors").read_bytes())
        self.name, self.width = f"DAMSM of {run.name} ({kept})", system.text.width
        self.protocol: dict[str, Any] = {
            "model": f"DAMSM of run {run.name}",
            "weights": kept,
            "note": "a system that was trained to please it scores higher than it deserves",
        }

    @torch.no_grad()
    def image(self, images: Tensor) -> Tensor:
        def encode(part: Tensor) -> Tensor:
            unit = to_unit(resized(part, self.size)).to(self.system.device)
            return cast(Tensor, self.system.picture_vectors(unit))

        return in_chunks(images, encode)

    @torch.no_grad()
    def text(self, captions: list[str]) -> Tensor:
        def encode(rows: Tensor) -> Tensor:
            return self.system.text.encode([captions[row] for row in rows.tolist()]).sentence

        return in_chunks(torch.arange(len(captions)), encode)


def matching_scorer(run: Path, device: torch.device) -> MatchingScorer:
    """The matching model of a run. Raises `UserError` if it has none."""
    system, size = load(run, str(device)), read_config(run).size
    if "imported" in read_json(run / "config.json").get("made_with", {}):
        raise UserError(f"{run} was imported without its image encoder; name a trained attngan.")
    blank = torch.zeros(1, 3, size, size, device=system.device)
    with torch.no_grad():
        if system.picture_vectors(blank) is None:
            raise UserError(f"{run} was trained without a DAMSM; name a run of attngan.")
    return MatchingScorer(system, run, size)


def find_scorer(
    name: str,
    spec: str,
    train: CaptionedDataset,
    unseen: CaptionedDataset,
    device: torch.device,
) -> Scorer | None:
    """The text-fit model called `auto` (the one of this data), `hub:MODEL`, `damsm:RUN` or `none`.

    Raises:
        UserError: there is none of that name, or the data cannot teach one.
    """
    if name == "none":
        return None
    if name.startswith("hub:"):
        return hub_scorer(name.removeprefix("hub:"), device)
    if name.startswith("damsm:"):
        return matching_scorer(Path(name.removeprefix("damsm:")), device)
    if name != "auto":
        raise UserError(f"There is no scorer {name!r}: auto, none, hub:MODEL or damsm:RUN.")
    return scorer_for(spec, train, fingerprint_of(train), unseen).to(device)


def kept_tensors(what: dict[str, Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors that `make` gives, made once for each `what`, which names all they depend on."""
    path = _path(what, ".safetensors")
    if path.exists():
        try:
            return load_tensors(path)
        except UserError:  # cut short by a crash: made again
            pass
    tensors = make()
    save_tensors(path, tensors)
    return tensors


def kept_json(what: dict[str, Any], make: Callable[[], Any]) -> Any:
    """The JSON value that `make` gives, likewise."""
    path = _path(what, ".json")
    if path.exists():
        try:
            return read_json(path)
        except UserError:
            pass
    value = make()
    write_json(path, value)
    return value


def _path(what: dict[str, Any], ending: str) -> Path:
    text = json.dumps({**what, "lineage": lineage.__version__}, sort_keys=True)
    return cache_folder("evaluate") / (fingerprint(text.encode()) + ending)
