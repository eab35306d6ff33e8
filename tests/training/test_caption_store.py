"""Features of captions in a folder: found again by other runs, whatever has happened to it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_caption_cache import (
    NAMES,
    WORDS,
    Calls,
    Few,
    advance,
    assert_equal,
    encoder,
    frozen,
    stackgan,
    trainer,
)

from lineage import files
from lineage.config import OptimConfig, TrainConfig
from lineage.runs import configure
from lineage.text.contract import TextEncoder
from lineage.text.tokenizer import WordTokenizer
from lineage.training import caption_cache, caption_store
from lineage.training.caption_cache import CaptionCache
from lineage.training.caption_store import CaptionStore
from lineage.training.stage import Stage
from lineage.training.store import read_json


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def filled(folder: Path, text: TextEncoder, captions: list[str] = WORDS) -> CaptionCache:
    """A cache that has encoded some captions and written them."""
    cache = CaptionCache(text, str(folder))
    cache.encode(captions)
    cache.save()
    return cache


def encoded_again(folder: Path, text: TextEncoder, captions: list[str] = WORDS) -> list[str]:
    """Captions that a new cache of the folder encodes; its features are those of no folder."""
    calls = Calls(text)
    features = CaptionCache(text, str(folder)).encode(captions)
    assert_equal(features, CaptionCache(text).encode(captions))
    return calls.encoded()[: -len(set(captions))]  # the last ones are those of no folder


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [10**9, 1])
def test_a_second_run_encodes_nothing(
    name: str,
    size: int,
    tokenizer: WordTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its features are the same, bit for bit, in memory and without room there."""
    monkeypatch.setattr(caption_cache, "CACHE_BYTES", size)
    text = frozen(tokenizer, name)
    whole = filled(tmp_path, text).encode(WORDS[::-1])
    calls = Calls(text)
    second = CaptionCache(text, str(tmp_path))
    for captions in (WORDS[:2], WORDS[::-1], WORDS[1:2] * 3):
        features = second.encode(captions)
    assert calls.encoded() == []
    assert_equal(second.encode(WORDS[::-1]), whole)
    assert len(features) == 3


def test_new_captions_are_added(tokenizer: WordTokenizer, tmp_path: Path) -> None:
    """To those of earlier runs, which are not written again."""
    text = frozen(tokenizer)
    filled(tmp_path, text, WORDS[:3])
    filled(tmp_path, text, WORDS)
    assert len(shards(tmp_path)) == 2
    assert encoded_again(tmp_path, text, [*WORDS, "a ring left"]) == ["a ring left"]


