"""Files that are whole or absent, and readers that execute nothing."""

from __future__ import annotations

import errno
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lineage.errors import UserError
from lineage.files import write_bytes
from lineage.training.log import Log, read_log
from lineage.training.store import (
    load_state,
    load_tensors,
    read_json,
    save_state,
    save_tensors,
    unseal_state,
    unseal_tensors,
    write_json,
)

STATE: dict[str, Any] = {
    "stage": "model",
    "step": 3,
    "weights": {"a": torch.arange(4.0)},
    "groups": {"g": {"optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}, "ema_decay": None}},
}


def full_disk(*arguments: Any, **keywords: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullFile:
    """An open file on a disk that fills up half-way through a write."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> FullFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> None:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        full_disk()


def open_on_full_disk(path: Path, *arguments: Any, **keywords: Any) -> FullFile:
    return FullFile(open(path, *arguments, **keywords))


@pytest.mark.parametrize("fault", ["replace", "fsync", "write"])
def test_a_full_disk_leaves_the_old_file_whole(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of the hour before must survive the one that did not fit."""
    path = tmp_path / "state.pt"
    save_state(path, STATE)
    before = path.read_bytes()
    with monkeypatch.context() as patched:
        if fault == "write":
            patched.setattr("lineage.files.open", open_on_full_disk, raising=False)
        else:
            patched.setattr(os, fault, full_disk)
        with pytest.raises(UserError, match="No space left on device") as caught:
            save_state(path, {**STATE, "step": 4})
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert load_state(path)["step"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_nothing_is_left_where_nothing_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(UserError):
        save_tensors(tmp_path / "model.safetensors", {"a": torch.zeros(2)})
    assert not list(tmp_path.iterdir())


def test_the_file_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the rename, the name holds the old content; the new one is complete by then."""
    path, states = tmp_path / "file", []
    write_bytes(path, b"old")
    original = os.replace

    def replace(source: Any, target: Any) -> None:
        states.append((path.read_bytes(), Path(source).read_bytes(), Path(target)))
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    write_bytes(path, b"new")
    assert states == [(b"old", b"new", path)]
    assert path.read_bytes() == b"new"


def test_a_file_in_the_way_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match="Could not write"):
        write_json(tmp_path / "run" / "config.json", {})


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    tensors = {
        "f": torch.randn(3, 4),
        "i": torch.arange(5),
        "b": torch.tensor([True, False]),
        "h": torch.randn(2).bfloat16(),
        "scalar": torch.tensor(7),
        "turned": torch.randn(3, 4).t(),
        "empty": torch.zeros(0, 3),
    }
    save_tensors(tmp_path / "a", tensors)
    back = load_tensors(tmp_path / "a")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)


def test_state_comes_back_as_it_was(tmp_path: Path) -> None:
    save_state(tmp_path / "state.pt", STATE)
    back = load_state(tmp_path / "state.pt")
    assert torch.equal(back["weights"]["a"], STATE["weights"]["a"])
    assert back["groups"]["g"]["optimizer"]["state"][0]["step"] == 3


def damaged(path: Path) -> list[bytes]:
    """Ways in which a file of tensors is broken."""
    whole = path.read_bytes()
    return [b"", whole[:7], whole[: len(whole) // 2], whole[:-1], b"\xff" * 64, b"<html></html>"]


def test_damaged_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_tensors(path, {"a": torch.randn(50)})
    for content in damaged(path):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"model\.safetensors"):
            load_tensors(path)
    path.unlink()
    with pytest.raises(UserError, match=r"There is no .*model\.safetensors"):
        load_tensors(path)


def test_damaged_state_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_state(path, STATE)
    for content in damaged(path):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"state\.pt") as caught:
            load_state(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("foreign", [[1, 2], {"epoch": 3}, torch.zeros(2), "text", {"step": 1}])
def test_a_foreign_state_is_refused(foreign: Any, tmp_path: Path) -> None:
    torch.save(foreign, tmp_path / "state.pt")
    with pytest.raises(UserError, match="not a checkpoint of this program"):
        load_state(tmp_path / "state.pt")


class Bomb:
    """A pickle that leaves a file behind when it is executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("kind", ["torch", "old torch", "pickle"])
def test_no_pickle_is_executed(kind: str, tmp_path: Path) -> None:
    """A checkpoint from the internet must not be able to run a program."""
    path, trace = tmp_path / "state.pt", tmp_path / "executed"
    content = {"step": 1, "weights": {}, "x": Bomb(trace)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(UserError):
        load_state(path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if kind != "pickle" else pickle.loads(path.read_bytes())
    assert trace.exists()  # the bomb is a real one


def test_json_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match=r"There is no .*config\.json"):
        read_json(path)
    for content in (b"", b"{", b"\xff\xfe", b"nonsense"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"config\.json cannot be read"):
            read_json(path)
    write_json(path, {"ä": [1, None]})
    assert read_json(path) == {"ä": [1, None]}


def line(stage: str, step: int) -> dict[str, Any]:
    return {"stage": stage, "step": step, "seconds": 0.5}


def test_the_log_drops_lines_after_the_checkpoint(tmp_path: Path) -> None:
    """A resumed run would otherwise have the same steps twice, and a comparison two curves."""
    log = Log(tmp_path)
    for stage, step in (("one", 5), ("one", 10), ("two", 5), ("two", 10), ("two", 15)):
        log.write(line(stage, step))
    log.truncate("two", 10)
    log.write(line("two", 12))
    log.close()
    steps = [(entry["stage"], entry["step"]) for entry in read_log(tmp_path / "metrics.jsonl")]
    assert steps == [("one", 5), ("one", 10), ("two", 5), ("two", 10), ("two", 12)]


def test_a_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(line("one", 5)) + "\n" + '{"stage": "one", "st')
    assert read_log(path) == [line("one", 5)]
    log = Log(tmp_path)
    log.truncate("one", 5)
    log.write(line("one", 6))
    assert [entry["step"] for entry in read_log(path)] == [5, 6]
    assert read_log(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize("kind", ["tensors", "state"])
def test_a_flipped_bit_is_never_read(kind: str, tmp_path: Path) -> None:
    """Wherever it is; and a file without a hash, as older versions wrote it, is read."""
    path = tmp_path / kind
    tensors = {"a": torch.randn(50)}
    read: Callable[[Path], dict[str, Any]]
    if kind == "tensors":
        read = load_tensors
        save_tensors(path, tensors)
    else:
        read = load_state
        save_state(path, {**STATE, "weights": tensors})
    whole = path.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 60)):
        changed = bytearray(whole)
        changed[position] ^= 4
        path.write_bytes(changed)
        try:
            value = read(path)
        except UserError:
            continue
        back = value if kind == "tensors" else value["weights"]
        assert torch.equal(back["a"], tensors["a"]), position
    unseal = unseal_tensors if kind == "tensors" else unseal_state
    path.write_bytes(unseal(whole))
    back = read(path)
    assert torch.equal((back if kind == "tensors" else back["weights"])["a"], tensors["a"])


def test_a_compressed_state_is_refused(tmp_path: Path) -> None:
    """A few bytes of it may fill the memory."""
    save_state(tmp_path / "state.pt", STATE)
    with zipfile.ZipFile(tmp_path / "state.pt") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match="compressed"):
        load_state(tmp_path / "bomb.pt")
