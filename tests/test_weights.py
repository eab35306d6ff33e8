"""Files of weights are recognised by their content; what holds none is named."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lineage.errors import UserError
from lineage.weights import kind_of, read_tensors

TENSORS = {"weight": torch.arange(6.0).view(2, 3)}
NAMES = ("model.safetensors", "model.SAFETENSORS", "model.ckpt", "model.pt", "model.bin", "model")


def save(form: str, path: Path) -> Path:
    if form == "safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=form == "zip")
    return path


@pytest.mark.parametrize("form", ["safetensors", "zip", "pickle"])
@pytest.mark.parametrize("name", NAMES)
def test_the_ending_says_nothing(form: str, name: str, tmp_path: Path) -> None:
    path = save(form, tmp_path / name)
    assert kind_of(path) == form
    tensors = read_tensors(path)
    assert tensors.keys() == TENSORS.keys()
    assert torch.equal(tensors["weight"], TENSORS["weight"])


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea\nsize 169\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is empty", "download it again"]),
        (LFS, ["Git LFS pointer", "git lfs pull"]),
        (b"<!DOCTYPE html>\n<html>", ["web page", "download the file itself"]),
        (b"\n  <html lang=en>", ["web page"]),
        (b'\xef\xbb\xbf<?xml version="1.0"?><Error>AccessDenied</Error>', ["web page"]),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), ["a picture"]),
        (b"\x1f\x8b\x08\x00" + bytes(40), ["an archive", "unpack it"]),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), ["HDF5", "safetensors"]),
        (b"GGUF" + bytes(40), ["GGUF"]),
        (json.dumps({"weight_map": {}}).encode(), ["is text"]),
        ("ein Vogel, größer".encode(), ["is text"]),
        (bytes(range(256)) * 4, ["no checkpoint of a known form"]),
        (b"PK\x03\x04 cut short", ["cut short", "download it again"]),
        ((10**6).to_bytes(8, "little") + b'{"a":', ["cut short"]),
        (b"\x80\x02}q\x00.", ["no checkpoint of tensors alone"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_what_holds_no_weights_is_named(
    content: bytes, words: list[str], name: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_tensors(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert all(word in message for word in words), message


def test_other_archives_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.safetensors", b"{}")
    with pytest.raises(UserError, match="is an archive: unpack it"):
        kind_of(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(20_000_000))
    with pytest.raises(UserError, match=r"would unpack to 0\.0 GB"):
        kind_of(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX pipes")
def test_a_pipe_a_device_and_a_folder_are_named(tmp_path: Path) -> None:
    """A pipe without a writer would be waited for."""
    os.mkfifo(tmp_path / "model.pt")
    for path, what in (
        (tmp_path / "model.pt", "a pipe"),
        (Path("/dev/zero"), "a device"),
        (tmp_path, "a folder"),
    ):
        with pytest.raises(UserError, match=f"is {what}, not a file: name the file of weights"):
            read_tensors(path)
    with pytest.raises(UserError, match="There is no file"):
        read_tensors(tmp_path / "none.pt")


def test_a_long_text_is_known_by_its_beginning(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("bird\n" * 1000 + "vögel" * 1000)
    assert kind_of(tmp_path / "words.txt") == "text"
