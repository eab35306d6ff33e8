"""Files of weights: what a file is, by its content and not by its name, and its tensors.

Nothing in a file is executed: a pickle is read with `weights_only=True`.
"""

from __future__ import annotations

import codecs
import io
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from lineage.characters import plain
from lineage.errors import UserError
from lineage.files import NotRegularError, check_regular, expanded, stand_in

HEAD = 512
"""Number of bytes by which a file is recognised."""

_FOREIGN: dict[bytes, str] = {
    b"\x89PNG": "a picture: name the file of weights",
    b"\xff\xd8\xff": "a picture: name the file of weights",
    b"\x89HDF": "an HDF5 file, as Keras writes: convert it to safetensors",
    b"GGUF": "a GGUF file: name the safetensors that it was made from",
    b"\x93NUMPY": "a NumPy array: convert it to safetensors",
    b"\x1f\x8b": "an archive: unpack it, and name the file of weights",
    b"BZh": "an archive: unpack it, and name the file of weights",
    b"\xfd7zXZ": "an archive: unpack it, and name the file of weights",
    b"7z\xbc\xaf": "an archive: unpack it, and name the file of weights",
    b"Rar!": "an archive: unpack it, and name the file of weights",
    b"%PDF": "a PDF: name the file of weights",
}
"""First bytes of files that hold no weights, what they are, and what to do."""


def kind_of(path: Path) -> str:
    """What a file of weights is: `safetensors`, `zip` (torch 1.6 and later) or `pickle`; `text` for
    plain text.

    Raises:
        UserError: it is missing, or holds something else; the sentence says what, and what to do.
    """
    name = plain(path)
    try:
        size = check_regular(path)
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except FileNotFoundError:
        raise UserError(f"There is no file {name}.") from None
    except NotRegularError as error:
        what = f"{error.strerror}".removeprefix("it is ")
        raise UserError(f"{name} is {what}: name the file of weights.") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}.") from error
    if not size:
        raise UserError(f"{name} is empty: copy or download it again.")
    if instead := stand_in(head):
        raise UserError(f"{name} is {instead}.")
    for first_bytes, what in _FOREIGN.items():
        if head.startswith(first_bytes):
            raise UserError(f"{name} is {what}.")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**40:
        if 8 + int.from_bytes(head[:8], "little") > size:
            raise UserError(f"{name} is cut short: copy or download it again.")
        return "safetensors"
    if head.startswith(b"PK"):
        _check_archive(path, size)
        return "zip"
    if head.startswith(b"\x80"):
        return "pickle"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "text"
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head, final=size <= HEAD)
    except UnicodeDecodeError:
        text = "\0"
    if all(char.isprintable() or char.isspace() for char in text):
        return "text"
    raise UserError(f"{name} is no checkpoint of a known form: name a .safetensors, .pt or .pth.")


def _check_archive(path: Path, size: int) -> None:
    """Raise `UserError` if a zip archive is not one that `torch.save` writes."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is cut short: copy or download it again.") from error
    if not any(member.filename.endswith("data.pkl") for member in members):
        raise UserError(f"{path} is an archive: unpack it, and name the file of weights.")
    unpacked = sum(member.file_size for member in members)
    if unpacked > 4 * size + 2**20:  # torch compresses nothing
        raise UserError(
            f"{path} would unpack to {unpacked / 1e9:,.1f} GB: save it again with torch.save."
        )


def _without_program(path: Path) -> BinaryIO:
    """An archive; of one that holds a TorchScript program too, as OpenAI's CLIPs do, the tensors
    and the tree of modules alone, as `torch.save` writes them.
    """
    with zipfile.ZipFile(path) as archive:
        names = [(name, name.partition("/")[2]) for name in archive.namelist()]
        if all(inner != "constants.pkl" for _, inner in names):
            return open(path, "rb")
        tensors = io.BytesIO()
        with zipfile.ZipFile(tensors, "w") as copy:
            for name, inner in names:
                if inner.startswith("data/") or inner in ("data.pkl", "version", "byteorder"):
                    copy.writestr(name, archive.read(name))
        tensors.seek(0)
        return tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name. Raises as `read`, and for a file that holds something else."""
    state = read(path)
    is_state_dict = isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    )
    if not is_state_dict:
        raise UserError(f"{path} is not a state dict (names and their tensors).")
    return state


def read(path: Path, placeholder: type | None = None) -> Any:
    """What a file of weights holds, most often tensors by name, on the CPU.

    Args:
        placeholder: Class whose instances stand for objects of foreign classes; without it, a file
            with such objects is refused.

    Raises:
        UserError: the file is missing, damaged or of another kind; the sentence says what to do.
    """
    path = expanded(path)
    kind = kind_of(path)
    if kind == "text":
        raise UserError(f"{path} is text: name the file of weights.")
    try:
        if kind == "safetensors":
            return safetensors.torch.load_file(path)
        if placeholder is None or kind != "zip":  # older files held no classes
            with open(path, "rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)  # by its content
        with _without_program(path) as file:
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            stand_ins: list[Any] = [(placeholder, name) for name in foreign]
            file.seek(0)
            with torch.serialization.safe_globals(stand_ins):
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of a dozen kinds, for files that are foreign or cut short
        line = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise UserError(f"{path} is no checkpoint of tensors alone ({line[:120]}).") from error
