"""Reading and writing the files of a run folder; a file is whole or absent.

Every file is written to a temporary name in the same folder and then renamed, so that a killed run
or a full disk leaves the last good file in place. Tensors are saved as safetensors, training state
as a torch file that is read with `weights_only=True`: no pickle is ever executed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lineage.errors import UserError
from lineage.files import expanded, write_bytes


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, all of it or nothing."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises `UserError` if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no {path}: is {path.parent} a run folder?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it or train again.") from error


def fingerprint(data: bytes) -> str:
    """A short hash of some bytes."""
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def cache_folder(kind: str) -> Path:
    """The folder of cached results of a kind, in `$LINEAGE_CACHE` or `~/.cache/lineage`."""
    return expanded(os.environ.get("LINEAGE_CACHE") or "~/.cache/lineage") / kind


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors, all of them or nothing."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, safetensors.torch.save(whole, {"format": "pt"}))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read safetensors. Raises `UserError` if the file is missing or broken."""
    try:
        return safetensors.torch.load(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"There is no {path}: has the run saved anything yet?") from None
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file ({error}); train again."
        ) from error


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state (tensors, numbers, text, lists and dicts), all of it or nothing."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(path, buffer.getvalue())


def load_state(path: Path) -> dict[str, Any]:
    """Read a training state without executing anything.

    Raises `UserError` if it is broken or not one of ours.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for files that are cut short or foreign
        first = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise UserError(
            f"{path} is damaged or not a checkpoint of this program ({first[:120]}); "
            "delete it to start this run again from step 0."
        ) from error
    if not isinstance(state, dict) or "step" not in state or "weights" not in state:
        raise UserError(
            f"{path} is not a checkpoint of this program; "
            "delete it to start this run again from step 0."
        )
    return state
