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
from typing import Any

import torch
from torch import Tensor

import lineage
from lineage.data.contract import CaptionedDataset
from lineage.errors import UserError
from lineage.evaluate.judge import Judge
from lineage.evaluate.scorer import Scorer, hub_scorer, scorer_for
from lineage.nn.inception import fid_features, load_inception
from lineage.runs import fingerprint_of
from lineage.train.store import (
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


def find_scorer(
    name: str,
    spec: str,
    train: CaptionedDataset,
    unseen: CaptionedDataset,
    device: torch.device,
) -> Scorer | None:
    """The text-fit model called `auto` (the one of this data), `hub:MODEL` or `none`.

    Raises:
        UserError: there is none of that name, or the data cannot teach one.
    """
    if name == "none":
        return None
    if name.startswith("hub:"):
        return hub_scorer(name.removeprefix("hub:"), device)
    if name != "auto":
        raise UserError(f"There is no scorer {name!r}: auto, none or hub:MODEL.")
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
