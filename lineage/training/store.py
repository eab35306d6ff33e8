"""Reading and writing the files of a run folder.

A file is whole or absent (`files.write_bytes`), so that a killed run or a full disk leaves the last
good one in place; only `metrics.jsonl` is appended to. Tensors are saved as safetensors, training
state as a torch file that is read with `weights_only=True`: no pickle is ever executed. Both carry
a hash of their bytes, so that a damaged file is never read as other weights; files without one,
such as those of older versions, are read as they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lineage.characters import plain
from lineage.errors import UserError
from lineage.files import NotRegularError, read_regular, write_bytes

MAX_JSON = 256 * 1024**2
"""Number of bytes above which a file is no configuration, tokeniser or score."""


def fingerprint(data: bytes) -> str:
    """A short hash of some bytes."""
    return hashlib.blake2b(data, digest_size=12).hexdigest()


# --- JSON -----------------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, all of it or nothing."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises `UserError` if it is missing or broken."""
    try:
        return json.loads(read_regular(path, MAX_JSON).decode("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"There is no {path}: is {path.parent} a run folder?") from None
    except NotRegularError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read ({_first(error)}); restore it or train again."
        ) from error


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object whose loss costs little; empty if the file is missing or holds none."""
    try:
        value = read_json(path)
    except UserError:
        return {}
    return value if isinstance(value, dict) else {}


def _first(error: BaseException) -> str:
    """The first sentence of an error, short."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return plain(text.splitlines()[0].split(". ")[0][:120])


# --- hashes ---------------------------------------------------------------------------------------

_TENSORS_SEAL = re.compile(rb'"blake2b":"([0-9a-f]{32})",')  # first in the metadata of safetensors
_STATE_SEAL = re.compile(rb"blake2b:([0-9a-f]{32})")  # the comment of a zip archive


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).hexdigest().encode()


def _with_header(data: bytes, header: bytes) -> bytes:
    """Safetensors with another header, padded to eight bytes."""
    size = int.from_bytes(data[:8], "little")
    header = header.rstrip(b" ")
    header += b" " * (-len(header) % 8)
    weights = memoryview(data)[8 + size :]  # a slice of bytes would copy them once more
    return b"".join((len(header).to_bytes(8, "little"), header, weights))


def seal_tensors(data: bytes) -> bytes:
    """Safetensors that hold, in their metadata, the hash of what they were without it."""
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    mark = b'"__metadata__":{'
    return _with_header(
        data, header.replace(mark, mark + b'"blake2b":"' + _digest(data) + b'",', 1)
    )


def unseal_tensors(data: bytes) -> bytes:
    """The inverse of `seal_tensors`. Raises `ValueError` if the hash does not fit."""
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    seal = _TENSORS_SEAL.search(header)
    if seal is None:
        return data
    whole = _with_header(data, header.replace(seal[0], b"", 1))
    if _digest(whole) != seal[1]:
        raise ValueError("its hash does not fit: the file was damaged after it was written")
    return whole


def seal_state(data: bytes) -> bytes:
    """A torch file (a zip archive) whose comment is the hash of what it was without it."""
    comment = b"blake2b:" + _digest(data)
    return data[:-2] + len(comment).to_bytes(2, "little") + comment


def unseal_state(data: bytes) -> bytes:
    """The inverse of `seal_state`. Raises `ValueError` if the hash does not fit."""
    if data[-22:-18] == b"PK\x05\x06":  # the end of an archive without comment
        return data
    length = len(b"blake2b:") + 32
    seal = _STATE_SEAL.fullmatch(data[-length:])
    whole = data[: -length - 2] + b"\0\0"
    if seal is None or _digest(whole) != seal[1]:
        raise ValueError("its hash does not fit: the file was damaged after it was written")
    return whole


# --- tensors --------------------------------------------------------------------------------------


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors, all of them or nothing."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, seal_tensors(safetensors.torch.save(whole, {"format": "pt"})))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read safetensors. Raises `UserError` if the file is missing or damaged."""
    try:
        return safetensors.torch.load(unseal_tensors(read_regular(path)))
    except FileNotFoundError:
        raise UserError(f"There is no {path}: has the run saved anything yet?") from None
    except NotRegularError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, MemoryError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file ({_first(error)}); train again."
        ) from error


# --- training state -------------------------------------------------------------------------------


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state (tensors, numbers, text, lists and dicts), all of it or nothing."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(path, seal_state(buffer.getvalue()))


def load_state(path: Path) -> dict[str, Any]:
    """Read a training state without executing anything.

    Raises `UserError` if it is damaged or not one of ours.
    """
    try:
        data = unseal_state(read_regular(path))
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise ValueError("it is compressed")  # ours are not, and a small file may be a bomb
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        _check_state(state)
    except Exception as error:  # torch raises a dozen kinds for files that are cut short or foreign
        raise UserError(
            f"{path} is damaged or not a checkpoint of this program ({_first(error)}); "
            "delete it to start this stage again from step 0."
        ) from error
    checked: dict[str, Any] = state
    return checked


def _check_state(state: Any) -> None:
    """Raise `ValueError` if a state is not of the form that `Trainer.state` gives it."""
    if not isinstance(state, dict) or not {"stage", "step", "weights", "groups"} <= state.keys():
        raise ValueError("it lacks a stage, a step, weights or groups")
    whole = type(state["step"]) is int and state["step"] >= 0
    if not whole or not isinstance(state["stage"], str):
        raise ValueError("its stage or step is of a wrong type")
    if not isinstance(state["groups"], dict):
        raise ValueError("its groups are of a wrong type")
    if not isinstance(state["weights"], dict) or not all(
        isinstance(name, str) and is_dense(value) for name, value in state["weights"].items()
    ):
        raise ValueError("its weights are not tensors by name")
    keys = state.get("keys", {})
    if not isinstance(keys, dict) or not all(
        isinstance(name, str) and isinstance(key, str) and re.fullmatch(r"[\w-]+-[0-9a-f]{24}", key)
        for name, key in keys.items()
    ):
        raise ValueError("its keys are not those of stages")


def is_dense(value: Any) -> bool:
    """Whether `value` is a dense tensor that holds each of its numbers in memory of its own."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_quantized
        and value.device.type == "cpu"
        and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
        and all(
            stride > 0 for stride, size in zip(value.stride(), value.shape, strict=True) if size > 1
        )
    )


def remove_partials(folder: Path) -> None:
    """Delete temporary files that a killed process left in `folder`; the caller holds its lock."""
    for path in folder.rglob(".*.partial"):
        with contextlib.suppress(OSError):
            path.unlink()