def test_features_are_written_as_they_become_many_or_old(
    tokenizer: WordTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a kill loses few of them."""
    cache = CaptionCache(frozen(tokenizer), str(tmp_path))
    cache.encode(WORDS[:2])
    assert not shards(tmp_path)
    monkeypatch.setattr(caption_store, "SAVE_SECONDS", 0.0)
    cache.encode(WORDS[2:3])
    assert len(shards(tmp_path)) == 1
    monkeypatch.undo()
    monkeypatch.setattr(caption_store, "SHARD_BYTES", 1)
    cache.encode(WORDS[3:5])
    assert len(shards(tmp_path)) == 3


# --- whose features -----------------------------------------------------------------------


def changed_weight(tokenizer: WordTokenizer) -> TextEncoder:
    text = frozen(tokenizer)
    next(text.parameters())[-1, -1] += 1e-6
    return text


OTHERS: dict[str, Callable[[WordTokenizer], TextEncoder]] = {
    "another kind": lambda tokenizer: frozen(tokenizer, "bag"),
    "a weight": changed_weight,
    "max_words": lambda tokenizer: frozen(tokenizer, max_words=31),
    "the tokeniser": lambda tokenizer: frozen(WordTokenizer([*tokenizer.words[::-1]])),
}


@pytest.mark.parametrize("what", OTHERS)
def test_an_encoder_reads_no_others_features(
    what: str, tokenizer: WordTokenizer, tmp_path: Path
) -> None:
    filled(tmp_path, frozen(tokenizer))
    assert sorted(encoded_again(tmp_path, OTHERS[what](tokenizer))) == sorted(WORDS)
    assert encoded_again(tmp_path, frozen(tokenizer)) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_fingerprint_is_of_the_content(name: str, tokenizer: WordTokenizer) -> None:
    """Not of the object; of every weight."""
    text, same = encoder(tokenizer, name), encoder(tokenizer, name)
    assert text.fingerprint() == same.fingerprint()
    for parameter in text.parameters():
        before, value = text.fingerprint(), parameter.detach().flatten()
        value[0] += 1
        assert text.fingerprint() != before


# --- damage -------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def flip_in(tensor: str) -> Callable[[Path], None]:
    """Change a bit in the middle of one tensor of a shard."""

    def change(path: Path) -> None:
        import json

        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        start, end = json.loads(data[8 : 8 + size])[tensor]["data_offsets"]
        flip(path, 8 + size + (start + end) // 2)

    return change


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "text": lambda path: path.write_text("no features"),
    "header": lambda path: flip(path, 20),
    **{f"a bit of {n}": flip_in(n) for n in ("words", "mask", "sentence", "ids", "length")},
    **{f"a bit of {n}": flip_in(n) for n in ("caption", "check", "index")},
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_features_are_made_again(
    what: str, tokenizer: WordTokenizer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One sentence says so; the next run finds all of them."""
    text = frozen(tokenizer)
    filled(tmp_path, text, WORDS[:3])
    (path,) = shards(tmp_path)
    filled(tmp_path, text, WORDS)
    DAMAGE[what](path)
    capfd.readouterr()
    again = encoded_again(tmp_path, text)
    assert again and set(again) <= set(WORDS[:3])
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and str(path) in said and "encoded again" in said
    filled(tmp_path, text)
    assert encoded_again(tmp_path, text) == []


def test_what_a_killed_process_left_is_ignored_and_removed_later(
    tokenizer: WordTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = frozen(tokenizer)
    filled(tmp_path, text)
    (path,) = shards(tmp_path)
    partial = path.with_name(f".{path.name}.1-ab.partial")
    partial.write_bytes(path.read_bytes()[:100])
    assert encoded_again(tmp_path, text) == [] and partial.exists()  # another run may be writing
    monkeypatch.setattr(caption_store, "PARTIAL_SECONDS", -1.0)
    assert encoded_again(tmp_path, text) == [] and not partial.exists()


def test_a_full_disk_costs_no_result(
    tokenizer: WordTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One sentence, then captions are encoded without the folder."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    text = frozen(tokenizer)
    expected = CaptionCache(text).encode(WORDS)
    monkeypatch.setattr(files.os, "replace", full)
    monkeypatch.setattr(caption_store, "SHARD_BYTES", 1)
    cache = CaptionCache(text, str(tmp_path))
    assert_equal(cache.encode(WORDS), expected)
    cache.encode(["a ring left"]), cache.save()
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "No space left" in said and "train.text_cache" in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# --- in a run ---------------------------------------------------------------------------------


def test_a_run_ends_with_the_same_bits_whatever_the_folder_holds(
    tokenizer: WordTokenizer, tmp_path: Path
) -> None:
    """None, empty, some captions, all of them."""
    filled(tmp_path / "some", frozen(tokenizer), WORDS[:3])
    filled(tmp_path / "all", frozen(tokenizer), WORDS)
    weights, encoded = {}, {}
    for folder in ("", "new", "some", "all"):
        text = encoder(tokenizer)
        one = trainer(stackgan, text, Few())
        one.captions.folder = str(tmp_path / folder) if folder else ""
        calls = Calls(text)
        list(advance(one, 7))
        weights[folder], encoded[folder] = one.system.state_dict(), len(calls.encoded())
    for name, tensor in weights[""].items():
        assert all(torch.equal(tensor, other[name]) for other in weights.values()), name
    assert encoded == {"": 6, "new": 6, "some": 3, "all": 0}


def test_the_setting_changes_no_key() -> None:
    """No result depends on it."""

    def key(**train: Any) -> str:
        config = TrainConfig(max_steps=3, **train)
        return Stage("a", Few, {}, optim=OptimConfig(), train=config).key({})

    assert key() == key(text_cache="somewhere") != key(batch_size=3)


def test_a_run_fills_and_reads_the_folder(
    train_run: Callable[..., Any], tmp_path: Path, call: Callable[..., Any]
) -> None:
    """From the command's setting on; a file in its place is refused before training."""
    settings = {"train.text_cache": str(tmp_path / "features")}
    one = train_run(tmp_path / "one", "gan_int_cls", settings)
    (shard,) = shards(tmp_path / "features")
    assert (
        read_json(one.folder / "config.json")["train"]["text_cache"] == settings["train.text_cache"]
    )
    other = train_run(tmp_path / "other", "gan_int_cls", {})
    assert (one.folder / "model.safetensors").read_bytes() == (
        other.folder / "model.safetensors"
    ).read_bytes()
    assert len(CaptionStore(shard.parent)) > 20
    (tmp_path / "file").write_text("")
    options = ["--preset", "smoke", "--set", f"train.text_cache={tmp_path / 'file'}"]
    answer = call("train", "gan_int_cls", *options)
    assert answer.code == 2 and str(tmp_path / "file") in answer.errors
    assert answer.errors.count("\n") == 1
    assert configure("gan_int_cls", preset_name="smoke").train.text_cache == ""
