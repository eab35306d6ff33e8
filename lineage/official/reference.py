"""Reading of reference files: weights, inputs and outputs of official code, as safetensors."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lineage.errors import UserError
from lineage.weights import kind_of


@dataclass(frozen=True)
class Reference:
    """One reference file, read.

    Attributes:
        path: where it lies.
        metadata: the file's strings, as they are.
        config: the official configuration.
        state: weights by network, then by official key; the network of a file with only one is "".
        inputs, outputs, checks: tensors by name, without the prefix.
        sentences: what the file says about a tensor, by its full name (`output/img64`).
    """

    path: Path
    metadata: dict[str, str]
    config: dict[str, Any]
    state: dict[str, dict[str, Tensor]] = field(repr=False)
    inputs: dict[str, Tensor] = field(repr=False)
    outputs: dict[str, Tensor] = field(repr=False)
    checks: dict[str, Tensor] = field(default_factory=dict, repr=False)
    sentences: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def source(self) -> str:
        return self.metadata["source"]


def read_reference(path: str | Path) -> Reference:
    """Read a reference file.

    Raises:
        UserError: if there is no such file, or it is not a safetensors file of the form above.
    """
    path = Path(path)
    if kind_of(path) != "safetensors":
        raise UserError(f"{path} is not a safetensors file: name a reference file to verify.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file: {first_line(error)}"
        ) from error
    if "source" not in metadata or "config" not in metadata:
        missing = " and ".join(repr(n) for n in ("source", "config") if n not in metadata)
        raise UserError(f"{path} is not a reference file: its metadata lacks {missing}.")

    groups: dict[str, dict[str, Tensor]] = {"state": {}, "input": {}, "output": {}, "check": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition("/")
        if group not in groups or not rest:
            raise UserError(
                f"{path} is not a reference file: its tensor {name!r} is none of "
                "state/…, input/…, output/…, check/…"
            )
        groups[group][rest] = tensor
    if not groups["output"]:
        raise UserError(f"{path} holds no output/… tensor, so there is nothing to verify.")

    state: dict[str, dict[str, Tensor]] = {}
    for name, tensor in groups["state"].items():
        network, _, key = name.rpartition("/")
        state.setdefault(network, {})[key] = tensor
    return Reference(
        path=path,
        metadata=metadata,
        config=_json_object(path, metadata, "config"),
        state=state,
        inputs=groups["input"],
        outputs=groups["output"],
        checks=groups["check"],
        sentences=_json_object(path, {"tensors": "{}", **metadata}, "tensors"),
    )


def _json_object(path: Path, metadata: dict[str, str], name: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata[name])
    except ValueError as error:
        raise UserError(f"{path}: the metadata {name!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: the metadata {name!r} is not a JSON object.")
    return value


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
